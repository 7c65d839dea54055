// One instruction set's building blocks (tiles, packing, exp2, ...) behind plain pointers, so that tests compiled for
// any processor can call them: no code of GoogleTest or of the standard library is compiled for a newer one.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "core/plan.h"
#include "core/problem.h"
#include "cpu/cpu_features.h"
#include "cpu/schedule.h"

namespace mmca::test {

inline constexpr int probe_stride = 272;  // of score rows

template <class T>
struct Probe {
  Isa isa;
  int width, tile_rows;  // a panel has 2 * width lanes

  // The tile of 1..tile_rows rows.
  void (*score_tile)(int rows, int depth, const T* strip, const T* panel, T* scores);
  void (*row_tile)(int rows, int depth, const T* weights, const T* panel, T* c, std::ptrdiff_t c_stride);
  void (*rescaled_row_tile)(int rows, int depth, const T* weights, const T* panel, T* c, std::ptrdiff_t c_stride,
                            const T* factor);
  void (*transposed_tile)(int depth, const T* weights, const T* panel, T* c, std::ptrdiff_t c_stride);
  int (*tile_height)(int rows);  // what with_tile_height makes of it
  void (*direct_score_tile)(int rows, int padded, const T* query, const T* const* keys, T* scores);
  void (*direct_weigh)(int rows, int depth, const T* weights, const T* const* values, int padded, T* out,
                       const T* factor);

  void (*pack_strip)(const T* const* rows, int count, int features, T scale, T* out);  // pack_columns, tile_rows wide
  void (*pack_panel)(const T* const* rows, int count, int features, T scale, T* out);  // the same, 2 * width wide
  T (*pack_row)(const T* row, int padded, T* panels, std::ptrdiff_t panel_stride);     // the sum of x * 0
  void (*pack_zero_row)(int padded, T* panels, std::ptrdiff_t panel_stride);
  // Rows of 16-bit storage; null where T is double.
  void (*widen_row)(DType storage, const void* source, std::int64_t step, int count, T* out);
  void (*narrow_row)(DType storage, const T* source, int count, void* out, std::int64_t step);
  void (*zero_non_finite)(T* panels, std::int64_t count);
  void (*add_non_finite)(const T* row, int features, T weight, T* out);

  void (*transpose)(T* square);  // [width][width]
  T (*reduce_add)(const T* lanes);
  T (*reduce_max)(const T* lanes);
  void (*exp2)(T* x, int registers_at_once, int count);  // count: a multiple of registers_at_once registers
  T (*exp2_one)(T x);
  void (*tanh)(T* y, T* slope, int count);  // count: a multiple of width
  T (*softcapped)(T t, T softcap, T* slope);
  T (*exp2_row)(T* scores, int count, double scale, T maximum);  // the sum
  T (*dot)(const T* a, const T* b, int count);
  void (*phi)(const T* row, int features, int padded, T* out);  // of a key; padded: a multiple of 2 * width
  T (*phi_of_query)(const T* row, int features, int padded, T* out);
  void (*dropout_factors)(const Dropout& dropout, const KeyList& keys, std::int32_t first, int count,
                          std::uint32_t position, std::uint32_t head, T* factors);

  cpu::BackwardTiles (*backward_tiles)(const Problem& problem);
};

// The probes of each instruction set that is built, whether or not this processor runs it.
template <class T>
std::vector<Probe<T>> probes();

}  // namespace mmca::test

// What the probe_*.cpp files define.
#define MMCA_PROBE(isa)                                \
  namespace mmca::cpu::probe_##isa {                   \
    void get_probe(mmca::test::Probe<float> & probe);  \
    void get_probe(mmca::test::Probe<double> & probe); \
  }
MMCA_PROBE(scalar)
#if defined(__x86_64__)
MMCA_PROBE(avx2)
MMCA_PROBE(avx512)
#endif
#if defined(__aarch64__)
MMCA_PROBE(neon)
#endif
#undef MMCA_PROBE

namespace mmca::test {

template <class T>
std::vector<Probe<T>> probes() {
  std::vector<Probe<T>> all(1);
  all[0].isa = Isa::scalar;
  cpu::probe_scalar::get_probe(all[0]);
#if defined(__x86_64__)
  all.resize(3);
  all[1].isa = Isa::avx2;
  cpu::probe_avx2::get_probe(all[1]);
  all[2].isa = Isa::avx512;
  cpu::probe_avx512::get_probe(all[2]);
#endif
#if defined(__aarch64__)
  all.resize(2);
  all[1].isa = Isa::neon;
  cpu::probe_neon::get_probe(all[1]);
#endif
  return all;
}

}  // namespace mmca::test
