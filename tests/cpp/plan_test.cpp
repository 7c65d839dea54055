// Plans against a predicate on each pair of row and key (reference.h), on random problems.
#include <gtest/gtest.h>

#include <algorithm>
#include <limits>
#include <set>

#include "case.h"
#include "core/plan.h"
#include "visible.h"

namespace mmca::test {
namespace {

// The keys that row `index` of the plan sees of a group, read off the plan.
std::set<std::int64_t> planned(const SequencePlan& plan, int group, std::int64_t index) {
  std::set<std::int64_t> keys;
  const Range range = plan.ranges[group][static_cast<std::size_t>(index)];
  for (std::int32_t c = range.begin; c < range.end; ++c) keys.insert(plan.keys[group].position(c));
  return keys;
}

void expect_plan_agrees(const Choices& choices) {
  SCOPED_TRACE(choices.text());
  const Case<float> c(choices);
  const Problem& p = c.problem;
  const Plan plan = make_plan(p);
  std::int64_t number = 0;
  for (const Sequence& s : sequences(p)) {
    if (s.tail && !s.q_len && !s.k_len) continue;
    const SequencePlan& sequence = plan.of(number++);
    ASSERT_EQ(sequence.q_begin, s.q_begin);
    ASSERT_EQ(sequence.q_len, s.q_len);
    ASSERT_EQ(sequence.k_begin, s.k_begin);
    ASSERT_EQ(sequence.k_len, s.k_len);
    std::set<std::int64_t> listed;
    for (int g = 0; g < p.groups(); ++g) {
      const KeyList& keys = sequence.keys[g];
      ASSERT_TRUE(keys.positions.empty() || static_cast<std::int32_t>(keys.positions.size()) == keys.size);
      std::int64_t before = -1;
      for (std::int32_t i = 0; i < keys.size; ++i) {
        const std::int64_t j = keys.position(i);
        ASSERT_GT(j, before);  // ascending
        ASSERT_LT(j, s.k_len);
        ASSERT_EQ(group_of(p, s, j), g);
        before = j;
        listed.insert(j);
      }
      ASSERT_EQ(static_cast<std::int64_t>(sequence.ranges[g].size()), s.q_len);
      for (const Range& range : sequence.ranges[g]) {
        ASSERT_EQ(range.size(), std::max(0, range.end - range.begin));
        ASSERT_TRUE(range.size() == 0 || (range.begin >= 0 && range.end <= keys.size));
      }
    }
    // Hidden keys are the rest, each once.
    const std::set<std::int64_t> hidden(sequence.hidden_keys.begin(), sequence.hidden_keys.end());
    ASSERT_EQ(hidden.size(), sequence.hidden_keys.size());
    ASSERT_EQ(static_cast<std::int64_t>(hidden.size() + listed.size()), s.k_len);
    for (std::int64_t j = 0; j < s.k_len; ++j) {
      ASSERT_EQ(hidden.count(j) == 1, is_padding(p, s, j)) << "key " << j;
      ASSERT_EQ(listed.count(j) == 0, is_padding(p, s, j)) << "key " << j;
    }

    std::set<std::int64_t> rows;
    for (std::int64_t index = 0; index < s.q_len; ++index) {
      const std::int64_t i = sequence.row(index);
      ASSERT_TRUE(i >= 0 && i < s.q_len && rows.insert(i).second) << "row " << i << " twice or out of range";
      bool own = false;
      std::set<std::int64_t> expected[max_groups];
      for (std::int64_t j = 0; j < s.k_len; ++j)
        if (sees(p, s, 0, i, j)) {
          if (is_own_image(p, s, i, j)) own = true;
          else expected[group_of(p, s, j)].insert(j);
        }
      ASSERT_EQ(sequence.attends_to_itself(i), own) << "row " << i;
      for (int g = 0; g < p.groups(); ++g)
        ASSERT_EQ(planned(sequence, g, index), expected[g]) << "row " << i << ", group " << g;
    }
  }
  ASSERT_EQ(plan.batch, number);
}

Choices random_lengths(Random& random) {
  Choices c;
  c.seed = random.bits();
  c.batch = random.integer(0, 3);
  c.q_len = random.integer(0, random.pick({5, 30, 60})), c.k_len = random.integer(0, random.pick({5, 30, 60}));
  return c;
}

TEST(Plan, BandOfEqualLengths) {
  for (std::uint64_t seed = 0; seed < 500 && !testing::Test::HasFailure(); ++seed) {
    Random random(seed);
    Choices c = random_lengths(random);
    c.q_len = c.k_len;
    c.causal = random.chance(0.5);
    if (random.chance(0.7)) c.window_left = random.integer(0, 70);
    if (random.chance(0.7)) c.window_right = random.integer(0, 70);
    if (random.chance(0.5)) c.pad = random.pick({0.0, 0.2, 0.8, 1.0});
    expect_plan_agrees(c);
  }
}

TEST(Plan, BandOfAnyLengths) {
  for (std::uint64_t seed = 0; seed < 1500 && !testing::Test::HasFailure(); ++seed) {
    Random random(seed);
    Choices c = random_lengths(random);
    c.causal = random.chance(0.5);
    if (random.chance(0.7)) c.window_left = random.integer(0, 70);
    if (random.chance(0.7)) c.window_right = random.integer(0, 70);
    if (random.chance(0.5)) c.pad = random.pick({0.0, 0.2, 0.8, 1.0});
    expect_plan_agrees(c);
  }
}

TEST(Plan, HugeWindowsDoNotOverflow) {
  for (const std::int64_t left : {std::int64_t{-1}, std::int64_t{3}, std::numeric_limits<std::int64_t>::max()})
    for (const std::int64_t right : {std::int64_t{-1}, std::int64_t{3}, std::numeric_limits<std::int64_t>::max()})
      for (const int q_len : {4, 9, 30}) {
        Choices c;
        c.q_len = q_len, c.k_len = 9;
        // The predicate adds p and right, so it is asked with a window that is as good as the largest.
        c.window_left = std::min<std::int64_t>(left, 1000), c.window_right = std::min<std::int64_t>(right, 1000);
        Case<float> moderate(c);
        const Plan expected = make_plan(moderate.problem);
        moderate.problem.window_left = left, moderate.problem.window_right = right;
        const Plan plan = make_plan(moderate.problem);
        for (std::size_t i = 0; i < static_cast<std::size_t>(q_len); ++i) {
          const Range a = plan.of(0).ranges[0][i], b = expected.of(0).ranges[0][i];
          EXPECT_EQ(a.size(), b.size());
          EXPECT_TRUE(a.size() == 0 || a.begin == b.begin);
        }
        expect_plan_agrees(c);
      }
}

void mmca_agrees(ImageRows image_rows) {
  for (std::uint64_t seed = 0; seed < 400 && !testing::Test::HasFailure(); ++seed) {
    Random random(seed);
    Choices c = random_lengths(random);
    c.mmca = true;
    c.image_rows = image_rows;
    c.image_id = random.chance(0.5);
    expect_plan_agrees(c);
  }
}

TEST(Plan, MmcaSelf) { mmca_agrees(ImageRows::self); }
TEST(Plan, MmcaBlock) { mmca_agrees(ImageRows::block); }
TEST(Plan, MmcaCausal) { mmca_agrees(ImageRows::causal); }
TEST(Plan, MmcaSelfText) { mmca_agrees(ImageRows::self_text); }

TEST(Plan, Packed) {
  for (std::uint64_t seed = 0; seed < 600 && !testing::Test::HasFailure(); ++seed) {
    Random random(seed);
    Choices c;
    c.seed = random.bits();
    choose_packed(c, random, random.pick({3, 40}), random.chance(0.5));
    c.causal = random.chance(0.5);
    if (random.chance(0.5)) c.window_left = random.integer(0, 40);
    if (random.chance(0.5)) c.window_right = random.integer(0, 40);
    if (random.chance(0.5)) c.pad = random.pick({0.0, 0.2, 0.8, 1.0});
    expect_plan_agrees(c);
  }
}

TEST(Plan, PackedMmca) {
  for (std::uint64_t seed = 0; seed < 600 && !testing::Test::HasFailure(); ++seed) {
    Random random(seed);
    Choices c;
    c.seed = random.bits();
    choose_packed(c, random, random.pick({3, 40}), random.chance(0.5));
    c.mmca = true;
    c.image_rows = any_image_rows(random);
    c.image_id = random.chance(0.5);
    expect_plan_agrees(c);
  }
}

TEST(Plan, PackedSequencesAndWhatLiesPastThem) {
  Choices c;
  c.batch = 4, c.q_offsets = {0, 3, 3, 4, 9}, c.k_offsets = {0, 5, 7, 7, 10}, c.q_len = 9, c.k_len = 10;
  EXPECT_EQ(make_plan(Case<float>(c).problem).batch, 4);
  c.q_len = 11;
  const Plan queries = make_plan(Case<float>(c).problem);
  ASSERT_EQ(queries.batch, 5);
  EXPECT_EQ(queries.of(4).q_begin, 9);
  EXPECT_EQ(queries.of(4).q_len, 2);
  EXPECT_EQ(queries.of(4).k_len, 0);
  c.q_len = 9, c.k_len = 12;
  const Plan keys = make_plan(Case<float>(c).problem);
  ASSERT_EQ(keys.batch, 5);
  EXPECT_EQ(keys.of(4).hidden_keys, (std::vector<std::int32_t>{0, 1}));
  c.batch = 0, c.q_offsets = c.k_offsets = {0};  // nothing but a tail
  EXPECT_EQ(make_plan(Case<float>(c).problem).batch, 1);
  c.q_len = c.k_len = 0;
  EXPECT_EQ(make_plan(Case<float>(c).problem).batch, 0);
}

// Every pointer of the problem of one sequence is at that sequence's first row, and null stays null.
template <class T>
void expect_problem_of_sequence(const Choices& choices) {
  SCOPED_TRACE(choices.text());
  using A = Accumulation<T>;
  Case<T> c(choices);
  const Problem& p = c.problem;
  const Plan plan = make_plan(p);
  std::int64_t number = 0;
  for (const Sequence& s : sequences(p)) {
    if (s.tail && !s.q_len && !s.k_len) continue;
    const Problem one = plan.problem_of(p, number++);
    EXPECT_EQ(one.q_len, s.q_len);
    EXPECT_EQ(one.k_len, s.k_len);
    const auto moved = [](const auto& all, const auto& x, std::int64_t size) {
      return (static_cast<const char*>(x.data) - static_cast<const char*>(all.data)) / size;
    };
    const auto expect_at = [&](const auto& all, const auto& x, std::int64_t begin, std::int64_t size) {
      ASSERT_EQ(all.data == nullptr, x.data == nullptr);
      if (x.data) {
        ASSERT_EQ(moved(all, x, size), s.batch * all.batch + begin * all.row);
      }
    };
    for (const auto member : {&Problem::query, &Problem::grad_out})
      expect_at(p.*member, one.*member, s.q_begin, sizeof(T));
    for (const auto member : {&Problem::key, &Problem::value}) expect_at(p.*member, one.*member, s.k_begin, sizeof(T));
    for (const auto member : {&Problem::out, &Problem::grad_query})
      expect_at(p.*member, one.*member, s.q_begin, sizeof(T));
    for (const auto member : {&Problem::grad_key, &Problem::grad_value})
      expect_at(p.*member, one.*member, s.k_begin, sizeof(T));
    for (const auto member : {&Problem::lse, &Problem::lse_low, &Problem::group_out, &Problem::grad_gate})
      expect_at(p.*member, one.*member, s.q_begin, sizeof(A));
    for (const auto member : {&Problem::gate, &Problem::grad_lse})
      expect_at(p.*member, one.*member, s.q_begin, sizeof(A));
    expect_at(p.bias, one.bias, s.q_begin, element_size(choices.bias_dtype));
    expect_at(p.grad_bias, one.grad_bias, s.q_begin, sizeof(A));
    if (p.attn_mask.data) {
      EXPECT_EQ(one.attn_mask.data - p.attn_mask.data, s.batch * p.attn_mask.batch);
    }
  }
}

TEST(Plan, ProblemOfASequenceIsAtItsRows) {
  for (std::uint64_t seed = 0; seed < 40; ++seed) {
    Random random(seed);
    Choices c;
    c.batch = random.integer(1, 3), c.kv_heads = 2, c.q_len = c.k_len = 6, c.head_dim = 3, c.value_dim = 2;
    c.lse_low = random.chance(0.5), c.grad_lse = random.chance(0.5);
    for (Layout* layout : {&c.query_layout, &c.key_layout, &c.value_layout, &c.out_layout, &c.grad_layout})
      *layout = any_layout(random);
    if (random.chance(0.5)) choose_packed(c, random, 9, true);
    else if (random.chance(0.5)) choose_bias(c, random), c.grad_bias = true, c.attend = 0.5;
    if (!c.bias) c.mmca = true, c.merge = any_merge(random), c.grad_gate = true;
    expect_problem_of_sequence<float>(c);
    expect_problem_of_sequence<double>(c);
    expect_problem_of_sequence<BFloat16>(c);
  }
}

TEST(Plan, SequencesAreSharedWhereNothingDiffers) {
  Choices c;
  c.batch = 5, c.q_len = 3, c.k_len = 7, c.causal = true;
  EXPECT_EQ(make_plan(Case<float>(c).problem).sequences.size(), 1u);
  c.pad = 0.5;
  EXPECT_EQ(make_plan(Case<float>(c).problem).sequences.size(), 5u);
}

// Neighbouring rows see nearly the same keys: text, then images, then padding.
TEST(Plan, MmcaRowsOfAKindAreTogether) {
  Choices c;
  c.mmca = true, c.q_len = c.k_len = 200;
  const Case<float> x(c);
  const Plan plan = make_plan(x.problem);
  const Sequence s = sequences(x.problem)[0];
  const auto kind = [&](std::int32_t row) { return (group_of(x.problem, s, row) + 3) % 3; };  // padding last
  for (std::size_t i = 1; i < plan.of(0).rows.size(); ++i)
    EXPECT_LE(kind(plan.of(0).rows[i - 1]), kind(plan.of(0).rows[i]));
}

}  // namespace
}  // namespace mmca::test
