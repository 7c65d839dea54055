// What an attention problem for the tests is made from: a few choices and a seed. case.h makes it.
#pragma once

#include <algorithm>
#include <sstream>
#include <string>
#include <vector>

#include "core/problem.h"
#include "tensor.h"

namespace mmca::test {

struct Choices {
  std::int64_t batch = 1, kv_heads = 1, heads_per_kv = 1, q_len = 1, k_len = 1, head_dim = 1, value_dim = 1;
  double scale = 1, softcap = 0;
  std::vector<std::int64_t> q_offsets, k_offsets;  // packed sequences: batch + 1 each; empty: not packed
  bool causal = false;
  std::int64_t window_left = -1, window_right = -1;
  double attend = -1, pad = -1;  // density of attn_mask and of hidden keys in key_mask; negative: no such mask
  std::int64_t mask_block = 0;   // > 0: attn_mask is the same for all heads, and made of square blocks and its diagonal
  std::vector<std::int64_t> key_lengths;  // each sequence's keys before its padding; empty: key_mask as `pad` says
  Layout mask_layout;
  bool bias = false, grad_bias = false;
  DType bias_dtype = DType::f32;
  double bias_size = 2, bias_hidden = 0;  // numbers of up to this size; density of -inf
  bool bias_same[4] = {};                 // broadcast dimensions
  Layout bias_layout;
  bool mmca = false, image_id = false;
  std::vector<std::int32_t> modality;  // of every sequence; empty: random runs
  ImageRows image_rows = ImageRows::self;
  Merge merge = Merge::sum;
  bool gate_same[4] = {}, grad_gate = false;  // (group, batch, head, row)
  bool keep_group_out = false;                // also for merges whose backward does without
  double dropout = 0;
  bool grad_lse = false, lse_low = false;
  Layout query_layout, key_layout, value_layout, out_layout, grad_layout;
  std::uint64_t seed = 0;

  std::string text() const {
    std::ostringstream text;
    const auto list = [&](const char* name, const auto& values) {
      text << " " << name << " {";
      for (const auto x : values) text << " " << x;
      text << " }";
    };
    text << "batch " << batch << " kv_heads " << kv_heads << " heads_per_kv " << heads_per_kv << " q_len " << q_len
         << " k_len " << k_len << " head_dim " << head_dim << " value_dim " << value_dim << " scale " << scale
         << " softcap " << softcap << " causal " << causal << " window " << window_left << " " << window_right
         << " attend " << attend << " pad " << pad;
    if (!q_offsets.empty()) list("q_offsets", q_offsets), list("k_offsets", k_offsets);
    if (bias) {
      text << " bias_dtype " << int(bias_dtype) << " bias_size " << bias_size << " bias_hidden " << bias_hidden
           << " grad_bias " << grad_bias;
      list("bias_same", bias_same);
    }
    if (mmca) text << " image_id " << image_id << " image_rows " << int(image_rows) << " merge " << int(merge);
    if (mmca && merge == Merge::gate) list("gate_same", gate_same);
    text << " dropout " << dropout << " grad_lse " << grad_lse << " lse_low " << lse_low << " seed " << seed;
    return text.str();
  }
};

inline ImageRows any_image_rows(Random& random) {
  return random.pick({ImageRows::self, ImageRows::block, ImageRows::causal, ImageRows::self_text});
}
inline Merge any_merge(Random& random) { return random.pick({Merge::sum, Merge::lse, Merge::gate, Merge::none}); }
inline DType any_dtype(Random& random) { return random.pick({DType::f32, DType::f64, DType::bf16, DType::f16}); }

inline Layout any_layout(Random& random) {
  Layout layout;
  layout.heads_inside_rows = random.chance(0.5);
  layout.feature_step = random.pick({1, 1, 2, 3});
  layout.gap = random.pick({0, 1, 5});
  layout.skip = random.integer(0, 7);
  return layout;
}

// A bias with whatever comes with one.
inline void choose_bias(Choices& c, Random& random) {
  c.bias = true;
  c.bias_dtype = any_dtype(random);
  c.bias_size = random.pick({2.0, 2.0, 20.0});
  c.bias_hidden = random.pick({0.0, 0.0, 0.1, 0.6, 1.0});
  for (bool& same : c.bias_same) same = random.chance(0.3);
  c.bias_layout = any_layout(random);
}

// Packed sequences: empty ones, single tokens and up to `longest`, and perhaps rows past the last offset.
inline void choose_packed(Choices& c, Random& random, int longest, bool equal_lengths) {
  c.batch = random.integer(0, 5);
  c.q_offsets = c.k_offsets = {0};
  const auto length = [&] { return random.chance(0.15) ? 0 : random.chance(0.15) ? 1 : random.integer(1, longest); };
  for (std::int64_t b = 0; b < c.batch; ++b) {
    const int queries = length(), keys = equal_lengths ? queries : length();
    c.q_offsets.push_back(c.q_offsets.back() + queries), c.k_offsets.push_back(c.k_offsets.back() + keys);
  }
  c.q_len = c.q_offsets.back() + (random.chance(0.5) ? random.integer(0, 9) : 0);
  c.k_len = c.k_offsets.back() + (random.chance(0.5) ? random.integer(0, 9) : 0);
}

// Runs of padding, text and images of a few ids, as an interleaved sequence has them.
inline std::vector<std::int32_t> random_modality(Random& random, std::int64_t count) {
  std::vector<std::int32_t> modality;
  while (static_cast<std::int64_t>(modality.size()) < count) {
    const int kind = random.pick({0, 1, 1, 1, 2, 2, 3}), run = random.integer(1, random.chance(0.2) ? 40 : 7);
    modality.insert(modality.end(), static_cast<std::size_t>(run), kind);
  }
  modality.resize(static_cast<std::size_t>(count));
  return modality;
}

}  // namespace mmca::test
