// exp2 of `count` registers, in place, interleaved to hide latency; included inside the namespace of an instruction
// set.
//
//     2^x = 2^n * 2^r,  n = round(x),  r = x - n in [-1/2, 1/2],  2^r by a minimax polynomial
//
// n comes from adding 1.5 * 2^mantissa + bias, whose low bits are then the exponent field of 2^n. Valid for
// x <= 127 (1023); below -126.5 (-1022.5), half a step under the normal numbers, the result is exactly 0. exp2(0) is
// exactly 1; NaN stays NaN. Relative error of the polynomials (Remez, relative weight): 1.9e-9 for degree 6 (float),
// 3.1e-18 for degree 11 (double), both far below an ulp. What remains is rounding: at most 0.95 ulp where multiply-adds
// are fused, 1.24 where they are not (measured in tests/cpp/exp2_test.cpp).

template <class T, int count>
MMCA_INLINE void exp2_in_place(typename Simd<T>::Reg (&x)[count]) {
  using S = Simd<T>;
  using C = Exp2Constants<T>;
  typename S::Reg power[count], polynomial[count];
#pragma GCC unroll 8
  for (int u = 0; u < count; ++u) x[u] = S::max(S::broadcast(C::lowest), x[u]);  // this order keeps NaN
#pragma GCC unroll 8
  for (int u = 0; u < count; ++u) power[u] = S::add(x[u], S::broadcast(C::magic));
#pragma GCC unroll 8
  for (int u = 0; u < count; ++u) x[u] = S::sub(x[u], S::sub(power[u], S::broadcast(C::magic)));
#pragma GCC unroll 8
  for (int u = 0; u < count; ++u) power[u] = S::exponent_from_low_bits(power[u]);
#pragma GCC unroll 8
  for (int u = 0; u < count; ++u) polynomial[u] = S::broadcast(C::coefficient[C::degree]);
#pragma GCC unroll 16
  for (int d = C::degree - 1; d >= 0; --d)
#pragma GCC unroll 8
    for (int u = 0; u < count; ++u) polynomial[u] = S::fma(polynomial[u], x[u], S::broadcast(C::coefficient[d]));
#pragma GCC unroll 8
  for (int u = 0; u < count; ++u) x[u] = S::mul(polynomial[u], power[u]);
}

// x[0..count) = exp2(x).
template <class T, int count>
MMCA_INLINE void exp2_each(T* x) {
  using S = Simd<T>;
  constexpr int registers = (count + S::width - 1) / S::width;
  alignas(64) T lanes[registers * S::width] = {};
  std::copy_n(x, count, lanes);
  typename S::Reg r[registers];
#pragma GCC unroll 4
  for (int i = 0; i < registers; ++i) r[i] = S::load(lanes + i * S::width);
  exp2_in_place<T, registers>(r);
#pragma GCC unroll 4
  for (int i = 0; i < registers; ++i) S::store(lanes + i * S::width, r[i]);
  std::copy_n(lanes, count, x);
}
