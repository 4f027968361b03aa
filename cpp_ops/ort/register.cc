// The entry point that ONNX Runtime looks for in a custom-op library.
#include "ort/register.h"

#include <cstdlib>
#include <mutex>
#include <new>

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

// One domain per runtime, for all SessionOptions.
Status* FindDomain(const ApiBase* base, const Api* api, CustomOpDomain** domain) {
  const std::lock_guard<std::mutex> lock(g_mutex);
  for (const Registration* r = g_registrations; r; r = r->next) {
    if (r->runtime.api == api) {
      *domain = r->domain;
      return nullptr;
    }
  }
  Registration* r = new Registration;
  r->runtime.api = api;
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

Status* Register(SessionOptions* options, const ApiBase* base, const Api* api) {
  Isa isa;
  const lucid::Status found = ActiveIsa(&isa);
  if (!found.ok()) return Call<CreateStatus>(api, kInvalidArgument, found.message);
  CustomOpDomain* domain = nullptr;
  Status* status = FindDomain(base, api, &domain);
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
