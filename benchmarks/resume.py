"""Kills fine-tuning runs at random moments, resumes them, and counts those that equal an uninterrupted run bit for bit.

    python -m benchmarks.resume [--kills 20] [--seed 0]

Each run is `paligemma finetune` on pictures of demo/transfer.py, with an evaluation and a checkpoint every few updates. It is
killed by SIGKILL at a random moment within the duration of an uninterrupted run (start, updates, writing a checkpoint, writing
the result) and is started again with --resume. At the end it must have the same loss in every line of metrics.jsonl, without
missing or repeated lines, the same scores, and the same bytes in model/model.safetensors. Every fourth run is killed twice. The
last line of the output is JSON.
"""

import argparse
import hashlib
import json
import random
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from paligemma.files import parse_json

ROOT = Path(__file__).resolve().parent.parent
TIMES = ("seconds",)  # keys of metrics.jsonl that may differ: measured times


def command(folder: Path, output: Path, steps: int) -> list[str]:
    settings = {"config": folder / "finetune.yaml", "output": output, "steps": steps, "save_every": 3, "evaluate_every": 5}
    settings |= {"batch_size": 4, "num_scored": 4, "lora_dropout": 0.1, "method": "lora"}
    return [sys.executable, "-m", "paligemma", "finetune", *(f"--{name}={value}" for name, value in settings.items())]


def run(arguments: list[str], kill_after_s: float | None = None) -> bool:
    """True if the run ended by itself, False if it was killed after `kill_after_s` seconds."""
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    with suppress(subprocess.TimeoutExpired):
        _, errors = process.communicate(timeout=kill_after_s)
        if process.returncode:
            raise SystemExit(f"a run ended with {process.returncode}: {errors}")
        return True
    process.kill()
    process.communicate()
    return False


def result(output: Path) -> tuple[list[dict], str]:
    """The lines of metrics.jsonl without their times, and the hash of the weights."""
    lines = [parse_json(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    weights = hashlib.sha256((output / "model" / "model.safetensors").read_bytes()).hexdigest()
    return [{name: value for name, value in line.items() if name not in TIMES} for line in lines], weights


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="number of runs")
    parser.add_argument("--steps", type=int, default=20, help="updates per run")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random moments")
    options = parser.parse_args()
    draw = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        demo = [sys.executable, "-m", "demo.transfer", "--out", str(folder), "--count", "40"]
        subprocess.run(demo, check=True, stdout=subprocess.DEVNULL)
        start = time.monotonic()
        run(command(folder, folder / "uninterrupted", options.steps))
        duration, expected = time.monotonic() - start, result(folder / "uninterrupted")
        equal, steps_at_kill, killed = 0, [], 0
        for number in range(options.kills):
            output = folder / f"run{number}"
            arguments, kills = command(folder, output, options.steps), 2 if number % 4 == 3 else 1
            for attempt in range(kills):
                if run(arguments + ["--resume"] * (attempt > 0), draw.uniform(0, duration)):
                    break
                killed += 1
                metrics = output / "metrics.jsonl"
                steps_at_kill.append(len(metrics.read_text().splitlines()) if metrics.exists() else 0)
            run([*arguments, "--resume"])
            is_equal = result(output) == expected
            equal += is_equal
            print(
                f"run {number}: killed with {steps_at_kill[-1:]} lines written, {'equal' if is_equal else 'DIFFERENT'}",
                flush=True,
            )
        print(json.dumps({"runs": options.kills, "killed": killed, "equal": equal, "lines_at_kill": steps_at_kill}))


if __name__ == "__main__":
    main()
