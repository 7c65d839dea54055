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

#include "cuda/sm80/linear_pieces.cuh"
#include "cuda/sm80/linear_rows.cuh"

namespace mmca::cuda::sm80 {

template <int P>
struct SweepTile {
  static constexpr int threads = 128, warps = 4, blocks = 2, sum_blocks = P == 64 ? 4 : 3;
  static constexpr int tokens = P == 256 ? 32 : 64, columns = P == 256 ? 32 : 64;
  // Readers: warps share the tile's rows, 16 each, and where too few, the columns.
  static constexpr int row_groups = tokens / 16, column_groups = warps / row_groups;
  static constexpr int y_tiles = columns / column_groups / 8;              // n8, of a warp
  static constexpr int m_tiles = P / warps / 16, m_columns = columns / 8;  // m16 and n8, of a warp
  static constexpr int vector_tiles = P / 16 / warps;                      // n16, of a warp

  static constexpr smem_t f_bytes = tokens * row_bytes<P>(), g_bytes = tokens * row_bytes<64>();
  static constexpr smem_t note_bytes = tokens * 4;
  static constexpr smem_t f(int buffer) { return static_cast<smem_t>(buffer) * (f_bytes + g_bytes); }
  static constexpr smem_t g(int buffer) { return f(buffer) + f_bytes; }
  static constexpr smem_t notes = 2 * (f_bytes + g_bytes);
  static constexpr smem_t note(int buffer) { return notes + static_cast<smem_t>(buffer) * 3 * note_bytes; }
  static constexpr smem_t block = notes + 6 * note_bytes, sums_bytes = block + 128;  // all that sums need
  static constexpr smem_t x = sums_bytes, state = x + f_bytes;
  static constexpr smem_t low = columns == 64 ? P * row_bytes<64>() : 0;  // of M's low halves, from the high ones
  static constexpr int low_chunk = columns == 64 ? 0 : 4;
  static constexpr smem_t vector = state + P * row_bytes<64>() + low, x_note = vector + 4 * P;
  static constexpr smem_t tops = x_note + 3 * note_bytes, bytes = tops + 4 * warps;
  static_assert(bytes <= 99 * 1024);
};

// What a block works on; read from shared memory where it is asked for: registers are for accumulators.
template <int P>
struct SweepBlock {
  using Shared = SweepTile<P>;

  const LinearProblem& problem;
  const LinearPlan& plan;
  const LinearSweep& sweep;
  std::int32_t index, q_len, k_len, exists, q_begin, k_begin;  // of the sequence
  std::int32_t kv_head, column;                                // column: the first number of g
  std::int32_t begin, end;                                     // of the piece's time
  std::int32_t reader_delay, writers, readers;

  PRIM SweepBlock(const LinearProblem& problem, const LinearPlan& plan, const LinearSweep& sweep)
      : problem(problem), plan(plan), sweep(sweep) {
    const auto of_sequence = prim::ld_shared<int4>(Shared::block), more = prim::ld_shared<int4>(Shared::block + 16);
    const auto of_time = prim::ld_shared<int4>(Shared::block + 32);
    index = of_sequence.x, q_len = of_sequence.y, k_len = of_sequence.z, exists = of_sequence.w;
    q_begin = more.x, k_begin = more.y, kv_head = more.z, column = more.w;
    begin = of_time.x, end = of_time.y, reader_delay = of_time.z;
    writers = !exists ? 0 : sweep.backwards() ? q_len : k_len, readers = sweep.backwards() ? k_len : q_len;
  }
  // By one thread, for all. A piece that has nothing to do becomes one without time.
  PRIM static void store(const LinearProblem& problem, const LinearPlan& plan, const LinearSweep& sweep, bool sums) {
    const std::int64_t line = std::int64_t{blockIdx.x} / sweep.columns;
    const SweepPiece piece = piece_at(problem, plan, sweep, line / problem.kv_heads);
    const LinearSequence& sequence = piece.line.sequence;
    const bool idle = sums ? !piece.adds(sweep) : !piece.has_readers();
    const std::int32_t end =
        sums && piece.line.writers < piece.end ? piece.line.writers : piece.end;  // no one reads after
    prim::st_shared(Shared::block, int4{sequence.index, sequence.q_len, sequence.k_len, sequence.exists});
    prim::st_shared(Shared::block + 16, int4{static_cast<int>(sequence.q_begin), static_cast<int>(sequence.k_begin),
                                             static_cast<int>(line % problem.kv_heads),
                                             static_cast<int>(blockIdx.x % sweep.columns) * Shared::columns});
    prim::st_shared(Shared::block + 32, int4{piece.begin, idle ? piece.begin : end, piece.line.reader_delay, 0});
  }

  PRIM LinearSequence sequence() const {
    LinearSequence sequence{{index, q_len, k_len, q_begin, k_begin, q_begin, k_begin}, 0, exists != 0};
    if (!plan.q_offsets) sequence.q_token = std::int64_t{index} * q_len, sequence.k_token = std::int64_t{index} * k_len;
    if (plan.first_keys) sequence.first_key = ld_global(plan.first_keys + index);
    return sequence;
  }
  PRIM float* slab() const { return sweep.slabs + std::int64_t{blockIdx.x} * sweep.slab_size; }
  PRIM bool hides_key(std::int32_t j) const {
    const std::int64_t first = plan.q_offsets ? k_begin : std::int64_t{index} * k_len;
    return !exists || (problem.key_mask && !ld_global(problem.key_mask + first + j));
  }
  PRIM std::int32_t heads() const { return static_cast<std::int32_t>(problem.heads_per_kv()); }
  PRIM std::int32_t writer_tiles() const { return sweep.backwards() ? heads() : 1; }
  PRIM std::int32_t reader_tiles() const { return sweep.backwards() ? 1 : heads(); }
  PRIM std::int64_t query_head(int tile) const { return std::int64_t{kv_head} * heads() + tile; }
  PRIM int phi_features() const { return static_cast<int>(problem.head_dim) - (sweep.has_phi_f() ? 0 : column); }

  PRIM bool writes(std::int32_t time) const { return time < writers && time + Shared::tokens > 0; }
  PRIM bool reads(std::int32_t time) const {
    const std::int32_t reader = time - reader_delay;
    return reader < readers && reader + Shared::tokens > 0;
  }
  // The token, counted from the first, of a writer or reader counted in the order of time; negative: none.
  PRIM std::int32_t writer_token(std::int32_t w) const {
    if (w < 0 || w >= (writers < end ? writers : end)) return -1;
    return sweep.backwards() ? writers - 1 - w : w;
  }
  PRIM std::int32_t reader_token(std::int32_t time) const {
    const std::int32_t a = time - reader_delay;
    if (a < 0 || a >= readers || time >= end) return -1;
    return sweep.backwards() ? readers - 1 - a : a;
  }

  // Rows of one head in the order of time, `features` numbers from `first` on.
  PRIM RowSource source(const Input& x, bool of_queries, std::int64_t head, std::int32_t rows, std::int32_t first,
                        std::int32_t features) const {
    RowSource source = row_source(x, sequence(), of_queries ? q_begin : k_begin, head, features);
    source.data += 2 * first;
    if (sweep.backwards()) source.data += (rows - 1) * source.stride, source.stride = -source.stride;
    return source;
  }

  PRIM void start_writers(std::int32_t time, int tile, int buffer) const {
    if (!writes(time)) return;
    const std::int64_t head = sweep.backwards() ? query_head(tile) : kv_head;
    const Interval inside{0, writers < end ? writers : end};
    const std::int32_t left = sweep.values - column;
    copy_rows<P, Shared::tokens, Shared::warps>(Shared::f(buffer),
                                                source(sweep.f, sweep.backwards(), head, writers, 0, sweep.depth), time,
                                                inside, warp_of_thread());
    copy_rows<64, Shared::tokens, Shared::warps>(
        Shared::g(buffer),
        source(sweep.g, sweep.backwards(), head, writers, column, left < Shared::columns ? left : Shared::columns),
        time, inside, warp_of_thread());
    if (threadIdx.x >= Shared::tokens) return;
    const std::int32_t token = writer_token(time + static_cast<std::int32_t>(threadIdx.x));
    const smem_t note = Shared::note(buffer) + 4 * threadIdx.x;
    if (sweep.backwards()) start_note(note, head, token);
    else prim::st_shared(note, token < 0 || hides_key(token) ? 0.0f : 1.0f);
  }
  PRIM void start_readers(std::int32_t time, int tile) const {
    if (!reads(time)) return;
    const std::int64_t head = sweep.backwards() ? kv_head : query_head(tile);
    const Interval inside{0, readers < end - reader_delay ? readers : end - reader_delay};
    copy_rows<P, Shared::tokens, Shared::warps>(Shared::x,
                                                source(sweep.x, !sweep.backwards(), head, readers, 0, sweep.depth),
                                                time - reader_delay, inside, warp_of_thread());
    if (sweep.role == SweepRole::query_gradient && threadIdx.x < Shared::tokens)
      start_note(Shared::x_note + 4 * threadIdx.x, head, reader_token(time + static_cast<std::int32_t>(threadIdx.x)));
  }

 private:
  PRIM void start_note(smem_t note, std::int64_t head, std::int32_t token) const {
    const bool exists = token >= 0;
    const std::int64_t at = row_fact(problem, plan, sequence(), head, exists ? token : 0);
    prim::cp_async<4>(note, sweep.facts.inverse + (exists ? at : 0), exists);
    prim::cp_async<4>(note + Shared::note_bytes, sweep.facts.top + (exists ? at : 0), exists);
    prim::cp_async<4>(note + 2 * Shared::note_bytes, sweep.facts.product + (exists ? at : 0), exists);
  }
};

// The largest |note| of a buffer's rows, by every warp for itself.
template <int Rows>
PRIM float largest_note(smem_t notes) {
  float top = 0.0f;
#pragma unroll
  for (int r = 0; r < Rows; r += warp_size)
    top = fmaxf(top, fabsf(prim::ld_shared<float>(notes + 4 * (r + lane_of_thread()))));
  return warp_max(top);
}

// ---- writers -------------------------------------------------------------------------------------------------------

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

// ---- readers -------------------------------------------------------------------------------------------------------

// A warp's rows of readers: y, and (of out) the weights' sum.
template <int P>
struct ReaderRows {
  Accumulator<1, SweepTile<P>::y_tiles> y;
  float total[2];
};

PRIM int first_reader(int row_groups) { return 16 * (warp_of_thread() % row_groups); }

template <class T, int P>
PRIM void map_readers(const SweepBlock<P>& block, std::int32_t time, int tile) {
  using Shared = SweepTile<P>;
  const LinearSweep& sweep = block.sweep;
  if (sweep.makes_rows()) {
    map_queries<T, P, Shared::tokens, Shared::threads>(Shared::x, block.phi_features(), [&](int r, float top) {
      const std::int32_t token =
          sweep.role == SweepRole::facts && block.column == 0 ? block.reader_token(time + r) : -1;
      if (token < 0) return;
      const std::int64_t head = block.query_head(tile);
      prim::st_global(sweep.facts.top + row_fact(block.problem, block.plan, block.sequence(), head, token), top);
    });
  } else if (sweep.has_phi_f()) {
    map_keys<T, P, Shared::tokens, Shared::threads>(Shared::x, block.phi_features());
  }
}

// Y = X M, and X z.
template <class T, int P>
PRIM void read_state(ReaderRows<P>& rows, float state_scale, bool totals) {
  using Shared = SweepTile<P>;
  const LanePlace<P> x = rows_first<P>(Shared::x).fresh();
  const int first = first_reader(Shared::row_groups), column = warp_of_thread() / Shared::row_groups * Shared::y_tiles;
  const LanePlace<64> state = rows_first<64>(Shared::state).fresh();
  const LanePlace<64> high = state.from_chunk(column),
                      low = state.at(Shared::low).from_chunk(Shared::low_chunk + column);
#pragma unroll 4
  for (int k = 0; k < P; k += 16) {
    std::uint32_t a[1][4];
    load_a(a[0], x, first, k / 8);
    multiply_rows<T>(rows.y, a, high, k);
    multiply_rows<T>(rows.y, a, low, k);
    if (totals) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 pair = unpack2<T>(a[0][i]);
        const auto z = prim::ld_shared<float2>(Shared::vector + 4 * (k + i / 2 * 8 + fragment_column()));
        rows.total[i % 2] = fmaf(pair.x, z.x, fmaf(pair.y, z.y, rows.total[i % 2]));
      }
    }
  }
#pragma unroll
  for (int n = 0; n < Shared::y_tiles; ++n)
#pragma unroll
    for (int e = 0; e < 4; ++e) rows.y[0][n][e] *= state_scale;
}

// Y += A G
template <class T, int P>
PRIM void read_writers(const SweepBlock<P>& block, ReaderRows<P>& rows, int buffer, float factor) {
  using Shared = SweepTile<P>;
  constexpr int tiles = Shared::tokens / 8;
  const SweepRole role = block.sweep.role;
  const int first = first_reader(Shared::row_groups), column = warp_of_thread() / Shared::row_groups * Shared::y_tiles;
  Accumulator<1, tiles> a;
  clear(a);
  const LanePlace<P> x = rows_first<P>(Shared::x).fresh(), f = chunks_first<P>(Shared::f(buffer)).fresh();
#pragma unroll 4
  for (int k = 0; k < P; k += 16) {
    std::uint32_t part[1][4];
    load_a(part[0], x, first, k / 8);
    multiply_columns<T>(a, part, f, k / 8);
  }

  const smem_t products = Shared::note(buffer) + 2 * Shared::note_bytes;
  PowerScale scale[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int row = first + fragment_row(h);
    float product = 0.0f, top = 0.0f, total = 0.0f;
    if (role == SweepRole::query_gradient)
      product = prim::ld_shared<float>(Shared::x_note + 2 * Shared::note_bytes + 4 * row);
#pragma unroll
    for (int n = 0; n < tiles; ++n) {
      float2 by_writer{0.0f, 0.0f};
      if (role == SweepRole::key_gradient)
        by_writer = prim::ld_shared<float2>(products + 4 * (8 * n + fragment_column()));
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float& weight = a[0][n][2 * h + e];
        weight -= product + (e ? by_writer.y : by_writer.x);
        if (8 * n + fragment_column() + e > row) weight = 0.0f;
        total += weight, top = fmaxf(top, fabsf(weight));
      }
    }
    rows.total[h] += total;
    if constexpr (is_f16<T>) {
      scale[h] = PowerScale(quad_max(top));
#pragma unroll
      for (int n = 0; n < tiles; ++n) a[0][n][2 * h] *= scale[h].up, a[0][n][2 * h + 1] *= scale[h].up;
    }
  }

  std::uint32_t rounded[tiles / 2][1][4];
#pragma unroll
  for (int n = 0; n < tiles; n += 2) pack_a<T>(rounded[n / 2][0], a[0][n], a[0][n + 1]);
  constexpr int at_once = Shared::y_tiles < 4 ? Shared::y_tiles : 4;
#pragma unroll
  for (int first_tile = 0; first_tile < Shared::y_tiles; first_tile += at_once) {
    const LanePlace<64> g = rows_first<64>(Shared::g(buffer)).fresh().from_chunk(column + first_tile);
    Accumulator<1, at_once> y;
    clear(y);
#pragma unroll
    for (int k = 0; k < tiles / 2; ++k) multiply_rows<T>(y, rounded[k], g, 16 * k);
#pragma unroll
    for (int n = 0; n < at_once; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        float& sum = rows.y[0][first_tile + n][e];
        sum = fmaf(factor * scale[e / 2].down, y[0][n][e], sum);
      }
  }
}

// Makes of y what it is for.
template <class T, int P>
PRIM void finish(const SweepBlock<P>& block, ReaderRows<P>& rows, std::int32_t time, int tile) {
  using Shared = SweepTile<P>;
  const LinearProblem& problem = block.problem;
  const LinearSweep& sweep = block.sweep;
  const LinearSequence sequence = block.sequence();
  const int part = warp_of_thread() / Shared::row_groups, in_block = part * Shared::y_tiles * 8;
  const int column = block.column + in_block, place = in_block + fragment_column();  // place: in the vector
  const std::int64_t head = sweep.backwards() ? block.kv_head : block.query_head(tile);
  const std::int64_t begin = sweep.backwards() ? sequence.k_begin : sequence.q_begin;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int r = first_reader(Shared::row_groups) + fragment_row(h);
    const std::int32_t token = block.reader_token(time + r);
    float total = quad_sum(rows.total[h]);
    const bool hidden = token < 0 || (!sweep.backwards() ? sequence.hides_all_from(problem, token)
                                                         : block.hides_key(token) ||
                                                               (!sequence.q_len && !problem.grad_final_state.sum));
    const std::int64_t row = token < 0 ? 0 : token;
    const auto each = [&](const auto& body) {
#pragma unroll
      for (int n = 0; n < Shared::y_tiles; ++n) {
        float &x = rows.y[0][n][2 * h], &y = rows.y[0][n][2 * h + 1];
        if (hidden) x = y = 0.0f;
        else body(n, x, y);
      }
    };
    const auto features = [&](const Input& of, int n, int count) {
      return pair_of_row<T>(of, sequence, begin, head, row, column + 8 * n + fragment_column(), count);
    };
    const auto head_dim = static_cast<int>(problem.head_dim), value_dim = static_cast<int>(problem.value_dim);

    if (sweep.makes_rows()) {
      const float inverse = hidden ? 0.0f : inverse_weight(total);
      each([&](int, float& x, float& y) { x = weighted(inverse, x), y = weighted(inverse, y); });
      if (sweep.role == SweepRole::facts) {
        float product = 0.0f;
        each([&](int n, float& x, float& y) {
          const float2 grad = features(problem.grad_out, n, value_dim);
          product = fmaf(x, grad.x, fmaf(y, grad.y, product));
        });
        product = quad_sum(product);
        if (token >= 0 && lane_of_thread() % 4 == 0) {
          const std::int64_t at = row_fact(problem, block.plan, sequence, head, row);
          const int index = block.column / Shared::columns * Shared::column_groups + part;
          prim::st_global(sweep.facts.parts + index * sweep.facts.size + at, product);
          if (index == 0) prim::st_global(sweep.facts.inverse + at, inverse);
        }
        continue;
      }
    } else if (sweep.role == SweepRole::query_gradient) {
      const smem_t note = Shared::x_note + 4 * r;
      const float inverse = prim::ld_shared<float>(note),
                  product = prim::ld_shared<float>(note + 2 * Shared::note_bytes);
      const RowMap map = map_of_query<T>(prim::ld_shared<float>(note + Shared::note_bytes));
      each([&](int n, float& x, float& y) {
        const float2 query = features(problem.query, n, head_dim);
        const auto z = prim::ld_shared<float2>(Shared::vector + 4 * (place + 8 * n));
        x = weighted(inverse, (x - product * z.x) * fminf(map.factor, map(query.x)));
        y = weighted(inverse, (y - product * z.y) * fminf(map.factor, map(query.y)));
      });
    } else if (sweep.role == SweepRole::key_gradient) {
      each([&](int n, float& x, float& y) {
        const float2 key = features(problem.key, n, head_dim);
        const auto z = prim::ld_shared<float2>(Shared::vector + 4 * (place + 8 * n));
        x = (x + z.x) * fminf(1.0f, phi(key.x)), y = (y + z.y) * fminf(1.0f, phi(key.y));
      });
    } else {
      each([](int, float&, float&) {});
    }
    store_fragment_row<T>(rows.y, h, sweep.y, sequence, begin, head, token, column, sweep.values, sweep.aligned);
  }
}

// ---- the kernels ---------------------------------------------------------------------------------------------------

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
          prim::syncthreads();
          map_readers<T>(block(), time, r);
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
