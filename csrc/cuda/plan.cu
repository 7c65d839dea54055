// Makes the lists and ranges of plan.h, one block a sequence. A thread owns a run of neighbouring keys: it counts them,
// a scan over the threads tells it how many lie before, and it counts again to write. O(length / threads) steps and one
// scan, whatever the content of modality, key_mask and cu_seqlens.
#include "cuda/launch.h"
#include "cuda/rows.cuh"

namespace mmca::cuda {
namespace {

using namespace prim;

constexpr int plan_threads = 512;

enum class Kind { text, image, hidden };  // of a key: list 0, list 1, none

// The plan's arrays while they are written, and what only the planning needs.
struct PlanArrays {
  std::int32_t *positions, *list_sizes, *rows;
  int4 *ranges, *hulls;
  std::uint8_t* self_entries;
  int2* ranks;  // [key token]: how many keys of list 0 and 1 lie before
  int2* runs;   // [key token]: the image it belongs to, as entries of list 1; null: not asked for
};

// The exclusive scan over the block's threads of a pair of numbers, and the whole; `minimum`: the smallest instead of
// the sum, from the last thread back. `scratch`: plan_threads pairs.
template <class Combine>
PRIM int2 scan_before(int2 own, int2 neutral, bool from_behind, smem_t scratch, int2& all, Combine combine) {
  const int thread = from_behind ? plan_threads - 1 - static_cast<int>(threadIdx.x) : static_cast<int>(threadIdx.x);
  const auto at = [&](int i) { return scratch + static_cast<smem_t>(i * sizeof(int2)); };
  st_shared(at(thread), own);
  syncthreads();
  for (int step = 1; step < plan_threads; step *= 2) {
    int2 sum = ld_shared<int2>(at(thread));
    if (thread >= step) sum = combine(ld_shared<int2>(at(thread - step)), sum);
    syncthreads();
    st_shared(at(thread), sum);
    syncthreads();
  }
  all = ld_shared<int2>(at(plan_threads - 1));
  const int2 before = thread > 0 ? ld_shared<int2>(at(thread - 1)) : neutral;
  syncthreads();
  return before;
}

class Planner {
 public:
  PRIM Planner(const Problem& problem, const DevicePlan& plan, const PlanArrays& arrays, std::int32_t b)
      : problem_(problem),
        plan_(plan),
        arrays_(arrays),
        sequence_(sequence_at(problem, plan, b)),
        rest_(is_rest(plan, sequence_)) {
    const std::int32_t share = (sequence_.k_len + plan_threads - 1) / plan_threads;
    const std::int64_t first = std::int64_t{share} * threadIdx.x;
    first_ = clamp_position(first, sequence_.k_len), last_ = clamp_position(first + share, sequence_.k_len);
  }

  PRIM void run() {
    list_keys();
    if (arrays_.runs) find_images();
    syncthreads();
    if (problem_.is_mmca) order_rows();
    else clip_bands();
    syncthreads();
    join_ranges();
  }

 private:
  PRIM Kind kind(std::int32_t j) const {
    if (rest_) return Kind::hidden;
    if (!problem_.is_mmca) return ld_global(problem_.key_mask + sequence_.k_token + j) ? Kind::text : Kind::hidden;
    const std::int32_t modality = ld_global(problem_.modality + sequence_.k_token + j);
    return modality == 1 ? Kind::text : modality >= 2 ? Kind::image : Kind::hidden;
  }
  PRIM static int2 count(int2 n, Kind kind) { return {n.x + (kind == Kind::text), n.y + (kind == Kind::image)}; }

  PRIM void list_keys() {
    int2 own{0, 0};
    for (std::int32_t j = first_; j < last_; ++j) own = count(own, kind(j));
    const auto sum = [](int2 a, int2 b) { return int2{a.x + b.x, a.y + b.y}; };
    int2 rank = scan_before(own, {0, 0}, false, 0, sizes_, sum);
    for (std::int32_t j = first_; j < last_; ++j) {
      const Kind k = kind(j);
      st_global(arrays_.ranks + sequence_.k_token + j, rank);
      if (k != Kind::hidden)
        st_global(arrays_.positions + sequence_.k_token + (k == Kind::text ? rank.x : sizes_.x + rank.y), j);
      rank = count(rank, k);
    }
    if (threadIdx.x == 0) {
      st_global(arrays_.list_sizes + 2 * std::int64_t{sequence_.index}, sizes_.x);
      st_global(arrays_.list_sizes + 2 * std::int64_t{sequence_.index} + 1, sizes_.y);
    }
  }

  PRIM std::int32_t image_id(std::int32_t j) const {
    return ld_global((problem_.image_id ? problem_.image_id : problem_.modality) + sequence_.k_token + j);
  }
  // Whether key j and the next one are of one image.
  PRIM bool goes_on(std::int32_t j) const {
    return j >= 0 && j + 1 < sequence_.k_len && kind(j) == Kind::image && kind(j + 1) == Kind::image &&
           image_id(j) == image_id(j + 1);
  }

  // An image begins at the last beginning before its key, and ends at the first end after it; both grow with the key.
  PRIM void find_images() {
    constexpr std::int32_t none = 0x7fffffff;
    int2 own{-1, none};
    for (std::int32_t j = first_; j < last_; ++j) {
      if (kind(j) != Kind::image) continue;
      const std::int32_t rank = own_rank(j).y;
      if (!goes_on(j - 1)) own.x = rank;
      if (!goes_on(j) && own.y == none) own.y = rank + 1;
    }
    int2 all;
    const auto largest = [](int2 a, int2 b) { return int2{a.x > b.x ? a.x : b.x, 0}; };
    const auto smallest = [](int2 a, int2 b) { return int2{0, a.y < b.y ? a.y : b.y}; };
    std::int32_t begin = scan_before(own, {-1, none}, false, 0, all, largest).x;
    std::int32_t end = scan_before(own, {-1, none}, true, 0, all, smallest).y;
    for (std::int32_t j = first_; j < last_; ++j) {
      if (kind(j) != Kind::image) continue;
      if (!goes_on(j - 1)) begin = own_rank(j).y;
      st_global(&arrays_.runs[sequence_.k_token + j].x, begin);
    }
    for (std::int32_t j = last_ - 1; j >= first_; --j) {
      if (kind(j) != Kind::image) continue;
      if (!goes_on(j)) end = own_rank(j).y + 1;
      st_global(&arrays_.runs[sequence_.k_token + j].y, end);
    }
  }

  PRIM int2 own_rank(std::int32_t j) const { return ld_global(arrays_.ranks + sequence_.k_token + j); }
  PRIM int2 rank(std::int32_t j) const { return j < sequence_.k_len ? own_rank(j) : sizes_; }

  // MMCA: text rows, image rows, the others; Problem has checked that every row has a position.
  PRIM void order_rows() const {
    const std::int32_t shift = sequence_.k_len - sequence_.q_len;
    const int2 skipped = rank(shift);
    const int2 rows{sizes_.x - skipped.x, sizes_.y - skipped.y};
    for (std::int32_t i = threadIdx.x; i < sequence_.q_len; i += plan_threads) {
      const std::int32_t p = i + shift;
      const Kind k = kind(p);
      const int2 before = own_rank(p);
      const std::int32_t among_hidden = i - (before.x - skipped.x) - (before.y - skipped.y);
      const std::int32_t entry = k == Kind::text    ? before.x - skipped.x
                                 : k == Kind::image ? rows.x + before.y - skipped.y
                                                    : rows.x + rows.y + among_hidden;
      const bool self = k == Kind::image && plan_.self_entries;
      const std::int64_t at = sequence_.q_token + entry;
      st_global(arrays_.rows + at, i);
      st_global(arrays_.ranges + at, seen(p, k, count(before, k), self));
      if (plan_.self_entries) st_global(arrays_.self_entries + at, static_cast<std::uint8_t>(self));
    }
  }

  // What position p of this kind sees; `until`: how many keys of each list lie up to it, itself included.
  PRIM int4 seen(std::int32_t p, Kind k, int2 until, bool self) const {
    if (k == Kind::hidden) return {0, 0, 0, 0};
    if (k == Kind::text || problem_.image_rows == ImageRows::causal) return {0, until.x, 0, until.y};
    if (self) return {0, problem_.image_rows == ImageRows::self_text ? until.x : 0, until.y - 1, until.y};
    const int2 image = ld_global(arrays_.runs + sequence_.k_token + p);
    return {0, 0, image.x, image.y};
  }

  // Ordinary attention: causal and window, in the list of the keys that are not hidden.
  PRIM void clip_bands() const {
    for (std::int32_t i = threadIdx.x; i < sequence_.q_len; i += plan_threads) {
      const Interval all = band(problem_, sequence_, i);
      const int4 range{rank(all.begin).x, rank(all.end).x, 0, 0};
      st_global(arrays_.ranges + sequence_.q_token + i, range);
    }
  }

  PRIM void join_ranges() const {
    for (std::int32_t t = threadIdx.x; t * plan_tile < sequence_.q_len; t += plan_threads) {
      Interval text{0, 0}, image{0, 0};
      for (std::int32_t e = t * plan_tile; e < (t + 1) * plan_tile && e < sequence_.q_len; ++e) {
        const int4 range = ld_global(arrays_.ranges + sequence_.q_token + e);
        text = hull(text, {range.x, range.y}), image = hull(image, {range.z, range.w});
      }
      st_global(arrays_.hulls + hull_index(plan_, sequence_) + t, int4{text.begin, text.end, image.begin, image.end});
    }
  }

  const Problem& problem_;
  const DevicePlan& plan_;
  const PlanArrays& arrays_;
  const Sequence sequence_;
  const bool rest_;
  std::int32_t first_, last_;  // this thread's keys
  int2 sizes_;                 // of the lists
};

__global__ void __launch_bounds__(plan_threads)
    plan_kernel(const __grid_constant__ Problem problem, const __grid_constant__ DevicePlan plan,
                const __grid_constant__ PlanArrays arrays) {
  Planner(problem, plan, arrays, static_cast<std::int32_t>(blockIdx.x)).run();
}

// Offsets that can be trusted: result[i] = the largest of given[1..i], brought into [0, tokens]; after the last,
// tokens.
__global__ void __launch_bounds__(plan_threads)
    offsets_kernel(const std::int64_t* given, std::int32_t count, std::int32_t tokens, std::int32_t* result) {
  const std::int32_t share = (count + plan_threads - 1) / plan_threads;
  const std::int32_t first = clamp_position(std::int64_t{share} * threadIdx.x, count);
  const std::int32_t last = clamp_position(std::int64_t{first} + share, count);
  const auto offset = [&](std::int32_t i) { return i == 0 ? 0 : clamp_position(ld_global(given + i), tokens); };
  int2 own{0, 0}, all;
  for (std::int32_t i = first; i < last; ++i) own.x = own.x > offset(i) ? own.x : offset(i);
  const auto largest = [](int2 a, int2 b) { return int2{a.x > b.x ? a.x : b.x, 0}; };
  std::int32_t so_far = scan_before(own, {0, 0}, false, 0, all, largest).x;
  for (std::int32_t i = first; i < last; ++i) {
    so_far = so_far > offset(i) ? so_far : offset(i);
    st_global(result + i, so_far);
  }
  if (threadIdx.x == 0) st_global(result + count, tokens);
}

constexpr std::size_t scan_bytes = plan_threads * sizeof(int2);

}  // namespace

DevicePlan make_plan(const Problem& problem, Workspace& workspace, prim::stream_t stream, const Device& device) {
  DevicePlan plan;
  const Launch launch{problem, plan, workspace, stream, device};
  const bool packed = problem.q_offsets;
  plan.sequences = static_cast<std::int32_t>(problem.batch + (packed ? 1 : 0));
  if (packed) {
    const auto trusted = [&](const std::int64_t* given, std::int64_t tokens) {
      const auto count = static_cast<std::int32_t>(problem.batch + 1);
      auto* offsets = launch.take<std::int32_t>(count + 1);
      launch(&offsets_kernel, 1, plan_threads, scan_bytes, given, count, static_cast<std::int32_t>(tokens), offsets);
      return offsets;
    };
    plan.q_offsets = trusted(problem.q_offsets, problem.q_len);
    // MMCA's queries are its keys' tokens, whatever a caller lists for them.
    const bool same = problem.is_mmca || problem.k_offsets == problem.q_offsets;
    plan.k_offsets = same ? plan.q_offsets : trusted(problem.k_offsets, problem.k_len);
  }
  if (!problem.is_mmca && !problem.key_mask) return plan;

  const std::int64_t copies = packed ? 1 : problem.batch;
  const std::int64_t q_tokens = copies * problem.q_len, k_tokens = copies * problem.k_len;
  PlanArrays arrays{};
  plan.positions = arrays.positions = launch.take<std::int32_t>(k_tokens);
  plan.list_sizes = arrays.list_sizes = launch.take<std::int32_t>(2 * std::int64_t{plan.sequences});
  plan.ranges = arrays.ranges = launch.take<int4>(q_tokens);
  plan.hulls = arrays.hulls = launch.take<int4>(tile_count(problem, plan, plan_tile, /*of_keys=*/false));
  arrays.ranks = launch.take<int2>(k_tokens);
  if (problem.is_mmca) {
    plan.rows = arrays.rows = launch.take<std::int32_t>(q_tokens);
    if (problem.image_rows == ImageRows::block) arrays.runs = launch.take<int2>(k_tokens);
    if (problem.image_rows == ImageRows::self || problem.image_rows == ImageRows::self_text)
      plan.self_entries = arrays.self_entries = launch.take<std::uint8_t>(q_tokens);
  }
  launch(&plan_kernel, plan.sequences, plan_threads, scan_bytes, problem, plan, arrays);
  return plan;
}

}  // namespace mmca::cuda
