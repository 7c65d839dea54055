// How linear attention is cut into work: sequences, and sweeps over them. Cuts never change a bit of the result.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "core/executor.h"
#include "core/linear_problem.h"

namespace mmca::cpu {

// One sequence: its lengths, and pointers to its first rows. The rows and keys past the last offset of a packed problem
// are a sequence of their own, of which nobody sees anything.
struct LinearSequence {
  LinearProblem problem;
  std::int64_t first_key;  // that key_mask leaves; k_len: none
  bool exists;             // false: what lies past the last offset

  bool has_keys() const { return exists && first_key < problem.k_len; }
  bool hides_key(std::int64_t j) const { return !exists || (problem.key_mask && !problem.key_mask[j]); }
  bool hides_all_from(std::int64_t row) const {
    if (!exists) return true;
    return !problem.state.sum && (problem.causal ? row + problem.k_len - problem.q_len : problem.k_len - 1) < first_key;
  }
};

class LinearSequences {
 public:
  explicit LinearSequences(const LinearProblem& problem);

  std::int64_t size() const { return static_cast<std::int64_t>(first_keys_.size()); }
  LinearSequence of(std::int64_t b) const;

 private:
  const LinearProblem& problem_;
  std::vector<std::int64_t> first_keys_;
};

// A sweep runs along the rows of one KV head of one sequence. Writers add to a state, readers read it: reader r sees
// the writers of the tokens up to its own, and gets
//
//     y[r] = sum over the writers w it sees of <x[r], f[w]> g[w]  =  x[r] . M,    M = start + sum f[w] g[w]^T
//
// With writers phi(key), value and readers phi(query) this is the forward; the backward is made of three more. Rows are
// numbered in the order of time, which for some sweeps runs backwards; tokens have equally many rows each.
struct SweepOrder {
  std::int64_t writers = 0, readers = 0;  // rows
  std::int64_t writers_per_token = 1, readers_per_token = 1;
  std::int64_t lead = 1;   // reader token a sees the first a + lead writer tokens: none below 0, at most all
  bool needs_end = false;  // the state after the last writer is wanted for itself

  std::int64_t writer_tokens() const { return writers / writers_per_token; }
  std::int64_t reader_tokens() const { return readers / readers_per_token; }
  // Readers are early ones, which see no writer; those of the chunks of writers, each token in the chunk that completes
  // what it sees; and late ones, which see what another has already seen all of.
  std::int64_t early_end() const { return std::clamp<std::int64_t>(1 - lead, 0, reader_tokens()) * readers_per_token; }
  std::int64_t late_begin() const {
    return std::clamp(writer_tokens() - lead + 1, early_end() / readers_per_token, reader_tokens()) * readers_per_token;
  }

  struct Rows {
    std::int64_t begin, end;
    std::int64_t size() const { return end - begin; }
  };
  // The readers of the chunk of writers begin..end-1.
  Rows readers_of(std::int64_t begin, std::int64_t end) const {
    const std::int64_t low = early_end(), high = late_begin();
    const auto clamped = [&](std::int64_t token) { return std::clamp(token * readers_per_token, low, high); };
    return {clamped(begin / writers_per_token + 1 - lead), clamped(end / writers_per_token + 1 - lead)};
  }
  // body(r, how many writers reader first + r sees), for `count` readers that see some.
  template <class Body>
  void each_seen(std::int64_t first, int count, const Body& body) const {
    std::int64_t seen = (first / readers_per_token + lead) * writers_per_token, after = first % readers_per_token;
    for (int r = 0; r < count; ++r) {
      body(r, seen);
      if (++after == readers_per_token) after = 0, seen += writers_per_token;
    }
  }
};

// Everyone sees everyone.
inline std::int64_t lead_of_all(std::int64_t writer_tokens) { return writer_tokens + 1; }

// What a sweep does to one head. Long heads are split where there are too few to keep all threads busy: the sums of the
// segments first, then in order what each starts from, then the segments. A split head has memory of its own, and a
// slot for each segment in flight.
class SweepStage {
 public:
  virtual SweepOrder order(std::int64_t head) const = 0;
  virtual void whole(std::int64_t head) const = 0;  // from first to last, in the thread's memory

  virtual void begin(std::int64_t head, void* memory) const = 0;
  virtual void sum(std::int64_t head, std::int64_t segment, void* slot) const = 0;  // of the segment's writers
  // `count` neighbouring slots, of which the first `sums` hold a sum, become what their segments start from.
  virtual void scan(void* memory, std::int64_t sums, std::int64_t count, void* slots) const = 0;
  virtual void segment(std::int64_t head, std::int64_t segment, const void* slot) const = 0;  // its readers
  virtual void read(std::int64_t head, SweepOrder::Rows rows, const void* memory) const = 0;  // early or late ones
  virtual void end(std::int64_t head, const void* memory) const = 0;

  std::int64_t heads = 0;
  int depth = 0, values = 0;  // of x and f; of y and g
  int chunk = 0;              // writers whose products with their readers are formed
  std::size_t memory_bytes = 0, slot_bytes = 0;

 protected:
  ~SweepStage() = default;
};

inline constexpr int linear_chunk = 32;  // writers of a chunk; measured: 48 and more, or fewer, are slower
inline constexpr int segment_chunks = 48;

void run_sweep(const SweepStage& stage, Executor& executor);

}  // namespace mmca::cpu
