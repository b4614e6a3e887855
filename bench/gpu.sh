#!/usr/bin/env bash
# Everything that needs a GPU, in ten minutes: bench/gpu.sh [wheel ...]
#
# The GPU tests, the op benches and the searches that fit; one JSON and one Markdown file in $OUT (out/gpu when unset).
# Needs Python with torch, triton, transformers, pytest and pytest-benchmark. The searches need more: the wheels of
# diffsynth, modelscope, modelscope_hub, cryptography, cffi and PyWavelets (and imageio, where the image lacks it), which
# are unpacked for this run alone. Without them the ops are measured, and the searches said to be not. Installs nothing.
# COMMIT names the commit where there is no git. Last, compute-sanitizer, where there is one and time is left.
set -u -o pipefail
limit=600
root=$(cd "$(dirname "$0")/.." && pwd)
out=${OUT:-$root/out/gpu}
python=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$out"
out=$(cd "$out" && pwd)

for wheel in "$@"; do "$python" -m zipfile -e "$wheel" "$work/wheels" || exit 2; done
# As a wheel lays it out: the kernels inside the package.
cp -r "$root/ses_fast" "$root/bench" "$root/tests" "$root/pyproject.toml" "$work/"
cp -r "$root/kernels" "$work/ses_fast/kernels"
export PYTHONPATH="$work:$work/wheels" PYTHONDONTWRITEBYTECODE=1 HF_HUB_OFFLINE=1
# So that the results name the commit.
if [ -e "$root/.git" ]; then export GIT_DIR="$root/.git" GIT_WORK_TREE="$root"; fi
cd "$work" || exit 2

failed=0
part() { # part NAME SECONDS COMMAND...: within what is left of the ten minutes, less what the last lines take
    local name=$1 most=$2 left=$((limit - 25 - SECONDS))
    shift 2
    if [ "$left" -lt 10 ]; then echo "$name: no time left"; failed=1; return; fi
    timeout -k 5 "$((left < most ? left : most))" "$@" >"$out/$name.log" 2>&1
    local status=$?
    tail -n 3 "$out/$name.log"
    echo "$name: exit $status, $SECONDS s since the start; $out/$name.log"
    if [ "$status" != 0 ]; then failed=1; fi
}

rm -f "$out/ops.json" "$out/searches.json"
part tests 240 "$python" -m pytest -q -p no:cacheprovider --require-gpu -m gpu tests/kernel_tests
if [ "$failed" != 0 ]; then
    echo "The kernels are wrong or were not run to the end: nothing is timed."
    exit 1
fi
part ops 180 "$python" -m bench.ops -p no:cacheprovider --out "$out/ops.json"
part searches 400 "$python" -m bench.end_to_end flux.2-klein-4b z-image-turbo flux.1-dev --out "$out/searches.json"
"$python" -m bench.collect "$out/ops.json" "$out/searches.json" --into "$out" || failed=1

if ! command -v compute-sanitizer >/dev/null; then
    echo "compute-sanitizer is not on PATH: not run"
else
    for tool in memcheck racecheck; do
        if [ $((limit - 25 - SECONDS)) -lt 60 ]; then echo "$tool: no time left, not run"; continue; fi
        # Without torch's own allocator, whose blocks would hide what is read beside a tensor.
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 part "$tool" 120 compute-sanitizer --tool "$tool" --error-exitcode 9 \
            "$python" -m pytest -q -p no:cacheprovider --require-gpu tests/kernel_tests \
            -k "(prime or one-number) and float32 and not six"
    done
fi
exit "$failed"
