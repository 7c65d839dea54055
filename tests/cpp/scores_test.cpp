// The kernels' tanh and its slope, of every instruction set, against the standard library's in long double.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "core/kernel_table.h"
#include "probe.h"
#include "reference.h"
#include "tensor.h"

namespace mmca::test {
namespace {

template <class T>
struct Tanh : testing::Test {};
struct Names {
  template <class T>
  static std::string GetName(int) {
    return to_string(dtype_of<T>);
  }
};
using Types = testing::Types<float, double>;
TYPED_TEST_SUITE(Tanh, Types, Names);

template <class T, class Body>
void each_probe(const Body& body) {
  for (const Probe<T>& probe : probes<T>()) {
    if (!missing_features(probe.isa, cpu_features()).empty()) continue;
    SCOPED_TRACE(to_string(probe.isa));
    body(probe);
  }
}

template <class T>
struct Results {
  std::vector<T> tanh, slope;
};

template <class T>
Results<T> results_of(const Probe<T>& probe, std::vector<T> y) {
  const std::size_t count = y.size(), step = static_cast<std::size_t>(probe.width);
  y.resize((count + step - 1) / step * step);
  std::vector<T> slope(y.size());
  probe.tanh(y.data(), slope.data(), static_cast<int>(y.size()));
  y.resize(count), slope.resize(count);
  return {std::move(y), std::move(slope)};
}

// Every binade from where tanh y is y to where it is 1, and both sides of 0.6, where the formula changes.
template <class T>
std::vector<T> arguments() {
  std::vector<T> y;
  Random random(1);
  const int per_binade = sizeof(T) == 4 ? 6000 : 1500;
  for (int exponent = -30; exponent <= 6; ++exponent)
    for (int i = 0; i < per_binade; ++i)
      y.push_back(static_cast<T>(std::ldexp(random.between(1, 2), exponent) * (random.chance(0.5) ? 1 : -1)));
  for (int i = 0; i < 10 * per_binade; ++i) y.push_back(static_cast<T>(random.between(-1.2, 1.2)));
  T below = T(0.6), above = T(0.6);
  for (int i = 0; i < 500; ++i) {
    y.insert(y.end(), {below, above, -below, -above});
    below = std::nextafter(below, T(0)), above = std::nextafter(above, T(1));
  }
  return y;
}

// In units u of roundoff, relative. Below 0.6, y + (y z) P: rounding the sum 1; y z P is at most 0.12 of it, with
// roundings of z, y z, the polynomial and its coefficients of at most 6. Above, (1 - e) / (1 + e): e <= 0.302 errs by 3
// (exp2) and 2 roundings of its argument, which is 2 |y|, so by 3 + 4 |y|; that moves the quotient by 2 e / (1 - e^2)
// times as much, at most 3.6 (at y = 0.6, from where it falls); two sums and a quotient round: 3. The polynomials' own
// errors are below 0.05. In ulps, u in [1/2, 1), that is at most 3.8 (near y = 0.9).
TYPED_TEST(Tanh, IsAsExactAsTheReferenceAssumes) {
  using T = TypeParam;
  const long double u = std::numeric_limits<T>::epsilon() / 2;
  const std::vector<T> y = arguments<T>();
  std::vector<long double> exact;
  for (const T x : y) exact.push_back(std::tanh(static_cast<long double>(x)));
  each_probe<T>([&](const Probe<T>& probe) {
    const Results<T> actual = results_of(probe, y);
    long double worst = 0, worst_ulp = 0;
    T where = 0;
    for (std::size_t i = 0; i < y.size(); ++i) {
      const long double error = std::abs(actual.tanh[i] - exact[i]);
      if (!(error / std::abs(exact[i]) <= worst)) worst = error / std::abs(exact[i]), where = y[i];
      worst_ulp = std::max(worst_ulp, error / std::ldexp(u * 2, std::ilogb(exact[i])));
      ASSERT_LE(std::abs(actual.tanh[i]), T(1)) << y[i];
    }
    EXPECT_LE(worst, tanh_error * u) << "at " << where << ": " << worst / u << " u";
    EXPECT_LE(worst_ulp, 4.0L);
    this->RecordProperty(std::string("ulp_") + to_string(probe.isa), std::to_string(worst_ulp));
  });
}

// 4 e / (1 + e)^2: e's error times (1 - e) / (1 + e) = |tanh y|, twice that of the sum, a product and a quotient.
TYPED_TEST(Tanh, SlopeIsAsExactAsTheReferenceAssumes) {
  using T = TypeParam;
  const long double u = std::numeric_limits<T>::epsilon() / 2;
  const std::vector<T> y = arguments<T>();
  std::vector<long double> exact;
  for (const T x : y) {
    const long double cosh = std::cosh(static_cast<long double>(x));
    exact.push_back(1 / (cosh * cosh));
  }
  each_probe<T>([&](const Probe<T>& probe) {
    const Results<T> actual = results_of(probe, y);
    long double worst = 0;
    for (std::size_t i = 0; i < y.size(); ++i) {
      const long double bound = u * (4 * std::abs(static_cast<long double>(y[i])) + 7) * exact[i];
      const long double error = std::abs(actual.slope[i] - exact[i]);
      if (exact[i] < 8 * std::numeric_limits<T>::min()) {
        ASSERT_LE(actual.slope[i], 16 * std::numeric_limits<T>::min()) << y[i];  // exp2 stops at the normal numbers
      } else {
        ASSERT_LE(error, bound) << "at " << y[i] << ": " << actual.slope[i];
        worst = std::max(worst, error / bound);
      }
      ASSERT_GE(actual.slope[i], T(0)) << y[i];
    }
    this->RecordProperty(std::string("largest_error_in_bounds_") + to_string(probe.isa), std::to_string(worst));
  });
}

TYPED_TEST(Tanh, IsOddAndKnowsItsLimits) {
  using T = TypeParam;
  const T infinity = std::numeric_limits<T>::infinity(), largest = std::numeric_limits<T>::max();
  each_probe<T>([&](const Probe<T>& probe) {
    const std::vector<T> y = arguments<T>();
    std::vector<T> minus;
    for (const T x : y) minus.push_back(-x);
    const Results<T> a = results_of(probe, y), b = results_of(probe, minus);
    for (std::size_t i = 0; i < y.size(); ++i) {
      ASSERT_EQ(a.tanh[i], -b.tanh[i]) << y[i];
      ASSERT_EQ(a.slope[i], b.slope[i]) << y[i];
    }
    for (const T x : {infinity, largest, T(1e30), T(700), T(100)}) {
      const Results<T> limit = results_of(probe, {x, -x});
      EXPECT_EQ(limit.tanh, (std::vector<T>{1, -1})) << x;
      EXPECT_LT(limit.slope[0], T(1e-30)) << x;
      EXPECT_LT(limit.slope[1], T(1e-30)) << x;
    }
    for (const T x : {T(0), T(1e-30), std::numeric_limits<T>::min()}) {
      const Results<T> small = results_of(probe, {x, -x});
      EXPECT_EQ(small.tanh, (std::vector<T>{x, -x}));
      EXPECT_EQ(small.slope, (std::vector<T>{1, 1}));
    }
    const Results<T> nan = results_of(probe, {std::numeric_limits<T>::quiet_NaN()});
    EXPECT_TRUE(std::isnan(nan.tanh[0]));
  });
}

TYPED_TEST(Tanh, Softcapped) {
  using T = TypeParam;
  const long double u = std::numeric_limits<T>::epsilon() / 2;
  Random random(2);
  each_probe<T>([&](const Probe<T>& probe) {
    for (int i = 0; i < 2000; ++i) {
      const T cap = static_cast<T>(std::exp2(random.between(-20, 20))), t = static_cast<T>(random.between(-30, 30));
      T slope;
      const T capped = probe.softcapped(t, cap, &slope);
      const long double y = static_cast<long double>(t) / cap, cosh = std::cosh(y);
      const long double exact = cap * std::tanh(y), exact_slope = 1 / (cosh * cosh);
      ASSERT_LE(std::abs(capped - exact), u * (exact_slope * std::abs(t) + (tanh_error + 1) * std::abs(exact)));
      ASSERT_LE(std::abs(slope - exact_slope),
                u * (6 * std::abs(y) + 7) * exact_slope + 16 * std::numeric_limits<T>::min());
    }
  });
}

}  // namespace
}  // namespace mmca::test
