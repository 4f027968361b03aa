// Random calls of the kernels by their C interface. fuzz/kernels.py compiles and runs it.
//
// Every call is compared with a reference that is written from the contract and shares no code with
// the kernels (reference.h): each result must lie between two bounds. Where the contract tells the
// order of additions, the bits are compared too. All instruction sets and 1 to 4 threads must give
// the same bits. Calls that the contract forbids must be rejected, with the right text.
//
// Every array that the library gets is followed and preceded by a page that nobody may touch, and
// it ends (or begins) right at that page. Inputs lie in memory that the library cannot write to: it
// is mapped a second time for this program.
//
// Case N of a seed is always the same: --seed S --first N --cases 1 runs one again. A failure is
// printed with all of its call, and the exit code is 1. --plant makes a fault of a kind that must
// be found, between the kernels and this program (tests/test_fuzz_kernels.py).
#include <dlfcn.h>
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "c_api.h"
#include "guarded.h"
#include "numbers.h"
#include "reference.h"

// A sanitizer calls it before it ends the process, where there is one.
extern "C" void __sanitizer_set_death_callback(void (*callback)()) __attribute__((weak));

using namespace fuzz;

namespace {

// ---- The library

struct Api {
  decltype(&lucid_onnx_version) version;
  decltype(&lucid_isa_count) isa_count;
  decltype(&lucid_isa_name) isa_name;
  decltype(&lucid_isa_supported) isa_supported;
  decltype(&lucid_table_plan) table_plan;
  decltype(&lucid_joined_table_plan) joined_table_plan;
  decltype(&lucid_embedding_bag) bag;
  decltype(&lucid_embedding_bag_grad) grad;
  decltype(&lucid_embedding_bag_grad_entries) grad_entries;
  decltype(&lucid_embedding_bag_collection) collection;
  std::vector<const char*> isas;  // that this machine runs

  void Open(const char* path) {
    void* const library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (!library) {
      std::fprintf(stderr, "%s\n", dlerror());
      std::exit(2);
    }
    const auto find = [&](auto* function, const char* name) {
      *function = reinterpret_cast<std::remove_pointer_t<decltype(function)>>(dlsym(library, name));
      if (!*function) {
        std::fprintf(stderr, "%s: no %s\n", path, name);
        std::exit(2);
      }
    };
    find(&version, "lucid_onnx_version");
    find(&isa_count, "lucid_isa_count");
    find(&isa_name, "lucid_isa_name");
    find(&isa_supported, "lucid_isa_supported");
    find(&table_plan, "lucid_table_plan");
    find(&joined_table_plan, "lucid_joined_table_plan");
    find(&bag, "lucid_embedding_bag");
    find(&grad, "lucid_embedding_bag_grad");
    find(&grad_entries, "lucid_embedding_bag_grad_entries");
    find(&collection, "lucid_embedding_bag_collection");
    for (int i = 0; i < isa_count(); ++i) {
      if (isa_supported(i)) isas.push_back(isa_name(i));
    }
  }
};

Api g_api;

// What --plant does to the calls.
enum class Plant {
  kNone,
  kNumber,       // a number of the output is a little off
  kLastBit,      // one instruction set has another last bit
  kThreads,      // three threads have another last bit
  kNan,          // a NaN with a payload
  kUnwritten,    // the last byte of the output is not written
  kWriteBehind,  // one byte behind the output
  kWriteBefore,
  kWriteInput,
  kReadBehind,  // one byte behind the indices
  kReadBefore,
  kAccepts,  // a bad call is "done"
  kRejects,  // a good call is rejected
  kMessage,  // an error names another position
  kTouches,  // a rejected call writes to its output
  kEntries,  // one entry too many
  kRace,     // two threads write to one place, which only ThreadSanitizer sees
  kHangs,
};
constexpr const char* kPlants[] = {
    "none",         "number",       "last_bit",    "threads",     "nan",         "unwritten",
    "write_behind", "write_before", "write_input", "read_behind", "read_before", "accepts",
    "rejects",      "message",      "touches",     "entries",     "race",        "hangs"};
Plant g_plant = Plant::kNone;

// ---- A case

enum class Kind { kBag, kCollection, kGrad, kPlan };
constexpr const char* kKinds[] = {"embedding_bag", "collection", "gradient", "table plans"};

// How large it may be.
struct Size {
  int64_t bags, length, columns, rows, positions;
  int64_t table_bytes = 0;  // of the first table; 0: what the rows take
};

Size DrawSize(Random* r) {
  const int64_t i = r->Below(4000);
  if (i < 2) return {3000, 9, 12, 5000, 16000};  // several chunks of positions
  if (i < 5) return {600, 9, 260, 700, 2400};    // several tasks of large rows
  if (i < 20) return {3, 3300, 12, 40, 7000};    // several pieces of a bag
  if (i < 200) return {12, 140, 70, 60, 300};    // several groups, several blocks
  if (i < 230) return {4, 4, 1100, 8, 16};       // many columns
  if (i < 240) {
    // Tables that caches do not hold, whose rows are fetched ahead.
    return {12, 60, 300, 100, 400, r->Pick<int64_t>({700, 800, 1100, 5000, 33000, 60000}) << 10};
  }
  return {7, 7, 20, 12, 40};
}

constexpr int kMostTables = 4;

// What is wrong with a call.
enum class Fault {
  kNone,
  kSizeBytes,
  kDtype,
  kIndexType,
  kOffsetType,
  kIndicesRank,
  kMode,
  kNegative,
  kDivisor,
  kWeightsOfMode,
  kMaxNorm,
  kNormType,
  kPadding,
  kNegativeSize,
  kRowStride,
  kScaleStride,
  kNoScale,
  kZeroPointAndBias,
  kOutputType,
  kScaleType,
  kFirstOffset,
  kFallingOffset,
  kOffsetPastEnd,
  kNoOffsets,
  kIndex,
  kIsa,
  kThreads,
  kGradSizeBytes,
  kSparse,
  kByFrequency,
  kWeightsGradOfMode,
  kGradOutputShape,
  kEntries,
  kCollectionSizeBytes,
  kNumTables,
  kNoTables,
  kPacked,
  kOutputTypes,
  kBags,
  kPackedLayout,
  kCount
};

class Fuzzer {
 public:
  Fuzzer() {
    for (int t = 0; t < kMostTables; ++t) tables_.emplace_back(new Table);
  }

  // Draws and runs one case. The text of a failure, or "".
  std::string Run(uint64_t seed, uint64_t number) {
    r_ = Random((seed + 1) * 0xd1342543de82ef95u ^ number * 0x2545f4914f6cdd1du);
    for (int i = 0; i < 3; ++i) r_.Next();
    failure_.clear();
    fault_ = Fault::kNone;
    text_.clear();
    untouched_ = true;
    outputs_.clear();
    grad_ = {};
    collection_ = {};
    bad_isa_ = bad_threads_ = no_tables_ = false;
    size_ = DrawSize(&r_);
    const int64_t i = r_.Below(200);
    kind_ = i < 1 ? Kind::kPlan : i < 100 ? Kind::kBag : i < 135 ? Kind::kCollection : Kind::kGrad;
    if (kind_ == Kind::kPlan) {
      num_tables_ = 0;
      Plans();
      return failure_;
    }
    Draw();
    if (r_.OneIn(12)) DrawFault();
    RunAll();
    return failure_;
  }

  Kind kind() const { return kind_; }
  bool rejected() const { return fault_ != Fault::kNone; }
  int64_t numbers() const { return numbers_; }
  int64_t open() const { return open_; }

  std::string Where(const char* address) const {
    for (const Guarded* g : {&output_, &values_, &rows_, &grad_weights_, &grad_output_, &message_,
                             &args_, &table_args_}) {
      const std::string text = g->Where(address);
      if (!text.empty()) return text;
    }
    for (const auto& t : tables_) {
      for (const Guarded* g :
           {&t->weight, &t->indices, &t->offsets, &t->weights, &t->scale, &t->second}) {
        const std::string text = g->Where(address);
        if (!text.empty()) return text;
      }
    }
    return "none of the call's arrays";
  }

  // The call, as far as it is short.
  void Describe(FILE* to) const {
    std::fprintf(to, "%s, fault %d\n", kKinds[static_cast<int>(kind_)], static_cast<int>(fault_));
    if (kind_ == Kind::kCollection) {
      std::fprintf(to, "num_tables %lld, packed %lld\n", Long(collection_.num_tables),
                   Long(collection_.packed));
    }
    if (kind_ == Kind::kGrad) {
      std::fprintf(
          to,
          "sparse %d, scale_grad_by_freq %d, grad_per_sample_weights %d, num_entries %lld, "
          "grad_output_shape [%lld, %lld]\n",
          grad_.sparse, grad_.scale_grad_by_freq, grad_.grad_per_sample_weights != nullptr,
          Long(grad_.num_entries), Long(grad_.grad_output_shape[0]),
          Long(grad_.grad_output_shape[1]));
      DescribeNumbers(
          to, "grad_output", tables_[0]->args.output_type, grad_output_.ours(),
          static_cast<int64_t>(grad_output_.bytes()) / SizeOf(tables_[0]->args.output_type & 3));
    }
    for (int t = 0; t < num_tables_; ++t) DescribeTable(to, *tables_[static_cast<size_t>(t)]);
  }

 private:
  static long long Long(int64_t x) { return x; }

  void Fail(const char* format, ...) __attribute__((format(printf, 2, 3))) {
    if (!failure_.empty()) return;
    char text[600];
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(text, sizeof(text), format, arguments);
    va_end(arguments);
    failure_ = text;
  }

  static void DescribeNumbers(FILE* to, const char* name, int32_t dtype, const char* base,
                              int64_t count) {
    std::fprintf(to, "  %s:", name);
    for (int64_t i = 0; i < std::min<int64_t>(count, 400); ++i) {
      std::fprintf(to, " %.17g", Load(dtype, base, i));
    }
    std::fprintf(to, count > 400 ? " ... (%lld)\n" : "\n", Long(count));
  }

  static void DescribeTable(FILE* to, const Table& t) {
    const EmbeddingBagArgs& a = t.args;
    std::fprintf(to,
                 "table: weight [%lld, %lld], dtype %d, output_type %d, row_stride %d, mode %d, "
                 "max_norm %.17g, "
                 "norm_type %.17g, padding_idx %lld, negative %d, divisor %d, scale_type %d, "
                 "scale_stride %d, %s\n"
                 "  indices [%lld, %lld], rank %d, index_type %d, offsets [%lld], offset_type %d, "
                 "include_last_offset %d\n  offsets of the bags:",
                 Long(a.weight_shape[0]), Long(a.weight_shape[1]), a.dtype, a.output_type,
                 a.row_stride, a.mode, a.max_norm, a.norm_type, Long(a.padding_idx), a.negative,
                 a.divisor, a.scale_type, a.scale_stride,
                 a.zero_point ? "with zero_point"
                 : a.bias     ? "with bias"
                              : "no second number",
                 Long(a.indices_shape[0]), Long(a.indices_shape[1]), a.indices_rank, a.index_type,
                 Long(a.num_offsets), a.offset_type, a.include_last_offset);
    for (size_t i = 0; i < std::min<size_t>(t.begin.size(), 100); ++i) {
      std::fprintf(to, " %lld", Long(t.begin[i]));
    }
    std::fprintf(to, "\n  indices:");
    for (size_t i = 0; i < std::min<size_t>(t.index.size(), 400); ++i) {
      std::fprintf(to, " %lld", Long(t.index[i]));
    }
    std::fprintf(to, "\n");
    if (t.sample_weights) {
      DescribeNumbers(to, "per_sample_weights", a.output_type, t.sample_weights, t.positions());
    }
    if (t.rows() * t.columns() > 400) return;
    for (int64_t row = 0; row < t.rows(); ++row) {
      std::fprintf(to, "  row %lld:", Long(row));
      for (int64_t c = 0; c < t.columns(); ++c) {
        if (!IsQuantized(a.dtype)) {
          std::fprintf(to, " %.17g", Load(a.dtype, t.weight.ours() + row * t.stride, c));
        } else {
          std::fprintf(to, " %02x",
                       static_cast<unsigned char>(
                           t.weight.ours()[row * t.stride + (IsNibble(a.dtype) ? c / 2 : c)]));
        }
      }
      if (IsQuantized(a.dtype) && t.scales) {
        std::fprintf(to, "  scale %.17g", Load(a.scale_type, t.scales + row * a.scale_stride, 0));
        if (t.seconds) {
          std::fprintf(to, ", %.17g", Load(a.scale_type, t.seconds + row * a.scale_stride, 0));
        }
      }
      std::fprintf(to, "\n");
    }
  }

  // ---- Drawing

  // What does not depend on the bags.
  void DrawRows(Table* t, int32_t output_type) {
    EmbeddingBagArgs& a = t->args;
    a = {};
    a.size_bytes = sizeof(EmbeddingBagArgs);
    const bool quantized = kind_ != Kind::kGrad && output_type <= kFloat16 && r_.OneIn(2);
    a.dtype = quantized ? kInt8 + static_cast<int32_t>(r_.Below(4)) : output_type;
    a.output_type = output_type;
    int64_t rows = r_.OneIn(30) ? 0 : 1 + r_.Below(size_.rows);
    int64_t columns = 1 + r_.Below(size_.columns);
    if (r_.OneIn(5)) {
      columns = std::min<int64_t>(
          size_.columns + 2, r_.Pick<int64_t>({0,  1,  2,  3,  4,  7,   8,   9,   15,  16,  17, 31,
                                               32, 33, 63, 64, 65, 127, 128, 129, 256, 257, 512}));
    }
    const int64_t row_bytes = RowBytes(a.dtype, columns);
    const bool large = t == tables_[0].get() && size_.table_bytes > 0 && row_bytes > 0;
    if (large) rows = std::min<int64_t>(200000, size_.table_bytes / (row_bytes + 32) + 1);
    a.weight_shape[0] = rows;
    a.weight_shape[1] = columns;
    t->stride = row_bytes;
    // A joined table has its scales behind each row, as a session makes it.
    const bool second = quantized && r_.OneIn(2);
    a.scale_type = quantized && r_.OneIn(2) ? kFloat16 : kFloat32;
    const int64_t scale_bytes = SizeOf(a.scale_type);
    const bool joined = quantized && r_.OneIn(3);
    if (joined) {
      t->stride += scale_bytes * (second ? 2 : 1) + (r_.OneIn(4) ? r_.Below(20) : 0);
    } else if (r_.OneIn(6)) {
      t->stride += 1 + r_.Below(20);
    }
    if (t->stride != row_bytes || (t->stride > 0 && r_.OneIn(4))) {
      a.row_stride = static_cast<int32_t>(t->stride);
    }
    // The last row has nothing behind it but its scales.
    const int64_t last = joined ? row_bytes + scale_bytes * (second ? 2 : 1) : row_bytes;
    t->weight.Place(&r_, rows == 0 ? 0 : (rows - 1) * t->stride + last);
    a.weight = t->weight.theirs();
    t->scales = t->seconds = nullptr;
    if (quantized) {
      char *scale, *other = nullptr;
      if (joined) {
        a.scale_stride = static_cast<int32_t>(t->stride);
        scale = t->weight.ours() + row_bytes;
        a.scale = t->weight.theirs() + row_bytes;
        if (second) other = scale + scale_bytes;
        a.bias = second ? t->weight.theirs() + row_bytes + scale_bytes : nullptr;
      } else {
        const int64_t stride = scale_bytes + (r_.OneIn(5) ? r_.Below(10) : 0);
        a.scale_stride = static_cast<int32_t>(stride);
        const int64_t bytes = rows == 0 ? 0 : (rows - 1) * stride + scale_bytes;
        scale = t->scale.Place(&r_, bytes);
        a.scale = t->scale.theirs();
        if (second) {
          other = t->second.Place(&r_, bytes);
          a.bias = t->second.theirs();
        }
        // (The arrays of no rows have no address that matters.)
        if (rows == 0 && r_.OneIn(2)) a.scale = nullptr;
      }
      if (second && r_.OneIn(2)) std::swap(a.zero_point, a.bias);
      t->scales = scale;
      t->seconds = other;
    }
    t->flavour = DrawFlavour(&r_);
    t->scale_flavour = DrawFlavour(&r_);
    t->second_flavour = DrawFlavour(&r_);
    // Of a large table, the rows that are looked up.
    for (int64_t row = 0; row < rows && !large; ++row) DrawRow(t, row);
    a.mode = static_cast<int32_t>(r_.Below(4));
    a.negative = r_.OneIn(3);
    a.divisor = r_.OneIn(3) ? kNoDivisor : static_cast<int32_t>(1 + r_.Below(2));
    a.max_norm = kInfinity;
    a.norm_type = 2;
    if (r_.OneIn(4)) {
      a.max_norm =
          r_.Pick<double>({0, 0x1p-149, 1e-7, 0.1, 1, 1, 2.5, 8, 300, 3e38, FLT_MAX, 1e300});
      if (r_.OneIn(3)) a.max_norm = r_.Unit() * 4;
      a.norm_type =
          r_.Pick<double>({2, 2, 2, 1, 1, kInfinity, kInfinity, 0.5, 3, 1.5, 7, 0.01, 60});
    }
    a.padding_idx = INT64_MIN;
    t->padded = -1;
    if (rows > 0 && r_.OneIn(3)) {
      t->padded = r_.Below(rows);
      a.padding_idx = r_.OneIn(2) ? t->padded : t->padded - rows;
    }
    a.output = const_cast<char*>(output_.nowhere());
  }

  void DrawRow(Table* t, int64_t row) {
    const EmbeddingBagArgs& a = t->args;
    const int64_t row_bytes = RowBytes(a.dtype, t->columns());
    char* const at = t->weight.ours() + row * t->stride;
    if (row + 1 < t->rows()) {
      std::memset(at + row_bytes, 0xff, static_cast<size_t>(t->stride - row_bytes));
    }
    if (!IsQuantized(a.dtype)) return DrawNumbers(&r_, a.dtype, t->flavour, at, t->columns());
    DrawBytes(at, row_bytes);
    const int64_t offset = row * a.scale_stride;
    DrawNumbers(&r_, a.scale_type, t->scale_flavour, const_cast<char*>(t->scales) + offset, 1);
    if (!t->seconds) return;
    char* const second = const_cast<char*>(t->seconds) + offset;
    if (a.zero_point && !r_.OneIn(3)) {
      Store(a.scale_type, second, 0, static_cast<double>(r_.Between(-128, 255)));
    } else {
      DrawNumbers(&r_, a.scale_type, t->second_flavour, second, 1);
    }
  }

  void DrawBytes(char* to, int64_t count) {
    for (int64_t i = 0; i < count; i += 8) {
      const uint64_t bits = r_.Next();
      std::memcpy(to + i, &bits, static_cast<size_t>(std::min<int64_t>(8, count - i)));
    }
  }

  int64_t DrawLength() {
    const int64_t i = r_.Below(8);
    if (i == 0) return 0;
    if (i == 1) return 1;
    if (size_.length > 100 && i < 5) {
      return std::min(size_.length, r_.Pick<int64_t>({63, 64, 65, 127, 128, 129, 1023, 1024, 1025,
                                                      2047, 2048, 2049, 3100}));
    }
    return r_.Below(size_.length + 1);
  }

  // Cuts the positions into so many bags; -1: any number. packed: for several tables.
  void DrawBags(Table* t, int64_t bags, bool packed) {
    EmbeddingBagArgs& a = t->args;
    const bool any = bags < 0;
    if (any) bags = r_.OneIn(25) ? 0 : 1 + r_.Below(size_.bags);
    a.index_type = static_cast<int32_t>(r_.Below(2));
    a.offset_type = static_cast<int32_t>(r_.Below(2));
    a.indices_rank = !packed && r_.OneIn(4) ? 2 : 1;
    a.include_last_offset = packed || r_.OneIn(2);
    t->begin.assign(1, 0);
    int64_t positions = 0;
    if (a.indices_rank == 2) {
      int64_t length = DrawLength();
      if (length * bags > size_.positions) {
        length = any && size_.length > 1000 ? length : size_.positions / bags;
        if (any) bags = std::max<int64_t>(1, size_.positions / std::max<int64_t>(1, length));
      }
      for (int64_t i = 0; i < bags; ++i) t->begin.push_back(positions += length);
      a.indices_shape[0] = bags;
      a.indices_shape[1] = length;
      a.num_offsets = r_.Below(3);  // unused, as the offsets are
      a.offsets = t->offsets.nowhere();
    } else {
      for (int64_t i = 0; i < bags; ++i) {
        positions += std::min(DrawLength(), size_.positions - positions);
        t->begin.push_back(positions);
      }
      const bool behind = a.include_last_offset && r_.OneIn(4);
      a.indices_shape[0] = positions + (behind ? r_.Below(5) : 0);
      a.indices_shape[1] = r_.OneIn(8) ? 77 : 0;  // means nothing
      if (!a.include_last_offset && bags == 0) a.indices_shape[0] = 0;
      a.num_offsets = bags + a.include_last_offset;
      const int64_t bytes = a.offset_type == kInt64 ? 8 : 4;
      t->offsets.Place(&r_, a.num_offsets * bytes);
      a.offsets = t->offsets.theirs();
      for (int64_t i = 0; i < a.num_offsets; ++i) {
        SetOffset(t, i, t->begin[static_cast<size_t>(i)]);
      }
    }
    t->num_bags = bags;
    const int64_t count = a.indices_rank == 2 ? positions : a.indices_shape[0];
    t->index.assign(static_cast<size_t>(count), 0);
    t->indices.Place(&r_, count * (a.index_type == kInt64 ? 8 : 4));
    a.indices = t->indices.theirs();
    // What belongs to no bag is never read.
    for (int64_t k = positions; k < count; ++k) {
      SetIndex(t, k, r_.Pick<int64_t>({-1, INT32_MIN, INT32_MAX, 0}));
    }
    if (count == 0 && r_.OneIn(8)) a.indices = nullptr;
  }

  void DrawWeights(Table* t) {
    t->weights.Place(&r_, t->positions() * SizeOf(t->args.output_type));
    DrawNumbers(&r_, t->args.output_type, DrawFlavour(&r_), t->weights.ours(), t->positions());
    t->args.per_sample_weights = t->weights.theirs();
    t->sample_weights = t->weights.ours();
  }

  static bool TakesWeights(const EmbeddingBagArgs& a) {
    return a.mode == kSum || (a.mode != kMax && a.divisor != kNoDivisor);
  }

  static void SetOffset(Table* t, int64_t i, int64_t offset) {
    SetInteger(t->offsets.ours(), t->args.offset_type, i, offset);
  }
  static int64_t GetOffset(const Table& t, int64_t i) {
    if (t.args.offset_type == kInt64) {
      int64_t offset;
      std::memcpy(&offset, t.offsets.ours() + i * 8, 8);
      return offset;
    }
    int32_t offset;
    std::memcpy(&offset, t.offsets.ours() + i * 4, 4);
    return offset;
  }
  static void SetIndex(Table* t, int64_t k, int64_t index) {
    SetInteger(t->indices.ours(), t->args.index_type, k, index);
    t->index[static_cast<size_t>(k)] = index;
  }
  static void SetInteger(char* base, int32_t type, int64_t i, int64_t value) {
    if (type == kInt64) {
      std::memcpy(base + i * 8, &value, 8);
    } else {
      const int32_t narrow = static_cast<int32_t>(value);
      std::memcpy(base + i * 4, &narrow, 4);
    }
  }

  // The indices of the positions [begin, end), of rows of the table `of`.
  void DrawIndices(Table* t, const Table& of, int64_t begin, int64_t end) {
    const int64_t rows = of.rows();
    const bool few = r_.OneIn(4);
    for (int64_t k = begin; k < end; ++k) {
      int64_t row = rows == 0 ? 0 : few ? r_.Below(std::min<int64_t>(rows, 2)) : r_.Below(rows);
      if (of.padded >= 0 && r_.OneIn(5)) row = of.padded;
      if (of.args.negative && (rows == 0 || r_.OneIn(5))) {
        row = r_.Pick<int64_t>({-1, -1, -rows - 1, INT32_MIN, INT64_MIN});
        if (t->args.index_type == kInt32) row = std::max<int64_t>(row, INT32_MIN);
      }
      SetIndex(t, k, row);
    }
    if (end > begin && rows > 0 && r_.OneIn(3)) SetIndex(t, r_.Between(begin, end - 1), rows - 1);
    if (&of == tables_[0].get() && size_.table_bytes > 0 && rows > 0) {
      for (int64_t k = begin; k < end; ++k) {
        const int64_t row = t->index[static_cast<size_t>(k)];
        if (row >= 0) DrawRow(tables_[0].get(), row);
      }
    }
    // Every index into a table without rows is a bad one.
    if (end > begin && rows == 0 && !of.args.negative && fault_ == Fault::kNone) {
      IsBadIndex(t, of, begin);
    }
  }

  // The index of that position is outside the table.
  void IsBadIndex(Table* t, const Table& of, int64_t position) {
    fault_ = Fault::kIndex;
    untouched_ = false;
    char text[120];
    const long long index = t->index[static_cast<size_t>(position)], rows = of.rows();
    if (t->args.indices_rank == 1) {
      std::snprintf(text, sizeof(text), "indices[%lld] = %lld is outside [0, %lld)", Long(position),
                    index, rows);
    } else {
      const int64_t length = t->args.indices_shape[1];
      std::snprintf(text, sizeof(text), "indices[%lld, %lld] = %lld is outside [0, %lld)",
                    Long(position / length), Long(position % length), index, rows);
    }
    text_ = text;
  }

  void Draw() {
    num_tables_ = kind_ == Kind::kCollection ? static_cast<int>(r_.Between(1, kMostTables)) : 1;
    const bool packed = kind_ == Kind::kCollection && r_.OneIn(2);
    const int32_t output_type = static_cast<int32_t>(r_.Below(4));
    for (int t = 0; t < num_tables_; ++t) {
      DrawRows(tables_[static_cast<size_t>(t)].get(), output_type);
      tables_[static_cast<size_t>(t)]->sample_weights = nullptr;
    }
    Table* const first = tables_[0].get();
    if (packed) {
      int64_t bags = r_.OneIn(25) ? 0 : 1 + r_.Below(size_.bags);
      DrawBags(first, bags * num_tables_, true);
      const std::vector<int64_t> begin = first->begin;
      for (int t = 0; t < num_tables_; ++t) {
        DrawIndices(first, *tables_[static_cast<size_t>(t)], begin[static_cast<size_t>(t * bags)],
                    begin[static_cast<size_t>((t + 1) * bags)]);
      }
      if (r_.OneIn(3)) {
        for (int t = 0; t < num_tables_; ++t) {
          EmbeddingBagArgs& a = tables_[static_cast<size_t>(t)]->args;
          if (!TakesWeights(a)) a.mode = kSum;
        }
        DrawWeights(first);
      }
      for (int t = 0; t < num_tables_; ++t) {
        Table* const table = tables_[static_cast<size_t>(t)].get();
        table->num_bags = bags;
        table->begin.assign(begin.begin() + t * bags, begin.begin() + (t + 1) * bags + 1);
        if (t == 0) continue;
        table->index = first->index;
        table->sample_weights = first->sample_weights;
        EmbeddingBagArgs& a = table->args;  // none of this is looked at
        a.indices = a.offsets = a.per_sample_weights = table->indices.nowhere();
        a.indices_shape[0] = a.num_offsets = -5;
        a.index_type = a.offset_type = a.indices_rank = 99;
      }
    } else {
      for (int t = 0; t < num_tables_; ++t) {
        Table* const table = tables_[static_cast<size_t>(t)].get();
        DrawBags(table, t == 0 ? -1 : first->num_bags, false);
        DrawIndices(table, *table, 0, table->begin.back());
        if (TakesWeights(table->args) && r_.OneIn(2)) DrawWeights(table);
      }
    }
    if (kind_ == Kind::kGrad) DrawGrad();
    columns_ = 0;
    for (int t = 0; t < num_tables_; ++t) columns_ += tables_[static_cast<size_t>(t)]->columns();
    if (kind_ == Kind::kCollection) {
      collection_.size_bytes = sizeof(collection_);
      collection_.num_tables = num_tables_;
      collection_.packed = packed;
    }
    if (kind_ != Kind::kGrad) {
      output_.Place(&r_, first->num_bags * RowBytes(output_type, columns_));
      outputs_.push_back(&output_);
    }
  }

  void DrawGrad() {
    Table* const t = tables_[0].get();
    EmbeddingBagGradArgs& g = grad_;
    const int32_t dtype = t->args.dtype;
    g.size_bytes = sizeof(g);
    g.sparse = r_.OneIn(2) || t->rows() * t->columns() > 200000;
    g.scale_grad_by_freq = r_.OneIn(3);
    g.grad_output_shape[0] = t->num_bags;
    g.grad_output_shape[1] = t->columns();
    grad_output_.Place(&r_, t->num_bags * RowBytes(dtype, t->columns()));
    g.grad_output = grad_output_.theirs();
    DrawNumbers(&r_, dtype, DrawFlavour(&r_), grad_output_.ours(), t->num_bags * t->columns());
    g.num_entries = 0;
    for (int64_t k = 0; k < t->begin.back(); ++k) {
      g.num_entries += !t->Skips(t->index[static_cast<size_t>(k)]);
    }
    const bool of_weights =
        (t->args.mode == kSum || (t->sample_weights && TakesWeights(t->args))) && r_.OneIn(2);
    // Outputs that the call does not use are nowhere.
    g.grad_weight = g.values = output_.nowhere();
    g.rows = reinterpret_cast<int64_t*>(output_.nowhere());
    if (g.sparse) {
      rows_.Place(&r_, g.num_entries * 8, 8);
      g.rows = reinterpret_cast<int64_t*>(rows_.theirs());
      values_.Place(&r_, g.num_entries * RowBytes(dtype, t->columns()));
      g.values = values_.theirs();
      outputs_ = {&rows_, &values_};
    } else {
      output_.Place(&r_, t->rows() * RowBytes(dtype, t->columns()));
      g.grad_weight = output_.theirs();
      outputs_ = {&output_};
    }
    if (of_weights) {
      grad_weights_.Place(&r_, t->positions() * SizeOf(dtype));
      g.grad_per_sample_weights = grad_weights_.theirs();
      outputs_.push_back(&grad_weights_);
    }
    // "weight is read only in mode max and for grad_per_sample_weights"
    if (t->args.mode != kMax && !of_weights && r_.OneIn(2)) t->args.weight = output_.nowhere();
  }

  // Makes one thing wrong, if this call has it.
  void DrawFault() {
    if (fault_ != Fault::kNone) return;
    const Fault fault = static_cast<Fault>(1 + r_.Below(static_cast<int64_t>(Fault::kCount) - 1));
    const bool packed = collection_.packed != 0;
    const size_t number = static_cast<size_t>(r_.Below(num_tables_));
    Table* const t = tables_[number].get();
    Table* const layout = packed ? tables_[0].get() : t;
    EmbeddingBagArgs& a = t->args;
    EmbeddingBagArgs& l = layout->args;
    const bool quantized = IsQuantized(a.dtype);
    const bool is_grad = kind_ == Kind::kGrad, is_collection = kind_ == Kind::kCollection;
    const int64_t n = l.indices_shape[0];
    const auto any = [&] {
      return static_cast<int32_t>(r_.Pick<int64_t>({-1, 100, INT32_MAX, INT32_MIN}));
    };
    switch (fault) {
      case Fault::kSizeBytes:
        a.size_bytes = r_.Pick<int64_t>({0, 8, a.size_bytes + 8, -1});
        text_ = "size_bytes";
        break;
      case Fault::kDtype:
        if (!is_grad || r_.OneIn(2)) {
          a.dtype = any();
          text_ = "dtype = ";
        } else {
          a.dtype = kUint8;
          a.output_type = kFloat32;
          a.scale = output_.nowhere();
          a.scale_stride = 4;
          a.row_stride = 0;
          text_ = "quantized";
        }
        break;
      case Fault::kIndexType:
        l.index_type = any();
        text_ = "index_type = ";
        break;
      case Fault::kOffsetType:
        if (l.indices_rank != 1) return;
        l.offset_type = any();
        text_ = "offset_type = ";
        break;
      case Fault::kIndicesRank:
        l.indices_rank = r_.OneIn(2) ? 0 : 3;
        text_ = "indices_rank = ";
        break;
      case Fault::kMode:
        a.mode = any();
        text_ = "mode = ";
        break;
      case Fault::kNegative:
        a.negative = any();
        text_ = "negative = ";
        break;
      case Fault::kDivisor:
        a.divisor = any();
        text_ = "divisor = ";
        break;
      case Fault::kWeightsOfMode:
        if (!layout->sample_weights) return;
        a.mode = r_.Pick<int32_t>({kMean, kMax, kSqrtn});
        a.divisor = kNoDivisor;
        text_ = "per_sample_weights";
        break;
      case Fault::kMaxNorm:
        a.max_norm = r_.Pick<double>({-1, -0x1p-1074, -kInfinity, static_cast<double>(NAN)});
        text_ = "max_norm = ";
        break;
      case Fault::kNormType:
        a.norm_type = r_.Pick<double>({-1, 0, -0.0, -kInfinity, static_cast<double>(NAN)});
        text_ = "norm_type = ";
        break;
      case Fault::kPadding:
        a.padding_idx = r_.Pick<int64_t>({t->rows(), -t->rows() - 1, INT64_MAX, INT64_MIN + 1});
        text_ = "padding_idx = ";
        break;
      case Fault::kNegativeSize:
        if (r_.OneIn(2)) {
          a.weight_shape[r_.Below(2)] = r_.OneIn(2) ? -1 : INT64_MIN;
        } else if (l.indices_rank == 1 && r_.OneIn(2)) {
          l.num_offsets = r_.OneIn(2) ? -1 : INT64_MIN;
        } else {
          l.indices_shape[r_.Below(l.indices_rank)] = r_.OneIn(2) ? -1 : INT64_MIN;
        }
        text_ = "negative";
        break;
      case Fault::kRowStride:
        if (t->columns() == 0) return;
        a.row_stride = static_cast<int32_t>(RowBytes(a.dtype, t->columns()) - 1);
        if (a.row_stride == 0 || r_.OneIn(2)) a.row_stride = -1;
        text_ = "row_stride = ";
        break;
      case Fault::kScaleStride:
        if (!quantized) return;
        a.scale_stride = r_.OneIn(2) ? static_cast<int32_t>(SizeOf(a.scale_type)) - 1 : any();
        if (a.scale_stride > 4) a.scale_stride = 0;
        text_ = "scale_stride = ";
        break;
      case Fault::kNoScale:
        if (!quantized || t->rows() == 0) return;
        a.scale = nullptr;
        text_ = "scale is missing";
        break;
      case Fault::kZeroPointAndBias:
        if (!quantized || (!a.zero_point && !a.bias)) return;
        a.zero_point = a.bias = a.zero_point ? a.zero_point : a.bias;
        text_ = "mutually exclusive";
        break;
      case Fault::kOutputType:
        a.output_type = quantized ? any() : (a.output_type + 1) % 4;
        text_ = "output_type = ";
        break;
      case Fault::kScaleType:
        if (!quantized) return;
        a.scale_type = any();
        text_ = "scale_type = ";
        break;
      case Fault::kFirstOffset:
        if (l.indices_rank != 1 || l.num_offsets == 0) return;
        SetOffset(layout, 0, r_.OneIn(2) ? 1 : -1);
        text_ = "offsets[0] = ";
        break;
      case Fault::kFallingOffset: {
        if (l.indices_rank != 1 || l.num_offsets < 2) return;
        const int64_t i = 1 + r_.Below(l.num_offsets - 1);
        int64_t offset = GetOffset(*layout, i - 1) - 1 - r_.Below(3);
        if (r_.OneIn(3)) offset = l.offset_type == kInt64 ? INT64_MIN : INT32_MIN;
        SetOffset(layout, i, offset);
        Text("offsets[%lld] = %lld is below", i, offset);
        break;
      }
      case Fault::kOffsetPastEnd: {
        if (l.indices_rank != 1 || l.num_offsets < 2) return;
        int64_t offset = n + 1 + r_.Below(3);
        if (r_.OneIn(3)) offset = l.offset_type == kInt64 ? INT64_MAX : INT32_MAX;
        const int64_t i = 1 + r_.Below(l.num_offsets - 1);
        for (int64_t j = i; j < l.num_offsets; ++j) SetOffset(layout, j, offset);
        Text("offsets[%lld] = %lld is past", i, offset);
        break;
      }
      case Fault::kNoOffsets:
        if (l.indices_rank != 1 || (n == 0 && !l.include_last_offset)) return;
        l.num_offsets = 0;
        text_ = "offsets is empty";
        break;
      case Fault::kIndex: {
        // One or several, in the bags of one table. (Several tables: the first one is told.)
        const int64_t begin = t->begin.front(), end = t->begin.back();
        if (begin == end) return;
        int64_t lowest = end;
        for (int64_t times = 1 + r_.Below(3); times > 0; --times) {
          const int64_t k = r_.Between(begin, end - 1);
          const int64_t rows = t->rows();
          if (a.negative) {
            SetIndex(layout, k, r_.OneIn(2) ? rows : INT32_MAX);
            lowest = std::min(lowest, k);
            continue;
          }
          SetIndex(layout, k,
                   l.index_type == kInt64
                       ? r_.Pick<int64_t>(
                             {-1, rows, rows + 1, INT64_MIN, INT64_MAX, int64_t{1} << 32, -rows})
                       : r_.Pick<int64_t>({-1, rows, rows + 1, INT32_MIN, INT32_MAX, -rows}));
          if (rows == 0) SetIndex(layout, k, -1);
          lowest = std::min(lowest, k);
        }
        IsBadIndex(layout, *t, lowest);
        break;
      }
      case Fault::kIsa:
        bad_isa_ = true;
        text_ = "";
        break;
      case Fault::kThreads:
        bad_threads_ = true;
        text_ = "num_threads = ";
        break;
      case Fault::kGradSizeBytes:
        if (!is_grad) return;
        grad_.size_bytes = r_.OneIn(2) ? 0 : grad_.size_bytes + 8;
        text_ = "size_bytes";
        break;
      case Fault::kSparse:
        if (!is_grad) return;
        grad_.sparse = r_.OneIn(2) ? 2 : -1;
        text_ = "sparse = ";
        break;
      case Fault::kByFrequency:
        if (!is_grad) return;
        grad_.scale_grad_by_freq = r_.OneIn(2) ? 2 : -1;
        text_ = "scale_grad_by_freq = ";
        break;
      case Fault::kWeightsGradOfMode:
        if (!is_grad || a.mode == kSum || a.per_sample_weights) return;
        a.divisor = kNoDivisor;
        grad_.grad_per_sample_weights = output_.nowhere();
        text_ = "grad_per_sample_weights";
        break;
      case Fault::kGradOutputShape:
        if (!is_grad) return;
        grad_.grad_output_shape[r_.Below(2)] += r_.OneIn(2) ? 1 : -1;
        text_ = "grad_output has shape";
        break;
      case Fault::kEntries:
        if (!is_grad || !grad_.sparse) return;
        grad_.num_entries += r_.OneIn(2) ? 1 : -1;
        text_ = "num_entries = ";
        break;
      case Fault::kCollectionSizeBytes:
        if (!is_collection) return;
        collection_.size_bytes += 8;
        text_ = "size_bytes";
        break;
      case Fault::kNumTables:
        if (!is_collection) return;
        collection_.num_tables = r_.Pick<int64_t>({0, -1, INT64_MIN});
        text_ = "num_tables = ";
        break;
      case Fault::kNoTables:
        if (!is_collection) return;
        no_tables_ = true;
        text_ = "tables is missing";
        break;
      case Fault::kPacked:
        if (!is_collection) return;
        collection_.packed = r_.OneIn(2) ? 2 : -1;
        text_ = "packed = ";
        break;
      case Fault::kOutputTypes:
        if (!is_collection || number == 0 || quantized) return;
        a.dtype = a.output_type = (a.output_type + 1) % 4;
        a.row_stride = 0;
        text_ = "output_type = ";
        break;
      case Fault::kBags:
        if (!is_collection || num_tables_ < 2) return;
        if (packed) {
          // One bag less, at the end.
          if (l.num_offsets < 2) return;
          --l.num_offsets;
          text_ = "offsets has";
        } else {
          if (number == 0 || l.indices_rank != 1 || l.num_offsets < 3) return;
          --l.num_offsets;
          text_ = "bags";
        }
        break;
      case Fault::kPackedLayout:
        if (!packed) return;
        l.include_last_offset = 0;
        text_ = "packed needs";
        break;
      default:
        return;
    }
    fault_ = fault;
  }

  void Text(const char* format, int64_t i, int64_t value) {
    char text[100];
    std::snprintf(text, sizeof(text), format, Long(i), Long(value));
    text_ = text;
  }

  // ---- Running

  void RunAll() {
    PlaceArguments();
    const bool is_grad = kind_ == Kind::kGrad;
    if (is_grad) RunEntries();
    const bool good = fault_ == Fault::kNone;
    const bool all = good && (size_.positions > 40 || r_.OneIn(64));
    const size_t isas = g_api.isas.size();
    const size_t runs = all ? 4 * isas : good || fault_ == Fault::kIndex ? isas : 1;
    const int any_threads = static_cast<int>(r_.Below(4));
    for (size_t run = 0; run < runs && failure_.empty(); ++run) {
      const char* isa = g_api.isas[run % isas];
      const int threads =
          1 + (all ? static_cast<int>(run / isas) : (any_threads + static_cast<int>(run)) % 4);
      RunOnce(run, r_.OneIn(16) ? nullptr : isa, threads);
      if (!failure_.empty()) {
        failure_ += std::string(" (") + isa + ", " + std::to_string(threads) + " threads)";
      }
    }
  }

  void PlaceArguments() {
    if (kind_ == Kind::kBag) {
      EmbeddingBagArgs a = tables_[0]->args;
      a.output = output_.theirs();
      Place(&args_, &a, sizeof(a));
    } else if (kind_ == Kind::kGrad) {
      grad_.forward = tables_[0]->args;
      Place(&args_, &grad_, sizeof(grad_));
    } else {
      std::vector<EmbeddingBagArgs> all;
      for (int t = 0; t < num_tables_; ++t) all.push_back(tables_[static_cast<size_t>(t)]->args);
      Place(&table_args_, all.data(), all.size() * sizeof(all[0]));
      collection_.tables =
          no_tables_ ? nullptr : reinterpret_cast<const EmbeddingBagArgs*>(table_args_.theirs());
      collection_.output = output_.theirs();
      Place(&args_, &collection_, sizeof(collection_));
    }
  }

  void Place(Guarded* to, const void* from, size_t bytes) {
    std::memcpy(to->Place(&r_, static_cast<int64_t>(bytes), 8), from, bytes);
  }

  void PlaceMessage(int pattern) {
    message_.Place(&r_, r_.Pick<int64_t>({0, 1, 16, 300, 300}));
    message_.Fill(pattern);
  }

  // Checks what every call returns. Whether it did its work.
  bool CheckStatus(int status, bool expected, const char* text) {
    const std::string message(message_.ours(), strnlen(message_.ours(), message_.bytes()));
    if (!message_.MarginsAreWhole()) Fail("the message is longer than its buffer");
    if (message_.bytes() > 0 && message.size() == message_.bytes()) Fail("the message has no end");
    const int code = expected ? 0 : 1;
    if (status != code) Fail("status %d, not %d: '%s' (%s)", status, code, message.c_str(), text);
    if (expected ? !message.empty() : message_.bytes() > 1 && message.empty()) {
      Fail("status %d has the message '%s'", status, message.c_str());
    }
    if (!expected && message_.bytes() >= 300 && message.find(text) == std::string::npos) {
      Fail("the message '%s' has no '%s'", message.c_str(), text);
    }
    return status == 0 && failure_.empty();
  }

  void RunEntries() {
    const Table& t = *tables_[0];
    int64_t expected = 0;
    for (int64_t k = 0; k < t.begin.back(); ++k) {
      expected += !t.Skips(t.index[static_cast<size_t>(k)]);
    }
    const bool good = fault_ == Fault::kNone || fault_ == Fault::kIndex || fault_ == Fault::kIsa ||
                      fault_ == Fault::kThreads || fault_ == Fault::kEntries;
    PlaceMessage(0x11);
    count_.Place(&r_, 8, 8);
    count_.Fill(0x22);
    const int status = g_api.grad_entries(
        reinterpret_cast<const EmbeddingBagGradArgs*>(args_.theirs()),
        reinterpret_cast<int64_t*>(count_.theirs()), message_.theirs(), message_.bytes());
    int64_t entries;
    std::memcpy(&entries, count_.ours(), 8);
    entries += g_plant == Plant::kEntries;
    if (!count_.MarginsAreWhole()) Fail("a write beside num_entries");
    if (CheckStatus(status, good, text_.c_str()) && entries != expected) {
      Fail("%lld entries, not %lld", Long(entries), Long(expected));
    }
  }

  int Call(const char* isa, int threads) {
    char* const message = message_.theirs();
    const size_t size = message_.bytes();
    if (bad_isa_) isa = "sse9";
    if (bad_threads_) threads = -static_cast<int>(size & 1);
    switch (kind_) {
      case Kind::kBag:
        return g_api.bag(reinterpret_cast<const EmbeddingBagArgs*>(args_.theirs()), isa, threads,
                         message, size);
      case Kind::kGrad:
        return g_api.grad(reinterpret_cast<const EmbeddingBagGradArgs*>(args_.theirs()), isa,
                          threads, message, size);
      default:
        return g_api.collection(reinterpret_cast<const EmbeddingBagCollectionArgs*>(args_.theirs()),
                                isa, threads, message, size);
    }
  }

  // The call with what --plant does to it.
  int CallPlanted(const char* isa, int threads, int pattern) {
    int status = Call(isa, threads);
    const Guarded& out = *outputs_.back();
    const int32_t dtype = tables_[0]->args.output_type & 3;
    const bool written = status == 0 && out.bytes() > 0 && &out != &rows_;
    char* const last = out.theirs() + out.bytes() - 1;
    switch (g_plant) {
      case Plant::kNumber:
        if (written) Store(dtype, out.theirs(), 0, Load(dtype, out.theirs(), 0) * 1.01);
        break;
      case Plant::kLastBit:
        if (written && isa == g_api.isas.back()) *out.theirs() ^= 1;
        break;
      case Plant::kThreads:
        if (written && threads == 3) *last ^= 1;
        break;
      case Plant::kNan:
        if (written && std::isnan(Load(dtype, out.theirs(), 0))) *out.theirs() ^= 1;
        break;
      case Plant::kUnwritten:
        if (written) *last = static_cast<char>(pattern);
        break;
      case Plant::kWriteBehind:
        last[1] = 0;
        break;
      case Plant::kWriteBefore:
        out.theirs()[-1] = 0;
        break;
      case Plant::kWriteInput:
        *tables_[0]->indices.theirs() = 0;
        break;
      case Plant::kReadBehind:
        sink_ = tables_[0]->indices.theirs()[tables_[0]->indices.bytes()];
        break;
      case Plant::kReadBefore:
        sink_ = tables_[0]->indices.theirs()[-1];
        break;
      case Plant::kAccepts:
        if (status == 1) status = 0;
        break;
      case Plant::kRejects:
        if (status == 0) status = 1;
        break;
      case Plant::kMessage:
        if (char* const at =
                static_cast<char*>(memmem(message_.ours(), message_.bytes(), "indices[", 8))) {
          at[8] ^= 1;  // the position
        }
        break;
      case Plant::kTouches:
        if (status == 1 && out.bytes() > 0) *last = 0;
        break;
      case Plant::kRace: {
        std::thread other([&] { ++raced_; });
        ++raced_;
        other.join();
        break;
      }
      case Plant::kHangs:
        for (;;) pause();
      default:
        break;
    }
    return status;
  }

  void RunOnce(size_t run, const char* isa, int threads) {
    const int pattern = 0xa5 ^ static_cast<int>(run * 0x31 & 0xff);
    for (const Guarded* out : outputs_) out->Fill(pattern);
    PlaceMessage(pattern ^ 0xff);
    const int status = CallPlanted(isa, threads, pattern);
    for (const Guarded* out : outputs_) {
      if (!out->MarginsAreWhole()) Fail("a write beside an output");
    }
    if (!CheckStatus(status, fault_ == Fault::kNone, text_.c_str())) {
      for (const Guarded* out : outputs_) {
        if (untouched_ && !out->IsUntouched()) Fail("a rejected call wrote to its output");
      }
      return;
    }
    first_.resize(3);
    for (size_t i = 0; i < outputs_.size(); ++i) {
      const char* const bytes = outputs_[i]->ours();
      const size_t count = outputs_[i]->bytes();
      if (run == 0) {
        first_[i].assign(bytes, bytes + count);
      } else if (count > 0 && std::memcmp(first_[i].data(), bytes, count) != 0) {
        size_t at = 0;
        while (first_[i][at] == bytes[at]) ++at;
        Fail("byte %zu of output %zu differs from that of %s and the first number of threads", at,
             i, g_api.isas[0]);
      }
    }
    if (run > 0 || !failure_.empty()) return;
    if (kind_ == Kind::kGrad) {
      CheckGradient();
    } else {
      CheckBags();
    }
  }

  // ---- Comparing

  // Number i of an array, which has a name.
  void CheckNumber(const Expected& e, int32_t dtype, const char* base, int64_t i,
                   const char* name) {
    const double x = Load(dtype, base, i);
    ++numbers_;
    open_ += e.anything;
    if (!IsExpected(e, dtype, x)) {
      Fail("%s[%lld] = %.17g, expected %s[%.20Lg, %.20Lg]", name, Long(i), x,
           e.nan ? "NaN, not " : "", e.low, e.high);
    }
    if (std::isnan(x) && !IsTheNan(dtype, base, i)) {
      Fail("%s[%lld] is a NaN with other bits than the one of the contract", name, Long(i));
    }
  }

  // The same, where every operation is known.
  void CheckExact(double expected, int32_t dtype, const char* base, int64_t i, const char* name) {
    char bytes[8];
    Store(dtype, bytes, 0, expected);
    const double rounded = Load(dtype, bytes, 0), x = Load(dtype, base, i);
    if (!(x == rounded || (std::isnan(x) && std::isnan(rounded)))) {
      Fail("%s[%lld] = %.17g, and in the order of the contract %.17g", name, Long(i), x, rounded);
    }
  }

  void CheckBags() {
    const int32_t dtype = tables_[0]->args.output_type;
    int64_t before = 0;
    for (int n = 0; n < num_tables_; ++n) {
      const Table& t = *tables_[static_cast<size_t>(n)];
      reference_.Begin(t);
      const bool exact = !IsQuantized(t.args.dtype) && !reference_.clips() &&
                         (t.args.mode == kSum || (t.args.mode == kMean && !t.DividesByWeights()));
      for (int64_t bag = 0; bag < t.num_bags && failure_.empty(); ++bag) {
        for (int64_t c = 0; c < t.columns(); ++c) {
          const int64_t i = bag * columns_ + before + c;
          CheckNumber(reference_.Pooled(bag, c), dtype, output_.ours(), i, "output");
          if (exact) {
            const double x = dtype == kFloat64 ? reference_.Ordered<double>(bag, c)
                                               : reference_.Ordered<float>(bag, c);
            CheckExact(x, dtype, output_.ours(), i, "output");
          }
        }
      }
      before += t.columns();
    }
  }

  // Position k of a bag that is not padded, and what it gives.
  struct Entry {
    int64_t position, bag, row, count;  // count: of the bag
  };
  enum Won : char { kNo, kYes, kMaybe };

  // Of each column of each entry, whether it is the maximum of its bag.
  void FindWinners() {
    const Table& t = *tables_[0];
    const int64_t columns = t.columns();
    won_.assign(entries_found_.size() * static_cast<size_t>(columns), kNo);
    seen_.assign(static_cast<size_t>(t.rows()), -1);
    for (size_t begin = 0, end; begin < entries_found_.size(); begin = end) {
      end = begin + static_cast<size_t>(entries_found_[begin].count);
      // Of two positions with one row the first one comes first.
      firsts_.clear();
      for (size_t e = begin; e < end; ++e) {
        int64_t& seen = seen_[static_cast<size_t>(entries_found_[e].row)];
        if (seen != entries_found_[begin].bag) firsts_.push_back(e);
        seen = entries_found_[begin].bag;
      }
      for (int64_t c = 0; c < columns; ++c) {
        const auto won = [&](size_t e) -> char& {
          return won_[e * static_cast<size_t>(columns) + static_cast<size_t>(c)];
        };
        numbers_of_.clear();
        bool anything = false;
        const Expected* nan = nullptr;
        Real least = -static_cast<Real>(kInfinity);
        for (const size_t e : firsts_) {
          numbers_of_.push_back(reference_.NumberOf(entries_found_[e].row, c));
          anything |= numbers_of_.back().anything;
          if (!numbers_of_.back().nan) least = std::max(least, numbers_of_.back().low);
        }
        size_t winner = 0;
        int64_t candidates = 0;
        bool exact = true;
        for (size_t i = firsts_.size(); i-- > 0;) {
          const Expected& x = numbers_of_[i];
          if (x.nan) nan = &x;
          if (x.nan || x.high < least) continue;
          winner = i;
          ++candidates;
          exact &= x.low == x.high;
        }
        for (size_t i = 0; i < firsts_.size(); ++i) {
          const Expected& x = numbers_of_[i];
          if (anything) {
            won(firsts_[i]) = kMaybe;
          } else if (nan) {
            if (nan == &x) won(firsts_[i]) = kYes;
          } else if (exact || candidates == 1) {
            if (i == winner) won(firsts_[i]) = kYes;
          } else if (!(x.high < least)) {
            won(firsts_[i]) = kMaybe;
          }
        }
      }
    }
  }

  // Adds what an entry gives to a column.
  void AddEntry(size_t e, int64_t column, Sum* sum) const {
    const Table& t = *tables_[0];
    const Entry& entry = entries_found_[e];
    const Real g = static_cast<Real>(
        Load(t.args.dtype, grad_output_.ours(), entry.bag * t.columns() + column));
    if (t.args.mode == kMax) {
      const char won = won_[e * static_cast<size_t>(t.columns()) + static_cast<size_t>(column)];
      if (won == kNo) return;
      sum->Add(won == kYes ? g : 0, g, std::fabs(g), std::fabs(g), 1);
    } else if (t.Divides()) {
      Expected given;
      given.nan = std::isnan(g);
      given.low = given.high = g;
      const Expected part =
          Quotient(PrecisionOf(t.args.dtype), given, divisors_[static_cast<size_t>(entry.bag)]);
      const Real w = reference_.WeightOf(entry.position);
      if (part.nan || std::isnan(w)) {
        sum->nan = true;
      } else if (part.anything) {
        sum->anything = true;
      } else {
        const Real a = part.low * w, b = part.high * w;
        const Real size = std::max(std::fabs(a), std::fabs(b));
        sum->Add(a, b, size, size, (1 + std::fabs(part.high)) * (1 + std::fabs(w)));
      }
    } else {
      const Real w = reference_.WeightOf(entry.position);
      const Real product = g * w, size = std::fabs(product);
      sum->Add(product, product, size, size, (1 + std::fabs(g)) * (1 + std::fabs(w)));
    }
  }

  // The sum of the entries in the order of the contract, of mode sum.
  template <class A>
  double OrderedGradient(const std::vector<size_t>& order, size_t begin, size_t end,
                         int64_t column) const {
    const Table& t = *tables_[0];
    const auto piece = [&](size_t from, size_t to) {
      A sum = 0, group = 0;
      for (size_t i = from; i < to; ++i) {
        const Entry& entry = entries_found_[order[i]];
        A x = static_cast<A>(
            Load(t.args.dtype, grad_output_.ours(), entry.bag * t.columns() + column));
        if (t.sample_weights) x *= static_cast<A>(reference_.WeightOf(entry.position));
        group += x;
        if ((i - from) % kGroup < kGroup - 1 && i + 1 < to) continue;
        sum += group;
        group = 0;
      }
      return sum;
    };
    if (end - begin <= static_cast<size_t>(kPiece)) return static_cast<double>(piece(begin, end));
    double all = 0;
    for (size_t i = begin; i < end; i += kPiece) {
      all += static_cast<double>(piece(i, std::min<size_t>(i + kPiece, end)));
    }
    return static_cast<double>(static_cast<A>(all));
  }

  void CheckGradient() {
    const Table& t = *tables_[0];
    const Precision& p = PrecisionOf(t.args.dtype);
    const int32_t dtype = t.args.dtype;
    const int64_t columns = t.columns();
    reference_.Begin(t);
    entries_found_.clear();
    for (int64_t bag = 0; bag < t.num_bags; ++bag) {
      const size_t first = entries_found_.size();
      for (int64_t k = t.begin[static_cast<size_t>(bag)]; k < t.begin[static_cast<size_t>(bag) + 1];
           ++k) {
        const int64_t row = t.index[static_cast<size_t>(k)];
        if (!t.Skips(row)) entries_found_.push_back({k, bag, row, 0});
      }
      for (size_t e = first; e < entries_found_.size(); ++e) {
        entries_found_[e].count = static_cast<int64_t>(entries_found_.size() - first);
      }
    }
    if (t.args.mode == kMax) FindWinners();
    divisors_.clear();
    for (int64_t bag = 0; bag < t.num_bags; ++bag) {
      divisors_.push_back(reference_.DivisorOf(bag));
    }
    frequency_.assign(static_cast<size_t>(t.rows()), 0);
    for (const Entry& e : entries_found_) ++frequency_[static_cast<size_t>(e.row)];
    int64_t more = 0;
    if (t.sample_weights) ++more;
    if (t.Divides()) ++more;
    if (grad_.scale_grad_by_freq) more += 2;
    const auto divisor = [&](int64_t row) {
      return grad_.scale_grad_by_freq ? static_cast<Real>(frequency_[static_cast<size_t>(row)]) : 1;
    };
    const bool exact = t.args.mode == kSum && !grad_.scale_grad_by_freq;
    if (grad_.sparse) {
      for (size_t e = 0; e < entries_found_.size() && failure_.empty(); ++e) {
        int64_t row;
        std::memcpy(&row, rows_.ours() + e * 8, 8);
        if (row != entries_found_[e].row) {
          Fail("rows[%zu] = %lld, expected %lld", e, Long(row), Long(entries_found_[e].row));
        }
        for (int64_t c = 0; c < columns; ++c) {
          Sum sum;
          AddEntry(e, c, &sum);
          CheckNumber(sum.Divided(p, more, divisor(entries_found_[e].row)), dtype, values_.ours(),
                      static_cast<int64_t>(e) * columns + c, "values");
        }
      }
    } else {
      CheckDense(more, exact, divisor);
    }
    if (grad_.grad_per_sample_weights) CheckWeightsGradient();
  }

  template <class F>
  void CheckDense(int64_t more, bool exact, const F& divisor) {
    const Table& t = *tables_[0];
    const Precision& p = PrecisionOf(t.args.dtype);
    const int32_t dtype = t.args.dtype;
    const int64_t columns = t.columns();
    order_.resize(entries_found_.size());
    for (size_t e = 0; e < order_.size(); ++e) order_[e] = e;
    std::stable_sort(order_.begin(), order_.end(), [&](size_t a, size_t b) {
      return entries_found_[a].row < entries_found_[b].row;
    });
    size_t begin = 0, end = 0;
    for (int64_t row = 0; row < t.rows() && failure_.empty(); ++row, begin = end) {
      while (end < order_.size() && entries_found_[order_[end]].row == row) ++end;
      for (int64_t c = 0; c < columns; ++c) {
        Sum sum;
        for (size_t i = begin; i < end; ++i) AddEntry(order_[i], c, &sum);
        const int64_t i = row * columns + c;
        CheckNumber(sum.Divided(p, more, divisor(row)), dtype, output_.ours(), i, "grad_weight");
        if (exact) {
          const double x = dtype == kFloat64 ? OrderedGradient<double>(order_, begin, end, c)
                                             : OrderedGradient<float>(order_, begin, end, c);
          CheckExact(x, dtype, output_.ours(), i, "grad_weight");
        }
      }
    }
  }

  // dot(k) of the contract, for an entry.
  Expected Dot(const Entry& entry) {
    const Table& t = *tables_[0];
    const Precision& p = PrecisionOf(t.args.dtype);
    const Divisor& d = divisors_[static_cast<size_t>(entry.bag)];
    Sum sum;
    Real largest = 0;
    bool vanishes = false;
    for (int64_t c = 0; c < t.columns(); ++c) {
      const Real g =
          static_cast<Real>(Load(t.args.dtype, grad_output_.ours(), entry.bag * t.columns() + c));
      if (std::isfinite(g)) largest = std::max(largest, std::fabs(g));
      const Element e = reference_.At(entry.row, c);
      // grad_output is divided first, may become 0, and 0 * inf is NaN.
      vanishes |= t.Divides() && std::isinf(e.value()) && g != 0 &&
                  !(std::fabs(g) > 2 * p.eta * std::max(std::fabs(d.low), std::fabs(d.high)));
      reference_.AddTerm(e, entry.row, g, &sum);
    }
    if (!t.Divides() || t.columns() == 0) return sum.Divided(p, 3);
    Expected e = Quotient(p, sum.Divided(p, 5), d);
    // grad_output / d may be less than any normal number, and it or the sum of its products with
    // the row may be infinite on the way, where the sum of the products is not.
    const Real least = std::min(std::fabs(d.low), std::fabs(d.high));
    const Real most = std::max({largest, sum.largest, sum.magnitude}) * (1 + 0x1p-10L);
    if (!e.nan && (vanishes || !(least > 0) || most / least >= p.max)) e.anything = true;
    if (d.low == 0 && d.high == 0) {
      e = Expected();
      e.anything = true;
    }
    e.low -= sum.tiny * p.eta;
    e.high += sum.tiny * p.eta;
    return e;
  }

  // c(i) of the contract, of the entries of a bag.
  Expected WeightedDots(size_t begin, size_t end, const std::vector<Expected>& dots) const {
    const Divisor& d = divisors_[static_cast<size_t>(entries_found_[begin].bag)];
    Sum sum;
    for (size_t e = begin; e < end; ++e) {
      const Expected& dot = dots[e - begin];
      const Real w = reference_.WeightOf(entries_found_[e].position);
      if (dot.nan || std::isnan(w)) {
        sum.nan = true;
      } else if (dot.anything || std::isinf(w) || std::isinf(dot.low)) {
        sum.anything = true;
      } else {
        const Real a = dot.low * w, b = dot.high * w;
        const Real size = std::max(std::fabs(a), std::fabs(b));
        sum.Add(a, b, size, size, 1 + size);
      }
    }
    return Quotient(kDouble, sum.Divided(kDouble, 4), d);
  }

  void CheckWeightsGradient() {
    const Table& t = *tables_[0];
    const Precision& p = PrecisionOf(t.args.dtype);
    std::vector<Expected> all(static_cast<size_t>(t.positions()));
    std::vector<Expected> dots;
    for (size_t begin = 0, end; begin < entries_found_.size(); begin = end) {
      end = begin + static_cast<size_t>(entries_found_[begin].count);
      dots.clear();
      for (size_t e = begin; e < end; ++e) dots.push_back(Dot(entries_found_[e]));
      Expected of_divisor;
      if (t.DividesByWeights()) of_divisor = WeightedDots(begin, end, dots);
      for (size_t e = begin; e < end; ++e) {
        const int64_t k = entries_found_[e].position;
        Expected& result = all[static_cast<size_t>(k)];
        result = dots[e - begin];
        if (!t.DividesByWeights()) continue;
        Expected c = of_divisor;
        const Real w = reference_.WeightOf(k);
        if (t.args.mode == kSqrtn && !c.nan && !c.anything) {
          Expected product;
          product.low = std::min(c.low * w, c.high * w);
          product.high = std::max(c.low * w, c.high * w);
          product.anything = !std::isfinite(w);
          c = Quotient(kDouble, product, divisors_[static_cast<size_t>(entries_found_[e].bag)]);
        }
        if (result.nan || c.nan) {
          result.nan = !result.anything || result.nan;
        } else if (result.anything || c.anything || std::isinf(result.low) || std::isinf(c.low)) {
          result.anything = true;
        } else {
          const Real size = std::max(
              {std::fabs(c.low), std::fabs(c.high), std::fabs(result.low), std::fabs(result.high)});
          const Real low = result.low - c.high, high = result.high - c.low;
          result.low = low - size * 4 * p.u - 2 * p.eta;
          result.high = high + size * 4 * p.u + 2 * p.eta;
          result.anything = size >= p.max / 4;
        }
      }
    }
    for (int64_t k = 0; k < t.positions(); ++k) {
      CheckNumber(all[static_cast<size_t>(k)], t.args.dtype, grad_weights_.ours(), k,
                  "grad_per_sample_weights");
    }
  }

  // ---- lucid_table_plan and lucid_joined_table_plan

  int64_t DrawBytesOf() {
    const int64_t x = r_.Pick<int64_t>({0, 1, 100, 8 << 20, int64_t{1} << 40, INT64_MAX});
    return r_.OneIn(8) ? static_cast<int64_t>(r_.Next()) : x - (r_.OneIn(3) ? 1 : 0);
  }

  void Plans() {
    constexpr const char* kChoices[] = {nullptr, "auto", "inplace", "hugepage_copy",
                                        "mmap",  "",     "Auto"};
    const int64_t choice = r_.Below(7);
    const char* const memory = kChoices[choice];
    const int64_t bytes = DrawBytesOf(), free_bytes = DrawBytesOf();
    const bool is_file = r_.OneIn(2);
    const int plan = g_api.table_plan(memory, is_file, bytes, free_bytes);
    const bool bad = choice > 4 || bytes < 0;
    if (bad ? plan != -1 : plan < 0 || plan > 3) Fail("table plan %d", plan);
    if (memory && std::strcmp(memory, "mmap") == 0 && !bad && plan != 0)
      Fail("mmap: plan %d", plan);
    const int64_t row_bytes = r_.OneIn(2) ? r_.Below(1100) : DrawBytesOf();
    const int numbers = static_cast<int>(r_.Between(-1, 4));
    int64_t copied = -77;
    const int joined =
        g_api.joined_table_plan(memory, bytes, row_bytes, numbers, free_bytes, &copied);
    const bool bad_numbers = bad || row_bytes < 0 || numbers < 1 || numbers > 2;
    if (bad_numbers ? joined != -1 : joined < -1 || joined > 2) Fail("joined plan %d", joined);
    if (joined <= 0 ? copied != 0 : false) Fail("joined plan %d copies %lld", joined, Long(copied));
    if (joined <= 0) return;
    const Real needed = static_cast<Real>(bytes) * static_cast<Real>(row_bytes + 4 * numbers);
    const Real rounded = needed + (joined == 2 ? static_cast<Real>((2 << 20) - 1) : 0);
    if (static_cast<Real>(copied) < needed || static_cast<Real>(copied) > rounded) {
      Fail("joined plan %d copies %lld of %.20Lg", joined, Long(copied), needed);
    }
  }

  Random r_{0};
  Kind kind_ = Kind::kBag;
  Size size_ = {};
  Fault fault_ = Fault::kNone;
  std::string text_;  // of the error
  std::string failure_;
  bool untouched_ = true;  // a rejected call leaves the output as it is
  bool bad_isa_ = false, bad_threads_ = false, no_tables_ = false;
  int num_tables_ = 0;
  int64_t columns_ = 0;  // of all tables
  std::vector<std::unique_ptr<Table>> tables_;
  EmbeddingBagGradArgs grad_ = {};
  EmbeddingBagCollectionArgs collection_ = {};
  Guarded output_{"the output", true}, values_{"values", true}, rows_{"rows", true},
      grad_weights_{"grad_per_sample_weights", true}, grad_output_{"grad_output", false},
      message_{"message", true}, count_{"num_entries", true}, args_{"the arguments", false},
      table_args_{"tables", false};
  std::vector<const Guarded*> outputs_;
  std::vector<std::vector<char>> first_;  // the outputs of the first run
  Reference reference_;
  std::vector<Entry> entries_found_;
  std::vector<char> won_;
  std::vector<int64_t> seen_, frequency_;
  std::vector<size_t> firsts_, order_;
  std::vector<Expected> numbers_of_;
  std::vector<Divisor> divisors_;
  int64_t numbers_ = 0, open_ = 0;
  volatile char sink_ = 0;
  int raced_ = 0;
};

// ---- The command

int64_t Now() {
  return std::chrono::duration_cast<std::chrono::milliseconds>(
             std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

// One at a time on a thread of its own.
struct Job {
  std::unique_ptr<Fuzzer> fuzzer{new Fuzzer};
  std::atomic<int64_t> number{-1};  // of the case under way
  std::atomic<int64_t> since{0};
  int64_t done = 0, rejected = 0, kinds[4] = {};
};

constexpr int kMostJobs = 64;
Job* g_jobs[kMostJobs];
int g_num_jobs = 0;
uint64_t g_seed = 0;
std::atomic<bool> g_stop{false};
std::atomic_flag g_told = ATOMIC_FLAG_INIT;
struct sigaction g_before[64];

void Tell(const Job& job, const char* what) {
  const long long number = job.number.load();
  std::fprintf(stderr, "case %lld: %s\n", number, what);
  job.fuzzer->Describe(stderr);
  std::fprintf(stderr, "again: --seed %llu --first %lld --cases 1\n",
               static_cast<unsigned long long>(g_seed), number);
}

// After what cannot go on: a fault, or the report of a sanitizer. No more than one is told.
void TellAll(const char* what, const char* address) {
  if (g_told.test_and_set()) return;
  alarm(10);  // should this not end
  for (int j = 0; j < g_num_jobs; ++j) {
    std::string where;
    if (address) where = ": " + g_jobs[j]->fuzzer->Where(address);
    Tell(*g_jobs[j], (what + where).c_str());
  }
}

void OnSignal(int signal, siginfo_t* info, void*) {
  char text[80];
  const bool at = signal == SIGSEGV || signal == SIGBUS;
  std::snprintf(text, sizeof(text), "%s at %p", strsignal(signal), at ? info->si_addr : nullptr);
  TellAll(text, at ? static_cast<const char*>(info->si_addr) : nullptr);
  // A sanitizer says more.
  if (g_before[signal].sa_handler == SIG_DFL) _exit(1);
  sigaction(signal, &g_before[signal], nullptr);
}

void Watch(int64_t limit_ms) {
  while (!g_stop.load()) {
    for (int i = 0; i < 20 && !g_stop.load(); ++i) usleep(10000);
    for (int j = 0; j < g_num_jobs; ++j) {
      const int64_t since = g_jobs[j]->since.load();
      if (since == 0 || Now() - since < limit_ms) continue;
      TellAll("it takes too long", nullptr);
      _exit(1);
    }
  }
}

struct Options {
  const char* library = nullptr;
  uint64_t seed = 0;
  int64_t first = 0, cases = INT64_MAX / 2;
  double seconds = 60;
  double limit = 60;
  int jobs = 1;
};

void Usage(const char* name, FILE* to) {
  std::fprintf(to,
               "usage: %s [options] LIBRARY\n"
               "  --seconds S   how long to go on (60; without end where --cases is given)\n"
               "  --cases N     how many cases at most\n"
               "  --first N     the number of the first case (0)\n"
               "  --seed S      other cases (0)\n"
               "  --jobs N      so many callers at once (1)\n"
               "  --limit S     a case that takes longer is a failure (60)\n"
               "  --plant KIND  a fault to be found:",
               name);
  for (const char* plant : kPlants) std::fprintf(to, " %s", plant);
  std::fprintf(to, "\n");
}

bool Parse(int argc, char** argv, Options* o) {
  bool seconds = false, cases = false;
  for (int i = 1; i < argc; ++i) {
    const std::string name = argv[i];
    if (name.rfind("--", 0) != 0) {
      if (o->library) return false;
      o->library = argv[i];
      continue;
    }
    if (++i == argc) return false;
    const char* const value = argv[i];
    if (name == "--plant") {
      int found = -1;
      for (int k = 0; k <= static_cast<int>(Plant::kHangs); ++k) {
        if (std::strcmp(kPlants[k], value) == 0) found = k;
      }
      if (found < 0) return false;
      g_plant = static_cast<Plant>(found);
      continue;
    }
    char* end;
    const double x = std::strtod(value, &end);
    if (end == value || *end || !(x >= 0) || x > 0x1p53) return false;
    if (name == "--seconds") {
      o->seconds = x;
      seconds = true;
    } else if (name == "--cases") {
      o->cases = static_cast<int64_t>(x);
      cases = true;
    } else if (name == "--first") {
      o->first = static_cast<int64_t>(x);
    } else if (name == "--seed") {
      o->seed = static_cast<uint64_t>(x);
    } else if (name == "--limit") {
      o->limit = x;
    } else if (name == "--jobs" && x >= 1 && x <= kMostJobs) {
      o->jobs = static_cast<int>(x);
    } else {
      return false;
    }
  }
  if (cases && !seconds) o->seconds = 1e9;
  return o->library != nullptr;
}

void Work(Job* job, const Options& o, int64_t begin, int64_t first, std::atomic<bool>* failed) {
  const int64_t end = begin + static_cast<int64_t>(o.seconds * 1000);
  for (int64_t i = first; i < o.cases && !g_stop.load(); i += o.jobs) {
    const int64_t now = Now();
    if (now >= end) return;
    job->number.store(o.first + i);
    job->since.store(now);
    const std::string failure = job->fuzzer->Run(o.seed, static_cast<uint64_t>(o.first + i));
    job->since.store(0);
    ++job->done;
    ++job->kinds[static_cast<int>(job->fuzzer->kind())];
    job->rejected += job->fuzzer->rejected();
    if (failure.empty()) continue;
    if (!failed->exchange(true)) Tell(*job, failure.c_str());
    g_stop.store(true);
  }
}

int Main(int argc, char** argv) {
  Options o;
  for (int i = 1; i < argc; ++i) {
    if (std::strcmp(argv[i], "--help") != 0) continue;
    Usage(argv[0], stdout);
    return 0;
  }
  if (!Parse(argc, argv, &o)) {
    Usage(argv[0], stderr);
    return 2;
  }
  g_api.Open(o.library);
  g_seed = o.seed;
  for (int j = 0; j < o.jobs; ++j) g_jobs[j] = new Job;
  g_num_jobs = o.jobs;
  if (__sanitizer_set_death_callback) {
    __sanitizer_set_death_callback([] { TellAll("a sanitizer's report", nullptr); });
  }
  struct sigaction action = {};
  action.sa_sigaction = OnSignal;
  action.sa_flags = SA_SIGINFO | SA_NODEFER;
  for (const int signal : {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGABRT}) {
    sigaction(signal, &action, &g_before[signal]);
  }
  const int64_t begin = Now();
  std::thread watch(Watch, static_cast<int64_t>(o.limit * 1000));
  std::atomic<bool> failed{false};
  std::vector<std::thread> threads;
  for (int j = 1; j < o.jobs; ++j) {
    threads.emplace_back([&, j] { Work(g_jobs[j], o, begin, j, &failed); });
  }
  Work(g_jobs[0], o, begin, 0, &failed);
  for (std::thread& thread : threads) thread.join();
  g_stop.store(true);
  watch.join();
  int64_t done = 0, rejected = 0, kinds[4] = {}, numbers = 0, open = 0;
  for (int j = 0; j < o.jobs; ++j) {
    done += g_jobs[j]->done;
    rejected += g_jobs[j]->rejected;
    numbers += g_jobs[j]->fuzzer->numbers();
    open += g_jobs[j]->fuzzer->open();
    for (int k = 0; k < 4; ++k) kinds[k] += g_jobs[j]->kinds[k];
  }
  std::printf("%lld cases of seed %llu from %lld on in %.0f s:", static_cast<long long>(done),
              static_cast<unsigned long long>(o.seed), static_cast<long long>(o.first),
              static_cast<double>(Now() - begin) / 1000);
  for (int k = 0; k < 4; ++k) {
    std::printf(" %lld %s,", static_cast<long long>(kinds[k]), kKinds[k]);
  }
  std::printf(" %lld bad calls; %lld numbers, %lld of them left open by the contract; %s\n",
              static_cast<long long>(rejected), static_cast<long long>(numbers),
              static_cast<long long>(open), failed ? "1 failed" : "0 failed");
  return failed ? 1 : 0;
}

}  // namespace

int main(int argc, char** argv) { return Main(argc, argv); }
