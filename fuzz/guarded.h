// Arrays between two pages that nobody may touch.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

#include "numbers.h"

namespace fuzz {

inline const size_t kPage = static_cast<size_t>(sysconf(_SC_PAGESIZE));
constexpr size_t kCapacity = size_t{8} << 20, kTableCapacity = size_t{64} << 20;
constexpr size_t kMargin = 64;  // of bytes around an output that are watched

[[noreturn]] inline void Give(const char* what) {
  std::perror(what);
  std::exit(2);
}

class Guarded {
 public:
  // The library may write to it only if it is an output.
  Guarded(const char* name, bool output, size_t capacity = kCapacity)
      : name_(name), capacity_(capacity) {
    const int file = memfd_create("fuzz", MFD_CLOEXEC);
    if (file < 0 || ftruncate(file, static_cast<off_t>(capacity_)) != 0) Give("memfd_create");
    const size_t around = capacity_ + 2 * kPage;
    char* const room = static_cast<char*>(
        mmap(nullptr, around, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    void* const ours = mmap(nullptr, capacity_, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    if (room == MAP_FAILED || ours == MAP_FAILED) Give("mmap");
    const int access = output ? PROT_READ | PROT_WRITE : PROT_READ;
    if (mmap(room + kPage, capacity_, access, MAP_SHARED | MAP_FIXED, file, 0) == MAP_FAILED) {
      Give("mmap");
    }
    close(file);
    theirs_ = room + kPage;
    ours_ = static_cast<char*>(ours);
  }

  // Room for so many bytes: up to the last page, or from the first one on; now and then a little
  // away from it, so that nothing is aligned. (`aligned`: to so many bytes.)
  char* Place(Random* r, int64_t bytes, int64_t aligned = 1) {
    bytes_ = static_cast<size_t>(bytes);
    if (bytes_ + 2 * kMargin > capacity_) Give("a case is too large for its memory");
    const size_t away = r->OneIn(4) ? static_cast<size_t>(r->Below(64) / aligned * aligned) : 0;
    at_ = r->OneIn(4) ? away : capacity_ - away - bytes_;
    return ours();
  }

  char* ours() const { return ours_ + at_; }
  char* theirs() const { return theirs_ + at_; }
  size_t bytes() const { return bytes_; }
  // An address that may not be touched.
  char* nowhere() const { return theirs_ + capacity_; }

  void Fill(int pattern) const {
    std::memset(ours_ + Begin(), pattern, End() - Begin());
    pattern_ = static_cast<char>(pattern);
  }
  // Whether the bytes around an output are as they were; and those in it.
  bool MarginsAreWhole() const { return IsFilled(Begin(), at_) && IsFilled(at_ + bytes_, End()); }
  bool IsUntouched() const { return IsFilled(Begin(), End()); }

  std::string Where(const char* address) const {
    const char* const begin = theirs_ - kPage;
    if (address < begin || address >= theirs_ + capacity_ + kPage) return "";
    char text[120];
    std::snprintf(text, sizeof(text), "byte %lld of %s, which has %lld bytes",
                  static_cast<long long>(address - theirs()), name_,
                  static_cast<long long>(bytes_));
    return text;
  }

 private:
  size_t Begin() const { return at_ < kMargin ? 0 : at_ - kMargin; }
  size_t End() const { return std::min(capacity_, at_ + bytes_ + kMargin); }
  bool IsFilled(size_t begin, size_t end) const {
    for (; begin < end; ++begin) {
      if (ours_[begin] != pattern_) return false;
    }
    return true;
  }

  const char* name_;
  size_t capacity_;
  char *ours_, *theirs_;
  size_t at_ = 0, bytes_ = 0;
  mutable char pattern_ = 0;
};

}  // namespace fuzz
