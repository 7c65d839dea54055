// Tiles of 16-bit numbers in shared memory, and products of them on the tensor cores. Shared by the kernels of sm80/.
//
// A tile is rows of D numbers, D = 64, 128 or 256, in chunks of 8 (16 bytes). Chunk c of row r lies at
//
//     tile + 2 D r + 16 (c ^ (r % 8))
//
// so that 8 rows of one chunk (ldmatrix) and 8 neighbouring chunks of one row (copies) both touch every bank once.
// Tiles begin at multiples of 128 bytes, parts of them at multiples of 8 rows.
//
// Fragments are those of mma.m16n8k16 (primitives.cuh): an m16 x n8 accumulator is float[4]; with g = lane / 4 and
// t = lane % 4 it holds rows g, g, g + 8, g + 8 and columns 2t, 2t + 1, 2t, 2t + 1.
#pragma once

#include "cuda/rows.cuh"

namespace mmca::cuda::sm80 {

using prim::smem_t;

constexpr int warp_size = 32;

// Made anew where they are asked for: registers are for accumulators.
PRIM int lane_of_thread() { return static_cast<int>(prim::opaque(threadIdx.x) % warp_size); }
PRIM int warp_of_thread() { return static_cast<int>(prim::opaque(threadIdx.x) / warp_size); }

template <int D>
PRIM constexpr int row_bytes() {
  return 2 * D;
}
template <int D>
PRIM constexpr smem_t chunk_address(smem_t tile, int row, int chunk) {
  return tile + static_cast<smem_t>(row * row_bytes<D>() + ((chunk ^ (row & 7)) << 4));
}

// ---- from global memory ----------------------------------------------------------------------------------------

// Rows of one head of one sequence: row p is at data + p * stride. Chunks that hold features are read, the last one
// whole (rows are padded to 8 numbers), chunks beyond are zeros in the tile.
struct RowSource {
  const unsigned char* data;
  std::int64_t stride;  // bytes
  std::int32_t chunks;
};
PRIM RowSource row_source_at(const unsigned char* data, const Input& x, std::int64_t features) {
  return {data, 2 * x.row, static_cast<std::int32_t>((features + 7) / 8)};
}
PRIM RowSource row_source(const Input& x, const Sequence& sequence, std::int64_t begin, std::int64_t head,
                          std::int64_t features) {
  const auto* data = static_cast<const unsigned char*>(x.data) + 2 * row_offset(x, sequence, begin, head, 0);
  return row_source_at(data, x, features);
}

// Row r of those that a warp copies, where Warps warps copy a tile together, in turns of rows_at_once: a lane's chunks
// of all of them lie apart by the same distance, for D < 256 with four warps and more.
template <int D, int Warps>
struct CopyTurns {
  static constexpr int chunks = D / 8, rows_at_once = warp_size / chunks, stride = rows_at_once * Warps;

  PRIM static int row(int warp, int r) { return r / rows_at_once * stride + warp * rows_at_once + r % rows_at_once; }
};

// Begins to copy Rows rows to `tile`, warp `warp` of Warps its share of them, at most 32. Lane r names the share's row
// r (CopyTurns): its row in the source, or a negative number for a row of zeros.
template <int D, int Rows, int Warps = 1>
PRIM void copy_rows(smem_t tile, const RowSource& source, std::int32_t row_of_lane, int warp = 0) {
  using Turns = CopyTurns<D, Warps>;
  static_assert(Rows / Warps <= warp_size && Rows % Turns::stride == 0);
  const int lane = lane_of_thread(), chunk = lane % Turns::chunks, first = Turns::row(warp, lane / Turns::chunks);
  const unsigned char* data = source.data + 16 * chunk;
  const bool features = chunk < source.chunks;
#pragma unroll
  for (int i = 0; i < Rows / Turns::stride; ++i) {
    const std::int32_t from = prim::shfl(row_of_lane, i * Turns::rows_at_once + lane / Turns::chunks);
    prim::cp_async<16>(chunk_address<D>(tile, first + i * Turns::stride, chunk), data + from * source.stride,
                       features && from >= 0);
  }
}

// The same for rows begin, begin + 1, ...; zeros for those outside of `inside`.
template <int D, int Rows, int Warps = 1>
PRIM void copy_rows(smem_t tile, const RowSource& source, std::int32_t begin, Interval inside, int warp = 0) {
  using Turns = CopyTurns<D, Warps>;
  static_assert(Rows % Turns::stride == 0);
  const int lane = lane_of_thread(), chunk = lane % Turns::chunks, first = Turns::row(warp, lane / Turns::chunks);
  const unsigned char* from = source.data + (begin + first) * source.stride + 16 * chunk;
  const auto place = static_cast<std::uint32_t>(begin + first - inside.begin);
  const auto size =
      static_cast<std::uint32_t>(chunk < source.chunks && inside.begin < inside.end ? inside.end - inside.begin : 0);
#pragma unroll
  for (int i = 0; i < Rows / Turns::stride; ++i) {
    prim::cp_async<16>(chunk_address<D>(tile, first + i * Turns::stride, chunk), from,
                       place + i * Turns::stride < size);
    from += Turns::stride * source.stride;
  }
}

// Entries begin .. begin + Rows - 1 of a list of keys, whichever way it is stored; zeros for those outside of `inside`.
// `row_of_lane`: what list_rows says of them, worth asking early; ignored without positions.
template <int D, int Rows, int Warps>
PRIM std::int32_t list_rows(const std::int32_t* positions, std::int32_t begin, Interval inside, int warp = 0) {
  const std::int32_t c = begin + CopyTurns<D, Warps>::row(warp, lane_of_thread());
  const bool valid = positions && lane_of_thread() < Rows / Warps && c >= inside.begin && c < inside.end;
  return valid ? ld_global(positions + c) : -1;
}
template <int Rows>
PRIM std::int32_t list_rows(const std::int32_t* positions, std::int32_t begin, Interval inside) {
  return list_rows<64, Rows, 1>(positions, begin, inside);  // one warp's rows are in their order for any D
}
template <int D, int Rows, int Warps = 1>
PRIM void copy_list_rows(smem_t tile, const RowSource& source, const std::int32_t* positions, std::int32_t row_of_lane,
                         std::int32_t begin, Interval inside, int warp = 0) {
  if (positions) copy_rows<D, Rows, Warps>(tile, source, row_of_lane, warp);
  else copy_rows<D, Rows, Warps>(tile, source, begin, inside, warp);
}

// ---- fragments ---------------------------------------------------------------------------------------------------

// A lane's place in the four 8 x 8 matrices of an ldmatrix_x4, for any 16 rows x 2 chunks of a tile (rows a multiple of
// 8, the first chunk even). Adding a multiple of 128 to `lane` moves to another tile.
template <int D>
struct LanePlace {
  smem_t lane;

  PRIM smem_t operator()(int row, int chunk) const {
    return (lane ^ static_cast<smem_t>((chunk & 7) << 4)) +
           static_cast<smem_t>(row * row_bytes<D>() + (chunk >> 3) * 128);
  }
  PRIM LanePlace at(smem_t offset) const { return {lane + offset}; }
  // The same place; addresses made from it are made anew where they are used, instead of kept in registers.
  PRIM LanePlace fresh() const { return {prim::opaque(lane)}; }
  // From `chunk` on, a multiple of the power of 2 above the chunks that will be asked for.
  PRIM LanePlace from_chunk(int chunk) const { return {(*this)(0, chunk)}; }
};
// Matrices in the order (rows 0-7, chunk 0), (rows 8-15, chunk 0), (rows 0-7, chunk 1), (rows 8-15, chunk 1).
template <int D>
PRIM LanePlace<D> rows_first(smem_t tile) {
  const int lane = lane_of_thread();
  return {chunk_address<D>(tile, lane % 16, lane / 16)};
}
// Matrices in the order (rows 0-7, chunk 0), (rows 0-7, chunk 1), (rows 8-15, chunk 0), (rows 8-15, chunk 1).
template <int D>
PRIM LanePlace<D> chunks_first(smem_t tile) {
  const int lane = lane_of_thread();
  return {chunk_address<D>(tile, lane / 16 * 8 + lane % 8, lane / 8 % 2)};
}

// What of a tile is which operand of d (m x n) += a (m x k) b (k x n):
//   a, tile rows are m: load_a(rows_first, m, k / 8)          a, tile rows are k: load_a_trans(chunks_first, k, m / 8)
//   b, tile rows are n: load_b(chunks_first, n, k / 8)        b, tile rows are k: load_b_trans(rows_first, k, n / 8)
// Each loads 16 x 16; b[0], b[1] are the fragment of the first 8 columns n, b[2], b[3] of the others.
template <int D>
PRIM void load_a(std::uint32_t (&a)[4], LanePlace<D> place, int row, int chunk) {
  prim::ldmatrix_x4(a, place(row, chunk));
}
template <int D>
PRIM void load_a_trans(std::uint32_t (&a)[4], LanePlace<D> place, int row, int chunk) {
  prim::ldmatrix_x4_trans(a, place(row, chunk));
}
template <int D>
PRIM void load_b(std::uint32_t (&b)[4], LanePlace<D> place, int row, int chunk) {
  prim::ldmatrix_x4(b, place(row, chunk));
}
template <int D>
PRIM void load_b_trans(std::uint32_t (&b)[4], LanePlace<D> place, int row, int chunk) {
  prim::ldmatrix_x4_trans(b, place(row, chunk));
}

// Two neighbouring n8 accumulators, rounded, as the a of a product over their 16 columns.
template <class T>
PRIM void pack_a(std::uint32_t (&a)[4], const float (&left)[4], const float (&right)[4]) {
  a[0] = prim::pack2<T>(left[0], left[1]), a[1] = prim::pack2<T>(left[2], left[3]);
  a[2] = prim::pack2<T>(right[0], right[1]), a[3] = prim::pack2<T>(right[2], right[3]);
}

// ---- products ----------------------------------------------------------------------------------------------------

template <int M, int N>
using Accumulator = float[M][N][4];  // M m16 x N n8

template <int M, int N>
PRIM void clear(Accumulator<M, N>& d) {
#pragma unroll
  for (int m = 0; m < M; ++m)
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) d[m][n][e] = 0.0f;
}

// d += a y^T: a is the 16 columns from `chunk` on, y_chunks_first the place of N n8 rows of D features.
template <class T, int D, int M, int N>
PRIM void multiply_columns(Accumulator<M, N>& d, const std::uint32_t (&a)[M][4], LanePlace<D> y_chunks_first,
                           int chunk) {
#pragma unroll
  for (int n = 0; n < N; n += 2) {
    std::uint32_t b[4];
    load_b(b, y_chunks_first, 8 * n, chunk);
#pragma unroll
    for (int m = 0; m < M; ++m) {
      prim::mma_m16n8k16<T>(d[m][n], a[m], b[0], b[1]);
      prim::mma_m16n8k16<T>(d[m][n + 1], a[m], b[2], b[3]);
    }
  }
}

// d += x y^T, summed over the D features: M m16 rows of x from its lane's place on, N n8 rows of y.
template <class T, int D, int M, int N>
PRIM void multiply_transposed(Accumulator<M, N>& d, LanePlace<D> x_rows_first, LanePlace<D> y_chunks_first) {
#pragma unroll
  for (int chunk = 0; chunk < D / 8; chunk += 2) {
    std::uint32_t a[M][4];
#pragma unroll
    for (int m = 0; m < M; ++m) load_a(a[m], x_rows_first, 16 * m, chunk);
    multiply_columns<T>(d, a, y_chunks_first, chunk);
  }
}

// d += a y: a is 16 columns, y the 16 rows from `row` on.
template <class T, int D, int M, int N>
PRIM void multiply_rows(Accumulator<M, N>& d, const std::uint32_t (&a)[M][4], LanePlace<D> y_rows_first, int row) {
#pragma unroll
  for (int n = 0; n < N; n += 2) {
    std::uint32_t b[4];
    load_b_trans(b, y_rows_first, row, n);
#pragma unroll
    for (int m = 0; m < M; ++m) {
      prim::mma_m16n8k16<T>(d[m][n], a[m], b[0], b[1]);
      prim::mma_m16n8k16<T>(d[m][n + 1], a[m], b[2], b[3]);
    }
  }
}

// d += p y: p an accumulator of K n8 columns, rounded to T; y has 8 K rows, of which columns 0 .. 8 N - 1 are taken.
template <class T, int D, int M, int N, int K>
PRIM void multiply_rounded(Accumulator<M, N>& d, const Accumulator<M, K>& p, LanePlace<D> y_rows_first) {
#pragma unroll
  for (int k = 0; k < K; k += 2) {
    std::uint32_t a[M][4];
#pragma unroll
    for (int m = 0; m < M; ++m) pack_a<T>(a[m], p[m][k], p[m][k + 1]);
    multiply_rows<T>(d, a, y_rows_first, 8 * k);
  }
}

// d += x y, summed over K columns of x and rows of y: M m16 rows of x, N n8 columns of y.
template <class T, int K, int Dx, int Dy, int M, int N>
PRIM void multiply(Accumulator<M, N>& d, LanePlace<Dx> x_rows_first, LanePlace<Dy> y_rows_first) {
#pragma unroll
  for (int k = 0; k < K; k += 16) {
    std::uint32_t a[M][4];
#pragma unroll
    for (int m = 0; m < M; ++m) load_a(a[m], x_rows_first, 16 * m, k / 8);
    multiply_rows<T>(d, a, y_rows_first, k);
  }
}

// d += x^T y, summed over K rows of x and y: M m16 columns of x, N n8 columns of y.
template <class T, int K, int Dx, int Dy, int M, int N>
PRIM void multiply_left_transposed(Accumulator<M, N>& d, LanePlace<Dx> x_chunks_first, LanePlace<Dy> y_rows_first) {
#pragma unroll
  for (int k = 0; k < K; k += 16) {
    std::uint32_t a[M][4];
#pragma unroll
    for (int m = 0; m < M; ++m) load_a_trans(a[m], x_chunks_first, k, 2 * m);
    multiply_rows<T>(d, a, y_rows_first, k);
  }
}

// A warp's 16 M rows of queries as fragments; in registers or not at all.
template <int D, int M, bool Held>
struct HeldQueries {
  std::uint32_t a[D / 16][M][4];

  PRIM void load(smem_t queries) {
    const LanePlace<D> place = rows_first<D>(queries);
#pragma unroll
    for (int k = 0; k < D / 16; ++k)
#pragma unroll
      for (int m = 0; m < M; ++m) load_a(a[k][m], place, 16 * m, 2 * k);
  }
  template <class T, int N>
  PRIM void multiply(Accumulator<M, N>& s, LanePlace<D> keys_chunks_first) const {
#pragma unroll
    for (int k = 0; k < D / 16; ++k) multiply_columns<T>(s, a[k], keys_chunks_first, 2 * k);
  }
};
template <int D, int M>
struct HeldQueries<D, M, false> {};

// ---- rows of an accumulator ----------------------------------------------------------------------------------------

// Row h (0 or 1) of an m16 accumulator's two rows of a lane, counted in the 16.
PRIM int fragment_row(int h) { return lane_of_thread() / 4 + 8 * h; }
// The first of a lane's two columns of an n8 accumulator.
PRIM int fragment_column() { return lane_of_thread() % 4 * 2; }

// Over the four lanes that share a row.
PRIM float quad_sum(float x) {
  x += prim::shfl_xor(x, 1);
  return x + prim::shfl_xor(x, 2);
}
PRIM float quad_max(float x) {
  x = fmaxf(x, prim::shfl_xor(x, 1));
  return fmaxf(x, prim::shfl_xor(x, 2));
}

}  // namespace mmca::cuda::sm80
