"""README.md of this folder: every row of the fault table names tests, and they exist."""

import ast
import re
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
NAME = re.compile(r"`((?:[\w/]+/)?test_\w+\.py)::(test_\w+)`")


def read_table(text):
    """(fault, [(file, test)]) of every row."""
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in text.splitlines() if line.startswith("|")]
    return [(row[0].strip(), NAME.findall(row[-1])) for row in rows[2:]]


TABLE = read_table((HERE / "README.md").read_text())


def functions_of(path):
    return {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)}


def missing(names):
    """The tests of a row that are not there."""
    paths = [(ROOT / file if "/" in file else HERE / file, test) for file, test in names]
    return [(path.name, test) for path, test in paths if not path.exists() or test not in functions_of(path)]


def test_the_table_is_there():
    assert len(TABLE) > 35 and len({fault for fault, _ in TABLE}) == len(TABLE)


@pytest.mark.parametrize("fault, names", TABLE, ids=[fault for fault, _ in TABLE])
def test_every_row_is_held(fault, names):
    assert names, "no test"
    assert not missing(names)


@pytest.mark.parametrize("path", sorted(HERE.glob("test_*.py")), ids=lambda path: path.name)
def test_every_test_is_in_the_table(path):
    listed = {test for _, names in TABLE for file, test in names if file == path.name}
    unlisted = {name for name in functions_of(path) if name.startswith("test_")} - listed
    assert path == Path(__file__) or not unlisted


def test_rows_that_hold_nothing_would_be_found():
    head = "| fault | the user sees | held by |\n|---|---|---|\n"
    (row,) = read_table(head + "| a | b | c |")
    assert row == ("a", [])
    (row,) = read_table(head + "| a | b | `test_table.py::test_gone` `nowhere/test_x.py::test_y` |")
    assert missing(row[1]) == [("test_table.py", "test_gone"), ("test_x.py", "test_y")]
