// The emulated CUDA kernels with blocks on several threads of the host at once, for
// ThreadSanitizer: what one block leaves for another, the first bad value of many, and the steps of
// a gradient. Each result must have the bits that blocks one after another give.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "c_api_cuda.h"

namespace {

int failures = 0;

#define CHECK(condition)                                                     \
  do {                                                                       \
    if (!(condition)) {                                                      \
      std::printf("%s:%d: %s (%s)\n", __FILE__, __LINE__, #condition, text); \
      ++failures;                                                            \
    }                                                                        \
  } while (false)

char text[256];

// Memory at a multiple of 256.
struct Memory {
  explicit Memory(int64_t bytes) : size((bytes + 256) / 256 * 256) {
    at = std::aligned_alloc(256, static_cast<size_t>(size));
    std::memset(at, 0xA5, static_cast<size_t>(size));
  }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  ~Memory() { std::free(at); }
  int64_t size;
  void* at;
};

struct Call {
  static constexpr int64_t kRows = 50, kColumns = 8;
  std::vector<float> weight, weights;
  std::vector<int64_t> indices, offsets;
  EmbeddingBagArgs args = {};

  explicit Call(const std::vector<int64_t>& lengths) {
    std::mt19937 random(1);
    offsets.push_back(0);
    for (const int64_t length : lengths) offsets.push_back(offsets.back() + length);
    for (int64_t i = 0; i < kRows * kColumns; ++i) {
      weight.push_back(static_cast<float>(random() % 1000) / 999);
    }
    for (int64_t i = 0; i < offsets.back(); ++i) {
      indices.push_back(static_cast<int64_t>(random() % kRows));
      weights.push_back(static_cast<float>(random() % 1000) / 999);
    }
    args.size_bytes = sizeof(args);
    args.weight = weight.data();
    args.indices = indices.data();
    args.offsets = offsets.data();
    args.per_sample_weights = weights.data();
    args.weight_shape[0] = kRows;
    args.weight_shape[1] = kColumns;
    args.indices_shape[0] = offsets.back();
    args.num_offsets = static_cast<int64_t>(offsets.size());
    args.max_norm = INFINITY;
    args.norm_type = 2;
    args.padding_idx = INT64_MIN;
    args.index_type = args.offset_type = 1;
    args.indices_rank = 1;
    args.include_last_offset = 1;
  }
};

void OnThreads(int count) { setenv("LUCID_EMULATE_THREADS", count == 1 ? "1" : "4", 1); }

std::vector<float> Pool(Call* call, LucidBoundsError* error) {
  std::vector<float> output((call->offsets.size() - 1) * Call::kColumns);
  call->args.output = output.data();
  LucidCudaPlan plan;
  CHECK(lucid_cuda_plan(&call->args, &plan, text, sizeof(text)) == 0);
  Memory scratch(plan.scratch_bytes);
  CHECK(lucid_cuda_embedding_bag(&call->args, scratch.at, scratch.size, error, nullptr, text,
                                 sizeof(text)) == 0);
  return output;
}

std::vector<float> Gradient(const Call& call, int64_t rows) {
  std::vector<float> grads((call.offsets.size() - 1) * Call::kColumns, 0.5f);
  std::vector<float> output(static_cast<size_t>(rows * Call::kColumns));
  EmbeddingBagGradArgs args = {};
  LucidBoundsError error = {};
  args.size_bytes = sizeof(args);
  args.forward = call.args;
  args.forward.output = nullptr;
  args.forward.weight_shape[0] = rows;
  args.grad_output = grads.data();
  args.grad_weight = output.data();
  args.grad_output_shape[0] = static_cast<int64_t>(call.offsets.size()) - 1;
  args.grad_output_shape[1] = Call::kColumns;
  LucidCudaGradPlan plan;
  CHECK(lucid_cuda_plan_grad(&args, &plan, text, sizeof(text)) == 0);
  Memory scratch(plan.scratch_bytes);
  CHECK(lucid_cuda_embedding_bag_grad(&args, scratch.at, scratch.size, &error, nullptr, text,
                                      sizeof(text)) == 0);
  CHECK(lucid_cuda_refusal(&error, text, sizeof(text)) == 0);
  return output;
}

bool SameBits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

}  // namespace

int main() {
  Call call({5000, 0, 3, 70, 2049, 1, 65, 1024, 64, 300});
  for (const int mode : {0, 1, 2, 3}) {
    call.args.mode = mode;
    call.args.per_sample_weights = mode != 2 ? call.weights.data() : nullptr;
    call.args.divisor = mode == 1 || mode == 3;  // the sum of weights
    std::vector<float> found[2];
    for (const int threads : {1, 4}) {
      OnThreads(threads);
      LucidBoundsError error = {};
      found[threads > 1] = Pool(&call, &error);
      CHECK(lucid_cuda_refusal(&error, text, sizeof(text)) == 0);
    }
    CHECK(SameBits(found[0], found[1]));
  }
  call.args.mode = call.args.divisor = 0;
  for (const int64_t rows : {Call::kRows, int64_t{40000}}) {  // as V bags, and as N
    std::vector<float> found[2];
    for (const int threads : {1, 4}) {
      OnThreads(threads);
      found[threads > 1] = Gradient(call, rows);
    }
    CHECK(SameBits(found[0], found[1]));
  }
  for (size_t i = 100; i < call.indices.size(); i += 7) call.indices[i] = -5;
  for (int turn = 0; turn < 3; ++turn) {
    OnThreads(4);
    LucidBoundsError error = {};
    Pool(&call, &error);
    CHECK(lucid_cuda_refusal(&error, text, sizeof(text)) == 1);
    CHECK(std::strcmp(text, "indices[100] = -5 is outside [0, 50)") == 0);
  }
  std::printf("%d failures\n", failures);
  return failures > 0;
}
