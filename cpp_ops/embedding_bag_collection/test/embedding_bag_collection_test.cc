// Collections against their tables one by one: every instruction set, type, layout and host, bit
// for bit; then every invalid argument, by the text of its error.
//
// Inputs and outputs live in allocations of their exact size, so that the address sanitizer sees a
// byte too far.
#include <algorithm>
#include <atomic>
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
#include "embedding_bag/embedding_bag.h"

namespace lucid {
namespace {

std::vector<Isa> Isas() {
  std::vector<Isa> found;
  for (int i = 0; i < kIsaCount; ++i) {
    if (IsaSupported(static_cast<Isa>(i))) found.push_back(static_cast<Isa>(i));
  }
  return found;
}

template <class T>
void Put(double value, char* at) {
  T out;
  FromAccumulator(static_cast<Accumulator<T>>(value), &out);
  std::memcpy(at, &out, sizeof(out));
}

// A vector's elements as integers of a type.
struct Integers {
  std::vector<int64_t> wide;
  std::vector<int32_t> narrow;

  const void* As(int32_t type) {
    narrow.assign(wide.begin(), wide.end());
    return type == kInt64 ? static_cast<const void*>(wide.data()) : narrow.data();
  }
};

struct Table {
  std::unique_ptr<char[]> rows, weights;
  Integers indices, offsets;
  int32_t index_type = kInt64, offset_type = kInt64;
  EmbeddingBagArgs args = {};
};

enum Layout { kRagged, kPacked, kRows };

// Tables and a call of them all, in random sizes.
struct Case {
  Layout layout;
  int32_t dtype = kFloat32;
  bool weighted = false;
  int64_t bags = 0;
  std::vector<Table> tables;
  Table all;  // what packed tables have together
  std::vector<EmbeddingBagArgs> args;
  EmbeddingBagCollectionArgs call = {};

  size_t ElementSize() const { return dtype == kFloat64 ? 8 : dtype == kFloat32 ? 4 : 2; }

  // Values that every type holds exactly.
  std::unique_ptr<char[]> Values(int64_t count) const {
    std::unique_ptr<char[]> data(new char[static_cast<size_t>(count) * ElementSize()]);
    for (int64_t i = 0; i < count; ++i) {
      const double value = static_cast<double>(Below(257) - 128) / 32;
      char* const at = data.get() + static_cast<size_t>(i) * ElementSize();
      if (dtype == kFloat32) Put<float>(value, at);
      if (dtype == kFloat16) Put<Float16>(value, at);
      if (dtype == kBFloat16) Put<BFloat16>(value, at);
      if (dtype == kFloat64) Put<double>(value, at);
    }
    return data;
  }

  void Make(Layout l, int32_t type, int32_t mode, int64_t num_tables, int64_t num_bags,
            int64_t longest) {
    layout = l;
    dtype = type;
    bags = num_bags;
    weighted = mode == kSum && Below(2);
    const bool ends = layout == kPacked || Below(2);
    const double max_norm = Below(3) ? std::numeric_limits<double>::infinity() : 3.5;
    const int64_t padding = Below(2) ? kNoPadding : -1;
    tables = std::vector<Table>(static_cast<size_t>(num_tables));
    args.clear();
    for (Table& t : tables) {
      const int64_t columns[] = {0, 1, 3, 7, 16, 33, 64, 100};
      const int64_t v = 1 + Below(40), d = columns[Below(8)];
      const int64_t length = Below(5);
      int64_t position = 0;
      for (int64_t i = 0; i <= bags; ++i) {
        if (i < bags || ends) t.offsets.wide.push_back(position);
        if (i == bags) break;
        position += layout == kRows ? length : Below(4) ? Below(6) : Below(longest + 1);
      }
      for (int64_t k = 0; k < position; ++k) t.indices.wide.push_back(Below(v));
      t.index_type = Below(2) ? kInt64 : kInt32;
      t.offset_type = Below(2) ? kInt64 : kInt32;
      t.rows = Values(v * d);
      if (weighted) t.weights = Values(position);
      EmbeddingBagArgs& a = t.args;
      a.size_bytes = sizeof(a);
      a.weight = t.rows.get();
      a.indices = t.indices.As(t.index_type);
      a.offsets = layout == kRows ? nullptr : t.offsets.As(t.offset_type);
      a.per_sample_weights = t.weights.get();
      a.weight_shape[0] = v;
      a.weight_shape[1] = d;
      a.indices_shape[0] = layout == kRows ? bags : position;
      a.indices_shape[1] = layout == kRows ? length : 0;
      a.num_offsets = layout == kRows ? 0 : bags + ends;
      a.max_norm = max_norm;
      a.norm_type = 2;
      a.padding_idx = padding;
      a.dtype = a.output_type = dtype;
      a.index_type = t.index_type;
      a.offset_type = t.offset_type;
      a.mode = mode;
      a.indices_rank = layout == kRows ? 2 : 1;
      a.include_last_offset = ends;
      args.push_back(a);
    }
    if (layout == kPacked) Pack();
    call = {sizeof(call), args.data(), num_tables, nullptr, layout == kPacked};
  }

  void Pack() {
    int64_t before = 0;
    std::string weights;
    for (const Table& t : tables) {
      const auto& o = t.offsets.wide;
      for (size_t i = before ? 1 : all.offsets.wide.size() ? 1 : 0; i < o.size(); ++i) {
        all.offsets.wide.push_back(before + o[i]);
      }
      all.indices.wide.insert(all.indices.wide.end(), t.indices.wide.begin(), t.indices.wide.end());
      if (weighted) weights.append(t.weights.get(), t.indices.wide.size() * ElementSize());
      before += o.back();
    }
    all.weights.reset(new char[weights.size()]);
    std::memcpy(all.weights.get(), weights.data(), weights.size());
    EmbeddingBagArgs& first = args[0];
    first.indices = all.indices.As(first.index_type);
    first.offsets = all.offsets.As(first.offset_type);
    first.per_sample_weights = weighted ? all.weights.get() : nullptr;
    first.indices_shape[0] = before;
    first.num_offsets = static_cast<int64_t>(all.offsets.wide.size());
    // What is not looked at may be anything.
    for (size_t t = 1; t < args.size(); ++t) {
      args[t].indices = args[t].offsets = args[t].per_sample_weights = nullptr;
      args[t].num_offsets = args[t].indices_shape[0] = -5;
    }
  }

  int64_t Columns() const {
    int64_t sum = 0;
    for (const Table& t : tables) sum += t.args.weight_shape[1];
    return sum;
  }

  Status Run(Isa isa, const ParallelFor& host, std::unique_ptr<char[]>* out) {
    const size_t size = static_cast<size_t>(bags * Columns()) * ElementSize();
    out->reset(new char[size]);
    std::memset(out->get(), 0xcd, size);
    call.output = out->get();
    return RunEmbeddingBagCollection(call, isa, host);
  }

  // The tables one by one, side by side.
  std::vector<char> Expect(Isa isa) {
    const size_t stride = static_cast<size_t>(Columns()) * ElementSize();
    std::vector<char> all_rows(static_cast<size_t>(bags) * stride);
    size_t column = 0;
    for (Table& t : tables) {
      const size_t size = static_cast<size_t>(t.args.weight_shape[1]) * ElementSize();
      std::unique_ptr<char[]> out(new char[static_cast<size_t>(bags) * size]);
      t.args.output = out.get();
      const Status status = RunEmbeddingBag(t.args, isa, {RunBackwards, nullptr});
      CHECK(status.ok(), "%s", status.message);
      for (size_t i = 0; size > 0 && i < static_cast<size_t>(bags); ++i) {
        std::memcpy(all_rows.data() + i * stride + column, out.get() + i * size, size);
      }
      column += size;
    }
    return all_rows;
  }
};

void TestBits() {
  for (const Layout layout : {kRagged, kPacked, kRows}) {
    for (const int32_t dtype : {kFloat32, kFloat16, kBFloat16, kFloat64}) {
      for (const int32_t mode : {kSum, kMean, kMax}) {
        for (int turn = 0; turn < 8; ++turn) {
          Case c;
          // Few and many bags, so that tasks run at once and on threads; in the last turns some
          // bags are cut into pieces.
          c.Make(layout, dtype, mode, 1 + Below(6), turn == 0 ? 0 : 1 + Below(turn < 4 ? 9 : 200),
                 turn < 6 ? 30 : 2500);
          for (const Isa isa : Isas()) {
            const std::vector<char> expected = c.Expect(isa);
            int threads = 1 + static_cast<int>(Below(4));
            for (const ParallelFor& host :
                 {ParallelFor{RunThreads, &threads}, ParallelFor{RunBackwards, nullptr}}) {
              std::unique_ptr<char[]> out;
              const Status status = c.Run(isa, host, &out);
              CHECK(status.ok(), "%s", status.message);
              CHECK(std::equal(expected.begin(), expected.end(), out.get()),
                    "layout %d, dtype %d, mode %d, turn %d, %s", layout, dtype, mode, turn,
                    IsaName(isa));
            }
          }
        }
      }
    }
  }
}

void ExpectInvalid(Case* c, const char* expected) {
  for (const Isa isa : Isas()) {
    std::unique_ptr<char[]> out;
    int threads = 3;
    for (const ParallelFor& host :
         {ParallelFor{RunThreads, &threads}, ParallelFor{RunBackwards, nullptr}}) {
      const Status status = c->Run(isa, host, &out);
      CHECK(status.code == Code::kInvalidArgument, "code %d", static_cast<int>(status.code));
      CHECK(!std::strcmp(status.message, expected), "\"%s\", expected \"%s\"", status.message,
            expected);
    }
  }
}

// Three tables of 10 rows and 4 columns, with 200 bags of 3.
void Plain(Layout layout, Case* c) {
  c->layout = layout;
  c->bags = 200;
  c->tables = std::vector<Table>(3);
  for (Table& t : c->tables) {
    t.rows = c->Values(40);
    for (int64_t i = 0; i <= 200; ++i) t.offsets.wide.push_back(3 * i);
    t.indices.wide.assign(600, 1);
    EmbeddingBagArgs& a = t.args;
    a = {};
    a.size_bytes = sizeof(a);
    a.weight = t.rows.get();
    a.indices = t.indices.wide.data();
    a.offsets = t.offsets.wide.data();
    a.weight_shape[0] = 10;
    a.weight_shape[1] = 4;
    a.indices_shape[0] = 600;
    a.num_offsets = 201;
    a.max_norm = std::numeric_limits<double>::infinity();
    a.norm_type = 2;
    a.padding_idx = kNoPadding;
    a.index_type = a.offset_type = kInt64;
    a.indices_rank = 1;
    a.include_last_offset = 1;
    c->args.push_back(a);
  }
  if (layout == kPacked) c->Pack();
  c->call = {sizeof(c->call), c->args.data(), 3, nullptr, layout == kPacked};
}

// The error after a change of a plain case.
template <class Change>
void ExpectInvalidAfter(Layout layout, const char* expected, Change change) {
  Case c;
  Plain(layout, &c);
  change(&c);
  ExpectInvalid(&c, expected);
}

void TestInvalidArguments() {
  ExpectInvalidAfter(kRagged, "size_bytes = 8 is not 40", [](Case* c) { c->call.size_bytes = 8; });
  ExpectInvalidAfter(kRagged, "num_tables = 0 must be >= 1",
                     [](Case* c) { c->call.num_tables = 0; });
  ExpectInvalidAfter(kRagged, "tables is missing", [](Case* c) { c->call.tables = nullptr; });
  ExpectInvalidAfter(kRagged, "packed = 2 is not 0 or 1", [](Case* c) { c->call.packed = 2; });
  ExpectInvalidAfter(kRagged, "table 1: indices[7] = -1 is outside [0, 10)", [](Case* c) {
    c->tables[1].indices.wide[7] = -1;
    c->tables[1].indices.wide[500] = 99;
    c->tables[2].indices.wide[0] = 99;
  });
  ExpectInvalidAfter(kPacked, "table 2: indices[1201] = 10 is outside [0, 10)", [](Case* c) {
    c->all.indices.wide[1201] = 10;
    c->all.indices.wide[1300] = 77;
  });
  ExpectInvalidAfter(kRagged, "table 2: offsets[0] = 1 must be 0",
                     [](Case* c) { c->tables[2].offsets.wide[0] = 1; });
  ExpectInvalidAfter(kPacked, "offsets[0] = 1 must be 0",
                     [](Case* c) { c->all.offsets.wide[0] = 1; });
  ExpectInvalidAfter(kPacked,
                     "offsets[300] = 5 is below offsets[299] = 897: offsets must not decrease",
                     [](Case* c) { c->all.offsets.wide[300] = 5; });
  ExpectInvalidAfter(kPacked, "offsets[600] = 1801 is past the number of indices, 1800",
                     [](Case* c) { c->all.offsets.wide[600] = 1801; });
  ExpectInvalidAfter(kPacked, "offsets has 600 entries, which are not 3 * B + 1",
                     [](Case* c) { c->args[0].num_offsets = 600; });
  ExpectInvalidAfter(kPacked,
                     "packed needs indices_rank = 1 and include_last_offset = 1, got 1 and 0",
                     [](Case* c) { c->args[0].include_last_offset = 0; });
  ExpectInvalidAfter(kRagged, "table 1 has 199 bags, table 0 has 200: they must be equal",
                     [](Case* c) { c->args[1].num_offsets = 200; });
  ExpectInvalidAfter(kRagged, "table 2: mode = 4 is not 0 (sum), 1 (mean), 2 (max) or 3 (sqrtn)",
                     [](Case* c) { c->args[2].mode = 4; });
  ExpectInvalidAfter(kRagged, "table 1: output_type = 3, table 0 has 0: they must be equal",
                     [](Case* c) { c->args[1].dtype = c->args[1].output_type = kFloat64; });
  ExpectInvalidAfter(kRagged, "table 2: padding_idx = 10 is outside [-10, 10), the rows of weight",
                     [](Case* c) { c->args[2].padding_idx = 10; });
  ExpectInvalidAfter(kRagged, "table 1: the columns of all tables are more than an output can have",
                     [](Case* c) {
                       c->args[0].weight_shape[0] = c->args[1].weight_shape[0] = 0;
                       c->args[0].weight_shape[1] = c->args[1].weight_shape[1] = INT64_MAX / 16 + 1;
                     });
}

// More work than is done at once, on a host that does none.
void TestHostThatFails() {
  Case c;
  Plain(kRagged, &c);
  c.bags = 20000;
  for (size_t t = 0; t < 3; ++t) {
    c.tables[t].offsets.wide.assign(20001, 0);
    c.args[t].offsets = c.tables[t].offsets.wide.data();
    c.args[t].num_offsets = 20001;
  }
  std::unique_ptr<char[]> out;
  const Status status = c.Run(Isas()[0], {RunNothing, nullptr}, &out);
  CHECK(status.code == Code::kInternal, "code %d", static_cast<int>(status.code));
}

}  // namespace
}  // namespace lucid

int main() {
  lucid::TestBits();
  lucid::TestInvalidArguments();
  lucid::TestHostThatFails();
  std::printf("%lld checks, %d failures\n", static_cast<long long>(lucid::g_checks),
              lucid::g_failures);
  return lucid::g_failures != 0;
}
