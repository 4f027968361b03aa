// Compiled with the flags for AVX2 and F16C, see isa_flags.cmake.
#include "base/isa.h"

#if defined(LUCID_X86_64)
#define LUCID_ISA          avx2
#define LUCID_VECTOR_BYTES 32
#include "embedding_bag_grad/grad_rows-inl.h"
#endif
