// EmbeddingBagCollection for ONNX Runtime's CUDA provider: the ops of
// ort_embedding_bag_collection.cc over device memory.
#include <memory>

#include "embedding_bag/ort_cuda_node.h"
#include "embedding_bag_collection/cuda.h"
#include "embedding_bag_collection/ort_embedding_bag_collection.h"

namespace lucid {
namespace ort {
namespace {

struct Kernel : CollectionKernel {
  CudaNode node;

  static Status* Create(const CustomOp& op, const Api* api, const KernelInfo* info,
                        std::unique_ptr<Kernel>* kernel);
  Status* Compute(KernelContext* context) const;
};

Status* Kernel::Create(const CustomOp& custom_op, const Api*, const KernelInfo* info,
                       std::unique_ptr<Kernel>* out) {
  const CollectionOp& op = static_cast<const CollectionOp&>(custom_op);
  auto kernel = std::make_unique<Kernel>();
  LUCID_RETURN_IF_ERROR(kernel->Init(op, info));
  LUCID_RETURN_IF_ERROR(kernel->node.Init(*op.runtime, op.name));
  *out = std::move(kernel);
  return nullptr;
}

Status* Kernel::Compute(KernelContext* context) const {
  Bound bound;
  LUCID_RETURN_IF_ERROR(Bind(context, &bound));
  LUCID_RETURN_IF_ERROR(AddOutput(context, &bound));
  CudaCollection collection;
  LUCID_RETURN_IF_ERROR(ToOrt(collection.PlanChecked(bound.args, bound.sizes)));
  if (collection.plan().launches == 0) return nullptr;

  CudaRun run(node, context);
  void* scratch = nullptr;
  LUCID_RETURN_IF_ERROR(run.Begin(bound.output));
  LUCID_RETURN_IF_ERROR(run.Allocate(bound.output, collection.plan().scratch_bytes, &scratch));
  return run.End(collection.Launch(scratch, run.error(), run.stream()));
}

}  // namespace

Status* AddCudaEmbeddingBagCollectionOps(const Runtime& runtime, CustomOpDomain* domain) {
  return AddCollectionOps(runtime, domain, DescribeCudaOp<Kernel>());
}

}  // namespace ort
}  // namespace lucid
