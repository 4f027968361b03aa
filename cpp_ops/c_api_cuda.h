/* The C entry points that liblucid_onnx_ops_cuda has beside those of c_api.h.
 *
 * EmbeddingBagArgs holds device pointers here (an array of them, as in EmbeddingBagCollectionArgs,
 * is the host's); LucidCudaPlan and LucidBoundsError are declared in embedding_bag/cuda.h, the
 * plans of other operators in the cuda.h of theirs. None of these functions waits for the device,
 * and none allocates there. A call is: plan, get plan.scratch_bytes of device memory and a
 * LucidBoundsError of zeros there, launch, and, when the stream has come past it, copy the
 * LucidBoundsError back and ask what it says.
 */
#ifndef LUCID_C_API_CUDA_H_
#define LUCID_C_API_CUDA_H_

#include "c_api.h"
#include "embedding_bag/cuda.h"
#include "embedding_bag_collection/cuda.h"
#include "embedding_bag_grad/cuda.h"

#ifdef __cplusplus
extern "C" {
#endif

/* The devices that the driver lists, 0 without a driver; message says why. */
LUCID_EXPORT int lucid_cuda_device_count(char* message, size_t message_size);

/* These three give 0, or a code and a text as lucid_embedding_bag does. */
LUCID_EXPORT int lucid_cuda_plan(const EmbeddingBagArgs* args, LucidCudaPlan* plan, char* message,
                                 size_t message_size);

/* scratch: a multiple of 256, or NULL if scratch_bytes is 0. stream: a cudaStream_t; NULL is the
 * default one. */
LUCID_EXPORT int lucid_cuda_embedding_bag(const EmbeddingBagArgs* args, void* scratch,
                                          int64_t scratch_bytes, LucidBoundsError* error,
                                          void* stream, char* message, size_t message_size);

/* The same for the bags of several tables. */
LUCID_EXPORT int lucid_cuda_plan_collection(const EmbeddingBagCollectionArgs* args,
                                            LucidCudaCollectionPlan* plan, char* message,
                                            size_t message_size);
LUCID_EXPORT int lucid_cuda_embedding_bag_collection(const EmbeddingBagCollectionArgs* args,
                                                     void* scratch, int64_t scratch_bytes,
                                                     LucidBoundsError* error, void* stream,
                                                     char* message, size_t message_size);

/* The same for a gradient. If plan->num_entries is -1, args->num_entries, which planning does not
 * look at, must be what lucid_cuda_embedding_bag_grad_entries writes: a number on the device. The
 * plan asks CUB what sorting needs, for which there must be a device; and it depends on which
 * outputs are wanted, so those pointers are set before. */
LUCID_EXPORT int lucid_cuda_plan_grad(const EmbeddingBagGradArgs* args, LucidCudaGradPlan* plan,
                                      char* message, size_t message_size);
LUCID_EXPORT int lucid_cuda_embedding_bag_grad_entries(const EmbeddingBagGradArgs* args,
                                                       int64_t* num_entries,
                                                       LucidBoundsError* error, void* stream,
                                                       char* message, size_t message_size);
LUCID_EXPORT int lucid_cuda_embedding_bag_grad(const EmbeddingBagGradArgs* args, void* scratch,
                                               int64_t scratch_bytes, LucidBoundsError* error,
                                               void* stream, char* message, size_t message_size);

/* error: on the host. */
LUCID_EXPORT int lucid_cuda_refusal(const LucidBoundsError* error, char* message,
                                    size_t message_size);

#ifdef __cplusplus
}
#endif

#endif /* LUCID_C_API_CUDA_H_ */
