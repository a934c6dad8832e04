// What is compiled once for every instruction set. All results are the same on all of them, bit for bit.
#ifndef POMONA_KERNELS_H
#define POMONA_KERNELS_H

#include <cstdint>

#if defined(__x86_64__) || defined(_M_X64)
#define POMONA_X86 1
#else
#define POMONA_X86 0
#endif

namespace pomona {

constexpr int kGatherSlack = 16;    // keys that `gather` may write beyond those it gathers
constexpr int kHistogramLanes = 4;  // copies of a histogram, so that equal keys in a row do not wait for each other

struct Tally {
  int64_t num_greater = 0;
  int64_t num_infinite = 0;
  int64_t num_nan = 0;
};

// `b` is NULL where the score is |a|. All kernels take any n in [0, 2^20].
struct Kernels {
  // Appends the keys in [low, high] to `out`, which has room for n + kGatherSlack; returns how many. Adds to the tally,
  // num_greater of `high`.
  int64_t (*gather)(const float* a, const float* b, int64_t n, int32_t low, int32_t high, int32_t* out, Tally* tally);
  // Adds to kHistogramLanes histograms, each of which has num_bins + 2 bins: [num_bins] below, [num_bins + 1] above.
  void (*histogram)(const float* a, const float* b, int64_t n, int32_t low, int32_t high, int shift, int64_t num_bins,
                    uint32_t* lanes, Tally* tally);
  void (*count)(const float* a, const float* b, int64_t n, int32_t threshold, int64_t* greater, int64_t* equal);
  // These two keep the keys > above, -1 <= above, and return how many.
  int64_t (*mask)(const float* a, const float* b, int64_t n, int32_t above, uint8_t* out);
  int64_t (*multiply)(const float* a, const float* b, int64_t n, int32_t above, float* target);
  int64_t (*nonfinite)(const void* values, int64_t n, int type);
  // The magnitudes of scores inside a mask, at least the smallest normal number each; zero outside.
  void (*among)(const float* a, const float* b, const uint8_t* inside, int64_t n, float* out);
  // Writes +0.0 where `pruned` is not 0. Returns the largest magnitude that was there, as the bits of the type.
  uint64_t (*zero)(void* values, const uint8_t* pruned, int64_t n, int type);
  // Returns how many are not zero. Lowers *smallest and raises *largest to the magnitudes of these, as bits of the type.
  int64_t (*survey)(const void* values, int64_t n, int type, uint64_t* smallest, uint64_t* largest);
  void (*to_float)(const void* values, int64_t n, int type, float* out);  // magnitudes right, signs perhaps lost
};

const Kernels* portable_kernels();
const Kernels* avx2_kernels();    // nullptr where the build has none
const Kernels* avx512_kernels();  // nullptr where the build has none

const Kernels& kernels();  // those in use

}  // namespace pomona

#endif
