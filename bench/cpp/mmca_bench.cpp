// Multi-modal causal attention: text and images in turn, the sequence of bench/cases.py.
#include "workload.h"

namespace mmca::bench {
namespace {

using test::Choices;

constexpr std::int32_t text = 1, image = 2;

std::vector<std::int32_t> sequence(std::initializer_list<std::pair<std::int32_t, std::size_t>> segments) {
  std::vector<std::int32_t> modality;
  for (const auto& [kind, length] : segments) modality.insert(modality.end(), length, kind);
  return modality;
}

Choices mmca(const std::vector<std::int32_t>& modality, ImageRows image_rows, Merge merge = Merge::sum) {
  const auto length = static_cast<std::int64_t>(modality.size());
  Choices c = attention(1, 8, 2, length, length, 64);
  c.mmca = true, c.modality = modality, c.image_rows = image_rows, c.merge = merge;
  return c;
}

// The same sequence and its two halves behind one another.
Choices packed(const std::vector<std::int32_t>& modality) {
  std::vector<std::int32_t> both = modality;
  both.insert(both.end(), modality.begin(), modality.end());
  Choices c = mmca(both, ImageRows::block);
  const auto whole = static_cast<std::int64_t>(modality.size());
  c.batch = 3, c.q_offsets = c.k_offsets = {0, whole, whole + whole / 2, 2 * whole};
  return c;
}

}  // namespace

Family family() {
  const auto chat = sequence({{text, 64}, {image, 576}, {text, 128}, {image, 576}, {text, 256}});
  const auto brief = sequence({{text, 16}, {image, 64}, {text, 32}});
  return {
      "Mmca",
      {
          {"1600_D64_self", mmca(chat, ImageRows::self), float_types},
          {"1600_D64_block", mmca(chat, ImageRows::block), float_types},
          {"1600_D64_self_text", mmca(chat, ImageRows::self_text)},
          {"1600_D64_causal", mmca(chat, ImageRows::causal)},
          {"1600_D64_block_lse", mmca(chat, ImageRows::block, Merge::lse)},
          {"1600_D64_block_gate", mmca(chat, ImageRows::block, Merge::gate)},
          {"packed_D64_block", packed(chat)},
          {"112_D64_block", mmca(brief, ImageRows::block), {DType::f32}, true, true},
      },
  };
}

}  // namespace mmca::bench
