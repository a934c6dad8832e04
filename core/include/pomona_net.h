/* Pomona's runtime: networks with sparse weights, executed as a whole. Plain C, no Python and no torch.
 *
 * A network is a list of nodes in order of execution. Values are numbered: first the inputs, then one value per node.
 * Shapes are those of one sample, without the batch: (features), (positions, features), (channels, height, width), or
 * any four dimensions. Inputs are float32 or integers, all else is float32; all arrays are dense and row-major, with
 * samples one after the other.
 *
 * Everything that comes from a file is checked in pomona_net_new, so that a lying one is an error and never a crash:
 * operands and tensors exist, shapes fit, columns ascend and are in range, no size overflows, and the memory needed is
 * below a bound.
 */
#ifndef POMONA_NET_H
#define POMONA_NET_H

#include "pomona.h"

#ifdef __cplusplus
extern "C" {
#endif

/* made by `make tables`: begin */
/* Operations. x is the first operand. */
enum {
  POMONA_CONV = 0, /* (C, H, W) to (O, H', W'); weight (O, C / groups, kh, kw), or (O, C) for 1 x 1; bias (O,); zero padding */
  POMONA_LINEAR = 1, /* (F,) to (O,), or (P, F) to (P, O); weight (O, F); bias (O,) */
  POMONA_RELU = 2, /* max(x, 0) */
  POMONA_CLIP = 3, /* min(max(x, low), high) */
  POMONA_GELU = 4, /* x Phi(x), by erf */
  POMONA_GELU_TANH = 5, /* x Phi(x), nearly, by tanh */
  POMONA_SILU = 6, /* x sigmoid(x) */
  POMONA_SIGMOID = 7, /* 1 / (1 + exp(-x)) */
  POMONA_TANH = 8, /* tanh(x) */
  POMONA_HARDSWISH = 9, /* x hardsigmoid(x) */
  POMONA_HARDSIGMOID = 10, /* min(max(x + 3, 0), 6) / 6 */
  POMONA_ADD = 11, /* the sum of two values of one shape */
  POMONA_MUL = 12, /* the product of two values of one shape, or of (C, H, W) and (C, 1, 1) */
  POMONA_SCALE = 13, /* weight (C,) times x plus bias (C,): by channel of (C, H, W), or by feature */
  POMONA_MAX_POOL = 14, /* (C, H, W) to (C, H', W'): the largest of a window; padding of at most half the kernel */
  POMONA_AVG_POOL = 15, /* (C, H, W) to (C, H', W'): the mean of a window; padding of at most half the kernel */
  POMONA_MEAN = 16, /* (C, H, W) to (C, 1, 1) */
  POMONA_FLATTEN = 17, /* all numbers of a value of 1, 3 or 4 dimensions, in one */
  POMONA_CONCAT = 18, /* values (C, H, W) along channels, or (F,) */
  POMONA_UPSAMPLE = 19, /* (C, H, W) to (C, H s, W t): each pixel s times down and t times across, where `stride` is (s, t) */
  POMONA_NUM_OPS = 20,
};

/* Attributes: integers, but for a number. A tensor is its index, or -1. */
enum {
  POMONA_ATTRIBUTE_WEIGHT = 0, /* tensor */
  POMONA_ATTRIBUTE_BIAS = 1, /* tensor */
  POMONA_ATTRIBUTE_KERNEL = 2, /* pair */
  POMONA_ATTRIBUTE_STRIDE = 3, /* pair */
  POMONA_ATTRIBUTE_PADDING = 4, /* pair */
  POMONA_ATTRIBUTE_DILATION = 5, /* pair */
  POMONA_ATTRIBUTE_GROUPS = 6, /* integer */
  POMONA_ATTRIBUTE_LOW = 7, /* number */
  POMONA_ATTRIBUTE_HIGH = 8, /* number */
  POMONA_ATTRIBUTE_CEIL = 9, /* bool */
  POMONA_ATTRIBUTE_COUNT_PADDING = 10, /* bool */
  POMONA_NUM_ATTRIBUTES = 11,
};

/* What values are made of. */
enum {
  POMONA_FLOAT32 = 0,
  POMONA_INT32 = 1,
  POMONA_INT64 = 2,
};

#define POMONA_MAX_DIMENSIONS 4
/* made by `make tables`: end */

/* One attribute of a node. What is left out has its default: no tensor, a kernel, stride, dilation and groups of 1, no
 * padding, bounds of infinity, false. An attribute that its operation does not read is an error, and so is one that is
 * there twice. */
typedef struct {
  int32_t name; /* POMONA_ATTRIBUTE_... */
  union {
    int32_t integers[4]; /* as many as the attribute has: two for a pair (height, width), one for others */
    float numbers[4];
  } value;
} pomona_attribute;

typedef struct {
  int32_t op;
  int32_t first_operand, num_operands;     /* operands[first_operand ...]: values */
  int32_t first_attribute, num_attributes; /* attributes[first_attribute ...] */
} pomona_node;

/* What a value is, without the batch. */
typedef struct {
  int32_t dtype; /* POMONA_FLOAT32, ...; what nodes yield is float32 */
  int32_t rank;  /* 1 to POMONA_MAX_DIMENSIONS */
  int32_t dims[POMONA_MAX_DIMENSIONS];
} pomona_type;

/* A matrix: sparse by rows (CSR), or dense where `starts` is NULL. A bias is a dense one of one column. */
typedef struct {
  const float* values;    /* row-major where dense */
  const int32_t* columns; /* ascending in each row; NULL where dense */
  const int64_t* starts;  /* rows + 1, from 0 */
  int64_t rows, cols;
  int64_t num_values; /* of `values`, and of `columns` */
} pomona_tensor;

typedef struct {
  const pomona_type* inputs;
  const pomona_node* nodes;
  const int32_t* operands;
  const pomona_attribute* attributes;
  const pomona_tensor* tensors;
  const int32_t* outputs; /* values of float32 */
  int32_t num_inputs, num_nodes, num_operands, num_attributes, num_tensors, num_outputs;
} pomona_graph;

/* Whether layers run as if they had no zeros; 0: as is faster. */
enum { POMONA_DENSE_NEVER = 1, POMONA_DENSE_ALWAYS = 2 };

/* With `ranges` a network computes in 16-bit fixed point instead of float32, in half the memory. A value v is then kept
 * as an int16 q, v = u q. Its unit u = POMONA_HEADROOM range / 32767, 1e-18 at least, is raised in the order of the
 * nodes, to 1e18 at most, all of it in float32:
 *
 *   relu, clip, add, concat: to the largest unit of the operands;
 *
 *   max_pool, flatten: it is the operand's.
 *
 * The add after a layer belongs to it if nothing else reads the layer and the other operand, the residual, exists
 * already; and so does the relu or clip after that, or after the layer. Then u is the unit of the last of these. Its
 * products are summed in units s = 2^d u, with the least d <= 15 for which few weights are kept in parts:
 *
 *   parts = 1 + floor(|w| (u_in / s) / m) if |w| (u_in / s) > m, and else 1, with m = 32767 / 32768, is at most 16 for
 *   each weight, sum(parts - 1) is at most a sixteenth of the number of weights that are not zero, and max|bias| is at
 *   most 32767 s.
 *
 * A weight is kept as that many (16 at most) equal W = round(2^15 (w / parts) (u_in / s)), a bias as round(bias / s),
 * both within [-32767, 32767]. Added up, from the bias on, are floor(W q_in / 2^15 + 1 / 2), in the order of the
 * columns; then the sum is doubled d times; then comes the residual. Each sum is cut off at the ends of int16. A
 * residual of another unit u_r is
 *
 *   floor(R q_r / 2^15 + 1 / 2), R = min(round(2^15 u_r / u), 32767).
 *
 * Bounds of a clip are rounded to units. Everything else is computed in float32 and rounded once, to q = round(v / u),
 * cut off, 0 for a NaN. So are inputs; and layers of one position, but not where samples go together, or where a
 * convolution needs room around that position. round is to the nearest, and to the even one of two. */
#define POMONA_HEADROOM 4

typedef struct {
  int64_t max_bytes;   /* of all that a network allocates, for weights, plans and activations; 0: 2^34 */
  int32_t micro_batch; /* samples that go through the network together; 0: as fits into the cache */
  int32_t dense;       /* POMONA_DENSE_..., or 0 */
  const float* ranges; /* the largest magnitude of every value, the inputs first; or NULL */
  int32_t num_ranges;  /* num_inputs + num_nodes, or 0 */
} pomona_net_options;

typedef struct pomona_net pomona_net;

/* Make a network; the graph is copied. `options` may be NULL. On an error *bad_node, if not NULL, is the node it was
 * found at, or -1. Errors: POMONA_BAD_VALUE (operation, operand, attribute, shape or range), POMONA_BAD_SIZE (above
 * max_bytes, or a size that overflows), POMONA_BAD_POINTER, POMONA_NO_MEMORY. */
POMONA_API int pomona_net_new(const pomona_graph* graph, const pomona_net_options* options, pomona_net** net,
                              int32_t* bad_node);
POMONA_API void pomona_net_free(pomona_net* net); /* NULL is allowed */

/* Dtype and shape of any value, after checks. */
POMONA_API int pomona_net_type(const pomona_net* net, int32_t value, pomona_type* type);

/* outputs[i] = output i of `batch` >= 0 samples, inputs[i] the samples of input i, of its dtype. One call at a time on one
 * network.
 *
 * Any number of threads yields the same bits; a batch of another size or another machine may round otherwise. What a
 * number of samples that go together needs is planned when it first occurs, and fewer go together where max_bytes
 * leaves no room; each thread but the first takes as much scratch memory again as is counted for one. Infinities and
 * NaNs stay within their sample; weights that are zero may or may not be multiplied by them. Errors: POMONA_BAD_VALUE,
 * POMONA_BAD_POINTER, POMONA_NO_MEMORY. */
POMONA_API int pomona_net_run(pomona_net* net, int64_t batch, const void* const* inputs, float* const* outputs,
                              int num_threads);

/* Seconds spent in each node since it was last asked, by one of its runs with `profile` on; fused nodes count as their
 * first. `seconds` has num_nodes elements. */
POMONA_API int pomona_net_profile(pomona_net* net, int profile, double* seconds);

typedef struct {
  int64_t activation_bytes; /* for the micro-batch that runs together */
  int64_t weight_bytes;     /* as laid out for execution */
  int64_t macs, dense_macs; /* multiplications of one sample: made, and of the same network without zeros */
} pomona_net_info;

POMONA_API int pomona_net_about(const pomona_net* net, pomona_net_info* info);

#ifdef __cplusplus
}
#endif

#endif
