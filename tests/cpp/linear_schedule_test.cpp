// How sweeps are cut: who reads what when, and that split heads are done whole, each part once and in a right order.
#include <gtest/gtest.h>

#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>

#include "cpu/linear_schedule.h"
#include "executors.h"

namespace mmca::cpu {
namespace {

using test::ThreadExecutor;

// ---------------------------------------------------------------- the order of a sweep

// Every reader once, in order, in a chunk that completes what it sees.
void expect_sound(const SweepOrder& order, int chunk) {
  std::int64_t next = order.early_end();
  for (std::int64_t r = 0; r < order.early_end(); ++r)
    EXPECT_LE(r / order.readers_per_token + order.lead, 0) << r << " sees something";
  for (std::int64_t first = 0; first < order.writers; first += chunk) {
    const std::int64_t end = std::min(first + chunk, order.writers);
    const SweepOrder::Rows rows = order.readers_of(first, end);
    if (!rows.size()) continue;
    EXPECT_EQ(rows.begin, next);
    next = rows.end;
    order.each_seen(rows.begin, static_cast<int>(rows.size()), [&](int r, std::int64_t seen) {
      const std::int64_t token = (rows.begin + r) / order.readers_per_token;
      EXPECT_EQ(seen, std::min((token + order.lead), order.writer_tokens()) * order.writers_per_token);
      EXPECT_GT(seen, first);
      EXPECT_LE(seen, end);
    });
  }
  EXPECT_EQ(next, order.late_begin());
  for (std::int64_t r = order.late_begin(); r < order.readers; ++r)
    EXPECT_GE(r / order.readers_per_token + order.lead, order.writer_tokens()) << r << " does not see all";
}

SweepOrder order_of(std::int64_t writers, std::int64_t per_token, std::int64_t readers, std::int64_t readers_per_token,
                    std::int64_t lead) {
  SweepOrder order;
  order.writers = writers * per_token, order.writers_per_token = per_token;
  order.readers = readers * readers_per_token, order.readers_per_token = readers_per_token, order.lead = lead;
  return order;
}

TEST(SweepOrder, EveryReaderComesOnce) {
  for (const std::int64_t writers : {0, 1, 5, 48, 49, 200})
    for (const std::int64_t per_token : {1, 3, 48, 70})
      for (const std::int64_t readers : {0, 1, 5, 48, 49, 200})
        for (const std::int64_t readers_per_token : {1, 4})
          for (const std::int64_t lead : {1 + writers - readers, std::int64_t{1}, lead_of_all(writers)}) {
            SCOPED_TRACE(testing::Message() << writers << " x " << per_token << ", " << readers << " x "
                                            << readers_per_token << ", lead " << lead);
            expect_sound(order_of(writers, per_token, readers, readers_per_token, lead), 48);
          }
}

TEST(SweepOrder, WhoeverSeesAllIsLate) {
  const SweepOrder all = order_of(10, 1, 7, 2, lead_of_all(10));
  EXPECT_EQ(all.early_end(), 0);
  EXPECT_EQ(all.late_begin(), 0);
  const SweepOrder nothing = order_of(0, 1, 7, 2, 1 + 0 - 7);  // causal without keys
  EXPECT_EQ(nothing.early_end(), 14);
  EXPECT_EQ(nothing.late_begin(), 14);
}

// ---------------------------------------------------------------- splitting

class Recorder final : public SweepStage {
 public:
  std::vector<SweepOrder> orders;

  explicit Recorder(std::vector<SweepOrder> all) : orders(std::move(all)) {
    heads = static_cast<std::int64_t>(orders.size()), depth = values = 64, chunk = 48;
    memory_bytes = 64, slot_bytes = 128;
  }

  SweepOrder order(std::int64_t head) const override { return orders[static_cast<std::size_t>(head)]; }
  void whole(std::int64_t head) const override { note("whole", head, 0); }
  void begin(std::int64_t head, void* memory) const override {
    note("begin", head, 0);
    *static_cast<std::int64_t*>(memory) = head;
  }
  void sum(std::int64_t head, std::int64_t segment, void* slot) const override {
    note("sum", head, segment);
    static_cast<std::int64_t*>(slot)[0] = head * 1000 + segment, static_cast<std::int64_t*>(slot)[1] = 0;
  }
  void scan(void* memory, std::int64_t sums, std::int64_t count, void* slots) const override {
    const std::int64_t head = *static_cast<std::int64_t*>(memory);
    for (std::int64_t s = 0; s < count; ++s) {
      auto* slot =
          reinterpret_cast<std::int64_t*>(static_cast<char*>(slots) + s * static_cast<std::int64_t>(slot_bytes));
      std::int64_t segment;
      {
        const std::lock_guard<std::mutex> lock(mutex_);
        segment = scanned_[head]++;
      }
      EXPECT_TRUE(s >= sums || slot[0] == head * 1000 + segment) << "the sum of another";
      slot[0] = head * 1000 + segment, slot[1] = 1;
    }
  }
  void segment(std::int64_t head, std::int64_t segment, const void* slot) const override {
    note("segment", head, segment);
    EXPECT_EQ(static_cast<const std::int64_t*>(slot)[0], head * 1000 + segment) << "the start of another";
    EXPECT_EQ(static_cast<const std::int64_t*>(slot)[1], 1) << "before its scan";
  }
  void read(std::int64_t head, SweepOrder::Rows rows, const void* memory) const override {
    EXPECT_EQ(*static_cast<const std::int64_t*>(memory), head);
    for (std::int64_t r = rows.begin; r < rows.end; ++r) note("read", head, r);
  }
  void end(std::int64_t head, const void*) const override { note("end", head, 0); }

  std::int64_t count(const std::string& what, std::int64_t head) const {
    std::int64_t count = 0;
    for (const auto& [key, times] : times_)
      if (std::get<0>(key) == what && std::get<1>(key) == head) count += times;
    return count;
  }
  bool each_once() const {
    for (const auto& [key, times] : times_)
      if (times != 1) return false;
    return true;
  }

 private:
  void note(const char* what, std::int64_t head, std::int64_t part) const {
    const std::lock_guard<std::mutex> lock(mutex_);
    ++times_[{what, head, part}];
  }

  mutable std::mutex mutex_;
  mutable std::map<std::tuple<std::string, std::int64_t, std::int64_t>, int> times_;
  mutable std::map<std::int64_t, std::int64_t> scanned_;
};

constexpr std::int64_t segment_rows = 48 * segment_chunks;

TEST(Sweeps, OneThreadRunsHeadsWhole) {
  const Recorder stage({order_of(100000, 1, 100000, 1, 1)});
  ThreadExecutor one(1);
  run_sweep(stage, one);
  EXPECT_EQ(stage.count("whole", 0), 1);
  EXPECT_EQ(stage.count("sum", 0), 0);
}

TEST(Sweeps, ManyHeadsStayWhole) {
  const Recorder stage(std::vector<SweepOrder>(16, order_of(10000, 1, 10000, 1, 1)));
  ThreadExecutor four(4);
  run_sweep(stage, four);
  for (std::int64_t h = 0; h < 16; ++h) EXPECT_EQ(stage.count("whole", h), 1);
  EXPECT_TRUE(stage.each_once());
}

// A head alone, with readers that see nothing, some and all.
void expect_split(SweepOrder order, std::size_t slot_bytes, std::int64_t sums) {
  Recorder stage({order});
  stage.slot_bytes = slot_bytes;
  ThreadExecutor four(4);
  run_sweep(stage, four);
  const std::int64_t segments = (order.writers + segment_rows - 1) / segment_rows;
  EXPECT_EQ(stage.count("whole", 0), 0);
  EXPECT_EQ(stage.count("begin", 0), 1);
  EXPECT_EQ(stage.count("end", 0), 1);
  EXPECT_EQ(stage.count("sum", 0), sums);
  EXPECT_EQ(stage.count("segment", 0), segments);
  EXPECT_EQ(stage.count("read", 0), order.early_end() + order.readers - order.late_begin());
  EXPECT_TRUE(stage.each_once());
}

TEST(Sweeps, AHeadAloneIsSplit) {
  const std::int64_t length = 10 * segment_rows + 5;
  for (const std::size_t slot_bytes : {std::size_t{128}, std::size_t{10} << 20}) {  // all at once; three at a time
    expect_split(order_of(length, 1, length, 1, 1), slot_bytes, 10);                // whose last sum nobody needs
    expect_split(order_of(length, 1, length, 3, lead_of_all(length)), slot_bytes, 11);
    expect_split(order_of(length, 1, length + 1000, 1, -999), slot_bytes, 10);
    expect_split(order_of(length, 1, length + 1000, 1, 1), slot_bytes, 11);
  }
  SweepOrder kept = order_of(length, 1, length, 1, 1);
  kept.needs_end = true;
  expect_split(kept, 128, 11);
}

TEST(Sweeps, LongHeadsAreSplitAndShortOnesNot) {
  std::vector<SweepOrder> orders(8, order_of(100, 1, 100, 1, 1));
  orders[3] = orders[5] = order_of(30000, 1, 30000, 1, 1);
  const Recorder stage(orders);
  ThreadExecutor four(4);
  run_sweep(stage, four);
  for (std::int64_t h = 0; h < 8; ++h) EXPECT_EQ(stage.count("whole", h), h != 3 && h != 5) << h;
  EXPECT_EQ(stage.count("segment", 3), (30000 + segment_rows - 1) / segment_rows);
  EXPECT_TRUE(stage.each_once());
}

}  // namespace
}  // namespace mmca::cpu
