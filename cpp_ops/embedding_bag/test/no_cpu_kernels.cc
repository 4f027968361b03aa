// For tests of the emulated CUDA kernels: what the adapters ask of the CPU's, without the time that
// those take to compile. It is never called.
#include "base/isa.h"
#include "base/pages.h"
#include "embedding_bag/embedding_bag.h"
#include "embedding_bag_grad/embedding_bag_grad.h"

namespace lucid {

Status RunEmbeddingBag(const EmbeddingBagArgs&, Isa, const ParallelFor&) {
  return Error(Code::kInternal, "this library has no CPU kernels");
}
Status RunEmbeddingBagCollection(const EmbeddingBagCollectionArgs&, Isa, const ParallelFor&) {
  return Error(Code::kInternal, "this library has no CPU kernels");
}
Status CountGradEntries(const EmbeddingBagGradArgs&, int64_t*) {
  return Error(Code::kInternal, "this library has no CPU kernels");
}
Status RunEmbeddingBagGrad(const EmbeddingBagGradArgs&, Isa, const ParallelFor&) {
  return Error(Code::kInternal, "this library has no CPU kernels");
}
int64_t EmbeddingBagRuns(Isa) { return 0; }

}  // namespace lucid
