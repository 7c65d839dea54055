// For the backward: sums in float of whole tiles in global memory, added up by several blocks or kept for one that
// rounds them at the end.
//
// A sheet is rows of `width` numbers (a multiple of 8) in pieces of 16 x 8, each as the accumulators of a warp: lane
// l's four at float 4 l of the piece. Every access of a warp to a piece is thus one run of 512 bytes.
#pragma once

#include "cuda/sm80/gradient_rows.cuh"

namespace mmca::cuda::sm80 {

PRIM constexpr int sheet_width(int chunks) { return 8 * chunks; }

// The lane's numbers of the piece of rows 16 m .. and columns 8 n .. .
template <class Pointer>
PRIM Pointer sheet_piece(Pointer sheet, int width, std::int64_t m, int n) {
  return sheet + ((m * (width / 8) + n) * warp_size + lane_of_thread()) * 4;
}

// A warp's M m16 rows and N n8 columns, the first piece of which is at `piece`; `column`: the first of the columns.
template <int M, int N>
PRIM void store_pieces(const Accumulator<M, N>& d, float* piece, int width, int column) {
#pragma unroll
  for (int m = 0; m < M; ++m, piece += 16 * width)
#pragma unroll
    for (int n = 0; n < N; ++n)
      if (column + 8 * n < width)
        prim::st_global(reinterpret_cast<float4*>(piece + 128 * n),
                        float4{d[m][n][0], d[m][n][1], d[m][n][2], d[m][n][3]});
}
// The same, added to what is there; `rows`: how many of them there are.
template <int M, int N>
PRIM void add_pieces(const Accumulator<M, N>& d, float* piece, int width, int column, std::int32_t rows) {
#pragma unroll
  for (int m = 0; m < M; ++m, piece += 16 * width)
#pragma unroll
    for (int n = 0; n < N; ++n)
      if (column + 8 * n < width && 16 * m < rows)
        prim::atomic_add_quad(piece + 128 * n, float4{d[m][n][0], d[m][n][1], d[m][n][2], d[m][n][3]});
}

// Rows `g` and `g` + 8 of the piece at `piece` (its first number), times `factor`; summed over `parts` sheets.
template <class T>
PRIM void read_piece(const float* piece, int g, int parts, std::int64_t part_stride, float factor, uint4& upper,
                     uint4& lower) {
  float sum[4][4] = {};  // lanes 4 g .. 4 g + 3
  for (int part = 0; part < parts; ++part) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float4 x = ld_global(reinterpret_cast<const float4*>(piece + part * part_stride + 4 * (4 * g + i)));
      sum[i][0] += x.x, sum[i][1] += x.y, sum[i][2] += x.z, sum[i][3] += x.w;
    }
  }
  std::uint32_t pairs[2][4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    pairs[0][i] = prim::pack2<T>(factor * sum[i][0], factor * sum[i][1]);
    pairs[1][i] = prim::pack2<T>(factor * sum[i][2], factor * sum[i][3]);
  }
  upper = {pairs[0][0], pairs[0][1], pairs[0][2], pairs[0][3]};
  lower = {pairs[1][0], pairs[1][1], pairs[1][2], pairs[1][3]};
}

}  // namespace mmca::cuda::sm80
