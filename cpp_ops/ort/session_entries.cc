#include "ort/session_entries.h"

#include <cstdint>

namespace lucid {
namespace ort {
namespace {

// Calls parse(text) if the kernel's session has the entry.
template <class F>
Status* ReadEntry(const Runtime& runtime, const KernelInfo* info, const char* key, const F& parse) {
  const Api* api = runtime.api;
  if (!runtime.has_data_reference) return nullptr;
  KeyValuePairs* entries = nullptr;
  Status* status = Call<KernelInfo_GetConfigEntries>(api, info, &entries);
  if (status) return status;
  const char* const text = Call<GetKeyValue>(api, entries, key);
  const lucid::Status parsed = text ? parse(text) : lucid::Status();
  Call<ReleaseKeyValuePairs>(api, entries);
  return parsed.ok() ? nullptr : Call<CreateStatus>(api, kInvalidArgument, parsed.message);
}

}  // namespace

Status* SessionTableMemory(const Runtime& runtime, const KernelInfo* info, TableMemory* memory) {
  *memory = runtime.table_memory;
  return ReadEntry(runtime, info, kTableMemoryEntry,
                   [&](const char* text) { return ParseTableMemory(text, memory); });
}

lucid::Status ParseMaxOutputBytes(const char* text, int64_t* bytes) {
  int64_t value = 0;
  bool valid = *text != 0;
  for (const char* c = text; *c && valid; ++c) {
    valid = *c >= '0' && *c <= '9' && value <= (INT64_MAX - (*c - '0')) / 10;
    if (valid) value = value * 10 + (*c - '0');
  }
  if (!valid || value == 0) {
    return InvalidArgument("%s = '%.100s' is not a positive whole number", kMaxOutputBytesEntry,
                           text);
  }
  *bytes = value;
  return lucid::Status();
}

Status* SessionMaxOutputBytes(const Runtime& runtime, const KernelInfo* info, int64_t* bytes) {
  *bytes = runtime.max_output_bytes;
  return ReadEntry(runtime, info, kMaxOutputBytesEntry,
                   [&](const char* text) { return ParseMaxOutputBytes(text, bytes); });
}

}  // namespace ort
}  // namespace lucid
