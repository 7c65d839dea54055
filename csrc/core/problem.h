// What is asked of a kernel: one plain struct for every attention operator, forward and backward.
//
// The operator is attention over key groups. The keys a row may see are partitioned into groups, each with its own
// softmax; the groups' outputs are merged. Ordinary attention has one group, MMCA has two (text, image). For batch b,
// query head h, KV head g = h / (q_heads / kv_heads), row i at position p = i + (k_len - q_len), and key j:
//
//     t[i,j]   = scale * <query[b,h,i], key[b,g,j]>
//     s[i,j]   = softcap * tanh(t / softcap) + bias[b,h,i,j]                 without a softcap or a bias: t, and + 0
//     lse_r[i] = log sum exp(s[i,j])                         over the keys j of group r that row i sees; -inf if none
//     O_r[i]   = sum exp(s[i,j] - lse_r[i]) * Z[i,j] * value[b,g,j]             Z: dropout factor; 0 if none is seen
//     out[i]   = merge(O_r, lse_r)
//
// This header and everything in core/ and cpu/ use the C++ standard library only.
#pragma once

#include <cstdint>

namespace mmca {

enum class DType : std::uint8_t { f32, f64, bf16, f16 };  // arithmetic: double for f64, float for all others

constexpr std::int64_t element_size(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }

// How the groups' outputs become one: sum of O_r, the joint softmax, a weighted sum, or left apart.
enum class Merge : std::uint8_t { sum, lse, gate, none };

// What an image row of MMCA sees: itself; its whole image; a text row's keys; itself and the text before it.
enum class ImageRows : std::uint8_t { self, block, causal, self_text };

// A (batch, head, row, feature) tensor. Strides count elements and may be 0 (an expanded input). `group` is the stride
// of a first dimension that only the results of Merge::none have. Kernels see one sequence at a time (core/plan.h),
// whose batch index is 0.
template <class Pointer>
struct Strided {
  Pointer data = nullptr;
  std::int64_t batch = 0, head = 0, row = 0, feature = 0, group = 0;

  constexpr std::int64_t offset(std::int64_t h, std::int64_t r) const { return h * head + r * row; }
};
using Input = Strided<const void*>;
using Output = Strided<void*>;

// A (group, batch, head, row) statistic in the accumulation type: float, or double for f64 problems.
template <class Pointer>
struct RowStatistic {
  Pointer data = nullptr;
  std::int64_t group = 0, batch = 0, head = 0, row = 0;

  constexpr std::int64_t offset(std::int64_t g, std::int64_t h, std::int64_t i) const {
    return g * group + h * head + i * row;
  }
};

// Weights are kept iff their 16-bit Philox lane is >= threshold, and then scaled by 65536 / (65536 - threshold).
struct Dropout {
  std::uint32_t threshold = 0;  // round(65536 p); 0: no dropout
  std::uint32_t offset = 0;     // fourth counter word
  std::uint64_t seed = 0;       // Philox key
};

struct Problem {
  DType dtype = DType::f32;
  std::int64_t batch = 0, q_heads = 1, kv_heads = 1;  // q_heads is a multiple of kv_heads
  std::int64_t q_len = 0, k_len = 0;
  std::int64_t head_dim = 1, value_dim = 1;  // 1..256 each
  double scale = 1.0;
  double softcap = 0.0;  // > 0; 0: none

  // Packed sequences: q_len and k_len count the rows of all of them together, batch strides are 0, and sequence b is
  // rows offsets[b]..offsets[b+1]-1, from offsets[0] = 0. Rows past the last offset see nothing. Null: not packed.
  const std::int64_t* q_offsets = nullptr;  // (batch + 1)
  const std::int64_t* k_offsets = nullptr;

  // Which keys a row sees: the conjunction of what is given. MMCA takes its order from the modality rule instead of
  // causal, window and key_mask.
  bool causal = false;                     // j <= p: bottom-right aligned
  std::int64_t window_left = -1;           // p - left <= j; -1: unbounded
  std::int64_t window_right = -1;          // j <= p + right; -1: unbounded
  Strided<const std::uint8_t*> attn_mask;  // (batch, q_heads, q_len, k_len), non-zero: attend; null: none
  Input bias;                              // (batch, q_heads, q_len, k_len), -inf hides; null: none
  DType bias_dtype = DType::f32;
  const std::uint8_t* key_mask = nullptr;  // (batch, k_len) contiguous, non-zero: attend; null: none
  bool is_mmca = false;                    // two key groups, by modality; false: one group, and nothing below counts
  const std::int32_t* modality = nullptr;  // (batch, k_len) contiguous, packed: (k_len): 0 padding, 1 text, >= 2 image
  const std::int32_t* image_id = nullptr;  // like modality, for ImageRows::block; null: runs of modality
  ImageRows image_rows = ImageRows::self;
  Merge merge = Merge::sum;
  RowStatistic<const void*> gate;  // w_r of Merge::gate

  Dropout dropout;

  bool deterministic = false;  // the same bits in every run, also where that is slower (CUDA; the CPU always is)

  // Inputs, and the forward's results (read again by the backward). `value`'s feature count is value_dim.
  Input query, key, value;
  Output out;                     // (batch, q_heads, q_len, value_dim); Merge::none: (groups, ...)
  RowStatistic<void*> lse;        // (groups, batch, q_heads, q_len), natural logarithm
  RowStatistic<void*> lse_low;    // what rounding took from lse: log2(e) lse, so rounded, + lse_low is the logarithm to
                                  // base 2; null: not kept, and taken as 0 by the backward
  RowStatistic<void*> group_out;  // O_r, value_dim neighbouring numbers a row, accumulation type; null: not kept. The
                                  // backward of the merges sum and gate needs it

  // The backward's further inputs and its results. Every element of grad_query, grad_key, grad_value and grad_gate is
  // written.
  Input grad_out;                      // like out
  RowStatistic<const void*> grad_lse;  // null: no gradient arrives at lse
  Output grad_query, grad_key, grad_value;
  Output grad_bias;               // accumulation type, added to: stride 0 where bias is broadcast; null: not wanted
  RowStatistic<void*> grad_gate;  // null: not wanted

  constexpr int groups() const { return is_mmca ? 2 : 1; }
  constexpr bool joint() const { return !is_mmca || merge == Merge::lse; }  // one softmax normalises all groups
  constexpr bool keeps_group_out() const { return is_mmca && (merge == Merge::sum || merge == Merge::gate); }
  constexpr bool shapes_scores() const { return softcap > 0 || bias.data; }  // s is more than a scaled product
  constexpr std::int64_t heads_per_kv() const { return q_heads / kv_heads; }
  constexpr std::int64_t row_shift() const { return k_len - q_len; }  // position of row 0
};

}  // namespace mmca
