"""Writes data to fine-tune the demo checkpoint on a task that it cannot do: to tell which shape is the largest.

    python -m demo.transfer --out runs/largest
    python -m paligemma finetune --config runs/largest/finetune.yaml --output runs/largest/full
    python -m paligemma finetune --config runs/largest/finetune.yaml --output runs/largest/lora --method lora --learning_rate 5e-3

The demo was not trained on this question, nor on any other question in which sizes are compared. The scenes are drawn by
shapes.py from seeds that the demo's training does not use, and have at least two shapes. Scenes are skipped if the sides of the
two largest shapes differ by less than a tenth.
"""

import argparse
import json
from collections.abc import Iterator
from itertools import count, islice
from pathlib import Path

import numpy as np

from demo import shapes
from paligemma.files import write_atomic

QUESTION = "answer en what is the largest shape?"
SEEDS = {"train": 3000, "valid": 4000}
MIN_RATIO = 1.1  # smallest ratio of the largest side to the second largest
SETTINGS = """\
train: {folder}/train.jsonl
valid: {folder}/valid.jsonl
epochs: 4
learning_rate: 3.0e-4
max_text_tokens: 64
"""


def scenes(seed: int) -> Iterator[tuple[shapes.Scene, str]]:
    """An endless series of scenes in which one shape is clearly the largest, each with the name of that shape."""
    for index in count():
        scene = shapes.make_scene(np.random.default_rng([seed, index]))
        largest, *others = sorted(scene.shapes, key=lambda shape: -shape.side)
        if others and largest.side > MIN_RATIO * others[0].side:
            yield scene, largest.name


def write_split(out: Path, name: str, number: int, size: int) -> None:
    """Writes `number` pictures, then OUT/NAME.jsonl in one step, so that it is always complete."""
    (out / name).mkdir(parents=True, exist_ok=True)
    lines = []
    for index, (scene, largest) in enumerate(islice(scenes(SEEDS[name]), number)):
        image = f"{name}/{index:05d}.png"
        shapes.draw(scene, size).save(out / image)
        lines.append(json.dumps({"image": image, "prefix": QUESTION, "suffix": largest}))
    write_atomic(out / f"{name}.jsonl", "".join(line + "\n" for line in lines))


def main() -> None:
    parser = argparse.ArgumentParser(description="Writes pictures and answers for a fine-tune of the demo checkpoint.")
    parser.add_argument("--out", type=Path, required=True, help="folder for the pictures, the JSONL files and finetune.yaml")
    parser.add_argument("--count", type=int, default=800, help="number of training pictures; a quarter as many for validation")
    parser.add_argument("--size", type=int, default=112, help="side of a picture in pixels")
    options = parser.parse_args()
    if options.count < 4 or options.size < 16:
        parser.error("--count must be at least 4, and --size at least 16.")
    for name, number in (("train", options.count), ("valid", options.count // 4)):
        write_split(options.out, name, number, options.size)
    (options.out / "finetune.yaml").write_text(SETTINGS.format(folder=options.out), encoding="utf-8")
    print(f"{options.count} training examples and {options.count // 4} validation examples are in {options.out}.")


if __name__ == "__main__":
    main()
