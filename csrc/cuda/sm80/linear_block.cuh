// What a block of a sweep of linear attention works on: its shared memory, its piece of time, its rows' way there
// (linear_sweep.cuh).
#pragma once

#include "cuda/sm80/linear_pieces.cuh"

namespace mmca::cuda::sm80 {

template <int P>
struct SweepTile {
  static constexpr int threads = 128, warps = 4, blocks = 2, sum_blocks = P == 64 ? 3 : 2;
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

}  // namespace mmca::cuda::sm80
