// Simd<T> in portable C++: 16-byte GNU vectors, which any x86-64 (SSE2) and any other target can run.
// The interface every simd_*.h offers; included inside the namespace of its instruction set.

template <class T>
struct Simd {
  using Scalar = T;
  typedef T Reg __attribute__((vector_size(16)));
  using Bits = std::conditional_t<sizeof(T) == 4, std::int32_t, std::int64_t>;
  typedef Bits BitsReg __attribute__((vector_size(16)));
  static constexpr int width = 16 / sizeof(T);
  static constexpr int tile_rows = 6;  // a tile is tile_rows x 2 registers of accumulators
  static constexpr int gradient_run =
      16;  // rows a key's gradient sums at a time; without fused multiply-adds they are short
  static constexpr bool fused = false;  // fma rounds once

  static MMCA_INLINE Reg zero() { return Reg{}; }
  static MMCA_INLINE Reg broadcast(T x) { return x - Reg{}; }
  static MMCA_INLINE Reg load(const T* p) { return loadu(p); }
  static MMCA_INLINE Reg loadu(const T* p) {
    Reg r;
    __builtin_memcpy(&r, p, sizeof r);
    return r;
  }
  static MMCA_INLINE void store(T* p, Reg r) { storeu(p, r); }
  static MMCA_INLINE void storeu(T* p, Reg r) { __builtin_memcpy(p, &r, sizeof r); }
  // 16-bit storage: `width` numbers at a time. T is float there.
  template <class Half>
  static MMCA_INLINE Reg widen(const Half* p) {
    Reg r = {};
    for (int i = 0; i < width; ++i) r[i] = static_cast<T>(p[i]);
    return r;
  }
  template <class Half>
  static MMCA_INLINE void narrow(Half* p, Reg r) {
    for (int i = 0; i < width; ++i) p[i] = Half(r[i]);
  }
  static MMCA_INLINE Reg add(Reg a, Reg b) { return a + b; }
  static MMCA_INLINE Reg sub(Reg a, Reg b) { return a - b; }
  static MMCA_INLINE Reg mul(Reg a, Reg b) { return a * b; }
  static MMCA_INLINE Reg div(Reg a, Reg b) { return a / b; }
  static MMCA_INLINE Reg fma(Reg a, Reg b, Reg c) { return a * b + c; }
  static MMCA_INLINE Reg max(Reg a, Reg b) { return a > b ? a : b; }                        // b where either is NaN
  static MMCA_INLINE Reg min(Reg a, Reg b) { return a < b ? a : b; }                        // likewise
  static MMCA_INLINE Reg select_less(Reg a, Reg b, Reg x, Reg y) { return a < b ? x : y; }  // a < b ? x : y
  // 2^n from a float whose low mantissa bits hold n + exponent bias (see exp2.h).
  static MMCA_INLINE Reg exponent_from_low_bits(Reg t) { return (Reg)((BitsReg)t << (sizeof(T) == 4 ? 23 : 52)); }
  // Registers of more than 4 lanes also have `quad` (features, 2 or 4) with broadcast_quad and reduce_quads: see
  // few_rows.h.
  static MMCA_INLINE T reduce_add(Reg r) {
    T sum = r[0];
    for (int i = 1; i < width; ++i) sum += r[i];
    return sum;
  }
  static MMCA_INLINE T reduce_max(Reg r) {
    T best = r[0];
    for (int i = 1; i < width; ++i) best = best > r[i] ? best : r[i];
    return best;
  }
  static MMCA_INLINE void transpose(Reg (&r)[width]) {
    T t[width][width];
    for (int i = 0; i < width; ++i)
      for (int j = 0; j < width; ++j) t[j][i] = r[i][j];
    for (int i = 0; i < width; ++i) r[i] = loadu(t[i]);
  }
};

// 32-bit words, for Philox.
struct Words {
  typedef std::uint32_t Reg __attribute__((vector_size(16)));
  static constexpr int width = 4;

  static MMCA_INLINE Reg broadcast(std::uint32_t x) { return x - Reg{}; }
  static MMCA_INLINE Reg count_from(std::uint32_t x) { return x + Reg{0, 1, 2, 3}; }
  static MMCA_INLINE Reg exclusive_or(Reg a, Reg b) { return a ^ b; }
  // The low halves of a * m; the high ones to `high`.
  static MMCA_INLINE Reg multiply(Reg a, std::uint32_t m, Reg& high) {
    Reg low;
    for (int i = 0; i < width; ++i) {
      const std::uint64_t product = std::uint64_t{a[i]} * m;
      low[i] = static_cast<std::uint32_t>(product), high[i] = static_cast<std::uint32_t>(product >> 32);
    }
    return low;
  }
  // Word i of register 0, 1, 2 and 3, then word i + 1, ..., each as its lower and its upper 16 bits.
  static MMCA_INLINE void store_interleaved(std::uint16_t* out, const Reg (&w)[4]) {
    for (int i = 0; i < width; ++i)
      for (int k = 0; k < 8; ++k) out[8 * i + k] = static_cast<std::uint16_t>(w[k / 2][i] >> (16 * (k % 2)));
  }
};
