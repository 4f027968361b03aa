// What an op's adapter gives to the registration.
#pragma once

#include "base/table_memory.h"
#include "ort/ort_abi.h"

namespace lucid {
namespace ort {

// Who reports a bad offset or index (CUDA only): its run, the node's next run, or whoever asks when
// the session has run.
enum class BoundsCheck { kReport, kDeferred, kRun };

// One runtime that this library was registered in, and one choice of its sessions. A process may
// hold several.
struct Runtime {
  const Api* api;
  bool has_data_reference;  // the slots of 1.24 may be called, and shape inference is safe
  BoundsCheck bounds_check;
  TableMemory table_memory;  // what the session options said when the library was registered
  int64_t max_output_bytes;  // likewise; INT64_MAX: any number
};

using AddOp = Status* (*)(const Runtime& runtime, CustomOpDomain* domain, const CustomOp* op);

// Adds every name and combination of types to the domain. The structs live as long as the process.
Status* AddEmbeddingBagOps(const Runtime& runtime, CustomOpDomain* domain);
Status* AddEmbeddingBagGradOps(const Runtime& runtime, CustomOpDomain* domain);

Status* AddEmbeddingBagCollectionOps(const Runtime& runtime, CustomOpDomain* domain);

// The same for the CUDA provider; in liblucid_onnx_ops_cuda alone.
Status* AddCudaEmbeddingBagOps(const Runtime& runtime, CustomOpDomain* domain);
Status* AddCudaEmbeddingBagCollectionOps(const Runtime& runtime, CustomOpDomain* domain);
Status* AddCudaEmbeddingBagGradOps(const Runtime& runtime, CustomOpDomain* domain);

}  // namespace ort
}  // namespace lucid
