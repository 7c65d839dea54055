// A kernel's view of a linear problem: sequences and heads (cuda/rows.cuh's Sequence, row_offset and tile_of serve here
// too), who sees what, states, and the order of a sweep.
#pragma once

#include "cuda/linear.h"
#include "cuda/rows.cuh"

namespace mmca::cuda {

struct LinearSequence : Sequence {
  std::int32_t first_key;  // that key_mask leaves; k_len: none
  bool exists;             // false: what lies past the last offset

  PRIM bool has_keys() const { return exists && first_key < k_len; }
  PRIM bool hides_key(const LinearProblem& problem, std::int32_t j) const {
    return !exists || (problem.key_mask && !ld_global(problem.key_mask + k_token + j));
  }
  // A row that sees neither key nor state: all up to this one. By the mask: a sum of weights may vanish for other
  // reasons.
  PRIM bool hides_all_from(const LinearProblem& problem, std::int32_t row) const {
    if (!exists) return true;
    const std::int64_t last = (problem.causal ? std::int64_t{row} - q_len : std::int64_t{-1}) + k_len;
    return !problem.state.sum && last < first_key;
  }
};

PRIM LinearSequence linear_sequence_at(const LinearProblem& problem, const LinearPlan& plan, std::int32_t b) {
  LinearSequence sequence{sequence_at(problem, plan, b), 0, true};
  sequence.exists = !is_rest(plan, sequence);
  if (plan.first_keys) sequence.first_key = ld_global(plan.first_keys + b);
  return sequence;
}

// The state of (sequence, KV head), which exists; elements (d, e) of S at d * value_dim + e.
template <class Double>
PRIM LinearStateOf<Double> state_of(const LinearStateOf<Double>& states, const LinearProblem& problem,
                                    const Sequence& sequence, std::int64_t kv_head) {
  if (!states.sum) return {};
  const std::int64_t at = (sequence.index * problem.kv_heads + kv_head) * problem.head_dim;
  return {states.sum + at * problem.value_dim, states.normal + at};
}

// A sweep runs along the rows of one KV head of one sequence (cpu/linear_schedule.h): reader token a sees the writers
// of the first a + lead tokens. Rows are numbered in the order of time, which for some sweeps runs backwards.
struct SweepOrder {
  std::int64_t writers, readers;  // rows
  std::int32_t writers_per_token, readers_per_token;
  std::int64_t lead;

  // How many writers reader row r sees.
  PRIM std::int64_t seen(std::int64_t r) const {
    const std::int64_t tokens = r / readers_per_token + lead, all = writers / writers_per_token;
    return (tokens < 0 ? 0 : tokens > all ? all : tokens) * writers_per_token;
  }
  // Readers are early ones, which see no writer; those of the chunks of writers, each token in the chunk that completes
  // what it sees; and late ones, which see what another has already seen all of.
  PRIM std::int64_t early_end() const { return clamped(1 - lead) * readers_per_token; }
  PRIM std::int64_t late_begin() const {
    const std::int64_t early = clamped(1 - lead), late = clamped(writers / writers_per_token - lead + 1);
    return (late < early ? early : late) * readers_per_token;
  }
  // The first reader of the chunks of writers from row `begin` on.
  PRIM std::int64_t first_reader(std::int64_t begin) const {
    const std::int64_t first = clamped(begin / writers_per_token + 1 - lead) * readers_per_token;
    const std::int64_t low = early_end(), high = late_begin();
    return first < low ? low : first > high ? high : first;
  }

 private:
  PRIM std::int64_t clamped(std::int64_t token) const {
    const std::int64_t all = readers / readers_per_token;
    return token < 0 ? 0 : token > all ? all : token;
  }
};

// Keys write, query rows read: the forward, and the query's gradient.
PRIM SweepOrder order_of_rows(const LinearProblem& problem, const LinearSequence& sequence) {
  const auto heads = static_cast<std::int32_t>(problem.heads_per_kv());
  const std::int64_t q_len = sequence.q_len, k_len = sequence.k_len;
  return {sequence.has_keys() ? k_len : 0, q_len * heads, 1, heads, problem.causal ? 1 + k_len - q_len : k_len + 1};
}
// Query rows write, from the last to the first, and keys read: the gradients of keys and values.
PRIM SweepOrder order_of_keys(const LinearProblem& problem, const LinearSequence& sequence) {
  const auto heads = static_cast<std::int32_t>(problem.heads_per_kv());
  const std::int64_t q_len = sequence.q_len, k_len = sequence.k_len;
  const bool writes = sequence.exists && (sequence.has_keys() || problem.state.sum);
  return {writes ? q_len * heads : 0, k_len, heads, 1, problem.causal ? 1 : q_len + 1};
}

}  // namespace mmca::cuda
