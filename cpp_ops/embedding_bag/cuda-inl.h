// What the CUDA kernels of all operators of bags share: how a thread finds the positions that are
// its, reads rows, records bad values, and joins what others left.
//
// A thread reads one vector of up to 16 bytes of every row of one chunk, at most 64 positions of a
// bag, and keeps the sums in registers. Threads beside each other have vectors beside each other of
// the same rows, so a warp reads whole rows, several if they are short. Nothing is shared between
// threads: of a bag in several chunks, the thread that is the last to be done with a vector of it
// adds up what the others left in scratch memory, always in the same order.
//
// LUCID_EMULATE_CUDA compiles what includes this as plain C++, for tests where there is no GPU.
#pragma once

#if defined(LUCID_EMULATE_CUDA)
#include "embedding_bag/test/cuda_emulation.h"
#else
#include <cuda_runtime.h>
#endif

#include <float.h>
#include <math.h>
#include <stdint.h>

#include <type_traits>

#include "base/types.h"
#include "embedding_bag/cuda.h"

namespace lucid {
namespace {

// The values of a quantized table, signed or not: `flip` and `code_offset` of the job tell.
struct Code8 {
  uint8_t bits;
};
struct Code4 {  // a byte that holds two
  uint8_t bits;
};
template <class T>
inline constexpr bool kIsCode = false;
template <>
inline constexpr bool kIsCode<Code8> = true;
template <>
inline constexpr bool kIsCode<Code4> = true;

// The bags of one table, as the kernels see them.
struct CudaJob {
  const char* weight;
  const char* indices;
  const char* offsets;             // null: two-dimensional indices
  const char* per_sample_weights;  // or null
  const char* factors;             // of each position: those weights, or the clips; or null
  char* clips;                     // what ComputeClips writes, or null
  const char* scale;
  const char* second;  // zero_point or bias, or null
  char* output;
  uint32_t* counters;     // [pieces + bags, row_vectors], 0 at first: the chunks (pieces) that are
                          // done
  int32_t* counts;        // the rows of every chunk
  int32_t* piece_counts;  // and piece
  char* partials;         // what chunks and pieces give, rows of accumulators
  LucidBoundsError* error;
  int64_t rows, columns;
  int64_t output_stride;  // bytes from one result to the next
  int64_t num_positions, num_offsets, num_bags, bag_length, bag_chunks, chunks;
  int64_t padding;
  int64_t vectors;
  int64_t row_vectors;  // of counters and partials
  double bags_per_extra;
  double max_norm, norm_type;
  uint32_t block_vectors, block_chunks, column_blocks;
  uint32_t row_bytes, scale_stride;
  uint32_t flip;    // of each four bytes of quantized values: the sign bits
  float code_base;  // 2^23, and what a quantized value is more than its number after the flip
  int32_t mode, output_type;
  bool wide_indices, wide_offsets, half_scale, second_is_bias, vector_output;
  bool half_factors;    // of 16 bits
  bool skips_negative;  // an index below 0 is skipped, else it is bad
  bool by_weights;      // mean and sqrtn divide by a sum of weights, else by the count
  // The places of offsets[0] and of the first index, and the tables that an error names: see
  // LucidBoundsError.
  uint64_t offset_place, index_place;
  uint32_t offset_table, index_table;
  // Of a table among several.
  uint32_t first_block, blocks, first_norm_block;
  int64_t table_bags;  // where this is several tables whose bags lie one after another: of each
  uint32_t group;      // of tables that one kernel pools
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

// Bits of a float32 or float16, and the number that they are. Apart, so that several loads can be
// under way before the first of their numbers is waited for.
__device__ __forceinline__ uint32_t LoadBits(const char* base, uint32_t stride, bool half,
                                             int64_t i) {
  const char* p = base + i * stride;
  return half ? Load<uint16_t>(p) : Load<uint32_t>(p);
}

__device__ __forceinline__ float FloatOf(uint32_t bits, bool half) {
  return half ? Widen(Float16{static_cast<uint16_t>(bits)}) : BitCast<float>(bits);
}

__device__ __forceinline__ float LoadFloat(const char* base, uint32_t stride, bool half,
                                           int64_t i) {
  return FloatOf(LoadBits(base, stride, half, i), half);
}

// 2^23 + code, whose lowest bits the code is. The difference of such numbers is exact, and takes
// one instruction where a conversion takes a slow one more.
constexpr uint32_t kCodeBits = 0x4B000000u;
constexpr float kCodeBase = 8388608.0f;

template <class T>
__device__ __forceinline__ Accumulator<T> LoadElement(const CudaJob& job, const char* row,
                                                      int64_t i) {
  if constexpr (kIsCode<T>) {
    constexpr bool kNibble = sizeof(T) == 1 && kElements<T, 1> == 2;
    uint32_t code = Load<uint8_t>(row + (kNibble ? i / 2 : i)) ^ (job.flip & 255u);
    if (kNibble) code = i % 2 ? code >> 4 : code & 15u;
    return BitCast<float>(kCodeBits | code) - job.code_base;
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

// The elements of a vector; At widens one of them. One after another, and never in an array that a
// loop counts through: the compiler may put such an array into memory.
template <class T, int kBytes>
struct Elements {
  static constexpr int n = kElements<T, kBytes>;
  Array<T, n> elements;

  __device__ __forceinline__ Elements(const CudaJob&, Word<kBytes> word)
      : elements(BitCast<Array<T, n>>(word)) {}
  __device__ __forceinline__ Accumulator<T> At(const CudaJob&, int i) const {
    return Widen(elements.at[i]);
  }
};

template <int kBytes>
struct Words {
  static constexpr int kCount = kBytes / 4 + (kBytes < 4);
  Array<uint32_t, kCount> words;

  __device__ __forceinline__ Words(const CudaJob& job, Word<kBytes> word) {
    if constexpr (kBytes < 4) {
      words.at[0] = word;
    } else {
      words = BitCast<Array<uint32_t, kCount>>(word);
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) words.at[i] ^= job.flip;
  }
  static __device__ __forceinline__ float ByteOf(const CudaJob& job, uint32_t word, int i) {
    const uint32_t selector = 0x7650u + static_cast<uint32_t>(i);
    return BitCast<float>(__byte_perm(word, kCodeBits, selector)) - job.code_base;
  }
};

template <int kBytes>
struct Elements<Code8, kBytes> : Words<kBytes> {
  using Words<kBytes>::Words;
  __device__ __forceinline__ float At(const CudaJob& job, int i) const {
    return this->ByteOf(job, this->words.at[i / 4], i % 4);
  }
};

template <int kBytes>
struct Elements<Code4, kBytes> : Words<kBytes> {
  using Words<kBytes>::Words;
  __device__ __forceinline__ float At(const CudaJob& job, int i) const {
    const uint32_t word = this->words.at[i / 8];
    return this->ByteOf(job, (i % 2 ? word >> 4 : word) & 0x0F0F0F0Fu, i % 8 / 2);
  }
};

// NaN in either stays; of equals the first stays.
template <class A>
__device__ __forceinline__ A MaxSticky(A a, A b) {
  return b > a || b != b ? b : a;
}

__device__ __forceinline__ int64_t IndexAt(const char* base, bool wide, int64_t i) {
  return wide ? Load<int64_t>(base + i * 8) : Load<int32_t>(base + i * 4);
}

// ---- Bad values.

// Records a bad value if its place is the lowest so far. Rare: only then it takes the lock.
__device__ __noinline__ void ReportTo(LucidBoundsError* error, uint64_t place, int64_t value,
                                      int64_t previous, int64_t limit, int64_t length,
                                      uint32_t table) {
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
    e->limit = limit;
    e->length = length;
    e->table = table;
  }
  __threadfence();
  atomicExch(&error->lock, 0u);
}

__device__ __forceinline__ void Report(const CudaJob& job, uint64_t place, int64_t value,
                                       int64_t previous) {
  const bool index = place >= kIndexPlace;
  ReportTo(job.error, place, value, previous, index ? job.rows : job.num_positions,
           job.offsets ? -1 : job.bag_length, index ? job.index_table : job.offset_table);
}

// All offsets, by all threads of `blocks` blocks of which this is number `block`: a search among
// wrong ones may miss the wrong ones. Whoever has the offsets before these checks the first.
__device__ __forceinline__ void CheckOffsets(const CudaJob& job, uint32_t block, uint32_t blocks) {
  if (!job.offsets) return;
  const bool first_of_all = job.offset_place % kTablePlace == 0;
  const int64_t threads = static_cast<int64_t>(blocks) * blockDim.x;
  int64_t i = static_cast<int64_t>(block) * blockDim.x + threadIdx.x;
  for (; i < job.num_offsets; i += threads) {
    const int64_t offset = IndexAt(job.offsets, job.wide_offsets, i);
    const int64_t previous = i ? IndexAt(job.offsets, job.wide_offsets, i - 1) : 0;
    if (i == 0 ? first_of_all && offset != 0 : offset < previous || offset > job.num_positions) {
      Report(job, job.offset_place + static_cast<uint64_t>(i), offset, previous);
    }
  }
}

// Whether an index is neither a row of the table nor skipped.
__device__ __forceinline__ bool IsBad(const CudaJob& job, int64_t index) {
  return static_cast<uint64_t>(index) >= static_cast<uint64_t>(job.rows) &&
         (index >= 0 || !job.skips_negative);
}

// The indices of the positions [begin, end), by all threads of blocks likewise.
__device__ __forceinline__ void CheckIndices(const CudaJob& job, int64_t begin, int64_t end,
                                             uint32_t block, uint32_t blocks) {
  const int64_t threads = static_cast<int64_t>(blocks) * blockDim.x;
  int64_t i = begin + static_cast<int64_t>(block) * blockDim.x + threadIdx.x;
  for (; i < end; i += threads) {
    const int64_t index = IndexAt(job.indices, job.wide_indices, i);
    if (IsBad(job, index)) {
      Report(job, job.index_place + static_cast<uint64_t>(i), index, 0);
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

// Chunk i of ragged bags, for i < B, is the first one of bag i. The others are numbered after
// those: number B + e belongs to the last bag in [0, B) whose offset / kChunk is at most e. A bag
// has numbers for its chunks, as a bag of more than kChunk positions ends past another multiple of
// kChunk for each of the others.
__device__ __forceinline__ int64_t FirstExtra(const CudaJob& job, int64_t bag) {
  return BagBegin(job, bag) / kChunk;
}

// Near where it would be if all bags were of one length, so the search goes out from there in steps
// that double. With bad offsets it is some bag.
__device__ __forceinline__ int64_t FindBag(const CudaJob& job, int64_t extra) {
  int64_t low = 0, high = job.num_bags - 1;
  int64_t middle = static_cast<int64_t>(static_cast<double>(extra) * job.bags_per_extra);
  middle = middle > high ? high : middle;
  if (FirstExtra(job, middle) <= extra) {
    low = middle;
    for (int64_t step = 1; low + step <= high; step *= 2) {
      if (FirstExtra(job, low + step) > extra) {
        high = low + step - 1;
        break;
      }
      low += step;
    }
  } else {
    high = middle - 1;
    for (int64_t step = 1; high - step + 1 > low; step *= 2) {
      if (FirstExtra(job, high - step + 1) <= extra) {
        low = high - step + 1;
        break;
      }
      high -= step;
    }
  }
  while (low < high) {
    middle = low + (high - low + 1) / 2;
    if (FirstExtra(job, middle) <= extra) {
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
  c->bag = chunk;
  c->number = 0;
  if (job.offsets) {
    if (chunk >= job.num_bags) {
      const int64_t extra = chunk - job.num_bags;
      c->bag = FindBag(job, extra);
      c->number = extra - FirstExtra(job, c->bag) + 1;
      if (c->number < 1) return false;  // only with bad offsets
    }
  } else if (job.bag_chunks > 1) {
    c->bag = chunk / job.bag_chunks;
    c->number = chunk - c->bag * job.bag_chunks;
  }
  c->bag_begin = BagBegin(job, c->bag);
  c->bag_end = BagBegin(job, c->bag + 1);
  if (c->bag_end < c->bag_begin) c->bag_end = c->bag_begin;
  c->begin = c->bag_begin + c->number * kChunk;
  if (c->number > 0 && c->begin >= c->bag_end) return false;
  c->size = static_cast<int>(c->bag_end - c->begin < kChunk ? c->bag_end - c->begin : kChunk);
  return true;
}

// ---- Pooling.

// What a kernel knows when it is compiled. One for either takes more instructions a row, and about
// half the time to compile.
enum class Pooling { kSums, kMaxima, kEither };

template <Pooling kPooling>
__device__ __forceinline__ bool IsMaximum(const CudaJob& job) {
  return kPooling == Pooling::kEither ? job.mode == kMax : kPooling == Pooling::kMaxima;
}

template <class A, int n>
__device__ __forceinline__ void Start(bool maximum, A* acc) {
#pragma unroll
  for (int i = 0; i < n; ++i) acc[i] = maximum ? -static_cast<A>(INFINITY) : static_cast<A>(0);
}

// The indices of the next `left` positions, in two halves.
template <class I>
__device__ __forceinline__ void LoadIndices(const char* indices, int left, uint32_t* low,
                                            int32_t* high) {
  I index[kAhead] = {};
#pragma unroll
  for (int u = 0; u < kAhead; ++u) {
    if (u < left) index[u] = Load<I>(indices + u * static_cast<int>(sizeof(I)));
  }
#pragma unroll
  for (int u = 0; u < kAhead; ++u) {
    low[u] = static_cast<uint32_t>(index[u]);
    high[u] = static_cast<int32_t>(static_cast<int64_t>(index[u]) >> 32);
  }
}

// Names the first bad index of a chunk.
__device__ __noinline__ void ReportIndex(const CudaJob& job, int64_t begin, int size) {
  for (int64_t p = begin; p < begin + size; ++p) {
    const int64_t index = IndexAt(job.indices, job.wide_indices, p);
    if (IsBad(job, index)) {
      Report(job, job.index_place + static_cast<uint64_t>(p), index, 0);
      return;
    }
  }
}

// The weight of a position.
template <class T>
__device__ __forceinline__ Accumulator<T> WeightAt(const CudaJob& job, int64_t p) {
  if constexpr (kIsCode<T>) {
    const bool half = job.output_type == kFloat16;
    return LoadFloat(job.per_sample_weights, half ? 2 : 4, half, p);
  } else {
    return LoadElement<T>(job, job.per_sample_weights, p);
  }
}

// What the row of a position is multiplied with, as it is stored: a weight, or a clip, which the
// weight is in. It is widened where it is used, so that no arithmetic stands between the loads of
// several.
template <class T>
using FactorBits = typename std::conditional<sizeof(Accumulator<T>) == 8, uint64_t, uint32_t>::type;

template <class T>
__device__ __forceinline__ FactorBits<T> LoadFactor(const char* p, bool half) {
  if constexpr (std::is_same<T, Accumulator<T>>::value) {
    return Load<FactorBits<T>>(p);
  } else {
    return half ? Load<uint16_t>(p) : Load<uint32_t>(p);
  }
}

template <class T>
__device__ __forceinline__ Accumulator<T> FactorOf(FactorBits<T> bits, bool half) {
  if constexpr (!std::is_same<T, Accumulator<T>>::value) {
    using Half = typename std::conditional<kIsCode<T>, Float16, T>::type;
    if (half) return Widen(BitCast<Half>(static_cast<uint16_t>(bits)));
  }
  return BitCast<Accumulator<T>>(bits);
}

// An address that the compiler does not take apart: it would add the parts anew for every row.
__device__ __forceinline__ const char* Whole(const char* p) {
#if defined(__CUDA_ARCH__)
  asm("" : "+l"(p));
#endif
  return p;
}

// Pools one vector of the rows of a chunk. Returns how many rows there are.
template <class T, int kBytes, Pooling kPooling>
__device__ __forceinline__ int Pool(const CudaJob& job, int64_t begin, int size, int64_t vector,
                                    Accumulator<T>* acc) {
  using A = Accumulator<T>;
  constexpr int n = kElements<T, kBytes>;
  const char* const column = Whole(job.weight + vector * kBytes);
  const bool wide = job.wide_indices, scaled = job.factors != nullptr;
  const bool half = !std::is_same<T, A>::value && job.half_factors;
  const int factor_bytes = half ? 2 : static_cast<int>(sizeof(A));
  const char* indices = job.indices + begin * (wide ? 8 : 4);
  const char* factors = scaled ? job.factors + begin * factor_bytes : nullptr;
  const uint32_t rows = static_cast<uint32_t>(job.rows);
  const uint32_t padding = static_cast<uint32_t>(job.padding);  // -1, no row: none
  const int32_t lowest = job.skips_negative ? 0 : INT32_MIN;  // of the upper halves of bad indices
  FactorBits<T> factor[kAhead];
#pragma unroll
  for (int u = 0; u < kAhead; ++u) factor[u] = BitCast<FactorBits<T>>(static_cast<A>(1));
  int count = 0;
  bool bad = false;
  float shift_sum = 0;  // what every column of a sum of quantized rows gets
  const bool maximum = IsMaximum<kPooling>(job);
  Start<A, n>(maximum, acc);
  for (int left = size; left > 0; left -= kAhead) {
    uint32_t row[kAhead];
    int32_t high[kAhead];
    if (scaled) {
#pragma unroll
      for (int u = 0; u < kAhead; ++u) {
        if (u < left) factor[u] = LoadFactor<T>(factors + u * factor_bytes, half);
      }
      factors += kAhead * factor_bytes;
    }
    if (wide) {
      LoadIndices<int64_t>(indices, left, row, high);
      indices += kAhead * 8;
    } else {
      LoadIndices<int32_t>(indices, left, row, high);
      indices += kAhead * 4;
    }
    bool used[kAhead];  // not what is skipped, nor a bad index
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      const bool inside = high[u] == 0 && row[u] < rows;
      if (!inside && high[u] >= lowest) bad = true;
      used[u] = u < left && inside && row[u] != padding;
    }
    Word<kBytes> word[kAhead];
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      if (used[u]) {
        word[u] = Load<Word<kBytes>>(column + static_cast<uint64_t>(row[u]) * job.row_bytes);
      }
    }
    uint32_t scales[kAhead], seconds[kAhead];
    if constexpr (kIsCode<T>) {
#pragma unroll
      for (int u = 0; u < kAhead; ++u) {
        if (!used[u]) continue;
        scales[u] = LoadBits(job.scale, job.scale_stride, job.half_scale, row[u]);
        if (job.second) seconds[u] = LoadBits(job.second, job.scale_stride, job.half_scale, row[u]);
      }
    }
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      if (!used[u]) continue;
      const Elements<T, kBytes> elements(job, word[u]);
      ++count;
      if constexpr (kIsCode<T>) {
        const float second = job.second ? FloatOf(seconds[u], job.half_scale) : 0;
        const float zero = job.second_is_bias ? 0 : second;
        float scale = FloatOf(scales[u], job.half_scale);
        float shift = job.second_is_bias ? second : 0, last = 1;
        bool at_once = maximum;  // the shift is added here
        if (scaled) {
          const float by = FactorOf<T>(factor[u], half);
          const float factored = scale * by, factored_shift = shift * by;
          if (maximum || (factored - factored == 0 && factored_shift - factored_shift == 0)) {
            scale = factored;
            shift = factored_shift;
          } else {
            // 0 * inf and inf - inf are not what (x * scale + shift) * inf is.
            at_once = true;
            last = by;
          }
        }
        if (!at_once) shift_sum += shift;
#pragma unroll
        for (int i = 0; i < n; ++i) {
          float x = (elements.At(job, i) - zero) * scale;
          if (at_once) x = (x + shift) * last;
          acc[i] = maximum ? MaxSticky(acc[i], x) : acc[i] + x;
        }
      } else {
        // Times 1 without factors: that costs less than asking.
        const A by = FactorOf<T>(factor[u], half);
#pragma unroll
        for (int i = 0; i < n; ++i) {
          const A x = elements.At(job, i) * by;
          acc[i] = maximum ? MaxSticky(acc[i], x) : acc[i] + x;
        }
      }
    }
  }
  if constexpr (kIsCode<T>) {
    if (!maximum) {
#pragma unroll
      for (int i = 0; i < n; ++i) acc[i] += shift_sum;
    }
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
  char* const p = job.output + bag * job.output_stride + vector * static_cast<int64_t>(sizeof(out));
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

// The sum of the weights of a bag or of a piece, or of their squares, in the CPU's order of
// additions. Every thread that finishes a vector of it adds them up: they are few beside the rows.
// Out of line, for the registers of the others.
template <class T>
__device__ __noinline__ double WeightSum(const CudaJob& job, int64_t begin, int64_t end) {
  constexpr int64_t kPositionsOfPiece = kChunk * kChunksOfPiece;
  const bool squares = job.mode == kSqrtn;
  double total = 0;
  for (int64_t piece = begin; piece < end; piece += kPositionsOfPiece) {
    double sum[4] = {0, 0, 0, 0};
    const int64_t stop = end - piece < kPositionsOfPiece ? end : piece + kPositionsOfPiece;
    for (int64_t first = piece; first < stop; first += 4) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (first + i >= stop) continue;
        const int64_t index = IndexAt(job.indices, job.wide_indices, first + i);
        if (index == job.padding || index < 0) continue;
        const double weight = WeightAt<T>(job, first + i);
        sum[i] += squares ? weight * weight : weight;
      }
    }
    total += (sum[0] + sum[1]) + (sum[2] + sum[3]);
  }
  return total;
}

// What mean and sqrtn divide by, for a bag of so many rows, of which `weights` is the sum if that
// counts; 1 for the other modes.
template <class T>
__device__ __forceinline__ Accumulator<T> DivisorFrom(const CudaJob& job, int64_t count,
                                                      double weights) {
  using A = Accumulator<T>;
  if (job.mode != kMean && job.mode != kSqrtn) return 1;
  if (job.mode == kMean && !job.by_weights) return static_cast<A>(count);
  const double total = job.by_weights ? weights : static_cast<double>(count);
  return static_cast<A>(job.mode == kSqrtn ? sqrt(total) : total);
}

// The same for the bag of the positions [begin, end).
template <class T>
__device__ __forceinline__ Accumulator<T> DivisorOf(const CudaJob& job, int64_t count,
                                                    int64_t begin, int64_t end) {
  return DivisorFrom<T>(job, count, job.by_weights ? WeightSum<T>(job, begin, end) : 0);
}

// Divides, rounds and stores what the rows of a chunk's bag gave.
template <class T, int n>
__device__ __forceinline__ void Finish(const CudaJob& job, const Chunk& c, int64_t vector,
                                       int64_t count, Accumulator<T> divisor,
                                       Accumulator<T>* value) {
  using A = Accumulator<T>;
#pragma unroll
  for (int i = 0; i < n; ++i) value[i] = count ? value[i] / divisor : static_cast<A>(0);
  if constexpr (!kIsCode<T>) {
    Store<T, A, n>(job, c.bag, vector, value);
  } else if (job.output_type == kFloat16) {
    Store<Float16, A, n>(job, c.bag, vector, value);
  } else {
    Store<float, A, n>(job, c.bag, vector, value);
  }
}

// Row `row` of partials, of one vector. Past the L1 cache, which may hold what stood there before
// another multiprocessor wrote.
template <class A, int n>
__device__ __forceinline__ A* Partial(const CudaJob& job, int64_t row, int64_t vector) {
  return reinterpret_cast<A*>(job.partials) + (row * job.row_vectors + vector) * n;
}

// The sum of the weights of a piece, where the mode divides by those: before the partials,
// backward.
__device__ __forceinline__ double* PieceWeights(const CudaJob& job, int64_t row) {
  return reinterpret_cast<double*>(job.partials) - 1 - row;
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
template <class S, class A, int n, Pooling kPooling>
__device__ __forceinline__ int64_t Combine(const CudaJob& job, int64_t row, int64_t stride,
                                           int64_t size, const int32_t* counts, int64_t vector,
                                           S* sum) {
  constexpr int kTogether = n < 4 ? 8 : n < 16 ? 4 : 2;
  const bool maximum = IsMaximum<kPooling>(job);
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
        sum[i] = total == 0 ? value : maximum ? MaxSticky(sum[i], value) : sum[i] + value;
      }
      total += count[u];
    }
  }
  return total;
}

// Adds 1. Whoever sees that sees what this thread wrote before, and this thread sees what those
// wrote whose additions it sees: one instruction, and no fence that waits for all others.
__device__ __forceinline__ uint32_t AddOne(uint32_t* counter) {
#if defined(LUCID_EMULATE_CUDA)
  return __atomic_fetch_add(counter, 1u, LUCID_EMULATED_ORDER);
#elif defined(__CUDA_ARCH__)
  uint32_t before;
  asm volatile("atom.acq_rel.gpu.add.u32 %0, [%1], 1;" : "=r"(before) : "l"(counter) : "memory");
  return before;
#else
  return *counter;  // never called on the host
#endif
}

// Says that one of `size` parts is done. True for the last one, which then sees what all wrote.
__device__ __forceinline__ bool IsLast(uint32_t* counter, int64_t size) {
  return static_cast<int64_t>(AddOne(counter)) + 1 == size;
}

// A chunk of a bag of several: leaves its sum, and whoever comes last joins them.
// Out of line, for the registers of the others.
template <class T, int n, Pooling kPooling>
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
  __stcg(job.counts + chunk_row + c.number, count);  // the same from every vector's thread
  if (!IsLast(job.counters + (piece_row + piece) * job.row_vectors + vector, size)) return;
  int64_t total = Combine<A, A, n, kPooling>(job, chunk_row + first, 1, size,
                                             job.counts + chunk_row + first, vector, acc);
  double weights = 0;
  if (job.by_weights) {
    const int64_t begin = c.bag_begin + first * kChunk, end = begin + size * kChunk;
    weights = WeightSum<T>(job, begin, end < c.bag_end ? end : c.bag_end);
  }
  if (pieces > 1) {
    // Nobody else reads this vector of the piece's first chunk.
    StorePartial<A, n>(acc, Partial<A, n>(job, chunk_row + first, vector));
    __stcg(job.piece_counts + piece_row + piece, static_cast<int32_t>(total));
    if (job.by_weights) __stcg(PieceWeights(job, piece_row + piece), weights);
    if (!IsLast(job.counters + (piece_row + pieces) * job.row_vectors + vector, pieces)) return;
    double sum[n];
    total = Combine<double, A, n, kPooling>(job, chunk_row, kChunksOfPiece, pieces,
                                            job.piece_counts + piece_row, vector, sum);
#pragma unroll
    for (int i = 0; i < n; ++i) acc[i] = static_cast<A>(sum[i]);
    weights = 0;
    for (int64_t i = 0; job.by_weights && i < pieces; ++i) {
      weights += __ldcg(PieceWeights(job, piece_row + i));
    }
  }
  Finish<T, n>(job, c, vector, total, DivisorFrom<T>(job, total, weights), acc);
}

// The chunk and the vector of this thread of a block; false if it has none.
__device__ __forceinline__ bool FindPart(const CudaJob& job, uint32_t block, Chunk* c,
                                         int64_t* vector) {
  const uint32_t chunk_in_block = threadIdx.x / job.block_vectors;
  const uint32_t column_block = block % job.column_blocks;
  const int64_t chunk =
      static_cast<int64_t>(block / job.column_blocks) * job.block_chunks + chunk_in_block;
  *vector = static_cast<int64_t>(column_block) * job.block_vectors +
            (threadIdx.x - chunk_in_block * job.block_vectors);
  return chunk_in_block < job.block_chunks && chunk < job.chunks && *vector < job.vectors &&
         FindChunk(job, chunk, c);
}

// What becomes of the sums of a chunk: they are the bag's, or join those of its other chunks.
template <class T, int n, Pooling kPooling>
__device__ __forceinline__ void Deliver(const CudaJob& job, const Chunk& c, int64_t vector,
                                        int count, Accumulator<T>* acc) {
  if (c.bag_end - c.bag_begin > kChunk) {
    const Chunk chunk_of_several = c;  // so that only this branch needs them in memory
    Accumulator<T> pooled[n];
#pragma unroll
    for (int i = 0; i < n; ++i) pooled[i] = acc[i];
    JoinChunks<T, n, kPooling>(job, chunk_of_several, vector, count, pooled);
  } else {
    Finish<T, n>(job, c, vector, count, DivisorOf<T>(job, count, c.bag_begin, c.bag_end), acc);
  }
}

// What a block does for bags: for one of each table, the jobs of which follow each other, where
// `unit` is of several.
template <class T, int kBytes, Pooling kPooling>
__device__ __forceinline__ void PoolBlock(const CudaJob& unit, const CudaJob* tables,
                                          uint32_t block, uint32_t blocks) {
  constexpr int n = kElements<T, kBytes>;
  CheckOffsets(unit, block, blocks);
  Chunk c;
  int64_t vector;
  if (!FindPart(unit, block, &c, &vector)) return;
  const int64_t table = tables ? c.bag / unit.table_bags : 0;
  const CudaJob& job = tables ? tables[table] : unit;
  if (tables) {
    if (job.group != unit.group || vector >= job.vectors) return;
    c.bag -= table * unit.table_bags;
  }
  Accumulator<T> acc[n];
  const int count = Pool<T, kBytes, kPooling>(job, c.begin, c.size, vector, acc);
  Deliver<T, n, kPooling>(job, c, vector, count, acc);
}

// ---- Norms.

__device__ __forceinline__ float Power(float x, float p) { return powf(x, p); }
__device__ __forceinline__ double Power(double x, double p) { return pow(x, p); }
__device__ __forceinline__ float SquareRoot(float x) { return sqrtf(x); }
__device__ __forceinline__ double SquareRoot(double x) { return sqrt(x); }

// Threads beside each other that share a position: 64 bytes of accumulators are their lanes, folded
// in the order of the CPU's kernels. Blocks have 256 threads.
template <class T>
constexpr int kSharers = 64 / static_cast<int>(sizeof(Accumulator<T>));

template <class T>
__device__ __forceinline__ int64_t PositionOf(uint32_t block) {
  return static_cast<int64_t>(block) * (256 / kSharers<T>)+threadIdx.x / kSharers<T>;
}

// The sum, over the lanes of a position, of what each has.
template <class T>
__device__ __forceinline__ Accumulator<T> FoldSum(Accumulator<T> x) {
#pragma unroll
  for (int width = kSharers<T> / 2; width > 0; width /= 2) {
    x = x + __shfl_down_sync(0xffffffffu, x, static_cast<unsigned>(width), kSharers<T>);
  }
  return x;
}

// Writes the factor that clips the row of a position, times its weight if there are weights.
template <class T>
__device__ __forceinline__ void ClipRow(const CudaJob& job, int64_t position) {
  using A = Accumulator<T>;
  constexpr int kLanes = kSharers<T>;
  const int lane = static_cast<int>(threadIdx.x % kLanes);
  const bool inside = job.clips && position < job.num_positions;
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
  A clip = used && norm > most ? most / (norm + static_cast<A>(1e-7)) : static_cast<A>(1);
  if (job.per_sample_weights) clip *= WeightAt<T>(job, position);
  reinterpret_cast<A*>(job.clips)[position] = clip;
}

// ---- Launching.

// Launches, and returns the error of this launch: what another call left as the last error is not
// looked at.
template <class... P, class... A>
cudaError_t Enqueue(void (*kernel)(P...), int64_t blocks, int64_t threads, cudaStream_t stream,
                    const A&... arguments) {
  static_assert((std::is_same<P, A>::value && ...), "they are passed by their addresses");
#if defined(LUCID_EMULATE_CUDA)
  return emulation::Launch(static_cast<unsigned>(blocks), static_cast<unsigned>(threads), stream,
                           [=] { kernel(arguments...); });
#else
  void* addresses[] = {const_cast<void*>(static_cast<const void*>(&arguments))...};
  return cudaLaunchKernel(reinterpret_cast<const void*>(kernel),
                          dim3(static_cast<unsigned>(blocks)), dim3(static_cast<unsigned>(threads)),
                          addresses, 0, stream);
#endif
}

// What a kernel needs to know of a call that was planned, but for its scratch memory.
inline CudaJob MakeJob(const EmbeddingBagArgs& a, const LucidCudaPlan& plan,
                       LucidBoundsError* error) {
  const bool flat = a.indices_rank == 1;
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
  job.output_stride = job.columns * (a.output_type == kFloat64   ? 8
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
  job.vectors = job.row_vectors = plan.vectors;
  job.bags_per_extra =
      static_cast<double>(plan.num_bags) / static_cast<double>(plan.num_positions / kChunk + 1);
  job.max_norm = a.max_norm;
  job.norm_type = a.norm_type;
  job.block_vectors = static_cast<uint32_t>(plan.block_vectors);
  job.block_chunks = static_cast<uint32_t>(plan.block_chunks);
  job.column_blocks = static_cast<uint32_t>(plan.column_blocks);
  job.flip = a.dtype == kInt8 ? 0x80808080u : a.dtype == kInt4 ? 0x88888888u : 0;
  job.code_base = kCodeBase + (a.dtype == kInt8 ? 128.0f : a.dtype == kInt4 ? 8.0f : 0.0f);
  job.mode = a.mode;
  job.output_type = a.output_type;
  job.wide_indices = a.index_type == kInt64;
  job.wide_offsets = a.offset_type == kInt64;
  job.half_scale = a.scale_type == kFloat16;
  job.second_is_bias = a.bias != nullptr;
  job.vector_output = plan.vector_output != 0;
  job.factors = job.per_sample_weights;
  job.half_factors = job.factors && (a.output_type == kFloat16 || a.output_type == kBFloat16);
  job.skips_negative = a.negative == kSkip;
  job.by_weights = DividesByWeights(a);
  job.index_place = kIndexPlace;
  return job;
}

// Has the rows multiplied with clips, which the kernel of the norms writes before.
inline void UseClips(char* clips, CudaJob* job) {
  job->clips = clips;
  job->factors = clips;
  job->half_factors = false;
}

// Adds the scratch memory of bags in several chunks: counters, which are zeros, and the others, of
// which counts_at is where the plan's offsets begin.
inline void SetPartials(const LucidCudaPlan& plan, char* counters, char* others, CudaJob* job) {
  if (plan.zeroed_bytes == 0) return;
  job->counters = reinterpret_cast<uint32_t*>(counters);
  job->counts = reinterpret_cast<int32_t*>(others);
  job->piece_counts = reinterpret_cast<int32_t*>(others + (plan.piece_counts_at - plan.counts_at));
  job->partials = others + (plan.partials_at - plan.counts_at);
}

inline Status CudaStatus(const char* doing, cudaError_t error) {
  if (error == cudaSuccess) return Status();
  // It is told here. CUDA keeps it as the last error too, which others would take for theirs.
  static_cast<void>(cudaGetLastError());
  return Error(error == cudaErrorMemoryAllocation ? Code::kOutOfMemory : Code::kInternal,
               "CUDA, %s: %s", doing, cudaGetErrorString(error));
}

}  // namespace
}  // namespace lucid
