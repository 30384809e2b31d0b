"""Start: seconds from starting the process to the first token of an answer about a picture file; all files are in the page cache.

This is how long a user waits for the answer to one question: interpreter, imports, tokenizer, weights, picture, vision tower,
prompt. Our side is the command line, `python inference.py ... --max_tokens_to_generate 1 --json`. The other side is the shortest
script that does the same with AutoProcessor, from_pretrained and generate (THEIRS, below). The time ends when the line with the
token is read. "import torch" alone is the least time that either side could take. A quantised model is loaded from its own file,
which save_model wrote. The warm-up round stores Python's byte code and our compiled kernels, as a user's first run does.
"""

import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

from benchmarks import turns
from paligemma.files import parse_json

PROMPT = "caption en"
# With this variable, Python would compile our files at every start.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
THEIRS = """
import json, sys
from PIL import Image
from transformers import AutoProcessor, PaliGemmaForConditionalGeneration

folder, picture, prompt, device = sys.argv[1:]
processor = AutoProcessor.from_pretrained(folder)
model = PaliGemmaForConditionalGeneration.from_pretrained(folder, dtype="auto").to(device)
inputs = processor(images=Image.open(picture).convert("RGB"), text="<image>" + prompt, return_tensors="pt").to(device)
output = model.generate(**inputs, max_new_tokens=1, do_sample=False)
print(json.dumps({"token_ids": output[0, inputs["input_ids"].shape[1] :].tolist()}), flush=True)
"""


def first_line(command: list[str]) -> dict:
    """Runs a program. Returns the seconds to its first line of output and, if this line is JSON, the tokens in it."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
    line = process.stdout.readline()
    seconds = time.perf_counter() - start
    errors = process.communicate()[1]
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with exit code {process.returncode}:\n{errors}")
    return {"seconds": seconds} | ({"tokens": parse_json(line)["token_ids"]} if line.startswith("{") else {})


def main() -> None:
    picture = turns.HERE.parent / "examples" / "cat.png"
    options = turns.parse(__doc__, flags={"--picture": {"type": Path, "default": picture}})
    python, ways = [sys.executable, "-c"], {}
    turns.read_files(options.model)
    for name in options.sides:
        if name == turns.THEIRS:
            command = [*python, THEIRS, str(options.model), str(options.picture), PROMPT, options.device]
        elif name in (turns.OURS, turns.INT8, turns.INT4):
            kind = name.split()[1]
            folder = options.model if name == turns.OURS else turns.quantised(options.model, kind, options.device)
            turns.read_files(folder)
            flags = {"model_path": folder, "image_file_path": options.picture, "prompt": PROMPT, "device": options.device}
            command = [sys.executable, str(turns.HERE.parent / "inference.py"), "--json", "--max_tokens_to_generate=1"]
            command += [f"--{flag}={value}" for flag, value in flags.items()]
        else:
            continue  # a static cache makes no difference for the first token
        ways[name] = partial(first_line, command)
    ways["import torch"] = partial(first_line, [*python, "import torch; print(torch.__version__)"])
    seconds = turns.in_turn(ways, options)
    rows = turns.compare(seconds, scale=1, unit="s")
    turns.finish(options, {"ways": rows})


if __name__ == "__main__":
    main()
