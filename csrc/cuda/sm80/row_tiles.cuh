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
  PRIM RowTiles(const Problem& problem, const DevicePlan& plan, const Sequence& sequence, int group, Interval keys,
                std::int64_t kv_head, std::int32_t part, std::int32_t parts)
      : problem_(problem), plan_(plan), sequence_(sequence), group_(group), keys_(keys) {
    const std::int64_t all = problem.heads_per_kv() * tiles(), begin = all * part / parts;
    left_ = static_cast<std::int32_t>(all * (part + 1) / parts - begin);  // 2^31 tiles of rows fit no memory
    if (left_ == 0) return;
    head_ = static_cast<std::int32_t>(kv_head * problem.heads_per_kv() + begin / tiles());
    tile_ = static_cast<std::int32_t>(begin % tiles());
  }

  PRIM bool next(RowTile& tile) {
    while (left_ > 0) {
      if (tile_ == tiles()) tile_ = 0, ++head_;
      if (tile_ / warp_size != window_) look(tile_ / warp_size);
      const std::uint32_t rest = met_ >> tile_ % warp_size;
      const bool meets = rest & 1u;
      tile = {head_, tile_ * Rows};
      const std::int32_t end = (window_ + 1) * warp_size < tiles() ? (window_ + 1) * warp_size : tiles();
      const std::int32_t step = rest ? 1 : end - tile_;
      tile_ += step, left_ -= step;
      if (meets) return true;
    }
    return false;
  }

 private:
  PRIM std::int32_t tiles() const { return (sequence_.q_len + Rows - 1) / Rows; }

  PRIM void look(std::int32_t window) {
    window_ = window;
    const int lane = lane_of_thread();
    const std::int32_t first = (window * warp_size + lane) * Rows, count = sequence_.q_len - first;
    Interval seen{0, 0};
    if (count > 0) {
      // A hull is that of plan_tile entries, smaller tiles share one.
      const std::int32_t begin = first / plan_tile * plan_tile;
      const std::int32_t size = Rows < plan_tile ? plan_tile : Rows;
      seen = entries_hull(problem_, plan_, sequence_, begin, count + first - begin < size ? count + first - begin : size,
                          group_);
    }
    const bool meets = (seen.begin > keys_.begin ? seen.begin : keys_.begin) <
                       (seen.end < keys_.end ? seen.end : keys_.end);
    met_ = meets ? 1u << lane : 0u;
    for (int step = 1; step < warp_size; step *= 2) met_ |= prim::shfl_xor(met_, step);
  }

  const Problem& problem_;
  const DevicePlan& plan_;
  const Sequence& sequence_;
  const int group_;
  const Interval keys_;
  std::int32_t head_ = 0, tile_ = 0, left_, window_ = -1;
  std::uint32_t met_ = 0;  // bit l: tile l of the window
};

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

// Facts and intervals of a tile's rows in shared memory.
template <int Rows>
struct RowTable {
  smem_t base;

  static constexpr int bytes = Rows * static_cast<int>(sizeof(RowFacts<float>) + sizeof(int2));

  PRIM smem_t facts(int row) const { return base + static_cast<smem_t>(row * sizeof(RowFacts<float>)); }
  PRIM smem_t seen(int row) const {
    return base + static_cast<smem_t>(Rows * sizeof(RowFacts<float>) + row * sizeof(int2));
  }
  // Begins to fill in row `row`; `first`: the facts of its head's row 0.
  PRIM void begin_row(int row, const RowSight& sight, const RowFacts<float>* first) const {
    prim::cp_async<16>(facts(row), first + (sight.row < 0 ? 0 : sight.row), sight.row >= 0);
    prim::st_shared(seen(row), int2{sight.seen.begin, sight.seen.end});
  }
};

}  // namespace mmca::cuda::sm80
