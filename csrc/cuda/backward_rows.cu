// What the backward needs of each row before it meets a key (RowFacts), and the gradient of the gates. Notation:
// cpu/backward.h. For group r with weight w_r in the merge:
//
//     offset = w_r rowsum(dO X_r) - dlse_r,  X_r = out (joint softmax), O_r (else);     dw_r = rowsum(dO O_r)
//
// A warp a row, neighbouring lanes on neighbouring features.
#include "cuda/launch.h"
#include "cuda/row_results.cuh"

namespace mmca::cuda {
namespace {

constexpr int rows_threads = 256, warp_lanes = 32;

template <class T>
class BackwardRows {
 public:
  PRIM BackwardRows(const Problem& problem, const DevicePlan& plan, RowFacts<T>* facts)
      : problem_(problem),
        facts_(facts),
        head_(static_cast<std::int64_t>(blockIdx.x) % problem.q_heads),
        tile_(tile_of(problem, plan, static_cast<std::int64_t>(blockIdx.x) / problem.q_heads, plan_tile, false)),
        lane_(static_cast<int>(threadIdx.x) % warp_lanes) {}

  PRIM void run() const {
    for (int r = static_cast<int>(threadIdx.x) / warp_lanes; r < tile_.count; r += rows_threads / warp_lanes)
      run_row(tile_.first + r);
  }

 private:
  PRIM void run_row(std::int64_t row) const {
    const bool natural = problem_.shapes_scores();
    const int groups = problem_.groups();
    RowFacts<T> facts[2] = {};
    double exact[2] = {-infinity<double>(), -infinity<double>()};
    T weight[2] = {T(1), T(1)};
#pragma unroll
    for (int g = 0; g < 2; ++g) {
      facts[g].lse = infinity<T>();
      if (g >= groups) continue;
      const T lse = ld_global(statistic<T>(problem_.lse, tile_.sequence, g, head_, row));
      if (lse == -infinity<T>()) continue;
      facts[g].lse = natural ? lse : exponent_of_2(lse);
      if (problem_.lse_low.data)
        facts[g].low = ld_global(statistic<T>(problem_.lse_low, tile_.sequence, g, head_, row));
      exact[g] = facts[g].lse + facts[g].low * (natural ? ln_2 : 1.0);
    }
    if (groups == 2) merge_weights(problem_, tile_.sequence, head_, row, exact, weight);
#pragma unroll
    for (int g = 0; g < 2; ++g) {
      if (g >= groups) continue;
      Products product{0.0, 0.0};
      if (facts[g].lse != infinity<T>()) {
        product = output_products(g, row);
        facts[g].weight = weight[g];
        const double sum = product.plain - product.plain == 0.0 ? product.plain : product.hidden;
        double offset = weighted(static_cast<double>(weight[g]), sum);
        if (problem_.grad_lse.data) offset -= ld_global(statistic<T>(problem_.grad_lse, tile_.sequence, g, head_, row));
        facts[g].offset = static_cast<T>(offset);
      }
      if (lane_ != 0) continue;
      prim::st_global(facts_ + facts_index(problem_, tile_.sequence, g, head_, row), facts[g]);
      if (problem_.grad_gate.data)
        prim::st_global(statistic<T>(problem_.grad_gate, tile_.sequence, g, head_, row), static_cast<T>(product.plain));
    }
  }

  // log2(e) lse, finite where lse is.
  PRIM static T exponent_of_2(T lse) {
    constexpr T largest = std::numeric_limits<T>::max();
    const T exponent = lse * static_cast<T>(log2_e);
    if (lse == infinity<T>()) return exponent;
    return exponent > largest ? largest : exponent < -largest ? -largest : exponent;
  }

  // rowsum(dO X_r), and the same where a feature without a gradient hides what X holds: an `out` too large for 16 bits
  // does not spoil the row then.
  struct Products {
    double plain, hidden;
  };

  PRIM Products output_products(int group, std::int64_t row) const {
    if constexpr (sizeof(T) == 8) return products_of<double>(group, row);
    else if (problem_.dtype == DType::bf16) return products_of<BFloat16>(group, row);
    else if (problem_.dtype == DType::f16) return products_of<Float16>(group, row);
    else return products_of<float>(group, row);
  }

  template <class S>
  PRIM Products products_of(int group, std::int64_t row) const {
    const Sequence& sequence = tile_.sequence;
    if (problem_.keeps_group_out())
      return sum<S, T>(group, row, statistic<T>(problem_.group_out, sequence, group, head_, row), 0, 1);
    const Output& out = problem_.out;
    return sum<S, S>(group, row, out.data, row_offset(out, sequence, sequence.q_begin, head_, row) + group * out.group,
                     out.feature);
  }

  template <class S, class X>
  PRIM Products sum(int group, std::int64_t row, const void* x, std::int64_t first, std::int64_t step) const {
    const Input& grad = problem_.grad_out;
    const std::int64_t at = row_offset(grad, tile_.sequence, tile_.sequence.q_begin, head_, row) + group * grad.group;
    using Sum = std::conditional_t<sizeof(S) == 2, float, double>;  // exact enough for the inputs
    Sum plain = Sum(0), hidden = Sum(0);
#pragma unroll 4
    for (std::int64_t d = lane_; d < problem_.value_dim; d += warp_lanes) {
      const Sum dy = number_of<Sum, S>(grad.data, at + d * grad.feature), y = number_of<Sum, X>(x, first + d * step);
      plain += dy * y;
      hidden += weighted(dy, y);
    }
#pragma unroll
    for (int mask = warp_lanes / 2; mask > 0; mask /= 2) {
      plain += prim::shfl_xor(plain, mask);
      hidden += prim::shfl_xor(hidden, mask);
    }
    return {plain, hidden};
  }

  const Problem& problem_;
  RowFacts<T>* facts_;
  const std::int64_t head_;
  const Tile tile_;
  const int lane_;
};

template <class T>
__global__ void __launch_bounds__(rows_threads)
    backward_rows_kernel(const __grid_constant__ Problem problem, const __grid_constant__ DevicePlan plan,
                         RowFacts<T>* facts) {
  BackwardRows<T>(problem, plan, facts).run();
}

}  // namespace

template <class T>
RowFacts<T>* backward_rows(const Launch& launch) {
  const Problem& problem = launch.problem;
  const std::int64_t tokens = problem.q_offsets ? problem.q_len : problem.batch * problem.q_len;
  auto* facts = launch.take<RowFacts<T>>(problem.groups() * problem.q_heads * tokens);
  launch(&backward_rows_kernel<T>, tile_count(problem, launch.plan, plan_tile, false) * problem.q_heads, rows_threads,
         0, problem, launch.plan, facts);
  return facts;
}

template RowFacts<float>* backward_rows<float>(const Launch& launch);
template RowFacts<double>* backward_rows<double>(const Launch& launch);

}  // namespace mmca::cuda
