#!/usr/bin/env bash
# Everything a machine with a GPU is for, in one call of less than nine minutes:
#
#     bench/gpu.sh [build] [test] [sanitize] [bench]        all four without arguments
#
# builds for the GPU that is here; side by side, runs the suites on its kernels, four tools of compute-sanitizer over a
# small set, and the compilers of what the benchmark compares with; then, alone, the comparison with torch's kernels.
# Needs python3 with torch for CUDA, nvcc, ninja, pytest; no network. With GoogleTest, the system's or its sources in
# build/googletest, the C++ benches run, too. Under $OUT, or bench/results without it:
#
#     gpu_<name>_checks.md      a line a check: its result, its time, the last line it printed
#     gpu_<name>_failures.log   the ends of what failed, if something did
#     gpu_<name>_kernels.txt    registers, stack and spills
#     gpu_<name>.json, .md      the comparison, written anew after every case
#
# The exit status is that of the checks. A check that outlasts its share of the time is interrupted and counts as
# failed, and none of them needs what another one found. DRY_RUN=1 goes through all of it on a machine without a GPU:
# CUDA's kernels on the emulated one, the benchmark small and on the CPU; BUILD_SECONDS: for its slower processor.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
dry=${DRY_RUN:-}
results=${OUT:-bench/results}
stages=${*:-build test sanitize bench}
build_seconds=${BUILD_SECONDS:-210}
total=$((build_seconds + 310)) # seconds in all
mkdir -p "$results"
work=$(mktemp -d)
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1

if [ -n "$dry" ]; then facts="dry_run 9.0a"; else facts=$($PYTHON - <<'PY'
import re, torch
if torch.cuda.is_available():
    p = torch.cuda.get_device_properties(0)
    # 9.0a: the instructions of Hopper alone; other GPUs run the code of their own or an older version.
    print(re.sub(r"\W+", "_", p.name.lower().removeprefix("nvidia ")), f"{p.major}.{p.minor}{'a' * (p.major == 9)}")
PY
); fi
read -r name arch <<<"$facts"
if [ -z "${name:-}" ]; then echo "bench/gpu.sh: torch sees no GPU here" >&2; exit 1; fi
export TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$arch} FORCE_CUDA=1
checks="$results/gpu_${name}_checks.md" failures="$results/gpu_${name}_failures.log"
rm -f "$failures"

wants() { case " $stages " in *" $1 "*) ;; *) false ;; esac; }
left() { echo $((total - SECONDS)); }

# stage SECONDS NAME COMMAND...: a line in the table; of what fails, the end of its output in the log. Several at once,
# each in the background, share both.
stage() {
  local limit=$1 label=$2 begin=$SECONDS status=0 verdict=passed log last
  shift 2
  log=$(mktemp "$work/XXXXXX")
  if [ "$(left)" -lt "$limit" ]; then limit=$(left); fi
  if [ "$limit" -gt 0 ]; then
    # An interrupt first, of which pytest then says what has failed so far; what is in the background ignores it else.
    timeout --signal=INT --kill-after=10 "$limit" env --default-signal=INT "$@" >"$log" 2>&1 || status=$?
  else
    status=124
    echo "the time was up" >"$log"
  fi
  if [ $status != 0 ]; then
    verdict="failed ($status)"
    [ $status = 124 ] && verdict="failed (out of time)"
    { echo "==== $label: $verdict: $*"; tail -c 400000 "$log"; } >>"$failures"
  fi
  last=$(grep -v '^[[:space:]]*$' "$log" | tail -n 1 | tr '|' '/' | cut -c1-160)
  echo "| $label | $verdict | $((SECONDS - begin)) s | $last |" >>"$checks"
  { echo "== $label: $verdict"; tail -n 12 "$log"; } | cut -c1-300
}

{
  echo "# Checks on $name, $(date +%F)"
  echo
  echo "commit $(git rev-parse --short HEAD 2>/dev/null || echo unknown), TORCH_CUDA_ARCH_LIST=$TORCH_CUDA_ARCH_LIST"
  echo
  echo "| check | result | time | last line |"
  echo "|---|---|---|---|"
} >"$checks"

if wants build; then
  stage "$build_seconds" build $PYTHON setup.py --quiet build_ext --inplace
  $PYTHON cuda_compiler.py --report build >"$results/gpu_${name}_kernels.txt"
fi

# All at once, each on a share of the processors: few of them ever wait for the GPU.
check_seconds=140
pytest() { stage $check_seconds "$1" env OMP_NUM_THREADS=1 $PYTHON -m pytest -q -rfE "${@:2}"; }
parallel() { if $PYTHON -c 'import xdist' 2>/dev/null; then echo "-n $1"; fi; }
if wants test && [ -n "$dry" ]; then
  pytest "test on the GPU itself" tests/test_cuda.py &
  pytest "test of all suites" --device emulated "tests/test_differential.py::test_kernels_are_the_reference[0]" &
elif wants test; then
  pytest "test on the GPU itself" $(parallel 4) tests/test_cuda.py &
  # Many of these compare bits. What starts processes is left out: none may use a GPU that it has inherited. The
  # accuracy of thousands of cases, which each worker would measure for itself, is a check of its own.
  pytest "test of all suites" $(parallel 6) --device cuda --deterministic tests/test_autograd.py \
    tests/test_gradcheck.py tests/test_functional_api.py tests/test_bad_packing.py tests/test_packed_layers.py \
    tests/faults --ignore tests/faults/test_process.py &
  pytest "test of random cases" $(parallel 4) --device cuda tests/test_differential.py tests/test_functional_api.py \
    -k the_reference &
  pytest "test of linear attention" $(parallel 2) --device cuda tests/test_linear.py &
  pytest "test of accuracy" --device cuda tests/test_differential.py -k "standard or past" &
fi
if wants sanitize && [ -n "$dry" ]; then
  stage $check_seconds "sanitize (dry run)" $PYTHON tests/sanitized.py --dry-run &
elif wants sanitize && command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck initcheck synccheck; do
    # Without torch's cache every tensor is an allocation of its own, with an end that memcheck knows.
    # initcheck must see who writes what our kernels read, torch's kernels too.
    only=(--kernel-name kns=mmca); [ "$tool" = initcheck ] && only=()
    stage $check_seconds "$tool" env OMP_NUM_THREADS=1 PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer \
      --tool "$tool" "${only[@]}" --error-exitcode 9 --print-limit 20 \
      $PYTHON tests/sanitized.py --seconds $((check_seconds - 40)) &
  done
elif wants sanitize; then
  echo "| sanitize | not run | | compute-sanitizer is not installed |" >>"$checks"
fi
where=(); if [ -n "$dry" ]; then where=(--device cpu --shrink 128 --seconds 0); fi
if wants bench && [ -z "$dry" ]; then # Triton's compilers fill a cache on disk: minutes that the benchmark then saves
  stage $check_seconds "compile the peers" $PYTHON -m bench gpu --compile &
fi
if wants test && [ -z "$dry" ] && { [ -e /usr/include/gtest/gtest.h ] || [ -d build/googletest ]; }; then
  stage $check_seconds "benches of C++" env MMCA_BENCH_SECONDS=0.01 bash -c '
    cmake -S bench/cpp -B build/bench-cpp -DFETCHCONTENT_SOURCE_DIR_GOOGLETEST="$PWD/build/googletest" >/dev/null &&
    cmake --build build/bench-cpp --parallel >/dev/null &&
    for family in build/bench-cpp/*_bench; do "$family" || exit 1; done' &
fi
wait

if wants bench; then
  budget=$(($(left) - 25)) # for the case under way, and the end
  stage "$(left)" bench $PYTHON -m bench gpu "${where[@]}" --budget "$budget" --json "$results/gpu_$name.json"
fi
rm -r "$work"
cat "$checks"
[ ! -e "$failures" ]
