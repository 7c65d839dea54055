// Faults in the data: what a row cannot see cannot change a bit of it, and huge numbers stay finite.
#include <limits>

#include "kernel_cases.h"

namespace mmca::test {
namespace {

class KernelFaults : public testing::TestWithParam<const Kernel*> {};

// Which rows see something poisoned, and which keys are seen by such a row: these may change, nothing else.
template <class T>
struct Poison {
  Case<T>& c;
  std::vector<std::uint8_t> keys, rows, reached_keys;  // by (batch, KV head, key); (batch, head, row)
  std::vector<std::uint8_t> pairs;                     // that see each other: (batch, head, row, key)

  explicit Poison(Case<T>& c_)
      : c(c_),
        keys(static_cast<std::size_t>(c.batch * c.problem.kv_heads * c.problem.k_len)),
        rows(static_cast<std::size_t>(c.batch * c.problem.q_heads * c.problem.q_len)),
        reached_keys(keys),
        pairs(rows.size() * static_cast<std::size_t>(c.problem.k_len)) {}

  std::size_t key(std::int64_t b, std::int64_t kv, std::int64_t j) const {
    return static_cast<std::size_t>((b * c.problem.kv_heads + kv) * c.problem.k_len + j);
  }
  std::size_t row(std::int64_t b, std::int64_t h, std::int64_t i) const {  // b: of a tensor that may have groups
    return static_cast<std::size_t>((b % c.batch * c.problem.q_heads + h) * c.problem.q_len + i);
  }
  std::size_t pair(std::int64_t b, std::int64_t h, std::int64_t i, std::int64_t j) const {
    return row(b, h, i) * static_cast<std::size_t>(c.problem.k_len) + static_cast<std::size_t>(j);
  }

  void spread() {
    const Problem& p = c.problem;
    for (const Sequence& s : sequences(p))
      for (std::int64_t h = 0; h < p.q_heads; ++h)
        for (std::int64_t i = 0; i < s.q_len; ++i) {
          const std::int64_t g = h / p.heads_per_kv(), r = s.q_begin + i;
          for (std::int64_t j = 0; j < s.k_len; ++j) {
            pairs[pair(s.batch, h, r, s.k_begin + j)] = sees(p, s, h, i, j);
            rows[row(s.batch, h, r)] |= keys[key(s.batch, g, s.k_begin + j)] && sees(p, s, h, i, j);
          }
          for (std::int64_t j = s.k_begin; j < s.k_begin + s.k_len; ++j)
            reached_keys[key(s.batch, g, j)] |= rows[row(s.batch, h, r)] && pairs[pair(s.batch, h, r, j)];
        }
  }
};

template <class T, class Reached>
void expect_unreached_equal(const char* what, Tensor<T>& clean, Tensor<T>& poisoned, const Choices& choices,
                            const Reached& reached) {
  std::size_t different = 0, compared = 0;
  clean.each([&](T x, std::int64_t b, std::int64_t h, std::int64_t i, std::int64_t d) {
    if (reached(b, h, i, d)) return;
    ++compared;
    different += !same_bits(x, poisoned.at(b, h, i, d));
  });
  EXPECT_EQ(different, 0u) << what << ": of " << compared << " elements that cannot see the poison\n" << choices.text();
}

enum class Into { key, value, query, grad_out, gate };

// Three NaNs or infinities at random places.
template <class T, class X>
void poison_tensor(Poison<T>& poison, Tensor<X>& target, Into into, Random& random) {
  const float infinity = std::numeric_limits<float>::infinity(), nan = std::numeric_limits<float>::quiet_NaN();
  for (int n = 0; n < 3; ++n) {
    std::int64_t at[4];
    for (int d = 0; d < 4; ++d) at[d] = random.integer(0, static_cast<int>(target.size(d)) - 1);
    const auto [b, h, i, d] = at;
    target.at(b, h, i, d) = static_cast<X>(random.pick({nan, infinity, -infinity}));
    if (into == Into::key || into == Into::value) poison.keys[poison.key(b, h, i)] = 1;
    else if (into == Into::gate) poison.rows[poison.row(h, i, d)] = 1;  // (group, batch, head, row)
    else poison.rows[poison.row(b, h, i)] = 1;
  }
}

template <class T>
void expect_contained(const Kernel& kernel, const Choices& choices, Into into, std::uint64_t seed) {
  Case<T> clean(choices), c(choices);
  Random random(seed);
  Poison<T> poison(c);
  if (into == Into::gate) poison_tensor(poison, c.gate, into, random);
  else
    poison_tensor(poison,
                  into == Into::key     ? c.key
                  : into == Into::value ? c.value
                  : into == Into::query ? c.query
                                        : c.grad_out,
                  into, random);
  poison.spread();
  prepare(kernel, clean), prepare(kernel, c);
  run_kernel(kernel, clean), run_kernel(kernel, c);

  const auto row_reached = [&](auto b, auto h, auto i, auto) { return poison.rows[poison.row(b, h, i)]; };
  const auto key_reached = [&](auto b, auto h, auto j, auto) { return poison.reached_keys[poison.key(b, h, j)]; };
  const auto pair_reached = [&](auto b, auto h, auto i, auto j) {
    return poison.rows[poison.row(b, h, i)] && poison.pairs[poison.pair(b, h, i, j)];
  };
  const auto statistic_reached = [&](auto, auto b, auto h, auto i) { return poison.rows[poison.row(b, h, i)]; };
  if (is_backward(kernel)) {
    expect_unreached_equal("grad_query", clean.grad_query, c.grad_query, choices, row_reached);
    expect_unreached_equal("grad_key", clean.grad_key, c.grad_key, choices, key_reached);
    expect_unreached_equal("grad_value", clean.grad_value, c.grad_value, choices, key_reached);
    expect_unreached_equal("grad_bias", clean.grad_bias, c.grad_bias, choices, pair_reached);
    expect_unreached_equal("grad_gate", clean.grad_gate, c.grad_gate, choices, statistic_reached);
  } else {
    expect_unreached_equal("out", clean.out, c.out, choices, row_reached);
    expect_unreached_equal("lse", clean.lse, c.lse, choices, statistic_reached);
    if (c.problem.group_out.data)
      expect_unreached_equal("group_out", clean.group_out, c.group_out, choices, row_reached);
  }
}

Choices random_choices(Random& random, bool few) {
  Choices c;
  c.seed = random.bits();
  c.batch = random.integer(1, 2), c.kv_heads = random.integer(1, 2), c.heads_per_kv = random.integer(1, 2);
  c.q_len = few ? random.integer(1, 8 / static_cast<int>(c.heads_per_kv)) : random.integer(9, 40);
  c.k_len = random.integer(1, 90), c.head_dim = random.integer(1, 40), c.value_dim = random.integer(1, 40);
  c.scale = 0.3;
  c.grad_lse = random.chance(0.3);
  switch (random.integer(0, 4)) {
    case 0: c.pad = 0.5; break;
    case 1: c.attend = 0.2; break;
    case 2: c.causal = true, c.window_left = random.integer(0, 9); break;
    case 3:  // hidden by a bias
      c.bias = c.grad_bias = true;
      c.bias_dtype = any_dtype(random);
      c.bias_hidden = 0.8;
      if (!few && random.chance(0.4)) c.k_len = random.integer(400, 500);  // several ranges of keys
      break;
    default:
      c.mmca = true, c.k_len = std::max(c.k_len, c.q_len);
      c.image_rows = any_image_rows(random);
      c.merge = any_merge(random), c.grad_gate = true;
  }
  if (random.chance(0.3)) c.dropout = 0.3;
  if (random.chance(0.3)) c.softcap = 2;
  if (!few && random.chance(0.3)) {  // packed
    const std::int64_t q = random.integer(0, static_cast<int>(c.q_len)),
                       k = random.integer(0, static_cast<int>(c.k_len));
    if (!c.bias && c.attend < 0) c.batch = 2, c.q_offsets = {0, q, c.q_len}, c.k_offsets = {0, k, c.k_len};
  }
  return c;
}

void contained(const Kernel& kernel, Into into, bool few) {
  for (std::uint64_t seed = 0; seed < 25 && !testing::Test::HasFailure(); ++seed) {
    Random random(seed);
    Choices choices = random_choices(random, few);
    if (into == Into::gate) {
      choices = Choices();
      choices.seed = seed, choices.batch = 2, choices.heads_per_kv = 2, choices.head_dim = choices.value_dim = 20;
      choices.q_len = choices.k_len = random.integer(9, 40), choices.scale = 0.3;
      choices.mmca = true, choices.merge = Merge::gate, choices.image_rows = any_image_rows(random);
    }
    with_type(kernel, [&](auto type) { expect_contained<decltype(type)>(kernel, choices, into, seed); });
  }
}

#define MMCA_CONTAINED(name, into, few)      \
  TEST_P(KernelFaults, name) {               \
    MMCA_SKIP_REFUSED(*GetParam());          \
    contained(*GetParam(), Into::into, few); \
  }
MMCA_CONTAINED(NonFiniteKeyReachesOnlyWhoSeesIt, key, false)
MMCA_CONTAINED(NonFiniteValueReachesOnlyWhoSeesIt, value, false)
MMCA_CONTAINED(NonFiniteQueryReachesOnlyItsRow, query, false)
MMCA_CONTAINED(NonFiniteGradientReachesOnlyItsRow, grad_out, false)
MMCA_CONTAINED(NonFiniteGateReachesOnlyItsRow, gate, false)
MMCA_CONTAINED(FewRowsNonFiniteKeyReachesOnlyWhoSeesIt, key, true)
MMCA_CONTAINED(FewRowsNonFiniteValueReachesOnlyWhoSeesIt, value, true)
MMCA_CONTAINED(FewRowsNonFiniteQueryReachesOnlyItsRow, query, true)

// A weight of zero hides what it weighs: with the image group's gate closed, NaN values of images reach no output.
TEST_P(KernelFaults, ClosedGateHidesItsGroup) {
  const Kernel& kernel = *GetParam();
  MMCA_SKIP_REFUSED(kernel);
  if (is_backward(kernel)) return;  // 0 * NaN is NaN there, as in any autograd
  for (const int rows : {4, 60})
    with_type(kernel, [&](auto type) {
      using T = decltype(type);
      Choices choices;
      choices.q_len = rows, choices.k_len = 60, choices.head_dim = choices.value_dim = 12, choices.seed = 9;
      choices.mmca = true, choices.merge = Merge::gate, choices.image_rows = ImageRows::self;
      Case<T> clean(choices), c(choices);
      for (Case<T>* x : {&clean, &c}) x->gate.each([](auto& w, std::int64_t g, auto...) { w = g == 1 ? 0 : 1; });
      const Sequence s = sequences(c.problem)[0];
      for (std::int64_t j = 0; j < 60; ++j)
        if (group_of(c.problem, s, j) == 1) c.value.at(0, 0, j, 3) = static_cast<T>(std::nanf(""));
      run_kernel(kernel, clean), run_kernel(kernel, c);
      expect_unreached_equal("out", clean.out, c.out, choices, [](auto...) { return false; });
    });
}

// Scores beyond any exp, to where their own rounding error is. The backward reads what its forward wrote.
TEST_P(KernelFaults, HugeNumbersStayFinite) {
  const Kernel& kernel = *GetParam();
  MMCA_SKIP_REFUSED(kernel);
  for (const double size : {700.0, 3e4, 1e5, 1e6, 5e8})
    for (const int rows : {5, 40})
      for (const bool mmca : {false, true})
        for (const double softcap : {0.0, 30.0})
          with_type(kernel, [&](auto type) {
            using T = decltype(type);
            if (kernel.dtype == DType::f16 && size > 700) return;  // the gradients would not fit its 65504
            Choices choices;
            choices.batch = 2, choices.q_len = rows, choices.k_len = 70, choices.head_dim = 16, choices.value_dim = 8,
            choices.scale = 0.25, choices.softcap = softcap;
            choices.mmca = mmca, choices.image_rows = ImageRows::causal;
            choices.causal = true;
            Case<T> c(choices);
            for (Tensor<T>* x : {&c.query, &c.key})
              x->each([&](T& element, auto...) { element = static_cast<T>(element * size); });
            const auto expect_finite = [&](const Kernel& which) {
              each_output(which, c, [&](const char* name, auto& output) {
                const bool may_be_infinite = name == std::string("lse");  // of a row that sees nothing
                for (const auto x : output.values()) {
                  ASSERT_TRUE(may_be_infinite || std::isfinite(static_cast<double>(x)))
                      << double(x) << " in " << name << "; operands of " << size << ", rows " << rows;
                }
              });
            };
            run_kernel(forward_of(kernel), c);
            expect_finite(forward_of(kernel));
            if (!is_backward(kernel)) return;
            run_kernel(kernel, c);
            expect_finite(kernel);
          });
}

TEST_P(KernelFaults, NeighboursInTheBatchChangeNothing) {
  const Kernel& kernel = *GetParam();
  MMCA_SKIP_REFUSED(kernel);
  for (std::uint64_t seed = 0; seed < 10; ++seed)
    with_type(kernel, [&](auto type) {
      using T = decltype(type);
      Random random(seed);
      Choices choices = random_choices(random, seed % 2);
      choices.batch = 2, choices.q_offsets.clear(), choices.k_offsets.clear();
      Case<T> c(choices), other(choices);
      for (Tensor<T>* x : {&other.query, &other.key, &other.value, &other.grad_out})
        x->each([&](T& element, std::int64_t b, auto...) {
          if (b % 2 == 1) element = static_cast<T>(element * 3);
        });
      prepare(kernel, c), prepare(kernel, other);
      run_kernel(kernel, c), run_kernel(kernel, other);
      const auto changed = [](auto b, auto...) { return b % 2 == 1; };
      const auto changed_statistic = [](auto, auto b, auto...) { return b == 1; };
      if (is_backward(kernel)) {
        expect_unreached_equal("grad_query", c.grad_query, other.grad_query, choices, changed);
        expect_unreached_equal("grad_key", c.grad_key, other.grad_key, choices, changed);
        expect_unreached_equal("grad_value", c.grad_value, other.grad_value, choices, changed);
        expect_unreached_equal("grad_bias", c.grad_bias, other.grad_bias, choices, changed);
        expect_unreached_equal("grad_gate", c.grad_gate, other.grad_gate, choices, changed_statistic);
      } else {
        expect_unreached_equal("out", c.out, other.out, choices, changed);
        expect_unreached_equal("lse", c.lse, other.lse, choices, changed_statistic);
        expect_unreached_equal("group_out", c.group_out, other.group_out, choices, changed);
      }
    });
}

TEST_P(KernelFaults, StridesChangeNothing) {
  const Kernel& kernel = *GetParam();
  MMCA_SKIP_REFUSED(kernel);
  for (std::uint64_t seed = 0; seed < 20; ++seed)
    with_type(kernel, [&](auto type) {
      using T = decltype(type);
      Random random(seed);
      Choices choices = random_choices(random, seed % 2);
      if (seed % 3 == 0) choices.head_dim = choices.value_dim = 32;  // rows that may be used where they lie
      Case<T> contiguous(choices);
      for (Layout* layout : {&choices.query_layout, &choices.key_layout, &choices.value_layout, &choices.out_layout,
                             &choices.grad_layout, &choices.bias_layout, &choices.mask_layout})
        layout->heads_inside_rows = random.chance(0.5), layout->feature_step = random.integer(1, 2),
        layout->gap = random.integer(0, 2), layout->skip = random.integer(0, 7);
      Case<T> strided(choices);
      prepare(kernel, contiguous), prepare(kernel, strided);
      EXPECT_TRUE(equal_bits(run_kernel(kernel, contiguous), run_kernel(kernel, strided))) << choices.text();
    });
}

INSTANTIATE_TEST_SUITE_P(, KernelFaults, testing::ValuesIn(all_kernels()),
                         [](const auto& info) { return identifier(*info.param); });

}  // namespace
}  // namespace mmca::test
