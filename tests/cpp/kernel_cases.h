// Running a row of the kernel table on a case, for the kernels_*_test.cpp suites.
#pragma once

#include <gtest/gtest.h>

#include <cctype>
#include <cmath>
#include <string>

#include "core/kernel_table.h"
#include "executors.h"
#include "reference.h"

namespace mmca::test {

// The kernel's name as GoogleTest takes it.
inline std::string identifier(const Kernel& kernel) {
  std::string name = kernel.name;
  for (char& c : name)
    if (!std::isalnum(static_cast<unsigned char>(c))) c = '_';
  return name;
}

inline std::vector<const Kernel*> all_kernels() {
  std::vector<const Kernel*> kernels;
  for (const Kernel& kernel : kernel_table()) kernels.push_back(&kernel);
  return kernels;
}

// Skips a kernel that this processor cannot run, with its reason.
#define MMCA_SKIP_REFUSED(kernel)                                                                \
  if (const std::string reason = refusal(kernel, cpu_features(), std::nullopt); !reason.empty()) \
  GTEST_SKIP() << (kernel).name << ": " << reason

inline bool is_backward(const Kernel& kernel) { return kernel.operation == Operation::attention_backward; }

// body(T()) with the kernel's element type.
template <class Body>
void with_type(const Kernel& kernel, const Body& body) {
  if (kernel.dtype == DType::f32) return body(float());
  if (kernel.dtype == DType::f64) return body(double());
  FAIL() << "this suite knows no dtype " << to_string(kernel.dtype);
}

template <class T>
std::vector<Tensor<T>*> outputs(const Kernel& kernel, Case<T>& c) {
  if (is_backward(kernel)) return {&c.grad_query, &c.grad_key, &c.grad_value};
  std::vector<Tensor<T>*> all = {&c.out, &c.lse};
  if (c.problem.group_out) all.push_back(&c.group_out);
  if (c.problem.lse_low.data) all.push_back(&c.lse_low);
  return all;
}

// Runs the kernel into fresh outputs; returns all their elements, one after the other.
template <class T>
std::vector<T> run_kernel(const Kernel& kernel, Case<T>& c, Executor& executor,
                          std::size_t poisoned_bytes = std::size_t{8} << 20) {
  for (Tensor<T>* x : outputs(kernel, c)) x->reset();
  poison_scratch(poisoned_bytes);
  kernel.run(c.problem, make_plan(c.problem), executor);
  std::vector<T> all;
  for (Tensor<T>* x : outputs(kernel, c)) {
    EXPECT_EQ(x->written_exactly(), "") << kernel.name << " output " << x - outputs(kernel, c)[0];
    for (const T element : x->values()) all.push_back(element);
  }
  return all;
}

template <class T>
std::vector<T> run_kernel(const Kernel& kernel, Case<T>& c) {
  SerialExecutor serial;
  return run_kernel(kernel, c, serial);
}

// The forward's results from the reference, for a backward kernel to read.
template <class T>
void prepare(const Kernel& kernel, Case<T>& c) {
  if (!is_backward(kernel)) return;
  Reference<T> reference(c);
  reference.forward();
  reference.store_results();
}

// Each element against the reference; returns the largest error in units of its bound.
template <class T, class R>
double expect_within(const char* what, Tensor<T>& actual, const Bounded<R>& expected, const Choices& choices) {
  double worst = 0;
  std::size_t at = 0, faults = 0;
  actual.each([&](T x, std::int64_t b, std::int64_t h, std::int64_t i, std::int64_t d) {
    const R exact = expected.value[at],
            bound = R(1.02) * expected.bound[at];  // errors below 1%, so their squares below that
    ++at;
    const R error = x == exact ? 0 : std::abs(static_cast<R>(x) - exact);  // equal infinities too
    if (!(error <= bound) && ++faults == 1)
      ADD_FAILURE() << what << "[" << b << "," << h << "," << i << "," << d << "] is " << x << ", expected "
                    << double(exact) << " within " << double(bound) << "\n"
                    << choices.text();
    if (bound > 0) worst = std::max(worst, static_cast<double>(error / bound));
  });
  EXPECT_LE(faults, 1u) << what << ": " << faults << " elements out of bounds";
  return worst;
}

// log2(e) lse, rounded, and lse_low are together as exact as the sum they are made of.
template <class T>
void expect_lse_in_two_parts(Case<T>& c, const Reference<T>& expected, const Choices& choices) {
  using R = typename Reference<T>::R;
  constexpr R log2_e = 1.44269504088896340735992468100189214L;
  std::size_t at = 0;
  c.lse.each([&](T lse, std::int64_t g, std::int64_t b, std::int64_t h, std::int64_t i) {
    const R exact = log2_e * expected.lse.value[at], bound = R(1.02) * expected.lse2_bound[at];
    ++at;
    const T high = lse * static_cast<T>(log2_e), low = c.lse_low.at(g, b, h, i);
    if (std::isinf(lse)) EXPECT_EQ(low, T(0));
    else EXPECT_LE(std::abs(static_cast<R>(high) + static_cast<R>(low) - exact), bound) << choices.text();
  });
}

// One problem through the kernel and the reference.
template <class T>
double check(const Kernel& kernel, const Choices& choices, std::size_t poisoned_bytes = std::size_t{8} << 20) {
  Case<T> c(choices);
  Reference<T> expected(c);
  expected.forward();
  if (is_backward(kernel)) {
    expected.store_results();
    expected.backward();
  }
  SerialExecutor serial;
  run_kernel(kernel, c, serial, poisoned_bytes);
  if (is_backward(kernel))
    return std::max({expect_within("grad_query", c.grad_query, expected.grad_query, choices),
                     expect_within("grad_key", c.grad_key, expected.grad_key, choices),
                     expect_within("grad_value", c.grad_value, expected.grad_value, choices)});
  double worst =
      std::max(expect_within("out", c.out, expected.out, choices), expect_within("lse", c.lse, expected.lse, choices));
  if (c.problem.lse_low.data) expect_lse_in_two_parts(c, expected, choices);
  if (c.problem.group_out)
    worst = std::max(worst, expect_within("group_out", c.group_out, expected.group_out, choices));
  return worst;
}

template <class T>
bool equal_bits(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0);
}

}  // namespace mmca::test
