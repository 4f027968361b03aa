// The entry point that ONNX Runtime looks for in a custom-op library.
#include "ort/register.h"

#if defined(__linux__)
#include <pthread.h>
#endif

#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>
#include <string>

#include "base/isa.h"
#include "ort/session_entries.h"

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

#if defined(__linux__)
// A child that is forked while another thread registers would find the mutex taken for ever.
const int g_at_fork =
    pthread_atfork([] { g_mutex.lock(); }, [] { g_mutex.unlock(); }, [] { g_mutex.unlock(); });
#endif

// "1.24.1" -> 24. Asking GetApi for a version that is not there would print to stderr.
int MinorVersion(const char* version) {
  char* end = nullptr;
  const long major = std::strtol(version, &end, 10);
  if (major > 1) return 1000;
  return *end == '.' ? static_cast<int>(std::strtol(end + 1, nullptr, 10)) : 0;
}

Status* AddOps(const Runtime& runtime, CustomOpDomain* domain) {
  Status* status = nullptr;
#if !defined(LUCID_EMULATE_CUDA)  // there both would be the CPU's
  status = AddEmbeddingBagOps(runtime, domain);
  if (!status) status = AddEmbeddingBagGradOps(runtime, domain);
  if (!status) status = AddEmbeddingBagCollectionOps(runtime, domain);
#endif
#if defined(LUCID_WITH_CUDA)
  if (!status) status = AddCudaEmbeddingBagOps(runtime, domain);
  if (!status) status = AddCudaEmbeddingBagCollectionOps(runtime, domain);
#if !defined(LUCID_WITHOUT_CUB)  // else gradients stay with the CPU's provider
  if (!status) status = AddCudaEmbeddingBagGradOps(runtime, domain);
#endif
#endif
  return status;
}

// What the session options say that the kernels cannot ask for on every version.
struct Choices {
  BoundsCheck bounds_check = BoundsCheck::kReport;
  TableMemory table_memory = TableMemory::kAuto;
  int64_t max_output_bytes = INT64_MAX;

  bool operator==(const Choices& other) const {
    return bounds_check == other.bounds_check && table_memory == other.table_memory &&
           max_output_bytes == other.max_output_bytes;
  }
};

// One domain per runtime and choices, for all SessionOptions.
Status* FindDomain(const ApiBase* base, const Api* api, const Choices& choices,
                   CustomOpDomain** domain) {
  const std::lock_guard<std::mutex> lock(g_mutex);
  for (const Registration* r = g_registrations; r; r = r->next) {
    if (r->runtime.api == api && Choices{r->runtime.bounds_check, r->runtime.table_memory,
                                         r->runtime.max_output_bytes} == choices) {
      *domain = r->domain;
      return nullptr;
    }
  }
  Registration* r = new Registration;
  r->runtime.api = api;
  r->runtime.has_data_reference = MinorVersion(base->GetVersionString()) >= kDataReferenceMinor;
  r->runtime.bounds_check = choices.bounds_check;
  r->runtime.table_memory = choices.table_memory;
  r->runtime.max_output_bytes = choices.max_output_bytes;
  r->next = g_registrations;
  Status* status = Call<CreateCustomOpDomain>(api, "ai.lucid", &r->domain);
  if (status) {
    delete r;
    return status;
  }
  status = AddOps(r->runtime, r->domain);
  if (status) {
    Call<ReleaseCustomOpDomain>(api, r->domain);
    delete r;
    return status;
  }
  g_registrations = r;
  *domain = r->domain;
  return nullptr;
}

// An entry of the session configuration, and whether it is there.
Status* ReadEntry(const Api* api, const SessionOptions* options, const char* key, bool* is_set,
                  std::string* value) {
  int found = 0;
  Status* status = Call<HasSessionConfigEntry>(api, options, key, &found);
  *is_set = found != 0;
  if (status || !found) return status;
  size_t size = 0;  // with the terminating zero
  status = Call<GetSessionConfigEntry>(api, options, key, static_cast<char*>(nullptr), &size);
  if (status) return status;
  value->assign(size, '\0');
  status = Call<GetSessionConfigEntry>(api, options, key, &(*value)[0], &size);
  value->resize(std::strlen(value->c_str()));
  return status;
}

// The session's choices. Kernels can ask for them from 1.24 on, and do for table memory and the
// size of outputs: see session_entries.h. Before, nobody but the registration sees the session
// options, and only what was set before it. So the choices are part of the domain, on every
// version, and a wrong one is reported here, with its code.
Status* ReadChoices(const Api* api, const SessionOptions* options, Choices* choices) {
  bool is_set;
  std::string value;
  Status* status = ReadEntry(api, options, kTableMemoryEntry, &is_set, &value);
  if (status) return status;
  if (is_set) {
    const lucid::Status parsed = ParseTableMemory(value.c_str(), &choices->table_memory);
    if (!parsed.ok()) return Call<CreateStatus>(api, kInvalidArgument, parsed.message);
  }
  status = ReadEntry(api, options, kMaxOutputBytesEntry, &is_set, &value);
  if (status) return status;
  if (is_set) {
    const lucid::Status parsed = ParseMaxOutputBytes(value.c_str(), &choices->max_output_bytes);
    if (!parsed.ok()) return Call<CreateStatus>(api, kInvalidArgument, parsed.message);
  }
  constexpr char kBoundsCheckEntry[] = "lucid.bounds_check";
  status = ReadEntry(api, options, kBoundsCheckEntry, &is_set, &value);
  if (status || !is_set) return status;
  choices->bounds_check = value == "deferred" ? BoundsCheck::kDeferred
                          : value == "run"    ? BoundsCheck::kRun
                                              : BoundsCheck::kReport;
  if (choices->bounds_check != BoundsCheck::kReport || value == "report") return nullptr;
  return Call<CreateStatus>(
      api, kInvalidArgument,
      (kBoundsCheckEntry + (" = " + value) + " is not report, deferred or run").c_str());
}

Status* Register(SessionOptions* options, const ApiBase* base, const Api* api) {
  Isa isa;
  const lucid::Status found = ActiveIsa(&isa);
  if (!found.ok()) return Call<CreateStatus>(api, kInvalidArgument, found.message);
  Choices choices;
  Status* status = ReadChoices(api, options, &choices);
  if (status) return status;
  CustomOpDomain* domain = nullptr;
  status = FindDomain(base, api, choices, &domain);
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
