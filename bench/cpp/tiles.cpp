// The kernels' inner loops by themselves, with all they touch in the nearest cache: what a tile loses to the machine's
// limit, and what the work between the products costs.
//
// The unit is the slot: the time of one multiply-add of a register in the peak loop of the same instruction set, which
// is half a cycle on processors with two such units. A product of n register multiply-adds takes n slots at the peak;
// work that is no product is given in slots a register.
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
  std::function<void()> run;
};

std::vector<Tile> tiles_of(const Probe<float>& p, Memory& m) {
  const int height = p.tile_rows, features = depth / p.width;
  return {
      {"score", true, 2.0 * height * depth,
       [&p, &m, height] { p.score_tile(height, depth, m.strip, m.panel, m.rows); }},
      {"weigh", true, 2.0 * height * keys,
       [&p, &m, height] { p.rescaled_row_tile(height, keys, m.rows, m.panel, m.out, depth, m.factor); }},
      {"query_gradient", true, 2.0 * height * keys,
       [&p, &m, height] { p.row_tile(height, keys, m.rows, m.panel, m.out, depth); }},
      {"key_gradient", true, 2.0 * height * 16, [&p, &m] { p.transposed_tile(16, m.rows, m.panel, m.out, depth); }},
      {"weigh_4_rows_in_place", true, 4.0 * keys * features,
       [&p, &m] { p.direct_weigh(4, keys, m.rows, m.row, depth, m.panel, m.factor); }},
      {"exp2_row", false, static_cast<double>(keys) / p.width,
       [&p, &m] { p.exp2_row(m.exponents, keys, 0.5, 1); }},  // of numbers up to 1, which they stay
      {"pack_columns", false, 2.0 * depth, [&p, &m] { p.pack_panel(m.row, 2 * p.width, depth, 1, m.panel); }},
  };
}

// The median of alternating rounds, in slots a register.
double slots(const Meter& meter, const Tile& tile, double seconds) {
  const double per_step = meter.flops_per_step / (2.0 * meter.width);
  const double calls = std::ceil(2e5 / tile.registers), steps = 2e5 / per_step;
  float kept = 0;
  std::vector<double> ratios;
  for (const double end = wall_clock() + seconds; ratios.size() < 5 || wall_clock() < end;) {
    const double ours = seconds_of_one_thread([&] {
      for (double call = 0; call < calls; ++call) tile.run();
    });
    const double peak =
        seconds_of_one_thread([&] { kept = meter.multiply_add(static_cast<std::int64_t>(steps), 0.999f, 0.001f); });
    ratios.push_back(ours / (calls * tile.registers) / (peak / (std::floor(steps) * per_step)));
  }
  EXPECT_TRUE(std::isfinite(kept));
  return quartiles(std::move(ratios)).middle;
}

class TileTest : public testing::Test {
 public:
  TileTest(const Probe<float>& probe, int index, double seconds) : probe_(probe), index_(index), seconds_(seconds) {}
  void TestBody() override {
    static Memory memory;
    const Tile tile = tiles_of(probe_, memory)[static_cast<std::size_t>(index_)];
    const double found = slots(meter_of(probe_.isa), tile, seconds_);
    std::printf("%-28s %-7s %6.2f slots a register%s", tile.name, to_string(probe_.isa), found,
                tile.product ? "" : "\n");
    if (tile.product) std::printf(", %5.1f%% of the FMA peak\n", 100 / found);
    RecordProperty("isa", to_string(probe_.isa)), RecordProperty("slots", std::to_string(found));
    EXPECT_GT(found, tile.product ? 0.5 : 0.1) << "quicker than the peak: what is measured is not the tile";
  }

 private:
  const Probe<float>& probe_;
  int index_;
  double seconds_;
};

void register_tiles(double seconds) {
  static const std::vector<Probe<float>> probes = test::probes<float>();
  for (const Probe<float>& probe : probes) {
    if (!missing_features(probe.isa, cpu_features()).empty() || (forced_isa() && *forced_isa() != probe.isa)) continue;
    Memory memory;
    const auto tiles = tiles_of(probe, memory);
    for (int i = 0; i < static_cast<int>(tiles.size()); ++i)
      testing::RegisterTest("Tiles",
                            (std::string(tiles[static_cast<std::size_t>(i)].name) + "/" + to_string(probe.isa)).c_str(),
                            nullptr, nullptr, __FILE__, __LINE__,
                            [&probe, i, seconds]() -> testing::Test* { return new TileTest(probe, i, seconds); });
  }
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
