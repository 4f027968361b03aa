// Vectors of N accumulators (float or double), with only the operations that the kernels need.
//
// A translation unit includes this after it set LUCID_VECTOR_BYTES, the width of its registers.
// Everything has internal linkage; types.h says why. Where there are no vector
// extensions, a vector is a plain struct of scalars and the compiler does what it can.
//
// Wider vectors than the registers would be simpler to use, but gcc keeps those in memory.
#pragma once

#include "base/types.h"

#if defined(__AVX2__) || defined(__F16C__)
#include <immintrin.h>
#elif defined(__SSE2__)
#include <emmintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#if defined(__GNUC__)
#define LUCID_INLINE         inline __attribute__((always_inline))
#define LUCID_ALWAYS_INLINE  __attribute__((always_inline))
#define LUCID_NOINLINE       __attribute__((noinline))
#define LUCID_UNROLL         _Pragma("GCC unroll 16")
#define LUCID_PREFETCH_L1(p) __builtin_prefetch(p, 0, 3)
#define LUCID_PREFETCH_L2(p) __builtin_prefetch(p, 0, 2)
#elif defined(_MSC_VER)
#include <intrin.h>
#define LUCID_INLINE __forceinline
#define LUCID_ALWAYS_INLINE
#define LUCID_NOINLINE __declspec(noinline)
#define LUCID_UNROLL
#if defined(_M_X64)
#define LUCID_PREFETCH_L1(p) _mm_prefetch(p, _MM_HINT_T0)
#define LUCID_PREFETCH_L2(p) _mm_prefetch(p, _MM_HINT_T1)
#else
#define LUCID_PREFETCH_L1(p) __prefetch(p)
#define LUCID_PREFETCH_L2(p) __prefetch(p)
#endif
#else
#define LUCID_INLINE inline
#define LUCID_ALWAYS_INLINE
#define LUCID_NOINLINE
#define LUCID_UNROLL
#define LUCID_PREFETCH_L1(p) static_cast<void>(p)
#define LUCID_PREFETCH_L2(p) static_cast<void>(p)
#endif

// LUCID_NO_VECTOR_EXTENSIONS brings the plain structs to compilers that could do better, to test
// them.
#if defined(__GNUC__) && !defined(LUCID_NO_VECTOR_EXTENSIONS)
#define LUCID_VECTOR_EXTENSIONS 1
#endif

namespace lucid {
namespace {

#if defined(LUCID_VECTOR_EXTENSIONS)

template <class E, int N>
struct VectorOf {
  typedef E type __attribute__((vector_size(N * sizeof(E))));
};
template <class E>
struct VectorOf<E, 1> {
  using type = E;
};
template <class E, int N>
using Vector = typename VectorOf<E, N>::type;

// A vector times a scalar is the language's own.

// NaN in either stays; of equals the first stays.
template <class V>
LUCID_INLINE V MaxSticky(V a, V b) {
  return ((b > a) | (b != b)) ? b : a;
}
template <>
LUCID_INLINE float MaxSticky(float a, float b) {
  return (b > a || b != b) ? b : a;
}
template <>
LUCID_INLINE double MaxSticky(double a, double b) {
  return (b > a || b != b) ? b : a;
}

template <class V>
LUCID_INLINE V Abs(V x) {
  return x < 0 ? -x : x;  // -0 may stay: it is added to or compared with what is not negative
}

template <class E, int N>
LUCID_INLINE Vector<E, N> CanonicalNans(Vector<E, N> x) {
  if constexpr (N == 1) {
    return CanonicalNan(x);
  } else {
    const Vector<E, N> nan = Vector<E, N>{} + CanonicalNan(static_cast<E>(__builtin_nanf("")));
    return x != x ? nan : x;
  }
}

#else

template <class E, int N>
struct Lanes {
  E lane[N];
};
template <class E, int N>
struct VectorOf {
  using type = Lanes<E, N>;
};
template <class E>
struct VectorOf<E, 1> {
  using type = E;
};
template <class E, int N>
using Vector = typename VectorOf<E, N>::type;

template <class E, int N>
LUCID_INLINE Lanes<E, N> operator+(Lanes<E, N> a, const Lanes<E, N>& b) {
  for (int i = 0; i < N; ++i) a.lane[i] += b.lane[i];
  return a;
}
template <class E, int N>
LUCID_INLINE Lanes<E, N> operator*(Lanes<E, N> a, const Lanes<E, N>& b) {
  for (int i = 0; i < N; ++i) a.lane[i] *= b.lane[i];
  return a;
}
template <class E, int N>
LUCID_INLINE Lanes<E, N> operator*(Lanes<E, N> a, E b) {
  for (int i = 0; i < N; ++i) a.lane[i] *= b;
  return a;
}
template <class E, int N>
LUCID_INLINE Lanes<E, N> operator+(Lanes<E, N> a, E b) {
  for (int i = 0; i < N; ++i) a.lane[i] += b;
  return a;
}
template <class E, int N>
LUCID_INLINE Lanes<E, N> operator-(Lanes<E, N> a, E b) {
  for (int i = 0; i < N; ++i) a.lane[i] -= b;
  return a;
}
template <class E, int N>
LUCID_INLINE Lanes<E, N> operator/(Lanes<E, N> a, E b) {
  for (int i = 0; i < N; ++i) a.lane[i] /= b;
  return a;
}

LUCID_INLINE float MaxSticky(float a, float b) { return (b > a || b != b) ? b : a; }
LUCID_INLINE double MaxSticky(double a, double b) { return (b > a || b != b) ? b : a; }
template <class E, int N>
LUCID_INLINE Lanes<E, N> MaxSticky(Lanes<E, N> a, const Lanes<E, N>& b) {
  for (int i = 0; i < N; ++i) a.lane[i] = MaxSticky(a.lane[i], b.lane[i]);
  return a;
}

LUCID_INLINE float Abs(float x) { return x < 0 ? -x : x; }
LUCID_INLINE double Abs(double x) { return x < 0 ? -x : x; }
template <class E, int N>
LUCID_INLINE Lanes<E, N> Abs(Lanes<E, N> x) {
  for (int i = 0; i < N; ++i) x.lane[i] = Abs(x.lane[i]);
  return x;
}

template <class E, int N>
LUCID_INLINE Vector<E, N> CanonicalNans(Vector<E, N> x) {
  if constexpr (N == 1) {
    return CanonicalNan(x);
  } else {
    for (int i = 0; i < N; ++i) x.lane[i] = CanonicalNan(x.lane[i]);
    return x;
  }
}

#endif

// Load<T, N>: N elements of type T as accumulators. Store is the inverse. Any alignment.
// The general case goes lane by lane; the overloads below are the fast ones.

template <class T, int N>
struct Memory {
  using A = Accumulator<T>;
  static LUCID_INLINE Vector<A, N> Load(const char* p) {
    if constexpr (sizeof(T) == sizeof(A)) {
      Vector<A, N> v;
      memcpy(&v, p, sizeof(v));
      return v;
    } else {
      A lanes[N];
      for (int i = 0; i < N; ++i) lanes[i] = ToAccumulator(LoadUnaligned<T>(p, i));
      Vector<A, N> v;
      memcpy(&v, lanes, sizeof(v));
      return v;
    }
  }
  static LUCID_INLINE void Store(Vector<A, N> v, char* p) {
    if constexpr (sizeof(T) == sizeof(A)) {
      memcpy(p, &v, sizeof(v));
    } else {
      A lanes[N];
      memcpy(lanes, &v, sizeof(v));
      T out[N];
      for (int i = 0; i < N; ++i) FromAccumulator(lanes[i], &out[i]);
      memcpy(p, out, sizeof(out));
    }
  }
};

#if defined(LUCID_VECTOR_EXTENSIONS)

#if defined(__AVX512F__)

template <>
struct Memory<Int8, 16> {
  static LUCID_INLINE Vector<float, 16> Load(const char* p) {
    const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return (Vector<float, 16>)_mm512_maskz_cvtepi32_ps(0xffff,
                                                       _mm512_maskz_cvtepi8_epi32(0xffff, x));
  }
};
template <>
struct Memory<Uint8, 16> {
  static LUCID_INLINE Vector<float, 16> Load(const char* p) {
    const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return (Vector<float, 16>)_mm512_maskz_cvtepi32_ps(0xffff,
                                                       _mm512_maskz_cvtepu8_epi32(0xffff, x));
  }
};

// gcc turns a conversion of 16 vector elements into four shuffles, where one instruction does it.
template <>
struct Memory<BFloat16, 16> {
  static LUCID_INLINE Vector<float, 16> Load(const char* p) {
    const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return (Vector<float, 16>)_mm512_maskz_slli_epi32(0xffff,
                                                      _mm512_maskz_cvtepu16_epi32(0xffff, x), 16);
  }
  // Not VCVTNEPS2BF16: that one flushes subnormals. The NaNs that come here are canonical, so the
  // rounding carry cannot reach their sign.
  static LUCID_INLINE void Store(Vector<float, 16> v, char* p) {
    const Vector<uint32_t, 16> x = (Vector<uint32_t, 16>)v;
    const Vector<uint32_t, 16> rounded = (x + 0x7fff + (x >> 16 & 1)) >> 16;
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm512_maskz_cvtepi32_epi16(0xffff, (__m512i)rounded));
  }
};
// The zeroing forms with a full mask: those without a mask start from an undefined register, which
// some gcc versions warn about.
template <>
struct Memory<Float16, 16> {
  static LUCID_INLINE Vector<float, 16> Load(const char* p) {
    return (Vector<float, 16>)_mm512_maskz_cvtph_ps(
        0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static LUCID_INLINE void Store(Vector<float, 16> v, char* p) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm512_maskz_cvtps_ph(0xffff, (__m512)v, _MM_FROUND_TO_NEAREST_INT));
  }
};

#endif  // __AVX512F__

#if defined(__F16C__) && defined(__AVX2__)

template <>
struct Memory<Int8, 8> {
  static LUCID_INLINE Vector<float, 8> Load(const char* p) {
    const __m128i x = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
    return (Vector<float, 8>)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(x));
  }
};
template <>
struct Memory<Uint8, 8> {
  static LUCID_INLINE Vector<float, 8> Load(const char* p) {
    const __m128i x = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
    return (Vector<float, 8>)_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(x));
  }
};

template <>
struct Memory<BFloat16, 8> {
  static LUCID_INLINE Vector<float, 8> Load(const char* p) {
    const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return (Vector<float, 8>)_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16);
  }
  static LUCID_INLINE void Store(Vector<float, 8> v, char* p) {
    const Vector<uint32_t, 8> x = (Vector<uint32_t, 8>)v;
    const __m256i rounded = (__m256i)((x + 0x7fff + (x >> 16 & 1)) >> 16);
    const __m128i low = _mm256_castsi256_si128(rounded),
                  high = _mm256_extracti128_si256(rounded, 1);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm_packus_epi32(low, high));
  }
};
template <>
struct Memory<Float16, 8> {
  static LUCID_INLINE Vector<float, 8> Load(const char* p) {
    return (Vector<float, 8>)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static LUCID_INLINE void Store(Vector<float, 8> v, char* p) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                     _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
  }
};

#endif  // __F16C__ && __AVX2__

#if defined(__SSE2__)

// Four bytes in the low quarter of a register, as floats.
LUCID_INLINE Vector<float, 4> FloatsOf(__m128i bytes, bool is_signed) {
  const __m128i zero = _mm_setzero_si128();
  if (!is_signed) {
    return (Vector<float, 4>)_mm_cvtepi32_ps(
        _mm_unpacklo_epi16(_mm_unpacklo_epi8(bytes, zero), zero));
  }
  // Into the top byte of each lane, and down again with the sign.
  const __m128i high = _mm_unpacklo_epi16(zero, _mm_unpacklo_epi8(zero, bytes));
  return (Vector<float, 4>)_mm_cvtepi32_ps(_mm_srai_epi32(high, 24));
}
template <>
struct Memory<Int8, 4> {
  static LUCID_INLINE Vector<float, 4> Load(const char* p) {
    return FloatsOf(_mm_cvtsi32_si128(LoadUnaligned<int32_t>(p, 0)), true);
  }
};
template <>
struct Memory<Uint8, 4> {
  static LUCID_INLINE Vector<float, 4> Load(const char* p) {
    return FloatsOf(_mm_cvtsi32_si128(LoadUnaligned<int32_t>(p, 0)), false);
  }
};

template <>
struct Memory<BFloat16, 4> {
  static LUCID_INLINE Vector<float, 4> Load(const char* p) {
    const __m128i x = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
    return (Vector<float, 4>)_mm_unpacklo_epi16(_mm_setzero_si128(), x);
  }
  static LUCID_INLINE void Store(Vector<float, 4> v, char* p) {
    const __m128i x = (__m128i)v;
    const __m128i odd = _mm_and_si128(_mm_srli_epi32(x, 16), _mm_set1_epi32(1));
    // SSE2 packs signed words only: shift arithmetically, so that each one fits.
    const __m128i rounded =
        _mm_srai_epi32(_mm_add_epi32(_mm_add_epi32(x, odd), _mm_set1_epi32(0x7fff)), 16);
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi32(rounded, rounded));
  }
};

template <>
struct Memory<Float16, 4> {
  static LUCID_INLINE Vector<float, 4> Load(const char* p) {
    const __m128i h = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
#if defined(__F16C__)
    return (Vector<float, 4>)_mm_cvtph_ps(h);
#else
    // ToAccumulator(Float16) in four lanes.
    const __m128i x = _mm_unpacklo_epi16(h, _mm_setzero_si128());
    const __m128i magnitude = _mm_and_si128(x, _mm_set1_epi32(0x7fff));
    const __m128i sign = _mm_slli_epi32(_mm_xor_si128(x, magnitude), 16);
    const __m128i rebias = _mm_set1_epi32(112 << 23);
    const __m128i top = _mm_cmpgt_epi32(magnitude, _mm_set1_epi32(0x7bff));
    const __m128i subnormal = _mm_cmplt_epi32(magnitude, _mm_set1_epi32(0x0400));
    const __m128i normal = _mm_add_epi32(_mm_add_epi32(_mm_slli_epi32(magnitude, 13), rebias),
                                         _mm_and_si128(top, rebias));
    const __m128 small =
        _mm_sub_ps(_mm_castsi128_ps(_mm_add_epi32(normal, _mm_set1_epi32(1 << 23))),
                   _mm_castsi128_ps(_mm_set1_epi32(113 << 23)));
    const __m128i bits = _mm_or_si128(_mm_and_si128(subnormal, _mm_castps_si128(small)),
                                      _mm_andnot_si128(subnormal, normal));
    return (Vector<float, 4>)_mm_or_si128(bits, sign);
#endif
  }
  static LUCID_INLINE void Store(Vector<float, 4> v, char* p) {
#if defined(__F16C__)
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p),
                     _mm_cvtps_ph((__m128)v, _MM_FROUND_TO_NEAREST_INT));
#else
    Float16 out[4];
    for (int i = 0; i < 4; ++i) FromAccumulator(v[i], &out[i]);
    memcpy(p, out, sizeof(out));
#endif
  }
};

#elif defined(__ARM_NEON) && defined(__aarch64__)

template <>
struct Memory<Int8, 4> {
  static LUCID_INLINE Vector<float, 4> Load(const char* p) {
    const int8x8_t x = vreinterpret_s8_u32(vdup_n_u32(LoadUnaligned<uint32_t>(p, 0)));
    return (Vector<float, 4>)vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(x))));
  }
};
template <>
struct Memory<Uint8, 4> {
  static LUCID_INLINE Vector<float, 4> Load(const char* p) {
    const uint8x8_t x = vreinterpret_u8_u32(vdup_n_u32(LoadUnaligned<uint32_t>(p, 0)));
    return (Vector<float, 4>)vcvtq_f32_u32(vmovl_u16(vget_low_u16(vmovl_u8(x))));
  }
};

template <>
struct Memory<BFloat16, 4> {
  static LUCID_INLINE Vector<float, 4> Load(const char* p) {
    uint16x4_t h;
    memcpy(&h, p, sizeof(h));
    return (Vector<float, 4>)vshll_n_u16(h, 16);
  }
  static LUCID_INLINE void Store(Vector<float, 4> v, char* p) {
    const uint32x4_t x = (uint32x4_t)v;
    const uint32x4_t odd = vandq_u32(vshrq_n_u32(x, 16), vdupq_n_u32(1));
    const uint16x4_t h = vshrn_n_u32(vaddq_u32(vaddq_u32(x, odd), vdupq_n_u32(0x7fff)), 16);
    memcpy(p, &h, sizeof(h));
  }
};
template <>
struct Memory<Float16, 4> {
  static LUCID_INLINE Vector<float, 4> Load(const char* p) {
    float16x4_t h;
    memcpy(&h, p, sizeof(h));
    return (Vector<float, 4>)vcvt_f32_f16(h);
  }
  static LUCID_INLINE void Store(Vector<float, 4> v, char* p) {
    const float16x4_t h = vcvt_f16_f32((float32x4_t)v);
    memcpy(p, &h, sizeof(h));
  }
};

#endif  // __SSE2__, __ARM_NEON

#endif  // LUCID_VECTOR_EXTENSIONS

// Keeps p in one register. gcc adds two in the address of every load otherwise, where p is a sum,
// and then a load takes a slot of its own beside the instruction that it is part of: a row of 256
// float16 took 18.7 ns in place of 16.6.
LUCID_INLINE const char* InOneRegister(const char* p) {
#if defined(__GNUC__)
  __asm__("" : "+r"(p));
#endif
  return p;
}

// Two vectors that lie side by side in memory, in an order of their own until InOrder puts every
// element where Load would have. Only where kExists: there it takes fewer instructions.
template <class T, int N>
struct Pair {
  static constexpr bool kExists = false;
};

// The even elements of bfloat16 want a shift and the odd ones a mask, where Load's widening comes
// to a shuffle and a shift for each vector. In a table that L2 holds, a row of 64 took 2.5 ns in
// place of 3.3, and one of 128 4.9 in place of 6.1, with AVX-512.
#if defined(LUCID_VECTOR_EXTENSIONS) && defined(__AVX512F__)

template <>
struct Pair<BFloat16, 16> {
  static constexpr bool kExists = true;

  static LUCID_INLINE void Load(const char* p, Vector<float, 16>* x) {
    const Vector<uint32_t, 16> both = (Vector<uint32_t, 16>)_mm512_loadu_si512(p);
    x[0] = (Vector<float, 16>)(both << 16);
    x[1] = (Vector<float, 16>)(both & 0xffff0000);
  }
  static LUCID_INLINE void InOrder(Vector<float, 16>* x) {
    const Vector<int32_t, 16> low = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23};
    const __m512 even = (__m512)x[0], odd = (__m512)x[1];
    x[0] = (Vector<float, 16>)_mm512_permutex2var_ps(even, (__m512i)low, odd);
    x[1] = (Vector<float, 16>)_mm512_permutex2var_ps(even, (__m512i)(low + 8), odd);
  }
};

#elif defined(LUCID_VECTOR_EXTENSIONS) && defined(__AVX2__)

template <>
struct Pair<BFloat16, 8> {
  static constexpr bool kExists = true;

  static LUCID_INLINE void Load(const char* p, Vector<float, 8>* x) {
    const Vector<uint32_t, 8> both =
        (Vector<uint32_t, 8>)_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    x[0] = (Vector<float, 8>)(both << 16);
    x[1] = (Vector<float, 8>)(both & 0xffff0000);
  }
  static LUCID_INLINE void InOrder(Vector<float, 8>* x) {
    const __m256 even = (__m256)x[0], odd = (__m256)x[1];
    const __m256 outer = _mm256_unpacklo_ps(even, odd), inner = _mm256_unpackhi_ps(even, odd);
    x[0] = (Vector<float, 8>)_mm256_permute2f128_ps(outer, inner, 0x20);
    x[1] = (Vector<float, 8>)_mm256_permute2f128_ps(outer, inner, 0x31);
  }
};

#endif

template <class T, int N>
LUCID_INLINE Vector<Accumulator<T>, N> Load(const char* p) {
  return Memory<T, N>::Load(p);
}
template <class T, int N>
LUCID_INLINE void Store(Vector<Accumulator<T>, N> v, char* p) {
  Memory<T, N>::Store(v, p);
}

// N 4-bit values as N bytes, for the loads of whole bytes.
template <class T, int N>
struct Nibbles {
  static LUCID_INLINE Vector<float, N> Load(const char* p, bool odd) {
    // N / 2 bytes, and half of the next one if the first value begins in half a byte.
    uint64_t word = 0;
    memcpy(&word, p, (N + 1) / 2);
    if (odd) {
      const uint64_t next = N > 1 ? static_cast<unsigned char>(p[N / 2]) : 0;
      word = word >> 4 | next << (4 * N - 4) % 64;
    }
    char bytes[N < 16 ? 16 : N];
#if defined(LUCID_VECTOR_EXTENSIONS) && defined(__SSE2__)
    const __m128i x = _mm_set_epi64x(0, static_cast<long long>(word));
    const __m128i low = _mm_set1_epi8(15), eight = _mm_set1_epi8(8);
    __m128i codes =
        _mm_unpacklo_epi8(_mm_and_si128(x, low), _mm_and_si128(_mm_srli_epi16(x, 4), low));
    if (kIsSignedNibble<T>) codes = _mm_sub_epi8(_mm_xor_si128(codes, eight), eight);
    memcpy(bytes, &codes, sizeof(codes));
#else
    for (int i = 0; i < N; ++i) {
      const int code = static_cast<int>(word >> (4 * i) & 15);
      bytes[i] = static_cast<char>(kIsSignedNibble<T> ? (code ^ 8) - 8 : code);
    }
#endif
    return Memory<Int8, N>::Load(bytes);
  }
};

#if defined(LUCID_VECTOR_EXTENSIONS) && defined(__AVX2__)

// Every lane shifts the word that it shares with others, where the general way takes bytes apart: a
// row of 64 values took 7.8 ns in place of 12.7 in a table that L2 holds.
template <class T>
struct Nibbles<T, 8> {
  static LUCID_INLINE Vector<float, 8> Load(const char* p, bool odd) {
    uint32_t eight = LoadUnaligned<uint32_t>(p, 0);
    if (odd) eight = eight >> 4 | static_cast<uint32_t>(static_cast<unsigned char>(p[4])) << 28;
    const __m256i word = _mm256_set1_epi32(static_cast<int>(eight));
    // A signed one goes to the top of its lane, and down again with its sign.
    const __m256i up = (__m256i)Vector<int32_t, 8>{28, 24, 20, 16, 12, 8, 4, 0};
    const __m256i down = (__m256i)Vector<int32_t, 8>{0, 4, 8, 12, 16, 20, 24, 28};
    return (Vector<float, 8>)_mm256_cvtepi32_ps(
        kIsSignedNibble<T>
            ? _mm256_srai_epi32(_mm256_sllv_epi32(word, up), 28)
            : _mm256_and_si256(_mm256_srlv_epi32(word, down), _mm256_set1_epi32(15)));
  }
};

#if defined(__AVX512BW__)

// 16 values, each in the low 4 bits of its lane, with others above it.
LUCID_INLINE __m512i SixteenNibbles(const char* p, bool odd) {
  uint32_t low = LoadUnaligned<uint32_t>(p, 0), high = LoadUnaligned<uint32_t>(p, 1);
  if (odd) {
    low = low >> 4 | high << 28;
    high = high >> 4 | static_cast<uint32_t>(static_cast<unsigned char>(p[8])) << 28;
  }
  const Vector<int32_t, 16> shifts = {0, 4, 8, 12, 16, 20, 24, 28, 0, 4, 8, 12, 16, 20, 24, 28};
  const __m512i words = _mm512_mask_set1_epi32(_mm512_set1_epi32(static_cast<int>(low)), 0xff00,
                                               static_cast<int>(high));
  return _mm512_maskz_srlv_epi32(0xffff, words, (__m512i)shifts);
}

#endif  // __AVX512BW__

#endif  // __AVX2__

// Load<T, N> of the elements that follow those in the first `byte` bytes of a row, and one more
// where `odd`; it is true for 4-bit values only.
template <class T, int N>
LUCID_INLINE Vector<Accumulator<T>, N> LoadAt(const char* row, size_t byte, bool odd) {
  if constexpr (kIsNibble<T>) {
    return Nibbles<T, N>::Load(row + byte, odd);
  } else {
    static_cast<void>(odd);
    return Load<T, N>(row + byte);
  }
}

// The products (value - zero) * scale of a quantized row, N at a time; `odd` as in LoadAt. Without
// has_zero zero is 0. Without kPlain it is 0 too, and from a kPartial class come the products where
// scale * 2^15 is finite, and elsewhere numbers of which none is.
template <class T, int N, bool kPlain>
class Products {
 public:
  static constexpr bool kPartial = false;

  LUCID_INLINE Products(float scale, float zero, bool has_zero)
      : scale_(scale), zero_(zero), has_zero_(has_zero) {}

  LUCID_INLINE Vector<float, N> At(const char* row, size_t byte, bool odd) const {
    const Vector<float, N> x = LoadAt<T, N>(row, byte, odd);
    return (kPlain && has_zero_ ? x - zero_ : x) * scale_;
  }

 private:
  float scale_, zero_;
  bool has_zero_;
};

#if defined(LUCID_VECTOR_EXTENSIONS) && defined(__AVX512BW__)

// 4-bit values have 16 products in a row. They fit in one register, and one instruction looks 16
// values up in it, by the low 4 bits of each lane whatever stands above them. In a table that L2
// holds, a row of 64 values took 4.5 ns in place of 7.0.
template <class T>
class NibbleProducts {
 public:
  static constexpr bool kPartial = false;

  LUCID_INLINE NibbleProducts(float scale, float zero, bool) {
    const Vector<float, 16> codes =
        kIsSignedNibble<T>
            ? Vector<float, 16>{0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1}
            : Vector<float, 16>{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    products_ = (codes - zero) * scale;
  }

  LUCID_INLINE Vector<float, 16> At(const char* row, size_t byte, bool odd) const {
    return (Vector<float, 16>)_mm512_maskz_permutexvar_ps(0xffff, SixteenNibbles(row + byte, odd),
                                                          (__m512)products_);
  }

 private:
  Vector<float, 16> products_;
};
template <bool kPlain>
class Products<Int4, 16, kPlain> : public NibbleProducts<Int4> {
  using NibbleProducts<Int4>::NibbleProducts;
};
template <bool kPlain>
class Products<Uint4, 16, kPlain> : public NibbleProducts<Uint4> {
  using NibbleProducts<Uint4>::NibbleProducts;
};

// A byte that is shuffled into the significand of 2^15 makes it 2^15 + value without a conversion.
// (2^15 + value) * scale - 2^15 * scale, rounded once, is value * scale: two instructions, as for a
// conversion and a product, but of three where those with the load's widening and the sum are four.
// In a table that L2 holds, a row of 64 values took 3.4 ns in place of 4.1. (Signed ones would need
// 2^15 + 128, whose product with the scale is not exact.)
template <>
class Products<Uint8, 16, false> {
 public:
  static constexpr bool kPartial = true;

  // The intrinsics, since gcc multiplies before it broadcasts otherwise, and broadcasts twice.
  LUCID_INLINE Products(float scale, float, bool)
      : scale_(_mm512_set1_ps(scale)),
        offset_(_mm512_maskz_mul_ps(0xffff, scale_, _mm512_set1_ps(-32768))) {}

  LUCID_INLINE Vector<float, 16> At(const char* row, size_t byte, bool) const {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(row + byte));
    // Byte 4 q + r of all goes to byte 1 of lane r in the quarter q.
    const Vector<uint32_t, 16> order = {0x0000, 0x0100, 0x0200, 0x0300, 0x0400, 0x0500,
                                        0x0600, 0x0700, 0x0800, 0x0900, 0x0a00, 0x0b00,
                                        0x0c00, 0x0d00, 0x0e00, 0x0f00};
    const __m512i x =
        _mm512_mask_shuffle_epi8((__m512i)_mm512_set1_ps(32768), 0x2222222222222222,
                                 _mm512_maskz_broadcast_i32x4(0xffff, bytes), (__m512i)order);
    return (Vector<float, 16>)_mm512_maskz_fmadd_ps(0xffff, (__m512)x, scale_, offset_);
  }

 private:
  __m512 scale_, offset_;
};

#endif  // __AVX512BW__

}  // namespace
}  // namespace lucid
