"""`python -m bench gpu` without a GPU: what it keeps when a case fails, when the time is up, when the GPU is lost."""

import json

import pytest
import torch

from bench import __main__ as command_line
from bench import gpu
from bench.gpu_cases import Work


def scaled(factor):
    return lambda q, k, v: factor * torch.nn.functional.scaled_dot_product_attention(q, k, v)


def work(name, ours=1.0, **peers):
    peers = {peer: scaled(factor) for peer, factor in peers.items()}
    return Work(name, "Some", scaled(ours), peers, ((1, 1, 4, 8),) * 3, "fp32", 1e3, goal=(1.0, None))


@pytest.fixture
def bench(monkeypatch, tmp_path):
    """Runs `bench gpu` over these pieces of work; returns what it wrote."""
    monkeypatch.setattr(gpu, "ceilings", lambda *_: ({"fp32": 1e9}, 1e9))
    path = tmp_path / "gpu.json"

    def run(works, *options):
        monkeypatch.setattr(gpu.Cases, "all", lambda self: iter(works))
        argv = ["gpu", "--device", "cpu", "--seconds", "0", "--json", str(path), *options]
        gpu.run(command_line.parse(argv), argv)
        return json.loads(path.read_text())

    run.path = path
    return run


def names(entries):
    return [entry["case"] for entry in entries]


def test_peers_that_differ_and_cases_that_fail_are_noted(bench):
    broken = work("broken", same=1.0)
    broken.ours = lambda *_: 1 / 0
    found = bench([work("first", same=1.0, other=2.0), broken, work("last", same=1.0)])
    assert names(found["rows"]) == ["first", "first", "last", "last"]
    assert [(f["case"], f["peer"], f["error"].split(" by ")[0]) for f in found["failures"]] == [
        ("first", "other", "differs from ours"),
        ("broken", "ours", "division"),
    ]
    assert "broken, ours: division by zero" in bench.path.with_suffix(".md").read_text()


def test_when_the_time_is_up_the_rest_is_noted(bench):
    first = work("first", same=1.0)
    bench([first])
    found = bench([first, work("second"), work("third")], "--budget", "0", "--resume")
    assert set(names(found["rows"])) == {"first"}
    assert [(f["case"], f["error"]) for f in found["failures"]] == [(n, "the time was up") for n in ("second", "third")]


def test_a_lost_gpu_costs_one_case(bench, monkeypatch):
    class BegunAnew(Exception):
        pass

    def execv(path, argv):
        raise BegunAnew(argv)

    monkeypatch.setattr(gpu.os, "execv", execv)
    monkeypatch.setattr(gpu, "is_lost", lambda device: True)
    wild, works = work("wild"), []
    wild.ours = lambda *_: 1 / 0
    works = [work("first", same=1.0), wild, work("last", same=1.0)]
    with pytest.raises(BegunAnew) as begun:
        bench(works, "--budget", "1000")
    argv = begun.value.args[0][3:]
    assert argv[0] == "gpu" and argv[-3:-1] == ["--resume", "--budget"] and 900 <= float(argv[-1]) <= 1000
    works[0].ours = wild.ours  # is not asked again
    found = bench(works, *argv[argv.index("--resume") :])
    assert set(names(found["rows"])) == {"first", "last"} and names(found["failures"]) == ["wild"]


def test_compile_times_nothing(bench, capsys):
    called = []

    def flex(q, k, v):
        called.append(q.shape)
        return scaled(1.0)(q, k, v)

    compiled, broken = work("first", same=1.0), work("second")
    compiled.peers["two FlexAttention"], broken.peers["FlexAttention"] = flex, lambda *_: 1 / 0
    with pytest.raises(FileNotFoundError):  # no results
        bench([compiled, broken], "--compile")
    assert len(called) == 1
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("first ") and first.endswith(" s") and second.endswith("division by zero")
