// A constant table of a node, in the memory that its session chose.
#pragma once

#include <memory>

#include "ort/register.h"

namespace lucid {
namespace ort {

// The session config entry; its values are those of ParseTableMemory.
constexpr char kTableMemoryEntry[] = "lucid.table_memory";

// PlaceTable as the session of this kernel says. *table may change, and lives as long as *keep and
// the session do. A copy that takes long is told to the session's log, as a warning: it is why the
// session does not start.
Status* PlaceConstantTable(const Runtime& runtime, const KernelInfo* info, size_t bytes,
                           const void** table, std::shared_ptr<const void>* keep);

// JoinRows as the session of this kernel says.
Status* JoinConstantRows(const Runtime& runtime, const KernelInfo* info, const RowPart* parts,
                         size_t num_parts, size_t rows, JoinedRows* joined);

}  // namespace ort
}  // namespace lucid
