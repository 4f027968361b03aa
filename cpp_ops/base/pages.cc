#include "base/pages.h"

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>

#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <string>

#include "base/lines.h"
#endif

namespace lucid {

#if defined(__linux__)
namespace {

// Of linux/mman.h; headers older than Linux 6.1 lack it, and kernels older than that refuse it.
constexpr int kMadviseCollapse = 25;

// Whether [begin, end) is private, writable and backed by no file, after /proc/self/maps.
bool IsAnonymous(uintptr_t begin, uintptr_t end) {
  // address range, permissions, offset, device, inode; a path may follow and be long.
  Lines maps("/proc/self/maps");
  std::string line;
  while (begin < end && maps.Next(&line)) {
    unsigned long low, high, inode;
    char permissions[5];
    if (std::sscanf(line.c_str(), "%lx-%lx %4s %*x %*s %lu", &low, &high, permissions, &inode) ==
            4 &&
        low <= begin && begin < high) {
      if (permissions[1] != 'w' || permissions[3] != 'p' || inode != 0) break;
      begin = high;
    }
  }
  return begin >= end;
}

// A number at the start of a file, or after a word at the start of one of its lines; else -1.
int64_t ReadNumber(const std::string& path, const std::string& word = "") {
  Lines lines(path);
  std::string line;
  while (lines.Next(&line)) {
    if (line.compare(0, word.size(), word) != 0) continue;
    const char* const text = line.c_str() + word.size();
    char* end;
    errno = 0;
    const long long number = std::strtoll(text, &end, 10);
    return end == text || errno != 0 || number < 0 ? -1 : number;  // such as "max": no limit
  }
  return -1;
}

// What is left of the limits of a control group and of those that it is in.
int64_t FreeInGroup(const std::string& mount, std::string group, const char* limit_name,
                    const char* usage_name, const char* inactive_name) {
  int64_t least = -1;
  for (;;) {
    const std::string folder = mount + group + '/';
    const int64_t limit = ReadNumber(folder + limit_name);
    const int64_t usage = ReadNumber(folder + usage_name);
    if (limit >= 0 && usage >= 0) {
      const int64_t inactive = ReadNumber(folder + "memory.stat", inactive_name);
      int64_t left = limit - usage + (inactive > 0 ? inactive : 0);
      if (left < 0) left = 0;
      if (least < 0 || left < least) least = left;
    }
    // In a container the path may be the host's, and its own group the root of what is mounted.
    if (group.empty()) return least;
    const size_t slash = group.rfind('/');
    group.resize(slash == std::string::npos ? 0 : slash);
  }
}

}  // namespace

int64_t FreeMemory(const char* root) {
  const std::string base = root;
  int64_t least = ReadNumber(base + "/proc/meminfo", "MemAvailable:");
  if (least < 0) return -1;
  least = least > INT64_MAX / 1024 ? INT64_MAX : least * 1024;
  Lines groups(base + "/proc/self/cgroup");
  std::string line;
  while (groups.Next(&line)) {  // hierarchy:controllers:/path
    const size_t first = line.find(':');
    const size_t second = first == std::string::npos ? first : line.find(':', first + 1);
    if (second == std::string::npos) continue;
    const std::string controllers = ',' + line.substr(first + 1, second - first - 1) + ',';
    std::string group = line.substr(second + 1);
    if (group == "/") group.clear();
    int64_t left = -1;
    if (controllers == ",,") {
      left = FreeInGroup(base + "/sys/fs/cgroup", group, "memory.max", "memory.current",
                         "inactive_file ");
    } else if (controllers.find(",memory,") != std::string::npos) {
      left = FreeInGroup(base + "/sys/fs/cgroup/memory", group, "memory.limit_in_bytes",
                         "memory.usage_in_bytes", "total_inactive_file ");
    }
    if (left >= 0 && left < least) least = left;
  }
  return least;
}

bool HugePagesOffered() {
  Lines file("/sys/kernel/mm/transparent_hugepage/enabled");
  std::string line;
  return file.Next(&line) && line.find("[never]") == std::string::npos;
}

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
bool HugePagesOffered() { return false; }
int64_t FreeMemory(const char*) { return -1; }

#endif

}  // namespace lucid
