// Philox 4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC 2011), and the dropout
// lanes made from it: key = 64-bit seed, counter = (j / 8, p, b * q_heads + h, offset), where j counts keys, p the
// row's position. Lane l = j % 8 is the 16-bit half word[l / 2] >> 16 * (l % 2). The mask thus depends on nothing but
// position.
#pragma once

#include <cstdint>

namespace mmca {

struct Philox {
  static constexpr std::uint32_t multiplier[2] = {0xD2511F53u, 0xCD9E8D57u};
  static constexpr std::uint32_t weyl[2] = {0x9E3779B9u, 0xBB67AE85u};
  static constexpr int rounds = 10;
};

// One counter's four words.
inline void philox(std::uint64_t seed, const std::uint32_t (&counter)[4], std::uint32_t (&word)[4]) {
  std::uint32_t c[4] = {counter[0], counter[1], counter[2], counter[3]};
  std::uint32_t key[2] = {static_cast<std::uint32_t>(seed), static_cast<std::uint32_t>(seed >> 32)};
  for (int round = 0; round < Philox::rounds; ++round) {
    const std::uint64_t p0 = std::uint64_t{Philox::multiplier[0]} * c[0],
                        p1 = std::uint64_t{Philox::multiplier[1]} * c[2];
    const std::uint32_t next[4] = {static_cast<std::uint32_t>(p1 >> 32) ^ c[1] ^ key[0], static_cast<std::uint32_t>(p1),
                                   static_cast<std::uint32_t>(p0 >> 32) ^ c[3] ^ key[1],
                                   static_cast<std::uint32_t>(p0)};
    for (int i = 0; i < 4; ++i) c[i] = next[i];
    for (int i = 0; i < 2; ++i) key[i] += Philox::weyl[i];
  }
  for (int i = 0; i < 4; ++i) word[i] = c[i];
}

}  // namespace mmca
