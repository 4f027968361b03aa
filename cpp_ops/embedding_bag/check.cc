// The checks of EmbeddingBag's arguments that need no kernel, and the texts of all refusals.
#include <algorithm>
#include <cstdio>

#include "base/types.h"
#include "embedding_bag/embedding_bag.h"
#include "embedding_bag/tasks.h"

namespace lucid {
namespace {

constexpr const char* kModeNames[] = {"sum", "mean", "max"};

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

// What a C caller may get wrong that the adapter cannot.
Status CheckStruct(const EmbeddingBagArgs& a) {
  if (a.size_bytes != static_cast<int64_t>(sizeof(EmbeddingBagArgs))) {
    return Refuse("size_bytes = %lld is not %lld", Wide(a.size_bytes),
                  Wide(sizeof(EmbeddingBagArgs)));
  }
  if (a.dtype < kFloat32 || a.dtype > kUint4) return Refuse("dtype = %d is unknown", a.dtype);
  if (IsQuantized(a.dtype)) {
    if (a.output_type != kFloat32 && a.output_type != kFloat16) {
      return Refuse("output_type = %d is not 0 or 1", a.output_type);
    }
    if (a.scale_type != kFloat32 && a.scale_type != kFloat16) {
      return Refuse("scale_type = %d is not 0 or 1", a.scale_type);
    }
    if (a.scale_stride < (a.scale_type == kFloat16 ? 2 : 4)) {
      return Refuse("scale_stride = %d is less than a scale has", a.scale_stride);
    }
    if (!a.scale && a.weight_shape[0] > 0) return Refuse("scale is missing");
    if (a.zero_point && a.bias) return Refuse("zero_point and bias exclude one another");
  } else if (a.output_type != a.dtype) {
    return Refuse("output_type = %d must be the dtype, %d", a.output_type, a.dtype);
  }
  if (a.index_type != kInt32 && a.index_type != kInt64) {
    return Refuse("index_type = %d is unknown", a.index_type);
  }
  if (a.indices_rank != 1 && a.indices_rank != 2) {
    return Refuse("indices_rank = %d is not 1 or 2", a.indices_rank);
  }
  if (a.indices_rank == 1 && a.offset_type != kInt32 && a.offset_type != kInt64) {
    return Refuse("offset_type = %d is unknown", a.offset_type);
  }
  if (a.weight_shape[0] < 0 || a.weight_shape[1] < 0 || a.indices_shape[0] < 0 ||
      (a.indices_rank == 2 && a.indices_shape[1] < 0) ||
      (a.indices_rank == 1 && a.num_offsets < 0)) {
    return Refuse("a size is negative");
  }
  if (a.row_stride != 0 && (a.weight_shape[1] > 2 * int64_t{a.row_stride} ||
                            a.row_stride < RowBytes(a.dtype, a.weight_shape[1]))) {
    return Refuse("row_stride = %d is less than a row has", a.row_stride);
  }
  return Status();
}

}  // namespace

int64_t RowBytes(int32_t dtype, int64_t columns) {
  LUCID_FOR_DTYPE(dtype, return static_cast<int64_t>(BytesOf<T>(columns)));
}

Status CheckEmbeddingBagAttributes(const EmbeddingBagArgs& a, bool has_per_sample_weights) {
  if (a.mode < kSum || a.mode > kMax) {
    return Refuse("mode = %d is not 0 (sum), 1 (mean) or 2 (max)", a.mode);
  }
  if (has_per_sample_weights && a.mode != kSum) {
    return Refuse("per_sample_weights needs mode 'sum', got mode = '%s'", kModeNames[a.mode]);
  }
  // The negated comparisons refuse NaN too.
  if (!(a.max_norm >= 0)) return Refuse("max_norm = %g must be >= 0", a.max_norm);
  if (!(a.norm_type > 0)) return Refuse("norm_type = %g must be > 0", a.norm_type);
  return Status();
}

Status SetEmbeddingBagShapes(TensorShape weight, TensorShape indices, const TensorShape* offsets,
                             const TensorShape* per_sample_weights, EmbeddingBagArgs* args) {
  const bool flat = args->indices_rank == 1;
  if (weight.rank != 2) {
    return Refuse("weight has shape %s, expected [V, D]", ShapeText(weight).text);
  }
  if (indices.rank != static_cast<size_t>(args->indices_rank)) {
    return Refuse("indices has shape %s, expected %s", ShapeText(indices).text,
                  flat ? "[N]" : "[B, L]");
  }
  if (offsets && offsets->rank != 1) {
    return Refuse("offsets has shape %s, expected one dimension", ShapeText(*offsets).text);
  }
  if (per_sample_weights &&
      (per_sample_weights->rank != indices.rank ||
       !std::equal(indices.dims, indices.dims + indices.rank, per_sample_weights->dims))) {
    return Refuse("per_sample_weights has shape %s, indices has shape %s: they must be equal",
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
    return Refuse("offsets is empty, shape [0]: include_last_offset needs at least one entry");
  }
  if (a.num_offsets == 0 && a.indices_shape[0] > 0) {
    return Refuse("offsets is empty, shape [0], but indices has %lld entries",
                  Wide(a.indices_shape[0]));
  }
  *num_bags = a.num_offsets - (a.include_last_offset ? 1 : 0);
  return Status();
}

Status RefuseOffset(const EmbeddingBagArgs& a, int64_t i, int64_t offset, int64_t previous) {
  if (i == 0) return Refuse("offsets[0] = %lld must be 0", Wide(offset));
  if (offset < previous) {
    return Refuse("offsets[%lld] = %lld is below offsets[%lld] = %lld: offsets must not decrease",
                  Wide(i), Wide(offset), Wide(i - 1), Wide(previous));
  }
  return Refuse("offsets[%lld] = %lld is past the number of indices, %lld", Wide(i), Wide(offset),
                Wide(a.indices_shape[0]));
}

Status RefuseIndex(const EmbeddingBagArgs& a, int64_t position, int64_t index) {
  const long long value = Wide(index), rows = Wide(a.weight_shape[0]);
  if (a.indices_rank == 1) {
    return Refuse("indices[%lld] = %lld is outside [0, %lld)", Wide(position), value, rows);
  }
  const int64_t length = a.indices_shape[1];
  return Refuse("indices[%lld, %lld] = %lld is outside [0, %lld)", Wide(position / length),
                Wide(position % length), value, rows);
}

Status CheckEmbeddingBag(const EmbeddingBagArgs& a, int64_t* num_bags, int64_t* padding) {
  Status status = CheckStruct(a);
  if (!status.ok()) return status;
  status = CheckEmbeddingBagAttributes(a, a.per_sample_weights != nullptr);
  if (!status.ok()) return status;
  const int64_t rows = a.weight_shape[0];
  *padding = -1;
  if (a.padding_idx != kNoPadding) {
    if (a.padding_idx < -rows || a.padding_idx >= rows) {
      return Refuse("padding_idx = %lld is outside [-%lld, %lld), the rows of weight",
                    Wide(a.padding_idx), Wide(rows), Wide(rows));
    }
    *padding = a.padding_idx < 0 ? a.padding_idx + rows : a.padding_idx;
  }
  return CountBags(a, num_bags);
}

}  // namespace lucid
