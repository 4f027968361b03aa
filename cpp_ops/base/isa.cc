#include "base/isa.h"

#include <cstdint>
#include <cstdlib>
#include <cstring>

#if defined(LUCID_X86_64)
#if defined(_MSC_VER)
#include <intrin.h>
#else
#include <cpuid.h>
#endif
#endif

namespace lucid {
namespace {

#if defined(LUCID_X86_64)

struct CpuId {
  uint32_t eax, ebx, ecx, edx;
};

CpuId Query(uint32_t leaf) {
  CpuId r = {0, 0, 0, 0};
#if defined(_MSC_VER)
  int regs[4];
  __cpuid(regs, 0);
  if (static_cast<uint32_t>(regs[0]) >= leaf) {
    __cpuidex(regs, static_cast<int>(leaf), 0);
    r = {static_cast<uint32_t>(regs[0]), static_cast<uint32_t>(regs[1]),
         static_cast<uint32_t>(regs[2]), static_cast<uint32_t>(regs[3])};
  }
#else
  __get_cpuid_count(leaf, 0, &r.eax, &r.ebx, &r.ecx, &r.edx);
#endif
  return r;
}

// XCR0: which register files the operating system saves. Only legal to read after OSXSAVE.
uint64_t EnabledState() {
#if defined(_MSC_VER)
  return _xgetbv(0);
#else
  uint32_t low, high;
  // The mnemonic needs -mxsave, which this file must not have.
  __asm__ volatile(".byte 0x0f, 0x01, 0xd0" : "=a"(low), "=d"(high) : "c"(0));
  return static_cast<uint64_t>(high) << 32 | low;
#endif
}

constexpr bool Bits(uint64_t value, uint64_t mask) { return (value & mask) == mask; }

Isa Detect() {
  constexpr uint32_t kOsxsave = 1u << 27, kAvx = 1u << 28, kF16c = 1u << 29;
  constexpr uint32_t kAvx2 = 1u << 5;
  constexpr uint32_t kAvx512 = 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31;  // F, DQ, BW, VL
  constexpr uint64_t kYmmState = 0x06, kZmmState = 0xe6;
  const CpuId basic = Query(1);
  if (!Bits(basic.ecx, kOsxsave | kAvx | kF16c)) return Isa::baseline;
  const uint64_t state = EnabledState();
  const CpuId extended = Query(7);
  if (!Bits(state, kYmmState) || !Bits(extended.ebx, kAvx2)) return Isa::baseline;
  if (!Bits(state, kZmmState) || !Bits(extended.ebx, kAvx512)) return Isa::avx2;
  return Isa::avx512;
}

constexpr const char* kNames[kIsaCount] = {"baseline", "avx2", "avx512"};

#elif defined(LUCID_AARCH64)

Isa Detect() { return Isa::neon; }  // part of every AArch64 CPU
constexpr const char* kNames[kIsaCount] = {"baseline", "neon"};

#else

Isa Detect() { return Isa::baseline; }
constexpr const char* kNames[kIsaCount] = {"baseline"};

#endif

// "baseline, avx2": what can be asked for on this CPU.
struct SupportedList {
  char text[64];

  SupportedList() {
    text[0] = '\0';
    for (int i = 0; i < kIsaCount; ++i) {
      if (!IsaSupported(static_cast<Isa>(i))) continue;
      if (text[0]) std::strcat(text, ", ");
      std::strcat(text, kNames[i]);
    }
  }
};

}  // namespace

const char* IsaName(Isa isa) { return kNames[static_cast<int>(isa)]; }

bool IsaSupported(Isa isa) {
  static const Isa best = Detect();
  return static_cast<int>(isa) <= static_cast<int>(best);
}

Status FindIsa(const char* name, Isa* isa) {
  for (int i = 0; i < kIsaCount; ++i) {
    if (std::strcmp(name, kNames[i]) != 0) continue;
    *isa = static_cast<Isa>(i);
    if (IsaSupported(*isa)) return Status();
    return InvalidArgument("this CPU does not support %s; it supports: %s", name,
                           SupportedList().text);
  }
  return InvalidArgument("unknown instruction set \"%.40s\"; this CPU supports: %s", name,
                         SupportedList().text);
}

Status ActiveIsa(Isa* isa) {
  const char* forced = std::getenv("LUCID_FORCE_ISA");
  if (forced && *forced) {
    Isa found;
    const Status status = FindIsa(forced, &found);
    if (!status.ok()) return InvalidArgument("LUCID_FORCE_ISA: %s", status.message);
    *isa = found;
    return status;
  }
  int best = kIsaCount - 1;
  while (!IsaSupported(static_cast<Isa>(best))) --best;
  *isa = static_cast<Isa>(best);
  return Status();
}

}  // namespace lucid
