// Forward of attention over key groups in 16 bits: a block owns a tile of rows of one query head and goes through the
// tiles of keys that any of them sees, group by group, with a running softmax. For products t of the rows with a tile
// of keys, c = scale log2(e), the largest product so far m and the sum l:
//
//     m' = max(m, max t),   p = exp2(c t - c m'),   f = exp2(c m - c m'),   l = f l + sum p,   O = f O + p V
//
// p is rounded to 16 bits for the product with V, all else is fp32. After a group, O_r = O / l and lse_r = c m + log2
// l. With two groups to be merged, O_0 waits in `first_out` until O_1 is there.
//
// Four warps, each with 16 or 32 of the rows: two m16 tiles share every fragment of keys and values. Shared memory: the
// tile of queries, the ring of keys and values (key_ring.cuh), the rows' ranges. A warp's output goes through the ring
// on its way to whole 16-byte stores.
//
// General kernels have a softcap, a bias, a mask, dropout or a scale that is not positive: there p = exp2(u (s - m)) of
// scores s, natural (u = log2(e)) or exponents of 2 (u = 1), and tiles are half as large.
#pragma once

#include <algorithm>
#include <cmath>

#include "cuda/row_results.cuh"
#include "cuda/sm80/forward_kernels.h"
#include "cuda/sm80/key_ring.cuh"
#include "cuda/sm80/pairs.cuh"
#include "cuda/sm80/row_stores.cuh"

namespace mmca::cuda::sm80 {

// What the kernel needs beside the problem.
struct ForwardFacts {
  std::int32_t tiles;     // of rows, over all sequences
  float unit;             // what turns a difference of scores into an exponent of 2; of products: c
  GroupOut group_out;     // of group 0 until the merge, and of both groups where Problem::group_out is wanted
  float2* first_softmax;  // (m, l) of group 0, [query head][query token]: Merge::lse alone
  bool aligned_out;       // see store_out
};

PRIM constexpr std::int64_t query_tokens(const Problem& problem) {
  return problem.q_offsets ? problem.q_len : problem.batch * problem.q_len;
}

template <int M>
struct RunningSoftmax {
  float top[M][2], sum[M][2];  // m, and this lane's part of l
};

// p of scores in their place, and the factor of what was summed up before. Unit: what turns a difference of scores into
// an exponent of 2. Products are positive multiples of scores: c (t - m) in one operation.
template <bool Products, int M, int N>
PRIM void soften(Accumulator<M, N>& s, RunningSoftmax<M>& softmax, float (&factor)[M][2], float unit) {
#pragma unroll
  for (int m = 0; m < M; ++m)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float top = softmax.top[m][h];
#pragma unroll
      for (int n = 0; n < N; ++n) top = fmaxf(top, fmaxf(s[m][n][2 * h], s[m][n][2 * h + 1]));
      top = quad_max(top);
      const float reference = top == -infinity<float>() ? 0.0f : top, shift = -reference * unit;
      const auto weight = [&](float x) {
        return prim::exp2_approx(Products ? fmaf(x, unit, shift) : (x - reference) * unit);
      };
      factor[m][h] = weight(softmax.top[m][h]);
#pragma unroll
      for (int n = 0; n < N; ++n)
        s[m][n][2 * h] = weight(s[m][n][2 * h]), s[m][n][2 * h + 1] = weight(s[m][n][2 * h + 1]);
      softmax.sum[m][h] *= factor[m][h];
      softmax.top[m][h] = top;
    }
}

// l += the weights of columns 8 n .. 8 n + 15.
template <int M, int N>
PRIM void sum_up(RunningSoftmax<M>& softmax, const Accumulator<M, N>& p, int n) {
#pragma unroll
  for (int m = 0; m < M; ++m)
#pragma unroll
    for (int h = 0; h < 2; ++h)
      softmax.sum[m][h] +=
          p[m][n][2 * h] + p[m][n][2 * h + 1] + (p[m][n + 1][2 * h] + p[m][n + 1][2 * h + 1]);
}

template <int M>
PRIM void clear(RunningSoftmax<M>& softmax) {
#pragma unroll
  for (int m = 0; m < M; ++m)
#pragma unroll
    for (int h = 0; h < 2; ++h) softmax.top[m][h] = -infinity<float>(), softmax.sum[m][h] = 0.0f;
}

template <int M, int N>
PRIM void scale_rows(Accumulator<M, N>& d, const float (&factor)[M][2]) {
  bool same = true;
#pragma unroll
  for (int m = 0; m < M; ++m) same = same && factor[m][0] == 1.0f && factor[m][1] == 1.0f;
  if (!prim::any_lane(!same)) return;
#pragma unroll
  for (int m = 0; m < M; ++m)
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) d[m][n][e] *= factor[m][e / 2];
}

// Scores of columns that a row does not see become -inf. `ranges`: of the warp's rows; `first`: the entry of column 0.
template <int M, int N>
PRIM void hide(Accumulator<M, N>& s, smem_t ranges, std::int32_t first) {
#pragma unroll
  for (int m = 0; m < M; ++m)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = 16 * m + fragment_row(h);
      const auto range = prim::ld_shared<Interval>(ranges + static_cast<smem_t>(row * sizeof(Interval)));
      const auto place = static_cast<std::uint32_t>(first + fragment_column() - range.begin);
      const auto size = static_cast<std::uint32_t>(range.end > range.begin ? range.end - range.begin : 0);
#pragma unroll
      for (int n = 0; n < N; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e)
          if (place + (8 * n + e) >= size) s[m][n][2 * h + e] = -infinity<float>();
    }
}

// What a warp's rows see of a list: entries that one of them sees, entries that all see.
struct WarpView {
  Interval any, all;
};

// A warp's rows in shared memory, for `hide`: the range of each and, last, what they see together.
template <int Rows>
constexpr smem_t ranges_bytes = Rows * sizeof(Interval) + sizeof(WarpView);

template <int Rows>
PRIM WarpView load_view(smem_t ranges) {
  const int4 v = prim::ld_shared<int4>(ranges + static_cast<smem_t>(Rows * sizeof(Interval)));
  return {{v.x, v.y}, {v.z, v.w}};
}

// `entry`: of lane r's row r, negative where there is none.
template <int Rows>
PRIM void store_ranges(const Problem& problem, const DevicePlan& plan, const Sequence& sequence, int group,
                       std::int32_t entry, smem_t ranges) {
  constexpr std::int32_t largest = 0x7fffffff;
  Interval range{0, 0}, any{largest, 0}, all{0, largest};
  if (entry >= 0) {
    range = entry_range(problem, plan, sequence, entry, group);
    if (range.begin < range.end) any = range;
    all = range;
  }
  const int lane = lane_of_thread();
  if (lane < Rows) prim::st_shared(ranges + static_cast<smem_t>(lane * sizeof(Interval)), range);
#pragma unroll
  for (int step = 1; step < warp_size; step *= 2) {
    any.begin = min(any.begin, prim::shfl_xor(any.begin, step)), any.end = max(any.end, prim::shfl_xor(any.end, step));
    all.begin = max(all.begin, prim::shfl_xor(all.begin, step)), all.end = min(all.end, prim::shfl_xor(all.end, step));
  }
  if (lane == 0)
    prim::st_shared(ranges + static_cast<smem_t>(Rows * sizeof(Interval)),
                    int4{any.begin, any.end, all.begin, all.end});
  prim::syncwarp();
}

template <int D, bool General>
struct ForwardTile {
  static constexpr int warps = 4, threads = warps * warp_size;
  static constexpr int m_tiles = General || D == 256 ? 1 : 2;  // of a warp
  static constexpr int warp_rows = 16 * m_tiles, rows = warps * warp_rows;
  static constexpr int keys = 64, buffers = D == 256 ? 2 : 3;
  using Ring = KeyRing<D, keys, warps, buffers>;

  static constexpr smem_t queries = 0, ring = rows * row_bytes<D>(), ranges = ring + Ring::bytes;
  static constexpr smem_t note = ranges + warps * ranges_bytes<warp_rows>, group_note = note + sizeof(int4), shared_bytes = group_note + sizeof(int);
  static_assert(warp_rows <= warp_size && rows % plan_tile == 0);
  static_assert(rows * row_bytes<D>() <= Ring::buffers_bytes, "the output fits into the ring");
};

PRIM float score_unit(const Problem& problem) { return problem.shapes_scores() ? static_cast<float>(log2_e) : 1.0f; }
PRIM std::int64_t token_index(const Problem& problem, const Sequence& sequence, std::int64_t head, std::int32_t row) {
  return head * query_tokens(problem) + sequence.q_token + row;
}

// The groups' outputs of the row that a lane looks after have these weights. `softmax`: (m, l) of this group.
PRIM void merge_weights(const Problem& problem, const ForwardFacts& facts, const Sequence& sequence, std::int64_t head,
                        std::int32_t row, float2 softmax, float (&weight)[2]) {
  weight[0] = weight[1] = 1.0f;
  if (row < 0) return;
  if (problem.merge == Merge::gate) {
    weight[0] = ld_global(statistic<float>(problem.gate, sequence, 0, head, row));
    weight[1] = ld_global(statistic<float>(problem.gate, sequence, 1, head, row));
  } else if (problem.merge == Merge::lse) {
    const float2 first = ld_global(facts.first_softmax + token_index(problem, sequence, head, row));
    joint_weights(first, softmax, score_unit(problem), weight);
  }
}

// What a block works on; its warps' rows.
struct ForwardBlock {
  Tile tile;
  std::int64_t head;

  // A row of the tile as an entry, and as a row; negative where there is none.
  PRIM std::int32_t entry(int row) const { return row < tile.count ? tile.first + row : -1; }
  PRIM std::int32_t row(const DevicePlan& plan, int r) const {
    const std::int32_t e = entry(r);
    return e >= 0 ? row_of(plan, tile.sequence, e) : -1;
  }
};

// Slowest first: KV heads, tiles from the last (of a causal problem the longest), the query heads of a KV head.
PRIM int4 note_of_block(const Problem& problem, const DevicePlan& plan, const ForwardFacts& facts, int rows) {
  const auto heads = static_cast<std::uint32_t>(problem.heads_per_kv()), at = blockIdx.x / heads;
  const std::uint32_t kv_head = at / facts.tiles, head = kv_head * heads + blockIdx.x % heads;
  const Tile tile = tile_of(problem, plan, facts.tiles - 1 - at % facts.tiles, rows, false);
  return {tile.sequence.index, tile.first, tile.count, static_cast<std::int32_t>(head)};
}
PRIM ForwardBlock noted_block(const Problem& problem, const DevicePlan& plan, int4 note) {
  return {{sequence_at(problem, plan, note.x), note.y, note.z}, note.w};
}

// Begins to copy a warp's rows, from `row` of the tile on.
template <int D, int Rows>
PRIM void copy_queries(const Problem& problem, const DevicePlan& plan, const ForwardBlock& block, int row, smem_t to) {
  const Sequence& sequence = block.tile.sequence;
  const RowSource source = row_source(problem.query, sequence, sequence.q_begin, block.head, problem.head_dim);
  copy_rows<D, Rows>(to, source, lane_of_thread() < Rows ? block.row(plan, row + lane_of_thread()) : -1);
}

// What makes up for the weights that dropout took.
PRIM float dropout_factor(const Problem& problem, const DevicePlan& plan, const Sequence& sequence, int group,
                          std::int32_t entry) {
  const PairDropout dropout(problem, sequence, 0);
  const bool drops = dropout.any() && !(group == 1 && is_self_entry(plan, sequence, entry));
  return drops ? dropout.kept() : 1.0f;
}

// O_r and lse_r of a group that is done: to where they are wanted, or, of the last group, merged with the other's.
// `row`: the warp's first in the tile. `staging`: shared memory of the warp alone, for its rows.
template <class T, int D, bool General, int M>
PRIM void finish_group(const Problem& problem, const DevicePlan& plan, const ForwardFacts& facts,
                       const ForwardBlock& block, int group, int row, Accumulator<M, D / 8>& out,
                       const RunningSoftmax<M>& softmax, smem_t staging) {
  const Sequence& sequence = block.tile.sequence;
  const std::int64_t head = block.head, value_dim = problem.value_dim;

  // Of the row that the lane looks after: (m, l), as store_lse wants them.
  float2 own{0.0f, 0.0f};
#pragma unroll
  for (int m = 0; m < M; ++m)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float sum = quad_sum(softmax.sum[m][h]), top = softmax.top[m][h];
      if (lane_of_thread() % 4 == 2 * m + h)
        own = {top == -infinity<float>() ? 0.0f : General ? top : top * facts.unit, sum};
    }
  const bool looks_after = row_looked_after() < 16 * M;
  const std::int32_t own_entry = looks_after ? block.entry(row + row_looked_after()) : -1;
  const std::int32_t own_row = own_entry >= 0 ? row_of(plan, sequence, own_entry) : -1;
  float factor = own.y == 0.0f ? 0.0f : 1.0f / own.y;
  if (own_row >= 0) {
    store_lse<float>(problem, sequence, group, head, own_row, own.x, own.y);
    if (General) factor *= dropout_factor(problem, plan, sequence, group, own_entry);
  }
  multiply_rows_of_lanes(out, factor);

  const bool merges = problem.groups() == 2 && problem.merge != Merge::none;
  if (merges) {
    if (group == 0 || problem.group_out.data)
      store_group_out(out, facts.group_out, sequence, group, head, own_row, value_dim);
    if (group == 0) {
      if (problem.merge == Merge::lse && own_row >= 0)
        prim::st_global(facts.first_softmax + token_index(problem, sequence, head, own_row), own);
      return;
    }
    float weight[2];
    merge_weights(problem, facts, sequence, head, own_row, own, weight);
    multiply_rows_of_lanes(out, weight[1]);
    add_group_out(out, facts.group_out, sequence, 0, head, own_row, value_dim, weight[0]);
  }
  store_out<T, D>(out, staging, problem.out, sequence, merges ? 0 : group, head, own_row, value_dim, facts.aligned_out);
}

template <class T, int D, bool General>
__global__ void __launch_bounds__(ForwardTile<D, General>::threads, (D == 64 && !General ? 3 : 2))
    tiled_forward_kernel(const __grid_constant__ Problem problem, const __grid_constant__ DevicePlan plan,
                         const __grid_constant__ ForwardFacts facts) {
  using Shape = ForwardTile<D, General>;
  using Ring = typename Shape::Ring;
  constexpr int M = Shape::m_tiles, keys = Shape::keys;
  const auto row = [] { return warp_of_thread() * Shape::warp_rows; };  // the warp's first
  const auto queries = [&] { return Shape::queries + row() * row_bytes<D>(); };
  const auto ranges = [] { return Shape::ranges + warp_of_thread() * ranges_bytes<Shape::warp_rows>; };

  // What only the ends of a group ask for is kept out of registers.
  if (threadIdx.x == 0) prim::st_shared(Shape::note, note_of_block(problem, plan, facts, Shape::rows));
  prim::syncthreads();
  const auto block = [&] { return noted_block(problem, plan, prim::ld_shared<int4>(Shape::note)); };
  if (block().tile.count <= 0) return;
  copy_queries<D, Shape::warp_rows>(problem, plan, block(), row(), queries());

  const int groups = problem.groups();
#pragma unroll 1
  for (int group = 0; group < groups; ++group) {
    if (threadIdx.x == 0) prim::st_shared(Shape::group_note, group);
    const ForwardBlock here = block();
    const Sequence& sequence = here.tile.sequence;
    const Interval hull = entries_hull(problem, plan, sequence, here.tile.first, here.tile.count, group);
    const std::int64_t kv_head = here.head / problem.heads_per_kv();
    Ring ring(Shape::ring);
    ring.start(row_source(problem.key, sequence, sequence.k_begin, kv_head, problem.head_dim),
               row_source(problem.value, sequence, sequence.k_begin, kv_head, problem.value_dim),
               list_positions(plan, sequence, group), hull.begin & ~7 /* a block of Philox */, keys, hull);
    const std::int32_t entry = lane_of_thread() < Shape::warp_rows ? here.entry(row() + lane_of_thread()) : -1;
    store_ranges<Shape::warp_rows>(problem, plan, sequence, group, entry, ranges());
    PairTerms terms(problem, plan, sequence, group, here.head);  // General kernels'
#pragma unroll
    for (int h = 0; h < 2; ++h)
      if (General) terms.set_row(problem, plan, sequence, group, h, here.entry(row() + fragment_row(h)));

    Accumulator<M, D / 8> out;
    RunningSoftmax<M> softmax;
    clear(out), clear(softmax);
#pragma unroll 1
    for (; ring.entry() < hull.end;) {
      const std::int32_t first = ring.entry();
      const WarpView view = load_view<Shape::warp_rows>(ranges());
      const bool takes_part = first < view.any.end && first + keys > view.any.begin;
      const bool whole = first >= view.all.begin && first + keys <= view.all.end;
      Accumulator<M, keys / 8> s;
      clear(s);

      const smem_t key_tile = ring.take();
      prim::syncthreads();
      ring.follow_keys(problem);
      if (takes_part) multiply_transposed<T>(s, rows_first<D>(queries()).fresh(), chunks_first<D>(key_tile).fresh());

      const smem_t value_tile = ring.take();
      prim::syncthreads();
      ring.follow_values(problem);
      if (!takes_part) continue;

      float factor[M][2];
      if constexpr (General) {
        terms.shape(s[0], first);
        soften<false>(s, softmax, factor, facts.unit);
#pragma unroll
        for (int n = 0; n < keys / 8; n += 2) sum_up(softmax, s, n);
        terms.drop(s[0], first);
      } else {
        if (!whole) hide(s, ranges(), first);
        soften<true>(s, softmax, factor, facts.unit);
      }
      scale_rows(out, factor);
      const LanePlace<D> values = rows_first<D>(value_tile).fresh();
#pragma unroll
      for (int n = 0; n < keys / 8; n += 2) {
        if (!General) sum_up(softmax, s, n);  // here, lest the weights outlive their rounding
        std::uint32_t p[M][4];
#pragma unroll
        for (int m = 0; m < M; ++m) pack_a<T>(p[m], s[m][n], s[m][n + 1]);
        multiply_rows<T>(out, p, values, 8 * n);
      }
    }
    prim::cp_async_wait<0>();
    prim::syncthreads();  // the ring is free
    group = prim::ld_shared<int>(Shape::group_note);
    finish_group<T, D, General>(problem, plan, facts, block(), group, row(), out, softmax,
                                Shape::ring + row() * row_bytes<D>());
    prim::syncthreads();
  }
}

// ---- host --------------------------------------------------------------------------------------------------------

template <class T, int D, bool General>
void start_tiled_forward(const Launch& launch, ForwardFacts facts) {
  using Shape = ForwardTile<D, General>;
  const Problem& p = launch.problem;
  const std::int64_t tiles = tile_count(p, launch.plan, Shape::rows, false);
  facts.tiles = static_cast<std::int32_t>(tiles);
  launch(&tiled_forward_kernel<T, D, General>, tiles * p.q_heads, Shape::threads, Shape::shared_bytes, p, launch.plan,
         facts);
}

template <class T, bool General>
void start_tiled_forward(const Launch& launch, const ForwardFacts& facts) {
  const std::int64_t dim = std::max(launch.problem.head_dim, launch.problem.value_dim);
  if (dim <= 64) start_tiled_forward<T, 64, General>(launch, facts);
  else if (dim <= 128) start_tiled_forward<T, 128, General>(launch, facts);
  else start_tiled_forward<T, 256, General>(launch, facts);
}

template <class T>
void tiled_forward(const Launch& launch) {
  const Problem& p = launch.problem;
  ForwardFacts facts{};
  facts.aligned_out = has_aligned_rows(p.out, p.value_dim);
  if (p.groups() == 2 && p.merge != Merge::none) {
    facts.group_out = group_out_of(launch);
    if (p.merge == Merge::lse) facts.first_softmax = launch.take<float2>(query_tokens(p) * p.q_heads);
  }
  const auto scale_log2 = static_cast<float>(p.scale * log2_e);
  const bool general =
      p.shapes_scores() || p.attn_mask.data || p.dropout.threshold || !(scale_log2 > 0.0f) || std::isinf(scale_log2);
  facts.unit = !general ? scale_log2 : p.shapes_scores() ? static_cast<float>(log2_e) : 1.0f;
  if (general) start_tiled_forward<T, true>(launch, facts);
  else start_tiled_forward<T, false>(launch, facts);
}

}  // namespace mmca::cuda::sm80
