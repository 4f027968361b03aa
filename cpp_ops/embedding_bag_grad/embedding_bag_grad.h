// The gradient of EmbeddingBag with respect to the table and to per_sample_weights.
//
// In the terms of embedding_bag.h, and with d(i) = n(i) for a mean, the square root of n(i) for
// sqrtn and else 1, position k of bag i adds to row indices[k] of the table
//
//   grad(k) = grad_output[i] / d(i) * (per_sample_weights[k] or 1)      sum, mean, sqrtn
//           | grad_output[i] in the columns whose maximum is row(k), else 0     max
//
// Of several equal maxima the first position is the one; if there is a NaN, the first NaN is the
// maximum. Positions that are padded or belong to no bag add nothing. With scale_grad_by_freq, what
// a row gets is divided by the number of positions that add to it.
//
//   grad_weight[r]             = sum of grad(k) over the positions k that add to row r
//   rows[e], values[e]         = indices[k], grad(k) of the positions that add something, in order
//   grad_per_sample_weights[k] = dot(k) = dot(grad_output[i] / d(i), weight[indices[k]] *
//                                clip(indices[k])), or 0 at positions that add nothing
//
// Where d(i) is made of the weights, it depends on them too: then that is dot(k) - c(i) for a mean,
// and dot(k) - c(i) * per_sample_weights[k] / d(i) for sqrtn, with
//
//   c(i) = sum of per_sample_weights[j] * dot(j) / d(i) over j in rows(i)
//
// in double, one j after another.
//
// The clip is not differentiated: it decides which row is the maximum, and scales the row in
// grad_per_sample_weights, no more.
//
// Sums are float (double for a double table) and rounded once. Their order is the positions of a
// row one after another, in groups of 64 and pieces of 1024, as embedding_bag.h says of a bag. So
// they have the same bits on every instruction set and at any thread count. A result that is NaN is
// always the one quiet NaN with an empty payload.
//
// Nothing here throws, prints or exits, and no value in indices or offsets leads to an access
// outside the arrays.
#pragma once

#include <stdint.h>

#include "embedding_bag/embedding_bag.h"
#include "embedding_bag_grad/args.h"

namespace lucid {

// A caller that fills in a struct for each call uses CountGradEntries and RunEmbeddingBagGrad,
// which check everything. A host whose nodes outlive their runs checks the attributes when it
// creates the kernel; what is left for each run is SetEmbeddingBagShapes for args->forward,
// CheckEmbeddingBagGradInputs, CheckGradOffsets and the two functions for checked arguments.

// Checks the shape of grad_output, fills it in, and checks what else a run has to check beside
// shapes, offsets and indices. *num_bags is B.
Status CheckEmbeddingBagGradInputs(TensorShape grad_output, EmbeddingBagGradArgs* args,
                                   int64_t* num_bags);

// Checks everything but the values of offsets and indices, and num_entries. *num_bags is B.
Status CheckEmbeddingBagGrad(const EmbeddingBagGradArgs& args, int64_t* num_bags);

// What the checks find out, and the computing starts from.
struct GradSizes {
  int64_t num_bags;   // B
  int64_t positions;  // that belong to a bag
};

// Checks the values of offsets, and counts the positions of the bags that they make.
Status CheckGradOffsets(const EmbeddingBagGradArgs& args, int64_t num_bags, GradSizes* sizes);

// The number of positions that add to a row, which is the length of rows and values. Checks
// everything but the values of the indices.
Status CountGradEntries(const EmbeddingBagGradArgs& args, int64_t* num_entries);

// The same, of arguments and offsets that were checked.
int64_t CountCheckedGradEntries(const EmbeddingBagGradArgs& args, const GradSizes& sizes);

// Checks everything and computes.
Status RunEmbeddingBagGrad(const EmbeddingBagGradArgs& args, Isa isa,
                           const ParallelFor& parallel_for);

// Checks num_entries and the values of indices, and computes. The rest of args was checked.
Status RunCheckedEmbeddingBagGrad(const EmbeddingBagGradArgs& args, const GradSizes& sizes, Isa isa,
                                  const ParallelFor& parallel_for);

// How many calls have entered the kernel of this instruction set in this process.
int64_t EmbeddingBagGradRuns(Isa isa);

}  // namespace lucid
