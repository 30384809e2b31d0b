"""Converts masks between 64 x 64 values in a box, pixels of a picture, COCO run lengths and polygons, with numpy and PIL only.

`paste` and `crop` follow Google's code for the `segment` task step by step (google-research/big_vision: the evaluator and the
preprocessing of refcoco-seg). Both there and here, the corners of a decoded box are truncated to whole pixels, the corners of a
training target are rounded, and a decoded mask is first resized and then compared with 0. Other ports of Google's code do not
follow these steps exactly, so their masks differ by a pixel or more.

A mask is bool[H, W]. Polygons are COCO's: [x, y, x, y, ...] in pixels, x to the right, y down. (0, 0) is the corner of the
picture, so the centre of the first pixel is (0.5, 0.5). Checked in tests/objects/test_masks.py.
"""

import heapq
from operator import index
from typing import Protocol

import numpy as np
from PIL import Image

from paligemma.errors import DatasetError

MASK_SIDE = 64  # the codec reads and writes masks of 64 x 64 pixels
MAX_PIXELS = 1 << 28  # limit for a mask in a file; it is above the default limit for pictures, 50 million pixels
SIMPLIFICATION = 0.01  # polygons may differ from the outline of the mask by this share of the mask's area
STEPS = ((1, 0), (0, 1), (-1, 0), (0, -1))  # (x, y) of right, down, left, up, so that a right turn leads to the next direction


class Box(Protocol):
    """The attributes of outputs.NormalizedBox that are used here: corners in fractions of the picture."""

    y_min: float
    x_min: float
    y_max: float
    x_max: float


def resize(values: np.ndarray, width: int, height: int) -> np.ndarray:
    """The values resized to float32[height, width] by bilinear interpolation. Pillow averages pixels if the result is smaller."""
    picture = Image.fromarray(values.astype(np.float32))
    return np.array(picture.resize((width, height), Image.Resampling.BILINEAR))


def paste(mask: np.ndarray, box: Box, height: int, width: int) -> np.ndarray:
    """A decoded mask at its place in the picture, bool[height, width]. The result is empty if the box contains no pixel.

    Args:
        mask: float[64, 64] from the decoder, about -1 to 1. Values above 0 after resizing are inside.
    """
    top, bottom = (min(max(int(y * height), 0), height) for y in (box.y_min, box.y_max))
    left, right = (min(max(int(x * width), 0), width) for x in (box.x_min, box.x_max))
    pasted = np.zeros((height, width), dtype=bool)
    if top < bottom and left < right:
        pasted[top:bottom, left:right] = resize(mask, right - left, bottom - top) > 0
    return pasted


def crop(mask: np.ndarray, box: Box) -> np.ndarray:
    """The encoder's input, float32[64, 64] from 0 to 1: the part of a picture's mask in the box.

    Args:
        mask: bool[H, W].
    Raises: DatasetError if the box, rounded to pixels, is empty.
    """
    height, width = mask.shape
    top, bottom = (min(max(round(y * height), 0), height) for y in (box.y_min, box.y_max))
    left, right = (min(max(round(x * width), 0), width) for x in (box.x_min, box.x_max))
    if top >= bottom or left >= right:
        raise DatasetError(
            f"The box y {box.y_min:.4f} to {box.y_max:.4f}, x {box.x_min:.4f} to {box.x_max:.4f} holds no pixel of a mask of "
            f"{width} x {height}. At least one pixel is needed. Leave this object out."
        )
    return resize(mask[top:bottom, left:right], MASK_SIDE, MASK_SIDE)


# COCO's run lengths are the numbers of pixels outside, inside, outside, ... of the mask, column by column. A string stores the
# first three numbers, and then for each number its difference from the number two places before. The difference is usually
# small, because neighbouring columns are similar. Each stored number is split into groups of five bits, lowest first. A group is
# written as the character with the code 48 + group, or 48 + group + 32 if another group of the same number follows.


def run_lengths(mask: np.ndarray) -> list[int]:
    """The numbers of pixels outside, inside, outside, ... column by column; 0 comes first if the first pixel is inside."""
    flat = np.concatenate([[False], np.asarray(mask, dtype=bool).ravel(order="F")])
    changes = np.flatnonzero(flat[1:] != flat[:-1])
    return np.diff(changes, prepend=0, append=flat.size - 1).tolist()


def to_rle(mask: np.ndarray) -> dict:
    """{"size": [height, width], "counts": text}, equal to pycocotools' encoding, for COCO files and evaluators."""
    runs = run_lengths(mask)
    text = ""
    for i, run in enumerate(runs):
        value = run - runs[i - 2] if i > 2 else run
        while True:
            group, value = value & 31, value >> 5
            is_last = value == (-1 if group & 16 else 0)  # the fifth bit of the last group is the sign
            text += chr(48 + (group if is_last else group | 32))
            if is_last:
                break
    return {"size": list(mask.shape), "counts": text}


def read_counts(text: str) -> list[int]:
    """The run lengths in a COCO string.

    Raises: ValueError for invalid characters, for a number larger than any mask, and if the string ends within a number.
    """
    runs: list[int] = []
    value = shift = 0
    for character in text:
        group = ord(character) - 48
        if not 0 <= group < 64:
            raise ValueError(f"{character!r} is not a character of COCO's run lengths")
        value |= (group & 31) << shift
        shift += 5
        if shift > MAX_PIXELS.bit_length() + 5:  # Python's integers are unbounded: without a limit, this takes quadratic time
            raise ValueError("a number is larger than any mask")
        if group & 32:
            continue
        if group & 16:
            value -= 1 << shift
        runs.append(value + runs[-2] if len(runs) > 2 else value)
        value = shift = 0
    if shift:
        raise ValueError("the string ends in the middle of a number")
    return runs


def from_rle(rle: dict) -> np.ndarray:
    """The mask, bool[H, W], of {"size": [height, width], "counts": text, bytes, or a list of run lengths}.

    Raises: DatasetError if `rle` has another form, if the runs do not sum to height * width, and for more than MAX_PIXELS pixels.
    """
    try:
        height, width = map(index, rle["size"])
        counts = rle["counts"]
        counts = counts.decode("ascii") if isinstance(counts, bytes) else counts
        runs = read_counts(counts) if isinstance(counts, str) else [*map(index, counts)]
        if not all(0 <= number <= MAX_PIXELS for number in (height, width, height * width, *runs)):
            raise ValueError(f"a number, or height * width, is not from 0 to {MAX_PIXELS}")
    except (ValueError, TypeError, KeyError) as error:
        raise DatasetError(f"Run lengths cannot be read ({error}). COCO's RLE is needed. Create this mask again.") from error
    if sum(runs) != height * width:
        raise DatasetError(
            f"A mask's run lengths sum to {sum(runs)}, but {height} x {width} has {height * width} pixels. "
            "Size and run lengths do not match. Correct the size, or create this mask again."
        )
    flat = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
    return flat.reshape(width, height).T


# Polygons


def trace(mask: np.ndarray) -> list[np.ndarray]:
    """The closed outlines of a mask, each float[points, 2] with x and y: clockwise around regions, counterclockwise around holes.

    An outline passes midway between a pixel inside and its neighbour outside. All pixel centres are therefore on the correct side
    of the outline, and a diagonal edge is a straight line instead of a staircase. At each corner, the region loses an eighth of a
    pixel. Pixels that touch only at a corner belong to separate regions.
    """
    height, width = mask.shape
    inside = np.pad(np.asarray(mask, dtype=bool), 1).astype(np.int8)
    # Differences between neighbouring pixels: 1 = the mask begins, -1 = the mask has ended.
    change_down, change_right = inside[1:] - inside[:-1], inside[:, 1:] - inside[:, :-1]
    # steps[direction, y, x]: whether an outline goes from the pixel corner (x, y) to the next corner in this direction. The
    # region is on the right of the step.
    steps = np.zeros((4, height + 1, width + 1), dtype=bool)
    steps[0], steps[1] = change_down[:, 1:] == 1, change_right[1:] == -1
    steps[2, :, 1:], steps[3, 1:] = change_down[:, 1:-1] == -1, change_right[1:-1] == 1
    outlines = []
    for y, x in np.argwhere(steps[0]).tolist():  # every outline has a step to the right
        direction, middles = 0, []
        while steps[direction, y, x]:
            steps[direction, y, x] = False
            dx, dy = STEPS[direction]
            middles.append((x + dx / 2, y + dy / 2))
            x, y = x + dx, y + dy
            # Where two pixels touch only at a corner, the outline could turn right or left. Right is tried first, because a right
            # turn stays at the same pixel. This keeps the regions separate.
            turns = [(direction + turn) % 4 for turn in (1, 0, 3)]
            direction = next((turn for turn in turns if steps[turn, y, x]), direction)
        if middles:
            outlines.append(np.array(middles))
    return outlines


def area(outline: np.ndarray) -> float:
    """The area inside an outline in square pixels, by the shoelace formula; the area of a hole is negative."""
    x, y = outline.T
    return float(x @ np.roll(y, -1) - y @ np.roll(x, -1)) / 2


def surrounds(outline: np.ndarray, point: np.ndarray) -> bool:
    """Whether the point is inside the outline: a ray from the point to the right crosses the outline an odd number of times."""
    start, end = outline - point, np.roll(outline, -1, axis=0) - point
    crosses_line = (start[:, 1] <= 0) != (end[:, 1] <= 0)
    (x, y), (next_x, next_y) = start[crosses_line].T, end[crosses_line].T
    return bool(np.count_nonzero(x - y * (next_x - x) / (next_y - y) > 0) % 2)


def simplify(outline: np.ndarray, allowed: float) -> np.ndarray:
    """The outline with fewer points: repeatedly removes the point whose removal changes the area least (Visvalingam, 1993).

    Args:
        allowed: limit for the sum of all changes, in square pixels.
    """
    points = outline.tolist()
    before, after = ([(i + step) % len(points) for i in range(len(points))] for step in (-1, 1))

    def triangle_area(i: int) -> float:
        (ax, ay), (bx, by), (cx, cy) = points[before[i]], points[i], points[after[i]]
        return abs((bx - ax) * (cy - ay) - (cx - ax) * (by - ay)) / 2

    sizes = {i: triangle_area(i) for i in range(len(points))}
    queue = [(size, i) for i, size in sizes.items()]
    heapq.heapify(queue)
    while len(sizes) > 4:
        size, i = heapq.heappop(queue)
        if sizes.get(i) != size:  # an old entry: the point was removed, or its triangle has changed
            continue
        allowed -= size
        if allowed < 0:
            break
        del sizes[i]
        after[before[i]], before[after[i]] = after[i], before[i]
        for j in (before[i], after[i]):
            sizes[j] = triangle_area(j)
            heapq.heappush(queue, (sizes[j], j))
    return outline[sorted(sizes)]


def join_hole(outer: np.ndarray, hole: np.ndarray) -> np.ndarray:
    """One outline for a region and its hole.

    The outline goes to the hole along the line between the nearest points of region and hole, around the hole, and back along
    the same line.
    """
    distance = ((outer[:, None] - hole) ** 2).sum(-1)
    i, j = np.unravel_index(distance.argmin(), distance.shape)
    return np.concatenate([outer[: i + 1], hole[j:], hole[: j + 1], outer[i:]])


def to_polygons(mask: np.ndarray, simplification: float = SIMPLIFICATION) -> list[list[float]]:
    """COCO's polygons of a mask, [x, y, x, y, ...] in pixels, one per region, the largest first; `fill` is the inverse.

    COCO has no holes, so each hole is joined to the outline around it by a line without width.

    Args:
        simplification: all outlines together may change by this share of the mask's area, to save points.
    """
    outlines = trace(mask)
    allowed_per_point = simplification * np.count_nonzero(mask) / max(sum(map(len, outlines)), 1)  # square pixels
    outers = sorted((outline for outline in outlines if area(outline) > 0), key=area)
    polygons = [simplify(outer, allowed_per_point * len(outer)) for outer in outers]
    for hole in (outline for outline in outlines if area(outline) < 0):
        # Outlines are sorted by area, so the first outline around the hole is the smallest.
        around = next(i for i, outer in enumerate(outers) if surrounds(outer, hole[0]))
        polygons[around] = join_hole(polygons[around], simplify(hole, allowed_per_point * len(hole)))
    return [polygon.ravel().tolist() for polygon in reversed(polygons)]


def fill(polygons: list[list[float]], height: int, width: int) -> np.ndarray:
    """bool[height, width]: pixels whose centres lie in a polygon. Areas where a polygon overlaps itself count as outside."""
    covered = np.zeros((height, width), dtype=bool)
    for polygon in polygons:
        x, y = np.array(polygon, dtype=float).reshape(-1, 2).T
        next_x, next_y = np.roll(x, -1), np.roll(y, -1)
        centre = np.arange(height)[:, None] + 0.5
        row, edge = np.nonzero((y <= centre) != (next_y <= centre))  # an edge crosses the line through the pixel centres of a row
        crossing_x = x[edge] + (row + 0.5 - y[edge]) * (next_x - x)[edge] / (next_y - y)[edge]
        crossings = np.zeros((height, width + 1), dtype=np.int64)
        np.add.at(crossings, (row, np.clip(np.ceil(crossing_x - 0.5), 0, width).astype(int)), 1)
        covered |= crossings[:, :-1].cumsum(axis=1) % 2 == 1
    return covered
