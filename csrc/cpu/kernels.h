// The kernels of MMCA_CPU_KERNELS, with products of packed operands; included inside the namespace of an instruction
// set, after its Simd<T>.

#include "cpu/bodies.h"

#define MMCA_DEFINE_KERNEL(operation, dtype, T)                                            \
  void operation##_##dtype(const Problem& problem, const Plan& plan, Executor& executor) { \
    operation<T, Packed>(problem, plan, executor);                                         \
  }
MMCA_CPU_KERNELS(MMCA_DEFINE_KERNEL)
