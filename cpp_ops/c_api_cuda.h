/* The C entry points that liblucid_onnx_ops_cuda has in addition to those of c_api.h.
 *
 * A call takes these steps:
 *   1. plan it;
 *   2. allocate plan.scratch_bytes of device memory, and a LucidBoundsError of zeros there;
 *   3. launch it on a stream;
 *   4. when the stream has completed it, copy the LucidBoundsError to the host and pass it to
 *      lucid_cuda_refusal, which says whether an offset or an index was out of bounds.
 *
 * The pointers in EmbeddingBagArgs are device pointers here. The array of them in
 * EmbeddingBagCollectionArgs is in host memory. None of these functions waits for the device or
 * allocates device memory. LucidCudaPlan and LucidBoundsError are declared in embedding_bag/cuda.h,
 * the other plans in the cuda.h of their operators.
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

/* The number of devices; 0 without a driver, and message says why. */
LUCID_EXPORT int lucid_cuda_device_count(char* message, size_t message_size);

/* Whether the kernels run on a device: 0, or a code and a message, such as that the library has no
 * kernel image for it. Starts CUDA on that device. */
LUCID_EXPORT int lucid_cuda_check_device(int device_id, char* message, size_t message_size);

/* The CUDA version that the library was built with, as 1000 * major + 10 * minor, and the first
 * NVIDIA driver that runs it. Needs no device. */
LUCID_EXPORT int lucid_cuda_toolkit_version(void);
LUCID_EXPORT int lucid_cuda_least_driver(void);

/* Plans a call, and checks what can be checked without looking at device memory. Returns 0, or a
 * code and a message, as lucid_embedding_bag does; so do the functions below. */
LUCID_EXPORT int lucid_cuda_plan(const EmbeddingBagArgs* args, LucidCudaPlan* plan, char* message,
                                 size_t message_size);

/* Launches a call. scratch: an address that is a multiple of 256, or NULL if scratch_bytes is 0.
 * error: in device memory. stream: a cudaStream_t; NULL is the default stream. */
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

/* The same for a gradient. Planning ignores args->num_entries. If plan->num_entries is -1, the
 * launch needs the number that lucid_cuda_embedding_bag_grad_entries writes to *num_entries, in
 * device memory. The output pointers must be set before planning, since the plan depends on which
 * are wanted. Planning asks CUB what sorting needs, for which there must be a device. */
LUCID_EXPORT int lucid_cuda_plan_grad(const EmbeddingBagGradArgs* args, LucidCudaGradPlan* plan,
                                      char* message, size_t message_size);
LUCID_EXPORT int lucid_cuda_embedding_bag_grad_entries(const EmbeddingBagGradArgs* args,
                                                       int64_t* num_entries,
                                                       LucidBoundsError* error, void* stream,
                                                       char* message, size_t message_size);
LUCID_EXPORT int lucid_cuda_embedding_bag_grad(const EmbeddingBagGradArgs* args, void* scratch,
                                               int64_t scratch_bytes, LucidBoundsError* error,
                                               void* stream, char* message, size_t message_size);

/* What a LucidBoundsError in host memory says: 0, or a code and a message. */
LUCID_EXPORT int lucid_cuda_refusal(const LucidBoundsError* error, char* message,
                                    size_t message_size);

/* For hosts of ONNX Runtime: the bad offsets and indices of sessions with the session configuration
 * lucid.bounds_check = deferred or run. A deferred session reports them in the next run of the
 * node. But a replay of a CUDA graph runs no node, so whoever replays one must ask.
 *
 * Waits for the device, which no thread may do while a CUDA graph is being recorded. Returns 0, or
 * the code and message of an error, with the name of its operator in front. Errors so far are
 * forgotten then. session: 0 for all sessions of the process, or a number that
 * lucid_cuda_begin_session returned. */
LUCID_EXPORT int lucid_cuda_check_bounds(int64_t session, char* message, size_t message_size);

/* The same for the runs that this thread did. With lucid.bounds_check = run, this must be called
 * after every run, whether it succeeded or not, on its thread (the default, sequential execution
 * mode runs nodes on the thread of the caller). Otherwise nobody reports. wait: 0 if the runtime
 * has waited for the device, as it does at the end of a run that succeeds. */
LUCID_EXPORT int lucid_cuda_check_run(int64_t session, int wait, char* message,
                                      size_t message_size);

/* The sessions that this thread creates between these two calls have the number returned. */
LUCID_EXPORT int64_t lucid_cuda_begin_session(void);
LUCID_EXPORT void lucid_cuda_end_session(void);

#ifdef __cplusplus
}
#endif

#endif /* LUCID_C_API_CUDA_H_ */
