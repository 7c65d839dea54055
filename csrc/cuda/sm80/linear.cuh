// Linear attention in 16 bits on the host: which sweeps, in how many pieces (linear_pieces.cuh).
#pragma once

#include <algorithm>

#include "cuda/sm80/linear_states.h"
#include "cuda/sm80/linear_sweep.cuh"

namespace mmca::cuda::sm80 {

template <class T, int P>
class SweepStart {
 public:
  using Shared = SweepTile<P>;

  SweepStart(const LinearLaunch& launch, LinearSweep sweep) : launch_(launch), sweep_(sweep) {
    const LinearProblem& p = launch.problem;
    sweep_.columns = (sweep.values + Shared::columns - 1) / Shared::columns;
    sweep_.aligned = has_aligned_rows(sweep.y, sweep.values);
    sweep_.slab_size = P * Shared::columns + P;
    cut();
    const bool given = sweep.role >= SweepRole::value_gradient ? p.grad_final_state.sum : p.state.sum;
    if (several_ || given || sweep.needs_end) {
      sweep_.slabs = launch.take<float>(blocks() * sweep_.slab_size);
      if (several_ || sweep.needs_end) start(&linear_sums_kernel<T, P>, Shared::sums_bytes);
      start_linear_states(launch, sweep_, P, Shared::columns);
    }
    start(&linear_sweep_kernel<T, P>, Shared::bytes);
  }

 private:
  // As many pieces as keep all multiprocessors busy; a piece is never so short that its state outweighs its rows. So
  // the rounding of long heads depends on how many heads there are, and on the GPU; never on what they hold.
  void cut() {
    const LinearProblem& p = launch_.problem;
    // Of a sequence's time, packed: of all; and of these tokens those that write or read, which is where the kernels
    // work.
    const std::int64_t busy = std::max(p.q_len, p.k_len), all = p.q_len + p.k_len;
    const std::int64_t tokens = p.causal && !p.q_offsets ? busy : all;
    const std::int64_t lines = (p.q_offsets ? 1 : launch_.plan.sequences) * p.kv_heads * sweep_.columns;
    const std::int64_t wanted = launch_.device.multiprocessors * Shared::blocks / std::max<std::int64_t>(1, lines);
    const auto chunks_of = [](std::int64_t n) { return (n + Shared::tokens - 1) / Shared::tokens; };
    constexpr std::int64_t fewest = 256 / Shared::tokens;
    const std::int64_t shared = wanted > 1 ? (busy + wanted - 1) / wanted : tokens;
    const std::int64_t segment = std::max(chunks_of(shared), fewest) * Shared::tokens;
    sweep_.segment = static_cast<std::int32_t>(segment);
    several_ = tokens > segment;
    sweep_.pieces =
        p.q_offsets ? 0 : static_cast<std::int32_t>(std::max<std::int64_t>(1, (tokens + segment - 1) / segment));
  }

  std::int64_t blocks() const {
    const LinearProblem& p = launch_.problem;
    return slot_count(p, launch_.plan, sweep_) * p.kv_heads * sweep_.columns;
  }
  template <class Kernel>
  void start(Kernel kernel, std::size_t shared_bytes) const {
    launch_(kernel, blocks(), Shared::threads, shared_bytes, launch_.problem, launch_.plan, sweep_);
  }

  const LinearLaunch& launch_;
  LinearSweep sweep_;
  bool several_ = false;
};

template <class T>
void start_sweep(const LinearLaunch& launch, const LinearSweep& sweep) {
  if (sweep.depth <= 64) SweepStart<T, 64>(launch, sweep);
  else if (sweep.depth <= 128) SweepStart<T, 128>(launch, sweep);
  else SweepStart<T, 256>(launch, sweep);
}

inline LinearSweep make_sweep(const LinearProblem& p, SweepRole role, const LinearRowFacts& facts) {
  LinearSweep sweep{};
  sweep.role = role, sweep.facts = facts;
  const auto head_dim = static_cast<std::int32_t>(p.head_dim), value_dim = static_cast<std::int32_t>(p.value_dim);
  const auto set = [&](const Input& f, std::int32_t depth, const Input& g, std::int32_t values, const Input& x,
                       const Output& y) {
    sweep.f = f, sweep.depth = depth, sweep.g = g, sweep.values = values, sweep.x = x, sweep.y = y;
  };
  switch (role) {
    case SweepRole::forward:
    case SweepRole::facts: set(p.key, head_dim, p.value, value_dim, p.query, p.out); break;
    case SweepRole::query_gradient: set(p.value, value_dim, p.key, head_dim, p.grad_out, p.grad_query); break;
    case SweepRole::value_gradient: set(p.query, head_dim, p.grad_out, value_dim, p.key, p.grad_value); break;
    case SweepRole::key_gradient: set(p.grad_out, value_dim, p.query, head_dim, p.value, p.grad_key); break;
  }
  sweep.needs_end =
      (role == SweepRole::forward && p.final_state.sum) || (role == SweepRole::key_gradient && p.grad_state.sum);
  return sweep;
}

template <class T>
void linear_forward(const LinearLaunch& launch) {
  start_sweep<T>(launch, make_sweep(launch.problem, SweepRole::forward, {}));
}

template <class T>
void linear_backward(const LinearLaunch& launch) {
  const LinearProblem& p = launch.problem;
  LinearRowFacts facts{};
  facts.size = (p.q_offsets ? 1 : p.batch) * p.q_heads * p.q_len;
  const std::int64_t parts = p.head_dim <= 128 ? (p.value_dim + 63) / 64 : (p.value_dim + 31) / 32 * 2;
  facts.inverse = static_cast<float*>(p.row_facts.data), facts.product = facts.inverse + facts.size;
  facts.top = launch.take<float>(facts.size);
  facts.parts = parts > 1 ? launch.take<float>(parts * facts.size) : facts.product;
  start_sweep<T>(launch, make_sweep(p, SweepRole::facts, facts));
  if (parts > 1) add_linear_products(launch, facts, static_cast<int>(parts));
  for (const SweepRole role : {SweepRole::query_gradient, SweepRole::value_gradient, SweepRole::key_gradient})
    start_sweep<T>(launch, make_sweep(p, role, facts));
}

}  // namespace mmca::cuda::sm80
