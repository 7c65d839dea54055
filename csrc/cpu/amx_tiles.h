// What the products by matrix instructions (cpu/amx_products.h, cpu/amx_gradients.h) are made of; included inside the
// namespace of AMX, after the bodies.
//
// Operands are packed into tiles of 16 x 32 numbers, and terms into pairs:
//
//     strips          [strip][32 features][row][32]                                   Q, dO on the left of a product
//     feature pairs   [32 keys][16 keys][32 features][pair of features][key][2]       K, V on the right, over features
//     row pairs       [32 rows][16 features][pair of rows][feature][2]                K, V on the right, over keys
//
// where row j of 32 is paired with row j + 16: a register of the first 16 numbers of a panel and one of the others are
// put together without a shuffle. Whatever is summed over rows or keys has them in this order.
//
// Stored bfloat16 go into tiles as they are. A float is the sum of three parts, each the next 8 bits of it; of two, the
// second rounded, but for 2^-16 of it. That is what the rounding errors of a sum of 512 floats may come to in the worst
// case, and so two parts do where a product sums over so many.

inline constexpr int two_parts_from = 512;

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

// What of x goes into part 0, 1 or 2 of `parts` is the upper half of part[..]. The last of two is rounded.
template <int parts>
MMCA_INLINE void split(__m512 x, __m512i (&part)[parts]) {
  part[0] = _mm512_castps_si512(x);
  x = without_upper_half(x);
  part[1] = _mm512_castps_si512(x);
  if constexpr (parts == 2) part[1] = _mm512_add_epi32(part[1], _mm512_set1_epi32(0x8000));
  else part[2] = _mm512_castps_si512(without_upper_half(x));
}

// A panel of 32 numbers of one row in `parts` parts: two of them to `out`, a third to `rest`.
template <int parts>
MMCA_INLINE void store_parts(__m512 first, __m512 second, void* out, void* rest) {
  __m512i a[parts], b[parts];
  split(first, a), split(second, b);
  _mm512_store_si512(out, pair_upper_halves(a[0], b[0]));
  _mm512_store_si512(static_cast<char*>(out) + 64, pair_upper_halves(a[1], b[1]));
  if constexpr (parts == 3) _mm512_store_si512(rest, pair_upper_halves(a[2], b[2]));
}

// Tiles of the features of 32 keys in pairs.
MMCA_INLINE void pack_feature_pairs(const BFloat16* const* rows, int count, int padded, BFloat16* out) {
  for (int first = 0; first < 32; first += 16)
    for (int d = 0; d < padded; d += 32, out += Tiles::elements) {
      __m512 pairs[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i)
        pairs[i] = first + i < count ? _mm512_loadu_ps(rows[first + i] + d) : _mm512_setzero_ps();
      Simd<float>::transpose(pairs);
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) _mm512_store_ps(out + 32 * i, pairs[i]);
    }
}

// Which numbers are finite, of several rows of 32: the largest exponents seen tell.
class FiniteRows {
 public:
  FiniteRows() : largest_(_mm512_setzero_si512()) {}
  void see(__m512i x) { largest_ = _mm512_max_epu16(largest_, _mm512_and_si512(x, exponent())); }
  bool all() const { return _mm512_cmpeq_epi16_mask(largest_, exponent()) == 0; }

  // Makes 0 of what is not finite.
  static MMCA_NOINLINE void clean(BFloat16* numbers, std::ptrdiff_t count) {
    for (std::ptrdiff_t i = 0; i < count; i += 32) {
      const __m512i x = _mm512_load_si512(numbers + i);
      const __mmask32 finite = _mm512_cmpneq_epi16_mask(_mm512_and_si512(x, exponent()), exponent());
      _mm512_store_si512(numbers + i, _mm512_maskz_mov_epi16(finite, x));
    }
  }

 private:
  static __m512i exponent() { return _mm512_set1_epi16(0x7f80); }
  __m512i largest_;
};

// Rows j and j + 16 of up to 32 in pairs: features 32 d .. 32 d + 15 and the next 16 of one pair, feature by feature.
MMCA_INLINE void pair_rows(const BFloat16* const* rows, int count, int j, int d, __m512i (&pair)[2],
                           FiniteRows& finite) {
  alignas(64) static constexpr std::int16_t order[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                         8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  const __m512i first = _mm512_load_si512(order);
  __m512i x[2];
  for (int i = 0; i < 2; ++i) {
    x[i] = j + 16 * i < count ? _mm512_loadu_si512(rows[j + 16 * i] + 32 * d) : _mm512_setzero_si512();
    finite.see(x[i]);
  }
  pair[0] = _mm512_permutex2var_epi16(x[0], first, x[1]);
  pair[1] = _mm512_permutex2var_epi16(x[0], _mm512_add_epi16(first, _mm512_set1_epi16(16)), x[1]);
}

// Tiles of the pairs of 32 rows, [32 features][16 features][pair][feature][2]. What is not finite is 0 there; false if
// there is such a number.
MMCA_INLINE bool pack_row_pairs(const BFloat16* const* rows, int count, int padded, BFloat16* out) {
  FiniteRows finite;
  for (int j = 0; j < 16; ++j)
    for (int d = 0; d < padded / 32; ++d) {
      __m512i pair[2];
      pair_rows(rows, count, j, d, pair, finite);
      for (int i = 0; i < 2; ++i) _mm512_store_si512(out + (2 * d + i) * Tiles::elements + 32 * j, pair[i]);
    }
  if (!finite.all()) FiniteRows::clean(out, 32 * padded);
  return finite.all();
}

// The same transposed, [16 features][feature][pair][2].
MMCA_INLINE bool pack_transposed(const BFloat16* const* rows, int count, int padded, BFloat16* out) {
  FiniteRows finite;
  BFloat16* to = out;
  for (int d = 0; d < padded / 32; ++d)
    for (int half = 0; half < 2; ++half, to += Tiles::elements) {
      __m512 pairs[16];
      for (int j = 0; j < 16; ++j) {
        __m512i pair[2];
        pair_rows(rows, count, j, d, pair, finite);
        pairs[j] = _mm512_castsi512_ps(pair[half]);
      }
      Simd<float>::transpose(pairs);
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) _mm512_store_ps(to + 32 * i, pairs[i]);
    }
  if (!finite.all()) FiniteRows::clean(out, 32 * padded);
  return finite.all();
}

// One row, times 1, -1 or 0, into the tiles of a strip, [32 features][row][32]; null: zeros.
MMCA_INLINE void pack_strip_row(const BFloat16* row, int padded, float factor, BFloat16* out) {
  const __m512i sign = _mm512_set1_epi16(factor < 0 ? static_cast<short>(0x8000) : 0);
  const __mmask32 kept = !row || factor == 0 ? 0 : ~__mmask32(0);
  for (int d = 0; d < padded; d += 32, out += 2 * Tiles::elements)
    _mm512_store_si512(out, _mm512_maskz_xor_epi32(static_cast<__mmask16>(kept), sign,
                                                   row ? _mm512_loadu_si512(row + d) : _mm512_setzero_si512()));
}

// The products of a strip, or its first 16 rows, and 16 keys.
template <bool both, int stride>
MMCA_INLINE void multiply_strip(const BFloat16* strip, const BFloat16* keys, int padded, float* out) {
  Tiles::zero<0>();
  if constexpr (both) Tiles::zero<1>();
  for (int d = 0; d < padded; d += 32, strip += 2 * Tiles::elements, keys += Tiles::elements) {
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

// 32 x 32 floats in tiles 0 to 3; without `both` the first 16 rows.
template <bool both = true>
MMCA_INLINE void load_square(const float* c, std::ptrdiff_t stride) {
  const std::ptrdiff_t bytes = stride * static_cast<std::ptrdiff_t>(sizeof(float));
  Tiles::load<0>(c, bytes);
  Tiles::load<1>(c + 16, bytes);
  if constexpr (both) {
    Tiles::load<2>(c + 16 * stride, bytes);
    Tiles::load<3>(c + 16 * stride + 16, bytes);
  }
}
template <bool both = true>
MMCA_INLINE void store_square(float* c, std::ptrdiff_t stride) {
  const std::ptrdiff_t bytes = stride * static_cast<std::ptrdiff_t>(sizeof(float));
  Tiles::store<0>(c, bytes);
  Tiles::store<1>(c + 16, bytes);
  if constexpr (both) {
    Tiles::store<2>(c + 16 * stride, bytes);
    Tiles::store<3>(c + 16 * stride + 16, bytes);
  }
}
