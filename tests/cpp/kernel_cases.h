// Running a row of the kernel table on a case, for the kernels_*_test.cpp suites.
#pragma once

#include <gtest/gtest.h>

#include <cctype>
#include <cmath>
#include <string>

#include "compare.h"
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

inline bool is_backward(const Kernel& kernel) { return kernel.operation == Operation::attention_backward; }

inline std::vector<const Kernel*> all_kernels() {
  std::vector<const Kernel*> kernels;
  for (const Kernel& kernel : kernel_table())
    if (!is_linear(kernel.operation)) kernels.push_back(&kernel);  // those: linear_test.cpp
  return kernels;
}
inline std::vector<const Kernel*> backward_kernels() {
  std::vector<const Kernel*> kernels;
  for (const Kernel& kernel : kernel_table())
    if (is_backward(kernel)) kernels.push_back(&kernel);
  return kernels;
}

// The forward kernel whose results this one reads.
inline const Kernel& forward_of(const Kernel& kernel) {
  for (const Kernel& other : kernel_table())
    if (other.isa == kernel.isa && other.dtype == kernel.dtype && other.operation == Operation::attention_forward)
      return other;
  return kernel;
}

// Skips a kernel that this processor cannot run, with its reason.
#define MMCA_SKIP_REFUSED(kernel)                                                                \
  if (const std::string reason = refusal(kernel, cpu_features(), std::nullopt); !reason.empty()) \
  GTEST_SKIP() << (kernel).name << ": " << reason

// body(T()) with the kernel's element type.
template <class Body>
void with_type(const Kernel& kernel, const Body& body) {
  switch (kernel.dtype) {
    case DType::f32: return body(float());
    case DType::f64: return body(double());
    case DType::bf16: return body(BFloat16());
    case DType::f16: return body(Float16());
  }
}

// body(name, tensor) for each tensor that the kernel writes.
template <class T, class Body>
void each_output(const Kernel& kernel, Case<T>& c, const Body& body) {
  if (is_backward(kernel)) {
    body("grad_query", c.grad_query), body("grad_key", c.grad_key), body("grad_value", c.grad_value);
    if (c.problem.grad_bias.data) body("grad_bias", c.grad_bias);
    if (c.problem.grad_gate.data) body("grad_gate", c.grad_gate);
  } else {
    body("out", c.out), body("lse", c.lse);
    if (c.problem.group_out.data) body("group_out", c.group_out);
    if (c.problem.lse_low.data) body("lse_low", c.lse_low);
  }
}

inline constexpr std::size_t small_scratch = std::size_t{2} << 20;  // what head dimensions below 64 need, and more

// Runs the kernel into fresh outputs; returns all their elements, one after the other. (To widen one keeps its bits.)
template <class T>
std::vector<Accumulation<T>> run_kernel(const Kernel& kernel, Case<T>& c, Executor& executor,
                                        std::size_t poisoned_bytes = small_scratch) {
  each_output(kernel, c, [](auto, auto& x) { x.reset(); });
  c.grad_bias.each([](auto& x, auto...) { x = 0; });
  poison_scratch(poisoned_bytes);
  kernel.run(c.problem, make_plan(c.problem), executor);
  std::vector<Accumulation<T>> all;
  each_output(kernel, c, [&](const char* name, auto& x) {
    EXPECT_EQ(x.written_exactly(), "") << kernel.name << " " << name;
    for (const auto element : x.values()) all.push_back(static_cast<Accumulation<T>>(element));
  });
  return all;
}

template <class T>
std::vector<Accumulation<T>> run_kernel(const Kernel& kernel, Case<T>& c) {
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
template <class X, class R>
double expect_within(const char* what, Tensor<X>& actual, const Bounded<R>& expected, const Choices& choices) {
  const Comparison found = compare(what, actual, expected, [](auto...) { return true; });
  EXPECT_EQ(found.faults, 0u) << found.text << "\n" << choices.text();
  return found.worst;
}

// lse and lse_low are together as exact as the sum they are made of.
template <class T>
void expect_lse_in_two_parts(Case<T>& c, const Reference<T>& expected, const Choices& choices) {
  using R = typename Reference<T>::R;
  std::size_t at = 0;
  c.lse.each([&](Accumulation<T> lse, std::int64_t g, std::int64_t b, std::int64_t h, std::int64_t i) {
    const R exact = expected.log2_e * expected.lse.value[at], bound = R(1.02) * expected.lse2_bound[at];
    ++at;
    const Accumulation<T> low = c.lse_low.at(g, b, h, i);
    if (std::isinf(lse)) EXPECT_EQ(low, 0);
    else EXPECT_LE(std::abs(expected.lse_high(lse) + static_cast<R>(low) - exact), bound) << choices.text();
  });
}

// One problem through the kernel and the reference.
template <class T>
double check(const Kernel& kernel, const Choices& choices, std::size_t poisoned_bytes = small_scratch) {
  Case<T> c(choices);
  Reference<T> expected(c);
  expected.forward();
  if (is_backward(kernel)) {
    expected.store_results();
    expected.backward();
  }
  SerialExecutor serial;
  run_kernel(kernel, c, serial, poisoned_bytes);
  const auto within = [&](const char* what, auto& actual, const auto& bounded) {
    return expect_within(what, actual, bounded, choices);
  };
  if (is_backward(kernel)) {
    double worst = std::max({within("grad_query", c.grad_query, expected.grad_query),
                             within("grad_key", c.grad_key, expected.grad_key),
                             within("grad_value", c.grad_value, expected.grad_value)});
    if (c.problem.grad_bias.data) worst = std::max(worst, within("grad_bias", c.grad_bias, expected.grad_bias));
    if (c.problem.grad_gate.data) worst = std::max(worst, within("grad_gate", c.grad_gate, expected.grad_gate));
    return worst;
  }
  double worst = std::max(within("out", c.out, expected.out), within("lse", c.lse, expected.lse));
  if (c.problem.lse_low.data) expect_lse_in_two_parts(c, expected, choices);
  if (c.problem.group_out.data) worst = std::max(worst, within("group_out", c.group_out, expected.group_out));
  return worst;
}

template <class T>
bool equal_bits(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0);
}

}  // namespace mmca::test
