#include "kernels_common.h"

#if POMONA_X86

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,popcnt"))), apply_to = function)
#elif defined(__GNUC__)
#pragma GCC target("avx2,fma,popcnt")
#endif

namespace pomona {
namespace {
#define POMONA_USE_AVX2
#include "kernels.inc"
}  // namespace
}  // namespace pomona

#if defined(__clang__)
#pragma clang attribute pop
#endif

namespace pomona {
const Kernels* avx2_kernels() { return &kKernels; }
}  // namespace pomona

#else

namespace pomona {
const Kernels* avx2_kernels() { return nullptr; }
}  // namespace pomona

#endif
