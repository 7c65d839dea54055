#include "cpu/isa.h"
#include "meter.h"

#if defined(__x86_64__)
// As in csrc/cpu/isa_avx512.cpp: gcc's own headers.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>

#pragma GCC target("avx512f,avx512vl,avx512bw,avx512dq,avx2,fma,f16c")

namespace mmca::cpu::meter_avx512 {
#include "cpu/simd_avx512.h"
#include "meter_body.h"
}  // namespace mmca::cpu::meter_avx512
#endif
