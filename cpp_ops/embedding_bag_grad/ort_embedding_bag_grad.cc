// The gradient of EmbeddingBag as custom ops of ONNX Runtime, one per combination of inputs and
// outputs. The inputs are grad_output and then those of EmbeddingBag's name:
//
//   EmbeddingBagGrad...        gives grad_weight [V, D]
//   EmbeddingBagSparseGrad...  gives rows [M] and values [M, D]
//
// and those of ...Weighted names give grad_per_sample_weights too, as their last output.
#include "embedding_bag_grad/ort_embedding_bag_grad.h"

#include <initializer_list>
#include <memory>

#include "ort/register.h"
#include "ort/session_entries.h"

namespace lucid {
namespace ort {
namespace {

constexpr GradForm kForms[] = {
    {"EmbeddingBagGrad", false, true, false},
    {"EmbeddingBagGradWeighted", false, true, true},
    {"EmbeddingBagGrad2D", false, false, false},
    {"EmbeddingBagGrad2DWeighted", false, false, true},
    {"EmbeddingBagSparseGrad", true, true, false},
    {"EmbeddingBagSparseGradWeighted", true, true, true},
    {"EmbeddingBagSparseGrad2D", true, false, false},
    {"EmbeddingBagSparseGrad2DWeighted", true, false, true},
};

const GradOp& Self(const CustomOp* op) { return *static_cast<const GradOp*>(op); }

}  // namespace

lucid::Status GradNode::ReadAttributes(const KernelInfo* info) {
  Attributes attributes(api(), info);
  const int64_t by_frequency = attributes.Int("scale_grad_by_freq", 0);
  if (by_frequency != 0 && by_frequency != 1) {
    return InvalidArgument("scale_grad_by_freq = %lld is not 0 or 1",
                           static_cast<long long>(by_frequency));
  }
  args.scale_grad_by_freq = static_cast<int32_t>(by_frequency);
  return ReadBagAttributes(&attributes, op->dtype, op->form->flat, op->form->weighted,
                           &args.forward);
}

Status* GradNode::Init(const GradOp& node_op, const KernelInfo* info) {
  op = &node_op;
  args.size_bytes = sizeof(args);
  args.sparse = op->form->sparse;
  args.forward.size_bytes = sizeof(args.forward);
  args.forward.dtype = args.forward.output_type = op->dtype;
  args.forward.index_type = op->index_type;
  args.forward.offset_type = op->offset_type;
  args.forward.indices_rank = op->form->flat ? 1 : 2;
  LUCID_RETURN_IF_ERROR(SessionMaxOutputBytes(*op->runtime, info, &max_output_bytes));
  return ToOrt(ReadAttributes(info));
}

Status* GradNode::Bind(const KernelContext* context, Bound* bound) const {
  const Runtime& runtime = *op->runtime;
  const GradForm& form = *op->form;
  EmbeddingBagGradArgs& a = bound->args;
  a = args;
  EmbeddingBagArgs& f = a.forward;
  Shape grad, weight, offsets, weights;
  LUCID_RETURN_IF_ERROR(GetInput(runtime, context, form.kGradOutput, &grad, &a.grad_output));
  LUCID_RETURN_IF_ERROR(GetInput(runtime, context, form.kWeight, &weight, &f.weight));
  LUCID_RETURN_IF_ERROR(GetInput(runtime, context, form.kIndices, &bound->indices, &f.indices));
  if (form.flat) {
    LUCID_RETURN_IF_ERROR(GetInput(runtime, context, form.kOffsets, &offsets, &f.offsets));
  }
  if (form.weighted) {
    LUCID_RETURN_IF_ERROR(
        GetInput(runtime, context, form.WeightsInput(), &weights, &f.per_sample_weights));
  }
  lucid::Status status = SetEmbeddingBagShapes(weight.shape, bound->indices.shape,
                                               form.flat ? &offsets.shape : nullptr,
                                               form.weighted ? &weights.shape : nullptr, &f);
  if (status.ok()) status = CheckEmbeddingBagGradInputs(grad.shape, &a, &bound->num_bags);
  return ToOrt(status);
}

Status* GradNode::AddOutput(KernelContext* context, size_t index, TensorShape shape,
                            size_t element_bytes, void** data) const {
  Value* value = nullptr;
  return ort::AddOutput(api(), context, op->form->name, max_output_bytes, index, shape,
                        element_bytes, &value, data);
}

Status* GradNode::AddOutputs(KernelContext* context, Bound* bound) const {
  const GradForm& form = *op->form;
  const size_t size = kSizeOf[op->dtype];
  EmbeddingBagGradArgs& a = bound->args;
  if (form.sparse) {
    const int64_t dims[2] = {a.num_entries, a.forward.weight_shape[1]};
    void* rows = nullptr;
    LUCID_RETURN_IF_ERROR(AddOutput(context, 0, {dims, 1}, sizeof(int64_t), &rows));
    a.rows = static_cast<int64_t*>(rows);
    LUCID_RETURN_IF_ERROR(AddOutput(context, 1, {dims, 2}, size, &a.values));
  } else {
    LUCID_RETURN_IF_ERROR(AddOutput(context, 0, {a.forward.weight_shape, 2}, size, &a.grad_weight));
  }
  if (!form.weighted) return nullptr;
  return AddOutput(context, form.WeightsOutput(), bound->indices.shape, size,
                   &a.grad_per_sample_weights);
}

namespace {

struct Kernel : GradNode {
  Isa isa;

  static Status* Create(const CustomOp& op, const Api* api, const KernelInfo* info,
                        std::unique_ptr<Kernel>* kernel);
  Status* Compute(KernelContext* context) const;
};

Status* Kernel::Create(const CustomOp& custom_op, const Api* api, const KernelInfo* info,
                       std::unique_ptr<Kernel>* out) {
  const GradOp& op = Self(&custom_op);
  auto kernel = std::make_unique<Kernel>();
  LUCID_RETURN_IF_ERROR(ort::ToOrt(api, op.form->name, ActiveIsa(&kernel->isa)));
  LUCID_RETURN_IF_ERROR(kernel->Init(op, info));
  *out = std::move(kernel);
  return nullptr;
}

Status* Kernel::Compute(KernelContext* context) const {
  Bound bound;
  EmbeddingBagGradArgs& a = bound.args;
  GradSizes sizes;
  LUCID_RETURN_IF_ERROR(Bind(context, &bound));
  LUCID_RETURN_IF_ERROR(ToOrt(CheckGradOffsets(a, bound.num_bags, &sizes)));
  if (a.sparse) a.num_entries = CountCheckedGradEntries(a, sizes);
  LUCID_RETURN_IF_ERROR(AddOutputs(context, &bound));
  Host host = {api(), context};
  return ToOrt(RunCheckedEmbeddingBagGrad(a, sizes, isa, host.Threads()));
}

// ---- Shape inference: of what does not depend on padding.

Status* LUCID_ORT_CALL InferOutputShapes(const CustomOp* op, ShapeInferContext* context) {
  // The runtime asks one op of each name, whatever the types at hand: only the form may be
  // believed.
  const GradForm& form = *Self(op).form;
  const Api* api = Self(op).runtime->api;
  ElementType type, index_type;
  Dim weight[2], indices[2];
  LUCID_RETURN_IF_ERROR(InferInput(api, context, form.kWeight, 2, &type, weight));
  if (!form.sparse) LUCID_RETURN_IF_ERROR(InferOutput(api, context, 0, type, weight, 2));
  if (!form.weighted) return nullptr;
  const size_t rank = form.flat ? 1 : 2;
  LUCID_RETURN_IF_ERROR(InferInput(api, context, form.kIndices, rank, &index_type, indices));
  return InferOutput(api, context, form.WeightsOutput(), type, indices, rank);
}

// ---- The description of an op.

const char* LUCID_ORT_CALL GetName(const CustomOp* op) { return Self(op).form->name; }
size_t LUCID_ORT_CALL GetInputCount(const CustomOp* op) { return Self(op).form->Inputs(); }
size_t LUCID_ORT_CALL GetOutputCount(const CustomOp* op) { return Self(op).form->Outputs(); }
ElementType LUCID_ORT_CALL GetInputType(const CustomOp* op, size_t index) {
  const GradOp& self = Self(op);
  if (index == GradForm::kIndices) return kElementOfIndex[self.index_type];
  if (self.form->flat && index == GradForm::kOffsets) return kElementOfIndex[self.offset_type];
  return kElementOf[self.dtype];
}
ElementType LUCID_ORT_CALL GetOutputType(const CustomOp* op, size_t index) {
  return Self(op).form->sparse && index == 0 ? kElementInt64 : kElementOf[Self(op).dtype];
}

}  // namespace

Status* AddGradOps(const Runtime& runtime, CustomOpDomain* domain, const CustomOp& kernel) {
  CustomOp base = kernel;
  base.GetName = GetName;
  base.GetInputType = GetInputType;
  base.GetInputTypeCount = GetInputCount;
  base.GetOutputType = GetOutputType;
  base.GetOutputTypeCount = GetOutputCount;
  base.InferOutputShapeFn = runtime.has_data_reference ? InferOutputShapes : nullptr;
  for (const GradForm& form : kForms) {
    for (const DType dtype : {kFloat32, kFloat16, kBFloat16, kFloat64}) {
      for (const IndexType index_type : {kInt32, kInt64}) {
        for (const IndexType offset_type : {kInt32, kInt64}) {
          if (!form.flat && offset_type != kInt32) continue;  // there is no offsets to have a type
          GradOp* const op = new GradOp{base, &runtime, &form, dtype, index_type, offset_type};
          LUCID_RETURN_IF_ERROR(Call<CustomOpDomain_Add>(runtime.api, domain, op));
        }
      }
    }
  }
  return nullptr;
}

Status* AddEmbeddingBagGradOps(const Runtime& runtime, CustomOpDomain* domain) {
  CustomOp kernel = DescribeOp();
  KernelFunctions<Kernel>::SetIn(&kernel);
  return AddGradOps(runtime, domain, kernel);
}

}  // namespace ort
}  // namespace lucid
