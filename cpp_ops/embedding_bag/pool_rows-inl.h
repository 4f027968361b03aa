// The loops of EmbeddingBag: one source, compiled once per instruction set by pool_rows_<isa>.cc,
// which sets LUCID_ISA, LUCID_VECTOR_BYTES and LUCID_MAX_VECTORS first.
//
// No standard library here and no inline function of external linkage: types.h says why.
//
// A bag is pooled in two steps. Gather checks its indices and lists the addresses of its rows, with
// their scales and without the padded ones. PoolBlock then has nothing left to decide: it adds up a
// block of columns, whose accumulators stay in registers, over all rows of the list.

#include <float.h>
#include <math.h>

#include "base/simd.h"
#include "embedding_bag/embedding_bag.h"
#include "embedding_bag/pool_rows.h"

namespace lucid {
namespace {

constexpr int64_t kGroup = 64;  // rows that are added up before they join the sum so far

LUCID_INLINE int64_t Smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Rows are fetched into L2 this many positions before their use. Worth on 256-byte rows of a 256 MB
// table (Sapphire Rapids, one thread): no fetching takes 1.5 to 2.3 times as long, a distance of 16
// or 32 up to 1.2 times, fetching into L1 or also into L1 1.1 to 1.3 times. On a table that fits
// into L2 the fetching itself costs 2 ns a row.
constexpr int64_t kAhead = 64;

struct Ahead {
  const char* indices;
  int64_t index_bytes, last_position;
  uintptr_t weight, row_bytes;
};

LUCID_INLINE void PrefetchRow(uintptr_t row, uintptr_t row_bytes) {
  const uintptr_t first = row & ~uintptr_t{63};  // a line of the cache
  for (uintptr_t i = 0; i < row - first + row_bytes; i += 64) {
    LUCID_PREFETCH(reinterpret_cast<const char*>(first + i));
  }
}

// Fetches the row that is used kAhead positions after this one, in whatever bag that is.
LUCID_INLINE void PrefetchAhead(const Ahead& a, int64_t position) {
  // The low half of an index is enough: it errs on tables of 2^32 rows and on big-endian machines
  // only, and an address that is merely prefetched may be anything, even an unchecked index's.
  uint32_t index;
  memcpy(&index, a.indices + Smaller(position + kAhead, a.last_position) * a.index_bytes,
         sizeof(index));
  PrefetchRow(a.weight + index * a.row_bytes, a.row_bytes);
}

template <class T>
struct Bag {
  using A = Accumulator<T>;
  int64_t count;  // of rows
  A divisor;      // 1 but for mean
  bool partial;   // the result is a row of accumulators
  uintptr_t row_bytes;
  const char* row[kPiece];
  A scale[kPiece];
};

// Row j's part of the block: vectors at column, column + N, ..., and the last one at `last`, where
// it may overlap the one before. Columns are independent, so what is computed twice is equal.
template <class T, int N, int kVectors, bool kScaled>
LUCID_INLINE void LoadRow(const Bag<T>& bag, int64_t j, size_t first_byte, size_t last_byte,
                          Vector<Accumulator<T>, N>* x) {
  const char* row = bag.row[j];
  LUCID_UNROLL
  for (int v = 0; v < kVectors - 1; ++v) x[v] = Load<T, N>(row + first_byte + v * N * sizeof(T));
  x[kVectors - 1] = Load<T, N>(row + last_byte);
  if (kScaled) {
    LUCID_UNROLL
    for (int v = 0; v < kVectors; ++v) x[v] = x[v] * bag.scale[j];
  }
}

template <class T, int N, int kVectors, bool kMaximum, bool kScaled>
LUCID_INLINE void AddRows(const Bag<T>& bag, int64_t j, int64_t end, size_t first_byte,
                          size_t last_byte, int64_t prefetch_end, Vector<Accumulator<T>, N>* acc) {
  using V = Vector<Accumulator<T>, N>;
  for (; j < end; ++j) {
    if (j + kAhead < prefetch_end) {
      PrefetchRow(reinterpret_cast<uintptr_t>(bag.row[j + kAhead]), bag.row_bytes);
    }
    V x[kVectors];
    LoadRow<T, N, kVectors, kScaled>(bag, j, first_byte, last_byte, x);
    LUCID_UNROLL
    for (int v = 0; v < kVectors; ++v) acc[v] = kMaximum ? MaxSticky(acc[v], x[v]) : acc[v] + x[v];
  }
}

// Pools one block of columns of a bag with at least one row.
template <class T, int N, int kVectors, bool kMaximum, bool kScaled>
void PoolBlock(const Bag<T>& bag, int64_t column, int64_t last, char* out) {
  using A = Accumulator<T>;
  using V = Vector<A, N>;
  const size_t first_byte = static_cast<size_t>(column) * sizeof(T);
  const size_t last_byte = static_cast<size_t>(last) * sizeof(T);
  const int64_t n = bag.count;
  // The first block fetches whole rows, for the other blocks too.
  const int64_t prefetch_end = column == 0 ? n : 0;

  V acc[kVectors];
  if (kMaximum) {
    LoadRow<T, N, kVectors, kScaled>(bag, 0, first_byte, last_byte, acc);
    AddRows<T, N, kVectors, kMaximum, kScaled>(bag, 1, n, first_byte, last_byte, prefetch_end, acc);
  } else {
    LUCID_UNROLL
    for (int v = 0; v < kVectors; ++v) acc[v] = V{};
    AddRows<T, N, kVectors, kMaximum, kScaled>(bag, 0, Smaller(n, kGroup), first_byte, last_byte,
                                               prefetch_end, acc);
    if (n > kGroup) {
      V sum[kVectors];
      LUCID_UNROLL
      for (int v = 0; v < kVectors; ++v) sum[v] = acc[v];
      for (int64_t j = kGroup; j < n; j += kGroup) {
        LUCID_UNROLL
        for (int v = 0; v < kVectors; ++v) acc[v] = V{};
        AddRows<T, N, kVectors, kMaximum, kScaled>(bag, j, Smaller(n, j + kGroup), first_byte,
                                                   last_byte, prefetch_end, acc);
        LUCID_UNROLL
        for (int v = 0; v < kVectors; ++v) sum[v] = sum[v] + acc[v];
      }
      LUCID_UNROLL
      for (int v = 0; v < kVectors; ++v) acc[v] = sum[v];
    }
  }

  if (bag.partial) {
    char* first = out + static_cast<size_t>(column) * sizeof(A);
    LUCID_UNROLL
    for (int v = 0; v < kVectors - 1; ++v) Store<A, N>(acc[v], first + v * N * sizeof(A));
    Store<A, N>(acc[kVectors - 1], out + static_cast<size_t>(last) * sizeof(A));
    return;
  }
  if (bag.divisor != 1) {
    LUCID_UNROLL
    for (int v = 0; v < kVectors; ++v) acc[v] = acc[v] / bag.divisor;
  }
  LUCID_UNROLL
  for (int v = 0; v < kVectors - 1; ++v) {
    Store<T, N>(CanonicalNans<A, N>(acc[v]), out + first_byte + v * N * sizeof(T));
  }
  Store<T, N>(CanonicalNans<A, N>(acc[kVectors - 1]), out + last_byte);
}

// The blocks that D columns are cut into: `full` ones of kMaxVectors registers, then one of as many
// as are left. A row narrower than a register takes narrower vectors, and below 16 bytes scalars.
template <class T>
struct Blocks {
  using Pool = void (*)(const Bag<T>& bag, int64_t column, int64_t last, char* out);
  Pool full, rest;
  int64_t full_columns;  // of one full block
  int64_t rest_begin;    // the first column of the rest; the full blocks end there
  int64_t full_last;     // from a full block's first column to its last vector
  int64_t rest_last;     // the column of the last vector of the rest
};

template <class T, int N, int kVectors, bool kMaximum, bool kScaled>
typename Blocks<T>::Pool ChooseBlock(int64_t vectors) {
  if constexpr (kVectors == 1) {
    static_cast<void>(vectors);
    return PoolBlock<T, N, 1, kMaximum, kScaled>;
  } else {
    return vectors == kVectors ? PoolBlock<T, N, kVectors, kMaximum, kScaled>
                               : ChooseBlock<T, N, kVectors - 1, kMaximum, kScaled>(vectors);
  }
}

template <class T, int N, bool kMaximum, bool kScaled>
Blocks<T> CutColumns(int64_t columns) {
  constexpr int kWidest = LUCID_VECTOR_BYTES / sizeof(Accumulator<T>);
  constexpr int kNarrowest = 16 / sizeof(Accumulator<T>);
  if constexpr (N > 1) {
    if (columns < N) {
      return CutColumns<T, (N > kNarrowest ? N / 2 : 1), kMaximum, kScaled>(columns);
    }
  }
  // Two narrow vectors reach across what one of the next width does not fit in.
  constexpr int kMost = N == kWidest ? LUCID_MAX_VECTORS : N > 1 ? 2 : kNarrowest - 1;
  Blocks<T> b = {};
  b.full_columns = kMost * N;
  b.full = ChooseBlock<T, N, kMost, kMaximum, kScaled>(kMost);
  b.full_last = b.full_columns - N;
  b.rest_begin = columns / b.full_columns * b.full_columns;
  if (b.rest_begin < columns) {
    b.rest = ChooseBlock<T, N, kMost, kMaximum, kScaled>((columns - b.rest_begin + N - 1) / N);
    b.rest_last = columns - N;
  }
  return b;
}

template <class T>
LUCID_INLINE void PoolColumns(const Blocks<T>& blocks, const Bag<T>& bag, char* out) {
  for (int64_t c = 0; c < blocks.rest_begin; c += blocks.full_columns) {
    blocks.full(bag, c, c + blocks.full_last, out);
  }
  if (blocks.rest) blocks.rest(bag, blocks.rest_begin, blocks.rest_last, out);
}

// |row|_p for p = 1, 2 and infinity. The lanes that the sum is spread over are 64 bytes wide
// whatever the registers are, and so are folded in one order.
template <class T, int kNorm>
Accumulator<T> RowNorm(const char* row, int64_t columns) {
  using A = Accumulator<T>;
  constexpr int N = LUCID_VECTOR_BYTES / sizeof(A);
  constexpr int kLanes = 64 / sizeof(A);
  using V = Vector<A, N>;
  V acc[kLanes / N];
  for (V& a : acc) a = V{};
  T tail[kLanes];
  for (int64_t i = 0; i < columns; i += kLanes) {
    const char* p = row + static_cast<size_t>(i) * sizeof(T);
    if (columns - i < kLanes) {
      memset(tail, 0, sizeof(tail));
      memcpy(tail, p, static_cast<size_t>(columns - i) * sizeof(T));
      p = reinterpret_cast<const char*>(tail);
    }
    for (int v = 0; v < kLanes / N; ++v) {
      const V x = Load<T, N>(p + v * N * sizeof(T));
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
Accumulator<T> Clip(const PoolJob& job, const char* row) {
  using A = Accumulator<T>;
  const A max_norm = static_cast<A>(job.max_norm);
  A norm;
  if (job.norm_type == 2) {
    norm = SquareRoot(RowNorm<T, 2>(row, job.columns));
  } else if (job.norm_type == 1) {
    norm = RowNorm<T, 1>(row, job.columns);
  } else if (job.norm_type > DBL_MAX) {
    norm = RowNorm<T, 0>(row, job.columns);
  } else {
    norm = static_cast<A>(job.general_norm(job, row));
  }
  return norm > max_norm ? max_norm / (norm + static_cast<A>(1e-7)) : static_cast<A>(1);
}

// Lists the rows of the positions [begin, end), at most kPiece. Returns kNoBadPosition, or the
// first position whose index is outside the table.
//
// Of a short bag, the rows that come kAhead positions later are fetched here: against fetching in
// PoolBlock, bags of 2 rows take 0.6 of the time and bags of 20 rows 0.9. A longer bag would fetch
// more than the nearer caches hold before it adds anything, and bags of 300 took 1.15 of the time:
// there PoolBlock fetches, from the list, and what follows the bag is fetched at its end.
template <class T, class I, bool kScaled>
LUCID_INLINE int64_t Gather(const PoolJob& job, const Ahead& ahead, int64_t begin, int64_t end,
                            Bag<T>* bag) {
  const bool is_short = end - begin <= kAhead;
  int64_t n = 0;
  for (int64_t k = begin; k < end; ++k) {
    const int64_t index = LoadUnaligned<I>(job.indices, k);
    if (static_cast<uint64_t>(index) >= static_cast<uint64_t>(job.rows)) return k;
    if (is_short) PrefetchAhead(ahead, k);
    if (index == job.padding) continue;
    const char* row = job.weight + index * job.row_bytes;
    bag->row[n] = row;
    if (kScaled) {
      Accumulator<T> scale = 1;
      if (job.max_norm <= DBL_MAX) scale = Clip<T>(job, row);
      if (job.per_sample_weights) {
        const char* weight = job.per_sample_weights + static_cast<size_t>(k) * sizeof(T);
        scale = scale * Load<T, 1>(weight);
      }
      bag->scale[n] = scale;
    }
    ++n;
  }
  bag->count = n;
  return kNoBadPosition;
}

template <class T>
struct Pooler {
  const PoolJob& job;
  bool scaled;
  Ahead ahead;
  Blocks<T> blocks = {};
  Bag<T> bag;

  explicit Pooler(const PoolJob& j) : job(j) {
    scaled = job.max_norm <= DBL_MAX || job.per_sample_weights;
    constexpr int N = LUCID_VECTOR_BYTES / sizeof(Accumulator<T>);
    if (job.columns > 0) {
      blocks = job.mode == lucid::kMax ? (scaled ? CutColumns<T, N, true, true>(job.columns)
                                                 : CutColumns<T, N, true, false>(job.columns))
                                       : (scaled ? CutColumns<T, N, false, true>(job.columns)
                                                 : CutColumns<T, N, false, false>(job.columns));
    }
    ahead.indices = job.indices;
    ahead.index_bytes = job.index_type == kInt64 ? 8 : 4;
    ahead.last_position = job.last_position;
    ahead.weight = reinterpret_cast<uintptr_t>(job.weight);
    ahead.row_bytes = static_cast<uintptr_t>(job.row_bytes);
    bag.row_bytes = ahead.row_bytes;
    bag.divisor = 1;
    bag.partial = false;
  }

  LUCID_INLINE int64_t GatherBag(int64_t begin, int64_t end) {
    return job.index_type == kInt64
               ? (scaled ? Gather<T, int64_t, true>(job, ahead, begin, end, &bag)
                         : Gather<T, int64_t, false>(job, ahead, begin, end, &bag))
               : (scaled ? Gather<T, int32_t, true>(job, ahead, begin, end, &bag)
                         : Gather<T, int32_t, false>(job, ahead, begin, end, &bag));
  }

  // To be called when the bag is done: fetches what follows it, if that was not done on the way.
  LUCID_INLINE void PrefetchNext(int64_t begin, int64_t end) {
    if (end - begin <= kAhead) return;
    for (int64_t k = end - kAhead; k < end; ++k) PrefetchAhead(ahead, k);
  }

  LUCID_INLINE int64_t BagBegin(int64_t i) const {
    if (!job.offsets) return i * job.bag_length;
    if (i >= job.num_offsets) return job.num_positions;
    return job.offset_type == kInt64 ? LoadUnaligned<int64_t>(job.offsets, i)
                                     : LoadUnaligned<int32_t>(job.offsets, i);
  }
};

template <class T>
int64_t PoolBags(const PoolJob& job, int64_t first, int64_t last) {
  Pooler<T> pooler(job);
  Bag<T>& bag = pooler.bag;
  char* out = job.output + first * job.row_bytes;
  int64_t end = pooler.BagBegin(first);
  for (int64_t i = first; i < last; ++i, out += job.row_bytes) {
    const int64_t begin = end;
    end = pooler.BagBegin(i + 1);
    if (end - begin > kPiece) continue;
    const int64_t bad = pooler.GatherBag(begin, end);
    if (bad != kNoBadPosition) return bad;
    if (bag.count == 0) {
      memset(out, 0, static_cast<size_t>(job.row_bytes));
    } else {
      if (job.mode == kMean) bag.divisor = static_cast<Accumulator<T>>(bag.count);
      PoolColumns(pooler.blocks, bag, out);
    }
    pooler.PrefetchNext(begin, end);
  }
  return kNoBadPosition;
}

template <class T>
int64_t PoolPiece(const PoolJob& job, int64_t begin, int64_t end, char* row, int64_t* count) {
  Pooler<T> pooler(job);
  pooler.bag.partial = true;
  const int64_t bad = pooler.GatherBag(begin, end);
  if (bad != kNoBadPosition) return bad;
  *count = pooler.bag.count;
  if (*count > 0) PoolColumns(pooler.blocks, pooler.bag, row);
  pooler.PrefetchNext(begin, end);
  return kNoBadPosition;
}

int64_t Bags(const PoolJob& job, int64_t first, int64_t last) {
  switch (job.dtype) {
    case kFloat32:
      return PoolBags<float>(job, first, last);
    case kFloat16:
      return PoolBags<Float16>(job, first, last);
    case kBFloat16:
      return PoolBags<BFloat16>(job, first, last);
    default:
      return PoolBags<double>(job, first, last);
  }
}

int64_t Piece(const PoolJob& job, int64_t begin, int64_t end, char* row, int64_t* count) {
  switch (job.dtype) {
    case kFloat32:
      return PoolPiece<float>(job, begin, end, row, count);
    case kFloat16:
      return PoolPiece<Float16>(job, begin, end, row, count);
    case kBFloat16:
      return PoolPiece<BFloat16>(job, begin, end, row, count);
    default:
      return PoolPiece<double>(job, begin, end, row, count);
  }
}

}  // namespace

namespace LUCID_ISA {
extern const PoolKernel kPoolRows;
const PoolKernel kPoolRows = {Bags, Piece};
}  // namespace LUCID_ISA

}  // namespace lucid
