// What the adapters of EmbeddingBag for ONNX Runtime's execution providers have in common: its
// forms, the attributes and tensors of a node as the arguments of a kernel, and the registration.
#pragma once

#include "embedding_bag/embedding_bag.h"
#include "ort/adapter.h"

namespace lucid {
namespace ort {

// The inputs of a table: its rows, or quantized values with one or two numbers per row.
enum class Table { kRows, kScale, kZeroPoint, kBias };

struct Form {
  const char* name;
  Table table;
  bool flat;  // indices [N] with offsets
  bool weighted;

  bool Quantized() const { return table != Table::kRows; }
  bool TwoNumbers() const { return table == Table::kZeroPoint || table == Table::kBias; }
  size_t IndicesInput() const { return 1u + Quantized() + TwoNumbers(); }
  size_t OffsetsInput() const { return IndicesInput() + 1; }
  size_t WeightsInput() const { return IndicesInput() + 1 + flat; }
  size_t Inputs() const { return WeightsInput() + weighted; }
};

// One name with one combination of types.
struct Op : CustomOp {
  const Runtime* runtime;
  const Form* form;
  DType dtype;        // of the table, as it is stored
  DType output_type;  // and of scale, zero_point, bias and per_sample_weights
  IndexType index_type, offset_type;
};

// The kernel of one node.
struct BagKernel {
  const Op* op = nullptr;
  EmbeddingBagArgs args = {};  // the attributes and types, checked; a run adds its tensors
  bool weight_is_constant = false;
  Shape weight;
  int64_t embedding_dim = -1;  // of a quantized table
  // Of a quantized table: args has scale, and zero_point or bias, for so many rows; else -1.
  int64_t bound_numbers = -1;
  int64_t max_output_bytes = INT64_MAX;

  const Api* api() const { return op->runtime->api; }

  // A call, checked but for the values of offsets and indices.
  struct Bound {
    EmbeddingBagArgs args;
    int64_t num_bags;
    Value* output = nullptr;
  };

  // Reads and checks the attributes.
  Status* Init(const Op& node_op, const Api* api, const KernelInfo* info);

  // Adds the inputs of a run to the attributes.
  Status* Bind(const KernelContext* context, Bound* bound) const;

  // Adds the output of a run.
  Status* AddOutput(KernelContext* context, Bound* bound) const;

 private:
  lucid::Status SetTableShape(TensorShape given, int64_t dims[2], TensorShape* shape) const;
};

// Reads and checks the attributes that all operators of bags have. `flat`: indices [N].
lucid::Status ReadBagAttributes(Attributes* attributes, DType dtype, bool flat, bool weighted,
                                EmbeddingBagArgs* args);

// B, from offsets (flat) or two-dimensional indices at that input.
Status* InferBags(const Api* api, ShapeInferContext* context, size_t index, bool flat, Dim* bags);

// Adds every name and combination of types to the domain, as ops that are like `kernel`: for its
// provider, and with its functions to make, run and free the kernel of a node.
Status* AddBagOps(const Runtime& runtime, CustomOpDomain* domain, const CustomOp& kernel);

}  // namespace ort
}  // namespace lucid
