// The 16-bit storage types: every number there is, and every place where rounding changes its mind.
#include "core/half.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "core/kernel_table.h"
#include "probe.h"
#include "tensor.h"

namespace mmca::test {
namespace {

template <class T>
struct Half : testing::Test {};
struct Names {
  template <class T>
  static std::string GetName(int) {
    return to_string(dtype_of<T>);
  }
};
using Types = testing::Types<BFloat16, Float16>;
TYPED_TEST_SUITE(Half, Types, Names);

template <class T>
constexpr int mantissa_bits = dtype_of<T> == DType::bf16 ? 7 : 10;
template <class T>
constexpr int exponent_bias = dtype_of<T> == DType::bf16 ? 127 : 15;
template <class T>
constexpr std::uint32_t infinity_bits = (0x7fffu >> mantissa_bits<T>) << mantissa_bits<T>;

template <class T>
T of_bits(std::uint32_t bits) {
  T x;
  x.bits = static_cast<std::uint16_t>(bits);
  return x;
}

// What the bits mean, from the definition; of the bits of infinity, the number that would come next.
template <class T>
double meaning(std::uint32_t bits) {
  const int exponent = static_cast<int>((bits & 0x7fffu) >> mantissa_bits<T>);
  const double mantissa = bits & ((1u << mantissa_bits<T>)-1), one = 1 << mantissa_bits<T>;
  const double size =
      std::ldexp(exponent ? one + mantissa : mantissa, std::max(exponent, 1) - exponent_bias<T> - mantissa_bits<T>);
  return bits & 0x8000u ? -size : size;
}

template <class T>
bool is_nan(std::uint32_t bits) {
  return (bits & 0x7fffu) > infinity_bits<T>;
}

TYPED_TEST(Half, WidensEveryNumber) {
  using T = TypeParam;
  for (std::uint32_t bits = 0; bits < 0x10000; ++bits) {
    const float x = of_bits<T>(bits);
    if (is_nan<T>(bits)) {
      ASSERT_TRUE(std::isnan(x)) << bits;
    } else if ((bits & 0x7fffu) == infinity_bits<T>) {
      ASSERT_EQ(x, (bits & 0x8000u ? -1 : 1) * std::numeric_limits<float>::infinity());
    } else {
      ASSERT_EQ(static_cast<double>(x), meaning<T>(bits)) << bits;
    }
    ASSERT_EQ(std::signbit(x), bits >= 0x8000u) << bits;
  }
}

TYPED_TEST(Half, NarrowsBackEveryNumber) {
  using T = TypeParam;
  for (std::uint32_t bits = 0; bits < 0x10000; ++bits) {
    const T back(static_cast<float>(of_bits<T>(bits)));
    if (is_nan<T>(bits)) ASSERT_TRUE(is_nan<T>(back.bits) && (back.bits & 0x8000u) == (bits & 0x8000u)) << bits;
    else ASSERT_EQ(back.bits, bits);
  }
}

// Between each number and the next: halfway goes to the even one, all else to the nearer. Subnormal numbers, zeros and
// the step from the largest number to infinity are among them.
TYPED_TEST(Half, NarrowsToTheNearestEven) {
  using T = TypeParam;
  constexpr float infinity = std::numeric_limits<float>::infinity();
  for (std::uint32_t bits = 0; bits < infinity_bits<T>; ++bits)
    for (const std::uint32_t sign : {0u, 0x8000u}) {
      const double low = meaning<T>(bits | sign), high = meaning<T>((bits + 1) | sign);
      const auto middle = static_cast<float>((low + high) / 2);  // exact
      ASSERT_EQ(static_cast<double>(middle), (low + high) / 2);
      const float away = sign ? -infinity : infinity;
      ASSERT_EQ(T(middle).bits, (bits + (bits & 1)) | sign) << bits;
      ASSERT_EQ(T(std::nextafter(middle, 0.0f)).bits, bits | sign) << bits;
      ASSERT_EQ(T(std::nextafter(middle, away)).bits, (bits + 1) | sign) << bits;
    }
}

TYPED_TEST(Half, NarrowsTheExtremes) {
  using T = TypeParam;
  using Limits = std::numeric_limits<float>;
  for (const float sign : {1.0f, -1.0f}) {
    const std::uint32_t bit = sign < 0 ? 0x8000u : 0;
    EXPECT_EQ(T(sign * 0.0f).bits, bit);
    EXPECT_EQ(T(sign * Limits::infinity()).bits, infinity_bits<T> | bit);
    EXPECT_EQ(T(sign * Limits::max()).bits, infinity_bits<T> | bit);
    EXPECT_EQ(T(sign * Limits::denorm_min()).bits, bit);
  }
  for (const std::uint32_t nan : {0x7f800001u, 0x7f801000u, 0x7fbfffffu, 0x7fc00000u, 0x7fffffffu, 0xff800001u}) {
    const T x(detail::float_of(nan));  // signalling ones and small payloads must not become infinities
    EXPECT_TRUE(is_nan<T>(x.bits)) << nan;
    EXPECT_EQ(x.bits & 0x8000u, nan >> 16 & 0x8000u) << nan;
  }
}

// All 16-bit numbers and, to be narrowed, what lies around and halfway between them, what is far out, and NaNs.
template <class T>
std::vector<float> numbers_to_narrow() {
  std::vector<float> numbers;
  for (std::uint32_t bits = 0; bits < 0x10000; ++bits) {
    if (is_nan<T>(bits)) continue;
    const auto x = static_cast<float>(meaning<T>(bits)), next = static_cast<float>(meaning<T>(bits + 1));
    const float middle = x + (next - x) / 2;
    for (const float y : {x, middle})
      numbers.insert(numbers.end(), {y, std::nextafter(y, -1e38f), std::nextafter(y, 1e38f)});
  }
  Random random(1);
  for (int i = 0; i < 100000; ++i) numbers.push_back(detail::float_of(static_cast<std::uint32_t>(random.bits())));
  return numbers;
}

// The vectors of each instruction set against one number at a time: contiguous rows of any length, so that tails come
// at every lane, and strided ones. A quiet NaN is a NaN's equal.
TYPED_TEST(Half, RowsAreWidenedAsNumbersAre) {
  using T = TypeParam;
  for (const Probe<float>& probe : probes<float>()) {
    if (!missing_features(probe.isa, cpu_features()).empty()) continue;
    SCOPED_TRACE(to_string(probe.isa));
    int length = 1;
    for (std::uint32_t first = 0; first < 0x10000; first += static_cast<std::uint32_t>(length), ++length) {
      length = length > 40 ? 1 : length;
      const int count = std::min(length, static_cast<int>(0x10000 - first));
      for (const int step : {1, 3}) {
        std::vector<T> source(static_cast<std::size_t>(count * step), sentinel<T>());
        for (int i = 0; i < count; ++i)
          source[static_cast<std::size_t>(i * step)] = of_bits<T>(first + static_cast<std::uint32_t>(i));
        std::vector<float> out(static_cast<std::size_t>(count) + 1, sentinel<float>());
        probe.widen_row(dtype_of<T>, source.data(), step, count, out.data());
        ASSERT_TRUE(same_bits(out.back(), sentinel<float>())) << "written past the end";
        for (int i = 0; i < count; ++i) {
          const float x = out[static_cast<std::size_t>(i)], expected = source[static_cast<std::size_t>(i * step)];
          ASSERT_TRUE(same_bits(x, expected) || (std::isnan(x) && std::isnan(expected)))
              << "bits " << first + static_cast<std::uint32_t>(i) << ", step " << step;
        }
      }
    }
  }
}

TYPED_TEST(Half, RowsAreNarrowedAsNumbersAre) {
  using T = TypeParam;
  const std::vector<float> numbers = numbers_to_narrow<T>();
  for (const Probe<float>& probe : probes<float>()) {
    if (!missing_features(probe.isa, cpu_features()).empty()) continue;
    SCOPED_TRACE(to_string(probe.isa));
    std::size_t length = 1;
    for (std::size_t first = 0; first < numbers.size(); first += length, ++length) {
      length = length > 40 ? 1 : length;
      const std::size_t count = std::min(length, numbers.size() - first);
      for (const std::size_t step : {std::size_t{1}, std::size_t{3}}) {
        std::vector<T> out(count * step + 1, sentinel<T>());
        probe.narrow_row(dtype_of<T>, numbers.data() + first, static_cast<int>(count), out.data(),
                         static_cast<std::int64_t>(step));
        ASSERT_TRUE(same_bits(out.back(), sentinel<T>())) << "written past the end";
        for (std::size_t i = 0; i < count * step; ++i) {
          if (i % step) {
            ASSERT_TRUE(same_bits(out[i], sentinel<T>())) << "written between";
            continue;
          }
          const T expected(numbers[first + i / step]);
          ASSERT_TRUE(out[i].bits == expected.bits || (is_nan<T>(out[i].bits) && is_nan<T>(expected.bits)))
              << numbers[first + i / step] << " became " << out[i].bits << " instead of " << expected.bits;
        }
      }
    }
  }
}

}  // namespace
}  // namespace mmca::test
