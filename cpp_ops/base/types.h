// Element types, and the scalar conversions that every vector version must agree with bit for bit.
//
// This header reaches translation units that are compiled for one instruction set, so its functions
// are static: an inline function with external linkage would leave several versions of one symbol,
// and the linker may keep the AVX-512 one for everybody.
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__CUDACC__)
#define LUCID_HOST_DEVICE __host__ __device__
#else
#define LUCID_HOST_DEVICE
#endif

namespace lucid {

enum DType : int32_t {
  kFloat32 = 0,
  kFloat16 = 1,
  kBFloat16 = 2,
  kFloat64 = 3,
  // Quantized values. Two of 4 bits share a byte, the first in the low half, and every row begins
  // at a byte of its own.
  kInt8 = 4,
  kUint8 = 5,
  kInt4 = 6,
  kUint4 = 7,
};
enum IndexType : int32_t { kInt32 = 0, kInt64 = 1 };

struct Float16 {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

struct Int8 {
  int8_t value;
};
struct Uint8 {
  uint8_t value;
};
struct Int4 {  // a byte that holds two
  uint8_t bits;
};
struct Uint4 {
  uint8_t bits;
};

template <class T>
inline constexpr bool kIsNibble = false;
template <>
inline constexpr bool kIsNibble<Int4> = true;
template <>
inline constexpr bool kIsNibble<Uint4> = true;
template <class T>
inline constexpr bool kIsSignedNibble = false;
template <>
inline constexpr bool kIsSignedNibble<Int4> = true;
template <class T>
inline constexpr bool kIsQuantized = kIsNibble<T>;
template <>
inline constexpr bool kIsQuantized<Int8> = true;
template <>
inline constexpr bool kIsQuantized<Uint8> = true;

// The bytes of a row's first n elements.
template <class T>
static constexpr size_t BytesOf(int64_t n) {
  return kIsNibble<T> ? (static_cast<size_t>(n) + 1) / 2 : static_cast<size_t>(n) * sizeof(T);
}

// The byte that a row's element n begins in.
template <class T>
static constexpr size_t ByteOf(int64_t n) {
  return kIsNibble<T> ? static_cast<size_t>(n) / 2 : static_cast<size_t>(n) * sizeof(T);
}

// The type that sums are kept in.
template <class T>
struct AccumulatorOf {
  using type = float;
};
template <>
struct AccumulatorOf<double> {
  using type = double;
};
template <class T>
using Accumulator = typename AccumulatorOf<T>::type;

template <class To, class From>
LUCID_HOST_DEVICE static inline To BitCast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "BitCast keeps the size");
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

// Tensors may start at any byte (external data is an mmap of a file): read through memcpy only.
template <class T>
static inline T LoadUnaligned(const void* base, int64_t i) {
  T value;
  memcpy(&value, static_cast<const char*>(base) + static_cast<size_t>(i) * sizeof(T), sizeof(T));
  return value;
}

// An offset if it is a position or the end, else the end.
LUCID_HOST_DEVICE static inline int64_t WithinPositions(int64_t offset, int64_t positions) {
  return static_cast<uint64_t>(offset) < static_cast<uint64_t>(positions) ? offset : positions;
}

LUCID_HOST_DEVICE static inline float ToAccumulator(float x) { return x; }
LUCID_HOST_DEVICE static inline double ToAccumulator(double x) { return x; }
LUCID_HOST_DEVICE static inline float ToAccumulator(Int8 x) { return x.value; }
LUCID_HOST_DEVICE static inline float ToAccumulator(Uint8 x) { return x.value; }
LUCID_HOST_DEVICE static inline float ToAccumulator(BFloat16 x) {
  return BitCast<float>(static_cast<uint32_t>(x.bits) << 16);
}
LUCID_HOST_DEVICE static inline float ToAccumulator(Float16 x) {
  // Rebias the exponent by integer addition. Subnormals get the smallest normal exponent and lose
  // its implicit bit by a subtraction of normal floats, which a flush-to-zero mode cannot spoil.
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t magnitude = x.bits & 0x7fffu;
  uint32_t bits = (magnitude << 13) + (112u << 23);
  if (magnitude >= 0x7c00u) {
    bits += 112u << 23;
  } else if (magnitude < 0x0400u) {
    bits = BitCast<uint32_t>(BitCast<float>(bits + (1u << 23)) - BitCast<float>(113u << 23));
  }
  return BitCast<float>(bits | sign);
}

// Element i of a row.
template <class T>
static inline Accumulator<T> ElementAt(const char* row, int64_t i) {
  if constexpr (kIsNibble<T>) {
    const int byte = static_cast<unsigned char>(row[i / 2]);
    const int code = i % 2 ? byte >> 4 : byte & 15;
    return static_cast<float>(kIsSignedNibble<T> ? (code ^ 8) - 8 : code);
  } else {
    return ToAccumulator(LoadUnaligned<T>(row, i));
  }
}

// The way back rounds to nearest even. NaN must have been made the canonical one before.
LUCID_HOST_DEVICE static inline void FromAccumulator(float x, float* out) { *out = x; }
LUCID_HOST_DEVICE static inline void FromAccumulator(double x, double* out) { *out = x; }
LUCID_HOST_DEVICE static inline void FromAccumulator(float x, BFloat16* out) {
  const uint32_t bits = BitCast<uint32_t>(x);
  out->bits = x != x ? static_cast<uint16_t>(bits >> 16 | 0x40u)
                     : static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}
LUCID_HOST_DEVICE static inline void FromAccumulator(float x, Float16* out) {
  const uint32_t bits = BitCast<uint32_t>(x);
  const uint32_t sign = bits >> 16 & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u | (magnitude >> 13 & 0x1ffu);
  } else if (magnitude >= 0x477ff000u) {  // 65520 and up round to infinity
    half = 0x7c00u;
  } else if (magnitude >= 0x38800000u) {  // a normal half
    half = (magnitude - (112u << 23) + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  } else {
    // A subnormal half: shift the significand down to units of 2^-24.
    const uint32_t exponent = magnitude >> 23;
    if (exponent < 102u) {  // below 2^-25: zero
      half = 0;
    } else {
      const uint32_t significand = (magnitude & 0x7fffffu) | 0x800000u;
      const uint32_t shift = 126u - exponent;
      const uint32_t odd = significand >> shift & 1u;
      half = (significand + (1u << (shift - 1)) - 1u + odd) >> shift;
    }
  }
  out->bits = static_cast<uint16_t>(half | sign);
}

// One bit pattern for all NaNs. Which payload survives an addition is the compiler's and the CPU's
// choice, and results must be the same bits on every instruction set.
LUCID_HOST_DEVICE static inline float CanonicalNan(float x) {
  return x != x ? BitCast<float>(0x7fc00000u) : x;
}
LUCID_HOST_DEVICE static inline double CanonicalNan(double x) {
  return x != x ? BitCast<double>(uint64_t{0x7ff8000000000000u}) : x;
}

}  // namespace lucid

// Runs a statement with T, the C++ type of a checked DType.
#define LUCID_FOR_DTYPE(dtype, statement)            \
  switch (dtype) {                                   \
    LUCID_DTYPE_CASE(kFloat32, float, statement)     \
    LUCID_DTYPE_CASE(kFloat16, Float16, statement)   \
    LUCID_DTYPE_CASE(kBFloat16, BFloat16, statement) \
    LUCID_DTYPE_CASE(kInt8, Int8, statement)         \
    LUCID_DTYPE_CASE(kUint8, Uint8, statement)       \
    LUCID_DTYPE_CASE(kInt4, Int4, statement)         \
    LUCID_DTYPE_CASE(kUint4, Uint4, statement)       \
    default: {                                       \
      using T = double;                              \
      statement;                                     \
    }                                                \
  }
#define LUCID_DTYPE_CASE(dtype, type, statement) \
  case dtype: {                                  \
    using T = type;                              \
    statement;                                   \
    break;                                       \
  }
