#include "cpu/isa.h"
#include "meter.h"

#if defined(__aarch64__)
#include <arm_neon.h>

namespace mmca::cpu::meter_neon {
#include "cpu/simd_neon.h"
#include "meter_body.h"
}  // namespace mmca::cpu::meter_neon
#endif
