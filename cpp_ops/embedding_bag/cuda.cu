// EmbeddingBag's CUDA kernels. cuda.h says what they compute, cuda_plan.cc how they are cut.
//
// A thread reads one vector of up to 16 bytes of every row of one chunk, at most 64 positions of a
// bag, and keeps the sums in registers. Threads beside each other have vectors beside each other of
// the same rows, so a warp reads whole rows, several if they are short. Nothing is shared between
// threads: of a bag in several chunks, the thread that is the last to be done with a vector of it
// adds up what the others left in scratch memory, always in the same order.
//
// LUCID_EMULATE_CUDA compiles this file as plain C++, for tests where there is no GPU.
#if defined(LUCID_EMULATE_CUDA)
#include "embedding_bag/test/cuda_emulation.h"
#else
#include <cuda_runtime.h>
#define LUCID_LAUNCH(kernel, blocks, threads, stream, ...) \
  kernel<<<blocks, threads, 0, stream>>>(__VA_ARGS__)
#endif

#include <float.h>
#include <math.h>
#include <stdint.h>

#include "base/types.h"
#include "embedding_bag/cuda.h"

namespace lucid {
namespace {

// Codes of a quantised table, signed ones and others: with `flip` and `code_offset` of the job.
struct Code8 {
  uint8_t bits;
};
struct Code4 {  // a byte of two
  uint8_t bits;
};
template <class T>
constexpr bool kIsCode = false;
template <>
constexpr bool kIsCode<Code8> = true;
template <>
constexpr bool kIsCode<Code4> = true;

// A call, as the kernels see it.
struct CudaJob {
  const char* weight;
  const char* indices;
  const char* offsets;             // null: two-dimensional indices
  const char* per_sample_weights;  // or null
  const char* clips;               // a factor per position, or null
  const char* scale;
  const char* second;  // zero_point or bias, or null
  char* output;
  uint32_t* counters;     // [pieces + bags, vectors], 0 at first: the chunks (pieces) that are done
  int32_t* counts;        // the rows of every chunk
  int32_t* piece_counts;  // and piece
  char* partials;         // what chunks and pieces give, rows of accumulators
  LucidBoundsError* error;
  int64_t rows, columns, output_row_bytes;
  int64_t num_positions, num_offsets, num_bags, bag_length, bag_chunks, chunks;
  int64_t padding;
  int64_t vectors;
  double bags_per_chunk;
  double max_norm, norm_type;
  uint32_t block_vectors, block_chunks, column_blocks;
  uint32_t row_bytes, scale_stride;
  uint32_t flip;  // of each four bytes of codes: the sign bits
  float code_offset;
  int32_t mode, output_type;
  bool wide_indices, wide_offsets, half_scale, second_is_bias, vector_output;
  bool scaled;  // by clips or per_sample_weights
};

template <int kBytes>
struct WordOf;
template <>
struct WordOf<16> {
  using type = uint4;
};
template <>
struct WordOf<8> {
  using type = uint2;
};
template <>
struct WordOf<4> {
  using type = uint32_t;
};
template <>
struct WordOf<2> {
  using type = uint16_t;
};
template <>
struct WordOf<1> {
  using type = uint8_t;
};
template <int kBytes>
using Word = typename WordOf<kBytes>::type;

template <class T, int kBytes>
constexpr int kElements = kBytes / static_cast<int>(sizeof(T));
template <int kBytes>
constexpr int kElements<Code4, kBytes> = 2 * kBytes;

// Rows that a thread reads before it adds the first of them, and how many blocks of 256 threads are
// to fit into the registers of a multiprocessor. Both hide the latency of memory, and each takes
// from the other.
#if !defined(LUCID_CUDA_ROWS_AHEAD)
#define LUCID_CUDA_ROWS_AHEAD 4
#endif
#if !defined(LUCID_CUDA_BLOCKS)
#define LUCID_CUDA_BLOCKS 4
#endif
constexpr int kAhead = LUCID_CUDA_ROWS_AHEAD;
template <class T, int kBytes>
constexpr int kBlocks = kElements<T, kBytes> > 8   ? (LUCID_CUDA_BLOCKS + 1) / 2
                        : kElements<T, kBytes> > 4 ? (LUCID_CUDA_BLOCKS * 3 + 3) / 4
                                                   : LUCID_CUDA_BLOCKS;

template <class W>
__device__ __forceinline__ W Load(const char* p) {
  return __ldg(reinterpret_cast<const W*>(p));
}

__device__ __forceinline__ float Widen(float x) { return x; }
__device__ __forceinline__ double Widen(double x) { return x; }
__device__ __forceinline__ float Widen(BFloat16 x) { return ToAccumulator(x); }
__device__ __forceinline__ float Widen(Float16 x) {
#if defined(__CUDA_ARCH__)
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(x.bits));
  return wide;
#else
  return ToAccumulator(x);
#endif
}

__device__ __forceinline__ float LoadFloat(const char* base, uint32_t stride, bool half,
                                           int64_t i) {
  const char* p = base + i * stride;
  return half ? Widen(Float16{Load<uint16_t>(p)}) : Load<float>(p);
}

template <class T>
__device__ __forceinline__ Accumulator<T> LoadElement(const CudaJob& job, const char* row,
                                                      int64_t i) {
  if constexpr (kIsCode<T>) {
    constexpr bool kNibble = sizeof(T) == 1 && kElements<T, 1> == 2;
    uint32_t code = Load<uint8_t>(row + (kNibble ? i / 2 : i)) ^ (job.flip & 255u);
    if (kNibble) code = i % 2 ? code >> 4 : code & 15u;
    return static_cast<float>(code) - job.code_offset;
  } else if constexpr (sizeof(T) == 2) {
    return Widen(BitCast<T>(Load<uint16_t>(row + i * 2)));
  } else {
    return Load<T>(row + i * static_cast<int64_t>(sizeof(T)));
  }
}

template <class T, int n>
struct Array {
  T at[n];
};

// The elements of a vector, widened.
template <class T, int kBytes>
__device__ __forceinline__ void Decode(const CudaJob& job, Word<kBytes> word, Accumulator<T>* x) {
  constexpr int n = kElements<T, kBytes>;
  if constexpr (kIsCode<T>) {
    constexpr int kBits = 8 * kBytes / n, kPerWord = 32 / kBits;
    Array<uint32_t, kBytes / 4 + (kBytes < 4)> words;
    if constexpr (kBytes < 4) {
      words.at[0] = word;
    } else {
      words = BitCast<decltype(words)>(word);
    }
#pragma unroll
    for (int i = 0; i < n; ++i) {
      const uint32_t codes = words.at[i / kPerWord] ^ job.flip;
      const uint32_t code = codes >> (kBits * (i % kPerWord)) & ((1u << kBits) - 1);
      x[i] = static_cast<float>(code) - job.code_offset;
    }
  } else {
    const auto elements = BitCast<Array<T, n>>(word);
#pragma unroll
    for (int i = 0; i < n; ++i) x[i] = Widen(elements.at[i]);
  }
}

// NaN in either stays; of equals the first stays.
template <class A>
__device__ __forceinline__ A MaxSticky(A a, A b) {
  return b > a || b != b ? b : a;
}

__device__ __forceinline__ int64_t IndexAt(const char* base, bool wide, int64_t i) {
  return wide ? Load<int64_t>(base + i * 8) : Load<int32_t>(base + i * 4);
}

// ---- What is refused.

constexpr uint64_t kIndexPlace = uint64_t{1} << 62;

// Notes a refusal if it is the lowest so far. Rare: only a place below all others takes the lock.
__device__ __noinline__ void Report(const CudaJob& job, uint64_t place, int64_t value,
                                    int64_t previous) {
  LucidBoundsError* const error = job.error;
  const unsigned long long inverse = ~place;
  if (atomicMax(reinterpret_cast<unsigned long long*>(&error->inverse), inverse) >= inverse) return;
  while (atomicCAS(&error->lock, 0u, 1u) != 0u) {
  }
  __threadfence();
  volatile LucidBoundsError* e = error;
  if (e->recorded < inverse) {
    e->recorded = inverse;
    e->value = value;
    e->previous = previous;
    e->limit = place < kIndexPlace ? job.num_positions : job.rows;
    e->length = job.offsets ? -1 : job.bag_length;
  }
  __threadfence();
  atomicExch(&error->lock, 0u);
}

// All offsets, by all threads: a search among wrong ones may miss the wrong ones.
__device__ __forceinline__ void CheckOffsets(const CudaJob& job) {
  if (!job.offsets) return;
  const int64_t threads = static_cast<int64_t>(gridDim.x) * blockDim.x;
  int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  for (; i < job.num_offsets; i += threads) {
    const int64_t offset = IndexAt(job.offsets, job.wide_offsets, i);
    const int64_t previous = i ? IndexAt(job.offsets, job.wide_offsets, i - 1) : 0;
    if (i == 0 ? offset != 0 : offset < previous || offset > job.num_positions) {
      Report(job, static_cast<uint64_t>(i), offset, previous);
    }
  }
}

// ---- Which positions a thread pools.

// offsets[i], in [0, N] whatever it is.
__device__ __forceinline__ int64_t BagBegin(const CudaJob& job, int64_t i) {
  if (!job.offsets) return i * job.bag_length;
  if (i >= job.num_offsets) return job.num_positions;
  const int64_t offset = IndexAt(job.offsets, job.wide_offsets, i);
  return offset < 0 ? 0 : offset > job.num_positions ? job.num_positions : offset;
}

// The number of the first chunk of a ragged bag. Rises by one at least from bag to bag.
__device__ __forceinline__ int64_t FirstChunk(const CudaJob& job, int64_t bag) {
  return BagBegin(job, bag) / kChunk + bag;
}

// The bag that a chunk belongs to: the last one in [0, B) whose first chunk is not behind it. Near
// where it would be if all bags were of one length, so the search goes out from there in steps that
// double. Of offsets that are refused, it is some bag.
__device__ __forceinline__ int64_t FindBag(const CudaJob& job, int64_t chunk) {
  int64_t low = chunk - job.num_positions / kChunk;
  if (low < 0) low = 0;
  int64_t high = chunk < job.num_bags ? chunk : job.num_bags - 1;
  int64_t middle = static_cast<int64_t>(static_cast<double>(chunk) * job.bags_per_chunk);
  middle = middle < low ? low : middle > high ? high : middle;
  if (FirstChunk(job, middle) <= chunk) {
    low = middle;
    for (int64_t step = 1; low + step <= high; step *= 2) {
      if (FirstChunk(job, low + step) > chunk) {
        high = low + step - 1;
        break;
      }
      low += step;
    }
  } else {
    high = middle - 1;
    for (int64_t step = 1; high - step + 1 > low; step *= 2) {
      if (FirstChunk(job, high - step + 1) <= chunk) {
        low = high - step + 1;
        break;
      }
      high -= step;
    }
  }
  while (low < high) {
    middle = low + (high - low + 1) / 2;
    if (FirstChunk(job, middle) <= chunk) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

struct Chunk {
  int64_t bag, bag_begin, bag_end;
  int64_t number;  // within the bag
  int64_t begin;   // its first position
  int size;        // how many it has
};

// False if the chunk is one of no positions behind a bag's last.
__device__ __forceinline__ bool FindChunk(const CudaJob& job, int64_t chunk, Chunk* c) {
  if (job.offsets) {
    c->bag = FindBag(job, chunk);
    c->number = chunk - FirstChunk(job, c->bag);
  } else {
    c->bag = chunk / job.bag_chunks;
    c->number = chunk - c->bag * job.bag_chunks;
  }
  c->bag_begin = BagBegin(job, c->bag);
  c->bag_end = BagBegin(job, c->bag + 1);
  if (c->bag_end < c->bag_begin) c->bag_end = c->bag_begin;
  if (c->number < 0) return false;  // only of refused offsets
  c->begin = c->bag_begin + c->number * kChunk;
  if (c->number > 0 && c->begin >= c->bag_end) return false;
  c->size = static_cast<int>(c->bag_end - c->begin < kChunk ? c->bag_end - c->begin : kChunk);
  return true;
}

// ---- Pooling.

template <class A, int n>
__device__ __forceinline__ void Start(bool maximum, A* acc) {
#pragma unroll
  for (int i = 0; i < n; ++i) acc[i] = maximum ? -static_cast<A>(INFINITY) : static_cast<A>(0);
}

constexpr uint32_t kNoRow = 0xffffffffu;  // a table has fewer

// The rows of `size` positions from an address of indices on. kNoRow for what is padded, and for
// what is refused, of which *bad tells.
template <class I>
__device__ __forceinline__ void LoadRows(const CudaJob& job, const char* indices, int size,
                                         uint32_t* row, bool* bad) {
  I index[kAhead];
#pragma unroll
  for (int u = 0; u < kAhead; ++u) {
    if (u < size) index[u] = Load<I>(indices + u * static_cast<int>(sizeof(I)));
  }
#pragma unroll
  for (int u = 0; u < kAhead; ++u) {
    row[u] = kNoRow;
    if (u >= size) continue;
    const int64_t wide = index[u];
    if (static_cast<uint64_t>(wide) >= static_cast<uint64_t>(job.rows)) {
      *bad = true;
    } else if (wide != job.padding) {
      row[u] = static_cast<uint32_t>(wide);
    }
  }
}

// Names the first index of a chunk that is outside the table.
__device__ __noinline__ void ReportIndex(const CudaJob& job, int64_t begin, int size) {
  for (int64_t p = begin; p < begin + size; ++p) {
    const int64_t index = IndexAt(job.indices, job.wide_indices, p);
    if (static_cast<uint64_t>(index) >= static_cast<uint64_t>(job.rows)) {
      Report(job, kIndexPlace + static_cast<uint64_t>(p), index, 0);
      return;
    }
  }
}

// What the row of a position is multiplied with.
template <class T>
__device__ __forceinline__ Accumulator<T> FactorAt(const CudaJob& job, int64_t p) {
  using A = Accumulator<T>;
  A factor = 1;
  if (job.clips) factor = Load<A>(job.clips + p * static_cast<int64_t>(sizeof(A)));
  if (job.per_sample_weights) {
    if constexpr (kIsCode<T>) {
      const bool half = job.output_type == kFloat16;
      factor *= LoadFloat(job.per_sample_weights, half ? 2 : 4, half, p);
    } else {
      factor *= LoadElement<T>(job, job.per_sample_weights, p);
    }
  }
  return factor;
}

// Pools one vector of the rows of a chunk. Returns how many rows there are.
template <class T, int kBytes, bool kMaximum>
__device__ __forceinline__ int Pool(const CudaJob& job, int64_t begin, int size, int64_t vector,
                                    Accumulator<T>* acc) {
  using A = Accumulator<T>;
  constexpr int n = kElements<T, kBytes>;
  const char* const column = job.weight + vector * kBytes;
  const char* indices = job.indices + begin * (job.wide_indices ? 8 : 4);
  int count = 0;
  bool bad = false;
  float shift_sum = 0;  // what every column of a sum of quantised rows gets
  Start<A, n>(kMaximum, acc);
  for (int done = 0; done < size; done += kAhead) {
    uint32_t row[kAhead];
    if (job.wide_indices) {
      LoadRows<int64_t>(job, indices, size - done, row, &bad);
      indices += kAhead * 8;
    } else {
      LoadRows<int32_t>(job, indices, size - done, row, &bad);
      indices += kAhead * 4;
    }
    Word<kBytes> word[kAhead];
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      if (row[u] != kNoRow) {
        word[u] = Load<Word<kBytes>>(column + static_cast<uint64_t>(row[u]) * job.row_bytes);
      }
    }
    float scale[kAhead], second[kAhead];
    if constexpr (kIsCode<T>) {
#pragma unroll
      for (int u = 0; u < kAhead; ++u) {
        second[u] = 0;
        if (row[u] == kNoRow) continue;
        scale[u] = LoadFloat(job.scale, job.scale_stride, job.half_scale, row[u]);
        if (job.second) {
          second[u] = LoadFloat(job.second, job.scale_stride, job.half_scale, row[u]);
        }
      }
    }
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      if (row[u] == kNoRow) continue;
      A x[n];
      Decode<T, kBytes>(job, word[u], x);
      ++count;
      if constexpr (kIsCode<T>) {
        const float zero = job.second_is_bias ? 0 : second[u];
        float shift = job.second_is_bias ? second[u] : 0;
        if (job.scaled) {
          const float factor = FactorAt<T>(job, begin + done + u);
          scale[u] *= factor;
          shift *= factor;
        }
        if (!kMaximum) shift_sum += shift;
#pragma unroll
        for (int i = 0; i < n; ++i) {
          x[i] = (x[i] - zero) * scale[u];
          if (kMaximum) x[i] += shift;
        }
      } else if (job.scaled) {
        const A factor = FactorAt<T>(job, begin + done + u);
#pragma unroll
        for (int i = 0; i < n; ++i) x[i] *= factor;
      }
#pragma unroll
      for (int i = 0; i < n; ++i) acc[i] = kMaximum ? MaxSticky(acc[i], x[i]) : acc[i] + x[i];
    }
  }
  if constexpr (kIsCode<T> && !kMaximum) {
#pragma unroll
    for (int i = 0; i < n; ++i) acc[i] += shift_sum;
  }
  if (bad && vector == 0) ReportIndex(job, begin, size);
  return count;
}

// ---- Results.

template <class Out, class A, int n>
__device__ __forceinline__ void Store(const CudaJob& job, int64_t bag, int64_t vector,
                                      const A* value) {
  Array<Out, n> out;
#pragma unroll
  for (int i = 0; i < n; ++i) FromAccumulator(CanonicalNan(value[i]), &out.at[i]);
  char* const p =
      job.output + bag * job.output_row_bytes + vector * static_cast<int64_t>(sizeof(out));
  constexpr int kWidth = sizeof(out) < 16 ? sizeof(out) : 16;
  if (job.vector_output) {
    constexpr int kWords = sizeof(out) / kWidth;
    const auto words = BitCast<Array<Word<kWidth>, kWords>>(out);
#pragma unroll
    for (int i = 0; i < kWords; ++i) reinterpret_cast<Word<kWidth>*>(p)[i] = words.at[i];
    return;
  }
#pragma unroll
  for (int i = 0; i < n; ++i) {
    if (vector * n + i < job.columns) reinterpret_cast<Out*>(p)[i] = out.at[i];
  }
}

// Divides, rounds and stores what a bag's rows gave.
template <class T, int n>
__device__ __forceinline__ void Finish(const CudaJob& job, int64_t bag, int64_t vector,
                                       int64_t count, Accumulator<T>* value) {
  using A = Accumulator<T>;
  const A divisor = job.mode == kMean ? static_cast<A>(count) : static_cast<A>(1);
#pragma unroll
  for (int i = 0; i < n; ++i) value[i] = count ? value[i] / divisor : static_cast<A>(0);
  if constexpr (!kIsCode<T>) {
    Store<T, A, n>(job, bag, vector, value);
  } else if (job.output_type == kFloat16) {
    Store<Float16, A, n>(job, bag, vector, value);
  } else {
    Store<float, A, n>(job, bag, vector, value);
  }
}

// Row `row` of partials, of one vector. Past the L1 cache, which may hold what stood there before
// another multiprocessor wrote.
template <class A, int n>
__device__ __forceinline__ A* Partial(const CudaJob& job, int64_t row, int64_t vector) {
  return reinterpret_cast<A*>(job.partials) + (row * job.vectors + vector) * n;
}

template <class A, int n>
__device__ __forceinline__ void LoadPartial(const A* from, A* x) {
  constexpr int kWidth = sizeof(A) * n < 16 ? sizeof(A) * n : 16;
  constexpr int kWords = static_cast<int>(sizeof(A)) * n / kWidth;
  Array<Word<kWidth>, kWords> words;
#pragma unroll
  for (int i = 0; i < kWords; ++i) {
    words.at[i] = __ldcg(reinterpret_cast<const Word<kWidth>*>(from) + i);
  }
  const auto values = BitCast<Array<A, n>>(words);
#pragma unroll
  for (int i = 0; i < n; ++i) x[i] = values.at[i];
}

template <class A, int n>
__device__ __forceinline__ void StorePartial(const A* x, A* to) {
  constexpr int kWidth = sizeof(A) * n < 16 ? sizeof(A) * n : 16;
  constexpr int kWords = static_cast<int>(sizeof(A)) * n / kWidth;
  Array<A, n> values;
#pragma unroll
  for (int i = 0; i < n; ++i) values.at[i] = x[i];
  const auto words = BitCast<Array<Word<kWidth>, kWords>>(values);
#pragma unroll
  for (int i = 0; i < kWords; ++i) reinterpret_cast<Word<kWidth>*>(to)[i] = words.at[i];
}

// Adds up `size` rows of partials, `stride` apart from `row` on, in S, but for those that are of no
// rows of the table. Returns how many rows the others are of.
template <class S, class A, int n, bool kMaximum>
__device__ __forceinline__ int64_t Combine(const CudaJob& job, int64_t row, int64_t stride,
                                           int64_t size, const int32_t* counts, int64_t vector,
                                           S* sum) {
  constexpr int kTogether = n < 4 ? 8 : n < 16 ? 4 : 2;
  int64_t total = 0;
#pragma unroll
  for (int i = 0; i < n; ++i) sum[i] = 0;
  for (int64_t k = 0; k < size; k += kTogether) {
    A x[kTogether][n];
    int32_t count[kTogether];
#pragma unroll
    for (int u = 0; u < kTogether; ++u) {
      count[u] = 0;
      if (k + u < size) {
        count[u] = __ldcg(counts + k + u);
        LoadPartial<A, n>(Partial<A, n>(job, row + (k + u) * stride, vector), x[u]);
      }
    }
#pragma unroll
    for (int u = 0; u < kTogether; ++u) {
      if (count[u] == 0) continue;
#pragma unroll
      for (int i = 0; i < n; ++i) {
        const S value = x[u][i];
        sum[i] = total == 0 ? value : kMaximum ? MaxSticky(sum[i], value) : sum[i] + value;
      }
      total += count[u];
    }
  }
  return total;
}

// Says that one of `size` parts is done. True for the last one, which then sees what all wrote.
__device__ __forceinline__ bool IsLast(uint32_t* counter, int64_t size) {
  __threadfence();
  if (static_cast<int64_t>(atomicAdd(counter, 1u)) + 1 != size) return false;
  __threadfence();
  return true;
}

// A chunk of a bag of several: leaves its sum, and whoever comes last joins them.
// Out of line, for the registers of the others.
template <class T, int n, bool kMaximum>
__device__ __noinline__ void JoinChunks(const CudaJob& job, const Chunk& c, int64_t vector,
                                        int count, const Accumulator<T>* pooled) {
  using A = Accumulator<T>;
  A acc[n];
#pragma unroll
  for (int i = 0; i < n; ++i) acc[i] = pooled[i];
  const int64_t chunks = (c.bag_end - c.bag_begin + kChunk - 1) / kChunk;
  const int64_t pieces = (chunks + kChunksOfPiece - 1) / kChunksOfPiece;
  const int64_t chunk_row = c.bag_begin / (kChunk / 2), piece_row = c.bag_begin / kChunk;
  const int64_t piece = c.number / kChunksOfPiece, first = piece * kChunksOfPiece;
  const int64_t size = chunks - first < kChunksOfPiece ? chunks - first : kChunksOfPiece;

  StorePartial<A, n>(acc, Partial<A, n>(job, chunk_row + c.number, vector));
  job.counts[chunk_row + c.number] = count;  // the same from every vector's thread
  if (!IsLast(job.counters + (piece_row + piece) * job.vectors + vector, size)) return;
  int64_t total = Combine<A, A, n, kMaximum>(job, chunk_row + first, 1, size,
                                             job.counts + chunk_row + first, vector, acc);
  if (pieces > 1) {
    // Nobody else reads this vector of the piece's first chunk.
    StorePartial<A, n>(acc, Partial<A, n>(job, chunk_row + first, vector));
    job.piece_counts[piece_row + piece] = static_cast<int32_t>(total);
    if (!IsLast(job.counters + (piece_row + pieces) * job.vectors + vector, pieces)) return;
    double sum[n];
    total = Combine<double, A, n, kMaximum>(job, chunk_row, kChunksOfPiece, pieces,
                                            job.piece_counts + piece_row, vector, sum);
#pragma unroll
    for (int i = 0; i < n; ++i) acc[i] = static_cast<A>(sum[i]);
  }
  Finish<T, n>(job, c.bag, vector, total, acc);
}

template <class T, int kBytes, bool kMaximum>
__global__ void __launch_bounds__(256, kBlocks<T, kBytes>)
    PoolChunks(const __grid_constant__ CudaJob job) {
  constexpr int n = kElements<T, kBytes>;
  CheckOffsets(job);
  const uint32_t chunk_in_block = threadIdx.x / job.block_vectors;
  const uint32_t column_block = blockIdx.x % job.column_blocks;
  const int64_t chunk =
      static_cast<int64_t>(blockIdx.x / job.column_blocks) * job.block_chunks + chunk_in_block;
  const int64_t vector = static_cast<int64_t>(column_block) * job.block_vectors +
                         (threadIdx.x - chunk_in_block * job.block_vectors);
  Chunk c;
  if (chunk_in_block >= job.block_chunks || chunk >= job.chunks || vector >= job.vectors ||
      !FindChunk(job, chunk, &c)) {
    return;
  }
  Accumulator<T> acc[n];
  const int count = Pool<T, kBytes, kMaximum>(job, c.begin, c.size, vector, acc);
  if (c.bag_end - c.bag_begin > kChunk) {
    const Chunk chunk_of_several = c;  // so that only this branch needs them in memory
    Accumulator<T> pooled[n];
#pragma unroll
    for (int i = 0; i < n; ++i) pooled[i] = acc[i];
    JoinChunks<T, n, kMaximum>(job, chunk_of_several, vector, count, pooled);
  } else {
    Finish<T, n>(job, c.bag, vector, count, acc);
  }
}

// For calls without a row to read: offsets and indices alone.
__global__ void __launch_bounds__(256) CheckBounds(const __grid_constant__ CudaJob job) {
  CheckOffsets(job);
  const int64_t threads = static_cast<int64_t>(gridDim.x) * blockDim.x;
  const int64_t end = job.num_bags ? BagBegin(job, job.num_bags) : 0;
  int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  for (; i < end; i += threads) {
    const int64_t index = IndexAt(job.indices, job.wide_indices, i);
    if (static_cast<uint64_t>(index) >= static_cast<uint64_t>(job.rows)) {
      Report(job, kIndexPlace + static_cast<uint64_t>(i), index, 0);
    }
  }
}

// ---- Norms.

__device__ __forceinline__ float Power(float x, float p) { return powf(x, p); }
__device__ __forceinline__ double Power(double x, double p) { return pow(x, p); }
__device__ __forceinline__ float SquareRoot(float x) { return sqrtf(x); }
__device__ __forceinline__ double SquareRoot(double x) { return sqrt(x); }

// The factors that clip the row of every position, 1 for what is padded or refused. 64 bytes of
// accumulators are lanes beside each other, folded in the order of the CPU's kernel.
template <class T>
__global__ void __launch_bounds__(256)
    ComputeClips(const __grid_constant__ CudaJob job, char* clips) {
  using A = Accumulator<T>;
  constexpr int kLanes = 64 / static_cast<int>(sizeof(A));
  const int lane = static_cast<int>(threadIdx.x % kLanes);
  const int64_t position = static_cast<int64_t>(blockIdx.x) * (256 / kLanes) + threadIdx.x / kLanes;
  const bool inside = position < job.num_positions;
  int64_t index = inside ? IndexAt(job.indices, job.wide_indices, position) : -1;
  const bool used =
      static_cast<uint64_t>(index) < static_cast<uint64_t>(job.rows) && index != job.padding;
  A norm = 0;
  const A p = static_cast<A>(job.norm_type);
  const int kind = job.norm_type == 2        ? 2
                   : job.norm_type == 1      ? 1
                   : job.norm_type > DBL_MAX ? 0
                                             : 3;
  if (used) {
    const char* row = job.weight + index * job.row_bytes;
    float scale = 1, zero = 0, shift = 0;
    if constexpr (kIsCode<T>) {
      scale = LoadFloat(job.scale, job.scale_stride, job.half_scale, index);
      if (job.second) {
        const float second = LoadFloat(job.second, job.scale_stride, job.half_scale, index);
        (job.second_is_bias ? shift : zero) = second;
      }
    }
#pragma unroll 4
    for (int64_t i = lane; i < job.columns; i += kLanes) {
      A x = LoadElement<T>(job, row, i);
      if constexpr (kIsCode<T>) x = (x - zero) * scale + shift;
      const A size = x < 0 ? -x : x;
      if (kind == 2) {
        norm += x * x;
      } else if (kind == 1) {
        norm += size;
      } else if (kind == 0) {
        norm = MaxSticky(norm, size);
      } else {
        norm += Power(size, p);
      }
    }
  }
#pragma unroll
  for (int width = kLanes / 2; width > 0; width /= 2) {
    const A other = __shfl_down_sync(0xffffffffu, norm, static_cast<unsigned>(width), kLanes);
    norm = kind ? norm + other : MaxSticky(norm, other);
  }
  if (lane != 0 || !inside) return;
  if (kind == 2) norm = SquareRoot(norm);
  if (kind == 3) norm = Power(norm, 1 / p);
  const A most = static_cast<A>(job.max_norm);
  reinterpret_cast<A*>(clips)[position] =
      used && norm > most ? most / (norm + static_cast<A>(1e-7)) : static_cast<A>(1);
}

// ---- Launching.

using PoolKernel = void (*)(CudaJob job);
using ClipKernel = void (*)(CudaJob job, char* clips);

template <class T, int kBytes>
PoolKernel ChoosePool(bool maximum) {
  return maximum ? PoolChunks<T, kBytes, true> : PoolChunks<T, kBytes, false>;
}

// The widths are those of cuda_plan.cc.
template <class T, int kWide, int kMiddle, int kNarrow>
PoolKernel ChooseWidth(int bytes, bool maximum) {
  if (bytes == kWide) return ChoosePool<T, kWide>(maximum);
  if (bytes == kMiddle) return ChoosePool<T, kMiddle>(maximum);
  return bytes == kNarrow ? ChoosePool<T, kNarrow>(maximum) : nullptr;
}

void ChooseKernels(int32_t dtype, int bytes, bool maximum, PoolKernel* pool, ClipKernel* clips) {
  switch (dtype) {
    case kFloat32:
      *pool = ChooseWidth<float, 16, 4, 4>(bytes, maximum);
      *clips = ComputeClips<float>;
      break;
    case kFloat16:
      *pool = ChooseWidth<Float16, 16, 4, 2>(bytes, maximum);
      *clips = ComputeClips<Float16>;
      break;
    case kBFloat16:
      *pool = ChooseWidth<BFloat16, 16, 4, 2>(bytes, maximum);
      *clips = ComputeClips<BFloat16>;
      break;
    case kFloat64:
      *pool = ChooseWidth<double, 16, 8, 8>(bytes, maximum);
      *clips = ComputeClips<double>;
      break;
    case kInt8:
    case kUint8:
      *pool = ChooseWidth<Code8, 16, 4, 1>(bytes, maximum);
      *clips = ComputeClips<Code8>;
      break;
    default:
      *pool = ChooseWidth<Code4, 8, 2, 1>(bytes, maximum);
      *clips = ComputeClips<Code4>;
  }
}

Status CudaStatus(const char* doing, cudaError_t error) {
  if (error == cudaSuccess) return Status();
  return Error(error == cudaErrorMemoryAllocation ? Code::kOutOfMemory : Code::kInternal,
               "CUDA, %s: %s", doing, cudaGetErrorString(error));
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
  return CudaStatus("copying what was refused",
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

Status IsCudaCapturing(void* stream, bool* capturing) {
  cudaStreamCaptureStatus found = cudaStreamCaptureStatusNone;
  const Status status = CudaStatus(
      "asking a stream", cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &found));
  *capturing = found != cudaStreamCaptureStatusNone;
  return status;
}

Status LaunchCudaEmbeddingBag(const EmbeddingBagArgs& a, const LucidCudaPlan& plan, void* scratch,
                              LucidBoundsError* error, void* stream_handle) {
  if (plan.blocks == 0 && plan.check_blocks == 0) return Status();
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_handle);
  const bool flat = a.indices_rank == 1;
  char* const base = static_cast<char*>(scratch);
  CudaJob job = {};
  job.weight = static_cast<const char*>(a.weight);
  job.indices = static_cast<const char*>(a.indices);
  job.offsets = flat ? static_cast<const char*>(a.offsets) : nullptr;
  job.per_sample_weights = static_cast<const char*>(a.per_sample_weights);
  job.scale = static_cast<const char*>(a.scale);
  job.second = static_cast<const char*>(a.bias ? a.bias : a.zero_point);
  job.output = static_cast<char*>(a.output);
  job.error = error;
  job.rows = a.weight_shape[0];
  job.columns = a.weight_shape[1];
  job.row_bytes = static_cast<uint32_t>(plan.vectors * plan.vector_bytes);
  job.output_row_bytes = job.columns * (a.output_type == kFloat64   ? 8
                                        : a.output_type == kFloat32 ? 4
                                                                    : 2);
  job.scale_stride = static_cast<uint32_t>(a.scale_stride);
  job.num_positions = plan.num_positions;
  job.num_offsets = flat ? a.num_offsets : 0;
  job.num_bags = plan.num_bags;
  job.bag_length = flat ? 0 : a.indices_shape[1];
  job.bag_chunks = plan.bag_chunks;
  job.chunks = plan.chunks;
  job.padding = plan.padding;
  job.vectors = plan.vectors;
  job.bags_per_chunk =
      plan.chunks ? static_cast<double>(plan.num_bags) / static_cast<double>(plan.chunks) : 0;
  job.max_norm = a.max_norm;
  job.norm_type = a.norm_type;
  job.block_vectors = static_cast<uint32_t>(plan.block_vectors);
  job.block_chunks = static_cast<uint32_t>(plan.block_chunks);
  job.column_blocks = static_cast<uint32_t>(plan.column_blocks);
  job.flip = a.dtype == kInt8 ? 0x80808080u : a.dtype == kInt4 ? 0x88888888u : 0;
  job.code_offset = a.dtype == kInt8 ? 128.0f : a.dtype == kInt4 ? 8.0f : 0.0f;
  job.mode = a.mode;
  job.output_type = a.output_type;
  job.wide_indices = a.index_type == kInt64;
  job.wide_offsets = a.offset_type == kInt64;
  job.half_scale = a.scale_type == kFloat16;
  job.second_is_bias = a.bias != nullptr;
  job.vector_output = plan.vector_output != 0;

  if (plan.check_blocks > 0) {
    LUCID_LAUNCH(CheckBounds, static_cast<unsigned>(plan.check_blocks), 256u, stream, job);
    return CudaStatus("checking bounds", cudaGetLastError());
  }
  PoolKernel pool = nullptr;
  ClipKernel compute_clips = nullptr;
  ChooseKernels(a.dtype, plan.vector_bytes, a.mode == kMax, &pool, &compute_clips);
  if (!pool) return Error(Code::kInternal, "no kernel reads %d bytes", plan.vector_bytes);
  if (plan.norm_blocks > 0) {
    char* const clips = base + plan.clips_at;
    LUCID_LAUNCH(compute_clips, static_cast<unsigned>(plan.norm_blocks), 256u, stream, job, clips);
    const Status status = CudaStatus("computing norms", cudaGetLastError());
    if (!status.ok()) return status;
    job.clips = clips;
  }
  job.scaled = job.clips || job.per_sample_weights;
  if (plan.zeroed_bytes > 0) {
    job.counters = reinterpret_cast<uint32_t*>(base);
    job.counts = reinterpret_cast<int32_t*>(base + plan.counts_at);
    job.piece_counts = reinterpret_cast<int32_t*>(base + plan.piece_counts_at);
    job.partials = base + plan.partials_at;
    const Status status =
        CudaStatus("clearing counters",
                   cudaMemsetAsync(base, 0, static_cast<size_t>(plan.zeroed_bytes), stream));
    if (!status.ok()) return status;
  }
  LUCID_LAUNCH(pool, static_cast<unsigned>(plan.blocks), static_cast<unsigned>(plan.block_threads),
               stream, job);
  return CudaStatus("pooling", cudaGetLastError());
}

}  // namespace lucid
