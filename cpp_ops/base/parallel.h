// How a kernel asks its host for threads.
#pragma once

#include <stddef.h>

namespace lucid {

// Calls task(argument, i) once for every i in [0, count), in any order, on any threads, and returns
// when all are done. False if the host could not run them; some may have run then.
struct ParallelFor {
  bool (*run)(void* host, void (*task)(void* argument, size_t i), size_t count, void* argument);
  void* host;
};

}  // namespace lucid
