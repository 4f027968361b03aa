// The interface between embedding_bag_grad.cc and the loops in grad_rows-inl.h. Internal.
#pragma once

#include <stdint.h>

#include "embedding_bag/pool_rows.h"

namespace lucid {

// A position that gives its row something.
struct GradEntry {
  int64_t row, position;
};

// A gradient. Everything that a kernel reads is checked, also the values of the indices.
struct GradJob {
  PoolJob forward;           // without its output
  const PoolKernel* pool;    // for the clips
  const char* grad_output;   // [B, D] of dtype
  char* scaled;              // room for grads, where they differ from grad_output; or null
  const char* grads;         // [B, D] of accumulators: grad_output, for mean and sqrtn divided
  const int64_t* bag_of;     // the bag of every position
  const GradEntry* entries;  // by row, those of a row by position
  int64_t num_entries;
  const int64_t* frequencies;  // of the row at every position, to divide values; or null
  bool by_frequency;           // divide what a row gets
  char* winners;       // [B, D]: the position of the maximum, of the type of WinnerOf; or null
  char* output;        // grad_weight, or values
  int64_t* rows;       // beside values
  char* grad_weights;  // grad_per_sample_weights
  char* dots;          // [N] of accumulators: what it is made from; or null: it is them
};

// Positions are told apart in numbers that are as wide as the accumulators.
template <class A>
struct WinnerOf {
  using type = int32_t;
};
template <>
struct WinnerOf<double> {
  using type = int64_t;
};

struct GradKernel {
  // Fills `scaled` for the bags [first, last).
  void (*scale)(const GradJob& job, int64_t first, int64_t last);

  // Fills `winners` for the bags [first, last). best: room for D accumulators.
  void (*winners)(const GradJob& job, int64_t first, int64_t last, char* best);

  // Sums the rows whose first entry is in [begin, end), except those of more than kPiece entries.
  void (*sums)(const GradJob& job, int64_t begin, int64_t end);

  // Sums the entries [begin, end), at most kPiece and of one row, into a row of accumulators.
  void (*piece)(const GradJob& job, int64_t begin, int64_t end, char* row);

  // Writes rows and values of the positions [begin, end), the first one at number `entry`.
  void (*values)(const GradJob& job, int64_t begin, int64_t end, int64_t entry);

  // Writes dots, or grad_weights, of the positions [begin, end).
  void (*dots)(const GradJob& job, int64_t begin, int64_t end);
};

}  // namespace lucid

// Runs a statement with T, the C++ type of a checked DType that is not quantized.
#define LUCID_FOR_FLOAT_TYPE(dtype, statement)       \
  switch (dtype) {                                   \
    LUCID_DTYPE_CASE(kFloat32, float, statement)     \
    LUCID_DTYPE_CASE(kFloat16, Float16, statement)   \
    LUCID_DTYPE_CASE(kBFloat16, BFloat16, statement) \
    default: {                                       \
      using T = double;                              \
      statement;                                     \
    }                                                \
  }
