// Which kernels run: the best that machine and build have, unless told otherwise.
#include <atomic>

#include "kernels.h"
#include "net_kernels.h"
#include "pomona.h"

#if POMONA_X86 && defined(_MSC_VER)
#include <intrin.h>
#elif POMONA_X86
#include <cpuid.h>
#endif

namespace pomona {
namespace {

#if POMONA_X86

// Asked of the processor itself: compilers' own helpers need run-time libraries that not all of them bring.
struct Registers {
  unsigned eax, ebx, ecx, edx;
};

Registers cpuid(unsigned leaf) {
#if defined(_MSC_VER)
  int out[4];
  __cpuidex(out, static_cast<int>(leaf), 0);
  return {static_cast<unsigned>(out[0]), static_cast<unsigned>(out[1]), static_cast<unsigned>(out[2]),
          static_cast<unsigned>(out[3])};
#else
  Registers r{};
  __cpuid_count(leaf, 0, r.eax, r.ebx, r.ecx, r.edx);
  return r;
#endif
}

// Which registers the operating system saves.
unsigned saved_registers() {
#if defined(_MSC_VER)
  return static_cast<unsigned>(_xgetbv(0));
#else
  unsigned low = 0, high = 0;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return low;
#endif
}

int detect() {
  const auto has = [](unsigned bits, unsigned wanted) { return (bits & wanted) == wanted; };
  if (cpuid(0).eax < 7) return POMONA_PORTABLE;
  if (!has(cpuid(1).ecx, 1u << 12 | 1u << 23 | 1u << 27)) return POMONA_PORTABLE;  // FMA, POPCNT, OSXSAVE
  const unsigned features = cpuid(7).ebx, saved = saved_registers();
  if (!has(features, 1u << 5) || !has(saved, 0x6)) return POMONA_PORTABLE;  // AVX2
  const unsigned avx512 = 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31;        // F, DQ, BW, VL
  return has(features, avx512) && has(saved, 0xe6) ? POMONA_AVX512 : POMONA_AVX2;
}

#else

int detect() { return POMONA_PORTABLE; }

#endif

int max_isa() {
  static const int isa = detect();
  return isa;
}

std::atomic<int> chosen{-1};

int isa_in_use() {
  const int isa = chosen.load(std::memory_order_relaxed);
  return isa < 0 ? max_isa() : isa;
}

template <typename T>
const T& of_isa(const T* portable, const T* avx2, const T* avx512) {
  switch (isa_in_use()) {
    case POMONA_AVX512: return *avx512;
    case POMONA_AVX2: return *avx2;
    default: return *portable;
  }
}

}  // namespace

const Kernels& kernels() { return of_isa(portable_kernels(), avx2_kernels(), avx512_kernels()); }

const AllNetKernels& net_kernels() { return of_isa(portable_net_kernels(), avx2_net_kernels(), avx512_net_kernels()); }

}  // namespace pomona

extern "C" {

int pomona_max_isa(void) { return pomona::max_isa(); }

int pomona_isa(void) { return pomona::isa_in_use(); }

int pomona_set_isa(int isa) {
  if (isa < 0 || isa > pomona::max_isa()) return POMONA_BAD_VALUE;
  pomona::chosen.store(isa, std::memory_order_relaxed);
  return POMONA_OK;
}

int pomona_abi(void) { return POMONA_ABI; }

const char* pomona_version(void) { return POMONA_VERSION; }

}
