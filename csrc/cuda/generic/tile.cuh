// Tiles in shared memory and their products by plain multiply-adds, for kernels that run on any GPU in fp32 and fp64.
//
// A block of four warps keeps one tile, its own, while others pass by. A thread (lanes: 4 in y, 8 in x) works on
//
//     own row i < own_steps:          warp * 4 own_steps + 4 i + y
//     passing row j < passing_steps:  8 j + x
//     feature chunk c < chunk_steps:  8 c + x, 16 bytes each
//
// so that a warp reads 4 + 8 rows of features for 32 products, without bank conflicts: a tile's rows are an odd number
// of chunks apart. What a warp computes for its own rows it alone needs again (as weights, [own row][passing row], rows
// passing + 8 numbers apart where there is room), so a syncwarp is all that stands between products and weighted sums.
#pragma once

#include "cuda/exp2.cuh"
#include "cuda/launch.h"
#include "cuda/row_results.cuh"

namespace mmca::cuda::generic {

using namespace prim;

inline constexpr int threads = 128, lanes_y = 4, lanes_x = 8, warps = threads / (lanes_x * lanes_y);

template <class T>
struct alignas(16) Chunk {
  static constexpr int size = 16 / sizeof(T);
  T x[size];
};

// width: the features of a row in shared memory; head_dim and value_dim are no more, the rest is zero. blocks: of so
// many the registers fit a multiprocessor.
template <class T, int width_, int own_steps_, int passing_steps_, int blocks_>
struct Shape {
  static constexpr int width = width_, own_steps = own_steps_, passing_steps = passing_steps_, blocks = blocks_;
  static constexpr int own = warps * lanes_y * own_steps, passing = lanes_x * passing_steps;
  static constexpr int chunk = Chunk<T>::size, row_chunks = width / chunk, chunk_steps = row_chunks / lanes_x;
  static constexpr int columns = width / lanes_x;  // of a row's features, a thread's share
  static constexpr smem_t pitch = (row_chunks | 1) * 16;
  static constexpr smem_t weight_pitch = (passing + (passing > lanes_x ? lanes_x : 0)) * sizeof(T);
  static constexpr smem_t own_bytes = own * pitch, passing_bytes = passing * pitch, weight_bytes = own * weight_pitch;
  static_assert(row_chunks % lanes_x == 0 && passing % chunk == 0 && own_steps <= lanes_x);
  // own tiles start at multiples of themselves, and no hull must be cut (entries_hull)
  static_assert(plan_tile % own == 0 && plan_tile % passing == 0);
};

struct Place {
  int thread, warp, y, x;

  PRIM Place() {
    thread = static_cast<int>(opaque(threadIdx.x));  // a second one shares no registers with the first
    warp = thread / (lanes_x * lanes_y), y = thread / lanes_x % lanes_y, x = thread % lanes_x;
  }
  template <class S>
  PRIM int own_row(int i) const {
    return (warp * S::own_steps + i) * lanes_y + y;
  }
  PRIM int passing_row(int j) const { return j * lanes_x + x; }
  PRIM int feature_chunk(int c) const { return c * lanes_x + x; }
};

PRIM float maximum(float a, float b) { return fmaxf(a, b); }
PRIM double maximum(double a, double b) { return fmax(a, b); }

// The sum or maximum over the lanes of an own row.
template <class T>
PRIM T sum_of_row(T x) {
#pragma unroll
  for (int mask = 1; mask < lanes_x; mask *= 2) x += shfl_xor(x, mask);
  return x;
}
template <class T>
PRIM T maximum_of_row(T x) {
#pragma unroll
  for (int mask = 1; mask < lanes_x; mask *= 2) x = maximum(x, shfl_xor(x, mask));
  return x;
}

// ---- loading -----------------------------------------------------------------------------------------------------

// The rows of one head of a tensor.
template <class T>
struct RowSource {
  const T* data;
  std::int64_t row, feature;
  int dim;
  bool aligned;  // chunks can be copied whole

  PRIM RowSource(const Input& x, const Sequence& sequence, std::int64_t begin, std::int64_t head, std::int64_t dim_,
                 int group = 0)
      : data(static_cast<const T*>(x.data) + row_offset(x, sequence, begin, head, 0) + group * x.group),
        row(x.row),
        feature(x.feature),
        dim(static_cast<int>(dim_)) {
    constexpr int chunk = Chunk<T>::size;
    aligned = feature == 1 && dim % chunk == 0 && row % chunk == 0 && reinterpret_cast<std::uintptr_t>(data) % 16 == 0;
  }
};

// Calls body(r, c) for this thread's chunks of a tile of `rows` rows: those it loads.
template <class S, int rows, class Body>
PRIM void each_loaded_row(Body body) {
  const Place place;
  constexpr int at_once = threads / lanes_x;
#pragma unroll
  for (int r0 = 0; r0 < rows; r0 += at_once) {
    const int r = r0 + place.thread / lanes_x;
    if (rows % at_once == 0 || r < rows) body(r);
  }
}

// Begins to copy a tile: row r is row_at(r) of the source, or zero where that is negative. Features past the source's
// are zero.
template <class S, int rows, class T, class RowAt>
PRIM void load_tile(smem_t tile, const RowSource<T>& source, RowAt row_at) {
  const Place place;
  each_loaded_row<S, rows>([&](int r) {
    const std::int64_t row = row_at(r);
    const T* from = source.data + (row < 0 ? 0 : row * source.row);
#pragma unroll 1
    for (int c = 0; c < S::chunk_steps; ++c) {
      const int chunk = place.feature_chunk(c), first = chunk * S::chunk;
      const smem_t to = tile + r * S::pitch + chunk * 16;
      if (row < 0 || first >= source.dim) {
        st_shared(to, Chunk<T>{});
      } else if (source.aligned) {
        cp_async<16>(to, from + first, true);
      } else {
        for (int e = 0; e < S::chunk; ++e) {
          const bool inside = first + e < source.dim;
          cp_async<sizeof(T)>(to + e * sizeof(T), inside ? from + (first + e) * source.feature : from, inside);
        }
      }
    }
  });
}

// All copies this thread began have landed.
PRIM void wait_for_copies() {
  cp_async_commit();
  cp_async_wait<0>();
}

// Whether this thread's part of a tile holds a NaN or an infinity; after its copy has landed.
template <class S, int rows, class T>
PRIM bool loaded_non_finite(smem_t tile) {
  const Place place;
  T zero = T(0);
  each_loaded_row<S, rows>([&](int r) {
#pragma unroll
    for (int c = 0; c < S::chunk_steps; ++c) {
      const auto chunk = ld_shared<Chunk<T>>(tile + r * S::pitch + place.feature_chunk(c) * 16);
#pragma unroll
      for (int e = 0; e < S::chunk; ++e) zero = multiply_add(chunk.x[e], T(0), zero);
    }
  });
  return !(zero == T(0));
}

// ---- products ----------------------------------------------------------------------------------------------------

// s[i][j] = <own row i, passing row j> over `dim` features, in their order: every kernel finds the same bits.
template <class S, class T>
PRIM void products(smem_t own, smem_t passing, int dim, T (&s)[S::own_steps][S::passing_steps]) {
  const Place place;
  own += place.own_row<S>(0) * S::pitch, passing += place.passing_row(0) * S::pitch;
#pragma unroll
  for (int i = 0; i < S::own_steps; ++i)
#pragma unroll
    for (int j = 0; j < S::passing_steps; ++j) s[i][j] = T(0);
#pragma unroll 2
  for (int d = 0; d < dim; d += S::chunk, own += 16, passing += 16) {
    Chunk<T> a[S::own_steps];
#pragma unroll
    for (int i = 0; i < S::own_steps; ++i) a[i] = ld_shared<Chunk<T>>(own + i * lanes_y * S::pitch);
#pragma unroll
    for (int j = 0; j < S::passing_steps; ++j) {
      const auto b = ld_shared<Chunk<T>>(passing + j * lanes_x * S::pitch);
#pragma unroll
      for (int e = 0; e < S::chunk; ++e)
#pragma unroll
        for (int i = 0; i < S::own_steps; ++i) s[i][j] = multiply_add(a[i].x[e], b.x[e], s[i][j]);
    }
  }
}

// The weight of a pair that does not see each other: it adds nothing to finite numbers, and where a tile holds others
// weigh() can tell it from a weight that came out as 0.
template <class T>
PRIM constexpr T hidden() {
  return T(-0.0);
}
PRIM bool is_hidden(float weight) {
  std::uint32_t bits;
  memcpy(&bits, &weight, sizeof bits);
  return bits == std::uint32_t{1} << 31;
}
PRIM bool is_hidden(double weight) {
  std::uint64_t bits;
  memcpy(&bits, &weight, sizeof bits);
  return bits == std::uint64_t{1} << 63;
}

// To and from shared memory: this thread's own pairs.
template <class S, class T>
PRIM void store_weights(smem_t weights, const T (&w)[S::own_steps][S::passing_steps]) {
  const Place place;
  const smem_t at = weights + place.own_row<S>(0) * S::weight_pitch + place.passing_row(0) * sizeof(T);
#pragma unroll
  for (int i = 0; i < S::own_steps; ++i)
#pragma unroll
    for (int j = 0; j < S::passing_steps; ++j)
      st_shared(at + i * lanes_y * S::weight_pitch + j * lanes_x * sizeof(T), w[i][j]);
}

template <class S, class T>
PRIM void load_weights(smem_t weights, T (&w)[S::own_steps][S::passing_steps]) {
  const Place place;
  const smem_t at = weights + place.own_row<S>(0) * S::weight_pitch + place.passing_row(0) * sizeof(T);
#pragma unroll
  for (int i = 0; i < S::own_steps; ++i)
#pragma unroll
    for (int j = 0; j < S::passing_steps; ++j)
      w[i][j] = ld_shared<T>(at + i * lanes_y * S::weight_pitch + j * lanes_x * sizeof(T));
}

// sum[i] += weights of own row i times the passing rows, this thread's columns of it: chunk c is feature_chunk(c).
template <class S, bool all_finite, class T>
PRIM void weigh_rows(smem_t weights, smem_t passing, T (&sum)[S::own_steps][S::columns]) {
  const Place place;
  weights += place.own_row<S>(0) * S::weight_pitch, passing += place.feature_chunk(0) * 16;
#pragma unroll 1
  for (int first = 0; first < S::passing; first += S::chunk, weights += 16) {
    Chunk<T> w[S::own_steps];
#pragma unroll
    for (int i = 0; i < S::own_steps; ++i) w[i] = ld_shared<Chunk<T>>(weights + i * lanes_y * S::weight_pitch);
#pragma unroll
    for (int e = 0; e < S::chunk; ++e, passing += S::pitch) {
#pragma unroll
      for (int c = 0; c < S::chunk_steps; ++c) {
        const auto b = ld_shared<Chunk<T>>(passing + c * lanes_x * 16);
#pragma unroll
        for (int i = 0; i < S::own_steps; ++i) {
          if (!all_finite && is_hidden(w[i].x[e])) continue;
#pragma unroll
          for (int f = 0; f < S::chunk; ++f) {
            T& x = sum[i][c * S::chunk + f];
            x = multiply_add(w[i].x[e], b.x[f], x);
          }
        }
      }
    }
  }
}
// In fp32 a tile's sum is taken apart: rounding grows with the lengths of the two sums, not with their product. In fp64
// it does not matter, and the registers do.
template <class S, class T>
PRIM void weigh(smem_t weights, smem_t passing, bool all_finite, T (&sum)[S::own_steps][S::columns]) {
  if constexpr (sizeof(T) == 8) {
    if (all_finite) weigh_rows<S, true>(weights, passing, sum);
    else weigh_rows<S, false>(weights, passing, sum);
  } else {
    T part[S::own_steps][S::columns];
#pragma unroll
    for (int i = 0; i < S::own_steps; ++i)
#pragma unroll
      for (int d = 0; d < S::columns; ++d) part[i][d] = T(0);
    if (all_finite) weigh_rows<S, true>(weights, passing, part);
    else weigh_rows<S, false>(weights, passing, part);
#pragma unroll
    for (int i = 0; i < S::own_steps; ++i)
#pragma unroll
      for (int d = 0; d < S::columns; ++d) sum[i][d] += part[i][d];
  }
}

// ---- results -----------------------------------------------------------------------------------------------------

// This thread's columns of a row: features first .. first + chunk - 1 of chunk c.
template <class S, class T>
PRIM void store_row(T* row, std::int64_t feature, int dim, const T (&x)[S::columns]) {
  const Place place;
  const bool aligned = feature == 1 && reinterpret_cast<std::uintptr_t>(row) % 16 == 0;
#pragma unroll
  for (int c = 0; c < S::chunk_steps; ++c) {
    const int first = place.feature_chunk(c) * S::chunk;
    if (aligned && first + S::chunk <= dim) {
      Chunk<T> chunk;
#pragma unroll
      for (int e = 0; e < S::chunk; ++e) chunk.x[e] = x[c * S::chunk + e];
      st_global(reinterpret_cast<Chunk<T>*>(row + first), chunk);
    } else {
#pragma unroll
      for (int e = 0; e < S::chunk; ++e)
        if (first + e < dim) st_global(row + (first + e) * feature, x[c * S::chunk + e]);
    }
  }
}

// ---- pairs ---------------------------------------------------------------------------------------------------------

// What a block knows of the rows of a tile, in shared memory.
struct alignas(16) RowView {
  Interval range;           // of the list of the group at hand
  std::int32_t row;         // of the sequence; -1: none
  std::int16_t self_group;  // 1: the row itself is its image group, whose weight is never dropped
  std::int16_t alone;       // 1: the row's softmax is over one key

  PRIM bool sees(std::int32_t c) const { return c >= range.begin && c < range.end; }
  PRIM bool meets(std::int32_t begin, std::int32_t end) const {
    return range.begin < range.end && range.begin < end && range.end > begin;
  }
};

// Row r of a tile of `count` rows that starts at entry `first` of a sequence.
PRIM RowView view_of(const Problem& problem, const DevicePlan& plan, const Sequence& sequence, int group,
                     std::int32_t first, std::int32_t count, int r) {
  if (r >= count) return {{0, 0}, -1, 0, 0};
  const std::int32_t entry = first + r;
  const Interval range = entry_range(problem, plan, sequence, entry, group);
  bool alone = range.end - range.begin == 1;
  if (alone && problem.joint() && problem.groups() == 2) {
    const Interval other = entry_range(problem, plan, sequence, entry, 1 - group);
    alone = other.begin >= other.end;
  }
  return {range, row_of(plan, sequence, entry), group == 1 && is_self_entry(plan, sequence, entry), alone};
}

// A block's tile of rows of one query head. Blocks, slowest first: KV head; tile of rows, the last one first, which
// under a causal mask takes longest; head. What can be made anew is: it would fill the registers of loops that do
// without.
template <int rows>
struct RowBlock {
  const Problem& problem;
  const DevicePlan& plan;
  std::int32_t head, index, first, count;  // index: of the sequence

  PRIM RowBlock(const Problem& problem_, const DevicePlan& plan_) : problem(problem_), plan(plan_) {
    const auto share = static_cast<std::int32_t>(problem.heads_per_kv());
    const std::int64_t tiles = gridDim.x / problem.q_heads, rest = blockIdx.x / share;
    const Tile tile = tile_of(problem, plan, tiles - 1 - rest % tiles, rows, false);
    head = static_cast<std::int32_t>(rest / tiles * share + blockIdx.x % share);
    index = tile.sequence.index, first = tile.first, count = tile.count;
  }
  PRIM Sequence sequence() const { return sequence_at(problem, plan, opaque(index)); }
  PRIM std::int32_t query_head() const { return opaque(head); }
  PRIM std::int32_t kv_head() const { return opaque(head) / static_cast<std::uint32_t>(problem.heads_per_kv()); }
  PRIM std::int32_t row_at(int r) const { return r < count ? row_of(plan, sequence(), first + r) : std::int32_t{-1}; }
  PRIM RowView view_of_row(int group, int r) const {
    return view_of(problem, plan, sequence(), group, first, count, r);
  }
};

// Are scores more than products with a sign and an interval?
PRIM bool shapes_pairs(const Problem& problem) { return problem.shapes_scores() || problem.attn_mask.data; }

// From products to what exponents are taken of, by a loop over the pairs in shared memory, where it takes few
// registers: scores; or, where scores are but scaled products, the product with the sign of the scale. -inf where the
// mask hides, and where row_at(own, passing) or key_at(own, passing) is negative.
template <class S, class T, class RowAt, class KeyAt>
PRIM void shape_pairs(smem_t weights, const Problem& problem, const Sequence& sequence, std::int64_t head, T factor,
                      RowAt row_at, KeyAt key_at) {
  const Place place;
  const PairScores<T> pairs(problem, sequence, head);
#pragma unroll 1
  for (int u = 0; u < S::own_steps * S::passing_steps; ++u) {
    const int own = place.own_row<S>(u / S::passing_steps), passing = place.passing_row(u % S::passing_steps);
    const smem_t at = weights + own * S::weight_pitch + passing * sizeof(T);
    const std::int32_t row = row_at(own, passing), key = key_at(own, passing);
    T s = -infinity<T>(), slope;
    if (row >= 0 && key >= 0) {
      const T product = ld_shared<T>(at);
      if (problem.shapes_scores()) s = pairs.score(product, row, key, slope);
      else if (pairs.visible(row, key)) s = product * factor;
    }
    st_shared(at, s);
  }
}

// ---- dropout -------------------------------------------------------------------------------------------------------

// Which weights of a tile of row x key pairs are kept, as bits in shared memory: a word holds the neighbouring keys of
// one row that one thread draws, and Philox's blocks of keys are drawn once.
template <int rows, int keys>
struct KeptBits {
  static constexpr int segments = threads / rows, keys_each = keys / segments;
  static constexpr smem_t bytes = threads * 4;
  static_assert(threads % rows == 0 && keys % segments == 0 && keys_each <= 32);

  // row_at(r), key_at(k): the sequence's row and key; negative: none. is_self(r): weights that are never dropped.
  template <class RowAt, class KeyAt>
  PRIM static void draw(smem_t bits, const PairDropout& dropout, RowAt row_at, KeyAt key_at) {
    const Place place;
    const int r = place.thread % rows, segment = place.thread / rows;
    const std::int32_t row = row_at(r);
    std::uint32_t kept = 0, word[4] = {};
    std::int32_t block = -1;
#pragma unroll 1
    for (int k = 0; k < keys_each && row >= 0; ++k) {
      const std::int32_t key = key_at(segment * keys_each + k);
      if (key < 0) continue;
      if (key / 8 != block) block = key / 8, dropout.words(row, block, word);
      const int w = key % 8 / 2;
      const std::uint32_t pair = w == 0 ? word[0] : w == 1 ? word[1] : w == 2 ? word[2] : word[3];
      if (dropout.factor(pair, key) != 0.0f) kept |= 1u << k;
    }
    st_shared(bits + (r * segments + segment) * 4, kept);
  }
  PRIM static bool kept(smem_t bits, int r, int k) {
    return ld_shared<std::uint32_t>(bits + (r * segments + k / keys_each) * 4) >> (k % keys_each) & 1u;
  }
};

template <class T>
PRIM T kept_factor(const Problem& problem) {
  const T all = T(65536), dropped = static_cast<T>(problem.dropout.threshold);
  return dropped < all ? all / (all - dropped) : T(0);
}

// ---- launch --------------------------------------------------------------------------------------------------------

inline constexpr smem_t most_shared_bytes = 99 * 1024;  // a block's, on the GPUs that have least

// Calls body(constant) with the narrowest width that holds the heads.
template <class Body>
void with_width(const Problem& problem, const Body& body) {
  const std::int64_t dim = problem.head_dim > problem.value_dim ? problem.head_dim : problem.value_dim;
  if (dim <= 64) body(std::integral_constant<int, 64>{});
  else if (dim <= 128) body(std::integral_constant<int, 128>{});
  else body(std::integral_constant<int, 256>{});
}

}  // namespace mmca::cuda::generic
