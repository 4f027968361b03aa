// Compiled with the flags for AVX-512 F, BW, DQ and VL, see isa_flags.cmake.
#include "base/isa.h"

#if defined(LUCID_X86_64)
#define LUCID_ISA          avx512
#define LUCID_VECTOR_BYTES 64
#if !defined(LUCID_MAX_VECTORS)
#define LUCID_MAX_VECTORS        8
#define LUCID_MAX_NARROW_VECTORS 16
#endif
#include "embedding_bag/pool_rows-inl.h"
#endif
