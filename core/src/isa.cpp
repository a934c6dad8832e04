// Which kernels run: the best that machine and build have, unless told otherwise.
#include <atomic>

#include "kernels.h"
#include "pomona.h"

#if POMONA_X86 && defined(_MSC_VER) && !defined(__clang__)
#include <intrin.h>
#endif

namespace pomona {
namespace {

#if POMONA_X86 && defined(_MSC_VER) && !defined(__clang__)

int detect() {
  int registers[4];
  __cpuid(registers, 0);
  if (registers[0] < 7) return POMONA_PORTABLE;
  __cpuid(registers, 1);
  const int fma = registers[2] >> 12 & 1, popcnt = registers[2] >> 23 & 1, osxsave = registers[2] >> 27 & 1;
  if (!osxsave) return POMONA_PORTABLE;
  const unsigned long long enabled = _xgetbv(0);  // registers that the operating system saves
  __cpuidex(registers, 7, 0);
  const unsigned features = static_cast<unsigned>(registers[1]);
  if (!fma || !popcnt || !(features >> 5 & 1) || (enabled & 0x6) != 0x6) return POMONA_PORTABLE;
  const unsigned avx512 = 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31;  // F, DQ, BW, VL
  return (features & avx512) == avx512 && (enabled & 0xe6) == 0xe6 ? POMONA_AVX512 : POMONA_AVX2;
}

#elif POMONA_X86

int detect() {
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("popcnt");
  if (!avx2) return POMONA_PORTABLE;
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return avx512 ? POMONA_AVX512 : POMONA_AVX2;
}

#else

int detect() { return POMONA_PORTABLE; }

#endif

int max_isa() {
  static const int isa = detect();
  return isa;
}

std::atomic<int> chosen{-1};

}  // namespace

const Kernels& kernels() {
  const int isa = chosen.load(std::memory_order_relaxed);
  switch (isa < 0 ? max_isa() : isa) {
    case POMONA_AVX512: return *avx512_kernels();
    case POMONA_AVX2: return *avx2_kernels();
    default: return *portable_kernels();
  }
}

}  // namespace pomona

extern "C" {

int pomona_max_isa(void) { return pomona::max_isa(); }

int pomona_isa(void) {
  const int isa = pomona::chosen.load(std::memory_order_relaxed);
  return isa < 0 ? pomona::max_isa() : isa;
}

int pomona_set_isa(int isa) {
  if (isa < 0 || isa > pomona::max_isa()) return POMONA_BAD_VALUE;
  pomona::chosen.store(isa, std::memory_order_relaxed);
  return POMONA_OK;
}

int pomona_abi(void) { return POMONA_ABI; }

const char* pomona_version(void) { return POMONA_VERSION; }

}
