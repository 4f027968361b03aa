// What an op's adapter gives to the registration.
#pragma once

#include "base/table_memory.h"
#include "ort/ort_abi.h"

namespace lucid {
namespace ort {

// One runtime that this library was registered in, and one choice of its sessions. A process may
// hold several.
struct Runtime {
  const Api* api;
  bool has_data_reference;   // the slots of 1.24 may be called, and shape inference is safe
  TableMemory table_memory;  // what the session options said when the library was registered
};

using AddOp = Status* (*)(const Runtime& runtime, CustomOpDomain* domain, const CustomOp* op);

// Adds every name and combination of types to the domain. The structs live as long as the process.
Status* AddEmbeddingBagOps(const Runtime& runtime, CustomOpDomain* domain);

}  // namespace ort
}  // namespace lucid
