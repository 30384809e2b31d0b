#!/usr/bin/env bash
# Answers a question about a picture: makes .venv if it is missing, installs requirements.txt, starts inference.py.
#     bash launch_inference.sh detect street.jpg car person --save out.png
# All arguments are passed to inference.py (--help lists them). Each environment variable below sets the flag of the same name;
# a flag in the arguments overrides its variable.
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/make_venv.sh" requirements.txt
PALIGEMMA_COMMAND="bash $(printf %q "$0")"  # the command that --help and messages show
export PALIGEMMA_COMMAND
exec "$python" "$home/inference.py" \
    ${MODEL_PATH:+"--model_path=$MODEL_PATH"} \
    ${PROMPT:+"--prompt=$PROMPT"} \
    ${IMAGE_FILE_PATH:+"--image_file_path=$IMAGE_FILE_PATH"} \
    ${MAX_TOKENS_TO_GENERATE:+"--max_tokens_to_generate=$MAX_TOKENS_TO_GENERATE"} \
    ${TEMPERATURE:+"--temperature=$TEMPERATURE"} \
    ${TOP_P:+"--top_p=$TOP_P"} \
    ${DO_SAMPLE:+"--do_sample=$DO_SAMPLE"} \
    ${ONLY_CPU:+"--only_cpu=$ONLY_CPU"} \
    "$@"
