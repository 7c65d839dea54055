// Dropout factors for a stretch of one row's keys (definition: core/philox.h); included inside the namespace of an
// instruction set.

// lanes16[8 c + l] is lane l of counter first_counter + c, for `batch` counters at once: plain loops that vectorise.
inline constexpr int philox_batch = 16;

inline MMCA_NOINLINE void philox_lanes(const Dropout& dropout, std::uint32_t first_counter, std::uint32_t position,
                                       std::uint32_t head, std::uint16_t (&lanes16)[8 * philox_batch]) {
  std::uint32_t c0[philox_batch], c1[philox_batch], c2[philox_batch], c3[philox_batch];
  for (int i = 0; i < philox_batch; ++i) {
    c0[i] = first_counter + static_cast<std::uint32_t>(i);
    c1[i] = position;
    c2[i] = head;
    c3[i] = dropout.offset;
  }
  std::uint32_t key0 = static_cast<std::uint32_t>(dropout.seed), key1 = static_cast<std::uint32_t>(dropout.seed >> 32);
  for (int round = 0; round < Philox::rounds; ++round) {
    for (int i = 0; i < philox_batch; ++i) {
      const std::uint64_t p0 = std::uint64_t{Philox::multiplier[0]} * c0[i],
                          p1 = std::uint64_t{Philox::multiplier[1]} * c2[i];
      c0[i] = static_cast<std::uint32_t>(p1 >> 32) ^ c1[i] ^ key0;
      c2[i] = static_cast<std::uint32_t>(p0 >> 32) ^ c3[i] ^ key1;
      c1[i] = static_cast<std::uint32_t>(p1);
      c3[i] = static_cast<std::uint32_t>(p0);
    }
    key0 += Philox::weyl[0];
    key1 += Philox::weyl[1];
  }
  for (int i = 0; i < philox_batch; ++i) {
    const std::uint32_t word[4] = {c0[i], c1[i], c2[i], c3[i]};
    for (int l = 0; l < 8; ++l) lanes16[8 * i + l] = static_cast<std::uint16_t>(word[l / 2] >> (16 * (l % 2)));
  }
}

// factors[c] = Z of key list entry first + c, c in 0..count-1: 0, or 65536 / (65536 - threshold).
template <class T>
MMCA_NOINLINE void dropout_factors(const Dropout& dropout, const KeyList& keys, std::int32_t first, int count,
                                   std::uint32_t position, std::uint32_t head, T* factors) {
  const T scale = dropout.threshold < 65536 ? T(65536.0 / (65536.0 - dropout.threshold)) : T(0);
  std::uint16_t lanes16[8 * philox_batch];
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
      for (int x = 0; x < run; ++x) factors[c + x] = lane[x] >= dropout.threshold ? scale : T(0);
      c += run - 1;
    } else {
      factors[c] = lanes16[j - start] >= dropout.threshold ? scale : T(0);
    }
  }
}
