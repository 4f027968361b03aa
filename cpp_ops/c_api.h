/* The C entry points of the library, for tests, tools and hosts other than ONNX Runtime.
 *
 * For callers in other languages, these are the byte offsets on every 64-bit platform. c_api.cc
 * asserts them. EmbeddingBagArgs, which embedding_bag/args.h declares:
 *
 *     byte  type        field               byte  type      field
 *        0  int64_t     size_bytes (= 184)   104  int64_t   num_offsets
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
 *                                            176  int32_t   negative
 *                                            180  int32_t   divisor
 *
 * EmbeddingBagGradArgs, which embedding_bag_grad/args.h declares:
 *
 *     byte  type              field                     byte  type        field
 *        0  int64_t           size_bytes (= 264)         224  void*       grad_per_sample_weights
 *        8  EmbeddingBagArgs  forward                    232  int64_t[2]  grad_output_shape
 *      192  const void*       grad_output                248  int64_t     num_entries
 *      200  void*             grad_weight                256  int32_t     sparse
 *      208  int64_t*          rows                       260  int32_t     scale_grad_by_freq
 *      216  void*             values
 *
 * EmbeddingBagCollectionArgs, whose fields all take 8 bytes: 0 size_bytes (= 40), 8 tables,
 * 16 num_tables, 24 output, 32 packed.
 *
 * QuantizeArgs, whose fields take 8 bytes but for the last two: 0 size_bytes (= 96), 8 rows,
 * 16 output, 24 scale, 32 bias, 40 squares, 48 lost, 56 furthest, 64 num_rows, 72 dim, 80 limit,
 * 88 dtype, 92 output_dtype.
 */
#ifndef LUCID_C_API_H_
#define LUCID_C_API_H_

#include <stddef.h>
#include <stdint.h>

#include "embedding_bag/args.h"
#include "embedding_bag_grad/args.h"
#include "quantize/args.h"

#if defined(_WIN32) && defined(LUCID_BUILDING_LIBRARY)
#define LUCID_EXPORT __declspec(dllexport)
#elif defined(_WIN32)
#define LUCID_EXPORT __declspec(dllimport)
#else
#define LUCID_EXPORT __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* The version of the library, such as "0.1.0". */
LUCID_EXPORT const char* lucid_onnx_version(void);

/* The instruction sets that the library was compiled for, the best one last. For an i outside
 * [0, lucid_isa_count()) lucid_isa_name returns NULL, and the other functions return 0. */
LUCID_EXPORT int lucid_isa_count(void);
LUCID_EXPORT const char* lucid_isa_name(int i);
LUCID_EXPORT int lucid_isa_supported(int i); /* 1: this CPU can run it */

/* The instruction set in use: the environment variable LUCID_FORCE_ISA, else the best supported
 * one. NULL if LUCID_FORCE_ISA names one that cannot run here. */
LUCID_EXPORT const char* lucid_isa_active(void);

/* How many calls have entered the kernels of an instruction set in this process. */
LUCID_EXPORT int64_t lucid_isa_runs(int i);

/* What a session does with a constant table of so many bytes:
 *    0  leaves it where it is
 *    1  puts huge pages under it, in place
 *    2  copies it to huge pages
 *    3  fails to start, because free_bytes are not enough for the copy
 *   -1  memory is not a valid choice, or bytes is negative
 * memory: the session config entry lucid.table_memory; NULL: "auto". is_file: the table is the
 * mapping of a file, as external data is. free_bytes: what lucid_free_memory returns. */
LUCID_EXPORT int lucid_table_plan(const char* memory, int is_file, int64_t bytes,
                                  int64_t free_bytes);

/* What a session does with a constant quantized table whose scales (numbers = 1), or scales and
 * zero_points or biases (numbers = 2), are constant too:
 *    0  does not join them; lucid_table_plan says what becomes of the table
 *    1  copies the table, with the numbers of each row behind its row_bytes of quantized values
 *    2  the same, to huge pages
 *   -1  memory is not a valid choice, or a number is out of range
 * *copy_bytes is the size of the copy, in plan 2 with the rest of its last huge page; else 0. */
LUCID_EXPORT int lucid_joined_table_plan(const char* memory, int64_t rows, int64_t row_bytes,
                                         int numbers, int64_t free_bytes, int64_t* copy_bytes);

/* The memory that this process can still allocate, within the limits of its control groups, in
 * bytes; -1 if the system does not say. */
LUCID_EXPORT int64_t lucid_free_memory(void);

/* The copies of tables that exist now, their bytes, and how many were ever made. */
LUCID_EXPORT int64_t lucid_table_copies(void);
LUCID_EXPORT int64_t lucid_table_copy_bytes(void);
LUCID_EXPORT int64_t lucid_table_copies_made(void);

/* Computes args->output. isa: the name of an instruction set, or NULL for the active one.
 * num_threads: at least 1. Every call checks all of args.
 *
 * Returns 0 if done, else a code of base/status.h: 1 invalid argument, 2 out of memory, 3 internal.
 * If message_size > 0, message receives the text of the error, or "". */
LUCID_EXPORT int lucid_embedding_bag(const EmbeddingBagArgs* args, const char* isa, int num_threads,
                                     char* message, size_t message_size);

/* Computes the outputs of a gradient. Returns as lucid_embedding_bag does. */
LUCID_EXPORT int lucid_embedding_bag_grad(const EmbeddingBagGradArgs* args, const char* isa,
                                          int num_threads, char* message, size_t message_size);

/* *num_entries is what args->num_entries must be in a call with args->sparse. Returns as
 * lucid_embedding_bag does. */
LUCID_EXPORT int lucid_embedding_bag_grad_entries(const EmbeddingBagGradArgs* args,
                                                  int64_t* num_entries, char* message,
                                                  size_t message_size);

/* Computes the bags of several tables into one output. Returns as lucid_embedding_bag does. */
LUCID_EXPORT int lucid_embedding_bag_collection(const EmbeddingBagCollectionArgs* args,
                                                const char* isa, int num_threads, char* message,
                                                size_t message_size);

/* Makes rows of floats smaller, on the calling thread: see quantize/quantize.h. Returns how many
 * rows are done, which are all or those before the first that is not finite or is out of range; -1
 * if an argument is not valid. */
LUCID_EXPORT int64_t lucid_quantize_rows(const QuantizeArgs* args);

#ifdef __cplusplus
}
#endif

#endif /* LUCID_C_API_H_ */
