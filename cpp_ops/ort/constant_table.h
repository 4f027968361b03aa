// A constant table of a node, in the memory that its session chose.
#pragma once

#include <memory>

#include "ort/register.h"

namespace lucid {
namespace ort {

// PlaceTable, with the choice of this kernel's session. *table may change, and is valid as long as
// *keep and the session are. A copy that takes long is logged to the session as a warning, since
// the session waits for it.
Status* PlaceConstantTable(const Runtime& runtime, const KernelInfo* info, size_t bytes,
                           const void** table, std::shared_ptr<const void>* keep);

// JoinRows, with the choice of this kernel's session.
Status* JoinConstantRows(const Runtime& runtime, const KernelInfo* info, const RowPart* parts,
                         size_t num_parts, size_t rows, JoinedRows* joined);

}  // namespace ort
}  // namespace lucid
