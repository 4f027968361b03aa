#include "base/status.h"

#include <cstdarg>
#include <cstdio>

namespace lucid {

Status Error(Code code, const char* format, ...) {
  Status status;
  status.code = code;
  va_list args;
  va_start(args, format);
  std::vsnprintf(status.message, sizeof(status.message), format, args);
  va_end(args);
  return status;
}

Status InvalidArgument(const char* format, ...) {
  Status status;
  status.code = Code::kInvalidArgument;
  va_list args;
  va_start(args, format);
  std::vsnprintf(status.message, sizeof(status.message), format, args);
  va_end(args);
  return status;
}

}  // namespace lucid
