// The kernels of MMCA_CPU_KERNELS, with products of packed operands; included inside the namespace of an instruction
// set, after its Simd<T>.

#include "cpu/bodies.h"
#include "cpu/feature_map.h"
#include "cpu/linear_sweep.h"
#include "cpu/linear_forward.h"
#include "cpu/linear_backward.h"

template <class T>
void linear_forward(const LinearProblem& problem, Executor& executor) {
  const LinearSequences sequences(problem);
  run_sweep(LinearStage<T, LinearForward>(problem, sequences), executor);
}

template <class T>
void linear_backward(const LinearProblem& problem, Executor& executor) {
  const LinearSequences sequences(problem);
  run_sweep(LinearStage<T, LinearQueryGradient>(problem, sequences), executor);
  run_sweep(LinearStage<T, LinearValueGradient>(problem, sequences), executor);
  run_sweep(LinearStage<T, LinearKeyGradient>(problem, sequences), executor);
}

#define MMCA_DEFINE_KERNEL(operation, dtype, T)                                            \
  void operation##_##dtype(const Problem& problem, const Plan& plan, Executor& executor) { \
    operation<T, Packed>(problem, plan, executor);                                         \
  }
MMCA_CPU_KERNELS(MMCA_DEFINE_KERNEL)

#define MMCA_DEFINE_LINEAR_KERNEL(operation, dtype, T) \
  void operation##_##dtype(const LinearProblem& problem, Executor& executor) { operation<T>(problem, executor); }
MMCA_CPU_LINEAR_KERNELS(MMCA_DEFINE_LINEAR_KERNEL)
