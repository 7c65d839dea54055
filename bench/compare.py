"""Two results files beside each other."""

import math

from .results import about, all_rows

# Facts that make figures of two files hard to compare where they differ.
SETTING = ("cpu", "machine", "threads", "isa", "torch", "torch_cpu_capability", "environment")


def changes(before, after):
    """For each case, direction and peer of both: (key, ratio before, ratio after, spread, verdict).

    The spread is the two interquartile ranges as the legs of a right triangle: what two independent spreads add up to.
    A change beyond it is "faster" or "slower", any other is "".
    """
    earlier = {_key(row): row for row in all_rows(before)}
    compared = []
    for row in all_rows(after):
        old = earlier.get(_key(row))
        if old is None:
            continue
        spread = math.hypot(old["high"] - old["low"], row["high"] - row["low"])
        moved = row["ratio"] - old["ratio"]
        verdict = "" if abs(moved) <= spread else "faster" if moved > 0 else "slower"
        compared.append((_key(row), old["ratio"], row["ratio"], spread, verdict))
    return compared


def show(before, after):
    for fact in SETTING:
        old, new = (about(results).get(fact) for results in (before, after))
        if old != new:
            print(f"note: {fact} differs: {old} and {new}")
    compared = changes(before, after)
    print(f"{'case':52} {'peer':24} {'direction':9} {'before':>8} {'after':>8} {'change':>8} {'spread':>8}")
    for (case, direction, peer), old, new, spread, verdict in compared:
        print(f"{case:52} {peer:24} {direction:9} {old:8.2f} {new:8.2f} {new / old - 1:+8.1%} {spread:8.2f} {verdict}")
    verdicts = [verdict for *_, verdict in compared]
    print(
        f"{len(compared)} compared: {verdicts.count('faster')} faster, {verdicts.count('slower')} slower, "
        f"{verdicts.count('')} within the spread"
    )
    keys = {_key(row) for row in all_rows(before)}, {_key(row) for row in all_rows(after)}
    for only, name in ((keys[0] - keys[1], "first"), (keys[1] - keys[0], "second")):
        if only:
            print(f"only in the {name}: {'; '.join(sorted({case for case, _, _ in only}))}")


def _key(row):
    return row["case"], row["direction"], row["peer"]
