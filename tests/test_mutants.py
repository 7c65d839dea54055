"""The mutation tests' tables (tests/mutants) against the tree: what they name is there. `make mutants` runs them."""

import ast
from pathlib import Path

import pytest
from mutants import checks, raises
from mutants.guards import AMX, PORTABLE

ROOT = Path(__file__).resolve().parents[1]
GUARDS = [(file, guard) for table in (PORTABLE, AMX) for file, guards in table.items() for guard in guards]
TESTS = {
    *checks.TESTS,
    *(t for tests in raises.TESTS.values() for t in tests),
    *(t for _, g in GUARDS for t in g.tests),
}


@pytest.mark.parametrize("file, guard", GUARDS, ids=lambda x: getattr(x, "what", None))
def test_guards_stand_once_in_their_files(file, guard):
    text = (ROOT / file).read_text()
    assert text.count(guard.old) == 1, f"{file} does not hold this once any more: {guard.old}"
    assert text.replace(guard.old, guard.new) != text


def test_names_are_apart():
    names = [(file, guard.what) for file, guard in GUARDS]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("test", sorted(TESTS))
def test_tests_are_there(test):
    file, _, name = test.partition("::")
    assert f"def {name}" in (ROOT / file).read_text()


def test_checks_are_numbered():
    labels = []
    source = Path("csrc/torch/ops.cpp")
    text = 'f();\nTORCH_CHECK_VALUE(x > 0, op);\n#define TORCH_CHECK_X(...) y\n  TORCH_CHECK_TYPE(ok(a,\n b), "c");\n'
    numbered = checks.numbered(source, text, labels)
    assert labels == ["ops.cpp:2 value x > 0", "ops.cpp:4 type ok(a"]
    assert "MMCA_GUARD(TORCH_CHECK_VALUE, 1, x > 0" in numbered and "MMCA_GUARD(TORCH_CHECK_TYPE, 2, ok(a" in numbered
    assert checks.numbered(Path("csrc/core/plan.cpp"), text, labels) == text


@pytest.mark.parametrize("name", raises.TESTS)
def test_raises_are_taken_away_one_by_one(name):
    text = (ROOT / name).read_text()
    count = sum(isinstance(node, ast.Raise) for node in ast.walk(ast.parse(text)))
    assert count > 0 and raises.without_raise(text, count) is None
    for index in (0, count - 1):
        changed, statement = raises.without_raise(text, index)
        assert isinstance(statement, ast.Raise)
        assert sum(isinstance(node, ast.Raise) for node in ast.walk(ast.parse(changed))) == count - 1
