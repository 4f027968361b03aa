// The gradient's kernels against the equation: every instruction set, type, mode and awkward width,
// compared with sums in double, and with each other bit for bit; then every invalid
// argument.
//
// Tensors live in allocations of their exact size, so that the address sanitizer sees a byte too
// far.
#include "embedding_bag_grad/embedding_bag_grad.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "base/test/testing.h"
#include "base/types.h"
#include "embedding_bag/test/fill.h"
#include "embedding_bag_grad/grad_rows.h"

namespace lucid {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

// ---- Tensors.

size_t SizeOf(int32_t dtype) { return dtype == kFloat64 ? 8 : dtype == kFloat32 ? 4 : 2; }

template <class T>
double GetAs(const char* data, int64_t i) {
  return ToAccumulator(LoadUnaligned<T>(data, i));
}

template <class T>
void PutAs(double value, char* data, int64_t i) {
  T out;
  FromAccumulator(static_cast<Accumulator<T>>(value), &out);
  std::memcpy(data + static_cast<size_t>(i) * sizeof(T), &out, sizeof(T));
}

double Get(int32_t dtype, const char* data, int64_t i) {
  LUCID_FOR_FLOAT_TYPE(dtype, return GetAs<T>(data, i));
}

void Put(int32_t dtype, double value, char* data, int64_t i) {
  LUCID_FOR_FLOAT_TYPE(dtype, PutAs<T>(value, data, i));
}

// `size` bytes that start `shift` bytes into a block and end with it.
class Bytes {
 public:
  void Reset(size_t size, size_t shift) {
    block_.reset(new char[size + shift]);
    data_ = block_.get() + shift;
    size_ = size;
    if (size) std::memset(data_, 0xcd, size);
  }
  char* data() const { return data_; }
  size_t size() const { return size_; }
  bool operator==(const Bytes& other) const {
    return size_ == other.size_ && (size_ == 0 || std::memcmp(data_, other.data_, size_) == 0);
  }

 private:
  std::unique_ptr<char[]> block_;
  char* data_ = nullptr;
  size_t size_ = 0;
};

struct Outputs {
  Bytes weight;  // or values
  Bytes rows, weights;

  bool operator==(const Outputs& other) const {
    return weight == other.weight && rows == other.rows && weights == other.weights;
  }
};

struct Case {
  int32_t dtype = kFloat32, index_type = kInt64, offset_type = kInt64, mode = kSum;
  bool flat = true, include_last_offset = false, weighted = false, sparse = false, by_freq = false;
  int64_t rows = 0, columns = 0, bags = 0, length = 0;
  std::vector<double> weight, grad, weights;  // [rows, columns], [bags, columns], as indices
  std::vector<int64_t> indices, offsets;
  int64_t padding = kNoPadding;
  double max_norm = kInfinity, norm_type = 2;
  size_t shift = 0;

  Bytes table, index_bytes, offset_bytes, weight_bytes, grad_bytes;
  EmbeddingBagGradArgs args;

  void Floats(std::vector<double>* from, Bytes* to) {
    to->Reset(from->size() * SizeOf(dtype), shift);
    for (size_t i = 0; i < from->size(); ++i) {
      Put(dtype, (*from)[i], to->data(), static_cast<int64_t>(i));
      (*from)[i] = Get(dtype, to->data(), static_cast<int64_t>(i));
    }
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

  // Writes the vectors into memory; the doubles become what the type can hold.
  void Build() {
    if (grad.empty()) {
      grad.resize(static_cast<size_t>(std::max<int64_t>(NumBags(), 0) * columns));
      for (double& x : grad) x = Normal();
    }
    Floats(&weight, &table);
    Floats(&weights, &weight_bytes);
    Floats(&grad, &grad_bytes);
    Integers(indices, index_type, &index_bytes);
    Integers(offsets, offset_type, &offset_bytes);
    args = {};
    args.size_bytes = sizeof(args);
    EmbeddingBagArgs& f = args.forward;
    f.size_bytes = sizeof(f);
    f.weight = table.data();
    f.indices = index_bytes.data();
    f.offsets = flat ? offset_bytes.data() : nullptr;
    f.per_sample_weights = weighted ? weight_bytes.data() : nullptr;
    f.weight_shape[0] = rows;
    f.weight_shape[1] = columns;
    f.indices_shape[0] = flat ? static_cast<int64_t>(indices.size()) : bags;
    f.indices_shape[1] = flat ? 0 : length;
    f.num_offsets = static_cast<int64_t>(offsets.size());
    f.max_norm = max_norm;
    f.norm_type = norm_type;
    f.padding_idx = padding;
    f.dtype = f.output_type = dtype;
    f.index_type = index_type;
    f.offset_type = offset_type;
    f.mode = mode;
    f.indices_rank = flat ? 1 : 2;
    f.include_last_offset = include_last_offset;
    args.grad_output = grad_bytes.data();
    args.grad_output_shape[0] = NumBags();
    args.grad_output_shape[1] = columns;
    args.sparse = sparse;
    args.scale_grad_by_freq = by_freq;
  }

  Status Run(Isa isa, const ParallelFor& host, Outputs* out) {
    const Status counted = CountGradEntries(args, &args.num_entries);
    if (!counted.ok()) return counted;
    const int64_t given = sparse ? args.num_entries : rows;
    out->weight.Reset(static_cast<size_t>(given * columns) * SizeOf(dtype), shift);
    out->rows.Reset(sparse ? static_cast<size_t>(given) * 8 : 0, 0);
    out->weights.Reset(weighted ? indices.size() * SizeOf(dtype) : 0, shift);
    args.grad_weight = args.values = out->weight.data();
    args.rows = reinterpret_cast<int64_t*>(out->rows.data());
    args.grad_per_sample_weights = weighted ? out->weights.data() : nullptr;
    return RunEmbeddingBagGrad(args, isa, host);
  }

  Status Run(Isa isa, int num_threads, Outputs* out) {
    return Run(isa, {RunThreads, &num_threads}, out);
  }

  double Clip(const double* row) const {
    if (max_norm == kInfinity) return 1;
    double sum = 0;
    for (int64_t c = 0; c < columns; ++c) {
      const double x = std::abs(row[c]);
      sum = norm_type == kInfinity ? std::max(sum, x) : sum + std::pow(x, norm_type);
    }
    const double norm = norm_type == kInfinity ? sum : std::pow(sum, 1 / norm_type);
    return norm > max_norm ? max_norm / (norm + 1e-7) : 1;
  }

  // The equation, in double. Of every number, the magnitudes that were added are kept too.
  struct Expected {
    std::vector<double> weight, weight_slack, values, weights, weights_slack;
    std::vector<int64_t> rows;
  };
  void Expect(Expected* e) const {
    const auto at = [](int64_t i) { return static_cast<size_t>(i); };
    const int64_t skipped = padding == kNoPadding ? -1 : padding < 0 ? padding + rows : padding;
    e->weight.assign(at(rows * columns), 0);
    e->weight_slack.assign(at(rows * columns), 0);
    e->weights.assign(indices.size(), 0);
    e->weights_slack.assign(indices.size(), 0);
    std::vector<double> frequency(at(rows), 0);
    for (int64_t k = 0; k < BagBegin(NumBags()); ++k) ++frequency[at(indices[at(k)])];
    for (int64_t i = 0; i < NumBags(); ++i) {
      std::vector<int64_t> used;
      for (int64_t k = BagBegin(i); k < BagBegin(i + 1); ++k) {
        if (indices[at(k)] != skipped) used.push_back(k);
      }
      std::vector<int64_t> winner(at(columns), used.empty() ? -1 : used[0]);
      for (const int64_t k : used) {
        const double* row = weight.data() + indices[at(k)] * columns;
        for (int64_t c = 0; mode == kMax && c < columns; ++c) {
          const double* best_row = weight.data() + indices[at(winner[at(c)])] * columns;
          const double best = best_row[c] * Clip(best_row), x = row[c] * Clip(row);
          if (best == best && (x > best || x != x)) winner[at(c)] = k;
        }
      }
      for (const int64_t k : used) {
        const int64_t r = indices[at(k)];
        const double* row = weight.data() + r * columns;
        const double clip = Clip(row);
        e->rows.push_back(r);
        for (int64_t c = 0; c < columns; ++c) {
          const double g = grad[at(i * columns + c)];
          double x = g;
          if (weighted) x *= weights[at(k)];
          if (mode == kMean) x /= static_cast<double>(used.size());
          if (mode == kMax && winner[at(c)] != k) x = 0;
          if (by_freq) x /= frequency[at(r)];
          e->values.push_back(x);
          e->weight[at(r * columns + c)] += x;
          e->weight_slack[at(r * columns + c)] += std::abs(x);
          e->weights[at(k)] += g * row[c] * clip;
          e->weights_slack[at(k)] += std::abs(g * row[c] * clip);
        }
      }
    }
  }

  std::string Describe() const {
    char text[300];
    std::snprintf(
        text, sizeof(text),
        "dtype %d index %d offset %d mode %d flat %d last %d weighted %d sparse %d freq %d "
        "V %lld D %lld bags %lld N %zu padding %lld max_norm %g p %g shift %zu",
        dtype, index_type, offset_type, mode, flat, include_last_offset, weighted, sparse, by_freq,
        static_cast<long long>(rows), static_cast<long long>(columns),
        static_cast<long long>(NumBags()), indices.size(), static_cast<long long>(padding),
        max_norm, norm_type, shift);
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

// One rounding to T, and what the additions in float may lose. NaN and infinity must be equal.
void CheckClose(const Case& c, const char* what, const Bytes& got, const std::vector<double>& value,
                const std::vector<double>& slack) {
  const double epsilon = c.dtype == kFloat16 ? 0x1p-11 : c.dtype == kBFloat16 ? 0x1p-8 : 0;
  const double lost = c.dtype == kFloat64 ? 1e-13 : 2e-6;  // the oracle is double too
  CHECK(got.size() == value.size() * SizeOf(c.dtype), "%s %s", c.Describe().c_str(), what);
  for (size_t i = 0; i < value.size(); ++i) {
    const double x = Get(c.dtype, got.data(), static_cast<int64_t>(i));
    const double tolerance = epsilon * (std::abs(value[i]) + lost) + lost * std::abs(slack[i]) +
                             (c.dtype == kFloat16 ? 0x1p-25 : 0);
    CHECK(std::isnan(value[i])   ? std::isnan(x)
          : std::isinf(value[i]) ? x == value[i]
                                 : std::abs(x - value[i]) <= tolerance,
          "%s: %s [%zu] %.9g, expected %.9g", c.Describe().c_str(), what, i, x, value[i]);
  }
}

// Right on one instruction set, and the same bits on all, on some threads and backwards.
void CheckCase(Case* c, const std::vector<int>& threads) {
  c->Build();
  if (IsLeftOut()) return;
  Case::Expected expected;
  c->Expect(&expected);
  Outputs first, other;
  const Status status = c->Run(Isa::baseline, 1, &first);
  CHECK(status.ok(), "%s: %s", c->Describe().c_str(), status.message);
  if (!status.ok()) return;
  if (c->sparse) {
    CheckClose(*c, "values", first.weight, expected.values, expected.values);
    CHECK(first.rows.size() == expected.rows.size() * 8, "%s", c->Describe().c_str());
    for (size_t i = 0; i < expected.rows.size(); ++i) {
      const int64_t row = LoadUnaligned<int64_t>(first.rows.data(), static_cast<int64_t>(i));
      CHECK(row == expected.rows[i], "%s: rows[%zu]", c->Describe().c_str(), i);
    }
  } else {
    CheckClose(*c, "grad_weight", first.weight, expected.weight, expected.weight_slack);
  }
  if (c->weighted) {
    CheckClose(*c, "grad_per_sample_weights", first.weights, expected.weights,
               expected.weights_slack);
  }
  for (const Isa isa : Isas()) {
    for (const int num_threads : threads) {  // 0: backwards
      const Status again = num_threads ? c->Run(isa, num_threads, &other)
                                       : c->Run(isa, {RunBackwards, nullptr}, &other);
      CHECK(again.ok(), "%s", again.message);
      CHECK(first == other, "%s: %s with %d threads has other bits", c->Describe().c_str(),
            IsaName(isa), num_threads);
    }
  }
}

// ---- The tests.

// Everything that has a loop of its own, in every type and width, the rest as chance will have it.
void TestSweep() {
  for (const int32_t dtype : {kFloat32, kFloat16, kBFloat16, kFloat64}) {
    for (const int64_t columns : {1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 64, 67, 130, 300}) {
      for (int kind = 0; kind < 8; ++kind) {
        Case c;
        c.dtype = dtype;
        c.mode = kind / 2 < 2 ? kSum : kind / 2 == 2 ? kMean : kMax;
        c.weighted = kind / 2 == 1;
        c.sparse = kind % 2;
        c.by_freq = Below(2);
        c.index_type = static_cast<int32_t>(Below(2));
        c.offset_type = static_cast<int32_t>(Below(2));
        c.shift = static_cast<size_t>(Below(2) * 3);
        FillTable(&c, 1 + Below(40), columns);
        if (Below(3)) {
          FillBags(&c, {2, 0, 1, 5, 0, 90, 3, 0}, Below(2) != 0);
        } else {
          FillGrid(&c, 6, 7);
        }
        if (Below(2)) c.padding = Below(2) ? Below(c.rows) : -1 - Below(c.rows);
        if (Below(2)) {
          c.max_norm = std::sqrt(static_cast<double>(columns));
          c.norm_type = std::vector<double>{2, 1, kInfinity, 3, 0.5}[static_cast<size_t>(Below(5))];
          // Of p = 1/2, the norm of many columns has more digits than a float tells apart.
          if (c.norm_type == 0.5) c.max_norm = static_cast<double>(columns * columns);
          // What is clipped to max_norm itself is equal but for the last bit, which is not what
          // decides on a maximum here.
          if (c.mode == kMax && c.norm_type == kInfinity) c.norm_type = 2;
          if (c.mode == kMax && columns == 1) c.max_norm = kInfinity;
        }
        CheckCase(&c, {1});
      }
    }
  }
}

// Work for threads: rows of many pieces, rows at the border of one, rows that nobody looks up.
void TestThreads() {
  for (const int32_t dtype : {kFloat32, kFloat16, kFloat64}) {
    for (const int mode : {kSum, kMean, kMax}) {
      for (const bool sparse : {false, true}) {
        Case c;
        c.dtype = dtype;
        c.mode = mode;
        c.weighted = mode == kSum;
        c.sparse = sparse;
        c.by_freq = mode != kMax;
        c.padding = 5;
        if (mode == kMax) c.max_norm = 3;
        FillTable(&c, 3000, 19);
        std::vector<int64_t> lengths(600, 13);
        lengths.insert(lengths.end(), {9000, 0, 0, 1100});
        FillBags(&c, lengths, true);
        // So many positions of row 7, 8, ... from some place on.
        size_t k = 100;
        for (const int64_t times : {7000, 1024, 1025, 2048, 1023}) {
          for (int64_t i = 0; i < times; ++i) c.indices[k++] = 7 + times % 5 * 400;
        }
        CheckCase(&c, {1, 2, 3, 4, 5, 6, 7, 8, 0});
      }
    }
  }
  // One row for all, and a table whose rows take several digits.
  for (const int64_t rows : {int64_t{1}, int64_t{200000}}) {
    Case c;
    c.dtype = kBFloat16;
    FillTable(&c, rows, 3);
    FillGrid(&c, 300, 100);
    CheckCase(&c, {1, 2, 8, 0});
  }
}

void TestNothing() {
  for (const bool sparse : {false, true}) {
    for (const bool weighted : {false, true}) {
      for (int kind = 0; kind < 9; ++kind) {
        Case c;
        c.sparse = sparse;
        c.weighted = weighted;
        FillTable(&c, kind == 0 ? 0 : 4, kind == 1 || kind == 2 ? 0 : 5);
        if (kind == 0) FillBags(&c, {0, 0}, false);  // V = 0
        if (kind == 1) FillBags(&c, {2, 3}, false);  // D = 0
        if (kind == 2) FillGrid(&c, 1000, 0);
        if (kind == 3) FillBags(&c, {}, false);        // B = N = 0
        if (kind == 4) FillBags(&c, {}, true);         // positions of no bag alone
        if (kind == 5) FillBags(&c, {0, 0, 0}, true);  // empty bags alone
        if (kind == 6) FillGrid(&c, 3, 0);
        if (kind == 7) FillGrid(&c, 0, 3);
        if (kind == 8) {  // padded positions alone, of weights that are not numbers
          FillBags(&c, {4, 3}, false);
          std::fill(c.indices.begin(), c.indices.end(), 2);
          std::fill(c.weights.begin(), c.weights.end(), kNan);
          c.padding = -2;
        }
        CheckCase(&c, {1, 2});
        if (kind != 2) continue;
        c.args.forward.indices_shape[0] = c.args.grad_output_shape[0] = int64_t{1} << 60;
        Outputs out;  // takes no memory, and must take no time
        CHECK(c.Run(Isa::baseline, 1, &out).ok(), "2^60 empty bags of no columns");
      }
    }
  }
}

// A NaN goes where it is given, and nowhere else.
void TestNan() {
  for (const int mode : {kSum, kMean, kMax}) {
    for (const bool sparse : {false, true}) {
      Case c;
      c.mode = mode;
      c.sparse = sparse;
      c.weighted = mode == kSum;
      FillTable(&c, 9, 18);
      FillBags(&c, {3, 2, 4}, false);
      c.indices = {0, 1, 2, 3, 4, 5, 8, 6, 8};
      c.weights[6] = c.weights[8] = kNan;
      c.padding = 8;
      c.grad.assign(3 * 18, 1.5);
      for (size_t i = 18; i < 36; ++i) c.grad[i] = i % 2 ? kNan : kInfinity;
      for (size_t i = 8 * 18; i < 9 * 18; ++i) c.weight[i] = kNan;
      CheckCase(&c, {1});
    }
  }
  // The first NaN is the maximum, and without one the first of equals.
  Case c;
  c.mode = kMax;
  FillTable(&c, 4, 17);
  for (size_t i = 0; i < c.weight.size(); ++i) c.weight[i] = static_cast<double>(i / 17 % 2);
  for (size_t i = 0; i < 17; ++i) c.weight[2 * 17 + i] = i % 3 ? kNan : 1;
  FillBags(&c, {4, 5}, false);
  c.indices = {0, 1, 3, 2, 1, 2, 2, 3, 1};
  CheckCase(&c, {1});
  c.sparse = true;
  CheckCase(&c, {1});
}

void ExpectInvalid(Case* c, const char* text) {
  Outputs out;
  const Status status = c->Run(Isa::baseline, 2, &out);
  CHECK(status.code == Code::kInvalidArgument && std::strcmp(status.message, text) == 0,
        "\"%s\", expected \"%s\"", status.message, text);
}

void TestInvalidArguments() {
  Case good;
  FillTable(&good, 50, 3);
  FillBags(&good, std::vector<int64_t>(2000, 10), false);
  const auto rejects = [&](const char* text, const auto& change) {
    for (const bool sparse : {false, true}) {
      Case c;
      c.rows = good.rows;
      c.columns = good.columns;
      c.weight = good.weight;
      c.indices = good.indices;
      c.offsets = good.offsets;
      c.weights = good.weights;
      c.sparse = sparse;
      c.Build();
      change(&c);
      ExpectInvalid(&c, text);
    }
  };
  const auto set = [](int64_t k, int64_t value) {
    return [=](Case* c) {
      std::memcpy(c->index_bytes.data() + 8 * k, &value, 8);
      std::memcpy(c->index_bytes.data() + 8 * 19990, &value, 8);
    };
  };
  rejects("indices[7001] = 50 is outside [0, 50)", set(7001, 50));
  rejects("indices[0] = -1 is outside [0, 50)", set(0, -1));
  rejects("indices[19990] = -9223372036854775808 is outside [0, 50)", set(19990, INT64_MIN));
  rejects("indices[12345] = 9223372036854775807 is outside [0, 50)", set(12345, INT64_MAX));
  const auto offset = [](int64_t i, int64_t value) {
    return [=](Case* c) { std::memcpy(c->offset_bytes.data() + 8 * i, &value, 8); };
  };
  rejects("offsets[0] = 1 must be 0", offset(0, 1));
  rejects("offsets[3] = 19 is below offsets[2] = 20: offsets must not decrease", offset(3, 19));
  rejects("offsets[1999] = 20001 is past the number of indices, 20000", offset(1999, 20001));
  rejects("grad_output has shape [1999, 3], expected [2000, 3]",
          [](Case* c) { c->args.grad_output_shape[0] = 1999; });
  rejects("grad_output has shape [2000, 4], expected [2000, 3]",
          [](Case* c) { c->args.grad_output_shape[1] = 4; });
  rejects("padding_idx = 50 is outside [-50, 50), the rows of weight",
          [](Case* c) { c->args.forward.padding_idx = 50; });
  rejects("max_norm = -1 must be >= 0", [](Case* c) { c->args.forward.max_norm = -1; });
  rejects("norm_type = 0 must be > 0", [](Case* c) { c->args.forward.norm_type = 0; });
  rejects("mode = 4 is not 0 (sum), 1 (mean), 2 (max) or 3 (sqrtn)",
          [](Case* c) { c->args.forward.mode = 4; });
  rejects("per_sample_weights needs mode 'sum', got mode = 'mean'", [](Case* c) {
    c->args.forward.mode = kMean;
    c->args.forward.per_sample_weights = c->weight_bytes.data();
  });
  rejects("size_bytes = 8 is not 264", [](Case* c) { c->args.size_bytes = 8; });
  rejects("sparse = 2 is not 0 or 1", [](Case* c) { c->args.sparse = 2; });
  rejects("scale_grad_by_freq = -1 is not 0 or 1",
          [](Case* c) { c->args.scale_grad_by_freq = -1; });
  rejects("dtype = 4 is quantized: a quantized table has no gradient", [](Case* c) {
    c->args.forward.dtype = kInt8;
    c->args.forward.output_type = kFloat32;
    c->args.forward.scale = c->table.data();
    c->args.forward.scale_stride = 4;
  });

  // What the caller made room for must be what there is.
  Case c;
  FillTable(&c, 5, 2);
  FillGrid(&c, 3, 4);
  c.sparse = true;
  c.Build();
  Outputs out;
  CHECK(c.Run(Isa::baseline, 1, &out).ok(), "good");
  c.args.num_entries = 11;
  int num_threads = 1;
  const Status status = RunEmbeddingBagGrad(c.args, Isa::baseline, {RunThreads, &num_threads});
  CHECK(std::strcmp(status.message, "num_entries = 11 is not 12") == 0, "%s", status.message);

  good.Build();
  const Status none = good.Run(Isa::baseline, {RunNothing, nullptr}, &out);
  CHECK(none.code == Code::kInternal, "a host without threads: %s", none.message);
}

// Another thread writes to the indices or the offsets while a call runs. Whatever it makes of them,
// nothing but the call's own memory is touched.
void TestChangingInputs() {
  for (int turn = 0; turn < 16; ++turn) {
    Case c;
    c.mode = turn % 4 == 3 ? kMax : turn % 4 == 2 ? kMean : kSum;
    c.weighted = turn % 4 == 1;
    c.sparse = turn / 4 % 2;
    c.by_freq = turn / 8;
    if (turn % 3 == 0) c.padding = 5;
    if (turn % 5 == 0) c.max_norm = 1;
    FillTable(&c, 3000, 16);
    std::vector<int64_t> lengths(300, 13);
    lengths.insert(lengths.end(), {3000, 0, 0, 1100});
    FillBags(&c, lengths, turn % 2);
    c.Build();
    const auto run = [&] {
      Outputs out;
      for (const Isa isa : Isas()) {
        const Status status = c.Run(isa, 2, &out);
        CHECK(status.ok() || status.code == Code::kInvalidArgument ||
                  std::strstr(status.message, "changed while"),
              "%s", status.message);
      }
    };
    const bool wild = turn % 4 == 0;
    const int64_t n = static_cast<int64_t>(c.indices.size());
    WhileWritten(c.index_bytes.data(), ContentsInTurn(c.indices, c.rows, false, wild), run);
    WhileWritten(c.offset_bytes.data(), ContentsInTurn(c.offsets, n + 1, true, wild), run);
  }
}

}  // namespace
}  // namespace lucid

int main() {
  lucid::TestSweep();
  lucid::TestThreads();
  lucid::TestNothing();
  lucid::TestNan();
#if !defined(__SANITIZE_THREAD__)  // for which the writing is an error
  lucid::TestChangingInputs();
#endif
  lucid::TestInvalidArguments();
  std::printf("%lld checks, %d failures\n", static_cast<long long>(lucid::g_checks),
              lucid::g_failures);
  return lucid::g_failures != 0;
}
