/* Pomona's core: exact global selection of scores, and updates masked by it, without a temporary of the model's size.
 *
 * Plain C, no Python and no torch. Conventions:
 *
 * - Tensors are dense arrays of `n` elements; where a function takes several arrays of one tensor they are in the same
 *   order in memory. Pointers are aligned to their element. NULL is allowed where n is 0.
 * - The key of a score is the bit pattern of the float32 |float(a) * float(b)|, or |float(a)| where `b` is NULL, read as
 *   int32. Keys order as scores do; 0 is a zero, POMONA_KEY_INFINITE an infinity, and NaNs are above it. The product is
 *   rounded once, in float32; a float64 is rounded to float32 before.
 * - `num_threads` >= 1 is an upper bound; 1 touches no thread. Results never depend on it, nor on the instruction set.
 * - Functions return POMONA_OK or a negative POMONA_* error, and have then changed no tensor. They may be called from any
 *   thread, and in a process that was forked from one that used them.
 * - Scratch memory: in pomona_select at most 16 MiB or one byte per 32 elements for keys, whichever is more, and half as
 *   much for its sample; 64 KiB per thread (16 bytes per bin in pomona_histogram); and 40 bytes per 2^14 elements.
 */
#ifndef POMONA_H
#define POMONA_H

#include <stdint.h>

#if defined(_WIN32)
#if defined(POMONA_BUILDING)
#define POMONA_API __declspec(dllexport)
#else
#define POMONA_API __declspec(dllimport)
#endif
#else
#define POMONA_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

#define POMONA_ABI 5 /* to be raised with every change of a signature, a struct or a constant in this file */

#define POMONA_KEY_INFINITE 0x7f800000
#define POMONA_KEY_MAX 0x7fffffff

/* Types of elements. */
enum { POMONA_F32 = 0, POMONA_BF16 = 1, POMONA_F16 = 2, POMONA_F64 = 3 };

/* Errors. */
enum {
  POMONA_OK = 0,
  POMONA_BAD_TYPE = -1,    /* a type of element that is none of the above */
  POMONA_BAD_SIZE = -2,    /* a negative size or number, or a total above 2^62 */
  POMONA_BAD_POINTER = -3, /* NULL, or not aligned to its element */
  POMONA_BAD_VALUE = -4,   /* another argument is out of its range */
  POMONA_NO_MEMORY = -5,
  POMONA_INTERNAL = -6,
};

/* Instruction sets, in order. The portable one is whatever the compiler targets by default. */
enum { POMONA_PORTABLE = 0, POMONA_AVX2 = 1 /* with FMA */, POMONA_AVX512 = 2 /* F, BW, DQ, VL */ };

typedef struct {
  const void* a;
  const void* b; /* NULL: the score is |a| */
  int64_t n;
  int32_t a_type, b_type; /* POMONA_F32...; b_type is ignored where b is NULL */
  const uint8_t* inside;  /* NULL, or a mask: scores where it is 0 are zero, and the others are raised to at least the
                             smallest normal float32, so that none of them is zero */
} pomona_score;

typedef struct {
  int64_t num_greater;  /* keys > threshold */
  int64_t num_equal;    /* keys == threshold */
  int64_t num_infinite; /* keys == POMONA_KEY_INFINITE */
  int64_t num_nan;      /* keys > POMONA_KEY_INFINITE */
  int32_t threshold;
  int32_t num_passes; /* over all scores, the sample apart: 1 unless the sample misled or keys tie by the million */
} pomona_kth_largest;

typedef struct {
  int64_t num_greater, num_equal; /* as of pomona_kth_largest, of one tensor */
} pomona_counts;

/* The k-th largest key of all scores together, 0 <= k <= number of scores.
 *
 * Zeros are never selected: with fewer than k other keys the threshold is 1, the smallest key of a score that is not
 * zero. With k = 0 it is POMONA_KEY_MAX. So in every case num_greater <= k, and exactly the keys > threshold and the
 * first min(num_equal, k - num_greater) equal ones are to be kept. `counts` has room for
 * num_scores, and costs no pass of its own unless the threshold was found by histograms. */
POMONA_API int pomona_select(const pomona_score* scores, int64_t num_scores, int64_t k, int num_threads,
                             pomona_kth_largest* out, pomona_counts* counts);

typedef struct {
  int64_t num_greater; /* keys > high */
  int64_t num_infinite, num_nan;
} pomona_tally;

/* How many keys fall into each bin of [low, high], 0 <= low <= high: bin (key - low) >> shift, 0 <= shift <= 30.
 *
 * With all_reduce in between this is selection over ranks. `bins` has num_bins >= ((high - low) >> shift) + 1 elements,
 * of which num_bins <= 2^16; all are written. `out` may be NULL. */
POMONA_API int pomona_histogram(const pomona_score* scores, int64_t num_scores, int32_t low, int32_t high, int shift,
                                int64_t* bins, int64_t num_bins, int num_threads, pomona_tally* out);

/* Copy the keys in [low, high], 0 <= low <= high, in any order, as far as `capacity` >= 0 goes; *count is how many there
 * are, which may be more. */
POMONA_API int pomona_gather(const pomona_score* scores, int64_t num_scores, int32_t low, int32_t high, int32_t* keys,
                             int64_t capacity, int num_threads, int64_t* count);

/* For each score tensor the number of keys greater than and equal to `threshold` >= 0. */
POMONA_API int pomona_count(const pomona_score* scores, int64_t num_scores, int32_t threshold, int64_t* greater,
                            int64_t* equal, int num_threads);

/* What a mask keeps of each tensor: keys > threshold, and the first num_ties equal ones in memory order (-1: all).
 * 1 <= threshold, so zero scores are not kept. NaNs are kept if the threshold is at most infinity. */

/* masks[i][j] = 1 where score j of tensor i is kept, else 0. kept[i], if kept is not NULL, counts the ones. */
POMONA_API int pomona_mask(const pomona_score* scores, int64_t num_scores, const int32_t* thresholds,
                           const int64_t* num_ties, uint8_t* const* masks, int num_threads, int64_t* kept);

/* targets[i][j] *= mask, as a product of floats: negative numbers become -0.0, infinities and NaNs a NaN.
 *
 * target_types[i] is POMONA_F32...; a target may be the very array a or b of its score. */
POMONA_API int pomona_multiply(const pomona_score* scores, int64_t num_scores, const int32_t* thresholds,
                               const int64_t* num_ties, void* const* targets, const int32_t* target_types,
                               int num_threads, int64_t* kept);

/* How many values are infinite or NaN; `types` as of the elements. */
POMONA_API int pomona_finite(const void* const* tensors, const int64_t* sizes, const int32_t* types,
                             int64_t num_tensors, int num_threads, int64_t* num_bad);

/* Write +0.0 over values[i][j] where pruned[i][j] is not 0. largest[i], if largest is not NULL, is the largest magnitude
 * that was there: 0 where nothing is pruned, NaN where a NaN was. */
POMONA_API int pomona_zero(void* const* values, const int64_t* sizes, const int32_t* types,
                           const uint8_t* const* pruned, int64_t num_tensors, int num_threads, double* largest);

/* counts[i] has for each row of tensor i, row_sizes[i] >= 1 elements that follow each other, how many are not zero.
 * smallest[i] is the smallest magnitude of these in all rows: infinity where there is none, NaN where one is NaN. */
POMONA_API int pomona_survey(const void* const* values, const int64_t* sizes, const int32_t* types,
                             const int64_t* row_sizes, int64_t num_tensors, int num_threads, int64_t* const* counts,
                             double* smallest);

POMONA_API const char* pomona_version(void); /* of the package that this was built for */
POMONA_API int pomona_abi(void);             /* POMONA_ABI, as compiled */
POMONA_API int pomona_isa(void);             /* the instruction set in use */
POMONA_API int pomona_max_isa(void);         /* the best that the machine and the build have */
POMONA_API int pomona_set_isa(int isa);      /* for tests; 0 <= isa <= pomona_max_isa(), for the whole process */

#ifdef __cplusplus
}
#endif

#endif
