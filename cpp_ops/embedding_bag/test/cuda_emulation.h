// Enough of CUDA to compile cuda.cu as plain C++ and run it on the host, for tests only.
//
// Memory is the host's, so AddressSanitizer sees every access, and a vector load or store of a
// misaligned address ends the process. Blocks and warps run one after another in an order that
// LUCID_EMULATE_ORDER, a number, shuffles; the threads of a warp are fibers that change where they
// exchange values. LUCID_EMULATE_THREADS, a number, is how many threads of the host run blocks at
// once, for ThreadSanitizer.
//
// Work on a stream is done at once. lucid_emulation_set and lucid_emulation_get change and tell
// what kind of machine this is, and what was asked of it: see Machine.
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <algorithm>
#include <atomic>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <thread>
#include <type_traits>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#endif

// The order of the counters of finished parts. ThreadSanitizer must report another.
#if !defined(LUCID_EMULATED_ORDER)
#define LUCID_EMULATED_ORDER __ATOMIC_ACQ_REL
#endif

#define __global__ static
#define __device__
#define __forceinline__ inline
#define __noinline__    __attribute__((noinline))
#define __launch_bounds__(...)
#define __grid_constant__

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

using cudaStream_t = void*;
enum cudaError_t : int {
  cudaSuccess = 0,
  cudaErrorMemoryAllocation = 2,
  cudaErrorInsufficientDriver = 35,
  cudaErrorInvalidDeviceFunction = 98,
  cudaErrorInvalidDevice = 101,
  cudaErrorNoKernelImageForDevice = 209,
  cudaErrorUnsupportedPtxVersion = 222,
  cudaErrorStreamCaptureUnsupported = 900,
  cudaErrorStreamCaptureInvalidated = 901,
};
enum cudaStreamCaptureMode {
  cudaStreamCaptureModeGlobal,
  cudaStreamCaptureModeThreadLocal,
  cudaStreamCaptureModeRelaxed
};
enum cudaStreamCaptureStatus {
  cudaStreamCaptureStatusNone,
  cudaStreamCaptureStatusActive,
  cudaStreamCaptureStatusInvalidated
};

namespace lucid {
namespace emulation {

// The machine, by the names of its numbers. Some can be changed, others count.
struct Machine {
  std::atomic<int64_t> devices{1};
  std::atomic<int64_t> kernel_images{1};  // 0: none for this device
  std::atomic<int64_t> driver{13000};     // below toolkit: it does not suffice
  std::atomic<int64_t> toolkit{13000};
  std::atomic<int64_t> failing_mallocs{0};  // of those to come
  // A CUDA graph is being recorded from every stream, in global mode. What invalidates that sets
  // `invalidated`.
  std::atomic<int64_t> capturing{0}, invalidated{0};
  std::atomic<int64_t> waits{0};          // for a stream or a device
  std::atomic<int64_t> other_devices{0};  // allocations while a device other than 0 was current
  std::atomic<int64_t> device_switches{0};

  static Machine& Get() {
    static Machine machine;
    return machine;
  }

  std::atomic<int64_t>* Find(const char* name) {
    const struct {
      const char* name;
      std::atomic<int64_t>* number;
    } all[] = {{"devices", &devices},
               {"kernel_images", &kernel_images},
               {"driver", &driver},
               {"toolkit", &toolkit},
               {"capturing", &capturing},
               {"failing_mallocs", &failing_mallocs},
               {"waits", &waits},
               {"invalidated", &invalidated},
               {"other_devices", &other_devices},
               {"device_switches", &device_switches}};
    for (const auto& one : all) {
      if (strcmp(one.name, name) == 0) return one.number;
    }
    return nullptr;
  }
};

// What CUDA knows of a thread of the host.
struct HostThread {
  cudaError_t last_error = cudaSuccess;
  cudaStreamCaptureMode mode = cudaStreamCaptureModeGlobal;
  int device = 0;

  static HostThread& Get() {
    static thread_local HostThread thread;
    return thread;
  }
};

inline cudaError_t Answer(cudaError_t error) {
  if (error != cudaSuccess) HostThread::Get().last_error = error;
  return error;
}

// What CUDA forbids while another thread records in global mode, unless this one is relaxed.
inline cudaError_t Unsafe() {
  Machine& machine = Machine::Get();
  if (!machine.capturing || HostThread::Get().mode == cudaStreamCaptureModeRelaxed) {
    return cudaSuccess;
  }
  machine.invalidated = 1;
  return Answer(cudaErrorStreamCaptureUnsupported);
}

// The default stream, which waits for the streams that wait for it.
inline cudaError_t CheckStream(cudaStream_t stream) {
  if (stream || !Machine::Get().capturing) return cudaSuccess;
  Machine::Get().invalidated = 1;
  return Answer(cudaErrorStreamCaptureInvalidated);
}

// CUDA graphs: while `recording`, work is put aside in the place of being done.
struct Recorder {
  bool recording = false;
  std::vector<std::function<void()>> work;

  static Recorder& Get() {
    static Recorder recorder;
    return recorder;
  }
};

// Does something that was enqueued, or puts it aside.
template <class F>
void Do(const F& something) {
  Recorder& recorder = Recorder::Get();
  if (recorder.recording) {
    recorder.work.emplace_back(something);
  } else {
    something();
  }
}

struct Index {
  unsigned x;
};

// A warp under way.
struct Warp {
  static constexpr int kLanes = 32;
  static constexpr size_t kStack = 256 << 10;

  struct Lane {
    ucontext_t context;
    std::unique_ptr<char[]> stack{new char[kStack]};
    void* fake_stack = nullptr;
#if defined(__SANITIZE_THREAD__)
    void* fiber = __tsan_create_fiber(0);
    ~Lane() { __tsan_destroy_fiber(fiber); }
#endif
    bool alive = false;
    unsigned exchanges = 0;  // that it has entered
    double given[2];         // to this exchange and the one before
  };

  Lane lanes[kLanes];
  ucontext_t scheduler;
#if defined(__SANITIZE_THREAD__)
  void* scheduler_fiber = __tsan_get_current_fiber();
#endif
  void* scheduler_fake_stack = nullptr;
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_size = 0;
  int current = -1;
  unsigned first_thread = 0;
  const std::function<void()>* body = nullptr;

  static Warp& Get() {
    static thread_local Warp warp;
    return warp;
  }

  static void StartSwitch(void** save, const void* bottom, size_t size) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(save, bottom, size);
#else
    static_cast<void>(save);
    static_cast<void>(bottom);
    static_cast<void>(size);
#endif
  }
  static void FinishSwitch(void* save, const void** bottom, size_t* size) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(save, bottom, size);
#else
    static_cast<void>(save);
    static_cast<void>(bottom);
    static_cast<void>(size);
#endif
  }

  // To a lane, or to the scheduler: null.
  void Switch(ucontext_t* from, Lane* to) {
#if defined(__SANITIZE_THREAD__)
    __tsan_switch_to_fiber(to ? to->fiber : scheduler_fiber, 0);
#endif
    swapcontext(from, to ? &to->context : &scheduler);
  }

  static void Entry() {
    Warp& w = Get();
    FinishSwitch(nullptr, &w.scheduler_stack, &w.scheduler_stack_size);
    (*w.body)();
    w.lanes[w.current].alive = false;
    StartSwitch(nullptr, w.scheduler_stack, w.scheduler_stack_size);
    w.Switch(&w.lanes[w.current].context, nullptr);
    abort();
  }

  void Resume(int lane) {
    current = lane;
    StartSwitch(&scheduler_fake_stack, lanes[lane].stack.get(), kStack);
    Switch(&scheduler, &lanes[lane]);
    FinishSwitch(scheduler_fake_stack, nullptr, nullptr);
  }

  void Yield() {
    Lane& lane = lanes[current];
    StartSwitch(&lane.fake_stack, scheduler_stack, scheduler_stack_size);
    Switch(&lane.context, nullptr);
    FinishSwitch(lane.fake_stack, &scheduler_stack, &scheduler_stack_size);
  }

  static void Prepare(Lane* lane) {
    getcontext(&lane->context);
    lane->context.uc_stack.ss_sp = lane->stack.get();
    lane->context.uc_stack.ss_size = kStack;
    lane->context.uc_link = nullptr;
    makecontext(&lane->context, Entry, 0);
  }

  void Run(unsigned first, unsigned count, const std::function<void()>& thread_body) {
    first_thread = first;
    body = &thread_body;
    for (unsigned i = 0; i < kLanes; ++i) {
      Lane& lane = lanes[i];
      lane.alive = i < count;
      lane.exchanges = 0;
      if (!lane.alive) continue;
      Prepare(&lane);
    }
    for (bool any = true; any;) {
      any = false;
      for (int i = 0; i < kLanes; ++i) {
        if (!lanes[i].alive) continue;
        any = true;
        Resume(i);
      }
    }
    current = -1;
  }

  // What all lanes of the warp give, each with its own: the value of `source`.
  double Exchange(double value, int source) {
    Lane& lane = lanes[current];
    const unsigned number = lane.exchanges++;
    lane.given[number % 2] = value;
    for (int i = 0; i < kLanes; ++i) {
      while (lanes[i].alive && lanes[i].exchanges <= number) Yield();
      if (lanes[i].exchanges <= number) {
        fprintf(stderr, "a thread of the warp left before an exchange of all\n");
        abort();
      }
    }
    return lanes[source].given[number % 2];
  }
};

inline thread_local Index block_index, block_size, grid_size;
inline Index ThreadIndex() {
  const Warp& w = Warp::Get();
  return {w.first_thread + static_cast<unsigned>(w.current)};
}

inline unsigned Order() {
  const char* text = getenv("LUCID_EMULATE_ORDER");
  return text ? static_cast<unsigned>(strtoul(text, nullptr, 10)) : 0;
}

inline unsigned Threads() {
  const char* text = getenv("LUCID_EMULATE_THREADS");
  return text ? std::max(1u, static_cast<unsigned>(strtoul(text, nullptr, 10))) : 1;
}

template <class F>
void Run(unsigned blocks, unsigned threads, const F& kernel) {
  const std::function<void()> body = kernel;
  std::vector<unsigned> block_order(blocks);
  std::iota(block_order.begin(), block_order.end(), 0u);
  std::mt19937 random(Order());
  if (Order()) std::shuffle(block_order.begin(), block_order.end(), random);
  std::atomic<size_t> next{0};
  const auto work = [&](unsigned seed) {
    std::vector<unsigned> warp_order((threads + 31) / 32);
    std::iota(warp_order.begin(), warp_order.end(), 0u);
    std::mt19937 shuffler(seed);
    block_size = {threads};
    grid_size = {blocks};
    for (size_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < block_order.size();) {
      block_index = {block_order[i]};
      if (Order()) std::shuffle(warp_order.begin(), warp_order.end(), shuffler);
      for (const unsigned warp : warp_order) {
        Warp::Get().Run(warp * 32, std::min(threads - warp * 32, 32u), body);
      }
    }
  };
  std::vector<std::thread> others;
  for (unsigned i = 1; i < Threads(); ++i) others.emplace_back(work, random() + i);
  work(random());
  for (std::thread& other : others) other.join();
}

// ONNX Runtime's CPU provider has no streams: it runs the kernels on the default one.
template <class F>
cudaError_t Launch(unsigned blocks, unsigned threads, cudaStream_t, const F& kernel) {
  Do([=] { Run(blocks, threads, kernel); });
  return cudaSuccess;
}

template <class T>
const T* Aligned(const T* p) {
  if (reinterpret_cast<uintptr_t>(p) % alignof(T) != 0) {
    fprintf(stderr, "a load of %zu bytes from the misaligned address %p\n", sizeof(T),
            static_cast<const void*>(p));
    abort();
  }
  return p;
}

}  // namespace emulation
}  // namespace lucid

#define threadIdx (::lucid::emulation::ThreadIndex())
#define blockIdx  (::lucid::emulation::block_index)
#define blockDim  (::lucid::emulation::block_size)
#define gridDim   (::lucid::emulation::grid_size)

template <class T>
T __ldg(const T* p) {
  T value;
  memcpy(&value, lucid::emulation::Aligned(p), sizeof(T));
  return value;
}
// Numbers that several threads write, all the same, are atomic.
template <class T>
T __ldcg(const T* p) {
  if constexpr (std::is_arithmetic<T>::value) {
    T value;
    __atomic_load(lucid::emulation::Aligned(p), &value, __ATOMIC_RELAXED);
    return value;
  } else {
    return __ldg(p);
  }
}
template <class T>
void __stcg(T* p, T value) {
  __atomic_store(p, &value, __ATOMIC_RELAXED);
}
template <class T>
T atomicMax(T* p, T value) {
  T old = __atomic_load_n(p, __ATOMIC_RELAXED);
  while (old < value &&
         !__atomic_compare_exchange_n(p, &old, value, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  return old;
}
template <class T>
T atomicAdd(T* p, T value) {
  return __atomic_fetch_add(p, value, __ATOMIC_RELAXED);
}
// The two that take and leave a lock, with the fences that stand beside them.
template <class T>
T atomicExch(T* p, T value) {
  return __atomic_exchange_n(p, value, __ATOMIC_RELEASE);
}
template <class T>
T atomicCAS(T* p, T expected, T value) {
  __atomic_compare_exchange_n(p, &expected, value, false, __ATOMIC_ACQUIRE, __ATOMIC_RELAXED);
  return expected;
}
inline void __threadfence() {}
inline uint32_t __byte_perm(uint32_t low, uint32_t high, uint32_t selector) {
  const uint64_t bytes = static_cast<uint64_t>(high) << 32 | low;
  uint32_t result = 0;
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned which = selector >> (4 * i) & 7u;
    result |= static_cast<uint32_t>(bytes >> (8 * which) & 255u) << (8 * i);
  }
  return result;
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width) {
  lucid::emulation::Warp& w = lucid::emulation::Warp::Get();
  if (mask != 0xffffffffu) abort();
  const int lane = w.current % width + static_cast<int>(delta);
  return static_cast<T>(
      w.Exchange(value, lane < width ? w.current + static_cast<int>(delta) : w.current));
}

inline cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t stream) {
  const cudaError_t error = lucid::emulation::CheckStream(stream);
  if (error == cudaSuccess) lucid::emulation::Do([=] { memset(p, value, bytes); });
  return error;
}
inline cudaError_t cudaGetLastError() {
  cudaError_t& last = lucid::emulation::HostThread::Get().last_error;
  const cudaError_t error = last;
  last = cudaSuccess;
  return error;
}
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorMemoryAllocation         ? "out of memory"
         : error == cudaErrorInsufficientDriver     ? "CUDA driver version is insufficient"
         : error == cudaErrorInvalidDevice          ? "invalid device ordinal"
         : error == cudaErrorNoKernelImageForDevice ? "no kernel image is available"
         : error == cudaSuccess                     ? "no error"
                                                    : "operation not permitted while capturing";
}
inline cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = static_cast<int>(lucid::emulation::Machine::Get().toolkit);
  return cudaSuccess;
}
inline cudaError_t cudaDriverGetVersion(int* version) {
  *version = static_cast<int>(lucid::emulation::Machine::Get().driver);
  return cudaSuccess;
}
inline cudaError_t cudaGetDeviceCount(int* count) {
  const lucid::emulation::Machine& machine = lucid::emulation::Machine::Get();
  *count = static_cast<int>(machine.devices);
  return lucid::emulation::Answer(
      machine.driver / 1000 < machine.toolkit / 1000 ? cudaErrorInsufficientDriver : cudaSuccess);
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = lucid::emulation::HostThread::Get().device;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int device) {
  lucid::emulation::Machine& machine = lucid::emulation::Machine::Get();
  if (device < 0 || device >= machine.devices) {
    return lucid::emulation::Answer(cudaErrorInvalidDevice);
  }
  ++machine.device_switches;
  lucid::emulation::HostThread::Get().device = device;
  return cudaSuccess;
}
enum cudaDeviceAttr { cudaDevAttrComputeCapabilityMajor, cudaDevAttrComputeCapabilityMinor };
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrComputeCapabilityMajor ? 7 : 0;
  return cudaSuccess;
}
struct cudaFuncAttributes {};
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, const void*) {
  return lucid::emulation::Answer(lucid::emulation::Machine::Get().kernel_images
                                      ? cudaSuccess
                                      : cudaErrorNoKernelImageForDevice);
}
// Memory is not zeros at first.
inline cudaError_t cudaMalloc(void** p, size_t bytes) {
  using namespace lucid::emulation;
  Machine& machine = Machine::Get();
  const cudaError_t error = Unsafe();
  if (error != cudaSuccess) return error;
  if (machine.failing_mallocs > 0) {
    --machine.failing_mallocs;
    return Answer(cudaErrorMemoryAllocation);
  }
  if (HostThread::Get().device != 0) ++machine.other_devices;
  *p = malloc(bytes);
  if (!*p) return Answer(cudaErrorMemoryAllocation);
  memset(*p, 0xA5, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaMallocHost(void** p, size_t bytes) { return cudaMalloc(p, bytes); }
inline cudaError_t cudaFree(void* p) {
  const cudaError_t error = lucid::emulation::Unsafe();
  if (error == cudaSuccess) free(p);
  return error;
}
inline cudaError_t cudaFreeHost(void* p) { return cudaFree(p); }
enum cudaMemcpyKind { cudaMemcpyDeviceToHost };
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind,
                                   cudaStream_t) {
  lucid::emulation::Do([=] { memcpy(to, from, bytes); });
  return cudaSuccess;
}
enum : unsigned { cudaStreamNonBlocking = 1 };
inline cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  *stream = malloc(1);
  return *stream ? cudaSuccess : lucid::emulation::Answer(cudaErrorMemoryAllocation);
}
inline cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  free(stream);
  return cudaSuccess;
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t) {
  ++lucid::emulation::Machine::Get().waits;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceSynchronize() {
  ++lucid::emulation::Machine::Get().waits;
  return lucid::emulation::Unsafe();
}
inline cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  std::swap(lucid::emulation::HostThread::Get().mode, *mode);
  return cudaSuccess;
}
// Another thread records, so no stream of this one is being recorded.
inline cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
