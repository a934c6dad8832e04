#include "kernels_common.h"

namespace pomona {
namespace {
#include "kernels.inc"
}  // namespace

const Kernels* portable_kernels() { return &kKernels; }

}  // namespace pomona
