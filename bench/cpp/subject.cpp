#include "subject.h"

#include "compare.h"
#include "executors.h"

namespace mmca::bench {
namespace {

using test::Sample;

constexpr std::int64_t sampled_pairs = std::int64_t{1} << 20;  // about a second of the reference's time

// The reference does hundreds of operations for each pair it looks at. Steps are odd, so that they meet every place of
// a tile.
Sample sample_of(const Problem& problem, std::int64_t pairs, bool backward) {
  const auto step = [](std::int64_t count) { return count <= sampled_pairs ? 1 : (count / sampled_pairs + 1) | 1; };
  Sample sample;
  sample.row_step = step(pairs);
  if (sample.row_step == 1) return sample;
  sample.kv_head = backward ? problem.kv_heads - 1 : Sample::none;
  sample.key_step = step(pairs / problem.kv_heads / 4);
  return sample;
}

// A problem laid out as torch's tensors are.
test::Choices on_cache_lines(test::Choices choices) {
  for (test::Layout* layout : {&choices.query_layout, &choices.key_layout, &choices.value_layout, &choices.out_layout,
                               &choices.grad_layout, &choices.mask_layout, &choices.bias_layout})
    layout->on_cache_line = true;
  return choices;
}

template <class T>
class TypedSubject final : public Subject {
 public:
  TypedSubject(const test::Choices& choices, bool backward)
      : backward_(backward), case_(on_cache_lines(choices)), pairs_(visible_pairs(case_.problem)) {
    Problem& p = case_.problem;
    if (!backward_) p.group_out = {};  // kept for a backward alone
    flops_ = (backward_ ? 2.5 : 1.0) * 2 * static_cast<double>(pairs_) * static_cast<double>(p.head_dim + p.value_dim);
    sample_ = sample_of(p, pairs_, backward_);
    expected_ = std::make_unique<test::Reference<T>>(case_, sample_);
    expected_->forward();
    if (!backward_) return;
    // What the backward reads: where the reference has not looked, a kernel's results.
    SerialExecutor serial;
    mmca::run(Operation::attention_forward, p, serial);
    expected_->store_results();
    expected_->backward();
  }

  const Problem& problem() const override { return case_.problem; }
  std::size_t compared() const override { return compared_; }

  std::string faults(const Kernel& kernel, Executor& executor) override {
    test::Case<T>& c = case_;
    const auto row = [&](auto, std::int64_t h, std::int64_t i, auto) { return sample_.row(h, i); };
    const auto statistic = [&](auto, auto, std::int64_t h, std::int64_t i) { return sample_.row(h, i); };
    const auto key = [&](auto, std::int64_t g, std::int64_t j, auto) { return sample_.key(g, j); };
    test::Reference<T>& exact = *expected_;
    compared_ = 0;
    std::string faults;
    const auto hold = [&](const char* name, auto& actual, const auto& expected, const auto& wanted) {
      if (const std::string fault = actual.written_exactly(); !fault.empty()) faults += name + fault + "\n";
      const test::Comparison found = test::compare(name, actual, expected, wanted);
      compared_ += found.compared;
      if (found.faults) faults += found.text + "\n";
    };
    if (!backward_) {
      c.out.reset(), c.lse.reset();
      run(kernel, executor);
      hold("out", c.out, exact.out, row), hold("lse", c.lse, exact.lse, statistic);
    } else {
      c.grad_query.reset(), c.grad_key.reset(), c.grad_value.reset(), c.grad_gate.reset();
      c.grad_bias.each([](auto& x, auto...) { x = 0; });  // added to
      run(kernel, executor);
      hold("grad_query", c.grad_query, exact.grad_query, row);
      hold("grad_key", c.grad_key, exact.grad_key, key), hold("grad_value", c.grad_value, exact.grad_value, key);
      if (c.problem.grad_bias.data) hold("grad_bias", c.grad_bias, exact.grad_bias, row);
      if (c.problem.grad_gate.data) hold("grad_gate", c.grad_gate, exact.grad_gate, statistic);
    }
    return faults.empty() && compared_ == 0 ? "nothing was compared\n" : faults;
  }

 private:
  const bool backward_;
  test::Case<T> case_;
  const std::int64_t pairs_;
  Sample sample_;
  std::unique_ptr<test::Reference<T>> expected_;
  std::size_t compared_ = 0;
};

}  // namespace

std::int64_t Subject::key_bytes() const {
  const Problem& p = problem();
  const std::int64_t sequences = p.q_offsets ? 1 : p.batch;
  return sequences * p.kv_heads * p.k_len * (p.head_dim + p.value_dim) * element_size(p.dtype);
}

std::int64_t visible_pairs(const Problem& problem) {
  const Plan plan = make_plan(problem);
  const auto& mask = problem.attn_mask;
  std::int64_t pairs = 0;
  for (std::int64_t b = 0; b < plan.batch; ++b) {
    const SequencePlan& sequence = plan.of(b);
    for (std::size_t row = 0; row < sequence.self_rows.size(); ++row)
      pairs += problem.q_heads * sequence.self_rows[row];
    for (int g = 0; g < problem.groups(); ++g)
      for (std::size_t index = 0; index < sequence.ranges[g].size(); ++index) {
        const Range range = sequence.ranges[g][index];
        if (!mask.data) {
          pairs += problem.q_heads * range.size();
          continue;
        }
        const std::int64_t row = sequence.row(static_cast<std::int64_t>(index));
        for (std::int64_t h = 0; h < problem.q_heads; ++h)
          for (std::int32_t c = range.begin; c < range.end; ++c)
            pairs += mask.data[b * mask.batch + mask.offset(h, row) + sequence.keys[g].position(c) * mask.feature] != 0;
      }
  }
  return pairs;
}

std::unique_ptr<Subject> make_subject(const Workload& workload, DType dtype, Operation operation) {
  if (is_linear(operation)) return make_linear_subject(workload, dtype, operation);
  test::Choices choices = workload.choices;
  const bool backward = operation == Operation::attention_backward;
  choices.lse_low = backward, choices.grad_gate = true;
  switch (dtype) {
    case DType::f32: return std::make_unique<TypedSubject<float>>(choices, backward);
    case DType::f64: return std::make_unique<TypedSubject<double>>(choices, backward);
    case DType::bf16: return std::make_unique<TypedSubject<BFloat16>>(choices, backward);
    case DType::f16: return std::make_unique<TypedSubject<Float16>>(choices, backward);
  }
  return nullptr;
}

}  // namespace mmca::bench
