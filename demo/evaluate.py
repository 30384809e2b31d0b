"""Measures a checkpoint on scenes that it has not seen: exact answers, exact captions, boxes by their overlap.

    python demo/evaluate.py [--model FOLDER] [--count PICTURES] [--seed S] [--quantize int8]

Each picture is encoded once and asked nine questions. An answer or caption counts if it is right to the letter. A `detect`
scores the sum of IoU over boxes of the same label, matched best first, divided by the larger of the numbers of true and said
boxes. Training draws its scenes from other seeds. One line a kind of question; the last line is JSON.
"""

import argparse
import json
import re
import sys
import time
from collections import defaultdict
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "demo")]

import shapes  # noqa: E402

ANSWERS = ("color", "shape", "count", "exists", "where")
KINDS = [*shapes.QUESTIONS, "count", "exists", "detect"]
BOX = re.compile(r"<loc(\d{4})><loc(\d{4})><loc(\d{4})><loc(\d{4})>([^;<>]*)")
PICTURES = 16  # a batch


def boxes(text: str) -> list[tuple[str, tuple[float, ...]]]:
    """The labels and boxes (y_min, x_min, y_max, x_max as fractions) that a `detect` answer names."""
    return [(found[4].strip(), tuple(int(v) / 1023 for v in found[:4])) for found in BOX.findall(text)]


def iou(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    """Area that two boxes share over area that they cover."""
    height, width = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    shared = max(0.0, height) * max(0.0, width)
    covered = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared
    return shared / covered if covered > 0 else 0.0


def detect_score(said: str, true: str) -> float:
    """1 for the right boxes and no others, 0 for none right."""
    theirs, ours = boxes(said), boxes(true)
    pairs = [
        (iou(a, b), i, j)
        for i, (label, a) in enumerate(theirs)
        for j, (wanted, b) in enumerate(ours)
        if label == wanted
    ]  # fmt: skip
    total, used = 0.0, set()
    for overlap, i, j in sorted(pairs, reverse=True):
        if not used & {("said", i), ("true", j)}:
            used |= {("said", i), ("true", j)}
            total += overlap
    return total / max(len(theirs), len(ours), 1)


def questions(count: int, seed: int) -> list[tuple[shapes.Scene, list[tuple[str, str, str]]]]:
    """The scenes of `shapes.py --seed` and, for each, its questions as (kind, prefix, suffix)."""
    scenes = []
    for index in range(count):
        rng = np.random.default_rng([seed, index])
        scene = shapes.make_scene(rng)
        asked = {}
        for kind in KINDS:
            for question in shapes.ask(scene, rng, [kind]):
                asked.setdefault(question, kind)
        scenes.append((scene, [(kind, *question) for question, kind in asked.items()]))
    return scenes


def answers(model, processor, asked: list, max_new_tokens: int) -> list[str]:
    """What the model says to each question, in the order of `asked`, as questions() returns it."""
    import torch

    from generation import generate

    pictures = [shapes.draw(scene) for scene, _ in asked]
    prompts = [prefix for _, scene_questions in asked for _, prefix, _ in scene_questions]
    owner = torch.tensor([i for i, (_, scene_questions) in enumerate(asked) for _ in scene_questions])
    inputs = processor([pictures[i] for i in owner], prompts)
    first = torch.cat([torch.zeros(1, dtype=torch.int64), (owner.diff() > 0).nonzero()[:, 0] + 1])
    with torch.no_grad():
        inputs["image_features"] = model.encode_images(inputs.pop("pixel_values")[first])[owner.to(model.device)]
    steps = generate(model, inputs, max_new_tokens=max_new_tokens, eos_token_id=processor.eos_token_id)
    return [processor.decode(ids) for ids in torch.stack([step.cpu() for step in steps], dim=1).tolist()]


def main() -> None:
    parser = argparse.ArgumentParser(description="Measures a checkpoint on unseen scenes.")
    parser.add_argument("--model", default=str(ROOT / "demo" / "checkpoint"), help="folder or hub id")
    parser.add_argument("--count", type=int, default=300, help="number of pictures")
    parser.add_argument("--seed", type=int, default=1000, help="of the scenes; training used others")
    parser.add_argument("--dtype", default=None, help="bf16, fp16 or fp32; as stored if not given")
    parser.add_argument("--quantize", default=None, help="int8 or int4, as in inference.py")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--show", type=int, default=0, help="print that many wrong answers")
    options = parser.parse_args()

    from processing_paligemma import PaliGemmaProcessor
    from weights import load_model, resolve

    start = time.perf_counter()
    model = load_model(options.model, device=options.device, dtype=options.dtype, quantize=options.quantize)
    processor = PaliGemmaProcessor.from_pretrained(resolve(options.model))
    asked = questions(options.count, options.seed)
    scores, shown = defaultdict(list), 0
    for at in range(0, len(asked), PICTURES):
        batch = asked[at : at + PICTURES]
        said = answers(model, processor, batch, max_new_tokens=48)
        flat = [question for _, scene_questions in batch for question in scene_questions]
        for text, (kind, prefix, suffix) in zip(said, flat, strict=True):
            score = detect_score(text, suffix) if kind == "detect" else float(text.strip() == suffix)
            scores[kind].append(score)
            if score < 0.5 and shown < options.show:
                shown += 1
                print(f"  {prefix!r}: said {text!r}, right is {suffix!r}")
    for kind, values in scores.items():
        print(f"{kind:8} {np.mean(values):6.1%} of {len(values)}")
    together = [score for kind in ANSWERS for score in scores[kind]]
    numbers = {"answer": np.mean(together), "caption": np.mean(scores["caption"]), "detect": np.mean(scores["detect"])}
    numbers |= {kind: np.mean(scores[kind]) for kind in ANSWERS}
    result = {name: round(float(value), 4) for name, value in numbers.items()}
    result |= {"pictures": options.count, "questions": sum(map(len, scores.values())), "seed": options.seed}
    result |= {"quantize": options.quantize, "seconds": round(time.perf_counter() - start, 1)}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
