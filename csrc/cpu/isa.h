// How one set of kernel bodies becomes one kernel per instruction set.
//
// Each isa_*.cpp includes this file, switches its target with a pragma, opens a namespace of its own and includes
// simd_<isa>.h and kernels.h there. Everything that may hold that instruction set's code therefore has a name of its
// own, and no shared inline function can end up compiled for a newer machine than the one it runs on.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <numeric>
#include <type_traits>
#include <vector>

#include "core/executor.h"
#include "core/exp2_constants.h"
#include "core/half.h"
#include "core/linear_problem.h"
#include "core/philox.h"
#include "core/plan.h"
#include "core/problem.h"
#include "cpu/linear_schedule.h"
#include "cpu/scratch.h"
#include "cpu/schedule.h"

#define MMCA_INLINE inline __attribute__((always_inline))
#define MMCA_NOINLINE __attribute__((noinline))

// The kernels of every instruction set: X(operation, dtype, accumulation type). Kernels that differ in how numbers are
// stored alone share their code.
#define MMCA_CPU_KERNELS(X)          \
  X(attention_forward, f32, float)   \
  X(attention_forward, f64, double)  \
  X(attention_forward, bf16, float)  \
  X(attention_forward, f16, float)   \
  X(attention_backward, f32, float)  \
  X(attention_backward, f64, double) \
  X(attention_backward, bf16, float) \
  X(attention_backward, f16, float)

// AMX multiplies matrices of bf16 alone; its other types are those of AVX-512, which every such processor has.
#define MMCA_AMX_KERNELS(X)         \
  X(attention_forward, bf16, float) \
  X(attention_backward, bf16, float)

#define MMCA_CPU_LINEAR_KERNELS(X) \
  X(linear_forward, f32, float)    \
  X(linear_forward, f64, double)   \
  X(linear_forward, bf16, float)   \
  X(linear_forward, f16, float)    \
  X(linear_backward, f32, float)   \
  X(linear_backward, f64, double)  \
  X(linear_backward, bf16, float)  \
  X(linear_backward, f16, float)

#define MMCA_DECLARE_KERNEL(operation, dtype, T) \
  void operation##_##dtype(const Problem& problem, const Plan& plan, Executor& executor);
#define MMCA_DECLARE_LINEAR_KERNEL(operation, dtype, T) \
  void operation##_##dtype(const LinearProblem& problem, Executor& executor);
#define MMCA_DECLARE_KERNELS            \
  MMCA_CPU_KERNELS(MMCA_DECLARE_KERNEL) \
  MMCA_CPU_LINEAR_KERNELS(MMCA_DECLARE_LINEAR_KERNEL)

namespace mmca::cpu {
namespace scalar {
MMCA_DECLARE_KERNELS
}
#if defined(__x86_64__)
namespace avx2 {
MMCA_DECLARE_KERNELS
}
namespace avx512 {
MMCA_DECLARE_KERNELS
}
namespace amx {
MMCA_AMX_KERNELS(MMCA_DECLARE_KERNEL)
}
#endif
#if defined(__aarch64__)
namespace neon {
MMCA_DECLARE_KERNELS
}
#endif
}  // namespace mmca::cpu
