// Linear attention as a subject. Its results are held to the reference, whose loops take the square of the length: on
// the problem itself where it is short, else on one of its KV heads, cut to a little more than a segment of a sweep.
#include "subject.h"

#include "compare.h"
#include "cpu/linear_schedule.h"
#include "executors.h"
#include "linear_case.h"

namespace mmca::bench {
namespace {

constexpr std::int64_t checked_tokens = cpu::linear_chunk * cpu::segment_chunks + 100;

test::LinearChoices linear_choices(const Workload& workload) {
  const test::Choices& from = workload.choices;
  test::LinearChoices c;
  c.batch = from.batch, c.kv_heads = from.kv_heads, c.heads_per_kv = from.heads_per_kv;
  c.q_len = from.q_len, c.k_len = from.k_len, c.head_dim = from.head_dim, c.value_dim = from.value_dim;
  c.causal = from.causal, c.pad = from.pad, c.state = c.final_state = workload.state;
  for (test::Layout* layout : {&c.query_layout, &c.key_layout, &c.value_layout, &c.out_layout, &c.grad_layout})
    layout->on_cache_line = true;
  return c;
}

test::LinearChoices shortened(test::LinearChoices c) {
  if (c.k_len > checked_tokens) c.batch = c.kv_heads = 1;
  c.q_len = std::min(c.q_len, checked_tokens), c.k_len = std::min(c.k_len, checked_tokens);
  return c;
}

// Forward: keys are added to a state, rows read it. Backward: keys to S and rows to R, both read by products with dO, k
// and v: dQ from S, dV and dK from R.
double flops_of(const LinearProblem& p, bool backward) {
  const auto keys = static_cast<double>(p.batch * p.kv_heads * p.k_len),
             rows = static_cast<double>(p.batch * p.q_heads * p.q_len);
  const auto product = static_cast<double>(p.head_dim * p.value_dim), dims = double(p.head_dim + p.value_dim);
  double pairs = 0;  // of a row and a key in one chunk
  for (std::int64_t i = 0; p.causal && i < p.q_len; ++i)
    if (const std::int64_t at = i + p.k_len - p.q_len; at >= 0) pairs += double(at % cpu::linear_chunk + 1);
  pairs *= static_cast<double>(p.batch * p.q_heads);
  return backward ? 2 * (product * (3 * keys + 2 * rows) + 3 * pairs * dims)
                  : 2 * (product * (keys + rows) + pairs * dims);
}

template <class T>
class LinearSubject final : public Subject {
 public:
  LinearSubject(const test::LinearChoices& choices, bool backward)
      : backward_(backward), timed_(choices), checked_(shortened(choices)), expected_(checked_) {
    const LinearProblem& p = timed_.problem;
    flops_ = flops_of(p, backward);
    problem_.dtype = p.dtype, problem_.batch = p.batch, problem_.q_heads = p.q_heads, problem_.kv_heads = p.kv_heads;
    problem_.q_len = p.q_len, problem_.k_len = p.k_len;
    problem_.head_dim = p.head_dim, problem_.value_dim = p.value_dim, problem_.key = p.key, problem_.value = p.value;
  }

  const Problem& problem() const override { return problem_; }
  std::size_t compared() const override { return compared_; }
  void run(const Kernel& kernel, Executor& executor) const override { kernel.run_linear(timed_.problem, executor); }

  std::string faults(const Kernel& kernel, Executor& executor) override {
    compared_ = 0;
    std::string faults;
    const auto hold = [&](const char* name, auto& actual, const auto& expected) {
      if (const std::string fault = actual.written_exactly(); !fault.empty()) faults += name + fault + "\n";
      const test::Comparison found = test::compare(name, actual, expected, [](auto...) { return true; });
      compared_ += found.compared;
      if (found.faults) faults += found.text + "\n";
    };
    test::LinearCase<T>& c = checked_;
    for (test::Tensor<T>* x : {&c.out, &c.grad_query, &c.grad_key, &c.grad_value}) x->reset();
    for (test::Tensor<double>* x : {&c.final_S, &c.final_z, &c.grad_S, &c.grad_z}) x->reset();
    kernel.run_linear(c.problem, executor);
    if (!backward_) {
      hold("out", c.out, expected_.out);
      if (c.problem.final_state.sum) hold("S", c.final_S, expected_.final_S), hold("z", c.final_z, expected_.final_z);
    } else {
      hold("grad_query", c.grad_query, expected_.grad_query), hold("grad_key", c.grad_key, expected_.grad_key);
      hold("grad_value", c.grad_value, expected_.grad_value);
      if (c.problem.grad_state.sum)
        hold("grad_S", c.grad_S, expected_.grad_S), hold("grad_z", c.grad_z, expected_.grad_z);
    }
    return faults.empty() && compared_ == 0 ? "nothing was compared\n" : faults;
  }

 private:
  const bool backward_;
  test::LinearCase<T> timed_, checked_;
  test::LinearReference<T> expected_;
  Problem problem_;
  std::size_t compared_ = 0;
};

}  // namespace

std::unique_ptr<Subject> make_linear_subject(const Workload& workload, DType dtype, Operation operation) {
  const test::LinearChoices choices = linear_choices(workload);
  const bool backward = operation == Operation::linear_backward;
  switch (dtype) {
    case DType::f32: return std::make_unique<LinearSubject<float>>(choices, backward);
    case DType::f64: return std::make_unique<LinearSubject<double>>(choices, backward);
    case DType::bf16: return std::make_unique<LinearSubject<BFloat16>>(choices, backward);
    case DType::f16: return std::make_unique<LinearSubject<Float16>>(choices, backward);
  }
  return nullptr;
}

}  // namespace mmca::bench
