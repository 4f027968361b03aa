// EmbeddingBagCollection as custom ops of ONNX Runtime: T tables, then by the attribute layout
//
//   0 ragged  indices [N] of each table, then offsets of each
//   1 packed  indices [N] and offsets [T * B + 1] of all
//   2 rows    indices [B, L] of each table
//
// and, with the attribute weighted, per_sample_weights as there are indices.
//
// The first table is an input of its own, which gives the op its type. All other inputs are one
// variadic input of any types, which are checked in every run. A model also has a function of each
// op's name, and a function has a fixed number of inputs. So a model needs a name for every number
// of inputs that it uses; hence the names below.
#include "embedding_bag_collection/ort_embedding_bag_collection.h"

#include <memory>

#include "ort/constant_table.h"
#include "ort/session_entries.h"

namespace lucid {
namespace ort {
namespace {

constexpr const char* kNames[] = {
    "EmbeddingBagCollection",   "EmbeddingBagCollection_1", "EmbeddingBagCollection_2",
    "EmbeddingBagCollection_3", "EmbeddingBagCollection_4", "EmbeddingBagCollection_5",
    "EmbeddingBagCollection_6", "EmbeddingBagCollection_7",
};

const CollectionOp& Self(const CustomOp* op) { return *static_cast<const CollectionOp*>(op); }

const char* NameOf(ElementType type) {
  switch (type) {
    case kElementFloat:
      return "float32";
    case kElementFloat16:
      return "float16";
    case kElementBFloat16:
      return "bfloat16";
    case kElementDouble:
      return "float64";
    case kElementInt32:
      return "int32";
    case kElementInt64:
      return "int64";
    default:
      return "another type";
  }
}

}  // namespace

Status* CollectionKernel::Init(const CollectionOp& node_op, const KernelInfo* info) {
  op = &node_op;
  LUCID_RETURN_IF_ERROR(SessionMaxOutputBytes(*op->runtime, info, &max_output_bytes));
  Attributes attributes(api(), info);
  inputs.num_tables = attributes.Int("num_tables", -1);
  inputs.layout = attributes.Int("layout", kRagged);
  inputs.weighted = attributes.Int("weighted", 0) != 0;
  size_t count = 0;
  LUCID_RETURN_IF_ERROR(Call<KernelInfo_GetInputCount>(api(), info, &count));
  if (!attributes.status().ok()) return ToOrt(attributes.status());
  if (!inputs.Fit(count)) {
    return ToOrt(InvalidArgument("num_tables = %lld and layout = %lld do not match %zu inputs",
                                 static_cast<long long>(inputs.num_tables),
                                 static_cast<long long>(inputs.layout), count));
  }
  args.size_bytes = sizeof(args);
  args.dtype = args.output_type = op->dtype;
  args.scale_stride = 4;
  args.indices_rank = inputs.Flat() ? 1 : 2;
  constants = std::make_unique<ConstantTable[]>(inputs.Tables());
  lucid::Status status =
      ReadBagAttributes(&attributes, op->dtype, inputs.Flat(), inputs.weighted, &args);
  if (status.ok() && inputs.layout == kPacked && !args.include_last_offset) {
    status = InvalidArgument("layout = 1 (packed) needs include_last_offset = 1, got 0");
  }
  return ToOrt(status);
}

namespace {

lucid::Status CheckIndexType(const char* name, ElementType type, int32_t* index_type) {
  if (type != kElementInt32 && type != kElementInt64) {
    return InvalidArgument("%s is %s, expected int32 or int64", name, NameOf(type));
  }
  *index_type = type == kElementInt64 ? kInt64 : kInt32;
  return lucid::Status();
}

lucid::Status CheckFloatType(const char* name, ElementType type, DType expected) {
  if (type == kElementOf[expected]) return lucid::Status();
  return InvalidArgument("%s is %s, the weight of table 0 is %s: they must be equal", name,
                         NameOf(type), NameOf(kElementOf[expected]));
}

}  // namespace

Status* CollectionKernel::BindTable(const KernelContext* context, size_t t,
                                    EmbeddingBagArgs* a) const {
  const Runtime& runtime = *op->runtime;
  const ConstantTable& constant = constants[t];
  Shape weight, indices, offsets, weights;
  ElementType weight_type = kElementOf[op->dtype], index_type = kElementInt64;
  ElementType offset_type = kElementInt64, weights_type = weight_type;
  a->weight = constant.data;
  if (!constant.data) {
    LUCID_RETURN_IF_ERROR(GetInput(runtime, context, t, &weight, &a->weight, &weight_type));
  }
  LUCID_RETURN_IF_ERROR(
      GetInput(runtime, context, inputs.Indices(t), &indices, &a->indices, &index_type));
  if (inputs.Flat()) {
    LUCID_RETURN_IF_ERROR(
        GetInput(runtime, context, inputs.Offsets(t), &offsets, &a->offsets, &offset_type));
  }
  if (inputs.weighted) {
    LUCID_RETURN_IF_ERROR(GetInput(runtime, context, inputs.Weights(t), &weights,
                                   &a->per_sample_weights, &weights_type));
  }
  lucid::Status status = CheckFloatType("weight", weight_type, op->dtype);
  if (status.ok()) status = CheckIndexType("indices", index_type, &a->index_type);
  if (status.ok()) status = CheckIndexType("offsets", offset_type, &a->offset_type);
  if (status.ok()) status = CheckFloatType("per_sample_weights", weights_type, op->dtype);
  if (status.ok()) {
    status = SetEmbeddingBagShapes(constant.data ? constant.shape.shape : weight.shape,
                                   indices.shape, inputs.Flat() ? &offsets.shape : nullptr,
                                   inputs.weighted ? &weights.shape : nullptr, a);
  }
  return ToOrt(InTable(static_cast<int64_t>(t), status));
}

Status* CollectionKernel::Bind(const KernelContext* context, Bound* bound) const {
  bound->tables.assign(inputs.Tables(), args);
  for (size_t t = 0; t < bound->tables.size(); ++t) {
    LUCID_RETURN_IF_ERROR(BindTable(context, t, &bound->tables[t]));
  }
  EmbeddingBagCollectionArgs& all = bound->args;
  all.size_bytes = sizeof(all);
  all.tables = bound->tables.data();
  all.num_tables = inputs.num_tables;
  all.packed = inputs.layout == kPacked;
  return ToOrt(CheckEmbeddingBagCollectionInputs(all, &bound->sizes));
}

Status* CollectionKernel::AddOutput(KernelContext* context, Bound* bound) const {
  const int64_t dims[2] = {bound->sizes.num_bags, bound->sizes.columns};
  return ort::AddOutput(api(), context, op->name, max_output_bytes, 0, {dims, 2},
                        kSizeOf[op->dtype], &bound->output, &bound->args.output);
}

namespace {

struct Kernel : CollectionKernel {
  Isa isa;

  static Status* Create(const CustomOp& op, const Api* api, const KernelInfo* info,
                        std::unique_ptr<Kernel>* kernel);
  Status* Compute(KernelContext* context) const;
};

Status* Kernel::Create(const CustomOp& custom_op, const Api* api, const KernelInfo* info,
                       std::unique_ptr<Kernel>* out) {
  auto kernel = std::make_unique<Kernel>();
  const CollectionOp& op = Self(&custom_op);
  const Runtime& runtime = *op.runtime;
  LUCID_RETURN_IF_ERROR(ort::ToOrt(api, op.name, ActiveIsa(&kernel->isa)));
  LUCID_RETURN_IF_ERROR(kernel->Init(op, info));
  for (size_t t = 0; t < kernel->inputs.Tables(); ++t) {
    const Value* weight = nullptr;
    LUCID_RETURN_IF_ERROR(ConstantInput(api, info, t, &weight));
    if (!weight) continue;
    ConstantTable& table = kernel->constants[t];
    ElementType type;
    LUCID_RETURN_IF_ERROR(GetShape(runtime, weight, &table.shape, &type));
    if (type != kElementOf[kernel->op->dtype]) continue;  // an error of the run
    LUCID_RETURN_IF_ERROR(GetData(api, weight, &table.data));
    size_t bytes = kSizeOf[kernel->op->dtype];
    for (size_t i = 0; i < table.shape.shape.rank; ++i) {
      bytes *= static_cast<size_t>(table.shape.shape.dims[i]);
    }
    LUCID_RETURN_IF_ERROR(PlaceConstantTable(runtime, info, bytes, &table.data, &table.memory));
  }
  *out = std::move(kernel);
  return nullptr;
}

Status* Kernel::Compute(KernelContext* context) const {
  Bound bound;
  LUCID_RETURN_IF_ERROR(Bind(context, &bound));
  std::vector<int64_t> longest(bound.tables.size());
  LUCID_RETURN_IF_ERROR(ToOrt(CheckCollectionOffsets(bound.args, longest.data())));
  LUCID_RETURN_IF_ERROR(AddOutput(context, &bound));
  Host host = {api(), context};
  return ToOrt(RunCheckedEmbeddingBagCollection(bound.args, bound.sizes, longest.data(), isa,
                                                host.Threads()));
}

// ---- Shape inference: [B, sum of D] where the sizes are known.

Status* InferShape(const Api* api, ShapeInferContext* context) {
  Inputs inputs = {-1, -1, false};
  int64_t weighted = 0;
  size_t count = 0;
  LUCID_RETURN_IF_ERROR(InferInt(api, context, "num_tables", &inputs.num_tables));
  LUCID_RETURN_IF_ERROR(InferInt(api, context, "layout", &inputs.layout));
  LUCID_RETURN_IF_ERROR(InferInt(api, context, "weighted", &weighted));
  LUCID_RETURN_IF_ERROR(Call<ShapeInferContext_GetInputCount>(api, context, &count));
  inputs.weighted = weighted != 0;
  if (!inputs.Fit(count)) return nullptr;  // the kernel says what is wrong
  Dim output[2];
  output[1].size = 0;
  ElementType type = kElementFloat;
  for (size_t t = inputs.Tables(); t-- > 0;) {  // the first one last: its type is the op's
    Dim weight[2];
    LUCID_RETURN_IF_ERROR(InferInput(api, context, t, 2, &type, weight));
    const bool known = weight[1].size >= 0 && output[1].size >= 0;
    output[1].size = known && weight[1].size <= INT32_MAX ? output[1].size + weight[1].size : -1;
  }
  LUCID_RETURN_IF_ERROR(InferBags(api, context,
                                  inputs.Flat() ? inputs.Offsets(0) : inputs.Indices(0),
                                  inputs.Flat(), &output[0]));
  if (inputs.layout == kPacked) {
    output[0].name = nullptr;
    if (output[0].size >= 0) output[0].size /= inputs.num_tables;
  }
  return InferOutput(api, context, 0, type, output, 2);
}

Status* LUCID_ORT_CALL InferOutputShape(const CustomOp* op, ShapeInferContext* context) {
  return InferShape(Self(op).runtime->api, context);
}

// ---- The description of an op.

constexpr int kVariadic = 2;  // INPUT_OUTPUT_VARIADIC

const char* LUCID_ORT_CALL GetName(const CustomOp* op) { return Self(op).name; }
size_t LUCID_ORT_CALL GetInputCount(const CustomOp*) { return 2; }
size_t LUCID_ORT_CALL GetOutputCount(const CustomOp*) { return 1; }
ElementType LUCID_ORT_CALL GetInputType(const CustomOp* op, size_t index) {
  return index == 0 ? kElementOf[Self(op).dtype] : kElementUndefined;
}
ElementType LUCID_ORT_CALL GetOutputType(const CustomOp* op, size_t) {
  return kElementOf[Self(op).dtype];
}
int LUCID_ORT_CALL GetCharacteristic(const CustomOp*, size_t index) {
  return index == 0 ? 0 : kVariadic;
}
int LUCID_ORT_CALL GetMinArity(const CustomOp*) { return 1; }

}  // namespace

Status* AddCollectionOps(const Runtime& runtime, CustomOpDomain* domain, const CustomOp& kernel) {
  for (const char* const name : kNames) {
    for (const DType dtype : {kFloat32, kFloat16, kBFloat16, kFloat64}) {
      CollectionOp* const op = new CollectionOp();
      static_cast<CustomOp&>(*op) = kernel;
      op->GetName = GetName;
      op->GetInputType = GetInputType;
      op->GetInputTypeCount = GetInputCount;
      op->GetInputCharacteristic = GetCharacteristic;
      op->GetVariadicInputMinArity = GetMinArity;
      op->GetOutputType = GetOutputType;
      op->GetOutputTypeCount = GetOutputCount;
      op->InferOutputShapeFn = runtime.has_data_reference ? InferOutputShape : nullptr;
      op->runtime = &runtime;
      op->name = name;
      op->dtype = dtype;
      LUCID_RETURN_IF_ERROR(Call<CustomOpDomain_Add>(runtime.api, domain, op));
    }
  }
  return nullptr;
}

Status* AddEmbeddingBagCollectionOps(const Runtime& runtime, CustomOpDomain* domain) {
  CustomOp kernel = DescribeOp();
  KernelFunctions<Kernel>::SetIn(&kernel);
  return AddCollectionOps(runtime, domain, kernel);
}

}  // namespace ort
}  // namespace lucid
