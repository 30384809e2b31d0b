"""The curves of a run in one SVG file: loss and scores over the number of updates. Checked in tests/programs/test_finetune.py."""

import math
from collections.abc import Sequence
from pathlib import Path

from paligemma.svg import BLUE, FAINT, GREEN, ORANGE, PURPLE, SOFT, Axes, Drawing

WIDTH, HEIGHT, GAP = 760, 250, 74
COLORS = (GREEN, ORANGE, PURPLE, BLUE, SOFT)
SMOOTHING = 0.02  # the dark curve of the loss is a moving average over this fraction of the updates


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers from `low` to `high`: at most count + 1, at equal distances."""
    step = 10 ** math.floor(math.log10((high - low) / count))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= count)
    return [step * i for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def smooth(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """An exponential moving average of points (x, y)."""
    keep = 1 - 1 / max(1.0, SMOOTHING * len(points))
    mean, weight, result = 0.0, 0.0, []
    for x, y in points:
        mean, weight = keep * mean + (1 - keep) * y if keep else y, keep * weight + (1 - keep) if keep else 1.0
        result.append((x, mean / weight))
    return result


def draw_plot(
    drawing: Drawing, top: float, title: str, curves: dict[str, list], last_step: float, y_range: tuple[float, float]
) -> None:
    """Draws one plot of curves, with the name of each curve at its right end.

    Args:
        top: the y coordinate of the plot in the drawing.
        curves: name -> points (number of updates, value).
        last_step: right end of the x axis, which begins at 0.
        y_range: lower and upper end of the y axis.
    """
    axes = Axes(drawing, (60, top, WIDTH - 130, top + HEIGHT), (0, max(1, last_step)), y_range)
    axes.frame(ticks(0, max(1, last_step)), ticks(*y_range), "updates", title)
    labels = []
    for number, (name, points) in enumerate(curves.items()):
        color = COLORS[number % len(COLORS)]
        if name == "loss":
            axes.curve(points, FAINT)
            points, color = smooth(points), BLUE
        axes.curve(points, color)
        for x, y in points if len(points) < 50 else ():
            drawing.dot(*axes.at(x, y), color, 2.5)
        labels.append((axes.at(*points[-1])[1], f"{name} {points[-1][1]:.3g}", color))
    drawing.labels(WIDTH - 122, labels)


def draw_curves(lines: Sequence[dict], file: Path) -> None:
    """Draws the lines of metrics.jsonl: one plot of the losses and, if there are scores, a plot of the scores below it."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for line in lines:
        for name, value in line.items():
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
            if is_number and (name == "loss" or "valid_loss" in line) and name != "step":
                curves.setdefault(name, []).append((line["step"], value))
    losses = {name: curves.pop(name) for name in ("loss", "valid_loss") if name in curves}
    if not losses:
        return
    last_step = max(line["step"] for line in lines)
    drawing = Drawing(WIDTH, 50 + HEIGHT + GAP + (HEIGHT + GAP if curves else 0))
    highest = max(y for points in losses.values() for _, y in points)
    draw_plot(drawing, 40, "loss, nats per token", losses, last_step, (0.0, highest * 1.05 or 1.0))
    if curves:
        top = max(1.0, *(y for points in curves.values() for _, y in points))
        scored = next((line["scored"] for line in reversed(lines) if isinstance(line.get("scored"), str)), "examples")
        draw_plot(drawing, 40 + HEIGHT + GAP, f"validation scores on {scored}", curves, last_step, (0.0, top))
    drawing.save(file)
