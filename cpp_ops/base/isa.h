// The instruction sets that this library was compiled for, and which of them this CPU can run.
#pragma once

#include "base/status.h"

namespace lucid {

// In order of speed: the best one last.
#if defined(__x86_64__) || defined(_M_X64)
#define LUCID_X86_64 1
enum class Isa : int { baseline, avx2, avx512 };
constexpr int kIsaCount = 3;
#elif defined(__aarch64__) || defined(_M_ARM64)
#define LUCID_AARCH64 1
enum class Isa : int { baseline, neon };
constexpr int kIsaCount = 2;
#else
enum class Isa : int { baseline };
constexpr int kIsaCount = 1;
#endif

const char* IsaName(Isa isa);

// Asks the CPU, and the operating system too: it must save the wide registers.
bool IsaSupported(Isa isa);

// An unknown name, or one that this CPU cannot run, is an invalid argument; the text lists the
// names that it can run.
Status FindIsa(const char* name, Isa* isa);

// The one named by the environment variable LUCID_FORCE_ISA, else the best supported one.
Status ActiveIsa(Isa* isa);

}  // namespace lucid
