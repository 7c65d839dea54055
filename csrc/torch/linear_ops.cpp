// Linear attention: from tensors to a LinearProblem, whatever their device.
#include "torch/linear_ops.h"

#include <ATen/ops/empty.h>

namespace mmca {
namespace {

constexpr const char* op = "mmca_ext.linear_attention";  // as the function is called

// A LinearProblem, and the tensors that own memory it points to. What it shares with attention, Arguments checks.
class LinearArguments {
 public:
  LinearProblem problem;

  LinearArguments(const Tensor& query, const Tensor& key, const Tensor& value, const OptionalTensor& state_S,
                  const OptionalTensor& state_z, const OptionalTensor& key_mask, const OptionalTensor& cu_seqlens_q,
                  const OptionalTensor& cu_seqlens_k, bool is_causal)
      : shared_(op, query, key, value, cu_seqlens_q, cu_seqlens_k, std::nullopt, std::nullopt, /*scale=*/1.0,
                /*softcap=*/0.0, /*is_mmca=*/false),
        packed_(cu_seqlens_q.has_value()) {
    const Problem& s = shared_.problem;
    LinearProblem& p = problem;
    p.dtype = s.dtype, p.batch = s.batch, p.q_heads = s.q_heads, p.kv_heads = s.kv_heads;
    p.q_len = s.q_len, p.k_len = s.k_len, p.head_dim = s.head_dim, p.value_dim = s.value_dim;
    p.q_offsets = s.q_offsets, p.k_offsets = s.k_offsets;
    p.query = s.query, p.key = s.key, p.value = s.value;
    p.causal = is_causal;
    if (key_mask) set_key_mask(*key_mask, query);
    if (state_S || state_z) set_state("state", state_S, state_z, query, state_S_, state_z_, p.state);
  }

  ThreeTensors allocate_results(const Tensor& query, bool return_state) {
    LinearProblem& p = problem;
    std::vector<std::int64_t> shape = query.sizes().vec();
    shape.back() = p.value_dim;
    // Heads inside rows where the query has them so, as all operators do.
    const bool swap = !packed_ && query.stride(1) < query.stride(2);
    if (swap) std::swap(shape[1], shape[2]);
    Tensor out = at::empty(shape, query.options());
    if (swap) out = out.transpose(1, 2);
    p.out = rows<Output>(out, out.mutable_data_ptr());
    const auto [S, z] = empty_state(query, return_state);
    if (return_state) p.final_state = {S.mutable_data_ptr<double>(), z.mutable_data_ptr<double>()};
    return {out, S, z};
  }

  void set_gradients(const Tensor& grad_out, const OptionalTensor& grad_S, const OptionalTensor& grad_z,
                     const Tensor& query, const Tensor& key, const Tensor& value) {
    LinearProblem& p = problem;
    std::vector<std::int64_t> shape = query.sizes().vec();
    shape.back() = p.value_dim;
    TORCH_CHECK_VALUE(grad_out.sizes() == shape, op, ": grad_out must have shape ", at::IntArrayRef(shape), ", got ",
                      grad_out.sizes());
    TORCH_CHECK_TYPE(grad_out.scalar_type() == query.scalar_type(), op, ": grad_out must have the query's dtype ",
                     query.scalar_type(), ", got ", grad_out.scalar_type());
    TORCH_CHECK_VALUE(grad_out.device() == query.device(), op, ": grad_out must be on the query's device ",
                      query.device(), ", got ", grad_out.device());
    grad_out_ = shared_.with_aligned_rows(grad_out);
    p.grad_out = rows<Input>(grad_out_, grad_out_.const_data_ptr());
    if (grad_S || grad_z) set_state("grad", grad_S, grad_z, query, grad_S_, grad_z_, p.grad_final_state);
    shared_.allocate_gradients(query, key, value, /*attn_mask_gradient=*/false);
    p.grad_query = shared_.problem.grad_query, p.grad_key = shared_.problem.grad_key;
    p.grad_value = shared_.problem.grad_value;
    const bool has_state = state_S_.defined();  // if only of no sequence
    std::tie(grad_state_S_, grad_state_z_) = empty_state(query, has_state);
    if (has_state) p.grad_state = {grad_state_S_.mutable_data_ptr<double>(), grad_state_z_.mutable_data_ptr<double>()};
    const std::int64_t batch = packed_ ? 1 : p.batch;
    facts_ = at::empty({2, batch, p.q_heads, p.q_len},
                       query.options().dtype(p.dtype == DType::f64 ? at::kDouble : at::kFloat));
    p.row_facts = {facts_.mutable_data_ptr(), facts_.stride(0), packed_ ? 0 : facts_.stride(1), facts_.stride(2),
                   facts_.stride(3)};
  }
  void run(Operation operation) const { shared_.run(operation, problem); }

  FiveTensors gradients(const OptionalTensor& state_S, const OptionalTensor& state_z) const {
    const Gradients rows = shared_.gradients();
    if (!state_S) return {rows.query, rows.key, rows.value, grad_state_S_, grad_state_z_};
    return {rows.query, rows.key, rows.value, grad_state_S_.to(state_S->scalar_type()),
            grad_state_z_.to(state_z->scalar_type())};
  }

 private:
  void set_key_mask(const Tensor& mask, const Tensor& query) {
    if (!packed_) {
      shared_.set_masks(std::nullopt, mask);
      problem.key_mask = shared_.problem.key_mask;
      return;
    }
    TORCH_CHECK_TYPE(mask.scalar_type() == at::kBool, op, ": key_mask must be a bool tensor (True = attend), got ",
                     mask.scalar_type());
    TORCH_CHECK_VALUE(mask.dim() == 1 && mask.size(0) == problem.k_len, op,
                      ": with cu_seqlens key_mask must have shape (Tk,) = (", problem.k_len, ",), got ", mask.sizes());
    TORCH_CHECK_VALUE(mask.device() == query.device(), op, ": key_mask must be on the query's device ", query.device(),
                      ", got ", mask.device());
    key_mask_ = mask.contiguous();
    problem.key_mask = reinterpret_cast<const std::uint8_t*>(key_mask_.const_data_ptr<bool>());
  }

  // `name`: of the pair. Both or neither; as contiguous doubles.
  void set_state(const char* name, const OptionalTensor& S, const OptionalTensor& z, const Tensor& query,
                 Tensor& kept_S, Tensor& kept_z, LinearStateOf<const double>& state) const {
    const LinearProblem& p = problem;
    TORCH_CHECK_VALUE(S && z, op, ": ", name, "'s S and z go together, got only ", S ? "S" : "z");
    const std::vector<std::int64_t> shape_S{p.batch, p.kv_heads, p.head_dim, p.value_dim},
        shape_z{p.batch, p.kv_heads, p.head_dim};
    TORCH_CHECK_VALUE(S->sizes() == shape_S && z->sizes() == shape_z, op, ": ", name,
                      " must be LinearState(S, z) of shapes ", at::IntArrayRef(shape_S), " and ",
                      at::IntArrayRef(shape_z), ", got ", S->sizes(), " and ", z->sizes());
    for (const Tensor* t : {&*S, &*z}) {
      const at::ScalarType type = t->scalar_type();
      TORCH_CHECK_TYPE(type == at::kDouble || type == at::kFloat, op, ": ", name,
                       " must be float64 or float32 tensors, got ", type);
      TORCH_CHECK_VALUE(t->device() == query.device(), op, ": ", name, " must be on the query's device ",
                        query.device(), ", got ", t->device());
    }
    kept_S = S->to(at::kDouble).contiguous(), kept_z = z->to(at::kDouble).contiguous();
    state = {kept_S.const_data_ptr<double>(), kept_z.const_data_ptr<double>()};
  }

  std::pair<Tensor, Tensor> empty_state(const Tensor& query, bool wanted) const {
    const LinearProblem& p = problem;
    const auto options = query.options().dtype(at::kDouble);
    if (!wanted) return {at::empty({0}, options), at::empty({0}, options)};
    return {at::empty({p.batch, p.kv_heads, p.head_dim, p.value_dim}, options),
            at::empty({p.batch, p.kv_heads, p.head_dim}, options)};
  }

  template <class Operand>
  Operand rows(const Tensor& t, decltype(Operand::data) data) const {
    const std::int64_t dim = packed_ ? 0 : 2, row = t.size(dim) == 1 ? 0 : t.stride(dim);  // as Arguments::strided
    if (packed_) return {data, 0, t.stride(1), row, t.stride(2)};
    return {data, t.stride(0), t.stride(1), row, t.stride(3)};
  }

  Arguments shared_;
  bool packed_;
  Tensor key_mask_, state_S_, state_z_, grad_S_, grad_z_, grad_state_S_, grad_state_z_, facts_, grad_out_;
};

}  // namespace

ThreeTensors linear_attention(const Tensor& query, const Tensor& key, const Tensor& value,
                              const OptionalTensor& state_S, const OptionalTensor& state_z,
                              const OptionalTensor& key_mask, const OptionalTensor& cu_seqlens_q,
                              const OptionalTensor& cu_seqlens_k, bool return_state, bool is_causal) {
  LinearArguments arguments(query, key, value, state_S, state_z, key_mask, cu_seqlens_q, cu_seqlens_k, is_causal);
  const ThreeTensors results = arguments.allocate_results(query, return_state);
  arguments.run(Operation::linear_forward);
  return results;
}

FiveTensors linear_attention_backward(const Tensor& grad_out, const OptionalTensor& grad_S,
                                      const OptionalTensor& grad_z, const Tensor& query, const Tensor& key,
                                      const Tensor& value, const OptionalTensor& state_S, const OptionalTensor& state_z,
                                      const OptionalTensor& key_mask, const OptionalTensor& cu_seqlens_q,
                                      const OptionalTensor& cu_seqlens_k, bool is_causal) {
  LinearArguments arguments(query, key, value, state_S, state_z, key_mask, cu_seqlens_q, cu_seqlens_k, is_causal);
  arguments.set_gradients(grad_out, grad_S, grad_z, query, key, value);
  arguments.run(Operation::linear_backward);
  return arguments.gradients(state_S, state_z);
}

}  // namespace mmca
