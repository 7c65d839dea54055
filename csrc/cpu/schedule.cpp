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

// The items of any head of one sequence; whose head is yet to be said.
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
      items.push_back({0, g, begin, end, static_cast<int>(items.size()), cost});
    }
  }
  if (items.empty()) items.push_back({0, 0, 0, 0, 0, 1});  // no key at all: zeros are written all the same
  return items;
}

}  // namespace

std::vector<ForwardItem> forward_items(const Problem& problem, const Plan& plan, int concurrency, int row_block,
                                       int max_rows) {
  const std::int64_t heads = problem.heads_per_kv();
  std::int64_t all_blocks = 0;
  for (std::int64_t b = 0; b < plan.batch; ++b)
    all_blocks += divide_up(plan.of(b).q_len * heads, row_block) * problem.kv_heads;
  const std::int64_t items_wanted = concurrency == 1 ? 1 : 8 * concurrency;
  const std::int64_t chunk_blocks = std::clamp<std::int64_t>(all_blocks / items_wanted, 1, max_rows / row_block);
  const std::int64_t chunk = chunk_blocks * row_block;

  std::vector<ForwardItem> items;
  items.reserve(static_cast<std::size_t>(all_blocks / chunk_blocks + plan.batch * problem.kv_heads));
  for (std::int64_t b = 0; b < plan.batch; ++b) {
    const SequencePlan& sequence = plan.of(b);
    const std::int64_t rows = sequence.q_len * heads;
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

std::vector<BackwardWave> backward_waves(const Problem& problem, const Plan& plan, const BackwardTiles& tiles) {
  // Broadcast dimensions of a bias: what shares its gradient goes one after the other, in a fixed order.
  const bool bias = problem.grad_bias.data != nullptr;
  const bool share_batch = bias && problem.grad_bias.batch == 0, share_heads = bias && problem.grad_bias.head == 0;
  const std::int64_t outer_heads = share_heads ? problem.kv_heads : 1, inner_heads = problem.kv_heads / outer_heads;

  std::vector<BackwardWave> waves;
  const auto add = [&](std::int64_t b, std::int64_t h, bool alone) {
    const SequencePlan& sequence = plan.of(b);
    const std::int64_t rows =
        is_small(problem, sequence)
            ? 0
            : divide_up(sequence.q_len * problem.heads_per_kv(), tiles.strip_rows) * tiles.strip_rows;
    const std::int64_t rows_limit = std::max(partial_bytes_limit / tiles.partial_row_bytes, rows);
    const std::int64_t parts_limit = rows ? std::min(rows_limit / rows, max_parts) : max_parts;
    const std::vector<BackwardItem> items = items_of_head(problem, sequence, tiles.key_range, parts_limit);
    const auto parts = static_cast<int>(items.size());
    if (alone || waves.back().rows + parts * rows > rows_limit) waves.emplace_back();
    BackwardWave& wave = waves.back();
    for (BackwardItem item : items) {
      item.head = static_cast<std::int64_t>(wave.heads.size());
      wave.items.push_back(item);
    }
    const std::int64_t blocks = divide_up(rows, tiles.row_block);
    wave.heads.push_back({b, h, parts, wave.rows, rows, wave.blocks, blocks});
    wave.rows += parts * rows, wave.blocks += parts * blocks;
  };
  for (std::int64_t outer = 0; outer < outer_heads; ++outer)
    for (std::int64_t b = 0; b < plan.batch; ++b)
      for (std::int64_t inner = 0; inner < inner_heads; ++inner)
        add(b, outer * inner_heads + inner, waves.empty() || (inner == 0 && (b == 0 || share_batch)));

  for (BackwardWave& wave : waves) {
    wave.unfinished = std::make_unique<std::atomic<std::int64_t>[]>(wave.heads.size());
    for (std::size_t i = 0; i < wave.heads.size(); ++i) wave.unfinished[i].store(wave.heads[i].parts);
    heaviest_first(wave.items);
  }
  return waves;
}

}  // namespace mmca::cpu
