// The products of a forward item (cpu/products.h) by matrix instructions; included inside the namespace of AMX.
//
// S is made of exact products of what is stored; P, a float, goes into the tiles in parts (cpu/amx_tiles.h).
//
// Layout: Q in strips, K in feature pairs, V in row pairs; S [row][key], which P overwrites, [row][32 keys][part 0, 1]
// [pair][2]; a third part has an array of its own.

// 2^x; fewer instructions than exp2_in_place where multiply-adds are dear, and they run on one port while tiles are in
// use. Below the normal numbers the result is subnormal.
template <int count>
MMCA_INLINE void exp2_by_scaling(__m512 (&x)[count]) {
  using C = Exp2Constants<float>;
  __m512 rest[count], polynomial[count];
#pragma GCC unroll 4
  for (int u = 0; u < count; ++u) rest[u] = _mm512_reduce_ps(x[u], 0);  // x - round(x); 0 of an infinity
#pragma GCC unroll 4
  for (int u = 0; u < count; ++u) x[u] = _mm512_sub_ps(x[u], rest[u]);
#pragma GCC unroll 4
  for (int u = 0; u < count; ++u) polynomial[u] = _mm512_set1_ps(C::coefficient[C::degree]);
#pragma GCC unroll 16
  for (int d = C::degree - 1; d >= 0; --d)
#pragma GCC unroll 4
    for (int u = 0; u < count; ++u)
      polynomial[u] = _mm512_fmadd_ps(polynomial[u], rest[u], _mm512_set1_ps(C::coefficient[d]));
#pragma GCC unroll 4
  for (int u = 0; u < count; ++u) x[u] = _mm512_scalef_ps(polynomial[u], x[u]);
}

// scores = exp2(scale (scores - maximum)) over a multiple of 32, in parts (0: as floats); returns their lane-wise sum.
template <int parts>
MMCA_NOINLINE __m512 exp2_parts(float* scores, BFloat16* rest, int count, float scale, float maximum) {
  const __m512 c = _mm512_set1_ps(scale), m = _mm512_set1_ps(maximum);
  __m512 even = _mm512_setzero_ps(), odd = even;
  const auto panels = [&](auto number) {
    __m512 x[2 * number.value];
#pragma GCC unroll 4
    for (int u = 0; u < 2 * number.value; ++u)
      x[u] = _mm512_mul_ps(c, _mm512_sub_ps(_mm512_load_ps(scores + 16 * u), m));
    exp2_by_scaling(x);
#pragma GCC unroll 2
    for (int p = 0; p < number.value; ++p, scores += 32, rest += 32) {
      even = _mm512_add_ps(even, x[2 * p]), odd = _mm512_add_ps(odd, x[2 * p + 1]);
      if constexpr (parts == 0) _mm512_store_ps(scores, x[2 * p]), _mm512_store_ps(scores + 16, x[2 * p + 1]);
      else store_parts<parts>(x[2 * p], x[2 * p + 1], scores, rest);
    }
  };
  for (; count >= 64; count -= 64) panels(std::integral_constant<int, 2>{});
  if (count) panels(std::integral_constant<int, 1>{});
  return _mm512_add_ps(even, odd);
}

template <class T>
class MatrixProducts {
 public:
  static_assert(std::is_same_v<T, float>);
  static constexpr int strip_rows = 32, row_block = 32, key_block = 256;
  static constexpr int stride = key_block + 16, rest_stride = key_block + 32;  // off the powers of two
  using Session = Tiles::Session;

  MatrixProducts(const RowList& rows, std::int64_t begin, int count, float query_factor, Arena& arena)
      : from_(rows, width), begin_(begin), count_(count), query_factor_(query_factor) {
    const int dim = std::max(from_.padded_head_dim, from_.padded_value_dim);
    query_ = arena.take<BFloat16>(static_cast<std::size_t>(round_up(count, strip_rows)) * from_.padded_head_dim);
    keys_ = arena.take<BFloat16>(static_cast<std::size_t>(key_block) * from_.padded_head_dim);
    values_ = arena.take<BFloat16>(static_cast<std::size_t>(key_block) * from_.padded_value_dim);
    scores_ = arena.take<float>(static_cast<std::size_t>(row_block) * stride);
    rest_ = arena.take<BFloat16>(static_cast<std::size_t>(row_block) * rest_stride);
    buffer_ = arena.take<BFloat16>(static_cast<std::size_t>(width) * dim);
  }

  void pack_queries() {
    for (int r = 0; r < round_up(count_, strip_rows); ++r) {
      const Row row = from_.rows.at(begin_ + std::min(r, count_ - 1));
      const BFloat16* source = r < count_ ? from_.query(row).row(row.row, buffer_) : nullptr;
      pack_strip_row(source, from_.padded_head_dim, query_factor_, strip(r) + r % strip_rows * 32);
    }
  }

  void pack_keys(const KeyList& list, std::int32_t first, int keys) {
    const RowReader<BFloat16> key = from_.key();
    const BFloat16* source[width];
    for (int c = 0; c < keys; c += width) {
      const int n = std::min(width, keys - c);
      for (int i = 0; i < n; ++i) source[i] = key.row(list.position(first + c + i), buffer_ + i * key.padded);
      pack_feature_pairs(source, n, key.padded, keys_ + static_cast<std::ptrdiff_t>(c) * key.padded);
    }
    pack_values(list, first, keys);
  }

  float* scores(int row) { return scores_ + row * stride; }

  void score(int first, int rows, int c, float* out, float* row_max) {
    const int padded = from_.padded_head_dim;
    const BFloat16* panel = keys_ + static_cast<std::ptrdiff_t>(c) * padded;
    for (int half = 0; half < width; half += 16, panel += 16 * padded) {
      if (rows > 16) multiply_strip<true, stride>(strip(first), panel, padded, out + half);
      else multiply_strip<false, stride>(strip(first), panel, padded, out + half);
    }
    if (row_max) track_maxima<float>(rows, out, stride, row_max);
  }

  MMCA_INLINE __m512 exponentiate(int row, int from, int count, const ExponentScale<float>& scale, float maximum,
                                  bool keep) {
    const float c = scale.high + scale.low;  // rounded once
    const auto exp2 = !keep ? exp2_parts<0> : parts_ == 2 ? exp2_parts<2> : exp2_parts<3>;
    return exp2(scores(row) + from, rest(row) + from, count, c, maximum);
  }
  void keep(int row, int from, int count) {
    for (int c = from; c < from + count; c += width) {
      float* x = scores(row) + c;
      const __m512 first = _mm512_load_ps(x), second = _mm512_load_ps(x + 16);
      if (parts_ == 2) store_parts<2>(first, second, x, nullptr);
      else store_parts<3>(first, second, x, rest(row) + c);
    }
  }
  float weight(int row, int c) const {
    const int at = c / 32 * 32, pair = 2 * (c % 16) + c % 32 / 16;
    const auto* first_two = reinterpret_cast<const BFloat16*>(scores_ + row * stride + at);
    const float p = static_cast<float>(first_two[pair]) + static_cast<float>(first_two[32 + pair]);
    return parts_ == 2 ? p : p + static_cast<float>(rest_[row * rest_stride + at + pair]);
  }

  void weigh(float* out, int rows, const std::uint64_t* live, const float* factor) {
    if (!live[0]) return;
    rescale(out, rows, factor);
    for (int d = 0; d < from_.padded_value_dim; d += 32) {
      const BFloat16* values = values_ + d / 32 * (2 * Tiles::elements);
      if (parts_ == 2)
        rows > 16 ? weigh_columns<2, true>(values, out + d, *live) : weigh_columns<2, false>(values, out + d, *live);
      else rows > 16 ? weigh_columns<3, true>(values, out + d, *live) : weigh_columns<3, false>(values, out + d, *live);
    }
  }

  bool values_finite() const { return values_finite_; }

 protected:
  static constexpr int width = lanes<float>;

  void pack_values(const KeyList& list, std::int32_t first, int keys) {
    const RowReader<BFloat16> value = from_.value();
    const BFloat16* source[width];
    parts_ = list.size < two_parts_from ? 3 : 2;
    values_finite_ = true;
    for (int c = 0; c < keys; c += width) {
      const int n = std::min(width, keys - c);
      for (int i = 0; i < n; ++i) source[i] = value.row(list.position(first + c + i), buffer_ + i * value.padded);
      values_finite_ &=
          pack_row_pairs(source, n, value.padded, values_ + static_cast<std::ptrdiff_t>(c) * value.padded);
    }
  }

  const Operands<BFloat16> from_;
  const std::int64_t begin_;
  const int count_;
  const float query_factor_;
  BFloat16 *query_, *keys_, *values_, *rest_, *buffer_;

 private:
  BFloat16* rest(int row) { return rest_ + row * rest_stride; }

  BFloat16* strip(int row) const {
    return query_ + static_cast<std::ptrdiff_t>(row / strip_rows) * strip_rows * from_.padded_head_dim;
  }

  void rescale(float* out, int rows, const float* factor) const {
    const int dim = from_.padded_value_dim;
    for (int r = 0; r < rows; ++r, out += dim) {
      if (factor[r] == 1.0f) continue;
      const __m512 f = _mm512_set1_ps(factor[r]);
      for (int d = 0; d < dim; d += 16) _mm512_store_ps(out + d, _mm512_mul_ps(f, _mm512_load_ps(out + d)));
    }
  }

  // O += P V of a strip and 32 features.
  template <int parts, bool both>
  void weigh_columns(const BFloat16* values, float* out, std::uint64_t live) const {
    load_square<both>(out, from_.padded_value_dim);
    for (; live; live &= live - 1) {
      const int c = __builtin_ctzll(live) * width;
      const BFloat16* tiles = values + static_cast<std::ptrdiff_t>(c) * from_.padded_value_dim;
      Tiles::load<6>(tiles);
      Tiles::load<7>(tiles + Tiles::elements);
#pragma GCC unroll 3
      for (int part = 0; part < parts; ++part) {
        const char* weights = part < 2 ? reinterpret_cast<const char*>(scores_ + c) + 64 * part
                                       : reinterpret_cast<const char*>(rest_ + c);
        const std::ptrdiff_t row_bytes = part < 2 ? stride * sizeof(float) : rest_stride * sizeof(BFloat16);
        Tiles::load<4>(weights, row_bytes);
        Tiles::multiply_add<0, 4, 6>();
        Tiles::multiply_add<1, 4, 7>();
        if constexpr (both) {
          Tiles::load<5>(weights + 16 * row_bytes, row_bytes);
          Tiles::multiply_add<2, 5, 6>();
          Tiles::multiply_add<3, 5, 7>();
        }
      }
    }
    store_square<both>(out, from_.padded_value_dim);
  }

  int parts_ = 3;
  bool values_finite_ = true;
  float* scores_;
};
