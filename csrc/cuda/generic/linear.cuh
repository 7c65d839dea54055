// Linear attention on any GPU, T = float or double: the kernels that make a sweep (generic/linear_sweep.cuh), and the
// forward and backward as sweeps (generic/linear_rows.cuh).
#pragma once

#include <algorithm>

#include "cuda/generic/linear_sweep.cuh"

namespace mmca::cuda::generic {

// ---- kernels -----------------------------------------------------------------------------------------------------

// A block a unit, from first_unit on.
template <class T, SweepOf what>
__global__ void __launch_bounds__(SweepSizes<T>::threads, 2)
    whole_kernel(const __grid_constant__ SweepArguments<T> a, bool reads, bool late) {
  Sweep<T, what>(a, a.first_unit + blockIdx.x).run_whole(reads, late);
}

// A block a segment of a unit: its sum, or its readers.
template <class T, SweepOf what, bool reads>
__global__ void __launch_bounds__(SweepSizes<T>::threads, 2)
    segment_kernel(const __grid_constant__ SweepArguments<T> a) {
  const auto block = static_cast<std::int32_t>(blockIdx.x);
  Sweep<T, what> sweep(a, block / a.in_flight);
  if (reads) sweep.read_segment(block % a.in_flight);
  else sweep.sum_segment(block % a.in_flight);
}

inline constexpr int element_threads = 256;

// A thread a sum: what the segments in flight start from, and the sum up to the last of them.
template <class T, SweepOf what>
__global__ void __launch_bounds__(element_threads) scan_kernel(const __grid_constant__ SweepArguments<T> a) {
  const std::int64_t blocks = (a.sizes.unit_sums + element_threads - 1) / element_threads;
  const SweepUnit<T, what> unit(a, static_cast<std::uint32_t>(blockIdx.x / blocks));
  const std::int64_t sum = blockIdx.x % blocks * element_threads + threadIdx.x;
  const std::int64_t left = unit.segments(a) - a.first_segment, count = left < a.in_flight ? left : a.in_flight;
  if (count <= 0 || sum >= std::int64_t{a.sizes.depth} * (SweepSizes<T>::width + (has_total(what) ? 1 : 0))) return;
  double* carry = a.carry + unit.index * a.sizes.unit_sums + sum;
  double carried = a.first_segment ? ld_global(carry) : unit.given(a, sum);
  T* slot = a.slots + unit.index * a.in_flight * a.sizes.unit_sums + sum;
  for (std::int64_t s = 0; s < count; ++s, slot += a.sizes.unit_sums) {
    const T local = ld_global(slot);
    st_global(slot, static_cast<T>(carried));
    carried += static_cast<double>(local);
  }
  st_global(carry, carried);
}

// A thread a sum: the problem's state after the last writer.
template <class T, SweepOf what>
__global__ void __launch_bounds__(element_threads) end_kernel(const __grid_constant__ SweepArguments<T> a) {
  const std::int64_t blocks = (a.sizes.unit_sums + element_threads - 1) / element_threads;
  const SweepUnit<T, what> unit(a, static_cast<std::uint32_t>(a.first_unit + blockIdx.x / blocks));
  const std::int64_t sum = blockIdx.x % blocks * element_threads + threadIdx.x;
  if (sum >= std::int64_t{a.sizes.depth} * (SweepSizes<T>::width + (has_total(what) ? 1 : 0))) return;
  unit.take(a, sum,
            unit.segments(a) ? ld_global(a.carry + (unit.index - a.first_unit) * a.sizes.unit_sums + sum)
                             : unit.given(a, sum));
}

// A block some tokens of a unit's sequence: readers outside all segments.
inline constexpr int read_rows = 256;
template <class T, SweepOf what>
__global__ void __launch_bounds__(SweepSizes<T>::threads, 2)
    read_kernel(const __grid_constant__ SweepArguments<T> a, int tokens, bool early) {
  const std::int64_t units = a.problem.kv_heads * a.sizes.tiles;
  const Tile tile = tile_of(a.problem, a.plan, blockIdx.x / units, tokens, keys_read(what));
  if (tile.count <= 0) return;
  const std::int64_t rows = keys_read(what) ? 1 : a.problem.heads_per_kv();
  Sweep<T, what>(a, tile.sequence.index * units + blockIdx.x % units)
      .read(tile.first * rows, (tile.first + tile.count) * rows, early);
}

// The row facts' second half, from what each tile of columns adds to it.
template <class T>
__global__ void __launch_bounds__(element_threads)
    facts_kernel(T* facts, std::int64_t group, const T* partials, std::int64_t count, int tiles) {
  const std::int64_t row = std::int64_t{blockIdx.x} * element_threads + threadIdx.x;
  if (row >= count) return;
  T sum = T(0);
  for (int t = 0; t < tiles; ++t) sum += ld_global(partials + t * count + row);
  st_global(facts + group + row, sum);
}

// ---- host --------------------------------------------------------------------------------------------------------

template <class T, SweepOf what>
void run_sweep(const LinearLaunch& launch, const StateView<const double>& start, const StateView<double>& end,
               T* partials = nullptr, std::int64_t facts = 0) {
  const LinearProblem& p = launch.problem;
  using S = SweepSizes<T>;
  const bool packed = p.q_offsets, reads = p.causal;
  // Whether there may be readers outside all segments, and whether some of them see a writer.
  const bool early = p.causal && !keys_read(what) && (packed || p.q_len > p.k_len);
  const bool late = !p.causal || packed || p.key_mask || p.k_len == 0 || (keys_read(what) && p.k_len > p.q_len);
  const bool late_see = !p.causal || (keys_read(what) && (packed || p.k_len > p.q_len));
  SweepArguments<T> a{p, launch.plan, S(p, by_value(what)), start, end, nullptr, nullptr, partials, facts, 0,
                      0, 1,           late_see || end.sum};
  static_assert(sizeof(a) < 4000);
  const std::int64_t units = launch.plan.sequences * p.kv_heads * a.sizes.tiles;
  if (units == 0) return;
  const std::int64_t writers = keys_read(what) ? p.q_len * p.heads_per_kv() : p.k_len;
  const std::int64_t segments = (writers + segment_rows - 1) / segment_rows;
  // Units that fill the GPU do all of their work, so many at once: memory does not grow with their number. Fewer share
  // it, in segments or tiles of readers.
  const std::int64_t blocks = 2 * launch.device.multiprocessors;
  const bool many = units >= blocks, whole = many || segments <= 1;
  const std::int64_t units_at_once = many ? std::min(units, 8 * blocks) : units;
  if (!whole) a.in_flight = static_cast<std::int32_t>(std::min(segments, (2 * blocks + units - 1) / units));
  if (segments && (segments > 1 || a.keeps_end)) a.carry = launch.take<double>(units_at_once * a.sizes.unit_sums);
  if (!whole || (segments && (segments > 1 || start.sum || a.keeps_end)))
    a.slots = launch.take<T>(units_at_once * a.in_flight * a.sizes.unit_sums);

  const int threads = S::threads;
  const std::int64_t unit_blocks = (a.sizes.unit_sums + element_threads - 1) / element_threads;
  const std::int64_t tokens = keys_read(what) ? 1 : p.heads_per_kv(),
                     at_once = std::max<std::int64_t>(read_rows / tokens, 1);
  const auto read = [&](bool of_early) {
    const std::int64_t tiles = tile_count(p, launch.plan, static_cast<int>(at_once), keys_read(what));
    launch(&read_kernel<T, what>, tiles * p.kv_heads * a.sizes.tiles, threads, a.sizes.bytes, a,
           static_cast<int>(at_once), of_early);
  };
  if (early) read(true);
  const auto run_whole = [&](std::int64_t count, bool with_late) {
    if (with_late || (segments && (reads || a.keeps_end)))
      launch(&whole_kernel<T, what>, count, threads, a.sizes.bytes, a, reads, with_late);
  };
  if (many) {
    for (; a.first_unit < units; a.first_unit += units_at_once) {
      const std::int64_t count = std::min(units_at_once, units - a.first_unit);
      run_whole(count, late);
      if (end.sum) launch(&end_kernel<T, what>, count * unit_blocks, element_threads, 0, a);
    }
    return;
  }
  if (whole) run_whole(units, false);
  for (; !whole && a.first_segment < segments; a.first_segment += a.in_flight) {
    launch(&segment_kernel<T, what, false>, units * a.in_flight, threads, a.sizes.bytes, a);
    launch(&scan_kernel<T, what>, units * unit_blocks, element_threads, 0, a);
    if (reads) launch(&segment_kernel<T, what, true>, units * a.in_flight, threads, a.sizes.bytes, a);
  }
  if (late) read(false);
  if (end.sum) launch(&end_kernel<T, what>, units * unit_blocks, element_threads, 0, a);
}

template <class T>
void linear_forward(const LinearLaunch& launch) {
  const LinearProblem& p = launch.problem;
  const auto view = [&](const auto& state) {
    return StateView<std::remove_pointer_t<decltype(state.sum)>>{state.sum, p.value_dim, 1, nullptr, state.normal};
  };
  run_sweep<T, SweepOf::out>(launch, view(p.state), view(p.final_state));
}

template <class T>
void linear_backward(const LinearLaunch& launch) {
  const LinearProblem& p = launch.problem;
  const auto transposed = [&](const auto& state) {
    return StateView<std::remove_pointer_t<decltype(state.sum)>>{state.sum, 1, p.value_dim, state.normal, nullptr};
  };
  const std::int64_t rows = (p.q_offsets ? 1 : p.batch) * p.q_heads * p.q_len;
  const int tiles = SweepSizes<T>(p, by_value(SweepOf::facts)).tiles;
  T* partials = launch.take<T>(tiles * rows);
  run_sweep<T, SweepOf::facts>(launch, {p.state.sum, p.value_dim, 1, nullptr, p.state.normal}, {}, partials, rows);
  launch(&facts_kernel<T>, (rows + element_threads - 1) / element_threads, element_threads, 0,
         static_cast<T*>(p.row_facts.data), p.row_facts.group, partials, rows, tiles);
  run_sweep<T, SweepOf::query>(launch, transposed(p.state), {});
  run_sweep<T, SweepOf::value>(launch, {p.grad_final_state.sum, p.value_dim, 1, nullptr, nullptr}, {});
  run_sweep<T, SweepOf::key>(launch, transposed(p.grad_final_state), transposed(p.grad_state));
}

}  // namespace mmca::cuda::generic
