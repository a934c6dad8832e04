#include "net_kernels_common.h"

#if POMONA_X86

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,popcnt"))), \
                             apply_to = function)
#elif defined(__GNUC__)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,popcnt")
#endif

namespace pomona {
namespace {
#define POMONA_LANES 16
#define POMONA_MAX_VECTORS 12
#define POMONA_MAX_DENSE_VECTORS 4
#include "net_kernels.inc"
}  // namespace
}  // namespace pomona

#if defined(__clang__)
#pragma clang attribute pop
#endif

namespace pomona {
const AllNetKernels* avx512_net_kernels() { return &kNetKernels; }
}  // namespace pomona

#else

namespace pomona {
const AllNetKernels* avx512_net_kernels() { return nullptr; }
}  // namespace pomona

#endif
