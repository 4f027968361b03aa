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
    StoreTables(const __grid_constant__ Jobs jobs, int32_t count, CudaJob* to) {
  const uint32_t words = static_cast<uint32_t>(count) * (sizeof(CudaJob) / 8);
  for (uint32_t i = threadIdx.x; i < words; i += blockDim.x) {
    memcpy(reinterpret_cast<char*>(to) + i * 8, reinterpret_cast<const char*>(jobs.few) + i * 8, 8);
  }
}

using Kernel = void (*)(Jobs jobs);
using ClipKernel = void (*)(Jobs jobs, bool packed);

// The widths are those of embedding_bag/cuda_plan.cc.
template <class T, int kWide, int kHalf, int kMiddle, int kNarrow>
Kernel ChooseWidth(int bytes) {
  if (bytes == kWide) return PoolTables<T, kWide>;
  if (bytes == kHalf) return PoolTables<T, kHalf>;
  if (bytes == kMiddle) return PoolTables<T, kMiddle>;
  return bytes == kNarrow ? PoolTables<T, kNarrow> : nullptr;
}

Kernel ChooseTables(int32_t dtype, int bytes) {
  switch (dtype) {
    case kFloat32:
      return ChooseWidth<float, 16, 8, 4, 4>(bytes);
    case kFloat16:
      return ChooseWidth<Float16, 16, 8, 4, 2>(bytes);
    case kBFloat16:
      return ChooseWidth<BFloat16, 16, 8, 4, 2>(bytes);
    default:
      return ChooseWidth<double, 16, 8, 8, 8>(bytes);
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

// What enqueues a planned call: the jobs of its launches, and the launches.
class CudaCollection::Launcher {
 public:
  Launcher(const CudaCollection& call, void* scratch, LucidBoundsError* error, void* stream)
      : call_(call),
        counters_(static_cast<char*>(scratch)),
        others_(counters_ + call.plan_.zeroed_bytes),
        error_(error),
        stream_(static_cast<cudaStream_t>(stream)),
        dtype_(call.tables_[0].args.dtype),
        output_stride_(RowBytes(call.tables_[0].args.output_type, call.plan_.columns)) {}

  // Lists the jobs. Those of a launch follow one another, and so do those of packed tables.
  Status ListJobs();

  // Puts the jobs where the kernels find them: in the parameters of a launch, or, for more than fit
  // there, in scratch memory.
  Status StoreJobs();

  Status ComputeClips();
  Status ClearCounters();
  Status Pool();

 private:
  // Whether the launch of a group takes the bags of all packed tables as one.
  bool IsShared(const CudaTables& group) const { return call_.packed_ && !group.checks_only; }

  CudaJob JobOf(const CudaTable& table) const;
  void Add(const CudaJob& job) { jobs_[static_cast<size_t>(count_++)] = job; }

  const CudaCollection& call_;
  char* const counters_;  // the scratch memory: what starts as zeros, and
  char* const others_;    // the rest
  LucidBoundsError* const error_;
  const cudaStream_t stream_;
  const int32_t dtype_;
  const int64_t output_stride_;
  std::unique_ptr<CudaJob[]> jobs_;
  int32_t count_ = 0;
  int32_t first_[kMostGroups] = {};  // job of every group
  Jobs parameters_ = {};
};

CudaJob CudaCollection::Launcher::JobOf(const CudaTable& table) const {
  CudaJob job = MakeJob(table.args, table.plan, error_);
  const bool packed = call_.packed_;
  const uint64_t number = static_cast<uint64_t>(table.number);
  const uint64_t num_bags = static_cast<uint64_t>(call_.plan_.num_bags);
  job.output_stride = output_stride_;
  job.offset_place = packed ? number * num_bags : number * kTablePlace;
  job.offset_table = packed ? 0 : static_cast<uint32_t>(number) + 1;
  job.index_place = kIndexPlace + number * kTablePlace;
  job.index_table = static_cast<uint32_t>(number) + 1;
  job.first_block = static_cast<uint32_t>(table.first_block);
  job.first_norm_block = static_cast<uint32_t>(table.first_norm_block);
  job.blocks = static_cast<uint32_t>(table.plan.check_blocks + table.plan.blocks);
  job.group = static_cast<uint32_t>(table.group);
  if (table.clips_at >= 0) UseClips(others_ + table.clips_at, &job);
  const bool shared = table.group >= 0 && IsShared(call_.groups_[table.group]);
  if (shared || !packed) {
    const CudaTable& parts = shared ? call_.groups_[table.group].all : table;
    SetPartials(parts.plan, counters_ + parts.counters_at, others_ + parts.others_at, &job);
    job.row_vectors = parts.plan.vectors;
  }
  return job;
}

Status CudaCollection::Launcher::ListJobs() {
  jobs_.reset(new (std::nothrow) CudaJob[static_cast<size_t>(call_.num_jobs_)]);
  if (!jobs_) {
    return Error(Code::kOutOfMemory, "no memory for %lld tables",
                 static_cast<long long>(call_.num_tables_));
  }
  for (int64_t g = 0; g < call_.num_groups_; ++g) {
    const CudaTables& group = call_.groups_[g];
    first_[g] = count_;
    if (IsShared(group)) {
      CudaJob job = JobOf(group.all);
      job.table_bags = call_.plan_.num_bags;
      Add(job);
      continue;
    }
    for (int64_t t = 0; t < call_.num_tables_; ++t) {
      const CudaTable& table = call_.tables_[static_cast<size_t>(t)];
      if (table.group == g) Add(JobOf(table));
    }
  }
  if (call_.packed_) {
    parameters_.first_table = count_;
    for (int64_t t = 0; t < call_.num_tables_; ++t) {
      Add(JobOf(call_.tables_[static_cast<size_t>(t)]));
    }
  }
  parameters_.num_tables = count_ - parameters_.first_table;
  if (count_ == call_.num_jobs_) return Status();
  return Error(Code::kInternal, "%d jobs, but the plan has %lld", count_,
               static_cast<long long>(call_.num_jobs_));
}

Status CudaCollection::Launcher::StoreJobs() {
  CudaJob* const stored = reinterpret_cast<CudaJob*>(counters_ + call_.jobs_at_);
  for (int32_t begin = 0; begin < count_; begin += static_cast<int32_t>(kTablesOfLaunch)) {
    const int32_t some = count_ - begin < kTablesOfLaunch ? count_ - begin : kTablesOfLaunch;
    for (int32_t i = 0; i < some; ++i) {
      parameters_.few[i] = jobs_[static_cast<size_t>(begin + i)];
    }
    if (count_ <= kTablesOfLaunch) return Status();
    const Status status =
        CudaStatus("storing the tables' descriptions",
                   Enqueue(StoreTables, 1, 256, stream_, parameters_, some, stored + begin));
    if (!status.ok()) return status;
  }
  parameters_.more = stored;
  return Status();
}

Status CudaCollection::Launcher::ComputeClips() {
  if (call_.norm_blocks_ == 0) return Status();
  const ClipKernel clips = ChooseClips(dtype_);
  return CudaStatus("computing norms",
                    Enqueue(clips, call_.norm_blocks_, 256, stream_, parameters_, call_.packed_));
}

Status CudaCollection::Launcher::ClearCounters() {
  if (call_.plan_.zeroed_bytes == 0) return Status();
  return ClearOnDevice(counters_, call_.plan_.zeroed_bytes, stream_);
}

Status CudaCollection::Launcher::Pool() {
  for (int64_t g = 0; g < call_.num_groups_; ++g) {
    const CudaTables& group = call_.groups_[g];
    parameters_.first = first_[g];
    parameters_.count = IsShared(group) ? 1 : static_cast<int32_t>(group.count);
    const Kernel kernel =
        group.checks_only ? CheckTables : ChooseTables(dtype_, group.vector_bytes);
    if (!kernel) return Error(Code::kInternal, "no kernel reads %d bytes", group.vector_bytes);
    const Status status =
        CudaStatus("pooling", Enqueue(kernel, group.blocks, group.threads, stream_, parameters_));
    if (!status.ok()) return status;
  }
  return Status();
}

Status CudaCollection::Launch(void* scratch, LucidBoundsError* error, void* stream) const {
  if (num_groups_ == 0) return Status();
  Launcher launcher(*this, scratch, error, stream);
  Status status = launcher.ListJobs();
  if (status.ok()) status = launcher.StoreJobs();
  if (status.ok()) status = launcher.ComputeClips();
  if (status.ok()) status = launcher.ClearCounters();
  return status.ok() ? launcher.Pool() : status;
}

}  // namespace lucid
