// Numbers of the types of tables: how they lie in memory, and random ones.
#pragma once

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>

namespace fuzz {

constexpr double kInfinity = HUGE_VAL;

// The numbers of the types in embedding_bag.h.
enum : int32_t { kFloat32, kFloat16, kBFloat16, kFloat64, kInt8, kUint8, kInt4, kUint4 };
enum : int32_t { kInt32, kInt64 };
enum : int32_t { kSum, kMean, kMax, kSqrtn };
enum : int32_t { kNoDivisor, kCount, kWeights };

inline bool IsQuantized(int32_t dtype) { return dtype >= kInt8; }
inline bool IsNibble(int32_t dtype) { return dtype >= kInt4; }

inline int64_t SizeOf(int32_t dtype) {
  constexpr int64_t kSizes[] = {4, 2, 2, 8, 1, 1};
  return dtype >= 0 && dtype <= kUint8 ? kSizes[dtype] : 1;
}

inline int64_t RowBytes(int32_t dtype, int64_t columns) {
  return IsNibble(dtype) ? (columns + 1) / 2 : columns * SizeOf(dtype);
}

// ---- Random numbers

class Random {
 public:
  explicit Random(uint64_t state) : state_(state) {}
  uint64_t Next() {  // splitmix64
    uint64_t z = state_ += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
  }
  int64_t Below(int64_t n) {
    return static_cast<int64_t>(static_cast<unsigned __int128>(Next()) * static_cast<uint64_t>(n) >>
                                64);
  }
  int64_t Between(int64_t low, int64_t high) { return low + Below(high - low + 1); }
  bool OneIn(int64_t n) { return Below(n) == 0; }
  double Unit() { return static_cast<double>(Next() >> 11) * 0x1p-53; }
  template <class T>
  T Pick(std::initializer_list<T> choices) {
    return choices.begin()[Below(static_cast<int64_t>(choices.size()))];
  }

 private:
  uint64_t state_;
};

// ---- Numbers of the types of tables, in memory. A double holds each of them.

inline double FromHalf(uint16_t bits) {
  const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
  double x;
  if (exponent == 31) {
    x = mantissa ? static_cast<double>(NAN) : kInfinity;
  } else {
    x = exponent ? std::ldexp(1024 + mantissa, exponent - 25) : std::ldexp(mantissa, -24);
  }
  return bits >> 15 ? -x : x;
}

template <class To, class From>
To Bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "the same bits");
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

inline double Load(int32_t dtype, const char* base, int64_t i) {
  const char* const at = base + i * SizeOf(dtype);
  if (dtype == kFloat64) {
    double x;
    std::memcpy(&x, at, 8);
    return x;
  }
  if (dtype == kFloat32) {
    float x;
    std::memcpy(&x, at, 4);
    return static_cast<double>(x);
  }
  uint16_t x;
  std::memcpy(&x, at, 2);
  if (dtype == kFloat16) return FromHalf(x);
  return static_cast<double>(Bits<float>(static_cast<uint32_t>(x) << 16));
}

// A float16 or bfloat16: the nearest one, to even.
inline uint16_t Narrow(int32_t dtype, double x) {
  const int mantissa_bits = dtype == kFloat16 ? 10 : 7, bias = dtype == kFloat16 ? 15 : 127;
  const uint16_t sign = static_cast<uint16_t>(std::signbit(x) ? 0x8000 : 0);
  const int infinity = (2 * bias + 1) << mantissa_bits;
  if (std::isnan(x)) return static_cast<uint16_t>(infinity | 1 << (mantissa_bits - 1));
  if (std::isinf(x)) return static_cast<uint16_t>(sign | infinity);
  if (x == 0) return sign;
  const int exponent = std::max(std::ilogb(x), 1 - bias);
  // In units of the last place; the carry of rounding up goes into the exponent by itself.
  const int units =
      static_cast<int>(std::nearbyint(std::ldexp(std::fabs(x), mantissa_bits - exponent)));
  const int bits = units + ((exponent + bias - 1) << mantissa_bits);
  return static_cast<uint16_t>(sign | std::min(bits, infinity));
}

inline void Store(int32_t dtype, char* base, int64_t i, double x) {
  char* const at = base + i * SizeOf(dtype);
  if (dtype == kFloat64) {
    std::memcpy(at, &x, 8);
  } else if (dtype == kFloat32) {
    const float narrow = static_cast<float>(x);
    std::memcpy(at, &narrow, 4);
  } else {
    const uint16_t bits = Narrow(dtype, x);
    std::memcpy(at, &bits, 2);
  }
}

// Whether a NaN there is the one that the contract names.
inline bool IsTheNan(int32_t dtype, const char* base, int64_t i) {
  const char* const at = base + i * SizeOf(dtype);
  if (dtype == kFloat64) {
    const uint64_t nan = 0x7ff8000000000000u;
    return std::memcmp(at, &nan, 8) == 0;
  }
  if (dtype == kFloat32) {
    const uint32_t nan = 0x7fc00000u;
    return std::memcmp(at, &nan, 4) == 0;
  }
  const uint16_t nan = dtype == kFloat16 ? 0x7e00 : 0x7fc0;
  return std::memcmp(at, &nan, 2) == 0;
}

// The kinds of numbers that an array is made of.
enum class Flavour { kPlain, kIntegers, kWide, kBits, kSpecial };

inline Flavour DrawFlavour(Random* r) {
  const int64_t i = r->Below(20);
  return i < 10   ? Flavour::kPlain
         : i < 14 ? Flavour::kIntegers
         : i < 16 ? Flavour::kWide
         : i < 17 ? Flavour::kBits
                  : Flavour::kSpecial;
}

inline void DrawNumbers(Random* r, int32_t dtype, Flavour flavour, char* base, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const uint64_t bits = r->Next();
    double x = static_cast<double>(static_cast<int64_t>(bits)) * 0x1p-63;
    switch (flavour) {
      case Flavour::kPlain:
        break;
      case Flavour::kIntegers:
        x = static_cast<double>(static_cast<int64_t>(bits >> 60) - 8);
        break;
      case Flavour::kWide: {
        constexpr int kExponents[] = {140, 22, 140, 1060};
        const int most = kExponents[dtype];
        x = std::ldexp(x, static_cast<int>(bits % static_cast<uint64_t>(2 * most)) - most);
        break;
      }
      case Flavour::kBits:
        std::memcpy(base + i * SizeOf(dtype), &bits, static_cast<size_t>(SizeOf(dtype)));
        continue;
      case Flavour::kSpecial:
        if (bits % 8 == 0) {
          constexpr double kLargest[] = {FLT_MAX, 65504, 0x1.fep127, DBL_MAX};
          constexpr double kSmallest[] = {0x1p-149, 0x1p-24, 0x1p-133, 0x1p-1074};
          const double special[] = {
              static_cast<double>(NAN), kInfinity, 0, kLargest[dtype], kSmallest[dtype],
              kSmallest[dtype] * 1023,  1,         2};
          x = std::copysign(special[bits / 8 % 8], x);
        }
    }
    Store(dtype, base, i, x);
  }
}

}  // namespace fuzz
