"""Figures of a results file: what it lacks is said, and the rest drawn."""

from functools import partial

from .results import Problem, load

OURS, PEERS = "#2f6fab", ("#d9822b", "#2e8b57", "#8e5ea2", "#7f7f7f", "#b22222")
FORWARD, BACKWARD, GOAL = "#2f6fab", "#d9822b", "#222222"
WAYS = ("forward", "backward")


def draw(path, folder, kind):
    """Writes <name of the results>_<figure>.<kind> into the folder, and says what was written."""
    results = load(path)
    plt = pyplot()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Problem(f"{folder}: {error.strerror}") from None
    rows, scaling = results.get("rows", []), results.get("scaling", {}).get("rows", [])
    linear = results.get("linear", {})
    figures = {
        "ratios": (ratios, [row for row in rows if row.get("same_result", True)], "run"),
        "matmul_share": (shares, [row for row in rows if row.get("matmul_share")], "run"),
        "length": (length, series(scaling, "attention", "causal attention"), "scaling"),
        "image_share": (image_share, series(scaling, "MMCA self", "MMCA block"), "scaling"),
        "decode": (decode, series(scaling, "decode fp32", "decode bf16", "decode fp16"), "scaling"),
        "linear": (partial(growth, linear.get("exponents", [])), linear.get("rows", []), "linear"),
    }
    for name, (picture, data, command) in figures.items():
        if not data:
            print(f"no {name}: {path} has no such rows; `python -m bench {command} --json {path}` measures them")
            continue
        figure = picture(plt, data)
        about = results["about"] if command == "run" else results[command]["about"]
        figure.text(0.995, 0.0, source(about), ha="right", va="top", fontsize=7, color="0.4")
        target = folder / f"{path.stem}_{name}.{kind}"
        # Nothing that changes from call to call: the same results give the same file.
        figure.savefig(target, bbox_inches="tight", dpi=130, metadata={"Date": None} if kind == "svg" else None)
        plt.close(figure)
        print(f"wrote {target}")


def pyplot():
    try:
        import matplotlib
    except ImportError:
        raise Problem("needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    # Text as text: a tenth of the size of outlines.
    plt.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "mmca_ext", "axes.spines.top": False})
    plt.rcParams.update({"axes.spines.right": False, "axes.axisbelow": True, "font.size": 9})
    return plt


def source(about):
    cpu = f"{about['cpu']}, " if "cpu" in about else ""
    return (
        f"{cpu}threads: {about['threads']}, ours {about['isa']}, torch {about['torch']} "
        f"({about['torch_cpu_capability']}), {about['date']}"
    )


def series(rows, *names):
    return [row for row in rows if row["series"] in names]


def ratios(plt, rows):
    """A bar for every case, peer and direction, from 1 (as fast) to the right (ours faster) or left."""
    pairs = list(dict.fromkeys((row["case"], row["peer"]) for row in rows))
    place = {pair: len(pairs) - 1 - index for index, pair in enumerate(pairs)}
    figure, axes = plt.subplots(figsize=(9, 1 + 0.3 * len(pairs)), layout="constrained")
    for way, color, shift in (("forward", FORWARD, 0.2), ("backward", BACKWARD, -0.2)):
        chosen = [row for row in rows if row["direction"] == way]
        if not chosen:
            continue
        height = [place[row["case"], row["peer"]] + shift for row in chosen]
        ratio = [row["ratio"] for row in chosen]
        spread = [[row["ratio"] - row["low"] for row in chosen], [row["high"] - row["ratio"] for row in chosen]]
        axes.barh(height, [r - 1 for r in ratio], 0.38, left=1, color=color, label=way)
        axes.errorbar(ratio, height, xerr=spread, fmt="none", ecolor="0.3", elinewidth=0.8)
        goals = [(row["goal"], y) for row, y in zip(chosen, height, strict=True) if row.get("goal")]
        if goals:
            label = "goal" if way == "forward" else None
            axes.plot(*zip(*goals, strict=True), "|", color=GOAL, markersize=8, markeredgewidth=2, label=label)
    axes.axvline(1, color="0.3", linewidth=1)
    axes.set_xscale("log")
    ticks = [tick for power in range(-2, 4) for tick in (10.0**power, 2 * 10.0**power, 5 * 10.0**power)]
    low, high = axes.get_xlim()
    axes.set_xticks([tick for tick in ticks if low < tick < high])
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    axes.xaxis.set_minor_locator(plt.NullLocator())
    axes.set_yticks(list(place.values()), [f"{case}  —  {peer}" for case, peer in place])
    axes.set_ylim(-0.7, len(pairs) - 0.3)
    axes.grid(axis="x", color="0.9")
    axes.set_xlabel("peer's time over ours (right of 1: ours is faster); median, quartiles as whiskers")
    axes.set_title("How many times faster than each peer", loc="left", pad=24)
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, frameon=False)
    return figure


def shares(plt, rows):
    """Of every case that is large enough: our rate, and SDPA's, over that of a large float32 matmul."""
    rows = list({(row["case"], row["direction"]): row for row in reversed(rows)}.values())[::-1]
    cases = list(dict.fromkeys(row["case"] for row in rows))
    figure, grid = plt.subplots(1, 2, figsize=(10, 1 + 0.25 * len(cases)), sharey=True, layout="constrained")
    for axes, way in zip(grid, WAYS, strict=True):
        chosen = [row for row in rows if row["direction"] == way]
        height = [len(cases) - 1 - cases.index(row["case"]) for row in chosen]
        axes.barh(height, [row["matmul_share"] for row in chosen], 0.6, color=OURS, label="ours")
        theirs = [(row["peer_matmul_share"], y) for row, y in zip(chosen, height, strict=True) if row["peer"] == "SDPA"]
        if theirs:
            axes.plot(*zip(*theirs, strict=True), "D", color=PEERS[0], markersize=4, label="SDPA")
        axes.axvline(1, color="0.3", linewidth=1)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        axes.set_yticks(range(len(cases)), cases[::-1])
        axes.grid(axis="x", color="0.9")
        axes.set_title(way)
    figure.legend(*grid[0].get_legend_handles_labels(), loc="outside lower left", ncols=2, frameon=False, fontsize=8)
    figure.suptitle("Share of a large float32 matmul's rate (arithmetic on visible pairs only)")
    return figure


def lines(axes, rows, label, ours):
    """Our time and the peers' over x, in ms."""
    for peer, color in zip(dict.fromkeys(row["peer"] for row in rows), PEERS, strict=False):
        chosen = [row for row in rows if row["peer"] == peer]
        axes.plot(
            [row["x"] for row in chosen], [row["peer_us"] / 1e3 for row in chosen], "s--", color=color, label=peer
        )
    once = {row["x"]: row["ours_us"] / 1e3 for row in rows}
    axes.plot(list(once), list(once.values()), "o-", color=OURS, label=ours)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.grid(color="0.92")
    axes.set_title(label, fontsize=10)


def panels(plt, rows, names, ways, title, xlabel, logarithmic):
    size = 4.3 * len(names), 3.3 * len(ways)
    figure, grid = plt.subplots(len(ways), len(names), figsize=size, squeeze=False, sharey="row", layout="constrained")
    for axes_of_way, way in zip(grid, ways, strict=True):
        for axes, name in zip(axes_of_way, names, strict=True):
            chosen = [row for row in series(rows, name) if row["direction"] == way]
            lines(axes, chosen, f"{name}, {way}", "ours")
            if logarithmic and chosen:
                ticks = sorted({row["x"] for row in chosen})
                axes.set_xscale("log", base=2)
                axes.set_xticks(ticks, [f"{x // 1024}k" if x >= 1024 else str(x) for x in ticks])
        axes_of_way[0].set_ylabel("ms (median)")
    for axes in grid[-1]:
        axes.set_xlabel(xlabel)
    grid[0][0].legend(fontsize=8)
    figure.suptitle(title)
    return figure


def length(plt, rows):
    names = list(dict.fromkeys(row["series"] for row in rows))
    return panels(plt, rows, names, WAYS, "Attention, float32, 4 heads of 64: time against length", "tokens", True)


def image_share(plt, rows):
    names = list(dict.fromkeys(row["series"] for row in rows))
    title = "MMCA, float32, 8/2 heads of 64, 1536 tokens: time against image share"
    return panels(plt, rows, names, WAYS, title, "image tokens (%)", False)


def decode(plt, rows):
    names = list(dict.fromkeys(row["series"] for row in rows))
    return panels(plt, rows, names, WAYS[:1], "One query row, 8/2 heads of 64: time against keys", "keys", True)


def growth(exponents, plt, rows):
    """Linear attention: time of either direction, and memory of the forward, over the length."""
    powers = {(fit["series"], fit["direction"], fit["what"]): fit["exponent"] for fit in exponents}
    names, whats = (list(dict.fromkeys(row[key] for row in rows)) for key in ("series", "peer"))
    colors = {"ours": OURS, **dict(zip(whats, PEERS * len(whats), strict=False))}
    pictures = [("forward", "us", 1e-3, "ms (median)"), ("backward", "us", 1e-3, "ms (median)")]
    pictures.append(("forward", "bytes", 1e-6, "MB beyond inputs and output"))
    size = 4.3 * len(pictures), 3.5 * len(names)
    figure, grid = plt.subplots(len(names), len(pictures), figsize=size, squeeze=False, layout="constrained")
    for axes_of_series, name in zip(grid, names, strict=True):
        for axes, (way, unit, factor, ylabel) in zip(axes_of_series, pictures, strict=True):
            chosen = [row for row in series(rows, name) if row["direction"] == way]
            chosen = [row for row in chosen if row.get(f"ours_{unit}") is not None]
            points = {"ours": {row["x"]: row[f"ours_{unit}"] for row in chosen}}
            for row in chosen:
                points.setdefault(row["peer"], {})[row["x"]] = row[f"peer_{unit}"]
            for what, at in points.items():
                power = powers.get((name, way, what)) if unit == "us" else None
                label = what if power is None else f"{what}: length to the {power:.2f}"
                # Less than the system counts is drawn at the least it does.
                ys = [max(y * factor, 0.1) if unit == "bytes" else y * factor for y in at.values()]
                style = "o-" if what == "ours" else "s--"
                axes.plot(list(at), ys, style, color=colors[what], label=label, markersize=4)
            ticks = sorted(points["ours"])
            axes.set_xscale("log", base=2)
            axes.set_xticks(ticks, [f"{x // 1024}k" if x < 2**20 else f"{x // 2**20}M" for x in ticks], fontsize=7)
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axes.grid(color="0.92")
            axes.set_title(f"{name}, {way}" + ", memory" * (unit == "bytes"), fontsize=10)
            axes.set_ylabel(ylabel)
            axes.legend(fontsize=7)
    for axes in grid[-1]:
        axes.set_xlabel("tokens")
    figure.suptitle("Linear attention, float32, 2 heads of 64: time and memory against length")
    return figure
