#include "cpu/schedule.h"

#include <algorithm>

namespace mmca::cpu {
namespace {

constexpr std::int64_t max_parts = 16;                                 // of one head's keys
constexpr std::int64_t partial_bytes_limit = std::int64_t{256} << 20;  // of all partials in flight

std::int64_t divide_up(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

template <class Item>
void heaviest_first(std::vector<Item>& items) {
  std::stable_sort(items.begin(), items.end(), [](const Item& a, const Item& b) { return a.cost > b.cost; });
}

// The items of any head of one sequence; whose head and which slot is yet to be said.
std::vector<BackwardItem> items_of_head(const Problem& problem, const SequencePlan& sequence, int key_range,
                                        std::int64_t parts_limit) {
  std::vector<BackwardItem> items;
  for (int g = 0; g < problem.groups(); ++g) {
    const std::int64_t keys = sequence.keys[g].size, ranges = divide_up(keys, key_range),
                       parts = std::min(ranges, parts_limit);
    for (std::int64_t part = 0; part < parts; ++part) {
      const auto begin = static_cast<std::int32_t>(ranges * part / parts * key_range);
      const auto end = static_cast<std::int32_t>(std::min(keys, ranges * (part + 1) / parts * key_range));
      double cost = 1;
      for (const Range& range : sequence.ranges[g])
        cost += static_cast<double>(std::max(0, std::min(range.end, end) - std::max(range.begin, begin)) *
                                    problem.heads_per_kv());
      items.push_back({0, g, begin, end, 0, cost});
    }
  }
  if (items.empty()) items.push_back({0, 0, 0, 0, 0, 1});  // no key at all: zeros are written all the same
  return items;
}

}  // namespace

std::vector<ForwardItem> forward_items(const Problem& problem, const Plan& plan, int concurrency, int row_block,
                                       int max_rows) {
  const std::int64_t heads = problem.heads_per_kv(), rows = problem.q_len * heads;
  const std::int64_t blocks = divide_up(rows, row_block), all_blocks = blocks * problem.batch * problem.kv_heads;
  const std::int64_t items_wanted = concurrency == 1 ? 1 : 8 * concurrency;
  const std::int64_t chunk_blocks = std::clamp<std::int64_t>(all_blocks / items_wanted, 1, max_rows / row_block);
  const std::int64_t chunk = chunk_blocks * row_block;

  std::vector<ForwardItem> items;
  items.reserve(static_cast<std::size_t>(divide_up(rows, chunk) * problem.batch * problem.kv_heads));
  for (std::int64_t b = 0; b < problem.batch; ++b) {
    const SequencePlan& sequence = plan.of(b);
    for (std::int64_t begin = 0; begin < rows; begin += chunk) {
      const std::int64_t end = std::min(begin + chunk, rows);
      double cost = 1;
      for (int g = 0; g < problem.groups(); ++g)
        for (std::int64_t index = begin / heads; index <= (end - 1) / heads; ++index)
          cost += static_cast<double>(sequence.ranges[g][static_cast<std::size_t>(index)].size() * heads);
      for (std::int64_t h = 0; h < problem.kv_heads; ++h) items.push_back({b, h, begin, end, cost});
    }
  }
  heaviest_first(items);
  return items;
}

std::vector<BackwardWave> backward_waves(const Problem& problem, const Plan& plan, int key_range,
                                         std::int64_t partial_bytes) {
  const std::int64_t slots_limit =
      std::max<std::int64_t>(partial_bytes_limit / std::max<std::int64_t>(partial_bytes, 1), 1);
  const std::int64_t parts_limit = std::min(slots_limit, max_parts);

  std::vector<BackwardWave> waves;
  std::int64_t slots = 0;
  for (std::int64_t b = 0; b < problem.batch; ++b) {
    const std::vector<BackwardItem> items = items_of_head(problem, plan.of(b), key_range, parts_limit);
    const auto count = static_cast<std::int64_t>(items.size());
    for (std::int64_t h = 0; h < problem.kv_heads; ++h) {
      if (waves.empty() || slots + count > slots_limit) {
        waves.emplace_back();
        slots = 0;
      }
      BackwardWave& wave = waves.back();
      for (std::int64_t i = 0; i < count; ++i) {
        BackwardItem item = items[static_cast<std::size_t>(i)];
        item.head = static_cast<std::int64_t>(wave.heads.size());
        item.slot = slots + i;
        wave.items.push_back(item);
      }
      wave.heads.push_back({b, h, slots, count});
      slots += count;
    }
  }
  for (BackwardWave& wave : waves) {
    wave.unfinished = std::make_unique<std::atomic<std::int64_t>[]>(wave.heads.size());
    for (std::size_t i = 0; i < wave.heads.size(); ++i) wave.unfinished[i].store(wave.heads[i].slots);
    heaviest_first(wave.items);
  }
  return waves;
}

}  // namespace mmca::cpu
