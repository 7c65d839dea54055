// One attention problem with all its operands, made from a few choices and a seed.
#pragma once

#include <algorithm>
#include <cstdio>
#include <string>
#include <vector>

#include "core/problem.h"
#include "tensor.h"

namespace mmca::test {

struct Choices {
  std::int64_t batch = 1, kv_heads = 1, heads_per_kv = 1, q_len = 1, k_len = 1, head_dim = 1, value_dim = 1;
  double scale = 1;
  bool causal = false;
  std::int64_t window_left = -1, window_right = -1;
  double attend = -1, pad = -1;  // density of attn_mask and of hidden keys in key_mask; negative: no such mask
  Layout mask_layout;
  bool mmca = false, image_id = false;
  ImageRows image_rows = ImageRows::self;
  Merge merge = Merge::sum;
  double dropout = 0;
  bool grad_lse = false, lse_low = false;
  Layout query_layout, key_layout, value_layout, out_layout, grad_layout;
  std::uint64_t seed = 0;

  std::string text() const {
    char buffer[400];
    std::snprintf(buffer, sizeof buffer,
                  "batch %d kv_heads %d heads_per_kv %d q_len %d k_len %d head_dim %d value_dim %d scale %g causal %d "
                  "window %d %d "
                  "attend %g pad %g mmca %d image_id %d image_rows %d merge %d dropout %g grad_lse %d seed %llu",
                  int(batch), int(kv_heads), int(heads_per_kv), int(q_len), int(k_len), int(head_dim), int(value_dim),
                  scale, causal, int(window_left), int(window_right), attend, pad, mmca, image_id, int(image_rows),
                  int(merge), dropout, grad_lse, static_cast<unsigned long long>(seed));
    return buffer;
  }
};

// Runs of padding, text and images of a few ids, as an interleaved sequence has them.
inline std::vector<std::int32_t> random_modality(Random& random, std::int64_t count) {
  std::vector<std::int32_t> modality;
  while (static_cast<std::int64_t>(modality.size()) < count) {
    const int kind = random.pick({0, 1, 1, 1, 2, 2, 3}), run = random.integer(1, random.chance(0.2) ? 40 : 7);
    modality.insert(modality.end(), static_cast<std::size_t>(run), kind);
  }
  modality.resize(static_cast<std::size_t>(count));
  return modality;
}

template <class T>
struct Case {
  Problem problem;
  Tensor<T> query, key, value, out, lse, lse_low, group_out, grad_out, grad_lse, grad_query, grad_key, grad_value;
  Tensor<std::uint8_t> attn_mask;
  std::vector<std::uint8_t> key_mask;
  std::vector<std::int32_t> modality, image_id;

  explicit Case(const Choices& c) {
    const std::int64_t q_heads = c.kv_heads * c.heads_per_kv, groups = c.mmca ? 2 : 1;
    query = Tensor<T>(c.batch, q_heads, c.q_len, c.head_dim, c.query_layout);
    key = Tensor<T>(c.batch, c.kv_heads, c.k_len, c.head_dim, c.key_layout);
    value = Tensor<T>(c.batch, c.kv_heads, c.k_len, c.value_dim, c.value_layout);
    out = Tensor<T>(c.batch, q_heads, c.q_len, c.value_dim, c.out_layout);
    lse = Tensor<T>(groups, c.batch, q_heads, c.q_len, c.out_layout);
    if (c.lse_low) lse_low = Tensor<T>(groups, c.batch, q_heads, c.q_len);
    group_out = Tensor<T>(groups * c.batch, q_heads, c.q_len, c.value_dim);
    grad_out = Tensor<T>(c.batch, q_heads, c.q_len, c.value_dim, c.grad_layout);
    Layout output = c.out_layout;
    grad_query = Tensor<T>(c.batch, q_heads, c.q_len, c.head_dim, output);
    output.heads_inside_rows = !output.heads_inside_rows;
    grad_key = Tensor<T>(c.batch, c.kv_heads, c.k_len, c.head_dim, output);
    grad_value = Tensor<T>(c.batch, c.kv_heads, c.k_len, c.value_dim, c.out_layout);

    Random random(c.seed);
    for (Tensor<T>* x : {&query, &key, &value, &grad_out})
      x->each([&](T& element, auto...) { element = static_cast<T>(random.between(-1.5, 1.5)); });

    Problem& p = problem;
    p.dtype = sizeof(T) == 4 ? DType::f32 : DType::f64;
    p.batch = c.batch, p.q_heads = q_heads, p.kv_heads = c.kv_heads, p.q_len = c.q_len, p.k_len = c.k_len;
    p.head_dim = c.head_dim, p.value_dim = c.value_dim, p.scale = c.scale;
    p.causal = c.causal, p.window_left = c.window_left, p.window_right = c.window_right;
    p.image_rows = c.image_rows, p.merge = c.merge;
    if (c.attend >= 0) {
      attn_mask = Tensor<std::uint8_t>(c.batch, q_heads, c.q_len, c.k_len, c.mask_layout);
      attn_mask.each([&](std::uint8_t& x, auto...) { x = random.chance(c.attend) ? random.pick({1, 1, 255}) : 0; });
      p.attn_mask = attn_mask.template strided<const std::uint8_t*>();
    }
    if (c.pad >= 0) {
      for (std::int64_t i = 0; i < c.batch * c.k_len; ++i) key_mask.push_back(!random.chance(c.pad));
      p.key_mask = key_mask.data();
    }
    if (c.mmca) {
      for (std::int64_t b = 0; b < c.batch; ++b) {
        const auto sequence = random_modality(random, c.k_len);
        modality.insert(modality.end(), sequence.begin(), sequence.end());
      }
      p.is_mmca = true;
      p.modality = modality.data();
      if (c.image_id) {
        for (std::size_t i = 0; i < modality.size(); ++i)
          image_id.push_back(i && random.chance(0.8) ? image_id.back() : random.integer(-2, 3));
        p.image_id = image_id.data();
      }
      p.group_out = group_out.data();
    }
    if (c.dropout > 0) {
      p.dropout.threshold = static_cast<std::uint32_t>(std::lround(65536 * c.dropout));
      p.dropout.seed = random.bits();
      p.dropout.offset = static_cast<std::uint32_t>(random.bits());
    }
    p.query = query.template strided<const void*>();
    p.key = key.template strided<const void*>();
    p.value = value.template strided<const void*>();
    p.out = out.template strided<void*>();
    p.lse = lse.template statistic<void*>();
    if (c.lse_low) p.lse_low = lse_low.template statistic<void*>();
    p.grad_out = grad_out.template strided<const void*>();
    if (c.grad_lse) {
      grad_lse = Tensor<T>(groups, c.batch, q_heads, c.q_len, c.grad_layout);
      grad_lse.each([&](T& element, auto...) { element = static_cast<T>(random.between(-1.5, 1.5)); });
      p.grad_lse = grad_lse.template statistic<const void*>();
    }
    p.grad_query = grad_query.template strided<void*>();
    p.grad_key = grad_key.template strided<void*>();
    p.grad_value = grad_value.template strided<void*>();
  }
  Case(const Case&) = delete;  // `problem` points into the members
  Case& operator=(const Case&) = delete;
};

}  // namespace mmca::test
