#include "cuda/linear_sequences.cuh"

namespace mmca::cuda {
namespace {

using namespace prim;

constexpr int first_key_threads = 256;

// A block a sequence.
__global__ void __launch_bounds__(first_key_threads)
    first_keys_kernel(const __grid_constant__ LinearProblem problem, const __grid_constant__ LinearPlan plan,
                      std::int32_t* first_keys) {
  const auto b = static_cast<std::int32_t>(blockIdx.x);
  const Sequence sequence = sequence_at(problem, plan, b);
  const auto thread = static_cast<std::int32_t>(threadIdx.x);
  std::int32_t first = 0;
  for (; first < sequence.k_len; first += first_key_threads) {
    const std::int32_t j = first + thread;
    if (syncthreads_or(j < sequence.k_len && ld_global(problem.key_mask + sequence.k_token + j))) break;
  }
  if (thread >= 32) return;
  std::int32_t found = sequence.k_len;
  for (std::int32_t j = first + 32 * (first_key_threads / 32 - 1); j >= first; j -= 32) {
    const bool is_kept = j + thread < sequence.k_len && ld_global(problem.key_mask + sequence.k_token + j + thread);
    const std::uint32_t kept = ballot(is_kept);
    if (kept) found = j + 31 - leading_zeros(kept & (0u - kept));
  }
  if (thread == 0) st_global(first_keys + b, found);
}

}  // namespace

LinearPlan make_linear_plan(const LinearProblem& problem, const DeviceCall& call) {
  LinearPlan plan;
  const bool packed = problem.q_offsets;
  plan.sequences = static_cast<std::int32_t>(problem.batch + (packed ? 1 : 0));
  if (packed) {
    plan.q_offsets = trusted_offsets(call, problem.q_offsets, problem.batch + 1, problem.q_len);
    plan.k_offsets = problem.k_offsets == problem.q_offsets && problem.k_len == problem.q_len
                         ? plan.q_offsets
                         : trusted_offsets(call, problem.k_offsets, problem.batch + 1, problem.k_len);
  }
  if (problem.key_mask) {
    auto* first_keys = call.take<std::int32_t>(plan.sequences);
    call(&first_keys_kernel, plan.sequences, first_key_threads, 0, problem, plan, first_keys);
    plan.first_keys = first_keys;
  }
  return plan;
}

}  // namespace mmca::cuda
