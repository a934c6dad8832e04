/* Pomona's runtime: networks with sparse weights, executed as a whole. Plain C, no Python and no torch.
 *
 * A network is a list of nodes in order of execution. Values are numbered: first the inputs, then what each node
 * yields, one value a node. Shapes are those of one sample, without the batch: (features), (positions, features), or
 * (channels, height, width). All numbers that come and go are float32, all arrays dense and row-major, of samples one
 * after the other.
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

/* Operations. x is the first operand. */
enum {
  POMONA_CONV = 0,   /* (C,H,W) -> (O,H',W'): weight (O, C/groups * kh * kw), bias (O) or none; zero padding */
  POMONA_LINEAR = 1, /* (F) -> (O), (P,F) -> (P,O): weight (O, F), bias (O) or none */
  POMONA_RELU = 2,
  POMONA_CLIP = 3, /* min(max(x, low), high) */
  POMONA_GELU = 4, /* x Phi(x), by erf */
  POMONA_GELU_TANH = 5,
  POMONA_SILU = 6,
  POMONA_SIGMOID = 7,
  POMONA_TANH = 8,
  POMONA_HARDSWISH = 9,
  POMONA_HARDSIGMOID = 10,
  POMONA_ADD = 11,      /* two operands of one shape */
  POMONA_MUL = 12,      /* the second of the same shape, or (C,1,1) for (C,H,W) */
  POMONA_SCALE = 13,    /* weight (C, 1) times x, plus bias (C): by channel, or feature */
  POMONA_MAX_POOL = 14, /* kernel, stride, padding of -infinity */
  POMONA_AVG_POOL = 15, /* kernel, stride, padding of zeros; POMONA_COUNT_PADDING */
  POMONA_MEAN = 16,     /* over height and width: (C,H,W) -> (C,1,1) */
  POMONA_FLATTEN = 17,  /* (C,H,W), or (features) -> (features) */
  POMONA_CONCAT = 18,   /* along channels; one or more operands */
  POMONA_NUM_OPS = 19,
};

enum {
  POMONA_COUNT_PADDING = 1, /* POMONA_AVG_POOL divides by what of a window is in the input or its padding */
  POMONA_CEIL = 2,          /* pools: windows that begin inside of the input or its left padding but end beyond */
};

typedef struct {
  int32_t op;
  int32_t first_operand, num_operands;                           /* operands[first_operand ...]: values */
  int32_t weight, bias;                                          /* tensors, or -1 */
  int32_t kernel[2], stride[2], padding[2], dilation[2], groups; /* of convolutions and pools */
  int32_t flags;
  float low, high; /* POMONA_CLIP */
} pomona_node;

typedef struct {
  int32_t rank; /* 1, 2 or 3 */
  int32_t dims[3];
} pomona_shape;

/* A matrix: sparse by rows (CSR), or dense where `starts` is NULL. A bias is a dense one of one column. */
typedef struct {
  const float* values;    /* row-major where dense */
  const int32_t* columns; /* ascending in each row; NULL where dense */
  const int64_t* starts;  /* rows + 1, from 0 */
  int64_t rows, cols;
  int64_t num_values; /* of `values`, and of `columns` */
} pomona_tensor;

typedef struct {
  const pomona_shape* inputs;
  const pomona_node* nodes;
  const int32_t* operands;
  const pomona_tensor* tensors;
  const int32_t* outputs; /* values */
  int32_t num_inputs, num_nodes, num_operands, num_tensors, num_outputs;
} pomona_graph;

/* Whether layers run as if without zeros; else as is faster. */
enum { POMONA_DENSE_NEVER = 1, POMONA_DENSE_ALWAYS = 2 };

/* With `ranges` a network computes in 16-bit fixed point instead of float32, in half the memory. A value v is then kept
 * as an int16 q, v = u q. Its unit u = POMONA_HEADROOM range / 32767, 1e-18 at least, is raised in the order of the
 * nodes, to 1e18 at most, all of it in float32:
 *
 *   relu, clip, add, concat: to the largest unit of the operands;
 *
 *   max_pool, flatten: it is the operand's.
 *
 * To a layer belongs the add behind it, where nothing else reads the layer and the other operand, the residual, is
 * there already; and the relu or clip behind that, or behind the layer, likewise. Then u is the unit of the last of
 * these. Its products are summed in units s = 2^d u, with the least d <= 15 for which few weights are kept in parts:
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

/* Shape of any value, after checks. */
POMONA_API int pomona_net_shape(const pomona_net* net, int32_t value, pomona_shape* shape);

/* outputs[i] = output i of `batch` >= 0 samples, inputs[i] the samples of input i. One call at a time on one network.
 *
 * Any number of threads yields the same bits; a batch of another size or another machine may round otherwise. What a
 * number of samples that go together needs is planned when it first occurs, and fewer go together where max_bytes
 * leaves no room; each thread but the first takes as much scratch memory again as is counted for one. Infinities and
 * NaNs stay within their sample; weights that are zero may or may not be multiplied by them. Errors: POMONA_BAD_VALUE,
 * POMONA_BAD_POINTER, POMONA_NO_MEMORY. */
POMONA_API int pomona_net_run(pomona_net* net, int64_t batch, const float* const* inputs, float* const* outputs,
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
