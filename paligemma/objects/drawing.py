"""Draws objects into their picture: boxes, masks, labels and scores. Needs Pillow and numpy, but not torch.

The widths of lines and the sizes of letters depend on the size of the picture. Each label has a colour; colour-blind people,
too, can distinguish two neighbouring colours of the palette. An edge that the model is unsure of is dashed and gets an error
bar. Labels lie inside the picture and cover each other as little as possible. Checked in tests/objects/test_drawing.py.
"""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from unicodedata import category

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from paligemma.files import open_atomic
from paligemma.objects.lettering import UNKNOWN, Lettering, lettering
from paligemma.objects.outputs import NormalizedBox, ParsedObject
from paligemma.pictures.images import load_image

Color = tuple[int, int, int]
Rectangle = tuple[int, int, int, int]  # left, top, right, bottom in pixels; right and bottom are exclusive

# The colours of Okabe and Ito (jfly.uni-koeln.de/color) without black. Colour-blind people can distinguish them, too.
PALETTE: tuple[Color, ...] = (
    (230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (0, 114, 178), (213, 94, 0), (204, 121, 167),
)  # fmt: skip
BLACK, WHITE = (0, 0, 0), (255, 255, 255)
LINES, LETTERS = 1 / 190, 1 / 34  # line width and letter size, as fractions of sqrt(width * height) of the picture
MIN_LETTER_WITH_ROOM = 12  # pixels: the smallest letter size before labels are shrunk
MIN_LETTER = 7  # pixels: the smallest letters; a label that does not fit even then is cut
MAX_LABEL = 200  # characters of a label that are drawn
LABEL_SHARE = 0.25  # share of the picture that all labels may cover; if they need more, they shrink, then the last are left out
FILL = 90  # opacity of a mask, from 0 to 255
SEAM = 110  # opacity of the dark line around a frame, from 0 to 255
UNSURE = 2  # an edge is dashed if the standard deviation of its position is more than this many line widths
DASH, GAP, CAP = 4, 3, 3  # length of a dash, of the gap after it, and of half an error bar's cap, in line widths
SUPERSAMPLING = 4
JOINER = "\u200d"  # zero-width joiner: invisible, combines several emoji into one
SOFTWARE = 305  # the EXIF tag that names the program that wrote a picture


# Colours


def palette(labels: Iterable[str]) -> dict[str, Color]:
    """A colour for each label, in the order in which the labels first appear. After seven labels, darker colours follow."""
    colors: dict[str, Color] = {}
    for label in labels:
        if label not in colors:
            repeats, index = divmod(len(colors), len(PALETTE))
            colors[label] = tuple(round(level * 0.7**repeats) for level in PALETTE[index])
    return colors


def luminance(color: Color) -> float:
    """The relative luminance of WCAG 2, from 0 to 1: how bright the eye sees the colour."""
    linear = [level / 3294 if level <= 10 else ((level / 255 + 0.055) / 1.055) ** 2.4 for level in color]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: Color, other: Color) -> float:
    """The contrast ratio of WCAG 2, from 1 (equal) to 21 (black on white). Readable text needs 4.5."""
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def text_color(background: Color) -> Color:
    """Black or white, whichever is easier to read on this background."""
    return max(BLACK, WHITE, key=lambda color: contrast(color, background))


# Shapes


def rectangle(box: NormalizedBox, width: int, height: int) -> Rectangle:
    """The box in whole pixels, inside the picture and at least one pixel wide and high."""

    def side(low: float, high: float, length: int) -> tuple[int, int]:
        first = min(max(round(low * length), 0), length - 1)
        return first, min(max(round(high * length), first + 1), length)

    (left, right), (top, bottom) = side(box.x_min, box.x_max, width), side(box.y_min, box.y_max, height)
    return left, top, right, bottom


def frame_parts(rectangle: Rectangle, line: int, is_dashed: Sequence[bool]) -> list[Rectangle]:
    """The rectangles that make up a frame: its left, upper, right and lower side, each as one line or as dashes."""
    left, top, right, bottom = rectangle
    sides = [
        (left, top, min(left + line, right), bottom), (left, top, right, min(top + line, bottom)),
        (max(right - line, left), top, right, bottom), (left, max(bottom - line, top), right, bottom),
    ]  # fmt: skip
    found = []
    for (x, y, x_end, y_end), dashed in zip(sides, is_dashed, strict=True):
        if not dashed:
            found.append((x, y, x_end, y_end))
        elif x_end - x > y_end - y:
            found += [(at, y, min(at + DASH * line, x_end), y_end) for at in range(x, x_end, (DASH + GAP) * line)]
        else:
            found += [(x, at, x_end, min(at + DASH * line, y_end)) for at in range(y, y_end, (DASH + GAP) * line)]
    return found


def error_bars(box: NormalizedBox, spread: Sequence[float], line: int, size: tuple[int, int]) -> list[Rectangle]:
    """The rectangles of the error bars. A bar crosses the middle of an edge and reaches one standard deviation to both sides.

    Args:
        spread: standard deviations of the left, upper, right and lower edge as fractions of the picture's sides; 0 = no bar.
        line: the line width in pixels.
        size: width and height of the picture in pixels.
    """
    width, height, cap = *size, CAP * line
    x, y = round((box.x_min + box.x_max) / 2 * width), round((box.y_min + box.y_max) / 2 * height)
    edges = (box.x_min, y, width), (box.y_min, x, height), (box.x_max, y, width), (box.y_max, x, height)
    found = []
    for number, ((edge, middle, length), deviation) in enumerate(zip(edges, spread, strict=True)):
        if deviation:
            ends = (min(max(end, -1), 2) * length for end in (edge - deviation, edge + deviation))  # a bar may end far outside
            (low, high), at = map(round, ends), middle - line // 2
            bar = (at, low, at + line, high)
            caps = [(at - cap, end, at + line + cap, end + line) for end in (low, high - line)]
            # `bar` and `caps` have the coordinates of a bar at the upper or lower edge; at the left or right edge x and y swap.
            found += [(x, y, x_end, y_end) if number % 2 else (y, x, y_end, x_end) for x, y, x_end, y_end in (bar, *caps)]
    return found


def draw_box(
    picture: Image.Image,
    box: NormalizedBox,
    color: Color,
    line: int,
    spread: Sequence[float] = (0, 0, 0, 0),
    has_seam: bool = True,
) -> None:
    """Draws a frame just inside the box. A faint dark seam separates it from a background of the same colour.

    Args:
        line: the line width in pixels.
        spread: as in error_bars. An edge whose standard deviation is above UNSURE line widths is dashed and gets an error bar.
    """
    width, height = picture.size
    marked = [value if value * side > UNSURE * line else 0 for value, side in zip(spread, (width, height) * 2, strict=True)]
    parts = frame_parts(rectangle(box, width, height), line, [value > 0 for value in marked])
    parts += error_bars(box, marked, line, picture.size)
    if has_seam:
        seam = max(1, line // 3)
        x, y = (min(part[axis] for part in parts) - seam for axis in (0, 1))
        x_end, y_end = (max(part[axis] for part in parts) + seam for axis in (2, 3))
        opacity = Image.new("L", (x_end - x, y_end - y), 0)
        for left, top, right, bottom in parts:
            opacity.paste(SEAM, (left - seam - x, top - seam - y, right + seam - x, bottom + seam - y))
        picture.paste(BLACK, (x, y), opacity)
    for part in parts:
        picture.paste(color, part)


def draw_mask(picture: Image.Image, mask: np.ndarray, color: Color, line: int, fill: int = FILL) -> None:
    """Fills the mask, bool[H, W] of the picture's size, with the colour (opacity fill / 255) and draws its outline."""
    if mask.shape != (picture.height, picture.width) or not mask.any():
        return
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    top, left = max(rows[0] - line - 1, 0), max(columns[0] - line - 1, 0)
    part = mask[top : rows[-1] + line + 2, left : columns[-1] + line + 2]
    padded = np.pad(part, line, mode="edge")
    height, width = part.shape
    inside = part.copy()  # after the loop: the pixels of the mask that lie at least `line` pixels from its edge
    for y, x in ((0, line), (2 * line, line), (line, 0), (line, 2 * line)):
        inside &= padded[y : y + height, x : x + width]
    corner = (int(left), int(top))
    picture.paste(color, corner, Image.fromarray(part.astype(np.uint8) * fill))
    outline = Image.fromarray((part & ~inside).astype(np.uint8) * 255).filter(ImageFilter.GaussianBlur(0.6))
    picture.paste(color, corner, outline)


# Labels


def clean(text: str) -> str:
    """The text on one line, without control characters, lone surrogates and invisible characters."""
    kept = (letter if letter.isprintable() or letter == JOINER else "" if category(letter) == "Cf" else " " for letter in text)
    return " ".join("".join(kept).split())


def label_text(found: ParsedObject) -> str:
    """The text of a label next to a box: the name and the score of the object."""
    label = found.label[:MAX_LABEL]
    return clean(f"{label} {found.score:.2f}" if found.score is not None else label)


def measure(text: str, size: float, letters: Lettering) -> tuple[int, int, int]:
    """Width and height in pixels of a label with this text and letter size, and the margin around the text."""
    space = max(1, round(size / 3))
    size *= SUPERSAMPLING
    width, height = letters.width(text, size) / SUPERSAMPLING, sum(letters.height(text, size)) / SUPERSAMPLING
    return math.ceil(width) + 2 * space, math.ceil(height) + 2 * (space // 3), space


def fit(text: str, size: float, width: int, height: int, letters: Lettering) -> tuple[str, float] | None:
    """The text and letter size with which a label fits. First the letters shrink, then the text is cut. None if nothing fits."""
    while True:
        label = measure(text, size, letters)
        if label[0] <= width and label[1] <= height:
            return text, size
        if size > MIN_LETTER:
            size = max(MIN_LETTER, size * 0.85)
        elif label[1] <= height and len(text) > 2:
            text = text[: -2 if text.endswith("…") else -1].rstrip() + "…"
        else:
            return None


def overlap(one: Rectangle, other: Rectangle) -> int:
    """The number of pixels in the intersection of two rectangles."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    return max(width, 0) * max(height, 0)


def place_label(box: Rectangle, label: tuple[int, int], taken: list[Rectangle], width: int, height: int) -> Rectangle:
    """The rectangle of a label near its box: of several candidates, the one that overlaps earlier labels the least.

    Args:
        label: width and height of the label.
        taken: the rectangles of the earlier labels.
        width, height: of the picture.
    """
    left, top, right, bottom = box
    wide, high = label
    corners = [(left, top - high), (left, top), (right - wide, top - high), (left, bottom), (right - wide, bottom)]
    corners += [(left, bottom - high), (right - wide, bottom - high), (right, top), (left - wide, top)]
    corners += [(left, top + step * high) for step in range(1, 1 + min(16, height // high))]

    def inside(x: int, y: int) -> Rectangle:
        x, y = min(max(x, 0), width - wide), min(max(y, 0), height - high)
        return x, y, x + wide, y + high

    return min((inside(*corner) for corner in corners), key=lambda spot: sum(overlap(spot, other) for other in taken))


def draw_label(picture: Image.Image, text: str, size: float, spot: Rectangle, color: Color, letters: Lettering) -> None:
    """Draws a label: the text on a plate in the colour of its box. It is drawn larger, then shrunk, to smooth its edges."""
    width, height, space = spot[2] - spot[0], spot[3] - spot[1], measure(text, size, letters)[2] * SUPERSAMPLING
    plate = Image.new("RGB", (width * SUPERSAMPLING, height * SUPERSAMPLING), color)
    letters.write(plate, (space, space // 3), text, size * SUPERSAMPLING, text_color(color))
    shape = Image.new("L", plate.size, 0)
    ImageDraw.Draw(shape).rounded_rectangle((0, 0, plate.width - 1, plate.height - 1), radius=space * 2 // 3, fill=245)
    plate, shape = (image.resize((width, height), Image.Resampling.BOX) for image in (plate, shape))
    picture.paste(plate, spot[:2], shape)


def draw_labels(picture: Image.Image, boxed: Sequence[ParsedObject], colors: dict[str, Color], letters: Lettering) -> int:
    """Draws labels next to boxes until they cover LABEL_SHARE of the picture. Returns: the number of labels left out."""
    named = [found for found in boxed if label_text(found)]
    num_pixels = picture.width * picture.height
    size = max(MIN_LETTER_WITH_ROOM, math.sqrt(num_pixels) * LETTERS)
    max_covered = num_pixels * LABEL_SHARE

    def area(found: ParsedObject) -> int:
        width, height, _ = measure(label_text(found), size, letters)
        return width * height

    while size > MIN_LETTER and sum(map(area, named)) > max_covered:
        size = max(MIN_LETTER, size * 0.85)
    taken: list[Rectangle] = []
    for found in named:
        fitting = fit(label_text(found), size, *picture.size, letters)
        if fitting is None:
            return len(named) - len(taken)
        label = measure(*fitting, letters)[:2]
        covered = sum((right - left) * (bottom - top) for left, top, right, bottom in taken)
        if label[0] * label[1] + covered > max_covered:
            return len(named) - len(taken)
        spot = place_label(rectangle(found.box, *picture.size), label, taken, *picture.size)
        taken.append(spot)
        draw_label(picture, *fitting, spot=spot, color=colors[found.label], letters=letters)
    return 0


@dataclass(frozen=True)
class Style:
    """How objects are drawn.

    Args:
        line_width: of boxes, in pixels; None = computed from the size of the picture.
        has_labels: whether labels and scores are drawn next to the boxes.
        is_plain: draw frames and outlines only: masks are not filled, and unsure edges look like sure ones.
        font: a font file for labels, which is used before the fonts that lettering.py finds.
    """

    line_width: int | None = None
    has_labels: bool = True
    is_plain: bool = False
    font: str | None = None


def draw(
    picture: Image.Image, objects: Sequence[ParsedObject], style: Style = Style(), notes: list[str] | None = None
) -> Image.Image:  # fmt: skip
    """A copy of the picture, RGB and of the same size, with masks, boxes, labels and scores drawn into it.

    Objects without a box are left out. Smaller boxes are drawn later, so that larger ones do not cover them.

    Args:
        picture: any PIL image. It goes through load_image, so that it is upright, as the model saw it.
        notes: gets a sentence for everything that could not be drawn.
    Raises: UsageError for a font that cannot be read.
    """
    out = load_image(picture).copy()
    boxed = sorted((found for found in objects if found.box is not None), key=lambda found: -found.box.area)
    colors = palette(found.label for found in objects)
    line = style.line_width or max(1, round(math.sqrt(out.width * out.height) * LINES))
    for found in boxed:
        if found.mask is not None:
            draw_mask(out, found.mask, colors[found.label], line, 0 if style.is_plain else FILL)
    for found in boxed:
        spread = (0, 0, 0, 0) if style.is_plain or found.spread is None else found.spread
        draw_box(out, found.box, colors[found.label], line, spread, not style.is_plain)
    if style.has_labels:
        letters = lettering(style.font)
        num_missing = draw_labels(out, boxed, colors, letters)
        unknown = letters.missing("".join(label_text(found) for found in boxed))
        if notes is not None and num_missing:
            size = f"{out.width} x {out.height} pixels have"
            notes.append(f"{size} no room for {num_missing} of the labels, which are left out.")
        if notes is not None and unknown:
            notes.append(
                f"no font on this machine has {unknown[:20]}, drawn as {UNKNOWN}. Install one (Debian and Ubuntu: apt install "
                "fonts-noto-cjk fonts-noto-color-emoji), or name its file with --font."
            )
    return out


def save(picture: Image.Image, path: str | Path, source: str = "") -> None:
    """Writes the picture in the format of the file's suffix; the file is complete or unchanged. Raises: OutputError.

    Args:
        source: the name of the picture that was drawn on. A hash of this name goes into the EXIF data if the format has any.
    """
    path = Path(path)
    exif = Image.Exif()
    exif[SOFTWARE] = source_mark(source)
    with open_atomic(path) as file:
        picture.save(file, format=Image.registered_extensions()[path.suffix.lower()], quality=95, exif=exif)


def source_mark(source: str) -> str:
    """The EXIF text in a drawing of this source: a hash, so that the file does not reveal the name."""
    return f"paligemma {blake2b(source.encode('utf-8', 'surrogatepass'), digest_size=8).hexdigest()}"


def read_mark(path: str | Path) -> str | None:
    """The source_mark of a drawing that `save` wrote; None for any other file."""
    try:
        with Image.open(path) as picture:
            found = str(picture.getexif().get(SOFTWARE, ""))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):  # not a picture, or damaged
        return None
    return found if re.fullmatch("paligemma [0-9a-f]{16}", found) else None
