// Products for items of few rows (decoding, tiny sequences), where packing a key would cost more than using it;
// included inside the namespace of an instruction set. Keys and values are read where they lie, one pointer a row.

inline constexpr int few_rows = 8;

// scores[row][c] = <query[row], keys[c]> for c in 0..lanes-1: dot products, one register of keys at a time, whose lanes
// are summed by a transpose instead of key by key. `padded`: features, a multiple of lanes; queries are `padded` apart.
template <class T, int stride>
MMCA_NOINLINE void direct_score_tile(int rows, int padded, const T* query, const T* const* keys, T* scores) {
  using S = Simd<T>;
  for (int r = 0; r < rows; ++r)
    for (int c = 0; c < lanes<T>; c += S::width) {
      typename S::Reg sum[S::width];
#pragma GCC unroll 16
      for (int i = 0; i < S::width; ++i) sum[i] = S::zero();
      for (int d = 0; d < padded; d += S::width) {
        const typename S::Reg q = S::load(query + r * padded + d);
#pragma GCC unroll 16
        for (int i = 0; i < S::width; ++i) sum[i] = S::fma(q, S::loadu(keys[c + i] + d), sum[i]);
      }
      S::transpose(sum);
#pragma GCC unroll 4
      for (int half = S::width / 2; half > 0; half /= 2)
#pragma GCC unroll 8
        for (int i = 0; i < half; ++i) sum[i] = S::add(sum[i], sum[i + half]);
      S::store(scores + r * stride + c, sum[0]);
    }
}

// out[row][0..registers * width) = factor[row] * out + weights[row][0..depth) * values, for `rows` rows
template <class T, int rows, int registers, int stride>
MMCA_INLINE void direct_row_tile(int depth, const T* weights, const T* const* values, int d, T* out,
                                 std::ptrdiff_t out_stride, const T* factor) {
  using S = Simd<T>;
  typename S::Reg sum[rows][registers];
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 8
    for (int x = 0; x < registers; ++x) sum[r][x] = S::zero();
  for (int c = 0; c < depth; ++c) {
    const T* value = values[c] + d;
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
      const typename S::Reg w = S::broadcast(weights[r * stride + c]);
#pragma GCC unroll 8
      for (int x = 0; x < registers; ++x) sum[r][x] = S::fma(w, S::loadu(value + x * S::width), sum[r][x]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 8
    for (int x = 0; x < registers; ++x) {
      T* c = out + r * out_stride + d + x * S::width;
      S::store(c, S::fma(S::broadcast(factor[r]), S::load(c), sum[r][x]));
    }
}

template <class T, int rows, int stride>
MMCA_NOINLINE void direct_rows(int depth, const T* weights, const T* const* values, int padded, T* out,
                               const T* factor) {
  constexpr int registers = 8 / rows, step = registers * Simd<T>::width;
  int d = 0;
  for (; d + step <= padded; d += step)
    direct_row_tile<T, rows, registers, stride>(depth, weights, values, d, out, padded, factor);
  for (; d < padded; d += lanes<T>) direct_row_tile<T, rows, 2, stride>(depth, weights, values, d, out, padded, factor);
}

template <class T, int stride>
void direct_weigh(int rows, int depth, const T* weights, const T* const* values, int padded, T* out, const T* factor) {
  int r = 0;
  const auto advance = [&](auto count) {
    constexpr int n = count.value;
    for (; r + n <= rows; r += n)
      direct_rows<T, n, stride>(depth, weights + r * stride, values, padded,
                                out + static_cast<std::ptrdiff_t>(r) * padded, factor + r);
  };
  advance(std::integral_constant<int, 4>{});
  advance(std::integral_constant<int, 2>{});
  advance(std::integral_constant<int, 1>{});
}
