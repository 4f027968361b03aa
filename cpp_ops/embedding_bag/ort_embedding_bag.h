// What the adapters of EmbeddingBag for ONNX Runtime's execution providers have in common: its
// forms, the attributes and tensors of a node as the arguments of a kernel, and the registration.
#pragma once

#include <memory>

#include "base/types.h"
#include "embedding_bag/embedding_bag.h"
#include "ort/register.h"

namespace lucid {
namespace ort {

// What a table is given as: its rows, or codes with one or two numbers a row.
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

#define LUCID_RETURN_IF_ERROR(expression)                   \
  do {                                                      \
    if (Status* const error_ = (expression)) return error_; \
  } while (false)

constexpr size_t kMostDims = 8;

// A shape, with room for it where the runtime cannot lend its own.
struct Shape {
  TensorShape shape = {nullptr, 0};
  int64_t dims[kMostDims];
};

// The kernel of one node.
struct BagKernel {
  const Op* op = nullptr;
  EmbeddingBagArgs args = {};  // the attributes and types; a run adds its tensors to a copy
  bool weight_is_constant = false;
  Shape weight;
  int64_t embedding_dim = -1;  // of a quantised table
  // Of a quantised table: args has scale, and zero_point or bias, of so many rows; else -1.
  int64_t bound_numbers = -1;

  // Reads the attributes.
  Status* Init(const Op& node_op, const Api* api, const KernelInfo* info);

  // Adds the tensors of a run, checked as far as shapes go, and the output.
  Status* Bind(KernelContext* context, EmbeddingBagArgs* a, Value** output) const;

 private:
  lucid::Status SetTableShape(TensorShape given, int64_t dims[2], TensorShape* shape) const;
};

// Frees the status and tells whether it was an error.
bool Failed(const Api* api, Status* status);

// A refusal by this library, under the name of the op.
Status* ToOrt(const Api* api, const Op& op, const lucid::Status& status);

// Adds every name and combination of types to the domain, with the four functions of `kernel`:
// which provider it is for, and what makes, runs and frees the kernel of a node.
Status* AddBagOps(const Runtime& runtime, CustomOpDomain* domain, const CustomOp& kernel);

}  // namespace ort
}  // namespace lucid
