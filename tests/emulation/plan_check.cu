// The device's plan against core/plan.h on random problems: tests/test_emulated_plan.py.
#include <map>
#include <set>
#include <sstream>
#include <vector>

#include "../cpp/case.h"
#include "core/plan.h"
#include "cuda/launch.h"
#include "cuda/rows.cuh"
#include "emulator.h"

namespace mmca::cuda {
namespace {

// What a kernel sees of the plan, an entry and a key at a time.
struct EntryView {
  std::int32_t seen, row, self;
  Interval range[2], hull[2];
};
struct KeyView {
  std::int32_t seen, position;
};
struct Views {
  EntryView* entries;  // [query token]
  KeyView* keys;       // [group][key token]: entries of the lists
};

constexpr int view_threads = 64;

__global__ void view_kernel(const Problem problem, const DevicePlan plan, const Views views, std::int64_t q_tiles,
                            std::int64_t k_tiles, std::int64_t k_tokens) {
  const bool of_keys = blockIdx.x >= q_tiles;
  const std::int64_t index = of_keys ? blockIdx.x - q_tiles : blockIdx.x;
  const Tile tile = tile_of(problem, plan, of_keys ? index % k_tiles : index, view_threads, of_keys);
  const auto thread = static_cast<std::int32_t>(threadIdx.x);
  if (thread >= tile.count) return;
  const Sequence& s = tile.sequence;
  const std::int32_t at = tile.first + thread;
  if (of_keys) {
    const int group = static_cast<int>(index / k_tiles);
    if (at < list_size(plan, s, group))
      prim::st_global(views.keys + group * k_tokens + s.k_token + at,
                      KeyView{1, position_at(list_positions(plan, s, group), at)});
    return;
  }
  EntryView view{1, row_of(plan, s, at), is_self_entry(plan, s, at), {}, {}};
  for (int g = 0; g < 2; ++g) {
    view.range[g] = entry_range(problem, plan, s, at, g);
    view.hull[g] = entries_hull(problem, plan, s, tile.first, tile.count, g);
  }
  prim::st_global(views.entries + s.q_token + at, view);
}

// Memory of the emulated device, full of bytes that are no sensible number.
class Memory final : public Workspace {
 public:
  ~Memory() {
    for (auto& block : blocks_) emulation_unregister(block.data());
  }
  void* take(std::int64_t bytes) override { return add(bytes, 2, "workspace"); }
  template <class T>
  T* zeros(std::int64_t count, const char* name) {
    T* p = static_cast<T*>(add(count * static_cast<std::int64_t>(sizeof(T)), 1, name));
    std::fill_n(reinterpret_cast<unsigned char*>(blocks_.back().data()), blocks_.back().size(), 0);
    return p;
  }
  template <class T>
  const T* given(const T* data, std::int64_t count, const char* name) {
    if (!data) return nullptr;
    void* p = add(count * static_cast<std::int64_t>(sizeof(T)), 0, name);
    std::copy_n(data, count, reinterpret_cast<T*>(blocks_.back().data()));
    return static_cast<const T*>(p);
  }
  template <class T>
  const T* contents(std::size_t block) const {
    return reinterpret_cast<const T*>(blocks_[block].data());
  }
  std::size_t size() const { return blocks_.size(); }

 private:
  void* add(std::int64_t bytes, int access, const char* name) {
    blocks_.emplace_back(static_cast<std::size_t>(std::max<std::int64_t>(bytes, 1)), 0xee);
    return emulation_register(blocks_.back().data(), blocks_.back().size(), access, name);
  }
  std::vector<std::vector<unsigned char>> blocks_;
};

test::Choices random_choices(test::Random& random) {
  test::Choices c;
  c.seed = random.bits();
  c.mmca = random.chance(0.6);
  if (random.chance(0.4)) {
    choose_packed(c, random, random.pick({5, 40, 200}), c.mmca);
    if (c.mmca) c.k_len = c.q_len;
  } else {
    c.batch = random.integer(0, 3);
    c.q_len = random.integer(0, random.pick({5, 80, 700})), c.k_len = random.integer(0, random.pick({5, 80, 1500}));
    if (c.mmca) c.k_len = std::max(c.k_len, c.q_len);
  }
  if (c.mmca) {
    c.image_rows = random.pick({ImageRows::self, ImageRows::block, ImageRows::causal, ImageRows::self_text});
    c.merge = Merge::lse;
    c.image_id = random.chance(0.5);
  } else {
    c.causal = random.chance(0.5);
    if (random.chance(0.4)) c.window_left = random.integer(0, 90);
    if (random.chance(0.4)) c.window_right = random.integer(0, 90);
    if (c.q_offsets.empty() && random.chance(0.5)) c.pad = random.pick({0.0, 0.2, 0.8, 1.0});
  }
  return c;
}

template <class Text>
void expect(bool condition, const Text& text) {
  if (!condition) throw std::runtime_error(text());
}

// The problem's plan as kernels see it.
struct View {
  Memory memory;
  std::int64_t q_tokens, k_tokens;
  const EntryView* entries;
  const KeyView* keys;

  explicit View(Problem problem) {
    const std::int64_t copies = problem.q_offsets ? 1 : problem.batch;
    q_tokens = copies * problem.q_len, k_tokens = copies * problem.k_len;
    problem.key_mask = memory.given(problem.key_mask, k_tokens, "key_mask");
    problem.modality = memory.given(problem.modality, k_tokens, "modality");
    problem.image_id = memory.given(problem.image_id, k_tokens, "image_id");
    problem.q_offsets = memory.given(problem.q_offsets, problem.batch + 1, "q_offsets");
    problem.k_offsets = memory.given(problem.k_offsets, problem.batch + 1, "k_offsets");
    const DeviceCall call{memory, nullptr, {90, 4}};
    const DevicePlan plan = make_plan(problem, call);
    Views views;
    const std::size_t first = memory.size();
    views.entries = memory.zeros<EntryView>(q_tokens, "entries");
    views.keys = memory.zeros<KeyView>(2 * k_tokens, "keys");
    const std::int64_t q_tiles = tile_count(problem, plan, view_threads, false);
    const std::int64_t k_tiles = tile_count(problem, plan, view_threads, true);
    call(&view_kernel, q_tiles + 2 * k_tiles, view_threads, 0, problem, plan, views, q_tiles, k_tiles, k_tokens);
    entries = memory.contents<EntryView>(first);
    keys = memory.contents<KeyView>(first + 1);
  }
};

void compare(const test::Choices& choices) {
  const test::Case<float> made(choices);
  const Problem& problem = made.problem;
  const mmca::Plan expected = mmca::make_plan(problem);
  const View device(problem);
  const auto [q_tokens, k_tokens] = std::pair{device.q_tokens, device.k_tokens};
  const EntryView* entries = device.entries;
  const KeyView* keys = device.keys;
  for (std::int64_t b = 0; b < expected.batch; ++b) {
    const SequencePlan& s = expected.of(b);
    const bool packed = problem.q_offsets;
    const std::int64_t q_token = packed ? s.q_begin : b * problem.q_len;
    const std::int64_t k_token = packed ? s.k_begin : b * problem.k_len;
    const auto where = [&](const char* what, std::int64_t at) {
      return [=] { return std::string(what) + " " + std::to_string(at) + " of sequence " + std::to_string(b); };
    };
    for (int g = 0; g < 2; ++g)
      for (std::int32_t c = 0; c < s.k_len; ++c) {
        const KeyView& view = keys[g * k_tokens + k_token + c];
        expect(view.seen == (c < s.keys[g].size), where("length of list at key", c));
        expect(!view.seen || view.position == s.keys[g].position(c), where("position of key", c));
      }
    for (std::int64_t i = 0; i < s.q_len; ++i) {
      const EntryView& view = entries[q_token + i];
      expect(view.seen, where("tile of entry", i));
      expect(view.row == s.row(i), where("row of entry", i));
      const bool self = s.attends_to_itself(view.row);
      expect((view.self != 0) == self, where("self row", i));
      for (int g = 0; g < 2; ++g) {
        Range range = s.ranges[g].empty() ? Range{} : s.ranges[g][static_cast<std::size_t>(i)];
        const Interval seen = view.range[g];
        if (g == 1 && self) {  // here a range of one key, itself
          const std::int64_t p = view.row + s.k_len - s.q_len;
          expect(seen.end == seen.begin + 1 && s.keys[1].position(seen.begin) == p, where("self range", i));
        } else {
          expect(range.size() == std::max(0, seen.end - seen.begin), where("size of range", i));
          expect(range.size() == 0 || range.begin == seen.begin, where("begin of range", i));
        }
        expect(seen.begin >= seen.end || (view.hull[g].begin <= seen.begin && view.hull[g].end >= seen.end),
               where("hull of entry", i));
      }
    }
  }
}

// Whatever cu_seqlens and modality hold, every row is some tile's, and no range leaves its list. The emulation sees to
// it that nothing outside the arrays is touched.
void survive(const test::Choices& choices) {
  const test::Case<float> made(choices);
  test::Random random(choices.seed);
  Problem problem = made.problem;
  const auto nonsense = [&] {
    return random.chance(0.2) ? static_cast<std::int64_t>(random.bits())
                              : random.integer(-50, static_cast<int>(problem.q_len) + 50);
  };
  std::vector<std::int64_t> q_offsets, k_offsets;
  for (std::int64_t b = 0; b <= problem.batch; ++b) q_offsets.push_back(nonsense()), k_offsets.push_back(nonsense());
  if (problem.q_offsets) problem.q_offsets = q_offsets.data(), problem.k_offsets = k_offsets.data();
  std::vector<std::int32_t> modality, image_id;
  const std::int64_t tokens = (problem.q_offsets ? 1 : problem.batch) * problem.k_len;
  for (std::int64_t j = 0; j < tokens; ++j)
    modality.push_back(static_cast<std::int32_t>(nonsense())),
        image_id.push_back(static_cast<std::int32_t>(nonsense()));
  if (problem.is_mmca) problem.modality = modality.data();
  if (problem.image_id) problem.image_id = image_id.data();
  const View device(problem);
  for (std::int64_t i = 0; i < device.q_tokens; ++i) {
    const EntryView& view = device.entries[i];
    const auto where = [=] { return "entry " + std::to_string(i); };
    expect(view.seen && view.row >= 0 && view.row < problem.q_len, where);
    for (const Interval& seen : view.range)
      expect(seen.begin >= seen.end || (seen.begin >= 0 && seen.end <= problem.k_len), where);
  }
}

}  // namespace
}  // namespace mmca::cuda

// Checks `count` random problems from `seed` on, with nonsense in their index tensors or without; null, or what is
// wrong (valid until the next call).
extern "C" const char* plan_check(std::uint64_t seed, int count, bool nonsense) {
  static std::string text;
  for (int i = 0; i < count; ++i) {
    mmca::test::Random random(seed + static_cast<std::uint64_t>(i));
    const mmca::test::Choices choices = mmca::cuda::random_choices(random);
    try {
      nonsense ? mmca::cuda::survive(choices) : mmca::cuda::compare(choices);
    } catch (const std::exception& error) {
      std::ostringstream out;
      out << "seed " << seed + static_cast<std::uint64_t>(i) << ": " << choices.text() << ": " << error.what();
      text = out.str();
      return text.c_str();
    }
  }
  return nullptr;
}
