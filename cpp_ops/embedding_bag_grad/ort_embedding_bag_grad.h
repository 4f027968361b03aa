// What the adapters of EmbeddingBag's gradient for ONNX Runtime's execution providers have in
// common: its forms, the attributes and tensors of a node as the arguments of a kernel, and the
// registration.
#pragma once

#include "embedding_bag/ort_embedding_bag.h"
#include "embedding_bag_grad/embedding_bag_grad.h"
#include "ort/adapter.h"

namespace lucid {
namespace ort {

struct GradForm {
  const char* name;
  bool sparse;
  bool flat;  // indices [N] with offsets
  bool weighted;

  static constexpr size_t kGradOutput = 0, kWeight = 1, kIndices = 2, kOffsets = 3;
  size_t WeightsInput() const { return 3u + flat; }
  size_t Inputs() const { return WeightsInput() + weighted; }
  size_t WeightsOutput() const { return 1u + sparse; }
  size_t Outputs() const { return WeightsOutput() + weighted; }
};

// One name with one combination of types.
struct GradOp : CustomOp {
  const Runtime* runtime;
  const GradForm* form;
  DType dtype;
  IndexType index_type, offset_type;
};

// The kernel of one node.
struct GradNode {
  const GradOp* op = nullptr;
  EmbeddingBagGradArgs args = {};  // the attributes and types, checked; a run adds its tensors
  int64_t max_output_bytes = INT64_MAX;

  // A call, checked but for the values of offsets and indices, and num_entries.
  struct Bound {
    EmbeddingBagGradArgs args;
    int64_t num_bags;
    Shape indices;
  };

  const Api* api() const { return op->runtime->api; }

  // Reads and checks the attributes.
  Status* Init(const GradOp& node_op, const KernelInfo* info);

  // Adds the inputs of a run to the attributes.
  Status* Bind(const KernelContext* context, Bound* bound) const;

  // Adds the outputs of a run, when num_entries is set.
  Status* AddOutputs(KernelContext* context, Bound* bound) const;

  Status* ToOrt(const lucid::Status& status) const {
    return ort::ToOrt(api(), op->form->name, status);
  }

 private:
  lucid::Status ReadAttributes(const KernelInfo* info);
  Status* AddOutput(KernelContext* context, size_t index, TensorShape shape, size_t element_bytes,
                    void** data) const;
};

// Adds every name and combination of types to the domain, as ops that are like `kernel`: see
// AddBagOps.
Status* AddGradOps(const Runtime& runtime, CustomOpDomain* domain, const CustomOp& kernel);

}  // namespace ort
}  // namespace lucid
