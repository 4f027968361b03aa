#include "quantize/quantize.h"

#include <float.h>

#include "base/types.h"

// Double precision in the vectors that every CPU of the platform has. Where a row lies in memory,
// and how it is cut, changes no byte of what is written: only the sums of squares are added up in
// lanes.

namespace lucid {
namespace {

#if defined(__GNUC__)
// Wider ones gain little: what takes the time is the division, of two numbers in four cycles.
typedef double Doubles __attribute__((vector_size(16)));
#else
typedef double Doubles;
#endif
constexpr int kWidth = sizeof(Doubles) / sizeof(double);
constexpr int kLanes = 8;
constexpr int kVectors = kLanes / kWidth;
constexpr int kBlock =
    512;  // elements that are worked on at a time; even, as two of 4 bits share a byte

// Adding it rounds a double below 2^51 to an integer, a half to the even one, and leaves its last
// bits in the last bits of the sum.
constexpr double kRounder = 6755399441055744.0;  // 1.5 * 2^52

inline Doubles LoadDoubles(const double* p) {
  Doubles x;
  memcpy(&x, p, sizeof(x));
  return x;
}
inline void StoreDoubles(Doubles x, double* p) { memcpy(p, &x, sizeof(x)); }
inline Doubles All(double x) { return Doubles{} + x; }
inline Doubles Smaller(Doubles a, Doubles b) { return a < b ? a : b; }
inline Doubles Larger(Doubles a, Doubles b) { return a > b ? a : b; }

// A number for each of the lanes; lane i % kLanes takes element i of a row.
struct Lanes {
  Doubles v[kVectors];

  explicit Lanes(double x) {
    for (Doubles& part : v) part = All(x);
  }
  double Sum() const {
    return Folded([](Doubles a, Doubles b) { return a + b; },
                  [](double a, double b) { return a + b; });
  }
  double Least() const {
    return Folded(Smaller, [](double a, double b) { return a < b ? a : b; });
  }
  double Largest() const {
    return Folded(Larger, [](double a, double b) { return a > b ? a : b; });
  }

 private:
  template <class F, class G>
  double Folded(F of_vectors, G of_numbers) const {
    Doubles all = v[0];
    for (int k = 1; k < kVectors; ++k) all = of_vectors(v[k], all);
    double parts[kWidth];
    StoreDoubles(all, parts);
    for (int i = 1; i < kWidth; ++i) parts[0] = of_numbers(parts[0], parts[i]);
    return parts[0];
  }
};

// What a row loses.
struct Losses {
  Lanes squares{0}, lost{0}, furthest{0};

  void AddRow(int k, Doubles x) { squares.v[k] += x * x; }
  void AddDifference(int k, Doubles x) {
    lost.v[k] += x * x;
    furthest.v[k] = Larger(x < All(0) ? -x : x, furthest.v[k]);
  }
  void Report(const QuantizeArgs& args, int64_t r) const {
    if (args.squares) args.squares[r] = squares.Sum();
    if (args.lost) args.lost[r] = lost.Sum();
    if (args.furthest) args.furthest[r] = furthest.Largest();
  }
};

// The elements of a block of a row, and behind them as many that are `fill` as the lanes have room
// for.
template <class T>
class Block {
 public:
  // Elements of the row from `begin` on.
  void Read(const char* row, int64_t begin, int64_t dim) {
    size_ = static_cast<int>(dim - begin < kBlock ? dim - begin : kBlock);
    end_ = (size_ + kLanes - 1) / kLanes * kLanes;
    for (int i = 0; i < size_; ++i) {
      numbers_[i] = static_cast<double>(ToAccumulator(LoadUnaligned<T>(row, begin + i)));
    }
  }
  int size() const { return size_; }
  void Fill(double fill) {
    for (int i = size_; i < end_; ++i) numbers_[i] = fill;
  }
  // Calls f(k, i, x) with x for vector k of the lanes, elements i and on.
  template <class F>
  void ForEach(F f) const {
    for (int i = 0; i < end_; i += kLanes) {
      for (int k = 0; k < kVectors; ++k) f(k, i + k * kWidth, At(i + k * kWidth));
    }
  }
  double first() const { return numbers_[0]; }
  Doubles At(int i) const { return LoadDoubles(numbers_ + i); }

 private:
  int size_ = 0, end_ = 0;
  alignas(64) double numbers_[kBlock];
};

// The range of quantized values.
template <class Q>
struct Range {
  static constexpr bool kSigned = false;
  static constexpr int kLowest = 0, kHighest = 255;
};
template <>
struct Range<Int8> {
  static constexpr bool kSigned = true;
  static constexpr int kLowest = -128, kHighest = 127;
};
template <>
struct Range<Int4> {
  static constexpr bool kSigned = true;
  static constexpr int kLowest = -8, kHighest = 7;
};
template <>
struct Range<Uint4> {
  static constexpr bool kSigned = false;
  static constexpr int kLowest = 0, kHighest = 15;
};

// The last bits of n doubles, to which `kRounder` was added.
template <class Q>
void Pack(const double* codes, int n, unsigned char* out) {
  const auto code = [codes](int i) {
    return static_cast<unsigned char>(BitCast<uint64_t>(codes[i]));
  };
  if constexpr (kIsNibble<Q>) {
    for (int i = 0; i + 1 < n; i += 2) {
      out[i / 2] = static_cast<unsigned char>((code(i) & 15) | code(i + 1) << 4);
    }
    if (n % 2) out[n / 2] = static_cast<unsigned char>(code(n - 1) & 15);
  } else {
    for (int i = 0; i < n; ++i) out[i] = code(i);
  }
}

template <class T, class Q>
bool QuantizeRow(const QuantizeArgs& args, int64_t r) {
  using R = Range<Q>;
  const int64_t dim = args.dim;
  const char* row = static_cast<const char*>(args.rows) + static_cast<size_t>(r) * BytesOf<T>(dim);
  unsigned char* out =
      static_cast<unsigned char*>(args.output) + static_cast<size_t>(r) * BytesOf<Q>(dim);
  double low = 0, high = 0;
  Block<T> block;
  block.Read(row, 0, dim);
  if (dim > 0) {
    const double first = block.first();
    Lanes least(first), most(first), odd(0);
    for (int64_t begin = 0; begin < dim; begin += kBlock) {
      if (begin > 0) block.Read(row, begin, dim);
      block.Fill(first);
      block.ForEach([&](int k, int, Doubles x) {
        least.v[k] = Smaller(x, least.v[k]);
        most.v[k] = Larger(x, most.v[k]);
        odd.v[k] += x - x;  // NaN, if x is not finite
      });
    }
    low = least.Least();
    high = most.Largest();
    if (!(odd.Sum() == 0 && low >= -args.limit && high <= args.limit)) return false;
  }

  double shift = 0;
  if constexpr (!R::kSigned) {
    const float bias = static_cast<float>(low) + 0.0f;  // a zero without a sign
    args.bias[r] = bias;
    shift = bias;
    low -= shift;
    high -= shift;
  }
  const double below = low < 0 ? -low : low, above = high < 0 ? -high : high;
  float scale = static_cast<float>((below > above ? below : above) / R::kHighest);
  if (scale == 0) scale = 1;  // a row of equal numbers: its quantized values are 0
  args.scale[r] = scale;

  const Doubles step = All(scale), zero = All(shift), rounder = All(kRounder);
  const Doubles lowest = All(R::kLowest), highest = All(R::kHighest);
  Losses losses;
  alignas(64) double codes[kBlock];
  for (int64_t begin = 0; begin < dim; begin += kBlock) {
    if (dim > kBlock) block.Read(row, begin, dim);
    block.Fill(0);
    block.ForEach([&](int k, int, Doubles x) { losses.AddRow(k, x); });
    block.Fill(shift);  // which is kept as it is
    block.ForEach([&](int k, int i, Doubles x) {
      Doubles number = R::kSigned ? x / step : (x - zero) / step;
      number = number + rounder - rounder;
      number = Larger(lowest, Smaller(highest, number));
      StoreDoubles(number + rounder, codes + i);
      losses.AddDifference(k, R::kSigned ? x - number * step : x - (number * step + zero));
    });
    Pack<Q>(codes, block.size(), out + ByteOf<Q>(begin));
  }
  losses.Report(args, r);
  return true;
}

// A float16 of a finite float without branches, as `FromAccumulator`.
uint16_t ToHalf(float x) {
  const uint32_t bits = BitCast<uint32_t>(x), magnitude = bits & 0x7fffffffu;
  const uint32_t normal = (magnitude - (112u << 23) + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  // Numbers from 1/2 on have steps of 2^-24 or more, which is the unit of subnormal halves.
  const uint32_t subnormal =
      BitCast<uint32_t>(BitCast<float>(magnitude) + 0.5f) - BitCast<uint32_t>(0.5f);
  const uint32_t half = magnitude < 0x38800000u    ? subnormal
                        : magnitude >= 0x477ff000u ? 0x7c00u
                                                   : normal;
  return static_cast<uint16_t>((bits >> 16 & 0x8000u) | half);
}

uint16_t Rounded(float x, Float16) { return ToHalf(x); }
uint16_t Rounded(float x, BFloat16) {
  const uint32_t bits = BitCast<uint32_t>(x);
  return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

template <class T, class Q>
bool RoundRow(const QuantizeArgs& args, int64_t r) {
  const int64_t dim = args.dim;
  const char* row = static_cast<const char*>(args.rows) + static_cast<size_t>(r) * BytesOf<T>(dim);
  char* out = static_cast<char*>(args.output) + static_cast<size_t>(r) * BytesOf<Q>(dim);
  Losses losses;
  uint16_t halves[kBlock];
  for (int64_t begin = 0; begin < dim; begin += kBlock) {
    Block<T> block;
    Block<Q> kept;
    block.Read(row, begin, dim);
    for (int i = 0; i < block.size(); ++i) {
      halves[i] = Rounded(ToAccumulator(LoadUnaligned<T>(row, begin + i)), Q());
    }
    block.Fill(0);
    block.ForEach([&](int k, int, Doubles x) { losses.AddRow(k, x); });
    kept.Read(reinterpret_cast<const char*>(halves), 0, block.size());
    kept.Fill(0);
    block.ForEach([&](int k, int i, Doubles x) { losses.AddDifference(k, x - kept.At(i)); });
    memcpy(out + static_cast<size_t>(begin) * sizeof(uint16_t), halves,
           static_cast<size_t>(block.size()) * sizeof(uint16_t));
  }
  // A difference is infinite where a number became so; one of infinities, or of NaN, is NaN.
  if (!(losses.lost.Sum() <= DBL_MAX)) return false;
  losses.Report(args, r);
  return true;
}

template <class T>
int64_t QuantizeAll(const QuantizeArgs& args) {
  bool (*row)(const QuantizeArgs&, int64_t) = nullptr;
  switch (args.output_dtype) {
    case kInt8:
      row = QuantizeRow<T, Int8>;
      break;
    case kUint8:
      row = QuantizeRow<T, Uint8>;
      break;
    case kInt4:
      row = QuantizeRow<T, Int4>;
      break;
    case kUint4:
      row = QuantizeRow<T, Uint4>;
      break;
    default:
      break;
  }
  if constexpr (sizeof(T) < sizeof(double)) {
    if (args.output_dtype == kFloat16) row = RoundRow<T, Float16>;
    if (args.output_dtype == kBFloat16) row = RoundRow<T, BFloat16>;
  }
  if (row == nullptr) return -1;
  int64_t r = 0;
  while (r < args.num_rows && row(args, r)) ++r;
  return r;
}

}  // namespace

int64_t QuantizeRows(const QuantizeArgs& args) {
  if (args.size_bytes != static_cast<int64_t>(sizeof(args)) || args.num_rows < 0 || args.dim < 0)
    return -1;
  const bool rounds = args.output_dtype == kFloat16 || args.output_dtype == kBFloat16;
  const bool has_bias = args.output_dtype == kUint8 || args.output_dtype == kUint4;
  if (args.num_rows > 0 && ((!rounds && !args.scale) || (has_bias && !args.bias))) return -1;
  if (args.num_rows > 0 && args.dim > 0 && (!args.rows || !args.output)) return -1;
  switch (args.dtype) {
    case kFloat32:
      return QuantizeAll<float>(args);
    case kFloat16:
      return QuantizeAll<Float16>(args);
    case kBFloat16:
      return QuantizeAll<BFloat16>(args);
    case kFloat64:
      return QuantizeAll<double>(args);
    default:
      return -1;
  }
}

}  // namespace lucid
