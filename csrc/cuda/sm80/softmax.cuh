// The running softmax of rows whose scores come tile by tile (its maths: forward.cuh).
#pragma once

#include "cuda/sm80/tile.cuh"
#include "cuda/scores.cuh"

namespace mmca::cuda::sm80 {

template <int M>
struct RunningSoftmax {
  float top[M][2], sum[M][2];  // m, and this lane's part of l
};

template <int M>
PRIM void clear(RunningSoftmax<M>& softmax) {
#pragma unroll
  for (int m = 0; m < M; ++m)
#pragma unroll
    for (int h = 0; h < 2; ++h) softmax.top[m][h] = -infinity<float>(), softmax.sum[m][h] = 0.0f;
}

// p of scores in their place, and the factor f of what was summed up before. Products are positive multiples of scores:
// c (t - m) in one operation.
template <bool Products, int M, int N>
PRIM void soften(Accumulator<M, N>& s, RunningSoftmax<M>& softmax, float (&factor)[M][2], float unit) {
#pragma unroll
  for (int m = 0; m < M; ++m)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float top = softmax.top[m][h];
#pragma unroll
      for (int n = 0; n < N; ++n) top = fmaxf(top, fmaxf(s[m][n][2 * h], s[m][n][2 * h + 1]));
      top = quad_max(top);
      const float reference = top == -infinity<float>() ? 0.0f : top, shift = -reference * unit;
      const auto weight = [&](float x) {
        return prim::exp2_approx(Products ? fmaf(x, unit, shift) : (x - reference) * unit);
      };
      factor[m][h] = weight(softmax.top[m][h]);
      float even = 0.0f, odd = 0.0f;
#pragma unroll
      for (int n = 0; n < N; ++n) {
        s[m][n][2 * h] = weight(s[m][n][2 * h]), s[m][n][2 * h + 1] = weight(s[m][n][2 * h + 1]);
        even += s[m][n][2 * h], odd += s[m][n][2 * h + 1];
      }
      softmax.sum[m][h] = fmaf(softmax.sum[m][h], factor[m][h], even + odd);
      softmax.top[m][h] = top;
    }
}

// d times f. That the sums take part in the question has them summed up before it, not in the shadow of the products
// that follow, where each weight would live twice: in 32 bits and rounded.
template <int M, int N>
PRIM void rescale(Accumulator<M, N>& d, const float (&factor)[M][2], const RunningSoftmax<M>& softmax) {
  bool same = true;
#pragma unroll
  for (int m = 0; m < M; ++m)
#pragma unroll
    for (int h = 0; h < 2; ++h) same = same && factor[m][h] == 1.0f && softmax.sum[m][h] >= 0.0f;
  if (!prim::any_lane(!same)) return;
#pragma unroll
  for (int m = 0; m < M; ++m)
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) d[m][n][e] *= factor[m][e / 2];
}

}  // namespace mmca::cuda::sm80
