// Compiled with the flags for AVX2 and F16C, see isa_flags.cmake.
#include "base/isa.h"

#if defined(LUCID_X86_64)
#define LUCID_ISA          avx2
#define LUCID_VECTOR_BYTES 32
#if !defined(LUCID_MAX_VECTORS)
#define LUCID_MAX_VECTORS      8
#define LUCID_MAX_LONE_VECTORS 14
#endif
#include "embedding_bag/pool_rows-inl.h"
#endif
