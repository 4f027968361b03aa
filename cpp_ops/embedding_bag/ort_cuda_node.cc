#include "embedding_bag/ort_cuda_node.h"

#include <cstdio>

namespace lucid {
namespace ort {

namespace {

constexpr uintptr_t kAlignment = 256;  // of scratch memory

}  // namespace

CudaNode::~CudaNode() {
  for (const auto& entry : entries_) entry->bounds.Free();
}

Status* CudaNode::Init(const Runtime& runtime, const char* op_name) {
  api_ = runtime.api;
  op_name_ = op_name;
  deferred_ = runtime.deferred_bounds;
  return ort::ToOrt(api_, op_name_, Add());
}

// The caller holds the mutex, or is alone.
lucid::Status CudaNode::Add() const {
  auto entry = std::make_unique<Entry>();
  const lucid::Status status = entry->bounds.Allocate();
  if (status.ok()) entries_.push_back(std::move(entry));
  return status;
}

// A bounds error for this run: used by one run at a time or, if deferred, by one stream.
lucid::Status CudaNode::Take(void* stream, Entry** entry) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  Entry* found = nullptr;
  for (const auto& e : entries_) {
    if (deferred_ && e->taken && e->stream == stream) {
      *entry = e.get();
      return lucid::Status();
    }
    if (!e->taken && !found) found = e.get();
  }
  if (!found) {
    const lucid::Status status = Add();
    if (!status.ok()) return status;
    found = entries_.back().get();
  }
  found->taken = true;
  found->stream = stream;
  *entry = found;
  return lucid::Status();
}

void CudaNode::GiveBack(Entry* entry) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (!deferred_) entry->taken = false;
}

CudaRun::~CudaRun() {
  for (const Memory& memory : memory_) {
    if (memory.block) memory.allocator->Free(memory.allocator, memory.block);
    Call<ReleaseAllocator>(node_.api_, memory.allocator);
  }
  if (entry_) node_.GiveBack(entry_);
}

Status* CudaRun::ToOrt(const lucid::Status& status) const {
  return ort::ToOrt(node_.api_, node_.op_name_, status);
}

Status* CudaRun::Begin() {
  LUCID_RETURN_IF_ERROR(Call<KernelContext_GetGPUComputeStream>(node_.api_, context_, &stream_));
  LUCID_RETURN_IF_ERROR(ToOrt(IsCudaCapturing(stream_, &capturing_)));
  if (capturing_ && !node_.deferred_) {
    return ToOrt(InvalidArgument(
        "a CUDA graph cannot record a run that waits for the device: set the session "
        "configuration lucid.bounds_check to deferred"));
  }
  LUCID_RETURN_IF_ERROR(ToOrt(node_.Take(stream_, &entry_)));
  return node_.deferred_ && !capturing_ ? ToOrt(ReportEarlier()) : nullptr;
}

Status* CudaRun::Allocate(const Value* beside, int64_t bytes, void** memory) {
  *memory = nullptr;
  if (bytes == 0) return nullptr;
  const MemoryInfo* info = nullptr;
  Allocator* allocator = nullptr;
  memory_.reserve(memory_.size() + 1);  // so that nothing can throw between here and there
  LUCID_RETURN_IF_ERROR(Call<GetTensorMemoryInfo>(node_.api_, beside, &info));
  LUCID_RETURN_IF_ERROR(Call<KernelContext_GetAllocator>(node_.api_, context_, info, &allocator));
  memory_.push_back({allocator, nullptr});
  void* const block = allocator->Alloc(allocator, static_cast<size_t>(bytes) + kAlignment);
  memory_.back().block = block;
  if (!block) {
    char text[80];
    std::snprintf(text, sizeof(text), "no %lld bytes of scratch memory on the device",
                  static_cast<long long>(bytes));
    return Call<CreateStatus>(node_.api_, kFail, text);
  }
  const uintptr_t p = reinterpret_cast<uintptr_t>(block);
  *memory = reinterpret_cast<void*>((p + kAlignment - 1) / kAlignment * kAlignment);
  return nullptr;
}

Status* CudaRun::Read(const int64_t* device, int64_t* value) {
  if (capturing_) {
    return ToOrt(InvalidArgument(
        "a CUDA graph cannot record a run whose output sizes are computed on the device"));
  }
  lucid::Status status = ReadFromDevice(device, value, stream_);
  if (status.ok()) status = Wait();
  return ToOrt(status);
}

// If deferred: the bounds error of an earlier run.
lucid::Status CudaRun::ReportEarlier() const {
  const CudaBounds& bounds = entry_->bounds;
  const volatile LucidBoundsError* host = bounds.host;
  if (host->inverse == 0) return lucid::Status();
  // Copies of it may be under way still, and this is the rare case.
  lucid::Status status = WaitForCudaStream(stream_);
  if (!status.ok()) return status;
  const lucid::Status error = BoundsStatus(*bounds.host);
  *bounds.host = LucidBoundsError();
  status = bounds.Clear(stream_);
  return status.ok() ? error : status;
}

// The bounds error of this run.
lucid::Status CudaRun::Wait() const {
  const CudaBounds& bounds = entry_->bounds;
  lucid::Status status = bounds.CopyToHost(stream_);
  if (status.ok()) status = WaitForCudaStream(stream_);
  if (!status.ok()) return status;
  const lucid::Status error = BoundsStatus(*bounds.host);
  if (error.ok()) return error;
  *bounds.host = LucidBoundsError();
  status = bounds.Clear(stream_);
  if (status.ok()) status = WaitForCudaStream(stream_);  // another stream may take it next
  return status.ok() ? error : status;
}

Status* CudaRun::End(const lucid::Status& launched) {
  if (!launched.ok()) return ToOrt(launched);
  return ToOrt(node_.deferred_ ? entry_->bounds.CopyToHost(stream_) : Wait());
}

}  // namespace ort
}  // namespace lucid
