// Known answers of Philox 4x32-10, as published with Random123 (file kat_vectors of its distribution), and the kernels'
// dropout lanes against the definition in core/philox.h.
#include "core/philox.h"

#include <gtest/gtest.h>

#include <array>
#include <cstdint>

#include "core/kernel_table.h"
#include "probe.h"
#include "tensor.h"

namespace mmca::test {
namespace {

using Words = std::array<std::uint32_t, 4>;

Words words(std::uint64_t seed, const std::uint32_t (&counter)[4]) {
  std::uint32_t word[4];
  philox(seed, counter, word);
  return {word[0], word[1], word[2], word[3]};
}

TEST(Philox, Zeros) { EXPECT_EQ(words(0, {0, 0, 0, 0}), (Words{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8})); }

TEST(Philox, Ones) {
  EXPECT_EQ(words(~std::uint64_t{0}, {0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff}),
            (Words{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}));
}

TEST(Philox, DigitsOfPi) {
  EXPECT_EQ(words(0x299f31d0a4093822, {0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}),
            (Words{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}));
}

// Any stretch of a list of keys, with gaps or without, past its end too.
template <class T>
void expect_dropout_factors() {
  for (const Probe<T>& probe : probes<T>()) {
    if (!missing_features(probe.isa, cpu_features()).empty()) continue;
    Random random(7);
    for (int round = 0; round < 300; ++round) {
      KeyList keys;
      keys.size = random.integer(0, 400);
      if (round % 2) {
        std::int32_t position = -1;
        for (int c = 0; c < keys.size; ++c)
          keys.positions.push_back(position += random.integer(1, random.chance(0.1) ? 500 : 3));
      }
      Dropout dropout;
      dropout.threshold = random.pick({1u, 6554u, 32768u, 65535u, 65536u});
      dropout.seed = random.bits();
      dropout.offset = static_cast<std::uint32_t>(random.bits());
      const auto position = static_cast<std::uint32_t>(random.bits()), head = static_cast<std::uint32_t>(random.bits());
      const int first = random.integer(0, keys.size), count = random.integer(0, 256);
      std::vector<T> factors(static_cast<std::size_t>(count) + 1, sentinel<T>());
      probe.dropout_factors(dropout, keys, first, count, position, head, factors.data());
      ASSERT_TRUE(same_bits(factors.back(), sentinel<T>()));
      for (int c = 0; c < count; ++c) {
        T expected = 0;
        if (first + c < keys.size) {
          const auto j = static_cast<std::uint32_t>(keys.position(first + c));
          const Words word = words(dropout.seed, {j / 8, position, head, dropout.offset});
          if (((word[j % 8 / 2] >> (16 * (j % 2))) & 0xffff) >= dropout.threshold)
            expected = static_cast<T>(65536.0 / (65536.0 - dropout.threshold));
        }
        ASSERT_EQ(factors[static_cast<std::size_t>(c)], expected)
            << to_string(probe.isa) << " round " << round << " key " << first + c;
      }
    }
  }
}

TEST(Dropout, FactorsFollowTheDefinitionF32) { expect_dropout_factors<float>(); }
TEST(Dropout, FactorsFollowTheDefinitionF64) { expect_dropout_factors<double>(); }

}  // namespace
}  // namespace mmca::test
