// The two ways of a forward in 16 bits. T: BFloat16 or Float16.
#pragma once

#include "cuda/launch.h"

namespace mmca::cuda::sm80 {

// A block per tile of rows and query head (forward.cuh).
template <class T>
void tiled_forward(const Launch& launch);

// For few rows a KV head: its keys are shared out among many blocks, what they find is merged after (decode.cuh).
template <class T>
void split_forward(const Launch& launch);

// Whether split_forward is the better one: as many rows, counted with the query heads of a KV head, cost one reading of
// the keys there, and leave too few blocks here.
inline bool has_few_rows(const Problem& problem) {
  constexpr std::int64_t few = 64;
  const std::int64_t sequences = problem.q_offsets ? problem.batch : 1;  // whose rows q_len counts
  return problem.q_len * problem.heads_per_kv() <= few * sequences;
}

}  // namespace mmca::cuda::sm80
