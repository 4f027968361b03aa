// What the adapters for ONNX Runtime's CUDA provider share: how a run of a node gets its scratch
// memory and reports bad offsets and indices.
//
// Whether an offset or index is bad is known when the device has completed the kernel. By default a
// run waits for that and reports it. With the session configuration lucid.bounds_check = deferred,
// which must be set before the library is registered, no run waits: it enqueues a copy of the
// bounds error, and a later run of the node on the same stream finds it and reports it instead of
// computing.
#pragma once

#include <memory>
#include <mutex>
#include <vector>

#include "embedding_bag/cuda.h"
#include "ort/adapter.h"

#if !defined(LUCID_CUDA_PROVIDER)
#define LUCID_CUDA_PROVIDER "CUDAExecutionProvider"
#endif

namespace lucid {
namespace ort {

inline const char* LUCID_ORT_CALL GetCudaProvider(const CustomOp*) { return LUCID_CUDA_PROVIDER; }

// What all ops with this kernel have in common.
template <class Kernel>
CustomOp DescribeCudaOp() {
  CustomOp op = DescribeOp();
  op.GetExecutionProviderType = GetCudaProvider;
  KernelFunctions<Kernel>::SetIn(&op);
  return op;
}

// Part of the kernel of a node.
class CudaNode {
 public:
  CudaNode() = default;
  CudaNode(const CudaNode&) = delete;
  CudaNode& operator=(const CudaNode&) = delete;
  ~CudaNode();

  // Allocates what a run will need: nothing may be allocated while a CUDA graph is recorded.
  Status* Init(const Runtime& runtime, const char* op_name);

 private:
  friend class CudaRun;

  struct Entry {
    CudaBounds bounds;
    void* stream = nullptr;
    bool taken = false;  // by a run that is under way, or for good by its stream
  };

  lucid::Status Add() const;
  lucid::Status Take(void* stream, Entry** entry) const;
  void GiveBack(Entry* entry) const;

  const Api* api_ = nullptr;
  const char* op_name_ = nullptr;
  bool deferred_ = false;
  mutable std::mutex mutex_;
  mutable std::vector<std::unique_ptr<Entry>> entries_;
};

// One run of a node: Begin, what is enqueued on its stream, End.
class CudaRun {
 public:
  CudaRun(const CudaNode& node, KernelContext* context) : node_(node), context_(context) {}
  CudaRun(const CudaRun&) = delete;
  CudaRun& operator=(const CudaRun&) = delete;
  ~CudaRun();

  // If deferred, reports the bounds error of an earlier run.
  Status* Begin();

  void* stream() const { return stream_; }
  LucidBoundsError* error() const { return entry_->bounds.device; }

  // Scratch memory where `beside` lies, a multiple of 256, from the provider's allocator; null for
  // no bytes. Given back at the end of the run, after which the provider hands it out to what is
  // enqueued on the same stream.
  Status* Allocate(const Value* beside, int64_t bytes, void** memory);

  // Waits for what was enqueued, and copies a number that it wrote on the device. Reports a bounds
  // error so far. An invalid argument while a CUDA graph is being recorded.
  Status* Read(const int64_t* device, int64_t* value);

  // `launched` is the status of enqueuing the work. Unless deferred, waits and reports a bounds
  // error.
  Status* End(const lucid::Status& launched);

 private:
  struct Memory {
    Allocator* allocator;
    void* block;
  };

  Status* ToOrt(const lucid::Status& status) const;
  lucid::Status ReportEarlier() const;
  lucid::Status Wait() const;

  const CudaNode& node_;
  KernelContext* const context_;
  void* stream_ = nullptr;
  bool capturing_ = false;
  CudaNode::Entry* entry_ = nullptr;
  std::vector<Memory> memory_;
};

}  // namespace ort
}  // namespace lucid
