// The arithmetic of networks, compiled once for every instruction set. In float32, where results differ between them by
// rounding: products and sums are fused where the machine can. Or in int16 fixed point, where a number stands for so
// many times its value's unit: a product is rounded to a whole number of units, w x 2^-15, sums stop at -2^15 and
// 2^15 - 1, and results are the same everywhere, but for operations that go through float32.
#ifndef POMONA_NET_KERNELS_H
#define POMONA_NET_KERNELS_H

#include <cstddef>
#include <cstdint>
#include <type_traits>

namespace pomona {

constexpr int kLine = 64;        // bytes: a cache line, and the widest vector
constexpr int kMaxVectors = 12;  // of a tile
constexpr int kDenseRows = 4;    // rows that share what is loaded
template <typename T>
constexpr int kMaxLanes = kLine / static_cast<int>(sizeof(T));
template <typename T>
constexpr int kMaxTile = kMaxVectors * kMaxLanes<T>;  // positions

// An int16 in both halves, so that one load of 32 bits fills a vector with it.
struct Twice {
  int32_t both = 0;
  static Twice of(int16_t x) { return {static_cast<int32_t>(static_cast<uint16_t>(x) * 0x10001u)}; }
};

template <typename T>
using Factor = std::conditional_t<std::is_same_v<T, float>, float, Twice>;
template <typename T>
using Bits = std::conditional_t<std::is_same_v<T, float>, int32_t, int16_t>;

// One weight: where its input is, from the tile's first position, in numbers.
template <typename T>
struct Entry {
  int32_t offset;
  Factor<T> value;
};

// What happens to sums before they are stored: plus a residual, through an activation, and zero between the images.
template <typename T>
struct Epilogue {
  const T* bias = nullptr;        // a row each, or null
  const T* residual = nullptr;    // at the place of the output, or null
  int32_t num_doublings = 0;      // of int16: before anything else
  bool scales_residual = false;   // of int16: it is of another unit,
  Twice residual_factor;          // and multiplied by this
  const Bits<T>* mask = nullptr;  // a position each: all bits where it is of an image, none between; or null
  int32_t act = -1;               // POMONA_RELU, POMONA_CLIP, or -1
  T low = 0, high = 0;
};

// out[row][p] = epilogue(sum over the row's entries of value * x[offset + p]) for positions p of one tile.
template <typename T>
struct Tile {
  const T* x;
  T* out;
  ptrdiff_t row_stride;  // of out and residual
  int32_t first_row, last_row;
  Epilogue<T> epilogue;  // residual and mask at the tile's first position, bias of row 0
  // With columns in blocks: sums so far, from first_row, where not `is_first`; and where they go, if not `is_last`.
  T* partial;
  ptrdiff_t partial_stride;
  bool is_first, is_last;
};

// What a number that is read stands for, and how many units of the result are 1. Float32 ignores it.
struct Units {
  float a = 1.0f, b = 1.0f, per_out = 1.0f;
  bool is_same = true;  // of what is read first and of the result
};

template <typename T>
struct NetKernels {
  int lanes;
  int max_vectors;        // of a sparse tile
  int max_dense_vectors;  // of a dense one
  // Tiles of 1 <= num_vectors vectors. starts[row], starts[row + 1]: the row's entries.
  void (*sparse)(const Tile<T>& tile, const Entry<T>* entries, const int32_t* starts, int num_vectors);
  // All rows use all `num` inputs: values[(row / kDenseRows * num + k) * kDenseRows + row % kDenseRows].
  void (*dense)(const Tile<T>& tile, const Factor<T>* values, const int32_t* offsets, int64_t num, int num_vectors);
  void (*unary)(int op, const T* x, T* out, int64_t n, float low, float high, Units units);
  void (*add)(const T* a, const T* b, T* out, int64_t n, Units units);
  void (*multiply)(const T* a, const T* b, T* out, int64_t n, Units units);
  void (*scale)(const T* x, float factor, float shift, T* out, int64_t n, Units units);
  void (*maximum)(const T* a, T* inout, int64_t n);
  float (*sum)(const T* x, int64_t n);                    // of the numbers as they are
  void (*copy)(const T* from, T* to, int64_t n);          // in whole vectors: up to lanes - 1 more
  void (*every_second)(const T* from, T* to, int64_t n);  // to[i] = from[2 i]; likewise
  void (*read)(const T* from, float unit, float* to, int64_t n);
  void (*write)(const float* from, float per_unit, T* to, int64_t n);  // rounded; a NaN becomes 0
};

struct AllNetKernels {
  NetKernels<float> float32;
  NetKernels<int16_t> int16;
  // One position, of float32: x[offset] for sparse, x[k] for dense (rows x num, row-major).
  void (*sparse_vector)(const Tile<float>& tile, const Entry<float>* entries, const int32_t* starts);
  void (*dense_vector)(const Tile<float>& tile, const float* values, int64_t num);
};

const AllNetKernels* portable_net_kernels();
const AllNetKernels* avx2_net_kernels();    // nullptr where the build has none
const AllNetKernels* avx512_net_kernels();  // nullptr where the build has none

const AllNetKernels& net_kernels();  // those in use

}  // namespace pomona

#endif
