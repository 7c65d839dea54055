// How a call is cut into work items. Cuts never change a bit of the result: forward rows are independent of each other,
// and backward cuts follow the lists of visible keys alone.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "core/plan.h"

namespace mmca::cpu {

// Plain attention of a head so small that it has a kernel of its own (cpu/small.h). By the sequence alone, so that the
// bits of a result depend on nothing else. Where keys are many for few rows, most of its lanes would be idle for long.
inline constexpr int small_rows = 64, small_keys = 64;
inline bool is_small(const Problem& problem, const SequencePlan& sequence) {
  const std::int64_t rows = sequence.q_len * problem.heads_per_kv(), keys = sequence.keys[0].size;
  return !problem.is_mmca && !problem.attn_mask.data && !problem.shapes_scores() && !problem.dropout.threshold &&
         rows <= small_rows && keys > 0 && keys <= small_keys && keys <= 8 * rows;
}

// Rows begin..end-1 of the row list (cpu/rows.h) of one batch and KV head.
struct ForwardItem {
  std::int64_t batch, kv_head, begin, end;
  double cost;  // row-key pairs
};

// Heaviest first, a few per thread; chunks are multiples of `row_block` rows, at most `max_rows`.
std::vector<ForwardItem> forward_items(const Problem& problem, const Plan& plan, int concurrency, int row_block,
                                       int max_rows);

// Multiply-adds of all items together; `products`: matrix products of each width, 1 forward, 2.5 (rounded up) backward.
template <class Item>
double multiply_adds(const Problem& problem, const std::vector<Item>& items, int products) {
  double pairs = 0;
  for (const Item& item : items) pairs += item.cost;
  return pairs * products * static_cast<double>(problem.head_dim + problem.value_dim);
}

// Keys begin..end-1 of one group's list, all rows, of one batch and KV head: owns their dK and dV, and adds its share
// of dQ to a partial of its own. The last item of a head to finish sums the partials in the order of the parts.
struct BackwardItem {
  std::int64_t head;  // index into BackwardWave::heads
  int group;
  std::int32_t begin, end;
  int part;     // of the head's parts
  double cost;  // row-key pairs
};

struct BackwardHead {
  std::int64_t batch, kv_head;
  int parts;
  std::int64_t first_row, partial_rows;      // its partials, one after the other, in rows: whole strips
  std::int64_t first_block, partial_blocks;  // the same in blocks of rows
};

// Heads whose partials fit in memory together, and of which no two add to the same element of a bias gradient.
struct BackwardWave {
  std::vector<BackwardHead> heads;
  std::vector<BackwardItem> items;                          // heaviest first
  std::unique_ptr<std::atomic<std::int64_t>[]> unfinished;  // items of each head
  std::int64_t rows = 0, blocks = 0;                        // of all partials
};

// The sizes of a backward kernel that its schedule needs. Item boundaries are multiples of `key_range`.
struct BackwardTiles {
  int key_range, row_block, strip_rows;
  std::int64_t partial_row_bytes;
};

std::vector<BackwardWave> backward_waves(const Problem& problem, const Plan& plan, const BackwardTiles& tiles);

}  // namespace mmca::cpu
