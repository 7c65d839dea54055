"""What a results file holds.

    {"about": facts of the run, "rows": [row, ...], "failures": [{"case", "peer", "error"}, ...],
     "scaling": {"about", "rows", "failures"},
     "linear": {"about", "rows", "failures", "exponents": [{"series", "direction", "what", "exponent"}, ...]}}

A row is one peer in one case and direction: `ratio` is the peer's time over ours, the median over the rounds, `low` and
`high` its quartiles. Rows of `scaling` and `linear` also say in which `series` they are, and where in it (`x`); those
of `linear` also `ours_bytes` and `peer_bytes`, null where they cannot be measured: what a call needs at most beyond
inputs and results; backward: a forward and a backward together. Nothing that only reads results needs torch.
"""

import json
import numbers

NEEDED = {"case": str, "direction": str, "peer": str, "ratio": numbers.Real, "low": numbers.Real, "high": numbers.Real}
FACTS = ("date", "threads", "isa", "torch", "torch_cpu_capability")
PARTS = "scaling", "linear"  # beside the rows of `run`, each with all that makes a file of its own
IN_SERIES = {**NEEDED, "series": str, "x": numbers.Real, "ours_us": numbers.Real, "peer_us": numbers.Real}
FIT = {"series": str, "direction": str, "what": str, "exponent": numbers.Real}


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
    if not isinstance(results, dict) or not {"rows", *PARTS} & set(results):
        raise Problem(f"{path} is not a results file: it has neither rows nor {' nor '.join(PARTS)}")
    if "rows" in results:
        _check_part(path, "", results, NEEDED)
    for part in PARTS:
        if part in results:
            _check_part(path, f"{part}: ", results[part], IN_SERIES)
    for number, fit in enumerate(results.get("linear", {}).get("exponents", [])):
        _check(path, "linear: ", "exponent", number, fit, FIT)
    return results


def save(path, part, results):
    """Writes what `run` (part "rows") or another command measured, and keeps the other parts of the file."""
    kept = load(path) if path.exists() else {}
    if part in PARTS:
        kept[part] = results
    else:
        kept = {**results, **{part: kept[part] for part in PARTS if part in kept}}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(kept, indent=1) + "\n")


def about(results):
    """The facts of the first part that the file has."""
    return next(part["about"] for part in (results, *(results.get(name, {}) for name in PARTS)) if "about" in part)


def all_rows(results):
    return results.get("rows", []) + [row for part in PARTS for row in results.get(part, {}).get("rows", [])]


def _check_part(path, where, part, needed):
    if not isinstance(part, dict) or not isinstance(part.get("about"), dict) or not isinstance(part.get("rows"), list):
        raise Problem(f"{path} is not a results file: {where}about must be an object and rows a list")
    missing = [fact for fact in FACTS if fact not in part["about"]]
    if missing:
        raise Problem(f"{path} is not a results file: {where}about has no {missing[0]}")
    for number, row in enumerate(part["rows"]):
        _check(path, where, "row", number, row, needed)


def _check(path, where, what, number, row, needed):
    for key, kind in needed.items():
        value = row.get(key) if isinstance(row, dict) else None
        if not isinstance(value, kind) or isinstance(value, bool):
            raise Problem(f"{path} is not a results file: {where}{what} {number} has no {key}")
