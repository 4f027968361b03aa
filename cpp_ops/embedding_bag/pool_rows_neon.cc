// 32 registers: sixteen accumulators.
#include "base/isa.h"

#if defined(LUCID_AARCH64)
#define LUCID_ISA          neon
#define LUCID_VECTOR_BYTES 16
#if !defined(LUCID_MAX_VECTORS)
#define LUCID_MAX_VECTORS 16
#endif
#include "embedding_bag/pool_rows-inl.h"
#endif
