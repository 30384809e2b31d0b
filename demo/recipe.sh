#!/usr/bin/env bash
# The whole recipe of PaliGemma in miniature, from scratch to a checkpoint and two transfers:
#
#     bash demo/recipe.sh [FOLDER] [HOURS]      default: FOLDER runs/recipe, HOURS 2.4
#
# HOURS is the time on two cores; the stages share it. A stage whose NAME.done exists is skipped, so after an interruption the
# same command starts again with the unfinished stage. The checkpoint is FOLDER/checkpoint, the log FOLDER/log.jsonl.
set -euo pipefail
case " $* " in *" --help "* | *" -h "*) sed -n '2,/^[^#]/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" && exit ;; esac
case "${1:-} ${2:-}" in -* | *" -"*) echo "recipe.sh: unknown flag. It takes [FOLDER] [HOURS]; --help explains them." >&2; exit 2 ;; esac
cd "$(dirname "${BASH_SOURCE[0]}")/.."
runs=${1:-runs/recipe} hours=${2:-2.4}
python=${PYTHON:-.venv/bin/python}

stage() {  # NAME SHARE ARGUMENTS...: the share of the time in percent, the arguments of train.py
  local name=$1 share=$2
  shift 2
  [ -e "$runs/$name.done" ] && return
  "$python" -m demo.train "$@" --name "$name" --runs "$runs" --minutes "$("$python" -c "print($hours * 0.6 * $share)")"
  touch "$runs/$name.done"
}

mkdir -p "$runs"
# Stage 0 of the paper: the vision tower alone, on pictures and their captions, at 84 x 84 pixels.
stage tower 7 contrastive --pixels 84 --batch 48 --head_weight 1
# The same with other scenes: the tower mainly improves at reading letters.
stage letters 6 contrastive --pixels 84 --batch 48 --head_weight 1 --start tower.pt --seed 5
# Stage 1: vision tower and decoder, on all tasks.
stage joint 20 shared --pixels 84 --start letters.pt --seed 2 --final 0.1 --tower_rate 0.5 --head_weight 0.5
# Stage 2: higher resolution, 64 patches instead of 36.
stage higher 8 shared --pixels 112 --start joint.pt --seed 3 --muon_lr 0.014 --adam_lr 1.5e-3 --bins 10 \
  --tower_rate 1 --head_weight 1 --final 0.1
# Then with the prefix-LM mask of inference (`prefix`) instead of one pass for all questions about a picture (`shared`).
stage last 16 prefix --pixels 112 --start higher.pt --seed 4 --batch 16 --muon_lr 0.007 --adam_lr 8e-4 --bins 5 \
  --tower_rate 0.5 --head_weight 0.5
# The same with more questions per picture and lower learning rates.
stage polish 4 prefix --pixels 112 --start last.pt --seed 6 --batch 16 --questions 5 --muon_lr 0.003 --adam_lr 4e-4 --bins 2 \
  --tower_rate 0.5 --head_weight 0.5
# The learning rates rise once more, for reading words, which takes the longest.
stage words 39 prefix --pixels 112 --start polish.pt --seed 7 --batch 16 --questions 5 --muon_lr 0.006 --adam_lr 7e-4 --bins 3 \
  --tower_rate 0.5 --head_weight 0
"$python" -m demo.train export --start words.pt --runs "$runs" --out "$runs/checkpoint"
cp paligemma/bundled/vae-oid.npz "$runs/checkpoint/"  # made by demo/codec.py
"$python" -m demo.evaluate --model "$runs/checkpoint" | tee "$runs/scores.txt"
# Stage 3: fine-tuning on a task that the model cannot do yet, once of all weights, and once of an adapter.
"$python" -m demo.transfer --out "$runs/largest"
transfer() {  # METHOD FLAGS...
  "$python" -m paligemma finetune --model_path "$runs/checkpoint" --config "$runs/largest/finetune.yaml" --output "$runs/$1" --method "$@" --resume
}
transfer full
transfer lora --learning_rate 5e-3  # the learning rate in finetune.yaml is for all weights
