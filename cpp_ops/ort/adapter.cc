#include "ort/adapter.h"

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <limits>
#include <string>

namespace lucid {
namespace ort {

bool Failed(const Api* api, Status* status) {
  if (status) Call<ReleaseStatus>(api, status);
  return status != nullptr;
}

Status* ToOrt(const Api* api, const char* op_name, const lucid::Status& status) {
  if (status.ok()) return nullptr;
  char text[sizeof(status.message) + 64];
  std::snprintf(text, sizeof(text), "%s: %s", op_name, status.message);
  return Call<CreateStatus>(api, status.code == Code::kInvalidArgument ? kInvalidArgument : kFail,
                            text);
}

namespace {

// The text of an error, which is freed.
std::string TakeMessage(const Api* api, Status* status) {
  const std::string text = Call<GetErrorMessage>(api, status);
  Call<ReleaseStatus>(api, status);
  return text;
}

}  // namespace

// Asking for an attribute fails with one code whether it is absent or of another type, and a
// default in the place of mode = [2] would be a wrong result. The texts differ. They are the
// runtime's own, so the text for an absent one is asked for: with a name that no node has, in the
// place of which goes the attribute's.
template <class Get, class V>
V Attributes::Read(const char* name, const char* expected, V value) {
  V found;
  Status* const error = Call<Get>(api_, info_, name, &found);
  if (!error) return found;
  const std::string text = TakeMessage(api_, error);
  const std::string nobody = "lucid.no_such_attribute";
  Status* const absent_error = Call<Get>(api_, info_, nobody.c_str(), &found);
  std::string absent = absent_error ? TakeMessage(api_, absent_error) : "";
  const size_t at = absent.find(nobody);
  if (at != std::string::npos) absent.replace(at, nobody.size(), name);
  if (text != absent && status_.ok()) {
    status_ = InvalidArgument("%s must be %s attribute", name, expected);
  }
  return value;
}

int64_t Attributes::Int(const char* name, int64_t value) {
  return Read<KernelInfoGetAttribute_int64>(name, "an INT", value);
}

float Attributes::Float(const char* name, float value) {
  return Read<KernelInfoGetAttribute_float>(name, "a FLOAT", value);
}

double Attributes::Double(const char* name, const char* low_name, float value) {
  const float high = Float(name, value), low = Float(low_name, 0);
  return std::isinf(high) ? high : static_cast<double>(high) + static_cast<double>(low);
}

Status* GetShape(const Runtime& runtime, const Value* value, Shape* out, ElementType* type) {
  const Api* api = runtime.api;
  if (runtime.has_data_reference) {
    ElementType unused;
    return Call<GetTensorElementTypeAndShapeDataReference>(api, value, type ? type : &unused,
                                                           &out->shape.dims, &out->shape.rank);
  }
  TypeAndShape* info = nullptr;
  LUCID_RETURN_IF_ERROR(Call<GetTensorTypeAndShape>(api, value, &info));
  Status* status = type ? Call<GetTensorElementType>(api, info, type) : nullptr;
  if (!status) status = Call<GetDimensionsCount>(api, info, &out->shape.rank);
  if (!status) {
    // Of a rank that no input has, only the first dimensions are told.
    if (out->shape.rank > kMostDims) out->shape.rank = kMostDims;
    status = Call<GetDimensions>(api, info, out->dims, out->shape.rank);
  }
  out->shape.dims = out->dims;
  Call<ReleaseTensorTypeAndShapeInfo>(api, info);
  return status;
}

Status* GetData(const Api* api, const Value* value, const void** data) {
  void* found = nullptr;
  Status* status = Call<GetTensorMutableData>(api, const_cast<Value*>(value), &found);
  *data = found;
  return status;
}

Status* GetInput(const Runtime& runtime, const KernelContext* context, size_t index, Shape* shape,
                 const void** data, ElementType* type) {
  const Value* value = nullptr;
  LUCID_RETURN_IF_ERROR(Call<KernelContext_GetInput>(runtime.api, context, index, &value));
  LUCID_RETURN_IF_ERROR(GetShape(runtime, value, shape, type));
  return GetData(runtime.api, value, data);
}

namespace {

// At most INT64_MAX. A dimension that is 0 makes it 0, whatever the others are.
int64_t BytesOf(TensorShape shape, size_t element_bytes) {
  uint64_t bytes = element_bytes;
  bool too_many = false;
  for (size_t i = 0; i < shape.rank; ++i) {
    const uint64_t dim = static_cast<uint64_t>(shape.dims[i]);
    if (dim == 0) return 0;
    too_many = too_many || bytes > static_cast<uint64_t>(INT64_MAX) / dim;
    if (!too_many) bytes *= dim;
  }
  return too_many ? INT64_MAX : static_cast<int64_t>(bytes);
}

}  // namespace

Status* AddOutput(const Api* api, KernelContext* context, const char* op_name, int64_t max_bytes,
                  size_t index, TensorShape shape, size_t element_bytes, Value** value,
                  void** data) {
  const int64_t bytes = BytesOf(shape, element_bytes);
  if (bytes > max_bytes) {
    std::string dims;
    for (size_t i = 0; i < shape.rank; ++i) {
      dims += (i ? ", " : "") + std::to_string(shape.dims[i]);
    }
    return ToOrt(api, op_name,
                 InvalidArgument("output %zu of shape [%s] takes %lld bytes, more than "
                                 "lucid.max_output_bytes = %lld",
                                 index, dims.c_str(), static_cast<long long>(bytes),
                                 static_cast<long long>(max_bytes)));
  }
  LUCID_RETURN_IF_ERROR(
      Call<KernelContext_GetOutput>(api, context, index, shape.dims, shape.rank, value));
  return Call<GetTensorMutableData>(api, *value, data);
}

Status* ConstantInput(const Api* api, const KernelInfo* info, size_t index, const Value** value) {
  int is_constant = 0;
  *value = nullptr;
  Status* status = Call<KernelInfoGetConstantInput_tensor>(api, info, index, &is_constant, value);
  if (!is_constant) *value = nullptr;
  return status;
}

namespace {

bool RunTasks(void* host, void (*task)(void*, size_t), size_t count, void* argument) {
  const Host& h = *static_cast<const Host*>(host);
  // A batch per task: the pool deals them out as threads become free.
  return !Failed(h.api,
                 Call<KernelContext_ParallelFor>(h.api, h.context, task, count, count, argument));
}

}  // namespace

ParallelFor Host::Threads() { return {RunTasks, this}; }

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

Status* InferInt(const Api* api, ShapeInferContext* context, const char* name, int64_t* value) {
  const OpAttr* attribute = nullptr;
  size_t size = 0;
  if (Failed(api, Call<ShapeInferContext_GetAttribute>(api, context, name, &attribute))) {
    return nullptr;
  }
  return Call<ReadOpAttr>(api, attribute, kAttrInt, value, sizeof(*value), &size);
}

Status* InferOutput(const Api* api, ShapeInferContext* context, size_t index, ElementType type,
                    const Dim* dims, size_t rank) {
  int64_t sizes[2];
  const char* names[2];
  for (size_t i = 0; i < rank; ++i) {
    // The runtime takes a size of -1 literally, and an invented symbol could meet another node's.
    if (!dims[i].known()) return nullptr;
    sizes[i] = dims[i].size;
    names[i] = dims[i].size < 0 ? dims[i].name : "";
  }
  TypeAndShape* shape = nullptr;
  LUCID_RETURN_IF_ERROR(Call<CreateTensorTypeAndShapeInfo>(api, &shape));
  Status* status = Call<SetTensorElementType>(api, shape, type);
  if (!status) status = Call<SetDimensions>(api, shape, sizes, rank);
  if (!status) status = Call<SetSymbolicDimensions>(api, shape, names, rank);
  if (!status) {
    status = Call<ShapeInferContext_SetOutputTypeShape>(api, context, index, shape);
  }
  Call<ReleaseTensorTypeAndShapeInfo>(api, shape);
  return status;
}

namespace {

const char* LUCID_ORT_CALL GetCpu(const CustomOp*) { return nullptr; }
int LUCID_ORT_CALL GetZero(const CustomOp*) { return 0; }
int LUCID_ORT_CALL GetZeroAt(const CustomOp*, size_t) { return 0; }
int LUCID_ORT_CALL GetFirstVersion(const CustomOp*) { return 1; }
int LUCID_ORT_CALL GetLastVersion(const CustomOp*) { return std::numeric_limits<int>::max(); }

}  // namespace

CustomOp DescribeOp() {
  CustomOp op = {};
  op.version = kApiVersion;
  op.GetExecutionProviderType = GetCpu;
  op.GetInputCharacteristic = GetZeroAt;
  op.GetOutputCharacteristic = GetZeroAt;
  op.GetInputMemoryType = GetZeroAt;
  op.GetVariadicInputMinArity = GetZero;
  op.GetVariadicInputHomogeneity = GetZero;
  op.GetVariadicOutputMinArity = GetZero;
  op.GetVariadicOutputHomogeneity = GetZero;
  op.GetStartVersion = GetFirstVersion;
  op.GetEndVersion = GetLastVersion;
  return op;
}

}  // namespace ort
}  // namespace lucid
