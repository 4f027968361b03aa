// EmbeddingBag: sums, means, maxima or sums over the square root of their number (sqrtn) of rows of
// a table, one result per bag of indices.
//
//   rows(i)   = the positions k of bag i with indices[k] != padding_idx and, where negative is
//   kSkip,
//               indices[k] >= 0
//   row(k)    = weight[indices[k]] * clip(indices[k]) * (per_sample_weights[k] or 1)
//   clip(r)   = max_norm / (norm(r) + 1e-7) if norm(r) > max_norm, else 1;  norm(r) = |weight[r]|_p
//   output[i] = sum row(k)  |  sum row(k) / n(i)  |  max row(k)  |  sum row(k) / sqrt(n(i))
//               over k in rows(i)
//   n(i)      = |rows(i)|; where divisor is kWeights, the sum of per_sample_weights[k] for a mean,
//   and
//               of their squares for sqrtn
//   output[i] = 0 where rows(i) is empty
//
// A quantized table holds small integers q in weight. Then weight[r] above is
//
//   (q[r] - zero_point[r]) * scale[r] + bias[r]
//
// in float, with a scale per row and, if given, a zero_point or a bias per row. Its output and its
// per_sample_weights are float or float16.
//
// Bag i is the positions offsets[i] .. offsets[i + 1], or row i of two-dimensional indices. The
// last bag ends at N, or at offsets[B] with include_last_offset. Positions that belong to no bag
// are never read.
//
// Sums are float (double for a double table). The order of additions depends on the bag alone,
// never on threads or instruction set, so the result has the same bits everywhere:
//   - the rows of a bag are added one after another in groups of 64 (padded positions do not
//     count), and the sums of the groups one after another;
//   - a bag of more than 1024 positions is cut into pieces of 1024 positions (padded ones count),
//     and the sums of the pieces are added in double, from the first to the last;
//   - of quantized rows, (q - zero_point) * scale and the biases are added apart, so a sum is not
//     finite where either of these is not, even if the rows themselves are.
//
// The sum of weights that is divided by is double: of each piece, of the positions 0, 4, 8, ..., of
// 1, 5, 9, ... and so on, skipped ones left out, as (sum 0 + sum 1) + (sum 2 + sum 3); and of those
// the sum, from the first piece to the last.
//
// A result that is NaN is always the one quiet NaN with an empty payload.
//
// Nothing here throws, prints or exits. No value in indices or offsets leads to an access outside
// the arrays: a bad value is an invalid argument, and the message names the first one.
#pragma once

#include <stdint.h>

// For mirrors of this struct in other languages: fields of 8 bytes, then twelve of 4, in this order
// and without padding. c_api.h lists the byte offsets.
typedef struct EmbeddingBagArgs {
  int64_t size_bytes;              // sizeof(EmbeddingBagArgs); any other value is invalid
  const void* weight;              // [V, D] of dtype. Data pointers may be misaligned. Two 4-bit
                                   // values share a byte, the first in the low half: a row takes
                                   // (D + 1) / 2 bytes.
  const void* indices;             // [N] or [B, L] of index_type
  const void* offsets;             // [num_offsets] of offset_type; unused if indices_rank is 2
  const void* per_sample_weights;  // of output_type, shaped like indices; or NULL
  void* output;                    // [B, D] of output_type; may not overlap the inputs
  const void* scale;               // [V] of scale_type for a quantized table, else NULL
  const void* zero_point;          // [V] of scale_type, or NULL
  const void* bias;                // [V] of scale_type, or NULL; not together with zero_point
  int64_t weight_shape[2];         // V, D
  int64_t indices_shape[2];        // N, 0 or B, L
  int64_t num_offsets;             // B, or B + 1 with include_last_offset
  double max_norm;                 // >= 0; infinity: none
  double norm_type;                // > 0; infinity is allowed
  int64_t padding_idx;             // in [-V, V); INT64_MIN: none
  int32_t dtype;                   // 0 float32, 1 float16, 2 bfloat16, 3 float64; quantized:
                                   // 4 int8, 5 uint8, 6 int4, 7 uint4
  int32_t index_type;              // 0 int32, 1 int64
  int32_t offset_type;             // 0 int32, 1 int64
  int32_t mode;                    // 0 sum, 1 mean, 2 max, 3 sqrtn
  int32_t indices_rank;            // 1 or 2
  int32_t include_last_offset;     // 0 or 1; ignored if indices_rank is 2
  int32_t scale_type;              // of scale, zero_point and bias: 0 float32, 1 float16
  int32_t scale_stride;            // bytes from one scale (zero_point, bias) to the next
  int32_t output_type;             // equal to dtype; of a quantized table 0 float32 or 1 float16
  int32_t row_stride;              // bytes from one row of weight to the next; 0: without gaps
  int32_t negative;                // what an index below 0 is: 0 an invalid argument, 1 skipped
  int32_t divisor;  // of mean and sqrtn with per_sample_weights: 0 none, with which these
                    // weights are invalid, 1 the count, 2 the weights
} EmbeddingBagArgs;

// The bags of several tables, concatenated in one output. Each table has the bits that it would
// have in a call of its own. Five fields of 8 bytes.
typedef struct EmbeddingBagCollectionArgs {
  int64_t size_bytes;              // sizeof(EmbeddingBagCollectionArgs); any other value is invalid
  const EmbeddingBagArgs* tables;  // [num_tables], all of one output_type; their output is ignored
  int64_t num_tables;              // at least 1
  void* output;                    // [B, sum of D]: the columns of tables[0] come first
  int64_t packed;                  // 0: every table has indices of its own, for the same B.
                                   // 1: tables[0] has the indices, offsets and per_sample_weights
                                   // of all tables, and those of the others are ignored. Bag i of
                                   // table t is offsets[t * B + i] .. offsets[t * B + i + 1] of
                                   // [T * B + 1]; indices_rank and include_last_offset must be 1.
} EmbeddingBagCollectionArgs;

#ifdef __cplusplus

#include <stddef.h>

#include "base/isa.h"
#include "base/parallel.h"
#include "base/shape.h"
#include "base/status.h"

namespace lucid {

enum BagMode : int32_t { kSum = 0, kMean = 1, kMax = 2, kSqrtn = 3 };

enum Negative : int32_t { kRefuse = 0, kSkip = 1 };
enum Divisor : int32_t { kNone = 0, kCount = 1, kWeights = 2 };

constexpr int64_t kNoPadding = INT64_MIN;

// The bytes of a row of so many elements of a DType.
int64_t RowBytes(int32_t dtype, int64_t columns);

// ---- One table.
//
// A caller that fills in a struct for each call uses RunEmbeddingBag, which checks everything.
//
// A host whose nodes outlive their runs decides once what a node decides, when it creates the
// kernel: CheckEmbeddingBagAttributes, and every type. What is left for each run is
// SetEmbeddingBagShapes, CheckEmbeddingBagInputs, CheckOffsets and RunCheckedEmbeddingBag. All but
// the last do without the output, so that a call that they reject need not allocate it.

// Check what is narrowed to a field of EmbeddingBagArgs afterwards.
Status CheckMode(int64_t mode);
Status CheckNegative(int64_t negative);
Status CheckDivisor(int64_t divisor);

// Checks mode, negative, divisor, max_norm, norm_type, and that there are no weights unless mode is
// kSum or there is a divisor for them.
Status CheckEmbeddingBagAttributes(const EmbeddingBagArgs& args, bool has_per_sample_weights);

// Checks the ranks and shapes against args->indices_rank, and fills in the shape fields.
// offsets and per_sample_weights are null where the op has none.
Status SetEmbeddingBagShapes(TensorShape weight, TensorShape indices, const TensorShape* offsets,
                             const TensorShape* per_sample_weights, EmbeddingBagArgs* args);

// *num_bags is B. An empty offsets that needs an entry is an invalid argument.
Status CountBags(const EmbeddingBagArgs& args, int64_t* num_bags);

// Checks that padding_idx is a row of weight.
Status CheckPadding(const EmbeddingBagArgs& args);

// CountBags and CheckPadding: all that a run has to check beside shapes, offsets and indices.
Status CheckEmbeddingBagInputs(const EmbeddingBagArgs& args, int64_t* num_bags);

// Checks everything but the values of offsets and indices. *num_bags is B.
Status CheckEmbeddingBag(const EmbeddingBagArgs& args, int64_t* num_bags);

// Whether a mode divides what a bag's rows give.
static inline bool Divides(int32_t mode) { return mode == kMean || mode == kSqrtn; }

// Whether it divides by a sum of weights.
bool DividesByWeights(const EmbeddingBagArgs& args);

// The padded row in [0, V), or -1, of checked arguments.
int64_t PaddedRow(const EmbeddingBagArgs& args);

// Checks the values of offsets. *longest is the length of the longest bag.
Status CheckOffsets(const EmbeddingBagArgs& args, int64_t* longest);

// The errors for a bad value: offsets[i], which follows `previous`, and the index at a position.
Status InvalidOffset(const EmbeddingBagArgs& args, int64_t i, int64_t offset, int64_t previous);
Status InvalidIndex(const EmbeddingBagArgs& args, int64_t position, int64_t index);

// Checks everything and computes.
Status RunEmbeddingBag(const EmbeddingBagArgs& args, Isa isa, const ParallelFor& parallel_for);

// Checks the values of indices, and computes. The rest of args was checked; num_bags and longest
// are what the checks said.
Status RunCheckedEmbeddingBag(const EmbeddingBagArgs& args, int64_t num_bags, int64_t longest,
                              Isa isa, const ParallelFor& parallel_for);

// ---- Several tables: the same functions for a collection.

// What the checks find out, and the output is made of.
struct CollectionSizes {
  int64_t num_bags;  // B
  int64_t columns;   // the sum of D
};

// The status, with the number of the table that it is about.
Status InTable(int64_t t, const Status& status);

// The arguments of table t; in a packed collection with the indices, offsets and
// per_sample_weights of all tables.
EmbeddingBagArgs ArgsOfTable(const EmbeddingBagCollectionArgs& args, int64_t t);

// CheckEmbeddingBagInputs of every table, and that the tables go together.
Status CheckEmbeddingBagCollectionInputs(const EmbeddingBagCollectionArgs& args,
                                         CollectionSizes* sizes);

// CheckOffsets of every table, longest[num_tables]; of a packed collection, of all tables at once.
Status CheckCollectionOffsets(const EmbeddingBagCollectionArgs& args, int64_t* longest);

// Checks everything but the values of offsets and indices.
Status CheckEmbeddingBagCollection(const EmbeddingBagCollectionArgs& args, CollectionSizes* sizes);

// Checks everything and computes, all tables at once.
Status RunEmbeddingBagCollection(const EmbeddingBagCollectionArgs& args, Isa isa,
                                 const ParallelFor& parallel_for);

// Checks the values of indices, and computes. The rest of args was checked; sizes and longest are
// what the checks said.
Status RunCheckedEmbeddingBagCollection(const EmbeddingBagCollectionArgs& args,
                                        const CollectionSizes& sizes, const int64_t* longest,
                                        Isa isa, const ParallelFor& parallel_for);

// How many calls have entered the kernel of this instruction set in this process.
int64_t EmbeddingBagRuns(Isa isa);

}  // namespace lucid

#endif  // __cplusplus
