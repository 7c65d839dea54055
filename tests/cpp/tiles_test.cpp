// The tiles, packing and row arithmetic of every instruction set against naive loops. Operands are small integers, so
// that every sum is exact in any order and results must agree in every bit; what a block must not touch is sentinel.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "core/kernel_table.h"
#include "probe.h"
#include "tensor.h"

namespace mmca::test {
namespace {

// `count` elements aligned to 64 bytes, between sentinels.
template <class T>
class Block {
 public:
  explicit Block(std::int64_t count)
      : count_(count), memory_(static_cast<std::size_t>(count) + 2 * guard, sentinel<T>()) {
    start_ = guard - reinterpret_cast<std::uintptr_t>(memory_.data() + guard) % 64 / sizeof(T);
  }
  Block(std::int64_t count, Random& random) : Block(count) {
    for (std::int64_t i = 0; i < count; ++i) data()[i] = static_cast<T>(random.integer(-8, 8));
  }
  Block(const Block&) = delete;
  T* data() { return memory_.data() + start_; }
  T& operator[](std::int64_t i) { return data()[i]; }
  ~Block() {
    for (std::size_t i = 0; i < memory_.size(); ++i)
      if (i < start_ || i >= start_ + static_cast<std::size_t>(count_)) {
        EXPECT_TRUE(same_bits(memory_[i], sentinel<T>())) << "written out of bounds";
      }
  }

 private:
  static constexpr std::size_t guard = 256;
  std::int64_t count_;
  std::size_t start_;
  std::vector<T> memory_;
};

template <class T>
struct Tiles : testing::Test {};
struct Names {
  template <class T>
  static std::string GetName(int) {
    return sizeof(T) == 4 ? "f32" : "f64";
  }
};
using Types = testing::Types<float, double>;
TYPED_TEST_SUITE(Tiles, Types, Names);

template <class T, class Body>
void each_probe(const Body& body) {
  for (const Probe<T>& probe : probes<T>()) {
    if (!missing_features(probe.isa, cpu_features()).empty()) continue;
    SCOPED_TRACE(to_string(probe.isa));
    Random random(5);
    body(probe, random);
  }
}

constexpr int depths[] = {1, 2, 3, 4, 5, 31, 64, 257};

TYPED_TEST(Tiles, Score) {
  using T = TypeParam;
  each_probe<T>([](const Probe<T>& p, Random& random) {
    const int lanes = 2 * p.width;
    for (int rows = 1; rows <= p.tile_rows; ++rows)
      for (const int depth : depths) {
        Block<T> strip(depth * p.tile_rows, random), panel(depth * lanes, random);
        Block<T> scores((rows - 1) * probe_stride + lanes);
        p.score_tile(rows, depth, strip.data(), panel.data(), scores.data());
        for (int i = 0; i < (rows - 1) * probe_stride + lanes; ++i) {
          const int r = i / probe_stride, c = i % probe_stride;
          T sum = 0;
          for (int d = 0; c < lanes && d < depth; ++d) sum += strip[d * p.tile_rows + r] * panel[d * lanes + c];
          if (c < lanes) ASSERT_EQ(scores[i], sum) << rows << " rows, depth " << depth;
          else ASSERT_TRUE(same_bits(scores[i], sentinel<T>()));
        }
      }
  });
}

TYPED_TEST(Tiles, RowAndRescaledAndTransposed) {
  using T = TypeParam;
  each_probe<T>([](const Probe<T>& p, Random& random) {
    const int lanes = 2 * p.width;
    enum { plain, rescaled, transposed };
    for (int rows = 1; rows <= p.tile_rows; ++rows)
      for (const int depth : depths)
        for (const int kind : {plain, rescaled, transposed}) {
          if (kind == transposed && rows < p.tile_rows) continue;
          const int c_stride = lanes * random.integer(1, 3), height = kind == transposed ? depth : rows;
          Block<T> weights((height - 1) * probe_stride + std::max(depth, rows), random), panel(depth * lanes, random),
              factor(rows, random);
          Block<T> c((rows - 1) * c_stride + lanes, random), before((rows - 1) * c_stride + lanes);
          for (int i = 0; i < (rows - 1) * c_stride + lanes; ++i) before[i] = c[i];
          if (kind == plain) p.row_tile(rows, depth, weights.data(), panel.data(), c.data(), c_stride);
          else if (kind == rescaled)
            p.rescaled_row_tile(rows, depth, weights.data(), panel.data(), c.data(), c_stride, factor.data());
          else p.transposed_tile(depth, weights.data(), panel.data(), c.data(), c_stride);
          for (int i = 0; i < (rows - 1) * c_stride + lanes; ++i) {
            const int r = i / c_stride, x = i % c_stride;
            T expected = before[i];
            if (x < lanes) {
              if (kind == rescaled) expected *= factor[r];
              for (int k = 0; k < depth; ++k)
                expected +=
                    weights[kind == transposed ? k * probe_stride + r : r * probe_stride + k] * panel[k * lanes + x];
            }
            ASSERT_EQ(c[i], expected) << "kind " << kind << ", " << rows << " rows, depth " << depth;
          }
        }
  });
}

TYPED_TEST(Tiles, HeightCoversRows) {
  using T = TypeParam;
  each_probe<T>([](const Probe<T>& p, Random&) {
    for (int rows = 1; rows <= p.tile_rows; ++rows) {
      EXPECT_GE(p.tile_height(rows), rows);
      EXPECT_LE(p.tile_height(rows), p.tile_rows);
    }
    EXPECT_EQ(p.tile_height(1), 1);
  });
}

TYPED_TEST(Tiles, Direct) {
  using T = TypeParam;
  each_probe<T>([](const Probe<T>& p, Random& random) {
    const int lanes = 2 * p.width;
    for (int rows = 1; rows <= 8; ++rows)
      for (const int panels : {1, 2, 3, 5, 9}) {
        const int padded = panels * lanes, depth = lanes * random.integer(1, 3);
        Block<T> query(rows * padded, random), keys(depth * padded, random), factor(rows, random),
            weights((rows - 1) * probe_stride + depth, random);
        Block<T> scores((rows - 1) * probe_stride + lanes), out(rows * padded, random), before(rows * padded);
        std::vector<const T*> row;
        for (int j = 0; j < depth; ++j)
          row.push_back(keys.data() + random.integer(0, depth - 1) * padded);  // any order
        p.direct_score_tile(rows, padded, query.data(), row.data(), scores.data());
        for (int r = 0; r < rows; ++r)
          for (int c = 0; c < lanes; ++c) {
            T sum = 0;
            for (int d = 0; d < padded; ++d) sum += query[r * padded + d] * row[c][d];
            ASSERT_EQ(scores[r * probe_stride + c], sum) << rows << " rows, " << padded << " features";
          }
        for (int i = 0; i < rows * padded; ++i) before[i] = out[i];
        p.direct_weigh(rows, depth, weights.data(), row.data(), padded, out.data(), factor.data());
        for (int r = 0; r < rows; ++r)
          for (int d = 0; d < padded; ++d) {
            T sum = factor[r] * before[r * padded + d];
            for (int j = 0; j < depth; ++j) sum += weights[r * probe_stride + j] * row[j][d];
            ASSERT_EQ(out[r * padded + d], sum) << rows << " rows, " << padded << " features";
          }
      }
  });
}

TYPED_TEST(Tiles, PackColumns) {
  using T = TypeParam;
  each_probe<T>([](const Probe<T>& p, Random& random) {
    for (const bool strip : {true, false}) {
      const int width = strip ? p.tile_rows : 2 * p.width;
      for (int count = 0; count <= width; ++count)
        for (const int features : {1, 2, 5, p.width, p.width + 1, 2 * p.width, 67}) {
          const int padded = (features + p.width - 1) / p.width * p.width;
          Block<T> source(std::max(1, count) * padded, random), out(padded * width + p.width);
          std::vector<const T*> rows;
          for (int r = 0; r < count; ++r) rows.push_back(source.data() + r * padded);
          rows.resize(static_cast<std::size_t>(width), nullptr);  // must not be read
          (strip ? p.pack_strip : p.pack_panel)(rows.data(), count, features, T(3), out.data());
          for (int d = 0; d < features; ++d)
            for (int r = 0; r < width; ++r)
              ASSERT_EQ(out[d * width + r], r < count ? 3 * rows[r][d] : T(0))
                  << width << " wide, " << count << " rows";
        }
    }
  });
}

TYPED_TEST(Tiles, PackRow) {
  using T = TypeParam;
  const T nan = std::numeric_limits<T>::quiet_NaN(), infinity = std::numeric_limits<T>::infinity();
  each_probe<T>([&](const Probe<T>& p, Random& random) {
    const int lanes = 2 * p.width, stride = 5 * lanes;
    for (const int panels : {1, 2, 4})
      for (const T odd : {T(1), std::numeric_limits<T>::max(), nan, infinity, -infinity}) {
        const int padded = panels * lanes;
        Block<T> row(padded, random), out((panels - 1) * stride + lanes);
        row[random.integer(0, padded - 1)] = odd;
        EXPECT_EQ(p.pack_row(row.data(), padded, out.data(), stride) == T(0), std::isfinite(odd)) << odd;
        for (int i = 0; i < (panels - 1) * stride + lanes; ++i) {
          if (i % stride < lanes) ASSERT_TRUE(same_bits(out[i], row[i / stride * lanes + i % stride]));
          else ASSERT_TRUE(same_bits(out[i], sentinel<T>()));
        }
        Block<T> sum(padded, random), before(padded);
        for (int d = 0; d < padded; ++d) before[d] = sum[d];
        p.add_non_finite(row.data(), padded, T(2), sum.data());
        for (int d = 0; d < padded; ++d)
          if (std::isfinite(row[d])) ASSERT_EQ(sum[d], before[d]);
          else ASSERT_TRUE(same_bits(sum[d], row[d]) || (std::isnan(sum[d]) && std::isnan(row[d])));
        p.zero_non_finite(row.data(), padded);
        for (int d = 0; d < padded; ++d) ASSERT_TRUE(std::isfinite(row[d]));
        p.pack_zero_row(padded, out.data(), stride);
        for (int i = 0; i < (panels - 1) * stride + lanes; ++i)
          if (i % stride < lanes) ASSERT_EQ(out[i], T(0));
          else ASSERT_TRUE(same_bits(out[i], sentinel<T>()));
      }
  });
}

TYPED_TEST(Tiles, TransposeAndReductions) {
  using T = TypeParam;
  each_probe<T>([](const Probe<T>& p, Random&) {
    const int n = p.width;
    Block<T> square(n * n);
    for (int i = 0; i < n * n; ++i) square[i] = static_cast<T>(i);
    p.transpose(square.data());
    for (int i = 0; i < n; ++i)
      for (int j = 0; j < n; ++j) EXPECT_EQ(square[i * n + j], static_cast<T>(j * n + i));
    for (int at = 0; at < n; ++at) {
      Block<T> lanes(n);
      for (int i = 0; i < n; ++i) lanes[i] = static_cast<T>(1 << i);
      EXPECT_EQ(p.reduce_add(lanes.data()), static_cast<T>((1 << n) - 1));  // each lane once
      for (int i = 0; i < n; ++i) lanes[i] = static_cast<T>(-i - 2);
      lanes[at] = T(-1);
      EXPECT_EQ(p.reduce_max(lanes.data()), T(-1));
    }
  });
}

TYPED_TEST(Tiles, Dot) {
  using T = TypeParam;
  each_probe<T>([](const Probe<T>& p, Random& random) {
    for (int count = 0; count <= 18 * p.width; count += 2 * p.width) {
      Block<T> a(count, random), b(count, random);
      T dot = 0;
      for (int i = 0; i < count; ++i) dot += a[i] * b[i];
      EXPECT_EQ(p.dot(a.data(), b.data(), count), dot) << count;
    }
  });
}

}  // namespace
}  // namespace mmca::test
