// The loops of EmbeddingBag: one source, compiled once per instruction set by pool_rows_<isa>.cc,
// which sets LUCID_ISA, LUCID_VECTOR_BYTES and the most vectors of a block first:
// LUCID_MAX_VECTORS, for sums of elements under 32 bits LUCID_MAX_NARROW_VECTORS, and for sums of
// float32 in rows of one block LUCID_MAX_LONE_VECTORS. What is above LUCID_MAX_VECTORS is even.
//
// Every loop here is compiled hundreds of times, for each element type, instruction set and width
// of rows. What a loop does not need goes into functions that are not inlined.
//
// No standard library here, and no inline function with external linkage: types.h says why.
//
// The first block of columns of a bag, which for most tables is all of them, is pooled in one pass
// over the positions: check the index, fetch a row that comes later, add the row to accumulators
// that stay in registers. It notes the rows' addresses, without the padded ones, for the other
// blocks. (Listing the rows in a pass of its own took 1.3 to 1.8 times as long.)

#include <float.h>
#include <math.h>

#include "base/simd.h"
#include "embedding_bag/embedding_bag.h"
#include "embedding_bag/pool_rows.h"

#if !defined(LUCID_MAX_NARROW_VECTORS)
#define LUCID_MAX_NARROW_VECTORS LUCID_MAX_VECTORS
#endif
#if !defined(LUCID_MAX_LONE_VECTORS)
#define LUCID_MAX_LONE_VECTORS LUCID_MAX_VECTORS
#endif

namespace lucid {
namespace {

constexpr int64_t kGroup = 64;  // rows that are added up before they join the sum so far

LUCID_INLINE int64_t Smaller(int64_t a, int64_t b) { return a < b ? a : b; }
LUCID_INLINE int64_t Larger(int64_t a, int64_t b) { return a < b ? b : a; }

// How far ahead rows are fetched, in positions, across the borders of bags, and which part of them.
#if LUCID_VECTOR_BYTES == 64
// Nanoseconds per row of 256 bytes with 16 into L1 / 64 into L2, new rows at every call (Emerald
// Rapids, one thread, 4 KiB pages): table of 2.5 MB 9.8 / 11.6, 25 MB 21.3 / 22.1, 256 MB 50.7 /
// 42.1; on 2 MiB pages the last one 30.5 / 23.9. Both together are worse than the better one
// everywhere. So L1 for what the caches hold, L2 for larger tables, nothing for those that L2 holds
// (8.1 / 4.8 ns with / without this and the other work per row that is now out of the loop; rows of
// 16-bit numbers, which take longer to add up, are fetched sooner: 256 bytes in 1 MB 6.7 / 6.0).
constexpr int64_t kNearDistance = 16, kFarDistance = 64;
constexpr bool kNearIntoL1 = true;
constexpr double kMostCachedBytes = 1 << 20;   // of all tables, to fetch nothing
constexpr double kMostCachedNarrow = 3 << 18;  // of those with elements under 32 bits
LUCID_INLINE bool IsNear(bool cached, int64_t) { return cached; }
// Of rows with more than one block all of them are fetched with the first.
constexpr bool kWholeRows = true;
#else
// With half of the registers, caches of half the size and room for fewer misses at once, 16 ahead
// is the best that there is from 256 bytes on, and 32 for short rows, both into L2 and for tables
// of any size (Zen 3, one thread, 2 MiB pages). Nanoseconds per row of 32, 256 and 400 bytes, 16 /
// 32 / 64 ahead: table of 10 MB 9.2 / 7.3 / 6.7, 13.3 / 14.1 / 15.8, 22.5 / 24.0 / 25.8; 256
// MB 16.1 / 15.7 / 15.9, 35.5 / 37.0 / 38.5, 60.6 / 62.9 / 64.3. Into L1 they take up to 1.1 times
// as long.
constexpr int64_t kNearDistance = 16, kFarDistance = 32;
constexpr bool kNearIntoL1 = false;
constexpr double kMostCachedBytes = 0, kMostCachedNarrow = 0;
LUCID_INLINE bool IsNear(bool, int64_t row_bytes) { return row_bytes > 128; }
// Of rows with more than one block the first is fetched, and the hardware follows: 512 bytes 72 ns
// in place of 90 in 256 MB. Of 16-bit and quantized values a block is too short for that.
constexpr bool kWholeRows = false;
#endif

// Nothing is fetched of rows of many lines, which the hardware streams better alone (3 KiB: 208
// without, 255 / 260 with). In what the caches hold that is so from 8 lines on (10 MiB: 256 bytes
// 16.5 without, 16.3 with, 512 bytes 28 / 31, 1 KiB 50 / 57), but not where a line is more than 16
// numbers and so many instructions that they keep the next rows out of sight (512 bytes of
// bfloat16: 31 / 27).
constexpr double kCacheBytes = 32 << 20;                  // of all tables: what the caches hold
constexpr int64_t kMostCachedRow = 511, kMostRow = 1536;  // bytes of a row, to fetch it at all

// An index that is only good for a prefetch. The low half is enough: it errs on tables of 2^32 rows
// and on big-endian machines only, and an address that is merely prefetched may be anything.
LUCID_INLINE uintptr_t HintAt(const char* indices, int64_t index_bytes, int64_t position) {
  uint32_t index;
  memcpy(&index, indices + position * index_bytes, sizeof(index));
  return index;
}

// What a row is multiplied with, by its clip and its weight. A quantized row is (value - zero) *
// scale + shift, with scale and shift multiplied likewise.
template <class T>
struct Factor {
  Accumulator<T> scale = 1;
};
struct AffineFactor {
  float scale = 1, zero = 0, shift = 0;
};
template <>
struct Factor<Int8> : AffineFactor {};
template <>
struct Factor<Uint8> : AffineFactor {};
template <>
struct Factor<Int4> : AffineFactor {};
template <>
struct Factor<Uint4> : AffineFactor {};

enum class Fetch { kNothing, kNear, kFar };

LUCID_INLINE Fetch FetchOf(const PoolJob& job) {
  const bool wide = job.dtype == kFloat32 || job.dtype == kFloat64;
  if (job.table_bytes <= (wide ? kMostCachedBytes : kMostCachedNarrow)) return Fetch::kNothing;
  const bool cached = job.table_bytes <= kCacheBytes;
  if (job.row_bytes > (cached && wide ? kMostCachedRow : kMostRow)) return Fetch::kNothing;
  return IsNear(cached, job.row_bytes) ? Fetch::kNear : Fetch::kFar;
}

// What the loop over positions reads, copied out of the job, which the stores might otherwise
// overwrite as far as the compiler can tell.
struct Positions {
  explicit Positions(const PoolJob& job);

  const char* weight;
  const char* indices;
  bool wide;
  int64_t index_bytes, row_bytes, padding;
  uint64_t rows;
  bool skips_negative, clips;
  // Of a quantized table: what its rows have beside their values.
  const char* scale;
  const char* second;  // zero_point, bias, or 0 for every row
  int64_t scale_stride, second_stride;
  bool half, has_zero;
  // per_sample_weights, or a 1 for every row. (Not of quantized tables.)
  const char* weights;
  int64_t weight_stride;
  Fetch fetch;
  int64_t distance;   // in positions, at which rows are fetched
  int64_t fetch_end;  // from here on no position has a row that comes later, to be fetched
};

constexpr char kNoNumber[4] = {};
constexpr float kOne = 1;
constexpr uint16_t kHalfOne = 0x3c00, kBFloat16One = 0x3f80;
constexpr double kDoubleOne = 1;

// 1 in the type of a table.
inline const void* OneOf(int32_t dtype) {
  switch (dtype) {
    case kFloat16:
      return &kHalfOne;
    case kBFloat16:
      return &kBFloat16One;
    case kFloat64:
      return &kDoubleOne;
    default:
      return &kOne;
  }
}

inline Positions::Positions(const PoolJob& job)
    : weight(job.weight),
      indices(job.indices),
      wide(job.index_type == kInt64),
      index_bytes(wide ? 8 : 4),
      row_bytes(job.row_bytes),
      padding(job.padding),
      rows(static_cast<uint64_t>(job.rows)),
      skips_negative(job.skips_negative),
      clips(job.max_norm <= DBL_MAX),
      scale(job.scale),
      second(job.bias         ? job.bias
             : job.zero_point ? job.zero_point
                              : kNoNumber),
      scale_stride(job.scale_stride),
      second_stride(job.bias || job.zero_point ? job.scale_stride : 0),
      half(job.scale_type == kFloat16),
      has_zero(job.zero_point != nullptr),
      weights(job.per_sample_weights ? job.per_sample_weights
                                     : static_cast<const char*>(OneOf(job.dtype))),
      weight_stride(job.per_sample_weights ? RowBytes(job.dtype, 1) : 0),
      fetch(FetchOf(job)),
      distance(fetch == Fetch::kNear ? kNearDistance : kFarDistance),
      fetch_end(fetch == Fetch::kNothing ? INT64_MIN : job.last_position + 1 - distance) {}

// What becomes of what was pooled.
template <class T>
struct Result {
  Accumulator<T> divisor = 1;  // but for mean and sqrtn
  bool partial = false;        // it is a row of accumulators
  bool half = false;           // the result of a quantized table is float16
};

template <class T>
struct Bag {
  explicit Bag(const PoolJob& job) : from(job) {}

  Positions from;  // of all bags; here, so that it is made once
  int64_t count;   // of rows
  bool is_whole;   // all blocks of columns are done, not only the first
  Result<T> result;
  const char* row[kPiece];
  union {  // so that they are not initialised, which took as long as some rows
    Factor<T> factor[kPiece];
  };
};

// What pooling starts from: no row changes it into anything but the row.
template <class T, int N, bool kMaximum>
LUCID_INLINE Vector<Accumulator<T>, N> Start() {
  const Vector<Accumulator<T>, N> zero = {};
  return kMaximum ? zero - static_cast<Accumulator<T>>(INFINITY) : zero;
}

template <class T, class V>
LUCID_INLINE V Scaled(V x, const Factor<T>& factor) {
  if constexpr (kIsQuantized<T>) {
    return (x - factor.zero) * factor.scale + factor.shift;
  } else {
    return x * factor.scale;
  }
}

// The vectors of a block are at its first column, N later, ..., and the last few end with the
// block. There they may overlap those before: columns are independent, so what is computed twice is
// equal. Of an even number about half are at the end, so that one loop is for many numbers of
// columns.
constexpr int AtEnd(int vectors) { return vectors < 4 || vectors % 2 ? 1 : vectors / 4 * 2; }
template <int kVectors>
constexpr int kAtEnd = AtEnd(kVectors);

// Where a block's first and last vector are in a row. 4-bit values may end in half a byte.
template <class T>
struct Span {
  size_t first_byte, last_byte;
  bool last_is_odd;

  Span(int64_t column, int64_t last)
      : first_byte(ByteOf<T>(column)),
        last_byte(ByteOf<T>(last)),
        last_is_odd(kIsNibble<T> && last % 2) {}

  // Where vector v is, and whether it begins in half a byte.
  template <int N, int kVectors>
  LUCID_INLINE size_t Byte(int v) const {
    return v < kVectors - kAtEnd<kVectors> ? first_byte + ByteOf<T>(v * N)
                                           : last_byte - ByteOf<T>((kVectors - 1 - v) * N);
  }
  template <int N, int kVectors>
  LUCID_INLINE bool IsOdd(int v) const {
    return v < kVectors - kAtEnd<kVectors> ? v * N % 2 : last_is_odd;
  }
};

// How many of the vectors are loaded in pairs, which lie side by side.
template <class T, int N>
constexpr int Paired(int vectors) {
  return Pair<T, N>::kExists && vectors > 2 ? vectors / 2 * 2 : 0;
}
template <class T, int N, int kVectors>
constexpr int kPaired = Paired<T, N>(kVectors);

template <class T, int N, int kVectors>
LUCID_INLINE void LoadBlock(const char* row, const Span<T>& span, Vector<Accumulator<T>, N>* x) {
  constexpr int kPairs = kPaired<T, N, kVectors>;
  if constexpr (kPairs > 0) {
    LUCID_UNROLL
    for (int v = 0; v < kPairs; v += 2) {
      Pair<T, N>::Load(row + span.template Byte<N, kVectors>(v), x + v);
    }
  }
  LUCID_UNROLL
  for (int v = kPairs; v < kVectors; ++v) {
    x[v] =
        LoadAt<T, N>(row, span.template Byte<N, kVectors>(v), span.template IsOdd<N, kVectors>(v));
  }
}

// A row's part of the block joins what is pooled. In a sum of quantized rows *shift gathers what
// every column gets, see EndGroup.
template <class T, int N, int kVectors, bool kMaximum, bool kScaled>
LUCID_INLINE void AddRow(const char* row, const Factor<T>& factor, bool has_zero,
                         const Span<T>& span, Vector<Accumulator<T>, N>* acc,
                         Accumulator<T>* shift) {
  Vector<Accumulator<T>, N> x[kVectors];
  if constexpr (kIsQuantized<T> && !kMaximum) {
    const Products<T, N, kScaled> products(factor.scale, factor.zero, has_zero);
    LUCID_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      x[v] =
          products.At(row, span.template Byte<N, kVectors>(v), span.template IsOdd<N, kVectors>(v));
    }
    *shift += factor.shift;
  } else {
    LoadBlock<T, N, kVectors>(row, span, x);
    if constexpr (kScaled || kIsQuantized<T>) {
      LUCID_UNROLL
      for (int v = 0; v < kVectors; ++v) x[v] = Scaled<T>(x[v], factor);
    }
  }
  static_cast<void>(factor);
  static_cast<void>(has_zero);
  static_cast<void>(shift);
  LUCID_UNROLL
  for (int v = 0; v < kVectors; ++v) acc[v] = kMaximum ? MaxSticky(acc[v], x[v]) : acc[v] + x[v];
}

// A group of rows is summed up: the biases of its rows, one addition a row, join each column's sum.
template <class T, int N, int kVectors>
LUCID_INLINE void EndGroup(Vector<Accumulator<T>, N>* acc, Accumulator<T>* shift) {
  if constexpr (kIsQuantized<T>) {
    LUCID_UNROLL
    for (int v = 0; v < kVectors; ++v) acc[v] = acc[v] + *shift;
    *shift = 0;
  } else {
    static_cast<void>(acc);
    static_cast<void>(shift);
  }
}

// Pools the listed rows [j, end), a group or, of a maximum, all.
template <class T, int N, int kVectors, bool kMaximum, bool kScaled>
LUCID_INLINE void AddRows(const Bag<T>& bag, int64_t j, int64_t end, const Span<T>& span,
                          Vector<Accumulator<T>, N>* acc) {
  Accumulator<T> shift = 0;
  LUCID_UNROLL
  for (int v = 0; v < kVectors; ++v) acc[v] = Start<T, N, kMaximum>();
  for (; j < end; ++j) {
    AddRow<T, N, kVectors, kMaximum, kScaled>(bag.row[j], bag.factor[j], true, span, acc, &shift);
  }
  if (!kMaximum) EndGroup<T, N, kVectors>(acc, &shift);
}

// Where the vectors of a block are stored: each where LoadBlock takes its elements from.
template <class Out, int N>
LUCID_INLINE char* PlaceOf(int v, int vectors, int64_t column, int64_t last, char* out) {
  const int64_t at = v < vectors - AtEnd(vectors) ? column + v * N : last - (vectors - 1 - v) * N;
  return out + static_cast<size_t>(at) * sizeof(Out);
}

// The type of the results, but for those of quantized tables that are float16.
template <class T, bool kQuantized = kIsQuantized<T>>
struct ResultType {
  using Type = T;
};

template <class T>
struct ResultType<T, true> {
  using Type = float;
};

template <class T>
using ResultOf = typename ResultType<T>::Type;

// What most blocks do not need has no place in the loops, each of which would have a copy: it goes
// vector by vector, as many as there are.

// Stores a block of accumulators, or of results in float16.
template <class T, int N>
LUCID_NOINLINE void StoreOther(const Result<T>& result, Vector<Accumulator<T>, N>* acc, int vectors,
                               int64_t column, int64_t last, char* out) {
  if constexpr (Pair<T, N>::kExists) {
    for (int v = 0; v < Paired<T, N>(vectors); v += 2) Pair<T, N>::InOrder(acc + v);
  }
  for (int v = 0; v < vectors; ++v) {
    if (result.partial) {
      using A = Accumulator<T>;
      Store<A, N>(acc[v], PlaceOf<A, N>(v, vectors, column, last, out));
    } else if constexpr (kIsQuantized<T>) {
      Store<Float16, N>(CanonicalNans<float, N>(acc[v] / result.divisor),
                        PlaceOf<Float16, N>(v, vectors, column, last, out));
    }
  }
}

// The sum of a group joins that of the groups before it, if there are any.
template <class A, int N>
LUCID_NOINLINE void JoinGroup(bool is_first, const Vector<A, N>* group, int vectors,
                              Vector<A, N>* sum) {
  for (int v = 0; v < vectors; ++v) sum[v] = is_first ? group[v] : sum[v] + group[v];
}

// Divides, rounds and stores a block of columns.
template <class T, int N, int kVectors>
LUCID_INLINE void Finish(const Result<T>& result, Vector<Accumulator<T>, N>* acc, int64_t column,
                         int64_t last, char* out) {
  using A = Accumulator<T>;
  using Out = ResultOf<T>;
  if (result.partial || (kIsQuantized<T> && result.half)) {
    Vector<A, N> copy[kVectors];  // acc itself stays in registers
    LUCID_UNROLL
    for (int v = 0; v < kVectors; ++v) copy[v] = acc[v];
    return StoreOther<T, N>(result, copy, kVectors, column, last, out);
  }
  if (result.divisor != 1) {
    LUCID_UNROLL
    for (int v = 0; v < kVectors; ++v) acc[v] = acc[v] / result.divisor;
  }
  LUCID_UNROLL
  for (int v = 0; v < kVectors; ++v) acc[v] = CanonicalNans<A, N>(acc[v]);
  constexpr int kPairs = kPaired<T, N, kVectors>;
  if constexpr (kPairs > 0) {
    LUCID_UNROLL
    for (int v = 0; v < kPairs; v += 2) Pair<T, N>::InOrder(acc + v);
  }
  LUCID_UNROLL
  for (int v = 0; v < kVectors; ++v) {
    Store<Out, N>(acc[v], PlaceOf<Out, N>(v, kVectors, column, last, out));
  }
}

// Pools a block of columns of a bag whose rows are listed, at least one.
template <class T, int N, int kVectors, bool kMaximum, bool kScaled>
void PoolBlock(const Bag<T>& bag, int64_t column, int64_t last, char* out) {
  using V = Vector<Accumulator<T>, N>;
  const Span<T> span(column, last);
  const int64_t n = bag.count;

  V acc[kVectors];
  AddRows<T, N, kVectors, kMaximum, kScaled>(bag, 0, kMaximum ? n : Smaller(n, kGroup), span, acc);
  if (!kMaximum && n > kGroup) {
    V sum[kVectors], group[kVectors];
    LUCID_UNROLL
    for (int v = 0; v < kVectors; ++v) sum[v] = acc[v];
    for (int64_t j = kGroup; j < n; j += kGroup) {
      AddRows<T, N, kVectors, kMaximum, kScaled>(bag, j, Smaller(n, j + kGroup), span, acc);
      LUCID_UNROLL
      for (int v = 0; v < kVectors; ++v) group[v] = acc[v];
      JoinGroup<Accumulator<T>, N>(false, group, kVectors, sum);
    }
    LUCID_UNROLL
    for (int v = 0; v < kVectors; ++v) acc[v] = sum[v];
  }
  Finish<T, N, kVectors>(bag.result, acc, column, last, out);
}

// |row|_p for p = 1, 2 and infinity. The lanes that the sum is spread over are 64 bytes wide
// whatever the registers are, and so are folded in one order.
template <class T, int kNorm>
Accumulator<T> RowNorm(const char* row, const Factor<T>& factor, int64_t columns) {
  using A = Accumulator<T>;
  constexpr int N = LUCID_VECTOR_BYTES / sizeof(A);
  constexpr int kLanes = 64 / sizeof(A);
  using V = Vector<A, N>;
  V acc[kLanes / N];
  for (V& a : acc) a = V{};
  for (int64_t i = 0; i < columns; i += kLanes) {
    V x_of[kLanes / N];
    if (columns - i < kLanes) {
      A tail[kLanes] = {};
      for (int64_t c = i; c < columns; ++c) {
        tail[c - i] =
            kIsQuantized<T> ? Scaled<T>(ElementAt<T>(row, c), factor) : ElementAt<T>(row, c);
      }
      memcpy(x_of, tail, sizeof(tail));
    } else {
      for (int v = 0; v < kLanes / N; ++v) {
        x_of[v] = LoadAt<T, N>(row, ByteOf<T>(i + v * N), false);
        if (kIsQuantized<T>) x_of[v] = Scaled<T>(x_of[v], factor);
      }
    }
    for (int v = 0; v < kLanes / N; ++v) {
      const V x = x_of[v];
      acc[v] = kNorm == 2   ? acc[v] + x * x
               : kNorm == 1 ? acc[v] + Abs(x)
                            : MaxSticky(acc[v], Abs(x));
    }
  }
  A lane[kLanes];
  memcpy(lane, acc, sizeof(lane));
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) {
      lane[i] = kNorm ? lane[i] + lane[i + width] : MaxSticky(lane[i], lane[i + width]);
    }
  }
  return lane[0];
}

LUCID_INLINE float SquareRoot(float x) { return sqrtf(x); }
LUCID_INLINE double SquareRoot(double x) { return sqrt(x); }

template <class T>
LUCID_NOINLINE Accumulator<T> Clip(const PoolJob& job, const char* row, const Factor<T>& factor) {
  using A = Accumulator<T>;
  const A max_norm = static_cast<A>(job.max_norm);
  A norm;
  if (job.norm_type == 2) {
    norm = SquareRoot(RowNorm<T, 2>(row, factor, job.columns));
  } else if (job.norm_type == 1) {
    norm = RowNorm<T, 1>(row, factor, job.columns);
  } else if (job.norm_type > DBL_MAX) {
    norm = RowNorm<T, 0>(row, factor, job.columns);
  } else {
    if constexpr (kIsQuantized<T>) {
      const Affine affine = {factor.scale, factor.zero, factor.shift};
      norm = static_cast<A>(job.general_norm(job, row, &affine));
    } else {
      norm = static_cast<A>(job.general_norm(job, row, nullptr));
    }
  }
  return norm > max_norm ? max_norm / (norm + static_cast<A>(1e-7)) : static_cast<A>(1);
}

// What mean and sqrtn divide by, for a bag of n rows, of which `weights` is the sum if that counts.
template <class T>
LUCID_INLINE Accumulator<T> DivisorOf(const PoolJob& job, int64_t n, double weights) {
  const double total = job.by_weights ? weights : static_cast<double>(n);
  return static_cast<Accumulator<T>>(job.mode == kSqrtn ? SquareRoot(total) : total);
}

// Number i of an array whose elements lie `stride` bytes apart, of float16 or float.
LUCID_INLINE float HalfOrFloat(const char* base, int64_t stride, bool half, int64_t i) {
  const char* p = base + i * stride;
  return half ? Load<Float16, 1>(p) : Load<float, 1>(p);
}

// What a quantized row is made of, whatever its table has.
template <class T>
LUCID_INLINE Factor<T> AffineOf(const Positions& from, int64_t index) {
  Factor<T> f;
  f.scale = HalfOrFloat(from.scale, from.scale_stride, from.half, index);
  const float second = HalfOrFloat(from.second, from.second_stride, from.half, index);
  (from.has_zero ? f.zero : f.shift) = second;
  return f;
}

// What a quantized row is multiplied with, by its clip and its weight.
template <class T>
LUCID_INLINE float WeightOf(const PoolJob& job, const Positions& from, int64_t k, const char* row,
                            const Factor<T>& affine) {
  float weight = 1;
  if (from.clips) weight = Clip<T>(job, row, affine);
  if (job.per_sample_weights) {
    const bool half = job.output_type == kFloat16;
    weight *= HalfOrFloat(job.per_sample_weights, half ? 2 : 4, half, k);
  }
  return weight;
}

// kAdjusted: with the row's clip and its weight; of a quantized table, also with a zero_point, and
// scales in float16. (Deciding on each of them at every row took 1.3 times as long.) kClips: other
// rows may be clipped too. (A call in the loop, made or not, cost weighted sums some 5 %.)
template <class T, bool kAdjusted, bool kClips>
LUCID_INLINE Factor<T> FactorOf(const PoolJob& job, const Positions& from, int64_t k, int64_t index,
                                const char* row) {
  Factor<T> f;
  if constexpr (kIsQuantized<T>) {
    if constexpr (!kAdjusted) {
      f.scale = Load<float, 1>(from.scale + index * from.scale_stride);
      f.shift = Load<float, 1>(from.second + index * from.second_stride);
    } else {
      f = AffineOf<T>(from, index);
      const float weight = WeightOf<T>(job, from, k, row, f);
      f.scale *= weight;
      f.shift *= weight;
    }
  } else {
    static_cast<void>(index);
    f.scale = Load<T, 1>(from.weights + k * from.weight_stride);
    if (kClips && from.clips) f.scale = Clip<T>(job, row, Factor<T>()) * f.scale;
  }
  return f;
}

// The callers read an index or an offset once, check it and use what they have checked: the host
// may write to the tensor meanwhile. (Forbidding the compiler to read it twice, which none does, by
// an asm statement as InOneRegister has took 1.05 to 1.11 times as long for rows of uint8.)
LUCID_INLINE int64_t IndexAt(const char* indices, bool wide, int64_t k) {
  return wide ? LoadUnaligned<int64_t>(indices, k) : LoadUnaligned<int32_t>(indices, k);
}

// Whether an index that is not a row of the table is an error, and not skipped.
LUCID_INLINE bool IsBad(const Positions& from, int64_t index) {
  return index >= 0 || !from.skips_negative;
}

LUCID_INLINE void FetchLines(bool near, uintptr_t p, int64_t bytes) {
  if (near && kNearIntoL1) {
    LUCID_UNROLL
    for (int64_t i = 0; i < bytes; i += 64) {
      LUCID_PREFETCH_L1(reinterpret_cast<const char*>(p + static_cast<uintptr_t>(i)));
    }
  } else {
    LUCID_UNROLL
    for (int64_t i = 0; i < bytes; i += 64) {
      LUCID_PREFETCH_L2(reinterpret_cast<const char*>(p + static_cast<uintptr_t>(i)));
    }
  }
}

// Fetches what position k looks up, `bytes` of its row.
template <class T>
LUCID_INLINE void FetchRow(const Positions& from, int64_t k, int64_t bytes) {
  const uintptr_t index = HintAt(from.indices, from.index_bytes, k);
  const bool near = from.fetch == Fetch::kNear;
  FetchLines(
      near,
      reinterpret_cast<uintptr_t>(from.weight) + index * static_cast<uintptr_t>(from.row_bytes),
      bytes);
  if (kIsQuantized<T>) {
    FetchLines(
        near,
        reinterpret_cast<uintptr_t>(from.scale) + index * static_cast<uintptr_t>(from.scale_stride),
        1);
  }
}

// Which positions of a loop fetch a row that comes later: all, none, or those before fetch_end.
enum class Fetches { kAll, kNone, kSome };

// Adds the rows of the positions [k, end) to the first block of columns; those of kListed jobs are
// noted in the bag too. Returns end, or the first position whose index is outside the table: a bad
// one, or one to skip, which costs the loop nothing so. *count is the number of rows in the bag.
//
// Few instructions a row matter here: the fewer, the more rows the processor has under way at once.
// So whatever stays as it is over many positions is a constant of the template or was cut away by
// the caller: 8.1 ns per row of 256 bytes became 4.8, in a table that L2 holds.
template <class T, int N, int kVectors, bool kMaximum, bool kScaled, bool kListed, Fetches kFetches>
LUCID_INLINE int64_t AddPositions(const PoolJob& job, const Positions& from, int64_t k, int64_t end,
                                  const Span<T>& span, Bag<T>* bag, int64_t* count,
                                  Vector<Accumulator<T>, N>* acc, Accumulator<T>* shift) {
  constexpr int64_t kBlockBytes = static_cast<int64_t>(BytesOf<T>(kVectors * N));
  // The place in the bag of position k is k - skipped: what changes at skipped positions only.
  int64_t skipped = k - *count;
  for (; k < end; ++k) {
    const int64_t index = IndexAt(from.indices, from.wide, k);
    if (static_cast<uint64_t>(index) >= from.rows) {
      if (kScaled || IsBad(from, index)) break;
      ++skipped;
      continue;
    }
    if (kFetches == Fetches::kAll || (kFetches == Fetches::kSome && k < from.fetch_end)) {
      FetchRow<T>(from, k + from.distance,
                  kListed && (kWholeRows || sizeof(T) < 4) ? from.row_bytes : kBlockBytes);
    }
    if (index == from.padding) {
      ++skipped;
      continue;
    }
    const char* const row = InOneRegister(from.weight + index * from.row_bytes);
    Factor<T> factor;
    if (kScaled || kIsQuantized<T>) {
      factor = FactorOf<T, kScaled, kFetches == Fetches::kSome>(job, from, k, index, row);
    }
    if (kListed) {
      bag->row[k - skipped] = row;
      if (kScaled || kIsQuantized<T>) bag->factor[k - skipped] = factor;
    }
    AddRow<T, N, kVectors, kMaximum, kScaled>(row, factor, kScaled && from.has_zero, span, acc,
                                              shift);
  }
  *count = k - skipped;
  return k;
}

// One of Fetches, as an argument for a lambda.
template <Fetches kFetches>
struct Constant {
  static constexpr Fetches kValue = kFetches;
};

// Some bags, one after another: the first one's positions are given, at most kPiece of them. Or
// one piece of a bag.
struct Range {
  int64_t bag, last_bag;
  int64_t begin, end;
};

// Where a bag begins. The offsets were checked, but the host may have written to them since: they
// are kept among the positions here.
struct Borders {
  static constexpr int64_t kSome = 64;

  const char* offsets;
  bool wide;
  int64_t count, bag_length, num_positions;

  explicit Borders(const PoolJob& job)
      : offsets(job.offsets),
        wide(job.offset_type == kInt64),
        count(job.num_offsets),
        bag_length(job.bag_length),
        num_positions(job.num_positions) {}

  LUCID_INLINE int64_t At(int64_t bag) const {
    if (!offsets) return bag * bag_length;
    return bag < count ? WithinPositions(IndexAt(offsets, wide, bag), num_positions)
                       : num_positions;
  }

  // Where the bags from this one on begin, `some` of them.
  LUCID_NOINLINE void Read(int64_t bag, int64_t some, int64_t* begins) const {
    for (int64_t j = 0; j < some; ++j) begins[j] = At(bag + j);
  }
};

// Whether a sum must be computed again, of plain products. One that is not finite stays so whatever
// is added, and one lane tells of all.
template <class T, int N, bool kMaximum, bool kScaled>
LUCID_INLINE bool IsSpoilt(const Vector<Accumulator<T>, N>& sum) {
  if constexpr (kIsQuantized<T> && !kMaximum) {
    if constexpr (Products<T, N, kScaled>::kPartial) return !(sum[0] - sum[0] == 0);
  }
  static_cast<void>(sum);
  return false;
}

// Whether a weighted sum of quantized rows must be computed again by SumByDefinition. A scale or a
// shift that is not finite spoils every column, so one lane tells of all here too.
template <class T, int N, bool kMaximum, bool kScaled>
LUCID_INLINE bool IsUndefined(const PoolJob& job, const Vector<Accumulator<T>, N>& sum) {
  if constexpr (kIsQuantized<T> && kScaled && !kMaximum) {
    float first;
    memcpy(&first, &sum, sizeof(first));
    return !(first - first == 0) && job.per_sample_weights;
  }
  static_cast<void>(job);
  static_cast<void>(sum);
  return false;
}

// The weighted sum over the positions [begin, end), at most kPiece, in all columns: the same as
// that of the loops, except for rows whose scale or shift is not finite once it is multiplied with
// the weight. Those are (value * scale + shift) * weight here, where value * (scale * weight) +
// shift * weight has 0 * inf and inf - inf. Returns as PoolFirstBlock does.
template <class T>
LUCID_NOINLINE int64_t SumByDefinition(const PoolJob& job, const Positions& from,
                                       const Result<T>& result, int64_t begin, int64_t end,
                                       char* out) {
  constexpr int64_t kSome = 512;  // columns at a time
  float acc[kSome], sum[kSome];
  for (int64_t column = 0; column < job.columns; column += kSome) {
    const int64_t some = Smaller(kSome, job.columns - column);
    for (int64_t c = 0; c < some; ++c) acc[c] = sum[c] = 0;
    float shift = 0;
    int64_t rows = 0;  // in this group
    bool in_sum = false;
    const auto end_group = [&] {
      for (int64_t c = 0; c < some; ++c) {
        acc[c] += shift;
        sum[c] = in_sum ? sum[c] + acc[c] : acc[c];
        acc[c] = 0;
      }
      shift = 0;
      rows = 0;
      in_sum = true;
    };
    for (int64_t k = begin; k < end; ++k) {
      const int64_t index = IndexAt(from.indices, from.wide, k);
      if (static_cast<uint64_t>(index) >= from.rows) {
        if (IsBad(from, index)) return k;
        continue;
      }
      if (index == from.padding) continue;
      const char* const row = from.weight + index * from.row_bytes;
      const Factor<T> affine = AffineOf<T>(from, index);
      const float weight = WeightOf<T>(job, from, k, row, affine);
      const float scale = affine.scale * weight, row_shift = affine.shift * weight;
      if (scale - scale == 0 && row_shift - row_shift == 0) {
        for (int64_t c = 0; c < some; ++c) {
          acc[c] += (ElementAt<T>(row, column + c) - affine.zero) * scale;
        }
        shift += row_shift;
      } else {
        for (int64_t c = 0; c < some; ++c) {
          acc[c] += Scaled<T>(ElementAt<T>(row, column + c), affine) * weight;
        }
      }
      if (++rows == kGroup) end_group();
    }
    if (rows > 0) end_group();
    for (int64_t c = 0; c < some; ++c) {
      const int64_t at = column + c;
      if (!result.partial && result.divisor != 1) sum[c] /= result.divisor;
      if (result.partial) {
        Store<float, 1>(sum[c], out + at * static_cast<int64_t>(sizeof(float)));
      } else if (result.half) {
        Store<Float16, 1>(CanonicalNan(sum[c]), out + at * 2);
      } else {
        Store<float, 1>(CanonicalNan(sum[c]), out + at * 4);
      }
    }
  }
  return kNoBadPosition;
}

// Pools the first block of columns of each bag in the range that is no longer than a piece, and
// lists the rows if there are more blocks (of one bag, then). Returns kNoBadPosition, or the first
// position whose index is outside the table. The result of a bag without a row is zeros, or nothing
// for a piece.
//
// All bags in one call, with what they share in registers: the fewer instructions lie between two
// rows, the more of them, and of their page walks, are under way at once. Where bags begin is read
// for many at a time. (Fetching rows eight at a time, out of the loop, took 1.02 to 1.2 times as
// long: the loop's end is mispredicted more often.)
template <class T, int N, int kVectors, bool kMaximum, bool kScaled, bool kListed>
int64_t PoolFirstBlock(const PoolJob& job, const Range& range, int64_t last, Bag<T>* bag,
                       char* out) {
  using A = Accumulator<T>;
  using V = Vector<A, N>;
  const Positions from = bag->from;
  const Borders borders(job);
  Result<T> result = bag->result;
  const bool divides = Divides(job.mode) && !result.partial, by_weights = divides && job.by_weights;
  const int64_t stride = job.output_stride, last_bag = range.last_bag;
  const Span<T> span(0, last);

  bag->is_whole = false;
  int64_t begin = range.begin;
  int64_t ends[Borders::kSome];
  for (int64_t i = range.bag, j = Borders::kSome; i < last_bag; ++i, ++j, out += stride) {
    if (j == Borders::kSome) {
      borders.Read(i + 1, Smaller(j, last_bag - i), ends);
      if (i == range.bag) ends[0] = range.end;
      j = 0;
    }
    const int64_t end = ends[j];
    const Range alone = {i, i + 1, begin, end};
    begin = end;
    if (end - alone.begin > kPiece) continue;
    // Before the rows, so that a call does not find the registers full of their sums.
    const double weights = by_weights ? job.weight_sum(job, alone.begin, end) : 0;
    V acc[kVectors], sum[kVectors];
    LUCID_UNROLL
    for (int v = 0; v < kVectors; ++v) acc[v] = Start<T, N, kMaximum>();
    A shift = 0;
    int64_t n = 0, group = 0;  // rows so far, and in the groups that sum holds
    for (int64_t k = alone.begin;;) {
      int64_t stop = kMaximum ? end : Smaller(end, k + (group + kGroup - n));
      const auto add = [&](auto fetches) LUCID_ALWAYS_INLINE {
        k = AddPositions<T, N, kVectors, kMaximum, kScaled, kListed, decltype(fetches)::kValue>(
            job, from, k, stop, span, bag, &n, acc, &shift);
      };
      constexpr bool kMayClip = kScaled && sizeof(T) >= 4;  // else the one loop does
      if constexpr (kMaximum || (kScaled && !kMayClip)) {
        add(Constant<Fetches::kSome>());
      } else {
        const bool clips = kMayClip && from.clips;
        if constexpr (kMayClip) {
          if (clips) add(Constant<Fetches::kSome>());
        }
        if (!clips && k < from.fetch_end) {
          stop = Smaller(stop, from.fetch_end);
          add(Constant<Fetches::kAll>());
        } else if (!clips) {
          add(Constant<Fetches::kNone>());
        }
      }
      if (k >= end) break;  // above it where offsets change while they are read
      if (k < stop) {
        if (IsBad(from, IndexAt(from.indices, from.wide, k))) return k;
        if (++k == end) break;
      }
      if (kMaximum || n < group + kGroup) continue;
      EndGroup<T, N, kVectors>(acc, &shift);
      V copy[kVectors];
      LUCID_UNROLL
      for (int v = 0; v < kVectors; ++v) {
        copy[v] = acc[v];
        acc[v] = V{};
      }
      JoinGroup<Accumulator<T>, N>(group == 0, copy, kVectors, sum);
      group = n;
    }
    bag->count = n;
    if (n == 0) {
      if (!result.partial) memset(out, 0, static_cast<size_t>(job.output_row_bytes));
      continue;
    }
    if (!kMaximum) EndGroup<T, N, kVectors>(acc, &shift);
    if (group > 0) {
      // A group without rows must not turn -0 into 0.
      LUCID_UNROLL
      for (int v = 0; v < kVectors; ++v) acc[v] = n > group ? sum[v] + acc[v] : sum[v];
    }
    if (divides) result.divisor = DivisorOf<T>(job, n, weights);
    if (IsSpoilt<T, N, kMaximum, kScaled>(acc[0])) {
      const int64_t bad =
          PoolFirstBlock<T, N, kVectors, kMaximum, true, kListed>(job, alone, last, bag, out);
      if (bad != kNoBadPosition) return bad;
    } else if (IsUndefined<T, N, kMaximum, kScaled>(job, acc[0])) {
      if constexpr (kIsQuantized<T>) {
        const int64_t bad = SumByDefinition<T>(job, bag->from, result, alone.begin, end, out);
        if (bad != kNoBadPosition) return bad;
      }
      bag->is_whole = true;
    } else {
      Finish<T, N, kVectors>(result, acc, 0, last, out);
    }
  }
  bag->result.divisor = result.divisor;
  return kNoBadPosition;
}

// The blocks that D columns are cut into: `full` ones of the most registers, then one for what is
// left, which begins earlier, among columns that are done, to be 1/8, 1/4, 1/2 or the whole of a
// full one: what is computed twice is equal, and there are fewer loops to compile. A row narrower
// than a register takes narrower vectors, and below 16 bytes scalars.
template <class T>
struct Blocks {
  using PoolFirst = int64_t (*)(const PoolJob& job, const Range& range, int64_t last, Bag<T>* bag,
                                char* out);
  using Pool = void (*)(const Bag<T>& bag, int64_t column, int64_t last, char* out);
  PoolFirst first;       // the block at column 0, whichever it is; null without columns
  Pool full, rest;       // the others; rest may be null
  int64_t full_columns;  // of one full block
  int64_t rest_begin;    // the first column of the rest; the full blocks end there or before
  int64_t full_last;     // from a full block's first column to its last vector
  int64_t rest_last;     // the column of the last vector of the rest
  int64_t first_last;    // the column of the last vector of the first block
};

// What computes in long chains anyway, or is rare, has loops of few registers only. Sums of
// elements under 32 bits have twice as many where there are 32, since another block is another pass
// over a bag's rows: one of 256 float16 took 12.1 ns in place of 15.2 in a table of 2 MB, one of
// 200 8-bit values 12.3 in place of 21.6. (float32, whose blocks have as many bytes without,
// lost 1 to 4 %.)
template <class T, bool kMaximum, bool kScaled>
constexpr int kMostVectors = kMaximum && (kScaled || kIsQuantized<T>) ? 2
                             : kMaximum || sizeof(T) > 2              ? LUCID_MAX_VECTORS
                                                                      : LUCID_MAX_NARROW_VECTORS;

// Sums of float32 may have more in a row that is one block: with AVX2, one of 100 took 60 ns in
// place of 71 in a table of 256 MB, 116 in place of 122 in one of 4 GiB. (16-bit numbers, which
// need registers to be widened in, lost 1.2 to 1.4 times there.)
template <class T, bool kMaximum, bool kScaled>
constexpr int kMostLoneVectors =
    !kMaximum && sizeof(T) == 4 ? LUCID_MAX_LONE_VECTORS : kMostVectors<T, kMaximum, kScaled>;

// The numbers of vectors that there are loops for: this one is the next after `vectors`. A loop
// takes what is more than the next one and up to its own. Plain sums of float32 have the finest
// choice: every loop is compiled for every element type and instruction set.
template <class T, bool kMaximum, bool kScaled>
constexpr int Fewer(int vectors) {
  constexpr bool kCoarse = kMaximum || kScaled, kFine = !kCoarse && sizeof(T) == 4;
  if (vectors > 8) return vectors > 12 && !kCoarse ? 12 : 8;
  if (vectors < 3) return kCoarse ? 0 : vectors - 1;
  return kFine || vectors % 2 ? vectors - 1 : kCoarse ? vectors / 2 / 2 * 2 : vectors - 2;
}

// The loop for a block of so many vectors, and how many it takes.
template <class T, int N, int kVectors, bool kMaximum, bool kScaled>
typename Blocks<T>::Pool ChooseBlock(int64_t vectors, int64_t* taken) {
  constexpr int kLess = kVectors / 2;
  if constexpr (kVectors > 2 && kVectors > LUCID_MAX_VECTORS / 4) {
    if (vectors <= kLess) return ChooseBlock<T, N, kLess, kMaximum, kScaled>(vectors, taken);
  }
  static_cast<void>(vectors);
  *taken = kVectors;
  return PoolBlock < T, N, kVectors, kMaximum, kScaled || kIsQuantized < T >> ;
}

// Sets the loops for a first block that is the only one.
template <class T, int N, int kVectors, bool kMaximum, bool kScaled>
void SetFirstBlock(Blocks<T>* b) {
  b->first = PoolFirstBlock<T, N, kVectors, kMaximum, kScaled, false>;
}

// The same for one of so many vectors.
template <class T, int N, int kVectors, bool kMaximum, bool kScaled>
void ChooseFirstBlock(int64_t vectors, Blocks<T>* b) {
  constexpr int kLess = Fewer<T, kMaximum, kScaled>(kVectors);
  static_assert(kVectors - kAtEnd<kVectors> <= (kLess > 1 ? kLess : 1), "a row may be too short");
  if constexpr (kLess > 0) {
    if (vectors <= kLess) return ChooseFirstBlock<T, N, kLess, kMaximum, kScaled>(vectors, b);
  }
  static_cast<void>(vectors);
  SetFirstBlock<T, N, kVectors, kMaximum, kScaled>(b);
}

template <class T, int N, bool kMaximum, bool kScaled>
Blocks<T> CutColumns(int64_t columns) {
  constexpr int kWidest = LUCID_VECTOR_BYTES / sizeof(Accumulator<T>);
  constexpr int kNarrowest = 16 / sizeof(Accumulator<T>);
  if constexpr (N > 1) {
    if (columns < N) {
      // Narrow maxima are rare: those without factors take the loops of those with.
      constexpr int kNarrower = N > kNarrowest ? N / 2 : 1;
      return CutColumns < T, kNarrower, kMaximum, kScaled || kMaximum > (columns);
    }
  }
  Blocks<T> b = {};
  b.first_last = columns - N;
  if constexpr (N == kWidest) {
    constexpr int kMost = kMostVectors<T, kMaximum, kScaled>;
    b.full_columns = kMost * N;
    b.rest_begin = columns / b.full_columns * b.full_columns;
    constexpr int kMostLone = kMostLoneVectors<T, kMaximum, kScaled>;
    if (columns <= kMostLone * N) {
      b.full_columns = b.rest_begin = columns;
      ChooseFirstBlock<T, N, kMostLone, kMaximum, kScaled>((columns + N - 1) / N, &b);
      return b;
    }
    b.first = PoolFirstBlock<T, N, kMost, kMaximum, kScaled, true>;
    b.full = PoolBlock < T, N, kMost, kMaximum, kScaled || kIsQuantized < T >> ;
    b.first_last = b.full_last = b.full_columns - N;
    if (b.rest_begin < columns) {
      const int64_t vectors = (columns - b.rest_begin + N - 1) / N;
      int64_t taken;
      b.rest = ChooseBlock<T, N, kMost, kMaximum, kScaled>(vectors, &taken);
      b.rest_begin -= (taken - vectors) * N;
      b.rest_last = columns - N;
    }
  } else if constexpr (N > 1) {
    // Two vectors, which overlap, reach across all that one of the next width does not fit in.
    b.full_columns = b.rest_begin = columns;
    constexpr int kOne = kMaximum || kScaled ? 2 : 1;
    if (columns == N) {
      SetFirstBlock<T, N, kOne, kMaximum, kScaled>(&b);
    } else {
      SetFirstBlock<T, N, 2, kMaximum, kScaled>(&b);
    }
  } else {
    // Three reach across two columns too, and are so rare that there are only those with factors.
    b.full_columns = b.rest_begin = columns;
    if (columns == 1) {
      SetFirstBlock<T, N, 1, kMaximum, kScaled>(&b);
    } else if constexpr (kNarrowest > 2) {
      SetFirstBlock<T, N, 3, kMaximum, true>(&b);
    }
  }
  return b;
}

template <class T>
struct Pooler {
  const PoolJob& job;
  Blocks<T> blocks = {};
  Bag<T> bag;

  explicit Pooler(const PoolJob& j) : job(j), bag(j) {
    const bool scaled = job.max_norm <= DBL_MAX || job.per_sample_weights ||
                        (kIsQuantized<T> && (job.zero_point || job.scale_type == kFloat16));
    constexpr int N = LUCID_VECTOR_BYTES / sizeof(Accumulator<T>);
    if (job.columns > 0) {
      blocks = job.mode == lucid::kMax ? Cut<N, true>(scaled) : Cut<N, false>(scaled);
    }
    bag.result.half = job.output_type == kFloat16;
  }

  template <int N, bool kMaximum>
  Blocks<T> Cut(bool scaled) const {
    // Maxima of quantized rows are rare: they have one loop for both.
    if constexpr (!(kIsQuantized<T> && kMaximum)) {
      if (!scaled) return CutColumns<T, N, kMaximum, false>(job.columns);
    }
    static_cast<void>(scaled);
    return CutColumns<T, N, kMaximum, true>(job.columns);
  }

  // Pools a range, which is one bag or piece if there is more than one block of columns or none.
  // bag.count tells whether its last bag had a row.
  LUCID_INLINE int64_t Pool(const Range& range, char* out) {
    if (!blocks.first) return Check(range.begin, range.end);
    const int64_t bad = blocks.first(job, range, blocks.first_last, &bag, out);
    if (bad != kNoBadPosition || bag.count == 0 || bag.is_whole) return bad;
    for (int64_t c = blocks.full_columns; c < blocks.rest_begin; c += blocks.full_columns) {
      blocks.full(bag, c, c + blocks.full_last, out);
    }
    if (blocks.rest) blocks.rest(bag, blocks.rest_begin, blocks.rest_last, out);
    return kNoBadPosition;
  }

  // For rows without columns: only the indices are looked at.
  int64_t Check(int64_t begin, int64_t end) {
    bag.count = 0;
    for (int64_t k = begin; k < end; ++k) {
      const int64_t index = IndexAt(bag.from.indices, bag.from.wide, k);
      if (static_cast<uint64_t>(index) >= bag.from.rows && IsBad(bag.from, index)) return k;
    }
    return kNoBadPosition;
  }
};

template <class T>
int64_t PoolBags(const PoolJob& job, int64_t first, int64_t last, bool ahead) {
  Pooler<T> pooler(job);
  const Borders borders(job);
  const Positions& from = pooler.bag.from;
  const int64_t begin = borders.At(first);
  if (!ahead && from.fetch != Fetch::kNothing) {
    const int64_t end = Smaller(begin + from.distance, job.last_position + 1);
    for (int64_t k = begin; k < end; ++k) FetchRow<T>(from, k, from.row_bytes);
  }
  const bool together = pooler.blocks.first && !pooler.blocks.full;
  for (int64_t i = first, next; i < last; i = next) {
    next = together ? last : i + 1;
    const Range range = {i, next, borders.At(i), borders.At(i + 1)};
    if (!together && range.end - range.begin > kPiece) continue;
    const int64_t bad = pooler.Pool(range, job.output + i * job.output_stride);
    if (bad != kNoBadPosition) return bad;
  }
  return kNoBadPosition;
}

template <class T>
int64_t PoolPiece(const PoolJob& job, int64_t begin, int64_t end, char* row, int64_t* count) {
  Pooler<T> pooler(job);
  pooler.bag.result.partial = true;
  const int64_t bad = pooler.Pool({0, 1, begin, end}, row);
  *count = bad == kNoBadPosition ? pooler.bag.count : 0;
  return bad;
}

// What the weight of a position adds to the sum that a bag is divided by.
template <class Weight, bool kSquares, bool kSkips>
LUCID_INLINE double AddedWeight(const PoolJob& job, int64_t k) {
  if constexpr (kSkips) {
    const int64_t index = IndexAt(job.indices, job.index_type == kInt64, k);
    if (index == job.padding || index < 0) return 0;
  }
  const double weight = ToAccumulator(LoadUnaligned<Weight>(job.per_sample_weights, k));
  return kSquares ? weight * weight : weight;
}

#if defined(LUCID_VECTOR_EXTENSIONS)
// The same of the N positions from k on.
template <class Weight, int N, bool kSquares, bool kSkips>
LUCID_INLINE Vector<double, N> AddedWeights(const PoolJob& job, int64_t k) {
  const char* const at = job.per_sample_weights + k * static_cast<int64_t>(sizeof(Weight));
  Vector<double, N> weight;
  if constexpr (sizeof(Weight) == sizeof(double)) {
    weight = Load<Weight, N>(at);
  } else {
    weight = __builtin_convertvector(Load<Weight, N>(at), Vector<double, N>);
  }
  if constexpr (kSquares) weight = weight * weight;
  if constexpr (kSkips) {
    Vector<int64_t, N> row;
    if (job.index_type == kInt64) {
      memcpy(&row, job.indices + k * 8, sizeof(row));
    } else {
      Vector<int32_t, N> narrow;
      memcpy(&narrow, job.indices + k * 4, sizeof(narrow));
      row = __builtin_convertvector(narrow, Vector<int64_t, N>);
    }
    weight = ((row == job.padding) | (row < 0)) ? Vector<double, N>{} : weight;
  }
  return weight;
}
#endif

// Position i of a piece joins lane i % 4, on every instruction set.
template <class Weight, bool kSquares, bool kSkips>
double SumWeights(const PoolJob& job, int64_t begin, int64_t end) {
  double total = 0;
  for (int64_t piece = begin; piece < end; piece += kPiece) {
    const int64_t stop = Smaller(piece + kPiece, end);
    int64_t k = piece;
    double lane[4] = {};
#if defined(LUCID_VECTOR_EXTENSIONS)
    constexpr int N = LUCID_VECTOR_BYTES < 32 ? 2 : 4;
    Vector<double, N> sum[4 / N] = {};
    for (; k + 4 <= stop; k += 4) {
      LUCID_UNROLL
      for (int v = 0; v < 4 / N; ++v) {
        sum[v] = sum[v] + AddedWeights<Weight, N, kSquares, kSkips>(job, k + v * N);
      }
    }
    memcpy(lane, sum, sizeof(lane));
#endif
    for (int64_t i = 0; k < stop; ++k, i = (i + 1) % 4) {
      lane[i] += AddedWeight<Weight, kSquares, kSkips>(job, k);
    }
    total += (lane[0] + lane[1]) + (lane[2] + lane[3]);
  }
  return total;
}

template <class Weight>
WeightSum SumOfWeights(bool squares, bool skips) {
  if (squares) return skips ? SumWeights<Weight, true, true> : SumWeights<Weight, true, false>;
  return skips ? SumWeights<Weight, false, true> : SumWeights<Weight, false, false>;
}

WeightSum WeightSumOf(const PoolJob& job) {
  const bool squares = job.mode == kSqrtn, skips = job.padding >= 0 || job.skips_negative;
  switch (job.output_type) {  // which is the type of the weights, also of a quantized table's
    case kFloat16:
      return SumOfWeights<Float16>(squares, skips);
    case kBFloat16:
      return SumOfWeights<BFloat16>(squares, skips);
    case kFloat64:
      return SumOfWeights<double>(squares, skips);
    default:
      return SumOfWeights<float>(squares, skips);
  }
}

int64_t Bags(const PoolJob& job, int64_t first, int64_t last, bool ahead) {
  LUCID_FOR_DTYPE(job.dtype, return PoolBags<T>(job, first, last, ahead));
}

int64_t Piece(const PoolJob& job, int64_t begin, int64_t end, char* row, int64_t* count) {
  LUCID_FOR_DTYPE(job.dtype, return PoolPiece<T>(job, begin, end, row, count));
}

template <class T>
double ClipRow(const PoolJob& job, const char* row) {
  if constexpr (kIsQuantized<T>) {
    return 1;
  } else {
    return Clip<T>(job, row, Factor<T>());
  }
}

double ClipOf(const PoolJob& job, const char* row) {
  LUCID_FOR_DTYPE(job.dtype, return ClipRow<T>(job, row));
}

}  // namespace

namespace LUCID_ISA {
extern const PoolKernel kPoolRows;
const PoolKernel kPoolRows = {WeightSumOf, Bags, Piece, ClipOf};
}  // namespace LUCID_ISA

}  // namespace lucid
