"""Draws recipe.svg from the log of the run that made the demo checkpoint, demo/recipe.jsonl: `python -m notes.recipe_figures`.

Every training scene is new, so the share of right answers in a step is measured on scenes that the model has not seen. The
answers are predicted with teacher forcing (each token is predicted from the right tokens before it). demo/evaluate.py lets the
model generate the whole answer, so its numbers are lower.
"""

import argparse
from pathlib import Path

if __name__ == "__main__":  # --help and wrong flags are answered before the slow imports
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()

from paligemma.files import parse_json
from paligemma.svg import BLUE, FAINT, GREEN, ORANGE, PURPLE, SOFT, Axes, Drawing

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
LOG = ROOT / "demo" / "recipe.jsonl"
ANSWERS = ("color", "shape", "count", "exists", "where")
BEFORE = ("tower", "letters")  # the stages without a decoder
STAGES = {  # name in demo/recipe.sh: title in the figure ("polish" is too short for a title)
    "tower": "0: captions", "letters": "0: letters", "joint": "1: all tasks", "higher": "2: 112 px", "last": "2: prefix-LM mask",
    "polish": "", "words": "2: with every word",
}  # fmt: skip
WIDTH, TOP, BOTTOM = 860, 74, 354


def read_log() -> list[dict]:
    """The lines of the log, each with `at`, the minutes since the beginning of the first stage."""
    lines, before, stage = [], 0.0, None
    for line in map(parse_json, LOG.read_text(encoding="utf-8").splitlines()):
        if stage is not None and line["stage"] != stage:
            before = lines[-1]["at"]
        stage = line["stage"]
        lines.append(line | {"at": before + line["minutes"]})
    return lines


def curves(lines: list[dict]) -> dict[str, tuple[list[tuple[float, float]], str]]:
    """Name: (points of minutes and share, colour) of each curve."""
    first, then = ([line for line in lines if (line["stage"] in BEFORE) == is_before] for is_before in (True, False))

    def points(part: list[dict], names: tuple[str, ...]) -> list[tuple[float, float]]:
        found = [(line["at"], [line[name] for name in names if name in line]) for line in part]
        return [(at, sum(values) / len(values)) for at, values in found if values]

    return {
        "shapes": (points(first, ("kind",)), SOFT),
        "letters": (points(first, ("letters",)), FAINT),
        "answers": (points(then, ANSWERS), BLUE),
        "captions": (points(then, ("caption",)), GREEN),
        "words": (points(then, ("ocr",)), ORANGE),
        "random letters": (points(then, ("letters",)), PURPLE),
    }


def smooth(points: list[tuple[float, float]], width: float = 1.0) -> list[tuple[float, float]]:
    """Means over `width` minutes, because each line of the log counts only a few captions and words."""
    result = []
    for at, _ in points:
        near = [value for other, value in points if abs(other - at) <= width / 2]
        result.append((at, sum(near) / len(near)))
    return result


def draw_recipe() -> None:
    lines = read_log()
    end = lines[-1]["at"]
    drawing = Drawing(WIDTH, BOTTOM + 60)
    axes = Axes(drawing, (50, TOP, WIDTH - 150, BOTTOM), (0, end), (0, 1))
    axes.frame([tick for tick in range(0, int(end) + 1, 10)], [0, 0.2, 0.4, 0.6, 0.8, 1], "minutes on two cores",
               "share of right answers, on new scenes")  # fmt: skip
    for number, (stage, title) in enumerate(STAGES.items()):
        mine = [line["at"] for line in lines if line["stage"] == stage]
        if mine:
            x = axes.at(mine[0], 0)[0]
            y = 18 + number % 2 * 16  # the first stages are short: alternating heights keep their names apart
            drawing.line([(x, y - 8), (x, BOTTOM)], SOFT, 1, "2 4")
            drawing.text(x + 4, y, title, size=11, fill=SOFT)
    ends = []
    for name, (points, color) in curves(lines).items():
        if points:
            points = smooth(points)
            axes.curve(points, color)
            if points[-1][0] == end:
                ends.append((axes.at(*points[-1])[1], f"{name} {points[-1][1]:.1%}", color))
            else:  # a curve of the stages without a decoder, which ends inside the figure
                x, y = axes.at(*points[-1])
                drawing.text(x - 4, y + 18, f"{name} {points[-1][1]:.0%}", anchor="end", size=11, fill=SOFT)
    drawing.labels(WIDTH - 142, ends)
    drawing.save(HERE / "recipe.svg")


def main() -> None:
    draw_recipe()
    for stage in STAGES:
        mine = [line for line in read_log() if line["stage"] == stage]
        if mine:
            last = {name: value for name, value in mine[-1].items() if name not in ("stage", "at", "loss", "head")}
            print(stage, " ".join(f"{name} {value:g}" for name, value in last.items()))


if __name__ == "__main__":
    main()
