// EmbeddingBag as four custom ops of ONNX Runtime, one per combination of inputs:
//
//   EmbeddingBag            (weight, indices [N], offsets)
//   EmbeddingBagWeighted    (weight, indices [N], offsets, per_sample_weights [N])
//   EmbeddingBag2D          (weight, indices [B, L])
//   EmbeddingBag2DWeighted  (weight, indices [B, L], per_sample_weights [B, L])
//
// Optional inputs would be one name instead, but shape inference over an absent one crashes
// runtimes before 1.24, and a model-local function of the same name could not express them.
#include <cmath>
#include <cstdio>
#include <initializer_list>
#include <limits>
#include <memory>
#include <new>

#include "base/pages.h"
#include "base/types.h"
#include "embedding_bag/embedding_bag.h"
#include "ort/register.h"

namespace lucid {
namespace ort {
namespace {

struct Form {
  const char* name;
  bool flat;  // indices [N] with offsets
  bool weighted;

  size_t Inputs() const { return 2u + flat + weighted; }
  size_t WeightsInput() const { return flat ? 3 : 2; }
};

constexpr Form kForms[] = {
    {"EmbeddingBag", true, false},
    {"EmbeddingBagWeighted", true, true},
    {"EmbeddingBag2D", false, false},
    {"EmbeddingBag2DWeighted", false, true},
};

// Indexed by DType and IndexType.
constexpr ElementType kElementOf[] = {kElementFloat, kElementFloat16, kElementBFloat16,
                                      kElementDouble};
constexpr ElementType kElementOfIndex[] = {kElementInt32, kElementInt64};

// One name with one combination of types.
struct Op : CustomOp {
  const Runtime* runtime;
  const Form* form;
  DType dtype;
  IndexType index_type, offset_type;
};

const Op& Self(const CustomOp* op) { return *static_cast<const Op*>(op); }

// Frees the status and tells whether it was an error.
bool Failed(const Api* api, Status* status) {
  if (status) Call<ReleaseStatus>(api, status);
  return status != nullptr;
}

// A refusal by this library, under the name of the op.
Status* ToOrt(const Api* api, const Op& op, const lucid::Status& status) {
  if (status.ok()) return nullptr;
  char text[sizeof(status.message) + 32];
  std::snprintf(text, sizeof(text), "%s: %s", op.form->name, status.message);
  return Call<CreateStatus>(api, status.code == Code::kInvalidArgument ? kInvalidArgument : kFail,
                            text);
}

#define LUCID_RETURN_IF_ERROR(expression)                   \
  do {                                                      \
    if (Status* const error_ = (expression)) return error_; \
  } while (false)

// ---- Attributes. The graph always writes all of them; what is missing has PyTorch's default.

class Attributes {
 public:
  Attributes(const Api* api, const KernelInfo* info) : api_(api), info_(info) {}

  int64_t Int(const char* name, int64_t value) {
    int64_t found;
    if (!Failed(api_, Call<KernelInfoGetAttribute_int64>(api_, info_, name, &found))) return found;
    float other;
    NoteType(name, "an INT",
             !Failed(api_, Call<KernelInfoGetAttribute_float>(api_, info_, name, &other)));
    return value;
  }

  float Float(const char* name, float value) {
    float found;
    if (!Failed(api_, Call<KernelInfoGetAttribute_float>(api_, info_, name, &found))) return found;
    int64_t other;
    NoteType(name, "a FLOAT",
             !Failed(api_, Call<KernelInfoGetAttribute_int64>(api_, info_, name, &other)));
    return value;
  }

  // The first attribute of a wrong type.
  const lucid::Status& status() const { return status_; }

 private:
  // The runtime does not tell "absent" from "of another type", and a default in the place of
  // mode = "max" would be a wrong result.
  void NoteType(const char* name, const char* expected, bool other_number) {
    if (!status_.ok()) return;
    size_t size = 0;
    if (other_number ||
        !Failed(api_, Call<KernelInfoGetAttribute_string>(api_, info_, name, nullptr, &size))) {
      status_ = Refuse("%s must be %s attribute", name, expected);
    }
  }

  const Api* api_;
  const KernelInfo* info_;
  lucid::Status status_;
};

// A double that the graph holds as the sum of two floats.
double TwoFloats(float high, float low) {
  return std::isinf(high) ? high : static_cast<double>(high) + static_cast<double>(low);
}

lucid::Status ReadAttributes(const Op& op, const Api* api, const KernelInfo* info,
                             EmbeddingBagArgs* args) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  Attributes attributes(api, info);
  const int64_t mode = attributes.Int("mode", kMean);
  args->padding_idx = attributes.Int("padding_idx", kNoPadding);
  const float max_norm = attributes.Float("max_norm", kInfinity);
  args->max_norm = TwoFloats(max_norm, attributes.Float("max_norm_lo", 0));
  const float norm_type = attributes.Float("norm_type", 2);
  args->norm_type = TwoFloats(norm_type, attributes.Float("norm_type_lo", 0));
  if (op.form->flat) args->include_last_offset = attributes.Int("include_last_offset", 0) != 0;
  const int64_t stash_type = op.dtype == kFloat64 ? kElementDouble : kElementFloat;
  const int64_t found = attributes.Int("stash_type", stash_type);
  if (!attributes.status().ok()) return attributes.status();
  if (mode < kSum || mode > kMax) {
    return Refuse("mode = %lld is not 0 (sum), 1 (mean) or 2 (max)", static_cast<long long>(mode));
  }
  args->mode = static_cast<int32_t>(mode);
  if (found != stash_type) {
    return Refuse("stash_type = %lld must be %lld for this type of weight",
                  static_cast<long long>(found), static_cast<long long>(stash_type));
  }
  return CheckEmbeddingBagAttributes(*args, op.form->weighted);
}

// ---- Tensors.

constexpr size_t kMostDims = 8;

// A shape, with room for it where the runtime cannot lend its own.
struct Shape {
  TensorShape shape = {nullptr, 0};
  int64_t dims[kMostDims];
};

Status* GetShape(const Runtime& runtime, const Value* value, Shape* out) {
  const Api* api = runtime.api;
  if (runtime.has_data_reference) {
    ElementType type;
    return Call<GetTensorElementTypeAndShapeDataReference>(api, value, &type, &out->shape.dims,
                                                           &out->shape.rank);
  }
  TypeAndShape* info = nullptr;
  LUCID_RETURN_IF_ERROR(Call<GetTensorTypeAndShape>(api, value, &info));
  Status* status = Call<GetDimensionsCount>(api, info, &out->shape.rank);
  if (!status) {
    // Of a rank that no input has, only the first dimensions are told.
    if (out->shape.rank > kMostDims) out->shape.rank = kMostDims;
    status = Call<GetDimensions>(api, info, out->dims, out->shape.rank);
  }
  out->shape.dims = out->dims;
  Call<ReleaseTensorTypeAndShapeInfo>(api, info);
  return status;
}

// The data of a tensor that is only read; the runtime has no const accessor in every version.
Status* GetData(const Api* api, const Value* value, const void** data) {
  void* found = nullptr;
  Status* status = Call<GetTensorMutableData>(api, const_cast<Value*>(value), &found);
  *data = found;
  return status;
}

Status* GetInput(const Runtime& runtime, const KernelContext* context, size_t index, Shape* shape,
                 const void** data) {
  const Value* value = nullptr;
  LUCID_RETURN_IF_ERROR(Call<KernelContext_GetInput>(runtime.api, context, index, &value));
  LUCID_RETURN_IF_ERROR(GetShape(runtime, value, shape));
  return GetData(runtime.api, value, data);
}

// ---- The kernel of one node.

// A smaller table is in the caches, and in the reach of their own page tables, before long.
constexpr size_t kHugePagesFrom = size_t{8} << 20;

struct Kernel {
  const Op* op;
  Isa isa;
  EmbeddingBagArgs args = {};  // the attributes and types; a run adds its tensors to a copy
  bool weight_is_constant = false;
  Shape weight;

  Status* Compute(KernelContext* context) const;
};

struct Host {
  const Api* api;
  const KernelContext* context;
};

bool RunTasks(void* host, void (*task)(void*, size_t), size_t count, void* argument) {
  const Host& h = *static_cast<const Host*>(host);
  // A batch per task: the pool deals them out as threads become free.
  return !Failed(h.api,
                 Call<KernelContext_ParallelFor>(h.api, h.context, task, count, count, argument));
}

Status* Kernel::Compute(KernelContext* context) const {
  const Runtime& runtime = *op->runtime;
  const Api* api = runtime.api;
  const Form& form = *op->form;

  EmbeddingBagArgs a = args;
  Shape table, indices, offsets, weights;
  if (!weight_is_constant) {
    LUCID_RETURN_IF_ERROR(GetInput(runtime, context, 0, &table, &a.weight));
  }
  LUCID_RETURN_IF_ERROR(GetInput(runtime, context, 1, &indices, &a.indices));
  if (form.flat) LUCID_RETURN_IF_ERROR(GetInput(runtime, context, 2, &offsets, &a.offsets));
  if (form.weighted) {
    LUCID_RETURN_IF_ERROR(
        GetInput(runtime, context, form.WeightsInput(), &weights, &a.per_sample_weights));
  }

  lucid::Status status = SetEmbeddingBagShapes(weight_is_constant ? weight.shape : table.shape,
                                               indices.shape, form.flat ? &offsets.shape : nullptr,
                                               form.weighted ? &weights.shape : nullptr, &a);
  if (!status.ok()) return ToOrt(api, *op, status);
  int64_t dims[2] = {0, a.weight_shape[1]};
  status = CountBags(a, &dims[0]);
  if (!status.ok()) return ToOrt(api, *op, status);

  Value* output = nullptr;
  LUCID_RETURN_IF_ERROR(Call<KernelContext_GetOutput>(api, context, 0, dims, 2, &output));
  LUCID_RETURN_IF_ERROR(Call<GetTensorMutableData>(api, output, &a.output));
  Host host = {api, context};
  return ToOrt(api, *op, RunEmbeddingBag(a, isa, {RunTasks, &host}));
}

Status* CreateKernel(const Op& op, const Api* api, const KernelInfo* info, void** out) {
  auto kernel = std::make_unique<Kernel>();
  kernel->op = &op;
  EmbeddingBagArgs& args = kernel->args;
  args.size_bytes = sizeof(args);
  args.dtype = op.dtype;
  args.index_type = op.index_type;
  args.offset_type = op.offset_type;
  args.indices_rank = op.form->flat ? 1 : 2;
  lucid::Status status = ActiveIsa(&kernel->isa);
  if (status.ok()) status = ReadAttributes(op, api, info, &args);
  if (!status.ok()) return ToOrt(api, op, status);

  // A constant table stays where it is for the life of the session.
  int is_constant = 0;
  const Value* weight = nullptr;
  LUCID_RETURN_IF_ERROR(
      Call<KernelInfoGetConstantInput_tensor>(api, info, 0, &is_constant, &weight));
  if (is_constant && weight) {
    LUCID_RETURN_IF_ERROR(GetShape(*op.runtime, weight, &kernel->weight));
    LUCID_RETURN_IF_ERROR(GetData(api, weight, &args.weight));
    kernel->weight_is_constant = true;
    size_t bytes = op.dtype == kFloat64 ? 8 : op.dtype == kFloat32 ? 4 : 2;
    for (size_t i = 0; i < kernel->weight.shape.rank; ++i) {
      bytes *= static_cast<size_t>(kernel->weight.shape.dims[i]);
    }
    if (bytes >= kHugePagesFrom) BackWithHugePages(args.weight, bytes);
  }
  *out = kernel.release();
  return nullptr;
}

Status* LUCID_ORT_CALL CreateKernelV2(const CustomOp* op, const Api* api, const KernelInfo* info,
                                      void** kernel) {
  try {
    return CreateKernel(Self(op), api, info, kernel);
  } catch (...) {
    return Call<CreateStatus>(api, kFail, "lucid_onnx: out of memory");
  }
}

Status* LUCID_ORT_CALL KernelComputeV2(void* kernel, KernelContext* context) {
  const Kernel& k = *static_cast<const Kernel*>(kernel);
  try {
    return k.Compute(context);
  } catch (...) {
    return Call<CreateStatus>(k.op->runtime->api, kFail, "lucid_onnx: out of memory");
  }
}

void LUCID_ORT_CALL KernelDestroy(void* kernel) { delete static_cast<Kernel*>(kernel); }

// ---- Shape inference: [B, D] where both are known.

struct Dim {
  int64_t size = -1;           // -1: unknown
  const char* name = nullptr;  // or a symbol

  bool known() const { return size >= 0 || (name && *name); }
};

// The type of an input and its first two dimensions; unknown ones where the rank is another. (The
// runtime gives an input of unknown rank as one of rank 0.)
Status* InferInput(const Api* api, ShapeInferContext* context, size_t index, size_t rank,
                   ElementType* type, Dim dims[2]) {
  TypeAndShape* info = nullptr;  // belongs to the context
  LUCID_RETURN_IF_ERROR(Call<ShapeInferContext_GetInputTypeShape>(api, context, index, &info));
  LUCID_RETURN_IF_ERROR(Call<GetTensorElementType>(api, info, type));
  size_t found = 0;
  LUCID_RETURN_IF_ERROR(Call<GetDimensionsCount>(api, info, &found));
  if (found != rank) return nullptr;
  int64_t sizes[2];
  const char* names[2] = {nullptr, nullptr};
  LUCID_RETURN_IF_ERROR(Call<GetDimensions>(api, info, sizes, rank));
  LUCID_RETURN_IF_ERROR(Call<GetSymbolicDimensions>(api, info, names, rank));
  for (size_t i = 0; i < rank; ++i) {
    dims[i].size = sizes[i];
    dims[i].name = names[i];
  }
  return nullptr;
}

// The runtime asks one op of each name, whatever the types at hand: only op.form may be believed.
Status* InferShape(const Op& op, const Api* api, ShapeInferContext* context) {
  Dim weight[2], bags[2];
  ElementType weight_type, index_type;
  LUCID_RETURN_IF_ERROR(InferInput(api, context, 0, 2, &weight_type, weight));
  LUCID_RETURN_IF_ERROR(op.form->flat ? InferInput(api, context, 2, 1, &index_type, bags)
                                      : InferInput(api, context, 1, 2, &index_type, bags));
  if (op.form->flat) {
    const OpAttr* attribute = nullptr;
    int64_t include_last_offset = 0;
    size_t size = 0;
    if (!Failed(api, Call<ShapeInferContext_GetAttribute>(api, context, "include_last_offset",
                                                          &attribute))) {
      LUCID_RETURN_IF_ERROR(Call<ReadOpAttr>(api, attribute, kAttrInt, &include_last_offset,
                                             sizeof(include_last_offset), &size));
    }
    if (include_last_offset) {
      bags[0].name = nullptr;  // a symbol less one has no name
      bags[0].size = bags[0].size > 0 ? bags[0].size - 1 : -1;
    }
  }
  // The runtime takes a size of -1 literally, and an invented symbol could meet another node's.
  if (!weight[1].known() || !bags[0].known()) return nullptr;

  const int64_t sizes[2] = {bags[0].size, weight[1].size};
  const char* names[2] = {bags[0].size < 0 ? bags[0].name : "",
                          weight[1].size < 0 ? weight[1].name : ""};
  TypeAndShape* shape = nullptr;
  LUCID_RETURN_IF_ERROR(Call<CreateTensorTypeAndShapeInfo>(api, &shape));
  Status* status = Call<SetTensorElementType>(api, shape, weight_type);
  if (!status) status = Call<SetDimensions>(api, shape, sizes, 2);
  if (!status) status = Call<SetSymbolicDimensions>(api, shape, names, 2);
  if (!status) {
    status = Call<ShapeInferContext_SetOutputTypeShape>(api, context, 0, shape);
  }
  Call<ReleaseTensorTypeAndShapeInfo>(api, shape);
  return status;
}

Status* LUCID_ORT_CALL InferOutputShape(const CustomOp* op, ShapeInferContext* context) {
  return InferShape(Self(op), Self(op).runtime->api, context);
}

// ---- The description of an op.

const char* LUCID_ORT_CALL GetName(const CustomOp* op) { return Self(op).form->name; }
const char* LUCID_ORT_CALL GetProvider(const CustomOp*) { return nullptr; }  // the CPU's
size_t LUCID_ORT_CALL GetInputCount(const CustomOp* op) { return Self(op).form->Inputs(); }
size_t LUCID_ORT_CALL GetOutputCount(const CustomOp*) { return 1; }
ElementType LUCID_ORT_CALL GetInputType(const CustomOp* op, size_t index) {
  const Op& self = Self(op);
  if (index == 1) return kElementOfIndex[self.index_type];
  if (index == 2 && self.form->flat) return kElementOfIndex[self.offset_type];
  return kElementOf[self.dtype];
}
ElementType LUCID_ORT_CALL GetOutputType(const CustomOp* op, size_t) {
  return kElementOf[Self(op).dtype];
}
// Zero for all of these: required, the default memory, and no variadic inputs.
int LUCID_ORT_CALL GetZero(const CustomOp*) { return 0; }
int LUCID_ORT_CALL GetZeroAt(const CustomOp*, size_t) { return 0; }
int LUCID_ORT_CALL GetFirstVersion(const CustomOp*) { return 1; }
int LUCID_ORT_CALL GetLastVersion(const CustomOp*) { return std::numeric_limits<int>::max(); }

Op MakeOp(const Runtime& runtime, const Form& form, DType dtype, IndexType index_type,
          IndexType offset_type) {
  Op op = {};
  op.version = kApiVersion;
  op.GetName = GetName;
  op.GetExecutionProviderType = GetProvider;
  op.GetInputType = GetInputType;
  op.GetInputTypeCount = GetInputCount;
  op.GetOutputType = GetOutputType;
  op.GetOutputTypeCount = GetOutputCount;
  op.KernelDestroy = KernelDestroy;
  op.GetInputCharacteristic = GetZeroAt;
  op.GetOutputCharacteristic = GetZeroAt;
  op.GetInputMemoryType = GetZeroAt;
  op.GetVariadicInputMinArity = GetZero;
  op.GetVariadicInputHomogeneity = GetZero;
  op.GetVariadicOutputMinArity = GetZero;
  op.GetVariadicOutputHomogeneity = GetZero;
  op.CreateKernelV2 = CreateKernelV2;
  op.KernelComputeV2 = KernelComputeV2;
  op.InferOutputShapeFn = runtime.has_data_reference ? InferOutputShape : nullptr;
  op.GetStartVersion = GetFirstVersion;
  op.GetEndVersion = GetLastVersion;
  op.runtime = &runtime;
  op.form = &form;
  op.dtype = dtype;
  op.index_type = index_type;
  op.offset_type = offset_type;
  return op;
}

}  // namespace

Status* AddEmbeddingBagOps(const Runtime& runtime, CustomOpDomain* domain) {
  for (const Form& form : kForms) {
    for (const DType dtype : {kFloat32, kFloat16, kBFloat16, kFloat64}) {
      for (const IndexType index_type : {kInt32, kInt64}) {
        for (const IndexType offset_type : {kInt32, kInt64}) {
          if (!form.flat && offset_type != kInt32) continue;  // there is no offsets to have a type
          const Op* op = new Op(MakeOp(runtime, form, dtype, index_type, offset_type));
          Status* status = Call<CustomOpDomain_Add>(runtime.api, domain, op);
          if (status) return status;
        }
      }
    }
  }
  return nullptr;
}

}  // namespace ort
}  // namespace lucid
