// dQ where the bits must not depend on the order of blocks: a block owns a tile of rows of one query head and meets the
// tiles of keys that they may see, group after group; dQ stays in registers. S, dP and dS as in backward_keys.cuh.
//
// Shared memory: dS (rows x keys); Q; dO, one for each group where they differ; for each stage K, V, the rows' facts.
#pragma once

#include "cuda/sm80/backward_arrays.cuh"
#include "cuda/sm80/pair_gradients.cuh"

namespace mmca::cuda::sm80 {

// score_rows x (warps / score_rows) warps share rows x keys, the same ones rows x dim.
template <int dim_, int keys_, int rows_, int warps_, int score_rows_>
struct QueryShape {
  static constexpr int dim = dim_, keys = keys_, rows = rows_, warps = warps_, threads = warps * warp_size;
  static constexpr int score_rows = score_rows_, columns = warps / score_rows;
  static constexpr int pair = keys < 64 ? 64 : keys;  // a row of the tiles of pairs
  static constexpr int pair_bytes = rows * row_bytes<pair>(), row_tile_bytes = rows * row_bytes<dim>();
  static constexpr int key_bytes = keys * row_bytes<dim>();
  static constexpr int table_bytes = (RowTable<rows>::bytes + 127) / 128 * 128;
  static constexpr int stage_bytes = 2 * key_bytes + table_bytes;

  static constexpr std::size_t shared_bytes(int stages, int outputs) {
    return pair_bytes + (1 + outputs) * row_tile_bytes + stages * stage_bytes;
  }
};

template <class T, class Shape>
class QueryGradients {
 public:
  PRIM QueryGradients(const Problem& problem, const DevicePlan& plan, const BackwardArrays& arrays)
      : problem_(problem),
        plan_(plan),
        arrays_(arrays),
        head_(static_cast<std::int32_t>(blockIdx.x % problem.q_heads)),
        tile_(tile_of(problem, plan, blockIdx.x / problem.q_heads, rows, /*of_keys=*/false)) {}

  PRIM void run() {
    if (tile_.count <= 0) return;
    clear(grad_query_);
    begin_rows();
    prim::cp_async_commit();
    // `incoming` is the tile whose copy begins next; with two stages `current`, the one before, is worked on meanwhile.
    const bool overlap = arrays_.stages == 2;
    KeysAt incoming{-1, 0, 0}, current{};
    bool coming = next(incoming), live = false;
    for (int turn = 0; live || coming; ++turn) {
      prim::cp_async_wait<0>();
      prim::syncthreads();
      if (coming) begin_keys(incoming, turn);
      prim::cp_async_commit();
      if (!overlap) {
        prim::cp_async_wait<0>();
        prim::syncthreads();
        current = incoming, live = true;
      }
      if (live) meet(current, overlap ? turn - 1 : turn);
      current = incoming, live = coming && overlap;
      coming = coming && next(incoming);
    }
    prim::cp_async_wait<0>();
    prim::syncthreads();
    store();
  }

 private:
  static constexpr int dim = Shape::dim, keys = Shape::keys, rows = Shape::rows, pair = Shape::pair;
  static constexpr int loaded_rows = rows / Shape::warps, loaded_keys = keys / Shape::warps;
  static constexpr int m = rows / Shape::score_rows / 16, score_n = keys / Shape::columns / 8,
                       n = dim / Shape::columns / 8;
  static_assert(score_n % 2 == 0 && n % 2 == 0);
  static constexpr smem_t gradient_tile_ = 0, query_tile_ = Shape::pair_bytes,
                          output_tiles_ = query_tile_ + Shape::row_tile_bytes;

  struct KeysAt {
    int group;
    std::int32_t first, end;  // entries still to come
  };

  PRIM smem_t output_tile(int group) const {
    return output_tiles_ + static_cast<smem_t>((arrays_.outputs == 2 ? group : 0) * Shape::row_tile_bytes);
  }
  PRIM smem_t key_tile(int turn) const {
    return output_tiles_ + static_cast<smem_t>(arrays_.outputs * Shape::row_tile_bytes +
                                               (arrays_.stages == 2 ? turn & 1 : 0) * Shape::stage_bytes);
  }
  PRIM RowTable<rows> table(int turn) const { return {key_tile(turn) + 2 * Shape::key_bytes}; }

  // The next tile of keys, and after a group's last one the other group's first.
  PRIM bool next(KeysAt& at) const {
    at.first += keys;
    while (at.group < 0 || at.first >= at.end) {
      if (++at.group == problem_.groups()) return false;
      const std::int32_t begin = tile_.first / plan_tile * plan_tile, left = tile_.sequence.q_len - begin;
      constexpr std::int32_t size = rows < plan_tile ? plan_tile : rows;
      const Interval seen = entries_hull(problem_, plan_, tile_.sequence, begin, left < size ? left : size, at.group);
      at.first = seen.begin / 8 * 8, at.end = seen.end;  // dropout counts keys in eights
    }
    return true;
  }

  // A warp's share of the tile's rows: lane r has row r.
  PRIM void begin_rows() const {
    const Sequence& s = tile_.sequence;
    const int row = warp_of_thread() * loaded_rows, mine = row + lane_of_thread();
    const std::int32_t from =
        lane_of_thread() < loaded_rows && mine < tile_.count ? row_of(plan_, s, tile_.first + mine) : -1;
    copy_rows<dim, loaded_rows>(query_tile_ + row * row_bytes<dim>(),
                                row_source(problem_.query, s, s.q_begin, head_, problem_.head_dim), from);
    for (int group = 0; group < arrays_.outputs; ++group) {
      RowSource grad = row_source(problem_.grad_out, s, s.q_begin, head_, problem_.value_dim);
      grad.data += 2 * group * problem_.grad_out.group;
      copy_rows<dim, loaded_rows>(output_tile(group) + row * row_bytes<dim>(), grad, from);
    }
  }

  PRIM void begin_keys(const KeysAt& at, int turn) const {
    const Sequence& s = tile_.sequence;
    const int row = warp_of_thread() * loaded_rows + lane_of_thread(), key = warp_of_thread() * loaded_keys;
    if (lane_of_thread() < loaded_rows)
      table(turn).begin_row(row, row_sight(problem_, plan_, s, at.group, tile_.first + row), at.first, keys,
                            arrays_.facts + facts_index(problem_, s, at.group, head_, 0));

    const std::int64_t kv_head = head_ / problem_.heads_per_kv();
    const std::int32_t* list = list_positions(plan_, s, at.group);
    const Interval inside{at.first, at.end};
    const std::int32_t from = list_rows<loaded_keys>(list, at.first + key, inside);
    copy_list_rows<dim, loaded_keys>(key_tile(turn) + key * row_bytes<dim>(),
                                     row_source(problem_.key, s, s.k_begin, kv_head, problem_.head_dim), list, from,
                                     at.first + key, inside);
    copy_list_rows<dim, loaded_keys>(key_tile(turn) + Shape::key_bytes + key * row_bytes<dim>(),
                                     row_source(problem_.value, s, s.k_begin, kv_head, problem_.value_dim), list, from,
                                     at.first + key, inside);
  }

  PRIM void meet(const KeysAt& at, int turn) {
    const int row = warp_of_thread() / Shape::columns * (16 * m);
    const int key = warp_of_thread() % Shape::columns * (8 * score_n);
    Accumulator<m, score_n> products, grads;
    clear(products), clear(grads);
    multiply_transposed<T, dim>(products, rows_first<dim>(query_tile_ + row * row_bytes<dim>()),
                                chunks_first<dim>(key_tile(turn) + key * row_bytes<dim>()));
    multiply_transposed<T, dim>(grads, rows_first<dim>(output_tile(at.group) + row * row_bytes<dim>()),
                                chunks_first<dim>(key_tile(turn) + Shape::key_bytes + key * row_bytes<dim>()));
    const PairPlace place{problem_,
                          plan_,
                          tile_.sequence,
                          list_positions(plan_, tile_.sequence, at.group),
                          at.end,
                          at.group,
                          head_,
                          tile_.first,
                          at.first,
                          row,
                          key,
                          arrays_.exponent,
                          arrays_.weight_factor};
    const auto to = fragment_place<pair>(gradient_tile_ + row * row_bytes<pair>()).from_chunk(key / 8);
    differentiate_general<T, false>(place, table(turn), products, grads, to, to);
    prim::syncthreads();
    const int column = warp_of_thread() % Shape::columns * (8 * n);
    multiply<T, keys>(grad_query_, rows_first<pair>(gradient_tile_ + row * row_bytes<pair>()),
                      rows_first<dim>(key_tile(turn)).from_chunk(column / 8));
  }

  PRIM void store() const {
    const int row = warp_of_thread() / Shape::columns * (16 * m), column = warp_of_thread() % Shape::columns * (8 * n);
    store_rounded<T>(grad_query_, arrays_.scale,
                     fragment_place<dim>(query_tile_ + row * row_bytes<dim>()).from_chunk(column / 8));
    prim::syncthreads();
    const Sequence& s = tile_.sequence;
    store_tile<dim>(query_tile_, row_target(problem_.grad_query, s, s.q_begin, head_, problem_.head_dim), tile_.count,
                    Shape::threads, [&](int r) { return row_of(plan_, s, tile_.first + r); });
  }

  const Problem& problem_;
  const DevicePlan& plan_;
  const BackwardArrays& arrays_;
  const std::int32_t head_;
  const Tile tile_;
  Accumulator<m, n> grad_query_;
};

template <class T, class Shape>
__global__ void __launch_bounds__(Shape::threads)
    query_gradients_kernel(const __grid_constant__ Problem problem, const __grid_constant__ DevicePlan plan,
                           const __grid_constant__ BackwardArrays arrays) {
  QueryGradients<T, Shape>(problem, plan, arrays).run();
}

}  // namespace mmca::cuda::sm80
