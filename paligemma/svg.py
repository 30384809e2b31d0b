"""Draws figures as SVG files: they are small, sharp at any size, and the same on every machine.

Coordinates are pixels from the upper left corner. `Axes` converts numbers to pixels and draws the frame of a plot.
"""

import math
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

from paligemma.files import write_atomic

INK, SOFT, FAINT = "#222222", "#777777", "#e3e3e3"  # for text, for secondary text and axes, for grid lines
BLUE, ORANGE, GREEN, PURPLE = "#2f6db3", "#d9781f", "#3c8d53", "#8456a8"  # colour-blind people can distinguish them


@dataclass
class Drawing:
    """A white sheet and the parts drawn on it; later parts cover earlier ones."""

    width: int
    height: int
    parts: list[str] = field(default_factory=list)

    def rect(self, x: float, y: float, width: float, height: float, fill: str, stroke: str = "none") -> None:
        place = f'x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}"'
        self.parts.append(f'<rect {place} fill="{fill}" stroke="{stroke}"/>')

    def text(
        self, x: float, y: float, words: str, *, anchor: str = "start", size: int = 13, fill: str = INK, turn: int = 0
    ) -> None:
        """Draws words with their baseline at y. `anchor` says which part of the words is at x: start, middle or end.

    `turn` is in degrees, clockwise.
    """
        turned = f' transform="rotate({turn} {x:g} {y:g})"' if turn else ""
        style = f'x="{x:g}" y="{y:g}" text-anchor="{anchor}" font-size="{size}" fill="{fill}"'
        self.parts.append(f"<text {style}{turned}>{escape(words)}</text>")

    def line(self, points: list[tuple[float, float]], color: str = INK, width: float = 1.0, dash: str = "") -> None:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        dashed = f' stroke-dasharray="{dash}"' if dash else ""
        self.parts.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="{width:g}"{dashed}/>')

    def dot(self, x: float, y: float, color: str, radius: float = 4.5) -> None:
        self.parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:g}" fill="{color}"/>')

    def labels(self, x: float, named: list[tuple[float, str, str]], gap: float = 15) -> None:
        """Draws the labels (y, words, colour) of curves at their right ends, moved down where they would overlap."""
        free = 0.0
        for y, words, color in sorted(named):
            free = max(y + 4, free)
            self.text(x, free, words, fill=color)
            free += gap

    def save(self, path: Path) -> None:
        """Writes the SVG file. Raises: OutputError."""
        head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" width="{self.width}"'
        sheet = f'<rect width="{self.width}" height="{self.height}" fill="white"/>'
        body = "\n".join([f'{head} font-family="Helvetica, Arial, sans-serif">', sheet, *self.parts, "</svg>", ""])
        write_atomic(path, body)


@dataclass
class Axes:
    """A plot on a drawing: converts numbers to pixels, draws the frame and the curves.

    Args:
        box: left, top, right, bottom in pixels.
        x, y: the smallest and the largest number on each axis.
        is_log: for x and for y, whether the axis is logarithmic.
    """

    drawing: Drawing
    box: tuple[float, float, float, float]
    x: tuple[float, float]
    y: tuple[float, float]
    is_log: tuple[bool, bool] = (False, False)

    def at(self, x: float, y: float) -> tuple[float, float]:
        """The pixel position of a point."""
        left, top, right, bottom = self.box
        across, up = axis_fraction(x, *self.x, self.is_log[0]), axis_fraction(y, *self.y, self.is_log[1])
        return left + (right - left) * across, bottom + (top - bottom) * up

    def frame(self, x_ticks: list[float], y_ticks: list[float], x_title: str, y_title: str) -> None:
        """Draws the grid lines, the numbers at the ticks, and the titles of both axes."""
        left, top, right, bottom = self.box
        for tick in y_ticks:
            height = self.at(self.x[0], tick)[1]
            self.drawing.line([(left, height), (right, height)], FAINT)
            self.drawing.text(left - 7, height + 4, f"{tick:g}", anchor="end", size=12, fill=SOFT)
        for tick in x_ticks:
            place = self.at(tick, self.y[0])[0]
            self.drawing.line([(place, bottom), (place, bottom + 4)], SOFT)
            self.drawing.text(place, bottom + 18, f"{tick:g}", anchor="middle", size=12, fill=SOFT)
        self.drawing.line([(left, bottom), (right, bottom)], SOFT)
        self.drawing.text((left + right) / 2, bottom + 38, x_title, anchor="middle")
        self.drawing.text(left, top - 12, y_title)

    def curve(self, points: list[tuple[float, float]], color: str, dash: str = "") -> None:
        self.drawing.line([self.at(x, y) for x, y in points], color, 2, dash)


def axis_fraction(value: float, low: float, high: float, is_log: bool) -> float:
    """The position of a number on an axis, from 0 at the low end to 1 at the high end."""
    if is_log:
        value, low, high = math.log(value), math.log(low), math.log(high)
    return (value - low) / (high - low)
