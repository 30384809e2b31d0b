"""Draws an explanation as one sheet: the picture, the answer, and a card with a heat map for each word.

explanation.py computes the explanation. Checked in tests/test_explanation.py.
"""

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

from paligemma.errors import counted
from paligemma.explanation import MIN_DEPENDENCE, Explanation, Token, Word, as_ratio
from paligemma.objects.drawing import PALETTE, clean, draw_box
from paligemma.objects.lettering import lettering
from paligemma.pictures.images import load_image
from paligemma.vocabulary import LOCATION_OR_CODE

WIDTH, MARGIN, GAP, PAD = 1240, 28, 18, 12  # pixels
CARDS = 5  # cards per row
TEXT_COLOUR, GREY_TEXT_COLOUR, LINE_COLOUR, BACKGROUND = "#22262b", "#707780", "#e4e6e9", "#f6f7f8"
BLUE, SKY, ORANGE, GREEN = PALETTE[4], PALETTE[1], PALETTE[5], PALETTE[2]
BARS = 3  # alternatives per card
HEAT_COLOURS = (  # (value from 0 to 1, (red, green, blue))
    (0.0, (255, 255, 255)), (0.35, (255, 214, 92)), (0.7, (240, 112, 24)), (1.0, (176, 18, 40)),
)  # fmt: skip


def signed(value: float, digits: int) -> str:
    """The number with its sign; a number that rounds to 0 gets a plus."""
    return f"{round(value, digits) + 0.0:+.{digits}f}"


def fitted(text: str, size: int, width: float) -> str:
    """The text, shortened to a width in pixels; a shortened text ends with "…"."""
    text = clean(text)
    if lettering().width(text, size) <= width:
        return text
    while text and lettering().width(text + "…", size) > width:
        text = text[:-1]
    return text + "…"


def wrapped(text: str, size: int, width: float, max_lines: int) -> list[str]:
    """The text in at most `max_lines` lines of at most `width` pixels; the last line is shortened if it is too long."""
    lines: list[str] = []
    for word in text.split():
        if lines and lettering().width(f"{lines[-1]} {word}", size) <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    kept = [*lines[: max_lines - 1], " ".join(lines[max_lines - 1 :])] if lines else []
    return [fitted(line, size, width) for line in kept if line]


def colour_map(grey: Image.Image) -> Image.Image:
    """Maps a grey picture (values 0 to 255) to the colours of HEAT_COLOURS."""
    stops = [stop for stop, _ in HEAT_COLOURS]
    channels = np.array([colour for _, colour in HEAT_COLOURS]).T
    tables = [np.interp(np.arange(256) / 255, stops, channel).round().tolist() for channel in channels]
    return Image.merge("RGB", [grey.point(table) for table in tables])


def heat_map(picture: Image.Image, values: Tensor) -> Image.Image:
    """The picture in pale grey under a heat map, in which the largest value has the darkest red.

    Args:
        values: float32[rows, columns of patches], not negative.
    """
    scaled = values / values.max().clamp(min=1e-30)
    small = Image.fromarray((scaled * 255).round().byte().numpy())
    heat = small.resize(picture.size, Image.Resampling.BICUBIC)
    pale = Image.blend(picture.convert("L").convert("RGB"), Image.new("RGB", picture.size, "white"), 0.35)
    opacity = heat.point([min(225, round(1.6 * level)) for level in range(256)])
    return Image.composite(colour_map(heat), pale, opacity)


def by_text(alternatives: Sequence[tuple[str, float]]) -> list[tuple[str, float]]:
    """The alternatives, most likely first. Probabilities of equal words are added ("cat" and " cat" are two tokens, one word)."""
    probabilities: dict[str, float] = {}
    for text, probability in alternatives:
        shown = text.strip() or repr(text)[1:-1]
        probabilities[shown] = probabilities.get(shown, 0.0) + probability
    return sorted(probabilities.items(), key=lambda pair: -pair[1])


def draw_bars(sheet: Image.Image, x: int, y: int, width: int, bars: Sequence[tuple[str, float]]) -> None:
    """Draws one line per alternative: text, bar and probability. The bar of probability 1 has the full length."""
    draw, label, number = ImageDraw.Draw(sheet), int(0.42 * width), 46
    for line, (text, probability) in enumerate(bars):
        top, room = y + 21 * line, width - label - number
        lettering().write(sheet, (x, top), fitted(text, 13, label - 8), 13, TEXT_COLOUR if line == 0 else GREY_TEXT_COLOUR)
        draw.rectangle((x + label, top + 3, x + label + room, top + 13), LINE_COLOUR)
        draw.rectangle((x + label, top + 3, x + label + max(1, round(room * probability)), top + 13), BLUE)
        lettering().write(sheet, (x + width, top), f"{probability:.0%}", 13, GREY_TEXT_COLOUR, "ra")


def with_boxes(picture: Image.Image, words: Sequence[Word]) -> Image.Image:
    """A copy of the picture with a box for each word that is an object."""
    out = picture.copy()
    for word in words:
        if word.box is not None:
            draw_box(out, word.box, SKY, 2)
    return out


def draw_card(sheet: Image.Image, x: int, y: int, picture: Image.Image, word: Word, tokens: Sequence[Token]) -> None:
    """Draws the card of a word.

    It has the map, the probability, the nats that the picture adds, and the alternatives to the word's least certain token.
    """
    width = picture.width
    heat = heat_map(picture, word.roll_out if word.gradient is None else word.gradient)
    sheet.paste(with_boxes(heat, [word]), (x, y))
    below = y + picture.height + 8
    chance = f"{math.exp(word.logprob / len(tokens)):.0%}"  # geometric mean over the tokens
    lettering().write(sheet, (x, below), fitted(word.text, 19, width - 56), 19, TEXT_COLOUR)
    lettering().write(sheet, (x + width, below + 4), chance, 14, GREY_TEXT_COLOUR, "ra")
    effect, color = f"picture {signed(word.dependence, 1)} nats", GREEN if word.dependence >= MIN_DEPENDENCE else ORANGE
    lettering().write(sheet, (x, below + 27), effect, 13, color)
    least_certain = max(tokens, key=lambda token: token.entropy)
    draw_bars(sheet, x, below + 50, width, by_text(least_certain.alternatives)[:BARS])


def draw_head(sheet: Image.Image, picture: Image.Image, explanation: Explanation) -> None:
    """Draws the picture, the prompt, the answer, and whether the answer depends on the picture."""
    draw, x, y = ImageDraw.Draw(sheet), MARGIN + picture.width + 28, MARGIN
    sheet.paste(with_boxes(picture, explanation.words), (MARGIN, MARGIN))
    width = sheet.width - x - MARGIN
    lettering().write(sheet, (x, y), fitted(explanation.prompt, 17, width), 17, GREY_TEXT_COLOUR)
    y += 32
    answer = LOCATION_OR_CODE.sub("", explanation.text)  # locations are drawn as boxes
    for line in wrapped(answer, 27, width, 3) or ["(no words)"]:
        lettering().write(sheet, (x, y), line, 27, TEXT_COLOUR)
        y += 36
    y += 12
    verdict = "The answer depends on the picture" if explanation.warning is None else "The answer hardly depends on the picture"
    color = GREEN if explanation.warning is None else ORANGE
    draw.rounded_rectangle((x, y, x + lettering().width(verdict, 17) + 28, y + 34), 6, color)
    lettering().write(sheet, (x + 14, y + 17), verdict, 17, "white", "lm")
    y += 48
    count = len(explanation.tokens)
    kind = "depends on (gradient)" if any(word.gradient is not None for word in explanation.words) else "looked at (attention)"
    for line in (
        f"The answer is {as_ratio(explanation.dependence)} as likely as with a flat picture of the same mean colour:",
        f"{signed(explanation.dependence, 1)} nats, {signed(explanation.dependence / count, 2)} per token "
        f"({counted(count, 'token')}).",
        f"Maps: what each word {kind}; the darkest red is the maximum. Bars: the alternatives.",
        *explanation.notes,
    ):
        lettering().write(sheet, (x, y), fitted(line, 15, width), 15, GREY_TEXT_COLOUR)
        y += 22


def draw_explanation(source: object, explanation: Explanation) -> Image.Image:
    """The explanation as one sheet: the picture, the prompt and the answer at the top, then a card for each word.

    Args:
        source: the picture that the prompt is about; anything that load_image takes.
    Raises: ImageError if the picture cannot be read.
    """
    picture = load_image(source)
    card_width = (WIDTH - 2 * MARGIN - 2 * PAD * CARDS - (CARDS - 1) * GAP) // CARDS
    ratio = min(max(picture.height / picture.width, 0.4), 2.0)  # a very wide or very high picture is drawn distorted
    small = picture.resize((card_width, round(card_width * ratio)), Image.Resampling.LANCZOS)
    head_height = 300
    large = picture.resize((round(head_height / ratio), head_height), Image.Resampling.LANCZOS)
    card_height = small.height + 2 * PAD + 58 + 21 * BARS
    rows = -(-len(explanation.words) // CARDS)
    sheet = Image.new("RGB", (WIDTH, 2 * MARGIN + head_height + rows * (card_height + GAP)), BACKGROUND)
    draw_head(sheet, large, explanation)
    for number, word in enumerate(explanation.words):
        row, column = divmod(number, CARDS)
        x = MARGIN + column * (card_width + 2 * PAD + GAP)
        y = MARGIN + head_height + GAP + row * (card_height + GAP)
        ImageDraw.Draw(sheet).rounded_rectangle((x, y, x + card_width + 2 * PAD, y + card_height), 10, "white", LINE_COLOUR)
        draw_card(sheet, x + PAD, y + PAD, small, word, explanation.tokens[word.tokens.start : word.tokens.stop])
    return sheet
