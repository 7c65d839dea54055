#include "cpu/isa.h"
#include "meter.h"

#if defined(__x86_64__)
#include <immintrin.h>

#pragma GCC target("avx2,fma,f16c")

namespace mmca::cpu::meter_avx2 {
#include "cpu/simd_avx2.h"
#include "meter_body.h"
}  // namespace mmca::cpu::meter_avx2
#endif
