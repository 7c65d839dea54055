// Finished rows on their way to global memory, and the weights they are merged with.
//
// A warp ends with accumulators of 16 M rows. Lane l of it looks after row 8 (l % 4) + l / 4 of them, which is one of
// the rows of its own quad: `row_of_lane` is that row's number, negative where there is none.
#pragma once

#include "cuda/launch.h"
#include "cuda/row_results.cuh"
#include "cuda/scores.cuh"
#include "cuda/sm80/tile.cuh"

namespace mmca::cuda::sm80 {

PRIM int row_looked_after() { return lane_of_thread() % 4 * 8 + lane_of_thread() / 4; }

// What the lane that looks after it holds of row 16 m + 8 h + l / 4.
template <class X>
PRIM X of_row(X of_lane, int m, int h) {
  return prim::shfl(of_lane, (lane_of_thread() & ~3) + 2 * m + h);
}

PRIM float weighted(float weight, float x) { return weight == 0.0f ? 0.0f : weight * x; }

// Rows times the factors of the lanes that look after them; a factor of zero hides even a NaN.
template <int M, int N>
PRIM void multiply_rows_of_lanes(Accumulator<M, N>& d, float factor_of_lane) {
#pragma unroll
  for (int m = 0; m < M; ++m)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float factor = of_row(factor_of_lane, m, h);
#pragma unroll
      for (int n = 0; n < N; ++n)
        d[m][n][2 * h] = weighted(factor, d[m][n][2 * h]), d[m][n][2 * h + 1] = weighted(factor, d[m][n][2 * h + 1]);
    }
}

// exp(lse_r - LSE) of two groups from their (m, l). `unit`: what turns a difference of maxima into an exponent of 2.
PRIM void joint_weights(float2 first, float2 last, float unit, float (&weight)[2]) {
  if (first.y == 0.0f || last.y == 0.0f) {  // the only group, whatever its scores
    weight[0] = first.y == 0.0f ? 0.0f : 1.0f, weight[1] = last.y == 0.0f ? 0.0f : 1.0f;
    return;
  }
  const float best = fmaxf(first.x, last.x);
  const float e[2] = {first.y * prim::exp2_approx((first.x - best) * unit),
                      last.y * prim::exp2_approx((last.x - best) * unit)};
  weight[0] = e[0] / (e[0] + e[1]), weight[1] = e[1] / (e[0] + e[1]);
}
// The weights of the groups' outputs of a row. first, last: (m, l) of group 0 and 1, for Merge::lse.
PRIM void merge_weights(const Problem& problem, const Sequence& sequence, std::int64_t head, std::int32_t row,
                        float2 first, float2 last, float (&weight)[2]) {
  weight[0] = weight[1] = 1.0f;
  if (problem.merge == Merge::gate) {
    weight[0] = ld_global(statistic<float>(problem.gate, sequence, 0, head, row));
    weight[1] = ld_global(statistic<float>(problem.gate, sequence, 1, head, row));
  } else if (problem.merge == Merge::lse) {
    joint_weights(first, last, problem.shapes_scores() ? static_cast<float>(log2_e) : 1.0f, weight);
  }
}

// What makes up for the weights that dropout took.
PRIM float dropout_factor(const Problem& problem, const DevicePlan& plan, const Sequence& sequence, int group,
                          std::int32_t entry) {
  const PairDropout dropout(problem, sequence, 0);
  const bool drops = dropout.any() && !(group == 1 && is_self_entry(plan, sequence, entry));
  return drops ? dropout.kept() : 1.0f;
}

PRIM constexpr std::int64_t query_tokens(const Problem& problem) {
  return problem.q_offsets ? problem.q_len : problem.batch * problem.q_len;
}
// O_r in fp32, value_dim neighbouring numbers a row.
struct GroupOut {
  RowStatistic<void*> at;
  bool paired;  // every pair of numbers at a multiple of 8 bytes
};

// Problem::group_out, or room for it in the workspace, where group 0 alone is stored.
inline GroupOut group_out_of(const Launch& launch) {
  const Problem& p = launch.problem;
  if (p.group_out.data) {
    const RowStatistic<void*>& x = p.group_out;
    const bool even = (x.group | x.batch | x.head | x.row | p.value_dim) % 2 == 0;
    return {x, even && reinterpret_cast<std::uintptr_t>(x.data) % 8 == 0};
  }
  const std::int64_t row = (p.value_dim + 1) / 2 * 2, sequences = p.q_offsets ? 1 : p.batch;
  const std::int64_t head = p.q_len * row, batch = p.q_heads * head;
  return {{launch.take<float>(sequences * batch), 0, p.q_offsets ? 0 : batch, head, row}, true};
}

template <int M, int N>
PRIM void store_group_out(const Accumulator<M, N>& d, const GroupOut& to, const Sequence& sequence, int group,
                          std::int64_t head, std::int32_t row_of_lane, std::int64_t value_dim) {
#pragma unroll
  for (int m = 0; m < M; ++m)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const std::int32_t row = of_row(row_of_lane, m, h);
      if (row < 0) continue;
      float* p = statistic<float>(to.at, sequence, group, head, row) + fragment_column();
      const auto left = static_cast<int>(value_dim) - fragment_column();  // numbers from p on
#pragma unroll
      for (int n = 0; n < N; ++n) {
        const float x = d[m][n][2 * h], y = d[m][n][2 * h + 1];
        if (to.paired) {
          if (8 * n < left) prim::st_global(reinterpret_cast<float2*>(p + 8 * n), float2{x, y});
        } else {
          if (8 * n < left) prim::st_global(p + 8 * n, x);
          if (8 * n + 1 < left) prim::st_global(p + 8 * n + 1, y);
        }
      }
    }
}

// d += weight O_r of what store_group_out stored from the same lanes. `weight`: of the row that a lane looks after.
template <int M, int N>
PRIM void add_group_out(Accumulator<M, N>& d, const GroupOut& from, const Sequence& sequence, int group,
                        std::int64_t head, std::int32_t row_of_lane, std::int64_t value_dim, float weight) {
#pragma unroll
  for (int m = 0; m < M; ++m)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const std::int32_t row = of_row(row_of_lane, m, h);
      const float w = of_row(weight, m, h);
      if (row < 0) continue;
      const float* p = statistic<float>(from.at, sequence, group, head, row) + fragment_column();
      const auto left = static_cast<int>(value_dim) - fragment_column();
#pragma unroll
      for (int n = 0; n < N; ++n) {
        float2 pair{0.0f, 0.0f};
        if (from.paired) {
          if (8 * n < left) pair = ld_global(reinterpret_cast<const float2*>(p + 8 * n));
        } else {
          if (8 * n < left) pair.x = ld_global(p + 8 * n);
          if (8 * n + 1 < left) pair.y = ld_global(p + 8 * n + 1);
        }
        d[m][n][2 * h] += weighted(w, pair.x), d[m][n][2 * h + 1] += weighted(w, pair.y);
      }
    }
}

// Whether `out` is rows of whole chunks of 16 bytes, at multiples of 16 bytes.
inline bool has_aligned_rows(const Output& out, std::int64_t value_dim) {
  return out.feature == 1 && (out.group | out.batch | out.head | out.row | value_dim) % 8 == 0 &&
         reinterpret_cast<std::uintptr_t>(out.data) % 16 == 0;
}

// d, rounded, to the rows' place in `out`, through `staging`: 16 M rows of D numbers of shared memory, the warp's
// alone. `aligned`: has_aligned_rows.
template <class T, int D, int M>
PRIM void store_out(const Accumulator<M, D / 8>& d, smem_t staging, const Output& out, const Sequence& sequence,
                    int group, std::int64_t head, std::int32_t row_of_lane, std::int64_t value_dim, bool aligned) {
  const int lane = lane_of_thread();
#pragma unroll
  for (int m = 0; m < M; ++m)
#pragma unroll
    for (int h = 0; h < 2; ++h)
#pragma unroll
      for (int n = 0; n < D / 8; ++n)
        prim::st_shared(chunk_address<D>(staging, 16 * m + fragment_row(h), n) + 2 * fragment_column(),
                        prim::pack2<T>(d[m][n][2 * h], d[m][n][2 * h + 1]));
  prim::syncwarp();
  std::uint16_t* const first =
      static_cast<std::uint16_t*>(out.data) + group * out.group + row_offset(out, sequence, sequence.q_begin, head, 0);
  constexpr int chunks = D / 8, rows_at_once = warp_size / chunks;
  if (aligned) {
    const int chunk = lane % chunks;
#pragma unroll 4
    for (int r = 0; r < 16 * M; r += rows_at_once) {
      const int mine = r + lane / chunks;
      const std::int32_t row = prim::shfl(row_of_lane, mine % 8 * 4 + mine / 8);
      if (row >= 0 && 8 * chunk < value_dim)
        prim::st_global_16(first + row * out.row + 8 * chunk,
                           prim::ld_shared<uint4>(chunk_address<D>(staging, mine, chunk)));
    }
    return;
  }
  for (int r = 0; r < 16 * M; ++r) {
    const std::int32_t row = prim::shfl(row_of_lane, r % 8 * 4 + r / 8);
    if (row < 0) continue;
    std::uint16_t* const p = first + row * out.row;
    for (int c = 2 * lane; c < value_dim; c += 2 * warp_size) {
      const auto pair = prim::ld_shared<std::uint32_t>(chunk_address<D>(staging, r, c / 8) + 2 * (c % 8));
      prim::st_global(p + c * out.feature, static_cast<std::uint16_t>(pair));
      if (c + 1 < value_dim) prim::st_global(p + (c + 1) * out.feature, static_cast<std::uint16_t>(pair >> 16));
    }
  }
}

}  // namespace mmca::cuda::sm80
