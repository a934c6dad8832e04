// What net_kernels.inc uses. Included before the instruction set is chosen, so that the standard library stays portable.
#ifndef POMONA_NET_KERNELS_COMMON_H
#define POMONA_NET_KERNELS_COMMON_H

#include <array>
#include <cstddef>
#include <cstdint>
#include <utility>

#include "kernels.h"
#include "net_kernels.h"
#include "pomona_net.h"

#endif
