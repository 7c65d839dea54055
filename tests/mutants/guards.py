"""The guards of the kernels: what each is for, what becomes of it in a mutant, and the tests that must notice.

`old` stands exactly once in its file; tests/test_mutants.py holds the tables to that, so that a guard whose code moves
takes its line here along.
"""

from dataclasses import dataclass

FAULTS = "tests/faults/"
NAN, EMPTY, EXTREME = (FAULTS + f"test_{name}.py" for name in ("nan_and_inf", "empty_rows", "extreme_numbers"))
LIMITS, SUBSETS, RANDOM = (FAULTS + f"test_{name}.py" for name in ("limits", "gradient_subsets", "randomness"))
REPEAT, PROCESS, LINEAR = (FAULTS + f"test_{name}.py" for name in ("determinism", "process", "linear"))

LINEAR_RESULTS = "tests/test_linear.py::test_kernels_are_the_reference"


@dataclass(frozen=True)
class Guard:
    what: str
    tests: list
    old: str
    new: str


# Compiled with the portable kernels alone.
PORTABLE = {
    "csrc/cpu/pack.h": [
        Guard("zero_non_finite", [NAN], "if (!is_finite(panels[i])) panels[i] = T(0);", ";"),
        Guard("add_non_finite", [NAN], "if (!is_finite(row[d])) out[d] += weight * row[d];", ";"),
    ],
    "csrc/cpu/products.h": [
        Guard(
            "values that are not finite are noticed",
            [NAN],
            "values_finite_ = is_finite(S::reduce_add(finite));",
            "values_finite_ = true;",
        ),
    ],
    "csrc/cpu/forward.h": [
        Guard(
            "non-finite values are added back",
            [NAN],
            "if (!products_.values_finite()) add_hidden_non_finite(group, block, rows, first, keys, live);",
            "",
        ),
        Guard("only for the rows that see them", [NAN], " && visibility.sees(begin_ + block + r, first + c))", ")"),
        Guard(
            "maximum of a row that sees nothing",
            [EMPTY],
            "maximum[r] = best == -infinity<T> ? T(0) : best;",
            "maximum[r] = best;",
        ),
        Guard("divisor of a row that sees nothing", [EMPTY], "S::broadcast(l == T(0) ? T(1) : l)", "S::broadcast(l)"),
        Guard(
            "hidden scores",
            [EMPTY, NAN],
            "if (tile == Visibility::some)\n            visibility.hide",
            "if (false)\n            visibility.hide",
        ),
        Guard("tiles that nobody sees", [EMPTY], "if (tile == Visibility::none) continue;", ""),
        Guard("not before a backward", [REPEAT], " && !problem.lse_low.data)", ")"),
    ],
    "csrc/cpu/few_rows.h": [
        Guard("sums are looked at", [NAN], "if (values_finite_) return;", "return;"),
        Guard("sums are taken again", [NAN], "std::copy_n(before_, elements, out);", ""),
        Guard("copies without NaN", [NAN], "zero_non_finite(copy, padded);", ""),
    ],
    "csrc/cpu/softmax.h": [
        Guard(
            "a smallest number is no -inf", [EMPTY], "natural ? maximum + log2_sum * ln_2 : lse2 * ln_2", "lse2 * ln_2"
        ),
        Guard("weighted", [NAN], "return weight == T(0) ? T(0) : weight * x;", "return weight * x;"),
        Guard(
            "an only group has weight 1",
            [EXTREME, EMPTY, NAN],
            "if (lse2[1 - g] == -infinity<double>) {",
            "if (false) {",
        ),
        Guard("clamp of SplitLse", [EXTREME], "high = std::clamp(high, -largest, largest);", ";"),
        Guard("low part of an empty row", [EMPTY, LIMITS], "if (lse == -infinity<T>) return T(0);", ""),
        Guard(
            "weights are at most 1",
            [EXTREME],
            "p[u] = S::min(S::zero(), S::sub(exponent, rest));",
            "p[u] = S::sub(exponent, rest);",
        ),
        Guard(
            "maximum of one that sees nothing",
            [EMPTY],
            "S::broadcast(maximum == -infinity<T> ? T(0) : maximum)",
            "S::broadcast(maximum)",
        ),
        Guard(
            "divisor of one that sees nothing",
            [EMPTY],
            "const T divisor = total == T(0) ? T(1) : total;",
            "const T divisor = total;",
        ),
        Guard("say when they are not finite", [NAN], "return is_finite(total) && is_finite(offset);", "return true;"),
    ],
    "csrc/cpu/small.h": [
        Guard("hidden scores", [EMPTY, NAN], "hide<registers>(weights, -infinity<T>);", ""),
        Guard(
            "maximum of a row that sees nothing",
            [EMPTY],
            "S::select_less(S::broadcast(-infinity<T>), best[x], best[x], S::zero())",
            "best[x]",
        ),
        Guard(
            "divisor of a row that sees nothing",
            [EMPTY],
            "S::select_less(l[x], S::broadcast(T(0.5)), S::broadcast(T(1)), l[x])",
            "l[x]",
        ),
        Guard("copies without NaN", [NAN], "if (all) return as_they_are;", "return as_they_are;"),
        Guard("non-finite values are added back", [NAN], "if (value_ != values_as_they_are_) add", "if (false) add"),
        Guard("non-finite keys are added back", [NAN], "if (key_ != keys_as_they_are_) add", "if (false) add"),
        Guard("only for the rows that see them", [NAN], "if (sees(first + r, c))", "if (true)"),
        Guard("hidden products with values", [NAN], "hide<registers>(grads, T(0));\n\n", "\n\n"),
        Guard(
            "hidden weights of a row with NaN",
            [NAN],
            "hide<registers>(weights, T(0)), hide<registers>(grads, T(0));",
            "hide<registers>(grads, T(0));",
        ),
        Guard(
            "hidden gradients of a row with NaN",
            [NAN],
            "hide<registers>(weights, T(0)), hide<registers>(grads, T(0));",
            "hide<registers>(weights, T(0));",
        ),
        Guard("rows without NaN", [NAN], "finite = false, zero_non_finite(panel, feature_panel);", ";"),
        Guard("non-finite rows are added back", [NAN], "!finite && r < count_", "false && r < count_"),
        Guard("only to the keys that they see", [NAN], "if (sees(r, c))", "if (true)"),
    ],
    "csrc/cpu/backward.h": [
        Guard(
            "hidden scores",
            [EMPTY, NAN],
            "visibility_.hide<width>(first_entry, count, strip_rows, key, visible, scores, stride, -infinity<T>);",
            "",
        ),
        Guard("tiles that nobody sees", [EMPTY], "std::fill_n(scores + r * stride, width, -infinity<T>);", ""),
        Guard(
            "hidden products with values",
            [NAN],
            "visibility_.hide<width>(first_entry, count, strip_rows, key, visible, grads, stride, T(0));",
            "",
        ),
        Guard(
            "hide again after differentiating",
            [NAN],
            "if (!visibility_.sees(entry, first + k)) weights[k] = grads[k] = T(0);",
            ";",
        ),
        Guard(
            "rows that see nothing have weights 0",
            [EMPTY, LIMITS],
            "if (g.lse2.high != -infinity<T>) lse2_[r] = g.lse2;",
            "lse2_[r] = g.lse2;",
        ),
        Guard("gradients of hidden keys are written", [NAN, EMPTY], "if (item_.part == 0) write_hidden_keys();", ""),
        Guard(
            "whole rows only where one block holds all keys",
            [SUBSETS, EXTREME],
            "if (keys_.size > key_block) return false;",
            "",
        ),
        Guard(
            "whole rows only where one group is seen",
            [LIMITS, EXTREME, RANDOM],
            "if (problem_.groups() == 1 || !problem_.joint()) return true;",
            "return true;",
        ),
        Guard(
            "non-finite numbers are added back to those who see them",
            [NAN],
            "if (!visibility_.sees(entry + r, first + c + k)) continue;",
            "",
        ),
        Guard(
            "a slope of NaN stays hidden",
            [NAN],
            "grads[k] = weighted(grads[k], slopes_[r * stride + k]);",
            "grads[k] = grads[k] * slopes_[r * stride + k];",
        ),
        Guard("a weight of 0 hides the output", [NAN], "product = weighted(w, product);", "product = w * product;"),
        Guard(
            "an out too large for its storage where no gradient arrives",
            [EXTREME],
            "product += weighted(grad[d], out[d]);",
            "product += grad[d] * out[d];",
        ),
        Guard(
            "partials start from zero",
            [SUBSETS, REPEAT],
            "if (!*touched) std::fill_n(block, rows * from_.padded_head_dim, T(0));",
            "",
        ),
    ],
    "csrc/cpu/gradients.h": [
        Guard(
            "keys that are not finite",
            [NAN],
            "keys_finite_ = is_finite(S::reduce_add(finite));",
            "keys_finite_ = true;",
        ),
        Guard(
            "queries that are not finite",
            [NAN],
            "queries_finite_ = is_finite(S::reduce_add(query_finite));",
            "queries_finite_ = true;",
        ),
        Guard(
            "gradients that are not finite",
            [NAN],
            "grads_finite_ = is_finite(S::reduce_add(grad_finite));",
            "grads_finite_ = true;",
        ),
    ],
    "csrc/cpu/schedule.cpp": [
        Guard(
            "shared biases one after the other",
            [SUBSETS, REPEAT],
            "if (alone || waves.back()",
            "if (waves.empty() || waves.back()",
        ),
    ],
    "csrc/cpu/rows.h": [
        Guard(
            "a bias of -inf hides",
            [EMPTY, NAN],
            "for (int c = 0; c < width; ++c) out[c] &= bias[r][c] != -infinity<T>;",
            ";",
        ),
        Guard("one pair: a bias of -inf hides", [EMPTY, NAN], "return !hidden;", "return true;"),
        Guard("one pair: a mask hides", [NAN], "* mask.feature]) return false;", "* mask.feature]) return true;"),
    ],
    "csrc/cpu/scores.h": [
        Guard(
            "a bias that is not finite is noticed", [NAN], "return is_finite(S::reduce_add(finite));", "return true;"
        ),
    ],
    "csrc/core/plan.cpp": [
        Guard(
            "rows past the last offset",
            [LIMITS, NAN],
            "if (rest.q_len || rest.k_len) plan.sequences",
            "if (false) plan.sequences",
        ),
        Guard("windows do not overflow", [LIMITS], "left = std::min(left, reach), right = std::min(right, reach);", ""),
    ],
    "csrc/torch/executor.h": [
        Guard(
            "a forked child runs on one thread",
            [PROCESS],
            "at::in_parallel_region() || is_forked_child ? 1",
            "at::in_parallel_region() ? 1",
        ),
    ],
    "csrc/torch/arguments.cpp": [
        Guard(
            "no gradient of an empty bias",
            [LIMITS],
            "attn_mask_gradient && attn_mask_.defined() && attn_mask_.is_floating_point()",
            "attn_mask_gradient && p.bias.data",
        ),
    ],
    "csrc/cpu/linear_sweep.h": [
        Guard("values that are not finite leave G", [LINEAR], "if (!finite_) find_non_finite();", ""),
        Guard(
            "non-finite values are added back to the state", [LINEAR], "if (!finite_) advance_non_finite(apart);", ""
        ),
        Guard("non-finite values are added back for readers", [LINEAR], "if (seen && !finite_)", "if (false)"),
        Guard("only for readers that see them", [LINEAR], "if (w < visible[r]) add_non_finite", "add_non_finite"),
        Guard("scores of what a reader does not see", [LINEAR], "scores_[r * stride + w] = T(0);", ";"),
        Guard(
            "a hidden writer adds nothing",
            [LINEAR_RESULTS],
            "if (!g) std::fill_n(f, sizes_.depth, T(0)), g = zero_;",
            "if (!g) g = zero_;",
        ),
    ],
    "csrc/cpu/linear_forward.h": [
        Guard("keys that are masked", [LINEAR], "if (sequence_.hides_key(j)) return nullptr;", ""),
        Guard(
            "queries that see nothing",
            [LINEAR],
            "if (this->sees_nothing(row)) this->zeros(x, padded_head_dim_);\n    else this",
            "this",
        ),
        Guard(
            "a sum of weights that underflows",
            [LINEAR],
            "std::abs(x) < std::numeric_limits<T>::min() ? T(0) : T(1) / x",
            "T(1) / x",
        ),
    ],
    "csrc/cpu/linear_backward.h": [
        Guard("dQ: keys that are masked", [LINEAR], "if (sequence_.hides_key(j)) return nullptr;", ""),
        Guard("dQ: rows that see nothing", [LINEAR], "if (this->sees_nothing(row)) {", "if (false) {"),
        Guard(
            "dV: rows that see nothing",
            [LINEAR],
            "if (this->inverse_of(row) == T(0)) return nullptr;\n    this->phi",
            "this->phi",
        ),
        Guard(
            "dV: gradients of keys that nobody sees",
            [LINEAR],
            "if (this->unseen(j)) this->zeros(y, this->padded_value_dim_);",
            "",
        ),
        Guard(
            "dK: rows that see nothing",
            [LINEAR],
            "if (this->inverse_of(row) == T(0)) return nullptr;\n    this->weighted",
            "this->weighted",
        ),
        Guard("dK: gradients of keys that nobody sees", [LINEAR], "if (this->unseen(j)) {", "if (false) {"),
    ],
    "csrc/cpu/feature_map.h": [
        Guard("a scale where all features are negative", [LINEAR], "largest < T(0) ? largest : T(0)", "T(0)"),
        Guard(
            "a scale where a feature is huge", [LINEAR], "largest > T(1 << 20) ? T(1) / (T(1) + largest) : T(1)", "T(1)"
        ),
    ],
}

# Compiled with every instruction set; run with the tests of this one alone, where the processor has it.
AMX = {
    "csrc/cpu/amx_tiles.h": [
        Guard(
            "numbers that are not finite become 0",
            [NAN],
            "_mm512_store_si512(numbers + i, _mm512_maskz_mov_epi16(finite, x));",
            ";",
        ),
        Guard("numbers that are not finite are noticed", [NAN], "finite.see(x[i]);", ";"),
        Guard(
            "a scale of 0 hides the query",
            [EXTREME],
            "const __mmask32 kept = !row || factor == 0 ? 0",
            "const __mmask32 kept = !row ? 0",
        ),
    ],
    "csrc/cpu/amx_products.h": [
        Guard("values are looked at", [NAN], "values_finite_ &=\n          pack", "pack"),
        Guard(
            "weights changed by dropout are kept",
            [RANDOM],
            "store_parts<3>(first, second, x, rest(row) + c);",
            ";",
        ),
    ],
    "csrc/cpu/amx_few_rows.h": [
        Guard("a scale of 0 hides the query", [EXTREME], "query_factor_ == 0.0f ? BFloat16(0.0f) : ", ""),
    ],
    "csrc/cpu/amx_gradients.h": [
        Guard("keys that are not finite", [NAN], "keys_finite_ &= pack", "pack"),
        Guard("queries that are not finite", [NAN], "queries_finite_ &= pack", "pack"),
        Guard("gradients that are not finite", [NAN], "grads_finite_ &= pack", "pack"),
        Guard("a weight of 0 hides the gradient", [NAN], "if (weight[r] != 0.0f) return", "if (true) return"),
        Guard(
            "weights beyond the rows",
            [NAN, EMPTY, LIMITS],
            "here ? _mm512_load_ps(scores(first + r) + at) : _mm512_setzero_ps()",
            "_mm512_load_ps(scores(first + r) + at)",
        ),
        Guard(
            "gradients beyond the rows",
            [NAN, EMPTY, LIMITS],
            "here ? _mm512_load_ps(grads(first + r) + at) : _mm512_setzero_ps()",
            "_mm512_load_ps(grads(first + r) + at)",
        ),
    ],
}
