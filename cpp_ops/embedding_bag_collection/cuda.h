// The bags of several tables on CUDA, in one output: the contract of EmbeddingBagCollectionArgs
// over device memory, with the bits that each table would have alone (embedding_bag/cuda.h says
// which of the CPU's they are). Quantized tables are not supported.
//
// All tables that are read in vectors of one width share a launch. So pooling takes one to four
// launches, whatever the number of tables. With max_norm there is one more before them, and one for
// tables without columns. The tables' descriptions travel in the parameters of a launch, or, for
// more tables than fit there, in scratch memory that launches before it write. Nothing is copied
// from the host, nothing waits for the device, and nothing is allocated there.
//
// Bad values are reported as by the CPU's kernel: offsets of any table before indices, and those of
// a lower table first.
#pragma once

#include <stdint.h>

#include "embedding_bag/cuda.h"

// Plain numbers that depend on the arguments alone, for callers and tests.
typedef struct LucidCudaCollectionPlan {
  int64_t size_bytes;  // sizeof(LucidCudaCollectionPlan)
  int64_t num_bags, columns;
  int64_t launches;  // of kernels; 0: there is nothing to do
  int64_t pool_launches;
  int64_t zeroed_bytes;  // of scratch, from its start
  int64_t scratch_bytes;
} LucidCudaCollectionPlan;

#ifdef __cplusplus

#include <memory>

namespace lucid {

// The parameters of a launch hold so many tables; more are written to scratch memory.
constexpr int64_t kTablesOfLaunch = 12;
constexpr int64_t kCudaJobBytes = 336;
constexpr int64_t kMostCudaTables = 1 << 14;

// One table, or the bags of all packed tables as one, and its place among the others.
struct CudaTable {
  EmbeddingBagArgs args = {};
  LucidCudaPlan plan = {};
  int64_t number = 0;
  int64_t group = -1;  // of CudaCollection::groups; -1: there is nothing to do
  int64_t first_block = 0, first_norm_block = 0;
  int64_t counters_at = 0, others_at = 0, clips_at = -1;  // in scratch; -1: none
};

// What one launch does.
struct CudaTables {
  bool checks_only = false;
  int32_t vector_bytes = 0;
  int64_t count = 0;    // of tables
  int64_t vectors = 0;  // the most that a row has
  int64_t blocks = 0;
  int32_t threads = 0;
  CudaTable all;  // of packed tables
};

// A call, planned. Its memory is the host's.
class CudaCollection {
 public:
  // Checks everything that can be checked without looking at the device. The arguments' tables are
  // copied.
  Status Plan(const EmbeddingBagCollectionArgs& args);

  // Plans a call that was checked but for what only a GPU asks for; sizes are what the check said.
  Status PlanChecked(const EmbeddingBagCollectionArgs& args, const CollectionSizes& sizes);

  const LucidCudaCollectionPlan& plan() const { return plan_; }

  // Enqueues the work, as LaunchCudaEmbeddingBag does.
  Status Launch(void* scratch, LucidBoundsError* error, void* stream) const;

 private:
  class Launcher;

  static constexpr int64_t kMostGroups = 5;  // four widths, and the checks

  Status PlanTables(const EmbeddingBagCollectionArgs& args);
  Status PlanGroups();
  Status PlaceTable(double threads, CudaTables* group, CudaTable* table);
  Status PlanScratch();
  CudaTables* GroupOf(const CudaTable& table);

  LucidCudaCollectionPlan plan_ = {};
  bool packed_ = false;
  int64_t num_tables_ = 0, num_groups_ = 0, num_jobs_ = 0, norm_blocks_ = 0, jobs_at_ = 0;
  std::unique_ptr<CudaTable[]> tables_;
  CudaTables groups_[kMostGroups];
};

}  // namespace lucid

#endif  // __cplusplus
