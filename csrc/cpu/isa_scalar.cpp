// Portable kernels: what any x86-64, or any other processor, runs.
#include "cpu/isa.h"

namespace mmca::cpu::scalar {
#include "cpu/simd_scalar.h"
#include "cpu/kernels.h"
}  // namespace mmca::cpu::scalar
