"""The README's tables, made from a results file. They have no goals, which are the project's own affair."""

import re
from pathlib import Path

from .results import Problem

LINEAR = re.compile(r"<!-- linear: (\S+) -->\n(.*?)<!-- /linear -->", re.DOTALL)
MARKED = re.compile(r"<!-- results: (\S+) -->\n(.*?)<!-- /results -->", re.DOTALL)


def shown(ratio):
    return "" if ratio is None else f"{ratio:.1f}x" if ratio >= 10 else f"{ratio:.2f}x"


def table(rows):
    """Markdown: a line for each case and peer, grouped, with the sizes where the file has them."""
    rows = [row for row in rows if row.get("same_result", True)]
    figures = {(row["case"], row["peer"], row["direction"]): row["ratio"] for row in rows}
    sized = any("size" in row for row in rows)
    columns = ["work", *(["size"] if sized else []), "peer", "forward", "backward"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    group = None
    for row in {(row["case"], row["peer"]): row for row in rows}.values():
        if row.get("group", group) != group:
            group = row["group"]
            lines.append(f"| **{group}** |" + " |" * (len(columns) - 1))
        ratios = [shown(figures.get((row["case"], row["peer"], way))) for way in ("forward", "backward")]
        cells = [row.get("label", row["case"]), *([row.get("size", "")] if sized else []), row["peer"], *ratios]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def linear_table(part, series="causal linear attention"):
    """Markdown: a line for each length of the forward, a column for ours and each peer, how time grows last."""
    rows = [row for row in part["rows"] if row["series"] == series and row["direction"] == "forward"]
    cells, whats = {}, ["ours", *dict.fromkeys(row["peer"] for row in rows)]
    for row in rows:
        for what in ("ours", row["peer"]):
            side = "ours" if what == "ours" else "peer"
            cells[row["x"], what] = f"{duration(row[f'{side}_us'])}, {size(row.get(f'{side}_bytes'))}"
    lines = [f"| tokens | {' | '.join(whats)} |", "|---" * (1 + len(whats)) + "|"]
    for x in sorted({row["x"] for row in rows}):
        lines.append(f"| {x} | {' | '.join(cells.get((x, what), '') for what in whats)} |")
    powers = {
        fit["what"]: f"length^{fit['exponent']:.2f}"
        for fit in part.get("exponents", [])
        if (fit["series"], fit["direction"]) == (series, "forward")
    }
    if powers:
        lines.append(f"| time grows as | {' | '.join(powers.get(what, '') for what in whats)} |")
    return "\n".join(lines)


def duration(us):
    return f"{us / 1e6:.2f} s" if us >= 1e6 else f"{us / 1e3:.0f} ms" if us >= 2e4 else f"{us / 1e3:.1f} ms"


def size(count):
    return "-" if count is None else "under 1 MB" if count < 1e6 else f"{count / 1e6:.0f} MB"


def setting(about):
    cpu = about.get("cpu", "a shared virtual machine")
    return (
        f"{about['threads']} threads of {cpu}, our {about['isa']} kernels against\n"
        f"torch {about['torch']} ({about['torch_cpu_capability']}), {about['date']} "
    )


def write(results, source, readme=Path("README.md")):
    """Puts the results between the README's markers: of `run`, and of `linear` where the file has them."""
    if "rows" not in results:
        raise Problem(f"{source} has no rows: `python -m bench run --json {source}` measures them")
    texts = {
        MARKED: f"<!-- results: {source} -->\nTimes faster than the peer, {setting(results['about'])}"
        f"([all figures]({source})):\n\n{table(results['rows'])}\n<!-- /results -->"
    }
    if "linear" in results:
        figure = source.with_name(f"{source.stem}_linear.svg")  # which `python -m bench plot` draws
        texts[LINEAR] = (
            f"<!-- linear: {source} -->\nA causal forward, float32, 2 heads of 64, and what memory it takes beyond\n"
            f"inputs and output; {setting(results['linear']['about'])}([all figures]({source}), "
            f"[drawn]({figure})):\n\n{linear_table(results['linear'])}\n<!-- /linear -->"
        )
    text = readme.read_text()
    for marked, part in texts.items():
        if not marked.search(text):
            name = "results" if marked is MARKED else "linear"
            raise Problem(f"{readme} has no place for results: <!-- {name}: FILE --> to <!-- /{name} -->")
        text = marked.sub(lambda _, part=part: part, text)
    readme.write_text(text)
