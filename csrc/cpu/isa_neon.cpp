// Kernels for Advanced SIMD (NEON), which every AArch64 processor has: the baseline, so no pragma switches it on.
#include "cpu/isa.h"

#if defined(__aarch64__)
#include <arm_neon.h>

// Scheduled before registers are allocated, a tile's broadcasts are all loaded first, and g++ 12 keeps three of the 24
// accumulators in memory.
#pragma GCC optimize("no-schedule-insns")

namespace mmca::cpu::neon {
#include "cpu/simd_neon.h"
#include "cpu/kernels.h"
}  // namespace mmca::cpu::neon
#endif
