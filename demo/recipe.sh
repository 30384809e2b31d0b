#!/usr/bin/env bash
# The whole recipe of PaliGemma in miniature, from nothing to a checkpoint and two transfers:
#
#     bash demo/recipe.sh [FOLDER] [HOURS]      default: FOLDER runs/recipe, HOURS 2.4
#
# HOURS is the time on two cores; the stages share it. A stage whose NAME.done exists is skipped, so a recipe that was
# interrupted starts again with the stage that it was in. The checkpoint is FOLDER/checkpoint, the log FOLDER/log.jsonl.
set -euo pipefail
case " $* " in *" --help "* | *" -h "*) sed -n '2,/^[^#]/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" && exit ;; esac
case "${1:-} ${2:-}" in -* | *" -"*) echo "recipe.sh: unknown flag. It takes [FOLDER] [HOURS]; --help explains them." >&2; exit 2 ;; esac
cd "$(dirname "${BASH_SOURCE[0]}")/.."
runs=${1:-runs/recipe} hours=${2:-2.4}
python=${PYTHON:-.venv/bin/python}

stage() {  # NAME, its share of the time in percent, and arguments of train.py
  local name=$1 share=$2
  shift 2
  [ -e "$runs/$name.done" ] && return
  "$python" -m demo.train "$@" --name "$name" --runs "$runs" --minutes "$("$python" -c "print($hours * 0.6 * $share)")"
  touch "$runs/$name.done"
}

mkdir -p "$runs"
# 0. The vision tower, on captions, at 84 x 84 pixels.
stage tower 7 contrastive --pixels 84 --batch 48 --head_weight 1
stage letters 6 contrastive --pixels 84 --batch 48 --head_weight 1 --start tower.pt --seed 5
# 1. Tower and decoder, on the mixture of tasks.
stage joint 20 shared --pixels 84 --start letters.pt --seed 2 --final 0.1 --tower_rate 0.5 --head_weight 0.5
# 2. Higher resolution: 64 patches instead of 36. Then the same pass as in inference, where the picture attends to the question.
stage higher 8 shared --pixels 112 --start joint.pt --seed 3 --muon_lr 0.014 --adam_lr 1.5e-3 --bins 10 \
  --tower_rate 1 --head_weight 1 --final 0.1
stage last 16 prefix --pixels 112 --start higher.pt --seed 4 --batch 16 --muon_lr 0.007 --adam_lr 8e-4 --bins 5 \
  --tower_rate 0.5 --head_weight 0.5
stage polish 4 prefix --pixels 112 --start last.pt --seed 6 --batch 16 --questions 5 --muon_lr 0.003 --adam_lr 4e-4 --bins 2 \
  --tower_rate 0.5 --head_weight 0.5
stage words 39 prefix --pixels 112 --start polish.pt --seed 7 --batch 16 --questions 5 --muon_lr 0.006 --adam_lr 7e-4 --bins 3 \
  --tower_rate 0.5 --head_weight 0
"$python" -m demo.train export --start words.pt --runs "$runs" --out "$runs/checkpoint"
cp paligemma/bundled/vae-oid.npz "$runs/checkpoint/"  # made by demo/codec.py
"$python" -m demo.evaluate --model "$runs/checkpoint" | tee "$runs/scores.txt"
# 3. A transfer to a task that the model cannot do: with all weights, and as an adapter.
"$python" -m demo.transfer --out "$runs/largest"
transfer() {  # METHOD and more flags; the learning rate of finetune.yaml is for all weights
  "$python" -m paligemma finetune --model_path "$runs/checkpoint" --config "$runs/largest/finetune.yaml" --output "$runs/$1" --method "$@" --resume
}
transfer full
transfer lora --learning_rate 5e-3
