// The ceiling of benchmarks/grid.py: random rows are read once, and nothing is done with them.
// Compiled when it runs.
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <condition_variable>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace {

// A register. (gcc takes wider vectors apart into single words.)
#if defined(__AVX512F__)
constexpr size_t kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr size_t kVectorBytes = 32;
#else
constexpr size_t kVectorBytes = 16;
#endif
typedef uint64_t Vector __attribute__((vector_size(kVectorBytes)));

template <int locality>
void Prefetch(const char* row, size_t row_bytes) {
  for (size_t byte = 0; byte < row_bytes; byte += 64) __builtin_prefetch(row + byte, 0, locality);
}

// The sum of all 8-byte words of the rows, so that no read can be left out.
uint64_t Gather(const char* table, size_t row_bytes, const int64_t* rows, size_t count, size_t far,
                size_t near) {
  Vector sums = {};
  uint64_t sum = 0;
  for (size_t i = 0; i < count; ++i) {
    if (far && i + far < count) {
      Prefetch<2>(table + static_cast<size_t>(rows[i + far]) * row_bytes, row_bytes);
    }
    if (near && i + near < count) {
      Prefetch<3>(table + static_cast<size_t>(rows[i + near]) * row_bytes, row_bytes);
    }
    const char* row = table + static_cast<size_t>(rows[i]) * row_bytes;
    size_t byte = 0;
    for (; byte + kVectorBytes <= row_bytes; byte += kVectorBytes) {
      Vector vector;
      memcpy(&vector, row + byte, kVectorBytes);
      sums += vector;
    }
    for (; byte + 8 <= row_bytes; byte += 8) {
      uint64_t word;
      memcpy(&word, row + byte, 8);
      sum += word;
    }
  }
  for (size_t w = 0; w < kVectorBytes / 8; ++w) sum += sums[w];
  return sum;
}

// Threads that sleep between calls, as those of a runtime do that may not spin. They end with the
// process.
class Pool {
 public:
  void Run(size_t parts, const std::function<void(size_t)>& work) {
    while (threads_ + 1 < parts) std::thread(&Pool::Serve, this, ++threads_, turn_).detach();
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      work_ = &work;
      waiting_ = threads_;
      parts_ = parts;
      ++turn_;
    }
    begin_.notify_all();
    work(0);
    std::unique_lock<std::mutex> lock(mutex_);
    end_.wait(lock, [&] { return waiting_ == 0; });
  }

 private:
  void Serve(size_t part, uint64_t seen) {
    for (;;) {
      std::unique_lock<std::mutex> lock(mutex_);
      begin_.wait(lock, [&] { return turn_ != seen; });
      seen = turn_;
      const bool needed = part < parts_;
      lock.unlock();
      if (needed) (*work_)(part);
      lock.lock();
      if (--waiting_ == 0) end_.notify_one();
    }
  }

  std::mutex mutex_;
  std::condition_variable begin_, end_;
  const std::function<void(size_t)>* work_ = nullptr;
  size_t threads_ = 0, waiting_ = 0, parts_ = 0;
  uint64_t turn_ = 0;
};

}  // namespace

// row_bytes: a multiple of 8. Each thread takes its part of the rows, one after the other. far,
// near: so many rows ahead are fetched into the second and the first cache; 0: none.
extern "C" uint64_t gather(const char* table, size_t row_bytes, const int64_t* rows, size_t count,
                           size_t far, size_t near, int num_threads) {
  const size_t parts = static_cast<size_t>(num_threads);
  std::vector<uint64_t> sums(parts);
  const auto work = [&](size_t i) {
    const size_t begin = count * i / parts, end = count * (i + 1) / parts;
    sums[i] = Gather(table, row_bytes, rows + begin, end - begin, far, near);
  };
  static Pool* const pool = new Pool;
  if (parts > 1) {
    pool->Run(parts, work);
  } else {
    work(0);
  }
  uint64_t sum = 0;
  for (const uint64_t part : sums) sum += part;
  return sum;
}
