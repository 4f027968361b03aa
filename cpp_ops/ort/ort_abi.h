// The part of ONNX Runtime's C ABI that this library uses, declared here because no package brings
// its headers. The runtime's table of functions and its OrtCustomOp only ever grow at the end, so a
// slot number is as good as a name. ort_abi_check.cc compares all of this with the official header.
#pragma once

#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32)
#define LUCID_ORT_CALL __stdcall
#else
#define LUCID_ORT_CALL
#endif

namespace lucid {
namespace ort {

// 1.17, the first whose table has all slots below but the one of 1.24.
constexpr uint32_t kApiVersion = 17;
constexpr int kDataReferenceMinor = 24;

struct Status;  // null: success
struct Value;
struct TypeAndShape;
struct KernelInfo;
struct KernelContext;
struct ShapeInferContext;
struct OpAttr;
struct CustomOpDomain;
struct SessionOptions;
struct KeyValuePairs;
struct Logger;
struct CustomOp;
struct MemoryInfo;

// OrtAllocator, as far as it is called.
struct Allocator {
  uint32_t version;
  void*(LUCID_ORT_CALL* Alloc)(Allocator*, size_t);
  void(LUCID_ORT_CALL* Free)(Allocator*, void*);
};

enum ErrorCode : int { kFail = 1, kInvalidArgument = 2 };

enum ElementType : int {
  kElementUndefined = 0,  // as an op's: any
  kElementFloat = 1,
  kElementUint8 = 2,
  kElementInt8 = 3,
  kElementInt32 = 6,
  kElementInt64 = 7,
  kElementFloat16 = 10,
  kElementDouble = 11,
  kElementBFloat16 = 16,
};

enum OpAttrType : int { kAttrInt = 1 };

enum LoggingLevel : int { kLogWarning = 2 };

#if defined(_WIN32)
using OrtChar = wchar_t;  // of paths
#else
using OrtChar = char;
#endif

// One function of the runtime: its slot in the table and its parameters (the first column is the
// official name).
template <int slot, class R, class... P>
struct Slot {
  using Function = R(LUCID_ORT_CALL*)(P...);
  static constexpr int kIndex = slot;
};

// LUCID_ORT_SLOT(name, slot, result, parameters...)
#define LUCID_ORT_SLOTS                                                                            \
  LUCID_ORT_SLOT(CreateStatus, 0, Status*, ErrorCode, const char*)                                 \
  LUCID_ORT_SLOT(GetErrorMessage, 2, const char*, const Status*)                                   \
  LUCID_ORT_SLOT(CreateCustomOpDomain, 26, Status*, const char*, CustomOpDomain**)                 \
  LUCID_ORT_SLOT(CustomOpDomain_Add, 27, Status*, CustomOpDomain*, const CustomOp*)                \
  LUCID_ORT_SLOT(AddCustomOpDomain, 28, Status*, SessionOptions*, CustomOpDomain*)                 \
  LUCID_ORT_SLOT(GetTensorMutableData, 51, Status*, Value*, void**)                                \
  LUCID_ORT_SLOT(CreateTensorTypeAndShapeInfo, 57, Status*, TypeAndShape**)                        \
  LUCID_ORT_SLOT(SetTensorElementType, 58, Status*, TypeAndShape*, ElementType)                    \
  LUCID_ORT_SLOT(SetDimensions, 59, Status*, TypeAndShape*, const int64_t*, size_t)                \
  LUCID_ORT_SLOT(GetTensorElementType, 60, Status*, const TypeAndShape*, ElementType*)             \
  LUCID_ORT_SLOT(GetDimensionsCount, 61, Status*, const TypeAndShape*, size_t*)                    \
  LUCID_ORT_SLOT(GetDimensions, 62, Status*, const TypeAndShape*, int64_t*, size_t)                \
  LUCID_ORT_SLOT(GetSymbolicDimensions, 63, Status*, const TypeAndShape*, const char**, size_t)    \
  LUCID_ORT_SLOT(GetTensorTypeAndShape, 65, Status*, const Value*, TypeAndShape**)                 \
  LUCID_ORT_SLOT(MemoryInfoGetId, 72, Status*, const MemoryInfo*, int*)                            \
  LUCID_ORT_SLOT(KernelInfoGetAttribute_float, 85, Status*, const KernelInfo*, const char*,        \
                 float*)                                                                           \
  LUCID_ORT_SLOT(KernelInfoGetAttribute_int64, 86, Status*, const KernelInfo*, const char*,        \
                 int64_t*)                                                                         \
  LUCID_ORT_SLOT(KernelContext_GetInput, 90, Status*, const KernelContext*, size_t, const Value**) \
  LUCID_ORT_SLOT(KernelContext_GetOutput, 91, Status*, KernelContext*, size_t, const int64_t*,     \
                 size_t, Value**)                                                                  \
  LUCID_ORT_SLOT(ReleaseStatus, 93, void, Status*)                                                 \
  LUCID_ORT_SLOT(ReleaseTensorTypeAndShapeInfo, 99, void, TypeAndShape*)                           \
  LUCID_ORT_SLOT(ReleaseCustomOpDomain, 101, void, CustomOpDomain*)                                \
  LUCID_ORT_SLOT(ReleaseAllocator, 132, void, Allocator*)                                          \
  LUCID_ORT_SLOT(KernelContext_GetGPUComputeStream, 193, Status*, const KernelContext*, void**)    \
  LUCID_ORT_SLOT(GetTensorMemoryInfo, 194, Status*, const Value*, const MemoryInfo**)              \
  LUCID_ORT_SLOT(KernelInfo_GetInputCount, 230, Status*, const KernelInfo*, size_t*)               \
  LUCID_ORT_SLOT(HasSessionConfigEntry, 237, Status*, const SessionOptions*, const char*, int*)    \
  LUCID_ORT_SLOT(GetSessionConfigEntry, 238, Status*, const SessionOptions*, const char*, char*,   \
                 size_t*)                                                                          \
  LUCID_ORT_SLOT(KernelInfo_GetLogger, 245, Status*, const KernelInfo*, const Logger**)            \
  LUCID_ORT_SLOT(Logger_LogMessage, 247, Status*, const Logger*, LoggingLevel, const char*,        \
                 const OrtChar*, int, const char*)                                                 \
  LUCID_ORT_SLOT(KernelInfoGetConstantInput_tensor, 249, Status*, const KernelInfo*, size_t, int*, \
                 const Value**)                                                                    \
  LUCID_ORT_SLOT(KernelContext_GetAllocator, 253, Status*, const KernelContext*,                   \
                 const MemoryInfo*, Allocator**)                                                   \
  LUCID_ORT_SLOT(ShapeInferContext_GetInputCount, 267, Status*, const ShapeInferContext*, size_t*) \
  LUCID_ORT_SLOT(ShapeInferContext_GetInputTypeShape, 268, Status*, const ShapeInferContext*,      \
                 size_t, TypeAndShape**)                                                           \
  LUCID_ORT_SLOT(ShapeInferContext_GetAttribute, 269, Status*, const ShapeInferContext*,           \
                 const char*, const OpAttr**)                                                      \
  LUCID_ORT_SLOT(ShapeInferContext_SetOutputTypeShape, 270, Status*, const ShapeInferContext*,     \
                 size_t, const TypeAndShape*)                                                      \
  LUCID_ORT_SLOT(SetSymbolicDimensions, 271, Status*, TypeAndShape*, const char**, size_t)         \
  LUCID_ORT_SLOT(ReadOpAttr, 272, Status*, const OpAttr*, OpAttrType, void*, size_t, size_t*)      \
  LUCID_ORT_SLOT(KernelContext_ParallelFor, 274, Status*, const KernelContext*,                    \
                 void (*)(void*, size_t), size_t, size_t, void*)                                   \
  /* From 1.24 on (the first two are older, and only needed with the third): */                    \
  LUCID_ORT_SLOT(GetKeyValue, 297, const char*, const KeyValuePairs*, const char*)                 \
  LUCID_ORT_SLOT(ReleaseKeyValuePairs, 300, void, KeyValuePairs*)                                  \
  LUCID_ORT_SLOT(KernelInfo_GetConfigEntries, 391, Status*, const KernelInfo*, KeyValuePairs**)    \
  LUCID_ORT_SLOT(GetTensorElementTypeAndShapeDataReference, 414, Status*, const Value*,            \
                 ElementType*, const int64_t**, size_t*)

#define LUCID_ORT_SLOT(name, slot, ...) using name = Slot<slot, __VA_ARGS__>;
LUCID_ORT_SLOTS
#undef LUCID_ORT_SLOT

// The runtime's table of functions: Call<CreateStatus>(api, kFail, "...").
struct Api;
template <class S, class... P>
auto Call(const Api* api, P... arguments) {
  const void* entry = reinterpret_cast<const void* const*>(api)[S::kIndex];
  return reinterpret_cast<typename S::Function>(const_cast<void*>(entry))(arguments...);
}

struct ApiBase {
  const Api*(LUCID_ORT_CALL* GetApi)(uint32_t version);  // null if the runtime is older
  const char*(LUCID_ORT_CALL* GetVersionString)();
};

// OrtCustomOp as of version 17. One word each; what is not set must be null.
struct CustomOp {
  uint32_t version;
  void*(LUCID_ORT_CALL* CreateKernel)(const CustomOp*, const Api*, const KernelInfo*);
  const char*(LUCID_ORT_CALL* GetName)(const CustomOp*);
  const char*(LUCID_ORT_CALL* GetExecutionProviderType)(const CustomOp*);
  ElementType(LUCID_ORT_CALL* GetInputType)(const CustomOp*, size_t);
  size_t(LUCID_ORT_CALL* GetInputTypeCount)(const CustomOp*);
  ElementType(LUCID_ORT_CALL* GetOutputType)(const CustomOp*, size_t);
  size_t(LUCID_ORT_CALL* GetOutputTypeCount)(const CustomOp*);
  void(LUCID_ORT_CALL* KernelCompute)(void*, KernelContext*);
  void(LUCID_ORT_CALL* KernelDestroy)(void*);
  int(LUCID_ORT_CALL* GetInputCharacteristic)(const CustomOp*, size_t);   // 0: required
  int(LUCID_ORT_CALL* GetOutputCharacteristic)(const CustomOp*, size_t);  // 0: required
  int(LUCID_ORT_CALL* GetInputMemoryType)(const CustomOp*, size_t);       // 0: the default
  int(LUCID_ORT_CALL* GetVariadicInputMinArity)(const CustomOp*);
  int(LUCID_ORT_CALL* GetVariadicInputHomogeneity)(const CustomOp*);
  int(LUCID_ORT_CALL* GetVariadicOutputMinArity)(const CustomOp*);
  int(LUCID_ORT_CALL* GetVariadicOutputHomogeneity)(const CustomOp*);
  Status*(LUCID_ORT_CALL* CreateKernelV2)(const CustomOp*, const Api*, const KernelInfo*, void**);
  Status*(LUCID_ORT_CALL* KernelComputeV2)(void*, KernelContext*);
  Status*(LUCID_ORT_CALL* InferOutputShapeFn)(const CustomOp*, ShapeInferContext*);
  int(LUCID_ORT_CALL* GetStartVersion)(const CustomOp*);
  int(LUCID_ORT_CALL* GetEndVersion)(const CustomOp*);
};

}  // namespace ort
}  // namespace lucid
