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
constexpr void philox(std::uint64_t seed, const std::uint32_t (&counter)[4], std::uint32_t (&word)[4]) {
  constexpr std::uint32_t multiplier0 = Philox::multiplier[0], multiplier1 = Philox::multiplier[1];
  constexpr std::uint32_t weyl0 = Philox::weyl[0], weyl1 = Philox::weyl[1];
  std::uint32_t c0 = counter[0], c1 = counter[1], c2 = counter[2], c3 = counter[3];
  std::uint32_t key0 = static_cast<std::uint32_t>(seed), key1 = static_cast<std::uint32_t>(seed >> 32);
  for (int round = 0; round < Philox::rounds; ++round) {
    const std::uint64_t p0 = std::uint64_t{multiplier0} * c0, p1 = std::uint64_t{multiplier1} * c2;
    c0 = static_cast<std::uint32_t>(p1 >> 32) ^ c1 ^ key0, c1 = static_cast<std::uint32_t>(p1);
    c2 = static_cast<std::uint32_t>(p0 >> 32) ^ c3 ^ key1, c3 = static_cast<std::uint32_t>(p0);
    key0 += weyl0, key1 += weyl1;
  }
  word[0] = c0, word[1] = c1, word[2] = c2, word[3] = c3;
}

}  // namespace mmca
