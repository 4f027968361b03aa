#include "base/isa.h"

#if defined(LUCID_AARCH64)
#define LUCID_ISA          neon
#define LUCID_VECTOR_BYTES 16
#include "embedding_bag_grad/grad_rows-inl.h"
#endif
