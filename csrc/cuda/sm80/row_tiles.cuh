// For the backward: the tiles of query rows that a block of keys has to meet, and what each row brings along.
#pragma once

#include "cuda/row_results.cuh"
#include "cuda/sm80/tile.cuh"

namespace mmca::cuda::sm80 {

struct RowTile {
  std::int32_t head;   // query head
  std::int32_t first;  // entry
};

// Walks the tiles of Rows entries of the query heads of one KV head, head after head, and stops at those whose rows may
// see a key of `keys`. Whole warps call it, every lane with the same result: lane l looks at tile l of 32 at once.
template <int Rows>
class RowTiles {
 public:
  // Part `part` of `parts`: all tiles cut into parts of one size.
  PRIM RowTiles(const Problem& problem, const Sequence& sequence, std::int64_t kv_head, std::int32_t part,
                std::int32_t parts) {
    const std::int32_t tiles = tiles_of(sequence);
    const std::int64_t all = problem.heads_per_kv() * tiles, begin = all * part / parts;
    left_ = static_cast<std::int32_t>(all * (part + 1) / parts - begin);  // 2^31 tiles of rows fit no memory
    if (left_ == 0) return;
    head_ = static_cast<std::int32_t>(kv_head * problem.heads_per_kv() + begin / tiles);
    tile_ = static_cast<std::int32_t>(begin % tiles);
  }

  // `keys`: entries of the group's list.
  PRIM bool next(RowTile& tile, const Problem& problem, const DevicePlan& plan, const Sequence& sequence, int group,
                 Interval keys) {
    const std::int32_t tiles = tiles_of(sequence);
    while (left_ > 0) {
      if (tile_ == tiles) tile_ = 0, ++head_;
      if (tile_ / warp_size != window_) {
        window_ = tile_ / warp_size;
        look(problem, plan, sequence, group, keys);
      }
      const std::uint32_t rest = met_ >> tile_ % warp_size;
      tile = {head_, tile_ * Rows};
      const std::int32_t end = (window_ + 1) * warp_size < tiles ? (window_ + 1) * warp_size : tiles;
      const std::int32_t step = rest ? 1 : end - tile_;
      tile_ += step, left_ -= step;
      if (rest & 1u) return true;
    }
    return false;
  }

 private:
  PRIM static std::int32_t tiles_of(const Sequence& sequence) { return (sequence.q_len + Rows - 1) / Rows; }

  PRIM void look(const Problem& problem, const DevicePlan& plan, const Sequence& sequence, int group, Interval keys) {
    const int lane = lane_of_thread();
    const std::int32_t first = (window_ * warp_size + lane) * Rows;
    Interval seen{0, 0};
    if (first < sequence.q_len) {
      const std::int32_t begin = first / plan_tile * plan_tile;  // a hull is that of plan_tile entries
      const std::int32_t left = sequence.q_len - begin, size = Rows < plan_tile ? plan_tile : Rows;
      seen = entries_hull(problem, plan, sequence, begin, left < size ? left : size, group);
    }
    const bool meets =
        (seen.begin > keys.begin ? seen.begin : keys.begin) < (seen.end < keys.end ? seen.end : keys.end);
    met_ = meets ? 1u << lane : 0u;
    for (int step = 1; step < warp_size; step *= 2) met_ |= prim::shfl_xor(met_, step);
  }

  std::int32_t head_ = 0, tile_ = 0, left_, window_ = -1;
  std::uint32_t met_ = 0;  // bit l: tile l of the window of 32
};

// The entries of the group's list that some row of the sequence may see; whole warps call it.
PRIM Interval seen_by_any(const Problem& problem, const DevicePlan& plan, const Sequence& sequence, int group) {
  if (!plan.ranges) return entries_hull(problem, plan, sequence, 0, sequence.q_len, group);
  Interval all{0, 0};
  for (std::int32_t first = lane_of_thread() * plan_tile; first < sequence.q_len; first += warp_size * plan_tile)
    all = hull(all, entries_hull(problem, plan, sequence, first, plan_tile, group));
  for (int step = 1; step < warp_size; step *= 2)
    all = hull(all, {prim::shfl_xor(all.begin, step), prim::shfl_xor(all.end, step)});
  return all;
}

// A row as the tile that is loaded needs it: a row that sees nothing of the group (or none at all) is -1, and nothing
// of it is read.
struct RowSight {
  std::int32_t row = -1;
  Interval seen{0, 0};
};
PRIM RowSight row_sight(const Problem& problem, const DevicePlan& plan, const Sequence& sequence, int group,
                        std::int32_t entry) {
  RowSight sight;
  if (entry >= sequence.q_len) return sight;
  sight.row = row_of(plan, sequence, entry);
  sight.seen = entry_range(problem, plan, sequence, entry, group);
  if (sight.seen.begin >= sight.seen.end) sight = RowSight();
  return sight;
}

// Facts of a tile's rows in shared memory, and which keys of the tile they see, counted from its first.
template <int Rows>
struct RowTable {
  smem_t base;

  static constexpr int bytes = Rows * static_cast<int>(sizeof(RowFacts<float>) + sizeof(std::uint32_t));

  PRIM RowFacts<float> facts(int row) const { return prim::ld_shared<RowFacts<float>>(facts_address(row)); }
  PRIM Interval seen(int row) const {
    const auto packed = prim::ld_shared<std::uint32_t>(seen_address(row));
    return {static_cast<std::int32_t>(packed & 0xffffu), static_cast<std::int32_t>(packed >> 16)};
  }
  // Begins to fill in row `row`; `head`: the facts of its head's row 0.
  PRIM void begin_row(int row, const RowSight& sight, std::int32_t first_key, int keys,
                      const RowFacts<float>* head) const {
    prim::cp_async<16>(facts_address(row), head + (sight.row < 0 ? 0 : sight.row), sight.row >= 0);
    const auto inside = [&](std::int32_t c) {
      return static_cast<std::uint32_t>(c < first_key ? 0 : c - first_key > keys ? keys : c - first_key);
    };
    prim::st_shared(seen_address(row), inside(sight.seen.begin) | inside(sight.seen.end) << 16);
  }

 private:
  PRIM smem_t facts_address(int row) const { return base + static_cast<smem_t>(row * sizeof(RowFacts<float>)); }
  PRIM smem_t seen_address(int row) const {
    return base + static_cast<smem_t>(Rows * sizeof(RowFacts<float>) + row * sizeof(std::uint32_t));
  }
};

}  // namespace mmca::cuda::sm80
