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
template <class T, int kWide, int kHalf, int kMiddle, int kNarrow>
Kernel ChooseWidth(int bytes, bool maximum) {
  if (bytes == kWide) return ChoosePool<T, kWide>(maximum);
  if (bytes == kHalf) return ChoosePool<T, kHalf>(maximum);
  if (bytes == kMiddle) return ChoosePool<T, kMiddle>(maximum);
  return bytes == kNarrow ? ChoosePool<T, kNarrow>(maximum) : nullptr;
}

Kernel ChoosePool(int32_t dtype, int bytes, bool maximum) {
  switch (dtype) {
    case kFloat32:
      return ChooseWidth<float, 16, 8, 4, 4>(bytes, maximum);
    case kFloat16:
      return ChooseWidth<Float16, 16, 8, 4, 2>(bytes, maximum);
    case kBFloat16:
      return ChooseWidth<BFloat16, 16, 8, 4, 2>(bytes, maximum);
    case kFloat64:
      return ChooseWidth<double, 16, 8, 8, 8>(bytes, maximum);
    case kInt8:
    case kUint8:
      return ChooseWidth<Code8, 16, 8, 4, 1>(bytes, maximum);
    default:
      return ChooseWidth<Code4, 8, 2, 1, 1>(bytes, maximum);
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
  const cudaError_t error = cudaGetDeviceCount(count);
  const Status status = CudaStatus("counting devices", error);
  if (status.ok()) return status;
  *count = 0;
  if (error != cudaErrorInsufficientDriver) return status;
  CudaVersions versions;
  if (!GetCudaVersions(&versions).ok()) return status;
  return Error(Code::kInternal,
               "CUDA, counting devices: this library was built with CUDA %d.%d, which needs driver "
               "%d or later; the driver here is for CUDA %d.%d",
               versions.toolkit / 1000, versions.toolkit % 1000 / 10, versions.least_driver,
               versions.driver / 1000, versions.driver % 1000 / 10);
}

Status GetCudaVersions(CudaVersions* versions) {
  *versions = CudaVersions();
  Status status = CudaStatus("asking for the toolkit", cudaRuntimeGetVersion(&versions->toolkit));
  if (status.ok()) {
    status = CudaStatus("asking for the driver", cudaDriverGetVersion(&versions->driver));
  }
  // The first driver of each major version, which runs all of its minor ones.
  const int major = versions->toolkit / 1000;
  versions->least_driver = major >= 13 ? 580 : major == 12 ? 525 : 450;
  return status;
}

Status CheckCudaDevice(int device) {
  int count = 0;
  Status status = CountCudaDevices(&count);
  if (!status.ok()) return status;
  if (count == 0) return Error(Code::kInternal, "the CUDA driver lists no device");
  if (device < 0 || device >= count) {
    return InvalidArgument("device_id = %d is outside [0, %d)", device, count);
  }
  const DeviceScope scope(device);
  int major = 0, minor = 0;
  cudaFuncAttributes attributes;
  status = scope.status();
  if (!status.ok()) return status;
  const cudaError_t error =
      cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(CheckBounds));
  status = CudaStatus("loading the kernels", error);
  if (error != cudaErrorNoKernelImageForDevice && error != cudaErrorInvalidDeviceFunction &&
      error != cudaErrorUnsupportedPtxVersion) {
    return status;
  }
  status = CudaStatus("asking a device",
                      cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  if (status.ok()) {
    status = CudaStatus("asking a device",
                        cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
  }
  if (!status.ok()) return status;
  return Error(Code::kInternal,
               "no kernel image for this GPU: device %d is of compute capability %d.%d (%s)",
               device, major, minor, cudaGetErrorString(error));
}

Status CurrentCudaDevice(int* device) {
  return CudaStatus("asking for the device", cudaGetDevice(device));
}

DeviceScope::DeviceScope(int device) {
  status_ = CurrentCudaDevice(&before_);
  if (!status_.ok() || device == before_) return;
  status_ = CudaStatus("choosing a device", cudaSetDevice(device));
  changed_ = status_.ok();
}

DeviceScope::~DeviceScope() {
  // It was the current one before, and nobody could do anything about an error.
  if (changed_ && cudaSetDevice(before_) != cudaSuccess) static_cast<void>(cudaGetLastError());
}

namespace {

// While there is one, this thread may allocate although another one records a CUDA graph, whose
// recording would be invalidated otherwise.
class RelaxedCapture {
 public:
  RelaxedCapture() { status_ = CudaStatus("choosing a mode", Exchange()); }
  RelaxedCapture(const RelaxedCapture&) = delete;
  RelaxedCapture& operator=(const RelaxedCapture&) = delete;
  ~RelaxedCapture() {
    if (status_.ok() && Exchange() != cudaSuccess) static_cast<void>(cudaGetLastError());
  }
  const Status& status() const { return status_; }

 private:
  cudaError_t Exchange() { return cudaThreadExchangeStreamCaptureMode(&mode_); }

  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
  Status status_;
};

// A stream of its own, which waits for no other: the default stream would wait for all of those
// that wait for it, and cannot be used while one of them is recorded.
class OwnStream {
 public:
  OwnStream() {
    status_ =
        CudaStatus("making a stream", cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
  }
  OwnStream(const OwnStream&) = delete;
  OwnStream& operator=(const OwnStream&) = delete;
  ~OwnStream() {
    if (status_.ok() && cudaStreamDestroy(stream_) != cudaSuccess) {
      static_cast<void>(cudaGetLastError());
    }
  }
  const Status& status() const { return status_; }
  cudaStream_t get() const { return stream_; }

 private:
  cudaStream_t stream_ = nullptr;
  Status status_;
};

}  // namespace

Status CudaBounds::Allocate(int on_device) {
  const DeviceScope scope(on_device);
  const RelaxedCapture relaxed;
  const OwnStream stream;
  Status status = scope.status();
  if (status.ok()) status = relaxed.status();
  if (status.ok()) status = stream.status();
  void* memory = nullptr;
  if (status.ok()) {
    status = CudaStatus("allocating on the device", cudaMalloc(&memory, sizeof(*device)));
  }
  if (!status.ok()) return status;
  device_id = on_device;
  device = static_cast<LucidBoundsError*>(memory);
  status = CudaStatus("allocating on the host", cudaMallocHost(&memory, sizeof(*host)));
  if (status.ok()) {
    host = static_cast<LucidBoundsError*>(memory);
    *host = LucidBoundsError();
    status = Clear(stream.get());
  }
  // No run clears it, so that a recorded run does not clear it again whenever it is replayed.
  if (status.ok()) status = WaitForCudaStream(stream.get());
  if (!status.ok()) Free();
  return status;
}

void CudaBounds::Free() {
  const RelaxedCapture relaxed;
  // Nobody could do anything about an error, and at the end of a process there is one.
  if (device && cudaFree(device) != cudaSuccess) static_cast<void>(cudaGetLastError());
  if (host && cudaFreeHost(host) != cudaSuccess) static_cast<void>(cudaGetLastError());
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

Status CudaBounds::Poll(bool wait) const {
  const volatile LucidBoundsError* seen = host;
  if (!wait && seen->inverse == 0) return Status();
  const DeviceScope scope(device_id);
  Status status = scope.status();
  if (status.ok()) status = CudaStatus("pooling", cudaDeviceSynchronize());
  if (!status.ok()) return status;
  const OwnStream stream;
  status = stream.status();
  if (status.ok()) status = CopyToHost(stream.get());
  if (status.ok()) status = WaitForCudaStream(stream.get());
  if (!status.ok()) return status;
  const Status error = BoundsStatus(*host);
  if (error.ok()) return error;
  *host = LucidBoundsError();
  status = Clear(stream.get());
  if (status.ok()) status = WaitForCudaStream(stream.get());
  return status.ok() ? error : status;
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
  return CudaStatus("computing norms",
                    Enqueue(kernel, plan.norm_blocks, 256, static_cast<cudaStream_t>(stream), job));
}

Status LaunchCudaEmbeddingBag(const EmbeddingBagArgs& a, const LucidCudaPlan& plan, void* scratch,
                              LucidBoundsError* error, void* stream_handle) {
  if (plan.blocks == 0 && plan.check_blocks == 0) return Status();
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_handle);
  char* const base = static_cast<char*>(scratch);
  CudaJob job = MakeJob(a, plan, error);
  if (plan.check_blocks > 0) {
    return CudaStatus("checking bounds", Enqueue(CheckBounds, plan.check_blocks, 256, stream, job));
  }
  const Kernel pool = ChoosePool(a.dtype, plan.vector_bytes, a.mode == kMax);
  if (!pool) return Error(Code::kInternal, "no kernel reads %d bytes", plan.vector_bytes);
  Status status;
  if (plan.norm_blocks > 0) {
    UseClips(base + plan.clips_at, &job);
    status = LaunchCudaClips(a, plan, job.clips, stream_handle);
  }
  if (status.ok() && plan.zeroed_bytes > 0) {
    SetPartials(plan, base, base + plan.counts_at, &job);
    status = ClearOnDevice(base, plan.zeroed_bytes, stream_handle);
  }
  if (!status.ok()) return status;
  return CudaStatus("pooling", Enqueue(pool, plan.blocks, plan.block_threads, stream, job));
}

}  // namespace lucid
