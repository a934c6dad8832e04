// What net_kernels.inc uses. Included before the instruction set is chosen: the standard library stays portable.
#ifndef POMONA_NET_KERNELS_COMMON_H
#define POMONA_NET_KERNELS_COMMON_H

#include <array>
#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <utility>

#include "kernels.h"
#include "net_kernels.h"
#include "operations.inc"
#include "pomona_net.h"

#if POMONA_X86
#include <immintrin.h>
#elif defined(__wasm_simd128__)
#include <wasm_simd128.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#endif
