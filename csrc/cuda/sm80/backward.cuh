// Host side of the backward on tensor cores: which kernels, how many blocks, which memory.
#pragma once

#include <algorithm>
#include <type_traits>

#include "cuda/launch.h"
#include "cuda/sm80/backward_keys.cuh"
#include "cuda/sm80/backward_queries.cuh"
#include "cuda/sm80/backward_sheets.cuh"

namespace mmca::cuda::sm80 {

// Shared memory that a block may have.
inline std::size_t shared_capacity(const Device& device) {
  switch (device.sm) {
    case 80:
    case 87: return 163 * 1024;
    case 90:
    case 100:
    case 103: return 227 * 1024;
    default: return 99 * 1024;
  }
}

template <class T>
class Backward {
 public:
  explicit Backward(const Launch& launch) : launch_(launch), problem_(launch.problem) {
    arrays_.facts = backward_rows<float>(launch);
    arrays_.scale = static_cast<float>(problem_.scale);
    arrays_.exponent = static_cast<float>(problem_.scale * log2_e);
    // No weight is larger than what dropout makes of 1, unless a gate does.
    const bool large = problem_.merge == Merge::gate || problem_.dropout.threshold > 65536 - 512;
    if (std::is_same_v<T, Float16> && !large) arrays_.weight_factor = 256;
    arrays_.key_chunks = static_cast<int>((problem_.head_dim + 7) / 8);
    arrays_.value_chunks = static_cast<int>((problem_.value_dim + 7) / 8);
    arrays_.outputs = problem_.groups() == 2 && problem_.grad_out.group ? 2 : 1;
  }

  // Of the shapes for a dimension the first that serves and fits.
  void run() {
    const std::int64_t dim = std::max(problem_.head_dim, problem_.value_dim);
    if (!problem_.deterministic) begin_query_sheets();
    const bool plain = !problem_.shapes_scores() && !problem_.attn_mask.data && !problem_.dropout.threshold &&
                       !problem_.grad_bias.data;
    if (dim <= 64) {
      (plain && run_keys<BackwardShape<64, 128, 128, 8, 4, 4, 4>, false>()) ||
          run_keys<BackwardShape<64, 128, 64, 8, 2, 4, 2>, true>();
    } else if (dim <= 128) {
      (plain && run_keys<BackwardShape<128, 128, 64, 8, 2, 4, 2>, false>()) ||
          run_keys<BackwardShape<128, 64, 64, 8, 4, 2, 2>, true>();
    } else {
      (plain && run_keys<BackwardShape<256, 64, 64, 8, 4, 2, 2>, false>()) ||
          run_keys<BackwardShape<256, 64, 32, 8, 2, 2, 1>, true>() ||
          run_keys<BackwardShape<256, 32, 32, 4, 2, 1, 2>, true>();
    }
    if (!problem_.deterministic) return finish_query_sheets();
    if (dim <= 64) run_queries<QueryShape<64, 64, 64, 8, 4>>();
    else if (dim <= 128) run_queries<QueryShape<128, 64, 64, 8, 4>>();
    else run_queries<QueryShape<256, 64, 64, 8, 4>>() || run_queries<QueryShape<256, 32, 32, 4, 2>>();
  }

 private:
  void begin_query_sheets() {
    arrays_.query_stride =
        tile_count(problem_, launch_.plan, plan_tile, false) * plan_tile * sheet_width(arrays_.key_chunks);
    const std::int64_t count = problem_.q_heads * arrays_.query_stride;
    arrays_.grad_query = launch_.take<float>(count);
    Launch::check(prim::fill_zero(arrays_.grad_query, static_cast<std::size_t>(count) * sizeof(float), launch_.stream),
                  launch_.device);
  }
  void finish_query_sheets() const {
    launch_(&query_sheets_kernel<T>, tile_count(problem_, launch_.plan, plan_tile, false) * problem_.q_heads,
            sheet_threads, 0, problem_, launch_.plan, arrays_);
  }

  template <class Shape, bool General>
  bool run_keys() {
    const auto fits = [&](int stages) { return Shape::shared_bytes(stages) <= shared_capacity(launch_.device); };
    if (!fits(1)) return false;
    arrays_.stages = fits(2) ? 2 : 1;
    arrays_.key_tiles = tile_count(problem_, launch_.plan, Shape::keys, true);
    arrays_.blocks = problem_.kv_heads * arrays_.key_tiles * problem_.groups();
    arrays_.parts = parts(Shape::rows);
    if (arrays_.parts > 1) {
      const std::int64_t rows = arrays_.parts * arrays_.blocks * Shape::keys;
      arrays_.grad_key = launch_.take<float>(rows * sheet_width(arrays_.key_chunks));
      arrays_.grad_value = launch_.take<float>(rows * sheet_width(arrays_.value_chunks));
    }
    launch_(&key_gradients_kernel<T, Shape, General>, arrays_.blocks * arrays_.parts, Shape::threads,
            Shape::shared_bytes(arrays_.stages), problem_, launch_.plan, arrays_);
    if (arrays_.parts > 1)
      launch_(&key_sheets_kernel<T>, arrays_.blocks, sheet_threads, 0, problem_, launch_.plan, arrays_, Shape::keys);
    return true;
  }

  // Blocks that share a tile of keys: enough to fill the GPU a few times over where there are few tiles, as long as
  // each has rows enough to be worth its copy of the keys and its sheets.
  int parts(int rows) const {
    constexpr std::int64_t waves = 4, least_tiles = 8;
    const std::int64_t blocks = problem_.kv_heads * arrays_.key_tiles, wanted = waves * launch_.device.multiprocessors;
    if (blocks == 0 || 4 * blocks >= 3 * wanted) return 1;
    const std::int64_t longest =
        problem_.q_offsets ? problem_.q_len / std::max<std::int64_t>(problem_.batch, 1) : problem_.q_len;
    const std::int64_t row_tiles = problem_.heads_per_kv() * ((longest + rows - 1) / rows);
    return static_cast<int>(
        std::max<std::int64_t>(1, std::min((wanted + blocks - 1) / blocks, row_tiles / least_tiles)));
  }

  template <class Shape>
  bool run_queries() {
    const auto bytes = [&](int stages) { return Shape::shared_bytes(stages, arrays_.outputs); };
    if (bytes(1) > shared_capacity(launch_.device)) return false;
    arrays_.stages = bytes(2) <= shared_capacity(launch_.device) ? 2 : 1;
    launch_(&query_gradients_kernel<T, Shape>,
            tile_count(problem_, launch_.plan, Shape::rows, false) * problem_.q_heads, Shape::threads,
            bytes(arrays_.stages), problem_, launch_.plan, arrays_);
    return true;
  }

  const Launch& launch_;
  const Problem& problem_;
  BackwardArrays arrays_;
};

template <class T>
void attention_backward(const Launch& launch) {
  Backward<T>(launch).run();
}

}  // namespace mmca::cuda::sm80
