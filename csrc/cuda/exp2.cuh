// exp2 as exact as the processor's kernels (method and error: cpu/exp2.h), and the scale that turns products into
// exponents of 2. For results in fp32 and fp64; 16 bits are served by exp2_approx.
#pragma once

#include <cmath>
#include <cstring>
#include <limits>

#include "core/exp2_constants.h"
#include "cuda/primitives.cuh"

namespace mmca::cuda {

PRIM float multiply_add(float x, float y, float z) { return fmaf(x, y, z); }
PRIM double multiply_add(double x, double y, double z) { return fma(x, y, z); }

// 2^n from a number whose low mantissa bits hold n + exponent bias.
PRIM float exponent_from_low_bits(float x) {
  std::uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  bits <<= 23;
  memcpy(&x, &bits, sizeof bits);
  return x;
}
PRIM double exponent_from_low_bits(double x) {
  std::uint64_t bits;
  memcpy(&bits, &x, sizeof bits);
  bits <<= 52;
  memcpy(&x, &bits, sizeof bits);
  return x;
}

template <class T, int degree = 0>
PRIM T exp2_polynomial(T x) {
  constexpr T coefficient = Exp2Constants<T>::coefficient[degree];
  if constexpr (degree == Exp2Constants<T>::degree) return coefficient;
  else return multiply_add(exp2_polynomial<T, degree + 1>(x), x, coefficient);
}

// The whole number next to x, in the low bits. No exponent is positive but by the rounding of enormous scores.
template <class T>
PRIM T shifted_exponent(T x) {
  constexpr T lowest = Exp2Constants<T>::lowest;
  return (x < lowest ? lowest : x > T(1) ? T(1) : x) + Exp2Constants<T>::magic;  // NaN stays
}
// 2^x, x = whole + rest; |rest| is little more than 1/2, or scores are so large that nothing of it is exact.
template <class T>
PRIM T exp2_of_parts(T x, T shifted, T rest) {
  rest = x < Exp2Constants<T>::lowest ? T(0) : rest > T(1) ? T(1) : rest < T(-1) ? T(-1) : rest;
  return exp2_polynomial(rest) * exponent_from_low_bits(shifted);
}

// scale * log2(e) in two parts: rounded to one, every score would be off by the same factor. Both are positive, so that
// a hidden -inf stays -inf; the sign, or a scale of 0, goes to the products.
template <class T>
struct ExponentScale {
  T factor, high, low;

  explicit ExponentScale(double scale) {
    factor = scale > 0 ? T(1) : scale < 0 ? T(-1) : T(0);
    constexpr long double log2_e_exact = 1.44269504088896340735992L;
    const long double exact = (scale == 0 ? 1.0L : std::abs(static_cast<long double>(scale))) * log2_e_exact;
    constexpr T smallest = std::numeric_limits<T>::min();
    high = std::fmax(static_cast<T>(exact), smallest);
    if (high >= exact) high = std::fmax(std::nextafter(high, T(0)), smallest);
    low = std::fmax(static_cast<T>(exact - high), smallest);
  }

  // 2^(c difference). The whole part is split off before anything is rounded, so what rounding leaves is a rounding of
  // less than 1/2, not of the exponent.
  PRIM T exp2_below(T difference, T less = T(0)) const {
    const T x = difference * high - less, shifted = shifted_exponent(x), whole = shifted - Exp2Constants<T>::magic;
    return exp2_of_parts(x, shifted, multiply_add(difference, low, multiply_add(difference, high, -whole) - less));
  }
  // 2^(c score - lse - less), in the same way: the whole part goes to lse, and what their sum loses comes back.
  PRIM T exp2_minus(T score, T lse, T less) const {
    const T x = multiply_add(score, low, multiply_add(score, high, -lse)) - less;
    const T shifted = shifted_exponent(x), whole = shifted - Exp2Constants<T>::magic;
    const T sum = lse + whole, part = sum - lse, lost = (lse - (sum - part)) + (whole - part);
    const T rest = multiply_add(score, high, -sum) + (multiply_add(score, low, -less) - lost);
    return exp2_of_parts(x, shifted, rest);
  }
  PRIM double exact(T score) const { return static_cast<double>(score) * (static_cast<double>(high) + low); }
};

}  // namespace mmca::cuda
