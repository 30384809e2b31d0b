#!/usr/bin/env bash
# Checks and measures a CUDA machine within eight minutes, the most important first. An interrupted run keeps its results so far.
#
#   bash benchmarks/gpu.sh [--model DIR] [--out DIR] [--rounds N] [--steps NAMES] [--save] [--quick] [--device cpu]
#
# The steps, in this order:
#   doctor      does this machine compute what the CPU computes? (paligemma doctor)
#   checkpoint  makes --model if it does not exist: random weights of full size, drawn on the GPU
#   decode      milliseconds per token: our bf16, with recorded steps, and transformers
#   prefill     milliseconds to the first token: the same two
#   quantised   milliseconds per token: our int8 and int4
#   compiled    milliseconds per token: our bf16, recorded after torch.compile, which takes a minute or two
#   agree       distances between all variants and the CPU; prints "fine" or "WRONG" for each
#   batch, memory, start    see benchmarks/README.md
#
# Every measurement is printed when it is made, and appended as a line of JSON to measurements.jsonl in the folder --out, where each
# step also leaves its output (default: $OUT, else ~/.cache/paligemma/gpu). Each step has its own time limit, so that one that
# hangs does not use up the time of the others. The end of the output lists the steps that failed or had no time.
#
# --steps names the steps to run, separated by commas (default: all). --quick uses a tiny model, and --device cpu the CPU: together
# they show on any machine that the script works. PYTHON is the interpreter (default: that of .venv, else python3); it needs
# torch, tokenizers, safetensors, pillow and, for the comparison, transformers.
#
# The goals on an H200: decode reaches 0.85 of the bandwidth and is 8 times as fast as transformers; int8 and int4 are 1.6 and 2.2
# times as fast as bf16; prefill reaches 0.5 of the matrix rate; batch makes 3 times as many pictures per second as transformers;
# memory is 1.0 (bf16), 0.62 (int8) and 0.45 (int4) times that of transformers; start takes 0.6 times its time.
set -uo pipefail
umask 077
case " $* " in *" --help "* | *" -h "*) sed -n '2,/^[^#]/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" && exit ;; esac
here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
root=$(dirname -- "$here")
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
python=${PYTHON:-$root/.venv/bin/python}
[ -x "$python" ] || python=$(command -v python3)

temporary=${TMPDIR:-/tmp} device=cuda size=3b rounds=5 model='' out=${OUT:-} steps='' flags=()
while [ $# -gt 0 ]; do
    case $1 in
        --model | --out | --rounds | --steps | --device)
            [ $# -gt 1 ] || { echo "gpu.sh: $1 needs a value." >&2; exit 2; }
            declare "${1#--}=$2"
            shift
            ;;
        --quick) size=tiny && flags+=(--quick) ;;
        --save) flags+=(--save) ;;
        *) echo "gpu.sh: unknown flag $1. --help lists the flags." >&2; exit 2 ;;
    esac
    shift
done
model=${model:-$temporary/paligemma-$size} out=${out:-${XDG_CACHE_HOME:-$HOME/.cache}/paligemma/gpu}

if [ "$device" != cpu ]; then
    "$python" -c 'import importlib.util, sys; sys.exit(not importlib.util.find_spec("torch"))' || {
        echo "gpu.sh: $python has no torch. Set PYTHON to an interpreter that has it." >&2
        exit 6
    }
    "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || {
        echo "gpu.sh: torch finds no CUDA device. To measure the CPU, run: bash benchmarks/all.sh" >&2
        exit 6
    }
fi
mkdir -p -- "$out" || exit
export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$out/inductor}

failed=() running=''
stop() { # ends the running step, with all its processes, and the script
    [ -z "$running" ] || kill "$running" 2>/dev/null
    printf '\nstopped. Measurements and output of each step: %s\n' "$out" >&2
    exit "$1"
}
trap 'stop 130' INT
trap 'stop 143' TERM
step() { # step NAME SECONDS COMMAND...
    local name=$1 limit=$2 left=$((480 - SECONDS))
    shift 2
    [[ ,${steps:-$name}, == *,$name,* ]] || return 0
    printf '\n== %s, %s, %d s left\n' "$name" "$(date -u +%H:%M:%S)" "$left"
    if [ "$left" -lt 5 ]; then
        failed+=("$name (no time left)")
        return
    fi
    # In the background, because bash runs a trap only while it waits, and timeout keeps Ctrl-C from the commands that it starts.
    exec 3> >(trap '' INT TERM && exec tee "$out/$name.txt")
    local tee=$!
    timeout "$((limit < left ? limit : left))" "$@" >&3 2>&1 3>&- &
    running=$!
    wait "$running" || failed+=("$name (exit code $?)")
    exec 3>&-
    wait "$tee"
}
measure() { # measure NAME SECONDS SCRIPT FLAGS...
    local name=$1 limit=$2 script=$3
    shift 3
    step "$name" "$limit" "$python" -m "benchmarks.$script" --model "$model" --device "$device" --out "$out/measurements.jsonl" \
        --rounds "$rounds" "${flags[@]}" "$@"
}

[ "$device" = cpu ] || nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.mem --format=csv,noheader || true
step doctor 60 "$python" -m paligemma doctor --device "$device"
make=("$python" -m benchmarks.make_checkpoint --out "$model" --size "$size" --device "$device")
[ -e "$model/config.json" ] || step checkpoint 60 "${make[@]}"
measure decode 90 decode --sides "ours bf16,transformers bf16"
measure prefill 60 prefill --sides "ours bf16,transformers bf16"
measure quantised 90 decode --sides "ours bf16,ours int8,ours int4"
measure compiled 180 decode --sides "ours bf16,ours bf16 compiled"
step agree 150 "$python" -m benchmarks.agree --device "$device" --out "$out/measurements.jsonl"
measure batch 60 batch --sides "ours bf16,transformers bf16"
measure memory 90 memory --sides "ours bf16,ours int8,ours int4,transformers bf16"
measure start 60 start --sides "ours bf16,transformers bf16"

printf '\nmeasurements and output of each step: %s\n' "$out"
if [ ${#failed[@]} -gt 0 ]; then
    printf 'failed: %s\n' "${failed[*]}" >&2
    exit 1
fi
