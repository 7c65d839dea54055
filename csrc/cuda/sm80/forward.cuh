// Forward of attention over key groups in 16 bits: a block owns a tile of rows of one query head and goes through the
// tiles of keys that any of them sees, group by group, with a running softmax. For products t of the rows with a tile
// of keys, c = scale log2(e), the largest product so far m and the sum l:
//
//     m' = max(m, max t),   p = exp2(c t - c m'),   f = exp2(c m - c m'),   l = f l + sum p,   O = f O + p V
//
// p is rounded to 16 bits for the product with V, all else is fp32. After a group, O_r = O / l and lse_r = c m + log2
// l. With two groups to be merged, O_0 waits in global memory until O_1 is there.
//
// Four warps, each with 16 or 32 of the rows: two m16 tiles share every fragment of keys and values. Shared memory: the
// tile of queries, the ring of keys and values (key_ring.cuh), and what is asked too rarely to deserve a register. The
// output goes through the ring on its way to whole 16-byte stores.
//
// General kernels have a softcap, a bias, a mask, dropout or a scale that is not positive: there p = exp2(u (s - m)) of
// scores s, natural (u = log2(e)) or exponents of 2 (u = 1).
#pragma once

#include <algorithm>
#include <cmath>

#include "cuda/row_results.cuh"
#include "cuda/sm80/forward_kernels.h"
#include "cuda/sm80/key_ring.cuh"
#include "cuda/sm80/pairs.cuh"
#include "cuda/sm80/row_stores.cuh"
#include "cuda/sm80/softmax.cuh"

namespace mmca::cuda::sm80 {

// What the entries of a tile see of a group's list (entry_range), for a kernel that asks seldom: in shared memory.
struct RangeNote {
  static constexpr smem_t bytes = 32;

  // An entry e sees [begin + e, end + e) as far as there are keys, or what `ranges` has at 2 e.
  PRIM static void store(smem_t at, const Problem& problem, const DevicePlan& plan, const Sequence& sequence,
                         int group) {
    constexpr std::int64_t unbounded = std::int64_t{1} << 40;
    const std::int64_t reach = std::int64_t{sequence.q_len} + sequence.k_len;
    const std::int64_t left = problem.window_left, right = problem.causal ? 0 : problem.window_right;
    const std::int64_t shift = sequence.k_len - sequence.q_len;
    const auto* ranges = reinterpret_cast<const int2*>(plan.ranges ? plan.ranges + sequence.q_token : nullptr);
    prim::st_shared(at, ranges ? ranges + group : nullptr);
    prim::st_shared(at + 8, left < 0 || left > reach ? -unbounded : shift - left);
    prim::st_shared(at + 16, right < 0 || right > reach ? unbounded : shift + right + 1);
    prim::st_shared(at + 24, sequence.k_len);
  }
  PRIM static Interval load(smem_t at, std::int32_t entry) {
    if (const auto* ranges = prim::ld_shared<const int2*>(at)) {
      const int2 range = ld_global(ranges + 2 * std::int64_t{entry});
      return {range.x, range.y};
    }
    const auto k_len = prim::ld_shared<std::int32_t>(at + 24);
    return {clamp_position(prim::ld_shared<std::int64_t>(at + 8) + entry, k_len),
            clamp_position(prim::ld_shared<std::int64_t>(at + 16) + entry, k_len)};
  }
};

template <int D, bool General>
struct ForwardTile {
  static constexpr int warps = 4, threads = warps * warp_size;
  static constexpr int m_tiles = General || D == 256 ? 1 : 2;  // of a warp
  static constexpr int warp_rows = 16 * m_tiles, rows = warps * warp_rows;
  static constexpr int keys = General && D == 256 ? 32 : 64, buffers = D == 256 ? 2 : 3;
  static constexpr bool holds_queries = D == 64 && !General;  // in registers
  using Ring = KeyRing<D, keys, warps, buffers>;

  // Shared memory.
  static constexpr smem_t queries = 0, ring = rows * row_bytes<D>(), views = ring + Ring::bytes;
  static constexpr smem_t block = views + warps * sizeof(int4), range = block + sizeof(int4);
  static constexpr smem_t group = range + RangeNote::bytes, unit = group + sizeof(int), bytes = unit + sizeof(float);

  static_assert(warp_rows <= warp_size && rows % plan_tile == 0);
  static_assert(rows * row_bytes<D>() <= Ring::buffers_bytes, "the output fits into the ring");
};

// What the kernel needs beside the problem.
struct ForwardFacts {
  std::int32_t tiles;     // of rows, over all sequences
  float unit;             // what turns a difference of scores into an exponent of 2; of products: c
  GroupOut group_out;     // of group 0 until the merge, and of both groups where Problem::group_out is wanted
  float2* first_softmax;  // (m, l) of group 0, [query head][query token]: Merge::lse alone
  bool aligned_out;       // see store_out
};

// ---- a block's work ----------------------------------------------------------------------------------------------

struct ForwardBlock {
  Tile tile;
  std::int64_t head;

  // A row of the tile as an entry, negative where there is none.
  PRIM std::int32_t entry(int row) const { return row < tile.count ? tile.first + row : -1; }
};

// Slowest first: KV heads, tiles from the last (of a causal problem the longest), the query heads of a KV head.
PRIM void store_block(const Problem& problem, const DevicePlan& plan, const ForwardFacts& facts, int rows, smem_t at) {
  const auto heads = static_cast<std::uint32_t>(problem.heads_per_kv()), index = blockIdx.x / heads;
  const std::uint32_t kv_head = index / facts.tiles, head = kv_head * heads + blockIdx.x % heads;
  const Tile tile = tile_of(problem, plan, facts.tiles - 1 - index % facts.tiles, rows, false);
  prim::st_shared(at, int4{tile.sequence.index, tile.first, tile.count, static_cast<std::int32_t>(head)});
}
PRIM ForwardBlock load_block(const Problem& problem, const DevicePlan& plan, smem_t at) {
  const int4 x = prim::ld_shared<int4>(at);
  return {{sequence_at(problem, plan, x.x), x.y, x.z}, x.w};
}

// Begins to copy a warp's rows of queries, from `row` of the tile on.
template <int D, int Rows>
PRIM void copy_queries(const Problem& problem, const DevicePlan& plan, const ForwardBlock& block, int row, smem_t to) {
  const Sequence& sequence = block.tile.sequence;
  const std::int32_t entry = lane_of_thread() < Rows ? block.entry(row + lane_of_thread()) : -1;
  copy_rows<D, Rows>(to, row_source(problem.query, sequence, sequence.q_begin, block.head, problem.head_dim),
                     entry >= 0 ? row_of(plan, sequence, entry) : -1);
}

// What a warp's rows see of a list: entries that one of them sees, entries that all see.
struct WarpView {
  Interval any, all;

  PRIM bool sees(std::int32_t first, int count) const { return first < any.end && first + count > any.begin; }
  PRIM bool sees_whole(std::int32_t first, int count) const { return first >= all.begin && first + count <= all.end; }
};
PRIM void store_view(const WarpView& v, smem_t at) {
  prim::st_shared(at, int4{v.any.begin, v.any.end, v.all.begin, v.all.end});
}
PRIM WarpView load_view(smem_t at) {
  const int4 v = prim::ld_shared<int4>(at);
  return {{v.x, v.y}, {v.z, v.w}};
}

// Lane r's row r < Rows is row + r of the tile.
template <int Rows>
PRIM WarpView view_of_warp(const Problem& problem, const DevicePlan& plan, const ForwardBlock& block, int group,
                           int row) {
  constexpr std::int32_t largest = 0x7fffffff;
  const std::int32_t entry = lane_of_thread() < Rows ? block.entry(row + lane_of_thread()) : -1;
  Interval any{largest, 0}, all{0, largest};
  if (entry >= 0) {
    all = entry_range(problem, plan, block.tile.sequence, entry, group);
    if (all.begin < all.end) any = all;
  }
#pragma unroll
  for (int step = 1; step < warp_size; step *= 2) {
    any.begin = min(any.begin, prim::shfl_xor(any.begin, step)), any.end = max(any.end, prim::shfl_xor(any.end, step));
    all.begin = max(all.begin, prim::shfl_xor(all.begin, step)), all.end = min(all.end, prim::shfl_xor(all.end, step));
  }
  return {any, all};
}

// Scores of columns that a row does not see become -inf. `row`: the warp's first; `first`: the list's entry of column
// 0.
template <int M, int N>
PRIM void hide(Accumulator<M, N>& s, smem_t range_note, smem_t block_note, int row, std::int32_t first) {
  const int4 block = prim::ld_shared<int4>(block_note);  // see store_block
#pragma unroll
  for (int m = 0; m < M; ++m)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int r = row + 16 * m + fragment_row(h);
      if (r >= block.z) continue;
      const Interval range = RangeNote::load(range_note, block.y + r);
      const auto place = static_cast<std::uint32_t>(first + fragment_column() - range.begin);
      const auto size = static_cast<std::uint32_t>(range.end > range.begin ? range.end - range.begin : 0);
#pragma unroll
      for (int n = 0; n < N; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e)
          if (place + (8 * n + e) >= size) s[m][n][2 * h + e] = -infinity<float>();
    }
}

// ---- the end of a group ------------------------------------------------------------------------------------------

PRIM float2* first_softmax_of(const Problem& problem, const ForwardFacts& facts, const ForwardBlock& block,
                              std::int32_t row) {
  return facts.first_softmax + block.head * query_tokens(problem) + block.tile.sequence.q_token + row;
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
  const std::int32_t own_entry = row_looked_after() < 16 * M ? block.entry(row + row_looked_after()) : -1;
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
        prim::st_global(first_softmax_of(problem, facts, block, own_row), own);
      return;
    }
    float weight[2]{1.0f, 1.0f};
    if (own_row >= 0) {
      float2 first{0.0f, 0.0f};
      if (problem.merge == Merge::lse) first = ld_global(first_softmax_of(problem, facts, block, own_row));
      merge_weights(problem, sequence, head, own_row, first, own, weight);
    }
    multiply_rows_of_lanes(out, weight[1]);
    add_group_out(out, facts.group_out, sequence, 0, head, own_row, value_dim, weight[0]);
  }
  store_out<T, D>(out, staging, problem.out, sequence, merges ? 0 : group, head, own_row, value_dim, facts.aligned_out);
}

// ---- the kernel --------------------------------------------------------------------------------------------------

template <class T, int D, bool General>
__global__ void __launch_bounds__(ForwardTile<D, General>::threads, 2)
    tiled_forward_kernel(const __grid_constant__ Problem problem, const __grid_constant__ DevicePlan plan,
                         const __grid_constant__ ForwardFacts facts) {
  using Shared = ForwardTile<D, General>;
  constexpr int M = Shared::m_tiles, keys = Shared::keys;
  if (threadIdx.x == 0) {
    store_block(problem, plan, facts, Shared::rows, Shared::block);
    prim::st_shared(Shared::unit, facts.unit);
  }
  prim::syncthreads();
  const auto block = [&] { return load_block(problem, plan, Shared::block); };
  if (block().tile.count <= 0) return;

  const auto row = [] { return warp_of_thread() * Shared::warp_rows; };  // the warp's first
  const auto queries = [&] { return Shared::queries + row() * row_bytes<D>(); };
  const auto view = [] { return Shared::views + warp_of_thread() * static_cast<smem_t>(sizeof(int4)); };
  copy_queries<D, Shared::warp_rows>(problem, plan, block(), row(), queries());
  prim::cp_async_commit();

#pragma unroll 1
  for (int group = 0; group < problem.groups(); ++group) {
    const ForwardBlock here = block();
    const Sequence& sequence = here.tile.sequence;
    const Interval hull = entries_hull(problem, plan, sequence, here.tile.first, here.tile.count, group);
    const std::int64_t kv_head = here.head / problem.heads_per_kv();
    if (threadIdx.x == 0) {
      prim::st_shared(Shared::group, group);
      RangeNote::store(Shared::range, problem, plan, sequence, group);
    }
    typename Shared::Ring ring(Shared::ring);
    ring.start(row_source(problem.key, sequence, sequence.k_begin, kv_head, problem.head_dim),
               row_source(problem.value, sequence, sequence.k_begin, kv_head, problem.value_dim),
               list_positions(plan, sequence, group), hull.begin & ~7 /* a block of Philox */, keys, hull);
    const WarpView seen = view_of_warp<Shared::warp_rows>(problem, plan, here, group, row());
    if (lane_of_thread() == 0) store_view(seen, view());
    prim::syncwarp();
    PairTerms terms(problem, plan, sequence, group, here.head);  // General kernels'
#pragma unroll
    for (int h = 0; h < 2; ++h)
      if (General) terms.set_row(problem, plan, sequence, group, h, here.entry(row() + fragment_row(h)));

    HeldQueries<D, M, Shared::holds_queries> held;
    if constexpr (Shared::holds_queries) {
      prim::cp_async_wait<Shared::buffers - 1>();  // all but the ring's
      prim::syncwarp();
      held.load(queries());
    }

    Accumulator<M, D / 8> out;
    RunningSoftmax<M> softmax;
    clear(out), clear(softmax);
#pragma unroll 1
    for (bool more = hull.begin < hull.end; more; more = ring.more()) {
      const std::int32_t first = ring.entry();
      const bool takes_part = load_view(view()).sees(first, keys), whole = load_view(view()).sees_whole(first, keys);
      Accumulator<M, keys / 8> s;

      const smem_t key_tile = ring.take();
      prim::syncthreads();
      ring.follow_keys();
      if (takes_part) {
        clear(s);
        const LanePlace<D> keys_place = chunks_first<D>(key_tile).fresh();
        if constexpr (Shared::holds_queries) held.template multiply<T>(s, keys_place);
        else multiply_transposed<T>(s, rows_first<D>(queries()).fresh(), keys_place);
      }

      const smem_t value_tile = ring.take();
      prim::syncthreads();
      ring.follow_values();
      if (!takes_part) continue;

      float factor[M][2];
      if constexpr (General) {
        terms.shape(s[0], first);
        soften<false>(s, softmax, factor, facts.unit);
        terms.drop(s[0], first);
      } else {
        if (!whole) hide(s, Shared::range, Shared::block, row(), first);
        soften<true>(s, softmax, factor, prim::ld_shared<float>(Shared::unit));
      }
      rescale(out, factor, softmax);
      multiply_rounded<T>(out, s, rows_first<D>(value_tile).fresh());
    }
    prim::cp_async_wait<0>();
    prim::syncthreads();  // the ring is free
    group = prim::ld_shared<int>(Shared::group);
    finish_group<T, D, General>(problem, plan, facts, block(), group, row(), out, softmax,
                                Shared::ring + row() * row_bytes<D>());
    prim::syncthreads();
  }
}

// ---- host --------------------------------------------------------------------------------------------------------

template <class T, int D, bool General>
void start_tiled_forward(const Launch& launch, ForwardFacts facts) {
  using Shared = ForwardTile<D, General>;
  const Problem& p = launch.problem;
  const std::int64_t tiles = tile_count(p, launch.plan, Shared::rows, false);
  facts.tiles = static_cast<std::int32_t>(tiles);
  launch(&tiled_forward_kernel<T, D, General>, tiles * p.q_heads, Shared::threads, Shared::bytes, p, launch.plan,
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
