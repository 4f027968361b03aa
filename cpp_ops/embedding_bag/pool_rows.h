// The interface between embedding_bag.cc and the loops in pool_rows-inl.h. Internal.
#pragma once

#include <stdint.h>

#include "base/isa.h"

namespace lucid {

// A longer bag is cut into pieces of this many positions.
constexpr int64_t kPiece = 1024;

// A row of a quantized table is (value - zero) * scale + shift.
struct Affine {
  float scale, zero, shift;
};

// What mode divides by where by_weights: the sum of the weights of the positions [begin, end), or
// of their squares.
struct PoolJob;
using WeightSum = double (*)(const PoolJob& job, int64_t begin, int64_t end);

// An EmbeddingBag call, checked but for the values of the indices.
struct PoolJob {
  const char* weight;
  const char* indices;
  const char* offsets;             // null: two-dimensional indices
  const char* per_sample_weights;  // or null
  const char* scale;               // of the rows of a quantized table, scale_stride bytes apart
  const char* zero_point;          // likewise, or null
  const char* bias;                // likewise, or null
  char* output;
  int64_t rows, columns;  // V, D
  int64_t row_bytes;      // from one row of the table to the next
  double table_bytes;     // of all tables that the call reads
  int64_t output_row_bytes,
      output_stride;  // what a row of the output has, and from one to the next
  int64_t scale_stride;
  int64_t num_offsets, num_positions, bag_length;
  int64_t last_position;  // the last one that belongs to a bag
  int64_t padding;        // in [0, V), or -1
  bool skips_negative;    // an index below 0 is skipped, else it is bad
  bool by_weights;        // mean and sqrtn divide by a sum of weights, else by the count
  double max_norm, norm_type;
  // |row|_p for a p without a loop of its own, in the type of the accumulators. affine is null
  // except for quantized tables.
  double (*general_norm)(const PoolJob& job, const char* row, const Affine* affine);
  WeightSum weight_sum;
  int32_t dtype, index_type, offset_type, mode;
  int32_t scale_type, output_type;  // the latter is dtype except for quantized tables
};

constexpr int64_t kNoBadPosition = INT64_MAX;

struct PoolKernel {
  // What PoolJob::weight_sum is to be for a job whose other fields are set.
  WeightSum (*weight_sum)(const PoolJob& job);

  // Computes the output rows of the bags [first, last), except bags longer than a piece.
  // Stops at the lowest position whose index is outside the table and returns it, or returns
  // kNoBadPosition. `ahead`: this thread has done the bags before, and so has fetched the first
  // rows of these, as far as it ever fetches ahead.
  int64_t (*bags)(const PoolJob& job, int64_t first, int64_t last, bool ahead);

  // Pools positions [begin, end), at most kPiece, into a row of accumulators, neither rounded nor
  // divided. *count is how many there are, without the padded ones; if it is 0, the row is left as
  // it was. Returns as above.
  int64_t (*piece)(const PoolJob& job, int64_t begin, int64_t end, char* row, int64_t* count);

  // The clip of a row that is not quantized: the factor to multiply it with, 1 for most.
  double (*clip)(const PoolJob& job, const char* row);
};

const PoolKernel& PoolKernelOf(Isa isa);

// Sets general_norm and weight_sum, by the other fields.
void SetFunctions(const PoolKernel& kernel, PoolJob* job);

}  // namespace lucid
