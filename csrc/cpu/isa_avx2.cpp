// Kernels for AVX2 with FMA and F16C: Haswell (2013), Excavator and later.
#include "cpu/isa.h"

#if defined(__x86_64__)
#include <immintrin.h>

#pragma GCC target("avx2,fma,f16c")

namespace mmca::cpu::avx2 {
#include "cpu/simd_avx2.h"
#include "cpu/kernels.h"
}  // namespace mmca::cpu::avx2
#endif
