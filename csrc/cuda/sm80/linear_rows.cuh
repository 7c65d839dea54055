// Rows of a sweep's tiles (linear_pieces.cuh): their feature map, their scale, and results on their way out.
//
// 16 bits must hold what is multiplied. phi(k) is as it is: at most 65505, and in fp16 what is below 2^-24 vanishes.
// phi(q) is in a scale of its row's own, which cancels: its largest is 1, in fp16 2^13, so that features down to 2^-27
// of it are whole. In fp16 rows of weights and the state are multiplied by powers of two that make their largest number
// less than 2^15.
#pragma once

#include <cstring>

#include "cuda/feature_map.cuh"
#include "cuda/sm80/row_stores.cuh"

namespace mmca::cuda::sm80 {

template <class T>
inline constexpr bool is_f16 = std::is_same_v<T, Float16>;

// ---- scales --------------------------------------------------------------------------------------------------------

PRIM std::uint32_t bits_of(float x) {
  std::uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}
PRIM float float_of(std::uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

// Powers of two: `up` brings numbers of up to `top` (not negative) below 2^15, `down` is 1 / up.
struct PowerScale {
  float up = 1.0f, down = 1.0f;

  PowerScale() = default;
  PRIM explicit PowerScale(float top) {
    std::uint32_t exponent = bits_of(top) >> 23;
    if (exponent < 15) exponent = 15;
    up = float_of((268 - exponent) << 23), down = float_of((exponent - 14) << 23);
  }
};

// phi of a row: factor phi(x - shift), whose derivative is min(factor, that).
struct RowMap {
  float shift = 0.0f, factor = 1.0f;

  PRIM float operator()(float x) const { return factor * phi(x - shift); }
};
// Of a query row, by its largest feature.
template <class T>
PRIM RowMap map_of_query(float top) {
  constexpr float largest = is_f16<T> ? 8192.0f : 1.0f;
  return top < 0.0f ? RowMap{top, largest} : RowMap{0.0f, largest / (1.0f + top)};
}

PRIM float warp_max(float x) {
#pragma unroll
  for (int lanes = 1; lanes < warp_size; lanes *= 2) x = fmaxf(x, prim::shfl_xor(x, lanes));
  return x;
}

// ---- tiles in shared memory ----------------------------------------------------------------------------------------

template <class T>
PRIM float2 unpack2(std::uint32_t pair) {
  return {prim::to_float<T>(static_cast<std::uint16_t>(pair)),
          prim::to_float<T>(static_cast<std::uint16_t>(pair >> 16))};
}

// body(row, chunk, address) for the chunks of a tile of Rows rows, of which each thread has its share; the lanes of a
// row are neighbours.
template <int D, int Rows, int Threads, class Body>
PRIM void each_chunk(smem_t tile, const Body& body) {
  constexpr int chunks = D / 8, rows_at_once = Threads / chunks;
  const int chunk = static_cast<int>(threadIdx.x) % chunks, first = static_cast<int>(threadIdx.x) / chunks;
#pragma unroll 2
  for (int r = first; r < Rows; r += rows_at_once) body(r, chunk, chunk_address<D>(tile, r, chunk));
}

template <class T>
PRIM uint4 map_chunk(uint4 raw, const RowMap& map, int features) {
  std::uint32_t* pairs = &raw.x;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 x = unpack2<T>(pairs[i]);
    pairs[i] = prim::pack2<T>(2 * i < features ? map(x.x) : 0.0f, 2 * i + 1 < features ? map(x.y) : 0.0f);
  }
  return raw;
}
// Writers, in place: phi of the first `features`, zeros behind them and in rows whose note is 0. map: of a row.
template <class T, int D, int Rows, int Threads, class Map>
PRIM void map_tile(smem_t tile, int features, smem_t notes, const Map& map) {
  each_chunk<D, Rows, Threads>(tile, [&](int r, int chunk, smem_t at) {
    uint4 mapped{0, 0, 0, 0};
    if (prim::ld_shared<float>(notes + 4 * r) != 0.0f)
      mapped = map_chunk<T>(prim::ld_shared<uint4>(at), map(r), features - 8 * chunk);
    prim::st_shared(at, mapped);
  });
}
// Zeros for rows whose note is 0.
template <int D, int Rows, int Threads>
PRIM void clear_hidden(smem_t tile, smem_t notes) {
  each_chunk<D, Rows, Threads>(tile, [&](int r, int, smem_t at) {
    if (prim::ld_shared<float>(notes + 4 * r) == 0.0f) prim::st_shared(at, uint4{0, 0, 0, 0});
  });
}
// Readers that are query rows, in place; body(row, top) by one thread of each row.
template <class T, int D, int Rows, int Threads, class Body>
PRIM void map_queries(smem_t tile, int features, const Body& body) {
  each_chunk<D, Rows, Threads>(tile, [&](int r, int chunk, smem_t at) {
    uint4 raw = prim::ld_shared<uint4>(at);
    const std::uint32_t* pairs = &raw.x;
    float top = -infinity<float>();
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 x = unpack2<T>(pairs[i]);
      if (8 * chunk + 2 * i < features) top = fmaxf(top, x.x);
      if (8 * chunk + 2 * i + 1 < features) top = fmaxf(top, x.y);
    }
#pragma unroll
    for (int lanes = 1; lanes < D / 8; lanes *= 2) top = fmaxf(top, prim::shfl_xor(top, lanes));
    if (chunk == 0) body(r, top);
    prim::st_shared(at, map_chunk<T>(raw, map_of_query<T>(top), features - 8 * chunk));
  });
}
// Readers that are keys.
template <class T, int D, int Rows, int Threads>
PRIM void map_keys(smem_t tile, int features) {
  each_chunk<D, Rows, Threads>(tile, [&](int, int chunk, smem_t at) {
    prim::st_shared(at, map_chunk<T>(prim::ld_shared<uint4>(at), RowMap{}, features - 8 * chunk));
  });
}

// ---- rows of an accumulator ----------------------------------------------------------------------------------------

// Numbers `column` and the next of a row of features; what lies past its end is 0.
template <class T>
PRIM float2 pair_of_row(const Input& x, const Sequence& sequence, std::int64_t begin, std::int64_t head,
                        std::int64_t row, int column, int features) {
  if (column >= features) return {0.0f, 0.0f};
  const auto* data = static_cast<const std::uint16_t*>(x.data) + row_offset(x, sequence, begin, head, row);
  float2 pair = unpack2<T>(ld_global(reinterpret_cast<const std::uint32_t*>(data + column)));
  if (column + 1 >= features) pair.y = 0.0f;
  return pair;
}

PRIM std::uint32_t pick(const std::uint32_t (&x)[4], int i) {
  const std::uint32_t low = i & 1 ? x[1] : x[0], high = i & 1 ? x[3] : x[2];
  return i & 2 ? high : low;
}
// Four words of each of the four lanes of a quad: lane t gets all words t.
PRIM uint4 transpose_quad(const std::uint32_t (&words)[4]) {
  const int t = lane_of_thread() % 4;
  std::uint32_t from[4] = {pick(words, t), 0, 0, 0};
#pragma unroll
  for (int s = 1; s < 4; ++s) from[s] = prim::shfl_xor(pick(words, t ^ s), s);
  return {pick(from, t), pick(from, t ^ 1), pick(from, t ^ 2), pick(from, t ^ 3)};
}

// Row `token` (negative: none; whole quads) from an accumulator's row h, its first column being `column` of `features`.
template <class T, int N>
PRIM void store_fragment_row(const Accumulator<1, N>& y, int h, const Output& out, const Sequence& sequence,
                             std::int64_t begin, std::int64_t head, std::int32_t token, int column, int features,
                             bool aligned) {
  std::uint16_t* const row =
      static_cast<std::uint16_t*>(out.data) + row_offset(out, sequence, begin, head, token < 0 ? 0 : token);
  std::uint32_t pairs[N];
#pragma unroll
  for (int n = 0; n < N; ++n) pairs[n] = prim::pack2<T>(y[0][n][2 * h], y[0][n][2 * h + 1]);
  if constexpr (N % 4 == 0) {
    if (aligned) {
#pragma unroll
      for (int n = 0; n < N; n += 4) {
        const uint4 chunk = transpose_quad({pairs[n], pairs[n + 1], pairs[n + 2], pairs[n + 3]});
        const int at = column + 8 * (n + lane_of_thread() % 4);
        if (token >= 0 && at < features) prim::st_global_16(row + at, chunk);
      }
      return;
    }
  }
  if (token < 0) return;
#pragma unroll
  for (int n = 0; n < N; ++n) {
    const int at = column + 8 * n + fragment_column();
    if (aligned) {
      if (at < features) prim::st_global(reinterpret_cast<std::uint32_t*>(row + at), pairs[n]);
    } else {
      if (at < features) prim::st_global(row + at * out.feature, static_cast<std::uint16_t>(pairs[n]));
      if (at + 1 < features) prim::st_global(row + (at + 1) * out.feature, static_cast<std::uint16_t>(pairs[n] >> 16));
    }
  }
}

}  // namespace mmca::cuda::sm80
