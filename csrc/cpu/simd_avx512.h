// Simd<T> for AVX-512F: 16 floats or 8 doubles. Interface and notes: simd_scalar.h.

template <class T>
struct Simd;

template <>
struct Simd<float> {
  using Scalar = float;
  using Reg = __m512;
  static constexpr int width = 16, tile_rows = 12;  // 24 accumulators, 2 operands, 1 broadcast of 32 registers
  static constexpr int gradient_run = 32;
  static constexpr bool fused = true;

  static MMCA_INLINE Reg zero() { return _mm512_setzero_ps(); }
  static MMCA_INLINE Reg broadcast(float x) { return _mm512_set1_ps(x); }
  static MMCA_INLINE Reg load(const float* p) { return _mm512_load_ps(p); }
  static MMCA_INLINE Reg loadu(const float* p) { return _mm512_loadu_ps(p); }
  static MMCA_INLINE void store(float* p, Reg r) { _mm512_store_ps(p, r); }
  static MMCA_INLINE void storeu(float* p, Reg r) { _mm512_storeu_ps(p, r); }
  // 16-bit storage: `width` numbers at a time.
  static MMCA_INLINE __m256i load_half(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
  static MMCA_INLINE void store_half(void* p, __m256i h) { _mm256_storeu_si256(static_cast<__m256i*>(p), h); }
  static MMCA_INLINE Reg widen(const BFloat16* p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(load_half(p)), 16));
  }
  static MMCA_INLINE Reg widen(const Float16* p) { return _mm512_cvtph_ps(load_half(p)); }
  static MMCA_INLINE void narrow(Float16* p, Reg r) { store_half(p, _mm512_cvtps_ph(r, _MM_FROUND_TO_NEAREST_INT)); }
  static MMCA_INLINE void narrow(BFloat16* p, Reg r) {
    const __m512i bits = _mm512_castps_si512(r),
                  odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));  // rounding could carry a NaN away
    const __m512i chosen = _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(r, r, _CMP_UNORD_Q), quiet);
    store_half(p, _mm512_cvtepi32_epi16(_mm512_srli_epi32(chosen, 16)));
  }
  static MMCA_INLINE Reg add(Reg a, Reg b) { return _mm512_add_ps(a, b); }
  static MMCA_INLINE Reg sub(Reg a, Reg b) { return _mm512_sub_ps(a, b); }
  static MMCA_INLINE Reg mul(Reg a, Reg b) { return _mm512_mul_ps(a, b); }
  static MMCA_INLINE Reg div(Reg a, Reg b) { return _mm512_div_ps(a, b); }
  static MMCA_INLINE Reg fma(Reg a, Reg b, Reg c) { return _mm512_fmadd_ps(a, b, c); }
  static MMCA_INLINE Reg max(Reg a, Reg b) { return _mm512_max_ps(a, b); }
  static MMCA_INLINE Reg min(Reg a, Reg b) { return _mm512_min_ps(a, b); }
  static MMCA_INLINE Reg select_less(Reg a, Reg b, Reg x, Reg y) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), y, x);
  }
  static MMCA_INLINE Reg exponent_from_low_bits(Reg t) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(t), 23));
  }
  static MMCA_INLINE float reduce_add(Reg r) { return _mm512_reduce_add_ps(r); }
  static MMCA_INLINE float reduce_max(Reg r) { return _mm512_reduce_max_ps(r); }
  static constexpr int quad = 4;
  static MMCA_INLINE Reg broadcast_quad(const float* p) { return _mm512_broadcast_f32x4(_mm_loadu_ps(p)); }
  static MMCA_INLINE Reg reduce_quads(const Reg (&r)[4]) {
    const Reg a = _mm512_add_ps(_mm512_unpacklo_ps(r[0], r[1]), _mm512_unpackhi_ps(r[0], r[1]));
    const Reg b = _mm512_add_ps(_mm512_unpacklo_ps(r[2], r[3]), _mm512_unpackhi_ps(r[2], r[3]));
    return _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xEE));
  }
  static MMCA_INLINE void transpose(Reg (&r)[16]) {
    Reg pair[16], quad[16], half[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; i += 2) {
      pair[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
      pair[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 16; i += 4) {  // quad[i + c], 128-bit lane l: column 4 l + c of rows i..i+3
      quad[i] = _mm512_shuffle_ps(pair[i], pair[i + 2], 0x44);
      quad[i + 1] = _mm512_shuffle_ps(pair[i], pair[i + 2], 0xEE);
      quad[i + 2] = _mm512_shuffle_ps(pair[i + 1], pair[i + 3], 0x44);
      quad[i + 3] = _mm512_shuffle_ps(pair[i + 1], pair[i + 3], 0xEE);
    }
#pragma GCC unroll 16
    for (int c = 0; c < 4; ++c) {  // then a 4 x 4 transpose of 128-bit lanes for each c
      half[c] = _mm512_shuffle_f32x4(quad[c], quad[4 + c], 0x88);
      half[4 + c] = _mm512_shuffle_f32x4(quad[8 + c], quad[12 + c], 0x88);
      half[8 + c] = _mm512_shuffle_f32x4(quad[c], quad[4 + c], 0xDD);
      half[12 + c] = _mm512_shuffle_f32x4(quad[8 + c], quad[12 + c], 0xDD);
      r[c] = _mm512_shuffle_f32x4(half[c], half[4 + c], 0x88);
      r[8 + c] = _mm512_shuffle_f32x4(half[c], half[4 + c], 0xDD);
      r[4 + c] = _mm512_shuffle_f32x4(half[8 + c], half[12 + c], 0x88);
      r[12 + c] = _mm512_shuffle_f32x4(half[8 + c], half[12 + c], 0xDD);
    }
  }
};

template <>
struct Simd<double> {
  using Scalar = double;
  using Reg = __m512d;
  static constexpr int width = 8, tile_rows = 12;
  static constexpr int gradient_run = 32;
  static constexpr bool fused = true;

  static MMCA_INLINE Reg zero() { return _mm512_setzero_pd(); }
  static MMCA_INLINE Reg broadcast(double x) { return _mm512_set1_pd(x); }
  static MMCA_INLINE Reg load(const double* p) { return _mm512_load_pd(p); }
  static MMCA_INLINE Reg loadu(const double* p) { return _mm512_loadu_pd(p); }
  static MMCA_INLINE void store(double* p, Reg r) { _mm512_store_pd(p, r); }
  static MMCA_INLINE void storeu(double* p, Reg r) { _mm512_storeu_pd(p, r); }
  static MMCA_INLINE Reg add(Reg a, Reg b) { return _mm512_add_pd(a, b); }
  static MMCA_INLINE Reg sub(Reg a, Reg b) { return _mm512_sub_pd(a, b); }
  static MMCA_INLINE Reg mul(Reg a, Reg b) { return _mm512_mul_pd(a, b); }
  static MMCA_INLINE Reg div(Reg a, Reg b) { return _mm512_div_pd(a, b); }
  static MMCA_INLINE Reg fma(Reg a, Reg b, Reg c) { return _mm512_fmadd_pd(a, b, c); }
  static MMCA_INLINE Reg max(Reg a, Reg b) { return _mm512_max_pd(a, b); }
  static MMCA_INLINE Reg min(Reg a, Reg b) { return _mm512_min_pd(a, b); }
  static MMCA_INLINE Reg select_less(Reg a, Reg b, Reg x, Reg y) {
    return _mm512_mask_blend_pd(_mm512_cmp_pd_mask(a, b, _CMP_LT_OQ), y, x);
  }
  static MMCA_INLINE Reg exponent_from_low_bits(Reg t) {
    return _mm512_castsi512_pd(_mm512_slli_epi64(_mm512_castpd_si512(t), 52));
  }
  static MMCA_INLINE double reduce_add(Reg r) { return _mm512_reduce_add_pd(r); }
  static MMCA_INLINE double reduce_max(Reg r) { return _mm512_reduce_max_pd(r); }
  static constexpr int quad = 2;
  static MMCA_INLINE Reg broadcast_quad(const double* p) { return _mm512_broadcast_f64x2(_mm_loadu_pd(p)); }
  static MMCA_INLINE Reg reduce_quads(const Reg (&r)[2]) {
    return _mm512_add_pd(_mm512_unpacklo_pd(r[0], r[1]), _mm512_unpackhi_pd(r[0], r[1]));
  }
  static MMCA_INLINE void transpose(Reg (&r)[8]) {
    Reg pair[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i += 2) {  // pair[i + c], 128-bit lane l: column 2 l + c of rows i, i+1
      pair[i] = _mm512_unpacklo_pd(r[i], r[i + 1]);
      pair[i + 1] = _mm512_unpackhi_pd(r[i], r[i + 1]);
    }
#pragma GCC unroll 8
    for (int c = 0; c < 2; ++c) {  // then a 4 x 4 transpose of 128-bit lanes for each c
      const Reg even_low = _mm512_shuffle_f64x2(pair[c], pair[2 + c], 0x88);
      const Reg even_high = _mm512_shuffle_f64x2(pair[4 + c], pair[6 + c], 0x88);
      const Reg odd_low = _mm512_shuffle_f64x2(pair[c], pair[2 + c], 0xDD);
      const Reg odd_high = _mm512_shuffle_f64x2(pair[4 + c], pair[6 + c], 0xDD);
      r[c] = _mm512_shuffle_f64x2(even_low, even_high, 0x88);
      r[4 + c] = _mm512_shuffle_f64x2(even_low, even_high, 0xDD);
      r[2 + c] = _mm512_shuffle_f64x2(odd_low, odd_high, 0x88);
      r[6 + c] = _mm512_shuffle_f64x2(odd_low, odd_high, 0xDD);
    }
  }
};

struct Words {
  using Reg = __m512i;
  static constexpr int width = 16;

  static MMCA_INLINE Reg broadcast(std::uint32_t x) { return _mm512_set1_epi32(static_cast<int>(x)); }
  static MMCA_INLINE Reg count_from(std::uint32_t x) {
    return _mm512_add_epi32(broadcast(x), _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
  }
  static MMCA_INLINE Reg exclusive_or(Reg a, Reg b) { return _mm512_xor_si512(a, b); }
  static MMCA_INLINE Reg multiply(Reg a, std::uint32_t m, Reg& high) {
    const Reg even = _mm512_mul_epu32(a, broadcast(m)), odd = _mm512_mul_epu32(_mm512_srli_epi64(a, 32), broadcast(m));
    high = _mm512_mask_blend_epi32(0xAAAA, _mm512_srli_epi64(even, 32), odd);
    return _mm512_mask_blend_epi32(0xAAAA, even, _mm512_slli_epi64(odd, 32));
  }
  static MMCA_INLINE void store_interleaved(std::uint16_t* out, const Reg (&w)[4]) {
    const Reg a = _mm512_unpacklo_epi32(w[0], w[1]), b = _mm512_unpackhi_epi32(w[0], w[1]);
    const Reg c = _mm512_unpacklo_epi32(w[2], w[3]), d = _mm512_unpackhi_epi32(w[2], w[3]);
    // Counters i, i + 4, i + 8 and i + 12.
    const Reg q[4] = {_mm512_unpacklo_epi64(a, c), _mm512_unpackhi_epi64(a, c), _mm512_unpacklo_epi64(b, d),
                      _mm512_unpackhi_epi64(b, d)};
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out + 8 * i), _mm512_castsi512_si128(q[i]));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out + 8 * (i + 4)), _mm512_extracti32x4_epi32(q[i], 1));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out + 8 * (i + 8)), _mm512_extracti32x4_epi32(q[i], 2));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out + 8 * (i + 12)), _mm512_extracti32x4_epi32(q[i], 3));
    }
  }
};
