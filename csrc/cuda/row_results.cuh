// What a forward leaves of a row beside its output, and what a backward reads of it.
#pragma once

#include "cuda/scores.cuh"

namespace mmca::cuda {

inline constexpr double log2_e = 1.4426950408889634, ln_2 = 0.6931471805599453;

template <class T>
PRIM T* statistic(const RowStatistic<void*>& x, const Sequence& sequence, int group, std::int64_t head,
                  std::int64_t row) {
  return static_cast<T*>(x.data) + sequence.index * x.batch + x.offset(group, head, sequence.q_begin + row);
}
template <class T>
PRIM const T* statistic(const RowStatistic<const void*>& x, const Sequence& sequence, int group, std::int64_t head,
                        std::int64_t row) {
  return static_cast<const T*>(x.data) + sequence.index * x.batch + x.offset(group, head, sequence.q_begin + row);
}

// Writes the log-sum-exp of a row: log(sum) above `maximum`, which is the largest score as an exponent of 2, or, where
// Problem::shapes_scores(), the natural one (finfo.min from a bias has no exponent of 2). sum 0: the row sees nothing.
// Returns lse to base 2 in the first case, to base e in the second.
template <class T>
PRIM double store_lse(const Problem& problem, const Sequence& sequence, int group, std::int64_t head, std::int64_t row,
                      double maximum, T sum) {
  const bool natural = problem.shapes_scores();
  const double log2_sum = log2(static_cast<double>(sum));  // 0: -inf; NaN stays
  const double exact = sum == T(0) ? -infinity<double>() : maximum + (natural ? log2_sum * ln_2 : log2_sum);
  const T lse = static_cast<T>(natural ? exact : exact * ln_2);
  prim::st_global(statistic<T>(problem.lse, sequence, group, head, row), lse);
  if (problem.lse_low.data) {
    const T high = lse * static_cast<T>(log2_e);
    const double low = natural ? log2_e * (maximum - lse) + log2_sum : exact - high;
    prim::st_global(statistic<T>(problem.lse_low, sequence, group, head, row),
                    sum == T(0) ? T(0) : static_cast<T>(low));
  }
  return exact;
}

// Weights of the two groups' outputs, from what store_lse returned of them, or the row's gate.
template <class T>
PRIM void merge_weights(const Problem& problem, const Sequence& sequence, std::int64_t head, std::int64_t row,
                        const double (&lse)[2], T (&weight)[2]) {
  weight[0] = weight[1] = T(1);
  if (problem.merge == Merge::gate)
    for (int g = 0; g < 2; ++g) weight[g] = prim::ld_global(statistic<T>(problem.gate, sequence, g, head, row));
  if (problem.merge != Merge::lse) return;
  const bool empty[2] = {lse[0] == -infinity<double>(), lse[1] == -infinity<double>()};
  if (empty[0] || empty[1]) {  // the only group, whatever its scores
    weight[0] = empty[0] ? T(0) : T(1), weight[1] = empty[1] ? T(0) : T(1);
    return;
  }
  const double unit = problem.shapes_scores() ? log2_e : 1.0, best = lse[0] > lse[1] ? lse[0] : lse[1];
  const double e0 = exp2(unit * (lse[0] - best)), e1 = exp2(unit * (lse[1] - best));
  weight[0] = static_cast<T>(e0 / (e0 + e1)), weight[1] = static_cast<T>(e1 / (e0 + e1));
}

// A weight of zero hides even a NaN.
template <class T>
PRIM T weighted(T weight, T x) {
  return weight == T(0) ? T(0) : weight * x;
}

// A row of one group, for the backward (notation: cpu/backward.h): P = exp2(c t - lse - low) with c = scale log2(e), or
// exp2(log2(e) (s - lse) - low) where scores are shaped; dS = P (weight Z (dO v) - offset); dV += (weight P Z) dO.
// A row that sees nothing has lse = inf, all else 0.
template <class T>
struct alignas(4 * sizeof(T)) RowFacts {
  T lse, low, offset, weight;
};

// Where a row's facts lie: [group][query head][query token].
PRIM std::int64_t facts_index(const Problem& problem, const Sequence& sequence, int group, std::int64_t head,
                              std::int64_t row) {
  const std::int64_t tokens = problem.q_offsets ? problem.q_len : problem.batch * problem.q_len;
  return (group * problem.q_heads + head) * tokens + sequence.q_token + row;
}

}  // namespace mmca::cuda
