// The gradient of EmbeddingBag for ONNX Runtime's CUDA provider: the ops of
// ort_embedding_bag_grad.cc over device memory.
//
// Where rows are padded or the last offset is given, only the device knows how many entries a
// sparse gradient has. Then a run waits for it before it can create its outputs.
#include <memory>

#include "embedding_bag/ort_cuda_node.h"
#include "embedding_bag_grad/cuda.h"
#include "embedding_bag_grad/ort_embedding_bag_grad.h"

namespace lucid {
namespace ort {
namespace {

struct Kernel : GradNode {
  CudaNode node;

  static Status* Create(const CustomOp& op, const Api* api, const KernelInfo* info,
                        std::unique_ptr<Kernel>* kernel);
  Status* Compute(KernelContext* context) const;
};

Status* Kernel::Create(const CustomOp& custom_op, const Api*, const KernelInfo* info,
                       std::unique_ptr<Kernel>* out) {
  const GradOp& op = static_cast<const GradOp&>(custom_op);
  auto kernel = std::make_unique<Kernel>();
  LUCID_RETURN_IF_ERROR(kernel->Init(op, info));
  LUCID_RETURN_IF_ERROR(kernel->node.Init(*op.runtime, op.form->name));
  *out = std::move(kernel);
  return nullptr;
}

Status* Kernel::Compute(KernelContext* context) const {
  Bound bound;
  EmbeddingBagGradArgs& a = bound.args;
  LUCID_RETURN_IF_ERROR(Bind(context, &bound));
  // Scratch memory is allocated where the inputs are.
  const Value* beside = nullptr;
  LUCID_RETURN_IF_ERROR(
      Call<KernelContext_GetInput>(api(), context, GradForm::kGradOutput, &beside));
  CudaRun run(node, context);
  LUCID_RETURN_IF_ERROR(run.Begin(beside));
  CudaGrad grad;
  if (a.sparse) {
    LUCID_RETURN_IF_ERROR(ToOrt(grad.PlanChecked(a, bound.num_bags, false)));
    a.num_entries = grad.plan().num_entries;
    if (a.num_entries < 0) {
      void* count = nullptr;
      LUCID_RETURN_IF_ERROR(run.Allocate(beside, sizeof(int64_t), &count));
      LUCID_RETURN_IF_ERROR(
          ToOrt(grad.LaunchCount(static_cast<int64_t*>(count), run.error(), run.stream())));
      LUCID_RETURN_IF_ERROR(run.Read(static_cast<const int64_t*>(count), &a.num_entries));
    }
  }
  LUCID_RETURN_IF_ERROR(AddOutputs(context, &bound));
  LUCID_RETURN_IF_ERROR(ToOrt(grad.PlanChecked(a, bound.num_bags)));
  void* scratch = nullptr;
  LUCID_RETURN_IF_ERROR(run.Allocate(beside, grad.plan().scratch_bytes, &scratch));
  return run.End(grad.Launch(scratch, run.error(), run.stream()));
}

}  // namespace

Status* AddCudaEmbeddingBagGradOps(const Runtime& runtime, CustomOpDomain* domain) {
  return AddGradOps(runtime, domain, DescribeCudaOp<Kernel>());
}

}  // namespace ort
}  // namespace lucid
