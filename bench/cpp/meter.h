// What a processor can do at most, per instruction set: multiply-adds in registers, and reading memory.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/cpu_features.h"

namespace mmca::bench {

struct Meter {
  int width = 0;  // floats of a register
  double flops_per_step = 0;
  // Independent chains of x = x * factor + addend, as many as a kernel's tile has accumulators. Returns their sum.
  float (*multiply_add)(std::int64_t steps, float factor, float addend) = nullptr;
  // The sum of `count` floats.
  float (*sum)(const float* data, std::int64_t count) = nullptr;
  const char* limit = "multiply-adds";
};

// An inner loop of AMX, `registers` of its operands or products long. Plain pointers: nothing of the standard library
// is compiled for a newer processor.
struct MatrixLoop {
  const char* name;
  bool product;
  double registers;
  void (*run)(std::int64_t times);
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
namespace meter_amx {
void get_meter(bench::Meter& meter);  // all but the sum
void get_loops(const bench::MatrixLoop*& first, int& count);
}  // namespace meter_amx
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
  if (isa == Isa::avx512 || isa == Isa::amx) cpu::meter_avx512::get_meter(meter);
  if (isa == Isa::amx) cpu::meter_amx::get_meter(meter);
#endif
#if defined(__aarch64__)
  if (isa == Isa::neon) cpu::meter_neon::get_meter(meter);
#endif
  if (isa == Isa::scalar) cpu::meter_scalar::get_meter(meter);
  return meter;
}

inline std::vector<MatrixLoop> matrix_loops() {
#if defined(__x86_64__)
  const MatrixLoop* first = nullptr;
  int count = 0;
  cpu::meter_amx::get_loops(first, count);
  return {first, first + count};
#else
  return {};
#endif
}

}  // namespace mmca::bench
