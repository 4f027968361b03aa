// What the adapters for ONNX Runtime's CUDA provider share: how a run of a node gets its scratch
// memory and reports bad offsets and indices.
//
// Whether an offset or index is bad is known when the device has completed the kernel. By default a
// run waits for that and reports it. With the session configuration lucid.bounds_check = deferred,
// which must be set before the library is registered, no run waits: it enqueues a copy of the
// bounds error, and a later run of the node on the same stream finds it and reports it instead of
// computing. Or lucid_cuda_check_bounds does (c_api_cuda.h), which is also how a caller learns of
// what a replayed CUDA graph recorded, since a replay is no run of a node.
//
// With lucid.bounds_check = run no run of a node waits or reports: whoever runs the session asks
// when it has run, by lucid_cuda_check_run, on the thread that ran it. So there is one wait a run,
// the runtime's own, whatever the number of nodes.
#pragma once

#include <memory>
#include <mutex>
#include <thread>
#include <utility>
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

// Scratch memory of a run, and the provider's allocator that it is from.
struct CudaBlock {
  Allocator* allocator;
  void* memory;
  int64_t bytes;
};

// Part of the kernel of a node. Nodes of a process are listed, for lucid_cuda_check_bounds.
class CudaNode {
 public:
  CudaNode() = default;
  CudaNode(const CudaNode&) = delete;
  CudaNode& operator=(const CudaNode&) = delete;
  ~CudaNode();

  // Allocates what the first run will need, on the device that is current: the provider's, unless
  // somebody else chose one since. A run on another device allocates it again.
  Status* Init(const Runtime& runtime, const char* op_name);

  // An error of the nodes of a session (0: of all sessions), with its op's name in front, or OK.
  // `wait` as in CudaBounds::Poll. `mine`: of the runs on this thread alone.
  static lucid::Status Poll(int64_t session, bool wait, bool mine);

  // Nodes that this thread makes from now on are of a session; 0: of none that has a number.
  static void StartSession(int64_t session);

 private:
  friend class CudaRun;

  struct Entry {
    CudaBounds bounds;
    void* stream = nullptr;
    bool taken = false;      // by a run that is under way, or for good by its stream
    std::thread::id thread;  // of the last run
    // If deferred: scratch memory of earlier runs on the stream, which the next ones on it use. The
    // provider would hand it out to other streams while the kernels still run.
    std::vector<CudaBlock> kept;
  };

  lucid::Status Add(int device) const;
  lucid::Status Take(void* stream, int device, Entry** entry) const;
  lucid::Status Leave(Entry* entry) const;
  lucid::Status PollEntries(bool wait, bool mine) const;
  void GiveBack(Entry* entry) const;
  void Free(const CudaBlock& block) const;

  const Api* api_ = nullptr;
  const char* op_name_ = nullptr;
  bool deferred_ = false;
  bool asked_ = false;  // lucid.bounds_check = run; then deferred_ too
  int64_t session_ = 0;
  CudaNode* next_ = nullptr;  // in the list of all
  bool listed_ = false;
  mutable std::mutex mutex_;
  mutable std::vector<std::unique_ptr<Entry>> entries_;
  // If asked_: errors that a thread has yet to ask for, whose stream another thread has taken
  // since.
  mutable std::vector<std::pair<std::thread::id, lucid::Status>> left_;
};

// One run of a node: Begin, what is enqueued on its stream, End.
class CudaRun {
 public:
  CudaRun(const CudaNode& node, KernelContext* context) : node_(node), context_(context) {}
  CudaRun(const CudaRun&) = delete;
  CudaRun& operator=(const CudaRun&) = delete;
  ~CudaRun();

  // `beside`: a value on the provider's device. If deferred, reports the bounds error of an earlier
  // run.
  Status* Begin(const Value* beside);

  void* stream() const { return stream_; }
  LucidBoundsError* error() const { return entry_->bounds.device; }

  // Scratch memory where `beside` lies, a multiple of 256, from the provider's allocator; null for
  // no bytes. Given back at the end of the run, or, if deferred, kept for the next one.
  Status* Allocate(const Value* beside, int64_t bytes, void** memory);

  // Waits for what was enqueued, and copies a number that it wrote on the device. Reports a bounds
  // error so far. An invalid argument while a CUDA graph is being recorded.
  Status* Read(const int64_t* device, int64_t* value);

  // `launched` is the status of enqueuing the work. Unless deferred, waits and reports a bounds
  // error.
  Status* End(const lucid::Status& launched);

 private:
  Status* ToOrt(const lucid::Status& status) const;
  lucid::Status ReportEarlier() const;
  bool TakeKept(int64_t bytes);
  lucid::Status Wait() const;

  const CudaNode& node_;
  KernelContext* const context_;
  void* stream_ = nullptr;
  bool capturing_ = false;
  CudaNode::Entry* entry_ = nullptr;
  std::vector<CudaBlock> memory_;
};

}  // namespace ort
}  // namespace lucid
