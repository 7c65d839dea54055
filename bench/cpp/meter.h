// What a processor can do at most, per instruction set: multiply-adds in registers, and reading memory.
#pragma once

#include <cstdint>

#include "cpu/cpu_features.h"

namespace mmca::bench {

struct Meter {
  int width = 0;  // floats of a register
  double flops_per_step = 0;
  // Independent chains of x = x * factor + addend, as many as a kernel's tile has accumulators. Returns their sum.
  float (*multiply_add)(std::int64_t steps, float factor, float addend) = nullptr;
  // The sum of `count` floats.
  float (*sum)(const float* data, std::int64_t count) = nullptr;
};

}  // namespace mmca::bench

// What the meter_*.cpp files define.
namespace mmca::cpu {
namespace meter_scalar {
void get_meter(bench::Meter& meter);
}
#if defined(__x86_64__)
namespace meter_avx2 {
void get_meter(bench::Meter& meter);
}
namespace meter_avx512 {
void get_meter(bench::Meter& meter);
}
#endif
#if defined(__aarch64__)
namespace meter_neon {
void get_meter(bench::Meter& meter);
}
#endif
}  // namespace mmca::cpu

namespace mmca::bench {

inline Meter meter_of(Isa isa) {
  Meter meter;
#if defined(__x86_64__)
  if (isa == Isa::avx2) cpu::meter_avx2::get_meter(meter);
  // Tiles share the processor with AVX-512, and are measured by its multiply-adds.
  if (isa == Isa::avx512 || isa == Isa::amx) cpu::meter_avx512::get_meter(meter);
#endif
#if defined(__aarch64__)
  if (isa == Isa::neon) cpu::meter_neon::get_meter(meter);
#endif
  if (isa == Isa::scalar) cpu::meter_scalar::get_meter(meter);
  return meter;
}

}  // namespace mmca::bench
