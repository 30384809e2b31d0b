"""A picture cut or moved a little, and the boxes of its answer with it. Checked in tests/learning/test_augmentation.py.

A zoom shows a random window of the picture, which may reach beyond it (grey there), and which holds every box whole. So a mask,
whose codes are relative to its box, stays as it is, and no object disappears that the answer names. Answers without boxes are
about the whole picture, which then only becomes smaller, never cut.
"""

import random
from dataclasses import replace

from PIL import Image

from paligemma.objects.outputs import NO_LABEL, NormalizedBox, ParsedObject, parse_text, to_suffix

GREY = (128, 128, 128)  # 0 for the model
SMALLEST, LARGEST = 0.6, 1.3  # sides of the window, relative to those of the picture


def window(boxes: list[NormalizedBox], draw: random.Random) -> tuple[float, float, float, float]:
    """A random window (y_min, x_min, y_max, x_max, in fractions of the picture, perhaps beyond 0 and 1) that holds all boxes."""
    sides = []
    for low, high in ((min(box.y_min for box in boxes), max(box.y_max for box in boxes)),
                      (min(box.x_min for box in boxes), max(box.x_max for box in boxes))):  # fmt: skip
        length = draw.uniform(max(SMALLEST, high - low), LARGEST)
        # As far to either side as keeps the boxes inside; a window smaller than the picture stays within it if it can.
        first, last = high - length, low
        if length <= 1:
            first, last = max(first, 0.0), min(last, 1 - length)
        start = draw.uniform(first, last)
        sides.append((start, start + length))
    (top, bottom), (left, right) = sides
    return top, left, bottom, right


def zoom(picture: Image.Image, suffix: str, seed: tuple) -> tuple[Image.Image, str]:
    """The picture through a random window, and the answer with its boxes moved; the same for the same seed.

    Args:
        picture: RGB.
        suffix: an answer; one that cannot be read whole leaves both as they are.
        seed: numbers.
    """
    reading = parse_text(suffix)
    if set(reading.problems) - {NO_LABEL} or any(found.box is None for found in reading.objects):
        return picture, suffix
    draw = random.Random(repr(seed))
    whole = NormalizedBox(0.0, 0.0, 1.0, 1.0)
    boxes = [found.box for found in reading.objects] or [whole]
    top, left, bottom, right = window(boxes, draw)
    width, height = picture.size
    edges = [round(left * width), round(top * height), round(right * width), round(bottom * height)]
    edges[2:] = max(edges[2], edges[0] + 1), max(edges[3], edges[1] + 1)
    shown = Image.new("RGB", (edges[2] - edges[0], edges[3] - edges[1]), GREY)
    shown.paste(picture, (-edges[0], -edges[1]))
    return shown, to_suffix(moved(found, edges, width, height) for found in reading.objects) if reading.objects else suffix


def moved(found: ParsedObject, edges: list[int], width: int, height: int) -> ParsedObject:
    """The object as it lies in the window whose edges (left, top, right, bottom) are in pixels of the picture."""
    left, top, right, bottom = edges
    x_min, y_min, x_max, y_max = found.box.xyxy(width, height)
    wide, high = right - left, bottom - top
    box = NormalizedBox((x_min - left) / wide, (y_min - top) / high, (x_max - left) / wide, (y_max - top) / high)
    return replace(found, box=box, locations=None)
