#include "net_kernels_common.h"

namespace pomona {
namespace {
#define POMONA_LANES 4
#define POMONA_MAX_VECTORS 12
#define POMONA_MAX_DENSE_VECTORS 2
#include "net_kernels.inc"
}  // namespace

const AllNetKernels* portable_net_kernels() { return &kNetKernels; }

}  // namespace pomona
