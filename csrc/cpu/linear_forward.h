// Linear attention's forward, as a sweep (cpu/linear_sweep.h); included inside the namespace of an instruction set.
// Notation: core/linear_problem.h.
//
//     writers: keys, f = phi(k), g = v        readers: queries, x = phi(q)        out = y / (phi(q) . z)

// Rows of one head of a sequence, for all sweeps.
template <class T>
class LinearRows : public SweepRoles<T> {
 public:
  LinearRows(const LinearSequence& sequence, std::int64_t kv_head)
      : sequence_(sequence),
        problem_(sequence.problem),
        kv_head_(kv_head),
        heads_(problem_.heads_per_kv()),
        head_dim_(static_cast<int>(problem_.head_dim)),
        value_dim_(static_cast<int>(problem_.value_dim)),
        padded_head_dim_(round_up(head_dim_, lanes<T>)),
        padded_value_dim_(round_up(value_dim_, lanes<T>)),
        key_(problem_.key, problem_.dtype, kv_head, head_dim_, padded_head_dim_),
        value_(problem_.value, problem_.dtype, kv_head, value_dim_, padded_value_dim_) {}

 protected:
  using S = Simd<T>;
  static constexpr int max_dim = 256;

  // Entry e of the head's query rows: heads vary fastest.
  Row row_of(std::int64_t e) const {
    if (heads_ == 1) return {static_cast<std::int32_t>(e), static_cast<std::int32_t>(kv_head_)};
    return {static_cast<std::int32_t>(e / heads_), static_cast<std::int32_t>(kv_head_ * heads_ + e % heads_)};
  }
  RowReader<T> query(std::int64_t h) const { return {problem_.query, problem_.dtype, h, head_dim_, padded_head_dim_}; }
  RowReader<T> grad_out(std::int64_t h) const {
    return {problem_.grad_out, problem_.dtype, h, value_dim_, padded_value_dim_};
  }
  bool sees_nothing(Row row) const { return sequence_.hides_all_from(row.row); }

  T* phi_of_query_row(Row row, T* out, T* factor = nullptr) {
    const T used = phi_of_query<T>(query(row.head).row(row.row, buffer_), head_dim_, padded_head_dim_, out);
    if (factor) *factor = used;
    return out;
  }
  T* phi_of_key_row(std::int64_t j, T* out) {
    phi_of_key<T>(key_.row(j, buffer_), head_dim_, padded_head_dim_, out);
    return out;
  }
  static void zeros(T* out, int count) { std::fill_n(out, count, T(0)); }
  static void copy(const T* row, int count, T* out) {
    if (row != out) std::copy_n(row, count, out);
  }
  // 1 / x; 0 where x is too small for that: a row whose weights all underflow has no average, and is 0.
  static T inverse(T x) { return std::abs(x) < std::numeric_limits<T>::min() ? T(0) : T(1) / x; }
  template <int write, class Tensor>
  void prefetch(const Tensor& tensor, std::int64_t h, std::int64_t r, int features) const {
    const std::int64_t size = element_size(problem_.dtype);
    const char* data = static_cast<const char*>(tensor.data) + tensor.offset(h, r) * size;
    for (std::int64_t at = 0; at < features * size; at += 64) __builtin_prefetch(data + at, write);
  }
  void expect_key(std::int64_t j) const {
    prefetch<0>(problem_.key, kv_head_, j, head_dim_), prefetch<0>(problem_.value, kv_head_, j, value_dim_);
  }
  void expect_row(Row row) const {
    prefetch<0>(problem_.query, row.head, row.row, head_dim_);
    prefetch<0>(problem_.grad_out, row.head, row.row, value_dim_);
  }
  void store(const T* row, int features, const Output& output, std::int64_t h, std::int64_t r) const {
    store_row<T>(row, features, output, problem_.dtype, output.offset(h, r));
  }
  // factor * y, of value_dim numbers; y is overwritten.
  void store_scaled(T* y, T factor, const Output& output, Row row) const {
    const typename S::Reg by = S::broadcast(factor);
    if (element_size(problem_.dtype) == sizeof(T) && output.feature == 1 && value_dim_ == padded_value_dim_) {
      T* to = static_cast<T*>(output.data) + output.offset(row.head, row.row);
      for (int e = 0; e < padded_value_dim_; e += S::width) S::storeu(to + e, S::mul(by, S::load(y + e)));
    } else {
      for (int e = 0; e < padded_value_dim_; e += S::width) S::store(y + e, S::mul(by, S::load(y + e)));
      store(y, value_dim_, output, row.head, row.row);
    }
  }
  std::int64_t state_at() const { return kv_head_ * head_dim_ * value_dim_; }
  std::int64_t normal_at() const { return kv_head_ * head_dim_; }

  const LinearSequence& sequence_;
  const LinearProblem& problem_;
  const std::int64_t kv_head_, heads_;
  const int head_dim_, value_dim_, padded_head_dim_, padded_value_dim_;
  const RowReader<T> key_, value_;
  alignas(64) T buffer_[max_dim];
};

template <class T>
class LinearForward final : public LinearRows<T> {
 public:
  using typename SweepRoles<T>::Also;
  LinearForward(const LinearSequence& sequence, std::int64_t kv_head) : LinearRows<T>(sequence, kv_head) {
    this->also = Also::total_weight;
  }
  static typename Sweep<T>::Sizes sizes(const LinearProblem& p) {
    return {static_cast<int>(p.head_dim), static_cast<int>(p.value_dim), static_cast<int>(p.head_dim)};
  }
  static SweepOrder order(const LinearSequence& sequence) {
    const LinearProblem& p = sequence.problem;
    SweepOrder order;
    order.writers = sequence.has_keys() ? p.k_len : 0;
    order.readers_per_token = p.heads_per_kv(), order.readers = p.q_len * order.readers_per_token;
    order.lead = p.causal ? 1 + p.k_len - p.q_len : lead_of_all(p.k_len);
    order.needs_end = p.final_state.sum != nullptr;
    return order;
  }

  const T* writer(std::int64_t j, T* f, T* buffer) override {
    if (sequence_.hides_key(j)) return nullptr;
    this->phi_of_key_row(j, f);
    return value_.row(j, buffer);
  }
  void reader(std::int64_t e, T* x) override {
    const Row row = this->row_of(e);
    if (this->sees_nothing(row)) this->zeros(x, padded_head_dim_);
    else this->phi_of_query_row(row, x);
  }
  void finish(std::int64_t e, const T* total_weight, T* y) override {
    this->store_scaled(y, this->inverse(*total_weight), problem_.out, this->row_of(e));  // 0 where nothing is seen
  }

  void expect_writer(std::int64_t j) const override { this->expect_key(j); }
  void expect_reader(std::int64_t e) const override {
    const Row row = this->row_of(e);
    this->template prefetch<0>(problem_.query, row.head, row.row, this->head_dim_);
    this->template prefetch<1>(problem_.out, row.head, row.row, value_dim_);
  }

  StateView<const double> start() const override { return view(problem_.state); }
  StateView<double> end() const override { return view(problem_.final_state); }

 private:
  using LinearRows<T>::sequence_, LinearRows<T>::problem_, LinearRows<T>::value_, LinearRows<T>::value_dim_,
      LinearRows<T>::padded_head_dim_, LinearRows<T>::padded_value_dim_;

  template <class Double>
  StateView<Double> view(const LinearStateOf<Double>& state) const {
    if (!state.sum) return {};
    return {state.sum + this->state_at(), value_dim_, 1, nullptr, state.normal + this->normal_at()};
  }
};

// ---------------------------------------------------------------- sweeps as stages of the schedule

template <class T, template <class> class Roles>
class LinearStage final : public SweepStage {
 public:
  LinearStage(const LinearProblem& problem, const LinearSequences& sequences)
      : problem_(problem), sequences_(sequences), sizes_(Roles<T>::sizes(problem)) {
    heads = sequences.size() * problem.kv_heads;
    depth = sizes_.depth, values = sizes_.values, chunk = Sweep<T>::chunk;
    memory_bytes = (sizes_.carried() * sizeof(double) + 63) / 64 * 64;
    slot_bytes = sizes_.carried() * sizeof(T);
  }

  SweepOrder order(std::int64_t head) const override {
    return Roles<T>::order(sequences_.of(head / problem_.kv_heads));
  }
  void whole(std::int64_t head) const override {
    with(head, [](Sweep<T>& sweep, auto&) { sweep.whole(); });
  }
  void begin(std::int64_t head, void* memory) const override {
    with(head, [&](Sweep<T>& sweep, auto& roles) { sweep.load(roles.start(), static_cast<double*>(memory)); });
  }
  void sum(std::int64_t head, std::int64_t segment, void* slot) const override {
    with(head, [&](Sweep<T>& sweep, auto&) { sweep.sum_segment(segment, static_cast<T*>(slot)); });
  }
  void scan(void* memory, std::int64_t sums, std::int64_t count, void* slots) const override {
    Sweep<T>::scan(static_cast<double*>(memory), sizes_, sums, count, static_cast<T*>(slots));
  }
  void segment(std::int64_t head, std::int64_t segment, const void* slot) const override {
    with(head, [&](Sweep<T>& sweep, auto&) { sweep.read_segment(segment, static_cast<const T*>(slot)); });
  }
  void read(std::int64_t head, SweepOrder::Rows rows, const void* memory) const override {
    with(head, [&](Sweep<T>& sweep, auto&) { sweep.read_all(rows, static_cast<const double*>(memory)); });
  }
  void end(std::int64_t head, const void* memory) const override {
    with(head, [&](Sweep<T>& sweep, auto& roles) {
      if (order(head).needs_end) sweep.store(static_cast<const double*>(memory), roles.end());
    });
  }

 private:
  template <class Body>
  void with(std::int64_t head, const Body& body) const {
    const LinearSequence sequence = sequences_.of(head / problem_.kv_heads);
    const SweepOrder order = Roles<T>::order(sequence);
    Roles<T> roles(sequence, head % problem_.kv_heads);
    Arena measure(nullptr);
    Sweep<T>(order, roles, sizes_, measure);
    Arena arena(worker_scratch(measure.used()));
    Sweep<T> sweep(order, roles, sizes_, arena);
    body(sweep, roles);
  }

  const LinearProblem& problem_;
  const LinearSequences& sequences_;
  const typename Sweep<T>::Sizes sizes_;
};
