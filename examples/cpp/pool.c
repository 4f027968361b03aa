#include <math.h>
#include <stdio.h>

#include <lucid_onnx/c_api.h>

int main(void) {
  const float weight[3][2] = {{1, 2}, {10, 20}, {100, 200}};
  const int64_t indices[] = {0, 1, 2}, offsets[] = {0, 2};
  float output[2][2];
  EmbeddingBagArgs args = {.size_bytes = sizeof args, .weight = weight, .indices = indices, .offsets = offsets};
  args.output = output;
  args.weight_shape[0] = 3, args.weight_shape[1] = 2;
  args.indices_shape[0] = 3;
  args.num_offsets = 2;
  args.max_norm = INFINITY, args.norm_type = 2, args.padding_idx = INT64_MIN; /* no clipping, no padding */
  args.index_type = args.offset_type = 1;                                     /* int64; dtype 0 is float32, mode 0 is sum */
  args.indices_rank = 1;
  char message[256];
  if (lucid_embedding_bag(&args, NULL, 1, message, sizeof message) != 0) return puts(message), 1;
  printf("%g %g, %g %g\n", output[0][0], output[0][1], output[1][0], output[1][1]); /* 11 22, 100 200 */
  return 0;
}
