// The shape of a tensor that somebody else holds.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace lucid {

struct TensorShape {
  const int64_t* dims;
  size_t rank;
};

}  // namespace lucid
