// How a call of EmbeddingBag is divided among threads, and the layout of its scratch memory. Does
// not depend on CUDA.
#include <algorithm>
#include <climits>

#include "base/types.h"
#include "embedding_bag/cuda.h"

namespace lucid {
namespace {

// The widths that a table can be read in, the widest first: those where rows and table are aligned
// to it, the last one an element (of 4 bits: a byte with two). Wide vectors of 4-bit values would
// need too many registers.
constexpr int32_t kWidths[][4] = {{16, 8, 4, 4}, {16, 8, 4, 2}, {16, 8, 4, 2}, {16, 8, 8, 8},
                                  {16, 8, 4, 1}, {16, 8, 4, 1}, {8, 2, 1, 1},  {8, 2, 1, 1}};
constexpr int32_t kElementBytes[] = {4, 2, 2, 8, 1, 1, 1, 1};

// Fewer threads to a block spread a small call over more multiprocessors.
constexpr int64_t kLargeCall = 132 * 2048;
constexpr int32_t kMostThreads = 256, kFewThreads = 64;

constexpr int64_t kNormThreads = 256;
// Far from where the arithmetic below would overflow, and past any device.
constexpr int64_t kMostPositions = int64_t{1} << 48;

int64_t CeilDiv(int64_t a, int64_t b) { return a / b + (a % b != 0); }
int64_t RoundUp(int64_t a, int64_t b) { return CeilDiv(a, b) * b; }

Status CheckAddresses(const EmbeddingBagArgs& a) {
  const int64_t element = kElementBytes[a.dtype], result = kElementBytes[a.output_type];
  Status status = CheckAddress("weight", a.weight, element);
  if (status.ok()) status = CheckAddress("indices", a.indices, a.index_type == kInt64 ? 8 : 4);
  if (status.ok() && a.indices_rank == 1) {
    status = CheckAddress("offsets", a.offsets, a.offset_type == kInt64 ? 8 : 4);
  }
  if (status.ok()) status = CheckAddress("per_sample_weights", a.per_sample_weights, result);
  if (status.ok()) status = CheckAddress("output", a.output, result);
  if (!status.ok() || a.dtype < kInt8) return status;
  const int32_t scale = a.scale_type == kFloat16 ? 2 : 4;
  if (a.scale_stride % scale) {
    return InvalidArgument("scale_stride = %d is not a multiple of the size of a scale, %d bytes",
                           a.scale_stride, scale);
  }
  status = CheckAddress("scale", a.scale, scale);
  if (status.ok()) status = CheckAddress("zero_point", a.zero_point, scale);
  if (status.ok()) status = CheckAddress("bias", a.bias, scale);
  return status;
}

}  // namespace

Status CheckAddress(const char* name, const void* p, int64_t bytes) {
  if (reinterpret_cast<uintptr_t>(p) % static_cast<uintptr_t>(bytes) == 0) return Status();
  return InvalidArgument(
      "%s is at %p, which is not a multiple of the size of its elements, %lld bytes", name, p,
      static_cast<long long>(bytes));
}

Status TooLargeForCuda() {
  return InvalidArgument("the call is too large for one launch on a GPU");
}

Status PlanCudaEmbeddingBag(const EmbeddingBagArgs& a, LucidCudaPlan* plan) {
  int64_t num_bags;
  const Status status = CheckEmbeddingBag(a, &num_bags);
  if (!status.ok()) return status;
  // Where this overflows, the plan finds the columns to be too many.
  const int64_t stride = RowBytes(a.output_type, a.weight_shape[1]);
  return PlanCheckedCudaEmbeddingBag(a, num_bags, stride, plan);
}

Status PlanCheckedCudaEmbeddingBag(const EmbeddingBagArgs& a, int64_t num_bags,
                                   int64_t output_stride, LucidCudaPlan* plan) {
  LucidCudaPlan p = {};
  p.size_bytes = sizeof(p);
  p.num_bags = num_bags;
  p.padding = PaddedRow(a);
  Status status = CheckAddresses(a);
  if (!status.ok()) return status;
  if (a.row_stride != 0) return InvalidArgument("row_stride = %d must be 0 on a GPU", a.row_stride);

  const bool flat = a.indices_rank == 1;
  const int64_t columns = a.weight_shape[1], length = flat ? 0 : a.indices_shape[1];
  if (length > 0 && a.indices_shape[0] > kMostPositions / length) return TooLargeForCuda();
  p.num_positions = flat ? a.indices_shape[0] : a.indices_shape[0] * length;
  if (p.num_positions > kMostPositions || columns > kMostPositions) return TooLargeForCuda();

  if (columns == 0 || p.num_bags == 0) {
    // No row is read. The offsets and, if there are bags, the indices are still checked.
    const int64_t checked = std::max(flat ? a.num_offsets : 0, p.num_bags ? p.num_positions : 0);
    p.check_blocks = CeilDiv(checked, kCheckThreads);
    if (p.check_blocks > INT32_MAX) return TooLargeForCuda();
    *plan = p;
    return status;
  }
  if (p.num_bags > kMostPositions) return TooLargeForCuda();

  const bool nibbles = a.dtype == kInt4 || a.dtype == kUint4;
  const int64_t row_bytes =
      nibbles ? columns / 2 + columns % 2 : columns * int64_t{kElementBytes[a.dtype]};
  // The kernel numbers rows, and the bytes of one, in 32 bits.
  if (a.weight_shape[0] >= UINT32_MAX || row_bytes > UINT32_MAX) return TooLargeForCuda();
  const uintptr_t begin = reinterpret_cast<uintptr_t>(a.weight);
  for (const int32_t width : kWidths[a.dtype]) {
    p.vector_bytes = width;
    if (row_bytes % width == 0 && begin % static_cast<uintptr_t>(width) == 0) break;
  }
  p.vectors = row_bytes / p.vector_bytes;
  p.vector_elements = nibbles ? 2 * p.vector_bytes : p.vector_bytes / kElementBytes[a.dtype];
  const int64_t store =
      std::min<int64_t>(16, int64_t{p.vector_elements} * kElementBytes[a.output_type]);
  p.vector_output = columns % p.vector_elements == 0 &&
                    reinterpret_cast<uintptr_t>(a.output) % static_cast<uintptr_t>(store) == 0 &&
                    output_stride % store == 0;

  // Of ragged bags: the first chunk of each bag, and then room for the others wherever they are.
  p.bag_chunks = flat ? 0 : std::max<int64_t>(1, CeilDiv(length, kChunk));
  p.chunks = flat ? p.num_positions / kChunk + p.num_bags : p.num_bags * p.bag_chunks;
  if (p.chunks > kMostPositions) return TooLargeForCuda();
  status = PlanCudaBlocks(CudaThreads(p), &p);
  if (!status.ok()) return status;

  const int64_t accumulator = a.dtype == kFloat64 ? 8 : 4;
  status = PlanCudaPartials(flat ? p.num_positions : length, accumulator, &p);
  if (!status.ok()) return status;
  if (a.max_norm <= 1.7976931348623157e308) {  // not infinity
    p.clips_at = p.scratch_bytes;
    p.scratch_bytes += RoundUp(p.num_positions * accumulator, 256);
    p.norm_blocks = CeilDiv(p.num_positions, kNormThreads / (64 / accumulator));
    if (p.norm_blocks > INT32_MAX) return TooLargeForCuda();
  }
  *plan = p;
  return status;
}

double CudaThreads(const LucidCudaPlan& plan) {
  return static_cast<double>(plan.chunks) * static_cast<double>(plan.vectors);
}

Status PlanCudaBlocks(double threads, LucidCudaPlan* plan) {
  LucidCudaPlan& p = *plan;
  const int32_t target = threads < static_cast<double>(kLargeCall) ? kFewThreads : kMostThreads;
  p.block_vectors = static_cast<int32_t>(std::min<int64_t>(p.vectors, target));
  p.block_chunks = target / p.block_vectors;
  p.block_threads = static_cast<int32_t>(RoundUp(p.block_vectors * p.block_chunks, 32));
  p.column_blocks = CeilDiv(p.vectors, p.block_vectors);
  const int64_t chunk_blocks = CeilDiv(p.chunks, p.block_chunks);
  if (p.column_blocks > INT32_MAX || chunk_blocks > INT32_MAX / p.column_blocks)
    return TooLargeForCuda();
  p.blocks = chunk_blocks * p.column_blocks;
  return Status();
}

Status PlanCudaPartials(int64_t longest, int64_t accumulator_bytes, LucidCudaPlan* plan) {
  LucidCudaPlan& p = *plan;
  p.scratch_bytes = 0;
  if (longest <= kChunk) return Status();
  // A bag of more than one chunk has, of these, the rows from begin / (kChunk / 2) on for its
  // chunks, and from begin / kChunk on for its pieces and one more: bags of more than kChunk
  // positions never meet there. The weights of the pieces, a double each, end where the partials
  // begin, the first one last.
  const int64_t row = p.vectors * p.vector_elements * accumulator_bytes;
  const int64_t chunk_rows = p.num_positions / (kChunk / 2) + 2;
  const int64_t piece_rows = p.num_positions / kChunk + 2;
  if (static_cast<double>(chunk_rows) * static_cast<double>(row) > 9e18 / 4) {
    return TooLargeForCuda();
  }
  p.zeroed_bytes = piece_rows * p.vectors * 4;
  p.counts_at = RoundUp(p.zeroed_bytes, 256);
  p.piece_counts_at = RoundUp(p.counts_at + chunk_rows * 4, 256);
  p.partials_at = RoundUp(p.piece_counts_at + piece_rows * 4 + (piece_rows + 1) * 8, 256);
  p.scratch_bytes = RoundUp(p.partials_at + chunk_rows * row, 256);
  return Status();
}

Status BoundsStatus(const LucidBoundsError& error) {
  if (error.inverse == 0) return Status();
  if (error.recorded != error.inverse) {
    return Error(Code::kInternal, "the kernel stopped while it recorded an error");
  }
  const uint64_t place = ~error.inverse;
  if (place == kEntriesPlace) {
    return InvalidArgument("num_entries = %lld is not %lld", static_cast<long long>(error.limit),
                           static_cast<long long>(error.value));
  }
  const int64_t position = static_cast<int64_t>(place % kTablePlace);
  EmbeddingBagArgs args = {};
  args.indices_rank = error.length < 0 ? 1 : 2;
  args.indices_shape[0] = error.limit;
  args.indices_shape[1] = error.length;
  args.weight_shape[0] = error.limit;
  const Status status = place < kIndexPlace
                            ? InvalidOffset(args, position, error.value, error.previous)
                            : InvalidIndex(args, position, error.value);
  return error.table == 0 ? status : InTable(int64_t{error.table} - 1, status);
}

}  // namespace lucid
