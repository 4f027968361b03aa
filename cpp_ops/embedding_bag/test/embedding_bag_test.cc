// The kernels against the equation: every instruction set, type, mode and awkward width, compared
// with sums in double, and with each other bit for bit; then every invalid argument.
//
// Inputs live in allocations of their exact size, so that the address sanitizer sees a byte too
// far.
#include "embedding_bag/embedding_bag.h"

#include <algorithm>
#include <atomic>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "base/test/testing.h"
#include "base/types.h"
#include "embedding_bag/pool_rows.h"
#include "embedding_bag/test/fill.h"

namespace lucid {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

// ---- A call with tensors of its own.

size_t SizeOf(int32_t dtype) { return dtype == kFloat64 ? 8 : dtype == kFloat32 ? 4 : 2; }

double Get(int32_t dtype, const char* data, int64_t i) {
  switch (dtype) {
    case kFloat32:
      return LoadUnaligned<float>(data, i);
    case kFloat16:
      return ToAccumulator(LoadUnaligned<Float16>(data, i));
    case kBFloat16:
      return ToAccumulator(LoadUnaligned<BFloat16>(data, i));
    default:
      return LoadUnaligned<double>(data, i);
  }
}

template <class T>
void PutAs(double value, char* data, int64_t i) {
  T out;
  FromAccumulator(static_cast<Accumulator<T>>(value), &out);
  std::memcpy(data + static_cast<size_t>(i) * sizeof(T), &out, sizeof(T));
}

void Put(int32_t dtype, double value, char* data, int64_t i) {
  switch (dtype) {
    case kFloat32:
      return PutAs<float>(value, data, i);
    case kFloat16:
      return PutAs<Float16>(value, data, i);
    case kBFloat16:
      return PutAs<BFloat16>(value, data, i);
    default:
      return PutAs<double>(value, data, i);
  }
}

// `size` bytes that start `shift` bytes into a block and end with it.
class Bytes {
 public:
  void Reset(size_t size, size_t shift) {
    block_.reset(new char[size + shift]);
    data_ = block_.get() + shift;
    size_ = size;
  }
  char* data() const { return data_; }
  size_t size() const { return size_; }

 private:
  std::unique_ptr<char[]> block_;
  char* data_ = nullptr;
  size_t size_ = 0;
};

struct Case {
  int32_t dtype = kFloat32, index_type = kInt64, offset_type = kInt64, mode = kSum;
  bool flat = true, include_last_offset = false, weighted = false;
  int64_t rows = 0, columns = 0;
  std::vector<double> weight;    // rows * columns
  std::vector<int64_t> indices;  // [N], or [bags * length]
  std::vector<int64_t> offsets;
  std::vector<double> weights;
  int64_t bags = 0, length = 0;  // of two-dimensional indices
  int64_t padding = kNoPadding;
  double max_norm = kInfinity, norm_type = 2;
  size_t shift = 0;
  // Of a quantised table, whose weight and magnitude are made from the codes by Build.
  enum Second { kNothing, kZeroPoint, kBias } second = kNothing;
  int32_t scale_type = kFloat32, output_type = kFloat32;
  bool pairs = false;  // scale and second beside each other
  // Bytes between one row of the table and the next. Scale and second are there if they fit.
  int64_t gap = 0;
  std::vector<double> magnitude;  // of what was added up to a weight; empty: the weight's own

  Bytes table, spread, index_bytes, offset_bytes, weight_bytes, scale_bytes;
  EmbeddingBagArgs args;

  bool Quantized() const { return dtype >= kInt8; }
  int32_t OutputType() const { return Quantized() ? output_type : dtype; }

  // Codes of every kind, with scales and the rest such that their sums stay small.
  void BuildQuantized() {
    const bool nibbles = dtype == kInt4 || dtype == kUint4;
    const bool is_signed = dtype == kInt8 || dtype == kInt4;
    const int64_t size = nibbles ? 16 : 256;
    const int64_t row_bytes = nibbles ? (columns + 1) / 2 : columns;
    const int64_t number = scale_type == kFloat16 ? 2 : 4;
    const int64_t stride = pairs ? 2 * number : number;
    table.Reset(static_cast<size_t>(rows * row_bytes), shift);
    // What lies behind the last code of an odd row is nobody's.
    for (size_t i = 0; i < table.size(); ++i) table.data()[i] = static_cast<char>(Below(256));
    scale_bytes.Reset(static_cast<size_t>(2 * number * rows), shift);
    char* const scales = scale_bytes.data();
    char* const seconds = scales + (pairs ? number : number * rows);
    magnitude.resize(weight.size());
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t at = r * stride / number;
      Put(scale_type, std::ldexp(Normal(), -6), scales, at);
      Put(scale_type, second == kBias ? Normal() : static_cast<double>(Below(size)), seconds, at);
      const double scale = Get(scale_type, scales, at), other = Get(scale_type, seconds, at);
      for (int64_t c = 0; c < columns; ++c) {
        int64_t code;
        if (nibbles) {
          char* const byte = table.data() + r * row_bytes + c / 2;
          code = static_cast<unsigned char>(*byte) >> (4 * (c % 2)) & 15;
        } else {
          code = static_cast<unsigned char>(table.data()[r * row_bytes + c]);
        }
        if (is_signed && code >= size / 2) code -= size;
        const double value = static_cast<double>(code) - (second == kZeroPoint ? other : 0);
        const size_t i = static_cast<size_t>(r * columns + c);
        weight[i] = value * scale + (second == kBias ? other : 0);
        magnitude[i] = std::abs(value * scale) + (second == kBias ? std::abs(other) : 0);
      }
    }
    args.scale = scales;
    if (second == kZeroPoint) args.zero_point = seconds;
    if (second == kBias) args.bias = seconds;
    args.scale_type = scale_type;
    args.scale_stride = static_cast<int32_t>(stride);
  }

  // Writes the vectors into memory; the doubles become what the type can hold.
  void Build() {
    args = {};
    if (Quantized()) BuildQuantized();
    const size_t size = SizeOf(OutputType());
    if (!Quantized()) table.Reset(weight.size() * size, shift);
    for (size_t i = 0; !Quantized() && i < weight.size(); ++i) {
      Put(dtype, weight[i], table.data(), static_cast<int64_t>(i));
      weight[i] = Get(dtype, table.data(), static_cast<int64_t>(i));
    }
    weight_bytes.Reset(weights.size() * size, shift);
    for (size_t i = 0; i < weights.size(); ++i) {
      Put(OutputType(), weights[i], weight_bytes.data(), static_cast<int64_t>(i));
      weights[i] = Get(OutputType(), weight_bytes.data(), static_cast<int64_t>(i));
    }
    Integers(indices, index_type, &index_bytes);
    Integers(offsets, offset_type, &offset_bytes);
    args.size_bytes = sizeof(args);
    args.weight = table.data();
    args.indices = index_bytes.data();
    args.offsets = flat ? offset_bytes.data() : nullptr;
    args.per_sample_weights = weighted ? weight_bytes.data() : nullptr;
    args.weight_shape[0] = rows;
    args.weight_shape[1] = columns;
    args.indices_shape[0] = flat ? static_cast<int64_t>(indices.size()) : bags;
    args.indices_shape[1] = flat ? 0 : length;
    args.num_offsets = static_cast<int64_t>(offsets.size());
    args.max_norm = max_norm;
    args.norm_type = norm_type;
    args.padding_idx = padding;
    args.dtype = dtype;
    args.output_type = OutputType();
    args.index_type = index_type;
    args.offset_type = offset_type;
    args.mode = mode;
    args.indices_rank = flat ? 1 : 2;
    args.include_last_offset = include_last_offset;
    if (gap > 0) Spread();
  }

  // Moves the rows apart.
  void Spread() {
    const int64_t row_bytes = RowBytes(dtype, columns), stride = row_bytes + gap;
    const int64_t number = scale_type == kFloat16 ? 2 : 4, numbers = second == kNothing ? 1 : 2;
    const bool fused = Quantized() && gap >= numbers * number;
    spread.Reset(static_cast<size_t>(rows * stride), shift);
    for (int64_t r = 0; r < rows; ++r) {
      char* const row = spread.data() + r * stride;
      for (int64_t i = 0; i < stride; ++i) row[i] = static_cast<char>(Below(256));
      std::memcpy(row, table.data() + r * row_bytes, static_cast<size_t>(row_bytes));
      if (!fused) continue;
      const char* const from = scale_bytes.data() + r * args.scale_stride;
      std::memcpy(row + row_bytes, from, static_cast<size_t>(number));
      if (second == kNothing) continue;
      const void* const other = second == kBias ? args.bias : args.zero_point;
      std::memcpy(row + row_bytes + number, static_cast<const char*>(other) + r * args.scale_stride,
                  static_cast<size_t>(number));
    }
    args.weight = spread.data();
    args.row_stride = static_cast<int32_t>(stride);
    if (!fused) return;
    args.scale = spread.data() + row_bytes;
    args.scale_stride = args.row_stride;
    if (args.zero_point) args.zero_point = spread.data() + row_bytes + number;
    if (args.bias) args.bias = spread.data() + row_bytes + number;
  }

  void Integers(const std::vector<int64_t>& from, int32_t type, Bytes* to) {
    to->Reset(from.size() * (type == kInt64 ? 8 : 4), shift);
    for (size_t i = 0; i < from.size(); ++i) {
      const int32_t narrow = static_cast<int32_t>(from[i]);
      if (type == kInt64) std::memcpy(to->data() + 8 * i, &from[i], 8);
      if (type == kInt32) std::memcpy(to->data() + 4 * i, &narrow, 4);
    }
  }

  int64_t NumBags() const {
    return flat ? static_cast<int64_t>(offsets.size()) - include_last_offset : bags;
  }

  int64_t BagBegin(int64_t i) const {
    if (!flat) return i * length;
    return i < static_cast<int64_t>(offsets.size()) ? offsets[static_cast<size_t>(i)]
                                                    : static_cast<int64_t>(indices.size());
  }

  Status Run(Isa isa, const ParallelFor& host, Bytes* out) {
    const int64_t n = std::max<int64_t>(NumBags(), 0) * columns;
    out->Reset(static_cast<size_t>(n) * SizeOf(OutputType()), shift);
    if (out->size()) std::memset(out->data(), 0xcd, out->size());
    args.output = out->data();
    return RunEmbeddingBag(args, isa, host);
  }

  Status Run(Isa isa, int num_threads, Bytes* out) {
    return Run(isa, {RunThreads, &num_threads}, out);
  }

  double Norm(const double* row) const {
    double sum = 0;
    for (int64_t c = 0; c < columns; ++c) {
      const double x = std::abs(row[c]);
      sum = norm_type == kInfinity ? std::max(sum, x)
            : norm_type == 2       ? sum + x * x
                                   : sum + std::pow(x, norm_type);
    }
    return norm_type == kInfinity ? sum : std::pow(sum, 1 / norm_type);
  }

  // The equation, in double. `slack` is the sum of the magnitudes that were added.
  void Expect(std::vector<double>* result, std::vector<double>* slack) const {
    const size_t total = static_cast<size_t>(NumBags() * columns);
    result->assign(total, 0);
    slack->assign(total, 0);
    const int64_t skipped = padding == kNoPadding ? -1 : padding < 0 ? padding + rows : padding;
    std::vector<double> norms(max_norm < kInfinity ? static_cast<size_t>(rows) : 0, -1);
    for (int64_t i = 0; i < NumBags(); ++i) {
      double* out = result->data() + i * columns;
      double* sizes = slack->data() + i * columns;
      int64_t count = 0;
      for (int64_t k = BagBegin(i); k < BagBegin(i + 1); ++k) {
        const int64_t index = indices[static_cast<size_t>(k)];
        if (index == skipped) continue;
        const double* row = weight.data() + index * columns;
        const double* size = magnitude.empty() ? row : magnitude.data() + index * columns;
        double scale = weighted ? weights[static_cast<size_t>(k)] : 1;
        if (max_norm < kInfinity) {
          double& norm = norms[static_cast<size_t>(index)];
          if (norm < 0) norm = Norm(row);
          if (norm > max_norm) scale *= max_norm / (norm + 1e-7);
        }
        for (int64_t c = 0; c < columns; ++c) {
          const double x = scale * row[c];
          out[c] = mode != kMax ? out[c] + x : count == 0 ? x : std::max(out[c], x);
          sizes[c] += std::abs(scale * size[c]);
        }
        ++count;
      }
      for (int64_t c = 0; mode == kMean && count && c < columns; ++c) {
        out[c] /= static_cast<double>(count);
        sizes[c] /= static_cast<double>(count);
      }
    }
  }

  std::string Describe() const {
    char text[200];
    std::snprintf(
        text, sizeof(text),
        "dtype %d index %d offset %d mode %d flat %d last %d weighted %d D %lld bags %lld "
        "padding %lld max_norm %g p %g shift %zu",
        dtype, index_type, offset_type, mode, flat, include_last_offset, weighted,
        static_cast<long long>(columns), static_cast<long long>(NumBags()),
        static_cast<long long>(padding), max_norm, norm_type, shift);
    return text;
  }
};

std::vector<Isa> Isas() {
  std::vector<Isa> isas;
  for (int i = 0; i < kIsaCount; ++i) {
    if (IsaSupported(static_cast<Isa>(i))) isas.push_back(static_cast<Isa>(i));
  }
  return isas;
}

// Right on one instruction set, and the same bits on all, on 1, 2 and 8 threads and backwards.
void CheckCase(Case* c, bool threads) {
  c->Build();
  if (IsLeftOut()) return;
  std::vector<double> expected, slack;
  c->Expect(&expected, &slack);
  Bytes first, other;
  const Status status = c->Run(Isa::baseline, 1, &first);
  CHECK(status.ok(), "%s: %s", c->Describe().c_str(), status.message);
  if (!status.ok()) return;
  // One rounding to T, and what a few dozen additions in float may lose.
  const int32_t type = c->OutputType();
  const double epsilon = type == kFloat16 ? 0x1p-11 : type == kBFloat16 ? 0x1p-8 : 0;
  const double lost = c->dtype == kFloat64 ? 1e-13 : 1e-6;  // the oracle is double too
  for (size_t i = 0; i < expected.size(); ++i) {
    const double got = Get(type, first.data(), static_cast<int64_t>(i));
    const double tolerance = epsilon * (std::abs(expected[i]) + lost) + lost * slack[i] +
                             (type == kFloat16 ? 0x1p-25 : 0);
    CHECK(std::abs(got - expected[i]) <= tolerance, "%s: [%zu] %.9g, expected %.9g",
          c->Describe().c_str(), i, got, expected[i]);
  }
  for (const Isa isa : Isas()) {
    for (const int num_threads : {1, 2, 8, 0}) {
      if (num_threads != 1 && !threads) continue;
      const Status again = num_threads ? c->Run(isa, num_threads, &other)
                                       : c->Run(isa, {RunBackwards, nullptr}, &other);
      CHECK(again.ok(), "%s", again.message);
      CHECK(first.size() == 0 || std::memcmp(first.data(), other.data(), first.size()) == 0,
            "%s: %s with %d threads has other bits", c->Describe().c_str(), IsaName(isa),
            num_threads);
    }
  }
}

// ---- The tests.

// Lengths around the kernel's steps. Bags of a few rows have a loop of their own.
const std::vector<int64_t> kBags = {0, 1, 2, 0, 20, 3, 64, 65, 5, 1, 0};
const std::vector<int64_t> kShortBags = {1, 0, 1, 8, 9, 1, 0, 0, 2, 66, 1, 1, 7, 3, 1, 1};

void TestEverything() {
  const int64_t widths[] = {0,  1,  3,  4,   5,   7,   8,   15,  16,  17,  31,  32,  33,
                            63, 64, 65, 100, 128, 129, 177, 223, 256, 300, 768, 1000};
  const double norms[][2] = {{kInfinity, 2}, {1, 2}, {2.5, 1}, {0.5, kInfinity}, {1, 3}, {0, 2}};
  int turn = 0;
  for (const int64_t columns : widths) {
    for (const int32_t dtype : {kFloat32, kFloat16, kBFloat16, kFloat64}) {
      for (const int mode : {0, 1, 2, 3}) {
        for (const auto& norm : norms) {
          for (const bool padded : {false, true}) {
            // What is orthogonal to the loops takes turns, with periods that share no factor.
            Case c;
            ++turn;
            c.dtype = dtype;
            c.mode = mode == 3 ? static_cast<int32_t>(kSum) : mode;
            c.weighted = mode == 3;
            c.index_type = turn % 3 == 0 ? kInt32 : kInt64;
            c.offset_type = turn % 5 < 2 ? kInt32 : kInt64;
            c.shift = static_cast<size_t>(turn % 7);
            c.gap = turn % 17 < 3 ? turn % 17 : 0;
            FillTable(&c, 37, columns);
            c.max_norm = norm[0];
            c.norm_type = norm[1];
            if (padded) c.padding = turn % 2 ? Below(c.rows) : -1 - Below(c.rows);
            if (turn % 11 == 0) {
              FillGrid(&c, 5, turn % 13);
            } else {
              FillBags(&c, turn % 13 < 7 ? kBags : kShortBags, turn % 11 < 4);
            }
            CheckCase(&c, false);
          }
        }
      }
    }
  }
}

void TestQuantized() {
  const int64_t widths[] = {0,  1,  3,  4,  5,   7,   8,   15,  16,  17,  31,  32,
                            33, 63, 64, 65, 100, 128, 129, 255, 300, 767, 1001};
  const double norms[][2] = {{kInfinity, 2}, {1, 2}, {2.5, 1}, {0.5, kInfinity}, {1, 3}, {0, 2}};
  int turn = 0;
  for (const int64_t columns : widths) {
    for (const int32_t dtype : {kInt8, kUint8, kInt4, kUint4}) {
      for (const int mode : {0, 1, 2, 3}) {
        for (const auto second : {Case::kNothing, Case::kZeroPoint, Case::kBias}) {
          Case c;
          ++turn;
          c.dtype = dtype;
          c.mode = mode == 3 ? static_cast<int32_t>(kSum) : mode;
          c.weighted = mode == 3;
          c.second = second;
          c.pairs = turn % 2;
          c.scale_type = turn % 5 < 2 ? kFloat16 : kFloat32;
          c.output_type = turn % 7 < 3 ? kFloat16 : kFloat32;
          c.index_type = turn % 3 == 0 ? kInt32 : kInt64;
          c.shift = static_cast<size_t>(turn % 11);
          c.gap = turn % 8 < 4 ? 2 * (turn % 8) + 3 : 0;
          FillTable(&c, 37, columns);
          c.max_norm = norms[turn % 13 % 6][0];
          c.norm_type = norms[turn % 13 % 6][1];
          if (turn % 5 == 0) c.padding = -1 - Below(c.rows);
          FillBags(&c, turn % 13 < 7 ? kBags : kShortBags, turn % 17 < 4);
          CheckCase(&c, false);
        }
      }
    }
  }
  // Long bags, in pieces, from a table larger than what is fetched from near.
  for (const int32_t dtype : {kInt8, kUint4}) {
    for (const int mode : {0, 1, 2}) {
      Case c;
      c.dtype = dtype;
      c.mode = mode;
      c.second = Case::kBias;
      c.output_type = mode == 1 ? kFloat16 : kFloat32;
      c.gap = mode == 2 ? 8 : 0;
      FillTable(&c, 20000, 131);
      FillBags(&c, {3, 5000, 0, kPiece, kPiece + 1}, false);
      CheckCase(&c, true);
    }
  }
}

// Scales of every magnitude, which loops that compute with a multiple of them must not show: one
// row is rounded once, and all sums have the same bits everywhere.
void TestScales() {
  const float wild[] = {0.f,      -0.f,     0x1p-149f, -3e-39f,  0x1p-126f,         -1.5f,
                        1e-3f,    0x1p104f, -0x1p112f, 0x1p113f, -1.75f * 0x1p119f, FLT_MAX,
                        -FLT_MAX, INFINITY, -INFINITY, NAN};
  const int64_t kWild = static_cast<int64_t>(sizeof(wild) / sizeof(wild[0]));
  for (const int32_t dtype : {kInt8, kUint8, kInt4, kUint4}) {
    for (const int64_t columns : {1, 7, 16, 40, 64, 129, 200}) {
      for (const auto second : {Case::kNothing, Case::kBias}) {
        for (const int mode : {kSum, kMean}) {
          Case c;
          c.dtype = dtype;
          c.mode = mode;
          c.second = second;
          FillTable(&c, 2 * kWild, columns);
          // Each row alone; tame rows, with a wild one here and there; and a bag of pieces.
          const auto tame = [&] { return kWild + Below(kWild); };
          const auto bag = [&](int64_t rows, int64_t others) {
            c.offsets.push_back(static_cast<int64_t>(c.indices.size()));
            for (int64_t k = 0; k < rows; ++k) c.indices.push_back(tame());
            for (int64_t k = 0; k < others; ++k) {
              c.indices[c.indices.size() - 1 - static_cast<size_t>(Below(rows))] = Below(kWild);
            }
          };
          c.flat = true;
          for (int64_t r = 0; r < kWild; ++r) {
            bag(1, 0);
            c.indices.back() = r;
          }
          for (const bool longer : {false, true}) {
            for (int i = 0; i < 40; ++i) bag(longer ? 1 + Below(150) : 1 + Below(5), i % 3);
            if (longer) bag(2 * kPiece + 3, 1);
            c.Build();
            std::memcpy(c.scale_bytes.data(), wild, sizeof(wild));
            Bytes first, other;
            CHECK(c.Run(Isa::baseline, 1, &first).ok(), "a plain call");
            for (const Isa isa : Isas()) {
              for (const int num_threads : {1, 2}) {
                CHECK(c.Run(isa, num_threads, &other).ok(), "a plain call");
                CHECK(std::memcmp(first.data(), other.data(), first.size()) == 0,
                      "%s: %s with %d threads has other bits", c.Describe().c_str(), IsaName(isa),
                      num_threads);
              }
            }
            for (int64_t r = 0; r < kWild; ++r) {
              const float scale = wild[r];
              float bias = 0;
              if (c.args.bias) bias = LoadUnaligned<float>(c.args.bias, r);
              for (int64_t i = 0; i < columns; ++i) {
                const char* const row = c.table.data() + r * RowBytes(dtype, columns);
                float code = 0;
                LUCID_FOR_DTYPE(dtype, code = static_cast<float>(ElementAt<T>(row, i)));
                const float expected = 0.f + code * scale + bias;
                const double got = Get(kFloat32, first.data(), r * columns + i);
                CHECK(got == expected || (got != got && expected != expected),
                      "%s: code %g, scale %g, bias %g: %g, expected %g", c.Describe().c_str(), code,
                      scale, bias, got, expected);
              }
            }
          }
        }
      }
    }
  }
}

void TestEmpty() {
  for (const bool flat : {true, false}) {
    for (const int64_t columns : {0, 5}) {
      for (const int64_t rows : {0, 3}) {
        for (const int mode : {0, 1, 2}) {
          Case c;
          c.mode = mode;
          c.rows = rows;
          c.columns = columns;
          c.weight.resize(static_cast<size_t>(rows * columns), 1.0);
          if (flat) {
            CheckCase(&c, false);  // no bags
            FillBags(&c, {0, 0, 0}, false);
          } else {
            FillGrid(&c, 0, 3);
            CheckCase(&c, false);
            FillGrid(&c, 3, 0);
          }
          CheckCase(&c, false);
        }
      }
    }
  }
  // Sizes that only tensors without elements can have.
  Case c;
  FillGrid(&c, 0, 0);
  c.Build();
  Bytes none;
  c.args.indices_shape[0] = int64_t{1} << 61;
  CHECK(RunEmbeddingBag(c.args, Isa::baseline, {RunNothing, nullptr}).ok(), "B = 2^61, L = D = 0");
  c.args.indices_shape[0] = 0;
  c.args.weight_shape[1] = int64_t{1} << 62;
  CHECK(RunEmbeddingBag(c.args, Isa::baseline, {RunNothing, nullptr}).ok(), "D = 2^62, B = V = 0");
}

// ThreadSanitizer makes them fifty times as slow, and wide rows have no other threads.
#if defined(__SANITIZE_THREAD__)
constexpr int64_t kMostLongColumns = 7;
#else
constexpr int64_t kMostLongColumns = INT64_MAX;
#endif

void TestLongBags() {
  const std::vector<std::vector<int64_t>> lengths = {
      {kPiece, 3, kPiece + 1, 0, 3 * kPiece, 2 * kPiece - 1, 7},
      {100000},
      {0, 0, 50000, 0, 1, 0},
      {1, 2, 3, 20000, 4, 5, 6, 30000},
  };
  for (const auto& bags : lengths) {
    for (const int32_t dtype : {kFloat32, kFloat16, kBFloat16, kFloat64}) {
      for (const int mode : {0, 1, 2, 3}) {
        for (const int64_t columns : {1, 7, 64, 223}) {
          if (columns > kMostLongColumns) continue;
          Case c;
          c.dtype = dtype;
          c.mode = mode == 3 ? static_cast<int32_t>(kSum) : mode;
          c.weighted = mode == 3;
          FillTable(&c, 1000, columns);
          FillBags(&c, bags, mode == 1);
          if (mode == 2) c.max_norm = 3;
          c.padding = mode == 0 ? kNoPadding : 5;
          // A whole piece of padding, and a whole bag.
          if (mode == 1)
            std::fill_n(c.indices.begin(), std::min<size_t>(c.indices.size(), 2500), 5);
          if (mode == 2 && columns == 7) std::fill(c.indices.begin(), c.indices.end(), 5);
          CheckCase(&c, columns != 1);
        }
      }
    }
  }
}

// Tables that are fetched from as what the second cache holds, as what the third one holds, and as
// larger ones are; those to the right have their rows apart.
void TestManyBags() {
  const struct {
    int64_t rows, columns, gap;
  } tables[] = {{3000, 64, 0}, {12000, 64, 0}, {40000, 8, 1000}};
  for (const auto& table : tables) {
    for (const bool flat : {true, false}) {
      for (const int32_t dtype : {kFloat32, kBFloat16, kInt8}) {
        Case c;
        c.dtype = dtype;
        c.gap = table.gap;
        FillTable(&c, table.rows, table.columns);
        if (flat) {
          std::vector<int64_t> lengths;
          for (int i = 0; i < 2000; ++i) lengths.push_back(Below(4) ? Below(12) : 0);
          lengths.push_back(900);
          lengths.push_back(3 * kPiece);
          for (int i = 0; i < 2000; ++i) lengths.push_back(i % 2);
          FillBags(&c, lengths, false);
        } else {
          FillGrid(&c, 700, 11);
        }
        c.mode = dtype == kInt8 ? kSum : kMean;
        CheckCase(&c, true);
      }
    }
  }
}

// The sum of many equal rows shows an accumulator that is too small.
void TestAccuracy() {
  for (const int64_t n : {1000, 100000}) {
    Case c;
    c.rows = 1;
    c.columns = 16;
    c.weight.assign(16, 0.1);
    c.flat = true;
    c.offsets = {0};
    c.indices.assign(static_cast<size_t>(n), 0);
    c.Build();
    Bytes out;
    CHECK(c.Run(Isa::baseline, 1, &out).ok(), "a plain call");
    const double exact = static_cast<double>(n) * c.weight[0];
    CHECK(std::abs(Get(kFloat32, out.data(), 0) / exact - 1) < 1e-6, "%.9g, expected %.9g",
          Get(kFloat32, out.data(), 0), exact);
  }
}

// Every 16-bit value through a load and a store, and every rounding that is a tie.
void TestConversions() {
  for (const int32_t dtype : {kFloat16, kBFloat16}) {
    const uint32_t top = dtype == kFloat16 ? 0x7c00 : 0x7f80;
    const auto value = [dtype](uint32_t bits) {
      char word[8];
      std::memcpy(word, &bits, 2);  // little-endian, as all of the targets are
      return Get(dtype, word, 0);
    };
    // The definition: sign, exponent and significand, scaled by powers of two.
    const int digits = dtype == kFloat16 ? 10 : 7;
    const int bias = dtype == kFloat16 ? 15 : 127;
    for (uint32_t bits = 0; bits < top; ++bits) {
      const uint32_t exponent = bits >> digits, low = bits & ((1u << digits) - 1);
      const double exact = exponent ? std::ldexp(static_cast<double>(low | 1u << digits),
                                                 static_cast<int>(exponent) - bias - digits)
                                    : std::ldexp(static_cast<double>(low), 1 - bias - digits);
      CHECK(value(bits) == exact && value(bits | 0x8000) == -exact, "%d: %04x", dtype, bits);
    }
    CHECK(value(top) == kInfinity && value(top | 0x8000) == -kInfinity, "infinities");

    // Rows 0 and 1: all bit patterns, and the one after each. Mean of both is the tie between them.
    Case c;
    c.dtype = dtype;
    c.rows = 2;
    c.columns = 65536;
    c.weight.resize(2 * 65536);
    c.indices = {0, 0, 1};
    c.offsets = {0, 1};
    c.Build();
    for (uint32_t i = 0; i < 65536; ++i) {
      const uint16_t words[2] = {static_cast<uint16_t>(i), static_cast<uint16_t>(i + 1)};
      std::memcpy(c.table.data() + 2 * i, &words[0], 2);
      std::memcpy(c.table.data() + 2 * (65536 + i), &words[1], 2);
    }
    for (const Isa isa : Isas()) {
      Bytes out;
      c.args.mode = kMax;
      CHECK(c.Run(isa, 1, &out).ok(), "a plain call");
      for (uint32_t i = 0; i < 65536; ++i) {
        const uint32_t got = LoadUnaligned<uint16_t>(out.data(), i);
        const bool nan = (i & 0x7fff) > top;
        CHECK(got == (nan ? (dtype == kFloat16 ? 0x7e00u : 0x7fc0u) : i), "%s %d: %04x -> %04x",
              IsaName(isa), dtype, i, got);
      }
      c.args.mode = kMean;
      CHECK(c.Run(isa, 1, &out).ok(), "a plain call");
      for (uint32_t i = 0; i + 1 < top; ++i) {
        for (const uint32_t sign : {0u, 0x8000u}) {
          // bfloat16 sums may overflow to infinity where the mean would fit.
          if (dtype == kBFloat16 && i >= 0x7f00) continue;
          const uint32_t got = LoadUnaligned<uint16_t>(out.data(), 65536 + (i | sign));
          const uint32_t even = ((i & 1) ? i + 1 : i) | sign;
          // The tie below the smallest bfloat16 subnormals is a float subnormal all the same.
          CHECK(got == even || (i == 0 && (got & 0x7fff) == 0), "%s %d: tie above %04x -> %04x",
                IsaName(isa), dtype, i | sign, got);
        }
      }
    }
  }
}

// NaN and infinity spread within their bag and column, and a padded one does not.
void TestNotFinite() {
  for (const int32_t dtype : {kFloat32, kFloat16, kBFloat16, kFloat64}) {
    for (const int64_t columns : {1, 6, 33}) {
      for (const int32_t mode : {kSum, kMean, kMax}) {
        Case c;
        c.dtype = dtype;
        c.mode = mode;
        FillTable(&c, 4, columns);
        const auto row = [&](int64_t i) { return c.weight.begin() + i * columns; };
        std::fill_n(row(1), columns, kInfinity);
        std::fill_n(row(2), columns, -kInfinity);
        std::fill_n(row(3), columns, kNan);
        c.flat = true;
        c.indices = {0, 0, 1, 1, 2, 0, 2, 3, 0, 0, 3, 2, 2};
        c.offsets = {0, 1, 3, 5, 7, 9, 11, 13, 13};
        c.Build();
        const double sums[] = {c.weight[0], kInfinity, kNan, -kInfinity, kNan, kNan, -kInfinity, 0};
        const double maxima[] = {c.weight[0], kInfinity, kInfinity,  c.weight[0],
                                 kNan,        kNan,      -kInfinity, 0};
        for (const Isa isa : Isas()) {
          Bytes out;
          CHECK(c.Run(isa, 1, &out).ok(), "a plain call");
          for (int64_t i = 0; i < 8; ++i) {
            const double expected = mode == kMax ? maxima[i] : sums[i];
            const double got = Get(dtype, out.data(), i * columns);
            CHECK(got == expected || (got != got && expected != expected),
                  "%s dtype %d mode %d bag %lld: %g, expected %g", IsaName(isa), dtype, mode,
                  static_cast<long long>(i), got, expected);
          }
          // The NaN row as padding, with a NaN weight on it.
          c.args.padding_idx = -1;
          if (mode == kSum) {
            std::vector<char> ones(c.indices.size() * SizeOf(dtype));
            for (size_t k = 0; k < c.indices.size(); ++k) {
              Put(dtype, c.indices[k] == 3 ? kNan : 1, ones.data(), static_cast<int64_t>(k));
            }
            c.args.per_sample_weights = ones.data();
            CHECK(c.Run(isa, 1, &out).ok(), "a plain call");
            c.args.per_sample_weights = nullptr;
          } else {
            CHECK(c.Run(isa, 1, &out).ok(), "a plain call");
          }
          c.args.padding_idx = kNoPadding;
          CHECK(Get(dtype, out.data(), 4 * columns) == c.weight[0], "padding must not be used");
          CHECK(Get(dtype, out.data(), 5 * columns) == c.weight[0], "padding must not be used");
        }
      }
    }
  }
}

// A quantized row is dequantized before it is multiplied: what is infinite stays infinite where the
// loops, which multiply the scale and the shift, would have 0 * inf and inf - inf.
void TestInfiniteWeights() {
  const double wild[] = {kInfinity, -kInfinity, kNan, -0.0, 0, 1, -2, 0.5};
  const double usual[] = {kInfinity, -kInfinity, 1, -2, 0.5, 0, kNan, 1};
  constexpr int64_t kWild = 8, kRows = 64;
  int turn = 0;
  for (const int32_t dtype : {kInt8, kUint8, kInt4, kUint4}) {
    for (const int64_t columns : {1, 7, 16, 33, 129, 300, 600}) {
      for (const auto second : {Case::kNothing, Case::kZeroPoint, Case::kBias}) {
        for (const bool finite : {true, false}) {
          Case c;
          ++turn;
          c.dtype = dtype;
          c.mode = kSum;
          c.weighted = true;
          c.second = second;
          c.scale_type = turn % 3 ? kFloat32 : kFloat16;
          c.output_type = turn % 5 < 3 ? kFloat32 : kFloat16;
          if (turn % 7 == 0) c.max_norm = 4;
          FillTable(&c, kRows, columns);
          FillBags(&c, std::vector<int64_t>(kRows, 1), false);
          for (int64_t r = 0; r < kRows; ++r) c.indices[static_cast<size_t>(r)] = r;
          for (const int64_t length : {2, 3, 70, 9, 2 * static_cast<int>(kPiece) + 3}) {
            c.offsets.push_back(static_cast<int64_t>(c.indices.size()));
            for (int64_t k = 0; k < length; ++k) c.indices.push_back(Below(kRows));
          }
          // Every weight with every scale, alone; in longer bags few that are not finite.
          c.weights.assign(c.indices.size(), 1);
          for (int64_t r = 0; r < kRows; ++r) c.weights[static_cast<size_t>(r)] = usual[r % kWild];
          for (const int64_t k : {0, 2, 30, 75, 79, 400}) {
            c.weights[static_cast<size_t>(kRows + k)] = usual[Below(2)];
          }
          c.Build();
          const int64_t number = c.scale_type == kFloat16 ? 2 : 4;
          char* const scales = c.scale_bytes.data();
          char* const seconds = scales + number * kRows;
          for (int64_t r = 0; r < kRows && !finite; ++r) {
            Put(c.scale_type, wild[r / kWild], scales, r);
            if (second == Case::kBias) Put(c.scale_type, wild[(r + r / kWild) % kWild], seconds, r);
          }
          c.magnitude.clear();
          for (int64_t r = 0; r < kRows; ++r) {
            const double scale = Get(c.scale_type, scales, r);
            const double other = Get(c.scale_type, seconds, r);
            for (int64_t i = 0; i < columns; ++i) {
              const char* const row = c.table.data() + r * RowBytes(dtype, columns);
              double code = 0;
              LUCID_FOR_DTYPE(dtype, code = static_cast<double>(ElementAt<T>(row, i)));
              c.weight[static_cast<size_t>(r * columns + i)] =
                  (code - (second == Case::kZeroPoint ? other : 0)) * scale +
                  (second == Case::kBias ? other : 0);
            }
          }
          std::vector<double> expected, slack;
          c.Expect(&expected, &slack);
          Bytes first, other;
          CHECK(c.Run(Isa::baseline, 1, &first).ok(), "a plain call");
          for (size_t i = 0; i < expected.size(); ++i) {
            const double got = Get(c.OutputType(), first.data(), static_cast<int64_t>(i));
            const double x = expected[i];
            const bool right = x != x              ? got != got
                               : std::abs(x) > 6e4 ? got == x || c.OutputType() == kFloat16
                                                   : std::abs(got - x) <= 2e-3 * slack[i] + 1e-3;
            CHECK(right, "%s second %d: [%zu] %g, expected %g", c.Describe().c_str(), second, i,
                  got, x);
          }
          for (const Isa isa : Isas()) {
            for (const int num_threads : {1, 2}) {
              CHECK(c.Run(isa, num_threads, &other).ok(), "a plain call");
              CHECK(std::memcmp(first.data(), other.data(), first.size()) == 0,
                    "%s: %s with %d threads has other bits", c.Describe().c_str(), IsaName(isa),
                    num_threads);
            }
          }
        }
      }
    }
  }
}

void ExpectInvalid(const Status& status, const char* message) {
  CHECK(status.code == Code::kInvalidArgument && std::strcmp(status.message, message) == 0,
        "got \"%s\", expected \"%s\"", status.message, message);
}

Case SmallCase() {
  Case c;
  FillTable(&c, 10, 4);
  FillBags(&c, {2, 3, 1}, false);
  c.Build();
  return c;
}

void TestInvalidArguments() {
  Bytes out;
  const auto rejects = [&](Case* c, const char* message) {
    for (const Isa isa : Isas()) ExpectInvalid(c->Run(isa, 1, &out), message);
  };
  const auto with = [&](const char* message, void (*change)(Case*)) {
    Case c = SmallCase();
    change(&c);
    c.Build();
    rejects(&c, message);
  };
  with("indices[5] = 17 is outside [0, 10)", [](Case* c) { c->indices[5] = 17; });
  with("indices[1] = -1 is outside [0, 10)", [](Case* c) { c->indices[1] = c->indices[4] = -1; });
  with("indices[0] = 10 is outside [0, 10)", [](Case* c) {
    c->indices[0] = 10;
    c->columns = 0;
    c->weight.clear();
  });
  with("indices[3] = -9223372036854775808 is outside [0, 10)",
       [](Case* c) { c->indices[3] = INT64_MIN; });
  with("indices[0] = 0 is outside [0, 0)", [](Case* c) {
    c->rows = 0;
    c->weight.clear();
    c->indices[0] = 0;
  });
  with("indices[1, 2] = 12 is outside [0, 10)", [](Case* c) {
    c->flat = false;
    c->bags = 2;
    c->length = 3;
    c->offsets.clear();
    c->indices[5] = 12;
  });
  with("offsets[0] = 1 must be 0", [](Case* c) { c->offsets[0] = 1; });
  with("offsets[0] = -9223372036854775808 must be 0", [](Case* c) { c->offsets[0] = INT64_MIN; });
  with("offsets[2] = 1 is below offsets[1] = 2: offsets must not decrease",
       [](Case* c) { c->offsets[2] = 1; });
  with("offsets[1] = -3 is below offsets[0] = 0: offsets must not decrease",
       [](Case* c) { c->offsets[1] = -3; });
  with("offsets[1] = 9223372036854775807 is past the number of indices, 6",
       [](Case* c) { c->offsets[1] = INT64_MAX; });
  with("offsets[2] = 7 is past the number of indices, 6", [](Case* c) { c->offsets[2] = 7; });
  with("offsets is empty, shape [0]: include_last_offset needs at least one entry", [](Case* c) {
    c->include_last_offset = true;
    c->offsets.clear();
  });
  with("offsets is empty, shape [0], but indices has 6 entries",
       [](Case* c) { c->offsets.clear(); });
  with("padding_idx = 10 is outside [-10, 10), the rows of weight",
       [](Case* c) { c->padding = 10; });
  with("padding_idx = -11 is outside [-10, 10), the rows of weight",
       [](Case* c) { c->padding = -11; });
  with("padding_idx = 0 is outside [-0, 0), the rows of weight", [](Case* c) {
    c->padding = 0;
    c->rows = 0;
    c->weight.clear();
  });
  with("max_norm = -1 must be >= 0", [](Case* c) { c->max_norm = -1; });
  with("max_norm = nan must be >= 0", [](Case* c) { c->max_norm = std::abs(kNan); });
  with("norm_type = 0 must be > 0", [](Case* c) { c->norm_type = 0; });
  with("mode = 4 is not 0 (sum), 1 (mean), 2 (max) or 3 (sqrtn)", [](Case* c) { c->mode = 4; });
  with("mode = -1 is not 0 (sum), 1 (mean), 2 (max) or 3 (sqrtn)", [](Case* c) { c->mode = -1; });
  with("per_sample_weights needs mode 'sum', got mode = 'mean'", [](Case* c) {
    c->mode = kMean;
    c->weighted = true;
  });
  with("per_sample_weights needs mode 'sum', got mode = 'max'", [](Case* c) {
    c->mode = kMax;
    c->weighted = true;
  });

  Case c = SmallCase();
  c.args.size_bytes = 8;
  rejects(&c, "size_bytes = 8 is not 184");
  c = SmallCase();
  c.args.dtype = 8;
  rejects(&c, "dtype = 8 is unknown");
  c = SmallCase();
  c.args.output_type = kFloat16;
  rejects(&c, "output_type = 1 must be the dtype, 0");
  c = SmallCase();
  c.args.row_stride = 1;
  rejects(&c, "row_stride = 1 is less than the size of a row");
  const auto codes = [&](const char* refusal, void (*change)(EmbeddingBagArgs*)) {
    c = SmallCase();
    c.dtype = kInt4;
    c.second = Case::kBias;
    c.Build();
    change(&c.args);
    rejects(&c, refusal);
  };
  codes("output_type = 2 is not 0 or 1", [](EmbeddingBagArgs* a) { a->output_type = kBFloat16; });
  codes("scale_type = 3 is not 0 or 1", [](EmbeddingBagArgs* a) { a->scale_type = kFloat64; });
  codes("scale_stride = 3 is less than the size of a scale",
        [](EmbeddingBagArgs* a) { a->scale_stride = 3; });
  codes("scale is missing", [](EmbeddingBagArgs* a) { a->scale = nullptr; });
  codes("zero_point and bias are mutually exclusive",
        [](EmbeddingBagArgs* a) { a->zero_point = a->bias; });
  c = SmallCase();
  c.args.indices_rank = 3;
  rejects(&c, "indices_rank = 3 is not 1 or 2");

  const int64_t dims[] = {10, 4, 3, 2, 1};
  const auto shapes = [&](int rank, size_t weight, size_t indices, const TensorShape* offsets,
                          const TensorShape* weights, const char* message) {
    EmbeddingBagArgs args = {};
    args.indices_rank = rank;
    ExpectInvalid(SetEmbeddingBagShapes({dims, weight}, {dims, indices}, offsets, weights, &args),
                  message);
  };
  const TensorShape one = {dims, 1}, two = {dims, 2}, other = {dims + 1, 2}, scalar = {dims, 0};
  shapes(1, 1, 1, &one, nullptr, "weight has shape [10], expected [V, D]");
  shapes(1, 3, 1, &one, nullptr, "weight has shape [10, 4, 3], expected [V, D]");
  shapes(1, 2, 2, &one, nullptr, "indices has shape [10, 4], expected [N]");
  shapes(2, 2, 0, nullptr, nullptr, "indices has shape [], expected [B, L]");
  shapes(1, 2, 1, &scalar, nullptr, "offsets has shape [], expected one dimension");
  shapes(1, 2, 1, &two, nullptr, "offsets has shape [10, 4], expected one dimension");
  shapes(1, 2, 1, &one, &two,
         "per_sample_weights has shape [10, 4], indices has shape [10]: they must be equal");
  shapes(2, 2, 2, nullptr, &other,
         "per_sample_weights has shape [4, 3], indices has shape [10, 4]: they must be equal");
}

void TestLowestInvalidPosition() {
  for (const bool long_bag : {false, true}) {
    Case c;
    FillTable(&c, 100, 64);
    FillBags(&c, long_bag ? std::vector<int64_t>{3, 40000, 9} : std::vector<int64_t>(2000, 20),
             false);
    for (const int64_t k : {39000, 1717, 20000, 33333, 1718}) c.indices[static_cast<size_t>(k)] = k;
    c.Build();
    Bytes out;
    for (const Isa isa : Isas()) {
      for (const int num_threads : {1, 2, 8}) {
        ExpectInvalid(c.Run(isa, num_threads, &out), "indices[1717] = 1717 is outside [0, 100)");
      }
      ExpectInvalid(c.Run(isa, {RunBackwards, nullptr}, &out),
                    "indices[1717] = 1717 is outside [0, 100)");
    }
    const Status status = c.Run(Isa::baseline, {RunNothing, nullptr}, &out);
    CHECK(status.code == Code::kInternal, "a host that cannot run: \"%s\"", status.message);
  }
}

// Garbage for indices and offsets: an error with the right position, or the right result.
void TestHostile() {
  const auto garbage = [](int64_t limit) -> int64_t {
    switch (Below(8)) {
      case 0:
        return static_cast<int64_t>(g_random());
      case 1:
        return Below(2) ? INT64_MIN + Below(3) : INT64_MAX - Below(3);
      case 2:
        return Below(2) ? INT32_MIN + Below(3) : INT32_MAX - Below(3);
      case 3:
        return -1 - Below(3);
      default:
        return limit + Below(3);
    }
  };
  for (int round = 0; round < 6000; ++round) {
    Case c;
    c.dtype = static_cast<int32_t>(Below(4));
    c.mode = static_cast<int32_t>(Below(3));
    c.index_type = Below(2) ? kInt32 : kInt64;
    c.offset_type = Below(2) ? kInt32 : kInt64;
    c.weighted = c.mode == kSum && Below(2);
    c.shift = static_cast<size_t>(Below(3));
    FillTable(&c, 1 + Below(20), Below(70));
    std::vector<int64_t> lengths;
    for (int64_t bags = 1 + Below(20); bags > 0; --bags) lengths.push_back(Below(6));
    if (Below(10) == 0) lengths.push_back(kPiece + Below(kPiece));
    FillBags(&c, lengths, Below(2));
    if (Below(4) == 0) c.padding = Below(c.rows);
    const auto n = static_cast<int64_t>(c.indices.size());
    for (int64_t i = Below(4); i > 0 && n > 0; --i) {
      c.indices[static_cast<size_t>(Below(n))] = garbage(c.rows);
    }
    for (int64_t i = Below(3); i > 0; --i) {
      c.offsets[static_cast<size_t>(Below(static_cast<int64_t>(c.offsets.size())))] = garbage(n);
    }
    // What the narrow types make of it.
    const auto narrow = [](std::vector<int64_t>* values, int32_t type) {
      for (int64_t& x : *values) x = type == kInt32 ? static_cast<int32_t>(x) : x;
    };
    narrow(&c.indices, c.index_type);
    narrow(&c.offsets, c.offset_type);

    std::string expected;
    for (size_t i = 0; i < c.offsets.size() && expected.empty(); ++i) {
      const std::string at = "offsets[" + std::to_string(i) + "] = " + std::to_string(c.offsets[i]);
      if (i == 0 && c.offsets[0] != 0) {
        expected = at + " must be 0";
      } else if (i > 0 && c.offsets[i] < c.offsets[i - 1]) {
        expected = at + " is below offsets[" + std::to_string(i - 1) +
                   "] = " + std::to_string(c.offsets[i - 1]) + ": offsets must not decrease";
      } else if (c.offsets[i] > n) {
        expected = at + " is past the number of indices, " + std::to_string(n);
      }
    }
    if (expected.empty()) {
      for (int64_t k = 0; k < c.BagBegin(c.NumBags()) && expected.empty(); ++k) {
        const int64_t index = c.indices[static_cast<size_t>(k)];
        if (index < 0 || index >= c.rows) {
          expected = "indices[" + std::to_string(k) + "] = " + std::to_string(index) +
                     " is outside [0, " + std::to_string(c.rows) + ")";
        }
      }
    }
    if (expected.empty()) {
      CheckCase(&c, false);
    } else {
      c.Build();
      Bytes out;
      for (const Isa isa : Isas()) {
        ExpectInvalid(c.Run(isa, 2, &out), expected.c_str());
        ExpectInvalid(c.Run(isa, {RunBackwards, nullptr}, &out), expected.c_str());
      }
    }
  }
}

// Another thread writes to the indices or the offsets while a call runs. Whatever it makes of them,
// nothing but the call's own memory is touched.
void TestChangingInputs() {
  const auto run = [](Case* c) {
    Bytes out;
    for (const Isa isa : Isas()) {
      const Status status = c->Run(isa, 2, &out);
      CHECK(status.ok() || status.code == Code::kInvalidArgument ||
                std::strstr(status.message, "changed while"),
            "%s", status.message);
    }
  };
  for (const bool flat : {true, false}) {
    for (const int64_t columns : {0, 5, 64, 700}) {
      Case c;
      c.dtype = columns == 5 ? kUint8 : kFloat32;
      c.second = Case::kBias;
      FillTable(&c, 50, columns);
      if (flat) {
        FillBags(&c, {3, 1, 2000, 0, 70, 8, 1, 1, 1500, 3000}, columns == 64);
        c.indices.resize(static_cast<size_t>(6584));  // without what stands behind the last bag
        c.weights.resize(c.indices.size());
      } else {
        FillGrid(&c, 40, 30);
      }
      c.Build();
      for (const bool wild : {false, true}) {
        WhileWritten(c.index_bytes.data(), ContentsInTurn(c.indices, c.rows, false, wild),
                     [&] { run(&c); });
        if (!flat) continue;
        const int64_t n = static_cast<int64_t>(c.indices.size());
        WhileWritten(c.offset_bytes.data(), ContentsInTurn(c.offsets, n + 1, true, wild),
                     [&] { run(&c); });
      }
    }
  }
  // One long bag and many: both are legal, and so is the one with the end of the other.
  Case c;
  FillTable(&c, 50, 1);
  FillBags(&c, std::vector<int64_t>(300, kPiece + 1), false);
  c.Build();
  std::vector<int64_t> one(c.offsets.size(), static_cast<int64_t>(c.indices.size()));
  one[0] = 0;
  std::vector<std::vector<char>> contents;
  for (const std::vector<int64_t>& offsets : {c.offsets, one}) {
    const char* const begin = reinterpret_cast<const char*>(offsets.data());
    contents.emplace_back(begin, begin + c.offset_bytes.size());
  }
  for (int i = 0; i < 5; ++i) WhileWritten(c.offset_bytes.data(), contents, [&] { run(&c); });
}

}  // namespace
}  // namespace lucid

int main() {
  using namespace lucid;
  TestEverything();
  TestQuantized();
  TestScales();
  TestEmpty();
  TestLongBags();
  TestManyBags();
  TestAccuracy();
  TestConversions();
  TestNotFinite();
  TestInfiniteWeights();
  TestInvalidArguments();
  TestLowestInvalidPosition();
  TestHostile();
#if !defined(__SANITIZE_THREAD__)  // for which the writing is an error
  TestChangingInputs();
#endif
  for (int i = 0; i < kIsaCount; ++i) {
    const Isa isa = static_cast<Isa>(i);
    std::printf("%s: %lld runs\n", IsaName(isa), static_cast<long long>(EmbeddingBagRuns(isa)));
    CHECK(!IsaSupported(isa) || EmbeddingBagRuns(isa) > 0, "%s never ran", IsaName(isa));
  }
  std::printf("%lld checks, %d failures\n", static_cast<long long>(g_checks), g_failures);
  return g_failures != 0;
}
