"""The benchmark's command line: what it measures, writes, draws and compares."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import cases, compare, measure, readme, results, scaling
from bench.__main__ import HELD, main

ROOT = Path(__file__).resolve().parents[1]
ABOUT = {"date": "2026-01-01", "threads": 1, "isa": "avx2", "torch": "2", "torch_cpu_capability": "AVX2"}


@pytest.fixture(autouse=True)
def same_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def row(case, ratio, spread=0.1, **more):
    quartiles = {"ratio": ratio, "low": ratio - spread / 2, "high": ratio + spread / 2}
    return {"case": case, "direction": "forward", "peer": "SDPA", **quartiles, "goal": None, **more}


def point(series, x, direction="forward"):
    return row(f"{series} {x}", 2.0, series=series, x=x, ours_us=10.0 * x, peer_us=20.0 * x, direction=direction)


def written(path, rows, scaling_rows=()):
    part = {"about": ABOUT, "rows": rows}
    path.write_text(json.dumps({**part, "scaling": {"about": ABOUT, "rows": scaling_rows}} if scaling_rows else part))
    return path


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """The smallest case, and the smallest point of a series, into one file."""
    path = tmp_path_factory.mktemp("bench") / "results.json"
    assert main(["--filter", "one number", "--seconds", "0", "--json", str(path)]) == 0  # `run` is the default
    assert main(["scaling", "--filter", "decode fp32, 512 keys", "--seconds", "0", "--json", str(path)]) == 0
    return path


def test_results_say_how_they_came_about(measured):
    file = results.load(measured)
    command = "python -m bench --filter 'one number' --seconds 0 --json "
    assert file["about"]["command"].startswith(command) and file["scaling"]["about"]["command"] != command
    assert {"date", "cpu", "threads", "isa", "torch", "commit", "environment"} <= set(file["about"])
    ways = {(r["case"], r["peer"], r["direction"]) for r in file["rows"]}
    assert ways == {
        ("one number: 1 x 1 x 1 x 8", peer, way) for peer in ("SDPA", "eager") for way in ("forward", "backward")
    }
    for r in results.all_rows(file):
        assert 0 < r["low"] <= r["ratio"] <= r["high"] and r["rounds"] >= 7 and r["ours_us"] > 0 and r["peer_us"] > 0
    assert [(r["series"], r["x"]) for r in file["scaling"]["rows"]] == [("decode fp32", 512)]


def test_a_second_run_keeps_the_series(measured, tmp_path):
    copy = tmp_path / "copy.json"
    copy.write_text(measured.read_text())
    results.save(copy, "rows", {"about": ABOUT, "rows": []})
    assert results.load(copy)["scaling"] == results.load(measured)["scaling"]


def test_table_shows_the_goal(capsys):
    goal = next(case for case in cases.all_cases() if "documents' size: 32" in case.name).goal["SDPA"]
    assert main(["run", "--filter", "the documents' size: 32", "--seconds", "0", "--threads", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "threads: 1" in lines
    header = next(line for line in lines if line.startswith("case "))
    end = header.index("goal") + len("goal")
    table = lines[lines.index(header) + 1 :]
    shown = {
        way: line[:end].split()[-1] for way in ("forward", "backward") for line in table if f" SDPA{'':21}{way}" in line
    }
    assert shown == {"forward": f"{goal[0]:g}", "backward": f"{goal[1]:g}"}
    assert re.fullmatch(r"goals reached: [012] of 2", table[-1])


def test_every_case_of_the_goal_table_is_there():
    """And names are unique: results files are compared by them."""
    names = [case.name for case in cases.all_cases()] + [case.name for _, case in scaling.all_series()]
    assert len(set(names)) == len(names)
    for part in ("cross bf16", "cross fp16", "decode bf16", "decode fp16", "packed", "MMCA block", "layer SimpleMMCA"):
        assert any(part in name for name in names)
    assert len([name for name in names if name.endswith("% masked")]) == 6
    assert {place["series"] for place, _ in scaling.all_series()} == {
        *("attention", "causal attention", "MMCA self", "MMCA block", "decode fp32", "decode bf16", "decode fp16")
    }


def small(**changes):
    case = cases.attention("small", (1, 2, 2, 8, 8, 8))
    for name, value in changes.items():
        setattr(case, name, value)
    return case


def test_a_failing_peer_is_a_line(capsys):
    def fails(q, k, v):
        raise RuntimeError("no such kernel\nand a trace")

    def fails_backward(q, k, v):
        return q.detach()

    failures = []
    case = small()
    case.peers |= {"broken": fails, "forward only": fails_backward}
    rows = measure.measure(case, 0.0, failures)
    assert {r["peer"] for r in rows} == {"SDPA", "eager"}
    assert re.search(r"small +broken +fails: no such kernel\n", capsys.readouterr().out)
    assert [failure["peer"] for failure in failures] == ["broken", "forward only"]


def test_other_results_are_not_timed():
    case = small(peers={"wrong": lambda q, k, v: cases.peers.sdpa(q, k, v) * 1.01})
    with pytest.raises(results.Problem, match="small: ours and wrong differ"):
        measure.measure(case, 0.0, [])


def test_large_cases_are_related_to_a_matmul(monkeypatch):
    monkeypatch.setattr(measure, "LARGE", 1.0)
    monkeypatch.setattr(measure, "MATMUL", 64)
    rows = measure.measure(small(beside={"itself": cases.without_dropout}), 0.0, [])
    assert all(r["matmul_share"] > 0 for r in rows)
    assert {r["peer"]: (r["same_result"], bool(r["peer_matmul_share"])) for r in rows} == {
        "SDPA": (True, True),
        "eager": (True, True),
        "itself": (False, False),
    }


def test_layers_written_out_give_the_same():
    """Outputs are compared by measure; here the gradients of every input and parameter."""
    for case in cases.all_cases()[-4:]:
        inputs = case.tensors()
        wanted = [*inputs, *case.parameters]
        assert len(case.parameters) >= 5

        def gradients(call, inputs=inputs, wanted=wanted):
            return torch.autograd.grad(sum(out.square().mean() for out in measure.as_tuple(call(*inputs))), wanted)

        ours = gradients(case.ours)
        for peer in case.peers.values():
            torch.testing.assert_close(gradients(peer), ours, rtol=1e-3, atol=1e-6)


def test_compare_tells_a_change_from_noise(tmp_path, capsys):
    before = written(
        tmp_path / "a.json",
        [row("planted", 1.0), row("lost", 1.0), row("noise", 1.0, spread=0.4), row("gone", 1.0)],
        [point("attention", 256)],
    )
    after = written(
        tmp_path / "b.json",
        [row("planted", 1.3), row("lost", 0.8), row("noise", 1.3, spread=0.4), row("new", 1.0)],
        [point("attention", 256)],
    )
    verdicts = {key[0]: verdict for key, *_, verdict in compare.changes(results.load(before), results.load(after))}
    assert verdicts == {"planted": "faster", "lost": "slower", "noise": "", "attention 256": ""}
    assert main(["compare", str(before), str(after)]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^planted .* 1\.00 +1\.30 +\+30\.0% +0\.14 faster$", out, re.MULTILINE)
    assert "4 compared: 1 faster, 1 slower, 2 within the spread" in out
    assert "only in the first: gone" in out and "only in the second: new" in out
    assert "note:" not in out


def test_compare_warns_of_another_machine(tmp_path, capsys):
    paths = [written(tmp_path / f"{name}.json", [row("x", 1.0)]) for name in "ab"]
    paths[1].write_text(paths[1].read_text().replace('"threads": 1', '"threads": 8'))
    assert main(["compare", *map(str, paths)]) == 0
    assert "note: threads differs: 1 and 8" in capsys.readouterr().out


@pytest.mark.parametrize(
    "content, complaint",
    [
        ("ratio 2", "not JSON"),
        ("[1]", "neither rows nor scaling"),
        ('{"rows": []}', "about must be an object"),
        (json.dumps({"about": {}, "rows": []}), "about has no date"),
        (json.dumps({"about": ABOUT, "rows": [{"case": "x"}]}), "row 0 has no direction"),
        (json.dumps({"about": ABOUT, "rows": [row("x", 1.0) | {"ratio": "fast"}]}), "row 0 has no ratio"),
        (json.dumps({"scaling": {"about": ABOUT, "rows": [row("x", 1.0)]}}), "scaling: row 0 has no series"),
    ],
)
@pytest.mark.parametrize("command", ["compare", "plot", "readme", "run"])
def test_other_files_are_refused(tmp_path, capsys, command, content, complaint):
    path = tmp_path / "file.json"
    path.write_text(content)
    arguments = {"compare": [path, path], "run": ["--filter", "one number", "--seconds", "0", "--json", path]}
    assert main([command, *map(str, arguments.get(command, [path]))]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"bench {command}: {path}") and complaint in error and error.count("\n") == 1


@pytest.mark.parametrize("command", ["compare", "plot", "readme"])
def test_missing_files_are_an_error(tmp_path, capsys, command):
    path = str(tmp_path / "none.json")
    assert main([command, *[path] * (2 if command == "compare" else 1)]) == 1
    assert capsys.readouterr().err == f"bench {command}: {path}: No such file or directory\n"


def test_an_unknown_case_is_an_error(capsys):
    assert main(["--filter", "no such case"]) == 1
    assert "no case has 'no such case' in its name" in capsys.readouterr().err


def test_plots_are_written_and_repeatable(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    ways = ("forward", "backward")
    rows = [row("x & y", 2.0, goal=1.5, matmul_share=0.5, peer_matmul_share=0.25) | {"direction": way} for way in ways]
    series = [
        point(name, x, way)
        for name in ("attention", "causal attention", "MMCA self", "MMCA block", "decode fp32")
        for x in (512, 1024)
        for way in (ways[:1] if "decode" in name else ways)
    ]
    path = written(tmp_path / "r.json", rows, series)
    names = {f"r_{name}.svg" for name in ("ratios", "matmul_share", "length", "image_share", "decode")}
    seen = []
    for _ in range(2):
        assert main(["plot", str(path), "--out", str(tmp_path / "figures")]) == 0
        seen.append({file.name: file.read_bytes() for file in (tmp_path / "figures").iterdir()})
    assert set(seen[0]) == names and seen[0] == seen[1]
    assert b"x &amp; y" in seen[0]["r_ratios.svg"] and max(map(len, seen[0].values())) < 60_000

    capsys.readouterr()
    assert main(["plot", str(written(tmp_path / "old.json", [row("x", 2.0)])), "--format", "png"]) == 0
    assert [file.name for file in tmp_path.glob("old_*")] == ["old_ratios.png"]
    assert "no length" in capsys.readouterr().out


def test_readme_table_is_grouped_without_goals(tmp_path):
    rows = [
        row("a", 2.0, group="Attention", label="fp32", size="8 heads", goal=9.9),
        row("a", 12.0, group="Attention", label="fp32", size="8 heads") | {"direction": "backward"},
        row("a", 0.9, group="Attention", label="fp32", size="8 heads", same_result=False) | {"peer": "other work"},
        row("b", 3.0, group="MMCA", label='image_rows="self"', size="text 64"),
    ]
    text = tmp_path / "README.md"
    text.write_text("before\n<!-- results: x.json -->\nold\n<!-- /results -->\nafter\n")
    readme.write({"about": ABOUT, "rows": rows}, Path("y.json"), text)
    assert text.read_text().splitlines()[4:] == [
        "",
        "| work | size | peer | forward | backward |",
        "|---|---|---|---|---|",
        "| **Attention** | | | | |",
        "| fp32 | 8 heads | SDPA | 2.00x | 12.0x |",
        "| **MMCA** | | | | |",
        '| image_rows="self" | text 64 | SDPA | 3.00x |  |',
        "<!-- /results -->",
        "after",
    ]


@pytest.mark.skipif(os.environ.get("MMCA_EXT_ISA") is not None, reason="the environment chose already")
def test_isa_holds_both_sides(tmp_path):
    """One flag sets what torch and we read at start, in a process of its own."""
    from mmca_ext import _C

    if not any(kernel["isa"] == "avx2" and kernel["available"] for kernel in _C.kernels()):
        pytest.skip("no AVX2 here")
    path = tmp_path / "r.json"
    command = ["--isa", "avx2", "--filter", "one number", "--seconds", "0", "--json", str(path)]
    subprocess.run([sys.executable, "-m", "bench", *command], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    about = results.load(path)["about"]
    assert (about["isa"], about["torch_cpu_capability"]) == ("avx2", "AVX2")
    assert HELD["avx2"].items() <= about["environment"].items()
