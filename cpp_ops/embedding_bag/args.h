// The arguments of EmbeddingBag and of EmbeddingBagCollection, in C: embedding_bag.h says what they
// mean.
#ifndef LUCID_EMBEDDING_BAG_ARGS_H_
#define LUCID_EMBEDDING_BAG_ARGS_H_

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

#endif  // LUCID_EMBEDDING_BAG_ARGS_H_
