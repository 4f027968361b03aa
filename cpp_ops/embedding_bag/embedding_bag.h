// EmbeddingBag: sums, means or maxima of the rows of a table, one result per bag of row numbers.
//
//   rows(i)   = the positions k of bag i with indices[k] != padding_idx
//   row(k)    = weight[indices[k]] * clip(indices[k]) * (per_sample_weights[k] or 1)
//   clip(r)   = max_norm / (norm(r) + 1e-7) if norm(r) > max_norm, else 1;  norm(r) = |weight[r]|_p
//   output[i] = sum row(k)  |  sum row(k) / max(1, |rows(i)|)  |  max row(k)   over k in rows(i)
//   output[i] = 0 where rows(i) is empty
//
// A quantised table has codes for weight, and weight[r] above is
//
//   (codes[r] - zero_point[r]) * scale[r] + bias[r]
//
// with a scale per row and a zero_point, a bias or neither, in float. Its output and its
// per_sample_weights are float or float16.
//
// Bag i is the positions offsets[i] .. offsets[i + 1] (the last one ends at N, or at offsets[B]
// with include_last_offset), or row i of two-dimensional indices. Positions that belong to no bag
// are never read.
//
// The sums are float (double for a double table), and their order depends on the bag alone, never
// on threads or instruction set, so the result has the same bits everywhere:
//   - rows are added one after the other in groups of 64 rows (padded ones do not count), and the
//     groups' sums one after the other;
//   - a bag of more than 1024 positions is cut into pieces of 1024 positions (padded ones count),
//     and the pieces' sums are added in double, from the first to the last.
// A result that is NaN is always the one quiet NaN with an empty payload.
//
// Nothing here throws, prints or exits, and no value in indices or offsets leads to an access
// outside the arrays: it is refused, and the lowest refused position is the one that is named.
#pragma once

#include <stdint.h>

// The mirror of this struct in other languages: words of 8 bytes and then eight of 4 in this order,
// without padding; the table of byte offsets stands in c_api.h.
typedef struct EmbeddingBagArgs {
  int64_t size_bytes;              // sizeof(EmbeddingBagArgs); another value is refused
  const void* weight;              // [V, D] of dtype. Every data pointer may be misaligned. Rows of
                                   // 4-bit codes take (D + 1) / 2 bytes, the first code in the low
                                   // half of the first byte.
  const void* indices;             // [N] or [B, L] of index_type
  const void* offsets;             // [num_offsets] of offset_type; unused if indices_rank is 2
  const void* per_sample_weights;  // of output_type, shaped like indices; or NULL
  void* output;                    // [B, D] of output_type; may not overlap the inputs
  const void* scale;               // [V] of scale_type for a quantised table, else NULL
  const void* zero_point;          // likewise, or NULL
  const void* bias;                // likewise, or NULL; not with zero_point
  int64_t weight_shape[2];         // V, D
  int64_t indices_shape[2];        // N, 0 or B, L
  int64_t num_offsets;             // B, or B + 1 with include_last_offset
  double max_norm;                 // >= 0; infinity: none
  double norm_type;                // > 0; infinity too
  int64_t padding_idx;             // in [-V, V); INT64_MIN: none
  int32_t dtype;                   // 0 float32, 1 float16, 2 bfloat16, 3 float64; codes: 4 int8,
                                   // 5 uint8, 6 int4, 7 uint4
  int32_t index_type;              // 0 int32, 1 int64
  int32_t offset_type;             // 0 int32, 1 int64
  int32_t mode;                    // 0 sum, 1 mean, 2 max
  int32_t indices_rank;            // 1 or 2
  int32_t include_last_offset;     // 0 or 1; ignored if indices_rank is 2
  int32_t scale_type;              // of scale, zero_point and bias: 0 float32, 1 float16
  int32_t scale_stride;            // bytes from one scale (zero_point, bias) to the next
  int32_t output_type;             // dtype; 0 float32 or 1 float16 if dtype is one of codes
  int32_t row_stride;              // bytes from one row of weight to the next; 0: as many as it has
} EmbeddingBagArgs;

// The bags of several tables, beside each other in one output: each has the bits that it would
// have alone. Five words of 8 bytes.
typedef struct EmbeddingBagCollectionArgs {
  int64_t size_bytes;              // sizeof(EmbeddingBagCollectionArgs); another value is refused
  const EmbeddingBagArgs* tables;  // [num_tables] of one output_type; their output is not looked at
  int64_t num_tables;              // at least 1
  void* output;                    // [B, sum of D]: first the columns of tables[0]
  int64_t packed;                  // 1: indices, offsets and per_sample_weights of tables[0] hold
                                   // those of all, whose own are not looked at. Bag i of table t is
                                   // offsets[t * B + i] .. offsets[t * B + i + 1] of [T * B + 1],
                                   // and indices_rank and include_last_offset must be 1
                                   // 0: every table has its own, of the same B
} EmbeddingBagCollectionArgs;

#ifdef __cplusplus

#include <stddef.h>

#include "base/isa.h"
#include "base/parallel.h"
#include "base/shape.h"
#include "base/status.h"

namespace lucid {

enum BagMode : int32_t { kSum = 0, kMean = 1, kMax = 2 };

constexpr int64_t kNoPadding = INT64_MIN;

// What a row of so many elements of a DType takes.
int64_t RowBytes(int32_t dtype, int64_t columns);

// The checks that need no input: mode, max_norm, norm_type and whether weights fit the mode.
Status CheckEmbeddingBagAttributes(const EmbeddingBagArgs& args, bool has_per_sample_weights);

// Checks the ranks and shapes against args->indices_rank, and fills in the shape fields.
// offsets and per_sample_weights are null where the op has none.
Status SetEmbeddingBagShapes(TensorShape weight, TensorShape indices, const TensorShape* offsets,
                             const TensorShape* per_sample_weights, EmbeddingBagArgs* args);

// B, the number of bags and of output rows. Refuses an empty offsets that needs an entry.
Status CountBags(const EmbeddingBagArgs& args, int64_t* num_bags);

// Checks everything but the values of offsets and indices. *num_bags is B, *padding the padded row
// in [0, V), or -1.
Status CheckEmbeddingBag(const EmbeddingBagArgs& args, int64_t* num_bags, int64_t* padding);

// Checks the values of offsets. *longest is the length of the longest bag.
Status CheckOffsets(const EmbeddingBagArgs& args, int64_t* longest);

// The refusals of a value: offsets[i], which stands behind `previous`, and the index at a position.
Status RefuseOffset(const EmbeddingBagArgs& args, int64_t i, int64_t offset, int64_t previous);
Status RefuseIndex(const EmbeddingBagArgs& args, int64_t position, int64_t index);

// Checks everything and computes.
Status RunEmbeddingBag(const EmbeddingBagArgs& args, Isa isa, const ParallelFor& parallel_for);

// The status, with the table that it is about.
Status InTable(int64_t t, const Status& status);

// The arguments of table t: in a packed collection with the indices, offsets and per_sample_weights
// of all.
EmbeddingBagArgs ArgsOfTable(const EmbeddingBagCollectionArgs& args, int64_t t);

// Checks everything about table t, whose arguments `table` are, but the values of offsets and
// indices. *num_bags is B, *padding the padded row in [0, V), or -1.
Status CheckTableOf(const EmbeddingBagCollectionArgs& args, int64_t t,
                    const EmbeddingBagArgs& table, int64_t* num_bags, int64_t* padding);

// Checks everything but the values of offsets and indices. *num_bags is B, *columns the sum of D.
Status CheckEmbeddingBagCollection(const EmbeddingBagCollectionArgs& args, int64_t* num_bags,
                                   int64_t* columns);

// Checks everything, of all tables, and computes, all tables at once.
Status RunEmbeddingBagCollection(const EmbeddingBagCollectionArgs& args, Isa isa,
                                 const ParallelFor& parallel_for);

// How often a call entered the kernel of this instruction set in this process.
int64_t EmbeddingBagRuns(Isa isa);

}  // namespace lucid

#endif  // __cplusplus
