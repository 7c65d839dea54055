// For the backward: rounded rows of gradients, from accumulators through a tile in shared memory to global memory.
#pragma once

#include "cuda/sm80/tile.cuh"

namespace mmca::cuda::sm80 {

// The place of a lane's two numbers of row lane / 4 and columns 2 (lane % 4) and the next, in a tile that takes rounded
// accumulators: place(row, chunk), `row` a multiple of 8, is where those of rows row.. and columns 8 chunk.. go.
template <int D>
PRIM LanePlace<D> fragment_place(smem_t tile) {
  const int lane = lane_of_thread();
  return {chunk_address<D>(tile, lane / 4, 0) + static_cast<smem_t>(lane % 4 * 4)};
}
template <class T, int D, int M, int N>
PRIM void store_rounded(const Accumulator<M, N>& d, float factor, LanePlace<D> place) {
#pragma unroll
  for (int m = 0; m < M; ++m)
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
      for (int h = 0; h < 2; ++h)
        prim::st_shared(place(16 * m + 8 * h, n), prim::pack2<T>(factor * d[m][n][2 * h], factor * d[m][n][2 * h + 1]));
}

// One head's rows of a result, which need not lie at aligned addresses.
struct RowTarget {
  unsigned char* data;
  std::int64_t row, feature;  // strides in bytes
  std::int32_t features;
};
PRIM RowTarget row_target(const Output& x, const Sequence& sequence, std::int64_t begin, std::int64_t head,
                          std::int64_t features) {
  return {static_cast<unsigned char*>(x.data) + 2 * row_offset(x, sequence, begin, head, 0), 2 * x.row, 2 * x.feature,
          static_cast<std::int32_t>(features)};
}

// Writes numbers 8 chunk .. 8 chunk + 7 of a row, as far as there are so many.
PRIM void store_chunk(const RowTarget& target, std::int32_t row, int chunk, uint4 numbers) {
  unsigned char* to = target.data + row * target.row + 8 * chunk * target.feature;
  if (target.feature == 2 && 8 * chunk + 8 <= target.features && reinterpret_cast<std::uintptr_t>(to) % 16 == 0) {
    prim::st_global_16(to, numbers);
    return;
  }
  const std::uint32_t pairs[4] = {numbers.x, numbers.y, numbers.z, numbers.w};
#pragma unroll
  for (int i = 0; i < 8; ++i)
    if (8 * chunk + i < target.features)
      prim::st_global(reinterpret_cast<std::uint16_t*>(to + i * target.feature),
                      static_cast<std::uint16_t>(pairs[i / 2] >> 16 * (i % 2)));
}

// The block's threads write the first `count` rows of a tile; row_at(r): where row r goes.
template <int D, class RowAt>
PRIM void store_tile(smem_t tile, const RowTarget& target, std::int32_t count, int threads, RowAt&& row_at) {
  constexpr int chunks = D / 8;
  const int thread = static_cast<int>(threadIdx.x), chunk = thread % chunks;
  if (8 * chunk >= target.features) return;
  for (int row = thread / chunks; row < count; row += threads / chunks)
    store_chunk(target, row_at(row), chunk, prim::ld_shared<uint4>(chunk_address<D>(tile, row, chunk)));
}

}  // namespace mmca::cuda::sm80
