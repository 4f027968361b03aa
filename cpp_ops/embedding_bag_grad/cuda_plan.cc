// The plan of a gradient on a GPU: which positions are sorted, and the layout of its scratch
// memory. Does not depend on CUDA.
#include <algorithm>
#include <limits>

#include "base/types.h"
#include "embedding_bag_grad/cuda.h"

namespace lucid {
namespace {

constexpr int64_t kLine = 256;  // what a part of the scratch memory begins at a multiple of

int64_t RoundUp(int64_t a, int64_t b) { return (a + b - 1) / b * b; }

}  // namespace

int BitsOf(int64_t x) {
  int bits = 1;
  while (bits < 63 && x >> bits > 0) ++bits;
  return bits;
}

Status CudaGrad::CheckAddresses() const {
  const int64_t element = RowBytes(args_.forward.dtype, 1);
  Status status = CheckAddress("grad_output", args_.grad_output, element);
  if (status.ok() && !args_.sparse) {
    status = CheckAddress("grad_weight", args_.grad_weight, element);
  }
  if (status.ok() && args_.sparse) status = CheckAddress("rows", args_.rows, 8);
  if (status.ok() && args_.sparse) status = CheckAddress("values", args_.values, element);
  if (!status.ok()) return status;
  return CheckAddress("grad_per_sample_weights", args_.grad_per_sample_weights, element);
}

Status CudaGrad::Plan(const EmbeddingBagGradArgs& args, bool counted) {
  plan_ = {};
  plan_.size_bytes = sizeof(plan_);
  int64_t num_bags;
  const Status status = CheckEmbeddingBagGrad(args, &num_bags);
  return status.ok() ? PlanChecked(args, num_bags, counted) : status;
}

// The dense gradient: bags of rows of grad_output, one for every row of the table, or, if those are
// more than twice the positions, for every position. (A row without positions takes a search and
// zeros; a position that is not the first of its row takes the same.)
Status CudaGrad::PlanRows() {
  const EmbeddingBagArgs& a = args_.forward;
  const int64_t rows = a.weight_shape[0];
  plan_.row_bags = plan_.num_positions < rows / 2 ? plan_.num_positions : rows;
  EmbeddingBagArgs& r = rows_args_;
  r = EmbeddingBagArgs();
  r.size_bytes = sizeof(r);
  r.weight = args_.grad_output;
  r.output = args_.grad_weight;
  r.weight_shape[0] = plan_.num_bags;
  r.weight_shape[1] = a.weight_shape[1];
  r.indices_shape[0] = plan_.num_positions;
  r.num_offsets = plan_.row_bags + 1;
  r.max_norm = std::numeric_limits<double>::infinity();
  r.norm_type = 2;
  r.padding_idx = kNoPadding;
  r.dtype = r.output_type = a.dtype;
  r.index_type = r.offset_type = kInt32;
  r.mode = args_.scale_grad_by_freq ? kMean : kSum;
  r.indices_rank = 1;
  r.include_last_offset = 1;
  const int64_t stride = RowBytes(r.output_type, r.weight_shape[1]);
  return PlanCheckedCudaEmbeddingBag(r, plan_.row_bags, stride, &rows_);
}

Status CudaGrad::PlanChecked(const EmbeddingBagGradArgs& args, int64_t num_bags, bool counted) {
  args_ = args;
  args_.forward.output = nullptr;
  const EmbeddingBagArgs& a = args_.forward;
  LucidCudaGradPlan& p = plan_;
  p = {};
  p.size_bytes = sizeof(p);
  p.num_bags = num_bags;
  p.padding = PaddedRow(a);
  parts_ = CudaGradParts();
  rows_ = {};
  sort_bytes_ = 0;
  const bool flat = a.indices_rank == 1;
  const int64_t columns = a.weight_shape[1];
  Status status = CheckAddresses();
  if (status.ok()) {
    const int64_t stride = RowBytes(a.output_type, columns);
    status = PlanCheckedCudaEmbeddingBag(a, num_bags, stride, &bags_);
  }
  if (!status.ok()) return status;

  p.num_positions = bags_.num_positions;
  // Positions and bags are numbered in 32 bits.
  if (p.num_positions > INT32_MAX || (p.num_positions > 0 && p.num_bags > INT32_MAX)) {
    return TooLargeForCuda();
  }
  // The table's rows are numbered, and one more is what positions have that give nothing.
  if (a.weight_shape[0] >= UINT32_MAX) return TooLargeForCuda();
  const bool skips = p.padding >= 0 || a.negative == kSkip;
  const bool asks = skips || (flat && a.include_last_offset);
  p.num_entries = asks && p.num_positions > 0 ? -1 : p.num_positions;
  if (args_.sparse && counted &&
      (p.num_entries >= 0 ? args_.num_entries != p.num_entries
                          : args_.num_entries < 0 || args_.num_entries > p.num_positions)) {
    // What the device counts is not known here, but how many there are at most.
    return InvalidArgument(
        "num_entries = %lld is not %s%lld", static_cast<long long>(args_.num_entries),
        p.num_entries >= 0 ? "" : "in [0, N] for N = ", static_cast<long long>(p.num_positions));
  }
  if (p.num_positions == 0) return status;  // there is nothing but zeros
  p.row_sort = (!args_.sparse && columns > 0) || args_.scale_grad_by_freq;
  p.entry_sort = args_.sparse && p.num_entries < 0;

  if (!args_.sparse && columns > 0) {
    status = PlanRows();
    if (!status.ok()) return status;
  }
  return PlanScratch();
}

Status CudaGrad::PlanScratch() {
  const EmbeddingBagArgs& a = args_.forward;
  LucidCudaGradPlan& p = plan_;
  const int64_t n = p.num_positions, columns = a.weight_shape[1];
  const int64_t accumulator = a.dtype == kFloat64 ? 8 : 4;
  const bool winners = a.mode == kMax && columns > 0;
  const bool clips = bags_.norm_blocks > 0 && (winners || args_.grad_per_sample_weights);
  // The forward call's plan had room for D of them, so that this cannot overflow much.
  if (winners && static_cast<double>(p.num_bags) * static_cast<double>(columns) > 9e18 / 16) {
    return TooLargeForCuda();
  }
  int64_t end = 0;
  const auto add = [&](bool wanted, int64_t bytes, int64_t* at) {
    if (!wanted) return;
    *at = end;
    end += RoundUp(bytes, kLine);
  };
  const bool counts = Divides(a.mode);
  const bool skips = p.padding >= 0 || a.negative == kSkip;
  add(counts && skips, p.num_bags * 4, &parts_.skipped);
  add(rows_.zeroed_bytes > 0, rows_.zeroed_bytes, &parts_.counters);
  p.zeroed_bytes = end;
  add(rows_.zeroed_bytes > 0, rows_.scratch_bytes - rows_.counts_at, &parts_.others);
  const bool sorts = p.row_sort || p.entry_sort;
  add(true, n * 4, &parts_.bag_of);
  add(sorts, n * 4, &parts_.keys);
  add(sorts, n * 4, &parts_.sorted_keys);
  add(sorts, n * 4, &parts_.positions);
  add(sorts, n * 4, &parts_.sorted_positions);
  add(rows_.blocks > 0, n * 4, &parts_.sorted_bags);
  add(rows_.blocks > 0, (p.row_bags + 1) * 4, &parts_.row_starts);
  add(args_.sparse && args_.scale_grad_by_freq, n * 4, &parts_.frequencies);
  add(counts, p.num_bags * accumulator, &parts_.divisors);
  add(DividesByWeights(a) && args_.grad_per_sample_weights, n * accumulator, &parts_.dots);
  add(winners, p.num_bags * columns * 4, &parts_.winners);
  add(clips, n * accumulator, &parts_.clips);
  if (sorts) {
    int64_t by_row = 0, by_entry = 0;
    Status status;
    if (p.row_sort) status = PlanCudaSort(n, BitsOf(a.weight_shape[0]), &by_row);
    if (status.ok() && p.entry_sort) status = PlanCudaSort(n, 1, &by_entry);
    if (!status.ok()) return status;
    sort_bytes_ = std::max(by_row, by_entry);
    add(true, sort_bytes_, &parts_.sort);
  }
  p.scratch_bytes = end;
  return Status();
}

}  // namespace lucid
