#!/usr/bin/env bash
# Runs every benchmark of this folder on the CPU, one after another, the most important first.
#
#   bash benchmarks/all.sh --model DIR [--save] [--quick]
#
# DIR is a checkpoint such as make_checkpoint.py writes. If it does not exist, it is made. Its quantised copies, DIR-int8 and
# DIR-int4, are deleted and made again. Run nothing else on the machine meanwhile. With --save, the JSON is stored in results/ and
# the plot is drawn.
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
        *) [ "${next:-}" = "$i" ] || { echo "all.sh: unknown argument ${!i}. --help lists the arguments." >&2; exit 2; } ;;
    esac
done
if [ -z "$model" ]; then
    echo "all.sh: no checkpoint given. Name one: bash benchmarks/all.sh --model DIR" >&2
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
