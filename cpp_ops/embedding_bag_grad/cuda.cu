// The CUDA kernels of EmbeddingBag's gradient. cuda.h says what they compute, cuda_plan.cc what
// they need; bags are found and their parts joined as embedding_bag/cuda-inl.h does it for the rows
// of a table.
#include "embedding_bag/cuda-inl.h"
#include "embedding_bag_grad/cuda.h"

namespace lucid {
namespace {

constexpr uint32_t kNoBag = 0xffffffffu;  // there are fewer

// A gradient, as the kernels see it.
struct GradJob {
  CudaJob bags;  // the forward call, of which nothing is pooled
  CudaJob rows;  // the dense gradient's rows as bags of sorted positions
  const char* grads;
  char* values;
  int64_t* entry_rows;
  char* grad_weights;
  uint32_t* padded;  // see CudaGradParts
  uint32_t* bag_of;
  uint32_t* keys;
  const uint32_t* sorted_keys;
  uint32_t* positions;
  const uint32_t* sorted_positions;
  uint32_t* sorted_bags;
  uint32_t* row_starts;
  uint32_t* frequencies;
  char* divisors;
  int32_t* winners;
  int64_t num_entries;
  bool by_entry;  // the sorted positions are those that give something
};

__device__ __forceinline__ int64_t FirstThread() {
  return static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
}
__device__ __forceinline__ int64_t AllThreads() {
  return static_cast<int64_t>(gridDim.x) * blockDim.x;
}

// The bag of a position, or -1: the last one that begins at or before it, if it does not end there.
// Of offsets that are refused, it is some bag.
__device__ __forceinline__ int64_t BagOf(const CudaJob& job, int64_t position) {
  if (job.num_bags == 0) return -1;
  if (!job.offsets) return position / job.bag_length;
  int64_t low = 0, high = job.num_bags;
  while (high - low > 1) {
    const int64_t middle = low + (high - low) / 2;
    if (BagBegin(job, middle) <= position) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return BagBegin(job, low) <= position && position < BagBegin(job, low + 1) ? low : -1;
}

// How many of n sorted keys are less.
__device__ __forceinline__ int64_t LowerBound(const uint32_t* keys, int64_t n, int64_t key) {
  int64_t low = 0, high = n;
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    if (static_cast<int64_t>(keys[middle]) < key) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

// ---- Which positions give which row something.

__global__ void __launch_bounds__(256) PlaceEntries(const __grid_constant__ GradJob job) {
  const CudaJob& bags = job.bags;
  CheckOffsets(bags, blockIdx.x, gridDim.x);
  for (int64_t k = FirstThread(); k < bags.num_positions; k += AllThreads()) {
    const int64_t bag = BagOf(bags, k);
    uint32_t key = static_cast<uint32_t>(bags.rows), found = kNoBag;
    if (bag >= 0) {
      const int64_t index = IndexAt(bags.indices, bags.wide_indices, k);
      if (static_cast<uint64_t>(index) >= static_cast<uint64_t>(bags.rows)) {
        Report(bags, bags.index_place + static_cast<uint64_t>(k), index, 0);
      } else if (index != bags.padding) {
        key = static_cast<uint32_t>(index);
        found = static_cast<uint32_t>(bag);
      } else if (job.padded) {
        atomicAdd(job.padded + bag, 1u);
      }
    }
    job.bag_of[k] = found;
    if (job.keys) {
      job.keys[k] = key;
      job.positions[k] = static_cast<uint32_t>(k);
    }
  }
}

// What PlaceEntries would find, of indices that are right.
__global__ void __launch_bounds__(256)
    CountEntries(const __grid_constant__ CudaJob bags, unsigned long long* count) {
  CheckOffsets(bags, blockIdx.x, gridDim.x);
  unsigned long long found = 0;
  for (int64_t k = FirstThread(); k < bags.num_positions; k += AllThreads()) {
    found += BagOf(bags, k) >= 0 && IndexAt(bags.indices, bags.wide_indices, k) != bags.padding;
  }
  if (found > 0) atomicAdd(count, found);
}

// What grad_output is divided by: the rows of each bag, and 1 for none.
__global__ void __launch_bounds__(256) CountRows(const __grid_constant__ GradJob job, bool wide) {
  for (int64_t bag = FirstThread(); bag < job.bags.num_bags; bag += AllThreads()) {
    int64_t count = BagBegin(job.bags, bag + 1) - BagBegin(job.bags, bag);
    if (job.padded) count -= job.padded[bag];
    if (count < 1) count = 1;
    if (wide) {
      reinterpret_cast<double*>(job.divisors)[bag] = static_cast<double>(count);
    } else {
      reinterpret_cast<float*>(job.divisors)[bag] = static_cast<float>(count);
    }
  }
}

// The sorted positions of every row of the table, and the bags of all.
__global__ void __launch_bounds__(256) FindRows(const __grid_constant__ GradJob job) {
  const int64_t n = job.bags.num_positions;
  for (int64_t j = FirstThread(); j < n; j += AllThreads()) {
    job.sorted_bags[j] = job.bag_of[job.sorted_positions[j]];
  }
  for (int64_t row = FirstThread(); row <= job.bags.rows; row += AllThreads()) {
    job.row_starts[row] = static_cast<uint32_t>(LowerBound(job.sorted_keys, n, row));
  }
}

__global__ void __launch_bounds__(256) FindFrequencies(const __grid_constant__ GradJob job) {
  const int64_t n = job.bags.num_positions;
  for (int64_t j = FirstThread(); j < n; j += AllThreads()) {
    const int64_t row = job.sorted_keys[j];
    if (row >= job.bags.rows) continue;
    job.frequencies[job.sorted_positions[j]] = static_cast<uint32_t>(
        LowerBound(job.sorted_keys, n, row + 1) - LowerBound(job.sorted_keys, n, row));
  }
}

// Keys that bring the positions that give something to the front.
__global__ void __launch_bounds__(256) MarkEntries(const __grid_constant__ GradJob job) {
  for (int64_t k = FirstThread(); k < job.bags.num_positions; k += AllThreads()) {
    job.keys[k] = job.bag_of[k] == kNoBag;
  }
}

__global__ void CheckEntries(const __grid_constant__ GradJob job) {
  const int64_t found = LowerBound(job.sorted_keys, job.bags.num_positions, 1);
  if (threadIdx.x == 0 && found != job.num_entries) {
    ReportTo(job.bags.error, kEntriesPlace, found, 0, job.num_entries, -1, 0);
  }
}

// ---- The maxima.

// The position whose row has the maximum of a bag in a column: the first of equals, or the first
// NaN. A thread takes a column of a bag.
template <class T>
__global__ void __launch_bounds__(256) FindWinners(const __grid_constant__ GradJob job) {
  using A = Accumulator<T>;
  const CudaJob& bags = job.bags;
  const int64_t count = bags.num_bags * bags.columns;
  for (int64_t i = FirstThread(); i < count; i += AllThreads()) {
    const int64_t bag = i / bags.columns, column = i - bag * bags.columns;
    const int64_t end = BagBegin(bags, bag + 1);
    int32_t winner = -1;
    A best = 0;
    for (int64_t k = BagBegin(bags, bag); k < end; ++k) {
      if (job.bag_of[k] != static_cast<uint32_t>(bag)) continue;  // padded, or refused
      const int64_t index = IndexAt(bags.indices, bags.wide_indices, k);
      A x = LoadElement<T>(bags, bags.weight + index * bags.row_bytes, column);
      if (bags.clips) x *= Load<A>(bags.clips + k * static_cast<int64_t>(sizeof(A)));
      if (winner < 0 || (best == best && !(x <= best))) {
        best = x;
        winner = static_cast<int32_t>(k);
      }
    }
    job.winners[i] = winner;
  }
}

// ---- Dense: sums of what the positions of a row give.

template <class T, int kBytes>
__device__ __forceinline__ void PoolEntries(const GradJob& job, int64_t begin, int size,
                                            int64_t vector, Accumulator<T>* acc) {
  using A = Accumulator<T>;
  constexpr int n = kElements<T, kBytes>;
  const char* const column = job.grads + vector * kBytes;
  Start<A, n>(false, acc);
  for (int done = 0; done < size; done += kAhead) {
    uint32_t bag[kAhead], position[kAhead];
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      if (done + u >= size) continue;
      bag[u] = job.sorted_bags[begin + done + u];
      position[u] = job.sorted_positions[begin + done + u];
    }
    Word<kBytes> word[kAhead];
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      if (done + u >= size) continue;
      word[u] = Load<Word<kBytes>>(column + static_cast<uint64_t>(bag[u]) * job.rows.row_bytes);
    }
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      if (done + u >= size) continue;
      A x[n];
      Decode<T, kBytes>(job.rows, word[u], x);
      if (job.divisors) {
        const A divisor = Load<A>(job.divisors + bag[u] * sizeof(A));
#pragma unroll
        for (int i = 0; i < n; ++i) x[i] /= divisor;
      } else if (job.bags.per_sample_weights) {
        const A weight = LoadElement<T>(job.bags, job.bags.per_sample_weights, position[u]);
#pragma unroll
        for (int i = 0; i < n; ++i) x[i] *= weight;
      } else if (job.winners) {
        const int32_t* const winners = job.winners + bag[u] * job.bags.columns + vector * n;
#pragma unroll
        for (int i = 0; i < n; ++i) {
          if (winners[i] != static_cast<int32_t>(position[u])) x[i] = 0;
        }
      }
#pragma unroll
      for (int i = 0; i < n; ++i) acc[i] += x[i];
    }
  }
}

template <class T, int kBytes>
__global__ void __launch_bounds__(256, kBlocks<T, kBytes>)
    PoolRows(const __grid_constant__ GradJob job) {
  constexpr int n = kElements<T, kBytes>;
  Chunk c;
  int64_t vector;
  if (!FindPart(job.rows, blockIdx.x, &c, &vector)) return;
  Accumulator<T> acc[n];
  PoolEntries<T, kBytes>(job, c.begin, c.size, vector, acc);
  Deliver<T, n, Pooling::kSums>(job.rows, c, vector, c.size, acc);
}

// ---- Sparse: what each position gives. A thread takes an element.

template <class T>
__global__ void __launch_bounds__(256) GiveValues(const __grid_constant__ GradJob job) {
  using A = Accumulator<T>;
  const CudaJob& bags = job.bags;
  const int64_t width = bags.columns > 0 ? bags.columns : 1;  // the rows are written either way
  const int64_t count = job.num_entries * width;
  for (int64_t i = FirstThread(); i < count; i += AllThreads()) {
    const int64_t entry = i / width, column = i - entry * width;
    const int64_t k = job.by_entry ? job.sorted_positions[entry] : entry;
    const uint32_t bag = job.bag_of[k];
    const bool gives = bag != kNoBag;  // or the call is refused
    if (column == 0) {
      job.entry_rows[entry] = gives ? IndexAt(bags.indices, bags.wide_indices, k) : 0;
    }
    if (bags.columns == 0) continue;
    A x = 0;
    if (gives) {
      const int64_t at = static_cast<int64_t>(bag) * bags.columns + column;
      x = LoadElement<T>(bags, job.grads, at);
      if (job.divisors) x /= Load<A>(job.divisors + bag * sizeof(A));
      if (bags.per_sample_weights) x *= LoadElement<T>(bags, bags.per_sample_weights, k);
      if (job.winners && job.winners[at] != static_cast<int32_t>(k)) x = 0;
      if (job.frequencies) x /= static_cast<A>(job.frequencies[k]);
    }
    FromAccumulator(CanonicalNan(x), reinterpret_cast<T*>(job.values) + i);
  }
}

// ---- The gradient of per_sample_weights.

// Spread over the lanes of a position and folded as norms are.
template <class T>
__global__ void __launch_bounds__(256) DotRows(const __grid_constant__ GradJob job) {
  using A = Accumulator<T>;
  const CudaJob& bags = job.bags;
  const int lane = static_cast<int>(threadIdx.x % kSharers<T>);
  const int64_t k = PositionOf<T>(blockIdx.x);
  const bool inside = k < bags.num_positions;
  const uint32_t bag = inside ? job.bag_of[k] : kNoBag;
  A sum = 0;
  if (bag != kNoBag) {
    const int64_t index = IndexAt(bags.indices, bags.wide_indices, k);
    const char* const row = bags.weight + index * bags.row_bytes;
    const char* const grad =
        job.grads + static_cast<int64_t>(bag) * bags.columns * static_cast<int64_t>(sizeof(T));
    const A clip =
        bags.clips ? Load<A>(bags.clips + k * static_cast<int64_t>(sizeof(A))) : static_cast<A>(1);
    for (int64_t i = lane; i < bags.columns; i += kSharers<T>) {
      sum += LoadElement<T>(bags, grad, i) * (LoadElement<T>(bags, row, i) * clip);
    }
  }
  sum = FoldSum<T>(sum);
  if (lane == 0 && inside) {
    FromAccumulator(CanonicalNan(sum), reinterpret_cast<T*>(job.grad_weights) + k);
  }
}

// ---- Launching.

using Kernel = void (*)(GradJob job);

// The kernels of one type of numbers.
struct Kernels {
  Kernel pool, winners, values, dots;
  int sharers;
};

// The widths are those of embedding_bag/cuda_plan.cc.
template <class T, int kWide, int kMiddle, int kNarrow>
Kernels KernelsOf(int bytes) {
  const Kernel pool = bytes == kWide     ? PoolRows<T, kWide>
                      : bytes == kMiddle ? PoolRows<T, kMiddle>
                                         : PoolRows<T, kNarrow>;
  return {pool, FindWinners<T>, GiveValues<T>, DotRows<T>, kSharers<T>};
}

Kernels ChooseKernels(int32_t dtype, int bytes) {
  switch (dtype) {
    case kFloat32:
      return KernelsOf<float, 16, 4, 4>(bytes);
    case kFloat16:
      return KernelsOf<Float16, 16, 4, 2>(bytes);
    case kBFloat16:
      return KernelsOf<BFloat16, 16, 4, 2>(bytes);
    default:
      return KernelsOf<double, 16, 8, 8>(bytes);
  }
}

// Blocks of 256 threads for so many things, which they share if those are very many.
unsigned BlocksFor(int64_t things) {
  constexpr int64_t kMostBlocks = 1 << 20;
  const int64_t blocks = things / 256 + (things % 256 != 0);
  return static_cast<unsigned>(blocks < 1 ? 1 : blocks < kMostBlocks ? blocks : kMostBlocks);
}

// What is where in the scratch memory.
template <class E>
E* Part(char* scratch, int64_t at) {
  return at < 0 ? nullptr : reinterpret_cast<E*>(scratch + at);
}

}  // namespace

Status CudaGrad::LaunchCount(int64_t* num_entries, LucidBoundsError* error, void* stream) const {
  const Status status = ClearOnDevice(num_entries, sizeof(*num_entries), stream);
  if (!status.ok()) return status;
  const CudaJob bags = MakeJob(args_.forward, bags_, error);
  const int64_t checked = bags.num_offsets;
  LUCID_LAUNCH(CountEntries, BlocksFor(checked > bags.num_positions ? checked : bags.num_positions),
               256u, static_cast<cudaStream_t>(stream), bags,
               reinterpret_cast<unsigned long long*>(num_entries));
  return CudaStatus("counting entries", cudaGetLastError());
}

Status CudaGrad::Launch(void* scratch, LucidBoundsError* error, void* stream_handle) const {
  const EmbeddingBagArgs& a = args_.forward;
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_handle);
  char* const base = static_cast<char*>(scratch);
  const int64_t n = plan_.num_positions, columns = a.weight_shape[1];
  const int64_t dense_bytes = args_.sparse ? 0 : a.weight_shape[0] * RowBytes(a.dtype, columns);
  if (n == 0 && dense_bytes > 0) {
    const Status status = ClearOnDevice(args_.grad_weight, dense_bytes, stream_handle);
    if (!status.ok()) return status;
  }

  GradJob job = {};
  job.bags = MakeJob(a, bags_, error);
  job.bags.row_bytes = static_cast<uint32_t>(RowBytes(a.dtype, columns));
  job.rows = MakeJob(rows_args_, rows_, error);
  job.rows.offsets = Part<char>(base, parts_.row_starts);
  if (parts_.counters >= 0) {
    SetPartials(rows_, base + parts_.counters, base + parts_.others, &job.rows);
  }
  job.grads = static_cast<const char*>(args_.grad_output);
  job.values = static_cast<char*>(args_.values);
  job.entry_rows = args_.rows;
  job.grad_weights = static_cast<char*>(args_.grad_per_sample_weights);
  job.padded = Part<uint32_t>(base, parts_.padded);
  job.bag_of = Part<uint32_t>(base, parts_.bag_of);
  job.keys = Part<uint32_t>(base, parts_.keys);
  job.sorted_keys = Part<uint32_t>(base, parts_.sorted_keys);
  job.positions = Part<uint32_t>(base, parts_.positions);
  job.sorted_positions = Part<uint32_t>(base, parts_.sorted_positions);
  job.sorted_bags = Part<uint32_t>(base, parts_.sorted_bags);
  job.row_starts = Part<uint32_t>(base, parts_.row_starts);
  job.frequencies = Part<uint32_t>(base, parts_.frequencies);
  job.divisors = Part<char>(base, parts_.divisors);
  job.winners = Part<int32_t>(base, parts_.winners);
  job.bags.clips = Part<char>(base, parts_.clips);
  job.num_entries = args_.num_entries;

  Status status;
  const auto launch = [&](Kernel kernel, unsigned blocks) {
    if (!status.ok()) return;
    LUCID_LAUNCH(kernel, blocks, 256u, stream, job);
    status = CudaStatus("computing a gradient", cudaGetLastError());
  };
  const auto sort = [&](int bits) {
    if (!status.ok()) return;
    status = LaunchCudaSort(base + parts_.sort, sort_bytes_, job.keys,
                            Part<uint32_t>(base, parts_.sorted_keys), job.positions,
                            Part<uint32_t>(base, parts_.sorted_positions), n, bits, stream_handle);
  };
  if (plan_.zeroed_bytes > 0) status = ClearOnDevice(base, plan_.zeroed_bytes, stream_handle);
  launch(PlaceEntries, BlocksFor(n > job.bags.num_offsets ? n : job.bags.num_offsets));
  if (!status.ok() || n == 0) return status;

  const Kernels kernels = ChooseKernels(a.dtype, rows_.vector_bytes);
  if (job.bags.clips) status = LaunchCudaClips(a, bags_, job.bags.clips, stream_handle);
  if (status.ok() && job.divisors) {
    LUCID_LAUNCH(CountRows, BlocksFor(plan_.num_bags), 256u, stream, job, a.dtype == kFloat64);
    status = CudaStatus("counting rows", cudaGetLastError());
  }
  if (job.winners) launch(kernels.winners, BlocksFor(plan_.num_bags * columns));
  if (plan_.row_sort) sort(BitsOf(a.weight_shape[0]));
  if (rows_.blocks > 0) {
    launch(FindRows, BlocksFor(n > a.weight_shape[0] ? n : a.weight_shape[0] + 1));
    if (status.ok()) {
      LUCID_LAUNCH(kernels.pool, static_cast<unsigned>(rows_.blocks),
                   static_cast<unsigned>(rows_.block_threads), stream, job);
      status = CudaStatus("adding up rows", cudaGetLastError());
    }
  }
  if (args_.sparse) {
    if (job.frequencies) launch(FindFrequencies, BlocksFor(n));
    if (plan_.entry_sort) {
      job.by_entry = true;
      launch(MarkEntries, BlocksFor(n));
      sort(1);
      launch(CheckEntries, 1);
    }
    if (job.num_entries > 0) {
      launch(kernels.values, BlocksFor(job.num_entries * (columns > 0 ? columns : 1)));
    }
  }
  if (job.grad_weights) {  // fewer than 2^31 positions, so this fits
    launch(kernels.dots, static_cast<unsigned>((n * kernels.sharers + 255) / 256));
  }
  return status;
}

}  // namespace lucid
