// The kernels' inner loops by themselves, with all they touch in the nearest cache: what a tile loses to the machine's
// limit, and what the work between the products costs.
//
// The unit is the slot: the time of one multiply-add of a register in the peak loop of the same instruction set, which
// is half a cycle on processors with two such units; of AMX, of a product of two tiles, 16 cycles. A product of n
// register multiply-adds takes n slots at the peak; work that is no product is given in slots a register.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <functional>
#include <iterator>
#include <stdexcept>
#include <vector>

#include "measure.h"
#include "meter.h"
#include "probe.h"

namespace mmca::bench {
namespace {

using test::Probe;
using test::probe_stride;

constexpr int depth = 64, keys = 256;  // features of a head, keys of a block

// What the tiles read and write, on cache lines.
struct Memory {
  alignas(64) float strip[depth * 16], panel[keys * 32], rows[16 * probe_stride], out[keys * depth], factor[16],
      exponents[keys];
  const float* row[keys];

  Memory() {
    const auto fill = [](float* x, std::size_t count) {
      for (std::size_t i = 0; i < count; ++i) x[i] = 1e-3f * static_cast<float>(i % 7);
    };
    fill(strip, std::size(strip)), fill(panel, std::size(panel)), fill(rows, std::size(rows));
    fill(out, std::size(out)), fill(factor, std::size(factor)), fill(exponents, std::size(exponents));
    for (int c = 0; c < keys; ++c) row[c] = out + c * depth;
  }
};

struct Tile {
  const char* name;
  bool product;
  double registers;  // multiply-adds, or registers worked on, of one call
  std::function<void(std::int64_t times)> run;
};

std::vector<Tile> tiles_of(const Probe<float>& p, Memory& m) {
  const int height = p.tile_rows, features = depth / p.width;
  const auto again = [](auto body) {
    return [body](std::int64_t times) {
      for (; times > 0; --times) body();
    };
  };
  return {
      {"score", true, 2.0 * height * depth,
       again([&p, &m, height] { p.score_tile(height, depth, m.strip, m.panel, m.rows); })},
      {"weigh", true, 2.0 * height * keys,
       again([&p, &m, height] { p.rescaled_row_tile(height, keys, m.rows, m.panel, m.out, depth, m.factor); })},
      {"query_gradient", true, 2.0 * height * keys,
       again([&p, &m, height] { p.row_tile(height, keys, m.rows, m.panel, m.out, depth); })},
      {"key_gradient", true, 2.0 * height * 16,
       again([&p, &m] { p.transposed_tile(16, m.rows, m.panel, m.out, depth); })},
      {"weigh_4_rows_in_place", true, 4.0 * keys * features,
       again([&p, &m] { p.direct_weigh(4, keys, m.rows, m.row, depth, m.panel, m.factor); })},
      {"exp2_row", false, static_cast<double>(keys) / p.width,
       again([&p, &m] { p.exp2_row(m.exponents, keys, 0.5, 1); })},  // of numbers up to 1, which they stay
      {"pack_columns", false, 2.0 * depth, again([&p, &m] { p.pack_panel(m.row, 2 * p.width, depth, 1, m.panel); })},
  };
}

std::vector<Tile> matrix_tiles() {
  std::vector<Tile> tiles;
  for (const MatrixLoop& loop : matrix_loops()) tiles.push_back({loop.name, loop.product, loop.registers, loop.run});
  return tiles;
}

// The median of alternating rounds, in slots a register.
double slots(const Meter& meter, const Tile& tile, double seconds) {
  const double per_step = meter.flops_per_step / (2.0 * meter.width);
  const double calls = std::ceil(2e5 / tile.registers), steps = 2e5 / per_step;
  float kept = 0;
  std::vector<double> ratios;
  for (const double end = wall_clock() + seconds; ratios.size() < 5 || wall_clock() < end;) {
    const double ours = seconds_of_one_thread([&] { tile.run(static_cast<std::int64_t>(calls)); });
    const double peak =
        seconds_of_one_thread([&] { kept = meter.multiply_add(static_cast<std::int64_t>(steps), 0.999f, 0.001f); });
    ratios.push_back(ours / (calls * tile.registers) / (peak / (std::floor(steps) * per_step)));
  }
  EXPECT_TRUE(std::isfinite(kept));
  return quartiles(std::move(ratios)).middle;
}

class TileTest : public testing::Test {
 public:
  TileTest(Isa isa, Tile tile, double seconds) : isa_(isa), tile_(std::move(tile)), seconds_(seconds) {}
  void TestBody() override {
    const Meter meter = meter_of(isa_);
    const double found = slots(meter, tile_, seconds_);
    std::printf("%-28s %-7s %6.2f slots a register%s", tile_.name, to_string(isa_), found, tile_.product ? "" : "\n");
    if (tile_.product) std::printf(", %5.1f%% of the peak of %s\n", 100 / found, meter.limit);
    RecordProperty("isa", to_string(isa_)), RecordProperty("slots", std::to_string(found));
    const double least = tile_.product ? 0.5 : isa_ == Isa::amx ? 0.01 : 0.1;
    EXPECT_GT(found, least) << "quicker than the peak: what is measured is not the tile";
  }

 private:
  Isa isa_;
  Tile tile_;
  double seconds_;
};

void register_tiles(double seconds) {
  static const std::vector<Probe<float>> probes = test::probes<float>();
  static Memory memory;
  const auto add = [seconds](Isa isa, const std::vector<Tile>& tiles) {
    if (!missing_features(isa, cpu_features()).empty() || (forced_isa() && *forced_isa() != isa)) return;
    for (const Tile& tile : tiles)
      testing::RegisterTest("Tiles", (std::string(tile.name) + "/" + to_string(isa)).c_str(), nullptr, nullptr,
                            __FILE__, __LINE__, [=]() -> testing::Test* { return new TileTest(isa, tile, seconds); });
  };
  for (const Probe<float>& probe : probes) add(probe.isa, tiles_of(probe, memory));
  add(Isa::amx, matrix_tiles());
}

}  // namespace
}  // namespace mmca::bench

int main(int argc, char** argv) {
  testing::InitGoogleTest(&argc, argv);
  try {
    mmca::bench::register_tiles(mmca::bench::settings_of_environment().seconds);
  } catch (const std::invalid_argument& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 2;
  }
  return RUN_ALL_TESTS();
}
