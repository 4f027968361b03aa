// What the adapters of EmbeddingBagCollection for ONNX Runtime's execution providers have in
// common: the attributes and tensors of a node as the arguments of a kernel, and the registration.
#pragma once

#include <memory>
#include <vector>

#include "embedding_bag/ort_embedding_bag.h"

namespace lucid {
namespace ort {

enum Layout : int64_t { kRagged = 0, kPacked = 1, kRows = 2 };

struct CollectionOp : CustomOp {
  const Runtime* runtime;
  const char* name;
  DType dtype;
};

// Which input is which.
struct Inputs {
  int64_t num_tables, layout;
  bool weighted;

  size_t Tables() const { return static_cast<size_t>(num_tables); }
  bool Flat() const { return layout != kRows; }
  size_t Each() const { return layout == kPacked ? 1 : Tables(); }  // how many indices there are
  size_t Indices(size_t t) const { return Tables() + (layout == kPacked ? 0 : t); }
  size_t Offsets(size_t t) const { return Indices(t) + Each(); }
  size_t Weights(size_t t) const { return Indices(t) + Each() * (1u + Flat()); }
  size_t Count() const { return Tables() + Each() * (1u + Flat() + weighted); }

  // Whether a node may have this many tables, with so many inputs.
  bool Fit(size_t count) const {
    return num_tables >= 1 && static_cast<size_t>(num_tables) <= count && layout >= kRagged &&
           layout <= kRows && Count() == count;
  }
};

// The kernel of one node.
struct CollectionKernel {
  struct ConstantTable {
    const void* data = nullptr;  // null: an input
    Shape shape;
    std::shared_ptr<const void> memory;  // where data is not the runtime's own
  };

  // A call, checked but for the values of offsets and indices.
  struct Bound {
    std::vector<EmbeddingBagArgs> tables;
    EmbeddingBagCollectionArgs args = {};
    CollectionSizes sizes;
    Value* output = nullptr;
  };

  const CollectionOp* op = nullptr;
  Inputs inputs = {};
  EmbeddingBagArgs args = {};  // the attributes of every table, checked
  std::unique_ptr<ConstantTable[]> constants;
  int64_t max_output_bytes = INT64_MAX;

  const Api* api() const { return op->runtime->api; }

  // Reads and checks the attributes.
  Status* Init(const CollectionOp& node_op, const KernelInfo* info);

  // Adds the inputs of a run to the attributes.
  Status* Bind(const KernelContext* context, Bound* bound) const;

  // Adds the output of a run.
  Status* AddOutput(KernelContext* context, Bound* bound) const;

  Status* ToOrt(const lucid::Status& status) const { return ort::ToOrt(api(), op->name, status); }

 private:
  Status* BindTable(const KernelContext* context, size_t t, EmbeddingBagArgs* a) const;
};

// Adds every name and type to the domain, as ops that are like `kernel`: see AddBagOps.
Status* AddCollectionOps(const Runtime& runtime, CustomOpDomain* domain, const CustomOp& kernel);

}  // namespace ort
}  // namespace lucid
