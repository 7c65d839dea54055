// Self-attention with grouped heads: the sizes of bench/cases.py.
#include "workload.h"

namespace mmca::bench {
namespace {

using test::Choices;

void causal(Choices& c) { c.causal = true; }

// 8 sequences behind one another, as many tokens as bench/cases.py's.
void packed(Choices& c) {
  c.causal = true;
  c.q_offsets = {0};
  for (const std::int64_t length : {1024, 96, 512, 33, 700, 256, 5, 384})
    c.q_offsets.push_back(c.q_offsets.back() + length);
  c.k_offsets = c.q_offsets;
  c.batch = static_cast<std::int64_t>(c.q_offsets.size()) - 1, c.q_len = c.k_len = c.q_offsets.back();
}

Workload decode(const char* name, std::int64_t kv_heads, std::int64_t keys, std::vector<DType> dtypes) {
  return {name, attention(1, 8, kv_heads, 1, keys, 64), std::move(dtypes), false, false, Limit::memory};
}

}  // namespace

Family family() {
  const Choices d64 = attention(1, 8, 8, 1024, 1024, 64), d128 = attention(1, 8, 8, 1024, 1024, 128);
  const Choices grouped = attention(1, 8, 2, 1024, 1024, 64), two = attention(2, 8, 8, 1024, 1024, 64);
  return {
      "Mgqa",
      {
          {"1024_D64", d64, float_types},
          {"1024_D64_causal", with(d64, causal), float_types},
          {"1024_D128", d128},
          {"1024_D128_causal", with(d128, causal)},
          {"4096_D64", attention(1, 2, 2, 4096, 4096, 64)},
          {"1024_D64_gqa_causal", with(grouped, causal), {DType::f32, DType::bf16}},
          {"1024_D64_window256", with(d64, [](Choices& c) { c.causal = true, c.window_left = 256; })},
          {"1024_D64_softcap", with(d64, [](Choices& c) { c.softcap = 30; })},
          {"1024_D64_dropout", with(d64, [](Choices& c) { c.dropout = 0.1; })},
          {"2x1024_D64_bias", with(two,
                                   [](Choices& c) {
                                     c.bias = c.grad_bias = true;
                                     c.bias_same[0] = true;
                                   })},
          {"2x1024_D64_mask", with(two, [](Choices& c) { c.attend = 0.5, c.mask_block = 64; })},
          {"2x1024_D64_padding", with(two, [](Choices& c) { c.key_lengths = {614, 409}; })},
          {"packed_D64_causal", with(grouped, packed)},
          {"documents_32x8x10_D64", attention(32, 8, 8, 10, 10, 64), float_types, true, true},
          decode("decode_2048_D64_gqa", 2, 2048, float_types),
          decode("decode_16384_D64_gqa", 2, 16384, float_types),
          decode("decode_2048_D64", 8, 2048, {DType::f32}),
      },
  };
}

}  // namespace mmca::bench
