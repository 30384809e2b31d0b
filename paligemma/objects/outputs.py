"""From `<loc0102><loc0204>...<seg007>... cat ; ...` to objects, and back: labels, boxes, codes of masks, scores.

An answer is read from its token ids (`read_ids`), where a location is a token of its own and no letter can be taken for one, or
from its text (`read_text`) where ids are gone. The grammar is

    answer := item (";" item)*        item := location{4} (code{16})? label       location := y_min, x_min, y_max, x_max

but models break off, repeat themselves and turn boxes around. Nothing of that raises: what can be mended is mended, the rest is
left out, and `problems` says which of the words below happened. "Nothing found" (an empty answer) is another status than
"unparsable" (words, but no box).

Coordinates are fractions of the picture's sides, y first as in the tokens; bin / 1023, as the official code divides
(big_vision, pp/proj/paligemma/segmentation.py). Imports neither torch nor numpy. Checked in tests/objects/test_outputs.py.
"""

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from paligemma.errors import DatasetError
from paligemma.vocabulary import CODE_TOKENS, CODES_PER_MASK, LOCATION_OR_CODE, LOCATION_TOKENS, LOCATIONS_PER_BOX, NUM_LOCATIONS

if TYPE_CHECKING:
    import numpy as np

    from paligemma.processing_paligemma import PaliGemmaProcessor

END_OF_ITEM = re.compile("[;\n]")

SWAPPED = "swapped"  # y_min > y_max or x_min > x_max, put in order
NO_AREA = "no area"  # two equal sides: kept, but it covers no pixel
NO_LABEL = "no label"  # as refcoco checkpoints answer, or broken off
NO_BOX = "no box"  # a label, or codes, with no location before them
CUT_BOX = "cut box"  # fewer than four locations: left out
CUT_MASK = "cut mask"  # fewer than sixteen codes: the box stays, the codes go
LONG_MASK = "long mask"  # more than sixteen codes: the first sixteen count
REPEATED = "repeated"  # label and box of an object before it: left out
PROBLEMS = (SWAPPED, NO_AREA, NO_LABEL, NO_BOX, CUT_BOX, CUT_MASK, LONG_MASK, REPEATED)


def in_order(sides: Sequence[float]) -> tuple[float, float, float, float]:
    """Four sides, y x y x, with the smaller of each two first."""
    y, x, y_end, x_end = sides
    return min(y, y_end), min(x, x_end), max(y, y_end), max(x, x_end)


@dataclass(frozen=True)
class Box:
    """A rectangle in fractions 0 to 1 of the picture's height (y) and width (x)."""

    y_min: float
    x_min: float
    y_max: float
    x_max: float

    @classmethod
    def from_bins(cls, bins: Sequence[float], denominator: int = NUM_LOCATIONS - 1) -> "Box":
        """The box of four locations, y x y x, put in order; the denominator 1024 is what some other readers divide by."""
        return cls(*(value / denominator for value in in_order(bins)))

    def bins(self) -> tuple[int, int, int, int]:
        """The nearest locations, y x y x, as training data has them."""
        last = NUM_LOCATIONS - 1
        return tuple(min(max(round(value * last), 0), last) for value in (self.y_min, self.x_min, self.y_max, self.x_max))

    def pixels(self, width: int, height: int) -> tuple[float, float, float, float]:
        """x_min, y_min, x_max, y_max in pixels of the original picture: the order that every other tool expects."""
        return self.x_min * width, self.y_min * height, self.x_max * width, self.y_max * height

    @property
    def area(self) -> float:
        return max(0.0, self.y_max - self.y_min) * max(0.0, self.x_max - self.x_min)

    def iou(self, other: "Box") -> float:
        """Area that two boxes share over area that they cover; 0 where neither covers any."""
        height = min(self.y_max, other.y_max) - max(self.y_min, other.y_min)
        width = min(self.x_max, other.x_max) - max(self.x_min, other.x_min)
        shared = max(0.0, height) * max(0.0, width)
        covered = self.area + other.area - shared
        return shared / covered if covered > 0 else 0.0


@dataclass(frozen=True)
class Found:
    """One object that the model named.

    Args:
        label: in full; "" where none was said.
        box: in order; None for a label that came without one.
        bins: the four locations as said, y x y x, perhaps not in order.
        codes: the sixteen codes of the mask.
        score: probability 0 to 1, from the log-probabilities of its tokens; see `score`.
        expected: the box of the means of the four distributions over the locations near those said: finer than a bin.
        spread: the standard deviations from them, y x y x, in fractions of the picture's sides.
        problems: words of PROBLEMS.
        mask: bool[H, W] of the whole picture, once it was decoded.
    """

    label: str
    box: Box | None
    bins: tuple[int, int, int, int] | None = None
    codes: tuple[int, ...] | None = None
    score: float | None = None
    expected: Box | None = None
    spread: tuple[float, float, float, float] | None = None
    problems: tuple[str, ...] = ()
    mask: "np.ndarray | None" = field(default=None, compare=False)


@dataclass(frozen=True)
class Reading:
    """What an answer says.

    Args:
        objects: in the order of the answer.
        problems: words of PROBLEMS in the order in which they happened, those of the objects among them.
        status: "objects"; "nothing" = an empty answer, so nothing was found; "unparsable" = something was said, but no whole box.
        text: the answer.
    """

    objects: list[Found]
    problems: list[str]
    status: str
    text: str


# Reading


@dataclass(frozen=True)
class Piece:
    """A location, a code, or some text (one of the three), and the tokens that said it, by their places in the answer."""

    tokens: tuple[int, ...]
    location: int | None = None
    code: int | None = None
    text: str | None = None


@dataclass
class Item:
    """An object while it is read: its values, and the tokens that said its locations and its label."""

    bins: list[int] = field(default_factory=list)
    bin_tokens: list[int] = field(default_factory=list)
    codes: list[int] = field(default_factory=list)
    words: list[str] = field(default_factory=list)
    word_tokens: list[int] = field(default_factory=list)
    has_label: bool = False  # kept, since putting the label together for every piece would take quadratic time

    @property
    def label(self) -> str:
        return "".join(self.words).strip()

    def is_begun(self) -> bool:
        return bool(self.bins or self.codes or self.has_label)

    def takes(self, piece: Piece) -> bool:
        """Whether the piece can still belong to this object, or must begin another."""
        if piece.location is not None:
            return not (self.has_label or self.codes or len(self.bins) == LOCATIONS_PER_BOX)
        return piece.code is None or not self.has_label

    def put(self, piece: Piece) -> None:
        if piece.location is not None:
            self.bins.append(piece.location)
            self.bin_tokens += piece.tokens
        elif piece.code is not None:
            self.codes.append(piece.code)
        else:
            self.words.append(piece.text)
            self.has_label = self.has_label or bool(piece.text.strip())
            self.word_tokens += piece.tokens if piece.text.strip() else ()


def items(pieces: Iterable[Piece]) -> Iterator[Item]:
    """The pieces, put together to objects; a separator, or a piece that cannot belong to an object any more, begins the next."""
    item = Item()
    for piece in pieces:
        if not item.takes(piece):
            yield item
            item = Item()
        first, *others = END_OF_ITEM.split(piece.text) if piece.text else [piece.text]
        item.put(replace(piece, text=first) if others else piece)
        for text in others:
            if item.is_begun():
                yield item
            item = Item()
            item.put(replace(piece, text=text))
    if item.is_begun():
        yield item


def expectation(moments: list[tuple[float, float] | None], denominator: int) -> tuple[Box, tuple] | tuple[None, None]:
    """`expected` and `spread` of an object from mean and deviation of its locations, y x y x, in order; None if one has none."""
    if None in moments:
        return None, None
    (y, y_end), (x, x_end) = sorted(moments[::2]), sorted(moments[1::2])
    means, deviations = zip(y, x, y_end, x_end, strict=True)
    return Box.from_bins(means, denominator), tuple(value / denominator for value in deviations)


def score(item: Item, logprobs: Sequence[float], expected: Box | None, spread: tuple | None) -> float:
    """How sure the model is of an object: p(label) x exp(-mean of spread / side).

    p(label) is the product over the label's tokens; a spread is the standard deviation of a coordinate, the side the height or
    width of the expected box: a box is as good as its corners are sharp for its size. Without spreads the second factor is the
    geometric mean of the probabilities of the four locations.

    Chosen by average precision (IoU 0.50 to 0.95, expected boxes) on 400 demo scenes of seed 500, and on 300 of seed 501 with
    questions for absent shapes among them:   no score .685 / .510,   locations .712 / .522,   locations x label .713 / .581,
    label .701 / .646,   spreads .734 / .580,   this .734 / .642. The smallest of the locations, the probability of the
    separator before the object, and of beginning a box at all, added nothing to that.
    """
    label = sum(logprobs[token] for token in item.word_tokens)
    if spread is None:
        return math.exp(label + sum(logprobs[token] for token in item.bin_tokens) / LOCATIONS_PER_BOX)
    one_bin = 1 / NUM_LOCATIONS  # no side is thinner
    sides = 2 * (max(expected.y_max - expected.y_min, one_bin), max(expected.x_max - expected.x_min, one_bin))
    return math.exp(label - sum(width / side for width, side in zip(spread, sides, strict=True)) / LOCATIONS_PER_BOX)


def finish(item: Item, denominator: int) -> tuple[Found | None, list[str]]:
    """The object, if enough of it was said, and its problems."""
    problems = []
    bins = tuple(item.bins)
    if 0 < len(bins) < LOCATIONS_PER_BOX:
        return None, [CUT_BOX]
    label = item.label
    if not bins:
        return Found(label, None, problems=(NO_BOX,)) if label else None, [NO_BOX]
    if bins[0] > bins[2] or bins[1] > bins[3]:
        problems.append(SWAPPED)
    if bins[0] == bins[2] or bins[1] == bins[3]:
        problems.append(NO_AREA)
    if item.codes and len(item.codes) != CODES_PER_MASK:
        problems.append(CUT_MASK if len(item.codes) < CODES_PER_MASK else LONG_MASK)
    if not label:
        problems.append(NO_LABEL)
    codes = tuple(item.codes[:CODES_PER_MASK]) if len(item.codes) >= CODES_PER_MASK else None
    return Found(label, Box.from_bins(bins, denominator), bins, codes, problems=tuple(problems)), problems


def read(
    pieces: Iterable[Piece],
    text: str,
    denominator: int,
    logprobs: Sequence[float] | None = None,
    places: Sequence[tuple[float, float] | None] | None = None,
) -> Reading:
    """The objects of an answer that was taken apart; arguments as read_ids."""
    objects, problems, seen = [], [], set()
    for item in items(pieces):
        found, wrong = finish(item, denominator)
        if found is not None and (found.label, found.box) in seen:
            found, wrong = None, [REPEATED]
        problems += wrong
        if found is None:
            continue
        seen.add((found.label, found.box))
        if found.box is not None:
            moments = [None] if places is None else [places[token] for token in item.bin_tokens]
            expected, spread = expectation(moments, denominator)
            value = None if logprobs is None else score(item, logprobs, expected, spread)
            found = replace(found, score=value, expected=expected, spread=spread)
        objects.append(found)
    if any(found.box is not None for found in objects):
        return Reading(objects, problems, "objects", text)
    return Reading([], problems, "unparsable" if text.strip() else "nothing", text)


def pieces_of_ids(ids: list[int], processor: "PaliGemmaProcessor") -> Iterator[Piece]:
    """One piece a token; the bytes that make up a letter are one. Control tokens say nothing."""
    stream, held = processor.stream(), ()
    for token, number in enumerate([*ids, processor.eos_token_id]):
        is_letter = not (number in processor.locations or number in processor.segments or number in processor.control_ids)
        text = stream.put(number) if is_letter else stream.end()
        held += (token,) if is_letter else ()
        if text:
            yield Piece(held, text=text)
            held = ()
        if number in processor.locations:
            yield Piece((token,), location=number - processor.locations.start)
        elif number in processor.segments:
            yield Piece((token,), code=number - processor.segments.start)


def read_ids(
    ids: Iterable[int],
    processor: "PaliGemmaProcessor",
    logprobs: Sequence[float] | None = None,
    places: Sequence[tuple[float, float] | None] | None = None,
    denominator: int = NUM_LOCATIONS - 1,
) -> Reading:
    """What the token ids of an answer say; whatever comes behind the first eos is not part of it.

    Args:
        ids: a list, or int64[L].
        processor: a PaliGemmaProcessor, for its ids and its letters.
        logprobs: float[L], of each token; gives the objects their scores.
        places: mean and standard deviation in bins of each token that is a location, as in generation.Answer; else None.
        denominator: 1023, or 1024 for comparison with readers that divide by it.
    Raises: ValueError if logprobs or places are not as many as ids.
    """
    ids = ids.tolist() if hasattr(ids, "tolist") else list(ids)
    logprobs = logprobs.tolist() if hasattr(logprobs, "tolist") else logprobs
    for name, values in (("logprobs", logprobs), ("places", places)):
        if values is not None and len(values) != len(ids):
            raise ValueError(f"{len(values)} {name} came for {len(ids)} ids. Pass one for each.")
    if processor.eos_token_id in ids:
        ids = ids[: ids.index(processor.eos_token_id)]
    return read(pieces_of_ids(ids, processor), processor.decode(ids), denominator, logprobs, places)


def pieces_of_text(text: str) -> Iterator[Piece]:
    """A location, a code, or what stands between. <loc9999>, which no tokenizer knows, is text."""
    end = 0
    for place in LOCATION_OR_CODE.finditer(text):
        location, code = (None if digits is None else int(digits) for digits in place.groups())
        if place.start() > end:
            yield Piece((), text=text[end : place.start()])
        yield Piece((), location, code)
        end = place.end()
    yield Piece((), text=text[end:])


def read_text(text: str, denominator: int = NUM_LOCATIONS - 1) -> Reading:
    """What the text of an answer says, with <loc> and <seg> kept; the tokens are gone, so there are no scores."""
    return read(pieces_of_text(text), text, denominator)


# Writing


def to_suffix(objects: Iterable[Found]) -> str:
    """The answer that names these objects, as a checkpoint is trained to give it; read_text and read_ids read it back.

    Locations come in order, also where a model had said them otherwise. Objects without a box become their label.
    Raises: DatasetError for a label that would be read as something else: a ";", a newline or a <loc> in it.
    """
    said = []
    for found in objects:
        if END_OF_ITEM.search(found.label) or LOCATION_OR_CODE.search(found.label):
            raise DatasetError(f"the label {found.label!r} holds a separator or a location. Use words without ; and <loc>.")
        bins = () if found.box is None else in_order(found.bins) if found.bins else found.box.bins()
        places = "".join([LOCATION_TOKENS[value] for value in bins] + [CODE_TOKENS[code] for code in found.codes or ()])
        said.append(f"{places} {found.label.strip()}".strip())
    return " ; ".join(said)


def as_json(found: Found, width: int, height: int) -> dict:
    """The object as the programs write it, for a picture of that many pixels; what is not known is left out.

    Returns: label, box [x_min, y_min, x_max, y_max] in pixels, box_normalized (the same, 0 to 1), score, expected_box (pixels),
        spread (pixels, x y x y), codes, mask (COCO's run lengths), problems.
    """
    row = {"label": found.label}
    if found.box is not None:
        row["box"] = [round(value, 2) for value in found.box.pixels(width, height)]
        row["box_normalized"] = [round(value, 5) for value in found.box.pixels(1, 1)]
    if found.score is not None:
        row["score"] = round(found.score, 5)
    if found.expected is not None:
        row["expected_box"] = [round(value, 2) for value in found.expected.pixels(width, height)]
    if found.spread is not None:
        row["spread"] = [round(value, 2) for value in Box(*found.spread).pixels(width, height)]
    if found.codes is not None:
        row["codes"] = list(found.codes)
    if found.mask is not None:
        from paligemma.objects.masks import to_rle  # numpy is imported only where there is a mask

        row["mask"] = to_rle(found.mask)
    return row | {"problems": list(found.problems)}
