// ldmatrix and mma of whole warps, after the fragment tables of the PTX ISA ("Matrix fragments for mma.m16n8k16").
#include <bit>
#include <cstring>
#include <vector>

#include "core/half.h"
#include "emulator.h"

namespace mmca::emulation {
namespace {

struct MatrixLoad {
  std::uint32_t* r;
  std::uint32_t address;
};

void load_matrices(MatrixLoad** lanes, bool transposed, Location at) {
  const int first_thread = current->warp * warp_size;
  for (int i = 0; i < 4; ++i) {
    std::uint16_t matrix[8][8];
    std::uint32_t used_banks[8] = {};  // of every 16 bytes of a pass over all banks: reads so far
    std::uint32_t passes = 0;
    for (int row = 0; row < 8; ++row) {
      const int lane = i * 8 + row;
      const std::uint32_t address = lanes[lane]->address;
      std::memcpy(matrix[row], shared_read<16>(address, first_thread + lane, true, at), 16);
      bool again = false;
      for (int earlier = i * 8; earlier < lane; ++earlier) again = again || lanes[earlier]->address == address;
      if (again) continue;
      std::uint32_t& bank = used_banks[address / 16 % 8];
      passes = ++bank > passes ? bank : passes;
    }
    ++statistics.ldmatrix_phases;
    statistics.ldmatrix_conflicts += passes - 1;
    for (int lane = 0; lane < warp_size; ++lane) {
      const int g = lane / 4, t = lane % 4;
      const std::uint32_t low = transposed ? matrix[2 * t][g] : matrix[g][2 * t];
      const std::uint32_t high = transposed ? matrix[2 * t + 1][g] : matrix[g][2 * t + 1];
      lanes[lane]->r[i] = low | high << 16;
    }
  }
}

struct MatrixProduct {
  float* d;
  const std::uint32_t* a;
  std::uint32_t b[2];
};

const float* f16_numbers() {  // all of them, by their bits
  static const std::vector<float> numbers = [] {
    std::vector<float> all(65536);
    for (std::uint32_t bits = 0; bits < 65536; ++bits) {
      Float16 x;
      x.bits = static_cast<std::uint16_t>(bits);
      all[bits] = static_cast<float>(x);
    }
    return all;
  }();
  return numbers.data();
}

struct WidenBF16 {
  float operator()(std::uint32_t bits) const { return std::bit_cast<float>(bits << 16); }
};
struct WidenF16 {
  const float* numbers = f16_numbers();
  float operator()(std::uint32_t bits) const { return numbers[bits & 0xffff]; }
};

// Products are exact in fp32, sums are rounded one by one, k ascending.
template <class Widen>
void multiply(MatrixProduct** lanes) {
  const Widen widen;
  typedef float Row __attribute__((vector_size(32)));  // of b and d
  alignas(32) float a[16][16], b[16][8], d[16][8];
  for (int lane = 0; lane < warp_size; ++lane) {
    const MatrixProduct& mine = *lanes[lane];
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) {
      float* at = &a[g + i % 2 * 8][2 * t + i / 2 * 8];
      at[0] = widen(mine.a[i]), at[1] = widen(mine.a[i] >> 16);
    }
    for (int i = 0; i < 2; ++i) {
      b[2 * t + 8 * i][g] = widen(mine.b[i]), b[2 * t + 8 * i + 1][g] = widen(mine.b[i] >> 16);
      d[g + 8 * i][2 * t] = mine.d[2 * i], d[g + 8 * i][2 * t + 1] = mine.d[2 * i + 1];
    }
  }
  for (int row = 0; row < 16; ++row) {
    Row sum;
    std::memcpy(&sum, d[row], sizeof sum);
    for (int k = 0; k < 16; ++k) {
      Row factor;
      std::memcpy(&factor, b[k], sizeof factor);
      sum += a[row][k] * factor;
    }
    std::memcpy(d[row], &sum, sizeof sum);
  }
  for (int lane = 0; lane < warp_size; ++lane)
    for (int i = 0; i < 4; ++i) lanes[lane]->d[i] = d[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
  ++statistics.mma;
}

}  // namespace

void ldmatrix_x4(std::uint32_t (&r)[4], std::uint32_t address, bool transposed, Location at) {
  MatrixLoad mine{r, address};
  warp_collective(mine, at, [=](MatrixLoad** lanes) { load_matrices(lanes, transposed, at); });
}

void mma_m16n8k16(Half type, float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1,
                  Location at) {
  MatrixProduct mine{d, a, {b0, b1}};
  warp_collective(mine, at, [=](MatrixProduct** lanes) {
    type == Half::bf16 ? multiply<WidenBF16>(lanes) : multiply<WidenF16>(lanes);
  });
}

}  // namespace mmca::emulation
