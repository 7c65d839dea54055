"""The benchmark's command line: what it measures, writes, draws and compares."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import cases, compare, linear, measure, memory, readme, results, scaling
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


def written(path, rows, scaling_rows=(), linear_rows=(), fits=()):
    parts = {"about": ABOUT, "rows": rows}
    if scaling_rows:
        parts["scaling"] = {"about": ABOUT, "rows": scaling_rows}
    if linear_rows:
        parts["linear"] = {"about": ABOUT, "rows": linear_rows, "exponents": fits}
    path.write_text(json.dumps(parts))
    return path


def linear_point(x, direction="forward", peer="torch, chunked", **more):
    sizes = {"ours_bytes": 3e5, "peer_bytes": 4e3 * x}
    return point("causal linear attention", x, direction) | {"peer": peer, **sizes, **more}


def fit(what, exponent, direction="forward"):
    return {"series": "causal linear attention", "direction": direction, "what": what, "exponent": exponent}


SHORT = [128, 256, 512]


@pytest.fixture(scope="module")
def short_lengths():
    """Linear attention with lengths of a few chunks, in a process that still gives its memory back."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear, "LENGTHS", SHORT)
        patch.setattr(linear, "CUMULATIVE_UP_TO", 128)
        patch.setattr(linear, "SOFTMAX_UP_TO", {True: 256, False: 128})
        patch.setattr(linear, "MILLION", 1024)
        patch.setattr(memory, "give_back", lambda: False)
        patch.setattr(memory, "keep", lambda: False)
        yield


@pytest.fixture(scope="module")
def measured(tmp_path_factory, short_lengths):
    """The smallest case, the smallest point of a series, and short linear attention, into one file."""
    path = tmp_path_factory.mktemp("bench") / "results.json"
    assert main(["--filter", "one number", "--seconds", "0", "--json", str(path)]) == 0  # `run` is the default
    assert main(["scaling", "--filter", "decode fp32, 512 keys", "--seconds", "0", "--json", str(path)]) == 0
    assert main(["linear", "--seconds", "0", "--json", str(path)]) == 0
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


def test_linear_attention_over_length(measured):
    """Every point has ours beside plain torch, softmax where it is affordable, and the power that time grows with."""
    part = results.load(measured)["linear"]
    assert part["about"]["memory_kept"] is False and part["failures"] == []
    found = {}
    for r in part["rows"]:
        found.setdefault((r["series"], r["direction"], r["peer"]), []).append(r["x"])
    causal, softmax = "causal linear attention", ("softmax, SDPA", "softmax, ours")
    assert found == {
        ("linear attention", "forward", "torch"): SHORT,
        ("linear attention", "backward", "torch"): SHORT,
        **{("linear attention", "forward", peer): SHORT[:1] for peer in softmax},
        (causal, "forward", "torch, chunked"): SHORT,
        (causal, "backward", "torch, chunked"): SHORT,
        (causal, "forward", "torch, cumulative"): SHORT[:1],
        (causal, "backward", "torch, cumulative"): SHORT[:1],
        **{(causal, "forward", peer): SHORT[:2] for peer in softmax},
        (causal, "forward", f"ours in {linear.CALLS} calls"): [1024],
    }
    fits = {(fit["series"], fit["direction"], fit["what"]): fit for fit in part["exponents"]}
    assert {what for *_, what in fits} == {"ours", "torch", "torch, chunked"} and len(fits) == 8
    for (*_, what), found in fits.items():
        assert (found["from"], found["to"]) == (128, 512) and -1 < found["exponent"] < 3
        assert found["goal"] == (linear.EXPONENT_GOAL if what == "ours" else None)


def test_the_power_that_time_grows_with(monkeypatch):
    assert linear.slope({x: 3 * x**1.7 for x in (64, 128, 1024)}) == pytest.approx(1.7)
    monkeypatch.setattr(linear, "LENGTHS", SHORT)
    # One slow round of three, and two lengths that are slow throughout: the median of the rounds' slopes.
    rounds = [[x**1.1 for x in SHORT], [100.0 * x for x in SHORT], [x**3.0 for x in SHORT]]
    monkeypatch.setattr(linear, "in_turn", lambda series, direction, lengths, seconds: rounds)
    rows = [linear_point(x) | {"peer_us": x**2.0} for x in SHORT] + [linear_point(1024, peer="softmax")]
    fits = {fit["what"]: fit["exponent"] for fit in linear.exponents(rows, 0.0)}
    assert fits == {"ours": pytest.approx(1.1), "torch, chunked": pytest.approx(2.0)}
    assert linear.exponents(rows[:2], 0.0) == []


def test_linear_peers_are_linear_attention():
    """Also the gradients, which measure does not compare."""
    for _, case in linear.all_series():
        inputs = [t.detach()[:, :, :256].double().requires_grad_() for t in case.tensors()] if case.peers else []
        outs = {name: call(*inputs) for name, call in {"ours": case.ours, **case.peers}.items()} if inputs else {}
        for out in outs.values():
            torch.testing.assert_close(out, outs["ours"], rtol=1e-10, atol=1e-12)
            found = torch.autograd.grad(out.sin().sum(), inputs, retain_graph=True)
            wanted = torch.autograd.grad(outs["ours"].sin().sum(), inputs, retain_graph=True)
            torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-10)
        if case.name.endswith(f" {linear.LENGTHS[1]} tokens") and "causal" in case.name:
            break


PEAKS = """
import torch
from bench import memory
exact, size = memory.give_back(), 30 << 20
call = lambda: torch.ones(2 * size, dtype=torch.uint8)[: size].clone()
call()  # whose code is in memory now
for _ in range(2):  # the second time in memory that the first left
    print(exact, memory.peak(call), memory.peak(lambda: None))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of memory is read from linux's /proc")
def test_peak_of_memory():
    """In a process of its own, whose allocator is told what to do."""
    done = subprocess.run([sys.executable, "-c", PEAKS], cwd=ROOT, check=True, capture_output=True, text=True)
    lines = [line.split() for line in done.stdout.splitlines()]
    assert len(lines) == 2
    for exact, peak, nothing in lines:
        if peak == "None":
            pytest.skip("no malloc_trim here, or clear_refs may not be written")
        assert exact == "True"
        assert int(peak) == pytest.approx(90 << 20, abs=3 << 20) and int(nothing) < 3 << 20


def test_memory_is_beyond_inputs_and_results(monkeypatch):
    def fails():
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(memory, "peak", lambda call: (call() and None) or 10_000)
    assert measure.peak_beside(lambda: (torch.zeros(100), torch.zeros(50))) == 10_000 - 600
    monkeypatch.setattr(memory, "peak", lambda call: call() and None)
    assert measure.peak_beside(fails) is None
    assert measure.peak_beside(lambda: (torch.zeros(100),)) is None


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
    series = [*scaling.all_series(), *linear.all_series()]
    names = [case.name for case in cases.all_cases()] + [case.name for _, case in series]
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
        [linear_point(4096, ratio=2.0), linear_point(8192)],
    )
    after = written(
        tmp_path / "b.json",
        [row("planted", 1.3), row("lost", 0.8), row("noise", 1.3, spread=0.4), row("new", 1.0)],
        [point("attention", 256)],
        [linear_point(4096, ratio=3.0), linear_point(8192)],
    )
    verdicts = {key[0]: verdict for key, *_, verdict in compare.changes(results.load(before), results.load(after))}
    assert verdicts == {"planted": "faster", "lost": "slower", "noise": "", "attention 256": ""} | {
        "causal linear attention 4096": "faster",
        "causal linear attention 8192": "",
    }
    assert main(["compare", str(before), str(after)]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^planted .* 1\.00 +1\.30 +\+30\.0% +0\.14 faster$", out, re.MULTILINE)
    assert "6 compared: 2 faster, 1 slower, 3 within the spread" in out
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
        (json.dumps({"linear": {"about": ABOUT, "rows": [row("x", 1.0)]}}), "linear: row 0 has no series"),
        (json.dumps({"linear": {"about": ABOUT, "rows": [], "exponents": [{}]}}), "linear: exponent 0 has no series"),
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
    of_linear = [linear_point(x, way) for x in (4096, 2**20) for way in ways]
    path = written(tmp_path / "r.json", rows, series, of_linear, [fit("ours", 1.006), fit("torch, chunked", 1.237)])
    names = {f"r_{name}.svg" for name in ("ratios", "matmul_share", "length", "image_share", "decode", "linear")}
    seen = []
    for _ in range(2):
        assert main(["plot", str(path), "--out", str(tmp_path / "figures")]) == 0
        seen.append({file.name: file.read_bytes() for file in (tmp_path / "figures").iterdir()})
    assert set(seen[0]) == names and seen[0] == seen[1]
    assert b"ours: length to the 1.01" in seen[0]["r_linear.svg"] and b"to the 1.24" in seen[0]["r_linear.svg"]
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


def test_readme_has_linear_attention_over_length(tmp_path):
    rows = [linear_point(4096), linear_point(8192) | {"peer_bytes": None}, linear_point(4096, peer="softmax")]
    rows += [linear_point(4096, "backward"), point("linear attention", 4096)]
    exponents = [fit("ours", 1.004), fit("softmax", 1.98), fit("ours", 1.5, "backward")]
    text = tmp_path / "README.md"
    places = "<!-- results: x.json -->\n<!-- /results -->\n"
    text.write_text(f"{places}between\n<!-- linear: x.json -->\nold\n<!-- /linear -->\nafter\n")
    part = {"about": ABOUT, "rows": rows, "exponents": exponents}
    readme.write({"about": ABOUT, "rows": [row("a", 2.0)], "linear": part}, Path("y.json"), text)
    lines = text.read_text().splitlines()
    assert lines[lines.index("between") + 1] == "<!-- linear: y.json -->"
    assert lines[lines.index("between") + 4].endswith("([all figures](y.json), [drawn](y_linear.svg)):")
    assert lines[lines.index("between") + 5 :] == [
        "",
        "| tokens | ours | torch, chunked | softmax |",
        "|---|---|---|---|",
        "| 4096 | 41 ms, under 1 MB | 82 ms, 16 MB | 82 ms, 16 MB |",
        "| 8192 | 82 ms, under 1 MB | 164 ms, - |  |",
        "| time grows as | length^1.00 |  | length^1.98 |",
        "<!-- /linear -->",
        "after",
    ]
    text.write_text(places)
    with pytest.raises(results.Problem, match="no place for results: <!-- linear: FILE -->"):
        readme.write({"about": ABOUT, "rows": [], "linear": part}, Path("y.json"), text)


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
