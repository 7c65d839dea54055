// The kernels of linear attention against plain loops, and against themselves: cut otherwise, by other threads, with
// other neighbours, with numbers that are none where nobody looks.
#include "linear_case.h"

#include "kernel_cases.h"

namespace mmca::test {
namespace {

bool is_linear_backward(const Kernel& kernel) { return kernel.operation == Operation::linear_backward; }

std::vector<const Kernel*> linear_kernels(bool all) {
  std::vector<const Kernel*> kernels;
  for (const Kernel& kernel : kernel_table())
    if (is_linear_backward(kernel) || (all && is_linear(kernel.operation))) kernels.push_back(&kernel);
  return kernels;
}

class LinearKernels : public testing::TestWithParam<const Kernel*> {
 protected:
  const Kernel& kernel() const { return *GetParam(); }
  bool backward() const { return is_linear_backward(kernel()); }

  template <class T, class Body>
  void each_output(LinearCase<T>& c, const Body& body) const {
    if (backward()) {
      body("grad_query", c.grad_query), body("grad_key", c.grad_key), body("grad_value", c.grad_value);
      if (c.problem.grad_state.sum) body("grad_S", c.grad_S), body("grad_z", c.grad_z);
    } else {
      body("out", c.out);
      if (c.problem.final_state.sum) body("final_S", c.final_S), body("final_z", c.final_z);
    }
  }

  // Runs the kernel into fresh outputs; returns all their elements.
  template <class T>
  std::vector<double> run(LinearCase<T>& c, Executor& executor) const {
    each_output(c, [](auto, auto& x) { x.reset(); });
    c.row_facts.reset();
    poison_scratch(std::size_t{8} << 20);
    kernel().run_linear(c.problem, executor);
    std::vector<double> all;
    each_output(c, [&](const char* name, auto& x) {
      EXPECT_EQ(x.written_exactly(), "") << kernel().name << " " << name << "\n" << c.choices.text();
      for (const auto element : x.values()) all.push_back(static_cast<double>(element));
    });
    return all;
  }
  template <class T>
  std::vector<double> run(LinearCase<T>& c) const {
    SerialExecutor serial;
    return run(c, serial);
  }

  template <class T, class X, class R>
  void expect_within(const LinearCase<T>& c, const char* what, Tensor<X>& actual, const Bounded<R>& expected) const {
    const Comparison found = compare(what, actual, expected, [](auto...) { return true; });
    EXPECT_EQ(found.faults, 0u) << kernel().name << " " << found.text << "\n" << c.choices.text();
  }

  template <class T>
  void check(const LinearChoices& choices) const {
    LinearCase<T> c(choices);
    LinearReference<T> expected(c);
    run(c);
    if (backward()) {
      expect_within(c, "grad_query", c.grad_query, expected.grad_query);
      expect_within(c, "grad_key", c.grad_key, expected.grad_key);
      expect_within(c, "grad_value", c.grad_value, expected.grad_value);
      if (c.problem.grad_state.sum) {
        expect_within(c, "grad_S", c.grad_S, expected.grad_S);
        expect_within(c, "grad_z", c.grad_z, expected.grad_z);
      }
    } else {
      expect_within(c, "out", c.out, expected.out);
      if (c.problem.final_state.sum) {
        expect_within(c, "final_S", c.final_S, expected.final_S);
        expect_within(c, "final_z", c.final_z, expected.final_z);
      }
    }
  }
  void check(const LinearChoices& choices) const {
    with_type(kernel(), [&](auto type) { check<decltype(type)>(choices); });
  }

  void expect_same_bits_for_any_threads(const LinearChoices& choices) const {
    with_type(kernel(), [&](auto type) {
      LinearCase<decltype(type)> c(choices);
      prepare(c);
      const auto serial = run(c);
      for (const auto x : serial) ASSERT_FALSE(std::isnan(x)) << choices.text();
      for (const int threads : {1, 2, 3, 7}) {
        ThreadExecutor executor(threads);
        EXPECT_TRUE(equal_bits(run(c, executor), serial)) << threads << " threads\n" << choices.text();
      }
      for (std::uint64_t seed = 0; seed < 3; ++seed) {
        ShuffledExecutor executor(5, seed);
        EXPECT_TRUE(equal_bits(run(c, executor), serial)) << "shuffle " << seed << "\n" << choices.text();
      }
    });
  }
  template <class T>
  void prepare(LinearCase<T>&) const {}
};

class LinearBackwardKernels : public LinearKernels {};

LinearChoices random_choices(std::uint64_t seed) {
  Random random(seed);
  LinearChoices c;
  c.seed = seed;
  c.batch = random.integer(0, 9) ? random.integer(1, 3) : 0;
  c.kv_heads = random.integer(1, 3), c.heads_per_kv = random.pick({1, 1, 2, 3, 7});
  const auto length = [&] {
    return random.pick(
        {random.integer(0, 9), random.integer(0, 60), 31, 32, 33, 63, 64, 65, 96, 97, random.integer(90, 110)});
  };
  c.q_len = length(), c.k_len = random.chance(0.6) ? c.q_len : length();
  const auto dim = [&] { return random.pick({1, random.integer(1, 9), random.integer(1, 40), 16, 32, 33}); };
  c.head_dim = dim(), c.value_dim = random.chance(0.4) ? c.head_dim : dim();
  c.causal = random.chance(0.6), c.state = random.chance(0.4);
  c.final_state = random.chance(0.4), c.grad_final_state = random.chance(0.4);
  c.pad = random.chance(0.4) ? random.pick({0.0, 0.2, 0.8, 1.0}) : -1;
  c.size = random.pick({1.5, 1.5, 1.5, 8.0, 0.01});
  if (random.chance(0.2)) {
    Choices packed;
    choose_packed(packed, random, 70, random.chance(0.5));
    c.batch = packed.batch, c.q_offsets = packed.q_offsets, c.k_offsets = packed.k_offsets;
    c.q_len = packed.q_len, c.k_len = packed.k_len;
  }
  for (Layout* layout : {&c.query_layout, &c.key_layout, &c.value_layout, &c.out_layout, &c.grad_layout})
    *layout = any_layout(random);
  return c;
}

TEST_P(LinearKernels, AreTheReference) {
  MMCA_SKIP_REFUSED(kernel());
  for (std::uint64_t seed = 0; seed < 80; ++seed) check(random_choices(seed));
}

// Lengths about the ends of chunks and segments; several segments.
TEST_P(LinearKernels, AreTheReferenceAtEveryBoundary) {
  MMCA_SKIP_REFUSED(kernel());
  LinearChoices c;
  c.head_dim = 3, c.value_dim = 2, c.final_state = c.grad_final_state = c.state = true;
  for (const bool causal : {true, false})
    for (const std::int64_t length : {1535, 1536, 1537, 1600, 3100}) {
      c.causal = causal, c.q_len = c.k_len = length, c.state = !c.state, ++c.seed;
      check(c);
    }
  c.causal = true, c.heads_per_kv = 5;  // chunks that end within a token, of some sweeps
  c.q_len = 700, c.k_len = 650, check(c);
  c.q_len = 650, c.k_len = 700, check(c);
  c.q_len = 3, c.k_len = 1700, check(c);
  c.q_len = 1700, c.k_len = 3, check(c);
}

TEST_P(LinearKernels, EveryHeadDim) {
  MMCA_SKIP_REFUSED(kernel());
  LinearChoices c;
  c.q_len = 20, c.k_len = 60, c.causal = c.state = c.final_state = c.grad_final_state = true;
  for (int dim = 1; dim <= 256; dim += dim < 70 ? 1 : 31) {
    c.head_dim = dim, c.value_dim = 257 - dim, ++c.seed;
    check(c);
  }
  c.head_dim = c.value_dim = 256, check(c);
}

TEST_P(LinearKernels, ManyHeadsOfOneKeyHead) {
  MMCA_SKIP_REFUSED(kernel());
  LinearChoices c;
  c.heads_per_kv = 130, c.q_len = 3, c.k_len = 4, c.head_dim = 5, c.value_dim = 4, c.state = true;
  for (const bool causal : {true, false}) c.causal = causal, check(c);
}

TEST_P(LinearKernels, ThreadsDoNotChangeABit) {
  MMCA_SKIP_REFUSED(kernel());
  LinearChoices c;  // long heads, fewer than threads: cut into segments
  c.head_dim = 12, c.value_dim = 20, c.q_len = c.k_len = 7000, c.causal = true, c.pad = 0.1;
  expect_same_bits_for_any_threads(c);
  c.state = c.final_state = c.grad_final_state = true, c.q_len = 5000, c.kv_heads = 2, c.heads_per_kv = 2;
  expect_same_bits_for_any_threads(c);
  c.causal = false, expect_same_bits_for_any_threads(c);
  c.final_state = c.state = false, expect_same_bits_for_any_threads(c);
  c.causal = true, c.q_len = 7000, c.k_len = 2500, c.state = true, expect_same_bits_for_any_threads(c);
  LinearChoices many;  // short ones
  many.batch = 30, many.kv_heads = 3, many.q_len = many.k_len = 100, many.head_dim = many.value_dim = 24;
  many.causal = many.state = true;
  expect_same_bits_for_any_threads(many);
  LinearChoices packed;  // both in one call
  packed.q_offsets = packed.k_offsets = {0, 100, 100, 9000, 9100}, packed.batch = 4, packed.q_len = packed.k_len = 9111;
  packed.head_dim = packed.value_dim = 16, packed.causal = packed.state = packed.final_state = true;
  packed.heads_per_kv = 2;
  expect_same_bits_for_any_threads(packed);
}

// A sequence has the same bits alone, in a batch and packed.
TEST_P(LinearKernels, NeighboursHaveNoInfluence) {
  MMCA_SKIP_REFUSED(kernel());
  with_type(kernel(), [&](auto type) {
    using T = decltype(type);
    LinearChoices c;
    c.batch = 3, c.kv_heads = 2, c.heads_per_kv = 2, c.q_len = c.k_len = 110, c.head_dim = 9, c.value_dim = 7;
    c.causal = true, c.pad = 0.2;
    LinearCase<T> whole(c);
    run(whole);
    for (std::int64_t b = 0; b < 3; ++b) {
      LinearChoices one = c;
      one.batch = 1;
      LinearCase<T> alone(one);
      const auto copy = [&](auto& from, auto& to) {
        to.each(
            [&](auto& x, std::int64_t, std::int64_t h, std::int64_t i, std::int64_t d) { x = from.at(b, h, i, d); });
      };
      copy(whole.query, alone.query), copy(whole.key, alone.key), copy(whole.value, alone.value);
      copy(whole.grad_out, alone.grad_out);
      std::copy_n(whole.key_mask.begin() + b * c.k_len, c.k_len, alone.key_mask.begin());
      run(alone);
      const auto same = [&](const char* name, auto& in_batch, auto& by_itself) {
        by_itself.each([&](auto& x, std::int64_t, std::int64_t h, std::int64_t i, std::int64_t d) {
          EXPECT_TRUE(same_bits(x, in_batch.at(b, h, i, d))) << name << " " << h << " " << i << " " << d;
        });
      };
      if (backward()) {
        same("grad_query", whole.grad_query, alone.grad_query), same("grad_key", whole.grad_key, alone.grad_key);
        same("grad_value", whole.grad_value, alone.grad_value);
      } else {
        same("out", whole.out, alone.out);
      }
    }
  });
}

// Numbers that are none: in keys that the mask hides nobody meets them; in the last token only its own row does.
TEST_P(LinearKernels, WhatIsNotSeenHasNoInfluence) {
  MMCA_SKIP_REFUSED(kernel());
  with_type(kernel(), [&](auto type) {
    using T = decltype(type);
    for (const float bad : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
      LinearChoices c;
      c.kv_heads = 2, c.heads_per_kv = 2, c.q_len = c.k_len = 70, c.head_dim = 9, c.value_dim = 7, c.causal = true;
      c.pad = 0.3;
      LinearCase<T> clean(c), hidden(c), later(c);
      clean.key_mask.back() = hidden.key_mask.back() = later.key_mask.back() = 1;
      for (std::int64_t g = 0; g < 2; ++g) {
        for (std::int64_t j = 0; j < c.k_len; ++j)
          if (!hidden.key_mask[j]) hidden.key.at(0, g, j, 3) = hidden.value.at(0, g, j, 2) = T(bad);
        later.key.at(0, g, c.k_len - 1, 3) = later.value.at(0, g, c.k_len - 1, 2) = T(bad);
      }
      for (std::int64_t h = 0; h < 4; ++h) hidden.query.at(0, h, 0, 1) = clean.query.at(0, h, 0, 1);
      const auto expected = run(clean);
      EXPECT_TRUE(equal_bits(run(hidden), expected)) << bad;
      run(later);
      const auto same_but_last = [&](const char* name, auto& x, auto& y) {
        x.each([&](auto& element, std::int64_t, std::int64_t h, std::int64_t i, std::int64_t d) {
          EXPECT_TRUE(i + 1 == c.q_len || same_bits(element, y.at(0, h, i, d)))
              << name << " " << bad << " " << h << " " << i << " " << d;
        });
      };
      if (!backward()) same_but_last("out", clean.out, later.out);
      else same_but_last("grad_query", clean.grad_query, later.grad_query);
      bool reached = true;
      for (std::int64_t h = 0; h < 4; ++h)
        reached =
            reached &&
            !std::isfinite(static_cast<float>((backward() ? later.grad_query : later.out).at(0, h, c.q_len - 1, 2)));
      EXPECT_TRUE(reached) << bad;
    }
  });
}

// A gradient that is none spoils its own row's and those of the keys it sees, not of later ones.
TEST_P(LinearBackwardKernels, AGradientReachesWhatTheRowSees) {
  MMCA_SKIP_REFUSED(kernel());
  with_type(kernel(), [&](auto type) {
    using T = decltype(type);
    LinearChoices c;
    c.heads_per_kv = 3, c.q_len = c.k_len = 100, c.head_dim = 9, c.value_dim = 7, c.causal = true;
    LinearCase<T> clean(c), bad(c);
    const std::int64_t row = 60;
    bad.grad_out.at(0, 1, row, 2) = T(std::numeric_limits<float>::quiet_NaN());
    run(clean), run(bad);
    const auto compare = [&](const char* name, auto& x, auto& y, const auto& reached) {
      x.each([&](auto& element, std::int64_t, std::int64_t h, std::int64_t i, std::int64_t d) {
        const auto other = y.at(0, h, i, d);
        const bool right = reached(h, i, d) ? std::isnan(static_cast<float>(other)) : same_bits(element, other);
        EXPECT_TRUE(right) << name << " " << h << " " << i << " " << d;
      });
    };
    compare("grad_query", clean.grad_query, bad.grad_query, [&](auto h, auto i, auto) { return h == 1 && i == row; });
    compare("grad_key", clean.grad_key, bad.grad_key, [&](auto, auto j, auto) { return j <= row; });
    compare("grad_value", clean.grad_value, bad.grad_value, [&](auto, auto j, auto d) { return j <= row && d == 2; });
  });
}

INSTANTIATE_TEST_SUITE_P(, LinearBackwardKernels, testing::ValuesIn(linear_kernels(false)),
                         [](const auto& info) { return identifier(*info.param); });
INSTANTIATE_TEST_SUITE_P(, LinearKernels, testing::ValuesIn(linear_kernels(true)),
                         [](const auto& info) { return identifier(*info.param); });

}  // namespace
}  // namespace mmca::test
