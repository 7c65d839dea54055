// The 16-bit storage types as the kernels see them: bits, and exact widening and round-to-nearest-even narrowing, one
// number at a time. The vector forms are in cpu/simd_*.h. Arithmetic is always float.
#pragma once

#include <cstdint>
#include <cstring>

namespace mmca {

namespace detail {
inline std::uint32_t bits_of(float x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
inline float float_of(std::uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
}  // namespace detail

// 8 exponent and 7 mantissa bits: the upper half of a float.
struct BFloat16 {
  std::uint16_t bits;

  BFloat16() = default;
  explicit BFloat16(float x) {
    const std::uint32_t wide = detail::bits_of(x);
    const bool nan = (wide & 0x7fffffffu) > 0x7f800000u;
    bits = static_cast<std::uint16_t>(nan ? (wide >> 16) | 0x40u : (wide + 0x7fffu + ((wide >> 16) & 1u)) >> 16);
  }
  operator float() const { return detail::float_of(std::uint32_t{bits} << 16); }
};

// IEEE 754 binary16: 5 exponent and 10 mantissa bits.
struct Float16 {
  std::uint16_t bits;

  Float16() = default;
  explicit Float16(float x) {
    const std::uint32_t wide = detail::bits_of(x), sign = wide >> 16 & 0x8000u, magnitude = wide & 0x7fffffffu;
    std::uint32_t half;
    if (magnitude > 0x7f800000u) {
      half = 0x7e00u | (magnitude >> 13 & 0x3ffu);
    } else if (magnitude >= 0x47800000u) {  // 65536 and above
      half = 0x7c00u;
    } else if (magnitude < 0x38800000u) {  // below 2^-14: adding 1/2 rounds at the last subnormal bit
      half = detail::bits_of(detail::float_of(magnitude) + 0.5f) - 0x3f000000u;
    } else {
      half = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
    }
    bits = static_cast<std::uint16_t>(sign | half);
  }
  operator float() const {
    const std::uint32_t sign = std::uint32_t{bits} << 16 & 0x80000000u, magnitude = bits & 0x7fffu;
    std::uint32_t wide;
    if (magnitude >= 0x7c00u) {
      wide = 0x7f800000u | magnitude << 13;
    } else if (magnitude < 0x0400u) {
      wide = detail::bits_of(static_cast<float>(magnitude) * 0x1p-24f);
    } else {
      wide = (magnitude << 13) + 0x38000000u;
    }
    return detail::float_of(sign | wide);
  }
};

}  // namespace mmca
