// The entries of a session's configuration that its kernels keep to. They are read at the
// registration, and from 1.24 on once more by every kernel, which then also sees those that were
// set after it.
#pragma once

#include "ort/register.h"

namespace lucid {
namespace ort {

constexpr char kTableMemoryEntry[] = "lucid.table_memory";
constexpr char kMaxOutputBytesEntry[] = "lucid.max_output_bytes";

Status* SessionTableMemory(const Runtime& runtime, const KernelInfo* info, TableMemory* memory);

// A positive whole number; anything else is an invalid argument.
lucid::Status ParseMaxOutputBytes(const char* text, int64_t* bytes);

Status* SessionMaxOutputBytes(const Runtime& runtime, const KernelInfo* info, int64_t* bytes);

}  // namespace ort
}  // namespace lucid
