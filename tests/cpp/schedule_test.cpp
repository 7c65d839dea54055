// Work items: every row and key once, heaviest first, partials within memory; and executors that run every item once.
#include <gtest/gtest.h>

#include <atomic>
#include <cstring>
#include <map>
#include <set>
#include <tuple>

#include "case.h"
#include "core/kernel_table.h"
#include "cpu/schedule.h"
#include "executors.h"
#include "probe.h"

namespace mmca::test {
namespace {

Choices random_problem(Random& random) {
  Choices c;
  c.seed = random.bits();
  c.batch = random.integer(0, 3), c.kv_heads = random.integer(1, 3), c.heads_per_kv = random.integer(1, 4);
  c.q_len = random.integer(0, 300), c.k_len = random.integer(0, random.pick({10, 900, 9000}));
  c.mmca = random.chance(0.4);
  c.image_rows = ImageRows::causal;
  c.causal = random.chance(0.5);
  if (random.chance(0.3)) c.pad = 0.5;
  return c;
}

template <class Item>
void expect_heaviest_first(const std::vector<Item>& items) {
  for (std::size_t i = 1; i < items.size(); ++i) ASSERT_GE(items[i - 1].cost, items[i].cost);
}

TEST(Schedule, ForwardItemsHoldEveryRowOnce) {
  for (std::uint64_t seed = 0; seed < 60; ++seed)
    for (const int concurrency : {1, 2, 7, 64}) {
      Random random(seed);
      const Case<float> c(random_problem(random));
      const Problem& p = c.problem;
      const int row_block = random.pick({6, 96}), most = row_block * random.integer(1, 8);
      const auto items = cpu::forward_items(p, make_plan(p), concurrency, row_block, most);
      std::set<std::tuple<std::int64_t, std::int64_t, std::int64_t>> rows;
      for (const cpu::ForwardItem& item : items) {
        ASSERT_EQ(item.begin % row_block, 0);
        ASSERT_TRUE(item.begin < item.end && item.end - item.begin <= most);
        for (std::int64_t row = item.begin; row < item.end; ++row)
          ASSERT_TRUE(rows.insert({item.batch, item.kv_head, row}).second);
        ASSERT_TRUE(item.batch >= 0 && item.batch < p.batch && item.kv_head >= 0 && item.kv_head < p.kv_heads &&
                    item.begin >= 0);
        ASSERT_LE(item.end, p.q_len * p.heads_per_kv());
      }
      ASSERT_EQ(static_cast<std::int64_t>(rows.size()), p.batch * p.kv_heads * p.q_len * p.heads_per_kv());
      expect_heaviest_first(items);
    }
}

TEST(Schedule, BackwardWavesHoldEveryKeyOnce) {
  for (std::uint64_t seed = 0; seed < 60; ++seed) {
    Random random(seed);
    const Case<float> c(random_problem(random));
    const Problem& p = c.problem;
    const Plan plan = make_plan(p);
    const int key_range = random.pick({32, 384});
    const std::int64_t partial_bytes = random.pick({64, 100000, 100000000});
    std::set<std::tuple<std::int64_t, std::int64_t, int, std::int32_t>> keys;
    std::int64_t heads = 0;
    for (const cpu::BackwardWave& wave : cpu::backward_waves(p, plan, key_range, partial_bytes)) {
      expect_heaviest_first(wave.items);
      heads += static_cast<std::int64_t>(wave.heads.size());
      std::set<std::int64_t> slots;
      std::map<std::int64_t, std::int64_t> items_of_head;
      for (const cpu::BackwardItem& item : wave.items) {
        const cpu::BackwardHead& head = wave.heads.at(static_cast<std::size_t>(item.head));
        ASSERT_TRUE(slots.insert(item.slot).second) << "slot " << item.slot << " has two owners";
        ASSERT_TRUE(item.slot >= head.first_slot && item.slot < head.first_slot + head.slots);
        ++items_of_head[item.head];
        ASSERT_EQ(item.begin % key_range, 0);
        ASSERT_TRUE(item.begin < item.end || (head.slots == 1 && item.end == 0));
        ASSERT_LE(item.end, plan.of(head.batch).keys[item.group].size);
        for (std::int32_t key = item.begin; key < item.end; ++key)
          ASSERT_TRUE(keys.insert({head.batch, head.kv_head, item.group, key}).second);
      }
      ASSERT_EQ(static_cast<std::int64_t>(slots.size()), wave.heads.back().first_slot + wave.heads.back().slots);
      for (std::size_t h = 0; h < wave.heads.size(); ++h) {
        ASSERT_EQ(items_of_head[static_cast<std::int64_t>(h)], wave.heads[h].slots);
        ASSERT_EQ(wave.unfinished[h].load(), wave.heads[h].slots);
      }
    }
    std::int64_t expected = 0;
    for (std::int64_t b = 0; b < p.batch; ++b)
      for (int g = 0; g < p.groups(); ++g) expected += p.kv_heads * plan.of(b).keys[g].size;
    ASSERT_EQ(static_cast<std::int64_t>(keys.size()), expected);
    ASSERT_EQ(heads, p.batch * p.kv_heads);
  }
}

// What a wave's partials take, as the kernel allocates them, for many tiny and for few large heads. One head alone may
// be larger than the limit.
TEST(Schedule, WavesFitInMemory) {
  constexpr std::int64_t limit = std::int64_t{256} << 20, key_range = 384;
  const std::int64_t shapes[][4] = {
      {4096, 16, 1, 64}, {1, 4096, 1, 64}, {64, 8, 90, 100}, {2, 4, 4096, 8192}, {1, 2, 20000, 5000}};
  for (const auto& [batch, heads, q_len, k_len] : shapes) {
    Problem p;
    p.batch = batch, p.q_heads = p.kv_heads = heads, p.q_len = q_len, p.k_len = k_len, p.head_dim = p.value_dim = 64;
    const Probe<float> probe = probes<float>()[0];
    const std::int64_t partial_bytes = probe.backward_partial_bytes(p, 1);
    for (const cpu::BackwardWave& wave : cpu::backward_waves(p, make_plan(p), key_range, partial_bytes)) {
      const std::int64_t slots = wave.heads.back().first_slot + wave.heads.back().slots;
      EXPECT_TRUE(slots == wave.heads[0].slots || probe.backward_partial_bytes(p, slots) <= limit)
          << slots << " slots take " << probe.backward_partial_bytes(p, slots) / (1 << 20) << " MiB: batch " << batch
          << ", heads " << heads << ", " << q_len << " rows, " << k_len << " keys";
    }
  }
}

TEST(Schedule, CostCountsVisiblePairs) {
  Choices choices;
  choices.q_len = choices.k_len = 192, choices.causal = true;
  const Case<float> c(choices);
  const auto items = cpu::forward_items(c.problem, make_plan(c.problem), 1000, 96, 96);
  ASSERT_EQ(items.size(), 2u);
  EXPECT_EQ(items[0].begin, 96);
  EXPECT_NEAR(items[0].cost, 96 * 97 / 2 + 96 * 96, 1);  // of rows 96..191; and 1 for the item itself
  EXPECT_NEAR(items[1].cost, 96 * 97 / 2, 1);
}

TEST(Executors, EveryItemOnceInAnyExecutor) {
  SerialExecutor serial;
  ThreadExecutor one(1), two(2), seven(7);
  ShuffledExecutor shuffled(5, 1);
  Executor* const executors[] = {&serial, &one, &two, &seven, &shuffled};
  for (Executor* executor : executors)
    for (const int count : {0, 1, 2, 6, 1000}) {
      for (const double work : {0.0, 1e5, 1e12}) {
        std::vector<std::atomic<int>> taken(static_cast<std::size_t>(count));
        for_each_item(*executor, count, work, [&](std::int64_t item) { ++taken[static_cast<std::size_t>(item)]; });
        for (const auto& times : taken) ASSERT_EQ(times.load(), 1);
      }
    }
}

TEST(Executors, LittleWorkWakesNobody) {
  struct Refusing final : Executor {
    int concurrency() const override { return 8; }
    void run(int, void (*)(void*, int), void*) override { ADD_FAILURE() << "a worker was woken"; }
  } refusing;
  int done = 0;
  for_each_item(refusing, 100, worth_a_worker, [&](std::int64_t item) { EXPECT_EQ(item, done++); });  // in order, too
  EXPECT_EQ(done, 100);
}

TEST(Executors, SerialRunsWorkersInOrder) {
  std::vector<int> order;
  SerialExecutor serial;
  serial.run(4, [](void* context, int worker) { static_cast<std::vector<int>*>(context)->push_back(worker); }, &order);
  EXPECT_EQ(order, (std::vector<int>{0, 1, 2, 3}));
}

TEST(Scratch, IsAlignedAndKept) {
  for (const std::size_t bytes :
       {std::size_t{1}, std::size_t{4096}, std::size_t{100000}, std::size_t{80} << 20, std::size_t{10}}) {
    void *worker = cpu::worker_scratch(bytes), *call = cpu::call_scratch(bytes);
    EXPECT_EQ(reinterpret_cast<std::uintptr_t>(worker) % 64, 0u);
    EXPECT_EQ(reinterpret_cast<std::uintptr_t>(call) % 64, 0u);
    EXPECT_NE(worker, call);
    std::memset(worker, 1, bytes), std::memset(call, 2, bytes);
    EXPECT_EQ(cpu::worker_scratch(bytes), worker);
    EXPECT_EQ(static_cast<unsigned char*>(worker)[bytes - 1], 1);
  }
}

TEST(Scratch, ArenaCutsAlignedArraysThatDoNotOverlap) {
  cpu::Arena measure(nullptr);
  EXPECT_EQ(measure.take<double>(3), nullptr);
  measure.take<char>(65);
  EXPECT_EQ(measure.used(), 64u + 128u);
  cpu::Arena arena(cpu::worker_scratch(measure.used()));
  double* first = arena.take<double>(3);
  char* second = arena.take<char>(65);
  EXPECT_EQ(reinterpret_cast<char*>(first) + 64, second);
}

}  // namespace
}  // namespace mmca::test
