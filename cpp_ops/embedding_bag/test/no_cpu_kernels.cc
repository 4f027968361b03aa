// For tests of the emulated CUDA kernels: the functions of the CPU's kernels that the adapters
// call, without the time that those take to compile. They are never called.
#include "embedding_bag/embedding_bag.h"
#include "embedding_bag_grad/embedding_bag_grad.h"

namespace lucid {

static Status NoKernels() { return Error(Code::kInternal, "this library has no CPU kernels"); }

Status CheckOffsets(const EmbeddingBagArgs&, int64_t*) { return NoKernels(); }
Status RunCheckedEmbeddingBag(const EmbeddingBagArgs&, int64_t, int64_t, Isa, const ParallelFor&) {
  return NoKernels();
}
Status CheckCollectionOffsets(const EmbeddingBagCollectionArgs&, int64_t*) { return NoKernels(); }
Status RunCheckedEmbeddingBagCollection(const EmbeddingBagCollectionArgs&, const CollectionSizes&,
                                        const int64_t*, Isa, const ParallelFor&) {
  return NoKernels();
}
Status CheckGradOffsets(const EmbeddingBagGradArgs&, int64_t, GradSizes*) { return NoKernels(); }
int64_t CountCheckedGradEntries(const EmbeddingBagGradArgs&, const GradSizes&) { return 0; }
Status RunCheckedEmbeddingBagGrad(const EmbeddingBagGradArgs&, const GradSizes&, Isa,
                                  const ParallelFor&) {
  return NoKernels();
}

}  // namespace lucid
