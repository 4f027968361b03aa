// The result of a kernel or a check. A plain value that holds its text: making one neither throws
// nor allocates, so it can report that there is no memory.
#pragma once

namespace lucid {

enum class Code : int { kOk = 0, kInvalidArgument = 1, kOutOfMemory = 2, kInternal = 3 };

struct Status {
  Code code = Code::kOk;
  char message[252];  // meaningful only if !ok(); longer texts are cut off

  Status() { message[0] = '\0'; }
  bool ok() const { return code == Code::kOk; }
};

#if defined(__GNUC__)
#define LUCID_PRINTF(format_arg, first) __attribute__((format(printf, format_arg, first)))
#else
#define LUCID_PRINTF(format_arg, first)
#endif

Status Error(Code code, const char* format, ...) LUCID_PRINTF(2, 3);

// An error of the caller: Code::kInvalidArgument.
Status InvalidArgument(const char* format, ...) LUCID_PRINTF(1, 2);

}  // namespace lucid
