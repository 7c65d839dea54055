// Backward on tensor cores: a block owns a tile of one group's keys of one KV head and meets the tiles of query rows
// that may see them, of all query heads of the KV head. With P, dS and W as in pair_gradients.cuh:
//
//     S = Q K^T    dP = dO V^T    dV += W^T dO    dK += dS^T Q    dQ += dS K
//
// dV and dK stay in registers until all rows have passed. dQ of a pair of tiles is added to a sheet (sheet.cuh) in
// global memory, which another kernel scales and rounds; where Problem::deterministic, backward_queries.cuh makes it.
// dK and dQ are multiplied by scale at the end only.
//
// Where there are fewer tiles of keys than the GPU has room for, `parts` blocks share a tile: each meets a part of its
// row tiles and leaves dK and dV in sheets of its own.
//
// Shared memory: K, V; dS, W (rows x keys); then for each stage Q, dO, and for each of two turns the rows' facts. With
// two stages the next tile of rows is on its way while one is worked on.
#pragma once

#include "cuda/sm80/backward_arrays.cuh"
#include "cuda/sm80/pair_gradients.cuh"
#include "cuda/sm80/sheet.cuh"

namespace mmca::cuda::sm80 {

// Tiles of a kernel and how its warps share them: score_rows x (warps / score_rows) for rows x keys, and so on.
template <int dim_, int keys_, int rows_, int warps_, int score_rows_, int key_rows_, int query_rows_>
struct BackwardShape {
  static constexpr int dim = dim_, keys = keys_, rows = rows_, warps = warps_, threads = warps * warp_size;
  static constexpr int score_rows = score_rows_, score_columns = warps / score_rows;  // S, dP
  static constexpr int key_rows = key_rows_, key_columns = warps / key_rows;          // dK, dV
  static constexpr int query_rows = query_rows_, query_columns = warps / query_rows;  // dQ
  static constexpr int key_bytes = keys * row_bytes<dim>(), row_tile_bytes = rows * row_bytes<dim>();
  static constexpr int pair = keys < 64 ? 64 : keys;  // a row of the tiles of pairs
  static constexpr int pair_bytes = rows * row_bytes<pair>();

  static constexpr std::size_t shared_bytes(int stages) {
    return 2 * key_bytes + 2 * pair_bytes + stages * 2 * row_tile_bytes + 2 * RowTable<rows>::bytes + 128;
  }
};

// The same in shared memory, for loops without a register to spare.
struct KeptKeyTile {
  smem_t base;

  static constexpr int bytes = 128;

  PRIM void keep(const KeyTile& tile) const {
    const Sequence& s = tile.sequence;
    const std::int64_t wide[4] = {s.q_begin, s.k_begin, s.q_token, s.k_token};
    const std::int32_t narrow[7] = {s.index, s.q_len, s.k_len, tile.kv_head, tile.first, tile.count, tile.group};
#pragma unroll
    for (int i = 0; i < 4; ++i) prim::st_shared(base + 8 * i, wide[i]);
#pragma unroll
    for (int i = 0; i < 7; ++i) prim::st_shared(base + 32 + 4 * i, narrow[i]);
  }
  PRIM Sequence sequence() const { return {narrow(0), narrow(1), narrow(2), wide(0), wide(1), wide(2), wide(3)}; }
  PRIM std::int32_t kv_head() const { return narrow(3); }
  PRIM std::int32_t first() const { return narrow(4); }
  PRIM std::int32_t end() const { return narrow(4) + narrow(5); }
  PRIM std::int32_t count() const { return narrow(5); }
  PRIM int group() const { return narrow(6); }

 private:
  PRIM std::int64_t wide(int i) const { return prim::ld_shared<std::int64_t>(base + 8 * i); }
  PRIM std::int32_t narrow(int i) const { return prim::ld_shared<std::int32_t>(base + 32 + 4 * i); }
};

template <class T, class Shape, bool General>
class KeyGradients {
 public:
  PRIM KeyGradients(const Problem& problem, const DevicePlan& plan, const BackwardArrays& arrays)
      : problem_(problem), plan_(plan), arrays_(arrays) {}

  PRIM void run() {
    const KeyTile tile = key_tile(problem_, plan_, arrays_.key_tiles, block(), keys);
    if (tile.count <= 0) return;
    if (threadIdx.x == 0) tile_.keep(tile);
    clear(grad_key_), clear(grad_value_);
    begin_keys(tile);
    prim::cp_async_commit();
    RowTiles<rows> row_tiles(problem_, tile.sequence, tile.kv_head, part(), arrays_.parts);
    prim::syncthreads();
    // `incoming` is the tile whose copy begins next; with two stages `current`, the one before, is worked on meanwhile.
    const bool overlap = arrays_.stages == 2;
    RowTile incoming{}, current{};
    bool coming = next(row_tiles, incoming), live = false;
    RowSight seen = coming ? sight(incoming) : RowSight();
    for (int turn = 0; live || coming; ++turn) {
      prim::cp_async_wait<0>();
      prim::syncthreads();
      if (coming) begin_rows(incoming, seen, turn);
      prim::cp_async_commit();
      if (!overlap) {
        prim::cp_async_wait<0>();
        prim::syncthreads();
        current = incoming, live = true;
      }
      const int loaded = overlap ? turn - 1 : turn;
      if (live) {
        score(current, loaded);
        prim::syncthreads();
      }
      const RowTile done = current;
      const bool scored = live;
      current = incoming, live = coming && overlap;
      coming = coming && next(row_tiles, incoming);
      if (coming) seen = sight(incoming);  // long before it is needed
      if (scored) accumulate(done, loaded);
    }
    prim::cp_async_wait<0>();
    prim::syncthreads();
    if (arrays_.parts > 1) keep();
    else store();
  }

 private:
  static constexpr int dim = Shape::dim, keys = Shape::keys, rows = Shape::rows, pair = Shape::pair;
  static constexpr int loaded_rows = rows / Shape::warps < 8 ? 8 : rows / Shape::warps;  // by a warp, if any
  static constexpr int loaded_keys = keys / Shape::warps;
  static constexpr int score_m = rows / Shape::score_rows / 16, score_n = keys / Shape::score_columns / 8;
  static constexpr int key_m = keys / Shape::key_rows / 16, key_n = dim / Shape::key_columns / 8;
  static constexpr int query_m = rows / Shape::query_rows / 16, query_n = dim / Shape::query_columns / 8;
  static_assert(score_n % 2 == 0 && key_n % 2 == 0 && query_n % 2 == 0 && loaded_keys % 8 == 0 && rows <= 128);

  static constexpr smem_t key_tile_ = 0, value_tile_ = Shape::key_bytes, gradient_tile_ = 2 * Shape::key_bytes,
                          weight_tile_ = gradient_tile_ + Shape::pair_bytes, tables_ = weight_tile_ + Shape::pair_bytes,
                          kept_ = tables_ + 2 * RowTable<rows>::bytes, stages_ = kept_ + KeptKeyTile::bytes;
  static_assert(stages_ % 128 == 0);

  PRIM std::int32_t part() const {
    return static_cast<std::int32_t>(blockIdx.x % static_cast<unsigned>(arrays_.parts));
  }
  PRIM std::int64_t block() const { return blockIdx.x / static_cast<unsigned>(arrays_.parts); }
  PRIM const std::int32_t* positions() const { return list_positions(plan_, tile_.sequence(), tile_.group()); }
  PRIM bool next(RowTiles<rows>& row_tiles, RowTile& tile) const {
    return row_tiles.next(tile, problem_, plan_, tile_.sequence(), tile_.group(), {tile_.first(), tile_.end()});
  }

  PRIM smem_t query_tile(int turn) const {
    return stages_ + static_cast<smem_t>((arrays_.stages == 2 ? turn & 1 : 0) * 2 * Shape::row_tile_bytes);
  }
  PRIM smem_t output_tile(int turn) const { return query_tile(turn) + Shape::row_tile_bytes; }
  PRIM RowTable<rows> table(int turn) const {
    return {tables_ + static_cast<smem_t>((turn & 1) * RowTable<rows>::bytes)};
  }

  PRIM void begin_keys(const KeyTile& tile) const {
    const int row = warp_of_thread() * loaded_keys;
    const std::int32_t first = tile.first + row;
    const Sequence& s = tile.sequence;
    const Interval seen = seen_by_any(problem_, plan_, s, tile.group);  // of other keys nothing is read, not even NaN
    const std::int32_t end = tile.first + tile.count;
    const Interval inside{seen.begin > tile.first ? seen.begin : tile.first, seen.end < end ? seen.end : end};
    const std::int32_t* list = list_positions(plan_, s, tile.group);
    const std::int32_t from = list_rows<loaded_keys>(list, first, inside);
    copy_list_rows<dim, loaded_keys>(key_tile_ + row * row_bytes<dim>(),
                                     row_source(problem_.key, s, s.k_begin, tile.kv_head, problem_.head_dim), list,
                                     from, first, inside);
    copy_list_rows<dim, loaded_keys>(value_tile_ + row * row_bytes<dim>(),
                                     row_source(problem_.value, s, s.k_begin, tile.kv_head, problem_.value_dim), list,
                                     from, first, inside);
  }

  // Of the warp's share of a tile's rows: lane r has row r.
  PRIM RowSight sight(const RowTile& tile) const {
    if (lane_of_thread() >= loaded_rows) return {};
    return row_sight(problem_, plan_, tile_.sequence(), tile_.group(),
                     tile.first + warp_of_thread() * loaded_rows + lane_of_thread());
  }
  PRIM void begin_rows(const RowTile& tile, const RowSight& sight, int turn) const {
    const int row = warp_of_thread() * loaded_rows;
    if (row >= rows) return;
    const Sequence s = tile_.sequence();
    RowSource query = row_source(problem_.query, s, s.q_begin, tile.head, 0);
    query.chunks = arrays_.key_chunks;
    copy_rows<dim, loaded_rows>(query_tile(turn) + row * row_bytes<dim>(), query, sight.row);
    RowSource grad = row_source(problem_.grad_out, s, s.q_begin, tile.head, 0);
    grad.chunks = arrays_.value_chunks;
    grad.data += 2 * tile_.group() * problem_.grad_out.group;
    copy_rows<dim, loaded_rows>(output_tile(turn) + row * row_bytes<dim>(), grad, sight.row);
    if (lane_of_thread() < loaded_rows)
      table(turn).begin_row(row + lane_of_thread(), sight, tile_.first(), keys,
                            arrays_.facts + facts_index(problem_, s, tile_.group(), tile.head, 0));
  }

  PRIM void score(const RowTile& tile, int turn) const {
    const int row = warp_of_thread() / Shape::score_columns * (16 * score_m);
    const int key = warp_of_thread() % Shape::score_columns * (8 * score_n);
    Accumulator<score_m, score_n> products, grads;
    clear(products), clear(grads);
    multiply_transposed<T, dim>(products, rows_first<dim>(query_tile(turn) + row * row_bytes<dim>()),
                                chunks_first<dim>(key_tile_ + key * row_bytes<dim>()));
    multiply_transposed<T, dim>(grads, rows_first<dim>(output_tile(turn) + row * row_bytes<dim>()),
                                chunks_first<dim>(value_tile_ + key * row_bytes<dim>()));
    const Sequence sequence = tile_.sequence();
    const PairPlace place{
        problem_,   plan_,         sequence, positions(), tile_.end(),      tile_.group(),        tile.head,
        tile.first, tile_.first(), row,      key,         arrays_.exponent, arrays_.weight_factor};
    const auto to = fragment_place<pair>(gradient_tile_ + row * row_bytes<pair>()).from_chunk(key / 8);
    constexpr int weights = weight_tile_ - gradient_tile_;
    if constexpr (General) differentiate_general<T, true>(place, table(turn), products, grads, to, to.at(weights));
    else differentiate_plain<T, true>(place, table(turn), products, grads, to, to.at(weights));
  }

  PRIM void accumulate(const RowTile& tile, int turn) {
    {
      const int key = warp_of_thread() / Shape::key_columns * (16 * key_m);
      const int column = warp_of_thread() % Shape::key_columns * (8 * key_n);
      const auto weights = chunks_first<pair>(weight_tile_).from_chunk(key / 8);
      const auto gradients = chunks_first<pair>(gradient_tile_).from_chunk(key / 8);
      multiply_left_transposed<T, rows>(grad_value_, weights,
                                        rows_first<dim>(output_tile(turn)).from_chunk(column / 8));
      multiply_left_transposed<T, rows>(grad_key_, gradients, rows_first<dim>(query_tile(turn)).from_chunk(column / 8));
    }
    if (!arrays_.grad_query) return;
    const int row = warp_of_thread() / Shape::query_columns * (16 * query_m);
    const int column = warp_of_thread() % Shape::query_columns * (8 * query_n);
    Accumulator<query_m, query_n> grad_query;
    clear(grad_query);
    multiply<T, keys>(grad_query, rows_first<pair>(gradient_tile_ + row * row_bytes<pair>()),
                      rows_first<dim>(key_tile_).from_chunk(column / 8));
    const int width = sheet_width(arrays_.key_chunks);
    const std::int64_t piece = hull_index(plan_, tile_.sequence()) * (plan_tile / 16) + (tile.first + row) / 16;
    add_pieces(grad_query, sheet_piece(arrays_.grad_query + tile.head * arrays_.query_stride, width, piece, column / 8),
               width, column, tile_.sequence().q_len - tile.first - row);
  }

  PRIM void keep() const {
    const std::int64_t first = (part() * arrays_.blocks + block()) * keys;
    const int key_width = sheet_width(arrays_.key_chunks), value_width = sheet_width(arrays_.value_chunks);
    keep(grad_key_, arrays_.grad_key + first * key_width, key_width);
    keep(grad_value_, arrays_.grad_value + first * value_width, value_width);
  }
  PRIM void keep(const Accumulator<key_m, key_n>& sum, float* sheet, int width) const {
    const int key = warp_of_thread() / Shape::key_columns * (16 * key_m);
    const int column = warp_of_thread() % Shape::key_columns * (8 * key_n);
    store_pieces(sum, sheet_piece(sheet, width, key / 16, column / 8), width, column);
  }

  // Through shared memory, where K and V were, to rows.
  PRIM void store() const {
    const int key = warp_of_thread() / Shape::key_columns * (16 * key_m);
    const int column = warp_of_thread() % Shape::key_columns * (8 * key_n);
    const auto to = fragment_place<dim>(key_tile_ + key * row_bytes<dim>()).from_chunk(column / 8);
    store_rounded<T>(grad_key_, arrays_.scale, to);
    store_rounded<T>(grad_value_, 1.0f / arrays_.weight_factor, to.at(value_tile_ - key_tile_));
    prim::syncthreads();
    store(key_tile_, problem_.grad_key, problem_.head_dim);
    store(value_tile_, problem_.grad_value, problem_.value_dim);
  }
  PRIM void store(smem_t tile, const Output& result, std::int64_t features) const {
    const Sequence s = tile_.sequence();
    const std::int32_t* list = positions();
    const std::int32_t first = tile_.first();
    store_tile<dim>(tile, row_target(result, s, s.k_begin, tile_.kv_head(), features), tile_.count(), Shape::threads,
                    [&](int row) { return position_at(list, first + row); });
  }

  const Problem& problem_;
  const DevicePlan& plan_;
  const BackwardArrays& arrays_;
  const KeptKeyTile tile_{kept_};
  Accumulator<key_m, key_n> grad_key_, grad_value_;
};

template <class T, class Shape, bool General>
__global__ void __launch_bounds__(Shape::threads, 1)
    key_gradients_kernel(const __grid_constant__ Problem problem, const __grid_constant__ DevicePlan plan,
                         const __grid_constant__ BackwardArrays arrays) {
  KeyGradients<T, Shape, General>(problem, plan, arrays).run();
}

}  // namespace mmca::cuda::sm80
