"""How far a result may be from exact arithmetic: a-priori bounds, element by element, for the cases of cases.py."""

import math

import torch

from mmca_ext.reference.philox import dropout_threshold


def weight_rounding(case):
    """The relative error of a weight that tensor cores take: rounded to nearest in 16 bits on CUDA, not on the CPU."""
    return torch.finfo(case.dtype).eps / 2 if case.device != "cpu" and case.dtype.itemsize == 2 else 0.0


def bounds(case, exact, w16=0.0):
    """Bounds on the errors of out, lse, dq, dk, dv, of the bias' gradient db and the gate's dg: a dict of tensors.

    First-order rounding analysis of the textbook algorithm, with e the machine epsilon of the result, u that of the
    arithmetic, S_i = |scale| |q_i| max_j |k_j| + max_j |bias_ij| the size of a row's scores (Cauchy-Schwarz), n the
    number of terms of a sum:

        a_i  = u (4 + sqrt(n) + S_i)      relative error of a weight exp(s - lse): u S from its rounded score and lse, a
                                          few u from exp and the division, sqrt(n) u from the sum (errors of random
                                          sign; Higham and Mary 2019, "A new approach to probabilistic rounding error
                                          analysis")
        out  : e |out| + 2 a max|v|       the weights sum to 1, errors of numerator and denominator
        lse  : u |lse| + a                the logarithm turns a relative into an absolute error
        dv   : e |dv| + a sqrt(n) max|dO|                             n rows, each weight at most 1
        dS   : (a + e16) A                A = |dO| |v| + |dlse|: dS = P (dP - D + dlse); |dP|, |D| <= |dO| |v|
        dq   : e |dq| + dS |scale| max|k|
        dk   : e |dk| + dS sqrt(n) |scale| max|q|
        db   : e |db| + dS sqrt(n)                                    n pairs share an element
        dg   : e |dg| + sqrt(n) (2 a max|v| |dO|_1 + u |dO|_1 max|v|) dg = rowsum(dO O_r); n rows share an element

    w16, if given, is weight_rounding: the weights that multiply v, dO and make O_r are off by as much, but not those
    that are summed for lse. So out has w16 max|v| more, dv has w16 where it has a, dg has w16 where it has 2 a. dS is
    rounded too before it multiplies k and q, but not for db, and |dS| <= 2 A: dq and dk have 2 w16 A more. D reads an
    out that is off by e16 / 2 and by w16 = e16 / 2: no more than the e16 A that dS has anyway.

    e16 is e where D = rowsum(dO out) reads an out of 16 bits, else 0. Dropout multiplies weights by z = 1 / (1 - p),
    hence v and dO in the products, and so does a gate w; separate softmaxes that are added (merge "sum") add their
    errors. A softcap adds u softcap to S, from the tanh. In float64 the reference in float64 has the same error once
    more, and there is no better one to judge terms whose errors have one sign (equal keys): n itself stands for
    sqrt(n). What sees nothing, or is seen by nothing, must be exactly zero. A 16-bit result may be off by half its
    smallest number, too.
    """
    mmca = case.op == "mmca_attention"
    u, groups = torch.finfo(case.statistic_dtype).eps, 2 if mmca else 1
    e16 = torch.finfo(case.dtype).eps if case.dtype not in (torch.float32, torch.float64) else 0.0
    double = case.dtype == torch.float64
    oracle, root = (2.0, float) if double else (1.0, math.sqrt)
    scale = abs(case.kwargs.get("scale", case.head_dim**-0.5))
    seen = case.visible()
    by_head = seen.any(0)
    row_seen, key_seen = by_head.any(-1), by_head.any(-2).unflatten(1, (case.kv_heads, case.share)).any(2)

    threshold = dropout_threshold(case.kwargs.get("dropout_p", 0.0))
    z = 65536 / (65536 - threshold) if threshold < 65536 else 0.0
    if groups == 2:
        z = max(z, 1.0)  # an image row's own value is not dropped

    def of_row(t):  # (B, Hkv, ...) -> (B, Hq, ...)
        return t.repeat_interleave(case.share, 1)

    def of_key(t):  # the largest over a group's rows: (B, Hq, Lq) -> (B, Hkv, 1)
        return largest(t.unflatten(1, (case.kv_heads, case.share)).flatten(2))

    def largest(t):  # of a possibly empty last dimension
        return t.amax(-1, keepdim=True) if t.shape[-1] else t.new_zeros(*t.shape[:-1], 1)

    query, key, value = (case.dense(t).double() for t in (case.query, case.key, case.value))
    query = query.masked_fill(~row_seen[..., None], 0.0)
    key, value = (t.masked_fill(~key_seen[..., None], 0.0) for t in (key, value))
    grad_out = case.dense(case.grad_out).double() if case.grads_arrive != "lse" else torch.zeros_like(query[..., :1])
    if grad_out.dim() == 5:  # the groups' outputs stay apart
        grad_out = grad_out.movedim(0, -1).flatten(-2)
    grad_lse = case.grad_lse.double().abs() if case.grads_arrive != "out" else torch.zeros(())
    if grad_lse.dim() and mmca:
        grad_lse = grad_lse.sum(0)
    if grad_lse.dim() and case.packed:
        grad_lse = grad_lse[None]

    gate = torch.ones(())
    if "gate" in case.kwargs:
        rows = (case.q_len, case.heads) if case.packed else (case.batch, case.heads, case.q_len)
        gate = case.kwargs["gate"].double().abs().expand(*rows, 2).amax(-1)
        gate = gate.transpose(0, 1)[None] if case.packed else gate

    size = scale * query.norm(dim=-1) * of_row(largest(key.norm(dim=-1)))
    bias = case.kwargs.get("attn_mask")
    if bias is not None and bias.is_floating_point():
        bias = bias.double().masked_fill(bias == -math.inf, 0.0).abs()
        bias = bias.expand(case.batch, case.heads, case.q_len, case.k_len)
        size = size + largest(bias).squeeze(-1)
    size = size + case.kwargs.get("softcap", 0.0)
    a = oracle * groups * u * (4 + root(case.k_len) + size)  # (B, Hq, Lq)
    rows = root(max(1, case.q_len * case.share))
    value_size = of_row(largest(value.abs().flatten(2)))
    arrives = z * gate * grad_out.norm(dim=-1) * of_row(largest(value.norm(dim=-1))) + grad_lse
    score_gradient = (a + e16) * arrives
    rounded_gradient = score_gradient + 2 * w16 * arrives  # as dq and dk take it

    bound = {
        "out": z * gate * (2 * a + groups * w16) * value_size,
        "lse": a if groups == 1 else torch.stack((a, a)),
        "dq": rounded_gradient * scale * of_row(largest(key.abs().flatten(2))),
        "dk": rows * scale * of_key(rounded_gradient * query.abs().amax(-1)),
        "dv": rows * of_key(z * gate * (a + groups * w16) * grad_out.abs().amax(-1)),
    }
    pairs = case.batch * case.heads * case.q_len * case.k_len
    if "db" in exact:
        bound["db"] = root(pairs / max(1, exact["db"].numel())) * largest(score_gradient.flatten())
    if "dg" in exact:
        output_error = z * (2 * a + u + w16) * value_size * grad_out.abs().sum(-1)
        bound["dg"] = root(2 * a.numel() / max(1, exact["dg"].numel())) * largest(output_error.flatten())
    for name in ("out", "dq"):
        bound[name] = bound[name].masked_fill(~row_seen, 0.0)[..., None]
    for name in ("dk", "dv"):
        bound[name] = bound[name].expand(key_seen.shape).masked_fill(~key_seen, 0.0)[..., None]
    if case.packed:  # back to (T, H, ...), and lse (..., H, T)
        for name in ("out", "dq", "dk", "dv"):
            bound[name] = bound[name][0].transpose(0, 1)
        bound["lse"] = bound["lse"].squeeze(-3)

    dtypes = {"lse": case.statistic_dtype, "db": getattr(case.kwargs.get("attn_mask"), "dtype", None)}
    dtypes["dg"] = getattr(case.kwargs.get("gate"), "dtype", None)
    result = {}
    for name, t in exact.items():
        info = torch.finfo(dtypes.get(name, case.dtype))
        smallest = 0.0 if info.bits > 16 else info.smallest_normal * info.eps / 2
        result[name] = oracle * max(info.eps, u) * t.abs() + bound[name] + torch.where(t != 0, smallest, 0.0)
    return result
