// Few rows over another sequence's keys: the sizes of bench/cases.py.
#include "workload.h"

namespace mmca::bench {

Family family() {
  const test::Choices few = attention(8, 8, 8, 32, 576, 64);
  return {
      "CrossAttention",
      {
          {"32_rows_576_keys_D64", few, float_types},
          {"32_rows_576_keys_D64_gqa", attention(8, 8, 2, 32, 576, 64)},
          {"32_rows_576_keys_D64_padding",
           with(few, [](test::Choices& c) { c.key_lengths = {576, 500, 433, 288, 576, 64, 350, 17}; })},
          {"128_rows_576_keys_D64", attention(4, 8, 8, 128, 576, 64), float_types},
          {"4_rows_100_keys_D64", attention(2, 4, 4, 4, 100, 64), {DType::f32}, true, true},
      },
  };
}

}  // namespace mmca::bench
