// The checks of a gradient's arguments that need no kernel.
#include <cstdio>

#include "base/types.h"
#include "embedding_bag/tasks.h"
#include "embedding_bag_grad/embedding_bag_grad.h"

namespace lucid {

Status CheckEmbeddingBagGrad(const EmbeddingBagGradArgs& args, int64_t* num_bags,
                             int64_t* padding) {
  const EmbeddingBagArgs& a = args.forward;
  if (args.size_bytes != static_cast<int64_t>(sizeof(EmbeddingBagGradArgs))) {
    return Refuse("size_bytes = %lld is not %lld", Wide(args.size_bytes),
                  Wide(sizeof(EmbeddingBagGradArgs)));
  }
  const Status status = CheckEmbeddingBag(a, num_bags, padding);
  if (!status.ok()) return status;
  if (a.dtype > kFloat64) {
    return Refuse("dtype = %d is one of codes: they have no gradient", a.dtype);
  }
  if (args.sparse != 0 && args.sparse != 1) return Refuse("sparse = %d is not 0 or 1", args.sparse);
  if (args.scale_grad_by_freq != 0 && args.scale_grad_by_freq != 1) {
    return Refuse("scale_grad_by_freq = %d is not 0 or 1", args.scale_grad_by_freq);
  }
  if (args.grad_per_sample_weights && a.mode != kSum) {
    return Refuse("grad_per_sample_weights needs mode 'sum'");
  }
  if (args.grad_output_shape[0] != *num_bags || args.grad_output_shape[1] != a.weight_shape[1]) {
    return Refuse("grad_output has shape [%lld, %lld], expected [%lld, %lld]",
                  Wide(args.grad_output_shape[0]), Wide(args.grad_output_shape[1]), Wide(*num_bags),
                  Wide(a.weight_shape[1]));
  }
  return status;
}

Status SetGradOutputShape(TensorShape grad_output, EmbeddingBagGradArgs* args) {
  int64_t num_bags;
  const Status status = CountBags(args->forward, &num_bags);
  if (!status.ok()) return status;
  const int64_t columns = args->forward.weight_shape[1];
  if (grad_output.rank == 2) {
    args->grad_output_shape[0] = grad_output.dims[0];
    args->grad_output_shape[1] = grad_output.dims[1];
    if (grad_output.dims[0] == num_bags && grad_output.dims[1] == columns) return status;
  }
  char shape[120] = "";
  for (size_t i = 0, used = 0; i < grad_output.rank && used + 28 < sizeof(shape); ++i) {
    used += static_cast<size_t>(std::snprintf(shape + used, sizeof(shape) - used, "%s%lld",
                                              i ? ", " : "", Wide(grad_output.dims[i])));
  }
  return Refuse("grad_output has shape [%s], expected [%lld, %lld]", shape, Wide(num_bags),
                Wide(columns));
}

}  // namespace lucid
