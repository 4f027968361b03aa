// The entry point that ONNX Runtime looks for in a custom-op library.
#include "ort/register.h"

#include <cstdlib>
#include <mutex>
#include <new>
#include <string>

#include "base/isa.h"
#include "ort/constant_table.h"

namespace lucid {
namespace ort {
namespace {

struct Registration {
  Runtime runtime;
  CustomOpDomain* domain;
  Registration* next;
};

// Never freed: sessions keep pointers to the domain's ops without saying for how long.
Registration* g_registrations = nullptr;
std::mutex g_mutex;

// "1.24.1" -> 24. Asking GetApi for a version that is not there would print to stderr.
int MinorVersion(const char* version) {
  char* end = nullptr;
  const long major = std::strtol(version, &end, 10);
  if (major > 1) return 1000;
  return *end == '.' ? static_cast<int>(std::strtol(end + 1, nullptr, 10)) : 0;
}

// One domain per runtime and choice of table memory, for all SessionOptions.
Status* FindDomain(const ApiBase* base, const Api* api, TableMemory table_memory,
                   CustomOpDomain** domain) {
  const std::lock_guard<std::mutex> lock(g_mutex);
  for (const Registration* r = g_registrations; r; r = r->next) {
    if (r->runtime.api == api && r->runtime.table_memory == table_memory) {
      *domain = r->domain;
      return nullptr;
    }
  }
  Registration* r = new Registration;
  r->runtime.api = api;
  r->runtime.table_memory = table_memory;
  r->runtime.has_data_reference = MinorVersion(base->GetVersionString()) >= kDataReferenceMinor;
  r->next = g_registrations;
  Status* status = Call<CreateCustomOpDomain>(api, "ai.lucid", &r->domain);
  if (status) {
    delete r;
    return status;
  }
  status = AddEmbeddingBagOps(r->runtime, r->domain);
  if (status) {
    Call<ReleaseCustomOpDomain>(api, r->domain);
    delete r;
    return status;
  }
  g_registrations = r;
  *domain = r->domain;
  return nullptr;
}

// The session's choice. Kernels can ask for it from 1.24 on, and do: see constant_table.cc. Before,
// nobody but the registration sees the session options, and only what was set before it. So the
// choice is part of the domain, on every version, and a wrong one is refused here with its code.
Status* ReadTableMemory(const Api* api, const SessionOptions* options, TableMemory* table_memory) {
  *table_memory = TableMemory::kAuto;
  int is_set = 0;
  Status* status = Call<HasSessionConfigEntry>(api, options, kTableMemoryEntry, &is_set);
  if (status || !is_set) return status;
  size_t size = 0;  // with the terminating zero
  status = Call<GetSessionConfigEntry>(api, options, kTableMemoryEntry, nullptr, &size);
  if (status) return status;
  std::string text(size, '\0');
  status = Call<GetSessionConfigEntry>(api, options, kTableMemoryEntry, &text[0], &size);
  if (status) return status;
  const lucid::Status parsed = ParseTableMemory(text.c_str(), table_memory);
  return parsed.ok() ? nullptr : Call<CreateStatus>(api, kInvalidArgument, parsed.message);
}

Status* Register(SessionOptions* options, const ApiBase* base, const Api* api) {
  Isa isa;
  const lucid::Status found = ActiveIsa(&isa);
  if (!found.ok()) return Call<CreateStatus>(api, kInvalidArgument, found.message);
  TableMemory table_memory;
  Status* status = ReadTableMemory(api, options, &table_memory);
  if (status) return status;
  CustomOpDomain* domain = nullptr;
  status = FindDomain(base, api, table_memory, &domain);
  return status ? status : Call<AddCustomOpDomain>(api, options, domain);
}

}  // namespace
}  // namespace ort
}  // namespace lucid

#if defined(_WIN32)
#define LUCID_EXPORT __declspec(dllexport)
#else
#define LUCID_EXPORT __attribute__((visibility("default")))
#endif

extern "C" LUCID_EXPORT lucid::ort::Status* LUCID_ORT_CALL
RegisterCustomOps(lucid::ort::SessionOptions* options, const lucid::ort::ApiBase* base) {
  using namespace lucid::ort;
  const Api* api = base->GetApi(kApiVersion);
  if (!api) {
    // CreateStatus is slot 0 of the first table there ever was.
    return Call<CreateStatus>(base->GetApi(1), kFail,
                              "lucid_onnx needs ONNX Runtime 1.17 or later");
  }
  try {
    return Register(options, base, api);
  } catch (...) {
    return Call<CreateStatus>(api, kFail, "lucid_onnx: out of memory");
  }
}
