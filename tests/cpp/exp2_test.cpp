// The kernels' exp2, of every instruction set, against the standard library's in long double.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "core/kernel_table.h"
#include "probe.h"
#include "tensor.h"

namespace mmca::test {
namespace {

template <class T>
struct Exp2 : testing::Test {};
struct Names {
  template <class T>
  static std::string GetName(int) {
    return sizeof(T) == 4 ? "f32" : "f64";
  }
};
using Types = testing::Types<float, double>;
TYPED_TEST_SUITE(Exp2, Types, Names);

template <class T, class Body>
void each_probe(const Body& body) {
  for (const Probe<T>& probe : probes<T>()) {
    if (!missing_features(probe.isa, cpu_features()).empty()) continue;
    SCOPED_TRACE(to_string(probe.isa));
    body(probe);
  }
}

// Largest |x| whose power is a normal number: 126 (1022); the least exponent is one more than max's, negated.
template <class T>
constexpr int reach = std::numeric_limits<T>::max_exponent - 2;

template <class T>
std::vector<T> exp2_of(const Probe<T>& probe, std::vector<T> x, int registers = 1) {
  const std::size_t count = x.size(), step = static_cast<std::size_t>(4 * probe.width);
  x.resize((count + step - 1) / step * step);
  probe.exp2(x.data(), registers, static_cast<int>(x.size()));
  x.resize(count);
  return x;
}

template <class T>
long double ulps(T actual, long double exact) {
  const int exponent = std::max(std::ilogb(exact), std::numeric_limits<T>::min_exponent - 1);
  return std::abs(actual - exact) / std::ldexp(1.0L, exponent - std::numeric_limits<T>::digits + 1);
}

// In ulps of a polynomial p in [0.7, 1.42], worst just below 1: rounding p is 1/2; before it q = (p - 1) / r, in [1/2,
// 1) and of magnitude times r at most 0.3, brings its own half ulp times |r| <= 1/2, so 1/4, and what lies deeper under
// 1/8; the rounded coefficient ln 2 under 1/8. Where multiplication and addition round apart, the products q r and
// below add 1/4 and under 1/8 more.
TYPED_TEST(Exp2, IsWithinAnUlp) {
  using T = TypeParam;
  std::vector<T> x;
  Random random(1);
  for (int i = 0; i < 150000; ++i) x.push_back(static_cast<T>(random.between(-reach<T>, 0)));
  for (int i = 0; i < 150000; ++i) x.push_back(static_cast<T>(random.between(-2, 2)));
  for (int i = 0; i < 50000; ++i) x.push_back(static_cast<T>(random.between(0, reach<T> + 1)));
  for (int i = 0; i < 20000; ++i) x.push_back(static_cast<T>(-std::exp2(random.between(-60, 0))));
  for (int n = -reach<T>; n <= reach<T>; ++n)  // both sides of each change of n, and of each whole number
    for (const T center : {static_cast<T>(n), static_cast<T>(n) + T(0.5)}) {
      T below = center, above = center;
      for (int i = 0; i < 4; ++i) {
        x.insert(x.end(), {below, above});
        below = std::nextafter(below, T(-5000)), above = std::nextafter(above, T(5000));
      }
    }
  x.erase(std::remove_if(x.begin(), x.end(), [](T v) { return v < -reach<T> || v > reach<T> + 1; }), x.end());
  std::vector<long double> exact;
  for (const T v : x) exact.push_back(std::exp2(static_cast<long double>(v)));

  each_probe<T>([&](const Probe<T>& probe) {
    for (const int registers : {1, 2, 4}) {
      const std::vector<T> y = exp2_of(probe, x, registers);
      long double worst = 0;
      T where = 0;
      for (std::size_t i = 0; i < x.size(); ++i)
        if (const long double error = ulps(y[i], exact[i]); !(error <= worst)) worst = error, where = x[i];
      EXPECT_LE(worst, probe.isa == Isa::scalar ? 1.375L : 1.0L) << "at " << where;
      this->RecordProperty(std::string("ulp_") + to_string(probe.isa), std::to_string(worst));
    }
  });
}

TYPED_TEST(Exp2, IsExactAtWholeNumbers) {
  using T = TypeParam;
  std::vector<T> x;
  for (int n = -reach<T>; n <= reach<T> + 1; ++n) x.push_back(static_cast<T>(n));
  each_probe<T>([&](const Probe<T>& probe) {
    const std::vector<T> y = exp2_of(probe, x);
    for (std::size_t i = 0; i < x.size(); ++i) EXPECT_EQ(y[i], std::ldexp(T(1), static_cast<int>(x[i])));
    EXPECT_EQ(probe.exp2_one(T(0)), T(1));
    EXPECT_EQ(probe.exp2_one(T(-0.0)), T(1));
  });
}

TYPED_TEST(Exp2, IsZeroBelowItsReach) {
  using T = TypeParam;
  const T r = static_cast<T>(reach<T>), infinity = std::numeric_limits<T>::infinity();
  each_probe<T>([&](const Probe<T>& probe) {
    for (const T x : {-infinity, std::numeric_limits<T>::lowest(), T(-1e30), -2 * r, -r - 2, -r - 1,
                      std::nextafter(-r - T(0.5), -infinity)})
      EXPECT_EQ(probe.exp2_one(x), T(0)) << x;
    for (int i = 1; i <= 64; ++i) {  // within half of the reach: 0, or the subnormal number it should be
      const T x = -r - T(i) / 128, y = probe.exp2_one(x);
      EXPECT_TRUE(y == T(0) || ulps(y, std::exp2(static_cast<long double>(x))) <= 1.375L) << x << ": " << y;
    }
  });
}

TYPED_TEST(Exp2, KeepsNaN) {
  using T = TypeParam;
  each_probe<T>([&](const Probe<T>& probe) {
    const int n = 4 * probe.width;
    for (const int registers : {1, 2, 4})
      for (int at = 0; at < n; ++at) {
        std::vector<T> x(static_cast<std::size_t>(n), T(-1));
        x[static_cast<std::size_t>(at)] = std::numeric_limits<T>::quiet_NaN();
        const std::vector<T> y = exp2_of(probe, x, registers);
        for (int i = 0; i < n; ++i) {
          if (i == at) EXPECT_TRUE(std::isnan(y[static_cast<std::size_t>(i)]));
          else EXPECT_EQ(y[static_cast<std::size_t>(i)], T(0.5));
        }
      }
    EXPECT_TRUE(std::isnan(probe.exp2_one(std::numeric_limits<T>::quiet_NaN())));
  });
}

}  // namespace
}  // namespace mmca::test
