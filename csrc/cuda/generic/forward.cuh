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

// As large as most_shared_bytes allow.
template <class T, int width>
struct ForwardShape;
template <>
struct ForwardShape<float, 64> : Shape<float, 64, 4, 8, 3> {};
template <>
struct ForwardShape<float, 128> : Shape<float, 128, 4, 4, 2> {};
template <>
struct ForwardShape<float, 256> : Shape<float, 256, 2, 2, 2> {};
template <>
struct ForwardShape<double, 64> : Shape<double, 64, 4, 4, 2> {};
template <>
struct ForwardShape<double, 128> : Shape<double, 128, 2, 2, 3> {};
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

  PRIM Forward(const Problem& problem, const DevicePlan& plan, const ExponentScale<T>& scale)
      : problem_(problem), plan_(plan), scale_(scale), block_(problem, plan) {}

  PRIM void run() {
    if (block_.count <= 0) return;
    const Sequence sequence = block_.sequence();
    load_tile<S, S::own>(
        queries, RowSource<T>(problem_.query, sequence, sequence.q_begin, block_.query_head(), problem_.head_dim),
        [&](int r) { return block_.row_at(r); });
    for (int group = 0; group < problem_.groups(); ++group) {
      attend(group);
      finish(group);
    }
    wait_for_copies();  // of rows that saw nothing
  }

 private:
  PRIM RowView view(int r) const { return ld_shared<RowView>(views + r * sizeof(RowView)); }

  template <class KeyAt>
  PRIM void load(smem_t tile, const Input& x, std::int64_t dim, KeyAt key_at) const {
    const Sequence sequence = block_.sequence();
    load_tile<S, S::passing>(tile, RowSource<T>(x, sequence, sequence.k_begin, block_.kv_head(), dim), key_at);
  }

  PRIM void attend(int group) {
#pragma unroll
    for (int i = 0; i < S::own_steps; ++i) {
      maximum_[i] = -infinity<T>(), sum_[i] = T(0);
#pragma unroll
      for (int d = 0; d < S::columns; ++d) out_[i][d] = T(0);
    }
    const Interval seen = entries_hull(problem_, plan_, block_.sequence(), block_.first, block_.count, group);
    if (seen.begin >= seen.end) return;
    const Place place;
    if (place.thread < S::own)
      st_shared(views + place.thread * sizeof(RowView), block_.view_of_row(group, place.thread));
    const std::int32_t* positions = list_positions(plan_, block_.sequence(), group);
    // Tiles start at multiples of their size: no bit of a row depends on its neighbours.
    std::int32_t first = seen.begin / S::passing * S::passing;
    const auto key_at = [&](int r) {
      const std::int32_t c = first + r;
      return c < seen.end ? position_at(positions, c) : -1;
    };
    load(keys, problem_.key, problem_.head_dim, key_at);
    while (first < seen.end) {
      wait_for_copies();
      if (problem_.dropout.threshold)
        Bits::draw(
            bits, PairDropout(problem_, block_.sequence(), block_.query_head()),
            [&](int r) { return block_.row_at(r); }, key_at);
      syncthreads();
      load(values, problem_.value, problem_.value_dim, key_at);
      const bool looks = any_lane(meets(first));
      if (looks) score(first, key_at);
      wait_for_copies();
      const bool finite = !syncthreads_or(loaded_non_finite<S, S::passing, T>(values));
      first += S::passing;
      if (first < seen.end) load(keys, problem_.key, problem_.head_dim, key_at);
      if (looks) weigh<S>(weights, values, finite, out_);
    }  // the next group's keys come where all have read these, its values behind a barrier of its own
  }

  PRIM bool meets(std::int32_t first) const {
    const Place place;
    bool any = false;
#pragma unroll
    for (int i = 0; i < S::own_steps; ++i) any |= view(place.own_row<S>(i)).meets(first, first + S::passing);
    return any;
  }

  // S, P and the running maximum, sum and rescaling of the warp's rows.
  template <class KeyAt>
  PRIM void score(std::int32_t first, KeyAt key_at) {
    const Place place;
    T s[S::own_steps][S::passing_steps];
    products<S>(queries, keys, static_cast<int>(problem_.head_dim), s);
    const bool shaped = shapes_pairs(problem_);
    if (shaped) {
      store_weights<S>(weights, s);
      shape_pairs<S>(
          weights, problem_, block_.sequence(), block_.query_head(), scale_.factor,
          [&](int own, int passing) {
            const RowView v = view(own);
            return v.sees(first + passing) ? v.row : -1;
          },
          [&](int, int passing) { return key_at(passing); });
      load_weights<S>(weights, s);
    }
    const T factor = kept_factor<T>(problem_);
#pragma unroll
    for (int i = 0; i < S::own_steps; ++i) {
      const RowView v = view(place.own_row<S>(i));
      T best = -infinity<T>();
#pragma unroll
      for (int j = 0; j < S::passing_steps; ++j) {
        if (!shaped) s[i][j] = v.sees(first + place.passing_row(j)) ? s[i][j] * scale_.factor : -infinity<T>();
        best = maximum(best, s[i][j]);
      }
      const T before = maximum_[i];
      maximum_[i] = maximum(before, maximum_of_row(best));
      const T base = maximum_[i] == -infinity<T>() ? T(0) : maximum_[i];
      const T rescale = scale_.exp2_below(before - base);
      T sum = T(0);
#pragma unroll
      for (int j = 0; j < S::passing_steps; ++j) {
        const T p = scale_.exp2_below(s[i][j] - base);
        sum += p;
        s[i][j] = s[i][j] == -infinity<T>() ? hidden<T>() : p;
      }
      sum_[i] = multiply_add(sum_[i], rescale, sum);
#pragma unroll
      for (int d = 0; d < S::columns; ++d) out_[i][d] *= rescale;
      if (!problem_.dropout.threshold || v.self_group) continue;
#pragma unroll
      for (int j = 0; j < S::passing_steps; ++j)
        s[i][j] *= Bits::kept(bits, place.own_row<S>(i), place.passing_row(j)) ? factor : T(0);
    }
    store_weights<S>(weights, s);
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
    const Place place;
    store_lses(group, sum);
#pragma unroll
    for (int i = 0; i < S::own_steps; ++i) {
      const std::int32_t row = block_.row_at(place.own_row<S>(i));
      if (row >= 0) write_row(group, row, lses + place.own_row<S>(i) * 8, out_[i]);
    }
  }

  PRIM void write_row(int group, std::int32_t row, smem_t row_lses, T (&x)[S::columns]) const {
    const Sequence sequence = block_.sequence();
    const std::int32_t head = block_.query_head();
    const int dim = static_cast<int>(problem_.value_dim);
    if (problem_.group_out.data) store_row<S>(statistic<T>(problem_.group_out, sequence, group, head, row), 1, dim, x);
    T* out = static_cast<T*>(problem_.out.data) + row_offset(problem_.out, sequence, sequence.q_begin, head, row);
    if (problem_.merge == Merge::none) out += group * problem_.out.group;
    else if (group == 1) merge(row, row_lses, out, x);
    store_row<S>(out, problem_.out.feature, dim, x);
  }

  // The logarithms of a warp's rows, a lane each; what they need goes through the rows' weights, which are done with.
  PRIM void store_lses(int group, const T (&sum)[S::own_steps]) const {
    const Place place;
    syncwarp();
#pragma unroll
    for (int i = 0; i < S::own_steps; ++i) {
      const smem_t at = weights + place.own_row<S>(i) * S::weight_pitch;
      if (place.x == 0) st_shared(at, maximum_[i]), st_shared(at + sizeof(T), sum[i]);
    }
    syncwarp();
    const int own = place.own_row<S>(place.x);
    const std::int32_t row = place.x < S::own_steps ? block_.row_at(own) : -1;
    if (row >= 0) {
      const smem_t at = weights + own * S::weight_pitch;
      const T m = ld_shared<T>(at);
      const double maximum = problem_.shapes_scores() ? static_cast<double>(m) : scale_.exact(m);
      const double lse = store_lse(problem_, block_.sequence(), group, block_.query_head(), row, maximum,
                                   ld_shared<T>(at + sizeof(T)));
      st_shared(lses + (group * S::own + own) * 8, lse);
    }
    syncwarp();
  }

  // The output of group 0 waits where the merged one goes.
  PRIM void merge(std::int32_t row, smem_t row_lses, const T* out, T (&x)[S::columns]) const {
    const Place place;
    T weight[2];
    const double lse[2] = {ld_shared<double>(row_lses), ld_shared<double>(row_lses + S::own * 8)};
    merge_weights(problem_, block_.sequence(), block_.query_head(), row, lse, weight);
#pragma unroll
    for (int c = 0; c < S::chunk_steps; ++c)
#pragma unroll
      for (int e = 0; e < S::chunk; ++e) {
        const int d = place.feature_chunk(c) * S::chunk + e;
        T& y = x[c * S::chunk + e];
        if (d < problem_.value_dim)
          y = weighted(weight[0], ld_global(out + d * problem_.out.feature)) + weighted(weight[1], y);
      }
  }

  const Problem& problem_;
  const DevicePlan& plan_;
  const ExponentScale<T>& scale_;
  const RowBlock<S::own> block_;
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
    static_assert(Kernel::shared_bytes <= most_shared_bytes);
    launch(&forward_kernel<T, width.value>, tile_count(problem, launch.plan, Kernel::S::own, false) * problem.q_heads,
           threads, Kernel::shared_bytes, problem, launch.plan,
           ExponentScale<T>(problem.shapes_scores() ? 1.0 : problem.scale));
  });
}

}  // namespace mmca::cuda::generic
