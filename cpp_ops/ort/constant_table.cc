#include "ort/constant_table.h"

#include <cstdio>

#include "ort/session_entries.h"

namespace lucid {
namespace ort {
namespace {

struct Log {
  const Api* api;
  const KernelInfo* info;
};

void Tell(void* host, size_t done, size_t total) {
  const Log& log = *static_cast<const Log*>(host);
  const Logger* logger = nullptr;
  Status* status = Call<KernelInfo_GetLogger>(log.api, log.info, &logger);
  if (!status) {
    char text[160];
    std::snprintf(text, sizeof(text),
                  "lucid_onnx: %zu of %zu MiB of a table are copied to huge pages "
                  "(lucid.table_memory)",
                  done >> 20, total >> 20);
#if defined(_WIN32)
    const OrtChar* const file = L"constant_table.cc";
#else
    const OrtChar* const file = "constant_table.cc";
#endif
    status = Call<Logger_LogMessage>(log.api, logger, kLogWarning, text, file, __LINE__, "Tell");
  }
  // Failing to log is not an error.
  if (status) Call<ReleaseStatus>(log.api, status);
}

}  // namespace

Status* PlaceConstantTable(const Runtime& runtime, const KernelInfo* info, size_t bytes,
                           const void** table, std::shared_ptr<const void>* keep) {
  TableMemory memory;
  Status* status = SessionTableMemory(runtime, info, &memory);
  if (status) return status;
  Log log = {runtime.api, info};
  const lucid::Status placed = PlaceTable(memory, bytes, {Tell, &log}, table, keep);
  if (placed.ok()) return nullptr;
  return Call<CreateStatus>(runtime.api,
                            placed.code == Code::kInvalidArgument ? kInvalidArgument : kFail,
                            placed.message);
}

Status* JoinConstantRows(const Runtime& runtime, const KernelInfo* info, const RowPart* parts,
                         size_t num_parts, size_t rows, JoinedRows* joined) {
  TableMemory memory;
  Status* status = SessionTableMemory(runtime, info, &memory);
  if (status) return status;
  Log log = {runtime.api, info};
  *joined = JoinRows(memory, parts, num_parts, rows, {Tell, &log});
  return nullptr;
}

}  // namespace ort
}  // namespace lucid
