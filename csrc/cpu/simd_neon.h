// Simd<T> for Advanced SIMD: 8 floats or 4 doubles as two registers of 128 bits, so that a tile is twice as wide and
// needs fewer broadcasts. Interface and notes: simd_scalar.h.

MMCA_INLINE void transpose_block(float32x4_t& a, float32x4_t& b, float32x4_t& c, float32x4_t& d) {
  const float64x2_t even_top = vreinterpretq_f64_f32(vtrn1q_f32(a, b)),
                    odd_top = vreinterpretq_f64_f32(vtrn2q_f32(a, b)), even = vreinterpretq_f64_f32(vtrn1q_f32(c, d)),
                    odd = vreinterpretq_f64_f32(vtrn2q_f32(c, d));
  a = vreinterpretq_f32_f64(vtrn1q_f64(even_top, even));
  b = vreinterpretq_f32_f64(vtrn1q_f64(odd_top, odd));
  c = vreinterpretq_f32_f64(vtrn2q_f64(even_top, even));
  d = vreinterpretq_f32_f64(vtrn2q_f64(odd_top, odd));
}

template <class T>
struct Simd;

template <>
struct Simd<float> {
  using Scalar = float;
  struct Reg {
    float32x4_t low, high;
  };
  static constexpr int width = 8, tile_rows = 6;  // 24 accumulators, 4 operands, 1 broadcast of 32 registers
  static constexpr int gradient_run = 32;
  static constexpr bool fused = true;

  static MMCA_INLINE Reg zero() { return broadcast(0.0f); }
  static MMCA_INLINE Reg broadcast(float x) { return {vdupq_n_f32(x), vdupq_n_f32(x)}; }
  static MMCA_INLINE Reg load(const float* p) { return loadu(p); }
  static MMCA_INLINE Reg loadu(const float* p) { return {vld1q_f32(p), vld1q_f32(p + 4)}; }
  static MMCA_INLINE void store(float* p, Reg r) { storeu(p, r); }
  static MMCA_INLINE void storeu(float* p, Reg r) { vst1q_f32(p, r.low), vst1q_f32(p + 4, r.high); }
  // 16-bit storage: `width` numbers at a time.
  static MMCA_INLINE uint16x8_t load_half(const void* p) { return vld1q_u16(static_cast<const std::uint16_t*>(p)); }
  static MMCA_INLINE void store_half(void* p, uint16x8_t h) { vst1q_u16(static_cast<std::uint16_t*>(p), h); }
  static MMCA_INLINE Reg widen(const BFloat16* p) {
    const uint16x8_t h = load_half(p);
    return {vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(h), 16)), vreinterpretq_f32_u32(vshll_high_n_u16(h, 16))};
  }
  static MMCA_INLINE Reg widen(const Float16* p) {
    const float16x8_t h = vreinterpretq_f16_u16(load_half(p));
    return {vcvt_f32_f16(vget_low_f16(h)), vcvt_high_f32_f16(h)};
  }
  static MMCA_INLINE void narrow(Float16* p, Reg r) {
    store_half(p, vreinterpretq_u16_f16(vcvt_high_f16_f32(vcvt_f16_f32(r.low), r.high)));
  }
  static MMCA_INLINE uint32x4_t rounded_to_bfloat16(float32x4_t x) {  // in the upper halves
    const uint32x4_t bits = vreinterpretq_u32_f32(x), odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    const uint32x4_t rounded = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
    const uint32x4_t quiet = vorrq_u32(bits, vdupq_n_u32(0x400000));  // rounding could carry a NaN away
    return vbslq_u32(vceqq_f32(x, x), rounded, quiet);
  }
  static MMCA_INLINE void narrow(BFloat16* p, Reg r) {
    store_half(p, vshrn_high_n_u32(vshrn_n_u32(rounded_to_bfloat16(r.low), 16), rounded_to_bfloat16(r.high), 16));
  }
  static MMCA_INLINE Reg add(Reg a, Reg b) { return {vaddq_f32(a.low, b.low), vaddq_f32(a.high, b.high)}; }
  static MMCA_INLINE Reg sub(Reg a, Reg b) { return {vsubq_f32(a.low, b.low), vsubq_f32(a.high, b.high)}; }
  static MMCA_INLINE Reg mul(Reg a, Reg b) { return {vmulq_f32(a.low, b.low), vmulq_f32(a.high, b.high)}; }
  static MMCA_INLINE Reg div(Reg a, Reg b) { return {vdivq_f32(a.low, b.low), vdivq_f32(a.high, b.high)}; }
  static MMCA_INLINE Reg fma(Reg a, Reg b, Reg c) {
    return {vfmaq_f32(c.low, a.low, b.low), vfmaq_f32(c.high, a.high, b.high)};
  }
  // Compared and selected: the maximum instructions treat NaN otherwise.
  static MMCA_INLINE Reg max(Reg a, Reg b) { return select_less(b, a, a, b); }
  static MMCA_INLINE Reg min(Reg a, Reg b) { return select_less(a, b, a, b); }
  static MMCA_INLINE Reg select_less(Reg a, Reg b, Reg x, Reg y) {
    return {vbslq_f32(vcltq_f32(a.low, b.low), x.low, y.low), vbslq_f32(vcltq_f32(a.high, b.high), x.high, y.high)};
  }
  static MMCA_INLINE float32x4_t exponent_from_low_bits(float32x4_t t) {
    return vreinterpretq_f32_s32(vshlq_n_s32(vreinterpretq_s32_f32(t), 23));
  }
  static MMCA_INLINE Reg exponent_from_low_bits(Reg t) {
    return {exponent_from_low_bits(t.low), exponent_from_low_bits(t.high)};
  }
  static MMCA_INLINE float reduce_add(Reg r) { return vaddvq_f32(vaddq_f32(r.low, r.high)); }
  static MMCA_INLINE float reduce_max(Reg r) { return vmaxnmvq_f32(vmaxnmq_f32(r.low, r.high)); }
  static constexpr int quad = 4;
  static MMCA_INLINE Reg broadcast_quad(const float* p) { return {vld1q_f32(p), vld1q_f32(p)}; }
  static MMCA_INLINE Reg reduce_quads(const Reg (&r)[4]) {
    return {vpaddq_f32(vpaddq_f32(r[0].low, r[1].low), vpaddq_f32(r[2].low, r[3].low)),
            vpaddq_f32(vpaddq_f32(r[0].high, r[1].high), vpaddq_f32(r[2].high, r[3].high))};
  }
  static MMCA_INLINE void transpose(Reg (&r)[8]) {
    transpose_block(r[0].low, r[1].low, r[2].low, r[3].low);
    transpose_block(r[0].high, r[1].high, r[2].high, r[3].high);
    transpose_block(r[4].low, r[5].low, r[6].low, r[7].low);
    transpose_block(r[4].high, r[5].high, r[6].high, r[7].high);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) std::swap(r[i].high, r[i + 4].low);
  }
};

template <>
struct Simd<double> {
  using Scalar = double;
  struct Reg {
    float64x2_t low, high;
  };
  static constexpr int width = 4, tile_rows = 6;
  static constexpr int gradient_run = 32;
  static constexpr bool fused = true;

  static MMCA_INLINE Reg zero() { return broadcast(0.0); }
  static MMCA_INLINE Reg broadcast(double x) { return {vdupq_n_f64(x), vdupq_n_f64(x)}; }
  static MMCA_INLINE Reg load(const double* p) { return loadu(p); }
  static MMCA_INLINE Reg loadu(const double* p) { return {vld1q_f64(p), vld1q_f64(p + 2)}; }
  static MMCA_INLINE void store(double* p, Reg r) { storeu(p, r); }
  static MMCA_INLINE void storeu(double* p, Reg r) { vst1q_f64(p, r.low), vst1q_f64(p + 2, r.high); }
  static MMCA_INLINE Reg add(Reg a, Reg b) { return {vaddq_f64(a.low, b.low), vaddq_f64(a.high, b.high)}; }
  static MMCA_INLINE Reg sub(Reg a, Reg b) { return {vsubq_f64(a.low, b.low), vsubq_f64(a.high, b.high)}; }
  static MMCA_INLINE Reg mul(Reg a, Reg b) { return {vmulq_f64(a.low, b.low), vmulq_f64(a.high, b.high)}; }
  static MMCA_INLINE Reg div(Reg a, Reg b) { return {vdivq_f64(a.low, b.low), vdivq_f64(a.high, b.high)}; }
  static MMCA_INLINE Reg fma(Reg a, Reg b, Reg c) {
    return {vfmaq_f64(c.low, a.low, b.low), vfmaq_f64(c.high, a.high, b.high)};
  }
  static MMCA_INLINE Reg max(Reg a, Reg b) { return select_less(b, a, a, b); }
  static MMCA_INLINE Reg min(Reg a, Reg b) { return select_less(a, b, a, b); }
  static MMCA_INLINE Reg select_less(Reg a, Reg b, Reg x, Reg y) {
    return {vbslq_f64(vcltq_f64(a.low, b.low), x.low, y.low), vbslq_f64(vcltq_f64(a.high, b.high), x.high, y.high)};
  }
  static MMCA_INLINE float64x2_t exponent_from_low_bits(float64x2_t t) {
    return vreinterpretq_f64_s64(vshlq_n_s64(vreinterpretq_s64_f64(t), 52));
  }
  static MMCA_INLINE Reg exponent_from_low_bits(Reg t) {
    return {exponent_from_low_bits(t.low), exponent_from_low_bits(t.high)};
  }
  static MMCA_INLINE double reduce_add(Reg r) { return vaddvq_f64(vaddq_f64(r.low, r.high)); }
  static MMCA_INLINE double reduce_max(Reg r) { return vmaxnmvq_f64(vmaxnmq_f64(r.low, r.high)); }
  static MMCA_INLINE void transpose(Reg (&r)[4]) {
    const Reg a = r[0], b = r[1], c = r[2], d = r[3];
    r[0] = {vtrn1q_f64(a.low, b.low), vtrn1q_f64(c.low, d.low)};
    r[1] = {vtrn2q_f64(a.low, b.low), vtrn2q_f64(c.low, d.low)};
    r[2] = {vtrn1q_f64(a.high, b.high), vtrn1q_f64(c.high, d.high)};
    r[3] = {vtrn2q_f64(a.high, b.high), vtrn2q_f64(c.high, d.high)};
  }
};

struct Words {
  using Reg = uint32x4_t;
  static constexpr int width = 4;

  static MMCA_INLINE Reg broadcast(std::uint32_t x) { return vdupq_n_u32(x); }
  static MMCA_INLINE Reg count_from(std::uint32_t x) {
    static constexpr std::uint32_t count[4] = {0, 1, 2, 3};
    return vaddq_u32(broadcast(x), vld1q_u32(count));
  }
  static MMCA_INLINE Reg exclusive_or(Reg a, Reg b) { return veorq_u32(a, b); }
  static MMCA_INLINE Reg multiply(Reg a, std::uint32_t m, Reg& high) {
    const Reg first = vreinterpretq_u32_u64(vmull_u32(vget_low_u32(a), vdup_n_u32(m))),
              last = vreinterpretq_u32_u64(vmull_high_u32(a, broadcast(m)));
    high = vuzp2q_u32(first, last);
    return vuzp1q_u32(first, last);
  }
  static MMCA_INLINE void store_interleaved(std::uint16_t* out, const Reg (&w)[4]) {
    float32x4_t counter[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) counter[i] = vreinterpretq_f32_u32(w[i]);
    transpose_block(counter[0], counter[1], counter[2], counter[3]);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) vst1q_u16(out + 8 * i, vreinterpretq_u16_f32(counter[i]));
  }
};
