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

  explicit Poison(Case<T>& c_)
      : c(c_),
        keys(static_cast<std::size_t>(c.problem.batch * c.problem.kv_heads * c.problem.k_len)),
        rows(static_cast<std::size_t>(c.problem.batch * c.problem.q_heads * c.problem.q_len)),
        reached_keys(keys) {}

  std::size_t key(std::int64_t b, std::int64_t kv, std::int64_t j) const {
    return (b * c.problem.kv_heads + kv) * c.problem.k_len + j;
  }
  std::size_t row(std::int64_t b, std::int64_t h, std::int64_t i) const {
    return (b * c.problem.q_heads + h) * c.problem.q_len + i;
  }

  void spread() {
    const Problem& p = c.problem;
    for (std::int64_t b = 0; b < p.batch; ++b)
      for (std::int64_t h = 0; h < p.q_heads; ++h)
        for (std::int64_t i = 0; i < p.q_len; ++i) {
          for (std::int64_t j = 0; j < p.k_len; ++j)
            rows[row(b, h, i)] |= keys[key(b, h / p.heads_per_kv(), j)] && sees(p, b, h, i, j);
          for (std::int64_t j = 0; j < p.k_len; ++j)
            reached_keys[key(b, h / p.heads_per_kv(), j)] |= rows[row(b, h, i)] && sees(p, b, h, i, j);
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

enum class Into { key, value, query, grad_out };

template <class T>
void expect_contained(const Kernel& kernel, const Choices& choices, Into into, std::uint64_t seed) {
  Case<T> clean(choices), c(choices);
  const Problem& p = c.problem;
  Random random(seed);
  Poison<T> poison(c);
  Tensor<T>& target = into == Into::key     ? c.key
                      : into == Into::value ? c.value
                      : into == Into::query ? c.query
                                            : c.grad_out;
  const bool at_keys = into == Into::key || into == Into::value;
  for (int n = 0; n < 3; ++n) {
    const std::int64_t b = random.integer(0, static_cast<int>(target.size(0)) - 1),
                       h = random.integer(0, static_cast<int>(target.size(1)) - 1),
                       i = random.integer(0, static_cast<int>(target.size(2)) - 1),
                       d = random.integer(0, static_cast<int>(target.size(3)) - 1);
    const T infinity = std::numeric_limits<T>::infinity();
    target.at(b, h, i, d) = random.pick({std::numeric_limits<T>::quiet_NaN(), infinity, -infinity});
    if (at_keys) poison.keys[poison.key(b, h, i)] = 1;
    else poison.rows[poison.row(b, h, i)] = 1;
  }
  poison.spread();
  prepare(kernel, clean), prepare(kernel, c);
  run_kernel(kernel, clean), run_kernel(kernel, c);

  const auto row_reached = [&](auto b, auto h, auto i, auto) { return poison.rows[poison.row(b, h, i)]; };
  const auto key_reached = [&](auto b, auto h, auto j, auto) { return poison.reached_keys[poison.key(b, h, j)]; };
  if (is_backward(kernel)) {
    expect_unreached_equal("grad_query", clean.grad_query, c.grad_query, choices, row_reached);
    expect_unreached_equal("grad_key", clean.grad_key, c.grad_key, choices, key_reached);
    expect_unreached_equal("grad_value", clean.grad_value, c.grad_value, choices, key_reached);
  } else {
    expect_unreached_equal("out", clean.out, c.out, choices, row_reached);
    expect_unreached_equal("lse", clean.lse, c.lse, choices,
                           [&](auto, auto b, auto h, auto i) { return poison.rows[poison.row(b, h, i)]; });
    if (p.group_out)
      expect_unreached_equal("group_out", clean.group_out, c.group_out, choices, [&](auto gb, auto h, auto i, auto) {
        return poison.rows[poison.row(gb % p.batch, h, i)];
      });
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
  switch (random.integer(0, 3)) {
    case 0: c.pad = 0.5; break;
    case 1: c.attend = 0.2; break;
    case 2: c.causal = true, c.window_left = random.integer(0, 9); break;
    default:
      c.mmca = true, c.k_len = std::max(c.k_len, c.q_len);
      c.image_rows = random.pick({ImageRows::self, ImageRows::block, ImageRows::causal, ImageRows::self_text});
      c.merge = random.pick({Merge::sum, Merge::lse});
  }
  if (random.chance(0.3)) c.dropout = 0.3;
  return c;
}

void contained(const Kernel& kernel, Into into, bool few) {
  for (std::uint64_t seed = 0; seed < 25 && !testing::Test::HasFailure(); ++seed) {
    Random random(seed);
    const Choices choices = random_choices(random, few);
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
MMCA_CONTAINED(FewRowsNonFiniteKeyReachesOnlyWhoSeesIt, key, true)
MMCA_CONTAINED(FewRowsNonFiniteValueReachesOnlyWhoSeesIt, value, true)
MMCA_CONTAINED(FewRowsNonFiniteQueryReachesOnlyItsRow, query, true)

// Scores beyond any exp, to where their own rounding error is. The backward reads what its forward wrote.
TEST_P(KernelFaults, HugeNumbersStayFinite) {
  const Kernel& kernel = *GetParam();
  MMCA_SKIP_REFUSED(kernel);
  for (const double size : {700.0, 3e4, 1e5, 1e6, 5e8})
    for (const int rows : {5, 40})
      for (const bool mmca : {false, true})
        with_type(kernel, [&](auto type) {
          using T = decltype(type);
          Choices choices;
          choices.batch = 2, choices.q_len = rows, choices.k_len = 70, choices.head_dim = 16, choices.value_dim = 8,
          choices.scale = 0.25;
          choices.mmca = mmca, choices.image_rows = ImageRows::causal;
          choices.causal = true;
          Case<T> c(choices);
          for (Tensor<T>* x : {&c.query, &c.key})
            x->each([&](T& element, auto...) { element *= static_cast<T>(size); });
          SerialExecutor serial;
          const Kernel* forward = &kernel;
          for (const Kernel& other : kernel_table())
            if (is_backward(kernel) && other.isa == kernel.isa && other.dtype == kernel.dtype && !is_backward(other))
              forward = &other;
          run_kernel(*forward, c, serial);
          for (const T x : c.out.values())
            ASSERT_TRUE(std::isfinite(x)) << x << " in out; operands of " << size << ", rows " << rows;
          if (!is_backward(kernel)) return;
          run_kernel(kernel, c, serial);
          for (Tensor<T>* output : outputs(kernel, c))
            for (const T x : output->values())
              ASSERT_TRUE(std::isfinite(x)) << x << " in output " << output - outputs(kernel, c)[0] << "; operands of "
                                            << size << ", rows " << rows;
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
      choices.batch = 2;
      Case<T> c(choices), other(choices);
      for (Tensor<T>* x : {&other.query, &other.key, &other.value, &other.grad_out})
        x->each([&](T& element, std::int64_t b, auto...) {
          if (b == 1) element *= T(3);
        });
      prepare(kernel, c), prepare(kernel, other);
      run_kernel(kernel, c), run_kernel(kernel, other);
      for (std::size_t o = 0; o < outputs(kernel, c).size(); ++o) {
        if (!is_backward(kernel) && o) continue;  // lse and group_out have the group first
        expect_unreached_equal("output", *outputs(kernel, c)[o], *outputs(kernel, other)[o], choices,
                               [](auto b, auto...) { return b == 1; });
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
                             &choices.grad_layout})
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
