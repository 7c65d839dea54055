// Linear attention: time must grow with the length alone, and its products reach what the processor can do.
#include "workload.h"

namespace mmca::bench {
namespace {

test::Choices tokens(std::int64_t heads, std::int64_t kv_heads, std::int64_t length, std::int64_t dim, bool causal) {
  return with(attention(1, heads, kv_heads, length, length, dim), [&](test::Choices& c) { c.causal = causal; });
}

Workload decode() {
  Workload one{"decode_D64_gqa", tokens(8, 2, 1, 64, true), {DType::f32}, false, true};
  one.state = true;
  return one;
}

}  // namespace

Family family() {
  return {
      "LinearAttention",
      {
          {"1024_D64_causal", tokens(2, 2, 1024, 64, true), float_types},  // in the second cache
          {"1024_D64", tokens(2, 2, 1024, 64, false)},
          {"1024_D128_causal", tokens(1, 1, 1024, 128, true)},
          {"1024_D64_gqa_causal", tokens(8, 2, 1024, 64, true)},
          {"4096_D64_causal", tokens(8, 8, 4096, 64, true), float_types},
          {"16384_D64_causal", tokens(8, 8, 16384, 64, true)},
          {"65536_D64_causal", tokens(2, 2, 65536, 64, true)},
          {"65536_one_head_D64_causal", tokens(1, 1, 65536, 64, true)},  // split among threads
          {"100_D64_causal", tokens(2, 2, 100, 64, true), float_types, true, true},
          decode(),
      },
      Operation::linear_forward,
      Operation::linear_backward,
  };
}

}  // namespace mmca::bench
