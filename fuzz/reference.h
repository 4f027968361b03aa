// The reference: what the contract of the kernels (embedding_bag.h) says, in long double, each
// result between two bounds.
//
// u is half the distance from 1 to the next number of the type that the contract accumulates in
// (float, or double for a double table), eta its smallest number. Each operation of that type gives
// the exact result times (1 + d), |d| <= u, plus at most eta if it is smaller than any normal
// number. So a sum of terms t, each of which goes through at most K operations, is off by at most
// gamma(K) * sum |t|, gamma(K) = K * u / (1 - K * u) (Higham, Accuracy and Stability of Numerical
// Algorithms, 3.1 and 4.2), in any order. An operation on a product of factors that loses eta is
// multiplied with the factors that are left: at most eta * product (1 + |factor|).
// Reals have errors of their own, 2^-63 an operation: those are added.
#pragma once

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <vector>

#include "embedding_bag/embedding_bag.h"
#include "guarded.h"
#include "numbers.h"

namespace fuzz {

using Real = long double;  // at least 64 bits of a number, and exponents beyond those of double

constexpr int64_t kGroup = 64, kPiece = 1024;  // of positions: "the order of additions"

// ---- A table of a call: what the library gets, and where this program has it

struct Table {
  EmbeddingBagArgs args;
  Guarded weight{"weight", false, kTableCapacity}, indices{"indices", false},
      offsets{"offsets", false}, weights{"per_sample_weights", false}, scale{"scale", false},
      second{"zero_point or bias", false};
  // Of these, where this program has them.
  const char* scales = nullptr;
  const char* seconds = nullptr;
  const char* sample_weights = nullptr;  // or null
  int64_t stride = 0;                    // of rows
  Flavour flavour, scale_flavour, second_flavour;
  // What the arrays say:
  int64_t num_bags = 0;
  int64_t padded = -1;         // the row
  std::vector<int64_t> begin;  // [num_bags + 1]
  std::vector<int64_t> index;  // [N]

  int64_t rows() const { return args.weight_shape[0]; }
  int64_t columns() const { return args.weight_shape[1]; }
  int64_t positions() const { return static_cast<int64_t>(index.size()); }
  // Whether a position with that index is not there.
  bool Skips(int64_t row) const { return row < 0 ? args.negative == 1 : row == padded; }
  bool Divides() const { return args.mode == kMean || args.mode == kSqrtn; }
  bool DividesByWeights() const { return Divides() && args.divisor == kWeights && sample_weights; }
};

struct Precision {
  Real u, eta, max;
};
constexpr Precision kSingle = {0x1p-24L, 0x1p-149L, static_cast<Real>(FLT_MAX)};
constexpr Precision kDouble = {0x1p-53L, 0x1p-1074L, static_cast<Real>(DBL_MAX)};

inline const Precision& PrecisionOf(int32_t dtype) { return dtype == kFloat64 ? kDouble : kSingle; }

inline Real Gamma(const Precision& p, int64_t k) {
  const Real ku = static_cast<Real>(k) * p.u;
  return ku / (1 - ku) + static_cast<Real>(k) * 0x1p-62L;
}

// What a result may be.
struct Expected {
  Real low = 0, high = 0;
  bool nan = false;
  bool anything = false;  // it depends on what the contract does not say: where a sum overflows
};

// A sum of products.
struct Sum {
  Real low = 0, high = 0;  // of the sum in exact arithmetic
  Real magnitude = 0;      // of |term|
  Real largest = 0;        // of |term| before a clip makes it smaller
  Real tiny = 0;           // the factors of eta
  int64_t terms = 0;
  bool nan = false, plus = false, minus = false, anything = false;

  // A term that is between two bounds. factors: the product of all (1 + |factor|).
  void Add(Real a, Real b, Real size, Real before_clip, Real factors) {
    ++terms;
    if (std::isnan(a) || std::isnan(b)) {
      // Both, or it depends on a factor that is not known exactly.
      (std::isnan(a) && std::isnan(b) ? nan : anything) = true;
    } else if (std::isinf(a) || std::isinf(b)) {
      if (a == b) {
        (a > 0 ? plus : minus) = true;
      } else {
        anything = true;
      }
    } else {
      low += std::min(a, b);
      high += std::max(a, b);
      magnitude += size;
      largest += before_clip;
      tiny += factors;
    }
  }

  // The sum divided by `divisor`; `more`: operations on a term beside the additions.
  Expected Divided(const Precision& p, int64_t more, Real divisor = 1) const {
    Expected e;
    if (terms == 0 && !nan && !anything) return e;
    if (nan || (plus && minus)) {
      e.nan = true;  // whatever else there is
    } else if (anything || std::max(largest, magnitude) >= p.max * (1 - 0x1p-10L)) {
      // (A finite sum may be infinite on the way: then NaN or either infinity comes of it.)
      e.anything = true;
    } else if (plus || minus) {
      e.low = e.high = plus ? static_cast<Real>(kInfinity) : -static_cast<Real>(kInfinity);
    } else {
      const Real error = Gamma(p, std::max<int64_t>(terms - 1, 0) + more) * magnitude +
                         (more > 0 ? (tiny + 1) * p.eta : 0);
      // What the division loses where its result is smaller than any normal number.
      const Real lost = divisor == 1 ? 0 : p.eta;
      e.low = (low - error) / divisor - lost;
      e.high = (high + error) / divisor + lost;
    }
    return e;
  }
};

// What a sum is divided by.
struct Divisor {
  Real low = 1, high = 1;
  bool nan = false, anything = false;
};

// One division, which is rounded.
inline Expected Quotient(const Precision& p, const Expected& e, const Divisor& d) {
  Expected q;
  const bool infinite = std::isinf(d.low) && d.low == d.high;
  const bool of_infinity = std::isinf(e.low) && e.low == e.high;
  if (e.nan || d.nan || (infinite && of_infinity && !e.anything && !d.anything)) {
    q.nan = true;
  } else if (e.anything || d.anything) {
    q.anything = true;
  } else if (infinite) {
    // 0
  } else if (d.low <= 0 && d.high >= 0) {
    const bool zeros = d.low == 0 && d.high == 0 && e.low == 0 && e.high == 0;
    (zeros ? q.nan : q.anything) = true;
  } else if (of_infinity) {
    q.low = q.high =
        (e.low > 0) == (d.low > 0) ? static_cast<Real>(kInfinity) : -static_cast<Real>(kInfinity);
  } else {
    const Real all[] = {e.low / d.low, e.low / d.high, e.high / d.low, e.high / d.high};
    q.low = *std::min_element(all, all + 4);
    q.high = *std::max_element(all, all + 4);
    q.low -= std::fabs(q.low) * 2 * p.u + p.eta;
    q.high += std::fabs(q.high) * 2 * p.u + p.eta;
    q.anything = std::max(std::fabs(q.low), std::fabs(q.high)) >= p.max;
  }
  return q;
}

// Whether `x` of a dtype may be the result. A 16-bit result is rounded once more.
inline bool IsExpected(const Expected& e, int32_t dtype, double x) {
  if (e.anything) return true;
  if (e.nan || std::isnan(x)) return e.nan && std::isnan(x);
  Real low = e.low, high = e.high;
  if (dtype == kFloat16 || dtype == kBFloat16) {
    // Half of the last place: relative for normal numbers, absolute for those below.
    const Real half = dtype == kFloat16 ? 0x1p-11L : 0x1p-8L;
    const Real least = dtype == kFloat16 ? 0x1p-25L : 0x1p-134L;
    const Real to_infinity = dtype == kFloat16 ? 65520.L : 0x1.ffp127L;
    const Real infinity = static_cast<Real>(kInfinity);
    if (high >= to_infinity) {
      high = infinity;
    } else if (high > -infinity) {
      high += std::max(half * std::fabs(high), least);
    }
    if (low <= -to_infinity) {
      low = -infinity;
    } else if (low < infinity) {
      low -= std::max(half * std::fabs(low), least);
    }
  }
  return low <= static_cast<Real>(x) && static_cast<Real>(x) <= high;
}

// A number of a table: (value - zero) * scale + shift. Of other tables, value alone.
struct Element {
  Real part;  // (value - zero) * scale
  Real shift;
  Real difference, scale;
  Real value() const { return part + shift; }
};

// A row's clip, between two bounds.
struct Clip {
  Real low = 1, high = 1;
  bool unknown = false;
  int64_t call = 0;  // that it belongs to
};

class Reference {
 public:
  void Begin(const Table& table) {
    t_ = &table;
    p_ = &PrecisionOf(table.args.dtype);
    // An infinite max_norm is none.
    clips_ = table.args.max_norm <= DBL_MAX;
    ++call_;
    if (clips_ && clip_.size() < static_cast<size_t>(table.rows())) {
      clip_.resize(static_cast<size_t>(table.rows()));
    }
  }

  bool clips() const { return clips_; }

  Element At(int64_t row, int64_t column) const {
    const EmbeddingBagArgs& a = t_->args;
    const char* const at = t_->weight.ours() + row * t_->stride;
    if (!IsQuantized(a.dtype)) {
      const Real x = static_cast<Real>(Load(a.dtype, at, column));
      return {x, 0, x, 1};
    }
    const int byte = static_cast<unsigned char>(at[IsNibble(a.dtype) ? column / 2 : column]);
    int q = byte;
    if (IsNibble(a.dtype)) q = column % 2 ? byte >> 4 : byte & 15;
    if (a.dtype == kInt8 && q >= 128) q -= 256;
    if (a.dtype == kInt4 && q >= 8) q -= 16;
    const auto number = [&](const char* base) {
      return static_cast<Real>(Load(a.scale_type, base + row * a.scale_stride, 0));
    };
    Element e;
    e.difference = static_cast<Real>(q) - (a.zero_point ? number(t_->seconds) : 0);
    e.scale = number(t_->scales);
    e.part = e.difference * e.scale;
    e.shift = a.bias ? number(t_->seconds) : 0;
    // "in float"
    if (std::fabs(e.difference) > p_->max && std::isfinite(e.difference)) e.part = Unknown();
    return e;
  }

  Real WeightOf(int64_t position) const {
    return t_->sample_weights
               ? static_cast<Real>(Load(t_->args.output_type, t_->sample_weights, position))
               : 1;
  }

  // Whether the row's number may be infinite or not, as a quantized one can that overflows.
  bool MayOverflow(const Element& e) const {
    return IsQuantized(t_->args.dtype) &&
           ((std::isfinite(e.part) && std::fabs(e.part) >= p_->max * (1 - 0x1p-20L)) ||
            (std::isfinite(e.value()) && std::fabs(e.value()) >= p_->max * (1 - 0x1p-20L)) ||
            (std::isfinite(e.difference) && std::fabs(e.difference) > p_->max));
  }

  // How far a row's number is off at most, for three operations of a quantized one.
  Real ErrorOf(const Element& e) const {
    if (!IsQuantized(t_->args.dtype)) return 0;
    return Gamma(*p_, 3) * (std::fabs(e.part) + std::fabs(e.shift)) +
           3 * p_->eta * (1 + std::fabs(e.scale));
  }

  const Clip& ClipOf(int64_t row) {
    Clip& clip = clip_[static_cast<size_t>(row)];
    if (clip.call != call_) {
      clip = Clip();
      clip.call = call_;
      FindClip(row, &clip);
    }
    return clip;
  }

  // What the rows of a bag are divided by: for mean and sqrtn, their number or their weights.
  Divisor DivisorOf(int64_t bag) const {
    const Precision& p = *p_;
    Divisor d;
    if (!t_->Divides()) return d;
    const bool squares = t_->args.mode == kSqrtn;
    Sum sum;
    int64_t rows = 0;
    bool tiny = false;
    for (int64_t k = t_->begin[static_cast<size_t>(bag)];
         k < t_->begin[static_cast<size_t>(bag) + 1]; ++k) {
      if (t_->Skips(t_->index[static_cast<size_t>(k)])) continue;
      ++rows;
      const Real w = WeightOf(k), term = squares ? w * w : w;
      sum.Add(term, term, std::fabs(term), std::fabs(term), 1);
      tiny |= w != 0 && std::fabs(term) < 0x1p-1000L;
    }
    if (!t_->DividesByWeights()) {
      d.low = d.high = static_cast<Real>(rows);
      if (squares) d.low = d.high = std::sqrt(d.low);
    } else {
      // The sum is double: each weight goes through at most as many operations as there are, and
      // three more.
      const Expected e = sum.Divided(kDouble, sum.magnitude > 0 ? 4 : 0);
      d = {e.low, e.high, e.nan, e.anything || tiny};
      if (squares && !d.nan) {
        d.low = std::sqrt(std::max<Real>(0, d.low));
        d.high = std::sqrt(d.high);
      }
    }
    if (d.nan || d.anything || std::isinf(d.low)) return d;
    // A root, and the rounding to the type that is divided in.
    const Real largest = std::max(std::fabs(d.low), std::fabs(d.high));
    if (largest >= p.max * (1 - 2 * p.u)) d.anything = true;
    if (largest > 0 && largest < p.eta * 0x1p40L) d.anything = true;
    const bool exact = !t_->DividesByWeights() && !squares && largest < 0x1p24L;
    if (!exact) {
      d.low -= std::fabs(d.low) * 2 * p.u;
      d.high += std::fabs(d.high) * 2 * p.u;
    }
    return d;
  }

  // One column of one bag.
  Expected Pooled(int64_t bag, int64_t column) {
    return t_->args.mode == kMax ? Maximum(bag, column) : Total(bag, column);
  }

  // The same where the contract tells every operation: the sum of a table that is neither quantized
  // nor clipped. (A zero may have another sign.)
  template <class A>
  double Ordered(int64_t bag, int64_t column) const {
    const int64_t begin = t_->begin[static_cast<size_t>(bag)];
    const int64_t end = t_->begin[static_cast<size_t>(bag) + 1];
    const auto piece = [&](int64_t from, int64_t to, int64_t* rows) {
      A sum = 0, group = 0;
      int64_t in_group = 0;
      for (int64_t k = from; k < to; ++k) {
        const int64_t row = t_->index[static_cast<size_t>(k)];
        if (t_->Skips(row)) continue;
        A x = static_cast<A>(Load(t_->args.dtype, t_->weight.ours() + row * t_->stride, column));
        if (t_->sample_weights) x *= static_cast<A>(WeightOf(k));
        group += x;
        ++*rows;
        if (++in_group < kGroup) continue;
        sum += group;
        group = 0;
        in_group = 0;
      }
      return in_group > 0 ? sum + group : sum;
    };
    int64_t rows = 0;
    A sum = 0;
    if (end - begin <= kPiece) {
      sum = piece(begin, end, &rows);
    } else {
      double all = 0;
      for (int64_t k = begin; k < end; k += kPiece) {
        all += static_cast<double>(piece(k, std::min(k + kPiece, end), &rows));
      }
      sum = static_cast<A>(all);
    }
    if (rows == 0) return 0;
    if (t_->args.mode == kMean) sum /= static_cast<A>(rows);
    return static_cast<double>(sum);
  }

 private:
  static Real Unknown() { return static_cast<Real>(kInfinity); }

  Real Power(Real x, Real exponent) const {
    // The reference's own error is far below u in either case.
    if (p_ == &kSingle && x < 0x1p900L && (x == 0 || x > 0x1p-900L)) {
      return static_cast<Real>(std::pow(static_cast<double>(x), static_cast<double>(exponent)));
    }
    return std::pow(x, exponent);
  }

  void FindClip(int64_t row, Clip* clip) {
    const Precision& p = *p_;
    const int64_t columns = t_->columns();
    const double type = t_->args.norm_type;
    // The contract takes max_norm and norm_type as numbers of the type that it accumulates in.
    Real limit = static_cast<Real>(t_->args.max_norm);
    Real exponent = static_cast<Real>(type);
    if (p_ == &kSingle) {
      limit = limit > static_cast<Real>(FLT_MAX) ? static_cast<Real>(kInfinity)
                                                 : static_cast<Real>(static_cast<float>(limit));
      if (type <= DBL_MAX) {
        if (type > 1e30 || type < 1e-30) clip->unknown = true;
        exponent = static_cast<Real>(static_cast<float>(type));
      }
    }
    const bool largest = !(type <= DBL_MAX);
    Real low = 0, high = 0;
    bool nan = false, inf = false;
    for (int64_t c = 0; c < columns; ++c) {
      const Element e = At(row, c);
      if (MayOverflow(e)) clip->unknown = true;
      const Real x = std::fabs(e.value());
      if (std::isnan(x)) {
        nan = true;
      } else if (std::isinf(x)) {
        inf = true;
      } else {
        const Real error = ErrorOf(e);
        const Real least = std::max<Real>(0, x - error), most = x + error;
        if (largest) {
          low = std::max(low, least);
          high = std::max(high, most);
        } else if (exponent == 1) {
          low += least;
          high += most;
        } else if (exponent == 2) {
          low += least * least * (1 - 2 * p.u);
          high += most * most * (1 + 2 * p.u);
        } else {
          // pow is off by less than 4 u, for an exponent that is off by u: x^(p (1 + u)).
          const auto bound = [&](Real base, int sign) -> Real {
            if (base == 0) return 0;
            const Real off = 4 * p.u + 2 * p.u * exponent * std::fabs(std::log(base));
            return off < 1    ? Power(base, exponent) * (1 + static_cast<Real>(sign) * off)
                   : sign < 0 ? 0
                              : static_cast<Real>(kInfinity);
          };
          low += bound(least, -1);
          high += bound(most, 1);
        }
      }
    }
    if (nan || clip->unknown) return;  // NaN is not above max_norm
    if (inf) {
      low = high = static_cast<Real>(kInfinity);
    } else if (!largest) {
      const Real gamma = Gamma(p, columns + 1), lost = static_cast<Real>(columns) * 2 * p.eta;
      const bool plain = exponent == 1 || exponent == 2;
      low = std::max<Real>(0, low * (1 - gamma) - (exponent == 1 ? 0 : lost));
      high = high * (1 + gamma) + (exponent == 1 ? 0 : lost);
      // Above the largest number, rounding decides.
      if (high >= p.max) high = static_cast<Real>(kInfinity);
      if (low > p.max * (1 + p.u)) low = static_cast<Real>(kInfinity);
      const auto root = [&](Real sum, int sign) -> Real {
        if (sum == 0 || std::isinf(sum) || exponent == 1) return sum;
        if (plain) return std::sqrt(sum) * (1 + static_cast<Real>(sign) * 2 * p.u);
        const Real off = 4 * p.u + 2 * p.u * std::fabs(std::log(sum)) / exponent;
        const Real value = Power(sum, 1 / exponent);
        return off < 1    ? value * (1 + static_cast<Real>(sign) * off)
               : sign < 0 ? 0
                          : static_cast<Real>(kInfinity);
      };
      low = root(low, -1);
      high = root(high, 1);
      if (!plain) {
        low = std::max<Real>(0, low - p.eta);
        high = high + p.eta > p.max ? static_cast<Real>(kInfinity) : high + p.eta;
        if (low > p.max * (1 + p.u)) low = static_cast<Real>(kInfinity);
      }
    }
    if (high <= limit) return;
    const Real epsilon = p_ == &kSingle ? static_cast<Real>(1e-7f) : static_cast<Real>(1e-7);
    Real least = 0, most = 0;
    if (limit > 0) {
      // An addition and a division.
      least = limit / (high + epsilon) * (1 - 3 * p.u) - p.eta;
      most = std::isinf(low) ? 0 : limit / (std::max(low, limit) + epsilon) * (1 + 3 * p.u) + p.eta;
      if (std::isinf(high)) least = 0;
      least = std::max<Real>(0, least);
    }
    clip->low = least;
    clip->high = low > limit ? most : 1;
    if (low <= limit) clip->high = std::max<Real>(1, most);
  }

  Expected Total(int64_t bag, int64_t column) {
    Sum sum;
    const bool quantized = IsQuantized(t_->args.dtype);
    int64_t rows = 0;
    for (int64_t k = t_->begin[static_cast<size_t>(bag)];
         k < t_->begin[static_cast<size_t>(bag) + 1]; ++k) {
      const int64_t row = t_->index[static_cast<size_t>(k)];
      if (t_->Skips(row)) continue;
      ++rows;
      const Element e = At(row, column);
      const Real w = WeightOf(k);
      AddTerm(e, row, w, &sum);
    }
    if (rows == 0) return Expected();
    int64_t more = 0;
    if (t_->sample_weights) ++more;
    if (clips_) ++more;
    // The shifts may be added up by themselves.
    if (quantized) more += 6 + sum.terms;
    const Expected e = sum.Divided(*p_, more);
    return t_->Divides() ? Quotient(*p_, e, DivisorOf(bag)) : e;
  }

 public:
  // number * clip * w, of a row that is not padded.
  void AddTerm(const Element& e, int64_t row, Real w, Sum* sum) {
    const Precision& p = *p_;
    const bool quantized = IsQuantized(t_->args.dtype);
    if (!quantized && !clips_) {
      const Real product = e.part * w, absolute = std::fabs(product);
      return sum->Add(product, product, absolute, absolute,
                      (1 + std::fabs(e.part)) * (1 + std::fabs(w)));
    }
    Clip clip;
    if (clips_) clip = ClipOf(row);
    const Real x = e.value();
    const Real size = std::fabs(e.part * w) + std::fabs(e.shift * w);
    // A product that underflows may become 0, and 0 * inf is NaN.
    const Real least = p.eta * 0x1p60L;
    const bool vanishes =
        (std::isinf(w) && (clips_ || quantized) && x != 0 && !(std::fabs(x) * clip.low > least)) ||
        (std::isinf(w) && quantized && !(ErrorOf(e) < std::fabs(x))) ||
        (std::isinf(e.difference) && std::fabs(e.scale * w) < least && e.scale * w != 0);
    if (clip.unknown || MayOverflow(e) || vanishes ||
        (quantized && size >= p.max / 2 && std::isfinite(size))) {
      // NaN stays NaN.
      if (std::isnan(x * w)) {
        sum->nan = true;
      } else {
        sum->anything = true;
      }
      return;
    }
    if (quantized && !std::isfinite(size)) {
      // The parts and the shifts are added apart, and may overflow apart.
      for (const Real part : {std::fabs(e.part * w), std::fabs(e.shift * w)}) {
        if (std::isfinite(part)) sum->largest += part;
      }
    }
    const Real factors = (1 + std::fabs(e.difference)) * (1 + std::fabs(e.scale)) *
                             (1 + std::fabs(w)) * (1 + clip.high) +
                         std::fabs(e.shift);
    sum->Add(x * clip.low * w, x * clip.high * w, size * clip.high, size, factors);
  }

  // A number of a clipped row.
  Expected NumberOf(int64_t row, int64_t column) {
    const Element e = At(row, column);
    Expected x;
    Clip clip;
    if (clips_) clip = ClipOf(row);
    const Real value = e.value();
    const Real a = value * clip.low, b = value * clip.high;
    if (std::isnan(a) || std::isnan(b)) {
      (std::isnan(a) && std::isnan(b) ? x.nan : x.anything) = true;
    } else if (clip.unknown || MayOverflow(e)) {
      x.anything = true;
    } else if (std::isinf(value)) {
      x.low = x.high = a;
      if (a != b) x.anything = true;
    } else {
      // (scale * clip may lose eta, which is multiplied with the quantized value.)
      const Real lost = 2 * p_->eta * (1 + std::fabs(e.difference)) * (1 + std::fabs(e.scale));
      const Real error =
          ErrorOf(e) * clip.high + (clips_ ? 2 * Gamma(*p_, 1) * std::fabs(b) + lost : 0);
      x.low = std::min(a, b) - error;
      x.high = std::max(a, b) + error;
    }
    return x;
  }

 private:
  Expected Maximum(int64_t bag, int64_t column) {
    Expected all;
    bool first = true;
    for (int64_t k = t_->begin[static_cast<size_t>(bag)];
         k < t_->begin[static_cast<size_t>(bag) + 1]; ++k) {
      const int64_t row = t_->index[static_cast<size_t>(k)];
      if (t_->Skips(row)) continue;
      const Expected x = NumberOf(row, column);
      all.nan |= x.nan;
      all.anything |= x.anything;
      all.low = first ? x.low : std::max(all.low, x.low);
      all.high = first ? x.high : std::max(all.high, x.high);
      first = false;
    }
    if (all.nan) all.anything = false;
    return all;
  }

  const Table* t_ = nullptr;
  const Precision* p_ = nullptr;
  bool clips_ = false;
  int64_t call_ = 0;
  std::vector<Clip> clip_;
};

}  // namespace fuzz
