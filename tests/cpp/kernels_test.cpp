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
  c.image_rows = any_image_rows(random);
  c.image_id = random.chance(0.4);
  c.merge = random.pick({Merge::sum, Merge::lse});
  c.keep_group_out = random.chance(0.5);
}

void heads(Choices& c, Random& random) {
  c.batch = random.integer(1, 3), c.kv_heads = random.integer(1, 3), c.heads_per_kv = random.integer(1, 5);
}

void few_rows(Choices& c, Random& random) {
  c.heads_per_kv = random.integer(1, 8), c.q_len = random.integer(1, 8 / static_cast<int>(c.heads_per_kv));
}

void softcap(Choices& c, Random& random) { c.softcap = random.pick({0.01, 0.3, 1.0, 3.0, 30.0, 1e30}); }

void gate(Choices& c, Random& random) {
  c.merge = Merge::gate;
  for (bool& same : c.gate_same) same = random.chance(0.25);
  c.grad_gate = random.chance(0.7);
}

void anything_for_bias(Choices& c, Random& random) {
  choose_bias(c, random);
  if (random.chance(0.3)) softcap(c, random);
  if (random.chance(0.4)) causal_or_window(c, random);
  if (random.chance(0.3)) key_masks(c, random);
  if (random.chance(0.3)) c.dropout = 0.3;
}

const Topic topics[] = {
    {"plain", 25, [](Choices&, Random&) {}},
    {"few_rows", 25,
     [](Choices& c, Random& random) {
       few_rows(c, random);
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
       if (random.chance(0.3)) softcap(c, random);
       if (random.chance(0.3)) c.merge = Merge::none;
       else if (random.chance(0.3)) gate(c, random);
     }},
    {"mmca_long", 4,
     [](Choices& c, Random& random) {
       mmca(c, random);
       c.k_len = random.integer(500, 900), c.q_len = random.integer(100, 300);
       c.head_dim = random.integer(1, 9), c.value_dim = random.integer(1, 9);
     }},
    {"softcap", 25,
     [](Choices& c, Random& random) {
       if (random.chance(0.4)) mmca(c, random), c.merge = any_merge(random);
       else if (random.chance(0.3)) few_rows(c, random);
       softcap(c, random);
       if (!c.mmca && random.chance(0.4)) key_masks(c, random);
       if (random.chance(0.2)) c.dropout = 0.3;
     }},
    {"bias", 30,
     [](Choices& c, Random& random) {
       if (random.chance(0.3)) few_rows(c, random);
       else heads(c, random);
       anything_for_bias(c, random);
     }},
    {"bias_gradient", 25,
     [](Choices& c, Random& random) {
       heads(c, random);
       c.q_len = random.integer(1, 25);
       anything_for_bias(c, random);
       c.grad_bias = true;
     }},
    {"bias_gradient_long", 4,  // several ranges of keys
     [](Choices& c, Random& random) {
       c.batch = 2, c.kv_heads = 2, c.heads_per_kv = random.integer(1, 2);
       c.q_len = random.integer(20, 60), c.k_len = random.integer(400, 1200);
       c.head_dim = random.integer(1, 9), c.value_dim = random.integer(1, 9);
       anything_for_bias(c, random);
       c.bias_hidden = random.pick({0.0, 0.1});
       c.grad_bias = true;
     }},
    {"gate", 25,
     [](Choices& c, Random& random) {
       mmca(c, random), gate(c, random);
       c.grad_gate = true;
       if (random.chance(0.5)) heads(c, random);
       if (random.chance(0.3)) strides(c, random);
       if (random.chance(0.3)) c.dropout = 0.3;
     }},
    {"none", 25,
     [](Choices& c, Random& random) {
       mmca(c, random);
       c.merge = Merge::none;
       if (random.chance(0.5)) heads(c, random);
       if (random.chance(0.5)) strides(c, random);
       if (random.chance(0.3)) c.dropout = 0.3;
     }},
    {"packed", 25,
     [](Choices& c, Random& random) {
       heads(c, random);
       choose_packed(c, random, 40, false);
       if (random.chance(0.5)) causal_or_window(c, random);
       if (random.chance(0.3)) c.pad = 0.3;
       if (random.chance(0.3)) c.dropout = 0.3;
       if (random.chance(0.2)) softcap(c, random);
       if (random.chance(0.3)) strides(c, random);
     }},
    {"packed_mmca", 25,
     [](Choices& c, Random& random) {
       mmca(c, random);
       c.kv_heads = random.integer(1, 2), c.heads_per_kv = random.integer(1, 3);
       choose_packed(c, random, 40, random.chance(0.8));
       c.merge = any_merge(random);
       if (c.merge == Merge::gate) gate(c, random);
       if (random.chance(0.3)) c.dropout = 0.3;
       if (random.chance(0.2)) softcap(c, random);
     }},
    {"packed_long", 2,
     [](Choices& c, Random& random) {
       do choose_packed(c, random, 500, false);
       while (c.k_len < 500 || c.q_len < 100);
       c.head_dim = random.integer(1, 9), c.value_dim = random.integer(1, 9);
       if (random.chance(0.5)) causal_or_window(c, random);
     }},
    {"empty", 16,
     [](Choices& c, Random& random) {
       if (random.chance(0.3)) mmca(c, random), c.merge = any_merge(random);
       else if (random.chance(0.3)) choose_bias(c, random), c.grad_bias = true;
       if (random.chance(0.3)) softcap(c, random);
       heads(c, random);
       c.grad_gate = true;
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
  // Types of 16 bits run float's code: storage is all there is to see.
  const int problems = element_size(kernel.dtype) == 2 ? (topic.problems + 1) / 2 : topic.problems;
  double worst = 0;
  for (int problem = 0; problem < problems && !HasFailure(); ++problem) {
    Random random(1000 * static_cast<std::uint64_t>(&topic - topics) + static_cast<std::uint64_t>(problem));
    Choices c;
    c.seed = random.bits();
    c.batch = random.integer(1, 2), c.q_len = random.integer(1, 40), c.k_len = random.integer(1, 70);
    c.head_dim = random.integer(1, 40), c.value_dim = random.integer(1, 40);
    c.scale = random.pick({1.0, 0.3, -0.2, 1 / std::sqrt(static_cast<double>(c.head_dim))});
    c.grad_lse = random.chance(0.5), c.lse_low = random.chance(0.5);
    topic.choose(c, random);
    const std::size_t scratch = c.q_len * c.k_len > 20000                ? std::size_t{48} << 20
                                : std::max(c.head_dim, c.value_dim) > 64 ? std::size_t{8} << 20
                                                                         : small_scratch;
    with_type(kernel, [&](auto type) { worst = std::max(worst, check<decltype(type)>(kernel, c, scratch)); });
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
