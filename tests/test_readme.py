"""The README keeps its promises: its examples run, its picture is what the operator does, its figures are measured."""

import json
import re
from pathlib import Path

import pytest
import torch

from bench import readme
from mmca_ext import reference

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("code", EXAMPLES, ids=lambda code: code.splitlines()[1].split()[-1])
def test_example_runs(code):
    exec(compile(code, "README.md", "exec"), {})


def test_there_is_an_example_of_every_layer():
    for layer in ("MultiModalCrossAttention", "SimpleMMCA", "MultiModalCausalAttention", "MGQA"):
        assert any(f"{layer}(" in code for code in EXAMPLES)


def test_picture_is_the_modality_rule():
    """Each row of the picture, read back, against the weights the reference gives that row."""
    lines = [
        re.match(r" {4}([TI]) {3}((?:[ti.] ?){8}) +[TI] {3}((?:[ti.] ?){8})", line) for line in README.splitlines()
    ]
    rows = [match for match in lines if match]
    modality = torch.tensor([[{"T": 1, "I": 2}[row[1]] for row in rows]])
    length = modality.shape[1]
    torch.manual_seed(0)
    query, key = torch.randn(2, 1, 1, length, 4, dtype=torch.float64)
    for column, image_rows in ((2, "self"), (3, "block")):
        picture = [row[column].split() for row in rows]
        # Values that are unit vectors make each group's output the row's weights.
        value = torch.eye(length, dtype=torch.float64)[None, None]
        weights, _ = reference.mmca_attention(query, key, value, modality, image_rows=image_rows, merge="none")
        for group, letter in enumerate("ti"):
            drawn = torch.tensor([[cell == letter for cell in row] for row in picture])
            assert torch.equal(weights[group, 0, 0] > 0, drawn)


def test_measured_table_is_the_results_file():
    source, text = readme.MARKED.search(README).groups()
    table = readme.table(json.loads((ROOT / source).read_text())["rows"])
    assert text.endswith(f"\n\n{table}\n") and table.count("\n") > 8


def test_linear_table_is_the_results_file():
    """Empty as long as the file has no such measurement."""
    source, text = readme.LINEAR.search(README).groups()
    part = json.loads((ROOT / source).read_text()).get("linear")
    assert text == "" if part is None else text.endswith(f"\n\n{readme.linear_table(part)}\n")
