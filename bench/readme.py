"""The README's table, made from a results file. It has no goals: they are the project's own affair."""

import re
from pathlib import Path

from .results import Problem

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


def write(results, source, readme=Path("README.md")):
    """Puts the results between the README's markers."""
    if "rows" not in results:
        raise Problem(f"{source} has no rows: `python -m bench run --json {source}` measures them")
    about = results["about"]
    cpu = about.get("cpu", "a shared virtual machine")
    text = (
        f"<!-- results: {source} -->\n"
        f"Times faster than the peer, {about['threads']} threads of {cpu}, our {about['isa']} kernels against\n"
        f"torch {about['torch']} ({about['torch_cpu_capability']}), {about['date']} "
        f"([all figures]({source})):\n\n"
        f"{table(results['rows'])}\n"
        "<!-- /results -->"
    )
    before = readme.read_text()
    if not MARKED.search(before):
        raise Problem(f"{readme} has no place for results: <!-- results: FILE --> to <!-- /results -->")
    readme.write_text(MARKED.sub(lambda _: text, before))
