#include "base/pages.h"

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>

#include <cstdio>
#endif

namespace lucid {

#if defined(__linux__)
namespace {

// Of linux/mman.h; headers older than Linux 6.1 lack it, and kernels older than that refuse it.
constexpr int kMadviseCollapse = 25;
constexpr uintptr_t kHugePage = uintptr_t{2} << 20;

// Whether [begin, end) is private, writable and backed by no file, after /proc/self/maps.
bool IsAnonymous(uintptr_t begin, uintptr_t end) {
  std::FILE* maps = std::fopen("/proc/self/maps", "r");
  if (!maps) return false;
  // address range, permissions, offset, device, inode; a path may follow and be long.
  char line[512];
  bool starts_line = true;
  while (begin < end && std::fgets(line, sizeof(line), maps)) {
    const bool ends_line = [&] {
      for (const char* c = line; *c; ++c) {
        if (*c == '\n') return true;
      }
      return false;
    }();
    unsigned long low, high, inode;
    char permissions[5];
    if (starts_line &&
        std::sscanf(line, "%lx-%lx %4s %*x %*s %lu", &low, &high, permissions, &inode) == 4 &&
        low <= begin && begin < high) {
      if (permissions[1] != 'w' || permissions[3] != 'p' || inode != 0) break;
      begin = high;
    }
    starts_line = ends_line;
  }
  std::fclose(maps);
  return begin >= end;
}

}  // namespace

void BackWithHugePages(const void* data, size_t bytes) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(data);
  const uintptr_t begin = (address + kHugePage - 1) & ~(kHugePage - 1);
  const uintptr_t end = (address + bytes) & ~(kHugePage - 1);
  if (begin >= end || !IsAnonymous(begin, end)) return;
  void* const start = reinterpret_cast<void*>(begin);
  if (madvise(start, end - begin, MADV_HUGEPAGE) != 0) return;
  // What is not collapsed here, the kernel may collapse later on its own.
  static_cast<void>(madvise(start, end - begin, kMadviseCollapse));
}

#else

void BackWithHugePages(const void*, size_t) {}

#endif

}  // namespace lucid
