// phi(x) = exp(min(x, 0)) + max(x, 0), of every instruction set, against the standard library's in long double.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "core/kernel_table.h"
#include "probe.h"
#include "tensor.h"

namespace mmca::test {
namespace {

template <class T>
struct FeatureMap : testing::Test {
  static long double exact(long double x) { return std::exp(std::min(x, 0.0L)) + std::max(x, 0.0L); }

  template <class Body>
  static void each_probe(const Body& body) {
    for (const Probe<T>& probe : probes<T>()) {
      if (!missing_features(probe.isa, cpu_features()).empty()) continue;
      SCOPED_TRACE(to_string(probe.isa));
      body(probe);
    }
  }
  static int padded(const Probe<T>& probe, std::size_t features) {
    const int panel = 2 * probe.width;
    return (static_cast<int>(features) + panel - 1) / panel * panel;
  }
  // A row behind which something else lies, as in a tensor; the padding is zero, as row readers make it.
  static std::vector<T> of_key(const Probe<T>& probe, std::vector<T> row) {
    const int features = static_cast<int>(row.size()), width = padded(probe, row.size());
    row.resize(static_cast<std::size_t>(width));
    std::vector<T> out(static_cast<std::size_t>(width) + 1, T(-1));
    probe.phi(row.data(), features, width, out.data());
    EXPECT_EQ(out.back(), T(-1));
    for (int d = features; d < width; ++d) EXPECT_EQ(out[static_cast<std::size_t>(d)], T(0)) << d;
    out.resize(static_cast<std::size_t>(features));
    return out;
  }
};

struct Names {
  template <class T>
  static std::string GetName(int) {
    return sizeof(T) == 4 ? "f32" : "f64";
  }
};
using Types = testing::Types<float, double>;
TYPED_TEST_SUITE(FeatureMap, Types, Names);

// In ulps: exp's polynomial and its coefficients 0.6, the argument's rounding (r = x - n ln 2) at most 0.35 and, where
// one product is rounded, as much again; where x > 0, one rounding of 1 + x. float's ln 2 is off by 1.9e-9, n times.
TYPED_TEST(FeatureMap, IsWithinTwoUlp) {
  using T = TypeParam;
  const long double of_ln_2 =
      sizeof(T) == 4 ? std::abs(static_cast<long double>(0.693147180559945309417L) - 0.693147180559945309417f) : 0;
  const T least = sizeof(T) == 4 ? T(-87.3) : T(-708.3);  // whose exp is a normal number
  std::vector<T> row;
  Random random(1);
  for (int i = 0; i < 20000; ++i) row.push_back(static_cast<T>(random.between(least, 0)));
  for (int i = 0; i < 5000; ++i) row.push_back(static_cast<T>(random.between(-2, 2)));
  for (int i = 0; i < 1000; ++i) row.push_back(static_cast<T>(std::exp(random.between(-60, 60))));
  for (const T x : {T(0), -T(0), std::numeric_limits<T>::min(), -std::numeric_limits<T>::min(), least})
    row.push_back(x);
  TestFixture::each_probe([&](const Probe<T>& probe) {
    const std::vector<T> out = TestFixture::of_key(probe, row);
    long double worst = 0;
    for (std::size_t i = 0; i < row.size(); ++i) {
      const long double exact = TestFixture::exact(row[i]);
      const long double ulp = std::ldexp(1.0L, std::ilogb(exact) - std::numeric_limits<T>::digits + 1);
      const long double n = std::max(0.0L, std::round(-row[i] / 0.693147180559945309417L));
      worst = std::max(worst, (std::abs(out[i] - exact) - n * of_ln_2 * exact) / ulp);
    }
    EXPECT_LT(worst, 2.0L);
    EXPECT_GT(worst, 0.5L);
  });
}

TYPED_TEST(FeatureMap, WhatIsNoNumber) {
  using T = TypeParam;
  constexpr T infinity = std::numeric_limits<T>::infinity(), nan = std::numeric_limits<T>::quiet_NaN();
  TestFixture::each_probe([&](const Probe<T>& probe) {
    const std::vector<T> out = TestFixture::of_key(probe, {-infinity, nan, infinity, T(-1e4), T(0)});
    EXPECT_EQ(out[0], T(0));
    EXPECT_EQ(out[3], T(0));
    EXPECT_EQ(out[4], T(1));
    EXPECT_TRUE(std::isnan(out[1]));
    EXPECT_FALSE(std::isfinite(out[2]));
  });
}

// A query's phi may be scaled: all features by the same factor, so that none of them is out of range.
TYPED_TEST(FeatureMap, QueriesKeepTheirRatios) {
  using T = TypeParam;
  constexpr long double u = std::numeric_limits<T>::epsilon();
  TestFixture::each_probe([&](const Probe<T>& probe) {
    Random random(2);
    for (const int features : {1, 3, 2 * probe.width, 40, 256})
      for (const double middle : {0.0, -3.0, -200.0, -1e6, 1e3, 1e8, 1e30}) {
        std::vector<T> row;
        for (int d = 0; d < features; ++d) row.push_back(static_cast<T>(middle + random.between(-2, 1)));
        const std::vector<T> original = row;
        const int width = TestFixture::padded(probe, row.size());
        row.resize(static_cast<std::size_t>(width));
        std::vector<T> out(static_cast<std::size_t>(width));
        const T factor = probe.phi_of_query(row.data(), features, width, out.data());
        const long double largest = *std::max_element(original.begin(), original.end());
        // exp(x - largest) where all are negative, else factor * phi(x)
        for (int d = 0; d < features; ++d) {
          const long double x = original[static_cast<std::size_t>(d)];
          const long double exact = largest < 0 ? std::exp(x - largest) : factor * TestFixture::exact(x);
          EXPECT_NEAR(out[static_cast<std::size_t>(d)], exact, 3 * u * exact) << middle << " " << d;
          EXPECT_LE(out[static_cast<std::size_t>(d)], T(1 << 20) + 2);
        }
        EXPECT_EQ(factor == T(1), largest <= T(1 << 20));
      }
  });
}

}  // namespace
}  // namespace mmca::test
