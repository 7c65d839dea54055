#!/usr/bin/env bash
# Everything a machine with a GPU is for, in one call of less than nine minutes:
#
#     bench/gpu.sh [build] [test] [sanitize] [bench]        all four without arguments
#
# builds for the GPU that is here, runs the suites on its kernels, four tools of compute-sanitizer over a small set, and
# the comparison with torch's own kernels. Needs python3 with torch for CUDA, nvcc, ninja, pytest; no network. Results:
# gpu_<name>.json, gpu_<name>.md and gpu_<name>_checks.md under $OUT, or bench/results without it. The exit status is
# that of the checks; a stage that outlasts its share of the time is stopped and counts as failed. DRY_RUN=1 goes through
# all of it on a machine without a GPU: CUDA's kernels on the emulated one, the benchmark small and on the CPU.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
results=${OUT:-bench/results}
stages=${*:-build test sanitize bench}
mkdir -p "$results"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1

if [ -n "${DRY_RUN:-}" ]; then facts="dry_run 9.0a"; else facts=$($PYTHON - <<'PY'
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
checks="$results/gpu_${name}_checks.md"
failed=0
wants() { case " $stages " in *" $1 "*) ;; *) false ;; esac; }
# stage SECONDS NAME COMMAND...: a line in the table, the output's end in the log
stage() {
  local limit=$1 label=$2 begin=$SECONDS status=0
  shift 2
  echo "== $label"
  timeout --kill-after=10 "$limit" "$@" 2>&1 | tee "$results/gpu_stage.log" | tail -n 40 || status=$?
  local last
  last=$(grep -v '^[[:space:]]*$' "$results/gpu_stage.log" | tail -n 1 | tr '|' '/' | cut -c1-160)
  [ $status = 0 ] && verdict=passed || { verdict="failed ($status)"; failed=1; cp "$results/gpu_stage.log" "$results/gpu_failed_${label//[^a-z0-9]/_}.log"; }
  echo "| $label | $verdict | $((SECONDS - begin)) s | $last |" >>"$checks"
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
  stage "${BUILD_SECONDS:-150}" build $PYTHON setup.py --quiet build_ext --inplace
  $PYTHON cuda_compiler.py --report build >"$results/gpu_${name}_kernels.txt"
fi
if wants test; then
  parallel=$($PYTHON -c 'import xdist; print("-n 8")' 2>/dev/null || true)
  suites="tests/test_cuda.py tests/test_differential.py tests/test_autograd.py tests/test_gradcheck.py tests/faults"
  suites="$suites tests/test_functional_api.py tests/test_bad_packing.py"
  device=cuda
  if [ -n "${DRY_RUN:-}" ]; then device=emulated suites="tests/test_differential.py -k reference[0]"; fi
  stage 40 "test on the GPU itself" $PYTHON -m pytest -q $parallel tests/test_cuda.py
  stage 90 "test of all suites" $PYTHON -m pytest -q $parallel --device $device $suites
fi
if wants sanitize && [ -n "${DRY_RUN:-}" ]; then
  stage 60 "sanitize (dry run)" $PYTHON tests/sanitized.py --dry-run
elif wants sanitize && command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck initcheck synccheck; do
    # Without torch's cache every tensor is an allocation of its own, with an end that memcheck knows.
    # initcheck must see who writes what our kernels read, torch's kernels too.
    only=(--kernel-name kns=mmca); [ "$tool" = initcheck ] && only=()
    stage 45 "$tool" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" "${only[@]}" \
      --error-exitcode 9 --print-limit 20 $PYTHON tests/sanitized.py
  done
elif wants sanitize; then
  echo "| sanitize | not run | | compute-sanitizer is not installed |" >>"$checks"
fi
if wants bench; then
  where=(); if [ -n "${DRY_RUN:-}" ]; then where=(--device cpu --shrink 128 --seconds 0); fi
  stage 170 bench $PYTHON -m bench gpu "${where[@]}" --budget 140 --json "$results/gpu_$name.json"
fi
rm -f "$results/gpu_stage.log"
cat "$checks"
exit $failed
