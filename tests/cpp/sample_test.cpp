// A reference that works out a sample alone finds there what the whole one does.
#include <gtest/gtest.h>

#include "compare.h"

namespace mmca::test {
namespace {

template <class X, class R, class Wanted>
void expect_same_part(const char* what, Tensor<X>& like, const Bounded<R>& whole, const Bounded<R>& part,
                      const Wanted& wanted) {
  std::size_t at = 0, compared = 0;
  like.each([&](auto, std::int64_t b, std::int64_t h, std::int64_t i, std::int64_t d) {
    if (wanted(b, h, i, d)) {
      ++compared;
      EXPECT_EQ(part.value[at], whole.value[at]) << what << " " << b << " " << h << " " << i << " " << d;
      EXPECT_EQ(part.bound[at], whole.bound[at]) << what << " " << b << " " << h << " " << i << " " << d;
    }
    ++at;
  });
  EXPECT_GT(compared, 0u) << what;
  EXPECT_LT(compared, at) << what;
}

void expect_same_part(const Choices& choices, const Sample& sample) {
  Case<float> c(choices);
  Reference<float> whole(c), part(c, sample);
  for (Reference<float>* reference : {&whole, &part}) reference->forward();
  whole.store_results();
  const auto out = c.out.values();
  part.store_results();  // the same numbers in the sample, and nothing elsewhere
  EXPECT_EQ(c.out.values(), out);
  const auto row = [&](auto, std::int64_t h, std::int64_t i, auto) { return sample.row(h, i); };
  const auto statistic = [&](auto, auto, std::int64_t h, std::int64_t i) { return sample.row(h, i); };
  const auto key = [&](auto, std::int64_t g, std::int64_t j, auto) { return sample.key(g, j); };
  expect_same_part("out", c.out, whole.out, part.out, row);
  expect_same_part("lse", c.lse, whole.lse, part.lse, statistic);
  if (sample.kv_head == Sample::none) return;
  whole.backward(), part.backward();
  expect_same_part("grad_query", c.grad_query, whole.grad_query, part.grad_query, row);
  expect_same_part("grad_key", c.grad_key, whole.grad_key, part.grad_key, key);
  expect_same_part("grad_value", c.grad_value, whole.grad_value, part.grad_value, key);
  if (choices.grad_bias) expect_same_part("grad_bias", c.grad_bias, whole.grad_bias, part.grad_bias, row);
}

Choices choices() {
  Choices c;
  c.batch = 2, c.kv_heads = 3, c.heads_per_kv = 2, c.q_len = 11, c.k_len = 14, c.head_dim = 4, c.value_dim = 3;
  c.causal = true, c.seed = 1;
  return c;
}

TEST(ReferenceSample, RowsAndOneHeadsKeys) {
  Choices c = choices();
  c.dropout = 0.2, c.lse_low = true;
  expect_same_part(c, {3, Sample::none, 1});
  expect_same_part(c, {3, 2, 1});
  expect_same_part(c, {5, 1, 3});
}

TEST(ReferenceSample, GradientThatBatchesShare) {
  Choices c = choices();
  c.bias = c.grad_bias = c.bias_same[0] = true;
  expect_same_part(c, {3, 0, 3});
}

TEST(ReferenceSample, PackedMmca) {
  Choices c = choices();
  c.mmca = true, c.q_len = c.k_len = 20, c.q_offsets = c.k_offsets = {0, 9, 18};
  expect_same_part(c, {3, 1, 3});
}

}  // namespace
}  // namespace mmca::test
