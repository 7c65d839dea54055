"""Series of linear attention: how time and memory grow with the length, to 256k tokens; one forward of a million.

Softmax attention, which computes something else, is timed beside it as far as a call takes about a second.
"""

import math
import statistics
import time

import torch

from mmca_ext import functional

from . import peers
from .cases import Case
from .timing import interleave

HEADS, DIM = 2, 64
LENGTHS = [2**exponent for exponent in range(12, 19)]
CUMULATIVE_UP_TO = 2**12  # at 16 KB a token and head, a second a call
SOFTMAX_UP_TO = {True: 2**15, False: 2**14}  # causal, which is half the work, or not
FEWER_ROUNDS_FROM = 2**16
SERIES = {"linear attention": False, "causal linear attention": True}
MILLION, CALLS = 2**20, 16
EXPONENT_GOAL = 1.03


def point(name, length, is_causal, **more):
    shape = (1, HEADS, length, DIM)
    return Case(
        f"{name}, {length} tokens",
        lambda q, k, v: functional.linear_attention(q, k, v, is_causal),
        shapes=(shape,) * 3,
        # A key is added to a state, a row reads it; what a chunk needs besides is the kernel's own affair.
        flops=4 * HEADS * length * DIM * DIM,
        label="fp32, causal" if is_causal else "fp32",
        size=f"batch 1, {HEADS} heads of {DIM}, {length} tokens",
        rounds=5 if length >= FEWER_ROUNDS_FROM else 7,
        **more,
    )


def softmax(is_causal):
    return {
        "softmax, SDPA": lambda q, k, v: peers.sdpa(q, k, v, is_causal=is_causal),
        "softmax, ours": lambda q, k, v: functional.attention(q, k, v, None, 0.0, is_causal),
    }


def in_calls(query, key, value):
    """One call after the other, each going on from the state of those before; their outputs are used up one by one."""
    state = None
    for part in zip(*(t.split(t.shape[2] // CALLS, 2) for t in (query, key, value)), strict=True):
        out, state = functional.linear_attention(*part, True, state=state, return_state=True)
    return out


def all_series():
    """({"series", "x"}, case) for every point of every series."""
    for name, is_causal in SERIES.items():
        for length in LENGTHS:
            plain = {"torch, chunked": peers.linear_chunked} if is_causal else {"torch": peers.linear_products}
            if is_causal and length <= CUMULATIVE_UP_TO:
                plain["torch, cumulative"] = peers.linear_cumulative
            beside = softmax(is_causal) if length <= SOFTMAX_UP_TO[is_causal] else {}
            yield {"series": name, "x": length}, point(name, length, is_causal, peers=plain, beside=beside)
    beside = {f"ours in {CALLS} calls": in_calls}
    case = point("causal linear attention", MILLION, True, peers={}, beside=beside, backward=False)
    yield {"series": "causal linear attention", "x": MILLION}, case


def exponents(rows, seconds):
    """How time grows with length, as its power, in each series and direction of the rows. Ours is measured once more,
    all lengths in turn (in_turn). The peers' are of the rows' medians."""
    times = {}
    for row in rows:
        times.setdefault((row["series"], row["direction"]), {}).setdefault(row["peer"], {})[row["x"]] = row["peer_us"]
    found = []
    for (series, direction), peers_times in times.items():
        lengths = sorted({x for points in peers_times.values() for x in points} & set(LENGTHS))
        if len(lengths) < 3:
            continue
        slopes = [slope(dict(zip(lengths, turn, strict=True))) for turn in in_turn(series, direction, lengths, seconds)]
        place = {"series": series, "direction": direction}
        found.append(
            {
                **place,
                "what": "ours",
                "exponent": statistics.median(slopes),
                "from": lengths[0],
                "to": lengths[-1],
                "goal": EXPONENT_GOAL,
            }
        )
        for peer, points in peers_times.items():
            if len(points) >= 3:
                fit = {"exponent": slope(points), "from": min(points), "to": max(points), "goal": None}
                found.append({**place, "what": peer, **fit})
    return found


def in_turn(series, direction, lengths, seconds):
    """Seconds of ours at every length, for each round: of one thread, by its own processor time, since a long call
    waits for other programs and a short one does not."""
    case = point(series, lengths[-1], SERIES[series], peers={})
    longest = [t.detach() for t in case.tensors()]
    inputs = [[t[:, :, :length].requires_grad_() for t in longest] for length in lengths]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        if direction == "forward":
            turns = [lambda parts=parts: case.ours(*(t.detach() for t in parts)) for parts in inputs]
        else:
            outs = [case.ours(*parts) for parts in inputs]
            wanted = zip(outs, inputs, [torch.randn_like(out) for out in outs], strict=True)
            turns = [lambda turn=turn: torch.autograd.grad(*turn, retain_graph=True) for turn in wanted]
        return list(zip(*interleave(turns, seconds, clock=time.thread_time), strict=True))
    finally:
        torch.set_num_threads(threads)


def slope(points):
    """Of the straight line through {x: y} with logarithmic axes, by least squares."""
    xs, ys = ([math.log(value) for value in values] for values in (points, points.values()))
    x, y = statistics.fmean(xs), statistics.fmean(ys)
    return sum((a - x) * (b - y) for a, b in zip(xs, ys, strict=True)) / sum((a - x) ** 2 for a in xs)
