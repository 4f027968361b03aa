// EmbeddingBag on CUDA: the contract of embedding_bag.h over device memory, in the same order of
// additions, and so with the same bits as the CPU's kernel. (Two exceptions: the p of norms without
// a loop of their own, whose powers differ in the last bits, and the sums of bags of more than 64
// positions some of which are skipped: here skipped positions count when a bag is cut.)
//
// Every pointer of EmbeddingBagArgs is one that the device can read, and a multiple of the size of
// its elements; row_stride is 0. Nothing waits for the device, and nothing is allocated.
//
// No value in offsets or indices leads to an access outside the arrays. The first bad value is
// recorded in a LucidBoundsError in device memory, which the caller owns, sets to zeros and reads
// when it wants to.
#pragma once

#include <stdint.h>

#include "embedding_bag/embedding_bag.h"

// All zero: no value was bad. Otherwise it is about the one with the lowest place; those of offsets
// are lower than those of indices.
typedef struct LucidBoundsError {
  uint64_t inverse;   // ~place, where place is i of offsets[i], or 2^62 + the position of an index;
                      // of table t of several, 2^48 * t more; 2^62 + 2^61: num_entries
  uint64_t recorded;  // the inverse that the next two belong to
  int64_t value;      // of the offset or the index
  int64_t previous;   // offsets[i - 1]
  int64_t limit;      // N or V
  int64_t length;     // L, or -1
  uint32_t lock;
  uint32_t table;  // the table that the message names, counted from 1; 0: none
} LucidBoundsError;

// How a call is divided among threads. Plain numbers that depend on the arguments alone, so that
// tests can check them.
typedef struct LucidCudaPlan {
  int64_t size_bytes;     // sizeof(LucidCudaPlan)
  int64_t num_bags;       // B
  int64_t padding;        // in [0, V), or -1
  int64_t num_positions;  // N, or B * L
  int64_t vectors;        // that a row is read in, a thread each
  int64_t chunks;         // that are looked for; every one but for those of no positions is there
  int64_t bag_chunks;     // of each bag of two-dimensional indices, else 0
  int64_t blocks;         // of threads; 0: there is nothing to pool
  int64_t column_blocks;  // blocks beside each other that share their chunks
  int64_t norm_blocks;    // of the kernel before it that computes the clips; 0: none
  int64_t check_blocks;   // of the kernel that only checks, in the place of all others; 0: none
  int64_t zeroed_bytes;   // of scratch, from its start: counters
  int64_t counts_at, piece_counts_at, partials_at, clips_at;  // bytes from the start of scratch
  int64_t scratch_bytes;
  int32_t vector_bytes, vector_elements;
  int32_t block_threads, block_vectors, block_chunks;
  int32_t vector_output;  // 1: results are stored as vectors
} LucidCudaPlan;

#ifdef __cplusplus

namespace lucid {

// Positions that one thread adds up, one after another. A longer bag is cut into chunks of this
// many; what they give joins chunk by chunk and piece by piece, as the CPU's groups do.
constexpr int64_t kChunk = 64;
constexpr int64_t kChunksOfPiece = 16;

// Threads of a block that only checks.
constexpr int32_t kCheckThreads = 256;

// In a LucidBoundsError's place.
constexpr uint64_t kTablePlace = uint64_t{1} << 48, kIndexPlace = uint64_t{1} << 62;
constexpr uint64_t kEntriesPlace = kIndexPlace + (uint64_t{1} << 61);

// Checks everything that can be checked without looking at the device, and plans.
Status PlanCudaEmbeddingBag(const EmbeddingBagArgs& args, LucidCudaPlan* plan);

// Plans a call that was checked but for what only a GPU asks for; num_bags is what the check said.
// output_stride: bytes from one result to the next.
Status PlanCheckedCudaEmbeddingBag(const EmbeddingBagArgs& args, int64_t num_bags,
                                   int64_t output_stride, LucidCudaPlan* plan);

// The threads that a plan's chunks and vectors are for.
double CudaThreads(const LucidCudaPlan& plan);

// Plans the blocks of plan->chunks chunks of plan->vectors vectors, in a launch of so many threads.
Status PlanCudaBlocks(double threads, LucidCudaPlan* plan);

// Plans the scratch memory of the parts of bags of at most `longest` positions, of which there are
// plan->num_positions, and sets scratch_bytes to what that takes.
Status PlanCudaPartials(int64_t longest, int64_t accumulator_bytes, LucidCudaPlan* plan);

// Checks that the address of an array is a multiple of the size of its elements.
Status CheckAddress(const char* name, const void* p, int64_t bytes);

// The error for a call whose sizes overflow the numbers of a launch.
Status TooLargeForCuda();

// Enqueues the work on a stream (a cudaStream_t). scratch: plan.scratch_bytes of device memory, a
// multiple of 256, that nobody else touches before the work is done.
Status LaunchCudaEmbeddingBag(const EmbeddingBagArgs& args, const LucidCudaPlan& plan,
                              void* scratch, LucidBoundsError* error, void* stream);

// Enqueues the computing of what the row of every position is clipped with, accumulators each. With
// per_sample_weights it is that times the weight.
Status LaunchCudaClips(const EmbeddingBagArgs& args, const LucidCudaPlan& plan, void* clips,
                       void* stream);

Status ClearOnDevice(void* begin, int64_t bytes, void* stream);

// The error that a LucidBoundsError, copied to the host, stands for; or OK.
Status BoundsStatus(const LucidBoundsError& error);

// How many devices there are; 0 with an error that says why where CUDA cannot start.
Status CountCudaDevices(int* count);

// CUDA versions as CUDA numbers them, 12040 for 12.4; driver: what the driver here is for, 0
// without one. least_driver: the driver that the toolkit needs.
struct CudaVersions {
  int toolkit = 0, driver = 0, least_driver = 0;
};
Status GetCudaVersions(CudaVersions* versions);

// Whether the kernels run on a device: it is there, and the library has code for it.
Status CheckCudaDevice(int device);

Status CurrentCudaDevice(int* device);

// Makes a device the current one of this thread, and the one before it again at the end.
class DeviceScope {
 public:
  explicit DeviceScope(int device);
  DeviceScope(const DeviceScope&) = delete;
  DeviceScope& operator=(const DeviceScope&) = delete;
  ~DeviceScope();
  const Status& status() const { return status_; }

 private:
  int before_ = 0;
  bool changed_ = false;
  Status status_;
};

// A BoundsError on a device, cleared, and memory that it can be copied to without waiting.
struct CudaBounds {
  LucidBoundsError* device = nullptr;
  LucidBoundsError* host = nullptr;
  int device_id = 0;

  // May be called while a CUDA graph is being recorded, by this thread or another.
  Status Allocate(int on_device);
  void Free();
  Status CopyToHost(void* stream) const;  // enqueued
  Status Clear(void* stream) const;       // enqueued

  // The error that launches on any stream have recorded, which is cleared, or OK. `wait`: waits for
  // the device, and so may not be called while a CUDA graph is being recorded. Otherwise it is an
  // error whose copy was enqueued and completed.
  Status Poll(bool wait) const;
};

Status WaitForCudaStream(void* stream);

// Copies a number of the device's and waits for it.
Status ReadFromDevice(const int64_t* device, int64_t* value, void* stream);

// Whether a CUDA graph is being recorded from a stream. Then nothing may wait for the stream.
Status IsCudaCapturing(void* stream, bool* capturing);

}  // namespace lucid

#endif  // __cplusplus
