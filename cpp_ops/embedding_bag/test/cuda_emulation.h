// Enough of CUDA to compile cuda.cu as plain C++ and run it on the host, for tests only.
//
// Memory is the host's, so AddressSanitizer sees every access, and a vector load or store of a
// misaligned address ends the process. Blocks and warps run one after another in an order that
// LUCID_EMULATE_ORDER, a number, shuffles; the threads of a warp are fibers that change where they
// exchange values.
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <algorithm>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
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
enum cudaError_t : int { cudaSuccess = 0, cudaErrorMemoryAllocation = 2 };

namespace lucid {
namespace emulation {

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
    bool alive = false;
    unsigned exchanges = 0;  // that it has entered
    double given[2];         // to this exchange and the one before
  };

  Lane lanes[kLanes];
  ucontext_t scheduler;
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

  static void Entry() {
    Warp& w = Get();
    FinishSwitch(nullptr, &w.scheduler_stack, &w.scheduler_stack_size);
    (*w.body)();
    w.lanes[w.current].alive = false;
    StartSwitch(nullptr, w.scheduler_stack, w.scheduler_stack_size);
    swapcontext(&w.lanes[w.current].context, &w.scheduler);
    abort();
  }

  void Resume(int lane) {
    current = lane;
    StartSwitch(&scheduler_fake_stack, lanes[lane].stack.get(), kStack);
    swapcontext(&scheduler, &lanes[lane].context);
    FinishSwitch(scheduler_fake_stack, nullptr, nullptr);
  }

  void Yield() {
    Lane& lane = lanes[current];
    StartSwitch(&lane.fake_stack, scheduler_stack, scheduler_stack_size);
    swapcontext(&lane.context, &scheduler);
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

inline Index block_index, block_size, grid_size;
inline Index ThreadIndex() {
  const Warp& w = Warp::Get();
  return {w.first_thread + static_cast<unsigned>(w.current)};
}

inline unsigned Order() {
  const char* text = getenv("LUCID_EMULATE_ORDER");
  return text ? static_cast<unsigned>(strtoul(text, nullptr, 10)) : 0;
}

template <class F>
void Launch(unsigned blocks, unsigned threads, const F& kernel) {
  const std::function<void()> body = kernel;
  std::vector<unsigned> block_order(blocks), warp_order((threads + 31) / 32);
  std::iota(block_order.begin(), block_order.end(), 0u);
  std::iota(warp_order.begin(), warp_order.end(), 0u);
  std::mt19937 random(Order());
  if (Order()) std::shuffle(block_order.begin(), block_order.end(), random);
  block_size = {threads};
  grid_size = {blocks};
  for (const unsigned block : block_order) {
    block_index = {block};
    if (Order()) std::shuffle(warp_order.begin(), warp_order.end(), random);
    for (const unsigned warp : warp_order) {
      Warp::Get().Run(warp * 32, std::min(threads - warp * 32, 32u), body);
    }
  }
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

#define LUCID_LAUNCH(kernel, blocks, threads, stream, ...) \
  (static_cast<void>(stream),                              \
   ::lucid::emulation::Launch(blocks, threads, [&] { kernel(__VA_ARGS__); }))

template <class T>
T __ldg(const T* p) {
  T value;
  memcpy(&value, lucid::emulation::Aligned(p), sizeof(T));
  return value;
}
template <class T>
T __ldcg(const T* p) {
  return __ldg(p);
}
template <class T>
T atomicMax(T* p, T value) {
  const T old = *p;
  *p = old < value ? value : old;
  return old;
}
template <class T>
T atomicAdd(T* p, T value) {
  const T old = *p;
  *p = old + value;
  return old;
}
template <class T>
T atomicExch(T* p, T value) {
  const T old = *p;
  *p = value;
  return old;
}
template <class T>
T atomicCAS(T* p, T expected, T value) {
  const T old = *p;
  if (old == expected) *p = value;
  return old;
}
inline void __threadfence() {}

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width) {
  lucid::emulation::Warp& w = lucid::emulation::Warp::Get();
  if (mask != 0xffffffffu) abort();
  const int lane = w.current % width + static_cast<int>(delta);
  return static_cast<T>(
      w.Exchange(value, lane < width ? w.current + static_cast<int>(delta) : w.current));
}

inline cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t) {
  memset(p, value, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }
inline cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}
inline cudaError_t cudaMalloc(void** p, size_t bytes) {
  *p = malloc(bytes);
  return *p ? cudaSuccess : cudaErrorMemoryAllocation;
}
inline cudaError_t cudaMallocHost(void** p, size_t bytes) { return cudaMalloc(p, bytes); }
inline cudaError_t cudaFree(void* p) {
  free(p);
  return cudaSuccess;
}
inline cudaError_t cudaFreeHost(void* p) { return cudaFree(p); }
inline cudaError_t cudaMemset(void* p, int value, size_t bytes) {
  return cudaMemsetAsync(p, value, bytes, nullptr);
}
enum cudaMemcpyKind { cudaMemcpyDeviceToHost };
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind,
                                   cudaStream_t) {
  memcpy(to, from, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone };
inline cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
