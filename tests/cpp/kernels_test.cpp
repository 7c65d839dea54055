// Every kernel of the table against the naive reference, on random problems of each topic.
#include <tuple>

#include "kernel_cases.h"

namespace mmca::test {
namespace {

struct Topic {
  const char* name;
  int problems;
  void (*choose)(Choices&, Random&);
};

void causal_or_window(Choices& c, Random& random) {
  c.causal = random.chance(0.5);
  if (random.chance(0.6)) c.window_left = random.integer(0, 40);
  if (random.chance(0.6)) c.window_right = random.integer(0, 40);
}

void key_masks(Choices& c, Random& random) {
  if (random.chance(0.8)) c.attend = random.pick({0.0, 0.03, 0.5, 0.9, 1.0});
  if (random.chance(0.7)) c.pad = random.pick({0.0, 0.1, 0.6, 1.0});
}

Layout any_layout(Random& random) {
  Layout layout;
  layout.heads_inside_rows = random.chance(0.5);
  layout.feature_step = random.pick({1, 1, 2, 3});
  layout.gap = random.pick({0, 1, 5});
  layout.skip = random.integer(0, 7);
  return layout;
}

void strides(Choices& c, Random& random) {
  for (Layout* layout :
       {&c.query_layout, &c.key_layout, &c.value_layout, &c.out_layout, &c.grad_layout, &c.mask_layout})
    *layout = any_layout(random);
  for (Layout* layout : {&c.query_layout, &c.key_layout, &c.value_layout, &c.grad_layout, &c.mask_layout}) {
    layout->same_batch = random.chance(0.2);
    layout->same_all = random.chance(0.1);
  }
}

void mmca(Choices& c, Random& random) {
  c.mmca = true;
  c.k_len = random.integer(1, 80);
  c.q_len = random.chance(0.5) ? c.k_len : random.integer(1, random.chance(0.2) ? 90 : static_cast<int>(c.k_len));
  c.image_rows = random.pick({ImageRows::self, ImageRows::block, ImageRows::causal, ImageRows::self_text});
  c.image_id = random.chance(0.4);
  c.merge = random.pick({Merge::sum, Merge::lse});
}

void heads(Choices& c, Random& random) {
  c.batch = random.integer(1, 3), c.kv_heads = random.integer(1, 3), c.heads_per_kv = random.integer(1, 5);
}

const Topic topics[] = {
    {"plain", 25, [](Choices&, Random&) {}},
    {"few_rows", 25,
     [](Choices& c, Random& random) {
       c.heads_per_kv = random.integer(1, 8), c.q_len = random.integer(1, 8 / static_cast<int>(c.heads_per_kv));
       c.k_len = random.integer(1, 600), c.head_dim = random.integer(1, 130), c.value_dim = random.integer(1, 256);
       if (random.chance(0.5)) causal_or_window(c, random);
       if (random.chance(0.5)) key_masks(c, random);
       if (random.chance(0.3)) c.dropout = 0.3;
     }},
    {"grouped_heads", 20, heads},
    {"masks", 30, key_masks},
    {"odd_scales", 20,
     [](Choices& c, Random& random) {
       c.scale =
           random.pick({0.0, 1e-42, 1e-38, -1e-20, 1e-310, 1.0 / 3});  // subnormal numbers of float and double, too
       c.causal = true;
       if (random.chance(0.5)) c.attend = 0.5;
       if (c.attend < 0 && random.chance(0.5)) c.mmca = true, c.image_rows = ImageRows::causal;
     }},
    {"band", 40,
     [](Choices& c, Random& random) {
       causal_or_window(c, random);
       if (random.chance(0.3)) c.q_len = random.integer(1, 100);
       if (random.chance(0.3)) key_masks(c, random);
     }},
    {"dropout", 25,
     [](Choices& c, Random& random) {
       c.dropout = random.pick({0.1, 0.5, 0.9, 1.0});
       c.k_len = random.integer(1, 300);
       if (random.chance(0.5)) key_masks(c, random);
       if (random.chance(0.5)) heads(c, random);
       if (random.chance(0.5)) causal_or_window(c, random);
     }},
    {"strides", 30,
     [](Choices& c, Random& random) {
       heads(c, random), strides(c, random);
       if (random.chance(0.5)) key_masks(c, random);
     }},
    {"head_dims", 24,
     [](Choices& c, Random& random) {
       const int sizes[] = {1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 96, 127, 128, 129, 192, 255, 256};
       c.head_dim = random.pick(sizes), c.value_dim = random.pick(sizes);
       c.q_len = random.integer(1, 20), c.k_len = random.integer(1, 40);
     }},
    {"long", 4,
     [](Choices& c, Random& random) {
       c.q_len = random.integer(97, 300), c.k_len = random.integer(257, 900);
       c.head_dim = random.integer(1, 9), c.value_dim = random.integer(1, 9);
       if (random.chance(0.7)) causal_or_window(c, random);
       if (random.chance(0.4)) c.window_left = 300;
       if (random.chance(0.3)) c.pad = 0.1;
       if (random.chance(0.3)) c.dropout = 0.2;
       if (random.chance(0.2)) c.attend = 0.05;
     }},
    {"mmca", 40, mmca},
    {"mmca_everything", 30,
     [](Choices& c, Random& random) {
       heads(c, random), mmca(c, random);
       c.q_len = std::min<std::int64_t>(c.q_len, 40);
       if (random.chance(0.5)) c.dropout = random.pick({0.2, 0.7, 1.0});
       if (random.chance(0.5)) strides(c, random);
     }},
    {"mmca_long", 4,
     [](Choices& c, Random& random) {
       mmca(c, random);
       c.k_len = random.integer(500, 900), c.q_len = random.integer(100, 300);
       c.head_dim = random.integer(1, 9), c.value_dim = random.integer(1, 9);
     }},
    {"empty", 12,
     [](Choices& c, Random& random) {
       if (random.chance(0.3)) mmca(c, random);
       heads(c, random);
       const int which = random.integer(0, 2);
       (which == 0 ? c.batch : which == 1 ? c.q_len : c.k_len) = 0;
       if (random.chance(0.3)) c.k_len = c.q_len = 0;
     }},
};

class Kernels : public testing::TestWithParam<std::tuple<const Kernel*, const Topic*>> {};

TEST_P(Kernels, MatchReference) {
  const Kernel& kernel = *std::get<0>(GetParam());
  const Topic& topic = *std::get<1>(GetParam());
  MMCA_SKIP_REFUSED(kernel);
  double worst = 0;
  for (int problem = 0; problem < topic.problems && !HasFailure(); ++problem) {
    Random random(1000 * static_cast<std::uint64_t>(&topic - topics) + static_cast<std::uint64_t>(problem));
    Choices c;
    c.seed = random.bits();
    c.batch = random.integer(1, 2), c.q_len = random.integer(1, 40), c.k_len = random.integer(1, 70);
    c.head_dim = random.integer(1, 40), c.value_dim = random.integer(1, 40);
    c.scale = random.pick({1.0, 0.3, -0.2, 1 / std::sqrt(static_cast<double>(c.head_dim))});
    c.grad_lse = random.chance(0.5), c.lse_low = random.chance(0.5);
    topic.choose(c, random);
    const bool big = c.q_len * c.k_len > 20000;
    with_type(kernel, [&](auto type) {
      worst = std::max(worst, check<decltype(type)>(kernel, c, std::size_t{big ? 48u : 4u} << 20));
    });
  }
  RecordProperty("largest_error_in_bounds", std::to_string(worst));
  EXPECT_TRUE(worst > 0 || topic.name == std::string("empty")) << "no error at all: nothing was compared";
}

std::vector<const Topic*> all_topics() {
  std::vector<const Topic*> all;
  for (const Topic& topic : topics) all.push_back(&topic);
  return all;
}

INSTANTIATE_TEST_SUITE_P(, Kernels, testing::Combine(testing::ValuesIn(all_kernels()), testing::ValuesIn(all_topics())),
                         [](const auto& info) {
                           return identifier(*std::get<0>(info.param)) + "__" + std::get<1>(info.param)->name;
                         });

}  // namespace
}  // namespace mmca::test
