// Simd<T> for AVX2 with FMA: 8 floats or 4 doubles. Interface and notes: simd_scalar.h.

template <class T>
struct Simd;

template <>
struct Simd<float> {
  using Scalar = float;
  using Reg = __m256;
  static constexpr int width = 8, tile_rows = 6;  // 12 accumulators, 2 operands, 1 broadcast of 16 registers
  static constexpr int gradient_run = 32;
  static constexpr bool fused = true;

  static MMCA_INLINE Reg zero() { return _mm256_setzero_ps(); }
  static MMCA_INLINE Reg broadcast(float x) { return _mm256_set1_ps(x); }
  static MMCA_INLINE Reg load(const float* p) { return _mm256_load_ps(p); }
  static MMCA_INLINE Reg loadu(const float* p) { return _mm256_loadu_ps(p); }
  static MMCA_INLINE void store(float* p, Reg r) { _mm256_store_ps(p, r); }
  static MMCA_INLINE void storeu(float* p, Reg r) { _mm256_storeu_ps(p, r); }
  // 16-bit storage: `width` numbers at a time.
  static MMCA_INLINE __m128i load_half(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
  static MMCA_INLINE void store_half(void* p, __m128i h) { _mm_storeu_si128(static_cast<__m128i*>(p), h); }
  static MMCA_INLINE Reg widen(const BFloat16* p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_half(p)), 16));
  }
  static MMCA_INLINE Reg widen(const Float16* p) { return _mm256_cvtph_ps(load_half(p)); }
  static MMCA_INLINE void narrow(Float16* p, Reg r) { store_half(p, _mm256_cvtps_ph(r, _MM_FROUND_TO_NEAREST_INT)); }
  static MMCA_INLINE void narrow(BFloat16* p, Reg r) {
    const __m256i bits = _mm256_castps_si256(r),
                  odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));  // rounding could carry a NaN away
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(r, r, _CMP_UNORD_Q));
    const __m256i high = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(high, high), 0x08);
    store_half(p, _mm256_castsi256_si128(packed));
  }
  static MMCA_INLINE Reg add(Reg a, Reg b) { return _mm256_add_ps(a, b); }
  static MMCA_INLINE Reg sub(Reg a, Reg b) { return _mm256_sub_ps(a, b); }
  static MMCA_INLINE Reg mul(Reg a, Reg b) { return _mm256_mul_ps(a, b); }
  static MMCA_INLINE Reg div(Reg a, Reg b) { return _mm256_div_ps(a, b); }
  static MMCA_INLINE Reg fma(Reg a, Reg b, Reg c) { return _mm256_fmadd_ps(a, b, c); }
  static MMCA_INLINE Reg max(Reg a, Reg b) { return _mm256_max_ps(a, b); }
  static MMCA_INLINE Reg min(Reg a, Reg b) { return _mm256_min_ps(a, b); }
  static MMCA_INLINE Reg select_less(Reg a, Reg b, Reg x, Reg y) {
    return _mm256_blendv_ps(y, x, _mm256_cmp_ps(a, b, _CMP_LT_OQ));
  }
  static MMCA_INLINE Reg exponent_from_low_bits(Reg t) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(t), 23));
  }
  static MMCA_INLINE float reduce_add(Reg r) {
    __m128 x = _mm_add_ps(_mm256_castps256_ps128(r), _mm256_extractf128_ps(r, 1));
    x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
  }
  static MMCA_INLINE float reduce_max(Reg r) {
    __m128 x = _mm_max_ps(_mm256_castps256_ps128(r), _mm256_extractf128_ps(r, 1));
    x = _mm_max_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
  }
  static constexpr int quad = 4;
  static MMCA_INLINE Reg broadcast_quad(const float* p) {
    return _mm256_broadcast_ps(reinterpret_cast<const __m128*>(p));
  }
  static MMCA_INLINE Reg reduce_quads(const Reg (&r)[4]) {
    return _mm256_hadd_ps(_mm256_hadd_ps(r[0], r[1]), _mm256_hadd_ps(r[2], r[3]));
  }
  static MMCA_INLINE void transpose(Reg (&r)[8]) {
    Reg pair[8], quad[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i += 2) {
      pair[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
      pair[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
    }
#pragma GCC unroll 8
    for (int i = 0; i < 8; i += 4) {
      quad[i] = _mm256_shuffle_ps(pair[i], pair[i + 2], 0x44);
      quad[i + 1] = _mm256_shuffle_ps(pair[i], pair[i + 2], 0xEE);
      quad[i + 2] = _mm256_shuffle_ps(pair[i + 1], pair[i + 3], 0x44);
      quad[i + 3] = _mm256_shuffle_ps(pair[i + 1], pair[i + 3], 0xEE);
    }
#pragma GCC unroll 8
    for (int i = 0; i < 4; ++i) {
      r[i] = _mm256_permute2f128_ps(quad[i], quad[i + 4], 0x20);
      r[i + 4] = _mm256_permute2f128_ps(quad[i], quad[i + 4], 0x31);
    }
  }
};

template <>
struct Simd<double> {
  using Scalar = double;
  using Reg = __m256d;
  static constexpr int width = 4, tile_rows = 6;
  static constexpr int gradient_run = 32;
  static constexpr bool fused = true;

  static MMCA_INLINE Reg zero() { return _mm256_setzero_pd(); }
  static MMCA_INLINE Reg broadcast(double x) { return _mm256_set1_pd(x); }
  static MMCA_INLINE Reg load(const double* p) { return _mm256_load_pd(p); }
  static MMCA_INLINE Reg loadu(const double* p) { return _mm256_loadu_pd(p); }
  static MMCA_INLINE void store(double* p, Reg r) { _mm256_store_pd(p, r); }
  static MMCA_INLINE void storeu(double* p, Reg r) { _mm256_storeu_pd(p, r); }
  static MMCA_INLINE Reg add(Reg a, Reg b) { return _mm256_add_pd(a, b); }
  static MMCA_INLINE Reg sub(Reg a, Reg b) { return _mm256_sub_pd(a, b); }
  static MMCA_INLINE Reg mul(Reg a, Reg b) { return _mm256_mul_pd(a, b); }
  static MMCA_INLINE Reg div(Reg a, Reg b) { return _mm256_div_pd(a, b); }
  static MMCA_INLINE Reg fma(Reg a, Reg b, Reg c) { return _mm256_fmadd_pd(a, b, c); }
  static MMCA_INLINE Reg max(Reg a, Reg b) { return _mm256_max_pd(a, b); }
  static MMCA_INLINE Reg min(Reg a, Reg b) { return _mm256_min_pd(a, b); }
  static MMCA_INLINE Reg select_less(Reg a, Reg b, Reg x, Reg y) {
    return _mm256_blendv_pd(y, x, _mm256_cmp_pd(a, b, _CMP_LT_OQ));
  }
  static MMCA_INLINE Reg exponent_from_low_bits(Reg t) {
    return _mm256_castsi256_pd(_mm256_slli_epi64(_mm256_castpd_si256(t), 52));
  }
  static MMCA_INLINE double reduce_add(Reg r) {
    const __m128d x = _mm_add_pd(_mm256_castpd256_pd128(r), _mm256_extractf128_pd(r, 1));
    return _mm_cvtsd_f64(_mm_add_sd(x, _mm_unpackhi_pd(x, x)));
  }
  static MMCA_INLINE double reduce_max(Reg r) {
    const __m128d x = _mm_max_pd(_mm256_castpd256_pd128(r), _mm256_extractf128_pd(r, 1));
    return _mm_cvtsd_f64(_mm_max_sd(x, _mm_unpackhi_pd(x, x)));
  }
  static MMCA_INLINE void transpose(Reg (&r)[4]) {
    const Reg a = _mm256_unpacklo_pd(r[0], r[1]), b = _mm256_unpackhi_pd(r[0], r[1]);
    const Reg c = _mm256_unpacklo_pd(r[2], r[3]), d = _mm256_unpackhi_pd(r[2], r[3]);
    r[0] = _mm256_permute2f128_pd(a, c, 0x20);
    r[1] = _mm256_permute2f128_pd(b, d, 0x20);
    r[2] = _mm256_permute2f128_pd(a, c, 0x31);
    r[3] = _mm256_permute2f128_pd(b, d, 0x31);
  }
};

struct Words {
  using Reg = __m256i;
  static constexpr int width = 8;

  static MMCA_INLINE Reg broadcast(std::uint32_t x) { return _mm256_set1_epi32(static_cast<int>(x)); }
  static MMCA_INLINE Reg count_from(std::uint32_t x) {
    return _mm256_add_epi32(broadcast(x), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
  static MMCA_INLINE Reg exclusive_or(Reg a, Reg b) { return _mm256_xor_si256(a, b); }
  static MMCA_INLINE Reg multiply(Reg a, std::uint32_t m, Reg& high) {
    const Reg even = _mm256_mul_epu32(a, broadcast(m)), odd = _mm256_mul_epu32(_mm256_srli_epi64(a, 32), broadcast(m));
    high = _mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xAA);
    return _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA);
  }
  static MMCA_INLINE void store_interleaved(std::uint16_t* out, const Reg (&w)[4]) {
    const Reg a = _mm256_unpacklo_epi32(w[0], w[1]), b = _mm256_unpackhi_epi32(w[0], w[1]);
    const Reg c = _mm256_unpacklo_epi32(w[2], w[3]), d = _mm256_unpackhi_epi32(w[2], w[3]);
    // Counters 0 and 4, 1 and 5, 2 and 6, 3 and 7.
    const Reg q[4] = {_mm256_unpacklo_epi64(a, c), _mm256_unpackhi_epi64(a, c), _mm256_unpacklo_epi64(b, d),
                      _mm256_unpackhi_epi64(b, d)};
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out + 8 * i), _mm256_castsi256_si128(q[i]));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out + 8 * (i + 4)), _mm256_extracti128_si256(q[i], 1));
    }
  }
};
