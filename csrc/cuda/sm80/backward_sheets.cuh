// The end of a backward whose sums lie in sheets (sheet.cuh): they are added up, scaled, rounded and put into rows.
#pragma once

#include "cuda/sm80/backward_arrays.cuh"
#include "cuda/sm80/sheet.cuh"

namespace mmca::cuda::sm80 {

constexpr int sheet_threads = 256;

// The first `count` rows of `parts` sheets of 8 `columns` numbers; row_at(r): where row r goes.
template <class T, class RowAt>
PRIM void write_sheets(const float* sheet, int columns, int parts, std::int64_t part_stride, float factor,
                       const RowTarget& target, std::int32_t count, RowAt&& row_at) {
  const int pairs = (count + 15) / 16 * 8 * columns;  // of a row and the one 8 below
  for (int i = static_cast<int>(threadIdx.x); i < pairs; i += sheet_threads) {
    const int g = i % 8, column = i / 8 % columns, m = i / 8 / columns, row = 16 * m + g;
    if (row >= count) continue;
    uint4 upper, lower;
    read_piece<T>(sheet + (std::int64_t{m} * columns + column) * 128, g, parts, part_stride, factor, upper, lower);
    store_chunk(target, row_at(row), column, upper);
    if (row + 8 < count) store_chunk(target, row_at(row + 8), column, lower);
  }
}

// dQ: a block a tile of plan_tile entries of one query head.
template <class T>
__global__ void __launch_bounds__(sheet_threads)
    query_sheets_kernel(const __grid_constant__ Problem problem, const __grid_constant__ DevicePlan plan,
                        const __grid_constant__ BackwardArrays arrays) {
  const auto head = static_cast<std::int64_t>(blockIdx.x) % problem.q_heads;
  const Tile tile = tile_of(problem, plan, static_cast<std::int64_t>(blockIdx.x) / problem.q_heads, plan_tile,
                            /*of_keys=*/false);
  if (tile.count <= 0) return;
  const Sequence& s = tile.sequence;
  const std::int64_t first = (hull_index(plan, s) + tile.first / plan_tile) * plan_tile;
  write_sheets<T>(arrays.grad_query + head * arrays.query_stride + first * sheet_width(arrays.key_chunks),
                  arrays.key_chunks, 1, 0, arrays.scale,
                  row_target(problem.grad_query, s, s.q_begin, head, problem.head_dim), tile.count,
                  [&](int row) { return row_of(plan, s, tile.first + row); });
}

// dK and dV: a block a tile of `keys` keys of one KV head.
template <class T>
__global__ void __launch_bounds__(sheet_threads, 2)
    key_sheets_kernel(const __grid_constant__ Problem problem, const __grid_constant__ DevicePlan plan,
                      const __grid_constant__ BackwardArrays arrays, int keys) {
  const KeyTile tile = key_tile(problem, plan, arrays.key_tiles, blockIdx.x, keys);
  if (tile.count <= 0) return;
  const Sequence& s = tile.sequence;
  const std::int32_t* list = list_positions(plan, s, tile.group);
  const auto position = [&](int row) { return position_at(list, tile.first + row); };
  const std::int64_t first = std::int64_t{blockIdx.x} * keys;
  const int key_width = sheet_width(arrays.key_chunks), value_width = sheet_width(arrays.value_chunks);
  write_sheets<T>(arrays.grad_key + first * key_width, arrays.key_chunks, arrays.parts,
                  arrays.blocks * keys * key_width, arrays.scale,
                  row_target(problem.grad_key, s, s.k_begin, tile.kv_head, problem.head_dim), tile.count, position);
  write_sheets<T>(arrays.grad_value + first * value_width, arrays.value_chunks, arrays.parts,
                  arrays.blocks * keys * value_width, 1.0f / arrays.weight_factor,
                  row_target(problem.grad_value, s, s.k_begin, tile.kv_head, problem.value_dim), tile.count, position);
}

}  // namespace mmca::cuda::sm80
