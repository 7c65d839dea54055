// Packed sequences: each as if it were alone, and nothing from past the last offset.
#include <algorithm>

#include "kernel_cases.h"

namespace mmca::test {
namespace {

class KernelPacked : public testing::TestWithParam<const Kernel*> {};

Choices packed_choices(Random& random) {
  Choices c;
  c.seed = random.bits();
  choose_packed(c, random, random.chance(0.2) ? 450 : 40, random.chance(0.5));
  c.kv_heads = random.integer(1, 2), c.heads_per_kv = random.integer(1, 3);
  c.head_dim = random.integer(1, 20), c.value_dim = random.integer(1, 20), c.scale = 0.3;
  c.grad_lse = random.chance(0.5), c.lse_low = random.chance(0.5);
  if (random.chance(0.3)) c.softcap = 2;
  if (random.chance(0.5)) {
    c.causal = random.chance(0.5);
    if (random.chance(0.3)) c.window_left = random.integer(0, 30);
    if (random.chance(0.3)) c.pad = 0.3;
  } else {
    c.mmca = true, c.image_rows = any_image_rows(random), c.image_id = random.chance(0.5);
    c.merge = any_merge(random), c.grad_gate = true, c.keep_group_out = random.chance(0.5);
  }
  return c;
}

// What of `all` belongs to a sequence, into a tensor of its shape.
template <class T>
void copy_sequence(Tensor<T>& all, Tensor<T>& one, std::int64_t begin, bool rows_last) {
  one.each([&](T& x, std::int64_t b, std::int64_t h, std::int64_t i, std::int64_t d) {
    x = rows_last ? all.at(b, h, i, begin + d) : all.at(b, h, begin + i, d);
  });
}
template <class T>
void copy_sequence(const std::vector<T>& all, std::vector<T>& one, std::int64_t begin) {
  if (!all.empty()) std::copy_n(all.begin() + begin, one.size(), one.begin());
}

// The problem of one sequence.
Choices alone(const Choices& all, std::size_t b) {
  Choices c = all;
  c.batch = 1;
  c.q_len = all.q_offsets[b + 1] - all.q_offsets[b], c.k_len = all.k_offsets[b + 1] - all.k_offsets[b];
  c.q_offsets.clear(), c.k_offsets.clear();
  return c;
}

TEST_P(KernelPacked, EachSequenceIsAsIfAlone) {
  const Kernel& kernel = *GetParam();
  MMCA_SKIP_REFUSED(kernel);
  for (std::uint64_t seed = 0; seed < 20 && !HasFailure(); ++seed)
    with_type(kernel, [&](auto type) {
      using T = decltype(type);
      Random random(seed);
      const Choices choices = packed_choices(random);
      Case<T> all(choices);
      prepare(kernel, all);
      run_kernel(kernel, all);
      for (std::size_t b = 0; b < static_cast<std::size_t>(choices.batch); ++b) {
        Case<T> one(alone(choices, b));
        const std::int64_t q = choices.q_offsets[b], k = choices.k_offsets[b];
        for (const auto member : {&Case<T>::query, &Case<T>::grad_out, &Case<T>::out})
          copy_sequence(all.*member, one.*member, q, false);
        for (const auto member : {&Case<T>::key, &Case<T>::value}) copy_sequence(all.*member, one.*member, k, false);
        for (const auto member : {&Case<T>::gate, &Case<T>::grad_lse, &Case<T>::lse, &Case<T>::lse_low})
          copy_sequence(all.*member, one.*member, q, true);
        copy_sequence(all.group_out, one.group_out, q, false);
        copy_sequence(all.key_mask, one.key_mask, k);
        copy_sequence(all.modality, one.modality, k), copy_sequence(all.image_id, one.image_id, k);

        std::vector<Accumulation<T>> expected;
        Case<T> packed(alone(choices, b));  // the sequence's part of the packed results
        each_output(kernel, packed, [&](const std::string& name, auto& x) {
          each_output(kernel, all, [&](const std::string& other, auto& source) {
            if constexpr (std::is_same_v<decltype(x), decltype(source)>) {
              const bool rows_last = name == "lse" || name == "lse_low" || name == "grad_gate";
              if (name == other)
                copy_sequence(source, x, name == "grad_key" || name == "grad_value" ? k : q, rows_last);
            }
          });
          for (const auto element : x.values()) expected.push_back(static_cast<Accumulation<T>>(element));
        });
        EXPECT_TRUE(equal_bits(run_kernel(kernel, one), expected)) << "sequence " << b << "\n" << choices.text();
      }
    });
}

// NaN past the last offset, in every operand: the same bits, and zeros there.
TEST_P(KernelPacked, NothingComesFromPastTheLastOffset) {
  const Kernel& kernel = *GetParam();
  MMCA_SKIP_REFUSED(kernel);
  for (std::uint64_t seed = 0; seed < 20 && !HasFailure(); ++seed)
    with_type(kernel, [&](auto type) {
      using T = decltype(type);
      Random random(seed);
      Choices choices = packed_choices(random);
      const std::int64_t q = choices.q_offsets.back(), k = choices.k_offsets.back();
      choices.q_len = q + random.integer(0, 200), choices.k_len = k + random.integer(0, 500);
      Case<T> clean(choices), c(choices);
      prepare(kernel, clean), prepare(kernel, c);
      const T nan = static_cast<T>(std::nanf(""));
      const auto poison = [&](auto& x, std::int64_t begin) {
        x.each([&](T& element, auto, auto, std::int64_t i, auto) {
          if (i >= begin) element = nan;
        });
      };
      poison(c.query, q), poison(c.grad_out, q), poison(c.key, k), poison(c.value, k);
      EXPECT_TRUE(equal_bits(run_kernel(kernel, clean), run_kernel(kernel, c))) << choices.text();
      const auto expect_zero = [&](auto& x, std::int64_t begin) {
        x.each([&](auto element, auto, auto, std::int64_t i, auto) {
          ASSERT_TRUE(i < begin || static_cast<float>(element) == 0) << choices.text();
        });
      };
      if (is_backward(kernel)) expect_zero(c.grad_query, q), expect_zero(c.grad_key, k), expect_zero(c.grad_value, k);
      else expect_zero(c.out, q);
      const auto infinity = std::numeric_limits<float>::infinity();
      if (!is_backward(kernel))
        c.lse.each(
            [&](auto x, auto, auto, auto, std::int64_t i) { ASSERT_TRUE(i < q || x == -infinity) << choices.text(); });
    });
}

INSTANTIATE_TEST_SUITE_P(, KernelPacked, testing::ValuesIn(all_kernels()),
                         [](const auto& info) { return identifier(*info.param); });

}  // namespace
}  // namespace mmca::test
