"""Pictures per second of `paligemma annotate` on a folder, compared with a plain loop over transformers.

    python -m benchmarks.annotate [--model CHECKPOINT] [--pictures 64] [--rows 16]
    python -m benchmarks.annotate --kills 5         the same, and then 1,000 pictures, 10 of them damaged, with 5 kills

The plain loop opens a picture, calls the processor, generates, decodes, and takes the next picture. `annotate` decodes `rows`
pictures at the same time, starts the next picture as soon as an answer has ended (continuous batching), reads pictures in threads
meanwhile, and flushes every row to its file. Both sides read the same files from the disk and generate the same tokens in the
same dtype. The default is float32, because bfloat16 occasionally decides a near-tie differently. Both sides use the number of
threads that `annotate` uses: all cores, or one thread for a model as small as the demo's, where one thread is also faster for
transformers. The pictures are drawn by demo/shapes.py; the prompts alternate between a caption, boxes and a count.

With --kills, the program runs on a folder that contains damaged pictures, is killed by SIGKILL at random moments, and is
started again. Then the rows are counted: a picture without a row is lost, a picture with several rows is repeated.
"""

import argparse
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

# isort: off
from benchmarks import turns
from paligemma.files import BUNDLED
from paligemma.programs import job
from paligemma.programs.job import JobFlags, Question

if __name__ == "__main__":  # --help and wrong flags are answered before the slow imports
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=BUNDLED, help="folder or hub id (default: the bundled model)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--dtype", default="fp32", choices=("bf16", "fp32"))
    parser.add_argument("--pictures", type=int, default=64, help="number of pictures (default: 64)")
    parser.add_argument("--size", type=int, default=224, help="side of a picture in pixels")
    parser.add_argument("--rows", type=int, default=JobFlags.rows, help="pictures that are decoded at the same time")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--kills", type=int, default=0, help="also kill the program this many times")
    parser.add_argument("--quick", action="store_true", help="run briefly, only to see that the script works")
    parser.add_argument("--save", action="store_true", help="store the JSON in results/CLASS/")
    options = parser.parse_args()

import numpy as np
import torch
from paligemma.programs.journal import Journal, rows
from PIL import Image

from demo import shapes
# isort: on

PROMPTS = ("caption en", "detect shape", "answer en how many shapes are there?")
LONGEST = 64  # tokens
KILL_PICTURES, KILL_DAMAGED = 1000, 10
NAMES = {dtype: (f"ours {dtype}", f"transformers {dtype}") for dtype in ("bf16", "fp32")}


def draw_pictures(folder: Path, count: int, size: int) -> list[Path]:
    """Draws `count` pictures into four folders."""
    paths = [folder / str(number % 4) / f"{number:06d}.png" for number in range(count)]
    for number, path in enumerate(paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        shapes.draw(shapes.make_scene(np.random.default_rng([0, number])), size).save(path)
    return paths


# Speed


def ours(options: argparse.Namespace, asked: list[tuple[Path, str]], folder: Path) -> Callable[[], dict]:
    """The loop of `annotate`, with a new output file in each round."""
    flags = JobFlags(
        positional=(str(folder),),
        model_path=str(options.model),
        device=options.device,
        dtype=options.dtype,
        output=str(folder / "rows.jsonl"),
        rows=options.rows,
        max_tokens_to_generate=LONGEST,
    )
    checkpoint = flags.open()
    annotator = job.make_annotator(flags, checkpoint)
    eos = checkpoint.config.eos_token_id

    def run() -> dict:
        questions = [Question(str(path), str(path), prompt, *job.read_prompt(prompt)) for path, prompt in asked]
        answers, start = {}, time.perf_counter()
        Path(flags.output).unlink(missing_ok=True)
        with Journal(flags.output, job.settings(flags, checkpoint)) as journal:
            for row, _, result in job.answer(annotator, questions, flags):
                journal.write(row)
                answers[row["image"]] = [token for token in result.token_ids if token != eos]
        return {"seconds": time.perf_counter() - start, "tokens": [answers[str(path)] for path, _ in asked]}

    return run


def theirs(options: argparse.Namespace, asked: list[tuple[Path, str]]) -> Callable[[], dict]:
    """The plain loop over transformers."""
    from transformers import AutoProcessor, PaliGemmaForConditionalGeneration

    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[options.dtype]
    processor = AutoProcessor.from_pretrained(options.model)
    model = PaliGemmaForConditionalGeneration.from_pretrained(options.model, dtype=dtype).to(options.device).eval()

    def run() -> dict:
        tokens, start = [], time.perf_counter()
        for path, prompt in asked:
            picture = Image.open(path).convert("RGB")
            inputs = processor(images=picture, text="<image>" + prompt, return_tensors="pt").to(options.device, dtype)
            output = model.generate(**inputs, do_sample=False, max_new_tokens=LONGEST)
            answer = output[0, inputs["input_ids"].shape[1] :].tolist()
            processor.decode(answer, skip_special_tokens=True)
            tokens.append([token for token in answer if token != model.generation_config.eos_token_id])
        return {"seconds": time.perf_counter() - start, "tokens": tokens}

    return run


def compare(options: argparse.Namespace, folder: Path) -> dict:
    """Measures both loops alternately; returns the pictures per second of each."""
    paths = draw_pictures(folder, options.pictures, options.size)
    asked = [(path, PROMPTS[number % len(PROMPTS)]) for number, path in enumerate(paths)]
    mine, plain = NAMES[options.dtype]
    seconds = turns.in_turn({mine: ours(options, asked, folder), plain: theirs(options, asked)}, options)
    print(f"{len(paths)} pictures of {options.size} x {options.size}, {options.rows} at the same time; time per picture:")
    each = {name: [value / len(paths) for value in values] for name, values in seconds.items()}
    found = turns.compare(each, baseline=plain)
    for row in found.values():
        row["pictures_per_s"] = float(f"{1e3 / row['ms']['median']:.4g}")
    return {"pictures": len(paths), "size": options.size, "in_flight": options.rows, "dtype": options.dtype, "ways": found}


# Kills


def count_rows(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def kill(options: argparse.Namespace, folder: Path) -> dict:
    """Starts and kills `annotate` several times; then lets it finish and counts the rows."""
    count, num_damaged = (12, 2) if options.quick else (KILL_PICTURES, KILL_DAMAGED)
    paths = draw_pictures(folder / "photos", count, 32)
    draw = random.Random(0)
    bad = draw.sample(paths, num_damaged)
    for path in bad:
        path.write_bytes(path.read_bytes()[: draw.randrange(60)])
    file = folder / "rows.jsonl"
    command = [sys.executable, "-m", "paligemma", "annotate", "photos", "--task=detect", "shape", f"--output={file}"]
    command += [f"--model_path={options.model}", f"--rows={options.rows}"]
    start = partial(subprocess.Popen, command, cwd=folder, stderr=subprocess.PIPE)
    kept = []
    for left in range(options.kills, 0, -1):
        present = count_rows(file)
        limit = present + draw.randrange(1, max(2, 2 * (len(paths) - present) // (left + 1)))
        process = start()
        while process.poll() is None and count_rows(file) < limit:
            time.sleep(0.001)
        time.sleep(draw.random() / 50)
        process.kill()
        process.communicate()
        kept.append(count_rows(file) - 1)
        print(f"killed with {kept[-1]} rows in the file")
    process = start()
    print(process.communicate()[1].decode().strip())
    found = Counter(row["image"] for row in rows(file))
    failed = {row["image"] for row in rows(file) if "error" in row}
    return {
        "pictures": len(paths),
        "bad": len(bad),
        "rows_at_kills": kept,
        "exit_code": process.returncode,
        "lost": len(paths) - len(found),
        "repeated": sum(found.values()) - len(found),
        "errors_are_the_bad_ones": failed == {str(path.relative_to(folder)) for path in bad},
    }


def main(options: argparse.Namespace) -> None:
    options.model, options.script = options.model.resolve(), "annotate"
    if options.quick:
        options.rounds, options.pictures = 1, 6
    with tempfile.TemporaryDirectory() as folder:
        results = compare(options, Path(folder) / "speed")
        if options.kills:
            results["kills"] = kill(options, Path(folder) / "kills")
    turns.finish(options, results)


if __name__ == "__main__":
    main(options)
