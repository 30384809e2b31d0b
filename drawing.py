"""What was found, drawn into its picture, or set as a table for a terminal. Pillow and numpy, no font file, no torch.

`draw` scales lines and letters with the picture, gives every label a colour that people with any colour vision can tell from
the next, shades each edge as far as the model was unsure of it, and moves labels until they neither leave the picture nor, if it
can be helped, cover each other. `table` shows the same objects in letters. `save` writes a picture so that nobody ever sees half
of it. Checked in tests/test_drawing.py.
"""

import math
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from files import whole
from outputs import Box, Found

Color = tuple[int, int, int]
Rectangle = tuple[int, int, int, int]  # left, top, right, bottom in pixels; right and bottom lie outside

# Okabe and Ito's colours (jfly.uni-koeln.de/color), made to be told apart with any colour vision; black is left out.
PALETTE: tuple[Color, ...] = (
    (230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (0, 114, 178), (213, 94, 0), (204, 121, 167),
)  # fmt: skip
BLACK, WHITE = (0, 0, 0), (255, 255, 255)
LINES, LETTERS = 1 / 190, 1 / 34  # width of a line, size of a letter, of the side of a square as large as the picture
USUAL_LETTER, SMALLEST_LETTER = 12, 7  # pixels: the least where there is room; what a label is shrunk to before it is cut
FILL = 90  # how opaque a mask is, of 255
VEIL = 100  # how opaque the shading of an unsure edge is where it is likeliest, of 255
SUPERSAMPLING = 4
BLOCKS = " ▏▎▍▌▋▊▉█"
BAR = 10  # letters of a full bar


# Colours


def palette(labels: Iterable[str]) -> dict[str, Color]:
    """A colour for each label, in the order in which they first come; beyond seven, the same ones darker."""
    colors: dict[str, Color] = {}
    for label in labels:
        if label not in colors:
            turn, place = divmod(len(colors), len(PALETTE))
            colors[label] = tuple(round(level * 0.7**turn) for level in PALETTE[place])
    return colors


def luminance(color: Color) -> float:
    """How bright a colour is to an eye, 0 to 1 (WCAG 2, relative luminance)."""
    linear = [level / 3294 if level <= 10 else ((level / 255 + 0.055) / 1.055) ** 2.4 for level in color]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: Color, other: Color) -> float:
    """From 1, the same, to 21, black on white (WCAG 2); text wants 4.5."""
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def ink(ground: Color) -> Color:
    """Black or white, whichever is easier to read on that ground."""
    return max(BLACK, WHITE, key=lambda color: contrast(color, ground))


# Shapes


def rectangle(box: Box, width: int, height: int) -> Rectangle:
    """The box in whole pixels of the picture, at least one of each, inside it."""

    def side(low: float, high: float, length: int) -> tuple[int, int]:
        first = min(max(round(low * length), 0), length - 1)
        return first, min(max(round(high * length), first + 1), length)

    (left, right), (top, bottom) = side(box.x_min, box.x_max, width), side(box.y_min, box.y_max, height)
    return left, top, right, bottom


def likelihood(length: int, first: int, ends: tuple[float, float], spreads: tuple[float, float]) -> tuple[np.ndarray, np.ndarray]:
    """How likely two opposite edges lie at each pixel from `first` on, and how likely that pixel lies between them.

    Returns: float32[length], the densities with their peaks at 1, and float32[length], 1 between the edges.
    """
    pixel = np.arange(first, first + length, dtype=np.float32) + 0.5
    low, high = (np.exp(-0.5 * ((pixel - end) / max(spread, 0.25)) ** 2) for end, spread in zip(ends, spreads, strict=True))
    return np.maximum(low, high), np.where(pixel < ends[0], low, np.where(pixel > ends[1], high, 1))


def shade_edges(picture: Image.Image, found: Found, color: Color) -> None:
    """Lays a veil over where each edge may be, as dense as it is likely to be there."""
    width, height = picture.size
    box, (top, left, bottom, right) = found.box, found.spread
    area = Box(box.y_min - 3 * top, box.x_min - 3 * left, box.y_max + 3 * bottom, box.x_max + 3 * right)
    x, y, x_end, y_end = rectangle(area, width, height)
    on_x, in_x = likelihood(x_end - x, x, (box.x_min * width, box.x_max * width), (left * width, right * width))
    on_y, in_y = likelihood(y_end - y, y, (box.y_min * height, box.y_max * height), (top * height, bottom * height))
    veil = np.maximum(in_y[:, None] * on_x, on_y[:, None] * in_x) * VEIL
    picture.paste(color, (x, y), Image.fromarray(veil.astype(np.uint8)))


def draw_box(picture: Image.Image, box: Box, color: Color, line: int) -> None:
    """A frame whose outer side is the box's, with a faint dark seam that sets it off from a ground of its own colour."""
    left, top, right, bottom = rectangle(box, *picture.size)
    veil = Image.new("L", (right - left + 2, bottom - top + 2), 0)
    pen = ImageDraw.Draw(veil)
    seam = max(1, line // 3)
    pen.rectangle((0, 0, veil.width - 1, veil.height - 1), outline=110, width=1 + line + seam)
    picture.paste(BLACK, (left - 1, top - 1), veil)
    ImageDraw.Draw(picture).rectangle((left, top, right - 1, bottom - 1), outline=color, width=line)


def draw_mask(picture: Image.Image, mask: np.ndarray, color: Color, line: int) -> None:
    """Colours what a mask, bool[H, W] of the picture, covers, and draws its outline."""
    if mask.shape != (picture.height, picture.width) or not mask.any():
        return
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    top, left = max(rows[0] - line - 1, 0), max(columns[0] - line - 1, 0)
    part = mask[top : rows[-1] + line + 2, left : columns[-1] + line + 2]
    padded = np.pad(part, line, mode="edge")
    height, width = part.shape
    inside = part.copy()
    for y, x in ((0, line), (2 * line, line), (line, 0), (line, 2 * line)):
        inside &= padded[y : y + height, x : x + width]
    corner = (int(left), int(top))
    picture.paste(color, corner, Image.fromarray(part.astype(np.uint8) * FILL))
    outline = Image.fromarray((part & ~inside).astype(np.uint8) * 255).filter(ImageFilter.GaussianBlur(0.6))
    picture.paste(color, corner, outline)


# Labels


@lru_cache(maxsize=64)
def font(size: float) -> ImageFont.FreeTypeFont:
    """Pillow's own, at this many pixels."""
    return ImageFont.load_default(size)


def clean(text: str) -> str:
    """Text on one line that can be drawn and printed: no control characters, no halves of letters."""
    return " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())


def caption(found: Found) -> str:
    """What stands beside a box: the label in full and the score."""
    return clean(f"{found.label} {found.score:.2f}" if found.score is not None else found.label)


def measure(text: str, size: float) -> tuple[int, int, int]:
    """Width and height of a label of this text and letter size, and the space around the text."""
    space = max(1, round(size / 3))
    letters = font(size * SUPERSAMPLING)
    width, height = letters.getlength(text) / SUPERSAMPLING, sum(letters.getmetrics()) / SUPERSAMPLING
    return math.ceil(width) + 2 * space, math.ceil(height) + 2 * (space // 3), space


def fit(text: str, size: float, width: int, height: int) -> tuple[str, float] | None:
    """The text and the letter size with which a label fits: smaller first, then cut; None if nothing does."""
    while True:
        label = measure(text, size)
        if label[0] <= width and label[1] <= height:
            return text, size
        if size > SMALLEST_LETTER:
            size = max(SMALLEST_LETTER, size * 0.85)
        elif label[1] <= height and len(text) > 2:
            text = text[: -2 if text.endswith("…") else -1].rstrip() + "…"
        else:
            return None


def overlap(one: Rectangle, other: Rectangle) -> int:
    """Pixels that two rectangles share."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    return max(width, 0) * max(height, 0)


def place(box: Rectangle, label: tuple[int, int], taken: list[Rectangle], width: int, height: int) -> Rectangle:
    """Where a label goes: the first of its places that covers least of the labels already there; always within the picture."""
    left, top, right, bottom = box
    wide, high = label
    spots = [(left, top - high), (left, top), (right - wide, top - high), (left, bottom), (right - wide, bottom)]
    spots += [(left, bottom - high), (right - wide, bottom - high), (right, top), (left - wide, top)]
    spots += [(left, top + step * high) for step in range(1, 1 + min(16, height // high))]

    def within(spot: tuple[int, int]) -> Rectangle:
        x, y = (min(max(value, 0), most) for value, most in zip(spot, (width - wide, height - high), strict=True))
        return x, y, x + wide, y + high

    return min((within(spot) for spot in spots), key=lambda spot: sum(overlap(spot, other) for other in taken))


def draw_label(picture: Image.Image, text: str, size: float, spot: Rectangle, color: Color) -> None:
    """A plate in the colour of the box with the text on it, drawn larger and shrunk, for even letters and round corners."""
    width, height, space = spot[2] - spot[0], spot[3] - spot[1], measure(text, size)[2] * SUPERSAMPLING
    plate = Image.new("RGB", (width * SUPERSAMPLING, height * SUPERSAMPLING), color)
    ImageDraw.Draw(plate).text((space, space // 3), text, font=font(size * SUPERSAMPLING), fill=ink(color))
    shape = Image.new("L", plate.size, 0)
    ImageDraw.Draw(shape).rounded_rectangle((0, 0, plate.width - 1, plate.height - 1), radius=space * 2 // 3, fill=245)
    plate, shape = (image.resize((width, height), Image.Resampling.BOX) for image in (plate, shape))
    picture.paste(plate, spot[:2], shape)


def draw(picture: Image.Image, objects: Sequence[Found]) -> Image.Image:
    """A copy of the picture, RGB and of the same size, with what was found: masks, boxes, labels and scores.

    Objects without a box are left out. The smaller a box, the later it is drawn, so that none is lost behind another.
    """
    out = picture.convert("RGB").copy()
    boxed = sorted((found for found in objects if found.box is not None), key=lambda found: -found.box.area)
    colors = palette(found.label for found in objects)
    side = math.sqrt(out.width * out.height)
    line, letter = max(1, round(side * LINES)), max(USUAL_LETTER, side * LETTERS)
    for found in boxed:
        if found.mask is not None:
            draw_mask(out, found.mask, colors[found.label], line)
    for found in boxed:
        if found.spread is not None:
            shade_edges(out, found, colors[found.label])
        draw_box(out, found.box, colors[found.label], line)
    taken: list[Rectangle] = []
    for found in boxed:
        fitting = fit(caption(found), letter, *out.size) if caption(found) else None
        if fitting is not None:
            label = measure(*fitting)[:2]
            spot = place(rectangle(found.box, *out.size), label, taken, *out.size)
            taken.append(spot)
            draw_label(out, *fitting, spot, colors[found.label])
    return out


def save(picture: Image.Image, path: str | Path) -> None:
    """Writes the picture in the format of the name's ending, beside its place first. Raises: OutputError."""
    path = Path(path)
    with whole(path) as beside, open(beside, "wb") as file:
        picture.save(file, format=Image.registered_extensions()[path.suffix.lower()], quality=95)


# Letters


def bar(score: float) -> str:
    """The score as a bar of at most ten letters, in eighths of one."""
    eighths = round(min(max(score, 0), 1) * BAR * 8)
    return ("█" * (eighths // 8) + BLOCKS[eighths % 8]).strip().ljust(BAR)


def shown_width(text: str) -> int:
    """Columns that a terminal gives a text: two for the wide letters of East Asia, none for marks that sit on others."""
    import unicodedata

    return sum(
        0 if unicodedata.combining(letter) else 2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in text
    )


def table(objects: Sequence[Found], width: int, height: int, is_colored: bool) -> str:
    """Objects for a terminal, one a line: label, score, the score as a bar, corners of the box in pixels, share of the mask."""
    boxed = [found for found in objects if found.box is not None]
    colors = palette(found.label for found in objects)
    labels = [clean(found.label) or "(no label)" for found in boxed]
    widest = max(map(shown_width, labels), default=0)
    lines = []
    for found, label in zip(boxed, labels, strict=True):
        dot, dim, end = "", "", ""
        if is_colored:
            dot, dim, end = "\x1b[38;2;{};{};{}m".format(*colors[found.label]), "\x1b[2m", "\x1b[0m"
        x_min, y_min, x_max, y_max = (round(value) for value in found.box.pixels(width, height))
        parts = [f"{dot}■{end} {label}{' ' * (widest - shown_width(label))}"]
        if found.score is not None:
            parts.append(f"{found.score:.2f} {dot}{bar(found.score)}{end}")
        digits = len(str(max(width, height)))
        parts.append(f"{x_min:>{digits}},{y_min:>{digits}} {dim}to{end} {x_max:>{digits}},{y_max:>{digits}}")
        if found.mask is not None:
            parts.append(f"{dim}mask{end} {found.mask.mean():.1%}")
        if found.problems:
            parts.append(f"{dim}{', '.join(found.problems)}{end}")
        lines.append("  ".join(parts).rstrip())
    return "".join(line + "\n" for line in lines)


def listing(objects: Sequence[Found], width: int, height: int) -> str:
    """Objects for programs, one a line, separated by tabs: label, score, x_min, y_min, x_max, y_max in pixels."""
    lines = []
    for found in objects:
        if found.box is not None:
            corners = (f"{value:.1f}" for value in found.box.pixels(width, height))
            lines.append("\t".join([clean(found.label), "" if found.score is None else f"{found.score:.4f}", *corners]))
    return "".join(line + "\n" for line in lines)
