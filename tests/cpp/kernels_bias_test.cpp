// Additive biases at the edges: numbers that swallow every score, and what a gradient is added to.
#include <limits>

#include "kernel_cases.h"

namespace mmca::test {
namespace {

class KernelBias : public testing::TestWithParam<const Kernel*> {};
class KernelBiasGradient : public testing::TestWithParam<const Kernel*> {};

double lowest(DType dtype) {
  switch (dtype) {
    case DType::f32: return std::numeric_limits<float>::lowest();
    case DType::f64: return std::numeric_limits<double>::lowest();
    case DType::bf16: return -0x1.fep127;
    default: return -65504;
  }
}

// Which biases are numbers to a kernel: float64's lowest is not one to a kernel that calculates in float.
std::vector<DType> bias_dtypes(const Kernel& kernel) {
  if (kernel.dtype == DType::f64) return {DType::f32, DType::f64, DType::bf16, DType::f16};
  return {DType::f32, DType::bf16, DType::f16};
}

Choices with_bias(const Kernel& kernel, DType dtype, int rows, int keys) {
  Choices c;
  c.q_len = rows, c.k_len = keys, c.head_dim = 9, c.value_dim = 5, c.scale = 0.3, c.seed = 3;
  c.bias = c.grad_bias = true, c.bias_dtype = dtype;
  c.lse_low = is_backward(kernel);  // a forward before a backward does not take the path of few rows
  return c;
}

template <class T, class Number>
void set_bias(Case<T>& c, const Number& number) {
  std::visit(
      [&](auto& bias) {
        bias.each([&](auto& x, auto, auto, std::int64_t i, std::int64_t j) {
          x = static_cast<std::decay_t<decltype(x)>>(number(i, j));
        });
      },
      c.bias);
}

constexpr int sizes[][2] = {{3, 30}, {20, 30}, {40, 192}, {20, 500}, {7, 1000}};  // rows, keys: in every path

// What a bias' lowest number is added to is rounded away: the n keys of a row weigh 1 / n each, forward and backward,
// and n u more or less, in a sum or in the logarithm of n. (Of f16's -65504 that is not so, and scores are 0 instead.)
template <class T>
void expect_uniform(const Kernel& kernel, DType bias_dtype, int rows, int keys) {
  using A = Accumulation<T>;
  SCOPED_TRACE(testing::Message() << to_string(bias_dtype) << " bias, " << rows << " rows, " << keys << " keys");
  Case<T> c(with_bias(kernel, bias_dtype, rows, keys));
  const auto number = static_cast<A>(lowest(bias_dtype));
  set_bias(c, [&](auto, auto) { return lowest(bias_dtype); });
  const bool swallows = number - A(20) == number;
  if (!swallows) c.query.each([](T& x, auto...) { x = T(0); });
  run_kernel(forward_of(kernel), c);
  if (is_backward(kernel)) run_kernel(kernel, c);

  const double n = keys, u = std::numeric_limits<A>::epsilon() / 2, e = StorageRounding<T>::relative;
  const double p_error = u * (n + 30);
  Bounded<double> out(c.out.count()), dq(c.query.count()), dk(c.key.count()), dv(c.value.count()),
      dbias(c.grad_bias.count());
  const auto add = [](Bounded<double>& sum, std::int64_t at, double x, double error) {
    const auto i = static_cast<std::size_t>(at);
    sum.value[i] += x, sum.bound[i] += std::abs(x) * error;
  };
  const auto at = [](Tensor<T>& x, std::int64_t i, std::int64_t d) { return static_cast<double>(x.at(0, 0, i, d)); };
  for (int i = 0; i < rows; ++i) {
    std::vector<double> product(static_cast<std::size_t>(keys));  // dO v, its mean over the keys, and its largest size
    double mean = 0, size = 0;
    for (int j = 0; j < keys; ++j) {
      double absolute = 0;
      for (int d = 0; d < 5; ++d) {
        const double x = at(c.grad_out, i, d) * at(c.value, j, d);
        product[static_cast<std::size_t>(j)] += x, absolute += std::abs(x), mean += x / n;
        add(out, i * 5 + d, at(c.value, j, d) / n, 2 * p_error);
        add(dv, j * 5 + d, at(c.grad_out, i, d) / n, p_error + u * (rows + 6));
      }
      size = std::max(size, absolute);
    }
    for (int j = 0; j < keys; ++j) {
      // p (dP - D): P's error, the means' of as many terms, and what rounding `out` adds.
      const double ds = (product[static_cast<std::size_t>(j)] - mean) / n,
                   error = 2 * size / n * (2 * p_error + u * 20 + e);
      const auto add_product = [&](Bounded<double>& sum, std::int64_t to, double x, double terms) {
        sum.value[static_cast<std::size_t>(to)] += ds * x;
        sum.bound[static_cast<std::size_t>(to)] += std::abs(x) * (error + u * terms * 2 * size / n);
      };
      for (int d = 0; d < 9; ++d) {
        add_product(dq, i * 9 + d, 0.3 * at(c.key, j, d), n + 24);
        add_product(dk, j * 9 + d, 0.3 * at(c.query, i, d), rows + 6);
      }
      add_product(dbias, i * keys + j, 1, 0);
    }
  }
  for (Bounded<double>* x : {&out, &dq, &dk, &dv})
    for (std::size_t i = 0; i < x->value.size(); ++i)
      x->bound[i] += e * std::abs(x->value[i]) + StorageRounding<T>::absolute + 1e-300;
  const Choices choices = with_bias(kernel, bias_dtype, rows, keys);
  expect_within("out", c.out, out, choices);
  for (int i = 0; swallows && i < rows; ++i) ASSERT_EQ(c.lse.at(0, 0, 0, i), number) << "lse of row " << i;
  if (!is_backward(kernel)) return;
  expect_within("grad_query", c.grad_query, dq, choices), expect_within("grad_key", c.grad_key, dk, choices);
  expect_within("grad_value", c.grad_value, dv, choices), expect_within("grad_bias", c.grad_bias, dbias, choices);
}

TEST_P(KernelBias, LowestNumberForAllKeysIsUniform) {
  const Kernel& kernel = *GetParam();
  MMCA_SKIP_REFUSED(kernel);
  for (const DType dtype : bias_dtypes(kernel))
    for (const auto& [rows, keys] : sizes)
      with_type(kernel, [&](auto type) { expect_uniform<decltype(type)>(kernel, dtype, rows, keys); });
}

// The lowest number for some keys only: as if they were hidden, to the last bit of out.
TEST_P(KernelBias, LowestNumberForSomeKeysWeighsNothing) {
  const Kernel& kernel = *GetParam();
  MMCA_SKIP_REFUSED(kernel);
  for (const DType dtype : bias_dtypes(kernel))
    for (const auto& [rows, keys] : sizes)
      with_type(kernel, [&](auto type) {
        using T = decltype(type);
        const Choices choices = with_bias(kernel, dtype, rows, keys);
        Case<T> low(choices), hidden(choices);
        const auto some = [&](std::int64_t i, std::int64_t j) { return (i + j) % 3 == 0; };
        set_bias(low, [&](auto i, auto j) { return some(i, j) ? lowest(dtype) : 0.5; });
        set_bias(hidden, [&](auto i, auto j) { return some(i, j) ? -std::numeric_limits<double>::infinity() : 0.5; });
        for (Case<T>* c : {&low, &hidden}) run_kernel(forward_of(kernel), *c);
        EXPECT_TRUE(equal_bits(run_kernel(kernel, low), run_kernel(kernel, hidden))) << choices.text();
      });
}

// Every number that a dtype can hold as a bias of the only key: its value comes out, and no gradient but its own.
TEST_P(KernelBias, OfTheOnlyKeyChangesNothing) {
  const Kernel& kernel = *GetParam();
  MMCA_SKIP_REFUSED(kernel);
  for (const DType dtype : bias_dtypes(kernel))
    for (const double number : {lowest(dtype), -lowest(dtype), 1.0, -100.0, 0.0})
      with_type(kernel, [&](auto type) {
        using T = decltype(type);
        Case<T> c(with_bias(kernel, dtype, 20, 1));
        set_bias(c, [&](auto, auto) { return number; });
        run_kernel(forward_of(kernel), c);
        c.out.each([&](T x, auto, auto, auto, std::int64_t d) {
          ASSERT_TRUE(same_bits(x, c.value.at(0, 0, 0, d))) << number << ": " << float(x);
        });
        if (!is_backward(kernel)) return;
        run_kernel(kernel, c);
        for (Tensor<T>* x : {&c.grad_query, &c.grad_key})
          x->each([&](T element, auto...) { ASSERT_EQ(static_cast<float>(element), 0) << number; });
        c.grad_bias.each([&](auto element, auto...) { ASSERT_EQ(element, 0) << number; });
      });
}

// A bias gradient is added to what is there. Small numbers of few bits: every sum is exact.
TEST_P(KernelBiasGradient, IsAddedTo) {
  const Kernel& kernel = *GetParam();
  MMCA_SKIP_REFUSED(kernel);
  for (const bool same : {false, true})
    with_type(kernel, [&](auto type) {
      using T = decltype(type);
      Choices choices = with_bias(kernel, DType::f32, 2, 2);
      choices.batch = 3, choices.bias_same[0] = choices.bias_same[2] = same;
      Case<T> c(choices);
      c.query.each([](T& x, auto...) { x = T(0); });
      set_bias(c, [](auto, auto) { return 1; });  // weights of 1/2
      for (Tensor<T>* x : {&c.value, &c.grad_out})
        x->each([](T& element, auto...) { element = static_cast<T>(element < 0 ? -1 : 2); });
      run_kernel(forward_of(kernel), c);
      run_kernel(kernel, c);
      const auto once = c.grad_bias.values();
      c.grad_bias.each([](auto& x, auto...) { x = 100; });
      SerialExecutor serial;
      kernel.run(c.problem, make_plan(c.problem), serial);
      std::size_t i = 0;
      c.grad_bias.each([&](auto x, auto...) { EXPECT_EQ(x, 100 + once[i++]); });
      EXPECT_NE(once, std::vector<Accumulation<T>>(once.size(), 0)) << "nothing was added";
    });
}

INSTANTIATE_TEST_SUITE_P(, KernelBias, testing::ValuesIn(all_kernels()),
                         [](const auto& info) { return identifier(*info.param); });
INSTANTIATE_TEST_SUITE_P(, KernelBiasGradient, testing::ValuesIn(backward_kernels()),
                         [](const auto& info) { return identifier(*info.param); });

}  // namespace
}  // namespace mmca::test
