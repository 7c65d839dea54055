// The products of a forward item (cpu/products.h) by matrix instructions, for bfloat16; included inside the namespace
// of AMX, after the bodies.
//
// Q, K and V go into the tiles as they are, so S is made of exact products. P is a float, and a tile takes bfloat16:
// P = P0 + P1 + P2, each the next 8 bits of it, is exact. For long lists two parts do: P1 rounded leaves 2^-16 of a
// weight, what the rounding errors of a sum of 512 floats may come to in the worst case, and P0 + P1 stands for P.
//
// Layout: Q [strip][32 features][row][32], K [32 keys][16 keys][32 features][pair of features][key][2],
// V [32 keys][16 features][pair of keys][feature][2], where key j is paired with key j + 16: a register of P's first 16
// keys and one of the other 16 are put together without a shuffle. S is [row][key]; P overwrites it, [row][32 keys][P0,
// P1][pair][2], and P2 has an array of its own.

// The upper halves of the lanes of two registers, as pairs.
MMCA_INLINE __m512i pair_upper_halves(__m512i first, __m512i second) {
  constexpr int first_unless_masked = 0xca;
  return _mm512_ternarylogic_epi32(_mm512_set1_epi32(static_cast<int>(0xffff0000u)), second,
                                   _mm512_srli_epi32(first, 16), first_unless_masked);
}
MMCA_INLINE __m512 without_upper_half(__m512 x) {
  const __m512i upper = _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(static_cast<int>(0xffff0000u)));
  return _mm512_sub_ps(x, _mm512_castsi512_ps(upper));
}

// A panel of 32 numbers of one row, x[0] and x[1], in `parts` parts: two of them to `out`, a third to `rest`.
template <int parts>
MMCA_INLINE void store_parts(const __m512 (&x)[2], void* out, void* rest) {
  char* to = static_cast<char*>(out);
  _mm512_store_si512(to, pair_upper_halves(_mm512_castps_si512(x[0]), _mm512_castps_si512(x[1])));
  const __m512 y[2] = {without_upper_half(x[0]), without_upper_half(x[1])};
  __m512i bits[2] = {_mm512_castps_si512(y[0]), _mm512_castps_si512(y[1])};
  if constexpr (parts == 2)  // rounded
    for (__m512i& b : bits) b = _mm512_add_epi32(b, _mm512_set1_epi32(0x8000));
  _mm512_store_si512(to + 64, pair_upper_halves(bits[0], bits[1]));
  if constexpr (parts == 3)
    _mm512_store_si512(rest, pair_upper_halves(_mm512_castps_si512(without_upper_half(y[0])),
                                               _mm512_castps_si512(without_upper_half(y[1]))));
}

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
      else store_parts<parts>({x[2 * p], x[2 * p + 1]}, scores, rest);
    }
  };
  for (; count >= 64; count -= 64) panels(std::integral_constant<int, 2>{});
  if (count) panels(std::integral_constant<int, 1>{});
  return _mm512_add_ps(even, odd);
}

// 32 keys' features 32 d .. 32 d + 31 of the first 16 and of the other 16: a tile each, in pairs of features.
MMCA_INLINE void pack_feature_pairs(const BFloat16* const* rows, int count, int d, BFloat16* tile) {
  __m512 pairs[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) pairs[i] = i < count ? _mm512_loadu_ps(rows[i] + 32 * d) : _mm512_setzero_ps();
  Simd<float>::transpose(pairs);
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) _mm512_store_ps(tile + 32 * i, pairs[i]);
}

// Lanes that are NaN or infinite.
MMCA_INLINE __mmask32 non_finite_halves(__m512i x) {
  const __m512i exponent = _mm512_set1_epi16(0x7f80);
  return _mm512_cmpeq_epi16_mask(_mm512_and_si512(x, exponent), exponent);
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
    const __m512i sign = _mm512_set1_epi16(query_factor_ < 0 ? static_cast<short>(0x8000) : 0);
    const __mmask32 kept = query_factor_ == 0 ? 0 : ~__mmask32(0);
    const int padded = from_.padded_head_dim;
    for (int r = 0; r < round_up(count_, strip_rows); ++r) {
      BFloat16* out = query_ + static_cast<std::ptrdiff_t>(r / strip_rows) * strip_rows * padded + r % strip_rows * 32;
      const BFloat16* source = nullptr;
      if (r < count_) {
        const Row row = from_.rows.at(begin_ + r);
        source = from_.query(row).row(row.row, buffer_);
      }
      for (int d = 0; d < padded; d += 32, out += strip_rows * 32)
        _mm512_store_si512(
            out, source ? _mm512_maskz_xor_epi32(kept, sign, _mm512_loadu_si512(source + d)) : _mm512_setzero_si512());
    }
  }

  void pack_keys(const KeyList& list, std::int32_t first, int keys) {
    const RowReader<BFloat16> key = from_.key(), value = from_.value();
    const BFloat16* source[width];
    parts_ = list.size < two_parts_from ? 3 : 2;
    __mmask32 non_finite = 0;
    for (int c = 0; c < keys; c += width) {
      const int n = std::min(width, keys - c);
      for (int i = 0; i < n; ++i) source[i] = key.row(list.position(first + c + i), buffer_ + i * key.padded);
      BFloat16* out = keys_ + static_cast<std::ptrdiff_t>(c) * key.padded;
      for (int half = 0; half < width; half += 16)
        for (int d = 0; d < key.padded / 32; ++d, out += Tiles::elements)
          pack_feature_pairs(source + half, n - half, d, out);
      for (int i = 0; i < n; ++i) source[i] = value.row(list.position(first + c + i), buffer_ + i * value.padded);
      non_finite |= pack_key_pairs(source, n, values_ + static_cast<std::ptrdiff_t>(c) * value.padded);
    }
    values_finite_ = non_finite == 0;
  }

  float* scores(int row) { return scores_ + row * stride; }

  void score(int first, int rows, int c, float* out, float* row_max) {
    const int padded = from_.padded_head_dim;
    const BFloat16* strip = query_ + static_cast<std::ptrdiff_t>(first / strip_rows) * strip_rows * padded;
    const BFloat16* panel = keys_ + static_cast<std::ptrdiff_t>(c) * padded;
    for (int half = 0; half < width; half += 16, panel += 16 * padded) {
      if (rows > 16) score_columns<true>(strip, panel, out + half);
      else score_columns<false>(strip, panel, out + half);
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
      const __m512 panel[2] = {_mm512_load_ps(x), _mm512_load_ps(x + 16)};
      if (parts_ == 2) store_parts<2>(panel, x, nullptr);
      else store_parts<3>(panel, x, rest(row) + c);
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

 private:
  static constexpr int width = lanes<float>, two_parts_from = 512;

  BFloat16* rest(int row) { return rest_ + row * rest_stride; }

  // V of 32 keys, in pairs of keys; what is not finite is 0, and its lanes of any 32 are returned.
  __mmask32 pack_key_pairs(const BFloat16* const* rows, int count, BFloat16* out) const {
    alignas(64) static constexpr std::int16_t low[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                         8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
    const __m512i first_half = _mm512_load_si512(low),
                  second_half = _mm512_add_epi16(first_half, _mm512_set1_epi16(16));
    __mmask32 non_finite = 0;
    for (int j = 0; j < 16; ++j, out += 32)
      for (int d = 0; d < from_.padded_value_dim; d += 32) {
        __m512i x[2];
        for (int i = 0; i < 2; ++i) {
          x[i] = j + 16 * i < count ? _mm512_loadu_si512(rows[j + 16 * i] + d) : _mm512_setzero_si512();
          const __mmask32 found = non_finite_halves(x[i]);
          x[i] = _mm512_maskz_mov_epi16(~found, x[i]);
          non_finite |= found;
        }
        BFloat16* tiles = out + d / 32 * (2 * Tiles::elements);
        _mm512_store_si512(tiles, _mm512_permutex2var_epi16(x[0], first_half, x[1]));
        _mm512_store_si512(tiles + Tiles::elements, _mm512_permutex2var_epi16(x[0], second_half, x[1]));
      }
    return non_finite;
  }

  // S of a strip and 16 keys.
  template <bool both>
  MMCA_INLINE void score_columns(const BFloat16* strip, const BFloat16* keys, float* out) const {
    Tiles::zero<0>();
    if constexpr (both) Tiles::zero<1>();
    for (int d = 0; d < from_.padded_head_dim; d += 32, strip += 2 * Tiles::elements, keys += Tiles::elements) {
      Tiles::load<6>(keys);
      Tiles::load<4>(strip);
      Tiles::multiply_add<0, 4, 6>();
      if constexpr (both) {
        Tiles::load<5>(strip + Tiles::elements);
        Tiles::multiply_add<1, 5, 6>();
      }
    }
    Tiles::store<0>(out, stride * sizeof(float));
    if constexpr (both) Tiles::store<1>(out + 16 * stride, stride * sizeof(float));
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
    const std::ptrdiff_t out_stride = from_.padded_value_dim * static_cast<std::ptrdiff_t>(sizeof(float));
    float* lower = out + 16 * from_.padded_value_dim;
    Tiles::load<0>(out, out_stride);
    Tiles::load<1>(out + 16, out_stride);
    if constexpr (both) {
      Tiles::load<2>(lower, out_stride);
      Tiles::load<3>(lower + 16, out_stride);
    }
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
    Tiles::store<0>(out, out_stride);
    Tiles::store<1>(out + 16, out_stride);
    if constexpr (both) {
      Tiles::store<2>(lower, out_stride);
      Tiles::store<3>(lower + 16, out_stride);
    }
  }

  const Operands<BFloat16> from_;
  const std::int64_t begin_;
  const int count_;
  const float query_factor_;
  int parts_ = 3;
  bool values_finite_ = true;
  BFloat16 *query_, *keys_, *values_, *rest_, *buffer_;
  float* scores_;
};
