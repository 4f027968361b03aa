#include "c_api_cuda.h"

#include <cstdio>

#include "embedding_bag/cuda.h"

using lucid::Status;

static_assert(sizeof(LucidBoundsError) == 56 && sizeof(LucidCudaPlan) == 160,
              "the mirrors of other languages");

namespace {

int Answer(const Status& status, char* message, size_t message_size) {
  if (message_size > 0) std::snprintf(message, message_size, "%s", status.message);
  return static_cast<int>(status.code);
}

Status Run(const EmbeddingBagArgs& args, void* scratch, int64_t scratch_bytes,
           LucidBoundsError* error, void* stream) {
  LucidCudaPlan plan;
  const Status status = lucid::PlanCudaEmbeddingBag(args, &plan);
  if (!status.ok()) return status;
  if (scratch_bytes < plan.scratch_bytes) {
    return lucid::Refuse("scratch_bytes = %lld is less than the %lld that the plan asks for",
                         static_cast<long long>(scratch_bytes),
                         static_cast<long long>(plan.scratch_bytes));
  }
  if (plan.scratch_bytes > 0 && (!scratch || reinterpret_cast<uintptr_t>(scratch) % 256 != 0)) {
    return lucid::Refuse("scratch lies at %p, which is no multiple of 256", scratch);
  }
  if (!error || reinterpret_cast<uintptr_t>(error) % 8 != 0) {
    return lucid::Refuse("error lies at %p, which is no multiple of 8", static_cast<void*>(error));
  }
  return lucid::LaunchCudaEmbeddingBag(args, plan, scratch, error, stream);
}

}  // namespace

extern "C" {

int lucid_cuda_device_count(char* message, size_t message_size) {
  int count = 0;
  Answer(lucid::CountCudaDevices(&count), message, message_size);
  return count;
}

int lucid_cuda_plan(const EmbeddingBagArgs* args, LucidCudaPlan* plan, char* message,
                    size_t message_size) {
  return Answer(lucid::PlanCudaEmbeddingBag(*args, plan), message, message_size);
}

int lucid_cuda_embedding_bag(const EmbeddingBagArgs* args, void* scratch, int64_t scratch_bytes,
                             LucidBoundsError* error, void* stream, char* message,
                             size_t message_size) {
  return Answer(Run(*args, scratch, scratch_bytes, error, stream), message, message_size);
}

int lucid_cuda_refusal(const LucidBoundsError* error, char* message, size_t message_size) {
  return Answer(lucid::RefuseBounds(*error), message, message_size);
}

}  // extern "C"
