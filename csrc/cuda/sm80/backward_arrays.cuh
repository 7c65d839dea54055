// What the kernels of the backward are given beside the Problem and its plan.
#pragma once

#include "cuda/row_results.cuh"
#include "cuda/sm80/tile.cuh"

namespace mmca::cuda::sm80 {

struct BackwardArrays {
  const RowFacts<float>* facts = nullptr;
  float scale = 0, exponent = 0;           // scale; scale log2(e)
  float weight_factor = 1;                 // of what is rounded of the weights, taken from dV at the end
  int key_chunks = 0, value_chunks = 0;    // of 8 numbers, in head_dim and value_dim
  int stages = 2;                          // of shared memory
  int outputs = 1;                         // tiles of dO: 2 where the groups' gradients differ
  std::int64_t key_tiles = 0, blocks = 0;  // tile_count of keys; blocks of their grid, without parts
  int parts = 1;

  // Sheets (sheet.cuh) of dQ, one for each query head; null: not wanted. With parts of dK, dV: [part][block].
  float *grad_query = nullptr, *grad_key = nullptr, *grad_value = nullptr;
  std::int64_t query_stride = 0;  // numbers from one head's sheet to the next
};

// Which tile a block owns.
struct KeyTile {
  Sequence sequence;
  std::int32_t kv_head, first, count;  // entries of the group's list; count <= 0: none
  int group;
};
PRIM KeyTile key_tile(const Problem& problem, const DevicePlan& plan, std::int64_t tiles, std::int64_t block,
                      int size) {
  const int groups = problem.groups();
  const Tile tile = tile_of(problem, plan, block / groups % tiles, size, /*of_keys=*/true);
  const int group = static_cast<int>(block % groups);
  const std::int32_t left = list_size(plan, tile.sequence, group) - tile.first;
  return {tile.sequence, static_cast<std::int32_t>(block / groups / tiles), tile.first, left < size ? left : size,
          group};
}

}  // namespace mmca::cuda::sm80
