#include "cpu/isa.h"
#include "probe.h"

#if defined(__aarch64__)
#include <arm_neon.h>

namespace mmca::cpu::probe_neon {
#include "cpu/simd_neon.h"
#include "probe_body.h"
}  // namespace mmca::cpu::probe_neon
#endif
