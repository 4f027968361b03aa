// The CUDA kernels of EmbeddingBagCollection: those of embedding_bag/cuda-inl.h, whose blocks look
// for their table first.
#include <new>
#include <type_traits>

#include "embedding_bag/cuda-inl.h"
#include "embedding_bag_collection/cuda.h"

namespace lucid {
namespace {

// What a launch knows: its jobs are jobs[first] .. jobs[first + count - 1], of blocks one after
// another. Jobs of several tables find those from jobs[first_table] on.
struct Jobs {
  const CudaJob* more;  // null: `few` has them
  int32_t first, count, first_table, num_tables;
  CudaJob few[kTablesOfLaunch];

  __device__ __forceinline__ const CudaJob* All() const { return more ? more : few; }
};
static_assert(sizeof(CudaJob) == kCudaJobBytes, "what the plan has room for");
static_assert(sizeof(Jobs) <= 4096, "what every device takes as parameters");
static_assert(std::is_trivially_copyable<CudaJob>::value, "it is written word by word");

// The last of `count` things, counted from 0, whose begin is not past `value`; begins never fall,
// and the first one's is not past it, or it is the first one.
template <class F>
__device__ __forceinline__ int32_t LastFrom(int32_t count, int64_t value, const F& begin) {
  int32_t low = 0, high = count - 1;
  while (low < high) {
    const int32_t middle = low + (high - low + 1) / 2;
    if (begin(middle) <= value) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

__device__ __forceinline__ const CudaJob& JobOfBlock(const Jobs& jobs) {
  const CudaJob* const first = jobs.All() + jobs.first;
  return first[LastFrom(jobs.count, blockIdx.x, [&](int32_t i) { return first[i].first_block; })];
}

// What looks for its table needs a few registers more than what has one: a block fewer, so that
// none of them is spilled.
template <class T, int kBytes>
constexpr int kTableBlocks = kBlocks<T, kBytes> > 3 ? 3 : kBlocks<T, kBytes>;

template <class T, int kBytes>
__global__ void __launch_bounds__(256, kTableBlocks<T, kBytes>)
    PoolTables(const __grid_constant__ Jobs jobs) {
  const CudaJob& job = JobOfBlock(jobs);
  PoolBlock<T, kBytes, Pooling::kEither>(job,
                                         job.table_bags ? jobs.All() + jobs.first_table : nullptr,
                                         blockIdx.x - job.first_block, job.blocks);
}

__global__ void __launch_bounds__(256) CheckTables(const __grid_constant__ Jobs jobs) {
  const CudaJob& job = JobOfBlock(jobs);
  const uint32_t block = blockIdx.x - job.first_block;
  CheckOffsets(job, block, job.blocks);
  if (job.num_bags == 0) return;
  CheckIndices(job, BagBegin(job, 0), BagBegin(job, job.num_bags), block, job.blocks);
}

// Of packed tables, a position belongs to the last one that begins at or before it.
template <class T>
__global__ void __launch_bounds__(256) ClipTables(const __grid_constant__ Jobs jobs, bool packed) {
  const CudaJob* const tables = jobs.All() + jobs.first_table;
  if (packed) {
    const int64_t position = PositionOf<T>(blockIdx.x);
    ClipRow<T>(tables[LastFrom(jobs.num_tables, position,
                               [&](int32_t t) { return BagBegin(tables[t], 0); })],
               position);
  } else {
    const CudaJob& job = tables[LastFrom(jobs.num_tables, blockIdx.x,
                                         [&](int32_t t) { return tables[t].first_norm_block; })];
    ClipRow<T>(job, PositionOf<T>(blockIdx.x - job.first_norm_block));
  }
}

// Writes `count` of the jobs that the parameters hold.
__global__ void __launch_bounds__(256)
    StoreJobs(const __grid_constant__ Jobs jobs, int32_t count, CudaJob* to) {
  const uint32_t words = static_cast<uint32_t>(count) * (sizeof(CudaJob) / 8);
  for (uint32_t i = threadIdx.x; i < words; i += blockDim.x) {
    memcpy(reinterpret_cast<char*>(to) + i * 8, reinterpret_cast<const char*>(jobs.few) + i * 8, 8);
  }
}

using Kernel = void (*)(Jobs jobs);
using ClipKernel = void (*)(Jobs jobs, bool packed);

// The widths are those of embedding_bag/cuda_plan.cc.
template <class T, int kWide, int kMiddle, int kNarrow>
Kernel ChooseWidth(int bytes) {
  if (bytes == kWide) return PoolTables<T, kWide>;
  if (bytes == kMiddle) return PoolTables<T, kMiddle>;
  return bytes == kNarrow ? PoolTables<T, kNarrow> : nullptr;
}

Kernel ChooseTables(int32_t dtype, int bytes) {
  switch (dtype) {
    case kFloat32:
      return ChooseWidth<float, 16, 4, 4>(bytes);
    case kFloat16:
      return ChooseWidth<Float16, 16, 4, 2>(bytes);
    case kBFloat16:
      return ChooseWidth<BFloat16, 16, 4, 2>(bytes);
    default:
      return ChooseWidth<double, 16, 8, 8>(bytes);
  }
}

ClipKernel ChooseClips(int32_t dtype) {
  switch (dtype) {
    case kFloat32:
      return ClipTables<float>;
    case kFloat16:
      return ClipTables<Float16>;
    case kBFloat16:
      return ClipTables<BFloat16>;
    default:
      return ClipTables<double>;
  }
}

}  // namespace

Status CudaCollection::Launch(void* scratch, LucidBoundsError* error, void* stream_handle) const {
  if (num_groups_ == 0) return Status();
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_handle);
  char* const base = static_cast<char*>(scratch);
  char* const others = base + plan_.zeroed_bytes;
  const std::unique_ptr<CudaJob[]> all(new (std::nothrow) CudaJob[static_cast<size_t>(num_jobs_)]);
  if (!all) {
    return Error(Code::kOutOfMemory, "no memory for %lld tables",
                 static_cast<long long>(num_tables_));
  }

  const int64_t stride = RowBytes(tables_[0].args.output_type, plan_.columns);
  const auto job_of = [&](const CudaTable& table) {
    CudaJob job = MakeJob(table.args, table.plan, error);
    const uint64_t number = static_cast<uint64_t>(table.number);
    job.output_stride = stride;
    job.offset_place =
        packed_ ? number * static_cast<uint64_t>(plan_.num_bags) : number * kTablePlace;
    job.offset_table = packed_ ? 0 : static_cast<uint32_t>(number) + 1;
    job.index_place = kIndexPlace + number * kTablePlace;
    job.index_table = static_cast<uint32_t>(number) + 1;
    job.first_block = static_cast<uint32_t>(table.first_block);
    job.first_norm_block = static_cast<uint32_t>(table.first_norm_block);
    job.blocks = static_cast<uint32_t>(table.plan.check_blocks + table.plan.blocks);
    job.group = static_cast<uint32_t>(table.group);
    if (table.clips_at >= 0) {
      job.clips = others + table.clips_at;
      job.scaled = true;
    }
    const bool shares = packed_ && table.group >= 0 && !groups_[table.group].checks_only;
    const CudaTable& parts = shares ? groups_[table.group].all : table;
    if (shares || !packed_) {
      SetPartials(parts.plan, base + parts.counters_at, others + parts.others_at, &job);
      job.row_vectors = parts.plan.vectors;
    }
    return job;
  };

  // The jobs of a launch follow each other, and packed tables do.
  Jobs jobs = {};
  int32_t first[kMostGroups] = {}, count = 0;
  for (int64_t g = 0; g < num_groups_; ++g) {
    const CudaTables& group = groups_[g];
    first[g] = count;
    if (packed_ && !group.checks_only) {
      CudaJob job = job_of(group.all);
      job.table_bags = plan_.num_bags;
      all[static_cast<size_t>(count++)] = job;
      continue;
    }
    for (int64_t t = 0; t < num_tables_; ++t) {
      const CudaTable& table = tables_[static_cast<size_t>(t)];
      if (table.group == g) all[static_cast<size_t>(count++)] = job_of(table);
    }
  }
  if (packed_) {
    jobs.first_table = count;
    for (int64_t t = 0; t < num_tables_; ++t) {
      all[static_cast<size_t>(count++)] = job_of(tables_[static_cast<size_t>(t)]);
    }
  }
  jobs.num_tables = count - jobs.first_table;
  if (count != num_jobs_) return Error(Code::kInternal, "%d jobs were planned otherwise", count);

  CudaJob* const stored = reinterpret_cast<CudaJob*>(base + jobs_at_);
  for (int32_t begin = 0; begin < count; begin += static_cast<int32_t>(kTablesOfLaunch)) {
    const int32_t some = count - begin < kTablesOfLaunch ? count - begin : kTablesOfLaunch;
    for (int32_t i = 0; i < some; ++i) jobs.few[i] = all[static_cast<size_t>(begin + i)];
    if (count <= kTablesOfLaunch) break;
    LUCID_LAUNCH(StoreJobs, 1u, 256u, stream, jobs, some, stored + begin);
    const Status status = CudaStatus("storing what tables there are", cudaGetLastError());
    if (!status.ok()) return status;
  }
  if (count > kTablesOfLaunch) jobs.more = stored;

  const int32_t dtype = tables_[0].args.dtype;
  if (norm_blocks_ > 0) {
    const ClipKernel clips = ChooseClips(dtype);
    LUCID_LAUNCH(clips, static_cast<unsigned>(norm_blocks_), 256u, stream, jobs, packed_);
    const Status status = CudaStatus("computing norms", cudaGetLastError());
    if (!status.ok()) return status;
  }
  if (plan_.zeroed_bytes > 0) {
    const Status status = ClearOnDevice(base, plan_.zeroed_bytes, stream_handle);
    if (!status.ok()) return status;
  }
  for (int64_t g = 0; g < num_groups_; ++g) {
    const CudaTables& group = groups_[g];
    jobs.first = first[g];
    jobs.count = packed_ && !group.checks_only ? 1 : static_cast<int32_t>(group.count);
    const Kernel kernel = group.checks_only ? CheckTables : ChooseTables(dtype, group.vector_bytes);
    if (!kernel) return Error(Code::kInternal, "no kernel reads %d bytes", group.vector_bytes);
    LUCID_LAUNCH(kernel, static_cast<unsigned>(group.blocks), static_cast<unsigned>(group.threads),
                 stream, jobs);
    const Status status = CudaStatus("pooling", cudaGetLastError());
    if (!status.ok()) return status;
  }
  return Status();
}

}  // namespace lucid
