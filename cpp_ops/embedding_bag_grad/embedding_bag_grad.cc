// Validation, the sorting of the positions by row, and the split into tasks. The loops are in
// grad_rows-inl.h.
//
// What a row of the table gets is a bag sum: of the rows of grad_output, over the positions that
// look the row up. So the positions are sorted by row, the sums are cut into tasks without regard
// to rows, and no two tasks write the same row: nothing races, and the order of additions is that
// of the positions. All memory but the outputs is proportional to positions and grad_output.
//
// The indices and the offsets are read once, into memory of the run, and checked on the way: the
// host may write to its tensors meanwhile, and what is counted must be what is sorted.
#include "embedding_bag_grad/embedding_bag_grad.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <memory>
#include <new>

#include "base/clear.h"
#include "base/types.h"
#include "embedding_bag/pool_rows.h"
#include "embedding_bag/tasks.h"
#include "embedding_bag_grad/grad_rows.h"

namespace lucid {

#define LUCID_POOL_ROWS(isa)         \
  namespace isa {                    \
  extern const GradKernel kGradRows; \
  }
#include "embedding_bag/kernels.inc"
#undef LUCID_POOL_ROWS

namespace {

constexpr const GradKernel* kKernels[] = {
#define LUCID_POOL_ROWS(isa) &isa::kGradRows,
#include "embedding_bag/kernels.inc"
#undef LUCID_POOL_ROWS
};
static_assert(sizeof(kKernels) / sizeof(kKernels[0]) == kIsaCount, "a kernel per instruction set");

std::atomic<int64_t> g_runs[kIsaCount];

constexpr int64_t kClearBytes = 1 << 20;        // of a task that clears, or more
constexpr int64_t kMostCachedBytes = 32 << 20;  // to be cleared by way of the caches

// Positions are looked at and sorted in chunks of at least so many, and never in more chunks.
constexpr int64_t kChunk = 4096;
constexpr int64_t kMostChunks = 32;
constexpr int kMostDigitBits = 11;  // of a row number: what a pass of the sort looks at

// Room for count elements that nobody has written to; null if there is none.
template <class E>
std::unique_ptr<E[]> Room(int64_t count, int64_t size = 1) {
  if (size > 0 && count > PTRDIFF_MAX / static_cast<int64_t>(sizeof(E)) / size) return nullptr;
  return std::unique_ptr<E[]>(new (std::nothrow) E[static_cast<size_t>(count * size)]);
}

Status NoMemory(const char* what, int64_t count) {
  return Error(Code::kOutOfMemory, "no memory for %s of %lld positions", what, Wide(count));
}

struct GradRun {
  GradJob job = {};
  const GradKernel* kernel = nullptr;
  const ParallelFor* parallel_for = nullptr;
  bool sparse = false;
  bool in_line = true;  // all on the caller's thread
  int64_t num_bags = 0;
  int64_t positions = 0;  // that belong to a bag
  int64_t chunks = 1;
  int64_t tasks = 1;
  // What the kernels read in the place of the tensors.
  std::unique_ptr<char[]> indices;
  std::unique_ptr<int64_t[]> offsets;
  std::unique_ptr<int64_t[]> bag_of, chunk_entries, counts, frequencies;
  std::unique_ptr<GradEntry[]> entries, other_entries;
  std::unique_ptr<char[]> scaled, winners, dots;

  size_t AccumulatorSize() const { return job.forward.dtype == kFloat64 ? 8 : 4; }

  int64_t BagBegin(int64_t i) const {
    const PoolJob& f = job.forward;
    if (!f.offsets) return i * f.bag_length;
    return i < f.num_offsets ? IndexAt(f.offsets, f.offset_type, i) : f.num_positions;
  }

  // The bag of a position that belongs to one.
  int64_t BagOf(int64_t position) const {
    if (!job.forward.offsets) return position / job.forward.bag_length;
    int64_t low = 0, high = num_bags;  // the last bag that begins at or before it
    while (high - low > 1) {
      const int64_t middle = low + (high - low) / 2;
      (BagBegin(middle) <= position ? low : high) = middle;
    }
    return low;
  }

  // The first of part `i` of `parts` equal ones of n.
  static int64_t Cut(int64_t n, int64_t i, int64_t parts) {
    return n / parts * i + n % parts * i / parts;
  }
  int64_t ChunkBegin(int64_t chunk) const { return Cut(positions, chunk, chunks); }

  // Cuts so that tasks share positions and bags evenly.
  int64_t FirstBag(int64_t task) const {
    const int64_t before = Cut(positions + num_bags, task, tasks);
    int64_t low = 0, high = num_bags;
    if (task >= tasks) return high;
    while (low < high) {
      const int64_t middle = low + (high - low) / 2;
      if (BagBegin(middle) + middle < before) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return low;
  }

  // task(i) once for every i in [0, count), on any threads.
  template <class F>
  Status ForEach(int64_t count, const F& task) const;

  // What a dense gradient takes.
  int64_t DenseBytes() const {
    const PoolJob& f = job.forward;
    return sparse ? 0 : f.rows * RowBytes(f.dtype, f.columns);
  }

  void SetJob(const EmbeddingBagGradArgs& args, const GradSizes& sizes, Isa isa);
  void SetTasks();
  Status CopyOffsets();
  Status CheckIndices(const EmbeddingBagGradArgs& args);
  Status Compute();
  Status ClearOutputs() const;
  Status Values();
  Status Dots();
  template <class T>
  void CorrectDots(int64_t first, int64_t last) const;
  Status Sort();
  Status SortPass(const GradEntry* from, GradEntry* to, int shift, int bits);
  Status Clear(void* data, int64_t bytes) const;
  Status Prepare();
  Status Sums();
  Status LongSums();
  template <class T>
  void CombinePieces(const char* pieces, int64_t count, int64_t entries, double* sum, int64_t row);
  Status Frequencies();
};

template <class F>
Status GradRun::ForEach(int64_t count, const F& task) const {
  struct Call {
    const F& task;
    std::atomic<int> failed{0};
  };
  Call call = {task};
  // An exception that left a task on a host's thread would hang or end the process.
  const auto entry = [](void* argument, size_t i) {
    Call* const c = static_cast<Call*>(argument);
    try {
      c->task(static_cast<int64_t>(i));
    } catch (...) {
      c->failed.store(1);
    }
  };
  if (in_line) {
    for (int64_t i = 0; i < count; ++i) entry(&call, static_cast<size_t>(i));
  } else if (!parallel_for->run(parallel_for->host, entry, static_cast<size_t>(count), &call)) {
    return Error(Code::kInternal, "the host could not run the tasks");
  }
  return call.failed.load() ? Error(Code::kInternal, "a task failed") : Status();
}

// Copies the offsets, which were checked. If they have changed since, these are others that rise
// from 0 to `positions`.
Status GradRun::CopyOffsets() {
  PoolJob& f = job.forward;
  if (!f.offsets) return Status();
  offsets = Room<int64_t>(num_bags + 1);
  if (!offsets) return NoMemory("the bags", positions);
  const char* const from = f.offsets;
  const int32_t type = f.offset_type;
  const int64_t bags = num_bags, end = positions;
  int64_t* const to = offsets.get();
  int64_t offset = 0;
  for (int64_t i = 0; i < bags; ++i) {
    to[i] = offset;
    if (i + 1 < bags) offset = std::max(offset, std::min(IndexAt(from, type, i + 1), end));
  }
  to[bags] = end;
  f.offsets = reinterpret_cast<const char*>(to);
  f.offset_type = kInt64;
  f.num_offsets = num_bags + 1;
  return Status();
}

// Copies the indices of the positions [begin, end), and counts those that are not skipped. Returns
// end, or the first position whose index is bad. Where negative ones are skipped, the copy has the
// padded row, which may be -1, in their place: what reads it need not tell them apart.
template <class From, class To>
int64_t CopyIndices(const PoolJob& f, int64_t begin, int64_t end, To* to, int64_t* count) {
  const char* const indices = f.indices;
  const uint64_t rows = static_cast<uint64_t>(f.rows);
  const int64_t padding = f.padding;
  int64_t found = 0, k = begin;
  for (; k < end; ++k) {
    int64_t index = LoadUnaligned<From>(indices, k);
    if (static_cast<uint64_t>(index) >= rows) {
      if (index >= 0 || !f.skips_negative) break;
      to[k] = static_cast<To>(padding);
      continue;
    }
    to[k] = static_cast<To>(index);
    found += index != padding;
  }
  *count = found;
  return k;
}

// Copies the indices, as the narrowest type that holds them, and fills in job.bag_of and
// job.num_entries. The first index outside the table is an error; the others are counted in every
// chunk, without the skipped ones: chunk_entries[c] is how many come before chunk c.
//
// Of a sparse gradient without skipped positions the copy is the output `rows`, unless more than
// its values comes from the indices: that is not the run's own memory. Another copy took 1.1 times
// as long.
Status GradRun::CheckIndices(const EmbeddingBagGradArgs& args) {
  const EmbeddingBagArgs& a = args.forward;
  const bool in_rows = sparse && !job.by_frequency && !job.grad_weights && a.mode != kMax &&
                       !job.forward.skips_negative && job.forward.padding < 0 &&
                       args.num_entries == positions;
  const bool wide = in_rows || job.forward.rows > INT32_MAX;
  chunk_entries = Room<int64_t>(chunks + 1);
  bag_of = Room<int64_t>(positions);
  if (!in_rows) indices = Room<char>(positions, wide ? sizeof(int64_t) : sizeof(int32_t));
  if (!chunk_entries || !bag_of || (!in_rows && !indices)) return NoMemory("the bags", positions);
  char* const copied = in_rows ? reinterpret_cast<char*>(job.rows) : indices.get();
  job.bag_of = bag_of.get();
  std::atomic<int64_t> bad{kNoBadPosition};
  const Status status = ForEach(chunks, [&](int64_t chunk) {
    const PoolJob& f = job.forward;
    const int64_t begin = ChunkBegin(chunk), end = ChunkBegin(chunk + 1);
    int64_t bag = begin < end ? BagOf(begin) : 0;
    for (int64_t k = begin; k < end; ++bag) {
      const int64_t stop = std::min(end, BagBegin(bag + 1));
      for (; k < stop; ++k) bag_of[static_cast<size_t>(k)] = bag;
    }
    int64_t* const count = &chunk_entries[static_cast<size_t>(chunk)];
    const auto copy = [&](auto from, auto to) {
      using To = decltype(to);
      return CopyIndices<decltype(from)>(f, begin, end, reinterpret_cast<To*>(copied), count);
    };
    const bool from_wide = f.index_type == kInt64;
    const int64_t k = from_wide ? wide ? copy(int64_t{}, int64_t{}) : copy(int64_t{}, int32_t{})
                      : wide    ? copy(int32_t{}, int64_t{})
                                : copy(int32_t{}, int32_t{});
    int64_t lowest = bad.load();
    while (k < end && k < lowest && !bad.compare_exchange_weak(lowest, k)) {
    }
  });
  if (!status.ok()) return status;
  if (bad.load() != kNoBadPosition) {
    return InvalidIndex(a, bad.load(), IndexAt(a.indices, a.index_type, bad.load()));
  }
  job.forward.indices = copied;
  job.forward.index_type = wide ? kInt64 : kInt32;
  int64_t sum = 0;
  for (int64_t chunk = 0; chunk <= chunks; ++chunk) {
    const int64_t count = chunk < chunks ? chunk_entries[static_cast<size_t>(chunk)] : 0;
    chunk_entries[static_cast<size_t>(chunk)] = sum;
    sum += count;
  }
  job.num_entries = sum;
  return status;
}

// One pass of a stable sort by `bits` bits of the row numbers, from bit `shift` on. Every chunk
// counts its digits, and then knows where each of them goes: behind those that are less, and those
// that are equal in the chunks before. Without `from`, the entries come from the indices.
Status GradRun::SortPass(const GradEntry* from, GradEntry* to, int shift, int bits) {
  const int64_t digits = int64_t{1} << bits, mask = digits - 1;
  const PoolJob& f = job.forward;
  const auto begin_of = [&](int64_t chunk) {
    return from ? Cut(job.num_entries, chunk, chunks) : ChunkBegin(chunk);
  };
  // Calls visit(entry) for the entries of a chunk.
  const auto for_entries = [&](int64_t chunk, const auto& visit) {
    const int64_t end = begin_of(chunk + 1);
    for (int64_t k = begin_of(chunk); k < end; ++k) {
      if (from) {
        visit(from[k]);
      } else {
        const int64_t row = IndexAt(f.indices, f.index_type, k);
        if (row != f.padding) visit(GradEntry{row, k});
      }
    }
  };
  Status status = ForEach(chunks, [&](int64_t chunk) {
    int64_t* const count = counts.get() + chunk * digits;
    std::fill(count, count + digits, 0);
    for_entries(chunk, [&](const GradEntry& entry) { ++count[entry.row >> shift & mask]; });
  });
  if (!status.ok()) return status;
  int64_t before = 0;
  for (int64_t digit = 0; digit < digits; ++digit) {
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      int64_t& count = counts[static_cast<size_t>(chunk * digits + digit)];
      const int64_t equal = count;
      count = before;
      before += equal;
    }
  }
  return ForEach(chunks, [&](int64_t chunk) {
    int64_t* const next = counts.get() + chunk * digits;
    for_entries(chunk,
                [&](const GradEntry& entry) { to[next[entry.row >> shift & mask]++] = entry; });
  });
}

// job.entries: the positions by row, and those of a row in their order.
Status GradRun::Sort() {
  int bits = 1;  // of the largest row number
  while (bits < 63 && (job.forward.rows - 1) >> bits > 0) ++bits;
  int most = 4;  // a digit's; fewer for few positions, whose counts are soon more than they are
  while (most < kMostDigitBits && positions / chunks >> most > 0) ++most;
  const int passes = (bits + most - 1) / most;
  const int digit = (bits + passes - 1) / passes;
  entries = Room<GradEntry>(job.num_entries);
  other_entries = Room<GradEntry>(job.num_entries);
  counts = Room<int64_t>(chunks << digit);
  if (!entries || !other_entries || !counts) return NoMemory("the order", positions);
  const GradEntry* from = nullptr;
  for (int pass = 0; pass < passes; ++pass) {
    GradEntry* const to = (pass % 2 ? other_entries : entries).get();
    const Status status = SortPass(from, to, pass * digit, digit);
    if (!status.ok()) return status;
    from = to;
  }
  job.entries = from;
  return Status();
}

Status GradRun::Clear(void* data, int64_t bytes) const {
  if (bytes == 0) return Status();
  const int64_t count = std::min(bytes / kClearBytes + 1, kMostTasks);
  return ForEach(count, [&](int64_t task) {
    const int64_t begin = Cut(bytes, task, count), size = Cut(bytes, task + 1, count) - begin;
    char* const part = static_cast<char*>(data) + begin;
    if (bytes > kMostCachedBytes) {
      ClearPastCaches(part, static_cast<size_t>(size));
    } else {
      std::memset(part, 0, static_cast<size_t>(size));
    }
  });
}

// job.grads and job.winners.
Status GradRun::Prepare() {
  const PoolJob& f = job.forward;
  job.grads = job.grad_output;
  const bool as_it_is = !Divides(f.mode) && (f.dtype == kFloat32 || f.dtype == kFloat64);
  if (!as_it_is) {
    scaled = Room<char>(num_bags * f.columns, static_cast<int64_t>(AccumulatorSize()));
    if (!scaled) return NoMemory("the gradients", positions);
    job.grads = job.scaled = scaled.get();
    const Status status = ForEach(
        tasks, [&](int64_t task) { kernel->scale(job, FirstBag(task), FirstBag(task + 1)); });
    if (!status.ok()) return status;
  }
  if (f.mode != kMax) return Status();
  // The winners have the accumulators' size.
  if (f.dtype != kFloat64 && positions > INT32_MAX) {
    return InvalidArgument(
        "%lld indices are too many for the gradient of mode 'max' with this dtype",
        Wide(positions));
  }
  winners = Room<char>(num_bags * f.columns, static_cast<int64_t>(AccumulatorSize()));
  const std::unique_ptr<char[]> best =
      Room<char>(tasks * f.columns, static_cast<int64_t>(AccumulatorSize()));
  if (!winners || !best) return NoMemory("the maxima", positions);
  job.winners = winners.get();
  return ForEach(tasks, [&](int64_t task) {
    kernel->winners(job, FirstBag(task), FirstBag(task + 1),
                    best.get() + static_cast<size_t>(task * f.columns) * AccumulatorSize());
  });
}

Status GradRun::Sums() {
  const Status status = ForEach(tasks, [&](int64_t task) {
    kernel->sums(job, Cut(job.num_entries, task, tasks), Cut(job.num_entries, task + 1, tasks));
  });
  return status.ok() ? LongSums() : status;
}

template <class T>
void GradRun::CombinePieces(const char* pieces, int64_t count, int64_t num_entries, double* sum,
                            int64_t row) {
  using A = Accumulator<T>;
  const int64_t columns = job.forward.columns;
  char* const out = job.output + static_cast<size_t>(row * columns) * sizeof(T);
  for (int64_t c = 0; c < columns; ++c) sum[c] = LoadUnaligned<A>(pieces, c);
  for (int64_t p = 1; p < count; ++p) {
    for (int64_t c = 0; c < columns; ++c) sum[c] += LoadUnaligned<A>(pieces, p * columns + c);
  }
  for (int64_t c = 0; c < columns; ++c) {
    A value = static_cast<A>(sum[c]);
    if (job.by_frequency) value /= static_cast<A>(num_entries);
    T rounded;
    FromAccumulator(CanonicalNan(value), &rounded);
    std::memcpy(out + static_cast<size_t>(c) * sizeof(T), &rounded, sizeof(T));
  }
}

// The rows with more than kPiece entries: their pieces are summed on all threads, and then joined.
Status GradRun::LongSums() {
  struct Long {
    int64_t begin, end, first_piece;
  };
  // Such a row has an entry at a multiple of kPiece, and the one kPiece before or behind it.
  const int64_t places = job.num_entries / kPiece + 1;
  std::unique_ptr<Long[]> rows;
  int64_t count = 0, pieces = 0;
  const auto less = [](const GradEntry& a, const GradEntry& b) { return a.row < b.row; };
  for (int64_t place = 0, done = 0; place < job.num_entries; place += kPiece) {
    if (place < done) continue;
    const GradEntry* const end_of_all = job.entries + job.num_entries;
    const GradEntry* const at = job.entries + place;
    const auto range = std::equal_range(job.entries + done, end_of_all, *at, less);
    done = range.second - job.entries;
    if (range.second - range.first <= kPiece) continue;
    if (!rows) rows.reset(new (std::nothrow) Long[static_cast<size_t>(places)]);
    if (!rows) return NoMemory("the rows", positions);
    rows[static_cast<size_t>(count++)] = {range.first - job.entries, done, pieces};
    pieces += (range.second - range.first + kPiece - 1) / kPiece;
  }
  const int64_t columns = job.forward.columns;
  if (count == 0 || columns == 0) return Status();
  const int64_t row_bytes = columns * static_cast<int64_t>(AccumulatorSize());
  const std::unique_ptr<char[]> partial = Room<char>(pieces, row_bytes);
  const std::unique_ptr<double[]> sum = Room<double>(columns);
  if (!partial || !sum) return NoMemory("the partial sums", positions);
  const Status status = ForEach(pieces, [&](int64_t piece) {
    const Long* const after =
        std::upper_bound(rows.get(), rows.get() + count, piece,
                         [](int64_t value, const Long& row) { return value < row.first_piece; });
    const Long& row = after[-1];
    const int64_t begin = row.begin + (piece - row.first_piece) * kPiece;
    kernel->piece(job, begin, std::min(begin + kPiece, row.end),
                  partial.get() + static_cast<size_t>(piece * row_bytes));
  });
  if (!status.ok()) return status;
  for (int64_t i = 0; i < count; ++i) {
    const Long& row = rows[static_cast<size_t>(i)];
    LUCID_FOR_FLOAT_TYPE(
        job.forward.dtype,
        CombinePieces<T>(partial.get() + static_cast<size_t>(row.first_piece * row_bytes),
                         (row.end - row.begin + kPiece - 1) / kPiece, row.end - row.begin,
                         sum.get(), job.entries[row.begin].row));
  }
  return status;
}

// job.frequencies: at every position that gives something, how many give something to its row.
Status GradRun::Frequencies() {
  frequencies = Room<int64_t>(positions);
  if (!frequencies) return NoMemory("the frequencies", positions);
  job.frequencies = frequencies.get();
  return ForEach(tasks, [&](int64_t task) {
    const GradEntry* const all_end = job.entries + job.num_entries;
    const int64_t end = Cut(job.num_entries, task + 1, tasks);
    const auto less = [](const GradEntry& a, const GradEntry& b) { return a.row < b.row; };
    for (int64_t j = Cut(job.num_entries, task, tasks); j < end;) {
      const auto range = std::equal_range(job.entries, all_end, job.entries[j], less);
      const int64_t stop = std::min<int64_t>(end, range.second - job.entries);
      for (; j < stop; ++j) {
        frequencies[static_cast<size_t>(job.entries[j].position)] = range.second - range.first;
      }
    }
  });
}

void GradRun::SetJob(const EmbeddingBagGradArgs& args, const GradSizes& sizes, Isa isa) {
  const EmbeddingBagArgs& a = args.forward;
  const bool flat = a.indices_rank == 1;
  PoolJob& f = job.forward;
  f.weight = static_cast<const char*>(a.weight);
  f.indices = static_cast<const char*>(a.indices);
  f.offsets = flat ? static_cast<const char*>(a.offsets) : nullptr;
  f.per_sample_weights = static_cast<const char*>(a.per_sample_weights);
  f.rows = a.weight_shape[0];
  f.columns = a.weight_shape[1];
  f.row_bytes = a.row_stride != 0 ? a.row_stride : RowBytes(a.dtype, f.columns);
  f.num_offsets = a.num_offsets;
  f.bag_length = flat ? 0 : a.indices_shape[1];
  f.num_positions = flat ? a.indices_shape[0] : a.indices_shape[0] * a.indices_shape[1];
  f.last_position = sizes.positions - 1;
  f.padding = PaddedRow(a);
  f.skips_negative = a.negative == kSkip;
  f.by_weights = DividesByWeights(a);
  f.max_norm = a.max_norm;
  f.norm_type = a.norm_type;
  f.dtype = a.dtype;
  f.index_type = a.index_type;
  f.offset_type = a.offset_type;
  f.mode = a.mode;
  f.output_type = a.output_type;
  job.pool = &PoolKernelOf(isa);
  SetFunctions(*job.pool, &f);
  job.grad_output = static_cast<const char*>(args.grad_output);
  job.output = static_cast<char*>(args.sparse ? args.values : args.grad_weight);
  job.rows = args.rows;
  job.grad_weights = static_cast<char*>(args.grad_per_sample_weights);
  kernel = kKernels[static_cast<int>(isa)];
  num_bags = sizes.num_bags;
  positions = sizes.positions;
  sparse = args.sparse != 0;
  job.by_frequency = args.scale_grad_by_freq != 0;
}

// Decides whether other threads are worth it, and cuts the work for them.
void GradRun::SetTasks() {
  const PoolJob& f = job.forward;
  const double bytes =
      static_cast<double>(positions) * static_cast<double>(RowBytes(f.dtype, f.columns) + 16) +
      static_cast<double>(DenseBytes());
  in_line = bytes <= kInlineBytes;
  if (in_line) return;
  chunks = std::min(positions / kChunk + 1, kMostChunks);
  tasks = std::min(static_cast<int64_t>(std::min(bytes / kTaskBytes, 1e6)) + 1,
                   std::min(kMostTasks, positions + 1));
}

// Clears what no entry writes: all of grad_weight, and grad_per_sample_weights at the positions
// that belong to no bag, or everywhere if there are no entries.
Status GradRun::ClearOutputs() const {
  if (!sparse) {
    const Status status = Clear(job.output, DenseBytes());
    if (!status.ok()) return status;
  }
  if (!job.grad_weights) return Status();
  const int64_t size = RowBytes(job.forward.dtype, 1);
  const int64_t first = job.num_entries == 0 ? 0 : positions;
  return Clear(job.grad_weights + first * size, (job.forward.num_positions - first) * size);
}

// The outputs of a sparse gradient.
Status GradRun::Values() {
  if (job.by_frequency) {
    const Status status = Frequencies();
    if (!status.ok()) return status;
  }
  return ForEach(chunks, [&](int64_t chunk) {
    kernel->values(job, ChunkBegin(chunk), ChunkBegin(chunk + 1),
                   chunk_entries[static_cast<size_t>(chunk)]);
  });
}

// The gradient of per_sample_weights.
Status GradRun::Dots() {
  if (job.forward.by_weights) {
    dots = Room<char>(positions, static_cast<int64_t>(AccumulatorSize()));
    if (!dots) return NoMemory("the dot products", positions);
    job.dots = dots.get();
  }
  const Status status = ForEach(
      chunks, [&](int64_t chunk) { kernel->dots(job, ChunkBegin(chunk), ChunkBegin(chunk + 1)); });
  if (!status.ok() || !job.dots) return status;
  return ForEach(tasks, [&](int64_t task) {
    LUCID_FOR_FLOAT_TYPE(job.forward.dtype,
                         return CorrectDots<T>(FirstBag(task), FirstBag(task + 1)));
  });
}

// What the divisor of the bags [first, last) gives the weights that it is made of.
template <class T>
void GradRun::CorrectDots(int64_t first, int64_t last) const {
  using A = Accumulator<T>;
  const PoolJob& f = job.forward;
  const auto is_used = [&](int64_t k) { return IndexAt(f.indices, f.index_type, k) != f.padding; };
  for (int64_t i = first; i < last; ++i) {
    const int64_t begin = BagBegin(i), end = BagBegin(i + 1);
    const double total = f.weight_sum(f, begin, end);
    const double divisor = f.mode == kSqrtn ? std::sqrt(total) : total;
    double sum = 0;
    for (int64_t k = begin; k < end; ++k) {
      if (!is_used(k)) continue;
      const double weight = ToAccumulator(LoadUnaligned<T>(f.per_sample_weights, k));
      sum += weight * static_cast<double>(LoadUnaligned<A>(job.dots, k));
    }
    for (int64_t k = begin; k < end; ++k) {
      A value = 0;
      if (is_used(k)) {
        double part = sum / divisor;
        if (f.mode == kSqrtn) {
          part = part *
                 static_cast<double>(ToAccumulator(LoadUnaligned<T>(f.per_sample_weights, k))) /
                 divisor;
        }
        value = static_cast<A>(static_cast<double>(LoadUnaligned<A>(job.dots, k)) - part);
      }
      T rounded;
      FromAccumulator(CanonicalNan(value), &rounded);
      std::memcpy(job.grad_weights + static_cast<size_t>(k) * sizeof(T), &rounded, sizeof(T));
    }
  }
}

// All outputs.
Status GradRun::Compute() {
  Status status = ClearOutputs();
  if (!status.ok() || job.num_entries == 0) return status;
  const bool sums = !sparse && job.forward.columns > 0;
  if (sums || (sparse && job.by_frequency)) status = Sort();
  if (status.ok()) status = Prepare();
  if (status.ok() && sparse) status = Values();
  if (status.ok() && sums) status = Sums();
  return status.ok() && job.grad_weights ? Dots() : status;
}

// Everything but num_entries and the values of indices.
Status CheckAll(const EmbeddingBagGradArgs& args, GradSizes* sizes) {
  int64_t num_bags;
  const Status status = CheckEmbeddingBagGrad(args, &num_bags);
  return status.ok() ? CheckGradOffsets(args, num_bags, sizes) : status;
}

}  // namespace

Status CheckGradOffsets(const EmbeddingBagGradArgs& args, int64_t num_bags, GradSizes* sizes) {
  const EmbeddingBagArgs& a = args.forward;
  int64_t longest;
  const Status status = CheckOffsets(a, &longest);
  if (!status.ok()) return status;
  sizes->num_bags = num_bags;
  if (a.indices_rank == 2) {
    sizes->positions = a.indices_shape[0] * a.indices_shape[1];
  } else if (a.include_last_offset) {
    // Read again, so it may be another by now.
    sizes->positions =
        WithinPositions(IndexAt(a.offsets, a.offset_type, num_bags), a.indices_shape[0]);
  } else {
    sizes->positions = a.indices_shape[0];
  }
  return status;
}

int64_t CountCheckedGradEntries(const EmbeddingBagGradArgs& args, const GradSizes& sizes) {
  const EmbeddingBagArgs& a = args.forward;
  const int64_t padding = PaddedRow(a);
  const bool skips_negative = a.negative == kSkip;
  int64_t count = sizes.positions;
  for (int64_t k = 0; (padding >= 0 || skips_negative) && k < sizes.positions; ++k) {
    const int64_t index = IndexAt(a.indices, a.index_type, k);
    count -= index == padding || (index < 0 && skips_negative);
  }
  return count;
}

Status CountGradEntries(const EmbeddingBagGradArgs& args, int64_t* num_entries) {
  GradSizes sizes;
  const Status status = CheckAll(args, &sizes);
  if (status.ok()) *num_entries = CountCheckedGradEntries(args, sizes);
  return status;
}

Status RunCheckedEmbeddingBagGrad(const EmbeddingBagGradArgs& args, const GradSizes& sizes, Isa isa,
                                  const ParallelFor& parallel_for) {
  GradRun run;
  run.parallel_for = &parallel_for;
  run.SetJob(args, sizes, isa);
  run.SetTasks();
  g_runs[static_cast<int>(isa)].fetch_add(1, std::memory_order_relaxed);
  Status status = run.CopyOffsets();
  if (status.ok()) status = run.CheckIndices(args);
  if (!status.ok()) return status;
  if (args.sparse && args.num_entries != run.job.num_entries) {
    return InvalidArgument("num_entries = %lld is not %lld", Wide(args.num_entries),
                           Wide(run.job.num_entries));
  }
  return run.Compute();
}

Status RunEmbeddingBagGrad(const EmbeddingBagGradArgs& args, Isa isa,
                           const ParallelFor& parallel_for) {
  GradSizes sizes;
  const Status status = CheckAll(args, &sizes);
  return status.ok() ? RunCheckedEmbeddingBagGrad(args, sizes, isa, parallel_for) : status;
}

int64_t EmbeddingBagGradRuns(Isa isa) {
  return g_runs[static_cast<int>(isa)].load(std::memory_order_relaxed);
}

}  // namespace lucid
