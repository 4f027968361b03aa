// 32 registers: sixteen accumulators.
#include "base/isa.h"

#if defined(LUCID_AARCH64)
#define LUCID_ISA          neon
#define LUCID_VECTOR_BYTES 16
#define LUCID_MAX_VECTORS  16
#include "embedding_bag/pool_rows-inl.h"
#endif
