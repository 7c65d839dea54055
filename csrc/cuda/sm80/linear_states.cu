#include "cuda/sm80/linear_states.h"

namespace mmca::cuda::sm80 {
namespace {

// Element (p, q) of a slab of P x Q numbers of M, then P of the vector, as a place in a problem's states.
struct StatePlace {
  std::int64_t at;  // negative: none
  bool is_vector;
};
PRIM StatePlace state_place(const LinearProblem& problem, const LinearSweep& sweep, std::int32_t element, int P, int Q,
                            std::int32_t column) {
  const std::int32_t p = element / Q, q = element % Q + column, v = element - P * Q;
  const bool phi_f = sweep.has_phi_f();
  if (v < 0) {
    if (p >= sweep.depth || q >= sweep.values) return {-1, false};
    return {phi_f ? p * problem.value_dim + q : q * problem.value_dim + p, false};
  }
  if (phi_f) return {v < sweep.depth ? v : -1, true};
  return {v < Q && v + column < sweep.values ? v + column : -1, true};
}

// A thread per element of the slabs of one KV head of one sequence.
__global__ void __launch_bounds__(256)
    linear_states_kernel(const __grid_constant__ LinearProblem problem, const __grid_constant__ LinearPlan plan,
                         const __grid_constant__ LinearSweep sweep, int P, int Q) {
  const std::int64_t parts = (sweep.slab_size + 255) / 256, index = blockIdx.x / parts;
  const auto element = static_cast<std::int32_t>(blockIdx.x % parts * 256 + threadIdx.x);
  const auto block = static_cast<std::int32_t>(index % sweep.columns);
  const std::int64_t kv_head = index / sweep.columns % problem.kv_heads;
  const SweepLine line =
      sweep_line(problem, plan, sweep, static_cast<std::int32_t>(index / sweep.columns / problem.kv_heads));
  if (!line.sequence.exists || element >= sweep.slab_size) return;

  const StatePlace place = state_place(problem, sweep, element, P, Q, block * Q);
  const auto begins =
      state_of(sweep.backwards() ? problem.grad_final_state : problem.state, problem, line.sequence, kv_head);
  const bool needs_vector = sweep.role != SweepRole::value_gradient;
  double sum = 0.0;
  if (begins.sum && place.at >= 0 && (!place.is_vector || needs_vector))
    sum = ld_global((place.is_vector ? begins.normal : begins.sum) + place.at);

  const std::int64_t first = first_slot(plan, sweep, line.sequence), heads = problem.kv_heads;
  const auto at = [&](std::int32_t s) {
    return sweep.slabs + (((first + s) * heads + kv_head) * sweep.columns + block) * sweep.slab_size + element;
  };
  constexpr int together = 8;  // loads under way at a time
  for (std::int32_t s = 0, pieces = piece_count(sweep, line); s < pieces; s += together) {
    float adds[together];
#pragma unroll
    for (int i = 0; i < together; ++i)
      adds[i] = s + i < pieces && piece_of_line(sweep, line, s + i).adds(sweep) ? ld_global(at(s + i)) : 0.0f;
#pragma unroll
    for (int i = 0; i < together; ++i) {
      if (s + i < pieces) prim::st_global(at(s + i), static_cast<float>(sum));
      sum += static_cast<double>(adds[i]);
    }
  }
  if (!sweep.needs_end || place.at < 0 || (place.is_vector && sweep.has_phi_f() && block != 0)) return;
  const auto ends =
      state_of(sweep.backwards() ? problem.grad_state : problem.final_state, problem, line.sequence, kv_head);
  prim::st_global((place.is_vector ? ends.normal : ends.sum) + place.at, sum);
}

// product = the sum of its parts.
__global__ void __launch_bounds__(256) linear_products_kernel(const __grid_constant__ LinearRowFacts facts, int parts) {
  const std::int64_t at = std::int64_t{blockIdx.x} * 256 + threadIdx.x;
  if (at >= facts.size) return;
  float sum = 0.0f;
  for (int p = 0; p < parts; ++p) sum += ld_global(facts.parts + p * facts.size + at);
  prim::st_global(facts.product + at, sum);
}

}  // namespace

void start_linear_states(const LinearLaunch& launch, const LinearSweep& sweep, int P, int Q) {
  const std::int64_t lines = std::int64_t{launch.plan.sequences} * launch.problem.kv_heads * sweep.columns;
  launch(&linear_states_kernel, lines * ((sweep.slab_size + 255) / 256), 256, 0, launch.problem, launch.plan, sweep, P,
         Q);
}

void add_linear_products(const LinearLaunch& launch, const LinearRowFacts& facts, int parts) {
  launch(&linear_products_kernel, (facts.size + 255) / 256, 256, 0, facts, parts);
}

}  // namespace mmca::cuda::sm80
