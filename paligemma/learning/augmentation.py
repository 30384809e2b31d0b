"""Augmentation: pictures are cropped or shifted a little, and the boxes of their answers move with them.

A zoom shows a random window of the picture. The window may extend beyond the picture; the part outside is grey. Every box lies
entirely within the window, so every object named in the answer stays visible. The codes of masks stay valid, because they are
relative to the box. If the answer has no boxes, the window contains the whole picture.

Checked in tests/learning/test_augmentation.py.
"""

import random
from dataclasses import replace

from PIL import Image

from paligemma.objects.outputs import NO_LABEL, NormalizedBox, ParsedObject, parse_text, to_suffix

GREY = (128, 128, 128)  # becomes about 0 in pixel_values
MIN_SCALE, MAX_SCALE = 0.6, 1.3  # range of (side of the window) / (side of the picture)


def window(boxes: list[NormalizedBox], rng: random.Random) -> tuple[float, float, float, float]:
    """A random window that contains all boxes.

    Returns: y_min, x_min, y_max, x_max as fractions of the picture, possibly below 0 or above 1.
    """
    sides = []
    for low, high in ((min(box.y_min for box in boxes), max(box.y_max for box in boxes)),
                      (min(box.x_min for box in boxes), max(box.x_max for box in boxes))):  # fmt: skip
        length = rng.uniform(max(MIN_SCALE, high - low), MAX_SCALE)
        # Any start from `first` to `last` keeps all boxes inside. A window smaller than the picture stays within the picture.
        first, last = high - length, low
        if length <= 1:
            first, last = max(first, 0.0), min(last, 1 - length)
        start = rng.uniform(first, last)
        sides.append((start, start + length))
    (top, bottom), (left, right) = sides
    return top, left, bottom, right


def zoom(picture: Image.Image, suffix: str, seed: tuple) -> tuple[Image.Image, str]:
    """The part of the picture in a random window, and the answer with its boxes moved. Equal seeds give equal results.

    Args:
        picture: RGB.
        suffix: an answer. If it cannot be parsed completely, picture and answer are returned unchanged.
        seed: a tuple of numbers.
    """
    parsed = parse_text(suffix)
    if set(parsed.problems) - {NO_LABEL} or any(obj.box is None for obj in parsed.objects):
        return picture, suffix
    rng = random.Random(repr(seed))
    whole = NormalizedBox(0.0, 0.0, 1.0, 1.0)
    boxes = [obj.box for obj in parsed.objects] or [whole]
    top, left, bottom, right = window(boxes, rng)
    width, height = picture.size
    edges = [round(left * width), round(top * height), round(right * width), round(bottom * height)]
    edges[2:] = max(edges[2], edges[0] + 1), max(edges[3], edges[1] + 1)
    shown = Image.new("RGB", (edges[2] - edges[0], edges[3] - edges[1]), GREY)
    shown.paste(picture, (-edges[0], -edges[1]))
    return shown, to_suffix(move(obj, edges, width, height) for obj in parsed.objects) if parsed.objects else suffix


def move(obj: ParsedObject, edges: list[int], width: int, height: int) -> ParsedObject:
    """The object with its box relative to a window instead of the picture.

    Args:
        edges: left, top, right and bottom of the window, in pixels of the picture.
        width, height: of the picture.
    """
    left, top, right, bottom = edges
    x_min, y_min, x_max, y_max = obj.box.xyxy(width, height)
    window_width, window_height = right - left, bottom - top
    box = NormalizedBox(
        (x_min - left) / window_width, (y_min - top) / window_height,
        (x_max - left) / window_width, (y_max - top) / window_height,
    )  # fmt: skip
    return replace(obj, box=box, locations=None)
