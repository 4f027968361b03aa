// Compiled with the flags for AVX-512 F, BW, DQ and VL, see isa_flags.cmake.
#include "base/isa.h"

#if defined(LUCID_X86_64)
#define LUCID_ISA          avx512
#define LUCID_VECTOR_BYTES 64
#include "embedding_bag_grad/grad_rows-inl.h"
#endif
