// Row arithmetic that forward and backward share; included inside the namespace of an instruction set.

// scores = exp2(scores - shift) over `count` elements (a multiple of two registers); returns their lane-wise sum.
template <class T>
MMCA_NOINLINE typename Simd<T>::Reg exp2_row(T* scores, int count, T shift) {
  using S = Simd<T>;
  const typename S::Reg m = S::broadcast(shift);
  typename S::Reg even = S::zero(), odd = S::zero();
  int c = 0;
  for (; c + 4 * S::width <= count; c += 4 * S::width) {
    typename S::Reg x[4];
#pragma GCC unroll 4
    for (int u = 0; u < 4; ++u) x[u] = S::sub(S::load(scores + c + u * S::width), m);
    exp2_in_place<T, 4>(x);
#pragma GCC unroll 4
    for (int u = 0; u < 4; ++u) S::store(scores + c + u * S::width, x[u]);
    even = S::add(S::add(even, x[0]), x[2]);  // one by one: the order must not depend on where the row starts
    odd = S::add(S::add(odd, x[1]), x[3]);
  }
  for (; c < count; c += 2 * S::width) {
    typename S::Reg x[2];
#pragma GCC unroll 2
    for (int u = 0; u < 2; ++u) x[u] = S::sub(S::load(scores + c + u * S::width), m);
    exp2_in_place<T, 2>(x);
#pragma GCC unroll 2
    for (int u = 0; u < 2; ++u) S::store(scores + c + u * S::width, x[u]);
    even = S::add(even, x[0]);
    odd = S::add(odd, x[1]);
  }
  return S::add(even, odd);
}

// scores = P = exp2(scores - lse2);  gradients = dS = P * (gradients - offset). P <= 1, also where scores are so large
// that lse2 is rounded by more than it takes to overflow.
template <class T>
MMCA_NOINLINE void score_gradient_row(T* scores, T* gradients, int count, T lse2, T offset) {
  using S = Simd<T>;
  const typename S::Reg l = S::broadcast(lse2), o = S::broadcast(offset);
  for (int c = 0; c < count; c += 2 * S::width) {
    typename S::Reg p[2];
#pragma GCC unroll 2
    for (int u = 0; u < 2; ++u) p[u] = S::min(S::zero(), S::sub(S::load(scores + c + u * S::width), l));
    exp2_in_place<T, 2>(p);
#pragma GCC unroll 2
    for (int u = 0; u < 2; ++u) {
      S::store(scores + c + u * S::width, p[u]);
      T* g = gradients + c + u * S::width;
      S::store(g, S::mul(p[u], S::sub(S::load(g), o)));
    }
  }
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

// Weights of the two groups' outputs.
template <class T>
MMCA_INLINE void merge_weights(Merge merge, const T* lse, T* weight) {
  weight[0] = weight[1] = T(1);
  if (merge == Merge::lse) {  // exp(lse_r - LSE)
    const T best = std::max(lse[0], lse[1]), shift = best == -infinity<T> ? T(0) : best;
    const T e[2] = {std::exp(lse[0] - shift), std::exp(lse[1] - shift)}, total = e[0] + e[1];
    for (int g = 0; g < 2; ++g) weight[g] = total == T(0) ? T(0) : e[g] / total;
  }
}

// A weight of zero hides even a NaN.
template <class T>
MMCA_INLINE T weighted(T weight, T x) {
  return weight == T(0) ? T(0) : weight * x;
}

template <class T>
MMCA_INLINE T* group_out_row(const Problem& problem, int group, std::int64_t b, std::int64_t h, std::int64_t i) {
  return static_cast<T*>(problem.group_out) +
         (((group * problem.batch + b) * problem.q_heads + h) * problem.q_len + i) * problem.value_dim;
}

// scale * <query row, key at its own position>; `buffer` holds two padded rows.
template <class T, class Storage>
T own_score(const Problem& problem, const RowList& rows, Row row, T* buffer) {
  const int dim = static_cast<int>(problem.head_dim), padded = round_up(dim, lanes<T>);
  const RowReader<T, Storage> query(problem.query, rows.batch, row.head, dim, padded);
  const RowReader<T, Storage> key(problem.key, rows.batch, rows.kv_head, dim, padded);
  return static_cast<T>(problem.scale) *
         dot(query.row(row.row, buffer), key.row(rows.position(row.row), buffer + padded), padded);
}
