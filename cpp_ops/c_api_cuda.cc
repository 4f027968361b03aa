#include "c_api_cuda.h"

#include <cstdio>

#include "embedding_bag/cuda.h"

using lucid::Status;

static_assert(sizeof(LucidBoundsError) == 56 && sizeof(LucidCudaPlan) == 160 &&
                  sizeof(LucidCudaCollectionPlan) == 56 && sizeof(LucidCudaGradPlan) == 80,
              "the mirrors of other languages");

namespace {

int Answer(const Status& status, char* message, size_t message_size) {
  if (message_size > 0) std::snprintf(message, message_size, "%s", status.message);
  return static_cast<int>(status.code);
}

Status CheckMemory(const void* scratch, int64_t scratch_bytes, int64_t planned_bytes,
                   const void* error) {
  if (scratch_bytes < planned_bytes) {
    return lucid::InvalidArgument(
        "scratch_bytes = %lld is less than the %lld that the plan asks for",
        static_cast<long long>(scratch_bytes), static_cast<long long>(planned_bytes));
  }
  if (planned_bytes > 0 && (!scratch || reinterpret_cast<uintptr_t>(scratch) % 256 != 0)) {
    return lucid::InvalidArgument("scratch is at %p, which is not a multiple of 256", scratch);
  }
  if (!error || reinterpret_cast<uintptr_t>(error) % 8 != 0) {
    return lucid::InvalidArgument("error is at %p, which is not a multiple of 8", error);
  }
  return Status();
}

Status Run(const EmbeddingBagArgs& args, void* scratch, int64_t scratch_bytes,
           LucidBoundsError* error, void* stream) {
  LucidCudaPlan plan;
  Status status = lucid::PlanCudaEmbeddingBag(args, &plan);
  if (status.ok()) status = CheckMemory(scratch, scratch_bytes, plan.scratch_bytes, error);
  return status.ok() ? lucid::LaunchCudaEmbeddingBag(args, plan, scratch, error, stream) : status;
}

Status RunCollection(const EmbeddingBagCollectionArgs& args, void* scratch, int64_t scratch_bytes,
                     LucidBoundsError* error, void* stream) {
  lucid::CudaCollection collection;
  Status status = collection.Plan(args);
  if (status.ok()) {
    status = CheckMemory(scratch, scratch_bytes, collection.plan().scratch_bytes, error);
  }
  return status.ok() ? collection.Launch(scratch, error, stream) : status;
}

Status CountEntries(const EmbeddingBagGradArgs& args, int64_t* num_entries, LucidBoundsError* error,
                    void* stream) {
  lucid::CudaGrad grad;
  Status status = grad.Plan(args, false);
  if (status.ok()) status = CheckMemory(nullptr, 0, 0, error);
  if (status.ok()) status = lucid::CheckAddress("num_entries", num_entries, 8);
  return status.ok() ? grad.LaunchCount(num_entries, error, stream) : status;
}

Status RunGrad(const EmbeddingBagGradArgs& args, void* scratch, int64_t scratch_bytes,
               LucidBoundsError* error, void* stream) {
  lucid::CudaGrad grad;
  Status status = grad.Plan(args);
  if (status.ok()) {
    status = CheckMemory(scratch, scratch_bytes, grad.plan().scratch_bytes, error);
  }
  return status.ok() ? grad.Launch(scratch, error, stream) : status;
}

}  // namespace

extern "C" {

int lucid_cuda_device_count(char* message, size_t message_size) {
  int count = 0;
  Answer(lucid::CountCudaDevices(&count), message, message_size);
  return count;
}

int lucid_cuda_check_device(int device_id, char* message, size_t message_size) {
  return Answer(lucid::CheckCudaDevice(device_id), message, message_size);
}

int lucid_cuda_toolkit_version(void) {
  lucid::CudaVersions versions;
  return lucid::GetCudaVersions(&versions).ok() ? versions.toolkit : 0;
}

int lucid_cuda_least_driver(void) {
  lucid::CudaVersions versions;
  return lucid::GetCudaVersions(&versions).ok() ? versions.least_driver : 0;
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

int lucid_cuda_plan_collection(const EmbeddingBagCollectionArgs* args,
                               LucidCudaCollectionPlan* plan, char* message, size_t message_size) {
  lucid::CudaCollection collection;
  const Status status = collection.Plan(*args);
  *plan = collection.plan();
  return Answer(status, message, message_size);
}

int lucid_cuda_embedding_bag_collection(const EmbeddingBagCollectionArgs* args, void* scratch,
                                        int64_t scratch_bytes, LucidBoundsError* error,
                                        void* stream, char* message, size_t message_size) {
  return Answer(RunCollection(*args, scratch, scratch_bytes, error, stream), message, message_size);
}

int lucid_cuda_plan_grad(const EmbeddingBagGradArgs* args, LucidCudaGradPlan* plan, char* message,
                         size_t message_size) {
  lucid::CudaGrad grad;
  const Status status = grad.Plan(*args, false);
  *plan = grad.plan();
  return Answer(status, message, message_size);
}

int lucid_cuda_embedding_bag_grad_entries(const EmbeddingBagGradArgs* args, int64_t* num_entries,
                                          LucidBoundsError* error, void* stream, char* message,
                                          size_t message_size) {
  return Answer(CountEntries(*args, num_entries, error, stream), message, message_size);
}

int lucid_cuda_embedding_bag_grad(const EmbeddingBagGradArgs* args, void* scratch,
                                  int64_t scratch_bytes, LucidBoundsError* error, void* stream,
                                  char* message, size_t message_size) {
  return Answer(RunGrad(*args, scratch, scratch_bytes, error, stream), message, message_size);
}

int lucid_cuda_refusal(const LucidBoundsError* error, char* message, size_t message_size) {
  return Answer(lucid::BoundsStatus(*error), message, message_size);
}

}  // extern "C"
