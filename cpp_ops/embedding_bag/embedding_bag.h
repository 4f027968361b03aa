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

#include <stddef.h>
#include <stdint.h>

#include "base/isa.h"
#include "base/parallel.h"
#include "base/shape.h"
#include "base/status.h"
#include "embedding_bag/args.h"

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
