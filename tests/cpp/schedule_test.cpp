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
  if (random.chance(0.3)) choose_packed(c, random, 900, false);
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
      const Plan plan = make_plan(p);
      const auto items = cpu::forward_items(p, plan, concurrency, row_block, most);
      std::set<std::tuple<std::int64_t, std::int64_t, std::int64_t>> rows;
      for (const cpu::ForwardItem& item : items) {
        ASSERT_EQ(item.begin % row_block, 0);
        ASSERT_TRUE(item.begin < item.end && item.end - item.begin <= most);
        for (std::int64_t row = item.begin; row < item.end; ++row)
          ASSERT_TRUE(rows.insert({item.batch, item.kv_head, row}).second);
        ASSERT_TRUE(item.batch >= 0 && item.batch < plan.batch && item.kv_head >= 0 && item.kv_head < p.kv_heads &&
                    item.begin >= 0);
        ASSERT_LE(item.end, plan.of(item.batch).q_len * p.heads_per_kv());
      }
      const std::int64_t batch = p.q_offsets ? 1 : p.batch;
      ASSERT_EQ(static_cast<std::int64_t>(rows.size()), batch * p.kv_heads * p.q_len * p.heads_per_kv());
      expect_heaviest_first(items);
    }
}

// Stretches of a wave's memory, each with one owner, without gaps.
class Stretches {
 public:
  void add(std::int64_t begin, std::int64_t size) {
    const bool free = size == 0 || size_.insert({begin, size}).second;
    ASSERT_TRUE(free) << "two stretches start at " << begin;
  }
  void expect_to_fill(std::int64_t total) const {
    std::int64_t at = 0;
    for (const auto& [begin, size] : size_) {
      ASSERT_EQ(begin, at);
      at += size;
    }
    ASSERT_EQ(at, total);
  }

 private:
  std::map<std::int64_t, std::int64_t> size_;
};

cpu::BackwardTiles random_tiles(Random& random) {
  const int strip_rows = random.pick({6, 12});
  return {random.pick({32, 384}), 96, strip_rows, random.pick({64, 100000, 100000000})};
}

// Every key of every head in one item, every head in one wave, and a partial for each item of more than a small head.
TEST(Schedule, BackwardWavesHoldEveryKeyOnce) {
  for (std::uint64_t seed = 0; seed < 90; ++seed) {
    Random random(seed);
    const Case<float> c(random_problem(random));
    const Problem& p = c.problem;
    const Plan plan = make_plan(p);
    const cpu::BackwardTiles tiles = random_tiles(random);
    std::set<std::tuple<std::int64_t, std::int64_t, int, std::int32_t>> keys;
    std::set<std::tuple<std::int64_t, std::int64_t>> heads;
    for (const cpu::BackwardWave& wave : cpu::backward_waves(p, plan, tiles)) {
      expect_heaviest_first(wave.items);
      Stretches rows, blocks;
      for (const cpu::BackwardHead& head : wave.heads) {
        ASSERT_TRUE(heads.insert({head.batch, head.kv_head}).second) << "head twice";
        const SequencePlan& sequence = plan.of(head.batch);
        const std::int64_t entries = cpu::is_small(p, sequence) ? 0 : sequence.q_len * p.heads_per_kv();
        ASSERT_EQ(head.partial_rows % tiles.strip_rows, 0);
        ASSERT_TRUE(head.partial_rows >= entries && head.partial_rows < entries + tiles.strip_rows);
        ASSERT_GE(head.partial_blocks * tiles.row_block, entries);
        for (int part = 0; part < head.parts; ++part) {
          rows.add(head.first_row + part * head.partial_rows, head.partial_rows);
          blocks.add(head.first_block + part * head.partial_blocks, head.partial_blocks);
        }
      }
      rows.expect_to_fill(wave.rows), blocks.expect_to_fill(wave.blocks);
      std::map<std::int64_t, std::set<int>> parts_of_head;
      for (const cpu::BackwardItem& item : wave.items) {
        const cpu::BackwardHead& head = wave.heads.at(static_cast<std::size_t>(item.head));
        ASSERT_TRUE(parts_of_head[item.head].insert(item.part).second) << "part " << item.part << " has two owners";
        ASSERT_TRUE(item.part >= 0 && item.part < head.parts);
        ASSERT_EQ(item.begin % tiles.key_range, 0);
        ASSERT_TRUE(item.begin < item.end || (head.parts == 1 && item.end == 0));
        ASSERT_LE(item.end, plan.of(head.batch).keys[item.group].size);
        for (std::int32_t key = item.begin; key < item.end; ++key)
          ASSERT_TRUE(keys.insert({head.batch, head.kv_head, item.group, key}).second);
      }
      for (std::size_t h = 0; h < wave.heads.size(); ++h) {
        ASSERT_EQ(static_cast<int>(parts_of_head[static_cast<std::int64_t>(h)].size()), wave.heads[h].parts);
        ASSERT_EQ(wave.unfinished[h].load(), wave.heads[h].parts);
      }
    }
    std::int64_t expected = 0;
    for (std::int64_t b = 0; b < plan.batch; ++b)
      for (int g = 0; g < p.groups(); ++g) expected += p.kv_heads * plan.of(b).keys[g].size;
    ASSERT_EQ(static_cast<std::int64_t>(keys.size()), expected);
    ASSERT_EQ(static_cast<std::int64_t>(heads.size()), plan.batch * p.kv_heads);
  }
}

// Of the heads of a wave no two add to the same element of a bias gradient, and those that share elements come in the
// same order however much memory there is: with it changed the order of their sums.
TEST(Schedule, HeadsOfAWaveShareNoBiasGradient) {
  for (std::uint64_t seed = 0; seed < 60; ++seed) {
    Random random(seed);
    Choices choices;
    choices.batch = random.integer(1, 4), choices.kv_heads = random.integer(1, 4);
    choices.heads_per_kv = random.integer(1, 3), choices.q_len = random.integer(1, 40);
    choices.k_len = random.integer(1, 900), choices.bias = choices.grad_bias = true;
    for (bool& same : choices.bias_same) same = random.chance(0.5);
    if (random.chance(0.3)) choices.pad = 0.3;
    const Case<float> c(choices);
    const Problem& p = c.problem;
    const Plan plan = make_plan(p);
    std::map<std::int64_t, std::vector<std::tuple<std::int64_t, std::int64_t>>> first_order;
    for (const std::int64_t row_bytes : {64, 100000, 100000000}) {
      std::map<std::int64_t, std::vector<std::tuple<std::int64_t, std::int64_t>>> order;  // of each element's heads
      std::set<std::tuple<std::int64_t, std::int64_t>> heads;
      std::size_t waves = 0;
      for (const cpu::BackwardWave& wave : cpu::backward_waves(p, plan, {384, 96, 6, row_bytes})) {
        ++waves;
        std::set<std::int64_t> elements;  // the first that each head adds to stands for all of its
        for (const cpu::BackwardHead& head : wave.heads) {
          const std::int64_t first =
              head.batch * p.grad_bias.batch + head.kv_head * p.heads_per_kv() * p.grad_bias.head;
          ASSERT_TRUE(elements.insert(first).second) << choices.text();
          ASSERT_TRUE(heads.insert({head.batch, head.kv_head}).second);
          order[first].push_back({head.batch, head.kv_head});
        }
      }
      ASSERT_EQ(static_cast<std::int64_t>(heads.size()), p.batch * p.kv_heads);
      if (first_order.empty()) {
        first_order = order;
        // No more waves than sharing asks for.
        const auto shared =
            static_cast<std::size_t>((p.grad_bias.batch ? 1 : p.batch) * (p.grad_bias.head ? 1 : p.kv_heads));
        ASSERT_EQ(waves, shared) << choices.text();
      }
      ASSERT_EQ(order, first_order) << choices.text();
    }
  }
}

// What a wave's partials take, as the kernel allocates them, for many tiny and for few large heads, and for sequences
// of many lengths. One head alone may be larger than the limit.
void expect_waves_fit(const Problem& p, const std::string& what) {
  constexpr std::int64_t limit = std::int64_t{256} << 20;
  for (const Probe<float>& probe : probes<float>()) {
    const cpu::BackwardTiles tiles = probe.backward_tiles(p);
    EXPECT_EQ(tiles.partial_row_bytes % (8 * probe.width), 0);  // whole panels of floats
    for (const cpu::BackwardWave& wave : cpu::backward_waves(p, make_plan(p), tiles))
      EXPECT_TRUE(wave.heads.size() == 1 || wave.rows * tiles.partial_row_bytes <= limit)
          << wave.rows << " rows take " << wave.rows * tiles.partial_row_bytes / (1 << 20) << " MiB: " << what;
  }
}

TEST(Schedule, WavesFitInMemory) {
  const std::int64_t shapes[][4] = {
      {4096, 16, 1, 64}, {1, 4096, 1, 64}, {64, 8, 90, 100}, {2, 4, 4096, 8192}, {1, 2, 20000, 5000}};
  for (const auto& [batch, heads, q_len, k_len] : shapes) {
    Problem p;
    p.batch = batch, p.q_heads = p.kv_heads = heads, p.q_len = q_len, p.k_len = k_len, p.head_dim = p.value_dim = 64;
    expect_waves_fit(p, "batch " + std::to_string(batch) + ", heads " + std::to_string(heads) + ", " +
                            std::to_string(q_len) + " rows, " + std::to_string(k_len) + " keys");
  }
}

TEST(Schedule, PackedWavesFitInMemory) {
  Random random(1);
  for (int round = 0; round < 5; ++round) {
    std::vector<std::int64_t> offsets{0};
    for (int b = 0; b < 50; ++b) offsets.push_back(offsets.back() + random.integer(0, random.pick({10, 300, 9000})));
    Problem p;
    p.batch = 50, p.q_heads = 8, p.kv_heads = 4, p.q_len = p.k_len = offsets.back() + 5, p.head_dim = p.value_dim = 60;
    p.q_offsets = p.k_offsets = offsets.data();
    expect_waves_fit(p, "packed, round " + std::to_string(round));
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
  EXPECT_EQ(measure.used(), 64u + 128u + 2 * cpu::arena_gap);
  cpu::Arena arena(cpu::worker_scratch(measure.used()));
  double* first = arena.take<double>(3);
  char* second = arena.take<char>(65);
  EXPECT_EQ(reinterpret_cast<char*>(first) + 64 + cpu::arena_gap, second);
}

}  // namespace
}  // namespace mmca::test
