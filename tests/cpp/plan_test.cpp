// Plans against a predicate on each pair of row and key (reference.h), on random problems.
#include <gtest/gtest.h>

#include <algorithm>
#include <limits>
#include <set>

#include "core/plan.h"
#include "reference.h"

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
  for (std::int64_t b = 0; b < p.batch; ++b) {
    const SequencePlan& sequence = plan.of(b);
    std::set<std::int64_t> listed;
    for (int g = 0; g < p.groups(); ++g) {
      const KeyList& keys = sequence.keys[g];
      ASSERT_TRUE(keys.positions.empty() || static_cast<std::int32_t>(keys.positions.size()) == keys.size);
      std::int64_t before = -1;
      for (std::int32_t i = 0; i < keys.size; ++i) {
        const std::int64_t j = keys.position(i);
        ASSERT_GT(j, before);  // ascending
        ASSERT_LT(j, p.k_len);
        ASSERT_EQ(group_of(p, b, j), g);
        before = j;
        listed.insert(j);
      }
      ASSERT_EQ(static_cast<std::int64_t>(sequence.ranges[g].size()), p.q_len);
      for (const Range& range : sequence.ranges[g]) {
        ASSERT_EQ(range.size(), std::max(0, range.end - range.begin));
        ASSERT_TRUE(range.size() == 0 || (range.begin >= 0 && range.end <= keys.size));
      }
    }
    // Hidden keys are the rest, each once.
    const std::set<std::int64_t> hidden(sequence.hidden_keys.begin(), sequence.hidden_keys.end());
    ASSERT_EQ(hidden.size(), sequence.hidden_keys.size());
    ASSERT_EQ(static_cast<std::int64_t>(hidden.size() + listed.size()), p.k_len);
    for (std::int64_t j = 0; j < p.k_len; ++j) {
      const bool padding = p.is_mmca ? group_of(p, b, j) < 0 : p.key_mask && !p.key_mask[b * p.k_len + j];
      ASSERT_EQ(hidden.count(j) == 1, padding) << "key " << j;
      ASSERT_EQ(listed.count(j) == 0, padding) << "key " << j;
    }

    std::set<std::int64_t> rows;
    for (std::int64_t index = 0; index < p.q_len; ++index) {
      const std::int64_t i = sequence.row(index);
      ASSERT_TRUE(i >= 0 && i < p.q_len && rows.insert(i).second) << "row " << i << " twice or out of range";
      bool own = false;
      std::set<std::int64_t> expected[max_groups];
      for (std::int64_t j = 0; j < p.k_len; ++j)
        if (sees(p, b, 0, i, j)) {
          if (is_own_image(p, b, i, j)) own = true;
          else expected[group_of(p, b, j)].insert(j);
        }
      ASSERT_EQ(sequence.attends_to_itself(i), own) << "row " << i;
      for (int g = 0; g < p.groups(); ++g)
        ASSERT_EQ(planned(sequence, g, index), expected[g]) << "row " << i << ", group " << g;
    }
  }
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
  const auto kind = [&](std::int32_t row) { return (group_of(x.problem, 0, row) + 3) % 3; };  // padding last
  for (std::size_t i = 1; i < plan.of(0).rows.size(); ++i)
    EXPECT_LE(kind(plan.of(0).rows[i - 1]), kind(plan.of(0).rows[i]));
}

}  // namespace
}  // namespace mmca::test
