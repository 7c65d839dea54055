// One attention problem with all its operands, made from choices.h.
#pragma once

#include <variant>
#include <vector>

#include "choices.h"
#include "core/problem.h"
#include "tensor.h"

namespace mmca::test {

template <class T>
struct Case {
  using A = Accumulation<T>;
  using AnyTensor = std::variant<Tensor<float>, Tensor<double>, Tensor<BFloat16>, Tensor<Float16>>;

  Problem problem;
  std::int64_t batch;  // of the tensors: 1 where sequences are packed
  Tensor<T> query, key, value, out, grad_out, grad_query, grad_key, grad_value;
  Tensor<A> lse, lse_low, group_out, grad_lse, gate, grad_gate, grad_bias;
  Tensor<std::uint8_t> attn_mask;
  AnyTensor bias;
  std::vector<std::uint8_t> key_mask;
  std::vector<std::int32_t> modality, image_id;
  std::vector<std::int64_t> q_offsets, k_offsets;

  explicit Case(const Choices& c) : batch(c.q_offsets.empty() ? c.batch : 1) {
    Random random(c.seed);
    set_sizes(c);
    set_operands(c, random);
    set_masks(c, random);
    if (c.bias) set_bias(c, random);
    if (c.mmca) set_modality(c, random);
    set_results(c);
    set_gradients(c, random);
    if (!c.q_offsets.empty()) set_offsets(c);
  }
  Case(const Case&) = delete;  // `problem` points into the members
  Case& operator=(const Case&) = delete;

 private:
  void set_sizes(const Choices& c) {
    Problem& p = problem;
    p.dtype = dtype_of<T>;
    p.batch = c.batch, p.q_heads = c.kv_heads * c.heads_per_kv, p.kv_heads = c.kv_heads;
    p.q_len = c.q_len, p.k_len = c.k_len, p.head_dim = c.head_dim, p.value_dim = c.value_dim;
    p.scale = c.scale, p.softcap = c.softcap;
    p.causal = c.causal, p.window_left = c.window_left, p.window_right = c.window_right;
    p.is_mmca = c.mmca, p.image_rows = c.image_rows, p.merge = c.merge;
  }

  template <class X>
  static void randomize(Tensor<X>& x, Random& random, double size = 1.5) {
    x.each([&](X& element, auto...) { element = static_cast<X>(random.between(-size, size)); });
  }

  void set_operands(const Choices& c, Random& random) {
    Problem& p = problem;
    query = Tensor<T>(batch, p.q_heads, p.q_len, p.head_dim, c.query_layout);
    key = Tensor<T>(batch, p.kv_heads, p.k_len, p.head_dim, c.key_layout);
    value = Tensor<T>(batch, p.kv_heads, p.k_len, p.value_dim, c.value_layout);
    for (Tensor<T>* x : {&query, &key, &value}) randomize(*x, random);
    p.query = query.template strided<const void*>();
    p.key = key.template strided<const void*>();
    p.value = value.template strided<const void*>();
    if (c.dropout > 0) {
      p.dropout.threshold = static_cast<std::uint32_t>(std::lround(65536 * c.dropout));
      p.dropout.seed = random.bits();
      p.dropout.offset = static_cast<std::uint32_t>(random.bits());
    }
  }

  void set_masks(const Choices& c, Random& random) {
    Problem& p = problem;
    if (c.attend >= 0 && c.mask_block > 0) {
      set_block_mask(c, random);
    } else if (c.attend >= 0) {
      attn_mask = Tensor<std::uint8_t>(batch, p.q_heads, p.q_len, p.k_len, c.mask_layout);
      attn_mask.each([&](std::uint8_t& x, auto...) { x = random.chance(c.attend) ? random.pick({1, 1, 255}) : 0; });
      p.attn_mask = attn_mask.template strided<const std::uint8_t*>();
    }
    if (!c.key_lengths.empty()) {
      for (const std::int64_t length : c.key_lengths)
        for (std::int64_t j = 0; j < p.k_len; ++j) key_mask.push_back(j < length);
    } else if (c.pad >= 0) {
      for (std::int64_t i = 0; i < batch * p.k_len; ++i) key_mask.push_back(!random.chance(c.pad));
    }
    if (!key_mask.empty()) p.key_mask = key_mask.data();
  }

  void set_block_mask(const Choices& c, Random& random) {
    attn_mask = Tensor<std::uint8_t>(batch, 1, problem.q_len, problem.k_len, c.mask_layout);
    const std::int64_t across = (problem.k_len - 1) / c.mask_block + 1, down = (problem.q_len - 1) / c.mask_block + 1;
    std::vector<bool> blocks(static_cast<std::size_t>(batch * down * across));
    for (auto block : blocks) block = random.chance(c.attend);
    attn_mask.each([&](std::uint8_t& x, std::int64_t b, std::int64_t, std::int64_t i, std::int64_t j) {
      x = i == j || blocks[static_cast<std::size_t>((b * down + i / c.mask_block) * across + j / c.mask_block)];
    });
    problem.attn_mask = attn_mask.template broadcast<const std::uint8_t*>();
  }

  void set_bias(const Choices& c, Random& random) {
    Problem& p = problem;
    const std::int64_t full[4] = {batch, p.q_heads, p.q_len, p.k_len};
    std::int64_t size[4];
    for (int d = 0; d < 4; ++d) size[d] = c.bias_same[d] ? std::min<std::int64_t>(full[d], 1) : full[d];
    const auto make = [&](auto type) {
      using B = decltype(type);
      Tensor<B> x(size[0], size[1], size[2], size[3], c.bias_layout);
      randomize(x, random, c.bias_size);
      x.each([&](B& element, auto...) {
        if (random.chance(c.bias_hidden)) element = static_cast<B>(-std::numeric_limits<float>::infinity());
      });
      bias = std::move(x);
      p.bias = std::get<Tensor<B>>(bias).template broadcast<const void*>();
    };
    p.bias_dtype = c.bias_dtype;
    switch (c.bias_dtype) {
      case DType::f32: make(float()); break;
      case DType::f64: make(double()); break;
      case DType::bf16: make(BFloat16()); break;
      case DType::f16: make(Float16());
    }
    if (!c.grad_bias) return;
    grad_bias = Tensor<A>(size[0], size[1], size[2], full[3], c.out_layout);  // no two keys share an element
    p.grad_bias = grad_bias.template broadcast<void*>();
    p.grad_bias.feature = grad_bias.stride(3);
  }

  void set_modality(const Choices& c, Random& random) {
    Problem& p = problem;
    for (std::int64_t b = 0; b < batch; ++b) {
      const auto sequence = c.modality.empty() ? random_modality(random, c.k_len) : c.modality;
      modality.insert(modality.end(), sequence.begin(), sequence.end());
    }
    p.modality = modality.data();
    if (c.image_id) {
      for (std::size_t i = 0; i < modality.size(); ++i)
        image_id.push_back(i && random.chance(0.8) ? image_id.back() : random.integer(-2, 3));
      p.image_id = image_id.data();
    }
    if (c.merge == Merge::gate) {
      const auto size = [&](int d, std::int64_t full) {
        return c.gate_same[d] ? std::min<std::int64_t>(full, 1) : full;
      };
      gate = Tensor<A>(size(0, 2), size(1, batch), size(2, p.q_heads), size(3, p.q_len), c.grad_layout);
      gate.each([&](A& x, auto...) { x = random.chance(0.2) ? A(0) : static_cast<A>(random.between(-1.5, 1.5)); });
      p.gate = gate.template broadcast_statistic<const void*>();
    }
  }

  void set_results(const Choices& c) {
    Problem& p = problem;
    const std::int64_t groups = p.groups(), results = c.mmca && c.merge == Merge::none ? 2 : 1;
    out = Tensor<T>(results * batch, p.q_heads, p.q_len, p.value_dim, c.out_layout);
    p.out = out.template strided<void*>();
    if (results == 2) p.out.group = batch * out.stride(0);
    lse = Tensor<A>(groups, batch, p.q_heads, p.q_len, c.out_layout);
    p.lse = lse.template statistic<void*>();
    if (c.lse_low) {
      lse_low = Tensor<A>(groups, batch, p.q_heads, p.q_len);
      p.lse_low = lse_low.template statistic<void*>();
    }
    if (p.keeps_group_out() || (c.mmca && c.keep_group_out)) {
      Layout layout = c.out_layout;
      layout.feature_step = 1;
      group_out = Tensor<A>(groups * batch, p.q_heads, p.q_len, p.value_dim, layout);
      p.group_out = {group_out.data(), batch * group_out.stride(0), group_out.stride(0), group_out.stride(1),
                     group_out.stride(2)};
    }
  }

  void set_gradients(const Choices& c, Random& random) {
    Problem& p = problem;
    grad_out = Tensor<T>(out.size(0), p.q_heads, p.q_len, p.value_dim, c.grad_layout);
    randomize(grad_out, random);
    p.grad_out = grad_out.template strided<const void*>();
    if (p.out.group) p.grad_out.group = batch * grad_out.stride(0);
    if (c.grad_lse) {
      grad_lse = Tensor<A>(p.groups(), batch, p.q_heads, p.q_len, c.grad_layout);
      randomize(grad_lse, random);
      p.grad_lse = grad_lse.template statistic<const void*>();
    }
    Layout output = c.out_layout;
    grad_query = Tensor<T>(batch, p.q_heads, p.q_len, p.head_dim, output);
    grad_value = Tensor<T>(batch, p.kv_heads, p.k_len, p.value_dim, output);
    output.heads_inside_rows = !output.heads_inside_rows;
    grad_key = Tensor<T>(batch, p.kv_heads, p.k_len, p.head_dim, output);
    p.grad_query = grad_query.template strided<void*>();
    p.grad_key = grad_key.template strided<void*>();
    p.grad_value = grad_value.template strided<void*>();
    if (c.grad_gate && p.gate.data) {
      grad_gate = Tensor<A>(2, batch, p.q_heads, p.q_len, c.out_layout);
      p.grad_gate = grad_gate.template statistic<void*>();
    }
  }

  void set_offsets(const Choices& c) {
    Problem& p = problem;
    q_offsets = c.q_offsets, k_offsets = c.k_offsets;
    p.q_offsets = q_offsets.data(), p.k_offsets = k_offsets.data();
    for (Input* x : {&p.query, &p.key, &p.value, &p.grad_out}) x->batch = 0;
    for (Output* x : {&p.out, &p.grad_query, &p.grad_key, &p.grad_value}) x->batch = 0;
    for (RowStatistic<void*>* x : {&p.lse, &p.lse_low, &p.group_out, &p.grad_gate}) x->batch = 0;
    for (RowStatistic<const void*>* x : {&p.gate, &p.grad_lse}) x->batch = 0;
  }
};

}  // namespace mmca::test
