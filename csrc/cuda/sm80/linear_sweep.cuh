// A sweep of linear attention on the tensor cores (linear_pieces.cuh says what it is for; numbers: linear_rows.cuh).
//
// A block takes one KV head, one piece of time and `columns` numbers of g, in chunks of `tokens`. For the tiles of a
// chunk, one for each head of the writers (F, G) or of the readers (X), 64 tokens (32 for P = 256) each:
//
//     A = X F^T, zero where a writer's time is after a reader's;  Y = X M + A G;  M += F^T G
//
// M is kept twice: in the registers of all warps (warp w its rows w P / 4 ...) in fp32, and for X M in shared memory as
// 16-bit pairs high + low, as it was when the chunk began. What a chunk adds is summed apart, so M's error does not
// grow with the tensor cores' truncation. A is rounded to 16 bits. The vector beside M is a product too: rows of ones,
// or of -p in three parts, times the tile of phi.
//
// Shared memory: two buffers (F [tokens][P], G [tokens][64]) and their rows' notes: three floats, (d, top, p), of keys
// (1 or 0 if hidden); what the block works on; then X [tokens][P], M [P][64] high and low (P = 256: 32 of each in one
// row), the vector, and notes of X. F and G are copied a step ahead; phi is applied in place.
#pragma once

#include "cuda/sm80/linear_readers.cuh"
#include "cuda/sm80/linear_writers.cuh"

namespace mmca::cuda::sm80 {

template <class T, int P>
PRIM void add_writers(const SweepBlock<P>& block, StateSum<P>& state, VectorSum<P>& vector, int buffer, float factor) {
  using Shared = SweepTile<P>;
  add_state<T, P>(state, buffer, factor);
  const smem_t products = Shared::note(buffer) + 2 * Shared::note_bytes;
  if (block.sweep.has_phi_f())  // p, in the key gradient alone; the value gradient's vector is never read
    add_vector<T, P>(vector, rows_first<P>(Shared::f(buffer)), P, false, products, 1.0f);
  else
    add_vector<T, P>(vector, rows_first<64>(Shared::g(buffer)), Shared::columns, block.sweep.backwards(), products,
                     factor);
}

template <int P>
PRIM void clear(StateSum<P>& state, VectorSum<P>& vector) {
  clear(state);
#pragma unroll
  for (int v = 0; v < SweepTile<P>::vector_tiles; ++v)
#pragma unroll
    for (int i = 0; i < 4; ++i) vector[v][i] = 0.0f;
}

// The sum of a piece's writers, to its slab.
template <class T, int P>
__global__ void __launch_bounds__(SweepTile<P>::threads, SweepTile<P>::sum_blocks)
    linear_sums_kernel(const __grid_constant__ LinearProblem problem, const __grid_constant__ LinearPlan plan,
                       const __grid_constant__ LinearSweep sweep) {
  using Shared = SweepTile<P>;
  if (threadIdx.x == 0) SweepBlock<P>::store(problem, plan, sweep, true);
  prim::syncthreads();
  const auto block = [&] { return SweepBlock<P>(problem, plan, sweep); };
  const std::int32_t end = block().end;
  std::int32_t time = block().begin;
  if (time >= end) return;
  StateSum<P> state;
  VectorSum<P> vector;
  clear<P>(state, vector);
  block().start_writers(time, 0, 0);
  prim::cp_async_commit();
  int buffer = 0;
#pragma unroll 1
  for (int w = 0; time < end; buffer ^= 1) {
    const bool writes = block().writes(time);
    if (!writes || ++w == block().writer_tiles()) w = 0, time += Shared::tokens;
    prim::cp_async_wait<0>();
    prim::syncthreads();
    if (time < end) block().start_writers(time, w, buffer ^ 1);
    prim::cp_async_commit();
    if (!writes) continue;
    const float factor = map_writers<T>(block(), buffer);
    prim::syncthreads();
    add_writers<T>(block(), state, vector, buffer, factor);
  }
  store_slab<P>(state, vector, sweep.has_phi_f() ? P : Shared::columns, block().slab());
}

template <class T, int P>
__global__ void __launch_bounds__(SweepTile<P>::threads, SweepTile<P>::blocks)
    linear_sweep_kernel(const __grid_constant__ LinearProblem problem, const __grid_constant__ LinearPlan plan,
                        const __grid_constant__ LinearSweep sweep) {
  using Shared = SweepTile<P>;
  constexpr int tokens = Shared::tokens;
  if (threadIdx.x == 0) SweepBlock<P>::store(problem, plan, sweep, false);
  prim::syncthreads();
  const auto block = [&] { return SweepBlock<P>(problem, plan, sweep); };
  const std::int32_t end = block().end;
  std::int32_t time = block().begin;
  if (time >= end) return;
  const int numbers = sweep.has_phi_f() ? P : Shared::columns;  // of the vector
  bool has_state = sweep.slabs && block().exists;
  float state_scale = 1.0f;
  StateSum<P> state;
  VectorSum<P> vector;
  clear<P>(state, vector);

  block().start_writers(time, 0, 0), block().start_readers(time, 0);
  prim::cp_async_commit();
  if (has_state) {
    load_slab<P>(state, vector, block().slab());
    note_top<T, P>(state);
    prim::syncthreads();
    state_scale = publish<T, P>(state, vector, numbers);
  } else {
    for (int at = static_cast<int>(threadIdx.x); at < P; at += Shared::threads)
      prim::st_shared(Shared::vector + 4 * at, 0.0f);
  }

  int buffer = 0;
#pragma unroll 1
  for (; time < end; time += tokens) {
    const bool writes = block().writes(time), reads = block().reads(time);
    const int writer_tiles = writes ? block().writer_tiles() : 1;
    ReaderRows<P> rows;
#pragma unroll 1
    for (int w = 0; w < writer_tiles; ++w) {
      prim::cp_async_wait<0>();
      prim::syncthreads();
      if (w + 1 < writer_tiles) block().start_writers(time, w + 1, buffer ^ 1);
      else if (time + tokens < end) block().start_writers(time + tokens, 0, buffer ^ 1);
      prim::cp_async_commit();
      const float factor = writes ? map_writers<T>(block(), buffer) : 1.0f;
      if (reads && w == 0) map_readers<T>(block(), time, 0);
      prim::syncthreads();

#pragma unroll 1
      for (int r = 0; reads && r < block().reader_tiles(); ++r) {
        if (r > 0) {
          prim::cp_async_wait<0>();
          map_readers<T>(block(), time, r);  // each thread what it has copied itself
          prim::syncthreads();
        }
        if (w == 0) {
          clear(rows.y), rows.total[0] = rows.total[1] = 0.0f;
          if (has_state) read_state<T>(rows, state_scale, sweep.makes_rows());
        }
        if (writes) read_writers<T>(block(), rows, buffer, factor);
        if (w + 1 < writer_tiles) continue;
        finish<T>(block(), rows, time, r);
        prim::syncthreads();  // X is free
        if (r + 1 < block().reader_tiles()) block().start_readers(time, r + 1);
        else if (time + tokens < end) block().start_readers(time + tokens, 0);
        prim::cp_async_commit();
      }
      if (writes) add_writers<T>(block(), state, vector, buffer, factor);
      buffer ^= 1;
    }
    if (time + tokens >= end) break;
    if (!reads) {  // readers may begin with the next chunk
      block().start_readers(time + tokens, 0);
      prim::cp_async_commit();
    }
    if (writes && block().reads(time + tokens)) {
      note_top<T, P>(state);
      prim::syncthreads();  // nobody reads M any more
      state_scale = publish<T, P>(state, vector, numbers);
      has_state = true;
    }
  }
}

}  // namespace mmca::cuda::sm80
