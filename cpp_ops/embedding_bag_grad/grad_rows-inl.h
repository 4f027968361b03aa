// The loops of EmbeddingBag's gradient: one source, compiled once per instruction set by
// grad_rows_<isa>.cc, which sets LUCID_ISA and LUCID_VECTOR_BYTES first.
//
// No standard library here, and no inline function with external linkage: types.h says why.

#include <float.h>
#include <math.h>

#include "base/simd.h"
#include "embedding_bag/embedding_bag.h"
#include "embedding_bag_grad/grad_rows.h"

namespace lucid {
namespace {

constexpr int64_t kGroup = 64;  // rows that are added up before they join the sum so far

// What becomes of a row of grads on its way to a row of the table.
enum class Gives { kAll, kWeighted, kWhereMaximum };

template <class T>
constexpr int kWidest = LUCID_VECTOR_BYTES / sizeof(Accumulator<T>);

// Rows narrower than a register take narrower vectors, and below 16 bytes scalars.
template <class T, int N>
constexpr int kNarrower = N > static_cast<int>(16 / sizeof(Accumulator<T>)) ? N / 2 : 1;

template <class T>
using Winner = typename WinnerOf<Accumulator<T>>::type;

LUCID_INLINE int64_t Smaller(int64_t a, int64_t b) { return a < b ? a : b; }

LUCID_INLINE int64_t IndexOf(const PoolJob& job, int64_t k) {
  return job.index_type == kInt64 ? LoadUnaligned<int64_t>(job.indices, k)
                                  : LoadUnaligned<int32_t>(job.indices, k);
}

LUCID_INLINE int64_t BagBegin(const PoolJob& job, int64_t i) {
  if (!job.offsets) return i * job.bag_length;
  if (i >= job.num_offsets) return job.num_positions;
  return job.offset_type == kInt64 ? LoadUnaligned<int64_t>(job.offsets, i)
                                   : LoadUnaligned<int32_t>(job.offsets, i);
}

// x where the winner is position k, else 0.
template <class T, int N>
LUCID_INLINE Vector<Accumulator<T>, N> WhereWon(Vector<Accumulator<T>, N> x, const char* winners,
                                                int64_t k) {
  using W = Winner<T>;
  if constexpr (N == 1) {
    return LoadUnaligned<W>(winners, 0) == static_cast<W>(k) ? x : 0;
  } else {
#if defined(LUCID_VECTOR_EXTENSIONS)
    Vector<W, N> w;
    memcpy(&w, winners, sizeof(w));
    return w == Vector<W, N>{} + static_cast<W>(k) ? x : Vector<Accumulator<T>, N>{};
#else
    for (int i = 0; i < N; ++i) {
      if (LoadUnaligned<W>(winners, i) != static_cast<W>(k)) x.lane[i] = 0;
    }
    return x;
#endif
  }
}

// ---- Dense: sums of what the entries of a row give.

// Where a block's vectors are in a row: at column, column + N, ..., and the last one at `last`,
// where it may overlap the one before. Columns are independent, so what is computed twice is equal.
struct Span {
  int64_t column, last;
};

template <class T, int N, int kVectors, Gives kGives>
LUCID_INLINE void AddEntries(const GradJob& job, int64_t j, int64_t end, Span span,
                             Vector<Accumulator<T>, N>* acc) {
  using A = Accumulator<T>;
  using W = Winner<T>;
  LUCID_UNROLL
  for (int v = 0; v < kVectors; ++v) acc[v] = Vector<A, N>{};
  for (; j < end; ++j) {
    const int64_t k = job.entries[j].position;
    const int64_t before = job.bag_of[k] * job.forward.columns;
    const char* const grad = job.grads + static_cast<size_t>(before) * sizeof(A);
    A weight = 1;
    if (kGives == Gives::kWeighted) {
      weight = Load<T, 1>(job.forward.per_sample_weights + static_cast<size_t>(k) * sizeof(T));
    }
    LUCID_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      const size_t c = static_cast<size_t>(v < kVectors - 1 ? span.column + v * N : span.last);
      Vector<A, N> x = Load<A, N>(grad + c * sizeof(A));
      if constexpr (kGives == Gives::kWeighted) x = x * weight;
      if constexpr (kGives == Gives::kWhereMaximum) {
        x = WhereWon<T, N>(x, job.winners + (static_cast<size_t>(before) + c) * sizeof(W), k);
      }
      acc[v] = acc[v] + x;
    }
    static_cast<void>(weight);
  }
}

template <class T, int N, int kVectors, Gives kGives>
void SumBlock(const GradJob& job, int64_t begin, int64_t end, Span span, Accumulator<T> divisor,
              bool partial, char* out) {
  using A = Accumulator<T>;
  Vector<A, N> acc[kVectors];
  AddEntries<T, N, kVectors, kGives>(job, begin, Smaller(end, begin + kGroup), span, acc);
  for (int64_t j = begin + kGroup; j < end; j += kGroup) {
    Vector<A, N> group[kVectors];
    AddEntries<T, N, kVectors, kGives>(job, j, Smaller(end, j + kGroup), span, group);
    LUCID_UNROLL
    for (int v = 0; v < kVectors; ++v) acc[v] = acc[v] + group[v];
  }
  LUCID_UNROLL
  for (int v = 0; v < kVectors; ++v) {
    const size_t c = static_cast<size_t>(v < kVectors - 1 ? span.column + v * N : span.last);
    if (partial) {
      Store<A, N>(acc[v], out + c * sizeof(A));
    } else {
      if (divisor != 1) acc[v] = acc[v] / divisor;
      Store<T, N>(CanonicalNans<A, N>(acc[v]), out + c * sizeof(T));
    }
  }
}

// The entries [begin, end) of one row, into that row or, if partial, a row of accumulators.
template <class T, int N, Gives kGives>
LUCID_INLINE void SumRow(const GradJob& job, int64_t begin, int64_t end, Accumulator<T> divisor,
                         bool partial, char* out) {
  const int64_t columns = job.forward.columns;
  if constexpr (N > 1) {
    if (columns < N) {
      return SumRow<T, kNarrower<T, N>, kGives>(job, begin, end, divisor, partial, out);
    }
  }
  const int64_t vectors = (columns + N - 1) / N;
  for (int64_t v = 0; v < vectors;) {
    const int64_t left = vectors - v;
    const int64_t most = N == kWidest<T> ? 8 : N > 1 ? 2 : 1;
    const int64_t taken = left >= 8 && most >= 8   ? 8
                          : left >= 4 && most >= 4 ? 4
                          : left >= 2 && most >= 2 ? 2
                                                   : 1;
    const Span span = {v * N, taken == left ? columns - N : (v + taken - 1) * N};
    if (taken == 1) {
      SumBlock<T, N, 1, kGives>(job, begin, end, span, divisor, partial, out);
    }
    if constexpr (N > 1) {
      if (taken == 2) SumBlock<T, N, 2, kGives>(job, begin, end, span, divisor, partial, out);
    }
    if constexpr (N == kWidest<T>) {
      if (taken == 4) SumBlock<T, N, 4, kGives>(job, begin, end, span, divisor, partial, out);
      if (taken == 8) SumBlock<T, N, 8, kGives>(job, begin, end, span, divisor, partial, out);
    }
    v += taken;
  }
}

template <class T, Gives kGives>
void SumRows(const GradJob& job, int64_t begin, int64_t end) {
  const GradEntry* const entries = job.entries;
  int64_t j = begin;
  // A row that began earlier is another task's.
  while (j > 0 && j < end && entries[j].row == entries[j - 1].row) ++j;
  while (j < end) {
    const int64_t row = entries[j].row, first = j;
    const int64_t limit = Smaller(job.num_entries, first + kPiece + 1);
    for (++j; j < limit && entries[j].row == row;) ++j;
    if (j - first > kPiece) {
      while (j < end && entries[j].row == row) ++j;
      continue;
    }
    const Accumulator<T> divisor = static_cast<Accumulator<T>>(job.by_frequency ? j - first : 1);
    char* const out = job.output + static_cast<size_t>(row * job.forward.columns) * sizeof(T);
    SumRow<T, kWidest<T>, kGives>(job, first, j, divisor, false, out);
  }
}

LUCID_INLINE Gives GivesOf(const GradJob& job) {
  return job.winners                      ? Gives::kWhereMaximum
         : job.forward.per_sample_weights ? Gives::kWeighted
                                          : Gives::kAll;
}

// Runs a statement with kGives, a constant.
#define LUCID_FOR_GIVES(gives, statement)            \
  switch (gives) {                                   \
    case Gives::kAll: {                              \
      constexpr Gives kGives = Gives::kAll;          \
      statement;                                     \
      break;                                         \
    }                                                \
    case Gives::kWeighted: {                         \
      constexpr Gives kGives = Gives::kWeighted;     \
      statement;                                     \
      break;                                         \
    }                                                \
    case Gives::kWhereMaximum: {                     \
      constexpr Gives kGives = Gives::kWhereMaximum; \
      statement;                                     \
      break;                                         \
    }                                                \
  }

template <class T>
void SumsOf(const GradJob& job, int64_t begin, int64_t end) {
  LUCID_FOR_GIVES(GivesOf(job), (SumRows<T, kGives>(job, begin, end)));
}

template <class T>
void PieceOf(const GradJob& job, int64_t begin, int64_t end, char* row) {
  LUCID_FOR_GIVES(GivesOf(job), (SumRow<T, kWidest<T>, kGives>(job, begin, end, 1, true, row)));
}

// ---- Sparse: what each position gives.

template <class T, int N, Gives kGives>
LUCID_INLINE void GiveRow(const GradJob& job, int64_t k, char* out) {
  using A = Accumulator<T>;
  const int64_t columns = job.forward.columns;
  if constexpr (N > 1) {
    if (columns < N) return GiveRow<T, kNarrower<T, N>, kGives>(job, k, out);
  }
  const int64_t before = job.bag_of[k] * columns;
  const char* const grad = job.grads + static_cast<size_t>(before) * sizeof(A);
  A weight = 1;
  if (kGives == Gives::kWeighted) {
    weight = Load<T, 1>(job.forward.per_sample_weights + static_cast<size_t>(k) * sizeof(T));
  }
  const A divisor = static_cast<A>(job.frequencies ? job.frequencies[k] : 1);
  for (int64_t c = 0; c < columns; c += N) {
    const size_t at = static_cast<size_t>(Smaller(c, columns - N));
    Vector<A, N> x = Load<A, N>(grad + at * sizeof(A));
    if constexpr (kGives == Gives::kWeighted) x = x * weight;
    if constexpr (kGives == Gives::kWhereMaximum) {
      x = WhereWon<T, N>(x, job.winners + (static_cast<size_t>(before) + at) * sizeof(Winner<T>),
                         k);
    }
    if (divisor != 1) x = x / divisor;
    Store<T, N>(CanonicalNans<A, N>(x), out + at * sizeof(T));
  }
  static_cast<void>(weight);
}

template <class T, Gives kGives>
void GiveRows(const GradJob& job, int64_t begin, int64_t end, int64_t entry) {
  const size_t row_bytes = static_cast<size_t>(job.forward.columns) * sizeof(T);
  char* out = job.output + static_cast<size_t>(entry) * row_bytes;
  for (int64_t k = begin; k < end; ++k) {
    const int64_t index = IndexOf(job.forward, k);
    if (index == job.forward.padding) continue;
    job.rows[entry++] = index;
    GiveRow<T, kWidest<T>, kGives>(job, k, out);
    out += row_bytes;
  }
}

template <class T>
void ValuesOf(const GradJob& job, int64_t begin, int64_t end, int64_t entry) {
  LUCID_FOR_GIVES(GivesOf(job), (GiveRows<T, kGives>(job, begin, end, entry)));
}

// ---- The gradient of per_sample_weights.

// Spread over lanes that are 64 bytes wide whatever the registers are, and folded in one order.
template <class T>
Accumulator<T> Dot(const char* grad, const char* row, Accumulator<T> clip, int64_t columns) {
  using A = Accumulator<T>;
  constexpr int N = kWidest<T>;
  constexpr int kLanes = 64 / sizeof(A);
  using V = Vector<A, N>;
  V acc[kLanes / N];
  for (V& a : acc) a = V{};
  for (int64_t i = 0; i < columns; i += kLanes) {
    V x[kLanes / N], g[kLanes / N];
    if (columns - i < kLanes) {
      A x_tail[kLanes] = {}, g_tail[kLanes] = {};
      for (int64_t c = i; c < columns; ++c) {
        x_tail[c - i] = ElementAt<T>(row, c);
        g_tail[c - i] = LoadUnaligned<A>(grad, c);
      }
      memcpy(x, x_tail, sizeof(x_tail));
      memcpy(g, g_tail, sizeof(g_tail));
    } else {
      for (int v = 0; v < kLanes / N; ++v) {
        x[v] = Load<T, N>(row + static_cast<size_t>(i + v * N) * sizeof(T));
        g[v] = Load<A, N>(grad + static_cast<size_t>(i + v * N) * sizeof(A));
      }
    }
    for (int v = 0; v < kLanes / N; ++v) acc[v] = acc[v] + g[v] * (x[v] * clip);
  }
  A lane[kLanes];
  memcpy(lane, acc, sizeof(lane));
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) lane[i] = lane[i] + lane[i + width];
  }
  return lane[0];
}

constexpr int64_t kRowsAhead = 8;  // that are fetched while a row is worked on

// Fetches the row that position k + kRowsAhead looks up, if that is before end.
LUCID_INLINE void FetchAhead(const PoolJob& job, int64_t k, int64_t end) {
  if (k + kRowsAhead >= end) return;
  const char* const next = job.weight + IndexOf(job, k + kRowsAhead) * job.row_bytes;
  for (int64_t i = 0; i < Smaller(job.row_bytes, 512); i += 64) LUCID_PREFETCH_L1(next + i);
}

template <class T>
void DotsOf(const GradJob& job, int64_t begin, int64_t end) {
  using A = Accumulator<T>;
  const PoolJob& forward = job.forward;
  const bool clips = forward.max_norm <= DBL_MAX;
  for (int64_t k = begin; k < end; ++k) {
    FetchAhead(forward, k, end);
    const int64_t index = IndexOf(forward, k);
    A value = 0;
    if (index != forward.padding) {
      const char* const row = forward.weight + index * forward.row_bytes;
      const A clip = clips ? static_cast<A>(job.pool->clip(forward, row)) : 1;
      const size_t before = static_cast<size_t>(job.bag_of[k] * forward.columns);
      value = CanonicalNan(Dot<T>(job.grads + before * sizeof(A), row, clip, forward.columns));
    }
    if (job.dots) {
      Store<A, 1>(value, job.dots + static_cast<size_t>(k) * sizeof(A));
    } else {
      Store<T, 1>(value, job.grad_weights + static_cast<size_t>(k) * sizeof(T));
    }
  }
}

// ---- What the others start from.

template <class T, int N>
LUCID_INLINE void ScaleColumns(const char* from, Accumulator<T> divisor, int64_t c, char* to) {
  using A = Accumulator<T>;
  Vector<A, N> x = Load<T, N>(from + static_cast<size_t>(c) * sizeof(T));
  if (divisor != 1) x = x / divisor;
  Store<A, N>(x, to + static_cast<size_t>(c) * sizeof(A));
}

template <class T>
void ScaleOf(const GradJob& job, int64_t first, int64_t last) {
  using A = Accumulator<T>;
  constexpr int N = kWidest<T>;
  const PoolJob& forward = job.forward;
  const int64_t columns = forward.columns;
  for (int64_t i = first; i < last; ++i) {
    double total = 1;
    if (Divides(forward.mode)) {
      const int64_t begin = BagBegin(forward, i), end = BagBegin(forward, i + 1);
      int64_t count = end - begin;
      const bool skips = forward.padding >= 0 || forward.skips_negative;
      for (int64_t k = begin; skips && k < end; ++k) {
        count -= IndexOf(forward, k) == forward.padding;
      }
      if (count > 0) {  // nobody reads the others
        total = forward.by_weights ? forward.weight_sum(forward, begin, end)
                                   : static_cast<double>(count);
      }
    }
    const A divisor = static_cast<A>(forward.mode == kSqrtn ? sqrt(total) : total);
    const char* const from = job.grad_output + static_cast<size_t>(i * columns) * sizeof(T);
    char* const to = job.scaled + static_cast<size_t>(i * columns) * sizeof(A);
    int64_t c = 0;
    for (; c + N <= columns; c += N) ScaleColumns<T, N>(from, divisor, c, to);
    for (; c < columns; ++c) ScaleColumns<T, 1>(from, divisor, c, to);
  }
}

// The row of position k takes the columns where it is more than the best one so far, or NaN where
// that one is not.
template <class T, int N>
LUCID_INLINE void Challenge(const char* row, Accumulator<T> clip, bool first, int64_t k, int64_t c,
                            char* best_row, char* winner_row) {
  using A = Accumulator<T>;
  using W = Winner<T>;
  char* const best_at = best_row + static_cast<size_t>(c) * sizeof(A);
  char* const winner_at = winner_row + static_cast<size_t>(c) * sizeof(W);
  Vector<A, N> x = Load<T, N>(row + static_cast<size_t>(c) * sizeof(T)) * clip;
  Vector<W, N> winner = Vector<W, N>{} + static_cast<W>(k);
  if (!first) {
    const Vector<A, N> best = Load<A, N>(best_at);
    Vector<W, N> before;
    memcpy(&before, winner_at, sizeof(before));
    if constexpr (N == 1) {
      const bool wins = best == best && !(x <= best);
      x = wins ? x : best;
      winner = wins ? winner : before;
    } else {
      const auto wins = (best == best) & ((x > best) | (x != x));
      x = wins ? x : best;
      winner = wins ? winner : before;
    }
  }
  Store<A, N>(x, best_at);
  memcpy(winner_at, &winner, sizeof(winner));
}

template <class T>
void WinnersOf(const GradJob& job, int64_t first, int64_t last, char* best) {
  using A = Accumulator<T>;
#if defined(LUCID_VECTOR_EXTENSIONS)
  constexpr int N = kWidest<T>;
#else
  constexpr int N = 1;
#endif
  const PoolJob& forward = job.forward;
  const int64_t columns = forward.columns;
  const bool clips = forward.max_norm <= DBL_MAX;
  for (int64_t i = first; i < last; ++i) {
    char* const winners = job.winners + static_cast<size_t>(i * columns) * sizeof(Winner<T>);
    const int64_t end = BagBegin(forward, i + 1);
    bool is_first = true;
    for (int64_t k = BagBegin(forward, i); k < end; ++k) {
      FetchAhead(forward, k, forward.last_position + 1);
      const int64_t index = IndexOf(forward, k);
      if (index == forward.padding) continue;
      const char* const row = forward.weight + index * forward.row_bytes;
      const A clip = clips ? static_cast<A>(job.pool->clip(forward, row)) : 1;
      int64_t c = 0;
      for (; c + N <= columns; c += N) Challenge<T, N>(row, clip, is_first, k, c, best, winners);
      for (; c < columns; ++c) Challenge<T, 1>(row, clip, is_first, k, c, best, winners);
      is_first = false;
    }
  }
}

// ---- The kernel.

void Scale(const GradJob& job, int64_t first, int64_t last) {
  LUCID_FOR_FLOAT_TYPE(job.forward.dtype, return ScaleOf<T>(job, first, last));
}
void Winners(const GradJob& job, int64_t first, int64_t last, char* best) {
  LUCID_FOR_FLOAT_TYPE(job.forward.dtype, return WinnersOf<T>(job, first, last, best));
}
void Sums(const GradJob& job, int64_t begin, int64_t end) {
  LUCID_FOR_FLOAT_TYPE(job.forward.dtype, return SumsOf<T>(job, begin, end));
}
void Piece(const GradJob& job, int64_t begin, int64_t end, char* row) {
  LUCID_FOR_FLOAT_TYPE(job.forward.dtype, return PieceOf<T>(job, begin, end, row));
}
void Values(const GradJob& job, int64_t begin, int64_t end, int64_t entry) {
  LUCID_FOR_FLOAT_TYPE(job.forward.dtype, return ValuesOf<T>(job, begin, end, entry));
}
void Dots(const GradJob& job, int64_t begin, int64_t end) {
  LUCID_FOR_FLOAT_TYPE(job.forward.dtype, return DotsOf<T>(job, begin, end));
}

}  // namespace

namespace LUCID_ISA {
extern const GradKernel kGradRows;
const GradKernel kGradRows = {Scale, Winners, Sums, Piece, Values, Dots};
}  // namespace LUCID_ISA

}  // namespace lucid
