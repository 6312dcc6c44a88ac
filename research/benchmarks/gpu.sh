#!/usr/bin/env bash
# Everything about the GPU path in one command, on a machine with an NVIDIA GPU:
#
#     pip install --no-deps --no-build-isolation -e .    # once
#     research/benchmarks/gpu.sh
#
# Builds the extension, runs the tests on the GPU, also under compute-sanitizer where it is there,
# measures with both backends and prints the bars. Needs no network. Every step reports and the next
# one goes on; each has a time limit, all of them together end within nine minutes. What comes out
# is in $OUT (default: research/benchmarks/results): a JSON and a PNG for each backend, gpu-cuda.* and
# gpu-torch.*, and what every step said, gpu.log. PYTHON names the interpreter (default: python3).
# Exit code: 0 if no step failed.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.." || exit 1
PYTHON=${PYTHON:-python3}
OUT=${OUT:-research/benchmarks/results}
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
LOGS=$(mktemp -d)
trap 'rm -rf "$LOGS"' EXIT
rm -f "$OUT"/gpu-{cuda,torch}.{json,png} # results of another state of the code
: >"$OUT/gpu.log"
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
TOTAL=530 # seconds for everything
KEPT=10   # last lines to show where a step failed
failed=() slow=() finished=()

# step NAME LIMIT COMMAND...: run it into the log, report, go on.
step() {
    local name=$1 limit=$2 begun=$SECONDS left=$((TOTAL - SECONDS)) code log=$LOGS/$1
    shift 2
    if [ "$left" -lt 5 ]; then
        slow+=("$name (no time left)")
        echo "== $name: not begun, no time left"
        return
    fi
    [ "$limit" -gt "$left" ] && limit=$left
    timeout --kill-after=5 "$limit" "$@" >"$log" 2>&1 </dev/null
    code=$?
    { echo "== $name: $*" && cat "$log" && echo; } >>"$OUT/gpu.log"
    case $code in
        0) finished+=("$name") && echo "== $name: done in $((SECONDS - begun)) s" ;;
        124 | 137)
            slow+=("$name (stopped after $limit s)")
            echo "== $name: stopped after $limit s; it last said:"
            tail -n "$KEPT" "$log"
            ;;
        *)
            failed+=("$name")
            echo "== $name: failed with code $code; it last said:"
            tail -n "$KEPT" "$log"
            ;;
    esac
    return 0
}

# Under the sanitizer a step also fails where the tool found an error (code 9), and it runs the
# tests one process deep, without the cache allocator that would hide accesses out of bounds.
sanitize() {
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 step "$1" "$2" compute-sanitizer --tool "$1" \
        --error-exitcode 9 --print-limit 20 "$PYTHON" -m pytest tests -m gpu -x -p no:cacheprovider
}

measure() {
    local backend=$1 limit=$2 budget=$3
    shift 3
    step "$backend-$1" "$limit" "$PYTHON" research/benchmarks/upsampling.py "--$1" --device cuda \
        --backend "$backend" --budget "$budget" \
        -o "$OUT/gpu-$backend.json" --plot "$OUT/gpu-$backend.png"
}

if ! command -v nvidia-smi >/dev/null || ! nvidia-smi -L; then
    echo "no NVIDIA GPU is visible here; on a CPU run research/benchmarks/upsampling.py itself"
    exit 1
fi
"$PYTHON" -c 'import sys, torch; print("Python", sys.version.split()[0], "PyTorch", torch.__version__)'

step build 150 "$PYTHON" -m fmupsample build
step tests 100 "$PYTHON" -m pytest tests -m gpu -p no:cacheprovider
measure cuda 60 45 quick
measure torch 60 45 quick
measure cuda 70 50 sweep
measure torch 70 50 sweep
if command -v compute-sanitizer >/dev/null; then
    sanitize memcheck 90
    sanitize racecheck 90
else
    echo "== compute-sanitizer is not here: no memcheck, no racecheck"
fi

for backend in cuda torch; do
    echo
    echo "Backend $backend:"
    grep -E '^cuda ' "$LOGS/$backend-quick" 2>/dev/null || echo "not measured"
done
echo
echo "done: ${finished[*]:-nothing}"
[ "${#slow[@]}" -gt 0 ] && printf 'out of time: %s\n' "${slow[@]}"
[ "${#failed[@]}" -gt 0 ] && printf 'failed: %s\n' "${failed[@]}"
[ "${#failed[@]}" -eq 0 ]
