// 16 registers on x86-64: four accumulators, and room for the row. (Eight fit too, for half a
// minute more of compilation on every machine, and hardly a machine has nothing better than this.)
#include "base/isa.h"

#define LUCID_ISA          baseline
#define LUCID_VECTOR_BYTES 16
#if !defined(LUCID_MAX_VECTORS)
#define LUCID_MAX_VECTORS 4
#endif
#include "embedding_bag/pool_rows-inl.h"
