#!/usr/bin/env bash
# Every benchmark of this folder on the CPU, one after another, the most telling first.
#
#   bash benchmarks/all.sh --model DIR [--save] [--quick]
#
# DIR is a checkpoint such as make_checkpoint.py writes; without one there it is made. Nothing else should run meanwhile.
# Its quantised copies, DIR-int8 and DIR-int4, are made anew. With --save the JSON goes to results/ and the plot is drawn.
set -euo pipefail
case " $* " in *" --help "* | *" -h "*) sed -n '2,/^[^#]/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" && exit ;; esac
here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
python=${PYTHON:-$here/../.venv/bin/python}
export PYTHONPATH=$here/..${PYTHONPATH:+:$PYTHONPATH}

model='' save=()
for ((i = 1; i <= $#; i++)); do
    case ${!i} in
        --model) next=$((i + 1)) && model=${!next} ;;
        --model=*) model=${!i#*=} ;;
        --save) save=(--save) ;;
        --quick) ;;
        *) [ "${next:-}" = "$i" ] || { echo "all.sh: unknown argument ${!i}. --help says what there is." >&2; exit 2; } ;;
    esac
done
if [ -z "$model" ]; then
    echo "Say which checkpoint: bash benchmarks/all.sh --model DIR" >&2
    exit 2
fi
[ -e "$model/config.json" ] || "$python" -m benchmarks.make_checkpoint --out "$model"
rm -rf -- "${model%/}-int8" "${model%/}-int4"

for script in decode prefill memory start batch quality growth; do
    printf '\n== %s, %s\n' "$script" "$(date -u +%H:%M:%S)"
    "$python" -m "benchmarks.$script" "$@"
done
printf '\n== products, %s\n' "$(date -u +%H:%M:%S)"
"$python" -m benchmarks.products "${save[@]}"
if [ ${#save[@]} -gt 0 ]; then
    "$python" -m benchmarks.plot
fi
