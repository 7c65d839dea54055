// Dropout factors for a stretch of one row's keys (definition: core/philox.h); included inside the namespace of an
// instruction set.

// lanes16[8 c + l] is lane l of counter first_counter + c, for `philox_batch` counters at once.
inline constexpr int philox_batch = 32;

inline MMCA_NOINLINE void philox_lanes(const Dropout& dropout, std::uint32_t first_counter, std::uint32_t position,
                                       std::uint32_t head, std::uint16_t* lanes16) {
  constexpr int at_once = 2;  // registers of counters: hides the latency of a product, and more would not fit 16
  constexpr int counters = at_once * Words::width;
  static_assert(philox_batch % counters == 0);
  for (int done = 0; done < philox_batch; done += counters) {
    Words::Reg c[at_once][4];
#pragma GCC unroll 2
    for (int r = 0; r < at_once; ++r) {
      c[r][0] = Words::count_from(first_counter + static_cast<std::uint32_t>(done + r * Words::width));
      c[r][1] = Words::broadcast(position);
      c[r][2] = Words::broadcast(head);
      c[r][3] = Words::broadcast(dropout.offset);
    }
    std::uint32_t key[2] = {static_cast<std::uint32_t>(dropout.seed), static_cast<std::uint32_t>(dropout.seed >> 32)};
    for (int round = 0; round < Philox::rounds; ++round) {
      const Words::Reg key0 = Words::broadcast(key[0]), key1 = Words::broadcast(key[1]);
#pragma GCC unroll 2
      for (int r = 0; r < at_once; ++r) {
        Words::Reg high0, high1;
        Words::Reg(&x)[4] = c[r];
        const Words::Reg low0 = Words::multiply(x[0], Philox::multiplier[0], high0);
        const Words::Reg low1 = Words::multiply(x[2], Philox::multiplier[1], high1);
        x[0] = Words::exclusive_or(Words::exclusive_or(high1, x[1]), key0);
        x[1] = low1;
        x[2] = Words::exclusive_or(Words::exclusive_or(high0, x[3]), key1);
        x[3] = low0;
      }
      key[0] += Philox::weyl[0];
      key[1] += Philox::weyl[1];
    }
#pragma GCC unroll 2
    for (int r = 0; r < at_once; ++r) Words::store_interleaved(lanes16 + 8 * (done + r * Words::width), c[r]);
  }
}

// factors = scale where a lane is at least the threshold, else 0. By masks: a choice of numbers becomes a branch here.
template <class T, int count>
MMCA_INLINE void choose_factors(const std::uint16_t* lanes16, std::uint32_t threshold, T scale, T* factors) {
  using Bits = std::conditional_t<sizeof(T) == 4, std::uint32_t, std::uint64_t>;
  Bits bits, chosen[count];
  std::memcpy(&bits, &scale, sizeof bits);
  for (int x = 0; x < count; ++x) chosen[x] = bits & (Bits(0) - Bits(lanes16[x] >= threshold));
  std::memcpy(factors, chosen, sizeof chosen);
}

// factors[c] = Z of key list entry first + c, c in 0..count-1: 0, or 65536 / (65536 - threshold).
template <class T>
MMCA_NOINLINE void dropout_factors(const Dropout& dropout, const KeyList& keys, std::int32_t first, int count,
                                   std::uint32_t position, std::uint32_t head, T* factors) {
  const T scale = dropout.threshold < 65536 ? T(65536.0 / (65536.0 - dropout.threshold)) : T(0);
  const std::uint32_t threshold = dropout.threshold;
  constexpr int chunk = 16;
  alignas(64) std::uint16_t lanes16[8 * philox_batch];
  std::int64_t start = -1;  // key of lanes16[0]
  for (int c = 0; c < count; ++c) {
    if (first + c >= keys.size) {
      factors[c] = T(0);
      continue;
    }
    const std::int64_t j = keys.position(first + c);
    if (start < 0 || j < start || j >= start + 8 * philox_batch) {
      start = j / 8 * 8;
      philox_lanes(dropout, static_cast<std::uint32_t>(start / 8), position, head, lanes16);
    }
    if (keys.identity()) {  // the rest of this batch of lanes in one loop
      const int run =
          static_cast<int>(std::min<std::int64_t>({start + 8 * philox_batch - j, count - c, keys.size - j}));
      const std::uint16_t* lane = lanes16 + (j - start);
      int x = 0;
      for (; x + chunk <= run; x += chunk) choose_factors<T, chunk>(lane + x, threshold, scale, factors + c + x);
      for (; x < run; ++x) choose_factors<T, 1>(lane + x, threshold, scale, factors + c + x);
      c += run - 1;
    } else {
      factors[c] = lanes16[j - start] >= threshold ? scale : T(0);
    }
  }
}

// x *= factors, `count` a multiple of two registers.
template <class T>
MMCA_INLINE void multiply_by(T* x, const T* factors, int count) {
  using S = Simd<T>;
  for (int c = 0; c < count; c += S::width) S::storeu(x + c, S::mul(S::loadu(x + c), S::loadu(factors + c)));
}
