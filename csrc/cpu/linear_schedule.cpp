#include "cpu/linear_schedule.h"

#include "cpu/scratch.h"

namespace mmca::cpu {
namespace {

template <class Tensor>
void move(Tensor& tensor, std::int64_t elements, std::int64_t size) {
  using Byte = std::conditional_t<std::is_const_v<std::remove_pointer_t<decltype(tensor.data)>>, const char, char>;
  if (tensor.data) tensor.data = static_cast<Byte*>(tensor.data) + elements * size;
}

template <class Double>
void move(LinearStateOf<Double>& state, const LinearProblem& problem, std::int64_t b) {
  if (state.sum) state.sum += b * problem.kv_heads * problem.head_dim * problem.value_dim;
  if (state.normal) state.normal += b * problem.kv_heads * problem.head_dim;
}

std::int64_t divide_up(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

constexpr std::size_t slot_bytes_limit = std::size_t{32} << 20;  // of all segments in flight
constexpr std::int64_t late_rows = 384;                          // readers at a time of those that see no chunk
constexpr double second_sum = 4.0 / 3.0;  // what a split head costs: its segments are summed twice

struct Head {
  std::int64_t index;
  double cost;  // multiply-adds
};

double cost_of(const SweepStage& stage, const SweepOrder& order) {
  const double products = static_cast<double>(stage.depth) * stage.values, sides = stage.depth + stage.values;
  const auto chunked = static_cast<double>(order.late_begin() - order.early_end());
  return products * static_cast<double>(order.writers + order.readers) + chunked * stage.chunk / 2 * sides + 1000;
}

// When the last of so many threads is done, each head going to the first that is free.
double finish(const std::vector<Head>& heaviest_first, int threads) {
  std::vector<double> busy(static_cast<std::size_t>(threads), 0.0);
  for (const Head& head : heaviest_first) *std::min_element(busy.begin(), busy.end()) += head.cost;
  return *std::max_element(busy.begin(), busy.end());
}

// Runs heads that are split, all of them together.
class Split {
 public:
  Split(const SweepStage& stage, Executor& executor, const std::vector<Head>& heads)
      : stage_(stage), executor_(executor), count_(static_cast<std::int64_t>(heads.size())) {
    for (const Head& head : heads) {
      heads_.push_back(head.index), orders_.push_back(stage.order(head.index)), cost_ += head.cost;
      most_ = std::max(most_, segments(orders_.back()));
    }
    in_flight_ = std::clamp<std::int64_t>(
        static_cast<std::int64_t>(slot_bytes_limit / (stage.slot_bytes * static_cast<std::size_t>(count_))), 1,
        std::max<std::int64_t>(most_, 1));
    const std::size_t memory = stage.memory_bytes * static_cast<std::size_t>(count_);
    memory_ =
        static_cast<char*>(call_scratch(memory + stage.slot_bytes * static_cast<std::size_t>(count_ * in_flight_)));
    slots_ = memory_ + memory;
  }

  void run() {
    for_each(count_, [&](std::int64_t h) { stage_.begin(heads_[at(h)], memory(h)); });
    read([](const SweepOrder& order) { return SweepOrder::Rows{0, order.early_end()}; });
    for (first_ = 0; first_ < most_; first_ += in_flight_) {
      each_slot([&](std::int64_t h, std::int64_t s) {
        if (s + 1 < segments(orders_[at(h)]) || end_matters(orders_[at(h)])) stage_.sum(heads_[at(h)], s, slot(h, s));
      });
      for_each(count_, [&](std::int64_t h) {
        const SweepOrder& order = orders_[at(h)];
        const std::int64_t sums = segments(order) - (end_matters(order) ? 0 : 1);
        const std::int64_t starts = std::min(segments(order) - first_, in_flight_);
        if (starts > 0) stage_.scan(memory(h), std::min(sums - first_, in_flight_), starts, slot(h, first_));
      });
      each_slot([&](std::int64_t h, std::int64_t s) { stage_.segment(heads_[at(h)], s, slot(h, s)); });
    }
    read([](const SweepOrder& order) { return SweepOrder::Rows{order.late_begin(), order.readers}; });
    for_each(count_, [&](std::int64_t h) { stage_.end(heads_[at(h)], memory(h)); });
  }

 private:
  static std::size_t at(std::int64_t h) { return static_cast<std::size_t>(h); }
  std::int64_t segments(const SweepOrder& order) const {
    return divide_up(order.writers, std::int64_t{stage_.chunk} * segment_chunks);
  }
  static bool end_matters(const SweepOrder& order) { return order.needs_end || order.late_begin() < order.readers; }
  char* memory(std::int64_t h) const { return memory_ + at(h) * stage_.memory_bytes; }
  char* slot(std::int64_t h, std::int64_t s) const {
    return slots_ + at(h * in_flight_ + s - first_) * stage_.slot_bytes;
  }

  template <class Body>
  void for_each(std::int64_t count, const Body& body) const {
    for_each_item(executor_, count, cost_, body);
  }

  // body(head, segment) for the segments in flight.
  template <class Body>
  void each_slot(const Body& body) const {
    for_each(count_ * in_flight_, [&](std::int64_t item) {
      const std::int64_t h = item % count_, s = first_ + item / count_;
      if (s < segments(orders_[at(h)])) body(h, s);
    });
  }

  template <class Choice>
  void read(const Choice& rows_of) const {
    std::int64_t blocks = 0;
    for (const SweepOrder& order : orders_) blocks = std::max(blocks, divide_up(rows_of(order).size(), late_rows));
    for_each(count_ * blocks, [&](std::int64_t item) {
      const std::int64_t h = item % count_;
      const SweepOrder::Rows rows = rows_of(orders_[at(h)]);
      const std::int64_t begin = rows.begin + item / count_ * late_rows;
      if (begin < rows.end) stage_.read(heads_[at(h)], {begin, std::min(begin + late_rows, rows.end)}, memory(h));
    });
  }

  const SweepStage& stage_;
  Executor& executor_;
  std::int64_t count_, most_ = 0, in_flight_ = 0, first_ = 0;
  std::vector<std::int64_t> heads_;
  std::vector<SweepOrder> orders_;
  double cost_ = 0;
  char *memory_ = nullptr, *slots_ = nullptr;
};

}  // namespace

LinearSequences::LinearSequences(const LinearProblem& problem) : problem_(problem) {
  const auto first_key = [&](std::int64_t at, std::int64_t k_len) {
    std::int64_t j = 0;
    if (problem.key_mask)
      while (j < k_len && !problem.key_mask[at + j]) ++j;
    return j;
  };
  const std::int64_t *q = problem.q_offsets, *k = problem.k_offsets;
  for (std::int64_t b = 0; b < problem.batch; ++b)
    first_keys_.push_back(k ? first_key(k[b], k[b + 1] - k[b]) : first_key(b * problem.k_len, problem.k_len));
  if (q && (q[problem.batch] < problem.q_len || k[problem.batch] < problem.k_len)) first_keys_.push_back(0);
}

LinearSequence LinearSequences::of(std::int64_t b) const {
  LinearSequence sequence{problem_, first_keys_[static_cast<std::size_t>(b)], b < problem_.batch};
  LinearProblem& p = sequence.problem;
  std::int64_t q_begin = 0, k_begin = 0;
  if (p.q_offsets) {
    q_begin = p.q_offsets[b], k_begin = p.k_offsets[b];
    p.q_len = (sequence.exists ? p.q_offsets[b + 1] : p.q_len) - q_begin;
    p.k_len = (sequence.exists ? p.k_offsets[b + 1] : p.k_len) - k_begin;
  }
  const std::int64_t size = element_size(p.dtype), fact_size = p.dtype == DType::f64 ? 8 : 4;
  for (Input* x : {&p.query, &p.grad_out}) move(*x, b * x->batch + q_begin * x->row, size);
  for (Output* x : {&p.out, &p.grad_query}) move(*x, b * x->batch + q_begin * x->row, size);
  for (Input* x : {&p.key, &p.value}) move(*x, b * x->batch + k_begin * x->row, size);
  for (Output* x : {&p.grad_key, &p.grad_value}) move(*x, b * x->batch + k_begin * x->row, size);
  move(p.row_facts, b * p.row_facts.batch + q_begin * p.row_facts.row, fact_size);
  if (p.key_mask) p.key_mask += problem_.k_offsets ? k_begin : b * p.k_len;
  if (sequence.exists) {
    move(p.state, p, b), move(p.grad_final_state, p, b);
    move(p.final_state, p, b), move(p.grad_state, p, b);
  } else {
    p.state = {}, p.grad_final_state = {}, p.final_state = {}, p.grad_state = {};
  }
  return sequence;
}

void run_sweep(const SweepStage& stage, Executor& executor) {
  std::vector<Head> heads, split;
  double work = 0;
  for (std::int64_t h = 0; h < stage.heads; ++h) {
    const SweepOrder order = stage.order(h);
    if (!order.writers && !order.readers && !order.needs_end) continue;
    heads.push_back({h, cost_of(stage, order)});
    work += heads.back().cost;
  }
  std::stable_sort(heads.begin(), heads.end(), [](const Head& a, const Head& b) { return a.cost > b.cost; });
  const int threads = executor.concurrency();
  if (threads > 1 && work > threads * worth_a_worker && finish(heads, threads) > second_sum * work / threads) {
    const auto first_whole =
        std::find_if(heads.begin(), heads.end(), [&](const Head& head) { return head.cost <= work / (2.0 * threads); });
    split.assign(heads.begin(), first_whole);
    heads.erase(heads.begin(), first_whole);
  }
  if (!split.empty()) Split(stage, executor, split).run();
  for_each_item(executor, static_cast<std::int64_t>(heads.size()), work,
                [&](std::int64_t item) { stage.whole(heads[static_cast<std::size_t>(item)].index); });
}

}  // namespace mmca::cpu
