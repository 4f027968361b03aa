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
  CudaJob rows;  // the dense gradient's rows as bags of sorted positions: see CudaGrad::PlanRows
  const char* grads;
  char* values;
  int64_t* entry_rows;
  char* grad_weights;
  uint32_t* skipped;  // see CudaGradParts
  uint32_t* bag_of;
  uint32_t* keys;
  const uint32_t* sorted_keys;
  uint32_t* positions;
  const uint32_t* sorted_positions;
  uint32_t* sorted_bags;
  uint32_t* row_starts;
  uint32_t* frequencies;
  char* divisors;
  char* dots;
  int32_t* winners;
  int64_t num_entries;
  bool by_entry;     // the sorted positions are those that give something
  bool by_position;  // the bags of `rows` are the sorted positions, else the table's rows
  int value_lanes;   // the logarithm of the threads that an entry's values are spread over
};

__device__ __forceinline__ int64_t FirstThread() {
  return static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
}
__device__ __forceinline__ int64_t AllThreads() {
  return static_cast<int64_t>(gridDim.x) * blockDim.x;
}

// The bag of a position, or -1: the last one that begins at or before it, if it does not end there.
// With bad offsets it is some bag.
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

// The row that a position looks up, which gave something when it was checked. -1 if the index has
// been changed since to one outside the table.
__device__ __forceinline__ int64_t RowAt(const CudaJob& bags, int64_t position) {
  const int64_t index = IndexAt(bags.indices, bags.wide_indices, position);
  return static_cast<uint64_t>(index) < static_cast<uint64_t>(bags.rows) ? index : -1;
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

__global__ void __launch_bounds__(256) FindEntries(const __grid_constant__ GradJob job) {
  const CudaJob& bags = job.bags;
  CheckOffsets(bags, blockIdx.x, gridDim.x);
  for (int64_t k = FirstThread(); k < bags.num_positions; k += AllThreads()) {
    const int64_t bag = BagOf(bags, k);
    uint32_t key = static_cast<uint32_t>(bags.rows), found = kNoBag;
    if (bag >= 0) {
      const int64_t index = IndexAt(bags.indices, bags.wide_indices, k);
      if (IsBad(bags, index)) {
        Report(bags, bags.index_place + static_cast<uint64_t>(k), index, 0);
      } else if (index >= 0 && index != bags.padding) {
        key = static_cast<uint32_t>(index);
        found = static_cast<uint32_t>(bag);
      } else if (job.skipped) {
        atomicAdd(job.skipped + bag, 1u);
      }
    }
    job.bag_of[k] = found;
    if (job.keys) {
      job.keys[k] = key;
      job.positions[k] = static_cast<uint32_t>(k);
    }
  }
}

// How many entries FindEntries would find, if all indices are valid.
__global__ void __launch_bounds__(256)
    CountEntries(const __grid_constant__ CudaJob bags, unsigned long long* count) {
  CheckOffsets(bags, blockIdx.x, gridDim.x);
  unsigned long long found = 0;
  for (int64_t k = FirstThread(); k < bags.num_positions; k += AllThreads()) {
    const int64_t index = IndexAt(bags.indices, bags.wide_indices, k);
    const bool skipped = index == bags.padding || (index < 0 && bags.skips_negative);
    found += BagOf(bags, k) >= 0 && !skipped;
  }
  if (found > 0) atomicAdd(count, found);
}

// What grad_output is divided by for each bag; 1 for a bag without rows.
template <class T>
__global__ void __launch_bounds__(256) FindDivisors(const __grid_constant__ GradJob job) {
  using A = Accumulator<T>;
  for (int64_t bag = FirstThread(); bag < job.bags.num_bags; bag += AllThreads()) {
    const int64_t begin = BagBegin(job.bags, bag), end = BagBegin(job.bags, bag + 1);
    int64_t count = end - begin;
    if (job.skipped) count -= job.skipped[bag];
    reinterpret_cast<A*>(job.divisors)[bag] =
        count < 1 ? static_cast<A>(1) : DivisorOf<T>(job.bags, count, begin, end);
  }
}

// The sorted positions of every bag of rows, and the bags of all.
__global__ void __launch_bounds__(256) FindRows(const __grid_constant__ GradJob job) {
  const int64_t n = job.bags.num_positions;
  for (int64_t j = FirstThread(); j < n; j += AllThreads()) {
    job.sorted_bags[j] = job.bag_of[job.sorted_positions[j]];
  }
  if (!job.by_position) {
    for (int64_t row = FirstThread(); row <= job.bags.rows; row += AllThreads()) {
      job.row_starts[row] = static_cast<uint32_t>(LowerBound(job.sorted_keys, n, row));
    }
    return;
  }
  // The first position of a row begins its bag, and the others begin theirs at its end.
  const uint32_t* const keys = job.sorted_keys;
  for (int64_t j = FirstThread(); j <= n; j += AllThreads()) {
    int64_t start = j;
    if (j > 0 && j < n && keys[j] == keys[j - 1]) {
      start = j + LowerBound(keys + j, n - j, static_cast<int64_t>(keys[j]) + 1);
    }
    job.row_starts[j] = static_cast<uint32_t>(start);
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
      if (job.bag_of[k] != static_cast<uint32_t>(bag)) continue;  // padded, or a bad index
      const int64_t index = RowAt(bags, k);
      if (index < 0) continue;
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
      const Elements<T, kBytes> elements(job.rows, word[u]);
      A divisor = 1, weight = 1;
      if (job.divisors) divisor = Load<A>(job.divisors + bag[u] * sizeof(A));
      if (job.bags.per_sample_weights) {
        weight = LoadElement<T>(job.bags, job.bags.per_sample_weights, position[u]);
      }
      const int32_t* const winners =
          job.winners ? job.winners + bag[u] * job.bags.columns + vector * n : nullptr;
#pragma unroll
      for (int i = 0; i < n; ++i) {
        A x = elements.At(job.rows, i);
        if (job.divisors) x /= divisor;
        if (job.bags.per_sample_weights) {
          x *= weight;
        } else if (winners && winners[i] != static_cast<int32_t>(position[u])) {
          x = 0;
        }
        acc[i] += x;
      }
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
  if (job.by_position) {
    if (c.bag_end == c.bag_begin) return;
    c.bag = job.sorted_keys[c.bag_begin];
    if (c.bag >= job.bags.rows) return;  // the positions that give nothing
  }
  Accumulator<T> acc[n];
  PoolEntries<T, kBytes>(job, c.begin, c.size, vector, acc);
  Deliver<T, n, Pooling::kSums>(job.rows, c, vector, c.size, acc);
}

// ---- Sparse: what each position gives. 2^value_lanes threads take an entry.

template <class T>
__global__ void __launch_bounds__(256) GiveValues(const __grid_constant__ GradJob job) {
  using A = Accumulator<T>;
  const CudaJob& bags = job.bags;
  const int64_t lanes = int64_t{1} << job.value_lanes, lane = FirstThread() & (lanes - 1);
  int64_t entry = FirstThread() >> job.value_lanes;
  for (; entry < job.num_entries; entry += AllThreads() >> job.value_lanes) {
    const int64_t k = job.by_entry ? job.sorted_positions[entry] : entry;
    const uint32_t bag = job.bag_of[k];
    const bool gives = bag != kNoBag;  // else the call has a bad index
    if (lane == 0) {
      job.entry_rows[entry] = gives ? IndexAt(bags.indices, bags.wide_indices, k) : 0;
    }
    for (int64_t column = lane; column < bags.columns; column += lanes) {
      A x = 0;
      if (gives) {
        const int64_t at = static_cast<int64_t>(bag) * bags.columns + column;
        x = LoadElement<T>(bags, job.grads, at);
        if (job.divisors) x /= Load<A>(job.divisors + bag * sizeof(A));
        if (bags.per_sample_weights) x *= LoadElement<T>(bags, bags.per_sample_weights, k);
        if (job.winners && job.winners[at] != static_cast<int32_t>(k)) x = 0;
        if (job.frequencies) x /= static_cast<A>(job.frequencies[k]);
      }
      FromAccumulator(CanonicalNan(x),
                      reinterpret_cast<T*>(job.values) + entry * bags.columns + column);
    }
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
  const int64_t index = bag != kNoBag ? RowAt(bags, k) : -1;
  A sum = 0;
  if (index >= 0) {
    const char* const row = bags.weight + index * bags.row_bytes;
    const char* const grad =
        job.grads + static_cast<int64_t>(bag) * bags.columns * static_cast<int64_t>(sizeof(T));
    const A clip =
        bags.clips ? Load<A>(bags.clips + k * static_cast<int64_t>(sizeof(A))) : static_cast<A>(1);
    const A divisor = job.divisors ? Load<A>(job.divisors + bag * sizeof(A)) : static_cast<A>(1);
    for (int64_t i = lane; i < bags.columns; i += kSharers<T>) {
      sum += LoadElement<T>(bags, grad, i) / divisor * (LoadElement<T>(bags, row, i) * clip);
    }
  }
  sum = FoldSum<T>(sum);
  if (lane != 0 || !inside) return;
  if (job.dots) {
    reinterpret_cast<A*>(job.dots)[k] = CanonicalNan(sum);
  } else {
    FromAccumulator(CanonicalNan(sum), reinterpret_cast<T*>(job.grad_weights) + k);
  }
}

// What a bag's divisor gives the weights that it is made of. A thread takes a bag.
template <class T>
__global__ void __launch_bounds__(256) CorrectDots(const __grid_constant__ GradJob job) {
  using A = Accumulator<T>;
  const CudaJob& bags = job.bags;
  const A* const dots = reinterpret_cast<const A*>(job.dots);
  for (int64_t bag = FirstThread(); bag < bags.num_bags; bag += AllThreads()) {
    const int64_t begin = BagBegin(bags, bag), end = BagBegin(bags, bag + 1);
    const double total = WeightSum<T>(bags, begin, end);
    const double divisor = bags.mode == kSqrtn ? sqrt(total) : total;
    double sum = 0;
    for (int64_t k = begin; k < end; ++k) {
      if (job.bag_of[k] != static_cast<uint32_t>(bag)) continue;
      sum += static_cast<double>(WeightAt<T>(bags, k)) * static_cast<double>(dots[k]);
    }
    for (int64_t k = begin; k < end; ++k) {
      A value = 0;
      if (job.bag_of[k] == static_cast<uint32_t>(bag)) {
        double part = sum / divisor;
        if (bags.mode == kSqrtn) {
          part = part * static_cast<double>(WeightAt<T>(bags, k)) / divisor;
        }
        value = static_cast<A>(static_cast<double>(dots[k]) - part);
      }
      FromAccumulator(CanonicalNan(value), reinterpret_cast<T*>(job.grad_weights) + k);
    }
  }
}

// Zeros for the positions that belong to no bag.
template <class T>
__global__ void __launch_bounds__(256) ClearDots(const __grid_constant__ GradJob job) {
  for (int64_t k = FirstThread(); k < job.bags.num_positions; k += AllThreads()) {
    if (job.bag_of[k] == kNoBag) reinterpret_cast<T*>(job.grad_weights)[k] = T{};
  }
}

// ---- Launching.

using Kernel = void (*)(GradJob job);

// The kernels of one type of numbers.
struct Kernels {
  Kernel pool, divisors, winners, values, dots, correct_dots, clear_dots;
  int sharers;
};

// The widths are those of embedding_bag/cuda_plan.cc.
template <class T, int kWide, int kHalf, int kMiddle, int kNarrow>
Kernels KernelsOf(int bytes) {
  const Kernel pool = bytes == kWide     ? PoolRows<T, kWide>
                      : bytes == kHalf   ? PoolRows<T, kHalf>
                      : bytes == kMiddle ? PoolRows<T, kMiddle>
                                         : PoolRows<T, kNarrow>;
  return {pool,       FindDivisors<T>, FindWinners<T>, GiveValues<T>,
          DotRows<T>, CorrectDots<T>,  ClearDots<T>,   kSharers<T>};
}

Kernels ChooseKernels(int32_t dtype, int bytes) {
  switch (dtype) {
    case kFloat32:
      return KernelsOf<float, 16, 8, 4, 4>(bytes);
    case kFloat16:
      return KernelsOf<Float16, 16, 8, 4, 2>(bytes);
    case kBFloat16:
      return KernelsOf<BFloat16, 16, 8, 4, 2>(bytes);
    default:
      return KernelsOf<double, 16, 8, 8, 8>(bytes);
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
  const unsigned blocks = BlocksFor(checked > bags.num_positions ? checked : bags.num_positions);
  return CudaStatus("counting entries",
                    Enqueue(CountEntries, blocks, 256, static_cast<cudaStream_t>(stream), bags,
                            reinterpret_cast<unsigned long long*>(num_entries)));
}

// What enqueues a planned call. After an error nothing more is enqueued.
class CudaGrad::Launcher {
 public:
  Launcher(const CudaGrad& call, void* scratch, LucidBoundsError* error, void* stream);

  // Clears a dense gradient, unless every row of it is written.
  void ClearTable();

  // Finds the row and the bag of every position.
  void PlaceEntries();

  // What the outputs are computed from: clips, divisors, maxima, and the positions sorted by row.
  void Prepare();

  // grad_weight.
  void PoolRows();

  // rows and values.
  void GiveValues();

  // grad_per_sample_weights.
  void GiveDots();

  const Status& status() const { return status_; }

 private:
  void LaunchKernel(Kernel kernel, unsigned blocks);
  void Sort(int bits);

  const CudaGrad& call_;
  const EmbeddingBagArgs& forward_;
  const int64_t n_, rows_, columns_;  // positions, V, D
  char* const scratch_;
  void* const stream_;
  const Kernels kernels_;
  GradJob job_ = {};
  Status status_;
};

CudaGrad::Launcher::Launcher(const CudaGrad& call, void* scratch, LucidBoundsError* error,
                             void* stream)
    : call_(call),
      forward_(call.args_.forward),
      n_(call.plan_.num_positions),
      rows_(forward_.weight_shape[0]),
      columns_(forward_.weight_shape[1]),
      scratch_(static_cast<char*>(scratch)),
      stream_(stream),
      kernels_(ChooseKernels(forward_.dtype, call.rows_.vector_bytes)) {
  const EmbeddingBagGradArgs& args = call.args_;
  const CudaGradParts& parts = call.parts_;
  job_.bags = MakeJob(forward_, call.bags_, error);
  job_.bags.row_bytes = static_cast<uint32_t>(RowBytes(forward_.dtype, columns_));
  job_.bags.clips = Part<char>(scratch_, parts.clips);
  job_.rows = MakeJob(call.rows_args_, call.rows_, error);
  job_.rows.offsets = Part<char>(scratch_, parts.row_starts);
  if (parts.counters >= 0) {
    SetPartials(call.rows_, scratch_ + parts.counters, scratch_ + parts.others, &job_.rows);
  }
  job_.grads = static_cast<const char*>(args.grad_output);
  job_.values = static_cast<char*>(args.values);
  job_.entry_rows = args.rows;
  job_.grad_weights = static_cast<char*>(args.grad_per_sample_weights);
  job_.skipped = Part<uint32_t>(scratch_, parts.skipped);
  job_.bag_of = Part<uint32_t>(scratch_, parts.bag_of);
  job_.keys = Part<uint32_t>(scratch_, parts.keys);
  job_.sorted_keys = Part<uint32_t>(scratch_, parts.sorted_keys);
  job_.positions = Part<uint32_t>(scratch_, parts.positions);
  job_.sorted_positions = Part<uint32_t>(scratch_, parts.sorted_positions);
  job_.sorted_bags = Part<uint32_t>(scratch_, parts.sorted_bags);
  job_.row_starts = Part<uint32_t>(scratch_, parts.row_starts);
  job_.frequencies = Part<uint32_t>(scratch_, parts.frequencies);
  job_.divisors = Part<char>(scratch_, parts.divisors);
  job_.dots = Part<char>(scratch_, parts.dots);
  job_.winners = Part<int32_t>(scratch_, parts.winners);
  job_.num_entries = args.num_entries;
  job_.by_position = call.plan_.row_bags != rows_;
}

void CudaGrad::Launcher::LaunchKernel(Kernel kernel, unsigned blocks) {
  if (!status_.ok()) return;
  status_ = CudaStatus("computing a gradient",
                       Enqueue(kernel, blocks, 256, static_cast<cudaStream_t>(stream_), job_));
}

void CudaGrad::Launcher::Sort(int bits) {
  if (!status_.ok()) return;
  const CudaGradParts& parts = call_.parts_;
  status_ = LaunchCudaSort(scratch_ + parts.sort, call_.sort_bytes_, job_.keys,
                           Part<uint32_t>(scratch_, parts.sorted_keys), job_.positions,
                           Part<uint32_t>(scratch_, parts.sorted_positions), n_, bits, stream_);
}

void CudaGrad::Launcher::ClearTable() {
  const int64_t bytes = call_.args_.sparse ? 0 : rows_ * RowBytes(forward_.dtype, columns_);
  if (call_.plan_.row_bags != rows_ && bytes > 0)
    status_ = ClearOnDevice(call_.args_.grad_weight, bytes, stream_);
}

void CudaGrad::Launcher::PlaceEntries() {
  const int64_t zeroed = call_.plan_.zeroed_bytes;
  if (status_.ok() && zeroed > 0) status_ = ClearOnDevice(scratch_, zeroed, stream_);
  const int64_t offsets = job_.bags.num_offsets;
  LaunchKernel(FindEntries, BlocksFor(n_ > offsets ? n_ : offsets));
}

void CudaGrad::Launcher::Prepare() {
  if (status_.ok() && job_.bags.clips) {
    EmbeddingBagArgs unweighted = forward_;
    unweighted.per_sample_weights = nullptr;
    status_ = LaunchCudaClips(unweighted, call_.bags_, job_.bags.clips, stream_);
  }
  if (job_.divisors) LaunchKernel(kernels_.divisors, BlocksFor(call_.plan_.num_bags));
  if (job_.winners) LaunchKernel(kernels_.winners, BlocksFor(call_.plan_.num_bags * columns_));
  if (call_.plan_.row_sort) Sort(BitsOf(rows_));
}

void CudaGrad::Launcher::PoolRows() {
  const LucidCudaPlan& plan = call_.rows_;
  LaunchKernel(FindRows, BlocksFor(n_ > plan.num_bags ? n_ : plan.num_bags + 1));
  if (!status_.ok()) return;
  status_ = CudaStatus("adding up rows", Enqueue(kernels_.pool, plan.blocks, plan.block_threads,
                                                 static_cast<cudaStream_t>(stream_), job_));
}

void CudaGrad::Launcher::GiveValues() {
  if (job_.frequencies) LaunchKernel(FindFrequencies, BlocksFor(n_));
  if (call_.plan_.entry_sort) {
    job_.by_entry = true;
    LaunchKernel(MarkEntries, BlocksFor(n_));
    Sort(1);
    LaunchKernel(CheckEntries, 1);
  }
  if (job_.num_entries <= 0) return;
  while (job_.value_lanes < 8 && int64_t{1} << job_.value_lanes < columns_) ++job_.value_lanes;
  LaunchKernel(kernels_.values, BlocksFor(job_.num_entries << job_.value_lanes));
}

void CudaGrad::Launcher::GiveDots() {
  // There are fewer than 2^31 positions, so this fits.
  LaunchKernel(kernels_.dots, static_cast<unsigned>((n_ * kernels_.sharers + 255) / 256));
  if (!job_.dots) return;
  LaunchKernel(kernels_.clear_dots, BlocksFor(n_));
  LaunchKernel(kernels_.correct_dots, BlocksFor(call_.plan_.num_bags));
}

Status CudaGrad::Launch(void* scratch, LucidBoundsError* error, void* stream) const {
  Launcher launcher(*this, scratch, error, stream);
  launcher.ClearTable();
  launcher.PlaceEntries();
  if (plan_.num_positions == 0) return launcher.status();
  launcher.Prepare();
  if (rows_.blocks > 0) launcher.PoolRows();
  if (args_.sparse) launcher.GiveValues();
  if (args_.grad_per_sample_weights) launcher.GiveDots();
  return launcher.status();
}

}  // namespace lucid
