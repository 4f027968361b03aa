// 16 registers on x86-64: eight accumulators, and room for the row.
#include "base/isa.h"

#define LUCID_ISA          baseline
#define LUCID_VECTOR_BYTES 16
#if !defined(LUCID_MAX_VECTORS)
#define LUCID_MAX_VECTORS 4
#endif
#include "embedding_bag/pool_rows-inl.h"
