// The same bits whatever the number of threads and the order in which workers come.
#include "kernel_cases.h"

namespace mmca::test {
namespace {

class KernelThreads : public testing::TestWithParam<const Kernel*> {};
class BackwardThreads : public testing::TestWithParam<const Kernel*> {};

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

Choices small_heads() {  // cpu/small.h: many heads, each its own keys
  Choices c;
  c.batch = 40, c.kv_heads = 4, c.heads_per_kv = 2, c.q_len = 11, c.k_len = 30, c.head_dim = 33, c.value_dim = 40;
  c.scale = 0.2, c.pad = 0.3, c.grad_lse = true, c.seed = 5;
  return c;
}

// A bias gradient that is shared along some dimensions, by several ranges of keys, heads and batches.
Choices shared_bias(bool batch, bool head, bool row) {
  Choices c;
  c.batch = 2, c.kv_heads = 2, c.heads_per_kv = 2, c.q_len = 30, c.k_len = 900, c.head_dim = 8, c.value_dim = 8,
  c.scale = 0.2;
  c.bias = c.grad_bias = c.lse_low = true, c.bias_hidden = 0.1, c.bias_dtype = DType::bf16, c.seed = 4;
  c.bias_same[0] = batch, c.bias_same[1] = head, c.bias_same[2] = row;
  return c;
}

Choices packed() {
  Choices c;
  c.q_offsets = c.k_offsets = {0, 300, 300, 301, 950}, c.batch = 4, c.q_len = c.k_len = 960,
  c.head_dim = c.value_dim = 8;
  c.kv_heads = 2, c.heads_per_kv = 2;
  c.mmca = true, c.image_rows = ImageRows::self_text, c.merge = Merge::gate, c.grad_gate = true, c.softcap = 3;
  c.dropout = 0.1, c.seed = 5;
  return c;
}

void expect_same_bits(const Kernel& kernel, const Choices& choices) {
  with_type(kernel, [&](auto type) {
    Case<decltype(type)> c(choices);
    run_kernel(forward_of(kernel), c);  // what a backward reads
    const auto serial = run_kernel(kernel, c);
    for (const auto x : serial) ASSERT_FALSE(std::isnan(x));
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
TEST_P(KernelThreads, SmallHeadsHaveTheSameBits) {
  MMCA_SKIP_REFUSED(*GetParam());
  expect_same_bits(*GetParam(), small_heads());
}
TEST_P(KernelThreads, DecodingHasTheSameBits) {
  MMCA_SKIP_REFUSED(*GetParam());
  expect_same_bits(*GetParam(), decoding());
}

TEST_P(KernelThreads, PackedHasTheSameBits) {
  MMCA_SKIP_REFUSED(*GetParam());
  expect_same_bits(*GetParam(), packed());
}
TEST_P(BackwardThreads, SharedBiasGradientHasTheSameBits) {
  MMCA_SKIP_REFUSED(*GetParam());
  for (const int shared : {1, 2, 4, 7}) expect_same_bits(*GetParam(), shared_bias(shared & 1, shared & 2, shared & 4));
}

INSTANTIATE_TEST_SUITE_P(, BackwardThreads, testing::ValuesIn(backward_kernels()),
                         [](const auto& info) { return identifier(*info.param); });
INSTANTIATE_TEST_SUITE_P(, KernelThreads, testing::ValuesIn(all_kernels()),
                         [](const auto& info) { return identifier(*info.param); });

}  // namespace
}  // namespace mmca::test
