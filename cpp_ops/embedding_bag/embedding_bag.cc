// Validation, the plan, and the split into tasks. The loops are in pool_rows-inl.h.
#include "embedding_bag/embedding_bag.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <memory>
#include <new>

#include "base/types.h"
#include "embedding_bag/pool_rows.h"
#include "embedding_bag/tasks.h"

namespace lucid {

#define LUCID_POOL_ROWS(isa)         \
  namespace isa {                    \
  extern const PoolKernel kPoolRows; \
  }
#include "embedding_bag/kernels.inc"
#undef LUCID_POOL_ROWS

namespace {

constexpr const PoolKernel* kKernels[] = {
#define LUCID_POOL_ROWS(isa) &isa::kPoolRows,
#include "embedding_bag/kernels.inc"
#undef LUCID_POOL_ROWS
};
static_assert(sizeof(kKernels) / sizeof(kKernels[0]) == kIsaCount, "a kernel per instruction set");

std::atomic<int64_t> g_runs[kIsaCount];

template <class I>
Status CheckOffsetsOf(const EmbeddingBagArgs& a, int64_t* longest) {
  const int64_t count = a.num_offsets, n = a.indices_shape[0];
  // Without branches, for speed; only if there is an error, the place is looked for.
  int64_t previous = LoadUnaligned<I>(a.offsets, 0);
  int64_t most = 0;
  bool bad = previous != 0;
  for (int64_t i = 1; i < count; ++i) {
    const int64_t offset = LoadUnaligned<I>(a.offsets, i);
    bad |= offset < previous;
    // Unsigned: hostile offsets may be further apart than an int64_t can tell.
    most = std::max(most, static_cast<int64_t>(static_cast<uint64_t>(offset) -
                                               static_cast<uint64_t>(previous)));
    previous = offset;
  }
  bad |= previous > n;
  if (!bad) {
    *longest = a.include_last_offset ? most : std::max(most, n - previous);
    return Status();
  }
  previous = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t offset = LoadUnaligned<I>(a.offsets, i);
    if (i == 0 ? offset != 0 : offset < previous || offset > n) {
      return InvalidOffset(a, i, offset, previous);
    }
    previous = offset;
  }
  return Error(Code::kInternal, "offsets changed while they were read");
}

template <class T>
double GeneralNorm(const PoolJob& job, const char* row, const Affine* affine) {
  using A = Accumulator<T>;
  const A p = static_cast<A>(job.norm_type);
  A sum = 0;
  // In groups: a float is off by 1e-6 after a thousand additions one after another.
  for (int64_t begin = 0; begin < job.columns; begin += 32) {
    A group = 0;
    for (int64_t i = begin; i < std::min(begin + 32, job.columns); ++i) {
      A x = ElementAt<T>(row, i);
      if (affine) x = (x - affine->zero) * affine->scale + affine->shift;
      group += std::pow(std::abs(x), p);
    }
    sum += group;
  }
  return std::pow(sum, 1 / p);
}

struct LongBag {
  int64_t bag, begin, end;
  int64_t first_piece;  // the number of pieces in the long bags before it
};

int64_t Pieces(int64_t positions) { return (positions + kPiece - 1) / kPiece; }

// The bags of one table under way.
struct Run {
  PoolJob job = {};
  const PoolKernel* kernel = nullptr;
  int64_t num_bags = 0;
  int64_t first_position = 0;  // of the first bag
  double bytes = 0;            // what is read and written, about
  int64_t first_task = 0;      // the tasks of the tables before
  int64_t bag_tasks = 0;  // tasks [0, bag_tasks) do bags, the others a piece of a long bag each
  std::unique_ptr<LongBag[]> long_bags;
  int64_t num_long_bags = 0;
  int64_t num_pieces = 0;
  std::unique_ptr<char[]> partial_rows;  // a row of accumulators per piece
  std::unique_ptr<int64_t[]> partial_counts;
  std::unique_ptr<double[]> partial_weights;  // where the mode divides by them
  std::atomic<int64_t> bad_position{kNoBadPosition};
  std::atomic<bool> failed{false};

  // The offsets were checked, but the host may have written to them since: whatever they are now,
  // this is a position or the end.
  int64_t BagBegin(int64_t i) const {
    if (!job.offsets) return i * job.bag_length;
    if (i >= job.num_offsets) return job.num_positions;
    return WithinPositions(IndexAt(job.offsets, job.offset_type, i), job.num_positions);
  }
  size_t AccumulatorSize() const { return job.dtype == kFloat64 ? sizeof(double) : sizeof(float); }
  size_t PartialRowBytes() const { return static_cast<size_t>(job.columns) * AccumulatorSize(); }

  void SetJob(const EmbeddingBagArgs& a, int64_t bags, Isa isa, char* output,
              int64_t output_stride);
  Status Plan(int64_t longest);
  bool FindLongBags();
  int64_t FirstBagOfTask(int64_t task) const;
  void DoTask(int64_t task);
  void ReportBad(int64_t position);
  void CombinePieces();
  template <class Out>
  void CombineLongBag(const LongBag& bag, double* sum);
};

// The bags that this thread has done last, up to `last`. (Those of an earlier call may look like
// these: then a few rows are fetched late, no more.)
struct Done {
  const Run* run;
  int64_t last;
};
thread_local Done t_done;

// False if there is no memory for them. There is room for as many as there were when they were
// counted, however many the offsets make by now, and they do not overlap.
bool Run::FindLongBags() {
  int64_t room = 0;
  for (int64_t i = 0, end = first_position; i < num_bags; ++i) {
    const int64_t begin = end;
    end = std::max(begin, BagBegin(i + 1));
    room += end - begin > kPiece;
  }
  long_bags.reset(new (std::nothrow) LongBag[static_cast<size_t>(room)]);
  if (!long_bags) return false;
  for (int64_t i = 0, end = first_position; i < num_bags && num_long_bags < room; ++i) {
    const int64_t begin = end;
    end = std::max(begin, BagBegin(i + 1));
    if (end - begin <= kPiece) continue;
    long_bags[static_cast<size_t>(num_long_bags++)] = {i, begin, end, num_pieces};
    num_pieces += Pieces(end - begin);
  }
  const size_t row = PartialRowBytes();
  if (row && static_cast<size_t>(num_pieces) > static_cast<size_t>(PTRDIFF_MAX) / row) return false;
  partial_rows.reset(new (std::nothrow) char[static_cast<size_t>(num_pieces) * row]);
  partial_counts.reset(new (std::nothrow) int64_t[static_cast<size_t>(num_pieces)]());
  if (job.by_weights) {
    partial_weights.reset(new (std::nothrow) double[static_cast<size_t>(num_pieces)]);
  }
  return partial_rows && partial_counts && (partial_weights || !job.by_weights);
}

// Tasks share positions and bags evenly, a bag counting as one position: empty ones cost too.
// offsets[i] - offsets[0] + i is the work before bag i. It rises strictly, so each cut is found by
// bisection.
int64_t Run::FirstBagOfTask(int64_t task) const {
  const int64_t work = job.last_position + 1 - first_position + num_bags;
  const int64_t before = work / bag_tasks * task + work % bag_tasks * task / bag_tasks;
  int64_t low = 0, high = num_bags;
  if (task >= bag_tasks) return high;
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    if (BagBegin(middle) - first_position + middle < before) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

void Run::ReportBad(int64_t position) {
  int64_t lowest = bad_position.load(std::memory_order_relaxed);
  while (position < lowest && !bad_position.compare_exchange_weak(lowest, position)) {
  }
}

void Run::DoTask(int64_t task) {
  if (task < bag_tasks) {
    const int64_t first = FirstBagOfTask(task), last = FirstBagOfTask(task + 1);
    if (first < last) {
      ReportBad(kernel->bags(job, first, last, t_done.run == this && t_done.last == first));
      t_done = {this, last};
    }
    return;
  }
  const int64_t piece = task - bag_tasks;
  const LongBag* after =
      std::upper_bound(long_bags.get(), long_bags.get() + num_long_bags, piece,
                       [](int64_t value, const LongBag& bag) { return value < bag.first_piece; });
  const LongBag& bag = after[-1];
  const int64_t begin = bag.begin + (piece - bag.first_piece) * kPiece;
  ReportBad(kernel->piece(job, begin, std::min(begin + kPiece, bag.end),
                          partial_rows.get() + static_cast<size_t>(piece) * PartialRowBytes(),
                          &partial_counts[static_cast<size_t>(piece)]));
  if (job.by_weights) {
    partial_weights[static_cast<size_t>(piece)] =
        job.weight_sum(job, begin, std::min(begin + kPiece, bag.end));
  }
}

// All tables of a call, their tasks one table after another.
struct Runs {
  Run* first;
  int64_t count;
};

// An exception that left a task on a host's thread would hang or end the process.
void TaskEntry(void* argument, size_t number) {
  const Runs& runs = *static_cast<const Runs*>(argument);
  const int64_t task = static_cast<int64_t>(number);
  Run& run = std::upper_bound(runs.first, runs.first + runs.count, task,
                              [](int64_t value, const Run& r) { return value < r.first_task; })[-1];
  try {
    run.DoTask(task - run.first_task);
  } catch (...) {
    run.failed.store(true);
  }
}

template <class Out>
void Run::CombineLongBag(const LongBag& bag, double* sum) {
  using A = Accumulator<Out>;
  const int64_t columns = job.columns;
  int64_t count = 0;
  double weights = 0;
  for (int64_t p = bag.first_piece; p < bag.first_piece + Pieces(bag.end - bag.begin); ++p) {
    if (partial_counts[static_cast<size_t>(p)] == 0) continue;
    const char* row = partial_rows.get() + static_cast<size_t>(p) * PartialRowBytes();
    for (int64_t c = 0; c < columns; ++c) {
      const double x = LoadUnaligned<A>(row, c);
      if (count == 0) {
        sum[c] = x;
      } else if (job.mode == kMax) {
        sum[c] = x > sum[c] || x != x ? x : sum[c];
      } else {
        sum[c] += x;
      }
    }
    count += partial_counts[static_cast<size_t>(p)];
    if (job.by_weights) weights += partial_weights[static_cast<size_t>(p)];
  }
  char* out = job.output + bag.bag * job.output_stride;
  if (count == 0) {
    std::memset(out, 0, static_cast<size_t>(job.output_row_bytes));
    return;
  }
  const double total = job.by_weights ? weights : static_cast<double>(count);
  const A divisor = static_cast<A>(job.mode == kSqrtn ? std::sqrt(total) : total);
  for (int64_t c = 0; c < columns; ++c) {
    A value = static_cast<A>(sum[c]);
    if (Divides(job.mode)) value /= divisor;
    Out rounded;
    FromAccumulator(CanonicalNan(value), &rounded);
    std::memcpy(out + static_cast<size_t>(c) * sizeof(Out), &rounded, sizeof(Out));
  }
}

void Run::CombinePieces() {
  if (num_long_bags == 0 || job.columns == 0) return;
  const std::unique_ptr<double[]> sum(new (std::nothrow) double[static_cast<size_t>(job.columns)]);
  if (!sum) {
    failed.store(true);
    return;
  }
  for (int64_t i = 0; i < num_long_bags; ++i) {
    const LongBag& bag = long_bags[static_cast<size_t>(i)];
    switch (job.output_type) {
      case kFloat32:
        CombineLongBag<float>(bag, sum.get());
        break;
      case kFloat16:
        CombineLongBag<Float16>(bag, sum.get());
        break;
      case kBFloat16:
        CombineLongBag<BFloat16>(bag, sum.get());
        break;
      default:
        CombineLongBag<double>(bag, sum.get());
    }
  }
}

// All but the values of the indices is checked.
void Run::SetJob(const EmbeddingBagArgs& a, int64_t bags, Isa isa, char* output,
                 int64_t output_stride) {
  const bool flat = a.indices_rank == 1;
  num_bags = bags;
  job.padding = PaddedRow(a);
  job.skips_negative = a.negative == kSkip;
  job.by_weights = DividesByWeights(a);
  job.rows = a.weight_shape[0];
  job.columns = a.weight_shape[1];
  job.weight = static_cast<const char*>(a.weight);
  job.indices = static_cast<const char*>(a.indices);
  job.offsets = flat ? static_cast<const char*>(a.offsets) : nullptr;
  job.per_sample_weights = static_cast<const char*>(a.per_sample_weights);
  job.scale = static_cast<const char*>(a.scale);
  job.zero_point = static_cast<const char*>(a.zero_point);
  job.bias = static_cast<const char*>(a.bias);
  job.output = output;
  job.row_bytes = a.row_stride != 0 ? a.row_stride : RowBytes(a.dtype, job.columns);
  job.table_bytes = static_cast<double>(job.rows) * static_cast<double>(job.row_bytes);
  job.output_row_bytes = RowBytes(a.output_type, job.columns);
  job.output_stride = output_stride;
  job.scale_stride = a.scale_stride;
  job.num_offsets = a.num_offsets;
  job.bag_length = flat ? 0 : a.indices_shape[1];
  job.num_positions = flat ? a.indices_shape[0] : a.indices_shape[0] * a.indices_shape[1];
  job.max_norm = a.max_norm;
  job.norm_type = a.norm_type;
  job.dtype = a.dtype;
  job.index_type = a.index_type;
  job.offset_type = a.offset_type;
  job.mode = a.mode;
  job.scale_type = a.scale_type;
  job.output_type = a.output_type;
  first_position = BagBegin(0);
  job.last_position = BagBegin(num_bags) - 1;
  kernel = &PoolKernelOf(isa);
  SetFunctions(*kernel, &job);
  bytes = (static_cast<double>(job.last_position) + 1 - static_cast<double>(first_position)) *
              static_cast<double>(job.row_bytes + 8) +
          static_cast<double>(num_bags) * static_cast<double>(job.output_row_bytes);
}

Status Run::Plan(int64_t longest) {
  if (longest <= kPiece || FindLongBags()) return Status();
  return Error(Code::kOutOfMemory, "no memory for the partial sums of %lld long bags",
               Wide(num_long_bags));
}

// Runs the tasks of all tables; a table without bag_tasks has none.
Status RunTasks(const Runs& runs, Isa isa, const ParallelFor& parallel_for) {
  g_runs[static_cast<int>(isa)].fetch_add(1, std::memory_order_relaxed);
  double bytes = 0;
  for (int64_t t = 0; t < runs.count; ++t) bytes += runs.first[t].bytes;
  const bool at_once = bytes <= kInlineBytes;
  const double task_bytes = std::max(kTaskBytes, bytes / kMostTasks);
  int64_t tasks = 0;
  for (int64_t t = 0; t < runs.count; ++t) {
    Run& run = runs.first[t];
    run.first_task = tasks;
    if (!run.kernel) continue;
    run.bag_tasks = 1;
    if (!at_once) {
      run.bag_tasks =
          std::min({static_cast<int64_t>(run.bytes / task_bytes) + 1, kMostTasks, run.num_bags});
    }
    tasks += run.bag_tasks + run.num_pieces;
  }
  Runs argument = runs;
  if (at_once) {
    for (int64_t task = 0; task < tasks; ++task) TaskEntry(&argument, static_cast<size_t>(task));
  } else if (!parallel_for.run(parallel_for.host, TaskEntry, static_cast<size_t>(tasks),
                               &argument)) {
    return Error(Code::kInternal, "the host could not run the tasks");
  }
  return Status();
}

// When all tasks are done: the error, or what is left to do.
Status Finish(const EmbeddingBagArgs& a, Run* run) {
  const int64_t bad = run->bad_position.load();
  if (bad != kNoBadPosition) return InvalidIndex(a, bad, IndexAt(a.indices, a.index_type, bad));
  if (!run->failed.load()) run->CombinePieces();
  if (run->failed.load()) return Error(Code::kInternal, "a task failed");
  return Status();
}

// Without output and without an index there is nothing to do, whatever the sizes claim: [B, 0]
// indices over a [V, 0] table take no memory, so B may be anything.
bool NothingToDo(const EmbeddingBagArgs& a, int64_t num_bags, int64_t longest) {
  return num_bags == 0 || (longest == 0 && a.weight_shape[1] == 0);
}

}  // namespace

const PoolKernel& PoolKernelOf(Isa isa) { return *kKernels[static_cast<int>(isa)]; }

void SetFunctions(const PoolKernel& kernel, PoolJob* job) {
  LUCID_FOR_DTYPE(job->dtype, job->general_norm = GeneralNorm<T>);
  job->weight_sum = kernel.weight_sum(*job);
}

Status CheckOffsets(const EmbeddingBagArgs& a, int64_t* longest) {
  *longest = 0;
  if (a.indices_rank == 2) {
    *longest = a.indices_shape[1];
  } else if (a.num_offsets > 0) {
    return a.offset_type == kInt64 ? CheckOffsetsOf<int64_t>(a, longest)
                                   : CheckOffsetsOf<int32_t>(a, longest);
  }
  return Status();
}

Status RunCheckedEmbeddingBag(const EmbeddingBagArgs& a, int64_t num_bags, int64_t longest, Isa isa,
                              const ParallelFor& parallel_for) {
  if (NothingToDo(a, num_bags, longest)) return Status();
  Run run;
  const int64_t stride = RowBytes(a.output_type, a.weight_shape[1]);
  run.SetJob(a, num_bags, isa, static_cast<char*>(a.output), stride);
  Status status = run.Plan(longest);
  if (status.ok()) status = RunTasks({&run, 1}, isa, parallel_for);
  return status.ok() ? Finish(a, &run) : status;
}

Status RunEmbeddingBag(const EmbeddingBagArgs& a, Isa isa, const ParallelFor& parallel_for) {
  int64_t num_bags, longest;
  Status status = CheckEmbeddingBag(a, &num_bags);
  if (status.ok()) status = CheckOffsets(a, &longest);
  return status.ok() ? RunCheckedEmbeddingBag(a, num_bags, longest, isa, parallel_for) : status;
}

Status CheckCollectionOffsets(const EmbeddingBagCollectionArgs& c, int64_t* longest) {
  for (int64_t t = 0; t < c.num_tables; ++t) {
    if (c.packed && t > 0) {
      longest[t] = longest[0];
      continue;
    }
    const Status status = CheckOffsets(c.tables[t], &longest[t]);
    if (!status.ok()) return c.packed ? status : InTable(t, status);
  }
  return Status();
}

Status RunCheckedEmbeddingBagCollection(const EmbeddingBagCollectionArgs& c,
                                        const CollectionSizes& sizes, const int64_t* longest,
                                        Isa isa, const ParallelFor& parallel_for) {
  const int64_t count = c.num_tables, num_bags = sizes.num_bags;
  const std::unique_ptr<Run[]> runs(new (std::nothrow) Run[static_cast<size_t>(count)]);
  if (!runs) return Error(Code::kOutOfMemory, "no memory for %lld tables", Wide(count));

  const int32_t output_type = c.tables[0].output_type;
  const int64_t stride = RowBytes(output_type, sizes.columns);
  Status status;
  int64_t column = 0;
  for (int64_t t = 0; t < count; ++t) {
    EmbeddingBagArgs a = ArgsOfTable(c, t);
    Run& run = runs[static_cast<size_t>(t)];
    if (!NothingToDo(a, num_bags, longest[t])) {
      if (c.packed) {
        a.offsets =
            static_cast<const char*>(a.offsets) + t * num_bags * (a.offset_type == kInt64 ? 8 : 4);
        a.num_offsets = num_bags + 1;
      }
      char* const output = static_cast<char*>(c.output) + RowBytes(output_type, column);
      run.SetJob(a, num_bags, isa, output, stride);
      status = run.Plan(longest[t]);
      if (!status.ok()) return InTable(t, status);
    }
    column += a.weight_shape[1];
  }
  double table_bytes = 0;
  for (int64_t t = 0; t < count; ++t) table_bytes += runs[static_cast<size_t>(t)].job.table_bytes;
  for (int64_t t = 0; t < count; ++t) runs[static_cast<size_t>(t)].job.table_bytes = table_bytes;
  status = RunTasks({runs.get(), count}, isa, parallel_for);
  for (int64_t t = 0; t < count && status.ok(); ++t) {
    status = InTable(t, Finish(ArgsOfTable(c, t), &runs[static_cast<size_t>(t)]));
  }
  return status;
}

Status RunEmbeddingBagCollection(const EmbeddingBagCollectionArgs& c, Isa isa,
                                 const ParallelFor& parallel_for) {
  CollectionSizes sizes;
  Status status = CheckEmbeddingBagCollection(c, &sizes);
  if (!status.ok()) return status;
  const std::unique_ptr<int64_t[]> longest(new (std::nothrow)
                                               int64_t[static_cast<size_t>(c.num_tables)]);
  if (!longest) return Error(Code::kOutOfMemory, "no memory for %lld tables", Wide(c.num_tables));
  status = CheckCollectionOffsets(c, longest.get());
  if (!status.ok()) return status;
  return RunCheckedEmbeddingBagCollection(c, sizes, longest.get(), isa, parallel_for);
}

int64_t EmbeddingBagRuns(Isa isa) {
  return g_runs[static_cast<int>(isa)].load(std::memory_order_relaxed);
}

}  // namespace lucid
