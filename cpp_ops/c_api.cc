#include "c_api.h"

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdio>
#include <thread>
#include <vector>

#include "base/pages.h"
#include "base/table_memory.h"
#include "embedding_bag/embedding_bag.h"
#include "embedding_bag_grad/embedding_bag_grad.h"
#include "quantize/quantize.h"

using lucid::Isa;
using lucid::Status;

static_assert(sizeof(void*) != 8 ||
                  (sizeof(EmbeddingBagArgs) == 184 && offsetof(EmbeddingBagArgs, output) == 40 &&
                   offsetof(EmbeddingBagArgs, bias) == 64 &&
                   offsetof(EmbeddingBagArgs, num_offsets) == 104 &&
                   offsetof(EmbeddingBagArgs, max_norm) == 112 &&
                   offsetof(EmbeddingBagArgs, padding_idx) == 128 &&
                   offsetof(EmbeddingBagArgs, dtype) == 136 &&
                   offsetof(EmbeddingBagArgs, include_last_offset) == 156 &&
                   offsetof(EmbeddingBagArgs, row_stride) == 172 &&
                   offsetof(EmbeddingBagArgs, divisor) == 180),
              "the table in c_api.h");
static_assert(sizeof(void*) != 8 ||
                  (sizeof(EmbeddingBagGradArgs) == 264 &&
                   offsetof(EmbeddingBagGradArgs, forward) == 8 &&
                   offsetof(EmbeddingBagGradArgs, grad_output) == 192 &&
                   offsetof(EmbeddingBagGradArgs, grad_per_sample_weights) == 224 &&
                   offsetof(EmbeddingBagGradArgs, grad_output_shape) == 232 &&
                   offsetof(EmbeddingBagGradArgs, sparse) == 256),
              "the table in c_api.h");
static_assert(sizeof(void*) != 8 || (sizeof(EmbeddingBagCollectionArgs) == 40 &&
                                     offsetof(EmbeddingBagCollectionArgs, packed) == 32),
              "the line below the table in c_api.h");
static_assert(sizeof(void*) != 8 ||
                  (sizeof(QuantizeArgs) == 96 && offsetof(QuantizeArgs, num_rows) == 64 &&
                   offsetof(QuantizeArgs, limit) == 80 &&
                   offsetof(QuantizeArgs, output_dtype) == 92),
              "the lines below the tables in c_api.h");

namespace {

bool RunThreads(void* host, void (*task)(void*, size_t), size_t count, void* argument) {
  const size_t num_threads = std::min(static_cast<size_t>(*static_cast<const int*>(host)), count);
  std::atomic<size_t> next{0};
  const auto work = [&] {
    for (size_t i; (i = next.fetch_add(1)) < count;) task(argument, i);
  };
  std::vector<std::thread> threads;
  try {
    threads.reserve(num_threads);
    while (threads.size() + 1 < num_threads) threads.emplace_back(work);
  } catch (...) {
    // Fewer threads than asked for do the same work.
  }
  work();
  for (std::thread& thread : threads) thread.join();
  return true;
}

// run: RunEmbeddingBag or one of its relatives.
template <class Args>
Status Run(Status (*run)(const Args&, Isa, const lucid::ParallelFor&), const Args* args,
           const char* isa, int num_threads) {
  Isa chosen;
  const Status status = isa ? lucid::FindIsa(isa, &chosen) : lucid::ActiveIsa(&chosen);
  if (!status.ok()) return status;
  if (num_threads < 1) return lucid::InvalidArgument("num_threads = %d must be >= 1", num_threads);
  return run(*args, chosen, {RunThreads, &num_threads});
}

int Answer(const Status& status, char* message, size_t message_size) {
  if (message_size > 0) std::snprintf(message, message_size, "%s", status.message);
  return static_cast<int>(status.code);
}

bool InList(int i) { return i >= 0 && i < lucid::kIsaCount; }

}  // namespace

extern "C" {

const char* lucid_onnx_version(void) { return LUCID_VERSION; }

int lucid_isa_count(void) { return lucid::kIsaCount; }

const char* lucid_isa_name(int i) {
  return InList(i) ? lucid::IsaName(static_cast<Isa>(i)) : nullptr;
}

int lucid_isa_supported(int i) { return InList(i) && lucid::IsaSupported(static_cast<Isa>(i)); }

const char* lucid_isa_active(void) {
  Isa isa;
  return lucid::ActiveIsa(&isa).ok() ? lucid::IsaName(isa) : nullptr;
}

int64_t lucid_isa_runs(int i) {
  if (!InList(i)) return 0;
  const Isa isa = static_cast<Isa>(i);
  return lucid::EmbeddingBagRuns(isa) + lucid::EmbeddingBagGradRuns(isa);
}

int lucid_table_plan(const char* memory, int is_file, int64_t bytes, int64_t free_bytes) {
  lucid::TableMemory chosen = lucid::TableMemory::kAuto;
  if (bytes < 0 || (memory && !lucid::ParseTableMemory(memory, &chosen).ok())) return -1;
  const lucid::TableSource source =
      is_file ? lucid::TableSource::kPrivateFile : lucid::TableSource::kAnonymous;
  return static_cast<int>(lucid::PlanTable(chosen, source, static_cast<size_t>(bytes), free_bytes,
                                           lucid::HugePagesOffered()));
}

int lucid_joined_table_plan(const char* memory, int64_t rows, int64_t row_bytes, int numbers,
                            int64_t free_bytes, int64_t* copy_bytes) {
  lucid::TableMemory chosen = lucid::TableMemory::kAuto;
  *copy_bytes = 0;
  if (rows < 0 || row_bytes < 0 || numbers < 1 || numbers > 2 ||
      (memory && !lucid::ParseTableMemory(memory, &chosen).ok())) {
    return -1;
  }
  if (!lucid::IsWorthJoining(static_cast<size_t>(row_bytes))) return 0;
  const int64_t stride = row_bytes + numbers * static_cast<int64_t>(sizeof(float));
  if (rows > INT64_MAX / 2 / stride) return -1;
  const size_t bytes = static_cast<size_t>(rows * stride);
  const lucid::JoinPlan plan =
      lucid::PlanJoin(chosen, bytes, free_bytes, lucid::HugePagesOffered());
  if (plan == lucid::JoinPlan::kCopy) *copy_bytes = static_cast<int64_t>(bytes);
  if (plan == lucid::JoinPlan::kHugePageCopy) {
    *copy_bytes =
        static_cast<int64_t>((bytes + lucid::kHugePage - 1) / lucid::kHugePage * lucid::kHugePage);
  }
  return static_cast<int>(plan);
}

int64_t lucid_free_memory(void) { return lucid::FreeMemory(); }

int64_t lucid_table_copies(void) { return lucid::CountTableCopies().living; }
int64_t lucid_table_copy_bytes(void) { return lucid::CountTableCopies().bytes; }
int64_t lucid_table_copies_made(void) { return lucid::CountTableCopies().made; }

int lucid_embedding_bag(const EmbeddingBagArgs* args, const char* isa, int num_threads,
                        char* message, size_t message_size) {
  return Answer(Run(lucid::RunEmbeddingBag, args, isa, num_threads), message, message_size);
}

int lucid_embedding_bag_grad_entries(const EmbeddingBagGradArgs* args, int64_t* num_entries,
                                     char* message, size_t message_size) {
  return Answer(lucid::CountGradEntries(*args, num_entries), message, message_size);
}

int lucid_embedding_bag_grad(const EmbeddingBagGradArgs* args, const char* isa, int num_threads,
                             char* message, size_t message_size) {
  return Answer(Run(lucid::RunEmbeddingBagGrad, args, isa, num_threads), message, message_size);
}

int lucid_embedding_bag_collection(const EmbeddingBagCollectionArgs* args, const char* isa,
                                   int num_threads, char* message, size_t message_size) {
  return Answer(Run(lucid::RunEmbeddingBagCollection, args, isa, num_threads), message,
                message_size);
}

int64_t lucid_quantize_rows(const QuantizeArgs* args) { return lucid::QuantizeRows(*args); }

}  // extern "C"
