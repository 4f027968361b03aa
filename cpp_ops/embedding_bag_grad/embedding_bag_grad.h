// The gradient of EmbeddingBag with respect to the table and to per_sample_weights.
//
// With the words of embedding_bag.h, and c(i) = max(1, |rows(i)|), position k of bag i gives row
// indices[k] of the table
//
//   grad(k) = grad_output[i] * (per_sample_weights[k] or 1)      sum
//           | grad_output[i] / c(i)                              mean
//           | grad_output[i] in the columns whose maximum is row(k), else 0     max
//
// where of several equal maxima the first position is the one, and the first NaN is the maximum if
// there is one. Positions that are padded or belong to no bag give nothing. With
// scale_grad_by_freq, what a row gets is divided by the number of positions that give it something.
//
//   grad_weight[r]             = sum of grad(k) over the positions k that give row r something
//   rows[e], values[e]         = indices[k], grad(k) of those positions, in their order
//   grad_per_sample_weights[k] = dot(grad_output[i], weight[indices[k]] * clip(indices[k])), 0 at
//                                positions that give nothing
//
// The clip is not differentiated: it decides which row is the maximum, and is part of the row in
// grad_per_sample_weights, no more.
//
// The sums are float (double for a double table), rounded once, and of one order: the positions of
// a row one after the other in groups of 64 and pieces of 1024, as embedding_bag.h says of a bag.
// So they have the same bits on every instruction set and at any thread count. A result that is NaN
// is always the one quiet NaN with an empty payload.
//
// Nothing here throws, prints or exits, and no value in indices or offsets leads to an access
// outside the arrays.
#pragma once

#include <stdint.h>

#include "embedding_bag/embedding_bag.h"

// The mirror of this struct in other languages: the byte offsets stand in c_api.h.
typedef struct EmbeddingBagGradArgs {
  int64_t size_bytes;        // sizeof(EmbeddingBagGradArgs); another value is refused
  EmbeddingBagArgs forward;  // the call whose gradient this is, without its output. Tables of codes
                             // are refused. weight is read in mode max, and for
                             // grad_per_sample_weights.
  const void* grad_output;   // [B, D] of dtype
  void* grad_weight;         // [V, D] of dtype, every byte of which is written; unused if sparse
  int64_t* rows;             // [num_entries]; used if sparse
  void* values;              // [num_entries, D] of dtype; used if sparse
  void* grad_per_sample_weights;  // of dtype, shaped like indices; or NULL: not wanted
  int64_t grad_output_shape[2];   // must be B, D
  int64_t num_entries;            // what CountGradEntries says; used if sparse
  int32_t sparse;                 // 0 or 1
  int32_t scale_grad_by_freq;     // 0 or 1
} EmbeddingBagGradArgs;

#ifdef __cplusplus

namespace lucid {

// Checks the rank and the shape of grad_output against those in args->forward, and fills them in.
Status SetGradOutputShape(TensorShape grad_output, EmbeddingBagGradArgs* args);

// Checks everything but the values of offsets and indices. *num_bags is B, *padding the padded row
// in [0, V), or -1.
Status CheckEmbeddingBagGrad(const EmbeddingBagGradArgs& args, int64_t* num_bags, int64_t* padding);

// The number of positions that give a row something: of rows and values. Checks everything but the
// values of the indices.
Status CountGradEntries(const EmbeddingBagGradArgs& args, int64_t* num_entries);

// Checks everything and computes.
Status RunEmbeddingBagGrad(const EmbeddingBagGradArgs& args, Isa isa,
                           const ParallelFor& parallel_for);

// How often RunEmbeddingBagGrad entered the kernel of this instruction set in this process.
int64_t EmbeddingBagGradRuns(Isa isa);

}  // namespace lucid

#endif  // __cplusplus
