// What the adapters of all ops share: a node's attributes and tensors, the runtime's threads, shape
// inference, and the functions by which the runtime makes, runs and frees a kernel.
#pragma once

#include <memory>

#include "base/parallel.h"
#include "base/shape.h"
#include "base/status.h"
#include "base/types.h"
#include "ort/register.h"

namespace lucid {
namespace ort {

#define LUCID_RETURN_IF_ERROR(expression)                   \
  do {                                                      \
    if (Status* const error_ = (expression)) return error_; \
  } while (false)

// Frees the status and tells whether it was an error.
bool Failed(const Api* api, Status* status);

// An error of this library, with the name of the op before its text.
Status* ToOrt(const Api* api, const char* op_name, const lucid::Status& status);

// Indexed by DType and IndexType. 4-bit values come as uint8, two in each.
constexpr ElementType kElementOf[] = {kElementFloat,  kElementFloat16, kElementBFloat16,
                                      kElementDouble, kElementInt8,    kElementUint8};
constexpr size_t kSizeOf[] = {4, 2, 2, 8, 1, 1};
constexpr ElementType kElementOfIndex[] = {kElementInt32, kElementInt64};

// ---- Attributes. The graph always writes all of them; a missing one has PyTorch's default. One of
// another type is an error. One of another name is not seen: a kernel can only ask for attributes
// by name, in every version of the runtime, and the runtime accepts any name on a node of a custom
// op.

class Attributes {
 public:
  Attributes(const Api* api, const KernelInfo* info) : api_(api), info_(info) {}

  int64_t Int(const char* name, int64_t value);
  float Float(const char* name, float value);

  // A double that the graph holds as the sum of two floats, the second of them in `low_name`.
  double Double(const char* name, const char* low_name, float value);

  // An error for the first attribute that has a wrong type, or OK.
  const lucid::Status& status() const { return status_; }

 private:
  template <class Get, class V>
  V Read(const char* name, const char* expected, V value);

  const Api* api_;
  const KernelInfo* info_;
  lucid::Status status_;
};

// ---- Tensors.

constexpr size_t kMostDims = 8;

// A shape, with memory for it where the runtime does not lend its own.
struct Shape {
  TensorShape shape = {nullptr, 0};
  int64_t dims[kMostDims];
};

// type may be null, here and in GetInput.
Status* GetShape(const Runtime& runtime, const Value* value, Shape* shape,
                 ElementType* type = nullptr);

// The data of a tensor that is only read; the runtime has no const accessor in every version.
Status* GetData(const Api* api, const Value* value, const void** data);

// An input of a run.
Status* GetInput(const Runtime& runtime, const KernelContext* context, size_t index, Shape* shape,
                 const void** data, ElementType* type = nullptr);

// Creates an output of a run, of elements of so many bytes. More than max_bytes, the session's
// lucid.max_output_bytes, is an invalid argument.
Status* AddOutput(const Api* api, KernelContext* context, const char* op_name, int64_t max_bytes,
                  size_t index, TensorShape shape, size_t element_bytes, Value** value,
                  void** data);

// The constant value of an input, or null.
Status* ConstantInput(const Api* api, const KernelInfo* info, size_t index, const Value** value);

// ---- The runtime's threads.

struct Host {
  const Api* api;
  const KernelContext* context;

  // Lives no longer than this.
  ParallelFor Threads();
};

// ---- Shape inference.

struct Dim {
  int64_t size = -1;           // -1: unknown
  const char* name = nullptr;  // or a symbol

  bool known() const { return size >= 0 || (name && *name); }
};

// The type of an input and its first dimensions; unknown ones where the rank is another than
// `rank`, at most 2. (The runtime gives an input of unknown rank as one of rank 0.)
Status* InferInput(const Api* api, ShapeInferContext* context, size_t index, size_t rank,
                   ElementType* type, Dim dims[2]);

// The value of an INT attribute, if it is there.
Status* InferInt(const Api* api, ShapeInferContext* context, const char* name, int64_t* value);

// Says what an output is, if all of its dimensions (at most 2) are known.
Status* InferOutput(const Api* api, ShapeInferContext* context, size_t index, ElementType type,
                    const Dim* dims, size_t rank);

// ---- The description of an op.

// An op with what all of ours have in common: version 1, required inputs and outputs in the default
// memory, for the CPU provider.
CustomOp DescribeOp();

// Lets the op's kernels be objects of K, which has
//   static Status* Create(const CustomOp& op, const Api* api, const KernelInfo* info,
//                         std::unique_ptr<K>* kernel);
//   Status* Compute(KernelContext* context) const;
//   const Api* api() const;
// Nothing that they throw reaches the runtime, whose threads would hang.
template <class K>
struct KernelFunctions {
  static constexpr char kOutOfMemory[] = "lucid_onnx: out of memory";

  static Status* LUCID_ORT_CALL Create(const CustomOp* op, const Api* api, const KernelInfo* info,
                                       void** out) {
    try {
      std::unique_ptr<K> kernel;
      LUCID_RETURN_IF_ERROR(K::Create(*op, api, info, &kernel));
      *out = kernel.release();
      return nullptr;
    } catch (...) {
      return Call<CreateStatus>(api, kFail, kOutOfMemory);
    }
  }

  static Status* LUCID_ORT_CALL Compute(void* kernel, KernelContext* context) {
    const K& k = *static_cast<const K*>(kernel);
    try {
      return k.Compute(context);
    } catch (...) {
      return Call<CreateStatus>(k.api(), kFail, kOutOfMemory);
    }
  }

  static void LUCID_ORT_CALL Destroy(void* kernel) { delete static_cast<K*>(kernel); }

  static void SetIn(CustomOp* op) {
    op->CreateKernelV2 = Create;
    op->KernelComputeV2 = Compute;
    op->KernelDestroy = Destroy;
  }
};

}  // namespace ort
}  // namespace lucid
