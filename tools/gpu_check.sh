#!/usr/bin/env bash
# All tests that need a GPU and the benchmarks of metrics, targets, training steps and losses, in at most 8 minutes:
#
#     tools/gpu_check.sh OUT [WHEELS]
#
# Results are written under OUT as they come. Nothing outside of the repository is needed but Python with torch (whose CUDA builds have Triton) and
# torchmetrics. Where nothing can be downloaded, WHEELS is a folder with what else is to be there, made elsewhere by
#
#     pip download --no-deps -d WHEELS pytest iniconfig pluggy pygments hypothesis sortedcontainers monai segmentation-models-pytorch
#
# Without pytest and hypothesis there are no tests, without MONAI and segmentation-models-pytorch no rows of theirs. The exit status is that of what
# went wrong: 0 if all tests passed and all contenders agreed.
set -uo pipefail
out=${1:?"usage: tools/gpu_check.sh OUT [WHEELS]"}
wheels=${2:-}
mkdir -p "$out"
out=$(cd "$out" && pwd)
[ -z "$wheels" ] || wheels=$(cd "$wheels" && pwd) || exit 1
cd "$(dirname "$0")/.." || exit 1
limit=${GPU_CHECK_SECONDS:-470}
shapes=${GPU_CHECK_SHAPES:-"2,14,128,128,128 8,19,1024,1024 2,105,128,128,128 2,4,128,128,128"}
metric_shapes=${GPU_CHECK_METRIC_SHAPES:-"1,19,1024,2048 2,14,128,128,128"}
target_shapes=${GPU_CHECK_TARGET_SHAPES:-"2,14,128,128,128 8,19,1024,1024"}
train_shape=${GPU_CHECK_TRAIN_SHAPE:-"2,14,128,128,128"}
repeats=${GPU_CHECK_REPEATS:-10}
device=${GPU_CHECK_DEVICE:-cuda}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 TRITON_CACHE_DIR="${TRITON_CACHE_DIR:-$out/triton-cache}"
failed=0

run() { # name of the log, then the command: within what is left of the time
    local name=$1 left=$((limit - SECONDS))
    shift
    if [ "$left" -lt 5 ]; then
        echo "skipped, no time left: $*" | tee -a "$out/skipped.txt"
        failed=1
        return
    fi
    echo "== $* (${left} s left)" | tee -a "$out/$name.txt"
    timeout "$left" "$@" 2>&1 | tee -a "$out/$name.txt"
    local status=${PIPESTATUS[0]}
    [ "$status" -eq 0 ] || { echo "exit status $status: $*" | tee -a "$out/failed.txt"; failed=1; }
}

[ -z "$wheels" ] || run install python -m pip install --no-index --no-deps --quiet --target "$out/packages" "$wheels"/*.whl
[ -z "$wheels" ] || export PYTHONPATH="$PYTHONPATH:$out/packages"
run environment python -c 'import sys, torch
print(sys.version.split()[0], torch.__version__, torch.version.cuda, torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU")'
if python -c 'import pytest, hypothesis' 2>/dev/null; then
    # Kernels first; the options of pyproject.toml ask for pytest-xdist. The markers would be unknown without its file.
    for tests in tests/ops/triton "tests/ops tests/losses tests/terms tests/targets tests/metrics --ignore=tests/ops/triton --continue-on-collection-errors"; do
        # shellcheck disable=SC2086
        run tests python -m pytest -o addopts= --import-mode=importlib -p no:cacheprovider -q -ra -m gpu $tests
    done
else
    echo "no pytest or no hypothesis: no tests" | tee -a "$out/failed.txt"
    failed=1
fi
# shellcheck disable=SC2086
run metrics python tools/benchmark.py metrics --shape $metric_shapes --device "$device" --images 2 --repeats "$repeats" --out "$out"
# shellcheck disable=SC2086
run targets python tools/benchmark.py targets --shape $target_shapes --label-dtype uint8 --device "$device" --repeats "$repeats" --out "$out"
run train python tools/benchmark.py train --shape "$train_shape" --precision bfloat16 --device "$device" --repeats $((repeats * 4)) --out "$out"
# Last, since it takes what is left: regions before blocks, both types of each shape.
# shellcheck disable=SC2086
run losses python tools/benchmark.py losses --shape $shapes --dtype float32 bfloat16 --labels regions blocks --label-dtype uint8 --device "$device" \
    --repeats "$repeats" --out "$out"
exit "$failed"
