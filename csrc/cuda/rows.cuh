// A kernel's view of the plan: which sequence and rows a block works on, and what they see.
#pragma once

#include "cuda/plan.h"
#include "cuda/primitives.cuh"

namespace mmca::cuda {

using prim::ld_global;

struct Interval {
  std::int32_t begin, end;  // empty if begin >= end
};

PRIM Interval hull(Interval a, Interval b) {
  if (a.begin >= a.end) return b;
  if (b.begin >= b.end) return a;
  return {a.begin < b.begin ? a.begin : b.begin, a.end > b.end ? a.end : b.end};
}

struct Sequence {
  std::int32_t index;  // b
  std::int32_t q_len, k_len;
  std::int64_t q_begin, k_begin;  // its first rows in the tensors
  std::int64_t q_token, k_token;  // its first tokens in the plan
};

// Problem and Plan: attention's, or linear attention's.
template <class Problem, class Plan>
PRIM Sequence sequence_at(const Problem& problem, const Plan& plan, std::int32_t b) {
  if (!plan.q_offsets) {
    const auto q_len = static_cast<std::int32_t>(problem.q_len), k_len = static_cast<std::int32_t>(problem.k_len);
    return {b, q_len, k_len, 0, 0, std::int64_t{b} * q_len, std::int64_t{b} * k_len};
  }
  const std::int32_t q = ld_global(plan.q_offsets + b), k = ld_global(plan.k_offsets + b);
  const std::int32_t q_end = ld_global(plan.q_offsets + b + 1), k_end = ld_global(plan.k_offsets + b + 1);
  return {b, q_end - q, k_end - k, q, k, q, k};
}
// What lies past the last offset: its rows see nothing and its keys are in no list.
template <class Plan>
PRIM bool is_rest(const Plan& plan, const Sequence& sequence) {
  return plan.q_offsets && sequence.index == plan.sequences - 1;
}

// Tiles of `size` tokens of all sequences, each sequence beginning a new one. Packed, a sequence's tiles begin at
// offset / size + b, which leaves room for at least as many as it has: no table is needed, some tiles are empty.
struct Tile {
  Sequence sequence;
  std::int32_t first, count;  // its tokens within the sequence; count <= 0: none
};

template <class Problem, class Plan>
PRIM Tile tile_of(const Problem& problem, const Plan& plan, std::int64_t index, int size, bool of_keys) {
  const std::int32_t* offsets = of_keys ? plan.k_offsets : plan.q_offsets;
  std::int32_t b, t;
  if (!offsets) {
    const auto length = static_cast<std::int32_t>(of_keys ? problem.k_len : problem.q_len);
    const std::int32_t tiles = (length + size - 1) / size;
    b = static_cast<std::int32_t>(index / tiles), t = static_cast<std::int32_t>(index % tiles);
  } else {
    std::int32_t low = 0, high = plan.sequences - 1;  // the last b whose tiles begin at or before the index
    while (low < high) {
      const std::int32_t middle = (low + high + 1) / 2;
      if (ld_global(offsets + middle) / size + middle <= index) low = middle;
      else high = middle - 1;
    }
    b = low, t = static_cast<std::int32_t>(index - (ld_global(offsets + b) / size + b));
  }
  Tile tile{sequence_at(problem, plan, b), t * size, 0};
  const std::int32_t length = of_keys ? tile.sequence.k_len : tile.sequence.q_len;
  tile.count = length - tile.first < size ? length - tile.first : size;
  return tile;
}

// How many there are: for grids.
template <class Problem, class Plan>
std::int64_t tile_count(const Problem& problem, const Plan& plan, int size, bool of_keys) {
  const std::int64_t tokens = of_keys ? problem.k_len : problem.q_len;
  if (plan.q_offsets) return tokens / size + plan.sequences;
  return plan.sequences * ((tokens + size - 1) / size);
}

// ---- who sees what ---------------------------------------------------------------------------------------------

PRIM std::int32_t list_size(const DevicePlan& plan, const Sequence& sequence, int group) {
  if (!plan.positions) return group == 0 && !is_rest(plan, sequence) ? sequence.k_len : 0;
  return ld_global(plan.list_sizes + 2 * std::int64_t{sequence.index} + group);
}

// The positions of list `group`, or null where entry c is position c.
PRIM const std::int32_t* list_positions(const DevicePlan& plan, const Sequence& sequence, int group) {
  if (!plan.positions) return nullptr;
  const std::int32_t* first = plan.positions + sequence.k_token;
  return group == 0 ? first : first + list_size(plan, sequence, 0);
}
PRIM std::int32_t position_at(const std::int32_t* positions, std::int32_t c) {
  return positions ? ld_global(positions + c) : c;
}

PRIM std::int32_t row_of(const DevicePlan& plan, const Sequence& sequence, std::int32_t entry) {
  return plan.rows ? ld_global(plan.rows + sequence.q_token + entry) : entry;
}

PRIM std::int32_t clamp_position(std::int64_t p, std::int32_t k_len) {
  return static_cast<std::int32_t>(p < 0 ? 0 : p > k_len ? k_len : p);
}

// The positions that row i may see by causal and window.
PRIM Interval band(const Problem& problem, const Sequence& sequence, std::int32_t row) {
  const std::int64_t p = std::int64_t{row} + sequence.k_len - sequence.q_len;
  std::int64_t right = problem.window_right;
  if (problem.causal) right = 0;  // a window to the right adds nothing to it
  const std::int32_t k_len = sequence.k_len;
  // Beyond k_len + q_len a bound bounds nothing, and p plus a larger one might overflow.
  const std::int64_t reach = std::int64_t{sequence.q_len} + k_len, left = problem.window_left;
  return {left < 0 || left > reach ? 0 : clamp_position(p - left, k_len),
          right < 0 || right > reach ? k_len : clamp_position(p + right + 1, k_len)};
}

PRIM Interval entry_range(const Problem& problem, const DevicePlan& plan, const Sequence& sequence, std::int32_t entry,
                          int group) {
  if (plan.ranges) {
    const int4 range = ld_global(plan.ranges + sequence.q_token + entry);
    return group == 0 ? Interval{range.x, range.y} : Interval{range.z, range.w};
  }
  if (group == 1 || is_rest(plan, sequence)) return {0, 0};
  return band(problem, sequence, entry);
}

PRIM std::int64_t hull_index(const DevicePlan& plan, const Sequence& sequence) {
  if (plan.q_offsets) return sequence.q_begin / plan_tile + sequence.index;
  return std::int64_t{sequence.index} * ((sequence.q_len + plan_tile - 1) / plan_tile);
}

// What entries first .. first + count - 1 see together; `first` is a multiple of plan_tile.
PRIM Interval entries_hull(const Problem& problem, const DevicePlan& plan, const Sequence& sequence, std::int32_t first,
                           std::int32_t count, int group) {
  Interval all{0, 0};
  if (plan.ranges) {
    const int4* at = plan.hulls + hull_index(plan, sequence) + first / plan_tile;
    for (std::int32_t t = 0; t * plan_tile < count; ++t) {
      const int4 h = ld_global(at + t);
      all = hull(all, group == 0 ? Interval{h.x, h.y} : Interval{h.z, h.w});
    }
    return all;
  }
  if (group == 1 || count <= 0 || is_rest(plan, sequence)) return all;
  // Bounds ascend with the row, but rows before the first key or past the last one see nothing.
  const Interval a = band(problem, sequence, first), b = band(problem, sequence, first + count - 1);
  return {a.begin, b.end};
}

PRIM bool is_self_entry(const DevicePlan& plan, const Sequence& sequence, std::int32_t entry) {
  return plan.self_entries && ld_global(plan.self_entries + sequence.q_token + entry);
}

// ---- addresses ---------------------------------------------------------------------------------------------------

// Elements from the tensor's first to (sequence, head, row, 0); `begin`: the sequence's q_begin or k_begin.
template <class Tensor>
PRIM std::int64_t row_offset(const Tensor& x, const Sequence& sequence, std::int64_t begin, std::int64_t head,
                             std::int64_t row) {
  return sequence.index * x.batch + head * x.head + (begin + row) * x.row;
}

// Element `at` of an array of S: float, double, BFloat16 or Float16.
template <class T, class S>
PRIM T number_of(const void* data, std::int64_t at) {
  if constexpr (sizeof(S) == 2)
    return static_cast<T>(prim::to_float<S>(ld_global(static_cast<const std::uint16_t*>(data) + at)));
  else return static_cast<T>(ld_global(static_cast<const S*>(data) + at));
}
// The same of a type known at run time.
template <class T>
PRIM T number_at(const void* data, DType dtype, std::int64_t at) {
  switch (dtype) {
    case DType::f32: return number_of<T, float>(data, at);
    case DType::f64: return number_of<T, double>(data, at);
    case DType::bf16: return number_of<T, BFloat16>(data, at);
    case DType::f16: break;
  }
  return number_of<T, Float16>(data, at);
}

}  // namespace mmca::cuda
