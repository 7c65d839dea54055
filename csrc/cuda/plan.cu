// Makes the lists and ranges of plan.h, one block a sequence. A warp owns a run of neighbouring keys, 32 at a time, and
// goes over it twice: it counts them, hears from the others how many lie before, and writes. Time grows with the
// sequence, whatever the content of modality, key_mask and cu_seqlens.
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

constexpr int plan_warps = plan_threads / 32;
constexpr std::size_t scan_bytes = plan_warps * sizeof(int2);

PRIM int lane() { return static_cast<int>(threadIdx.x) % 32; }
PRIM int warp() { return static_cast<int>(threadIdx.x) / 32; }
PRIM std::uint32_t lanes_below(int n) { return (1u << n) - 1u; }  // n < 32

// What the warps before this one have, or those behind it, and what all have. `own` is the same in all lanes.
template <class Combine>
PRIM int2 scan_warps(int2 own, int2 neutral, bool behind, int2& all, Combine combine) {
  const auto at = [](int w) { return static_cast<smem_t>(w * sizeof(int2)); };
  if (lane() == 0) st_shared(at(warp()), own);
  syncthreads();
  int2 others = neutral;
  all = neutral;
  for (int w = 0; w < plan_warps; ++w) {
    const int2 its = ld_shared<int2>(at(w));
    all = combine(all, its);
    if (behind ? w > warp() : w < warp()) others = combine(others, its);
  }
  syncthreads();
  return others;
}

// A warp's run of `count` things: [first, last).
struct Run {
  std::int32_t first, last;
};
PRIM Run run_of_warp(std::int32_t count) {
  const std::int32_t share = (count + plan_threads - 1) / plan_threads * 32;
  return {clamp_position(std::int64_t{share} * warp(), count),
          clamp_position(std::int64_t{share} * (warp() + 1), count)};
}

class Planner {
 public:
  PRIM Planner(const Problem& problem, const DevicePlan& plan, const PlanArrays& arrays, std::int32_t b)
      : problem_(problem),
        plan_(plan),
        arrays_(arrays),
        sequence_(sequence_at(problem, plan, b)),
        rest_(is_rest(plan, sequence_)),
        keys_(run_of_warp(sequence_.k_len)) {}

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

  // 32 keys from `first` on: the lane's own kind, and who is what.
  struct Kinds {
    Kind own;
    std::uint32_t text, image;

    PRIM int2 count(std::uint32_t among) const { return {count_bits(text & among), count_bits(image & among)}; }
  };
  PRIM Kinds look(std::int32_t first) const {
    const std::int32_t j = first + lane();
    const Kind own = j < keys_.last ? kind(j) : Kind::hidden;
    return {own, ballot(own == Kind::text), ballot(own == Kind::image)};
  }
  PRIM static int2 sum(int2 a, int2 b) { return {a.x + b.x, a.y + b.y}; }

  PRIM void list_keys() {
    int2 own{0, 0};
#pragma unroll 4
    for (std::int32_t first = keys_.first; first < keys_.last; first += 32)
      own = sum(own, look(first).count(all_lanes));
    int2 before = scan_warps(own, {0, 0}, false, sizes_, &sum);
#pragma unroll 4
    for (std::int32_t first = keys_.first; first < keys_.last; first += 32) {
      const Kinds kinds = look(first);
      const int2 rank = sum(before, kinds.count(lanes_below(lane())));
      const std::int32_t j = first + lane();
      if (j < keys_.last) st_global(arrays_.ranks + sequence_.k_token + j, rank);
      if (kinds.own != Kind::hidden)
        st_global(arrays_.positions + sequence_.k_token + (kinds.own == Kind::text ? rank.x : sizes_.x + rank.y), j);
      before = sum(before, kinds.count(all_lanes));
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

  // An image begins at the last beginning up to its key, and ends at the first end from there on; entries of list 1.
  PRIM void find_images() {
    constexpr std::int32_t none = 0x7fffffff;
    int2 own{-1, none};
    for (std::int32_t first = keys_.first; first < keys_.last; first += 32) {
      const Ends ends = find_ends(first);
      const std::int32_t begin = last_rank(ends.begins, ends.rank), end = first_rank(ends.ends, ends.rank) + 1;
      if (ends.begins) own.x = begin;
      if (ends.ends && own.y == none) own.y = end;
    }
    int2 all;
    const auto largest = [](int2 a, int2 b) { return int2{max(a.x, b.x), 0}; };
    const auto smallest = [](int2 a, int2 b) { return int2{0, min(a.y, b.y)}; };
    std::int32_t begin = scan_warps(own, {-1, none}, false, all, largest).x;
    std::int32_t end = scan_warps(own, {-1, none}, true, all, smallest).y;
    const std::uint32_t below = lanes_below(lane()), self = 1u << lane();
    for (std::int32_t first = keys_.first; first < keys_.last; first += 32) {
      const Ends ends = find_ends(first);
      const std::uint32_t so_far = ends.begins & (below | self);
      const std::int32_t found = last_rank(so_far, ends.rank), next = last_rank(ends.begins, ends.rank);
      if (ends.is_image) st_global(&arrays_.runs[sequence_.k_token + first + lane()].x, so_far ? found : begin);
      if (ends.begins) begin = next;
    }
    const std::int32_t steps = (keys_.last - keys_.first + 31) / 32;
    for (std::int32_t step = steps - 1; step >= 0; --step) {
      const std::int32_t first = keys_.first + 32 * step;
      const Ends ends = find_ends(first);
      const std::uint32_t to_come = ends.ends & ~below;
      const std::int32_t found = first_rank(to_come, ends.rank) + 1, next = first_rank(ends.ends, ends.rank) + 1;
      if (ends.is_image) st_global(&arrays_.runs[sequence_.k_token + first + lane()].y, to_come ? found : end);
      if (ends.ends) end = next;
    }
  }

  // Of 32 keys from `first` on: the lane's place in list 1, and at which lanes images begin and end.
  struct Ends {
    bool is_image;
    std::int32_t rank;
    std::uint32_t begins, ends;
  };
  PRIM Ends find_ends(std::int32_t first) const {
    const std::int32_t j = first + lane();
    const bool is_image = j < keys_.last && kind(j) == Kind::image;
    return {is_image, is_image ? own_rank(j).y : 0, ballot(is_image && !goes_on(j - 1)),
            ballot(is_image && !goes_on(j))};
  }
  // The rank of the last or the first of some lanes; of any lane if there are none.
  PRIM static std::int32_t last_rank(std::uint32_t lanes, std::int32_t rank) {
    return shfl(rank, lanes ? 31 - leading_zeros(lanes) : 0);
  }
  PRIM static std::int32_t first_rank(std::uint32_t lanes, std::int32_t rank) {
    return shfl(rank, lanes ? 31 - leading_zeros(lanes & (0u - lanes)) : 0);
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
      const int2 until{before.x + (k == Kind::text), before.y + (k == Kind::image)};
      st_global(arrays_.ranges + at, seen(p, k, until, self));
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

  // A warp takes the entries of a hull, each lane two of them.
  PRIM void join_ranges() const {
    for (std::int32_t t = warp(); t * plan_tile < sequence_.q_len; t += plan_warps) {
      Interval text{0, 0}, image{0, 0};
      for (std::int32_t e = t * plan_tile + lane(); e < (t + 1) * plan_tile && e < sequence_.q_len; e += 32) {
        const int4 range = ld_global(arrays_.ranges + sequence_.q_token + e);
        text = hull(text, {range.x, range.y}), image = hull(image, {range.z, range.w});
      }
#pragma unroll
      for (int step = 1; step < 32; step *= 2) {
        text = hull(text, {shfl_xor(text.begin, step), shfl_xor(text.end, step)});
        image = hull(image, {shfl_xor(image.begin, step), shfl_xor(image.end, step)});
      }
      if (lane() == 0)
        st_global(arrays_.hulls + hull_index(plan_, sequence_) + t, int4{text.begin, text.end, image.begin, image.end});
    }
  }

  const Problem& problem_;
  const DevicePlan& plan_;
  const PlanArrays& arrays_;
  const Sequence sequence_;
  const bool rest_;
  const Run keys_;  // this warp's
  int2 sizes_;      // of the lists
};

__global__ void __launch_bounds__(plan_threads, 1)
    plan_kernel(const __grid_constant__ Problem problem, const __grid_constant__ DevicePlan plan,
                const __grid_constant__ PlanArrays arrays) {
  Planner(problem, plan, arrays, static_cast<std::int32_t>(blockIdx.x)).run();
}

// Offsets that can be trusted: result[i] = the largest of given[1..i], brought into [0, tokens]; after the last,
// tokens.
__global__ void __launch_bounds__(plan_threads, 1)
    offsets_kernel(const std::int64_t* given, std::int32_t count, std::int32_t tokens, std::int32_t* result) {
  const Run run = run_of_warp(count);
  const auto offset = [&](std::int32_t i) {
    return i == 0 || i >= run.last ? 0 : clamp_position(ld_global(given + i), tokens);
  };
  int2 own{0, 0}, all;
  for (std::int32_t first = run.first; first < run.last; first += 32) own.x = max(own.x, offset(first + lane()));
#pragma unroll
  for (int step = 1; step < 32; step *= 2) own.x = max(own.x, shfl_xor(own.x, step));
  const auto largest = [](int2 a, int2 b) { return int2{max(a.x, b.x), 0}; };
  std::int32_t so_far = scan_warps(own, {0, 0}, false, all, largest).x;
  for (std::int32_t first = run.first; first < run.last; first += 32) {
    std::int32_t x = max(so_far, offset(first + lane()));
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const std::int32_t before = shfl(x, lane() >= step ? lane() - step : lane());
      x = max(x, before);
    }
    if (first + lane() < run.last) st_global(result + first + lane(), x);
    so_far = shfl(x, 31);
  }
  if (threadIdx.x == 0) st_global(result + count, tokens);
}

}  // namespace

std::int32_t* trusted_offsets(const DeviceCall& call, const std::int64_t* given, std::int64_t count,
                              std::int64_t tokens) {
  auto* offsets = call.take<std::int32_t>(count + 1);
  call(&offsets_kernel, 1, plan_threads, scan_bytes, given, static_cast<std::int32_t>(count),
       static_cast<std::int32_t>(tokens), offsets);
  return offsets;
}

DevicePlan make_plan(const Problem& problem, const DeviceCall& call) {
  DevicePlan plan;
  const bool packed = problem.q_offsets;
  plan.sequences = static_cast<std::int32_t>(problem.batch + (packed ? 1 : 0));
  if (packed) {
    plan.q_offsets = trusted_offsets(call, problem.q_offsets, problem.batch + 1, problem.q_len);
    // MMCA's queries are its keys' tokens, whatever a caller lists for them.
    const bool same = problem.is_mmca || problem.k_offsets == problem.q_offsets;
    plan.k_offsets = same ? plan.q_offsets : trusted_offsets(call, problem.k_offsets, problem.batch + 1, problem.k_len);
  }
  if (!problem.is_mmca && !problem.key_mask) return plan;

  const std::int64_t copies = packed ? 1 : problem.batch;
  const std::int64_t q_tokens = copies * problem.q_len, k_tokens = copies * problem.k_len;
  PlanArrays arrays{};
  plan.positions = arrays.positions = call.take<std::int32_t>(k_tokens);
  plan.list_sizes = arrays.list_sizes = call.take<std::int32_t>(2 * std::int64_t{plan.sequences});
  plan.ranges = arrays.ranges = call.take<int4>(q_tokens);
  plan.hulls = arrays.hulls = call.take<int4>(tile_count(problem, plan, plan_tile, /*of_keys=*/false));
  arrays.ranks = call.take<int2>(k_tokens);
  if (problem.is_mmca) {
    plan.rows = arrays.rows = call.take<std::int32_t>(q_tokens);
    if (problem.image_rows == ImageRows::block) arrays.runs = call.take<int2>(k_tokens);
    if (problem.image_rows == ImageRows::self || problem.image_rows == ImageRows::self_text)
      plan.self_entries = arrays.self_entries = call.take<std::uint8_t>(q_tokens);
  }
  call(&plan_kernel, plan.sequences, plan_threads, scan_bytes, problem, plan, arrays);
  return plan;
}

}  // namespace mmca::cuda
