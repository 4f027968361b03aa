// What the C++ tests share: checks that go on after a failure, random numbers, and hosts to run
// tasks.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <thread>
#include <vector>

namespace lucid {

inline int64_t g_checks = 0;
inline int g_failures = 0;

// Prints the first ones.
inline void Fail(const char* file, int line, const char* condition, const char* format, ...) {
  if (++g_failures > 20) return;
  std::printf("%s:%d: %s: ", file, line, condition);
  va_list arguments;
  va_start(arguments, format);
  std::vprintf(format, arguments);
  va_end(arguments);
  std::printf("\n");
}

// CHECK(condition) or CHECK(condition, "what else to print", ...), which is looked at on failure.
#define CHECK(condition, ...)                                                        \
  do {                                                                               \
    ++::lucid::g_checks;                                                             \
    if (!(condition)) ::lucid::Fail(__FILE__, __LINE__, #condition, "" __VA_ARGS__); \
  } while (false)

// Where LUCID_SHORT_TESTS is set, as under an emulator, one of ten cases is for testing.
inline bool IsLeftOut() {
  static const bool is_short = std::getenv("LUCID_SHORT_TESTS") != nullptr;
  static int turn = 0;
  return is_short && turn++ % 10 != 0;
}

// The same numbers in every run.
inline std::mt19937_64 g_random(20240607);

inline int64_t Below(int64_t n) {
  return static_cast<int64_t>(g_random() % static_cast<uint64_t>(n));
}

// One of ten thousand normal numbers, in turn: a new one each time would take longer than what is
// tested, with a sanitizer in it.
inline double Normal() {
  static std::vector<double> drawn;
  static size_t next = 0;
  if (drawn.empty()) {
    std::normal_distribution<double> normal;
    for (int i = 0; i < 10007; ++i) drawn.push_back(normal(g_random));
  }
  return drawn[next++ % drawn.size()];
}

// ---- Hosts: so many threads, one that takes the tasks in the worst order, and none.

inline bool RunThreads(void* host, void (*task)(void*, size_t), size_t count, void* argument) {
  const int num_threads = *static_cast<int*>(host);
  std::atomic<size_t> next{0};
  const auto work = [&] {
    for (size_t i; (i = next.fetch_add(1)) < count;) task(argument, i);
  };
  std::vector<std::thread> threads;
  for (int i = 1; i < num_threads; ++i) threads.emplace_back(work);
  work();
  for (std::thread& thread : threads) thread.join();
  return true;
}

inline bool RunBackwards(void*, void (*task)(void*, size_t), size_t count, void* argument) {
  while (count > 0) task(argument, --count);
  return true;
}

// Calls run() for a while, and another thread writes one of the contents after another to the
// memory meanwhile, all of one size.
template <class F>
void WhileWritten(char* memory, const std::vector<std::vector<char>>& contents, const F& run) {
  const auto end = std::chrono::steady_clock::now() + std::chrono::milliseconds(150);
  std::atomic<bool> stop{false};
  std::thread writer([&] {
    // Through a volatile pointer, so that all of it is written every time.
    volatile char* const to = memory;
    for (size_t i = 0; !stop; ++i) {
      const std::vector<char>& content = contents[i % contents.size()];
      for (size_t k = 0; k < content.size(); ++k) to[k] = content[k];
    }
  });
  while (std::chrono::steady_clock::now() < end) run();
  stop = true;
  writer.join();
}

inline bool RunNothing(void*, void (*)(void*, size_t), size_t, void*) { return false; }

}  // namespace lucid
