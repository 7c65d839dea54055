#include "core/plan.h"

#include <algorithm>
#include <type_traits>

namespace mmca {
namespace {

std::int64_t clamp_position(std::int64_t p, std::int64_t k_len) { return std::clamp<std::int64_t>(p, 0, k_len); }

// The key positions p_i + first .. p_i + last (inclusive) that a row may see by order alone.
struct Band {
  bool left_bounded = false, right_bounded = false;
  std::int64_t left = 0, right = 0;

  explicit Band(const Problem& problem) {
    if (problem.window_left >= 0) left_bounded = true, left = problem.window_left;
    if (problem.window_right >= 0) right_bounded = true, right = problem.window_right;
    if (problem.causal) right = right_bounded ? std::min<std::int64_t>(right, 0) : 0, right_bounded = true;
    const std::int64_t reach = problem.q_len + problem.k_len;  // beyond any key, and small enough to add to a position
    left = std::min(left, reach), right = std::min(right, reach);
  }
  std::int64_t begin(std::int64_t p, std::int64_t k_len) const {
    return left_bounded ? clamp_position(p - left, k_len) : 0;
  }
  std::int64_t end(std::int64_t p, std::int64_t k_len) const {
    return right_bounded ? clamp_position(p + right + 1, k_len) : k_len;
  }
};

// rank[j] = how many listed keys lie before position j: turns ranges of positions into ranges of a list.
std::vector<std::int32_t> ranks(const KeyList& keys, std::int64_t k_len) {
  std::vector<std::int32_t> rank(static_cast<std::size_t>(k_len) + 1, 0);
  for (std::int32_t position : keys.positions) rank[static_cast<std::size_t>(position) + 1] = 1;
  for (std::size_t j = 1; j < rank.size(); ++j) rank[j] += rank[j - 1];
  return rank;
}

void add_key(KeyList& keys, std::int64_t position) {
  keys.positions.push_back(static_cast<std::int32_t>(position));
  ++keys.size;
}

// Where a sequence lies in the tensors.
struct Extent {
  std::int64_t q_begin, q_len, k_begin, k_len;
};

SequencePlan empty_plan(const Extent& extent) {
  SequencePlan plan;
  plan.q_begin = extent.q_begin, plan.q_len = extent.q_len, plan.k_begin = extent.k_begin, plan.k_len = extent.k_len;
  return plan;
}

// Ordinary attention: one list (all keys, or the unpadded ones), ranges from the band. `problem` is that of the
// sequence: its lengths.
SequencePlan plan_attention(const Problem& problem, const Extent& extent, const std::uint8_t* key_mask) {
  SequencePlan plan = empty_plan(extent);
  KeyList& keys = plan.keys[0];
  if (key_mask) {
    for (std::int64_t j = 0; j < problem.k_len; ++j) {
      if (key_mask[j]) {
        add_key(keys, j);
      } else {
        plan.hidden_keys.push_back(static_cast<std::int32_t>(j));
      }
    }
  }
  if (!key_mask || keys.size == problem.k_len) {
    keys.positions.clear();
    keys.size = static_cast<std::int32_t>(problem.k_len);
  }
  const bool identity = keys.size == problem.k_len;
  const std::vector<std::int32_t> rank = identity ? std::vector<std::int32_t>{} : ranks(keys, problem.k_len);
  const Band band(problem);
  plan.ranges[0].resize(static_cast<std::size_t>(problem.q_len));
  for (std::int64_t i = 0; i < problem.q_len; ++i) {
    const std::int64_t p = i + problem.row_shift();
    std::int64_t begin = band.begin(p, problem.k_len), end = band.end(p, problem.k_len);
    if (!identity) begin = rank[static_cast<std::size_t>(begin)], end = rank[static_cast<std::size_t>(end)];
    plan.ranges[0][static_cast<std::size_t>(i)] = {static_cast<std::int32_t>(begin), static_cast<std::int32_t>(end)};
  }
  return plan;
}

bool is_text(std::int32_t modality) { return modality == 1; }
bool is_image(std::int32_t modality) { return modality >= 2; }

// MMCA: list 0 holds the text keys, list 1 the image keys. Text rows first, then image rows, then padding, so that
// neighbouring rows see nearly the same keys.
SequencePlan plan_mmca(const Problem& problem, const Extent& extent, const std::int32_t* modality,
                       const std::int32_t* image_id) {
  SequencePlan plan = empty_plan(extent);
  const std::int64_t k_len = problem.k_len;
  for (std::int64_t j = 0; j < k_len; ++j) {
    if (is_text(modality[j])) add_key(plan.keys[0], j);
    else if (is_image(modality[j])) add_key(plan.keys[1], j);
    else plan.hidden_keys.push_back(static_cast<std::int32_t>(j));
  }
  const std::vector<std::int32_t> text_rank = ranks(plan.keys[0], k_len), image_rank = ranks(plan.keys[1], k_len);

  // The run of positions [first, last] of one image, found for every position of it at once.
  const std::int32_t* id = image_id ? image_id : modality;
  std::vector<Range> image(static_cast<std::size_t>(k_len));
  for (std::int64_t j = 0; j < k_len;) {
    std::int64_t next = j + 1;
    while (next < k_len && is_image(modality[j]) && is_image(modality[next]) && id[next] == id[j]) ++next;
    for (std::int64_t x = j; x < next; ++x)
      image[static_cast<std::size_t>(x)] = {static_cast<std::int32_t>(j), static_cast<std::int32_t>(next)};
    j = next;
  }

  const auto rows_of_kind = [&](auto kind) {
    for (std::int64_t i = 0; i < problem.q_len; ++i)
      if (const std::int64_t p = i + problem.row_shift(); p >= 0 && kind(modality[p]))
        plan.rows.push_back(static_cast<std::int32_t>(i));
  };
  for (std::int64_t i = 0; i < std::min(problem.q_len, -problem.row_shift()); ++i)
    plan.rows.push_back(static_cast<std::int32_t>(i));  // rows before the first key see nothing
  rows_of_kind(is_text);
  rows_of_kind(is_image);
  rows_of_kind([](std::int32_t m) { return !is_text(m) && !is_image(m); });

  for (std::int32_t i : plan.rows) {
    const std::int64_t p = i + problem.row_shift();
    Range text, images;
    if (p >= 0) {
      const std::size_t at = static_cast<std::size_t>(p);
      const Range text_prefix{0, text_rank[at + 1]}, image_prefix{0, image_rank[at + 1]};
      if (is_text(modality[p])) {
        text = text_prefix, images = image_prefix;
      } else if (is_image(modality[p])) {
        switch (problem.image_rows) {
          case ImageRows::causal: text = text_prefix, images = image_prefix; break;
          case ImageRows::block:
            images = {image_rank[static_cast<std::size_t>(image[at].begin)],
                      image_rank[static_cast<std::size_t>(image[at].end)]};
            break;
          case ImageRows::self_text: text = text_prefix; [[fallthrough]];
          case ImageRows::self:
            plan.self_rows.resize(static_cast<std::size_t>(problem.q_len), 0);
            plan.self_rows[static_cast<std::size_t>(i)] = 1;
        }
      }
    }
    plan.ranges[0].push_back(text);
    plan.ranges[1].push_back(images);
  }
  return plan;
}

// Rows and keys that belong to no sequence: nobody sees anything.
SequencePlan plan_nothing(const Problem& problem, const Extent& extent) {
  SequencePlan plan = empty_plan(extent);
  for (int g = 0; g < problem.groups(); ++g) plan.ranges[g].resize(static_cast<std::size_t>(extent.q_len));
  for (std::int64_t j = 0; j < extent.k_len; ++j) plan.hidden_keys.push_back(static_cast<std::int32_t>(j));
  return plan;
}

// The plan of one sequence, whose masks and ids start at `at`.
SequencePlan plan_sequence(const Problem& problem, const Extent& extent, std::int64_t at) {
  Problem sequence = problem;
  sequence.q_len = extent.q_len, sequence.k_len = extent.k_len;
  if (problem.is_mmca)
    return plan_mmca(sequence, extent, problem.modality + at, problem.image_id ? problem.image_id + at : nullptr);
  return plan_attention(sequence, extent, problem.key_mask ? problem.key_mask + at : nullptr);
}

template <class Pointer>
Pointer moved(Pointer pointer, std::int64_t bytes) {
  using Byte = std::conditional_t<std::is_const_v<std::remove_pointer_t<Pointer>>, const char*, char*>;
  return pointer ? reinterpret_cast<Pointer>(reinterpret_cast<Byte>(pointer) + bytes) : pointer;
}

}  // namespace

Plan make_plan(const Problem& problem) {
  Plan plan;
  plan.batch = problem.batch;
  const Extent whole{0, problem.q_len, 0, problem.k_len};
  if (problem.q_offsets) {
    const std::int64_t *q = problem.q_offsets, *k = problem.k_offsets;
    for (std::int64_t b = 0; b < problem.batch; ++b)
      plan.sequences.push_back(plan_sequence(problem, {q[b], q[b + 1] - q[b], k[b], k[b + 1] - k[b]}, k[b]));
    const Extent rest{q[problem.batch], problem.q_len - q[problem.batch], k[problem.batch],
                      problem.k_len - k[problem.batch]};
    if (rest.q_len || rest.k_len) plan.sequences.push_back(plan_nothing(problem, rest)), ++plan.batch;
  } else if (problem.is_mmca || problem.key_mask) {
    for (std::int64_t b = 0; b < problem.batch; ++b)
      plan.sequences.push_back(plan_sequence(problem, whole, b * problem.k_len));
  } else {
    plan.sequences.push_back(plan_sequence(problem, whole, 0));
  }
  return plan;
}

Problem Plan::problem_of(const Problem& problem, std::int64_t b) const {
  const SequencePlan& sequence = of(b);
  Problem p = problem;
  p.q_len = sequence.q_len, p.k_len = sequence.k_len;
  const auto move = [&](auto& x, std::int64_t begin, std::int64_t size) {
    x.data = moved(x.data, (b * x.batch + begin * x.row) * size);
  };
  const std::int64_t size = element_size(p.dtype), statistic_size = p.dtype == DType::f64 ? 8 : 4;
  for (Input* x : {&p.query, &p.grad_out}) move(*x, sequence.q_begin, size);
  for (Output* x : {&p.out, &p.grad_query}) move(*x, sequence.q_begin, size);
  for (Input* x : {&p.key, &p.value}) move(*x, sequence.k_begin, size);
  for (Output* x : {&p.grad_key, &p.grad_value}) move(*x, sequence.k_begin, size);
  for (RowStatistic<void*>* x : {&p.lse, &p.lse_low, &p.group_out, &p.grad_gate})
    move(*x, sequence.q_begin, statistic_size);
  for (RowStatistic<const void*>* x : {&p.gate, &p.grad_lse}) move(*x, sequence.q_begin, statistic_size);
  move(p.attn_mask, sequence.q_begin, 1);
  move(p.bias, sequence.q_begin, element_size(p.bias_dtype));
  move(p.grad_bias, sequence.q_begin, statistic_size);
  return p;
}

}  // namespace mmca
