// Sorting on the device, which CUB does: the one part of the gradient that is not this project's.
//
// LUCID_EMULATE_CUDA compiles the same two functions over memory of the host.
#include "embedding_bag_grad/cuda.h"

#if defined(LUCID_EMULATE_CUDA)

#include <algorithm>
#include <numeric>
#include <vector>

#include "embedding_bag/test/cuda_emulation.h"

namespace lucid {

Status PlanCudaSort(int64_t, int, int64_t* bytes) {
  *bytes = 8;  // not 0, so that a caller who does not allocate it is found
  return Status();
}

Status LaunchCudaSort(void* scratch, int64_t bytes, const uint32_t* keys, uint32_t* sorted_keys,
                      const uint32_t* values, uint32_t* sorted_values, int64_t n, int bits, void*) {
  if (!scratch || bytes != 8) return Error(Code::kInternal, "sorting has no scratch memory");
  const uint32_t mask = bits < 32 ? (uint32_t{1} << bits) - 1 : ~uint32_t{0};
  emulation::Do([=] {
    std::vector<uint32_t> order(static_cast<size_t>(n));
    std::iota(order.begin(), order.end(), 0u);
    std::stable_sort(order.begin(), order.end(),
                     [&](uint32_t a, uint32_t b) { return (keys[a] & mask) < (keys[b] & mask); });
    for (int64_t i = 0; i < n; ++i) {
      sorted_keys[i] = keys[order[static_cast<size_t>(i)]];
      sorted_values[i] = values[order[static_cast<size_t>(i)]];
    }
  });
  return Status();
}

}  // namespace lucid

#elif defined(LUCID_WITHOUT_CUB)

namespace lucid {

Status PlanCudaSort(int64_t, int, int64_t*) {
  return Error(Code::kInternal, "this library was built without CUB, which sorts on the GPU");
}
Status LaunchCudaSort(void*, int64_t, const uint32_t*, uint32_t*, const uint32_t*, uint32_t*,
                      int64_t, int, void*) {
  return Error(Code::kInternal, "this library was built without CUB, which sorts on the GPU");
}

}  // namespace lucid

#else

#include <cuda_runtime.h>

#include <cub/device/device_radix_sort.cuh>

namespace lucid {
namespace {

Status Sort(void* scratch, size_t* bytes, const uint32_t* keys, uint32_t* sorted_keys,
            const uint32_t* values, uint32_t* sorted_values, int64_t n, int bits, void* stream) {
  // CUB takes the last error for its own, whoever left it there.
  static_cast<void>(cudaGetLastError());
  const cudaError_t error = cub::DeviceRadixSort::SortPairs(
      scratch, *bytes, keys, sorted_keys, values, sorted_values, static_cast<int>(n), 0, bits,
      static_cast<cudaStream_t>(stream));
  if (error == cudaSuccess) return Status();
  static_cast<void>(cudaGetLastError());
  return Error(Code::kInternal, "CUDA, sorting: %s", cudaGetErrorString(error));
}

}  // namespace

Status PlanCudaSort(int64_t n, int bits, int64_t* bytes) {
  size_t found = 0;
  const Status status = Sort(nullptr, &found, nullptr, nullptr, nullptr, nullptr, n, bits, nullptr);
  *bytes = static_cast<int64_t>(found > 0 ? found : 1);
  return status;
}

Status LaunchCudaSort(void* scratch, int64_t bytes, const uint32_t* keys, uint32_t* sorted_keys,
                      const uint32_t* values, uint32_t* sorted_values, int64_t n, int bits,
                      void* stream) {
  size_t size = static_cast<size_t>(bytes);
  return Sort(scratch, &size, keys, sorted_keys, values, sorted_values, n, bits, stream);
}

}  // namespace lucid

#endif
