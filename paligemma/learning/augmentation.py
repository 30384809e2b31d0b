"""Augmentation: pictures are cropped or shifted a little, and the boxes of their answers move with them.

A zoom shows a random window of the picture. The window may extend beyond the picture, where it is grey, and contains every box
entirely. So no object that the answer names disappears, and the codes of masks, which are relative to the box, stay valid. If the
answer has no boxes, the window contains the whole picture. Checked in tests/learning/test_augmentation.py.
"""

import random
from dataclasses import replace

from PIL import Image

from paligemma.objects.outputs import NO_LABEL, NormalizedBox, ParsedObject, parse_text, to_suffix

GREY = (128, 128, 128)  # about 0 in pixel_values
SMALLEST, LARGEST = 0.6, 1.3  # side of the window divided by the side of the picture


def window(boxes: list[NormalizedBox], draw: random.Random) -> tuple[float, float, float, float]:
    """A random window that contains all boxes.

    Returns: y_min, x_min, y_max, x_max as fractions of the picture, possibly below 0 or above 1.
    """
    sides = []
    for low, high in ((min(box.y_min for box in boxes), max(box.y_max for box in boxes)),
                      (min(box.x_min for box in boxes), max(box.x_max for box in boxes))):  # fmt: skip
        length = draw.uniform(max(SMALLEST, high - low), LARGEST)
        # The starts that keep all boxes inside. A window that is smaller than the picture stays within the picture if possible.
        first, last = high - length, low
        if length <= 1:
            first, last = max(first, 0.0), min(last, 1 - length)
        start = draw.uniform(first, last)
        sides.append((start, start + length))
    (top, bottom), (left, right) = sides
    return top, left, bottom, right


def zoom(picture: Image.Image, suffix: str, seed: tuple) -> tuple[Image.Image, str]:
    """The part of the picture in a random window, and the answer with moved boxes; deterministic for equal seeds.

    Args:
        picture: RGB.
        suffix: an answer. If it cannot be parsed completely, picture and answer are returned unchanged.
        seed: a tuple of numbers.
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
    """The object with its box relative to the window. `edges`: its left, top, right, bottom in pixels of the picture."""
    left, top, right, bottom = edges
    x_min, y_min, x_max, y_max = found.box.xyxy(width, height)
    wide, high = right - left, bottom - top
    box = NormalizedBox((x_min - left) / wide, (y_min - top) / high, (x_max - left) / wide, (y_max - top) / high)
    return replace(found, box=box, locations=None)
