"""Measures a checkpoint on scenes that it has not seen: exact answers and captions, boxes, masks, and average precision.

    python -m demo.evaluate [--model FOLDER] [--count PICTURES] [--seed S] [--quantize int8] [--grammar]

The model answers the questions of shapes.ASKED about each picture. An answer or caption is right only if every letter is right.
For a `detect` question, generated and true boxes with the same label are matched, the best pairs first; the score is the sum of
the IoU of these pairs, divided by the number of true or of generated boxes, whichever is larger. The score of a `segment`
question is computed from masks in the same way, if the checkpoint has a codec. A `several` question is a `detect` or a `segment`.
`ocr` asks for words that were in training, `letters` asks for random letters, and in `blank` the picture has no text. Training
draws its scenes from other seeds.

Then COCO's average precision, over the IoU from 0.50 to 0.95, is computed for all boxes of `detect` together. Each (question,
label) pair is a separate image for COCO, so that a box counts only for the label that it was generated for. Boxes are evaluated
with and without their scores, and with generated or expected coordinates (expected: see outputs.ParsedObject). The mean errors of
both kinds of coordinates are printed, too. The output has one line per measure. The last line is JSON, with the curves that
notes/boxes_figures.py draws.
"""

import argparse
import contextlib
import io
import json
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from demo import shapes
from paligemma.learning.scores import mask_iou, pycocotools_problem
from paligemma.objects.exports import coco, coco_results, collect
from paligemma.objects.outputs import NormalizedBox, ParsedObject, as_json
from paligemma.tasks import OBJECT_TASKS, Annotator, Request, Result, in_order

ROOT = Path(__file__).resolve().parent.parent
ANSWERS = ("color", "shape", "count", "exists", "where")
SIZE = 224  # pixels of a picture's side
ROWS = 96  # number of questions that are decoded at the same time
CURVES = ("0.50", "0.75")  # the IoUs whose precision-recall curves are stored
MAX_NEW_TOKENS = 112  # a caption is shorter, and so are four boxes with masks


@dataclass(frozen=True)
class Question:
    """A question about a scene.

    Args:
        kind: a key of shapes.QUESTIONS.
        prefix, suffix: the question and its answer.
        true: the right objects for `detect` and `segment`. Boxes and masks are exact, not rounded to the tokens of the answer.
    """

    kind: str
    prefix: str
    suffix: str
    true: list[ParsedObject]

    @property
    def task(self) -> str:
        task = self.prefix.partition(" ")[0]
        return task if task in OBJECT_TASKS else "ask"

    @property
    def words(self) -> str:
        return self.prefix.partition(" ")[2]


def truth(scene: shapes.Scene, prefix: str) -> list[ParsedObject]:
    """The objects that a `detect` or `segment` question asks for; [] for other questions."""
    task, _, words = prefix.partition(" ")
    named = shapes.named(scene, words.split(" ; ")) if task in OBJECT_TASKS else []
    masks = [shapes.silhouette(shape, SIZE) if task == "segment" else None for shape, _ in named]
    return [
        ParsedObject(word, NormalizedBox.from_locations(shape.box, denominator=1), mask=mask)
        for (shape, word), mask in zip(named, masks, strict=True)
    ]


def questions(count: int, seed: int) -> list[tuple[shapes.Scene, list[Question]]]:
    """The scenes that demo.shapes draws from this seed, each with its questions."""
    scenes = []
    for index in range(count):
        rng = np.random.default_rng([seed, index])
        scene = shapes.make_scene(rng)
        asked = {}
        for kind in shapes.ASKED:
            for question in shapes.ask(scene, rng, [kind]):
                asked.setdefault(question, kind)
        scenes.append((scene, [Question(kind, *question, true=truth(scene, question[0])) for question, kind in asked.items()]))
    return scenes


def answers(annotator: Annotator, asked: list[tuple[shapes.Scene, list[Question]]]) -> list[Result]:
    """The answers of the model to all questions, in the order of `asked`."""

    def requests():
        for scene, scene_questions in asked:
            picture = shapes.draw(scene, SIZE)
            for question in scene_questions:
                yield Request(picture=picture, task=question.task, text=question.words, prompt=question.prefix)

    return list(in_order(annotator.run(requests()), sum(len(scene_questions) for _, scene_questions in asked)))


# Scores


def box_overlap(a: ParsedObject, b: ParsedObject) -> float:
    return a.box.iou(b.box) if a.box and b.box else 0.0


def mask_overlap(a: ParsedObject, b: ParsedObject) -> float:
    return mask_iou(a.mask, b.mask) if a.mask is not None and b.mask is not None else 0.0


def matches(
    generated: list[ParsedObject], true: list[ParsedObject], overlap: Callable[[ParsedObject, ParsedObject], float]
) -> list[tuple[float, ParsedObject, ParsedObject]]:
    """Pairs of the same label, (overlap, generated, true), the best first; each object is in one pair at most."""
    pairs = [(overlap(a, b), i, j) for i, a in enumerate(generated) for j, b in enumerate(true) if a.label == b.label]
    found, used = [], set()
    for value, i, j in sorted(pairs, reverse=True):
        if not used & {("generated", i), ("true", j)}:
            used |= {("generated", i), ("true", j)}
            found.append((value, generated[i], true[j]))
    return found


def objects_score(
    generated: list[ParsedObject], true: list[ParsedObject], overlap: Callable[[ParsedObject, ParsedObject], float]
) -> float:
    """From 0 (no object is right) to 1 (exactly the right objects)."""
    return sum(value for value, _, _ in matches(generated, true, overlap)) / max(len(generated), len(true), 1)


def score(question: Question, result: Result) -> float:
    """The score of one answer, from 0 to 1."""
    if not question.true:
        return float(result.text.strip() == question.suffix)
    generated = result.parsed.objects if result.parsed else []
    return objects_score(generated, question.true, mask_overlap if question.task == "segment" else box_overlap)


# Detection


def average_precision(
    generated: list[list[ParsedObject]], true: list[list[ParsedObject]]
) -> tuple[float, float, dict[str, list[float]]]:
    """(average precision over IoU from 0.50 to 0.95, average precision at IoU 0.50, {IoU: precision at recall 0, 0.01, ... 1}).

    Args:
        generated, true: the objects of each question. A box without a score counts as if its score were 1.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    found, expected = [], []
    for number, (a, b) in enumerate(zip(generated, true, strict=True)):
        for word in dict.fromkeys(obj.label for obj in [*b, *a]):
            for objects, rows in ((a, found), (b, expected)):
                named = [as_json(replace(obj, label="", mask=None), 1000, 1000) for obj in objects if obj.label == word]
                rows.append({"image": f"{number} {word}", "width": 1000, "height": 1000, "objects": named})
    reference = coco(collect(expected))
    results = coco_results(collect(found), reference)
    if not results:  # COCOeval fails on an empty list
        return 0.0, 0.0, {iou: [0.0] * 101 for iou in CURVES}
    with contextlib.redirect_stdout(io.StringIO()):  # COCOeval prints its progress
        index = COCO()
        index.dataset = reference
        index.createIndex()
        evaluation = COCOeval(index, index.loadRes(results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    precision = evaluation.eval["precision"][:, :, 0, 0, -1].round(4).tolist()  # by IoU and recall
    curves = {f"{iou:.2f}": curve for iou, curve in zip(evaluation.params.iouThrs, precision, strict=True)}
    return float(evaluation.stats[0]), float(evaluation.stats[1]), {iou: curves[iou] for iou in CURVES}


def detection(generated: list[list[ParsedObject]], true: list[list[ParsedObject]]) -> dict:
    """Average precision and curves with and without scores and expected coordinates, and the mean error of a coordinate."""
    expected = [[replace(obj, box=obj.expected or obj.box) for obj in objects] for objects in generated]
    without_scores = [[replace(obj, score=None) for obj in objects] for objects in generated]
    variants = {"plain": without_scores, "scores": generated, "scores_and_expected": expected}
    result: dict = {"map": {}, "map_50": {}, "curves": {}}
    for name, objects in variants.items():
        result["map"][name], result["map_50"][name], result["curves"][name] = average_precision(objects, true)
    pairs = [pair for a, b in zip(generated, true, strict=True) for pair in matches(a, b, box_overlap) if pair[0] >= 0.5]
    sides = ("y_min", "x_min", "y_max", "x_max")
    # "bin_error" is the error of the generated coordinates, because a generated <loc> token is one of 1024 bins.
    for name, box in (("bin", lambda found: found.box), ("expected", lambda found: found.expected or found.box)):
        errors = [abs(getattr(box(a), side) - getattr(b.box, side)) for _, a, b in pairs for side in sides]
        result[f"{name}_error"] = float(np.mean(errors)) if errors else None
    return result | {"boxes": sum(map(len, generated)), "true_boxes": sum(map(len, true)), "matched": len(pairs)}


def report_detection(result: dict) -> None:
    for name, key in (("mAP", "map"), ("AP at 0.50", "map_50")):
        values = result[key]
        print(f"{name:11}{values['plain']:6.1%} without scores, {values['scores']:.1%} with scores, "
              f"{values['scores_and_expected']:.1%} with scores and expected boxes")  # fmt: skip
    errors = [result[name] * 1000 for name in ("bin_error", "expected_error")]
    print(f"coordinate error in thousandths of the side: {errors[0]:.2f} generated, {errors[1]:.2f} expected")


def rounded(value: object) -> object:
    """The value with all floats rounded to five decimals, also those in nested dicts."""
    if isinstance(value, dict):
        return {key: rounded(inner) for key, inner in value.items()}
    return round(value, 5) if isinstance(value, float) else value


def annotator(options: argparse.Namespace) -> Annotator:
    """An Annotator with the model of the checkpoint, and with its mask codec if there is one."""
    from paligemma.objects.mask_codec import find_codec, load_codec
    from paligemma.programs.options import ModelFlags

    flags = ModelFlags(model_path=options.model, device=options.device, dtype=options.dtype, quantize=options.quantize)
    checkpoint = flags.open()
    file = find_codec(checkpoint.folder)
    return Annotator(
        flags.load(checkpoint),
        checkpoint.processor,
        codec=None if file is None else load_codec(file),
        rows=ROWS,
        max_new_tokens=MAX_NEW_TOKENS,
        uses_grammar=options.grammar,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Measures a checkpoint on unseen scenes.")
    parser.add_argument("--model", default=str(ROOT / "paligemma" / "bundled"), help="folder or hub id of the checkpoint")
    parser.add_argument("--count", type=int, default=300, help="number of pictures")
    parser.add_argument("--seed", type=int, default=1000, help="seed of the scenes; training used other seeds")
    parser.add_argument("--dtype", default=None, help="bf16, fp16 or fp32 (default: as stored)")
    parser.add_argument("--quantize", default=None, help="int8 or int4, as in inference.py")
    parser.add_argument("--grammar", action="store_true", help="constrain detect and segment to valid answers")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--show", type=int, default=0, help="number of wrong answers to print")
    options = parser.parse_args()

    problem = pycocotools_problem()
    if problem:
        print(f"note: {problem} Average precision is not computed; the other scores are printed.", file=sys.stderr)
    start = time.perf_counter()
    model_annotator = annotator(options)
    asked = questions(options.count, options.seed)
    flat = [question for _, scene_questions in asked for question in scene_questions]
    results = answers(model_annotator, asked)
    scores, shown = defaultdict(list), 0
    for question, result in zip(flat, results, strict=True):
        if question.task == "segment" and question.true and model_annotator.codec is None:
            continue
        value = score(question, result)
        scores[question.kind].append(value)
        if value < 0.5 and shown < options.show:
            shown += 1
            print(f"  {question.prefix!r}: generated {result.text!r}, expected {question.suffix!r}")
    for kind in dict.fromkeys(shapes.ASKED):
        if scores[kind]:
            print(f"{kind:8} {np.mean(scores[kind]):6.1%} of {len(scores[kind])}")
    together = [value for kind in ANSWERS for value in scores[kind]]
    numbers = {"answer": np.mean(together)} | {kind: np.mean(values) for kind, values in scores.items() if values}
    summary = {name: float(value) for name, value in numbers.items()}
    summary |= {"pictures": options.count, "questions": sum(map(len, scores.values())), "seed": options.seed}
    summary |= {"quantize": options.quantize, "grammar": options.grammar}
    if not problem:
        boxed = [(question, result) for question, result in zip(flat, results, strict=True) if question.task == "detect"]
        generated = [result.parsed.objects if result.parsed else [] for _, result in boxed]
        summary["detection"] = detection(generated, [question.true for question, _ in boxed])
        report_detection(summary["detection"])
    print(json.dumps(rounded(summary | {"seconds": time.perf_counter() - start})))


if __name__ == "__main__":
    main()
