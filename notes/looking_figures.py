"""Draws the figures of looking.md and prints its numbers, with the demo checkpoint: `python -m notes.looking_figures`.

looking.png      the explanation of a caption, as `--explain` draws it
maps.png         for each of two answers, two maps of the picture: the roll-out of attention, and the gradient
dependence.svg   how much the picture adds to the log-probability of answers that need the picture, and of answers that do not

The scenes are new: their seed was used neither in training nor when the maps were designed.
"""

import argparse
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":  # --help and wrong flags are answered before the slow imports
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from demo import shapes
from paligemma.checkpoints.weights import load_model
from paligemma.explanation import MIN_DEPENDENCE, Explanation, answer_logits, explain
from paligemma.explanation_sheet import draw_explanation, heat_map, with_boxes
from paligemma.generation import generate
from paligemma.modeling_paligemma import PaliGemmaForConditionalGeneration
from paligemma.processing_paligemma import PaliGemmaProcessor, load_image
from paligemma.svg import BLUE, GREEN, ORANGE, SOFT, Axes, Drawing

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
PICTURE = ROOT / "examples" / "shapes.png"
SCENES, SEED = 50, 40_001
ERASED = 16  # number of patches that are erased, of 64
NEEDS_NO_PICTURE = ("answer en is there a shape?", "answer en is there a dog?")  # every picture has shapes, no picture has a dog
NEEDS_PICTURE = ("caption", "color", "shape", "where", "detect")  # kinds of questions
LOW, HIGH = -2.0, 14.0  # the range of the figure in nats
SIDE = 280  # of a picture in a figure, pixels


@dataclass(frozen=True)
class Demo:
    """The bundled checkpoint."""

    model: PaliGemmaForConditionalGeneration
    processor: PaliGemmaProcessor

    def ask(self, picture: Image.Image, question: str) -> list[int]:
        steps = generate(self.model, self.processor(picture, question), max_new_tokens=100)
        return [int(tokens) for tokens in steps]

    def explain(self, picture: Image.Image, question: str, answer: list[int] | None = None) -> Explanation:
        """Explains an answer; by default the answer that the model generates."""
        ids = self.ask(picture, question) if answer is None else answer
        return explain(self.model, self.processor, self.processor(picture, question), ids)


def scenes() -> Iterator[tuple[int, shapes.Scene, Image.Image]]:
    """(number, scene, picture) of the first SCENES scenes with at least two shapes."""
    number = count = 0
    while count < SCENES:
        scene = shapes.make_scene(np.random.default_rng([SEED, number]))
        if len(scene.shapes) > 1:
            count += 1
            yield number, scene, shapes.draw(scene)
        number += 1


# Which patches does the answer depend on?


def targets_of(scene: shapes.Scene, number: int) -> Iterator[tuple[str, str, list[tuple[shapes.Shape, slice]]]]:
    """(kind, question, targets): a target is a shape, and the slice of the answer's words that are about this shape."""
    every = slice(None)
    for kind, attributes in (("color", ("kind",)), ("shape", ("color",)), ("where", ("kind", "color", "name"))):
        question = shapes.QUESTIONS[kind](scene, np.random.default_rng(number))
        if question:  # the same seed makes only_one choose the shape that the question is about
            yield kind, question[0], [(shapes.only_one(scene.shapes, np.random.default_rng(number), by=attributes)[0], every)]
    names = [shape.name for shape in scene.shapes]
    alone = [shape for shape in scene.shapes if names.count(shape.name) == 1]
    if alone:
        yield "detect", f"detect {alone[0].name}", [(alone[0], every)]
    # "a red circle, a blue star and ...": each colour word is followed by the kind of the shape.
    caption = shapes.ask_caption(scene, np.random.default_rng())[1].split()
    places = [place for place, word in enumerate(caption) if word in shapes.COLORS]
    yield "caption", "caption en", [(s, slice(p, p + 2)) for s, p in zip(scene.shapes, places, strict=True)]


def inside(shape: shapes.Shape, across: int) -> Tensor:
    """float32[across, across]: the share of each patch that lies in the shape's box."""
    edges = torch.arange(across) / across
    y, x, y_end, x_end = shape.box
    rows, columns = (
        ((edges + 1 / across).clamp(max=high) - edges.clamp(min=low)).clamp(min=0) * across
        for low, high in ((y, y_end), (x, x_end))
    )
    return rows[:, None] * columns


def is_hit(values: Tensor, shape: shapes.Shape) -> bool:
    """Whether the middle of the strongest patch lies in the box."""
    row, column = divmod(int(values.argmax()), len(values))
    y, x, y_end, x_end = shape.box
    return y <= (row + 0.5) / len(values) <= y_end and x <= (column + 0.5) / len(values) <= x_end


def measure_maps(demo: Demo) -> None:
    """Prints, for each map, how often the strongest patch lies in the right shape's box, and the share of the map's sum in it."""
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    chances = []
    for number, scene, picture in scenes():
        for kind, question, targets in targets_of(scene, number):
            words = demo.explain(picture, question).words
            for shape, part in targets:
                own = words[part]
                if not own:
                    continue
                area = inside(shape, 8)
                chances.append(float(area.mean()))
                for name in ("roll_out", "gradient"):
                    values = sum(getattr(word, name) for word in own)
                    mass = float((values * area).sum() / values.sum())
                    found.setdefault((kind, name), []).append((is_hit(values, shape), mass / float(area.mean())))
    print(f"a shape's box covers {np.mean(chances):.0%} of the picture")
    print("share of answers whose strongest patch lies in the box / mass in the box relative to a uniform map:")
    for kind in ("color", "shape", "where", "caption", "detect"):
        parts = []
        for name in ("roll_out", "gradient"):
            hits, mass = np.mean(found[kind, name], axis=0)
            parts.append(f"{name.replace('_', '-')} {hits:4.0%} / {mass:4.1f}")
        print(f"  {kind:8} {len(found[kind, 'gradient']):3} answers   " + "   ".join(parts))


@torch.no_grad()
def logprob_drops(demo: Demo, picture: Image.Image, question: str, ids: list[int], choices: list[Tensor]) -> list[float]:
    """How much the log-probability of the answer falls, in nats, when some patch vectors are replaced by the mean of all.

    Args:
        choices: sets of patches; each set is replaced separately and gives one number.
    """
    inputs = demo.processor(picture, question)
    types = torch.cat((inputs["token_type_ids"], torch.ones(1, len(ids), dtype=torch.int64)), dim=1)
    row = {"input_ids": torch.cat((inputs["input_ids"], torch.tensor([ids])), dim=1), "token_type_ids": types}
    features = demo.model.encode_images(inputs["pixel_values"])
    logprobs = []
    for patches in (torch.tensor([], dtype=torch.int64), *choices):
        erased = features.clone()
        erased[:, patches] = features.mean(1, keepdim=True)
        chosen = answer_logits(demo.model, row, erased).log_softmax(-1).gather(1, torch.tensor(ids)[:, None])
        logprobs.append(float(chosen.sum()))
    return [logprobs[0] - logprob for logprob in logprobs[1:]]


def measure_erasing(demo: Demo) -> None:
    """Prints how much the log-probability of answers falls when the strongest patches of a map, or random patches, are erased."""
    drops, draw = [], torch.Generator().manual_seed(0)
    for number, scene, picture in scenes():
        for kind, question, _ in targets_of(scene, number):
            if kind not in ("color", "shape", "where"):
                continue
            ids = demo.ask(picture, question)
            words = demo.explain(picture, question, ids).words
            if not words:
                continue
            maps = [sum(getattr(word, name) for word in words).flatten() for name in ("roll_out", "gradient")]
            choices = [values.topk(ERASED).indices for values in maps]
            drops.append(logprob_drops(demo, picture, question, ids, [*choices, torch.randperm(64, generator=draw)[:ERASED]]))
    rolled, gradient, drawn = np.mean(drops, axis=0)
    print(
        f"mean drop of the log-probability of {len(drops)} answers, in nats, when {ERASED} of 64 patches are erased: "
        f"strongest by gradient {gradient:.1f}, by roll-out {rolled:.1f}, random {drawn:.1f}"
    )


# Does the answer depend on the picture at all?


def dependences(demo: Demo) -> dict[str, list[float]]:
    """How many nats the picture adds to the log-probability of each answer, for three kinds of answers."""
    found: dict[str, list[float]] = {"needs the picture": [], '"no" or "0"': [], "does not need it": []}
    for number, scene, picture in scenes():
        found["does not need it"] += [demo.explain(picture, question).dependence for question in NEEDS_NO_PICTURE]
        for kind in (*NEEDS_PICTURE, "count", "exists"):
            question = shapes.QUESTIONS[kind](scene, np.random.default_rng(number))
            if not question:
                continue
            answer = demo.explain(picture, question[0])
            if kind in NEEDS_PICTURE:
                found["needs the picture"].append(answer.dependence)
            elif answer.text in ("no", "0"):
                found['"no" or "0"'].append(answer.dependence)
    return found


def draw_dependence(demo: Demo) -> None:
    """Draws dependence.svg; prints how often `--explain` warns that an answer does not depend on the picture."""
    found = dependences(demo)
    drawing = Drawing(640, 330)
    axes = Axes(drawing, (60, 50, 470, 270), x=(LOW, HIGH), y=(0, 1))
    ticks = list(range(-2, 15, 2)), [0, 0.25, 0.5, 0.75, 1]
    axes.frame(*ticks, "nats that the picture adds to the answer", "share of answers with fewer nats")
    axes.curve([(MIN_DEPENDENCE, 0), (MIN_DEPENDENCE, 1)], SOFT, "4 4")
    labels = []
    for (name, values), color in zip(found.items(), (GREEN, ORANGE, BLUE), strict=True):
        warned = sum(value < MIN_DEPENDENCE for value in values)
        median = round(np.median(values), 1) + 0.0  # + 0.0 turns -0.0 into 0.0
        print(f"{name:17} {len(values):3} answers, median {median:+5.1f} nats, {warned / len(values):4.0%} with a warning")
        levels = [(value, np.mean(np.array(values) <= value)) for value in np.linspace(LOW, HIGH, 321)]
        axes.curve(levels, color)
        labels.append((axes.at(*levels[-1])[1], name, color))
    drawing.labels(478, labels, gap=18)
    place = axes.at(MIN_DEPENDENCE, 0.6)
    drawing.text(place[0] + 5, place[1], "ln 2", size=12, fill=SOFT)
    drawing.save(HERE / "dependence.svg")


# Figures


def draw_maps(demo: Demo, picture: Image.Image) -> None:
    """Draws maps.png: for two answers, the picture and both maps."""
    small = picture.resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    sheet = Image.new("RGB", (3 * (SIDE + 12) - 12, 2 * (SIDE + 32)), "white")
    draw = ImageDraw.Draw(sheet)
    for row, question in enumerate(("answer en what color is the heart?", "detect cross")):
        found = demo.explain(picture, question)
        word, top = found.words[0], row * (SIDE + 32)
        panels = [(small, question), (heat_map(small, word.roll_out), "roll-out"), (heat_map(small, word.gradient), "gradient")]
        for column, (panel, title) in enumerate(panels):
            left = column * (SIDE + 12)
            sheet.paste(with_boxes(panel, [word]), (left, top))
            draw.text((left + SIDE / 2, top + SIDE + 15), title, "black", ImageFont.load_default(15), anchor="mm")
        print(f'"{question}": "{found.text}", roll-out: {word.share:.0%} of the mass ends in the picture')
    sheet.quantize(192).save(HERE / "maps.png", optimize=True)


def main() -> None:
    torch.set_num_threads(1)
    folder = ROOT / "paligemma" / "bundled"
    demo = Demo(load_model(folder, dtype="fp32"), PaliGemmaProcessor.from_pretrained(folder))
    picture = load_image(PICTURE)
    caption = demo.explain(picture, "caption en")
    draw_explanation(picture, caption).quantize(192).save(HERE / "looking.png", optimize=True)
    print(f'"{caption.text}": {caption.dependence:+.1f} nats from the picture, {math.exp(caption.logprob):.0%} likely')
    draw_maps(demo, picture)
    measure_maps(demo)
    measure_erasing(demo)
    draw_dependence(demo)


if __name__ == "__main__":
    main()
