// EmbeddingBag for ONNX Runtime's CUDA provider: the ops of ort_embedding_bag.cc over device
// memory.
#include <memory>

#include "embedding_bag/ort_cuda_node.h"
#include "embedding_bag/ort_embedding_bag.h"

namespace lucid {
namespace ort {
namespace {

struct Kernel : BagKernel {
  CudaNode node;

  static Status* Create(const CustomOp& op, const Api* api, const KernelInfo* info,
                        std::unique_ptr<Kernel>* kernel);
  Status* Compute(KernelContext* context) const;
};

Status* Kernel::Compute(KernelContext* context) const {
  Bound bound;
  LUCID_RETURN_IF_ERROR(Bind(context, &bound));
  LUCID_RETURN_IF_ERROR(AddOutput(context, &bound));
  const EmbeddingBagArgs& a = bound.args;
  const int64_t stride = RowBytes(a.output_type, a.weight_shape[1]);
  LucidCudaPlan plan;
  LUCID_RETURN_IF_ERROR(
      ToOrt(api(), op->form->name, PlanCheckedCudaEmbeddingBag(a, bound.num_bags, stride, &plan)));
  if (plan.blocks == 0 && plan.check_blocks == 0) return nullptr;

  CudaRun run(node, context);
  void* scratch = nullptr;
  LUCID_RETURN_IF_ERROR(run.Begin(bound.output));
  LUCID_RETURN_IF_ERROR(run.Allocate(bound.output, plan.scratch_bytes, &scratch));
  return run.End(LaunchCudaEmbeddingBag(a, plan, scratch, run.error(), run.stream()));
}

Status* Kernel::Create(const CustomOp& custom_op, const Api* api, const KernelInfo* info,
                       std::unique_ptr<Kernel>* out) {
  const Op& op = static_cast<const Op&>(custom_op);
  auto kernel = std::make_unique<Kernel>();
  LUCID_RETURN_IF_ERROR(kernel->Init(op, api, info));
  LUCID_RETURN_IF_ERROR(kernel->node.Init(*op.runtime, op.form->name));
  *out = std::move(kernel);
  return nullptr;
}

}  // namespace

Status* AddCudaEmbeddingBagOps(const Runtime& runtime, CustomOpDomain* domain) {
  return AddBagOps(runtime, domain, DescribeCudaOp<Kernel>());
}

}  // namespace ort
}  // namespace lucid
