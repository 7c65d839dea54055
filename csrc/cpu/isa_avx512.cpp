// Kernels for AVX-512 (F, VL, BW, DQ): Skylake-SP, Zen 4 and later.
#include "cpu/isa.h"

#if defined(__x86_64__)
// gcc 12 warns of its own headers' deliberately undefined registers.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>

#pragma GCC target("avx512f,avx512vl,avx512bw,avx512dq,avx2,fma,f16c")

namespace mmca::cpu::avx512 {
#include "cpu/simd_avx512.h"
#include "cpu/kernels.h"
}  // namespace mmca::cpu::avx512
#endif
