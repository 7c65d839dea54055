// All kernel bodies, and the entry points made from them; included inside the namespace of an instruction set, after
// its Simd<T>.

#include "cpu/common.h"
#include "cpu/exp2.h"
#include "cpu/tiles.h"
#include "cpu/pack.h"
#include "cpu/rows.h"
#include "cpu/scores.h"
#include "cpu/softmax.h"
#include "cpu/dropout.h"
#include "cpu/few_rows.h"
#include "cpu/small.h"
#include "cpu/forward.h"
#include "cpu/backward.h"
#include "cpu/feature_map.h"
#include "cpu/linear_sweep.h"
#include "cpu/linear_forward.h"
#include "cpu/linear_backward.h"

template <class T>
void attention_forward(const Problem& problem, const Plan& plan, Executor& executor) {
  using Kernel = Forward<T>;
  const auto items = forward_items(problem, plan, executor.concurrency(), Kernel::row_block, Kernel::max_chunk);
  const Kernel kernel(problem, plan, items);
  for_each_item(executor, static_cast<std::int64_t>(items.size()), multiply_adds(problem, items, 1), kernel);
}

template <class T>
void attention_backward(const Problem& problem, const Plan& plan, Executor& executor) {
  using Kernel = Backward<T>;
  const std::int64_t row_bytes = Kernel::partial_row_bytes(problem);
  for (BackwardWave& wave :
       backward_waves(problem, plan, {Kernel::key_range, Kernel::row_block, tile_rows<T>, row_bytes})) {
    const auto bytes = static_cast<std::size_t>(wave.rows * row_bytes), flags = static_cast<std::size_t>(wave.blocks);
    Arena measure(nullptr);
    measure.take<unsigned char>(bytes);
    measure.take<std::uint8_t>(flags);
    Arena arena(call_scratch(measure.used()));
    T* partials = reinterpret_cast<T*>(arena.take<unsigned char>(bytes));
    std::uint8_t* touched = arena.take<std::uint8_t>(flags);
    std::fill_n(touched, flags, std::uint8_t{0});
    const Kernel kernel(problem, plan, wave, partials, touched);
    for_each_item(executor, static_cast<std::int64_t>(wave.items.size()), multiply_adds(problem, wave.items, 3),
                  kernel);
  }
}

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
    operation<T>(problem, plan, executor);                                                 \
  }
MMCA_CPU_KERNELS(MMCA_DEFINE_KERNEL)

#define MMCA_DEFINE_LINEAR_KERNEL(operation, dtype, T) \
  void operation##_##dtype(const LinearProblem& problem, Executor& executor) { operation<T>(problem, executor); }
MMCA_CPU_LINEAR_KERNELS(MMCA_DEFINE_LINEAR_KERNEL)
