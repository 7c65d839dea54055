// Who sees what, on the GPU: core/plan.h's lists of keys and ranges of rows, made by kernels (plan.cu) from modality,
// key_mask and cu_seqlens where they lie, without a word to the host. All arrays are device memory.
//
// Tokens are counted over the whole batch: token q_token + i is row i of a sequence, k_token + j its key j; without
// packing q_token = b * q_len. An *entry* is a row in the plan's order.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "core/problem.h"

namespace mmca::cuda {

inline constexpr int plan_tile = 64;  // rows that share a hull

struct DevicePlan {
  std::int32_t sequences = 0;  // batch; packed: what lies past the last offset is one more, which sees nothing

  // Packed: (sequences + 1) offsets each, ascending and within the tokens whatever cu_seqlens holds. Null: not packed.
  const std::int32_t* q_offsets = nullptr;
  const std::int32_t* k_offsets = nullptr;

  // Null: every key is listed, in its place. Otherwise [key token]: positions of a sequence's list 0, then its list 1.
  const std::int32_t* positions = nullptr;
  const std::int32_t* list_sizes = nullptr;  // (sequences, 2)

  // MMCA: rows of a kind together. [query token]: the row of an entry. Null: entry i is row i.
  const std::int32_t* rows = nullptr;
  // [query token]: what the entry's row sees, list 0 [x, y) and list 1 [z, w). Null: by causal and window alone.
  const int4* ranges = nullptr;
  // [query token]: 1 where the row itself is its image group, whose weight is 1 and never dropped. Null: no such row.
  const std::uint8_t* self_entries = nullptr;
  // The hull of the ranges of plan_tile entries: tile t of sequence b at hull_index(b) + t. Null with ranges.
  const int4* hulls = nullptr;
};

}  // namespace mmca::cuda
