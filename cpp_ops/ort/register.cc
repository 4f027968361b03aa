// The entry point that ONNX Runtime looks for in a custom-op library.
#include "ort/register.h"

#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>
#include <string>

#include "base/isa.h"

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

Status* AddOps(const Runtime& runtime, CustomOpDomain* domain) {
  Status* status = nullptr;
#if !defined(LUCID_EMULATE_CUDA)  // there both would be the CPU's
  status = AddEmbeddingBagOps(runtime, domain);
#endif
#if defined(LUCID_WITH_CUDA)
  if (!status) status = AddCudaEmbeddingBagOps(runtime, domain);
#endif
  return status;
}

// What the session configuration lucid.bounds_check says.
Status* ReadBoundsCheck(const Api* api, const SessionOptions* options, bool* deferred) {
  constexpr char kKey[] = "lucid.bounds_check";
  *deferred = false;
  int there = 0;
  Status* status = Call<HasSessionConfigEntry>(api, options, kKey, &there);
  if (status || !there) return status;
  size_t size = 0;
  status = Call<GetSessionConfigEntry>(api, options, kKey, static_cast<char*>(nullptr), &size);
  if (status) return status;
  std::string value(size, '\0');  // with the final zero
  status = Call<GetSessionConfigEntry>(api, options, kKey, &value[0], &size);
  if (status) return status;
  value.resize(std::strlen(value.c_str()));
  *deferred = value == "deferred";
  if (*deferred || value == "report") return nullptr;
  return Call<CreateStatus>(api, kInvalidArgument,
                            (kKey + (" = " + value) + " is not report or deferred").c_str());
}

// One domain per runtime and way to check, for all SessionOptions.
Status* FindDomain(const ApiBase* base, const Api* api, bool deferred, CustomOpDomain** domain) {
  const std::lock_guard<std::mutex> lock(g_mutex);
  for (const Registration* r = g_registrations; r; r = r->next) {
    if (r->runtime.api == api && r->runtime.deferred_bounds == deferred) {
      *domain = r->domain;
      return nullptr;
    }
  }
  Registration* r = new Registration;
  r->runtime.api = api;
  r->runtime.has_data_reference = MinorVersion(base->GetVersionString()) >= kDataReferenceMinor;
  r->runtime.deferred_bounds = deferred;
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

Status* Register(SessionOptions* options, const ApiBase* base, const Api* api) {
  Isa isa;
  const lucid::Status found = ActiveIsa(&isa);
  if (!found.ok()) return Call<CreateStatus>(api, kInvalidArgument, found.message);
  bool deferred = false;
  Status* status = ReadBoundsCheck(api, options, &deferred);
  if (status) return status;
  CustomOpDomain* domain = nullptr;
  status = FindDomain(base, api, deferred, &domain);
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
