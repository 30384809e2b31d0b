#!/usr/bin/env bash
# Everything worth knowing on a CUDA machine, within eight minutes: correctness first, then the numbers.
#
#   bash benchmarks/gpu.sh [--model DIR] [further flags of the scripts, such as --save or --quick]
#
# DIR (default: paligemma-3b in the temporary folder) is made if it is not there. Every step has a limit of its own, so that
# one that hangs does not cost the rest; what failed is said at the end. PYTHON names another interpreter than .venv's.
set -uo pipefail
here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
root=$(dirname -- "$here")
python=${PYTHON:-$root/.venv/bin/python}
[ -x "$python" ] || python=$(command -v python3)
model=${TMPDIR:-/tmp}/paligemma-3b
if [ "${1:-}" = --model ]; then
    model=$2
    shift 2
fi

if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "gpu.sh: torch finds no CUDA device here, so there is nothing to measure. bash benchmarks/all.sh measures the CPU." >&2
    exit 6
fi

failed=()
step() { # step NAME SECONDS COMMAND...
    local name=$1 limit=$2
    shift 2
    printf '\n== %s, %s\n' "$name" "$(date -u +%H:%M:%S)"
    timeout "$limit" "$@" || failed+=("$name (exit code $?)")
}
measure() { # measure SCRIPT SECONDS FLAGS...
    local script=$1 limit=$2
    shift 2
    step "$script" "$limit" "$python" "$here/$script.py" --model "$model" --device cuda "$@"
}

nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.mem --format=csv,noheader || true
"$python" -c 'import torch; print("torch", torch.__version__, "CUDA", torch.version.cuda, "cuDNN", torch.backends.cudnn.version())'
"$python" -c 'import transformers; print("transformers", transformers.__version__)' || true

step agree 60 "$python" "$here/agree.py" --device cuda
step pytest 90 "$python" -m pytest -q -x "$root"/tests/test_modeling_{siglip,gemma,paligemma}.py "$root"/tests/test_generation.py
[ -e "$model/config.json" ] || step checkpoint 150 "$python" "$here/make_checkpoint.py" --out "$model"
measure decode 150 "$@"
measure prefill 60 "$@"
measure batch 90 --rounds 2 "$@"
measure memory 90 "$@"
measure start 90 --rounds 3 "$@"

if [ ${#failed[@]} -gt 0 ]; then
    printf '\nfailed: %s\n' "${failed[*]}" >&2
    exit 1
fi
