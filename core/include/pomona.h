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
 * - Scratch memory: at most 16 MiB for keys in pomona_select, a few MiB for its sample, 64 KiB a thread (16 bytes a bin
 *   in pomona_histogram), and 40 bytes for every 2^14 elements.
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
} pomona_score;

typedef struct {
  int64_t num_greater;  /* keys > threshold */
  int64_t num_equal;    /* keys == threshold */
  int64_t num_infinite; /* keys == POMONA_KEY_INFINITE */
  int64_t num_nan;      /* keys > POMONA_KEY_INFINITE */
  int32_t threshold;
  int32_t num_passes; /* over all scores, the sample apart: 1 unless the sample misled or keys tie by the million */
} pomona_selection;

typedef struct {
  int64_t num_greater, num_equal; /* as of pomona_selection, of one tensor */
} pomona_counts;

/* The k-th largest key of all scores together, 0 <= k <= number of scores.
 *
 * Zeros are never selected: with fewer than k other keys the threshold is 1, the smallest key of a score that is not
 * zero. With k = 0 it is POMONA_KEY_MAX. So in every case num_greater <= k, and exactly the keys > threshold and the
 * first min(num_equal, k - num_greater) equal ones are to be kept. `counts` has room for
 * num_scores, and costs no pass of its own unless the threshold was found by histograms. */
POMONA_API int pomona_select(const pomona_score* scores, int64_t num_scores, int64_t k, int num_threads,
                             pomona_selection* out, pomona_counts* counts);

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

/* torch.optim.SGD on a gradient that is masked by the scores |w g|, in one pass. Per element, in float32:
 *
 *   g' = g * mask           (all of g where threshold is 0)
 *   d  = g' + weight_decay w   (weight_decay != 0)
 *   z  = momentum z + (1 - dampening) d, on the first step z = d
 *   u  = z, with nesterov d + momentum z; without momentum u = d, and z is not touched
 *   w  = w - lr u
 *
 * Scalars are rounded to float32 where torch does. How products and sums are rounded depends in torch on the path: */
enum {
  /* One rounding each: fma(weight_decay, w, g'), fma(1 - dampening, d, round(momentum z)), fma(momentum, z, d),
   * fma(-lr, u, w). As SGD's loop and foreach do with AVX2 and above. */
  POMONA_ROUND_LOOP = 0,
  /* The same, but fma(momentum, z, round((1 - dampening) d)) in the last n mod 8. As SGD(fused=True) does there. */
  POMONA_ROUND_FUSED = 1,
  /* Every product is rounded before it is added. As all of torch does without AVX2. */
  POMONA_ROUND_SEPARATE = 2,
};

typedef struct {
  double lr, momentum, dampening, weight_decay;
  int32_t nesterov; /* 0 or 1 */
  int32_t rounding; /* POMONA_ROUND_... */
} pomona_sgd;

enum {
  POMONA_STEP_FIRST = 1, /* z is not yet set */
  POMONA_STEP_MASK = 2,  /* also write g' to g, which stays as it was otherwise */
};

typedef struct {
  float* w;
  float* g;
  float* z; /* may be NULL where momentum is 0; no two of w, g, z overlap */
  int64_t n;
  int64_t num_ties;  /* as of a mask; ignored where threshold is 0 */
  int32_t threshold; /* as of a mask; or 0: the gradient is not masked */
  int32_t group;     /* index into groups */
  int32_t flags;     /* POMONA_STEP_... */
  int32_t reserved;
} pomona_step;

POMONA_API int pomona_gsm_step(const pomona_step* steps, int64_t num_steps, const pomona_sgd* groups,
                               int64_t num_groups, int num_threads, int64_t* kept);

/* How many values are infinite or NaN; `types` as of the elements. */
POMONA_API int pomona_finite(const void* const* tensors, const int64_t* sizes, const int32_t* types,
                             int64_t num_tensors, int num_threads, int64_t* num_bad);

POMONA_API const char* pomona_version(void); /* of the package that this was built for */
POMONA_API int pomona_abi(void);             /* POMONA_ABI, as compiled */
POMONA_API int pomona_isa(void);             /* the instruction set in use */
POMONA_API int pomona_max_isa(void);         /* the best that the machine and the build have */
POMONA_API int pomona_set_isa(int isa);      /* for tests; 0 <= isa <= pomona_max_isa(), for the whole process */

#ifdef __cplusplus
}
#endif

#endif
