// Row arithmetic that forward and backward share; included inside the namespace of an instruction set.

// A row's log-sum-exp to base 2 in two parts. The one number that users get, lse, is rounded by up to |lse| / 2 ulp, an
// error that every weight of the row would share: `low` is what is missing. `high` is log2(e) lse, rounded; but lse
// itself where scores are not mere products (`natural`), for only then a score of -3e38, which a bias may make, does
// not swallow the rest.
template <class T>
struct SplitLse {
  T high, low;

  SplitLse() = default;
  SplitLse(T lse, T low_, bool natural) : high(natural ? lse : lse * static_cast<T>(log2_e)), low(low_) {
    constexpr T largest = std::numeric_limits<T>::max();
    if (is_finite(lse)) high = std::clamp(high, -largest, largest);
  }
  double exact(bool natural) const { return (natural ? log2_e : 1.0) * static_cast<double>(high) + low; }
};

// The low part that goes with `lse`; exactly, the logarithm is log2_maximum + log2_sum, or, natural, log2(e) maximum +
// log2_sum.
template <class T>
T low_part(T lse, double maximum, double log2_maximum, double log2_sum, bool natural) {
  if (lse == -infinity<T>) return T(0);
  return static_cast<T>(natural ? log2_e * (maximum - lse) + log2_sum
                                : log2_maximum + log2_sum - SplitLse<T>(lse, T(0), false).high);
}

template <class T>
double log2_of_sum(T l) {
  return l == T(0) ? -infinity<double> : std::log2(static_cast<double>(l));
}

// Writes the log-sum-exp of a row whose largest score is `maximum`, log2_maximum as an exponent of 2; returns it to
// base 2.
template <class T>
double store_lse(const Problem& problem, int group, Row row, double maximum, double log2_maximum, double log2_sum) {
  const bool natural = problem.shapes_scores();
  const double lse2 = log2_maximum + log2_sum;
  const T lse = static_cast<T>(natural ? maximum + log2_sum * ln_2 : lse2 * ln_2);  // of finfo.min, lse2 is -inf
  *statistic<T>(problem.lse, group, row) = lse;
  if (problem.lse_low.data)
    *statistic<T>(problem.lse_low, group, row) = low_part(lse, maximum, log2_maximum, log2_sum, natural);
  return lse2;
}

// scale * log2(e), which turns products into exponents of 2, in two parts: rounded to one, every score would be off by
// the same factor. Both parts are positive, so that a hidden -inf stays -inf; the sign, or a scale of 0, goes to the
// queries.
template <class T>
struct ExponentScale {
  T query_factor, high, low;

  explicit ExponentScale(double scale) {
    query_factor = scale > 0 ? T(1) : scale < 0 ? T(-1) : T(0);
    const long double exact = (scale == 0 ? 1.0L : std::abs(static_cast<long double>(scale))) * log2_e_exact;
    constexpr T smallest = std::numeric_limits<T>::min();
    high = std::max(static_cast<T>(exact), smallest);
    if (high >= exact) high = std::max(std::nextafter(high, T(0)), smallest);
    low = std::max(static_cast<T>(exact - high), smallest);
  }
  T below(T difference) const { return std::fma(difference, low, difference * high); }
  double exact(T score) const { return static_cast<double>(score) * (static_cast<double>(high) + low); }
};

// c (score - maximum): the difference first, which is exact near the maximum however large both are.
template <class T>
MMCA_INLINE typename Simd<T>::Reg exponent_below(typename Simd<T>::Reg score, typename Simd<T>::Reg maximum,
                                                 typename Simd<T>::Reg high, typename Simd<T>::Reg low) {
  const typename Simd<T>::Reg difference = Simd<T>::sub(score, maximum);
  return Simd<T>::fma(difference, low, Simd<T>::mul(difference, high));
}

// scores = exp2(c (scores - maximum)) over `count` elements (a multiple of two registers); returns their lane-wise sum.
template <class T>
MMCA_NOINLINE typename Simd<T>::Reg exp2_row(T* scores, int count, const ExponentScale<T>& scale, T maximum) {
  using S = Simd<T>;
  const typename S::Reg high = S::broadcast(scale.high), low = S::broadcast(scale.low), m = S::broadcast(maximum);
  typename S::Reg even = S::zero(), odd = S::zero();
  int c = 0;
  for (; c + 4 * S::width <= count; c += 4 * S::width) {
    typename S::Reg x[4];
#pragma GCC unroll 4
    for (int u = 0; u < 4; ++u) x[u] = exponent_below<T>(S::load(scores + c + u * S::width), m, high, low);
    exp2_in_place<T, 4>(x);
#pragma GCC unroll 4
    for (int u = 0; u < 4; ++u) S::store(scores + c + u * S::width, x[u]);
    even = S::add(S::add(even, x[0]), x[2]);  // one by one: the order must not depend on where the row starts
    odd = S::add(S::add(odd, x[1]), x[3]);
  }
  for (; c < count; c += 2 * S::width) {
    typename S::Reg x[2];
#pragma GCC unroll 2
    for (int u = 0; u < 2; ++u) x[u] = exponent_below<T>(S::load(scores + c + u * S::width), m, high, low);
    exp2_in_place<T, 2>(x);
#pragma GCC unroll 2
    for (int u = 0; u < 2; ++u) S::store(scores + c + u * S::width, x[u]);
    even = S::add(even, x[0]);
    odd = S::add(odd, x[1]);
  }
  return S::add(even, odd);
}

// scores = P = exp2(c scores - lse2), c from ExponentScale;  gradients = dS = P * (gradients - offset).
// P <= 1, also where scores are so large that rounding them could say otherwise.
template <class T, bool natural>
MMCA_NOINLINE void score_gradient_row(T* scores, T* gradients, int count, const ExponentScale<T>& scale,
                                      SplitLse<T> lse2, T offset) {
  using S = Simd<T>;
  const typename S::Reg high = S::broadcast(scale.high), low = S::broadcast(scale.low), o = S::broadcast(offset);
  const typename S::Reg l = S::broadcast(natural ? lse2.high : -lse2.high), rest = S::broadcast(lse2.low);
  for (int c = 0; c < count; c += 2 * S::width) {
    typename S::Reg p[2];
#pragma GCC unroll 2
    for (int u = 0; u < 2; ++u) {
      const typename S::Reg score = S::load(scores + c + u * S::width);
      const typename S::Reg exponent =
          natural ? exponent_below<T>(score, l, high, low) : S::fma(score, low, S::fma(score, high, l));
      p[u] = S::min(S::zero(), S::sub(exponent, rest));
    }
    exp2_in_place<T, 2>(p);
#pragma GCC unroll 2
    for (int u = 0; u < 2; ++u) {
      S::store(scores + c + u * S::width, p[u]);
      T* g = gradients + c + u * S::width;
      S::store(g, S::mul(p[u], S::sub(S::load(g), o)));
    }
  }
}

// The same for a row whose keys are all here: a softmax from its own maximum and sum, and offset = rowsum(P dP) - dlse.
// That is as exact as a materialised softmax where few keys share the weight; one key gives a dS of exactly 0. False if
// a NaN or an infinity took part.
template <class T>
MMCA_NOINLINE bool whole_score_gradient_row(T* scores, T* gradients, int count, const ExponentScale<T>& scale,
                                            T lse_gradient) {
  using S = Simd<T>;
  typename S::Reg best = S::broadcast(-infinity<T>);
  for (int c = 0; c < count; c += S::width) best = S::max(best, S::load(scores + c));
  const T maximum = S::reduce_max(best);
  const typename S::Reg high = S::broadcast(scale.high), low = S::broadcast(scale.low);
  const typename S::Reg m = S::broadcast(maximum == -infinity<T> ? T(0) : maximum);
  typename S::Reg sum = S::zero(), product = S::zero();
  for (int c = 0; c < count; c += 2 * S::width) {
    typename S::Reg p[2];
#pragma GCC unroll 2
    for (int u = 0; u < 2; ++u) p[u] = exponent_below<T>(S::load(scores + c + u * S::width), m, high, low);
    exp2_in_place<T, 2>(p);
#pragma GCC unroll 2
    for (int u = 0; u < 2; ++u) {
      S::store(scores + c + u * S::width, p[u]);
      sum = S::add(sum, p[u]);
      product = S::fma(p[u], S::load(gradients + c + u * S::width), product);
    }
  }
  const T total = S::reduce_add(sum);
  const T divisor = total == T(0) ? T(1) : total;
  const T offset = S::reduce_add(product) / divisor - lse_gradient;
  const typename S::Reg d = S::broadcast(divisor), o = S::broadcast(offset);
  for (int c = 0; c < count; c += S::width) {
    const typename S::Reg p = S::div(S::load(scores + c), d);
    S::store(scores + c, p);
    S::store(gradients + c, S::mul(p, S::sub(S::load(gradients + c), o)));
  }
  return is_finite(total) && is_finite(offset);
}

template <class T>
MMCA_NOINLINE T dot(const T* a, const T* b, int count) {
  using S = Simd<T>;  // rows are padded to two registers
  typename S::Reg even = S::zero(), odd = S::zero();
  for (int d = 0; d < count; d += 2 * S::width) {
    even = S::fma(S::loadu(a + d), S::loadu(b + d), even);
    odd = S::fma(S::loadu(a + d + S::width), S::loadu(b + d + S::width), odd);
  }
  return S::reduce_add(S::add(even, odd));
}

// Weights of the two groups' outputs, from their log-sum-exp to base 2 or the row's gate.
template <class T>
MMCA_INLINE void merge_weights(const Problem& problem, Row row, const double* lse2, T* weight) {
  weight[0] = weight[1] = T(1);
  if (problem.merge == Merge::gate)
    for (int g = 0; g < 2; ++g) weight[g] = *statistic<const T>(problem.gate, g, row);
  if (problem.merge != Merge::lse) return;
  for (int g = 0; g < 2; ++g)
    if (lse2[1 - g] == -infinity<double>) {  // the only group, whatever its scores
      weight[g] = lse2[g] == -infinity<double> ? T(0) : T(1);
      weight[1 - g] = T(0);
      return;
    }
  const double best = std::max(lse2[0], lse2[1]);
  const double e[2] = {std::exp2(lse2[0] - best), std::exp2(lse2[1] - best)};
  for (int g = 0; g < 2; ++g) weight[g] = static_cast<T>(e[g] / (e[0] + e[1]));  // exp(lse_r - LSE)
}

// A weight of zero hides even a NaN.
template <class T>
MMCA_INLINE T weighted(T weight, T x) {
  return weight == T(0) ? T(0) : weight * x;
}

// The score of a row and the key at its own position, and ds/dt; `buffer` holds two padded rows.
template <class T>
T own_score(const RowList& rows, Row row, T* buffer, T* slope) {
  const Problem& problem = rows.problem;
  const int dim = static_cast<int>(problem.head_dim), padded = round_up(dim, lanes<T>);
  const RowReader<T> query(problem.query, problem.dtype, row.head, dim, padded);
  const RowReader<T> key(problem.key, problem.dtype, rows.kv_head, dim, padded);
  const T t = static_cast<T>(problem.scale) *
              dot(query.row(row.row, buffer), key.row(rows.position(row.row), buffer + padded), padded);
  *slope = T(1);
  return problem.softcap > 0 ? softcapped(t, static_cast<T>(problem.softcap), slope) : t;
}
