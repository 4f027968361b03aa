// The gradient of EmbeddingBag on CUDA: the contract of embedding_bag_grad.h over device memory, in
// the CPU's order of additions, and so with its bits. (The exception is the p of norms without a
// loop of their own, whose powers differ in the last bits.) No number is added up atomically but
// counts, so the bits do not depend on the order in which blocks run.
//
// Every position is given its row and its bag, and the positions are sorted by row, those of a row
// in their order. Then what a row of the table gets is the bag sum, over its positions, of rows of
// grad_output, and is pooled by the bags' own plan: a dense gradient is an EmbeddingBag of V bags.
// Where most rows get nothing it is one of N bags, and the table is cleared first: of the sorted
// positions of a row the first is a bag of them all, and the others are empty bags.
//
// No value in offsets or indices leads to an access outside the arrays; the first bad value is
// recorded in a LucidBoundsError. Nothing waits for the device, and nothing is allocated there.
#pragma once

#include <stdint.h>

#include "embedding_bag/cuda.h"
#include "embedding_bag_grad/embedding_bag_grad.h"

// Plain numbers that depend on the arguments alone, for callers and tests.
typedef struct LucidCudaGradPlan {
  int64_t size_bytes;            // sizeof(LucidCudaGradPlan)
  int64_t num_bags;              // B
  int64_t padding;               // in [0, V), or -1
  int64_t num_positions;         // N, or B * L; below 2^31
  int64_t num_entries;           // what a sparse gradient has; -1: the device counts them
  int64_t row_sort, entry_sort;  // 1: the positions are sorted by row; those that give something
                                 // are brought to the front
  int64_t row_bags;              // that a dense gradient is summed as: V, N or 0
  int64_t zeroed_bytes;          // of scratch, from its start
  int64_t scratch_bytes;
} LucidCudaGradPlan;

#ifdef __cplusplus

namespace lucid {

// The layout of the scratch memory: the offset of each part in bytes, or -1 if it is not needed.
struct CudaGradParts {
  int64_t skipped = -1;           // [B] uint32: skipped positions of each bag; zeros at first
  int64_t counters = -1;          // of rows' parts; zeros at first
  int64_t others = -1;            // the rest of what SetPartials needs
  int64_t bag_of = -1;            // [N] uint32; kNoBag for a position that gives nothing
  int64_t keys = -1;              // [N] uint32: what is sorted, before and
  int64_t sorted_keys = -1;       // after
  int64_t positions = -1;         // [N] uint32: 0, 1, 2, ... and
  int64_t sorted_positions = -1;  // sorted
  int64_t sorted_bags = -1;       // [N] uint32, of sorted positions
  int64_t row_starts = -1;        // [row_bags + 1] uint32, in sorted positions
  int64_t frequencies = -1;       // [N] uint32: of the row at every position
  int64_t divisors = -1;          // [B] accumulators
  int64_t dots = -1;              // [N] accumulators: grad_per_sample_weights but for the divisors
  int64_t winners = -1;           // [B, D] int32: the position of the maximum
  int64_t clips = -1;             // [N] accumulators
  int64_t sort = -1;              // what sorting needs
};

// A call, planned.
class CudaGrad {
 public:
  // Checks everything that can be checked without looking at what the pointers point to. What
  // num_entries must be is checked too, as far as the sizes tell. `counted` is false for a caller
  // that has yet to ask how many entries there are.
  Status Plan(const EmbeddingBagGradArgs& args, bool counted = true);

  // Plans a call that was checked but for num_entries and what only a GPU asks for; num_bags is
  // what the check said.
  Status PlanChecked(const EmbeddingBagGradArgs& args, int64_t num_bags, bool counted = true);

  const LucidCudaGradPlan& plan() const { return plan_; }

  // Enqueues the counting of entries into *num_entries, on the device. Records bad offsets, but no
  // bad index.
  Status LaunchCount(int64_t* num_entries, LucidBoundsError* error, void* stream) const;

  // Enqueues the work, as LaunchCudaEmbeddingBag does.
  Status Launch(void* scratch, LucidBoundsError* error, void* stream) const;

 private:
  class Launcher;

  Status CheckAddresses() const;
  Status PlanRows();
  Status PlanScratch();

  EmbeddingBagGradArgs args_ = {};
  LucidCudaGradPlan plan_ = {};
  LucidCudaPlan bags_ = {};          // of the forward call, for its norms
  EmbeddingBagArgs rows_args_ = {};  // the dense gradient as bags of grad_output
  LucidCudaPlan rows_ = {};
  CudaGradParts parts_;
  int64_t sort_bytes_ = 0;
};

// The interface to the library that sorts. Pairs of keys, of which the lowest `bits` bits count,
// and values; equal keys stay in their order. *bytes is what `scratch` must have; n < 2^31.
Status PlanCudaSort(int64_t n, int bits, int64_t* bytes);
Status LaunchCudaSort(void* scratch, int64_t bytes, const uint32_t* keys, uint32_t* sorted_keys,
                      const uint32_t* values, uint32_t* sorted_values, int64_t n, int bits,
                      void* stream);

// The bits of a number that is not negative; 1 for 0.
int BitsOf(int64_t x);

}  // namespace lucid

#endif  // __cplusplus
