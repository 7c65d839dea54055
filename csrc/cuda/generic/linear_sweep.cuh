// A sweep of linear attention on any GPU (what its rows are: generic/linear_rows.cuh), T = float or double. A block has
// a `width` of columns of one head's state M (depth x values); it goes along the head in steps of `width` writers:
//
//     A = X F^T, zero where a reader does not see a writer;  Y = X M + A G;  then M += F^T G
//     total = X z + rowsum A,  z += colsum F                                  (the forward's D alone)
//
// Long heads are cut into segments of segment_rows writers. Within one, M = start + local: `local` lives in registers,
// `start` is rounded once from a sum that is carried in double, so the error of M does not grow with the position.
// Where there are heads enough, a block takes a head from first to last (a "whole" sweep); else three kernels share it:
// local sums of all segments, their running sum, and the segments' readers. Neither that choice nor the number of
// segments in flight changes a bit. Readers of no segment (early ones see no writer, late ones all of them) have a
// kernel of their own. Nothing is added in an order that could change.
//
// Shared memory: F [writer][depth], X [reader][depth], both of an odd number of 16-byte chunks a row; M
// [depth][column]; G [writer][column]; A [reader][writer]; z [depth]. Global: a unit is (sequence, KV head, columns),
// its sums are M [depth][column], then z.
#pragma once

#include "cuda/generic/linear_rows.cuh"
#include "cuda/generic/tile.cuh"

namespace mmca::cuda::generic {

inline constexpr int segment_rows = 512;

// A state of the problem as a sweep sees it: of each head, element (p, q) at p * by_depth + q * by_value of sum, but
// the last p's in `last_row` where there is that; `normal` goes with the sums z.
template <class Double>
struct StateView {
  Double* sum = nullptr;  // null: no state
  std::int64_t by_depth = 0, by_value = 0;
  Double *last_row = nullptr, *normal = nullptr;
};

// Sizes of a sweep over a problem.
template <class T>
struct SweepSizes {
  static constexpr int chunk = Chunk<T>::size, width = 128 / static_cast<int>(sizeof(T)), readers = width / 2;
  static constexpr int threads = 8 * width, lanes = threads / readers, each = width / lanes;  // of a reader's row
  static constexpr int depth_lanes = 32, columns = width * depth_lanes / threads;  // of the state: a thread's share
  static constexpr int max_depth = 257, depth_steps = (max_depth + depth_lanes - 1) / depth_lanes;
  static constexpr int z_steps = (max_depth - 1 + threads - 1) / threads;
  static constexpr smem_t a_pitch = (width + chunk) * sizeof(T);

  int depth, padded_depth, values, tiles;
  std::int64_t unit_sums;  // numbers, a multiple of 4
  smem_t pitch, x, m, g, a, z, bytes;

  SweepSizes(const LinearProblem& problem, bool by_value) {
    depth = static_cast<int>(by_value ? problem.value_dim + 1 : problem.head_dim);
    values = static_cast<int>(by_value ? problem.head_dim : problem.value_dim);
    padded_depth = (depth + depth_lanes - 1) / depth_lanes * depth_lanes, tiles = (values + width - 1) / width;
    unit_sums = static_cast<std::int64_t>(depth) * width + (depth + 3) / 4 * 4;
    constexpr smem_t size = sizeof(T);
    const auto rows = static_cast<smem_t>((depth + chunk - 1) / chunk * chunk);
    pitch = (static_cast<smem_t>(padded_depth / chunk) | 1) * 16;
    x = width * pitch, m = x + readers * pitch, g = m + rows * width * size, a = g + width * width * size,
    z = a + readers * a_pitch, bytes = z + rows * size;
  }
};

template <class T>
struct SweepArguments {
  LinearProblem problem;
  LinearPlan plan;
  SweepSizes<T> sizes;
  StateView<const double> start;
  StateView<double> end;
  double* carry;                          // [unit]: the sum of all segments so far, once there is one
  T* slots;                               // [unit][segment in flight]: its own sum, then what it starts from
  T* partials;                            // [tile of columns][row]: see LinearRows::finish
  std::int64_t facts;                     // rows in each
  std::int64_t first_unit;                // of carry and slots
  std::int32_t first_segment, in_flight;  // the segments of this launch; a whole sweep has a slot a unit
  bool keeps_end;                         // somebody reads the sum of all segments
};

// What a block or thread works on: a unit, and the sequence and head it is of.
template <class T, SweepOf what>
struct SweepUnit {
  LinearSequence sequence;
  std::int64_t index, head, kv_head;  // head: over all sequences, as states are numbered
  int tile;                           // of columns

  PRIM SweepUnit(const SweepArguments<T>& a, std::uint32_t unit) : index(unit) {
    const auto tiles = static_cast<std::uint32_t>(a.sizes.tiles),
               heads = static_cast<std::uint32_t>(a.problem.kv_heads);
    tile = static_cast<int>(unit % tiles), head = unit / tiles, kv_head = unit / tiles % heads;
    sequence = linear_sequence_at(a.problem, a.plan, static_cast<std::int32_t>(unit / tiles / heads));
  }
  PRIM LinearRows<T, what> rows(const SweepArguments<T>& a) const { return {a.problem, sequence, kv_head}; }
  PRIM std::int32_t segments(const SweepArguments<T>& a) const {
    return static_cast<std::int32_t>((rows(a).order().writers + segment_rows - 1) / segment_rows);
  }

  // Sums are numbered [depth][column], then z.
  PRIM double given(const SweepArguments<T>& a, std::int64_t sum) const {
    if (!a.start.sum || !sequence.exists) return 0.0;
    constexpr int width = SweepSizes<T>::width;
    const std::int64_t p = sum / width, q = tile * width + sum % width, dim = a.problem.head_dim;
    if (p >= a.sizes.depth) {
      const std::int64_t d = sum - std::int64_t{a.sizes.depth} * width;
      return a.start.normal && d < a.sizes.depth ? ld_global(a.start.normal + head * dim + d) : 0.0;
    }
    if (q >= a.sizes.values) return 0.0;
    if (a.start.last_row && p + 1 == a.sizes.depth) return ld_global(a.start.last_row + head * dim + q);
    return ld_global(a.start.sum + head * dim * a.problem.value_dim + p * a.start.by_depth + q * a.start.by_value);
  }
  PRIM void take(const SweepArguments<T>& a, std::int64_t sum, double value) const {
    if (!sequence.exists) return;
    constexpr int width = SweepSizes<T>::width;
    const std::int64_t p = sum / width, q = tile * width + sum % width, dim = a.problem.head_dim;
    if (p >= a.sizes.depth) {
      const std::int64_t d = sum - std::int64_t{a.sizes.depth} * width;
      if (a.end.normal && tile == 0 && d < a.sizes.depth) st_global(a.end.normal + head * dim + d, value);
    } else if (q < a.sizes.values) {
      if (a.end.last_row && p + 1 == a.sizes.depth) st_global(a.end.last_row + head * dim + q, value);
      else st_global(a.end.sum + head * dim * a.problem.value_dim + p * a.end.by_depth + q * a.end.by_value, value);
    }
  }
};

template <class T, SweepOf what>
class Sweep {
 public:
  using S = SweepSizes<T>;

  PRIM Sweep(const SweepArguments<T>& arguments, std::int64_t unit)
      : a_(arguments),
        s_(arguments.sizes),
        index_(static_cast<std::uint32_t>(unit)),
        thread_(static_cast<int>(threadIdx.x)),
        lane_(static_cast<int>(threadIdx.x) % 32),
        warp_(static_cast<int>(threadIdx.x) / 32) {}

  // late: its late readers too.
  PRIM void run_whole(bool reads, bool late) {
    const std::int32_t segments = unit().segments(a_);
    for (std::int32_t s = 0; s < segments; ++s) {
      if (s == 0 && starts()) {
        const Unit unit = this->unit();
        T* slot = slot_of(0);
        each_number([&](std::int64_t sum) { st_global(slot + sum, static_cast<T>(unit.given(a_, sum))); });
        syncthreads();
      }
      run_segment(s, s > 0 || starts() ? slot_of(0) : nullptr, reads);
      if (s + 1 == segments && !a_.keeps_end) break;
      carry_on(s == 0);
    }
    if (!late) return;
    const Unit unit = this->unit();
    const SweepOrder order = unit.rows(a_).order();
    const T* slot = slot_of(0);
    read_rows(order.late_begin(), order.readers,
              [&](std::int64_t sum) { return segments ? ld_global(slot + sum) : static_cast<T>(unit.given(a_, sum)); });
  }

  // Of segment first_segment + s.
  PRIM void sum_segment(std::int32_t s) {
    if (a_.first_segment + s >= unit().segments(a_)) return;
    run_segment(a_.first_segment + s, nullptr, false);
    store_local(slot_of(s));
  }
  PRIM void read_segment(std::int32_t s) {
    if (a_.first_segment + s < unit().segments(a_)) run_segment(a_.first_segment + s, slot_of(s), true);
  }

  // Early or late readers among rows begin .. end - 1.
  PRIM void read(std::int64_t begin, std::int64_t end, bool early) {
    const Unit unit = this->unit();
    const SweepOrder order = unit.rows(a_).order();
    const std::int64_t low = early ? 0 : order.late_begin(), high = early ? order.early_end() : order.readers;
    if (begin < low) begin = low;
    if (end > high) end = high;
    const bool carried = !early && order.writers;
    const double* carry = a_.carry + place() * s_.unit_sums;
    read_rows(begin, end,
              [&](std::int64_t sum) { return static_cast<T>(carried ? ld_global(carry + sum) : unit.given(a_, sum)); });
  }

 private:
  using Unit = SweepUnit<T, what>;
  using Rows = LinearRows<T, what>;
  // Made anew wherever it is needed: it is not kept in registers meanwhile.
  PRIM Unit unit() const { return {a_, opaque(index_)}; }
  PRIM std::int64_t place() const { return opaque(index_) - a_.first_unit; }  // of the unit in carry and slots
  PRIM T* slot_of(std::int32_t s) const { return a_.slots + (place() * a_.in_flight + s) * s_.unit_sums; }

  PRIM bool starts() const { return a_.start.sum && unit().sequence.exists; }  // from a state that was given

  // Adds the segment's sum to the carried one, which the next segment starts from.
  PRIM void carry_on(bool is_first) {
    T* slot = slot_of(0);
    store_local(slot);
    syncthreads();
    const Unit unit = this->unit();
    double* carry = a_.carry + place() * s_.unit_sums;
    each_number([&](std::int64_t sum) {
      const double before = is_first ? unit.given(a_, sum) : ld_global(carry + sum);
      const double carried = before + static_cast<double>(ld_global(slot + sum));
      st_global(carry + sum, carried);
      st_global(slot + sum, static_cast<T>(carried));
    });
    syncthreads();
  }

  PRIM int state_row(int i) const { return thread_ / (S::width / S::columns) + S::depth_lanes * i; }
  PRIM int state_column() const { return thread_ % (S::width / S::columns) * S::columns; }

  // body(number) for the unit's sums, shared out among all threads.
  template <class Body>
  PRIM void each_number(Body body) const {
    const std::int64_t numbers = std::int64_t{s_.depth} * (S::width + (has_total(what) ? 1 : 0));
#pragma unroll 1
    for (std::int64_t sum = thread_; sum < numbers; sum += S::threads) body(sum);
  }

  PRIM void store_local(T* slot) const {
#pragma unroll
    for (int i = 0; i < S::depth_steps; ++i) {
      const int d = state_row(i);
      if (S::depth_lanes * i >= s_.depth || d >= s_.depth) continue;
#pragma unroll
      for (int c = 0; c < S::columns; c += S::chunk) {
        Chunk<T> x;
#pragma unroll
        for (int e = 0; e < S::chunk; ++e) x.x[e] = local_[i][c + e];
        st_global(reinterpret_cast<Chunk<T>*>(slot + std::int64_t{d} * S::width + state_column() + c), x);
      }
    }
    if constexpr (has_total(what))
#pragma unroll
      for (int i = 0; i < S::z_steps; ++i) {
        const int d = thread_ + S::threads * i;
        if (d < s_.depth) st_global(slot + std::int64_t{s_.depth} * S::width + d, local_z_[i]);
      }
  }

  // Of the state alone, whose numbers are sum(number).
  template <class Sum>
  PRIM void read_rows(std::int64_t begin, std::int64_t end, Sum sum) const {
    if (begin >= end) return;
    const std::int64_t numbers = std::int64_t{s_.depth} * S::width, filled = (s_.g - s_.m) / sizeof(T);
    for (std::int64_t i = thread_; i < filled; i += S::threads)
      st_shared(s_.m + static_cast<smem_t>(i) * sizeof(T), i < numbers ? sum(i) : T(0));
    if constexpr (has_total(what))
      for (int d = thread_; d < s_.depth; d += S::threads) st_shared(s_.z + d * sizeof(T), sum(numbers + d));
    for (std::int64_t r = begin; r < end; r += S::readers)
      read_strip(r, static_cast<int>(end - r < S::readers ? end - r : S::readers), -1, true);
  }

  // Leaves the segment's sum in local_. `start`: null: nothing.
  PRIM void run_segment(std::int32_t s, const T* start, bool reads) {
    const std::int64_t begin = std::int64_t{s} * segment_rows, rest = unit().rows(a_).order().writers - begin;
    const int writers = rest < segment_rows ? static_cast<int>(rest) : segment_rows;
    reads = reads && first_reader(begin) < first_reader(begin + writers);
#pragma unroll
    for (int i = 0; i < S::depth_steps; ++i)
#pragma unroll
      for (int c = 0; c < S::columns; ++c) local_[i][c] = T(0);
#pragma unroll
    for (int i = 0; i < S::z_steps; ++i) local_z_[i] = T(0);
    if (reads && start) store_state(start);
    for (int done = 0; done < writers; done += S::width) {
      const std::int64_t first = begin + done;
      const int left = writers - done, count = left < S::width ? left : S::width;
      load_writers(first, count);
      syncthreads();
      if (reads) {
        const std::int64_t last = first_reader(first + count);
        for (std::int64_t r = first_reader(first); r < last; r += S::readers)
          read_strip(r, static_cast<int>(last - r < S::readers ? last - r : S::readers), first, start || done);
      }
      add_writers(count);
      if (reads && count < left) store_state(start);
      syncthreads();
    }
  }

  PRIM std::int64_t first_reader(std::int64_t writer) const { return unit().rows(a_).order().first_reader(writer); }

  // Two rows at a time are read by a warp, so that their loads are on their way together: body(r, row r, row r +
  // warps), row_at(r) being valid below `filled`.
  static constexpr int warps = S::threads / 32;
  template <int count, class RowAt, class Body>
  PRIM void each_pair_of_rows(int filled, RowAt row_at, Body body) const {
    static_assert(count % (2 * warps) == 0);
#pragma unroll 1
    for (int r = warp_; r < count; r += 2 * warps)
      body(r, row_at(r < filled ? r : 0), row_at(r + warps < filled ? r + warps : 0));
  }
  // Writes rows r and r + warps of a tile: side(row, d) for d < dim, zeros up to `padded` and where a row does not
  // count or is none of the first `filled`.
  template <class Row, class Side>
  PRIM void store_pair(smem_t tile, smem_t pitch, int filled, int r, const Row& one, const Row& two, int dim,
                       int padded, Side side) const {
    const bool counts = r < filled && one.counts, other_counts = r + warps < filled && two.counts;
    tile += r * pitch;
#pragma unroll 1
    for (int d = lane_; d < padded; d += 32) {
      const T x = side(one, d < dim ? d : 0), y = side(two, d < dim ? d : 0);
      st_shared(tile + d * sizeof(T), counts && d < dim ? x : T(0));
      st_shared(tile + warps * pitch + d * sizeof(T), other_counts && d < dim ? y : T(0));
    }
  }

  PRIM void load_writers(std::int64_t first, int count) const {
    const Unit unit = this->unit();
    const auto rows = unit.rows(a_);
    const int column = unit.tile * S::width, left = s_.values - column;
    // One side after the other: both sides of two rows would take too many registers.
    each_pair_of_rows<S::width>(
        count, [&](int w) { return rows.writer(first + w, !by_value(what)); },
        [&](int w, const auto& one, const auto& two) {
          store_pair(0, s_.pitch, count, w, one, two, s_.depth, s_.padded_depth,
                     [](const auto& row, int d) { return Rows::first_side(row, d); });
        });
    each_pair_of_rows<S::width>(
        count, [&](int w) { return rows.writer(first + w, by_value(what)); },
        [&](int w, const auto& one, const auto& two) {
          store_pair(s_.g, S::width * sizeof(T), count, w, one, two, left < S::width ? left : S::width, S::width,
                     [&](const auto& row, int c) { return Rows::second_side(row, column + c); });
        });
  }

  // local += F^T G, z's likewise; the step's sum is made first.
  PRIM void add_writers(int count) {
    constexpr int at_once = 3;
    static_assert(S::depth_steps % at_once == 0);
    const smem_t values = s_.g + state_column() * sizeof(T);
#pragma unroll
    for (int i0 = 0; i0 < S::depth_steps; i0 += at_once) {
      if (S::depth_lanes * i0 >= s_.depth) continue;
      T sum[at_once][S::columns] = {};
#pragma unroll 2
      for (int w = 0; w < count; ++w) {
        T g[S::columns], f[at_once];
#pragma unroll
        for (int c = 0; c < S::columns; c += S::chunk) {
          const auto x = ld_shared<Chunk<T>>(values + (w * S::width + c) * sizeof(T));
#pragma unroll
          for (int e = 0; e < S::chunk; ++e) g[c + e] = x.x[e];
        }
#pragma unroll
        for (int i = 0; i < at_once; ++i)
          f[i] =
              S::depth_lanes * (i0 + i) < s_.depth ? ld_shared<T>(w * s_.pitch + state_row(i0 + i) * sizeof(T)) : T(0);
#pragma unroll
        for (int i = 0; i < at_once; ++i)
#pragma unroll
          for (int c = 0; c < S::columns; ++c) sum[i][c] = multiply_add(f[i], g[c], sum[i][c]);
      }
#pragma unroll
      for (int i = 0; i < at_once; ++i)
#pragma unroll
        for (int c = 0; c < S::columns; ++c) local_[i0 + i][c] += sum[i][c];
    }
    if constexpr (has_total(what))
#pragma unroll
      for (int i = 0; i < S::z_steps; ++i) {
        const int d = thread_ + S::threads * i;
        T sum = T(0);
#pragma unroll 2
        for (int w = 0; d < s_.depth && w < count; ++w) sum += ld_shared<T>(w * s_.pitch + d * sizeof(T));
        local_z_[i] += sum;
      }
  }

  // M = start + local, and z; rows of M that only fill a chunk are zero.
  PRIM void store_state(const T* start) const {
#pragma unroll
    for (int i = 0; i < S::depth_steps; ++i) {
      const int d = state_row(i);
      if (S::depth_lanes * i >= s_.depth || d >= (s_.depth + S::chunk - 1) / S::chunk * S::chunk) continue;
#pragma unroll
      for (int c = 0; c < S::columns; c += S::chunk) {
        const std::int64_t sum = std::int64_t{d} * S::width + state_column() + c;
        Chunk<T> x{};
        if (d < s_.depth) {
          if (start) x = ld_global(reinterpret_cast<const Chunk<T>*>(start + sum));
#pragma unroll
          for (int e = 0; e < S::chunk; ++e) x.x[e] += local_[i][c + e];
        }
        st_shared(s_.m + static_cast<smem_t>(sum) * sizeof(T), x);
      }
    }
    if constexpr (has_total(what))
#pragma unroll
      for (int i = 0; i < S::z_steps; ++i) {
        const int d = thread_ + S::threads * i;
        if (d < s_.depth)
          st_shared(s_.z + d * sizeof(T),
                    (start ? ld_global(start + std::int64_t{s_.depth} * S::width + d) : T(0)) + local_z_[i]);
      }
  }

  // `count` readers from r0 on, of the step of writers that begins at `first`, -1: of the state alone. `has_state`: M
  // holds something.
  PRIM void read_strip(std::int64_t r0, int count, std::int64_t first, bool has_state) const {
    const Unit unit = this->unit();
    const auto rows = unit.rows(a_);
    each_pair_of_rows<S::readers>(
        count, [&](int r) { return rows.reader(r0 + r); },
        [&](int r, const auto& one, const auto& two) {
          store_pair(s_.x, s_.pitch, count, r, one, two, s_.depth, s_.padded_depth,
                     [](const auto& row, int d) { return Rows::first_side(row, d); });
        });
    syncthreads();
    const int r = thread_ / S::lanes, lane = thread_ % S::lanes;
    const bool active = r < count;
    const smem_t x = s_.x + r * s_.pitch, weights = s_.a + r * S::a_pitch;
    T y[S::each] = {}, total = T(0);
    if (first >= 0) {
      const std::int64_t visible = active ? this->unit().rows(a_).order().seen(r0 + r) - first : 0;
      const int seen = static_cast<int>(visible < S::width ? visible : S::width);
      total = score(x, weights, seen, lane);
      syncwarp();
      weigh(weights, seen, lane, y);
    }
    if (has_state) {
      read_state(x, lane, y);
      if constexpr (has_total(what))
#pragma unroll 1
        for (int d = lane; d < s_.depth; d += S::lanes)
          total = multiply_add(ld_shared<T>(x + d * sizeof(T)), ld_shared<T>(s_.z + d * sizeof(T)), total);
    }
    if constexpr (has_total(what))
#pragma unroll
      for (int step = 1; step < S::lanes; step *= 2) total += shfl_xor(total, step);
    const Unit now = this->unit();
    T* partials = what == SweepOf::facts ? a_.partials + now.tile * a_.facts : nullptr;
    now.rows(a_).template finish<S::lanes>(active, active ? r0 + r : r0, now.tile * S::width + lane * S::each,
                                           s_.values, y, total, partials);
    syncthreads();
  }

  // This thread's part of a row of A, whose sum it returns.
  PRIM T score(smem_t x, smem_t weights, int seen, int lane) const {
    T sum[S::each][S::chunk] = {};
#pragma unroll 2
    for (int d = 0; d < s_.depth; d += S::chunk) {
      const auto own = ld_shared<Chunk<T>>(x + d * sizeof(T));
#pragma unroll
      for (int j = 0; j < S::each; ++j) {
        const auto f = ld_shared<Chunk<T>>((lane + S::lanes * j) * s_.pitch + d * sizeof(T));
#pragma unroll
        for (int e = 0; e < S::chunk; ++e) sum[j][e] = multiply_add(own.x[e], f.x[e], sum[j][e]);
      }
    }
    T total = T(0);
#pragma unroll
    for (int j = 0; j < S::each; ++j) {
      const int w = lane + S::lanes * j;
#pragma unroll
      for (int e = 1; e < S::chunk; ++e) sum[j][0] += sum[j][e];
      const T weight = w < seen ? sum[j][0] : T(0);
      st_shared(weights + w * sizeof(T), weight);
      total += weight;
    }
    return total;
  }

  // y += A G, of the writers the row sees: the others' values may be NaN.
  PRIM void weigh(smem_t weights, int seen, int lane, T (&y)[S::each]) const {
#pragma unroll 1
    for (int w0 = 0; w0 < seen; w0 += S::chunk) {
      const auto a = ld_shared<Chunk<T>>(weights + w0 * sizeof(T));
#pragma unroll
      for (int e = 0; e < S::chunk; ++e) {
        if (w0 + e >= seen) continue;
        const auto g = ld_shared<Columns>(s_.g + ((w0 + e) * S::width + lane * S::each) * sizeof(T));
#pragma unroll
        for (int i = 0; i < S::each; ++i) y[i] = multiply_add(a.x[e], g.x[i], y[i]);
      }
    }
  }

  // y += X M
  PRIM void read_state(smem_t x, int lane, T (&y)[S::each]) const {
    T sum[S::each] = {};
#pragma unroll 2
    for (int d = 0; d < s_.depth; d += S::chunk) {
      const auto own = ld_shared<Chunk<T>>(x + d * sizeof(T));
#pragma unroll
      for (int e = 0; e < S::chunk; ++e) {
        const auto m = ld_shared<Columns>(s_.m + ((d + e) * S::width + lane * S::each) * sizeof(T));
#pragma unroll
        for (int i = 0; i < S::each; ++i) sum[i] = multiply_add(own.x[e], m.x[i], sum[i]);
      }
    }
#pragma unroll
    for (int i = 0; i < S::each; ++i) y[i] += sum[i];
  }

  struct alignas(8) Columns {
    T x[S::each];
  };

  const SweepArguments<T>& a_;
  const S& s_;
  const std::uint32_t index_;  // of the unit
  const int thread_, lane_, warp_;
  T local_[S::depth_steps][S::columns], local_z_[S::z_steps];
};

}  // namespace mmca::cuda::generic
