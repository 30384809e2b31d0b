"""Draws scenes of coloured shapes and asks questions about them: the training and test data of the demo checkpoint.

    python -m demo.shapes --out DIR --count N --seed S      N pictures and DIR/annotations.jsonl, one question per line

A scene has one to four shapes that do not touch, on a background that is flat, a gradient, striped or noisy, and often a word
in capital letters. Every question has exactly one right answer, which can be seen in the picture:
- The centres of two shapes differ horizontally by at least 0.08, so the order of captions and boxes, from left to right, is
  unambiguous.
- Questions about "the circle" are asked only if there is exactly one circle.
- "where" questions are asked only about shapes well inside one of the nine fields of a 3 x 3 grid.

If `detect` or `segment` asks for something absent, the answer is empty. All shapes of a kind fill their boxes in the same way, so
they all have the same sixteen codes: those that the encoder of paligemma/bundled/vae-oid.npz computes for the outline.

The same seed draws the same scenes. Coordinates are fractions of the picture's side, x to the right, y down. The module needs
numpy and PIL, and torch only for mask codes; the fonts are in demo/fonts/.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from itertools import pairwise
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from paligemma.files import BUNDLED, open_atomic, write_atomic
from paligemma.objects.masks import MASK_SIDE, fill, resize
from paligemma.vocabulary import CODE_TOKENS, LOCATION_TOKENS, NUM_LOCATIONS

CODEC = BUNDLED / "vae-oid.npz"
COLORS = {
    "red": (215, 35, 40), "orange": (245, 140, 25), "yellow": (245, 222, 45), "green": (45, 160, 65),
    "blue": (45, 85, 220), "purple": (140, 55, 185), "black": (18, 18, 20), "white": (248, 248, 246),
}  # fmt: skip
KINDS = ("circle", "square", "triangle", "star", "heart", "cross")
MIN_SIDE, MAX_SIDE = 0.17, 0.36  # smallest and largest side of a shape's box
GAP = 0.02  # smallest distance between two boxes
COLUMN_GAP = 0.08  # smallest horizontal distance between two centres
FIELD_MARGIN = 0.04  # smallest distance between a centre and the lines of the 3 x 3 grid, for "where"
SUPERSAMPLING = 4
FONTS = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSerif", "DejaVuSansMono", "STIXGeneralBol", "cmss10")
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
WORDS = """
    AIR APPLE ARM ART BAKER BAND BANK BAR BEACH BELL BIKE BIRD BOAT BOOK BOX BREAD BRIDGE BUS CAFE CAKE CAMP CAR CASH CHECK CITY
    CLOCK COAST COFFEE COLD CUP DANGER DESK DOCK DOG DOOR DOWN DRINK EAST ENTRY EXIT FARM FIRE FISH FLAT FLOOR FOOD FOX FRUIT
    GATE GIFT GOLD GRAND GUEST HALL HELP HERE HOTEL HOUSE ICE INFO JAZZ JUICE KEY KITE LAKE LAMP LEFT LIFT LIVE MAIL MAP MARKET
    MENU MILK MUSIC NEW NEXT NORTH OFF ON OPEN OUT OVEN PARK PHONE PIANO PIZZA PLAY POOL POST PULL PUSH QUICK QUIET RADIO RIGHT
    RIVER ROAD ROOM SALE SALT SCHOOL SHOE SHOP SLOW SOUTH STOP SUN TAXI TEA TICKET TOWN TRAIN TREE UP VIDEO WATER WEST WINE YARD
    YES ZERO ZONE ZOO
""".split()
WORD_SHARE = 0.8  # share of scenes that get a word if there is room
RANDOM_SHARE = 0.35  # share of words that are random letters
MIN_HEIGHT, MAX_HEIGHT = 0.1, 0.16  # smallest and largest height of the letters
CONTRAST = 110  # smallest RGB distance between a word's colour and either colour of the background


@dataclass(frozen=True)
class Shape:
    kind: str
    color: str
    rgb: tuple[int, int, int]
    x: float  # left edge
    y: float  # upper edge
    side: float

    @property
    def name(self) -> str:
        return f"{self.color} {self.kind}"

    @property
    def box(self) -> tuple[float, float, float, float]:
        """y_min, x_min, y_max, x_max: the order of PaliGemma's <loc> tokens."""
        return self.y, self.x, self.y + self.side, self.x + self.side

    @property
    def center(self) -> tuple[float, float]:
        return self.x + self.side / 2, self.y + self.side / 2


@dataclass(frozen=True)
class Word:
    """A word in capital letters. Its box is that of Pillow's getbbox: as high as the ink, and a little wider on both sides."""

    text: str
    font: str  # one of FONTS
    rgb: tuple[int, int, int]
    x: float  # left edge
    y: float  # upper edge
    height: float

    @property
    def width(self) -> float:
        left, top, right, bottom = face(self.font, 200).getbbox(self.text)
        return (right - left) / (bottom - top) * self.height

    def centers(self) -> list[tuple[float, float]]:
        """The centre of each letter, (x, y)."""
        font = face(self.font, 200)
        ends = [font.getlength(self.text[:count]) / font.getlength(self.text) for count in range(len(self.text) + 1)]
        middles = [(a + b) / 2 for a, b in pairwise(ends)]
        return [(self.x + middle * self.width, self.y + self.height / 2) for middle in middles]


@dataclass(frozen=True)
class Scene:
    shapes: tuple[Shape, ...]  # from left to right
    background: str  # flat, graded (a gradient), striped or noisy
    tones: tuple[tuple[int, int, int], tuple[int, int, int]]  # the two colours of the background
    angle: float  # direction of the gradient or the stripes, radians
    waves: float  # number of stripes across the picture
    noise_seed: int
    word: Word | None = None


@lru_cache(256)
def face(font: str, size: int) -> ImageFont.FreeTypeFont:
    """A font at a size in pixels."""
    return ImageFont.truetype(Path(__file__).with_name("fonts") / f"{font}.ttf", size)


@cache
def outline(kind: str) -> np.ndarray:
    """The corners of a shape, float[corners, 2] as x and y, scaled so that the shape touches all sides of the unit square."""
    if kind == "square":
        points = np.array([(0, 0), (1, 0), (1, 1), (0, 1)], dtype=float)
    elif kind == "triangle":
        points = np.array([(0.5, 0), (1, 1), (0, 1)], dtype=float)
    elif kind == "cross":
        a, b = 0.32, 0.68
        points = np.array([(a, 0), (b, 0), (b, a), (1, a), (1, b), (b, b), (b, 1), (a, 1), (a, b), (0, b), (0, a), (a, a)])
    elif kind == "star":
        angle = np.arange(10) * np.pi / 5
        radius = np.where(np.arange(10) % 2, 0.42, 1.0)
        points = np.stack([radius * np.sin(angle), -radius * np.cos(angle)], axis=1)
    elif kind == "heart":
        t = np.linspace(0, 2 * np.pi, 60, endpoint=False)
        height = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
        points = np.stack([16 * np.sin(t) ** 3, -height], axis=1)
    elif kind == "circle":
        t = np.linspace(0, 2 * np.pi, 60, endpoint=False)
        points = np.stack([np.cos(t), np.sin(t)], axis=1)
    else:
        raise ValueError(f"kind is {kind!r}; one of {', '.join(KINDS)} is needed.")
    low, high = points.min(axis=0), points.max(axis=0)
    return (points - low) / (high - low)


def place(rng: np.random.Generator, count: int) -> list[tuple[float, float, float]]:
    """(x, y, side) of `count` random boxes, from left to right. They are drawn again until none is too close to another."""
    while True:
        largest = MAX_SIDE if count < 4 else 0.3
        side = rng.uniform(MIN_SIDE, largest, count)
        x, y = rng.uniform(0.01, 0.99 - side), rng.uniform(0.01, 0.99 - side)
        order = np.argsort(x + side / 2)
        x, y, side = x[order], y[order], side[order]
        if (np.diff(x + side / 2) < COLUMN_GAP).any():
            continue
        pairs = [(i, j) for i in range(count) for j in range(i)]
        gaps = ((x[j] - x[i] - side[i], x[i] - x[j] - side[j], y[j] - y[i] - side[i], y[i] - y[j] - side[j]) for i, j in pairs)
        if all(max(gap) >= GAP for gap in gaps):
            return [(float(a), float(b), float(c)) for a, b, c in zip(x, y, side, strict=True)]


def place_word(scene: Scene, rng: np.random.Generator) -> Word | None:
    """A random word outside the shapes, in a readable colour; None for some scenes, and if there is no room."""
    if rng.random() >= WORD_SHARE:
        return None
    is_random = rng.random() < RANDOM_SHARE
    text = "".join(rng.choice(list(LETTERS), rng.integers(2, 6))) if is_random else str(rng.choice(WORDS))
    readable = [rgb for rgb in COLORS.values() if np.linalg.norm(np.array(scene.tones) - np.array(rgb), axis=-1).min() > CONTRAST]
    font, rgb = str(rng.choice(FONTS)), tuple(rng.choice(readable).tolist())
    word = Word(text, font, rgb, 0, 0, float(rng.uniform(MIN_HEIGHT, MAX_HEIGHT)))
    width = word.width
    for _ in range(40):
        x, y = (float(v) for v in rng.uniform(0.02, 1.0, 2))
        is_inside = x + width < 0.98 and y + word.height < 0.98
        gaps = ((s.x - x - width, x - s.x - s.side, s.y - y - word.height, y - s.y - s.side) for s in scene.shapes)
        if is_inside and all(max(gap) >= GAP for gap in gaps):
            return replace(word, x=x, y=y)
    return None


def make_scene(rng: np.random.Generator) -> Scene:
    """A random scene. A third of the later shapes repeat the kind or colour of an earlier one, so there is something to count."""
    boxes = place(rng, int(rng.integers(1, 5)))
    shapes: list[Shape] = []
    for x, y, side in boxes:
        kind, color = str(rng.choice(KINDS)), str(rng.choice(list(COLORS)))
        if shapes and rng.random() < 0.35:
            other = shapes[rng.integers(len(shapes))]
            kind, color = (other.kind, color) if rng.random() < 0.6 else (kind, other.color)
        rgb = np.clip(np.array(COLORS[color]) + rng.integers(-14, 15, 3), 0, 255)
        shapes.append(Shape(kind, color, tuple(rgb.tolist()), x, y, side))
    while True:  # two dull tones, both very different from the colours of all shapes
        tone = rng.uniform(55, 225) + rng.uniform(-28, 28, 3)
        tones = np.clip(np.stack([tone, tone + rng.uniform(-30, 30) + rng.uniform(-12, 12, 3)]), 0, 255)
        used = np.array([shape.rgb for shape in shapes])
        if np.linalg.norm(used[:, None] - tones, axis=-1).min() > 85:
            break
    background = str(rng.choice(["flat", "graded", "striped", "noisy"]))
    first, second = (tuple(tone.astype(int).tolist()) for tone in tones)
    angle, waves = float(rng.uniform(0, 2 * np.pi)), float(rng.uniform(3, 9))
    scene = Scene(tuple(shapes), background, (first, second), angle, waves, int(rng.integers(2**31)))
    # Words were added later. A separate generator draws them, so that each seed still gives the same shapes and background.
    return replace(scene, word=place_word(scene, rng.spawn(1)[0]))


def draw_background(scene: Scene, size: int) -> Image.Image:
    """The picture without shapes."""
    first, second = (np.array(tone, dtype=np.float32) for tone in scene.tones)
    if scene.background == "flat":
        return Image.new("RGB", (size, size), scene.tones[0])
    if scene.background == "noisy":
        share = np.random.default_rng(scene.noise_seed).random((size, size), dtype=np.float32)
    else:
        place = (np.arange(size, dtype=np.float32) + 0.5) / size - 0.5
        along = place * np.cos(scene.angle) + place[:, None] * np.sin(scene.angle)  # -0.71 to 0.71
        share = along / 1.42 + 0.5
        if scene.background == "striped":
            share = np.clip(0.5 + 3 * np.sin(2 * np.pi * scene.waves * along), 0, 1)
    pixels = first + (second - first) * share[..., None]
    return Image.fromarray(pixels.astype(np.uint8))


def draw(scene: Scene, size: int = 224) -> Image.Image:
    """The scene as an RGB picture of `size` x `size` pixels with smooth edges."""
    picture = draw_background(scene, size)
    for shape in scene.shapes:
        left, top = int(shape.x * size), int(shape.y * size)
        side = int(np.ceil((max(shape.x, shape.y) % (1 / size) + shape.side) * size)) + 1
        corners = outline(shape.kind) * shape.side * size + (shape.x * size - left, shape.y * size - top)
        mask = Image.new("L", (side * SUPERSAMPLING, side * SUPERSAMPLING))
        # PIL fills every pixel that contains a corner; shifting by half a (supersampled) pixel keeps the shape inside its box.
        ImageDraw.Draw(mask).polygon([tuple(point) for point in corners * SUPERSAMPLING - 0.5], fill=255)
        picture.paste(shape.rgb, (left, top), mask.reduce(SUPERSAMPLING))
    if scene.word:
        draw_word(picture, scene.word)
    return picture


def draw_word(picture: Image.Image, word: Word) -> None:
    """Draws the letters into the picture with smooth edges."""
    size = picture.width
    left, top, right, bottom = face(word.font, 200).getbbox(word.text)
    scale = word.height * size * SUPERSAMPLING / (bottom - top)
    letters = face(word.font, max(1, round(200 * scale)))
    x, y = int(word.x * size), int(word.y * size)
    ink = letters.getbbox(word.text)
    shift = ((word.x * size - x) * SUPERSAMPLING - ink[0], (word.y * size - y) * SUPERSAMPLING - ink[1])
    side = [int(np.ceil((end - begin) / SUPERSAMPLING)) + 2 for begin, end in (ink[::2], ink[1::2])]
    mask = Image.new("L", (side[0] * SUPERSAMPLING, side[1] * SUPERSAMPLING))
    ImageDraw.Draw(mask).text(shift, word.text, font=letters, fill=255)
    picture.paste(word.rgb, (x, y), mask.reduce(SUPERSAMPLING))


def silhouette(shape: Shape, size: int) -> np.ndarray:
    """The shape's mask in a picture of `size` x `size` pixels, bool[size, size]: the pixels whose centres it covers."""
    corners = (outline(shape.kind) * shape.side + (shape.x, shape.y)) * size
    return fill([corners.ravel().tolist()], size, size)


def article(name: str) -> str:
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"


def only_one(shapes: tuple[Shape, ...], rng: np.random.Generator, *, by: tuple[str, ...]) -> tuple[Shape, str] | None:
    """A random shape and a word that fits only this shape; None if every word fits several shapes.

    Args:
        by: the kinds of words to try: "kind" ("circle"), "color" ("red shape"), "name" ("red circle").
    """
    words = {"kind": lambda shape: shape.kind, "color": lambda shape: f"{shape.color} shape", "name": lambda shape: shape.name}
    found = []
    for way in by:
        named = [words[way](shape) for shape in shapes]
        found += [(shape, word) for shape, word in zip(shapes, named, strict=True) if named.count(word) == 1]
    return found[rng.integers(len(found))] if found else None


def ask_caption(scene: Scene, _rng: np.random.Generator) -> tuple[str, str] | None:
    names = [article(shape.name) for shape in scene.shapes]
    return "caption en", ", ".join(names[:-1]) + " and " + names[-1] if len(names) > 1 else names[0]


def ask_color(scene: Scene, rng: np.random.Generator) -> tuple[str, str] | None:
    found = only_one(scene.shapes, rng, by=("kind",))
    return found and (f"answer en what color is the {found[1]}?", found[0].color)


def ask_shape(scene: Scene, rng: np.random.Generator) -> tuple[str, str] | None:
    found = only_one(scene.shapes, rng, by=("color",))
    return found and (f"answer en what shape is {found[0].color}?", found[0].kind)


def ask_count(scene: Scene, rng: np.random.Generator) -> tuple[str, str] | None:
    asked = rng.integers(3)
    if asked == 0:
        return "answer en how many shapes are there?", str(len(scene.shapes))
    pick = scene.shapes[rng.integers(len(scene.shapes))]
    if asked == 1:
        kind = pick.kind if rng.random() < 0.8 else str(rng.choice(KINDS))
        plural = kind + "es" if kind == "cross" else kind + "s"
        return f"answer en how many {plural} are there?", str(sum(shape.kind == kind for shape in scene.shapes))
    color = pick.color if rng.random() < 0.8 else str(rng.choice(list(COLORS)))
    return f"answer en how many {color} shapes are there?", str(sum(shape.color == color for shape in scene.shapes))


def absent_thing(scene: Scene, pick: Shape, rng: np.random.Generator) -> str:
    """A word for something absent: a kind, "red shape", or (half of the time) a name whose kind or colour is in the scene."""
    there = {word for shape in scene.shapes for word in (shape.kind, f"{shape.color} shape", shape.name)}
    kinds, colors = [word for word in KINDS if word not in there], [word for word in COLORS if f"{word} shape" not in there]
    names = [f"{color} {pick.kind}" for color in COLORS] + [f"{pick.color} {kind}" for kind in KINDS]
    names += [f"{a.color} {b.kind}" for a in scene.shapes for b in scene.shapes] * 3
    names = [word for word in names if word not in there]
    way = rng.integers(4)
    return str(rng.choice((kinds, colors, names, names)[way])) + (" shape" if way == 1 else "")


def ask_exists(scene: Scene, rng: np.random.Generator) -> tuple[str, str] | None:
    """Half of the answers are yes. Of the other questions, half ask for a name whose kind or colour is in the scene."""
    pick = scene.shapes[rng.integers(len(scene.shapes))]
    if rng.random() < 0.5:
        word = str(rng.choice([pick.kind, f"{pick.color} shape", pick.name, pick.name]))
        return f"answer en is there {article(word)}?", "yes"
    return f"answer en is there {article(absent_thing(scene, pick, rng))}?", "no"


def ask_where(scene: Scene, rng: np.random.Generator) -> tuple[str, str] | None:
    found = only_one(scene.shapes, rng, by=("kind", "color", "name"))
    if not found:
        return None
    shape, word = found
    if any(abs(v - line) < FIELD_MARGIN for v in shape.center for line in (1 / 3, 2 / 3)):
        return None
    column, row = (int(v * 3) for v in shape.center)
    words = [("top", "", "bottom")[row], ("left", "", "right")[column]]
    return f"answer en where is the {word}?", " ".join(filter(None, words)) or "center"


def loc(v: float) -> str:
    """The <loc> token of a coordinate from 0 to 1."""
    last = NUM_LOCATIONS - 1
    return LOCATION_TOKENS[min(max(round(v * last), 0), last)]


def pick_words(scene: Scene, rng: np.random.Generator) -> list[str]:
    """Labels to look for: one, two, or "shape" for all shapes."""
    way = rng.random()
    pick = scene.shapes[rng.integers(len(scene.shapes))]
    if way < 0.25:
        return ["shape"]
    if way < 0.5:
        return [pick.kind]
    if way < 0.75:
        return [pick.name]
    names = sorted({shape.name for shape in scene.shapes})
    return [str(name) for name in rng.permutation(names)[:2]]


def named(scene: Scene, words: list[str]) -> list[tuple[Shape, str]]:
    """Pairs (shape, word) of the shapes that the words name, in the order of the words; for each word, from left to right."""
    return [(shape, word) for word in words for shape in scene.shapes if word in ("shape", shape.kind, shape.name)]


def box_tokens(shape: Shape) -> str:
    return "".join(loc(v) for v in shape.box)


@cache
def mask_tokens(kind: str) -> str:
    """The sixteen code tokens of a kind of shape, as the bundled codec encodes its outline."""
    import torch

    from paligemma.objects.mask_codec import load_codec

    fine = fill([(outline(kind) * 8 * MASK_SIDE).ravel().tolist()], 8 * MASK_SIDE, 8 * MASK_SIDE)
    codes = load_codec(CODEC).encode(torch.from_numpy(resize(fine, MASK_SIDE, MASK_SIDE))[None])[0]
    return "".join(CODE_TOKENS[code] for code in codes.tolist())


def box_answer(scene: Scene, words: list[str]) -> str:
    return " ; ".join(f"{box_tokens(shape)} {word}" for shape, word in named(scene, words))


def mask_answer(scene: Scene, words: list[str]) -> str:
    return " ; ".join(f"{box_tokens(shape)}{mask_tokens(shape.kind)} {word}" for shape, word in named(scene, words))


def ask_detect(scene: Scene, rng: np.random.Generator) -> tuple[str, str] | None:
    words = pick_words(scene, rng)
    return "detect " + " ; ".join(words), box_answer(scene, words)


def ask_segment(scene: Scene, rng: np.random.Generator) -> tuple[str, str] | None:
    words = pick_words(scene, rng)
    return "segment " + " ; ".join(words), mask_answer(scene, words)


def absent_label(scene: Scene, pick: Shape, rng: np.random.Generator) -> str:
    """The kind or the name of something absent, as a label for detect and segment."""
    while (word := absent_thing(scene, pick, rng)).endswith(" shape"):  # detect and segment never ask for "red shape"
        pass
    return word


def ask_absent(scene: Scene, rng: np.random.Generator) -> tuple[str, str] | None:
    """`detect` or `segment` of something absent."""
    pick = scene.shapes[rng.integers(len(scene.shapes))]
    task = str(rng.choice(["detect", "segment"]))
    return f"{task} {absent_label(scene, pick, rng)}", ""


def ask_several(scene: Scene, rng: np.random.Generator) -> tuple[str, str] | None:
    """`detect` or `segment` of two to four kinds or names, one of which may be absent."""
    task = str(rng.choice(["detect", "segment"]))
    by_kind = rng.random() < 0.5
    there = sorted({shape.kind if by_kind else shape.name for shape in scene.shapes})
    words = [str(word) for word in rng.permutation(there)[:3]]
    if len(words) == 1 or rng.random() < 0.3:
        words.insert(int(rng.integers(len(words) + 1)), absent_label(scene, scene.shapes[0], rng))
    answer = box_answer if task == "detect" else mask_answer
    return f"{task} " + " ; ".join(words), answer(scene, words)


def ask_ocr(scene: Scene, _rng: np.random.Generator) -> tuple[str, str] | None:
    return ("ocr", scene.word.text) if scene.word and scene.word.text in WORDS else None


def ask_letters(scene: Scene, _rng: np.random.Generator) -> tuple[str, str] | None:
    """`ocr` of random letters, which must be read one by one."""
    return ("ocr", scene.word.text) if scene.word and scene.word.text not in WORDS else None


def ask_blank(scene: Scene, _rng: np.random.Generator) -> tuple[str, str] | None:
    """`ocr` of a picture without text."""
    return None if scene.word else ("ocr", "")


QUESTIONS: dict[str, Callable[[Scene, np.random.Generator], tuple[str, str] | None]] = {
    "caption": ask_caption, "color": ask_color, "shape": ask_shape, "count": ask_count, "exists": ask_exists,
    "where": ask_where, "detect": ask_detect, "segment": ask_segment, "absent": ask_absent, "several": ask_several,
    "ocr": ask_ocr, "letters": ask_letters, "blank": ask_blank,
}  # fmt: skip
# The questions that are asked about each picture, here and in evaluate.py. New kinds are added at the end, so that the random
# numbers of the other kinds stay the same.
ASKED = (
    "caption", "color", "shape", "count", "exists", "where", "detect", "count", "exists", "detect", "segment", "absent",
    "several", "ocr", "letters", "blank",
)  # fmt: skip


def ask(scene: Scene, rng: np.random.Generator, kinds: list[str]) -> list[tuple[str, str]]:
    """Questions (prefix, suffix) of these kinds, in this order, without repetitions. Kinds that do not fit are skipped."""
    found = dict.fromkeys(QUESTIONS[kind](scene, rng) for kind in kinds)
    return [question for question in found if question is not None]


def write(out: Path, count: int, seed: int, size: int) -> None:
    """Writes pictures 000000.png, ..., then annotations.jsonl in one step, so that it is always complete."""
    out.mkdir(parents=True, exist_ok=True)
    lines = []
    for index in range(count):
        rng = np.random.default_rng([seed, index])
        scene = make_scene(rng)
        name = f"{index:06d}.png"
        with open_atomic(out / name) as stream:
            draw(scene, size).save(stream, format="png")
        for prefix, suffix in ask(scene, rng, list(ASKED)):
            lines.append(json.dumps({"image": name, "prefix": prefix, "suffix": suffix}))
    write_atomic(out / "annotations.jsonl", "".join(line + "\n" for line in lines))


def main() -> None:
    parser = argparse.ArgumentParser(description="Draws scenes of coloured shapes and questions about them.")
    parser.add_argument("--out", type=Path, required=True, help="folder for the pictures and annotations.jsonl")
    parser.add_argument("--count", type=int, default=100, help="number of pictures")
    parser.add_argument("--seed", type=int, default=0, help="the same seed draws the same pictures")
    parser.add_argument("--size", type=int, default=224, help="side of a picture in pixels")
    options = parser.parse_args()
    if options.count < 0 or options.seed < 0 or options.size < 16:
        parser.error("--count and --seed must be at least 0, and --size at least 16.")
    write(options.out, options.count, options.seed, options.size)
    print(f"{options.count} pictures and their questions are in {options.out}.")


if __name__ == "__main__":
    main()
