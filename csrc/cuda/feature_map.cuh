// The feature map of linear attention, phi(x) = elu(x) + 1 = exp(min(x, 0)) + max(x, 0); its derivative is min(phi, 1).
#pragma once

#include <cmath>

#include "cuda/primitives.cuh"

namespace mmca::cuda {

PRIM float exp_of_negative(float x) { return expf(x); }
PRIM double exp_of_negative(double x) { return exp(x); }

// Infinity, which has no place in an average, becomes NaN; NaN stays.
template <class T>
PRIM T phi(T x) {
  const T above = x < T(0) ? T(0) : x;
  return exp_of_negative(x - above) + above;
}

// phi of a query, in a scale of its own, which cancels: where all features are negative, phi of the largest is 1, so
// that they do not vanish together; where one is huge, it is 1 too, so that nothing overflows.
template <class T>
struct QueryScale {
  T shift, factor;  // phi is factor * phi(x - shift), and its derivative min(factor, that)

  PRIM explicit QueryScale(T largest)  // of the row's features
      : shift(largest < T(0) ? largest : T(0)), factor(largest > T(1 << 20) ? T(1) / (T(1) + largest) : T(1)) {}
  PRIM T phi_of(T x) const { return factor * phi(x - shift); }
};

// 1 / x; 0 where x is too small for that: a row whose weights all underflow has no average, and is 0.
PRIM float inverse_weight(float x) { return fabsf(x) < 0x1p-126f ? 0.0f : 1.0f / x; }
PRIM double inverse_weight(double x) { return fabs(x) < 0x1p-1022 ? 0.0 : 1.0 / x; }

}  // namespace mmca::cuda
