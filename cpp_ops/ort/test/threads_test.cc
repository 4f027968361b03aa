// The registration and the kernels of a session from several threads, through the library's entry
// point and a runtime that has no more than they call. ThreadSanitizer cannot watch them in ONNX
// Runtime, whose own threads it knows nothing of.
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "base/test/testing.h"
#include "ort/ort_abi.h"

extern "C" lucid::ort::Status* LUCID_ORT_CALL RegisterCustomOps(lucid::ort::SessionOptions* options,
                                                                const lucid::ort::ApiBase* base);

namespace lucid {
namespace ort {

// What the runtime's types are here.
struct Status {
  ErrorCode code;
  std::string text;
};
struct Value {
  ElementType type;
  std::vector<int64_t> dims;
  std::vector<char> bytes;
};
using Entries = std::map<std::string, std::string>;
struct SessionOptions {
  Entries entries;
  CustomOpDomain* domain = nullptr;
};
struct KeyValuePairs {
  Entries entries;
};
struct CustomOpDomain {
  std::vector<const CustomOp*> ops;
};
struct KernelInfo {
  Entries entries;
  std::map<std::string, int64_t> ints;
  std::vector<const Value*> constants;  // null: not constant
};
struct KernelContext {
  std::vector<const Value*> inputs;
  Value output;
};

namespace {

std::atomic<int> g_statuses{0}, g_domains{0}, g_pairs{0};

Status* Error(ErrorCode code, const std::string& text) {
  ++g_statuses;
  return new Status{code, text};
}

// ---- The runtime's functions

Status* LUCID_ORT_CALL CreateError(ErrorCode code, const char* text) { return Error(code, text); }
const char* LUCID_ORT_CALL GetText(const Status* status) { return status->text.c_str(); }
void LUCID_ORT_CALL FreeStatus(Status* status) {
  --g_statuses;
  delete status;
}

Status* LUCID_ORT_CALL CreateDomain(const char*, CustomOpDomain** domain) {
  ++g_domains;
  *domain = new CustomOpDomain;
  return nullptr;
}
Status* LUCID_ORT_CALL AddOp(CustomOpDomain* domain, const CustomOp* op) {
  domain->ops.push_back(op);
  return nullptr;
}
Status* LUCID_ORT_CALL AddDomain(SessionOptions* options, CustomOpDomain* domain) {
  options->domain = domain;
  return nullptr;
}

Status* LUCID_ORT_CALL HasEntry(const SessionOptions* options, const char* key, int* found) {
  *found = static_cast<int>(options->entries.count(key));
  return nullptr;
}
Status* LUCID_ORT_CALL GetEntry(const SessionOptions* options, const char* key, char* value,
                                size_t* size) {
  const std::string& text = options->entries.at(key);
  *size = text.size() + 1;
  if (value) std::memcpy(value, text.c_str(), *size);
  return nullptr;
}

Status* LUCID_ORT_CALL GetFloat(const KernelInfo*, const char* name, float*) {
  return Error(kFail, std::string("no attribute ") + name);
}
Status* LUCID_ORT_CALL GetInt(const KernelInfo* info, const char* name, int64_t* value) {
  const auto found = info->ints.find(name);
  if (found == info->ints.end()) return Error(kFail, std::string("no attribute ") + name);
  *value = found->second;
  return nullptr;
}
Status* LUCID_ORT_CALL GetConstant(const KernelInfo* info, size_t index, int* is_constant,
                                   const Value** value) {
  *value = index < info->constants.size() ? info->constants[index] : nullptr;
  *is_constant = *value != nullptr;
  return nullptr;
}
Status* LUCID_ORT_CALL GetPairs(const KernelInfo* info, KeyValuePairs** pairs) {
  ++g_pairs;
  *pairs = new KeyValuePairs{info->entries};
  return nullptr;
}
const char* LUCID_ORT_CALL GetPair(const KeyValuePairs* pairs, const char* key) {
  const auto found = pairs->entries.find(key);
  return found == pairs->entries.end() ? nullptr : found->second.c_str();
}
void LUCID_ORT_CALL FreePairs(KeyValuePairs* pairs) {
  --g_pairs;
  delete pairs;
}

Status* LUCID_ORT_CALL GetInput(const KernelContext* context, size_t index, const Value** value) {
  *value = context->inputs[index];
  return nullptr;
}
Status* LUCID_ORT_CALL GetOutput(KernelContext* context, size_t, const int64_t* dims, size_t rank,
                                 Value** value) {
  context->output.dims.assign(dims, dims + rank);
  size_t bytes = sizeof(float);
  for (size_t i = 0; i < rank; ++i) bytes *= static_cast<size_t>(dims[i]);
  context->output.bytes.assign(bytes, '\x55');
  *value = &context->output;
  return nullptr;
}
Status* LUCID_ORT_CALL GetBytes(Value* value, void** data) {
  *data = value->bytes.data();
  return nullptr;
}
Status* LUCID_ORT_CALL GetTypeAndDims(const Value* value, ElementType* type, const int64_t** dims,
                                      size_t* rank) {
  *type = value->type;
  *dims = value->dims.data();
  *rank = value->dims.size();
  return nullptr;
}
Status* LUCID_ORT_CALL RunOnThreads(const KernelContext*, void (*task)(void*, size_t), size_t count,
                                    size_t, void* argument) {
  int num_threads = 3;
  RunThreads(&num_threads, task, count, argument);
  return nullptr;
}

void LUCID_ORT_CALL Missing() {
  std::printf("a function of the runtime that is not here was called\n");
  std::abort();
}

constexpr size_t kSlots = 512;
const void* g_slots[kSlots];

template <class S>
void Set(typename S::Function function) {
  g_slots[S::kIndex] = reinterpret_cast<const void*>(function);
}

const Api* LUCID_ORT_CALL GetApi(uint32_t) { return reinterpret_cast<const Api*>(g_slots); }
const char* LUCID_ORT_CALL GetVersion() { return "1.24.0"; }
constexpr ApiBase kBase = {GetApi, GetVersion};

void FillApi() {
  for (const void*& slot : g_slots) slot = reinterpret_cast<const void*>(Missing);
  Set<CreateStatus>(CreateError);
  Set<GetErrorMessage>(GetText);
  Set<ReleaseStatus>(FreeStatus);
  Set<CreateCustomOpDomain>(CreateDomain);
  Set<CustomOpDomain_Add>(AddOp);
  Set<AddCustomOpDomain>(AddDomain);
  Set<HasSessionConfigEntry>(HasEntry);
  Set<GetSessionConfigEntry>(GetEntry);
  Set<KernelInfoGetAttribute_float>(GetFloat);
  Set<KernelInfoGetAttribute_int64>(GetInt);
  Set<KernelInfoGetConstantInput_tensor>(GetConstant);
  Set<KernelInfo_GetConfigEntries>(GetPairs);
  Set<GetKeyValue>(GetPair);
  Set<ReleaseKeyValuePairs>(FreePairs);
  Set<KernelContext_GetInput>(GetInput);
  Set<KernelContext_GetOutput>(GetOutput);
  Set<GetTensorMutableData>(GetBytes);
  Set<GetTensorElementTypeAndShapeDataReference>(GetTypeAndDims);
  Set<KernelContext_ParallelFor>(RunOnThreads);
}

// ---- The tests

// run(i) on so many threads.
template <class F>
void OnThreads(int count, const F& run) {
  std::vector<std::thread> threads;
  for (int i = 1; i < count; ++i) threads.emplace_back([&run, i] { run(i); });
  run(0);
  for (std::thread& thread : threads) thread.join();
}

// One domain for each combination of choices, whoever comes first.
void TestRegistration() {
  const std::vector<Entries> choices = {
      {},
      {{"lucid.table_memory", "mmap"}},
      {{"lucid.max_output_bytes", "1000"}},
      {{"lucid.max_output_bytes", "2000"}, {"lucid.table_memory", "inplace"}},
  };
  constexpr int kThreads = 6;
  std::vector<std::vector<SessionOptions>> all(kThreads,
                                               std::vector<SessionOptions>(choices.size()));
  std::atomic<int> wrong{0};
  OnThreads(kThreads, [&](int thread) {
    std::vector<SessionOptions>& mine = all[static_cast<size_t>(thread)];
    for (size_t i = 0; i < choices.size(); ++i) {
      SessionOptions& options = mine[(i + static_cast<size_t>(thread)) % choices.size()];
      options.entries = choices[(i + static_cast<size_t>(thread)) % choices.size()];
      if (RegisterCustomOps(&options, &kBase)) ++wrong;
    }
    SessionOptions bad;
    bad.entries["lucid.table_memory"] = "elsewhere";
    Status* const status = RegisterCustomOps(&bad, &kBase);
    if (!status || status->code != kInvalidArgument || bad.domain) ++wrong;
    if (status) FreeStatus(status);
  });
  CHECK(wrong == 0, "%d registrations", wrong.load());
  CHECK(g_domains == static_cast<int>(choices.size()), "%d domains", g_domains.load());
  for (size_t i = 0; i < choices.size(); ++i) {
    for (const std::vector<SessionOptions>& mine : all) {
      CHECK(mine[i].domain == all[0][i].domain && mine[i].domain);
      CHECK(i == 0 || mine[i].domain != mine[0].domain);
    }
  }
}

template <class T>
Value MakeValue(ElementType type, std::vector<int64_t> dims, const std::vector<T>& numbers) {
  Value value = {type, std::move(dims), std::vector<char>(numbers.size() * sizeof(T))};
  std::memcpy(value.bytes.data(), numbers.data(), value.bytes.size());
  return value;
}

const CustomOp* FindOp(const CustomOpDomain& domain, const char* name, ElementType table,
                       size_t indices) {
  for (const CustomOp* op : domain.ops) {
    if (std::strcmp(op->GetName(op), name) == 0 && op->GetInputType(op, 0) == table &&
        op->GetOutputType(op, 0) == kElementFloat &&
        op->GetInputType(op, indices) == kElementInt64 &&
        op->GetInputType(op, indices + 1) == kElementInt64) {
      return op;
    }
  }
  return nullptr;
}

// Sessions made on several threads over one table, each run on several threads. A bag is `length`
// positions of one row, whose number is all ones times the row's value.
void TestSessions(const char* name, bool quantized, int64_t rows, int64_t columns) {
  SessionOptions options;
  CHECK(RegisterCustomOps(&options, &kBase) == nullptr);
  const ElementType type = quantized ? kElementInt8 : kElementFloat;
  const size_t first = quantized ? 2 : 1;  // the input of the indices
  const CustomOp* const op = FindOp(*options.domain, name, type, first);
  CHECK(op != nullptr, "%s", name);
  if (!op) return;

  const auto value_of = [&](int64_t row) { return static_cast<float>(row % 100); };
  Value table, scale;
  const size_t size = static_cast<size_t>(rows * columns);
  if (quantized) {
    std::vector<int8_t> values(size);
    for (size_t i = 0; i < size; ++i) {
      values[i] = static_cast<int8_t>(value_of(static_cast<int64_t>(i) / columns));
    }
    table = MakeValue(type, {rows, columns}, values);
    scale = MakeValue(kElementFloat, {rows}, std::vector<float>(static_cast<size_t>(rows), 2.0f));
  } else {
    std::vector<float> values(size);
    for (size_t i = 0; i < size; ++i) values[i] = value_of(static_cast<int64_t>(i) / columns);
    table = MakeValue(type, {rows, columns}, values);
  }
  constexpr int64_t kBags = 200, kLength = 9;
  std::vector<int64_t> indices, offsets;
  for (int64_t bag = 0; bag < kBags; ++bag) {
    offsets.push_back(bag * kLength);
    for (int64_t k = 0; k < kLength; ++k) indices.push_back(bag * 37 % rows);
  }
  const Value indices_value = MakeValue(kElementInt64, {kBags * kLength}, indices);
  indices[5] = rows;
  const Value bad_indices = MakeValue(kElementInt64, {kBags * kLength}, indices);
  const Value offsets_value = MakeValue(kElementInt64, {kBags}, offsets);

  std::atomic<int> wrong{0};
  OnThreads(3, [&](int) {
    KernelInfo info;
    info.ints["mode"] = 0;
    info.constants = {&table};
    if (quantized) info.constants.push_back(&scale);
    void* kernel = nullptr;
    if (op->CreateKernelV2(op, GetApi(0), &info, &kernel)) {
      ++wrong;
      return;
    }
    OnThreads(3, [&](int thread) {
      const auto run = [&](const Value& positions, KernelContext* context) {
        context->inputs = {&table};
        if (quantized) context->inputs.push_back(&scale);
        context->inputs.push_back(&positions);
        context->inputs.push_back(&offsets_value);
        return op->KernelComputeV2(kernel, context);
      };
      for (int i = 0; i < 4; ++i) {
        KernelContext context;
        if (thread == 1 && i % 2) {
          Status* const status = run(bad_indices, &context);
          if (!status || status->code != kInvalidArgument) ++wrong;
          if (status) FreeStatus(status);
          continue;
        }
        if (run(indices_value, &context)) ++wrong;
        if (context.output.dims != std::vector<int64_t>{kBags, columns}) ++wrong;
        for (int64_t j = 0; j < kBags * columns; ++j) {
          float x;
          std::memcpy(&x, context.output.bytes.data() + static_cast<size_t>(j) * sizeof(x),
                      sizeof(x));
          const float expected = value_of(j / columns * 37 % rows) * kLength * (quantized ? 2 : 1);
          if (x < expected || x > expected) ++wrong;
        }
      }
    });
    op->KernelDestroy(kernel);
  });
  CHECK(wrong == 0, "%s: %d", name, wrong.load());
}

}  // namespace
}  // namespace ort
}  // namespace lucid

int main() {
  using namespace lucid;
  ort::FillApi();
  ort::TestRegistration();
  ort::TestSessions("EmbeddingBag", false, 1000, 64);           // several tasks
  ort::TestSessions("EmbeddingBag", false, 40000, 64);          // a table that gets huge pages
  ort::TestSessions("QuantizedEmbeddingBag", true, 1000, 128);  // rows joined with their scales
  CHECK(ort::g_statuses == 0 && ort::g_pairs == 0, "%d statuses and %d pairs were not freed",
        ort::g_statuses.load(), ort::g_pairs.load());
  std::printf("%lld checks, %d failures\n", static_cast<long long>(g_checks), g_failures);
  return g_failures != 0;
}
