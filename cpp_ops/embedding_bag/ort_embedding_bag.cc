// EmbeddingBag as custom ops of ONNX Runtime, one per combination of inputs:
//
//   EmbeddingBag            (weight, indices [N], offsets)
//   EmbeddingBagWeighted    (weight, indices [N], offsets, per_sample_weights [N])
//   EmbeddingBag2D          (weight, indices [B, L])
//   EmbeddingBag2DWeighted  (weight, indices [B, L], per_sample_weights [B, L])
//
// and the same four as QuantizedEmbeddingBag..., with (codes, scale) for weight, as
// QuantizedEmbeddingBagZeroPoint... with (codes, scale, zero_point), and as
// QuantizedEmbeddingBagBias... with (codes, scale, bias).
//
// Optional inputs would be one name instead, but shape inference over an absent one crashes
// runtimes before 1.24, and a model-local function of the same name could not express them.
#include "embedding_bag/ort_embedding_bag.h"

#include <cmath>
#include <cstdio>
#include <initializer_list>
#include <limits>
#include <memory>
#include <new>

#include "base/pages.h"
#include "base/types.h"
#include "embedding_bag/embedding_bag.h"
#include "ort/constant_table.h"
#include "ort/register.h"
#include "ort/session_entries.h"

namespace lucid {
namespace ort {

namespace {

constexpr Form kForms[] = {
    {"EmbeddingBag", Table::kRows, true, false},
    {"EmbeddingBagWeighted", Table::kRows, true, true},
    {"EmbeddingBag2D", Table::kRows, false, false},
    {"EmbeddingBag2DWeighted", Table::kRows, false, true},
    {"QuantizedEmbeddingBag", Table::kScale, true, false},
    {"QuantizedEmbeddingBagWeighted", Table::kScale, true, true},
    {"QuantizedEmbeddingBag2D", Table::kScale, false, false},
    {"QuantizedEmbeddingBag2DWeighted", Table::kScale, false, true},
    {"QuantizedEmbeddingBagZeroPoint", Table::kZeroPoint, true, false},
    {"QuantizedEmbeddingBagZeroPointWeighted", Table::kZeroPoint, true, true},
    {"QuantizedEmbeddingBagZeroPoint2D", Table::kZeroPoint, false, false},
    {"QuantizedEmbeddingBagZeroPoint2DWeighted", Table::kZeroPoint, false, true},
    {"QuantizedEmbeddingBagBias", Table::kBias, true, false},
    {"QuantizedEmbeddingBagBiasWeighted", Table::kBias, true, true},
    {"QuantizedEmbeddingBagBias2D", Table::kBias, false, false},
    {"QuantizedEmbeddingBagBias2DWeighted", Table::kBias, false, true},
};

// TensorProto's numbers, which the attribute codes_type has.
constexpr int64_t kProtoUint4 = 21, kProtoInt4 = 22;

const Op& Self(const CustomOp* op) { return *static_cast<const Op*>(op); }

lucid::Status ReadAttributes(const Op& op, const Api* api, const KernelInfo* info,
                             EmbeddingBagArgs* args, int64_t* embedding_dim) {
  Attributes attributes(api, info);
  const int64_t stored = kElementOf[op.dtype];
  int64_t codes_type = stored;
  if (op.form->Quantized()) {
    codes_type = attributes.Int("codes_type", stored);
    *embedding_dim = attributes.Int("embedding_dim", -1);
  }
  const lucid::Status status =
      ReadBagAttributes(&attributes, op.dtype, op.form->flat, op.form->weighted, args);
  if (!status.ok() || codes_type == stored) return status;
  if (op.dtype != kUint8 || (codes_type != kProtoInt4 && codes_type != kProtoUint4)) {
    return InvalidArgument("codes_type = %lld does not match codes of type %lld",
                           static_cast<long long>(codes_type), static_cast<long long>(stored));
  }
  args->dtype = codes_type == kProtoInt4 ? kInt4 : kUint4;
  return status;
}

// ---- The kernel of one node.

struct Kernel : BagKernel {
  Isa isa;
  std::shared_ptr<const void> table_memory;  // where args.weight is not the runtime's own
  std::unique_ptr<float[]> pairs;            // where args.scale is not

  static Status* Create(const CustomOp& op, const Api* api, const KernelInfo* info,
                        std::unique_ptr<Kernel>* kernel);
  Status* Compute(KernelContext* context) const;
  Status* BindNumbers(const KernelInfo* info);
  Status* JoinRows(const KernelInfo* info, const void* const* numbers);
};

// Where the zero_point or the bias belongs.
const void** SecondNumber(const Form& form, EmbeddingBagArgs* args) {
  return form.table == Table::kBias ? &args->bias : &args->zero_point;
}

lucid::Status CheckRowNumbers(const char* name, TensorShape shape, int64_t rows) {
  if (shape.rank == 1 && shape.dims[0] == rows) return lucid::Status();
  if (shape.rank != 1) {
    return InvalidArgument("%s has %lld dimensions, expected [V]", name,
                           static_cast<long long>(shape.rank));
  }
  return InvalidArgument("%s has shape [%lld], codes has %lld rows", name,
                         static_cast<long long>(shape.dims[0]), static_cast<long long>(rows));
}

}  // namespace

lucid::Status ReadBagAttributes(Attributes* attributes, DType dtype, bool flat, bool weighted,
                                EmbeddingBagArgs* args) {
  const int64_t mode = attributes->Int("mode", kMean);
  const int64_t negative = attributes->Int("negative", kRefuse);
  const int64_t divisor = attributes->Int("divisor", kNone);
  args->padding_idx = attributes->Int("padding_idx", kNoPadding);
  args->max_norm =
      attributes->Double("max_norm", "max_norm_lo", std::numeric_limits<float>::infinity());
  args->norm_type = attributes->Double("norm_type", "norm_type_lo", 2);
  if (flat) args->include_last_offset = attributes->Int("include_last_offset", 0) != 0;
  const int64_t stash_type = dtype == kFloat64 ? kElementDouble : kElementFloat;
  const int64_t found = attributes->Int("stash_type", stash_type);
  if (!attributes->status().ok()) return attributes->status();
  lucid::Status valid = CheckMode(mode);
  if (valid.ok()) valid = CheckNegative(negative);
  if (valid.ok()) valid = CheckDivisor(divisor);
  if (!valid.ok()) return valid;
  args->mode = static_cast<int32_t>(mode);
  args->negative = static_cast<int32_t>(negative);
  args->divisor = static_cast<int32_t>(divisor);
  if (found != stash_type) {
    return InvalidArgument("stash_type = %lld must be %lld for this type of weight",
                           static_cast<long long>(found), static_cast<long long>(stash_type));
  }
  return CheckEmbeddingBagAttributes(*args, weighted);
}

Status* InferBags(const Api* api, ShapeInferContext* context, size_t index, bool flat, Dim* bags) {
  ElementType type;
  Dim dims[2];
  LUCID_RETURN_IF_ERROR(InferInput(api, context, index, flat ? 1 : 2, &type, dims));
  *bags = dims[0];
  if (!flat) return nullptr;
  int64_t include_last_offset = 0;
  LUCID_RETURN_IF_ERROR(InferInt(api, context, "include_last_offset", &include_last_offset));
  // A symbol less one has no name.
  if (include_last_offset) *bags = {dims[0].size > 0 ? dims[0].size - 1 : -1, nullptr};
  return nullptr;
}

// [V, D] of a table that may hold two values in a byte.
lucid::Status BagKernel::SetTableShape(TensorShape given, int64_t dims[2],
                                       TensorShape* shape) const {
  *shape = given;
  if (!op->form->Quantized() || given.rank != 2) return lucid::Status();
  const bool nibbles = args.dtype == kInt4 || args.dtype == kUint4;
  dims[0] = given.dims[0];
  dims[1] = nibbles || embedding_dim >= 0 ? embedding_dim : given.dims[1];
  if (dims[1] < 0 || (nibbles ? dims[1] / 2 + dims[1] % 2 : dims[1]) != given.dims[1]) {
    return InvalidArgument(
        "codes has shape [%lld, %lld], which does not hold embedding_dim = %lld values per row",
        static_cast<long long>(given.dims[0]), static_cast<long long>(given.dims[1]),
        static_cast<long long>(embedding_dim));
  }
  *shape = {dims, 2};
  return lucid::Status();
}

Status* BagKernel::Bind(const KernelContext* context, Bound* bound) const {
  const Runtime& runtime = *op->runtime;
  const Api* api = runtime.api;
  const Form& form = *op->form;

  EmbeddingBagArgs& a = bound->args;
  a = args;
  Shape table, indices, offsets, weights, scale, second;
  if (!weight_is_constant) {
    LUCID_RETURN_IF_ERROR(GetInput(runtime, context, 0, &table, &a.weight));
  }
  if (form.Quantized() && bound_numbers < 0) {
    LUCID_RETURN_IF_ERROR(GetInput(runtime, context, 1, &scale, &a.scale));
    if (form.TwoNumbers()) {
      LUCID_RETURN_IF_ERROR(GetInput(runtime, context, 2, &second, SecondNumber(form, &a)));
    }
  }
  LUCID_RETURN_IF_ERROR(GetInput(runtime, context, form.IndicesInput(), &indices, &a.indices));
  if (form.flat) {
    LUCID_RETURN_IF_ERROR(GetInput(runtime, context, form.OffsetsInput(), &offsets, &a.offsets));
  }
  if (form.weighted) {
    LUCID_RETURN_IF_ERROR(
        GetInput(runtime, context, form.WeightsInput(), &weights, &a.per_sample_weights));
  }

  TensorShape table_shape;
  int64_t table_dims[2];
  lucid::Status status =
      SetTableShape(weight_is_constant ? weight.shape : table.shape, table_dims, &table_shape);
  if (status.ok()) {
    status = SetEmbeddingBagShapes(table_shape, indices.shape, form.flat ? &offsets.shape : nullptr,
                                   form.weighted ? &weights.shape : nullptr, &a);
  }
  if (status.ok() && form.Quantized()) {
    const bool bound = bound_numbers >= 0;
    const TensorShape numbers = {&bound_numbers, 1};
    status = CheckRowNumbers("scale", bound ? numbers : scale.shape, a.weight_shape[0]);
    if (status.ok() && form.TwoNumbers() && !bound) {
      status = CheckRowNumbers(form.table == Table::kBias ? "bias" : "zero_point", second.shape,
                               a.weight_shape[0]);
    }
  }
  if (status.ok()) status = CheckEmbeddingBagInputs(a, &bound->num_bags);
  return ToOrt(api, op->form->name, status);
}

Status* BagKernel::AddOutput(KernelContext* context, Bound* bound) const {
  EmbeddingBagArgs& a = bound->args;
  const int64_t dims[2] = {bound->num_bags, a.weight_shape[1]};
  return ort::AddOutput(api(), context, op->form->name, max_output_bytes, 0, {dims, 2},
                        kSizeOf[a.output_type], &bound->output, &a.output);
}

Status* BagKernel::Init(const Op& node_op, const Api* api, const KernelInfo* info) {
  op = &node_op;
  args.size_bytes = sizeof(args);
  args.dtype = op->dtype;
  args.index_type = op->index_type;
  args.offset_type = op->offset_type;
  args.indices_rank = op->form->flat ? 1 : 2;
  args.output_type = op->output_type;
  args.scale_type = op->output_type;
  args.scale_stride = op->output_type == kFloat16 ? 2 : 4;
  LUCID_RETURN_IF_ERROR(SessionMaxOutputBytes(*op->runtime, info, &max_output_bytes));
  return ToOrt(api, op->form->name, ReadAttributes(*op, api, info, &args, &embedding_dim));
}

namespace {

Status* Kernel::Compute(KernelContext* context) const {
  const Api* api = op->runtime->api;
  Bound bound;
  int64_t longest;
  LUCID_RETURN_IF_ERROR(Bind(context, &bound));
  LUCID_RETURN_IF_ERROR(ToOrt(api, op->form->name, CheckOffsets(bound.args, &longest)));
  LUCID_RETURN_IF_ERROR(AddOutput(context, &bound));
  Host host = {api, context};
  return ToOrt(api, op->form->name,
               RunCheckedEmbeddingBag(bound.args, bound.num_bags, longest, isa, host.Threads()));
}

// Constant scales, and zero_points or biases, move to where they cost the fewest cache lines:
// behind the values of their rows or, where tables stay where they are, beside each other.
Status* Kernel::BindNumbers(const KernelInfo* info) {
  const Api* api = op->runtime->api;
  const size_t count = op->form->TwoNumbers() ? 2 : 1;
  const void* numbers[2] = {nullptr, nullptr};
  int64_t rows = -1;
  for (size_t i = 0; i < count; ++i) {
    const Value* value;
    LUCID_RETURN_IF_ERROR(ConstantInput(api, info, i + 1, &value));
    if (!value) return nullptr;
    Shape shape;
    LUCID_RETURN_IF_ERROR(GetShape(*op->runtime, value, &shape));
    LUCID_RETURN_IF_ERROR(GetData(api, value, &numbers[i]));
    // A wrong shape is an error of the run.
    if (shape.shape.rank != 1 || (i > 0 && shape.shape.dims[0] != rows)) return nullptr;
    rows = shape.shape.dims[0];
  }
  if (weight_is_constant && weight.shape.rank == 2 && weight.shape.dims[0] == rows) {
    LUCID_RETURN_IF_ERROR(JoinRows(info, numbers));
  }
  if (args.row_stride == 0) {
    if (count < 2) return nullptr;
    const bool half = args.scale_type == kFloat16;
    pairs.reset(new (std::nothrow) float[static_cast<size_t>(rows) * 2]);
    if (!pairs) return nullptr;  // it works without
    const size_t bytes = static_cast<size_t>(rows) * 2 * sizeof(float);
    if (bytes >= kLargeTable) BackWithHugePages(pairs.get(), bytes);
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t i = 0; i < 2; ++i) {
        pairs[static_cast<size_t>(2 * r + i)] =
            half ? ToAccumulator(LoadUnaligned<Float16>(numbers[i], r))
                 : LoadUnaligned<float>(numbers[i], r);
      }
    }
    args.scale = pairs.get();
    *SecondNumber(*op->form, &args) = pairs.get() + 1;
    args.scale_type = kFloat32;
    args.scale_stride = 2 * sizeof(float);
  }
  bound_numbers = rows;
  return nullptr;
}

// A copy of the table in which every row's numbers follow its values, if there is to be one.
Status* Kernel::JoinRows(const KernelInfo* info, const void* const* numbers) {
  constexpr size_t kNumber = sizeof(float);
  const size_t count = op->form->TwoNumbers() ? 2 : 1;
  const size_t codes = static_cast<size_t>(weight.shape.dims[1]);  // a byte each, or two in one
  const size_t stride = codes + count * kNumber;
  if (!IsWorthJoining(codes)) return nullptr;
  RowPart parts[3] = {{static_cast<const char*>(args.weight), codes}};
  std::unique_ptr<float[]> wide[2];  // of float16, in the type that has the faster loop
  for (size_t i = 0; i < count; ++i) {
    parts[1 + i] = {static_cast<const char*>(numbers[i]), kNumber};
    if (args.scale_type != kFloat16) continue;
    wide[i].reset(new (std::nothrow) float[static_cast<size_t>(weight.shape.dims[0])]);
    if (!wide[i]) return nullptr;
    for (int64_t r = 0; r < weight.shape.dims[0]; ++r) {
      wide[i][static_cast<size_t>(r)] = ToAccumulator(LoadUnaligned<Float16>(numbers[i], r));
    }
    parts[1 + i].data = reinterpret_cast<const char*>(wide[i].get());
  }
  JoinedRows joined;
  LUCID_RETURN_IF_ERROR(JoinConstantRows(*op->runtime, info, parts, 1 + count,
                                         static_cast<size_t>(weight.shape.dims[0]), &joined));
  if (!joined.memory) return nullptr;
  table_memory = joined.memory;
  args.weight = joined.data;
  args.row_stride = static_cast<int32_t>(stride);
  args.scale = joined.data + codes;
  args.scale_type = kFloat32;
  args.scale_stride = args.row_stride;
  if (count > 1) *SecondNumber(*op->form, &args) = joined.data + codes + kNumber;
  return nullptr;
}

Status* Kernel::Create(const CustomOp& custom_op, const Api* api, const KernelInfo* info,
                       std::unique_ptr<Kernel>* out) {
  const Op& op = Self(&custom_op);
  auto kernel = std::make_unique<Kernel>();
  LUCID_RETURN_IF_ERROR(ToOrt(api, op.form->name, ActiveIsa(&kernel->isa)));
  LUCID_RETURN_IF_ERROR(kernel->Init(op, api, info));
  EmbeddingBagArgs& args = kernel->args;

  // The runtime keeps a constant table at its address for the life of the session.
  const Value* weight = nullptr;
  size_t bytes = 0;
  LUCID_RETURN_IF_ERROR(ConstantInput(api, info, 0, &weight));
  if (weight) {
    LUCID_RETURN_IF_ERROR(GetShape(*op.runtime, weight, &kernel->weight));
    LUCID_RETURN_IF_ERROR(GetData(api, weight, &args.weight));
    kernel->weight_is_constant = true;
    bytes = kSizeOf[op.dtype];
    for (size_t i = 0; i < kernel->weight.shape.rank; ++i) {
      bytes *= static_cast<size_t>(kernel->weight.shape.dims[i]);
    }
  }
  if (op.form->Quantized()) LUCID_RETURN_IF_ERROR(kernel->BindNumbers(info));
  if (weight && args.row_stride == 0) {
    LUCID_RETURN_IF_ERROR(
        PlaceConstantTable(*op.runtime, info, bytes, &args.weight, &kernel->table_memory));
  }
  *out = std::move(kernel);
  return nullptr;
}

// ---- Shape inference: [B, D] where both are known.

// The runtime asks one op of each name, whatever the types at hand: only op.form may be believed.
Status* InferShape(const Op& op, const Api* api, ShapeInferContext* context) {
  const Form& form = *op.form;
  Dim weight[2], unused[2];
  ElementType output_type;
  LUCID_RETURN_IF_ERROR(InferInput(api, context, 0, 2, &output_type, weight));
  if (form.Quantized()) {
    LUCID_RETURN_IF_ERROR(InferInput(api, context, 1, 1, &output_type, unused));
    int64_t dim = -1;
    LUCID_RETURN_IF_ERROR(InferInt(api, context, "embedding_dim", &dim));
    if (dim >= 0) weight[1] = {dim, nullptr};
  }
  Dim output[2];
  LUCID_RETURN_IF_ERROR(InferBags(
      api, context, form.flat ? form.OffsetsInput() : form.IndicesInput(), form.flat, &output[0]));
  output[1] = weight[1];
  return InferOutput(api, context, 0, output_type, output, 2);
}

Status* LUCID_ORT_CALL InferOutputShape(const CustomOp* op, ShapeInferContext* context) {
  return InferShape(Self(op), Self(op).runtime->api, context);
}

// ---- The description of an op.

const char* LUCID_ORT_CALL GetName(const CustomOp* op) { return Self(op).form->name; }
size_t LUCID_ORT_CALL GetInputCount(const CustomOp* op) { return Self(op).form->Inputs(); }
size_t LUCID_ORT_CALL GetOutputCount(const CustomOp*) { return 1; }
ElementType LUCID_ORT_CALL GetInputType(const CustomOp* op, size_t index) {
  const Op& self = Self(op);
  const Form& form = *self.form;
  if (index == 0) return kElementOf[self.dtype];
  if (index == form.IndicesInput()) return kElementOfIndex[self.index_type];
  if (form.flat && index == form.OffsetsInput()) return kElementOfIndex[self.offset_type];
  return kElementOf[self.output_type];
}
ElementType LUCID_ORT_CALL GetOutputType(const CustomOp* op, size_t) {
  return kElementOf[Self(op).output_type];
}

Op MakeOp(const Runtime& runtime, const CustomOp& kernel, const Form& form, DType dtype,
          DType output_type, IndexType index_type, IndexType offset_type) {
  Op op = {};
  static_cast<CustomOp&>(op) = kernel;
  op.GetName = GetName;
  op.GetInputType = GetInputType;
  op.GetInputTypeCount = GetInputCount;
  op.GetOutputType = GetOutputType;
  op.GetOutputTypeCount = GetOutputCount;
  op.InferOutputShapeFn = runtime.has_data_reference ? InferOutputShape : nullptr;
  op.runtime = &runtime;
  op.form = &form;
  op.dtype = dtype;
  op.output_type = output_type;
  op.index_type = index_type;
  op.offset_type = offset_type;
  return op;
}

}  // namespace

Status* AddBagOps(const Runtime& runtime, CustomOpDomain* domain, const CustomOp& kernel) {
  struct Types {
    DType dtype, output_type;
  };
  constexpr Types kRows[] = {
      {kFloat32, kFloat32}, {kFloat16, kFloat16}, {kBFloat16, kBFloat16}, {kFloat64, kFloat64}};
  constexpr Types kCodes[] = {
      {kInt8, kFloat32}, {kInt8, kFloat16}, {kUint8, kFloat32}, {kUint8, kFloat16}};
  for (const Form& form : kForms) {
    for (const Types& types : form.Quantized() ? kCodes : kRows) {
      for (const IndexType index_type : {kInt32, kInt64}) {
        for (const IndexType offset_type : {kInt32, kInt64}) {
          if (!form.flat && offset_type != kInt32) continue;  // there is no offsets to have a type
          const Op* op = new Op(MakeOp(runtime, kernel, form, types.dtype, types.output_type,
                                       index_type, offset_type));
          Status* status = Call<CustomOpDomain_Add>(runtime.api, domain, op);
          if (status) return status;
        }
      }
    }
  }
  return nullptr;
}

Status* AddEmbeddingBagOps(const Runtime& runtime, CustomOpDomain* domain) {
  CustomOp kernel = DescribeOp();
  KernelFunctions<Kernel>::SetIn(&kernel);
  return AddBagOps(runtime, domain, kernel);
}

}  // namespace ort
}  // namespace lucid
