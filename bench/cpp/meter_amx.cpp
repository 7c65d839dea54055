// AMX at its most, and its inner loops by themselves (tiles.cpp).
#include "cpu/isa.h"
#include "meter.h"

#if defined(__x86_64__)
// As in csrc/cpu/isa_avx512.cpp: gcc's own headers.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>

#pragma GCC target("avx512f,avx512vl,avx512bw,avx512dq,avx2,fma,f16c")

namespace mmca::cpu::meter_amx {
#include "cpu/simd_avx512.h"
#include "cpu/simd_amx.h"
#include "cpu/bodies.h"
#include "cpu/amx_tiles.h"
#include "cpu/amx_products.h"
#include "cpu/amx_few_rows.h"

// Four tiles are added to in turn, as in the kernels: no product waits for the one before it. Their sum.
MMCA_NOINLINE float multiply_add(std::int64_t steps, float factor, float addend) {
  const Tiles::Session session;
  alignas(64) BFloat16 operands[2][Tiles::elements];
  for (int i = 0; i < Tiles::elements; ++i) operands[0][i] = BFloat16(factor), operands[1][i] = BFloat16(addend);
  Tiles::zero<0>(), Tiles::zero<1>(), Tiles::zero<2>(), Tiles::zero<3>();
  Tiles::load<4>(operands[0]), Tiles::load<5>(operands[0]), Tiles::load<6>(operands[1]), Tiles::load<7>(operands[1]);
  for (; steps > 0; --steps) {
    Tiles::multiply_add<0, 4, 6>();
    Tiles::multiply_add<1, 4, 7>();
    Tiles::multiply_add<2, 5, 6>();
    Tiles::multiply_add<3, 5, 7>();
  }
  alignas(64) float square[32 * 32];
  store_square(square, 32);
  float total = 0;
  for (const float x : square) total += x;
  return total;
}

constexpr int multiply_adds_of_tile = Tiles::elements * Tiles::columns;

void get_meter(bench::Meter& meter) {
  meter.width = multiply_adds_of_tile;
  meter.flops_per_step = 4 * 2.0 * multiply_adds_of_tile;
  meter.multiply_add = multiply_add;
  meter.limit = "its matrix instructions";
}

// What the loops work on: a strip of rows and a panel of keys of 64 features, the scores of a row.
constexpr int padded = 64, keys = 256, panel = 32, stride = keys + 16;
alignas(64) BFloat16 strip_of_rows[panel * padded],
    panel_of_keys[panel * padded], source[panel * padded], packed[panel * padded];
alignas(64) float scores[panel * stride];

template <class Body>
MMCA_INLINE void repeat(std::int64_t times, const Body& body) {
  const Tiles::Session session;
  const BFloat16* rows[panel];
  for (int r = 0; r < panel; ++r) rows[r] = source + r * padded;
  for (; times > 0; --times) body(rows);
}
template <bool both>
void score(std::int64_t times) {
  repeat(times, [](auto) { multiply_strip<both, stride>(strip_of_rows, panel_of_keys, padded, scores); });
}
template <int parts>
void exponentiate(std::int64_t times) {  // what it leaves are two numbers in the place of one: small ones, here
  repeat(times, [](auto) { exp2_parts<parts>(scores, packed, keys, 1.0f, 1.0f); });
}

const bench::MatrixLoop loops[] = {
    {"score", true, 4, score<true>},
    {"score_16_rows", true, 2, score<false>},
    {"exp2_in_2_parts", false, keys / 16, exponentiate<2>},
    {"exp2_in_3_parts", false, keys / 16, exponentiate<3>},
    {"pack_feature_pairs", false, padded,
     [](std::int64_t n) { repeat(n, [](auto rows) { pack_feature_pairs(rows, panel, padded, packed); }); }},
    {"pack_row_pairs", false, padded,
     [](std::int64_t n) { repeat(n, [](auto rows) { pack_row_pairs(rows, panel, padded, packed); }); }},
    {"pack_transposed", false, padded,
     [](std::int64_t n) { repeat(n, [](auto rows) { pack_transposed(rows, panel, padded, packed); }); }},
    {"columns_into_4_rows", false, 4,
     [](std::int64_t n) { repeat(n, [](auto) { transpose_columns(scores, 4, scores + 256, stride); }); }},
};
void get_loops(const bench::MatrixLoop*& first, int& count) { first = loops, count = std::size(loops); }
}  // namespace mmca::cpu::meter_amx
#endif
