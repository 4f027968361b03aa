// EmbeddingBag for ONNX Runtime's CUDA provider: the ops of ort_embedding_bag.cc over device
// memory.
//
// Which offset or index is refused is known when the device has come past the kernel. By default a
// run waits for that and reports it. With the session configuration lucid.bounds_check = deferred,
// which must be set before the library is registered, no run waits: it enqueues a copy of what was
// refused, and a later run of the node on the same stream finds it and reports it in the place of
// computing.
#include <cstdio>
#include <memory>
#include <mutex>
#include <vector>

#include "embedding_bag/cuda.h"
#include "embedding_bag/ort_embedding_bag.h"

#if !defined(LUCID_CUDA_PROVIDER)
#define LUCID_CUDA_PROVIDER "CUDAExecutionProvider"
#endif

namespace lucid {
namespace ort {
namespace {

// Scratch memory of a run, from the provider's allocator. Given back at the end of the run, after
// which the provider hands it out to what is enqueued on the same stream.
class Scratch {
 public:
  explicit Scratch(const Api* api) : api_(api) {}
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() {
    if (memory_) allocator_->Free(allocator_, memory_);
    if (allocator_) Call<ReleaseAllocator>(api_, allocator_);
  }

  // From where `beside` lies.
  Status* Allocate(const KernelContext* context, const Value* beside, int64_t bytes) {
    const MemoryInfo* info = nullptr;
    LUCID_RETURN_IF_ERROR(Call<GetTensorMemoryInfo>(api_, beside, &info));
    LUCID_RETURN_IF_ERROR(Call<KernelContext_GetAllocator>(api_, context, info, &allocator_));
    memory_ = allocator_->Alloc(allocator_, static_cast<size_t>(bytes) + kAlignment);
    if (memory_) return nullptr;
    char text[80];
    std::snprintf(text, sizeof(text), "no %lld bytes of scratch memory on the device",
                  static_cast<long long>(bytes));
    return Call<CreateStatus>(api_, kFail, text);
  }

  void* get() const {
    const uintptr_t p = reinterpret_cast<uintptr_t>(memory_);
    return reinterpret_cast<void*>((p + kAlignment - 1) / kAlignment * kAlignment);
  }

 private:
  static constexpr uintptr_t kAlignment = 256;
  const Api* api_;
  Allocator* allocator_ = nullptr;
  void* memory_ = nullptr;
};

struct Kernel : BagKernel {
  struct Entry {
    CudaBounds bounds;
    void* stream = nullptr;
    bool taken = false;  // by a run that is under way, or for good by its stream
  };

  bool deferred = false;
  mutable std::mutex mutex;
  mutable std::vector<std::unique_ptr<Entry>> entries;

  static Status* Create(const CustomOp& op, const Api* api, const KernelInfo* info,
                        std::unique_ptr<Kernel>* kernel);
  ~Kernel() {
    for (const auto& entry : entries) entry->bounds.Free();
  }

  lucid::Status Add() const;
  lucid::Status Take(void* stream, Entry** entry) const;
  void GiveBack(Entry* entry) const;
  lucid::Status ReportEarlier(const Entry& entry) const;
  lucid::Status Wait(const Entry& entry) const;
  Status* Compute(KernelContext* context) const;
};

// The caller holds the mutex, or is alone.
lucid::Status Kernel::Add() const {
  auto entry = std::make_unique<Entry>();
  const lucid::Status status = entry->bounds.Allocate();
  if (status.ok()) entries.push_back(std::move(entry));
  return status;
}

// A place for what this run refuses: of one run at a time, or, deferred, of one stream.
lucid::Status Kernel::Take(void* stream, Entry** entry) const {
  const std::lock_guard<std::mutex> lock(mutex);
  *entry = nullptr;
  for (const auto& e : entries) {
    if (deferred && e->taken && e->stream == stream) {
      *entry = e.get();
      return lucid::Status();
    }
    if (!e->taken && !*entry) *entry = e.get();
  }
  if (!*entry) {
    const lucid::Status status = Add();
    if (!status.ok()) return status;
    *entry = entries.back().get();
  }
  (*entry)->taken = true;
  (*entry)->stream = stream;
  return lucid::Status();
}

void Kernel::GiveBack(Entry* entry) const {
  const std::lock_guard<std::mutex> lock(mutex);
  if (!deferred) entry->taken = false;
}

// What an earlier run refused, deferred.
lucid::Status Kernel::ReportEarlier(const Entry& entry) const {
  const volatile LucidBoundsError* host = entry.bounds.host;
  if (host->inverse == 0) return lucid::Status();
  // Copies of it may be under way still, and this is the rare case.
  lucid::Status status = WaitForCudaStream(entry.stream);
  if (!status.ok()) return status;
  const lucid::Status refusal = RefuseBounds(*entry.bounds.host);
  *entry.bounds.host = LucidBoundsError();
  status = entry.bounds.Clear(entry.stream);
  return status.ok() ? refusal : status;
}

// Reports what this run refused.
lucid::Status Kernel::Wait(const Entry& entry) const {
  lucid::Status status = entry.bounds.CopyToHost(entry.stream);
  if (status.ok()) status = WaitForCudaStream(entry.stream);
  if (!status.ok()) return status;
  const lucid::Status refusal = RefuseBounds(*entry.bounds.host);
  if (refusal.ok()) return refusal;
  status = entry.bounds.Clear(entry.stream);
  if (status.ok()) status = WaitForCudaStream(entry.stream);  // another stream may take it next
  return status.ok() ? refusal : status;
}

Status* Kernel::Compute(KernelContext* context) const {
  const Api* api = op->runtime->api;
  EmbeddingBagArgs a;
  Value* output = nullptr;
  LUCID_RETURN_IF_ERROR(Bind(context, &a, &output));
  LucidCudaPlan plan;
  LUCID_RETURN_IF_ERROR(ToOrt(api, op->form->name, PlanCudaEmbeddingBag(a, &plan)));
  if (plan.blocks == 0 && plan.check_blocks == 0) return nullptr;

  void* stream = nullptr;
  LUCID_RETURN_IF_ERROR(Call<KernelContext_GetGPUComputeStream>(api, context, &stream));
  bool capturing = false;
  LUCID_RETURN_IF_ERROR(ToOrt(api, op->form->name, IsCudaCapturing(stream, &capturing)));
  if (capturing && !deferred) {
    return ToOrt(api, op->form->name,
                 Refuse("a CUDA graph cannot record a run that waits for the device: set the "
                        "session configuration lucid.bounds_check to deferred"));
  }
  Entry* entry = nullptr;
  LUCID_RETURN_IF_ERROR(ToOrt(api, op->form->name, Take(stream, &entry)));
  lucid::Status status;
  if (deferred && !capturing) status = ReportEarlier(*entry);
  Scratch scratch(api);
  Status* failed = nullptr;
  if (status.ok() && plan.scratch_bytes > 0) {
    failed = scratch.Allocate(context, output, plan.scratch_bytes);
  }
  if (status.ok() && !failed) {
    status = LaunchCudaEmbeddingBag(a, plan, scratch.get(), entry->bounds.device, stream);
    if (status.ok()) {
      status = deferred ? entry->bounds.CopyToHost(stream) : Wait(*entry);
    }
  }
  GiveBack(entry);
  return failed ? failed : ToOrt(api, op->form->name, status);
}

Status* Kernel::Create(const CustomOp& custom_op, const Api* api, const KernelInfo* info,
                       std::unique_ptr<Kernel>* out) {
  const Op& op = static_cast<const Op&>(custom_op);
  auto kernel = std::make_unique<Kernel>();
  LUCID_RETURN_IF_ERROR(kernel->Init(op, api, info));
  kernel->deferred = op.runtime->deferred_bounds;
  // Now, because nothing may be allocated while a CUDA graph is recorded.
  LUCID_RETURN_IF_ERROR(ToOrt(api, op.form->name, kernel->Add()));
  *out = std::move(kernel);
  return nullptr;
}

const char* LUCID_ORT_CALL GetProvider(const CustomOp*) { return LUCID_CUDA_PROVIDER; }

}  // namespace

Status* AddCudaEmbeddingBagOps(const Runtime& runtime, CustomOpDomain* domain) {
  CustomOp kernel = DescribeOp();
  kernel.GetExecutionProviderType = GetProvider;
  KernelFunctions<Kernel>::SetIn(&kernel);
  return AddBagOps(runtime, domain, kernel);
}

}  // namespace ort
}  // namespace lucid
