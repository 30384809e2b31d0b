"""Objects as text, one per line: an aligned table for a terminal, or tab-separated values for programs.

Checked in tests/objects/test_tables.py.
"""

import unicodedata
from collections.abc import Sequence

from paligemma.objects.drawing import clean, palette
from paligemma.objects.outputs import ParsedObject

EIGHTHS = " ▏▎▍▌▋▊▉█"  # a cell of the bar, filled from left to right
BAR_WIDTH = 10  # characters of a full bar


def score_bar(score: float) -> str:
    """The score, from 0 to 1, as a bar of BAR_WIDTH characters, exact to an eighth of a character."""
    eighths = round(min(max(score, 0), 1) * BAR_WIDTH * 8)
    return ("█" * (eighths // 8) + EIGHTHS[eighths % 8]).strip().ljust(BAR_WIDTH)


def terminal_width(text: str) -> int:
    """The number of terminal columns of a text: two for the wide characters of East Asia, none for combining marks."""
    return sum(
        0 if unicodedata.combining(letter) else 2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in text
    )


def table(objects: Sequence[ParsedObject], width: int, height: int, is_colored: bool) -> str:
    """The table for a terminal: label, score, score as a bar, box corners in pixels, share of the picture that the mask covers.

    Args:
        width, height: of the picture, in pixels.
        is_colored: whether to use colours: those that `drawing.draw` gives to the labels.
    """
    boxed = [found for found in objects if found.box is not None]
    colors = palette(found.label for found in objects)
    labels = [clean(found.label) or "(no label)" for found in boxed]
    widest = max(map(terminal_width, labels), default=0)
    lines = []
    for found, label in zip(boxed, labels, strict=True):
        color, dim, end = "", "", ""
        if is_colored:
            color, dim, end = "\x1b[38;2;{};{};{}m".format(*colors[found.label]), "\x1b[2m", "\x1b[0m"
        x_min, y_min, x_max, y_max = (round(value) for value in found.box.xyxy(width, height))
        parts = [f"{color}■{end} {label}{' ' * (widest - terminal_width(label))}"]
        if found.score is not None:
            parts.append(f"{found.score:.2f} {color}{score_bar(found.score)}{end}")
        digits = len(str(max(width, height)))
        parts.append(f"{x_min:>{digits}},{y_min:>{digits}} {dim}to{end} {x_max:>{digits}},{y_max:>{digits}}")
        if found.mask is not None:
            parts.append(f"{dim}mask{end} {found.mask.mean():.1%}")
        if found.problems:
            parts.append(f"{dim}{', '.join(found.problems)}{end}")
        lines.append("  ".join(parts).rstrip())
    return "".join(line + "\n" for line in lines)


def listing(objects: Sequence[ParsedObject], width: int, height: int) -> str:
    """The tab-separated values for programs: label, score (or nothing), x_min, y_min, x_max, y_max in pixels."""
    lines = []
    for found in objects:
        if found.box is not None:
            corners = (f"{value:.1f}" for value in found.box.xyxy(width, height))
            lines.append("\t".join([clean(found.label), "" if found.score is None else f"{found.score:.4f}", *corners]))
    return "".join(line + "\n" for line in lines)
