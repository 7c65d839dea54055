"""What a results file holds.

    {"about": facts of the run, "rows": [row, ...], "failures": [{"case", "peer", "error"}, ...],
     "scaling": {"about", "rows", "failures"}}

A row is one peer in one case and direction: `ratio` is the peer's time over ours, the median over the rounds, `low` and
`high` its quartiles. Rows of `scaling` also say in which `series` they are, and where in it (`x`). Nothing that only
reads results needs torch.
"""

import json
import numbers

NEEDED = {"case": str, "direction": str, "peer": str, "ratio": numbers.Real, "low": numbers.Real, "high": numbers.Real}
FACTS = ("date", "threads", "isa", "torch", "torch_cpu_capability")
IN_SERIES = {**NEEDED, "series": str, "x": numbers.Real, "ours_us": numbers.Real, "peer_us": numbers.Real}


class Problem(Exception):
    """Something the user can mend, said in one line."""


def load(path):
    """A results file, checked; Problem if it is not one."""
    try:
        results = json.loads(path.read_text())
    except OSError as error:
        raise Problem(f"{path}: {error.strerror or error}") from None
    except ValueError as error:
        raise Problem(f"{path} is not a results file: not JSON ({error})") from None
    if not isinstance(results, dict) or not {"rows", "scaling"} & set(results):
        raise Problem(f"{path} is not a results file: it has neither rows nor scaling")
    if "rows" in results:
        _check_part(path, "", results, NEEDED)
    if "scaling" in results:
        _check_part(path, "scaling: ", results["scaling"], IN_SERIES)
    return results


def save(path, part, results):
    """Writes what `run` (part "rows") or `scaling` measured, and keeps the other's part of the file."""
    kept = load(path) if path.exists() else {}
    if part == "scaling":
        kept["scaling"] = results
    else:
        kept = {**results, **({"scaling": kept["scaling"]} if "scaling" in kept else {})}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(kept, indent=1) + "\n")


def all_rows(results):
    return results.get("rows", []) + results.get("scaling", {}).get("rows", [])


def _check_part(path, where, part, needed):
    if not isinstance(part, dict) or not isinstance(part.get("about"), dict) or not isinstance(part.get("rows"), list):
        raise Problem(f"{path} is not a results file: {where}about must be an object and rows a list")
    missing = [fact for fact in FACTS if fact not in part["about"]]
    if missing:
        raise Problem(f"{path} is not a results file: {where}about has no {missing[0]}")
    for number, row in enumerate(part["rows"]):
        for key, kind in needed.items():
            value = row.get(key) if isinstance(row, dict) else None
            if not isinstance(value, kind) or isinstance(value, bool):
                raise Problem(f"{path} is not a results file: {where}row {number} has no {key}")
