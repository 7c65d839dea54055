"""The C++ benchmarks (bench/cpp): they build, their own tests pass, and one quick case of each leaves its figures.

That a wrong result fails a case and is not timed is held by bench/cpp/self_test.cpp.
"""

import json
import os

import pytest
from cpp_suites import ROOT, Unavailable, build, list_cases, run

FOLDER = ROOT / "build" / "bench-cpp"
QUICK = {  # a case of each binary
    "mgqa_bench": "Mgqa/forward.fp32_documents_32x8x10_D64",
    "cross_attention_bench": "CrossAttention/backward.fp32_4_rows_100_keys_D64",
    "mmca_bench": "Mmca/backward.fp32_112_D64_block",
    "linear_attention_bench": "LinearAttention/backward.fp32_100_D64_causal",
}

pytestmark = pytest.mark.cpp


@pytest.fixture(scope="module")
def binaries():
    try:
        build(ROOT / "bench/cpp", FOLDER)
    except Unavailable as reason:
        pytest.skip(str(reason))
    except RuntimeError as error:
        pytest.fail(f"the C++ benchmarks do not build:\n{error}", pytrace=False)
    return FOLDER


def environment(**variables):
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MMCA_", "GTEST_"))}
    return {**kept, "MMCA_BENCH_SECONDS": "0.01", "MMCA_BENCH_THREADS": "2", **variables}


def test_every_family_has_a_quick_case(binaries):
    assert set(QUICK) == {path.stem for path in (ROOT / "bench/cpp").glob("*_bench.cpp")}


def test_own_tests_pass(binaries):
    done = run(binaries / "mmca_bench_self_test", timeout=300, env=environment())
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("binary", QUICK)
def test_lists_its_cases(binaries, binary):
    cases = list_cases(binaries / binary)
    assert len(cases) == len(set(cases))
    for direction in ("forward", "backward"):
        for dtype in ("fp32", "bf16", "fp16"):
            assert any(f"/{direction}.{dtype}_" in case for case in cases), (direction, dtype)
    assert f"{QUICK[binary]}/scalar" in cases


@pytest.mark.parametrize("binary", QUICK)
def test_a_case_leaves_its_figures(binaries, binary, tmp_path):
    case, report = QUICK[binary], tmp_path / "report.json"
    done = run(
        binaries / binary,
        f"--gtest_filter={case}/*",
        f"--gtest_output=json:{report}",
        timeout=300,
        env=environment(),
    )
    assert done.returncode == 0, done.stdout
    suites = json.loads(report.read_text())["testsuites"]
    records = [record for suite in suites for record in suite["testsuite"]]
    assert "scalar" in {record["isa"] for record in records}
    for record in records:
        assert f"{record['classname']}.{record['name']}" == f"{case}/{record['isa']}"
        operation = "linear" if "Linear" in case else "attention"
        assert record["kernel"].startswith(f"cpu.{record['isa']}.{operation}_")
        assert (record["dtype"], record["threads"], record["limit"]) == ("fp32", "2", "fma_gflops")
        assert int(record["rounds"]) >= 5 and int(record["compared"]) > 0
        for name in ("microseconds", "gflops", "share"):
            low, middle, high = (float(record[name + suffix]) for suffix in ("_low", "", "_high"))
            assert 0 < low <= middle <= high
        assert float(record["limit_value"]) > 0


def test_decoding_is_beside_memory(binaries, tmp_path):
    report = tmp_path / "report.json"
    done = run(
        binaries / "mgqa_bench",
        "--gtest_filter=*fp16_decode_2048_D64_gqa/*",
        f"--gtest_output=json:{report}",
        timeout=300,
        env=environment(MMCA_BENCH_THREADS="1"),
    )
    assert done.returncode == 0, done.stdout
    (record, *_) = json.loads(report.read_text())["testsuites"][0]["testsuite"]
    assert record["limit"] == "memory_gbytes_per_second" and record["threads"] == "1"


def test_inner_loops(binaries, tmp_path):
    report = tmp_path / "report.json"
    run(binaries / "tiles_bench", f"--gtest_output=json:{report}", timeout=300, env=environment())
    records = json.loads(report.read_text())["testsuites"][0]["testsuite"]
    assert {"score/scalar", "exp2_row/scalar"} <= {record["name"] for record in records}
    assert all(float(record["slots"]) > 0 for record in records)


def test_one_instruction_set_alone(binaries):
    done = run(binaries / "mmca_bench", "--gtest_list_tests", timeout=60, env=environment(MMCA_EXT_ISA="scalar")).stdout
    assert "/scalar" in done and "/avx" not in done


@pytest.mark.parametrize(
    "variable", [{"MMCA_EXT_ISA": "avx9"}, {"MMCA_BENCH_THREADS": "0"}, {"MMCA_BENCH_SECONDS": "soon"}], ids=str
)
def test_a_wrong_setting_is_an_error(binaries, variable):
    done = run(binaries / "mmca_bench", timeout=60, env=environment(**variable))
    ((name, value),) = variable.items()
    assert done.returncode == 2 and name in done.stdout and value in done.stdout
