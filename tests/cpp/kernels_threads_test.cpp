// The same bits whatever the number of threads and the order in which workers come.
#include "kernel_cases.h"

namespace mmca::test {
namespace {

class KernelThreads : public testing::TestWithParam<const Kernel*> {};

Choices attention() {
  Choices c;
  c.batch = 2, c.kv_heads = 2, c.heads_per_kv = 2, c.q_len = 150, c.k_len = 900, c.head_dim = 20, c.value_dim = 12,
  c.scale = 0.2;
  c.window_left = 700, c.pad = 0.1, c.dropout = 0.1, c.grad_lse = c.lse_low = true, c.seed = 1;
  return c;
}

Choices mmca() {
  Choices c;
  c.batch = 2, c.heads_per_kv = 3, c.q_len = c.k_len = 800, c.head_dim = 16, c.value_dim = 16, c.scale = 0.2;
  c.mmca = true, c.image_rows = ImageRows::self_text, c.merge = Merge::lse, c.seed = 2;
  return c;
}

Choices decoding() {  // few rows a head, many heads
  Choices c;
  c.batch = 40, c.kv_heads = 4, c.heads_per_kv = 2, c.q_len = 1, c.k_len = 90, c.head_dim = 33, c.value_dim = 40,
  c.scale = 0.2, c.seed = 3;
  return c;
}

void expect_same_bits(const Kernel& kernel, const Choices& choices) {
  with_type(kernel, [&](auto type) {
    using T = decltype(type);
    Case<T> c(choices);
    for (Tensor<T>* x : {&c.out, &c.lse, &c.lse_low, &c.group_out})  // what a backward reads: any numbers do
      x->each([&](T& element, auto...) { element = T(3); });
    for (const Kernel& other : kernel_table())
      if (other.isa == kernel.isa && other.dtype == kernel.dtype && !is_backward(other)) run_kernel(other, c);
    const std::vector<T> serial = run_kernel(kernel, c);
    for (const T x : serial) ASSERT_FALSE(std::isnan(x));
    for (const int threads : {1, 2, 3, 7}) {
      ThreadExecutor executor(threads);
      EXPECT_TRUE(equal_bits(run_kernel(kernel, c, executor), serial)) << threads << " threads\n" << choices.text();
    }
    for (std::uint64_t seed = 0; seed < 3; ++seed) {
      ShuffledExecutor executor(5, seed);
      EXPECT_TRUE(equal_bits(run_kernel(kernel, c, executor), serial)) << "shuffle " << seed << "\n" << choices.text();
    }
  });
}

TEST_P(KernelThreads, AttentionHasTheSameBits) {
  MMCA_SKIP_REFUSED(*GetParam());
  expect_same_bits(*GetParam(), attention());
}
TEST_P(KernelThreads, MmcaHasTheSameBits) {
  MMCA_SKIP_REFUSED(*GetParam());
  expect_same_bits(*GetParam(), mmca());
}
TEST_P(KernelThreads, DecodingHasTheSameBits) {
  MMCA_SKIP_REFUSED(*GetParam());
  expect_same_bits(*GetParam(), decoding());
}

INSTANTIATE_TEST_SUITE_P(, KernelThreads, testing::ValuesIn(all_kernels()),
                         [](const auto& info) { return identifier(*info.param); });

}  // namespace
}  // namespace mmca::test
