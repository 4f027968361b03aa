// What a kernel answers. A plain value with its text inside: making one can neither throw nor
// allocate, so it can be made anywhere, out of memory included.
#pragma once

namespace lucid {

enum class Code : int { kOk = 0, kInvalidArgument = 1, kOutOfMemory = 2, kInternal = 3 };

struct Status {
  Code code = Code::kOk;
  char message[252];  // meaningful only if !ok(); a longer text is cut

  Status() { message[0] = '\0'; }
  bool ok() const { return code == Code::kOk; }
};

#if defined(__GNUC__)
#define LUCID_PRINTF(format_arg, first) __attribute__((format(printf, format_arg, first)))
#else
#define LUCID_PRINTF(format_arg, first)
#endif

Status Error(Code code, const char* format, ...) LUCID_PRINTF(2, 3);

// Code::kInvalidArgument: the caller's input is refused.
Status Refuse(const char* format, ...) LUCID_PRINTF(1, 2);

}  // namespace lucid
