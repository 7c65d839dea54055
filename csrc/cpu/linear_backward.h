// Linear attention's backward, as three sweeps (cpu/linear_sweep.h); included inside the namespace of an instruction
// set. With D = phi(q) . z and the row facts d = 1 / D, e = d <dO, out>:
//
//     dphi(q[i]) = d (S dO - <dO, out> z)                                           dq = dphi(q) phi'(q), likewise dk
//     dphi(k[j]) = sum over rows i that see key j, phi(q[i]) (d <dO[i], v[j]> - e)
//     dv[j]      = sum over rows i that see key j, d <phi(q[i]), phi(k[j])> dO[i]
//
//     sweep        writers: f, g             readers: x            what it leaves
//     dQ           keys: v, phi(k)           rows: dO              <phi(q), y> = D <dO, out>; the row facts
//     dV           rows: phi(q), d dO        keys: phi(k)
//     dK           rows: (d dO, -e), phi(q)  keys: (v, 1)          the gradient of the state before the first key
//
// The last two run backwards in time. S is computed anew: nothing of the forward is kept.

template <class T>
class LinearQueryGradient final : public LinearRows<T> {
 public:
  using typename SweepRoles<T>::Also;
  LinearQueryGradient(const LinearSequence& sequence, std::int64_t kv_head) : LinearRows<T>(sequence, kv_head) {
    this->also = Also::sum_of_g;
  }
  static typename Sweep<T>::Sizes sizes(const LinearProblem& p) {
    return {static_cast<int>(p.value_dim), static_cast<int>(p.head_dim), static_cast<int>(p.head_dim)};
  }
  static SweepOrder order(const LinearSequence& sequence) {
    SweepOrder order = LinearForward<T>::order(sequence);
    order.needs_end = false;
    return order;
  }

  const T* writer(std::int64_t j, T* f, T* buffer) override {
    if (sequence_.hides_key(j)) return nullptr;
    this->copy(value_.row(j, f), value_dim_, f);
    return this->phi_of_key_row(j, buffer);
  }
  void reader(std::int64_t e, T* x) override {
    const Row row = this->row_of(e);
    this->copy(this->grad_out(row.head).row(row.row, x), padded_value_dim_, x);
  }
  void finish(std::int64_t e, const T* sum, T* y) override {
    const Row row = this->row_of(e);
    T inverse = T(0), product = T(0);
    if (this->sees_nothing(row)) {
      this->zeros(y, padded_head_dim_);
    } else {
      T factor;
      const T* phi = this->phi_of_query_row(row, phi_, &factor);
      inverse = this->inverse(dot<T>(phi, sum, padded_head_dim_));
      product = inverse * dot<T>(phi, y, padded_head_dim_);
      const typename S::Reg slope = S::broadcast(factor), minus_product = S::broadcast(-product),
                            by = S::broadcast(inverse);
      for (int d = 0; d < padded_head_dim_; d += S::width) {
        const typename S::Reg of_phi = S::mul(by, S::fma(minus_product, S::loadu(sum + d), S::loadu(y + d)));
        S::storeu(y + d, S::mul(of_phi, S::min(slope, S::loadu(phi + d))));
      }
    }
    const RowStatistic<void*>& facts = problem_.row_facts;
    T* fact = static_cast<T*>(facts.data) + facts.offset(0, row.head, row.row);
    fact[0] = inverse, fact[facts.group] = inverse * product;
    this->store(y, head_dim_, problem_.grad_query, row.head, row.row);
  }

  void expect_writer(std::int64_t j) const override { this->expect_key(j); }
  void expect_reader(std::int64_t e) const override {
    const Row row = this->row_of(e);
    this->expect_row(row);
    this->template prefetch<1>(problem_.grad_query, row.head, row.row, head_dim_);
  }

  StateView<const double> start() const override {
    if (!problem_.state.sum) return {};
    return {problem_.state.sum + this->state_at(), 1, value_dim_, nullptr, problem_.state.normal + this->normal_at()};
  }

 private:
  using S = Simd<T>;
  using LinearRows<T>::sequence_, LinearRows<T>::problem_, LinearRows<T>::value_, LinearRows<T>::value_dim_,
      LinearRows<T>::head_dim_, LinearRows<T>::padded_head_dim_, LinearRows<T>::padded_value_dim_;

  alignas(64) T phi_[LinearRows<T>::max_dim];
};

// Sweeps from the last row to the first.
template <class T>
class LinearRowsBackwards : public LinearRows<T> {
 public:
  using LinearRows<T>::LinearRows;
  static SweepOrder order(const LinearSequence& sequence) {
    const LinearProblem& p = sequence.problem;
    SweepOrder order;
    order.writers_per_token = p.heads_per_kv();
    if (sequence.has_keys() || p.state.sum) order.writers = p.q_len * order.writers_per_token;
    order.readers = p.k_len;
    order.lead = p.causal ? 1 : lead_of_all(p.q_len);
    return order;
  }

 protected:
  Row writer_row(std::int64_t w) const { return this->row_of(problem_.q_len * this->heads_ - 1 - w); }
  std::int64_t reader_key(std::int64_t r) const { return problem_.k_len - 1 - r; }
  // Nobody sees the key: its gradients are 0, whatever it is.
  bool unseen(std::int64_t j) const {
    return this->sequence_.hides_key(j) || (!problem_.q_len && !problem_.grad_final_state.sum);
  }
  const T* facts(Row row) const {
    return static_cast<const T*>(problem_.row_facts.data) + problem_.row_facts.offset(0, row.head, row.row);
  }
  T inverse_of(Row row) const { return facts(row)[0]; }
  T product_of(Row row) const { return facts(row)[problem_.row_facts.group]; }

  // out = d dO
  T* weighted_grad_out(Row row, T* out) {
    const T* grad = this->grad_out(row.head).row(row.row, out);
    const typename Simd<T>::Reg inverse = Simd<T>::broadcast(inverse_of(row));
    for (int e = 0; e < this->padded_value_dim_; e += Simd<T>::width)
      Simd<T>::storeu(out + e, Simd<T>::mul(inverse, Simd<T>::loadu(grad + e)));
    return out;
  }

  using LinearRows<T>::problem_;
};

template <class T>
class LinearValueGradient final : public LinearRowsBackwards<T> {
 public:
  using LinearRowsBackwards<T>::LinearRowsBackwards;
  static typename Sweep<T>::Sizes sizes(const LinearProblem& p) {
    return {static_cast<int>(p.head_dim), static_cast<int>(p.value_dim), 0};
  }

  const T* writer(std::int64_t w, T* f, T* buffer) override {
    const Row row = this->writer_row(w);
    if (this->inverse_of(row) == T(0)) return nullptr;
    this->phi_of_query_row(row, f);
    return this->weighted_grad_out(row, buffer);
  }
  void reader(std::int64_t r, T* x) override { this->phi_of_key_row(this->reader_key(r), x); }
  void finish(std::int64_t r, const T*, T* y) override {
    const std::int64_t j = this->reader_key(r);
    if (this->unseen(j)) this->zeros(y, this->padded_value_dim_);
    this->store(y, this->value_dim_, problem_.grad_value, this->kv_head_, j);
  }

  void expect_writer(std::int64_t w) const override { this->expect_row(this->writer_row(w)); }
  void expect_reader(std::int64_t r) const override {
    const std::int64_t j = this->reader_key(r);
    this->template prefetch<0>(problem_.key, this->kv_head_, j, this->head_dim_);
    this->template prefetch<1>(problem_.grad_value, this->kv_head_, j, this->value_dim_);
  }

  StateView<const double> start() const override {
    if (!problem_.grad_final_state.sum) return {};
    return {problem_.grad_final_state.sum + this->state_at(), this->value_dim_, 1, nullptr, nullptr};
  }

 private:
  using LinearRows<T>::problem_;
};

template <class T>
class LinearKeyGradient final : public LinearRowsBackwards<T> {
 public:
  using LinearRowsBackwards<T>::LinearRowsBackwards;
  static typename Sweep<T>::Sizes sizes(const LinearProblem& p) {
    return {static_cast<int>(p.value_dim) + 1, static_cast<int>(p.head_dim), 0};
  }
  static SweepOrder order(const LinearSequence& sequence) {
    SweepOrder order = LinearRowsBackwards<T>::order(sequence);
    order.needs_end = sequence.problem.grad_state.sum != nullptr;
    return order;
  }

  const T* writer(std::int64_t w, T* f, T* buffer) override {
    const Row row = this->writer_row(w);
    if (this->inverse_of(row) == T(0)) return nullptr;
    this->weighted_grad_out(row, f);
    f[value_dim_] = -this->product_of(row);
    return this->phi_of_query_row(row, buffer);
  }
  void reader(std::int64_t r, T* x) override {
    const std::int64_t j = this->reader_key(r);
    const int padded = round_up(value_dim_ + 1, lanes<T>);
    this->copy(this->value_.row(j, x), value_dim_, x);
    x[value_dim_] = T(1);
    std::fill(x + value_dim_ + 1, x + padded, T(0));
  }
  void finish(std::int64_t r, const T*, T* y) override {
    const std::int64_t j = this->reader_key(r);
    if (this->unseen(j)) {
      this->zeros(y, this->padded_head_dim_);
    } else {
      const T* phi = this->phi_of_key_row(j, phi_);
      const typename S::Reg one = S::broadcast(T(1));
      for (int d = 0; d < this->padded_head_dim_; d += S::width)
        S::storeu(y + d, S::mul(S::loadu(y + d), S::min(one, S::loadu(phi + d))));
    }
    this->store(y, this->head_dim_, problem_.grad_key, this->kv_head_, j);
  }

  void expect_writer(std::int64_t w) const override { this->expect_row(this->writer_row(w)); }
  void expect_reader(std::int64_t r) const override {
    const std::int64_t j = this->reader_key(r);
    this->expect_key(j);
    this->template prefetch<1>(problem_.grad_key, this->kv_head_, j, this->head_dim_);
  }

  StateView<const double> start() const override { return view(problem_.grad_final_state); }
  StateView<double> end() const override { return view(problem_.grad_state); }

 private:
  using S = Simd<T>;
  using LinearRows<T>::problem_, LinearRows<T>::value_dim_;

  template <class Double>
  StateView<Double> view(const LinearStateOf<Double>& state) const {
    if (!state.sum) return {};
    return {state.sum + this->state_at(), 1, value_dim_, state.normal + this->normal_at(), nullptr};
  }

  alignas(64) T phi_[LinearRows<T>::max_dim];
};
