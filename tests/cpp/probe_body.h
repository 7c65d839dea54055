// get_probe() of one instruction set; included inside its namespace, after its simd_*.h, by probe_<isa>.cpp.

#include "cpu/bodies.h"
#include "cpu/feature_map.h"

inline constexpr int probe_stride = mmca::test::probe_stride;

// Calls body(constant) with the constant equal to `rows`, one of 1..most.
template <int most, class Body>
void with_height(int rows, const Body& body) {
  if constexpr (most > 0) {
    if (rows == most) body(std::integral_constant<int, most>{});
    else with_height<most - 1>(rows, body);
  }
}

template <class T>
struct ProbeBody {
  using S = Simd<T>;
  static constexpr int width = S::width, most = S::tile_rows;

  static void score(int rows, int depth, const T* strip, const T* panel, T* scores) {
    with_height<most>(rows, [&](auto n) { score_tile<T, n.value, probe_stride>(depth, strip, panel, scores); });
  }
  static void row(int rows, int depth, const T* weights, const T* panel, T* c, std::ptrdiff_t stride) {
    with_height<most>(rows, [&](auto n) { row_tile<T, n.value, probe_stride>(depth, weights, panel, c, stride); });
  }
  static void rescaled(int rows, int depth, const T* weights, const T* panel, T* c, std::ptrdiff_t stride,
                       const T* factor) {
    with_height<most>(
        rows, [&](auto n) { rescaled_row_tile<T, n.value, probe_stride>(depth, weights, panel, c, stride, factor); });
  }
  static int height(int rows) {
    int chosen = 0;
    with_tile_height<T>(rows, [&](auto n) { chosen = n.value; });
    return chosen;
  }
  static T pack(const T* row, int padded, T* panels, std::ptrdiff_t stride) {
    return S::reduce_add(pack_row<T>(row, padded, panels, stride, S::zero()));
  }
  static void zero_row(int padded, T* panels, std::ptrdiff_t stride) { pack_zero_row<T>(padded, panels, stride); }
  static void transpose(T* square) {
    typename S::Reg r[width];
    for (int i = 0; i < width; ++i) r[i] = S::loadu(square + i * width);
    S::transpose(r);
    for (int i = 0; i < width; ++i) S::storeu(square + i * width, r[i]);
  }
  static void phi(const T* row, int features, int padded, T* out) { phi_of_key<T>(row, features, padded, out); }
  static T query_phi(const T* row, int features, int padded, T* out) {
    return phi_of_query<T>(row, features, padded, out);
  }
  static T add(const T* lanes) { return S::reduce_add(S::loadu(lanes)); }
  static T max(const T* lanes) { return S::reduce_max(S::loadu(lanes)); }
  template <int registers>
  static void exp2_by(T* x, int count) {
    for (int i = 0; i < count; i += registers * width) {
      typename S::Reg r[registers];
      for (int u = 0; u < registers; ++u) r[u] = S::loadu(x + i + u * width);
      exp2_in_place<T, registers>(r);
      for (int u = 0; u < registers; ++u) S::storeu(x + i + u * width, r[u]);
    }
  }
  static void exp2(T* x, int registers, int count) {
    if (registers == 1) exp2_by<1>(x, count);
    else if (registers == 2) exp2_by<2>(x, count);
    else exp2_by<4>(x, count);
  }
  static T one(T x) {
    exp2_each<T, 1>(&x);
    return x;
  }
  static void tanh(T* y, T* slope, int count) {
    for (int i = 0; i < count; i += width) {
      typename S::Reg derivative;
      S::storeu(y + i, tanh_register<T>(S::loadu(y + i), derivative));
      S::storeu(slope + i, derivative);
    }
  }
  static T capped(T t, T softcap, T* slope) { return softcapped<T>(t, softcap, slope); }
  static void widen(DType storage, const void* source, std::int64_t step, int count, T* out) {
    if (storage == DType::bf16) widen_row(static_cast<const BFloat16*>(source), step, count, out);
    else widen_row(static_cast<const Float16*>(source), step, count, out);
  }
  static void narrow(DType storage, const T* source, int count, void* out, std::int64_t step) {
    if (storage == DType::bf16) narrow_row(source, count, static_cast<BFloat16*>(out), step);
    else narrow_row(source, count, static_cast<Float16*>(out), step);
  }
  static cpu::BackwardTiles tiles(const Problem& problem) {
    using Kernel = Backward<T, PackedGradients>;
    return {Kernel::key_range, Kernel::row_block, most, Kernel::partial_row_bytes(problem)};
  }

  static void direct_scores(int rows, int padded, const T* query, const T* const* keys, T* scores) {
    std::vector<T> memory(static_cast<std::size_t>(round_up(rows, quad_rows<T>)) * padded + 16);
    T* packed = memory.data();
    while (reinterpret_cast<std::uintptr_t>(packed) % 64) ++packed;
    for (int r = 0; r < rows; ++r) pack_quads<T>(query + r * padded, r, padded, T(1), packed);
    direct_score_tile<T, probe_stride>(rows, padded, packed, keys, scores);
  }

  static T row_of_exp2(T* scores, int count, double scale, T maximum) {
    return Simd<T>::reduce_add(exp2_row<T>(scores, count, ExponentScale<T>(scale), maximum));
  }

  static void get(mmca::test::Probe<T>& p) {
    p.width = width, p.tile_rows = most;
    p.score_tile = score, p.row_tile = row, p.rescaled_row_tile = rescaled;
    p.transposed_tile = transposed_tile<T, probe_stride>;
    p.tile_height = height;
    p.direct_score_tile = direct_scores, p.direct_weigh = direct_weigh<T, probe_stride>;
    p.pack_strip = pack_columns<T, most>, p.pack_panel = pack_columns<T, 2 * width>;
    p.pack_row = pack, p.pack_zero_row = zero_row;
    p.zero_non_finite = zero_non_finite<T>, p.add_non_finite = add_non_finite<T>;
    p.transpose = transpose, p.reduce_add = add, p.reduce_max = max;
    if constexpr (sizeof(T) == 4) p.widen_row = widen, p.narrow_row = narrow;
    else p.widen_row = nullptr, p.narrow_row = nullptr;
    p.exp2 = exp2, p.exp2_one = one;
    p.tanh = tanh, p.softcapped = capped, p.phi = phi, p.phi_of_query = query_phi;
    p.exp2_row = row_of_exp2;
    p.dot = dot<T>;
    p.dropout_factors = dropout_factors<T>;
    p.backward_tiles = tiles;
  }
};

void get_probe(mmca::test::Probe<float>& probe) { ProbeBody<float>::get(probe); }
void get_probe(mmca::test::Probe<double>& probe) { ProbeBody<double>::get(probe); }
