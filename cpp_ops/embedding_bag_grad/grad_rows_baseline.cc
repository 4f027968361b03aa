#include "base/isa.h"

#define LUCID_ISA          baseline
#define LUCID_VECTOR_BYTES 16
#include "embedding_bag_grad/grad_rows-inl.h"
