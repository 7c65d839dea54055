// Forward on any GPU, T = float or double. Notation: core/problem.h, tiles: generic/tile.cuh.
//
// A block owns a tile of rows of one query head. Per group it walks the tiles of keys that its rows see, with a running
// softmax (m, l, O) per row:
//
//     S = Q K^T;  m' = max(m, rowmax S)             c = scale log2(e); with a softcap or a bias S is the score, c =
//     log2(e) f = exp2(c (m - m'));  P = exp2(c (S - m'));  l = f l + rowsum P;  O = f O + (P Z) V at the group's end:
//     O_r = O / l,  lse_r = (c m + log2 l) ln 2;  out = merge(O_r, lse_r)
//
// The output of the first of two groups waits in `out`, which is as exact as the sums. Keys are copied while values are
// weighed, values while scores are computed.
#pragma once

#include "cuda/generic/tile.cuh"

namespace mmca::cuda::generic {

// As large as 99 KiB of shared memory allow, the most that some GPUs have.
template <class T, int width>
struct ForwardShape;
template <>
struct ForwardShape<float, 64> : Shape<float, 64, 4, 8, 3> {};
template <>
struct ForwardShape<float, 128> : Shape<float, 128, 4, 4, 2, 2> {};
template <>
struct ForwardShape<float, 256> : Shape<float, 256, 2, 2, 2, 2> {};
template <>
struct ForwardShape<double, 64> : Shape<double, 64, 4, 4, 2> {};
template <>
struct ForwardShape<double, 128> : Shape<double, 128, 2, 2, 2> {};
template <>
struct ForwardShape<double, 256> : Shape<double, 256, 1, 1, 2> {};

template <class T, int width>
class Forward {
 public:
  using S = ForwardShape<T, width>;
  using Bits = KeptBits<S::own, S::passing>;

  static constexpr smem_t queries = 0, keys = queries + S::own_bytes, values = keys + S::passing_bytes,
                          weights = values + S::passing_bytes, bits = weights + S::weight_bytes,
                          views = bits + Bits::bytes,
                          lses = views + S::own * sizeof(RowView),  // [group][own row], double
      shared_bytes = lses + 2 * S::own * 8;

  // Blocks, slowest first: KV head; tile of rows, the last one first, which under a causal mask takes longest; head.
  PRIM Forward(const Problem& problem, const DevicePlan& plan, const ExponentScale<T>& scale)
      : problem_(problem), plan_(plan), scale_(scale) {
    const std::int64_t share = problem.heads_per_kv(), tiles = gridDim.x / problem.q_heads;
    const std::int64_t block = blockIdx.x, rest = block / share;
    kv_head_ = rest / tiles, head_ = kv_head_ * share + block % share;
    tile_ = tile_of(problem, plan, tiles - 1 - rest % tiles, S::own, false);
  }

  PRIM void run() {
    if (tile_.count <= 0) return;
    load_tile<S, S::own>(place_, queries,
                         RowSource<T>(problem_.query, tile_.sequence, tile_.sequence.q_begin, head_, problem_.head_dim),
                         [&](int r) { return row_at(r); });
    for (int group = 0; group < problem_.groups(); ++group) {
      attend(group);
      finish(group);
    }
    wait_for_copies();  // of rows that saw nothing
  }

 private:
  PRIM std::int32_t row_at(int r) const {
    return r < tile_.count ? row_of(plan_, tile_.sequence, tile_.first + r) : std::int32_t{-1};
  }
  PRIM RowView view(int r) const { return ld_shared<RowView>(views + r * sizeof(RowView)); }

  PRIM void attend(int group) {
#pragma unroll
    for (int i = 0; i < S::own_steps; ++i) {
      maximum_[i] = -infinity<T>(), sum_[i] = T(0);
#pragma unroll
      for (int d = 0; d < S::columns; ++d) out_[i][d] = T(0);
    }
    const Sequence& sequence = tile_.sequence;
    const Interval seen = entries_hull(problem_, plan_, sequence, tile_.first, tile_.count, group);
    if (seen.begin >= seen.end) return;
    const int r = place_.thread;
    if (r < S::own)
      st_shared(views + r * sizeof(RowView), view_of(problem_, plan_, sequence, group, tile_.first, tile_.count, r));
    const std::int32_t* positions = list_positions(plan_, sequence, group);
    const auto load_keys = [&](auto key_at) {
      const std::int32_t head = prim::opaque(kv_head_);
      load_tile<S, S::passing>(place_, keys,
                               RowSource<T>(problem_.key, sequence, sequence.k_begin, head, problem_.head_dim), key_at);
    };
    const auto load_values = [&](auto key_at) {
      const std::int32_t head = prim::opaque(kv_head_);
      load_tile<S, S::passing>(
          place_, values, RowSource<T>(problem_.value, sequence, sequence.k_begin, head, problem_.value_dim), key_at);
    };
    // Tiles start at multiples of their size: no bit of a row depends on its neighbours.
    std::int32_t first = seen.begin / S::passing * S::passing;
    const auto key_at = [&](int r) {
      const std::int32_t c = first + r;
      return c >= seen.begin && c < seen.end ? position_at(positions, c) : -1;
    };
    load_keys(key_at);
    while (first < seen.end) {
      wait_for_copies();
      if (problem_.dropout.threshold)
        Bits::draw(place_, bits, PairDropout(problem_, sequence, head_), [&](int r) { return row_at(r); }, key_at);
      syncthreads();
      load_values(key_at);
      const bool looks = any_lane(meets(first));
      if (looks) score(first, key_at);
      wait_for_copies();
      const bool finite = !syncthreads_or(loaded_non_finite<S, S::passing, T>(place_, values));
      first += S::passing;
      if (first < seen.end) load_keys(key_at);
      if (looks) weigh<S>(place_, weights, values, finite, out_);
    }
    syncthreads();  // before other keys and values come
  }

  PRIM bool meets(std::int32_t first) const {
    bool any = false;
#pragma unroll
    for (int i = 0; i < S::own_steps; ++i) any |= view(place_.own_row<S>(i)).meets(first, first + S::passing);
    return any;
  }

  // S, P and the running maximum, sum and rescaling of the warp's rows.
  template <class KeyAt>
  PRIM void score(std::int32_t first, KeyAt key_at) {
    T s[S::own_steps][S::passing_steps];
    products<S>(place_, queries, keys, static_cast<int>(problem_.head_dim), s);
    const bool shaped = shapes_pairs(problem_);
    if (shaped) {
      store_weights<S>(place_, weights, s);
      shape_pairs<S>(
          place_, weights, problem_, tile_.sequence, head_, scale_.factor,
          [&](int own, int passing) {
            const RowView v = view(own);
            return v.sees(first + passing) ? v.row : -1;
          },
          [&](int, int passing) { return key_at(passing); });
      load_weights<S>(place_, weights, s);
    }
    const T factor = kept_factor<T>(problem_);
#pragma unroll
    for (int i = 0; i < S::own_steps; ++i) {
      const RowView v = view(place_.own_row<S>(i));
      T best = -infinity<T>();
#pragma unroll
      for (int j = 0; j < S::passing_steps; ++j) {
        if (!shaped) s[i][j] = v.sees(first + place_.passing_row(j)) ? s[i][j] * scale_.factor : -infinity<T>();
        best = maximum(best, s[i][j]);
      }
      const T before = maximum_[i];
      maximum_[i] = maximum(before, maximum_of_row(best));
      const T base = maximum_[i] == -infinity<T>() ? T(0) : maximum_[i];
      const T rescale = exp2_exact(scale_.below(before - base));
      T sum = T(0);
#pragma unroll
      for (int j = 0; j < S::passing_steps; ++j) {
        const T p = exp2_exact(scale_.below(s[i][j] - base));
        sum += p;
        s[i][j] = s[i][j] == -infinity<T>() ? hidden<T>() : p;
      }
      sum_[i] = multiply_add(sum_[i], rescale, sum);
#pragma unroll
      for (int d = 0; d < S::columns; ++d) out_[i][d] *= rescale;
      if (!problem_.dropout.threshold || v.self_group) continue;
#pragma unroll
      for (int j = 0; j < S::passing_steps; ++j)
        s[i][j] *= Bits::kept(bits, place_.own_row<S>(i), place_.passing_row(j)) ? factor : T(0);
    }
    store_weights<S>(place_, weights, s);
  }

  // O_r = O / l, lse_r, and at the last group out = merge(O_r, lse_r).
  PRIM void finish(int group) {
    T sum[S::own_steps];
#pragma unroll
    for (int i = 0; i < S::own_steps; ++i) {
      sum[i] = sum_of_row(sum_[i]);
      const T divisor = sum[i] == T(0) ? T(1) : sum[i];
#pragma unroll
      for (int d = 0; d < S::columns; ++d) out_[i][d] /= divisor;
    }
    store_lses(group, sum);
    const bool waits = problem_.groups() == 2 && problem_.merge != Merge::none && group == 0;
    const bool merges = problem_.groups() == 2 && problem_.merge != Merge::none && group == 1;
    const int dim = static_cast<int>(problem_.value_dim);
#pragma unroll
    for (int i = 0; i < S::own_steps; ++i) {
      const std::int32_t row = row_at(place_.own_row<S>(i));
      if (row < 0) continue;
      const Sequence& sequence = tile_.sequence;
      if (problem_.group_out.data)
        store_row<S>(place_, statistic<T>(problem_.group_out, sequence, group, head_, row), 1, dim, out_[i]);
      T* out = static_cast<T*>(problem_.out.data) + row_offset(problem_.out, sequence, sequence.q_begin, head_, row);
      if (merges) merge(i, row, out);
      store_row<S>(place_, waits || merges ? out : out + group * problem_.out.group, problem_.out.feature, dim,
                   out_[i]);
    }
  }

  // Lane x of a row's lanes takes row x of them.
  PRIM void store_lses(int group, const T (&sum)[S::own_steps]) const {
    T m = maximum_[0], l = sum[0];
#pragma unroll
    for (int i = 1; i < S::own_steps; ++i)
      if (place_.x == i) m = maximum_[i], l = sum[i];
    const std::int32_t row = place_.x < S::own_steps ? row_at(place_.own_row<S>(place_.x)) : -1;
    if (row >= 0) {
      const double maximum = problem_.shapes_scores() ? static_cast<double>(m) : scale_.exact(m);
      const double lse = store_lse(problem_, tile_.sequence, group, head_, row, maximum, l);
      st_shared(lses + (group * S::own + place_.own_row<S>(place_.x)) * 8, lse);
    }
    syncwarp();
  }

  PRIM void merge(int i, std::int32_t row, const T* first_group) {
    T weight[2];
    const smem_t at = lses + place_.own_row<S>(i) * 8;
    const double lse[2] = {ld_shared<double>(at), ld_shared<double>(at + S::own * 8)};
    merge_weights(problem_, tile_.sequence, head_, row, lse, weight);
#pragma unroll
    for (int c = 0; c < S::chunk_steps; ++c)
#pragma unroll
      for (int e = 0; e < S::chunk; ++e) {
        const int d = place_.feature_chunk(c) * S::chunk + e;
        if (d >= problem_.value_dim) continue;
        T& x = out_[i][c * S::chunk + e];
        x = weighted(weight[0], ld_global(first_group + d * problem_.out.feature)) + weighted(weight[1], x);
      }
  }

  const Problem& problem_;
  const DevicePlan& plan_;
  const ExponentScale<T>& scale_;
  const Place place_;
  std::int32_t kv_head_, head_;
  Tile tile_;
  Interval range_[S::own_steps];                                                 // what they see of the group at hand
  T maximum_[S::own_steps], sum_[S::own_steps], out_[S::own_steps][S::columns];  // the sum: this thread's part
};

template <class T, int width>
__global__ void __launch_bounds__(threads, ForwardShape<T, width>::blocks)
    forward_kernel(const __grid_constant__ Problem problem, const __grid_constant__ DevicePlan plan,
                   const __grid_constant__ ExponentScale<T> scale) {
  Forward<T, width>(problem, plan, scale).run();
}

template <class T>
void attention_forward(const Launch& launch) {
  const Problem& problem = launch.problem;
  with_width(problem, [&](auto width) {
    using Kernel = Forward<T, width.value>;
    launch(&forward_kernel<T, width.value>, tile_count(problem, launch.plan, Kernel::S::own, false) * problem.q_heads,
           threads, Kernel::shared_bytes, problem, launch.plan,
           ExponentScale<T>(problem.shapes_scores() ? 1.0 : problem.scale));
  });
}

}  // namespace mmca::cuda::generic
