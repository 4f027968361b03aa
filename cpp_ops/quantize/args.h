// The arguments of making rows of floats smaller, in C: quantize.h says what is done.
#ifndef LUCID_QUANTIZE_ARGS_H_
#define LUCID_QUANTIZE_ARGS_H_

#include <stdint.h>

// For mirrors of this struct in other languages: c_api.h lists the byte offsets.
typedef struct QuantizeArgs {
  int64_t size_bytes;  // of this struct
  const void* rows;    // [num_rows, dim], row by row, of dtype
  void* output;        // [num_rows, dim] of output_dtype; 4-bit rows take (dim + 1) / 2 bytes
  float* scale;        // [num_rows]; of 16-bit floats not used
  float* bias;         // [num_rows]; of unsigned values only
  double* squares;     // [num_rows]: the sum of the squares of a row; may be null, as the next two
  double* lost;        // [num_rows]: that of its differences from the row that is kept
  double* furthest;    // [num_rows]: the largest of these differences, without sign
  int64_t num_rows;
  int64_t dim;
  double limit;          // of the elements of a row that is quantized, without sign
  int32_t dtype;         // float32, float16, bfloat16 or float64, as in base/types.h
  int32_t output_dtype;  // int8, uint8, int4, uint4; or float16 or bfloat16, not of float64 rows
} QuantizeArgs;

#endif  // LUCID_QUANTIZE_ARGS_H_
