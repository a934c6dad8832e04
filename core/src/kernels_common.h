// What kernels.inc uses. Included before the instruction set is chosen, so that the standard library stays portable.
#ifndef POMONA_KERNELS_COMMON_H
#define POMONA_KERNELS_COMMON_H

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>

#include "kernels.h"
#include "pomona.h"

#if POMONA_X86
#include <immintrin.h>
#endif

#if defined(_MSC_VER)
#define POMONA_RESTRICT __restrict
#else
#define POMONA_RESTRICT __restrict__
#endif

#endif
