// The checks of a gradient's arguments that need no kernel.
#include <cstdio>

#include "base/types.h"
#include "embedding_bag/tasks.h"
#include "embedding_bag_grad/embedding_bag_grad.h"

namespace lucid {

namespace {

// The shape of grad_output must be [num_bags, columns].
Status CheckGradOutput(TensorShape grad_output, int64_t num_bags, int64_t columns) {
  if (grad_output.rank == 2 && grad_output.dims[0] == num_bags && grad_output.dims[1] == columns) {
    return Status();
  }
  char shape[120] = "";
  for (size_t i = 0, used = 0; i < grad_output.rank && used + 28 < sizeof(shape); ++i) {
    used += static_cast<size_t>(std::snprintf(shape + used, sizeof(shape) - used, "%s%lld",
                                              i ? ", " : "", Wide(grad_output.dims[i])));
  }
  return InvalidArgument("grad_output has shape [%s], expected [%lld, %lld]", shape, Wide(num_bags),
                         Wide(columns));
}

}  // namespace

Status CheckEmbeddingBagGrad(const EmbeddingBagGradArgs& args, int64_t* num_bags) {
  const EmbeddingBagArgs& a = args.forward;
  if (args.size_bytes != static_cast<int64_t>(sizeof(EmbeddingBagGradArgs))) {
    return InvalidArgument("size_bytes = %lld is not %lld", Wide(args.size_bytes),
                           Wide(sizeof(EmbeddingBagGradArgs)));
  }
  const Status status = CheckEmbeddingBag(a, num_bags);
  if (!status.ok()) return status;
  if (a.dtype > kFloat64) {
    return InvalidArgument("dtype = %d is quantized: a quantized table has no gradient", a.dtype);
  }
  if (args.sparse != 0 && args.sparse != 1) {
    return InvalidArgument("sparse = %d is not 0 or 1", args.sparse);
  }
  if (args.scale_grad_by_freq != 0 && args.scale_grad_by_freq != 1) {
    return InvalidArgument("scale_grad_by_freq = %d is not 0 or 1", args.scale_grad_by_freq);
  }
  if (args.grad_per_sample_weights && a.mode != kSum) {
    if (a.divisor == kNone || !Divides(a.mode)) {
      return InvalidArgument("grad_per_sample_weights needs mode 'sum'");
    }
    if (!a.per_sample_weights && a.indices_shape[0] > 0 &&
        (a.indices_rank == 1 || a.indices_shape[1] > 0)) {
      return InvalidArgument("grad_per_sample_weights needs per_sample_weights");
    }
  }
  return CheckGradOutput({args.grad_output_shape, 2}, *num_bags, a.weight_shape[1]);
}

Status CheckEmbeddingBagGradInputs(TensorShape grad_output, EmbeddingBagGradArgs* args,
                                   int64_t* num_bags) {
  const EmbeddingBagArgs& a = args->forward;
  Status status = CountBags(a, num_bags);
  if (status.ok()) status = CheckGradOutput(grad_output, *num_bags, a.weight_shape[1]);
  if (!status.ok()) return status;
  args->grad_output_shape[0] = *num_bags;
  args->grad_output_shape[1] = a.weight_shape[1];
  return CheckPadding(a);
}

}  // namespace lucid
