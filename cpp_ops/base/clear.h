// Zeros in large memory.
#pragma once

#include <stddef.h>

namespace lucid {

// Clears memory that is more than the caches hold, past them.
void ClearPastCaches(void* data, size_t bytes);

}  // namespace lucid
