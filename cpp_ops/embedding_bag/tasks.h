// What validation and the splits of work of all kernels share. Internal, and not for the loops.
#pragma once

#include <stdint.h>

#include "base/types.h"

namespace lucid {
namespace {

// Less work than this, in bytes of rows that are read and written, is done at once on the caller's
// thread: a real ParallelFor leaves the host's threads spinning, which costs the next small run
// more than it won. On two threads, 129 to 207 KiB at once took 0.72 to 0.82 of the time where the
// host's threads sleep, and 0.91 to 1.27 where they spin.
constexpr double kInlineBytes = 192 << 10;

// A task is about this many bytes of rows, but there are never more than kMostTasks of them (the
// pieces of long bags are tasks of their own).
constexpr double kTaskBytes = 64 << 10;
constexpr int64_t kMostTasks = 128;

// For %lld: int64_t is long on some platforms and long long on others.
inline long long Wide(int64_t x) { return x; }

inline int64_t IndexAt(const void* base, int32_t type, int64_t i) {
  return type == kInt64 ? LoadUnaligned<int64_t>(base, i) : LoadUnaligned<int32_t>(base, i);
}

}  // namespace
}  // namespace lucid
