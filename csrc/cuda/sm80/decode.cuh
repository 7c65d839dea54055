// Forward for few rows, above all one query token: reading the keys and values is the work, so they are shared out
// among as many blocks as fill the machine, and the rows of all query heads of a KV head look at them together.
//
// A tile is up to 16 rows: neighbouring entries times the query heads of one KV head, row r = entry r / heads and head
// r % heads. A block has one tile, one KV head and one of `splits` equal parts of what the tile sees of each list. Its
// four warps go through that part by turns, each with a ring of its own (key_ring.cuh), without waiting for one
// another; then they put their sums together and leave, for every group, split and row,
//
//     m = max s,   l = sum exp2(u (s - m)),   O = sum exp2(u (s - m)) Z v          (m, l) and O in fp32, not divided
//
// for merge_splits_kernel, which makes of them what forward.cuh writes. u and s as in its general kernels.
#pragma once

#include <algorithm>

#include "cuda/row_results.cuh"
#include "cuda/sm80/forward_kernels.h"
#include "cuda/sm80/key_ring.cuh"
#include "cuda/sm80/row_stores.cuh"
#include "cuda/sm80/softmax.cuh"

namespace mmca::cuda::sm80 {

template <int D>
struct SplitTile {
  static constexpr int warps = 4, threads = warps * warp_size, rows = 16;
  static constexpr int keys = D == 64 ? 32 : 16, buffers = D == 256 ? 2 : 6;  // of a warp
  static constexpr bool holds_queries = D < 256;                              // in registers
  using Ring = KeyRing<D, keys, 1, buffers>;

  // Shared memory: each warp's ring, where its O lies in the end, in padded rows, and its queries, which a ring may
  // overwrite where they are held in registers; the warps' (m, l).
  static constexpr smem_t sum_row = 4 * (D + 8);
  static constexpr smem_t ring_or_sum = (std::max<smem_t>(Ring::bytes, rows* sum_row) + 127) / 128 * 128;
  static constexpr smem_t queries = holds_queries ? 0 : ring_or_sum;
  static constexpr smem_t warp_bytes = holds_queries ? ring_or_sum : queries + rows * row_bytes<D>();
  static constexpr smem_t softmaxes = warps * warp_bytes, bytes = softmaxes + warps * rows * sizeof(float2);
  static_assert(rows * row_bytes<D>() <= ring_or_sum && warp_bytes % 128 == 0);

  PRIM static smem_t softmax(int warp, int row) { return softmaxes + (warp * rows + row) * sizeof(float2); }
  PRIM static smem_t sum(int warp, int row) { return warp * warp_bytes + row * sum_row; }
};

// What the kernels need beside the problem.
struct SplitFacts {
  std::int32_t tiles, head_tiles;  // of entries, over all sequences; of a KV head's query heads
  std::int32_t entries, heads;     // of a tile
  std::int32_t tokens;             // tiles of one entry, of merge_splits_kernel
  std::int32_t splits;
  float unit;       // u
  float2* softmax;  // (m, l), [group][split][query head][query token, in the plan's order]
  float* out;       // O, the same, value_dim numbers each; where l is 0, not written
};

PRIM std::int64_t split_row(const Problem& problem, const SplitFacts& facts, int group, int split, std::int64_t head,
                            std::int64_t token) {
  return ((std::int64_t{group} * facts.splits + split) * problem.q_heads + head) * query_tokens(problem) + token;
}

// ---- the rows of a tile --------------------------------------------------------------------------------------------

struct SplitRow {
  std::int32_t entry;  // negative: there is none
  std::int64_t head;
};
PRIM SplitRow row_of_tile(const Problem& problem, const SplitFacts& facts, const Tile& tile, std::int32_t kv_head,
                          std::int32_t head_tile, int r) {
  const std::int32_t place = r / facts.heads, head = head_tile * facts.heads + r % facts.heads;
  const bool exists = place < facts.entries && place < tile.count && head < problem.heads_per_kv();
  return {exists ? tile.first + place : -1, kv_head * problem.heads_per_kv() + head};
}

// Copies the queries of a tile to `to` for this warp alone; lane r < 16 knows row r.
template <int D>
PRIM void copy_tile_queries(const Problem& problem, const DevicePlan& plan, const Sequence& sequence,
                            const SplitRow& row_of_lane, smem_t to) {
  constexpr int chunks = D / 8, rows_at_once = warp_size / chunks;
  std::int64_t offset = -1;
  if (lane_of_thread() < 16 && row_of_lane.entry >= 0)
    offset = row_offset(problem.query, sequence, sequence.q_begin, row_of_lane.head,
                        row_of(plan, sequence, row_of_lane.entry));
  const int chunk = lane_of_thread() % chunks;
#pragma unroll
  for (int r = 0; r < 16; r += rows_at_once) {
    const int row = r + lane_of_thread() / chunks;
    const std::int64_t from = prim::shfl(offset, row);
    prim::cp_async<16>(chunk_address<D>(to, row, chunk),
                       static_cast<const unsigned char*>(problem.query.data) + (from >= 0 ? 2 * from : 0) + 16 * chunk,
                       from >= 0 && 8 * chunk < problem.head_dim);
  }
  prim::cp_async_commit();
  prim::cp_async_wait<0>();
  prim::syncwarp();
}

// What a lane's two rows of the accumulators are in a group.
struct SplitPairs {
  std::int32_t row[2];
  std::int64_t head[2];
  Interval seen[2];
  bool drops[2];
};

// Products become scores; of pairs that are not seen, -inf.
template <int N>
PRIM void shape_pairs(float (&s)[N][4], const Problem& problem, const Sequence& sequence, const SplitPairs& pairs,
                      const std::int32_t* positions, std::int32_t first) {
  const bool shaped = problem.shapes_scores(), masked = problem.attn_mask.data;
  const float scale_log2 = static_cast<float>(problem.scale * log2_e);
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const PairScores<float> scores(problem, sequence, pairs.head[h]);
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float& x = s[n][2 * h + e];
        const std::int32_t entry = first + 8 * n + fragment_column() + e;
        const bool seen = entry >= pairs.seen[h].begin && entry < pairs.seen[h].end;
        float slope;
        if (!shaped) x *= scale_log2;
        if (!seen) x = -infinity<float>();
        else if (shaped) x = scores.score(x, pairs.row[h], position_at(positions, entry), slope);
        else if (masked && !scores.visible(pairs.row[h], position_at(positions, entry))) x = -infinity<float>();
      }
  }
}

template <int N>
PRIM void drop_pairs(float (&p)[N][4], const Problem& problem, const Sequence& sequence, const SplitPairs& pairs,
                     const std::int32_t* positions, std::int32_t first) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const PairDropout dropout(problem, sequence, pairs.head[h]);
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const std::int32_t entry = first + 8 * n + fragment_column() + e;
        if (pairs.drops[h] && entry >= pairs.seen[h].begin && entry < pairs.seen[h].end &&
            dropout.factor_of(pairs.row[h], position_at(positions, entry)) == 0.0f)
          p[n][2 * h + e] = 0.0f;
      }
  }
}

// What all rows of the lanes see together.
PRIM Interval hull_of_lanes(Interval x) {
#pragma unroll
  for (int step = 1; step < warp_size; step *= 2)
    x = hull(x, Interval{prim::shfl_xor(x.begin, step), prim::shfl_xor(x.end, step)});
  return x;
}

// Part `split` of `splits` equal ones of an interval, in whole steps.
PRIM Interval part_of(Interval whole, std::int32_t split, std::int32_t splits, std::int32_t step) {
  const std::int32_t size = whole.end > whole.begin ? whole.end - whole.begin : 0;
  const std::int32_t steps = (size + step - 1) / step, share = (steps + splits - 1) / splits;
  const std::int64_t begin = std::int64_t{split} * share * step, end = begin + std::int64_t{share} * step;
  return {whole.begin + static_cast<std::int32_t>(begin < size ? begin : size),
          whole.begin + static_cast<std::int32_t>(end < size ? end : size)};
}

// ---- the kernels -------------------------------------------------------------------------------------------------

template <class T, int D>
__global__ void __launch_bounds__(SplitTile<D>::threads, 2)
    split_forward_kernel(const __grid_constant__ Problem problem, const __grid_constant__ DevicePlan plan,
                         const __grid_constant__ SplitFacts facts) {
  using Shared = SplitTile<D>;
  constexpr int keys = Shared::keys;
  // Fastest first: what reads the same keys (tiles of heads, tiles of entries), KV heads, splits.
  const std::uint32_t head_tile = blockIdx.x % facts.head_tiles, a = blockIdx.x / facts.head_tiles;
  const std::uint32_t tile_index = a % facts.tiles, b = a / facts.tiles;
  const auto kv_head = static_cast<std::int32_t>(b % problem.kv_heads),
             split = static_cast<std::int32_t>(b / problem.kv_heads);
  const Tile tile = tile_of(problem, plan, tile_index, facts.entries, false);
  if (tile.count <= 0) return;
  const Sequence& sequence = tile.sequence;
  const int warp = warp_of_thread(), lane = lane_of_thread();
  const auto row_at = [&](int r) { return row_of_tile(problem, facts, tile, kv_head, head_tile, r); };

  const smem_t ring_at = warp * Shared::warp_bytes, queries_at = ring_at + Shared::queries;
  copy_tile_queries<D>(problem, plan, sequence, row_at(lane % 16), queries_at);
  HeldQueries<D, 1, Shared::holds_queries> held;
  if constexpr (Shared::holds_queries) held.load(queries_at);
  prim::syncwarp();

#pragma unroll 1
  for (int group = 0; group < problem.groups(); ++group) {
    const auto range_of = [&](int r) {
      const std::int32_t entry = row_at(r).entry;
      return entry >= 0 ? entry_range(problem, plan, sequence, entry, group) : Interval{0, 0};
    };
    const Interval part = part_of(hull_of_lanes(range_of(lane % 16)), split, facts.splits, Shared::warps * keys);
    const std::int32_t* positions = list_positions(plan, sequence, group);
    typename Shared::Ring ring(ring_at);
    ring.start(row_source(problem.key, sequence, sequence.k_begin, kv_head, problem.head_dim),
               row_source(problem.value, sequence, sequence.k_begin, kv_head, problem.value_dim), positions,
               part.begin + warp * keys, Shared::warps * keys, part);
    SplitPairs pairs;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const SplitRow row = row_at(fragment_row(h));
      pairs.row[h] = row.entry >= 0 ? row_of(plan, sequence, row.entry) : 0;
      pairs.head[h] = row.entry >= 0 ? row.head : 0;
      pairs.seen[h] = range_of(fragment_row(h));
      pairs.drops[h] =
          row.entry >= 0 && problem.dropout.threshold > 0 && !(group == 1 && is_self_entry(plan, sequence, row.entry));
    }

    Accumulator<1, D / 8> out;
    RunningSoftmax<1> softmax;
    clear(out), clear(softmax);
#pragma unroll 1
    while (ring.entry() < part.end) {
      const std::int32_t first = ring.entry();
      Accumulator<1, keys / 8> s;
      clear(s);
      const smem_t key_tile = ring.take();
      prim::syncwarp();
      ring.follow_keys();
      const LanePlace<D> keys_place = chunks_first<D>(key_tile).fresh();
      if constexpr (Shared::holds_queries) held.template multiply<T>(s, keys_place);
      else multiply_transposed<T>(s, rows_first<D>(queries_at).fresh(), keys_place);

      shape_pairs(s[0], problem, sequence, pairs, positions, first);
      float factor[1][2];
      soften<false>(s, softmax, factor, facts.unit);
      if (problem.dropout.threshold > 0) drop_pairs(s[0], problem, sequence, pairs, positions, first);
      rescale(out, factor, softmax);
      const smem_t value_tile = ring.take();
      prim::syncwarp();
      ring.follow_values();
      multiply_rounded<T>(out, s, rows_first<D>(value_tile).fresh());
    }

    // The warps' sums become the block's: each brings its own to the largest m, then every thread adds up columns. No
    // copy is under way any more: whatever was begun has been taken.
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      softmax.sum[0][h] = quad_sum(softmax.sum[0][h]);
      if (lane % 4 == 0)
        prim::st_shared(Shared::softmax(warp, fragment_row(h)), float2{softmax.top[0][h], softmax.sum[0][h]});
    }
    prim::syncthreads();               // the rings are free, too
    const auto whole = [&](int row) {  // (m, l) of the block
      float2 all{-infinity<float>(), 0.0f};
      for (int w = 0; w < Shared::warps; ++w) all.x = fmaxf(all.x, prim::ld_shared<float2>(Shared::softmax(w, row)).x);
      all.x = all.x == -infinity<float>() ? 0.0f : all.x;
      for (int w = 0; w < Shared::warps; ++w) {
        const float2 x = prim::ld_shared<float2>(Shared::softmax(w, row));
        all.y += x.y * prim::exp2_approx((x.x - all.x) * facts.unit);
      }
      return all;
    };
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float scaled = prim::exp2_approx((softmax.top[0][h] - whole(fragment_row(h)).x) * facts.unit);
#pragma unroll
      for (int n = 0; n < D / 8; ++n)
        prim::st_shared(Shared::sum(warp, fragment_row(h)) + 4 * (8 * n + fragment_column()),
                        float2{scaled * out[0][n][2 * h], scaled * out[0][n][2 * h + 1]});
    }
    prim::syncthreads();
    for (int r = warp; r < Shared::rows; r += Shared::warps) {
      const SplitRow row = row_at(r);
      if (row.entry < 0) continue;
      const float2 all = whole(r);
      const std::int64_t at = split_row(problem, facts, group, split, row.head, sequence.q_token + row.entry);
      if (lane == 0) prim::st_global(facts.softmax + at, all);
      if (all.y == 0.0f) continue;
      for (int c = lane; c < problem.value_dim; c += warp_size) {
        float x = 0.0f;
        for (int w = 0; w < Shared::warps; ++w) x += prim::ld_shared<float>(Shared::sum(w, r) + 4 * c);
        prim::st_global(facts.out + at * problem.value_dim + c, x);
      }
    }
    prim::syncthreads();  // what lies where the rings begin has been read
  }
}

constexpr int merge_threads = 128, most_splits = 256;

// Shared memory of merge_splits_kernel: the splits' weights [group][split], negative where a split saw nothing; a
// number of each warp.
constexpr smem_t split_weights = 0, warp_numbers = 2 * most_splits * sizeof(float),
                 merge_bytes = warp_numbers + merge_threads / warp_size * sizeof(float);

template <class Combine>
PRIM float over_block(float x, Combine combine) {
#pragma unroll
  for (int step = 1; step < warp_size; step *= 2) x = combine(x, prim::shfl_xor(x, step));
  if (lane_of_thread() == 0) prim::st_shared(warp_numbers + 4 * warp_of_thread(), x);
  prim::syncthreads();
  x = prim::ld_shared<float>(warp_numbers);
#pragma unroll
  for (int w = 1; w < merge_threads / warp_size; ++w) x = combine(x, prim::ld_shared<float>(warp_numbers + 4 * w));
  prim::syncthreads();
  return x;
}

// (m, l) of a row, and what each split's O counts in O / l: a thread looks at every merge_threads-th split.
PRIM float2 merge_softmaxes(const Problem& problem, const SplitFacts& facts, int group, std::int64_t head,
                            std::int64_t token, float factor) {
  const auto part = [&](int s) { return ld_global(facts.softmax + split_row(problem, facts, group, s, head, token)); };
  const auto weight_at = [&](int s) { return split_weights + static_cast<smem_t>(4 * (group * most_splits + s)); };
  float top = -infinity<float>(), sum = 0.0f;
  for (int s = static_cast<int>(threadIdx.x); s < facts.splits; s += merge_threads) {
    const float2 p = part(s);
    if (p.y != 0.0f) top = fmaxf(top, p.x);
  }
  top = over_block(top, [](float a, float b) { return fmaxf(a, b); });
  if (top == -infinity<float>()) top = 0.0f;
  const auto share = [&](float2 p) { return prim::exp2_approx((p.x - top) * facts.unit); };
  for (int s = static_cast<int>(threadIdx.x); s < facts.splits; s += merge_threads) {
    const float2 p = part(s);
    if (p.y != 0.0f) sum += p.y * share(p);
  }
  sum = over_block(sum, [](float a, float b) { return a + b; });
  for (int s = static_cast<int>(threadIdx.x); s < facts.splits; s += merge_threads) {
    const float2 p = part(s);
    prim::st_shared(weight_at(s), p.y != 0.0f ? share(p) * (factor / sum) : -1.0f);
  }
  prim::syncthreads();
  return {top, sum};
}

// A block makes one row: of one entry and query head.
template <class T>
__global__ void __launch_bounds__(merge_threads, 4)
    merge_splits_kernel(const __grid_constant__ Problem problem, const __grid_constant__ DevicePlan plan,
                        const __grid_constant__ SplitFacts facts) {
  const auto tokens = static_cast<std::uint32_t>(facts.tokens);
  const std::int64_t head = blockIdx.x / tokens;
  const Tile tile = tile_of(problem, plan, blockIdx.x % tokens, 1, false);
  if (tile.count <= 0) return;
  const Sequence& sequence = tile.sequence;
  const std::int32_t entry = tile.first, row = row_of(plan, sequence, entry);
  const std::int64_t value_dim = problem.value_dim, token = sequence.q_token + entry;
  const bool merges = problem.groups() == 2 && problem.merge != Merge::none;

  float2 all[2]{};
#pragma unroll
  for (int group = 0; group < 2; ++group) {
    if (group == problem.groups()) break;
    const float factor = dropout_factor(problem, plan, sequence, group, entry);
    all[group] = merge_softmaxes(problem, facts, group, head, token, factor);
    if (threadIdx.x == 0) store_lse<float>(problem, sequence, group, head, row, all[group].x, all[group].y);
  }
  float weight[2]{1.0f, 1.0f};
  if (merges) merge_weights(problem, sequence, head, row, all[0], all[1], weight);

  const auto column = [&](int group, int c) {  // of O_r
    float sum = 0.0f;
#pragma unroll 8
    for (int s = 0; s < facts.splits; ++s) {  // nothing here waits for what an earlier step loads
      const float w = prim::ld_shared<float>(split_weights + 4 * (group * most_splits + s));
      if (!(w < 0.0f))
        sum += w * ld_global(facts.out + split_row(problem, facts, group, s, head, token) * value_dim + c);
    }
    return sum;
  };
  for (int c = static_cast<int>(threadIdx.x); c < value_dim; c += merge_threads) {
    float merged = 0.0f;
#pragma unroll
    for (int group = 0; group < 2; ++group) {
      if (group == problem.groups()) break;
      const float x = column(group, c);
      if (merges && problem.group_out.data)
        prim::st_global(statistic<float>(problem.group_out, sequence, group, head, row) + c, x);
      merged = merges ? merged + weighted(weight[group], x) : x;
      if (merges && group == 0) continue;
      std::uint16_t* const out = static_cast<std::uint16_t*>(problem.out.data) +
                                 (merges ? 0 : group) * problem.out.group +
                                 row_offset(problem.out, sequence, sequence.q_begin, head, row);
      prim::st_global(out + c * problem.out.feature, static_cast<std::uint16_t>(prim::pack2<T>(merged, 0.0f)));
    }
  }
}

// ---- host --------------------------------------------------------------------------------------------------------

// The fewest parts of the keys whose blocks come within a tenth of the best use of whole waves; each part is worth
// starting a block for.
inline std::int32_t choose_splits(std::int64_t blocks, std::int64_t keys, int multiprocessors) {
  constexpr std::int64_t least_keys = 128, most = most_splits;
  const std::int64_t slots = 2 * std::max(multiprocessors, 1),
                     limit = std::clamp(keys / least_keys, std::int64_t{1}, most);
  const auto use = [&](std::int64_t splits) {
    const std::int64_t n = blocks * splits;
    return static_cast<double>(n) / static_cast<double>((n + slots - 1) / slots * slots);
  };
  double best = 0.0;
  for (std::int64_t splits = 1; splits <= limit; ++splits) best = std::max(best, use(splits));
  std::int64_t splits = 1;
  while (use(splits) < 0.9 * best) ++splits;
  return static_cast<std::int32_t>(splits);
}

template <class T, int D>
void start_split_forward(const Launch& launch, const SplitFacts& facts) {
  const Problem& p = launch.problem;
  launch(&split_forward_kernel<T, D>, p.kv_heads * facts.tiles * facts.head_tiles * facts.splits, SplitTile<D>::threads,
         SplitTile<D>::bytes, p, launch.plan, facts);
}

template <class T>
void split_forward(const Launch& launch) {
  const Problem& p = launch.problem;
  if (p.q_len == 0 || p.batch == 0) return;
  const auto heads_per_kv = static_cast<std::int32_t>(p.heads_per_kv());
  SplitFacts facts{};
  facts.heads = std::min(heads_per_kv, 16), facts.entries = 16 / facts.heads;
  facts.head_tiles = (heads_per_kv + facts.heads - 1) / facts.heads;
  facts.tiles = static_cast<std::int32_t>(tile_count(p, launch.plan, facts.entries, false));
  const std::int64_t keys = p.k_offsets ? p.k_len / p.batch : p.k_len;
  facts.splits = choose_splits(p.kv_heads * facts.tiles * facts.head_tiles, keys, launch.device.multiprocessors);
  facts.tokens = static_cast<std::int32_t>(tile_count(p, launch.plan, 1, false));
  facts.unit = p.shapes_scores() ? static_cast<float>(log2_e) : 1.0f;
  const std::int64_t rows = p.groups() * facts.splits * p.q_heads * query_tokens(p);
  facts.softmax = launch.take<float2>(rows), facts.out = launch.take<float>(rows * p.value_dim);

  const std::int64_t dim = std::max(p.head_dim, p.value_dim);
  if (dim <= 64) start_split_forward<T, 64>(launch, facts);
  else if (dim <= 128) start_split_forward<T, 128>(launch, facts);
  else start_split_forward<T, 256>(launch, facts);
  launch(&merge_splits_kernel<T>, facts.tokens * p.q_heads, merge_threads, merge_bytes, p, launch.plan, facts);
}

}  // namespace mmca::cuda::sm80
