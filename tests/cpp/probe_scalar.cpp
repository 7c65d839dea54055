#include "cpu/isa.h"
#include "probe.h"

namespace mmca::cpu::probe_scalar {
#include "cpu/simd_scalar.h"
#include "probe_body.h"
}  // namespace mmca::cpu::probe_scalar
