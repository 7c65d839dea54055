// What the writers of a sweep of linear attention add: M += F^T G and the vector beside M; and M's way to the readers
// (linear_sweep.cuh).
#pragma once

#include "cuda/sm80/linear_block.cuh"
#include "cuda/sm80/linear_rows.cuh"

namespace mmca::cuda::sm80 {

// The largest |note| of a buffer's rows, by every warp for itself.
template <int Rows>
PRIM float largest_note(smem_t notes) {
  float top = 0.0f;
#pragma unroll
  for (int r = 0; r < Rows; r += warp_size)
    top = fmaxf(top, fabsf(prim::ld_shared<float>(notes + 4 * (r + lane_of_thread()))));
  return warp_max(top);
}

// What F and G in a buffer are to be. Returns what F^T G and A G have to be multiplied with.
template <class T, int P>
PRIM float map_writers(const SweepBlock<P>& block, int buffer) {
  using Shared = SweepTile<P>;
  constexpr int tokens = Shared::tokens, threads = Shared::threads;
  const smem_t notes = Shared::note(buffer), f = Shared::f(buffer), g = Shared::g(buffer);
  float up = 1.0f, down = 1.0f;
  if (block.sweep.backwards()) {  // d, in the scale of the largest
    const float top = float_of(bits_of(largest_note<tokens>(notes)) & 0x7f800000);
    if (top > 0x1p-126f && top < 0x1p126f) up = 1.0f / top, down = top;
  }
  const auto map = [&](int r) {
    if (!block.sweep.backwards()) return RowMap{};
    RowMap map = map_of_query<T>(prim::ld_shared<float>(notes + Shared::note_bytes + 4 * r));
    map.factor *= prim::ld_shared<float>(notes + 4 * r) * up;
    return map;
  };
  if (block.sweep.has_phi_f()) {
    map_tile<T, P, tokens, threads>(f, block.phi_features(), notes, map);
    clear_hidden<64, tokens, threads>(g, notes);
  } else {
    const int features = block.phi_features();
    map_tile<T, 64, tokens, threads>(g, features < Shared::columns ? features : Shared::columns, notes, map);
    clear_hidden<P, tokens, threads>(f, notes);
  }
  return down;
}

template <int P>
using VectorSum = float[SweepTile<P>::vector_tiles][4];

// Row g of 16 x 16 weights, as the a of a product: part g of the weights of 16 rows; parts add up to the weight.
template <class T>
PRIM void weights_fragment(std::uint32_t (&a)[4], smem_t notes, float up) {
  const int part = lane_of_thread() / 4;
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    const auto weights = prim::ld_shared<float2>(notes + 4 * (fragment_column() + 4 * i));
    float2 rest{-up * weights.x, -up * weights.y};
#pragma unroll
    for (int p = 0; p < 2; ++p) {
      if (p >= part) continue;
      const float2 taken = unpack2<T>(prim::pack2<T>(rest.x, rest.y));
      rest.x -= taken.x, rest.y -= taken.y;
    }
    a[i] = part < 3 ? prim::pack2<T>(rest.x, rest.y) : 0, a[i + 1] = 0;
  }
}

// sum += the tile's rows, all features of them that are this warp's; or each times -p, if p (notes) is there.
template <class T, int P, int D>
PRIM void add_vector(VectorSum<P>& sum, LanePlace<D> tile_rows_first, int numbers, bool weighted, smem_t products,
                     float factor) {
  using Shared = SweepTile<P>;
  const PowerScale scale = weighted ? PowerScale(largest_note<Shared::tokens>(products)) : PowerScale();
  constexpr std::uint32_t one = is_f16<T> ? 0x3c003c00 : 0x3f803f80;
#pragma unroll
  for (int v = 0; v < Shared::vector_tiles; ++v) {
    const int chunk = 2 * (warp_of_thread() + v * Shared::warps);
    if (8 * chunk >= numbers) break;
    Accumulator<1, 2> d;
    clear(d);
#pragma unroll
    for (int k = 0; k < Shared::tokens; k += 16) {
      std::uint32_t a[1][4];
      a[0][0] = a[0][2] = lane_of_thread() < 4 ? one : 0, a[0][1] = a[0][3] = 0;
      if (weighted) weights_fragment<T>(a[0], products + 4 * k, scale.up);
      multiply_rows<T>(d, a, tile_rows_first.from_chunk(chunk), k);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float x = d[0][i / 2][i % 2];
      for (int lanes = 4; lanes < warp_size; lanes *= 2) x += prim::shfl_xor(x, lanes);
      sum[v][i] += factor * scale.down * x;
    }
  }
}
// body(place in the vector, register) for the numbers that the lane stores.
template <int P, class Body>
PRIM void each_of_vector(VectorSum<P>& sum, int numbers, const Body& body) {
  if (lane_of_thread() >= 4) return;
#pragma unroll
  for (int v = 0; v < SweepTile<P>::vector_tiles; ++v)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int at = 16 * (warp_of_thread() + v * SweepTile<P>::warps) + 8 * (i / 2) + fragment_column() + i % 2;
      if (at < numbers) body(at, sum[v][i]);
    }
}

// ---- the state -----------------------------------------------------------------------------------------------------

template <int P>
using StateSum = Accumulator<SweepTile<P>::m_tiles, SweepTile<P>::m_columns>;

// M += factor F^T G
template <class T, int P>
PRIM void add_state(StateSum<P>& state, int buffer, float factor) {
  using Shared = SweepTile<P>;
  const LanePlace<P> f = chunks_first<P>(Shared::f(buffer)).fresh();
  const LanePlace<64> g = rows_first<64>(Shared::g(buffer)).fresh();
#pragma unroll
  for (int m = 0; m < Shared::m_tiles; ++m) {
    const int chunk = 2 * (warp_of_thread() * Shared::m_tiles + m);
    Accumulator<1, Shared::m_columns> sum;
    clear(sum);
#pragma unroll
    for (int k = 0; k < Shared::tokens; k += 16) {
      std::uint32_t a[1][4];
      load_a_trans(a[0], f, k, chunk);
      multiply_rows<T>(sum, a, g, k);
    }
#pragma unroll
    for (int n = 0; n < Shared::m_columns; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) state[m][n][e] = fmaf(factor, sum[0][n][e], state[m][n][e]);
  }
}

// body(row, column, two neighbouring registers) of M.
template <int P, class Body>
PRIM void each_of_state(StateSum<P>& state, const Body& body) {
  using Shared = SweepTile<P>;
  const int row = 16 * warp_of_thread() * Shared::m_tiles + fragment_row(0), column = fragment_column();
#pragma unroll
  for (int m = 0; m < Shared::m_tiles; ++m)
#pragma unroll
    for (int h = 0; h < 2; ++h)
#pragma unroll
      for (int n = 0; n < Shared::m_columns; ++n)
        body(row + 16 * m + 8 * h, column + 8 * n, state[m][n][2 * h], state[m][n][2 * h + 1]);
}

// What of `state` and `sum` fits 16 bits is written for the readers of the next chunk; in fp16 in two steps, with a
// barrier between them: all must know the largest number.
template <class T, int P>
PRIM void note_top(StateSum<P>& state) {
  if constexpr (!is_f16<T>) return;
  float top = 0.0f;
  each_of_state<P>(state, [&](int, int, float x, float y) { top = fmaxf(top, fmaxf(fabsf(x), fabsf(y))); });
  top = warp_max(top);
  if (lane_of_thread() == 0) prim::st_shared(SweepTile<P>::tops + 4 * warp_of_thread(), top);
}
template <class T, int P>
PRIM float publish(StateSum<P>& state, VectorSum<P>& sum, int numbers) {
  using Shared = SweepTile<P>;
  PowerScale scale;
  if constexpr (is_f16<T>) {
    const auto tops = prim::ld_shared<float4>(Shared::tops);
    scale = PowerScale(fmaxf(fmaxf(tops.x, tops.y), fmaxf(tops.z, tops.w)));
  }
  each_of_state<P>(state, [&](int row, int column, float x, float y) {
    x *= scale.up, y *= scale.up;
    const std::uint32_t high = prim::pack2<T>(x, y);
    const float2 taken = unpack2<T>(high);
    const smem_t at = Shared::state + 2 * (column % 8);
    prim::st_shared(chunk_address<64>(at, row, column / 8), high);
    prim::st_shared(chunk_address<64>(at + Shared::low, row, column / 8 + Shared::low_chunk),
                    prim::pack2<T>(x - taken.x, y - taken.y));
  });
  each_of_vector<P>(sum, numbers, [](int at, float x) { prim::st_shared(Shared::vector + 4 * at, x); });
  return scale.down;
}

template <int P>
PRIM void load_slab(StateSum<P>& state, VectorSum<P>& sum, const float* slab) {
  constexpr int columns = SweepTile<P>::columns;
  each_of_state<P>(state, [&](int row, int column, float& x, float& y) {
    const auto pair = ld_global(reinterpret_cast<const float2*>(slab + row * columns + column));
    x = pair.x, y = pair.y;
  });
  each_of_vector<P>(sum, P, [&](int at, float& x) { x = ld_global(slab + P * columns + at); });
}
template <int P>
PRIM void store_slab(StateSum<P>& state, VectorSum<P>& sum, int numbers, float* slab) {
  constexpr int columns = SweepTile<P>::columns;
  each_of_state<P>(state, [&](int row, int column, float x, float y) {
    prim::st_global(reinterpret_cast<float2*>(slab + row * columns + column), float2{x, y});
  });
  each_of_vector<P>(sum, P,
                    [&](int at, float x) { prim::st_global(slab + P * columns + at, at < numbers ? x : 0.0f); });
}

}  // namespace mmca::cuda::sm80
