"""Timing two or more callables side by side on a machine that others use too."""

import statistics
import time


def interleave(callables, seconds=2.0, at_least=7, clock=time.perf_counter):
    """Runs the callables in turn, A B C A B C ..., for about `seconds` in all, after two uncounted rounds.

    Returns one list of seconds per callable; entry i of every list was measured in the same round.
    """
    for _ in range(2):
        for call in callables:
            call()
    times = [[] for _ in callables]
    end = time.perf_counter() + seconds
    while len(times[0]) < at_least or time.perf_counter() < end:
        for call, record in zip(callables, times, strict=True):
            start = clock()
            call()
            record.append(clock() - start)
    return times


def ratio(theirs, ours):
    """Median and quartiles of theirs / ours, pair by pair: how many times faster ours is."""
    ratios = sorted(a / b for a, b in zip(theirs, ours, strict=True))
    low, middle, high = statistics.quantiles(ratios, n=4)
    return middle, low, high
