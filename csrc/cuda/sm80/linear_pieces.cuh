// Linear attention's sweeps in 16 bits, and how they are cut (core/linear_problem.h has the notation). Writers add f
// g^T to a state M, readers take y = x M; with hatted phi(q) in a scale of its row's own, d = 1 / (phi(q) . z) in that
// scale, and p = <dO, out>:
//
//     sweep            writers: f, g          readers: x     y becomes
//     forward          keys: phi(k), v        rows: phi(q)   out = d y
//     facts            the same                              d, p and the row's scale, kept for the others
//     query gradient   keys: v, phi(k)        rows: dO       dq = d (y - p z) phi'(q)
//     value gradient   rows: d phi(q), dO     keys: phi(k)   dv = y
//     key gradient     rows: dO, d phi(q)     keys: v        dk = (y - sum p d phi(q)) phi'(k)
//
// One tile of f or g holds phi of keys or of query rows, and M has a vector beside it, the sum of these (z), for the
// key gradient that of -p d phi(q).
//
// Time: writer token w is at time w, reader token a at a + reader_delay and sees the writers up to its own time. So
// early readers, which see nothing, have negative times, and those that see everyone come after the last writer. The
// last two sweeps run from the last token to the first: there, token w is w tokens before the last. Each sequence's
// time is cut into pieces of `segment` tokens. Where there are several, or states come or go, all pieces' sums are
// formed first, then (linear_states.cu) what each starts from, then y; else one pass does all.
#pragma once

#include "cuda/linear_sequences.cuh"
#include "cuda/sm80/tile.cuh"

namespace mmca::cuda::sm80 {

enum class SweepRole : std::int32_t { forward, facts, query_gradient, value_gradient, key_gradient };

// What the facts sweep leaves of each query row: arrays over heads and rows (row_fact).
struct LinearRowFacts {
  float* inverse;  // d; 0: the row sees nothing
  float* top;      // its largest feature
  float* product;  // p
  float* parts;    // [part]: what p is the sum of, for `size` rows each
  std::int64_t size;
};

struct LinearSweep {
  SweepRole role;
  bool needs_end, aligned;       // aligned: has_aligned_rows(y)
  std::int32_t depth, values;    // numbers of f and of g
  std::int32_t columns;          // blocks that share the numbers of g
  std::int32_t segment, pieces;  // pieces: of each sequence; 0: packed
  std::int64_t slab_size;
  float* slabs;  // [slot][kv_head][column block]: a piece's sum, then what it starts from; null: all start from nothing
  Input f, g, x;
  Output y;
  LinearRowFacts facts;

  // Query rows write, keys read, from the last token to the first.
  PRIM bool backwards() const { return role >= SweepRole::value_gradient; }
  PRIM bool makes_rows() const { return role <= SweepRole::facts; }                          // of out
  PRIM bool has_phi_f() const { return makes_rows() || role == SweepRole::value_gradient; }  // and x; else g
};

// One KV head of one sequence in a sweep.
struct SweepLine {
  LinearSequence sequence;
  std::int32_t writers, readers, reader_delay;  // tokens

  PRIM std::int32_t begin() const { return reader_delay < 0 ? reader_delay : 0; }  // times
  PRIM std::int32_t end() const { return writers > readers + reader_delay ? writers : readers + reader_delay; }
};

PRIM SweepLine sweep_line(const LinearProblem& problem, const LinearPlan& plan, const LinearSweep& sweep,
                          std::int32_t b) {
  SweepLine line{linear_sequence_at(problem, plan, b), 0, 0, 0};
  const std::int32_t q_len = line.sequence.q_len, k_len = line.sequence.k_len;
  line.readers = sweep.backwards() ? k_len : q_len;
  if (!line.sequence.exists) return line;
  line.writers = sweep.backwards() ? q_len : k_len;
  line.reader_delay = !problem.causal ? line.writers : sweep.backwards() ? 0 : k_len - q_len;
  return line;
}

PRIM std::int32_t piece_count(const LinearSweep& sweep, const SweepLine& line) {
  return (line.end() - line.begin() + sweep.segment - 1) / sweep.segment;
}
// The slot of a sequence's first piece.
PRIM std::int64_t first_slot(const LinearPlan& plan, const LinearSweep& sweep, const Sequence& sequence) {
  if (!plan.q_offsets) return std::int64_t{sequence.index} * sweep.pieces;
  return (sequence.q_begin + sequence.k_begin) / sweep.segment + sequence.index;
}

struct SweepPiece {
  SweepLine line;
  std::int32_t begin, end;  // times; begin >= end: none

  PRIM bool has_writers() const { return begin < line.writers && end > 0; }
  PRIM bool has_readers() const {
    return begin < line.readers + line.reader_delay && end > line.reader_delay && line.readers > 0;
  }
  // Its sum is wanted: for the pieces after it, or for the end.
  PRIM bool adds(const LinearSweep& sweep) const { return has_writers() && (sweep.needs_end || end < line.end()); }
};
PRIM SweepPiece piece_of_line(const LinearSweep& sweep, const SweepLine& line, std::int32_t s) {
  const std::int64_t begin = line.begin() + std::int64_t{s} * sweep.segment, end = begin + sweep.segment;
  if (begin >= line.end()) return {line, 0, 0};
  return {line, static_cast<std::int32_t>(begin), static_cast<std::int32_t>(end < line.end() ? end : line.end())};
}
PRIM SweepPiece piece_at(const LinearProblem& problem, const LinearPlan& plan, const LinearSweep& sweep,
                         std::int64_t slot) {
  std::int32_t b, s;
  if (!plan.q_offsets) {
    b = static_cast<std::int32_t>(slot / sweep.pieces), s = static_cast<std::int32_t>(slot % sweep.pieces);
  } else {
    const auto first = [&](std::int32_t at) {
      return (std::int64_t{ld_global(plan.q_offsets + at)} + ld_global(plan.k_offsets + at)) / sweep.segment + at;
    };
    std::int32_t low = 0, high = plan.sequences - 1;  // the last b whose pieces begin at or before the slot
    while (low < high) {
      const std::int32_t middle = (low + high + 1) / 2;
      if (first(middle) <= slot) low = middle;
      else high = middle - 1;
    }
    b = low, s = static_cast<std::int32_t>(slot - first(b));
  }
  return piece_of_line(sweep, sweep_line(problem, plan, sweep, b), s);
}
// How many slots there are: for grids and memory.
inline std::int64_t slot_count(const LinearProblem& problem, const LinearPlan& plan, const LinearSweep& sweep) {
  if (!plan.q_offsets) return std::int64_t{plan.sequences} * sweep.pieces;
  return (problem.q_len + problem.k_len) / sweep.segment + plan.sequences;
}

PRIM std::int64_t row_fact(const LinearProblem& problem, const LinearPlan& plan, const Sequence& sequence,
                           std::int64_t head, std::int64_t row) {
  if (plan.q_offsets) return head * problem.q_len + sequence.q_begin + row;
  return (sequence.index * problem.q_heads + head) * problem.q_len + row;
}

}  // namespace mmca::cuda::sm80
