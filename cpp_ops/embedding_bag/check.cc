// The checks of EmbeddingBag's arguments that need no kernel, and the texts of its errors.
#include <algorithm>
#include <cstdio>

#include "base/types.h"
#include "embedding_bag/embedding_bag.h"
#include "embedding_bag/tasks.h"

namespace lucid {
namespace {

constexpr const char* kModeNames[] = {"sum", "mean", "max", "sqrtn"};

struct ShapeText {
  char text[80];

  explicit ShapeText(TensorShape shape) {
    size_t used = static_cast<size_t>(std::snprintf(text, sizeof(text), "["));
    for (size_t i = 0; i < shape.rank && used + 28 < sizeof(text); ++i) {
      used +=
          static_cast<size_t>(std::snprintf(text + used, sizeof(text) - used, "%s%lld",
                                            i ? ", " : "", static_cast<long long>(shape.dims[i])));
    }
    std::snprintf(text + used, sizeof(text) - used, "]");
  }
};

bool IsQuantized(int32_t dtype) { return dtype >= kInt8; }

// What a C caller may get wrong, and the adapter for ONNX Runtime cannot.
Status CheckStruct(const EmbeddingBagArgs& a) {
  if (a.size_bytes != static_cast<int64_t>(sizeof(EmbeddingBagArgs))) {
    return InvalidArgument("size_bytes = %lld is not %lld", Wide(a.size_bytes),
                           Wide(sizeof(EmbeddingBagArgs)));
  }
  if (a.dtype < kFloat32 || a.dtype > kUint4)
    return InvalidArgument("dtype = %d is unknown", a.dtype);
  if (IsQuantized(a.dtype)) {
    if (a.output_type != kFloat32 && a.output_type != kFloat16) {
      return InvalidArgument("output_type = %d is not 0 or 1", a.output_type);
    }
    if (a.scale_type != kFloat32 && a.scale_type != kFloat16) {
      return InvalidArgument("scale_type = %d is not 0 or 1", a.scale_type);
    }
    if (a.scale_stride < (a.scale_type == kFloat16 ? 2 : 4)) {
      return InvalidArgument("scale_stride = %d is less than the size of a scale", a.scale_stride);
    }
    if (!a.scale && a.weight_shape[0] > 0) return InvalidArgument("scale is missing");
    if (a.zero_point && a.bias)
      return InvalidArgument("zero_point and bias are mutually exclusive");
  } else if (a.output_type != a.dtype) {
    return InvalidArgument("output_type = %d must be the dtype, %d", a.output_type, a.dtype);
  }
  if (a.index_type != kInt32 && a.index_type != kInt64) {
    return InvalidArgument("index_type = %d is unknown", a.index_type);
  }
  if (a.indices_rank != 1 && a.indices_rank != 2) {
    return InvalidArgument("indices_rank = %d is not 1 or 2", a.indices_rank);
  }
  if (a.indices_rank == 1 && a.offset_type != kInt32 && a.offset_type != kInt64) {
    return InvalidArgument("offset_type = %d is unknown", a.offset_type);
  }
  if (a.weight_shape[0] < 0 || a.weight_shape[1] < 0 || a.indices_shape[0] < 0 ||
      (a.indices_rank == 2 && a.indices_shape[1] < 0) ||
      (a.indices_rank == 1 && a.num_offsets < 0)) {
    return InvalidArgument("a size is negative");
  }
  if (a.row_stride != 0 && (a.weight_shape[1] > 2 * int64_t{a.row_stride} ||
                            a.row_stride < RowBytes(a.dtype, a.weight_shape[1]))) {
    return InvalidArgument("row_stride = %d is less than the size of a row", a.row_stride);
  }
  return Status();
}

}  // namespace

int64_t RowBytes(int32_t dtype, int64_t columns) {
  LUCID_FOR_DTYPE(dtype, return static_cast<int64_t>(BytesOf<T>(columns)));
}

Status CheckMode(int64_t mode) {
  if (mode >= kSum && mode <= kSqrtn) return Status();
  return InvalidArgument("mode = %lld is not 0 (sum), 1 (mean), 2 (max) or 3 (sqrtn)", Wide(mode));
}

Status CheckNegative(int64_t negative) {
  if (negative == kRefuse || negative == kSkip) return Status();
  return InvalidArgument("negative = %lld is not 0 (refuse) or 1 (skip)", Wide(negative));
}

Status CheckDivisor(int64_t divisor) {
  if (divisor >= kNone && divisor <= kWeights) return Status();
  return InvalidArgument("divisor = %lld is not 0 (none), 1 (count) or 2 (weights)", Wide(divisor));
}

Status CheckEmbeddingBagAttributes(const EmbeddingBagArgs& a, bool has_per_sample_weights) {
  Status status = CheckMode(a.mode);
  if (status.ok()) status = CheckNegative(a.negative);
  if (status.ok()) status = CheckDivisor(a.divisor);
  if (!status.ok()) return status;
  if (has_per_sample_weights && a.mode != kSum && (a.divisor == kNone || !Divides(a.mode))) {
    return InvalidArgument("per_sample_weights needs mode 'sum', got mode = '%s'",
                           kModeNames[a.mode]);
  }
  // The comparisons are negated so that NaN is invalid too.
  if (!(a.max_norm >= 0)) return InvalidArgument("max_norm = %g must be >= 0", a.max_norm);
  if (!(a.norm_type > 0)) return InvalidArgument("norm_type = %g must be > 0", a.norm_type);
  return Status();
}

Status SetEmbeddingBagShapes(TensorShape weight, TensorShape indices, const TensorShape* offsets,
                             const TensorShape* per_sample_weights, EmbeddingBagArgs* args) {
  const bool flat = args->indices_rank == 1;
  if (weight.rank != 2) {
    return InvalidArgument("weight has shape %s, expected [V, D]", ShapeText(weight).text);
  }
  if (indices.rank != static_cast<size_t>(args->indices_rank)) {
    return InvalidArgument("indices has shape %s, expected %s", ShapeText(indices).text,
                           flat ? "[N]" : "[B, L]");
  }
  if (offsets && offsets->rank != 1) {
    return InvalidArgument("offsets has shape %s, expected one dimension",
                           ShapeText(*offsets).text);
  }
  if (per_sample_weights &&
      (per_sample_weights->rank != indices.rank ||
       !std::equal(indices.dims, indices.dims + indices.rank, per_sample_weights->dims))) {
    return InvalidArgument(
        "per_sample_weights has shape %s, indices has shape %s: they must be equal",
        ShapeText(*per_sample_weights).text, ShapeText(indices).text);
  }
  args->weight_shape[0] = weight.dims[0];
  args->weight_shape[1] = weight.dims[1];
  args->indices_shape[0] = indices.dims[0];
  args->indices_shape[1] = flat ? 0 : indices.dims[1];
  args->num_offsets = offsets ? offsets->dims[0] : 0;
  return Status();
}

Status CountBags(const EmbeddingBagArgs& a, int64_t* num_bags) {
  if (a.indices_rank == 2) {
    *num_bags = a.indices_shape[0];
    return Status();
  }
  if (a.num_offsets == 0 && a.include_last_offset) {
    return InvalidArgument(
        "offsets is empty, shape [0]: include_last_offset needs at least one entry");
  }
  if (a.num_offsets == 0 && a.indices_shape[0] > 0) {
    return InvalidArgument("offsets is empty, shape [0], but indices has %lld entries",
                           Wide(a.indices_shape[0]));
  }
  *num_bags = a.num_offsets - (a.include_last_offset ? 1 : 0);
  return Status();
}

Status InvalidOffset(const EmbeddingBagArgs& a, int64_t i, int64_t offset, int64_t previous) {
  if (i == 0) return InvalidArgument("offsets[0] = %lld must be 0", Wide(offset));
  if (offset < previous) {
    return InvalidArgument(
        "offsets[%lld] = %lld is below offsets[%lld] = %lld: offsets must not decrease", Wide(i),
        Wide(offset), Wide(i - 1), Wide(previous));
  }
  return InvalidArgument("offsets[%lld] = %lld is past the number of indices, %lld", Wide(i),
                         Wide(offset), Wide(a.indices_shape[0]));
}

Status InvalidIndex(const EmbeddingBagArgs& a, int64_t position, int64_t index) {
  const long long value = Wide(index), rows = Wide(a.weight_shape[0]);
  if (a.indices_rank == 1) {
    return InvalidArgument("indices[%lld] = %lld is outside [0, %lld)", Wide(position), value,
                           rows);
  }
  const int64_t length = a.indices_shape[1];
  return InvalidArgument("indices[%lld, %lld] = %lld is outside [0, %lld)", Wide(position / length),
                         Wide(position % length), value, rows);
}

Status CheckPadding(const EmbeddingBagArgs& a) {
  const int64_t rows = a.weight_shape[0];
  if (a.padding_idx == kNoPadding || (a.padding_idx >= -rows && a.padding_idx < rows)) {
    return Status();
  }
  return InvalidArgument("padding_idx = %lld is outside [-%lld, %lld), the rows of weight",
                         Wide(a.padding_idx), Wide(rows), Wide(rows));
}

Status CheckEmbeddingBagInputs(const EmbeddingBagArgs& a, int64_t* num_bags) {
  const Status status = CountBags(a, num_bags);
  return status.ok() ? CheckPadding(a) : status;
}

Status CheckEmbeddingBag(const EmbeddingBagArgs& a, int64_t* num_bags) {
  Status status = CheckStruct(a);
  if (status.ok()) status = CheckEmbeddingBagAttributes(a, a.per_sample_weights != nullptr);
  return status.ok() ? CheckEmbeddingBagInputs(a, num_bags) : status;
}

bool DividesByWeights(const EmbeddingBagArgs& a) {
  return Divides(a.mode) && a.divisor == kWeights && a.per_sample_weights;
}

int64_t PaddedRow(const EmbeddingBagArgs& a) {
  if (a.padding_idx == kNoPadding) return -1;
  return a.padding_idx < 0 ? a.padding_idx + a.weight_shape[0] : a.padding_idx;
}

Status InTable(int64_t t, const Status& status) {
  return status.ok() ? status : Error(status.code, "table %lld: %s", Wide(t), status.message);
}

EmbeddingBagArgs ArgsOfTable(const EmbeddingBagCollectionArgs& c, int64_t t) {
  EmbeddingBagArgs a = c.tables[t];
  if (!c.packed || t == 0) return a;
  const EmbeddingBagArgs& all = c.tables[0];
  a.indices = all.indices;
  a.offsets = all.offsets;
  a.per_sample_weights = all.per_sample_weights;
  std::copy(all.indices_shape, all.indices_shape + 2, a.indices_shape);
  a.num_offsets = all.num_offsets;
  a.index_type = all.index_type;
  a.offset_type = all.offset_type;
  a.indices_rank = all.indices_rank;
  a.include_last_offset = all.include_last_offset;
  return a;
}

namespace {

// Adds table t, which has so many bags and was checked by itself, to the sizes of the tables before
// it: there must be as many bags as they have, and room for its columns beside theirs.
Status AddTable(const EmbeddingBagCollectionArgs& c, int64_t t, const EmbeddingBagArgs& a,
                int64_t num_bags, CollectionSizes* sizes) {
  if (c.packed) {
    if (num_bags % c.num_tables != 0) {
      return InvalidArgument("offsets has %lld entries, which are not %lld * B + 1",
                             Wide(a.num_offsets), Wide(c.num_tables));
    }
    num_bags /= c.num_tables;
  }
  if (t == 0) *sizes = {num_bags, 0};
  if (num_bags != sizes->num_bags) {
    return InvalidArgument("table %lld has %lld bags, table 0 has %lld: they must be equal",
                           Wide(t), Wide(num_bags), Wide(sizes->num_bags));
  }
  // A table without rows takes no memory, so its D may be anything.
  constexpr int64_t kMostColumns = INT64_MAX / 8;
  if (a.weight_shape[1] > kMostColumns - sizes->columns) {
    return InvalidArgument("table %lld: the columns of all tables are more than an output can have",
                           Wide(t));
  }
  sizes->columns += a.weight_shape[1];
  return Status();
}

// What a C caller may get wrong about table t that the adapter cannot, and everything about it by
// itself.
Status CheckTable(const EmbeddingBagCollectionArgs& c, int64_t t, const EmbeddingBagArgs& a,
                  int64_t* num_bags) {
  const Status status = CheckEmbeddingBag(a, num_bags);
  if (!status.ok()) return InTable(t, status);
  if (a.output_type != c.tables[0].output_type) {
    return InvalidArgument("table %lld: output_type = %d, table 0 has %d: they must be equal",
                           Wide(t), a.output_type, c.tables[0].output_type);
  }
  if (c.packed && (a.indices_rank != 1 || !a.include_last_offset)) {
    return InvalidArgument(
        "packed needs indices_rank = 1 and include_last_offset = 1, got %d and %d", a.indices_rank,
        a.include_last_offset);
  }
  return status;
}

}  // namespace

Status CheckEmbeddingBagCollectionInputs(const EmbeddingBagCollectionArgs& c,
                                         CollectionSizes* sizes) {
  Status status;
  for (int64_t t = 0; t < c.num_tables && status.ok(); ++t) {
    const EmbeddingBagArgs a = ArgsOfTable(c, t);
    int64_t num_bags = 0;
    status = InTable(t, CheckEmbeddingBagInputs(a, &num_bags));
    if (status.ok()) status = AddTable(c, t, a, num_bags, sizes);
  }
  return status;
}

Status CheckEmbeddingBagCollection(const EmbeddingBagCollectionArgs& c, CollectionSizes* sizes) {
  if (c.size_bytes != static_cast<int64_t>(sizeof(EmbeddingBagCollectionArgs))) {
    return InvalidArgument("size_bytes = %lld is not %lld", Wide(c.size_bytes),
                           Wide(sizeof(EmbeddingBagCollectionArgs)));
  }
  if (c.num_tables < 1)
    return InvalidArgument("num_tables = %lld must be >= 1", Wide(c.num_tables));
  if (!c.tables) return InvalidArgument("tables is missing");
  if (c.packed != 0 && c.packed != 1)
    return InvalidArgument("packed = %lld is not 0 or 1", Wide(c.packed));
  Status status;
  for (int64_t t = 0; t < c.num_tables && status.ok(); ++t) {
    const EmbeddingBagArgs a = ArgsOfTable(c, t);
    int64_t num_bags = 0;
    status = CheckTable(c, t, a, &num_bags);
    if (status.ok()) status = AddTable(c, t, a, num_bags, sizes);
  }
  return status;
}

}  // namespace lucid
