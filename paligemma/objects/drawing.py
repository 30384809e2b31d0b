"""What was found, drawn into its picture, or set as a table for a terminal. Pillow and numpy, no torch.

`draw` scales lines and letters with the picture, gives every label a colour that people with any colour vision can tell from the
next, dashes each edge that the model is unsure of and marks how far off it may be, and places labels inside the picture so that
they cover each other as little as possible. `table` shows the same objects in letters. `save` writes a picture that is complete
or absent. Checked in tests/objects/test_drawing.py.
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
Rectangle = tuple[int, int, int, int]  # left, top, right, bottom in pixels; right and bottom lie outside

# Okabe and Ito's colours (jfly.uni-koeln.de/color), made to be told apart with any colour vision; black is left out.
PALETTE: tuple[Color, ...] = (
    (230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (0, 114, 178), (213, 94, 0), (204, 121, 167),
)  # fmt: skip
BLACK, WHITE = (0, 0, 0), (255, 255, 255)
LINES, LETTERS = 1 / 190, 1 / 34  # width of a line, size of a letter, of the side of a square as large as the picture
USUAL_LETTER, SMALLEST_LETTER = 12, 7  # pixels: the least where there is room; what a label is shrunk to before it is cut
MOST_LETTERS = 200  # of a label; the rest is cut
LABEL_SHARE = 0.25  # of the picture, which labels may cover together; then they shrink, then the last ones are left out
FILL = 90  # how opaque a mask is, of 255
SEAM = 110  # how opaque the dark line around a frame is, of 255
UNSURE = 2  # standard deviation of an edge from which it is marked as unsure, in widths of the line
DASH, GAP, CAP = 4, 3, 3  # lengths of a dash, of the gap after it and of half a whisker's cap, in widths of the line
SUPERSAMPLING = 4
JOINER = "\u200d"  # invisible, but what makes one emoji of several
BLOCKS = " ▏▎▍▌▋▊▉█"
SOFTWARE = 305  # the EXIF tag of what wrote a picture
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


def rectangle(box: NormalizedBox, width: int, height: int) -> Rectangle:
    """The box in whole pixels of the picture, at least one of each, inside it."""

    def side(low: float, high: float, length: int) -> tuple[int, int]:
        first = min(max(round(low * length), 0), length - 1)
        return first, min(max(round(high * length), first + 1), length)

    (left, right), (top, bottom) = side(box.x_min, box.x_max, width), side(box.y_min, box.y_max, height)
    return left, top, right, bottom


def strokes(rectangle: Rectangle, line: int, is_dashed: Sequence[bool]) -> list[Rectangle]:
    """What a frame is drawn of: its left, upper, right and lower side, each whole or in dashes."""
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


def whiskers(box: NormalizedBox, spread: Sequence[float], line: int, size: tuple[int, int]) -> list[Rectangle]:
    """An error bar across the middle of each edge with a spread: from one standard deviation before it to one after it.

    Args:
        spread: standard deviations of the left, upper, right and lower edge, in fractions of the picture's sides; 0 = no bar.
        size: width and height of the picture.
    """
    width, height, cap = *size, CAP * line
    x, y = round((box.x_min + box.x_max) / 2 * width), round((box.y_min + box.y_max) / 2 * height)
    edges = (box.x_min, y, width), (box.y_min, x, height), (box.x_max, y, width), (box.y_max, x, height)
    found = []
    for number, ((edge, middle, length), deviation) in enumerate(zip(edges, spread, strict=True)):
        if deviation:
            ends = (min(max(end, -1), 2) * length for end in (edge - deviation, edge + deviation))  # near the picture
            (low, high), at = map(round, ends), middle - line // 2
            bar = (at, low, at + line, high)
            caps = [(at - cap, end, at + line + cap, end + line) for end in (low, high - line)]
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
    """A frame whose outer side is the box's, with a faint dark seam that sets it off from a ground of its own colour.

    Args:
        spread: see `whiskers`; an edge that may be off by more than UNSURE lines is dashed and gets an error bar.
    """
    width, height = picture.size
    marked = [value if value * side > UNSURE * line else 0 for value, side in zip(spread, (width, height) * 2, strict=True)]
    parts = strokes(rectangle(box, width, height), line, [value > 0 for value in marked])
    parts += whiskers(box, marked, line, picture.size)
    if has_seam:
        seam = max(1, line // 3)
        x, y = (min(part[axis] for part in parts) - seam for axis in (0, 1))
        x_end, y_end = (max(part[axis] for part in parts) + seam for axis in (2, 3))
        veil = Image.new("L", (x_end - x, y_end - y), 0)
        for left, top, right, bottom in parts:
            veil.paste(SEAM, (left - seam - x, top - seam - y, right + seam - x, bottom + seam - y))
        picture.paste(BLACK, (x, y), veil)
    for part in parts:
        picture.paste(color, part)


def draw_mask(picture: Image.Image, mask: np.ndarray, color: Color, line: int, fill: int = FILL) -> None:
    """Colours what a mask, bool[H, W] of the picture, covers, as opaque as fill says (of 255), and draws its outline."""
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
    picture.paste(color, corner, Image.fromarray(part.astype(np.uint8) * fill))
    outline = Image.fromarray((part & ~inside).astype(np.uint8) * 255).filter(ImageFilter.GaussianBlur(0.6))
    picture.paste(color, corner, outline)


# Labels


def clean(text: str) -> str:
    """Text on one line that can be drawn and printed: no control characters, no halves of letters, nothing invisible."""
    kept = (letter if letter.isprintable() or letter == JOINER else "" if category(letter) == "Cf" else " " for letter in text)
    return " ".join("".join(kept).split())


def caption(found: ParsedObject) -> str:
    """What stands beside a box: the label in full and the score."""
    label = found.label[:MOST_LETTERS]
    return clean(f"{label} {found.score:.2f}" if found.score is not None else label)


def measure(text: str, size: float, letters: Lettering) -> tuple[int, int, int]:
    """Width and height of a label of this text and letter size, and the space around the text."""
    space = max(1, round(size / 3))
    size *= SUPERSAMPLING
    width, height = letters.width(text, size) / SUPERSAMPLING, sum(letters.height(text, size)) / SUPERSAMPLING
    return math.ceil(width) + 2 * space, math.ceil(height) + 2 * (space // 3), space


def fit(text: str, size: float, width: int, height: int, letters: Lettering) -> tuple[str, float] | None:
    """The text and the letter size with which a label fits: smaller first, then cut; None if nothing does."""
    while True:
        label = measure(text, size, letters)
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


def draw_label(picture: Image.Image, text: str, size: float, spot: Rectangle, color: Color, letters: Lettering) -> None:
    """A plate in the colour of the box with the text on it, drawn larger and shrunk, for even letters and round corners."""
    width, height, space = spot[2] - spot[0], spot[3] - spot[1], measure(text, size, letters)[2] * SUPERSAMPLING
    plate = Image.new("RGB", (width * SUPERSAMPLING, height * SUPERSAMPLING), color)
    letters.write(plate, (space, space // 3), text, size * SUPERSAMPLING, ink(color))
    shape = Image.new("L", plate.size, 0)
    ImageDraw.Draw(shape).rounded_rectangle((0, 0, plate.width - 1, plate.height - 1), radius=space * 2 // 3, fill=245)
    plate, shape = (image.resize((width, height), Image.Resampling.BOX) for image in (plate, shape))
    picture.paste(plate, spot[:2], shape)


def draw_labels(picture: Image.Image, boxed: Sequence[ParsedObject], colors: dict[str, Color], letters: Lettering) -> int:
    """Draws labels beside boxes until they cover LABEL_SHARE of the picture. Returns: how many are left out."""
    named = [found for found in boxed if caption(found)]
    num_pixels = picture.width * picture.height
    size, room = max(USUAL_LETTER, math.sqrt(num_pixels) * LETTERS), num_pixels * LABEL_SHARE

    def area(found: ParsedObject) -> int:
        width, height, _ = measure(caption(found), size, letters)
        return width * height

    while size > SMALLEST_LETTER and sum(map(area, named)) > room:
        size = max(SMALLEST_LETTER, size * 0.85)
    taken: list[Rectangle] = []
    for found in named:
        fitting = fit(caption(found), size, *picture.size, letters)
        label = measure(*fitting, letters)[:2] if fitting else picture.size
        if label[0] * label[1] + sum(overlap(spot, spot) for spot in taken) > room:
            return len(named) - len(taken)
        spot = place(rectangle(found.box, *picture.size), label, taken, *picture.size)
        taken.append(spot)
        draw_label(picture, *fitting, spot=spot, color=colors[found.label], letters=letters)
    return 0


@dataclass(frozen=True)
class Style:
    """How objects are drawn.

    Args:
        line_width: of boxes, in pixels; None = by the size of the picture.
        has_labels: whether names and scores stand beside the boxes.
        is_plain: frames and outlines only: masks are not filled, and unsure edges look like sure ones.
        font: a font file for labels, asked before those that lettering.py finds.
    """

    line_width: int | None = None
    has_labels: bool = True
    is_plain: bool = False
    font: str | None = None


def draw(
    picture: Image.Image, objects: Sequence[ParsedObject], style: Style = Style(), notes: list[str] | None = None
) -> Image.Image:  # fmt: skip
    """A copy of the picture, RGB and of the same size, with what was found: masks, boxes, labels and scores.

    Objects without a box are left out. The smaller a box, the later it is drawn, so that larger ones do not cover it.

    Args:
        picture: as load_image gives it, or read by it first: upright, as the model saw it.
        notes: gets a sentence for each thing that could not be drawn.
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
        unknown = letters.missing("".join(caption(found) for found in boxed))
        if notes is not None and num_missing:
            size = f"{out.width} x {out.height} pixels have"
            notes.append(f"{size} no room for {num_missing} of the labels: they are left out of the drawing.")
        if notes is not None and unknown:
            notes.append(
                f"no font here has {unknown[:20]}: drawn as {UNKNOWN}. Install one (Debian and Ubuntu: apt install "
                "fonts-noto-cjk fonts-noto-color-emoji), or name its file with --font."
            )
    return out


def save(picture: Image.Image, path: str | Path, source: str = "") -> None:
    """Writes the picture in the format of the name's ending, beside its place first. Raises: OutputError.

    Args:
        source: of what it is a drawing; kept in the file, where its format has room for that, in a form that names nothing.
    """
    path = Path(path)
    exif = Image.Exif()
    exif[SOFTWARE] = mark(source)
    with open_atomic(path) as file:
        picture.save(file, format=Image.registered_extensions()[path.suffix.lower()], quality=95, exif=exif)


def mark(source: str) -> str:
    """What a drawing of that source carries."""
    return f"paligemma {blake2b(source.encode('utf-8', 'surrogatepass'), digest_size=8).hexdigest()}"


def mark_of(path: str | Path) -> str | None:
    """The mark of a drawing that `save` wrote; None of any other file."""
    try:
        with Image.open(path) as picture:
            found = str(picture.getexif().get(SOFTWARE, ""))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):  # no picture, or one that is damaged
        return None
    return found if re.fullmatch("paligemma [0-9a-f]{16}", found) else None


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


def table(objects: Sequence[ParsedObject], width: int, height: int, is_colored: bool) -> str:
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
        x_min, y_min, x_max, y_max = (round(value) for value in found.box.xyxy(width, height))
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


def listing(objects: Sequence[ParsedObject], width: int, height: int) -> str:
    """Objects for programs, one a line, separated by tabs: label, score, x_min, y_min, x_max, y_max in pixels."""
    lines = []
    for found in objects:
        if found.box is not None:
            corners = (f"{value:.1f}" for value in found.box.xyxy(width, height))
            lines.append("\t".join([clean(found.label), "" if found.score is None else f"{found.score:.4f}", *corners]))
    return "".join(line + "\n" for line in lines)
