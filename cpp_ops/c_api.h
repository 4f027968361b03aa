/* The C entry points of the library, for tests, tools and hosts other than ONNX Runtime.
 *
 * EmbeddingBagArgs is declared in embedding_bag.h. On every 64-bit platform its fields lie at
 *
 *     byte  type        field               byte  type      field
 *        0  int64_t     size_bytes (= 176)   104  int64_t   num_offsets
 *        8  const void* weight               112  double    max_norm
 *       16  const void* indices              120  double    norm_type
 *       24  const void* offsets              128  int64_t   padding_idx
 *       32  const void* per_sample_weights   136  int32_t   dtype
 *       40  void*       output               140  int32_t   index_type
 *       48  const void* scale                144  int32_t   offset_type
 *       56  const void* zero_point           148  int32_t   mode
 *       64  const void* bias                 152  int32_t   indices_rank
 *       72  int64_t[2]  weight_shape         156  int32_t   include_last_offset
 *       88  int64_t[2]  indices_shape        160  int32_t   scale_type
 *                                            164  int32_t   scale_stride
 *                                            168  int32_t   output_type
 *                                            172  int32_t   row_stride
 *
 * and those of EmbeddingBagGradArgs, of embedding_bag_grad.h, at
 *
 *     byte  type              field                     byte  type        field
 *        0  int64_t           size_bytes (= 256)         216  void*       grad_per_sample_weights
 *        8  EmbeddingBagArgs  forward                    224  int64_t[2]  grad_output_shape
 *      184  const void*       grad_output                240  int64_t     num_entries
 *      192  void*             grad_weight                248  int32_t     sparse
 *      200  int64_t*          rows                       252  int32_t     scale_grad_by_freq
 *      208  void*             values
 *
 * and c_api.cc asserts it.
 */
#ifndef LUCID_C_API_H_
#define LUCID_C_API_H_

#include <stddef.h>
#include <stdint.h>

#include "embedding_bag/embedding_bag.h"
#include "embedding_bag_grad/embedding_bag_grad.h"

#if defined(_WIN32)
#define LUCID_EXPORT __declspec(dllexport)
#else
#define LUCID_EXPORT __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

LUCID_EXPORT const char* lucid_onnx_version(void);

/* The instruction sets that the library was compiled for, the best one last. lucid_isa_name gives
 * NULL, the others 0, for an i outside [0, lucid_isa_count()). */
LUCID_EXPORT int lucid_isa_count(void);
LUCID_EXPORT const char* lucid_isa_name(int i);
LUCID_EXPORT int lucid_isa_supported(int i); /* by this CPU */

/* The one in use: LUCID_FORCE_ISA's, else the best. NULL if LUCID_FORCE_ISA names none that runs.
 */
LUCID_EXPORT const char* lucid_isa_active(void);

/* Kernel runs by this instruction set in this process: the proof that a forced one was used. */
LUCID_EXPORT int64_t lucid_isa_runs(int i);

/* What a session would do with a constant table, by the session config entry lucid.table_memory
 * (NULL: "auto"): 0 leave it, 1 put huge pages under it in place, 2 copy it, 3 refuse it because
 * free_bytes are not enough; -1 if memory names no choice. is_file: it is the mapping of a file, as
 * external data is. free_bytes: as lucid_free_memory gives it. */
LUCID_EXPORT int lucid_table_plan(const char* memory, int is_file, int64_t bytes,
                                  int64_t free_bytes);

/* What the process may still take, limits of control groups included; -1: the system does not say.
 */
LUCID_EXPORT int64_t lucid_free_memory(void);

/* Copies of tables that live now, their bytes, and how many were ever made. */
LUCID_EXPORT int64_t lucid_table_copies(void);
LUCID_EXPORT int64_t lucid_table_copy_bytes(void);
LUCID_EXPORT int64_t lucid_table_copies_made(void);

/* Computes args->output. isa: a name, or NULL for the active one. num_threads: 1 and up.
 * Gives 0 if done, else a code of base/status.h (1: refused, 2: no memory, 3: internal) and, if
 * message_size > 0, a text in message. */
LUCID_EXPORT int lucid_embedding_bag(const EmbeddingBagArgs* args, const char* isa, int num_threads,
                                     char* message, size_t message_size);

/* What args->num_entries must be if args->sparse. Answers as lucid_embedding_bag does. */
LUCID_EXPORT int lucid_embedding_bag_grad_entries(const EmbeddingBagGradArgs* args,
                                                  int64_t* num_entries, char* message,
                                                  size_t message_size);

/* Computes the outputs of args, likewise. */
LUCID_EXPORT int lucid_embedding_bag_grad(const EmbeddingBagGradArgs* args, const char* isa,
                                          int num_threads, char* message, size_t message_size);

#ifdef __cplusplus
}
#endif

#endif /* LUCID_C_API_H_ */
