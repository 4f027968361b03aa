// How the bags of several tables are divided among launches, and the layout of their scratch
// memory. Does not depend on CUDA.
#include <algorithm>
#include <new>

#include "base/types.h"
#include "embedding_bag_collection/cuda.h"

namespace lucid {
namespace {

constexpr int64_t kLine = 256;  // what a part of the scratch memory begins at a multiple of

int64_t RoundUp(int64_t a, int64_t b) { return (a + b - 1) / b * b; }

// Far from where sums of a few of them overflow.
constexpr int64_t kMostBytes = int64_t{1} << 60;

// Adds part to *sum, if it stays below kMostBytes.
bool Add(int64_t part, int64_t* sum) {
  if (part > kMostBytes - *sum) return false;
  *sum += part;
  return true;
}

}  // namespace

Status CudaCollection::Plan(const EmbeddingBagCollectionArgs& args) {
  plan_ = {};
  plan_.size_bytes = sizeof(plan_);
  CollectionSizes sizes;
  const Status status = CheckEmbeddingBagCollection(args, &sizes);
  return status.ok() ? PlanChecked(args, sizes) : status;
}

Status CudaCollection::PlanChecked(const EmbeddingBagCollectionArgs& args,
                                   const CollectionSizes& sizes) {
  plan_ = {};
  plan_.size_bytes = sizeof(plan_);
  plan_.num_bags = sizes.num_bags;
  plan_.columns = sizes.columns;
  num_groups_ = num_jobs_ = norm_blocks_ = 0;
  Status status = PlanTables(args);
  if (status.ok()) status = PlanGroups();
  return status.ok() ? PlanScratch() : status;
}

// Each table by itself, with its columns of the output.
Status CudaCollection::PlanTables(const EmbeddingBagCollectionArgs& args) {
  num_tables_ = args.num_tables;
  packed_ = args.packed != 0;
  if (num_tables_ > kMostCudaTables) {
    return InvalidArgument("num_tables = %lld is more than a call on a GPU supports, %lld",
                           static_cast<long long>(num_tables_),
                           static_cast<long long>(kMostCudaTables));
  }
  tables_.reset(new (std::nothrow) CudaTable[static_cast<size_t>(num_tables_)]);
  if (!tables_) {
    return Error(Code::kOutOfMemory, "no memory for %lld tables",
                 static_cast<long long>(num_tables_));
  }
  const int64_t stride = RowBytes(args.tables[0].output_type, plan_.columns);
  int64_t column = 0;
  for (int64_t t = 0; t < num_tables_; ++t) {
    CudaTable& table = tables_[static_cast<size_t>(t)];
    table = CudaTable();
    table.number = t;
    EmbeddingBagArgs& a = table.args;
    a = ArgsOfTable(args, t);
    if (a.dtype > kFloat64) {
      return InvalidArgument(
          "table %lld: dtype = %d is quantized: collections on a GPU do not support quantized "
          "tables",
          static_cast<long long>(t), a.dtype);
    }
    if (packed_) {
      const int64_t size = a.offset_type == kInt64 ? 8 : 4;
      a.offsets = static_cast<const char*>(a.offsets) + t * plan_.num_bags * size;
      a.num_offsets = plan_.num_bags + 1;
    }
    a.output = static_cast<char*>(args.output) + RowBytes(a.output_type, column);
    const Status status = PlanCheckedCudaEmbeddingBag(a, plan_.num_bags, stride, &table.plan);
    if (!status.ok()) return InTable(t, status);
    column += a.weight_shape[1];
  }
  return Status();
}

// The launch that a table shares with those like it.
CudaTables* CudaCollection::GroupOf(const CudaTable& table) {
  CudaTables group;
  group.checks_only = table.plan.check_blocks > 0;
  if (!group.checks_only) group.vector_bytes = table.plan.vector_bytes;
  CudaTables* const end = groups_ + num_groups_;
  CudaTables* const found = std::find_if(groups_, end, [&](const CudaTables& g) {
    return g.checks_only == group.checks_only && g.vector_bytes == group.vector_bytes;
  });
  if (found == end) {
    *found = group;
    ++num_groups_;
  }
  return found;
}

Status CudaCollection::PlanGroups() {
  double threads = 0;
  for (int64_t t = 0; t < num_tables_; ++t) {
    CudaTable& table = tables_[static_cast<size_t>(t)];
    if (table.plan.blocks == 0 && table.plan.check_blocks == 0) continue;
    CudaTables* const group = GroupOf(table);
    table.group = group - groups_;
    ++group->count;
    group->vectors = std::max(group->vectors, table.plan.vectors);
    threads += CudaThreads(table.plan);
  }

  // The bags of packed tables are searched as one. So a launch has threads for the longest row of
  // its tables in all chunks, and skips the chunks of tables in other launches.
  for (CudaTables* group = groups_; packed_ && group < groups_ + num_groups_; ++group) {
    if (group->checks_only) continue;
    CudaTable& all = group->all;
    all = tables_[0];
    all.group = group - groups_;
    all.args.num_offsets = plan_.num_bags * num_tables_ + 1;
    all.plan.num_bags = plan_.num_bags * num_tables_;
    all.plan.vectors = group->vectors;
    all.plan.vector_bytes = group->vector_bytes;
    const int32_t element = static_cast<int32_t>(RowBytes(all.args.dtype, 1));
    all.plan.vector_elements = group->vector_bytes / element;
    all.plan.chunks = all.plan.num_positions / kChunk + all.plan.num_bags;
    all.plan.check_blocks = all.plan.norm_blocks = all.plan.zeroed_bytes = 0;
    Status status = PlanCudaBlocks(CudaThreads(all.plan), &all.plan);
    if (status.ok()) {
      status = PlanCudaPartials(all.plan.num_positions, element > 4 ? 8 : 4, &all.plan);
    }
    if (!status.ok()) return status;
    group->blocks = all.plan.blocks;
    group->threads = all.plan.block_threads;
  }

  for (int64_t g = 0; g < num_groups_; ++g) {
    for (int64_t t = 0; t < num_tables_; ++t) {
      CudaTable& table = tables_[static_cast<size_t>(t)];
      if (table.group != g) continue;
      const Status status = PlaceTable(threads, &groups_[g], &table);
      if (!status.ok()) return InTable(t, status);
    }
  }
  return Status();
}

// The blocks of a table behind those of the tables before it.
Status CudaCollection::PlaceTable(double threads, CudaTables* group, CudaTable* table) {
  if (group->checks_only) {
    table->first_block = group->blocks;
    group->blocks += table->plan.check_blocks;
    group->threads = kCheckThreads;
  } else if (!packed_) {
    const Status status = PlanCudaBlocks(threads, &table->plan);
    if (!status.ok()) return status;
    table->first_block = group->blocks;
    group->blocks += table->plan.blocks;
    group->threads = std::max(group->threads, table->plan.block_threads);
  }
  if (packed_) {  // the norms of all positions are found at once
    norm_blocks_ = std::max(norm_blocks_, table->plan.norm_blocks);
  } else {
    table->first_norm_block = norm_blocks_;
    norm_blocks_ += table->plan.norm_blocks;
  }
  if (group->blocks > INT32_MAX || norm_blocks_ > INT32_MAX) return TooLargeForCuda();
  return Status();
}

// Counters first, which start as zeros; then the rest of what SetPartials needs, clips and jobs.
Status CudaCollection::PlanScratch() {
  int64_t zeroed = 0, others = 0;
  const auto add = [&](CudaTable* table) {
    if (table->plan.zeroed_bytes == 0) return true;
    table->counters_at = zeroed;
    table->others_at = others;
    const int64_t end =
        table->plan.norm_blocks > 0 ? table->plan.clips_at : table->plan.scratch_bytes;
    return Add(RoundUp(table->plan.zeroed_bytes, kLine), &zeroed) &&
           Add(end - table->plan.counts_at, &others);
  };
  bool fits = true;
  for (int64_t g = 0; g < num_groups_; ++g) {
    CudaTables& group = groups_[g];
    if (packed_ && !group.checks_only) {
      fits = fits && add(&group.all);
    }
  }
  int64_t shared_clips = -1;
  for (int64_t t = 0; t < num_tables_; ++t) {
    CudaTable& table = tables_[static_cast<size_t>(t)];
    if (table.group < 0) continue;
    if (!packed_) fits = fits && add(&table);
    if (table.plan.norm_blocks == 0) continue;
    table.clips_at = shared_clips >= 0 ? shared_clips : others;
    if (packed_ && shared_clips >= 0) continue;
    fits = fits && Add(table.plan.scratch_bytes - table.plan.clips_at, &others);
    if (packed_) shared_clips = table.clips_at;
  }
  if (!fits) return TooLargeForCuda();
  plan_.zeroed_bytes = zeroed;
  plan_.scratch_bytes = jobs_at_ = zeroed + others;
  plan_.launches = num_groups_ + (norm_blocks_ > 0);
  if (num_groups_ == 0) return Status();
  if (packed_) num_jobs_ = num_tables_;
  for (int64_t g = 0; g < num_groups_; ++g) {
    const CudaTables& group = groups_[g];
    plan_.pool_launches += !group.checks_only;
    num_jobs_ += packed_ && !group.checks_only ? 1 : group.count;
  }
  if (num_jobs_ <= kTablesOfLaunch) return Status();
  plan_.launches += (num_jobs_ + kTablesOfLaunch - 1) / kTablesOfLaunch;
  plan_.scratch_bytes += RoundUp(num_jobs_ * kCudaJobBytes, kLine);
  return Status();
}

}  // namespace lucid
