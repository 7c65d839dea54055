// Linear attention on the GPU: what a kernel's host side is given (core/linear_problem.h, core/kernel_table.h).
#pragma once

#include "core/linear_problem.h"
#include "cuda/launch.h"

namespace mmca::cuda {

// Which rows are a sequence's, and whom it hides. Arrays are device memory; linear_plan.cu.
struct LinearPlan {
  std::int32_t sequences = 0;  // batch; packed: what lies past the last offset is one more, which sees nothing

  // Packed: (sequences + 1) offsets each, ascending and within the tokens whatever cu_seqlens holds. Null: not packed.
  const std::int32_t* q_offsets = nullptr;
  const std::int32_t* k_offsets = nullptr;

  // [sequence]: the first key that key_mask leaves; its k_len if there is none. Null: no mask.
  const std::int32_t* first_keys = nullptr;
};
LinearPlan make_linear_plan(const LinearProblem& problem, const DeviceCall& call);

struct LinearLaunch : DeviceCall {
  const LinearProblem& problem;
  const LinearPlan plan;

  LinearLaunch(const DeviceCall& call, const LinearProblem& problem, const LinearPlan& plan)
      : DeviceCall(call), problem(problem), plan(plan) {}
};

// Any GPU from 8.0 on, fp32 (T = float) and fp64 (T = double).
namespace generic {
template <class T>
void linear_forward(const LinearLaunch& launch);
template <class T>
void linear_backward(const LinearLaunch& launch);
}  // namespace generic

// Tensor cores, T = BFloat16 or Float16.
namespace sm80 {
template <class T>
void linear_forward(const LinearLaunch& launch);
template <class T>
void linear_backward(const LinearLaunch& launch);
}  // namespace sm80

}  // namespace mmca::cuda
