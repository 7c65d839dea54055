// The feature map of linear attention, phi(x) = elu(x) + 1 = exp(min(x, 0)) + max(x, 0), row by row; included inside
// the namespace of an instruction set. Its derivative is min(phi(x), 1).

// exp of numbers of at most 0, as 2^n exp(r) with r = x - n ln 2: exp2.h's polynomial in another variable. ln 2 is
// taken away in two parts, so that the error is no larger for large |x|. Below -126.5 ln 2 (-1022.5 ln 2) the result is
// exactly 0; NaN stays NaN.
template <class T>
struct ExpConstants;

template <>
struct ExpConstants<float> {
  static constexpr float lowest = -88.02f, ln_2_high = 0x1.63p-1f, ln_2_low = -0x1.bd0106p-13f;
};

template <>
struct ExpConstants<double> {
  static constexpr double lowest = -709.0, ln_2_high = 0x1.62e42feep-1, ln_2_low = 0x1.a39ef35793c76p-33;
};

template <class T>
constexpr T exp_coefficient(int d) {
  long double power = 1;
  for (int i = 0; i < d; ++i) power *= log2_e_exact;
  return static_cast<T>(power * Exp2Constants<T>::coefficient[d]);
}

template <class T, int count>
MMCA_INLINE void exp_in_place(typename Simd<T>::Reg (&x)[count]) {
  using S = Simd<T>;
  using C = Exp2Constants<T>;
  using E = ExpConstants<T>;
  typename S::Reg power[count], polynomial[count];
#pragma GCC unroll 8
  for (int u = 0; u < count; ++u) x[u] = S::max(S::broadcast(E::lowest), x[u]);  // this order keeps NaN
#pragma GCC unroll 8
  for (int u = 0; u < count; ++u) power[u] = S::fma(S::broadcast(static_cast<T>(log2_e)), x[u], S::broadcast(C::magic));
#pragma GCC unroll 8
  for (int u = 0; u < count; ++u) {
    const typename S::Reg n = S::sub(power[u], S::broadcast(C::magic));
    if constexpr (S::fused && sizeof(T) == 4) {
      x[u] = S::fma(n, S::broadcast(static_cast<T>(-ln_2)), x[u]);
    } else {
      x[u] = S::fma(n, S::broadcast(-E::ln_2_high), x[u]);
      x[u] = S::fma(n, S::broadcast(-E::ln_2_low), x[u]);
    }
  }
#pragma GCC unroll 8
  for (int u = 0; u < count; ++u) power[u] = S::exponent_from_low_bits(power[u]);
  constexpr T leading = exp_coefficient<T>(C::degree);
#pragma GCC unroll 8
  for (int u = 0; u < count; ++u) polynomial[u] = S::broadcast(leading);
#pragma GCC unroll 16
  for (int d = C::degree - 1; d >= 0; --d)
#pragma GCC unroll 8
    for (int u = 0; u < count; ++u) polynomial[u] = S::fma(polynomial[u], x[u], S::broadcast(exp_coefficient<T>(d)));
#pragma GCC unroll 8
  for (int u = 0; u < count; ++u) x[u] = S::mul(polynomial[u], power[u]);
}

// out[0..padded) = phi(row) for the first `features`, then zeros; `scaled`: factor * phi(row - shift). padded: a
// multiple of lanes. Returns the lane-wise maximum of the row, whose padding is zero.
template <class T, bool scaled>
MMCA_NOINLINE typename Simd<T>::Reg apply_phi(const T* row, int features, int padded, T shift, T factor, T* out) {
  using S = Simd<T>;
  constexpr int at_once = 4;
  const typename S::Reg zero = S::zero(), shifts = S::broadcast(shift), factors = S::broadcast(factor);
  typename S::Reg best = S::broadcast(-infinity<T>);
  const auto map = [&](int d, auto count) {
    constexpr int n = count.value;
    typename S::Reg above[n], e[n];
#pragma GCC unroll 4
    for (int u = 0; u < n; ++u) {
      typename S::Reg x = S::loadu(row + d + u * S::width);
      best = S::max(best, x);
      if constexpr (scaled) x = S::sub(x, shifts);
      above[u] = S::max(zero, x);  // this order keeps NaN
      e[u] = S::sub(x, above[u]);  // min(x, 0); infinity, which has no place in an average, becomes NaN
    }
    exp_in_place<T, n>(e);
#pragma GCC unroll 4
    for (int u = 0; u < n; ++u) {
      e[u] = S::add(e[u], above[u]);
      if constexpr (scaled) e[u] = S::mul(factors, e[u]);
      S::storeu(out + d + u * S::width, e[u]);
    }
  };
  int d = 0;
  for (; d + at_once * S::width <= padded; d += at_once * S::width) map(d, std::integral_constant<int, at_once>{});
  for (; d < padded; d += lanes<T>) map(d, std::integral_constant<int, 2>{});
  for (d = features; d < padded; ++d) out[d] = T(0);
  return best;
}

// Of a key.
template <class T>
MMCA_INLINE void phi_of_key(const T* row, int features, int padded, T* out) {
  apply_phi<T, false>(row, features, padded, T(0), T(1), out);
}

// Of a query, in a scale of its own, which cancels in linear attention: where all features are negative, phi of the
// largest is 1, so that they do not vanish together; where one is huge, it is 1 too, so that nothing overflows. Returns
// the scale's factor, or 1 where the derivative needs none.
template <class T>
MMCA_INLINE T phi_of_query(const T* row, int features, int padded, T* out) {
  // Most rows need no scale: the processor goes on with that guess and does not wait for the maximum.
  T largest = Simd<T>::reduce_max(apply_phi<T, false>(row, features, padded, T(0), T(1), out));
  if (features < padded) {
    largest = row[0];
    for (int d = 1; d < features; ++d) largest = largest > row[d] ? largest : row[d];
  }
  if (__builtin_expect(largest >= T(0) && largest <= T(1 << 20), true)) return T(1);
  const T shift = largest < T(0) ? largest : T(0), factor = largest > T(1 << 20) ? T(1) / (T(1) + largest) : T(1);
  apply_phi<T, true>(row, features, padded, shift, factor, out);
  return factor;
}
