// The arithmetic of networks, compiled once for every instruction set. Results differ between them by rounding:
// products and sums are fused where the machine can.
#ifndef POMONA_NET_KERNELS_H
#define POMONA_NET_KERNELS_H

#include <cstddef>
#include <cstdint>

namespace pomona {

constexpr int kMaxVectors = 12;  // of a tile
constexpr int kMaxLanes = 16;
constexpr int kMaxTile = kMaxVectors * kMaxLanes;  // positions
constexpr int kDenseRows = 4;                      // rows that share what is loaded

// One weight: where its input is, from the tile's first position, in floats.
struct Entry {
  int32_t offset;
  float value;
};

// What happens to sums before they are stored: plus a residual, through an activation, and zero between the images.
struct Epilogue {
  const float* bias = nullptr;      // a row each, or null
  const float* residual = nullptr;  // at the place of the output, or null
  const int32_t* mask = nullptr;    // a position each: all bits where it is of an image, none between; or null
  int32_t act = -1;                 // POMONA_RELU, POMONA_CLIP, or -1
  float low = 0.0f, high = 0.0f;
};

// out[row][p] = epilogue(sum over the row's entries of value * x[offset + p]) for positions p of one tile.
struct Tile {
  const float* x;
  float* out;
  ptrdiff_t row_stride;  // of out and residual
  int32_t first_row, last_row;
  Epilogue epilogue;  // residual and mask at the tile's first position, bias of row 0
  // With columns in blocks: sums so far, from first_row, where not `is_first`; and where they go, if not `is_last`.
  float* partial;
  ptrdiff_t partial_stride;
  bool is_first, is_last;
};

struct NetKernels {
  int lanes;
  int max_vectors;        // of a sparse tile
  int max_dense_vectors;  // of a dense one
  // Tiles of 1 <= num_vectors vectors. starts[row], starts[row + 1]: the row's entries.
  void (*sparse)(const Tile& tile, const Entry* entries, const int32_t* starts, int num_vectors);
  // All rows use all `num` inputs: values[(row / kDenseRows * num + k) * kDenseRows + row % kDenseRows].
  void (*dense)(const Tile& tile, const float* values, const int32_t* offsets, int64_t num, int num_vectors);
  // One position. x[offset] for sparse, x[k] for dense (rows x num, row-major).
  void (*sparse_vector)(const Tile& tile, const Entry* entries, const int32_t* starts);
  void (*dense_vector)(const Tile& tile, const float* values, int64_t num);
  void (*unary)(int op, const float* x, float* out, int64_t n, float low, float high);
  void (*add)(const float* a, const float* b, float* out, int64_t n);
  void (*multiply)(const float* a, const float* b, float* out, int64_t n);
  void (*scale)(const float* x, float factor, float shift, float* out, int64_t n);
  void (*maximum)(const float* a, float* inout, int64_t n);
  float (*sum)(const float* x, int64_t n);
  void (*copy)(const float* from, float* to, int64_t n);          // in whole vectors: up to lanes - 1 more
  void (*every_second)(const float* from, float* to, int64_t n);  // to[i] = from[2 i]; likewise
};

const NetKernels* portable_net_kernels();
const NetKernels* avx2_net_kernels();    // nullptr where the build has none
const NetKernels* avx512_net_kernels();  // nullptr where the build has none

const NetKernels& net_kernels();  // those in use

}  // namespace pomona

#endif
