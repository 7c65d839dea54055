// The keys and values of a list on their way through shared memory: a ring of tiles, filled ahead of their use.
//
// Items of the ring are, in turn, the keys of tile 0, its values, the keys of tile 1, ... Whoever takes item i has
// items up to i + Buffers - 2 on their way, and starts item i + Buffers - 1 into the buffer of item i - 1, when nobody
// reads that any more.
#pragma once

#include "cuda/sm80/tile.cuh"

namespace mmca::cuda::sm80 {

// Tiles of Rows keys, copied by Warps warps together; `warp` is one of them. What is asked once a tile lies in shared
// memory, too: registers are for accumulators.
template <int D, int Rows, int Warps, int Buffers>
class KeyRing {
 public:
  static constexpr smem_t buffer_bytes = Rows * row_bytes<D>(), buffers_bytes = Buffers * buffer_bytes;
  static constexpr smem_t bytes = buffers_bytes + 64;

  PRIM explicit KeyRing(smem_t ring) : ring_(ring) {}

  // Starts with entries first .. first + Rows - 1 of a list, then those `step` further on, while they begin before the
  // end of `inside`; what is outside of it becomes zeros. keys, values: of one KV head. No one may still be reading.
  PRIM void start(const RowSource& keys, const RowSource& values, const std::int32_t* positions, std::int32_t first,
                  std::int32_t step, Interval inside) {
    next_ = first, step_ = step;
    read_ = ring_;
    row_of_lane_ = find_rows(positions, inside);
    if (warp() == 0 && lane_of_thread() == 0) {
      store_source(note(0), keys), store_source(note(3), values);
      prim::st_shared(note(6), positions), prim::st_shared(note(7), inside);
    }
#pragma unroll
    for (int item = 0; item < Buffers - 1; ++item) {
      copy(item % 2 ? values : keys, ring_ + item * buffer_bytes, positions, inside);
      step_on(item % 2, positions, inside);
    }
  }

  // Waits for what this warp copies of the next item, and returns its buffer. All warps' is there after a barrier.
  PRIM smem_t take() {
    prim::cp_async_wait<Buffers - 2>();
    const smem_t buffer = read_;
    read_ += buffer_bytes;
    if (read_ == ring_ + buffers_bytes) read_ = ring_;
    return buffer;
  }
  // Starts the item which is then due, where nobody reads the one before any more: after taking keys, after taking
  // values.
  PRIM void follow_keys() { start_item(Buffers % 2 == 0); }
  PRIM void follow_values() { start_item(Buffers % 2 == 1); }

  // Whether there are keys left to take, known after the first barrier.
  PRIM bool more() const { return entry() < prim::ld_shared<Interval>(note(7)).end; }
  // The first entry of the keys that are taken next.
  PRIM std::int32_t entry() const {
    return Buffers % 2 == 1 ? next_ - Buffers / 2 * step_ : next_ - (Buffers / 2 - 1) * step_;
  }

 private:
  PRIM static int warp() { return Warps > 1 ? warp_of_thread() : 0; }
  PRIM smem_t note(int i) const { return ring_ + buffers_bytes + 8 * i; }
  PRIM std::int32_t find_rows(const std::int32_t* positions, Interval inside) const {
    return list_rows<D, Rows, Warps>(positions, next_, inside, warp());
  }
  PRIM void copy(const RowSource& source, smem_t buffer, const std::int32_t* positions, Interval inside) {
    if (next_ < inside.end)
      copy_list_rows<D, Rows, Warps>(buffer, source, positions, row_of_lane_, next_, inside, warp());
    prim::cp_async_commit();
  }
  PRIM void step_on(bool of_values, const std::int32_t* positions, Interval inside) {
    if (!of_values) return;
    next_ += step_;
    row_of_lane_ = find_rows(positions, inside);
  }
  PRIM void start_item(bool values) {
    const auto* positions = prim::ld_shared<const std::int32_t*>(note(6));
    const auto inside = prim::ld_shared<Interval>(note(7));
    smem_t buffer = read_ + (Buffers - 2) * buffer_bytes;  // two back: the one before the item taken last
    if (Buffers > 2 && buffer >= ring_ + buffers_bytes) buffer -= buffers_bytes;
    copy(load_source(note(values ? 3 : 0)), buffer, positions, inside);
    step_on(values, positions, inside);
  }
  PRIM static void store_source(smem_t at, const RowSource& source) {
    prim::st_shared(at, source.data), prim::st_shared(at + 8, source.stride), prim::st_shared(at + 16, source.chunks);
  }
  PRIM static RowSource load_source(smem_t at) {
    return {prim::ld_shared<const unsigned char*>(at), prim::ld_shared<std::int64_t>(at + 8),
            prim::ld_shared<std::int32_t>(at + 16)};
  }

  smem_t ring_, read_;
  std::int32_t next_, step_, row_of_lane_;
};

}  // namespace mmca::cuda::sm80
