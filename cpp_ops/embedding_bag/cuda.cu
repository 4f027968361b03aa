// EmbeddingBag's CUDA kernels. cuda.h says what they compute, cuda_plan.cc how work is divided, and
// cuda-inl.h how a thread pools its part.
#include "embedding_bag/cuda-inl.h"

namespace lucid {
namespace {

template <class T, int kBytes, Pooling kPooling>
__global__ void __launch_bounds__(256, kBlocks<T, kBytes>)
    PoolChunks(const __grid_constant__ CudaJob job) {
  PoolBlock<T, kBytes, kPooling>(job, nullptr, blockIdx.x, gridDim.x);
}

// For calls without a row to read: offsets and indices alone.
__global__ void __launch_bounds__(256) CheckBounds(const __grid_constant__ CudaJob job) {
  CheckOffsets(job, blockIdx.x, gridDim.x);
  CheckIndices(job, 0, job.num_bags ? BagBegin(job, job.num_bags) : 0, blockIdx.x, gridDim.x);
}

template <class T>
__global__ void __launch_bounds__(256) ComputeClips(const __grid_constant__ CudaJob job) {
  ClipRow<T>(job, PositionOf<T>(blockIdx.x));
}

// ---- Launching.

using Kernel = void (*)(CudaJob job);

template <class T, int kBytes>
Kernel ChoosePool(bool maximum) {
  return maximum ? PoolChunks<T, kBytes, Pooling::kMaxima> : PoolChunks<T, kBytes, Pooling::kSums>;
}

// The widths are those of cuda_plan.cc.
template <class T, int kWide, int kMiddle, int kNarrow>
Kernel ChooseWidth(int bytes, bool maximum) {
  if (bytes == kWide) return ChoosePool<T, kWide>(maximum);
  if (bytes == kMiddle) return ChoosePool<T, kMiddle>(maximum);
  return bytes == kNarrow ? ChoosePool<T, kNarrow>(maximum) : nullptr;
}

Kernel ChoosePool(int32_t dtype, int bytes, bool maximum) {
  switch (dtype) {
    case kFloat32:
      return ChooseWidth<float, 16, 4, 4>(bytes, maximum);
    case kFloat16:
      return ChooseWidth<Float16, 16, 4, 2>(bytes, maximum);
    case kBFloat16:
      return ChooseWidth<BFloat16, 16, 4, 2>(bytes, maximum);
    case kFloat64:
      return ChooseWidth<double, 16, 8, 8>(bytes, maximum);
    case kInt8:
    case kUint8:
      return ChooseWidth<Code8, 16, 4, 1>(bytes, maximum);
    default:
      return ChooseWidth<Code4, 8, 2, 1>(bytes, maximum);
  }
}

Kernel ChooseClips(int32_t dtype) {
  switch (dtype) {
    case kFloat32:
      return ComputeClips<float>;
    case kFloat16:
      return ComputeClips<Float16>;
    case kBFloat16:
      return ComputeClips<BFloat16>;
    case kFloat64:
      return ComputeClips<double>;
    case kInt8:
    case kUint8:
      return ComputeClips<Code8>;
    default:
      return ComputeClips<Code4>;
  }
}

}  // namespace

Status CountCudaDevices(int* count) {
  *count = 0;
  const Status status = CudaStatus("counting devices", cudaGetDeviceCount(count));
  if (!status.ok()) *count = 0;
  return status;
}

Status CudaBounds::Allocate() {
  void* memory = nullptr;
  Status status = CudaStatus("allocating on the device", cudaMalloc(&memory, sizeof(*device)));
  if (!status.ok()) return status;
  device = static_cast<LucidBoundsError*>(memory);
  status = CudaStatus("clearing", cudaMemset(device, 0, sizeof(*device)));
  if (status.ok()) {
    status = CudaStatus("allocating on the host", cudaMallocHost(&memory, sizeof(*host)));
  }
  if (status.ok()) {
    host = static_cast<LucidBoundsError*>(memory);
    *host = LucidBoundsError();
  } else {
    Free();
  }
  return status;
}

void CudaBounds::Free() {
  // Nobody could do anything about an error, and at the end of a process there is one.
  if (device) static_cast<void>(cudaFree(device));
  if (host) static_cast<void>(cudaFreeHost(host));
  device = host = nullptr;
}

Status CudaBounds::CopyToHost(void* stream) const {
  return CudaStatus("copying the bounds error",
                    cudaMemcpyAsync(host, device, sizeof(*host), cudaMemcpyDeviceToHost,
                                    static_cast<cudaStream_t>(stream)));
}

Status CudaBounds::Clear(void* stream) const {
  return CudaStatus("clearing",
                    cudaMemsetAsync(device, 0, sizeof(*device), static_cast<cudaStream_t>(stream)));
}

Status WaitForCudaStream(void* stream) {
  return CudaStatus("pooling", cudaStreamSynchronize(static_cast<cudaStream_t>(stream)));
}

Status ReadFromDevice(const int64_t* device, int64_t* value, void* stream) {
  const Status status = CudaStatus(
      "copying a number", cudaMemcpyAsync(value, device, sizeof(*value), cudaMemcpyDeviceToHost,
                                          static_cast<cudaStream_t>(stream)));
  return status.ok() ? WaitForCudaStream(stream) : status;
}

Status IsCudaCapturing(void* stream, bool* capturing) {
  cudaStreamCaptureStatus found = cudaStreamCaptureStatusNone;
  const Status status = CudaStatus(
      "asking a stream", cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &found));
  *capturing = found != cudaStreamCaptureStatusNone;
  return status;
}

Status ClearOnDevice(void* begin, int64_t bytes, void* stream) {
  return CudaStatus("clearing scratch memory", cudaMemsetAsync(begin, 0, static_cast<size_t>(bytes),
                                                               static_cast<cudaStream_t>(stream)));
}

Status LaunchCudaClips(const EmbeddingBagArgs& a, const LucidCudaPlan& plan, void* clips,
                       void* stream) {
  CudaJob job = MakeJob(a, plan, nullptr);
  job.clips = static_cast<char*>(clips);
  const Kernel kernel = ChooseClips(a.dtype);
  LUCID_LAUNCH(kernel, static_cast<unsigned>(plan.norm_blocks), 256u,
               static_cast<cudaStream_t>(stream), job);
  return CudaStatus("computing norms", cudaGetLastError());
}

Status LaunchCudaEmbeddingBag(const EmbeddingBagArgs& a, const LucidCudaPlan& plan, void* scratch,
                              LucidBoundsError* error, void* stream_handle) {
  if (plan.blocks == 0 && plan.check_blocks == 0) return Status();
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_handle);
  char* const base = static_cast<char*>(scratch);
  CudaJob job = MakeJob(a, plan, error);
  if (plan.check_blocks > 0) {
    LUCID_LAUNCH(CheckBounds, static_cast<unsigned>(plan.check_blocks), 256u, stream, job);
    return CudaStatus("checking bounds", cudaGetLastError());
  }
  const Kernel pool = ChoosePool(a.dtype, plan.vector_bytes, a.mode == kMax);
  if (!pool) return Error(Code::kInternal, "no kernel reads %d bytes", plan.vector_bytes);
  Status status;
  if (plan.norm_blocks > 0) {
    job.clips = base + plan.clips_at;
    job.scaled = true;
    status = LaunchCudaClips(a, plan, job.clips, stream_handle);
  }
  if (status.ok() && plan.zeroed_bytes > 0) {
    SetPartials(plan, base, base + plan.counts_at, &job);
    status = ClearOnDevice(base, plan.zeroed_bytes, stream_handle);
  }
  if (!status.ok()) return status;
  LUCID_LAUNCH(pool, static_cast<unsigned>(plan.blocks), static_cast<unsigned>(plan.block_threads),
               stream, job);
  return CudaStatus("pooling", cudaGetLastError());
}

}  // namespace lucid
