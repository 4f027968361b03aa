// The exported C functions, through the shared library.
#include "c_api.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <vector>

namespace {

int g_failures = 0;

#define CHECK(condition)                                          \
  do {                                                            \
    if (!(condition)) {                                           \
      std::printf("%s:%d: %s\n", __FILE__, __LINE__, #condition); \
      ++g_failures;                                               \
    }                                                             \
  } while (false)

void SetForcedIsa(const char* name) {
#if defined(_WIN32)
  _putenv_s("LUCID_FORCE_ISA", name);
#else
  setenv("LUCID_FORCE_ISA", name, 1);
#endif
}

void TestNames() {
  CHECK(std::strlen(lucid_onnx_version()) > 0);
  CHECK(lucid_isa_count() >= 1);
  CHECK(std::strcmp(lucid_isa_name(0), "baseline") == 0);
  CHECK(lucid_isa_supported(0));
  CHECK(lucid_isa_name(-1) == nullptr && lucid_isa_name(lucid_isa_count()) == nullptr);
  CHECK(!lucid_isa_supported(-1) && lucid_isa_runs(lucid_isa_count()) == 0);
}

void TestJoinedTablePlan() {
#if defined(__linux__)
  constexpr int64_t kPlenty = int64_t{1} << 40;
  int64_t copy_bytes = -1;
  CHECK(lucid_joined_table_plan("mmap", 100, 8, 1, kPlenty, &copy_bytes) == 0 && copy_bytes == 0);
  CHECK(lucid_joined_table_plan("inplace", 100, 8, 1, kPlenty, &copy_bytes) == 0);
  CHECK(lucid_joined_table_plan("hugepage_copy", 100, 8, 2, 0, &copy_bytes) == 1);
  CHECK(copy_bytes == 100 * (8 + 8));
  CHECK(lucid_joined_table_plan(nullptr, 100, 1024, 1, 0, &copy_bytes) == 1);
  CHECK(copy_bytes == 100 * (1024 + 4));
  CHECK(lucid_joined_table_plan(nullptr, 100, 1025, 1, kPlenty, &copy_bytes) == 0);
  CHECK(copy_bytes == 0);
  CHECK(lucid_joined_table_plan(nullptr, 0, 8, 1, kPlenty, &copy_bytes) == 0);
  // From 8 MiB on as lucid_table_plan says of a file under "auto".
  const int large = lucid_table_plan(nullptr, 1, 8 << 20, kPlenty);
  CHECK(large == 0 || large == 2);
  CHECK(lucid_joined_table_plan(nullptr, (8 << 20) / 16, 12, 1, kPlenty, &copy_bytes) == large);
  CHECK(copy_bytes == (large == 2 ? 8 << 20 : 0));
  CHECK(lucid_joined_table_plan(nullptr, (8 << 20) / 16 + 1, 12, 1, kPlenty, &copy_bytes) == large);
  CHECK(copy_bytes == (large == 2 ? 10 << 20 : 0));
  CHECK(lucid_joined_table_plan("hugepage_copy", 1 << 20, 12, 1, 0, &copy_bytes) == 0);
#endif
  int64_t no_bytes = -1;
  CHECK(lucid_joined_table_plan("swap", 100, 8, 1, 0, &no_bytes) == -1 && no_bytes == 0);
  CHECK(lucid_joined_table_plan(nullptr, -1, 8, 1, 0, &no_bytes) == -1);
  CHECK(lucid_joined_table_plan(nullptr, 100, -8, 1, 0, &no_bytes) == -1);
  CHECK(lucid_joined_table_plan(nullptr, 100, 8, 3, 0, &no_bytes) == -1);
  CHECK(lucid_joined_table_plan(nullptr, INT64_MAX, 8, 1, 0, &no_bytes) == -1);
}

void TestCalls() {
  const float weight[] = {1, 2, 10, 20, 100, 200};
  const int64_t indices[] = {0, 1, 2, 2};
  const int32_t offsets[] = {0, 1};
  float output[4];
  EmbeddingBagArgs args = {};
  args.size_bytes = sizeof(args);
  args.weight = weight;
  args.indices = indices;
  args.offsets = offsets;
  args.output = output;
  args.weight_shape[0] = 3;
  args.weight_shape[1] = 2;
  args.indices_shape[0] = 4;
  args.num_offsets = 2;
  args.max_norm = std::numeric_limits<double>::infinity();
  args.norm_type = 2;
  args.padding_idx = INT64_MIN;
  args.index_type = 1;
  args.indices_rank = 1;

  char message[200];
  for (int i = 0; i < lucid_isa_count(); ++i) {
    const int64_t before = lucid_isa_runs(i);
    std::memset(output, 0, sizeof(output));
    const int code = lucid_embedding_bag(&args, lucid_isa_name(i), 2, message, sizeof(message));
    CHECK((code == 0) == (lucid_isa_supported(i) != 0));
    CHECK(lucid_isa_runs(i) == before + lucid_isa_supported(i));
    if (code == 0) CHECK(output[0] == 1 && output[1] == 2 && output[2] == 210 && output[3] == 420);
  }

  for (int i = 0; i < lucid_isa_count(); ++i) {
    if (!lucid_isa_supported(i)) continue;
    SetForcedIsa(lucid_isa_name(i));
    CHECK(std::strcmp(lucid_isa_active(), lucid_isa_name(i)) == 0);
    const int64_t before = lucid_isa_runs(i);
    CHECK(lucid_embedding_bag(&args, nullptr, 1, message, sizeof(message)) == 0);
    CHECK(message[0] == '\0');
    CHECK(lucid_isa_runs(i) == before + 1);
  }
  SetForcedIsa("abacus");
  CHECK(lucid_isa_active() == nullptr);
  CHECK(lucid_embedding_bag(&args, nullptr, 1, message, sizeof(message)) == 1);
  CHECK(std::strstr(message, "abacus") && std::strstr(message, "baseline"));
  SetForcedIsa("");
  CHECK(lucid_isa_active() != nullptr);

  // The table twice: its sums, and beside them its maxima.
  EmbeddingBagArgs tables[2] = {args, args};
  tables[1].mode = 2;
  float both[8];
  EmbeddingBagCollectionArgs all = {sizeof(all), tables, 2, both, 0};
  CHECK(lucid_embedding_bag_collection(&all, nullptr, 2, message, sizeof(message)) == 0);
  const float expected[] = {1, 2, 1, 2, 210, 420, 100, 200};
  CHECK(std::memcmp(both, expected, sizeof(both)) == 0);
  tables[1].weight_shape[0] = 2;
  CHECK(lucid_embedding_bag_collection(&all, nullptr, 2, message, sizeof(message)) == 1);
  CHECK(std::strcmp(message, "table 1: indices[2] = 2 is outside [0, 2)") == 0);

  args.weight_shape[0] = 2;
  CHECK(lucid_embedding_bag(&args, nullptr, 1, message, sizeof(message)) == 1);
  CHECK(std::strcmp(message, "indices[2] = 2 is outside [0, 2)") == 0);
  CHECK(lucid_embedding_bag(&args, nullptr, 1, nullptr, 0) == 1);
  CHECK(lucid_embedding_bag(&args, nullptr, 0, message, 8) == 1);
  CHECK(std::strcmp(message, "num_thr") == 0);
}

// Every array is as long as it must be, so that a sanitizer sees whatever lies beside it.
void TestQuantizeRows() {
  for (const int64_t dim : {0, 1, 2, 7, 8, 9, 64, 511, 512, 513, 1025}) {
    for (int dtype = 0; dtype <= 3; ++dtype) {
      constexpr int64_t kRows = 3;
      const size_t width = dtype == 0 ? 4 : dtype == 3 ? 8 : 2;
      const std::vector<char> rows(static_cast<size_t>(kRows * dim) * width, 0);
      for (const int output : {1, 2, 4, 5, 6, 7}) {
        const int64_t row_bytes = output <= 2 ? 2 * dim : output <= 5 ? dim : (dim + 1) / 2;
        std::vector<char> values(static_cast<size_t>(kRows * row_bytes), 1);
        std::vector<float> scale(kRows), bias(kRows);
        std::vector<double> squares(kRows, 1), lost(kRows, 1), furthest(kRows, 1);
        QuantizeArgs args = {};
        args.size_bytes = sizeof(args);
        args.rows = rows.data();
        args.output = values.data();
        args.scale = scale.data();
        args.bias = bias.data();
        args.num_rows = kRows;
        args.dim = dim;
        args.limit = 1;
        args.dtype = dtype;
        args.output_dtype = output;
        const bool taken = dtype != 3 || output > 2;
        CHECK(lucid_quantize_rows(&args) == (taken ? kRows : -1));
        args.squares = squares.data();
        args.lost = lost.data();
        args.furthest = furthest.data();
        if (!taken) continue;
        CHECK(lucid_quantize_rows(&args) == kRows);
        for (const char value : values) CHECK(value == 0);
        for (int64_t r = 0; r < kRows; ++r) {
          const size_t i = static_cast<size_t>(r);
          CHECK(squares[i] == 0 && lost[i] == 0 && furthest[i] == 0);
          CHECK(output <= 2 || scale[i] == 1);
        }
      }
    }
  }
  QuantizeArgs args = {};
  CHECK(lucid_quantize_rows(&args) == -1);
  args.size_bytes = sizeof(args);
  args.output_dtype = 4;
  CHECK(lucid_quantize_rows(&args) == 0);
  args.num_rows = 1;
  CHECK(lucid_quantize_rows(&args) == -1);  // there is no scale
}

}  // namespace

int main() {
  TestNames();
  TestJoinedTablePlan();
  TestCalls();
  TestQuantizeRows();
  std::printf("%d failures\n", g_failures);
  return g_failures != 0;
}
