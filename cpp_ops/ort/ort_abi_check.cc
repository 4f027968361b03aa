// Compiled only with LUCID_ORT_HEADER_DIR: the official header must agree with ort_abi.h.
#include <cstddef>

#include "onnxruntime_c_api.h"
#include "ort/ort_abi.h"

namespace lucid {
namespace ort {

#define LUCID_ORT_SLOT(name, slot, ...) \
  static_assert(offsetof(OrtApi, name) == (slot) * sizeof(void*), #name " is in another slot");
LUCID_ORT_SLOTS
#undef LUCID_ORT_SLOT

static_assert(offsetof(OrtApiBase, GetApi) == offsetof(ApiBase, GetApi), "");
static_assert(offsetof(OrtApiBase, GetVersionString) == offsetof(ApiBase, GetVersionString), "");

#define LUCID_FIELD(name) \
  static_assert(offsetof(OrtCustomOp, name) == offsetof(CustomOp, name), #name " lies elsewhere");
LUCID_FIELD(version)
LUCID_FIELD(CreateKernel)
LUCID_FIELD(GetName)
LUCID_FIELD(GetExecutionProviderType)
LUCID_FIELD(GetInputType)
LUCID_FIELD(GetInputTypeCount)
LUCID_FIELD(GetOutputType)
LUCID_FIELD(GetOutputTypeCount)
LUCID_FIELD(KernelCompute)
LUCID_FIELD(KernelDestroy)
LUCID_FIELD(GetInputCharacteristic)
LUCID_FIELD(GetOutputCharacteristic)
LUCID_FIELD(GetInputMemoryType)
LUCID_FIELD(GetVariadicInputMinArity)
LUCID_FIELD(GetVariadicInputHomogeneity)
LUCID_FIELD(GetVariadicOutputMinArity)
LUCID_FIELD(GetVariadicOutputHomogeneity)
LUCID_FIELD(CreateKernelV2)
LUCID_FIELD(KernelComputeV2)
LUCID_FIELD(InferOutputShapeFn)
LUCID_FIELD(GetStartVersion)
LUCID_FIELD(GetEndVersion)
#undef LUCID_FIELD

static_assert(offsetof(OrtAllocator, version) == offsetof(Allocator, version), "");
static_assert(offsetof(OrtAllocator, Alloc) == offsetof(Allocator, Alloc), "");
static_assert(offsetof(OrtAllocator, Free) == offsetof(Allocator, Free), "");

#define LUCID_VALUE(ours, official) \
  static_assert(static_cast<int>(ours) == static_cast<int>(official), #ours);
LUCID_VALUE(kFail, ORT_FAIL)
LUCID_VALUE(kInvalidArgument, ORT_INVALID_ARGUMENT)
LUCID_VALUE(kElementUndefined, ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED)
LUCID_VALUE(kElementFloat, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT)
LUCID_VALUE(kElementUint8, ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8)
LUCID_VALUE(kElementInt8, ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8)
LUCID_VALUE(kElementInt32, ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32)
LUCID_VALUE(kElementInt64, ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64)
LUCID_VALUE(kElementFloat16, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16)
LUCID_VALUE(kElementDouble, ONNX_TENSOR_ELEMENT_DATA_TYPE_DOUBLE)
LUCID_VALUE(kElementBFloat16, ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16)
LUCID_VALUE(kAttrInt, ORT_OP_ATTR_INT)
LUCID_VALUE(kLogWarning, ORT_LOGGING_LEVEL_WARNING)
LUCID_VALUE(0, INPUT_OUTPUT_REQUIRED)
LUCID_VALUE(2, INPUT_OUTPUT_VARIADIC)
LUCID_VALUE(0, OrtMemTypeDefault)
#undef LUCID_VALUE

}  // namespace ort
}  // namespace lucid
