// The arguments of the gradient of EmbeddingBag, in C: embedding_bag_grad.h says what they mean.
#ifndef LUCID_EMBEDDING_BAG_GRAD_ARGS_H_
#define LUCID_EMBEDDING_BAG_GRAD_ARGS_H_

#include <stdint.h>

#include "../embedding_bag/args.h"

// For mirrors of this struct in other languages: c_api.h lists the byte offsets.
typedef struct EmbeddingBagGradArgs {
  int64_t size_bytes;        // sizeof(EmbeddingBagGradArgs); any other value is invalid
  EmbeddingBagArgs forward;  // the call whose gradient this is, without its output. Its table may
                             // not be quantized. weight is read only in mode max and for
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

#endif  // LUCID_EMBEDDING_BAG_GRAD_ARGS_H_
