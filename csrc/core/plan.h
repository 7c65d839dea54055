// Who sees what, worked out once per call: the visibility arguments of a Problem (causal, window, key padding,
// modality) become lists of keys and, for each row, one half-open range in each list. After this the kernels know
// nothing of modalities or padding: hidden keys are absent, and a row's cost is the length of its ranges.
//
// O(batch * (q_len + k_len)) memory at most; batches with nothing of their own share one plan. Packed sequences become
// sequences like any other here: no kernel knows of packing.
#pragma once

#include <cstdint>
#include <vector>

#include "core/problem.h"

namespace mmca {

inline constexpr int max_groups = 2;

struct Range {
  std::int32_t begin = 0, end = 0;  // empty if begin >= end
  std::int32_t size() const { return end > begin ? end - begin : 0; }
};

// The keys of one group in ascending order.
struct KeyList {
  std::int32_t size = 0;
  std::vector<std::int32_t> positions;  // empty: the identity, key c of the list is key c of the sequence

  bool identity() const { return positions.empty(); }
  std::int32_t position(std::int32_t c) const { return positions.empty() ? c : positions[static_cast<std::size_t>(c)]; }
};

struct SequencePlan {
  std::int64_t q_begin = 0, q_len = 0, k_begin = 0, k_len = 0;  // its rows of the tensors
  std::vector<std::int32_t> rows;         // every query row once, rows of a kind together; empty: the identity
  std::vector<Range> ranges[max_groups];  // [group][index in rows]: what the row sees, in coordinates of keys[group]
  KeyList keys[max_groups];
  std::vector<std::int32_t> hidden_keys;  // keys in no list: padding
  std::vector<std::uint8_t> self_rows;    // [query row]: 1 where the row itself is its image group; empty: no such row

  std::int32_t row(std::int64_t index) const {
    return rows.empty() ? static_cast<std::int32_t>(index) : rows[static_cast<std::size_t>(index)];
  }
  bool attends_to_itself(std::int64_t row) const {
    return !self_rows.empty() && self_rows[static_cast<std::size_t>(row)];
  }
};

struct Plan {
  std::int64_t batch = 0;               // sequences; packed ones with what lies past the last offset as one more
  std::vector<SequencePlan> sequences;  // one per batch, or one for all of them

  const SequencePlan& of(std::int64_t b) const { return sequences.size() == 1 ? sequences[0] : sequences[b]; }

  // The same problem for sequence b alone: its lengths, pointers to its first row of its batch.
  Problem problem_of(const Problem& problem, std::int64_t b) const;
};

Plan make_plan(const Problem& problem);

}  // namespace mmca
