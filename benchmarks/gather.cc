// The ceiling of benchmarks/grid.py: random rows are read once, and nothing is done with them. Compiled when it runs.
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <thread>
#include <vector>

namespace {

// The sum of all 8-byte words of the rows, so that no read can be left out.
uint64_t Gather(const char* table, size_t row_bytes, const int64_t* rows, size_t count,
                size_t ahead) {
  uint64_t sums[8] = {};
  for (size_t i = 0; i < count; ++i) {
    if (ahead && i + ahead < count) {
      const char* next = table + static_cast<size_t>(rows[i + ahead]) * row_bytes;
      for (size_t byte = 0; byte < row_bytes; byte += 64) __builtin_prefetch(next + byte, 0, 2);
    }
    const char* row = table + static_cast<size_t>(rows[i]) * row_bytes;
    size_t byte = 0;
    for (; byte + 64 <= row_bytes; byte += 64) {
      uint64_t words[8];
      memcpy(words, row + byte, 64);
      for (int w = 0; w < 8; ++w) sums[w] += words[w];
    }
    for (; byte + 8 <= row_bytes; byte += 8) {
      uint64_t word;
      memcpy(&word, row + byte, 8);
      sums[0] += word;
    }
  }
  uint64_t sum = 0;
  for (const uint64_t part : sums) sum += part;
  return sum;
}

}  // namespace

// row_bytes: a multiple of 8. Each thread takes its part of the rows, one after the other.
extern "C" uint64_t gather(const char* table, size_t row_bytes, const int64_t* rows, size_t count,
                           size_t ahead, int num_threads) {
  const size_t parts = static_cast<size_t>(num_threads);
  std::vector<uint64_t> sums(parts);
  const auto work = [&](size_t i) {
    const size_t begin = count * i / parts, end = count * (i + 1) / parts;
    sums[i] = Gather(table, row_bytes, rows + begin, end - begin, ahead);
  };
  std::vector<std::thread> threads;
  for (size_t i = 1; i < parts; ++i) threads.emplace_back(work, i);
  work(0);
  for (std::thread& thread : threads) thread.join();
  uint64_t sum = 0;
  for (const uint64_t part : sums) sum += part;
  return sum;
}
