// For the backward: from the products of a tile of rows and a tile of keys to the weights and the scores' gradients.
//
//     P  = exp2(c t - lse - low)      or exp2(log2(e) (s - lse) - low) where scores are shaped; hidden pairs: 0
//     dS = P (weight Z dP - offset)   t = q k, dP = dO v; RowFacts of row_results.cuh
//     W  = weight Z P                 dV += W^T dO
//
// W is rounded as weight_factor W, a power of 2 that keeps the weights of long rows among float16's normal numbers.
#pragma once

#include "cuda/sm80/gradient_rows.cuh"
#include "cuda/sm80/pairs.cuh"
#include "cuda/sm80/row_tiles.cuh"

namespace mmca::cuda::sm80 {

// A warp's part of a tile of rows and a tile of keys.
struct PairPlace {
  const Problem& problem;
  const DevicePlan& plan;
  const Sequence& sequence;
  const std::int32_t* positions;  // of the group's list
  std::int32_t keys;              // its size, or the end of the tile
  int group;
  std::int32_t head, first_entry, first_key;  // of the tiles
  int row, key;                               // the warp's first in the tiles
  float exponent, weight_factor;              // exponent: c
};

// Factors of the weights of one row and a warp's N n8 keys; whole warps call it.
template <int N>
PRIM void dropout_factors(const PairDropout& dropout, const PairPlace& at, std::int32_t row,
                          const std::int32_t (&position)[N][2], float (&factor)[N][2]) {
  if (at.positions) {
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
      for (int e = 0; e < 2; ++e) factor[n][e] = dropout.factor_of(row, position[n][e]);
    return;
  }
  // Keys in their places: an n8 is what one counter serves. Each lane of a quad makes the words of one of four.
#pragma unroll
  for (int n = 0; n < N; n += 4) {
    std::uint32_t word[4];
    dropout.words(row, (at.first_key + at.key) / 8 + n + lane_of_thread() % 4, word);
    transpose_quad(word);
#pragma unroll
    for (int i = 0; i < 4 && n + i < N; ++i)
#pragma unroll
      for (int e = 0; e < 2; ++e) factor[n + i][e] = dropout.factor(word[i], e);
  }
}

// t and g (the products, dP) of a warp's M m16 rows and N n8 keys become dS and W, rounded, at the lane's places of
// two tiles. This one for neither softcap, bias, mask nor dropout.
template <class T, bool WithWeights, bool Cut, int Rows, int Keys, int M, int N>
PRIM void differentiate_plain(const PairPlace& at, const RowTable<Rows>& table, const Accumulator<M, N>& t,
                              const Accumulator<M, N>& g, LanePlace<Keys> score_gradients, LanePlace<Keys> weights) {
  const int row = at.row + lane_of_thread() / 4, key = at.key + fragment_column();
#pragma unroll
  for (int m = 0; m < M; ++m)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int r = 16 * m + 8 * h;
      const RowFacts<float> facts = table.facts(row + r);
      const Interval seen = Cut ? table.seen(row + r) : Interval{};
      const float weight = facts.weight * at.weight_factor;
#pragma unroll
      for (int n = 0; n < N; ++n) {
        float w[2], ds[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const float p = prim::exp2_approx(fmaf(t[m][n][2 * h + e], at.exponent, -facts.lse) - facts.low);
          w[e] = p * weight;
          ds[e] = p * fmaf(facts.weight, g[m][n][2 * h + e], -facts.offset);
          if (Cut && (key + 8 * n + e < seen.begin || key + 8 * n + e >= seen.end)) w[e] = ds[e] = 0.0f;
        }
        prim::st_shared(score_gradients(r, n), prim::pack2<T>(ds[0], ds[1]));
        if (WithWeights) prim::st_shared(weights(r, n), prim::pack2<T>(w[0], w[1]));
      }
    }
}
template <class T, bool WithWeights, int Rows, int Keys, int M, int N>
PRIM void differentiate_plain(const PairPlace& at, const RowTable<Rows>& table, const Accumulator<M, N>& t,
                              const Accumulator<M, N>& g, LanePlace<Keys> score_gradients, LanePlace<Keys> weights) {
  // Is there a row of the warp that does not see all of its keys?
  const Interval seen = table.seen(at.row + lane_of_thread() % (16 * M));
  if (prim::any_lane(seen.begin > at.key || seen.end < at.key + 8 * N))
    differentiate_plain<T, WithWeights, true>(at, table, t, g, score_gradients, weights);
  else differentiate_plain<T, WithWeights, false>(at, table, t, g, score_gradients, weights);
}

// And this one for all of them. WithWeights: it also adds the bias' gradient.
template <class T, bool WithWeights, int Rows, int Keys, int M, int N>
PRIM void differentiate_general(const PairPlace& at, const RowTable<Rows>& table, const Accumulator<M, N>& t,
                                const Accumulator<M, N>& g, LanePlace<Keys> score_gradients, LanePlace<Keys> weights) {
  const Problem& problem = at.problem;
  const PairScores<float> scores(problem, at.sequence, at.head);
  const PairDropout dropout(problem, at.sequence, at.head);
  const bool natural = problem.shapes_scores();
  const Output& bias = problem.grad_bias;
  float* grad_bias = nullptr;
  if (WithWeights && bias.data)
    grad_bias = static_cast<float*>(bias.data) + row_offset(bias, at.sequence, at.sequence.q_begin, at.head, 0);

  std::int32_t position[N][2];
#pragma unroll
  for (int n = 0; n < N; ++n)
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const std::int32_t key = at.first_key + at.key + fragment_column() + 8 * n + e;
      position[n][e] = key < at.keys ? position_at(at.positions, key) : 0;
    }
#pragma unroll
  for (int m = 0; m < M; ++m)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int r = at.row + 16 * m + 8 * h + lane_of_thread() / 4;
      const RowFacts<float> facts = table.facts(r);
      const Interval seen = table.seen(r);
      const bool looks = seen.begin < seen.end;
      const std::int32_t row = looks ? row_of(at.plan, at.sequence, at.first_entry + r) : 0;
      float factor[N][2];
      const bool drops =
          dropout.any() && !(at.group == 1 && looks && is_self_entry(at.plan, at.sequence, at.first_entry + r));
      if (dropout.any()) dropout_factors(dropout, at, row, position, factor);
#pragma unroll
      for (int n = 0; n < N; ++n) {
        float w[2] = {0.0f, 0.0f}, ds[2] = {0.0f, 0.0f};
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int key = at.key + fragment_column() + 8 * n + e;
          if (key < seen.begin || key >= seen.end) continue;
          const float product = t[m][n][2 * h + e];
          float p, slope = 1.0f;
          if (natural) {
            const float s = scores.score(product, row, position[n][e], slope);
            if (s == -infinity<float>()) continue;
            p = prim::exp2_approx((s - facts.lse) * static_cast<float>(log2_e) - facts.low);
          } else {
            if (!scores.visible(row, position[n][e])) continue;
            p = prim::exp2_approx(fmaf(product, at.exponent, -facts.lse) - facts.low);
          }
          w[e] = p * facts.weight;
          if (drops) w[e] *= factor[n][e];
          ds[e] = w[e] * g[m][n][2 * h + e] - p * facts.offset;
          if (grad_bias && ds[e] != 0.0f)
            prim::atomic_add(grad_bias + row * bias.row + position[n][e] * bias.feature, ds[e]);
          ds[e] *= slope;
        }
        prim::st_shared(score_gradients(16 * m + 8 * h, n), prim::pack2<T>(ds[0], ds[1]));
        if (WithWeights)
          prim::st_shared(weights(16 * m + 8 * h, n), prim::pack2<T>(at.weight_factor * w[0], at.weight_factor * w[1]));
      }
    }
}

}  // namespace mmca::cuda::sm80
