#include "cpu/isa.h"
#include "meter.h"

namespace mmca::cpu::meter_scalar {
#include "cpu/simd_scalar.h"
#include "meter_body.h"
}  // namespace mmca::cpu::meter_scalar
