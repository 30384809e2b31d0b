"""Parses answers such as `<loc0102><loc0204>...<seg007>... cat ; ...` into objects, and writes such answers from objects.

An object has a label, a box, mask codes and a score. `parse_ids` parses the token ids of an answer. It cannot confuse a
location with ordinary text, because a location is a single id. `parse_text` parses the text if there are no ids. The grammar of
an answer is

    answer := object (";" object)*        object := location{4} (code{16})? label       location := y_min, x_min, y_max, x_max

but models stop too early, repeat themselves and swap the corners of a box. Such faults raise no error: they are repaired if
possible, otherwise the object is left out, and `problems` lists the faults by the names below. An empty answer has the status
"nothing" (no object was found). An answer with words but without a box has the status "unparsable".

Locations have y before x, as in the tokens; all other coordinates have x before y. A location divided by 1023 is a fraction of
the picture's height or width, as in the official code (big_vision, pp/proj/paligemma/segmentation.py). This file imports neither
torch nor numpy. Checked in tests/objects/test_outputs.py.
"""

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from paligemma.errors import DatasetError
from paligemma.vocabulary import CODE_TOKENS, CODES_PER_MASK, LOCATION_OR_CODE, LOCATION_TOKENS, LOCATIONS_PER_BOX, NUM_LOCATIONS

if TYPE_CHECKING:
    import numpy as np

    from paligemma.tokenization import PromptTokenizer

END_OF_OBJECT = re.compile("[;\n]")

SWAPPED = "swapped"  # y_min > y_max or x_min > x_max: the two values are exchanged
NO_AREA = "no area"  # y_min = y_max or x_min = x_max: the object is kept, although its box covers no pixel
NO_LABEL = "no label"  # normal for refcoco checkpoints; with other checkpoints, the answer stopped too early
NO_BOX = "no box"  # a label or mask codes without locations before them
CUT_BOX = "cut box"  # fewer than four locations: the object is left out
CUT_MASK = "cut mask"  # fewer than sixteen mask codes: the box is kept, the codes are dropped
LONG_MASK = "long mask"  # more than sixteen mask codes: the first sixteen are kept
REPEATED = "repeated"  # same label and box as an earlier object: the object is left out
PROBLEMS = (SWAPPED, NO_AREA, NO_LABEL, NO_BOX, CUT_BOX, CUT_MASK, LONG_MASK, REPEATED)


def sort_corners(locations: Sequence[float]) -> tuple[float, float, float, float]:
    """The four values y x y x, with the smaller y and the smaller x first."""
    y, x, y_end, x_end = locations
    return min(y, y_end), min(x, x_end), max(y, y_end), max(x, x_end)


@dataclass(frozen=True)
class NormalizedBox:
    """A rectangle. Its coordinates are fractions, 0 to 1, of the picture's width (x) and height (y)."""

    x_min: float
    y_min: float
    x_max: float
    y_max: float

    @classmethod
    def from_locations(cls, locations: Sequence[float], denominator: float = NUM_LOCATIONS - 1) -> "NormalizedBox":
        """The box of four locations, y x y x, sorted or not. Pass denominator 1024 to compare with code that divides by 1024."""
        y_min, x_min, y_max, x_max = (value / denominator for value in sort_corners(locations))
        return cls(x_min, y_min, x_max, y_max)

    def to_locations(self) -> tuple[int, int, int, int]:
        """The nearest locations, 0 to 1023, in the order of the tokens: y x y x."""
        last = NUM_LOCATIONS - 1
        sides = (self.y_min, self.x_min, self.y_max, self.x_max)
        y_min, x_min, y_max, x_max = (min(max(round(value * last), 0), last) for value in sides)
        return y_min, x_min, y_max, x_max

    def xyxy(self, width: float, height: float) -> tuple[float, float, float, float]:
        """x_min, y_min, x_max, y_max in pixels, for a picture of this size."""
        return self.x_min * width, self.y_min * height, self.x_max * width, self.y_max * height

    @property
    def area(self) -> float:
        """The share of the picture that the box covers."""
        return max(0.0, self.y_max - self.y_min) * max(0.0, self.x_max - self.x_min)

    def iou(self, other: "NormalizedBox") -> float:
        """Intersection over union; 0 if both boxes have no area."""
        height = min(self.y_max, other.y_max) - max(self.y_min, other.y_min)
        width = min(self.x_max, other.x_max) - max(self.x_min, other.x_min)
        intersection = max(0.0, height) * max(0.0, width)
        union = self.area + other.area - intersection
        return intersection / union if union > 0 else 0.0


@dataclass(frozen=True)
class ParsedObject:
    """One object of an answer.

    Args:
        label: the whole label; "" if the answer has none.
        box: None for a label without a box.
        locations: the numbers of the four location tokens, 0 to 1023, in the order of the answer: y x y x, not sorted.
        codes: the sixteen mask codes, 0 to 127.
        score: confidence from 0 to 1, computed by `object_score`.
        expected: a box that is more precise than the locations: each coordinate is the mean of the locations near the generated
            location, weighted by their probabilities.
        spread: the standard deviation of each coordinate, x y x y, in fractions of the picture's width and height.
        problems: names from PROBLEMS.
        mask: bool[H, W] for the whole picture, if the codes were decoded.
    """

    label: str
    box: NormalizedBox | None
    locations: tuple[int, int, int, int] | None = None
    codes: tuple[int, ...] | None = None
    score: float | None = None
    expected: NormalizedBox | None = None
    spread: tuple[float, float, float, float] | None = None
    problems: tuple[str, ...] = ()
    mask: "np.ndarray | None" = field(default=None, compare=False)


@dataclass(frozen=True)
class ParsedAnswer:
    """The objects of an answer.

    Args:
        objects: the objects in the order of the answer.
        problems: names from PROBLEMS for all objects in the order of the answer, including the objects that were left out.
        status: "objects" = there is at least one box; "nothing" = the answer is empty; "unparsable" = it has words, but no box.
        text: the text of the answer.
    """

    objects: list[ParsedObject]
    problems: list[str]
    status: str
    text: str


# Parsing


@dataclass(frozen=True)
class Lexeme:
    """A location, a mask code or some text; `indices` are the positions of its tokens in the answer."""

    indices: tuple[int, ...]
    # Exactly one of these three fields is given.
    location: int | None = None
    code: int | None = None
    text: str | None = None


@dataclass
class PartialObject:
    """An object while it is parsed: the values found so far, and the indices of its tokens in the answer."""

    locations: list[int] = field(default_factory=list)
    location_indices: list[int] = field(default_factory=list)
    codes: list[int] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    label_indices: list[int] = field(default_factory=list)
    has_label: bool = False  # stored, because computing `label` for each lexeme would take quadratic time

    @property
    def label(self) -> str:
        return "".join(self.texts).strip()

    def has_begun(self) -> bool:
        return bool(self.locations or self.codes or self.has_label)

    def accepts(self, lexeme: Lexeme) -> bool:
        """Whether the lexeme can belong to this object. If not, the lexeme begins the next object."""
        if lexeme.location is not None:
            return not (self.has_label or self.codes or len(self.locations) == LOCATIONS_PER_BOX)
        return lexeme.code is None or not self.has_label

    def add(self, lexeme: Lexeme) -> None:
        if lexeme.location is not None:
            self.locations.append(lexeme.location)
            self.location_indices += lexeme.indices
        elif lexeme.code is not None:
            self.codes.append(lexeme.code)
        elif lexeme.text is not None:
            self.texts.append(lexeme.text)
            if lexeme.text.strip():
                self.has_label = True
                self.label_indices += lexeme.indices


def group_objects(lexemes: Iterable[Lexeme]) -> Iterator[PartialObject]:
    """Groups lexemes into objects. An object begins after a separator, and at a lexeme that the current object cannot accept."""
    current = PartialObject()
    for lexeme in lexemes:
        if not current.accepts(lexeme):
            yield current
            current = PartialObject()
        first, *others = END_OF_OBJECT.split(lexeme.text) if lexeme.text else [lexeme.text]
        current.add(replace(lexeme, text=first) if others else lexeme)
        for text in others:
            if current.has_begun():
                yield current
            current = PartialObject()
            current.add(replace(lexeme, text=text))
    if current.has_begun():
        yield current


def expected_box(
    moments: Sequence[tuple[float, float] | None], denominator: int
) -> tuple[NormalizedBox, tuple[float, float, float, float]] | tuple[None, None]:
    """`expected` and `spread` of an object, as in ParsedObject; (None, None) if the moments of a location are unknown.

    Args:
        moments: (mean, standard deviation) of the object's four locations, y x y x.
    """
    known = [pair for pair in moments if pair is not None]
    if len(known) < LOCATIONS_PER_BOX:
        return None, None
    (top, bottom), (left, right) = sorted(known[::2]), sorted(known[1::2])  # each is a pair (mean, standard deviation)
    box = NormalizedBox.from_locations([top[0], left[0], bottom[0], right[0]], denominator)
    return box, (left[1] / denominator, top[1] / denominator, right[1] / denominator, bottom[1] / denominator)


def object_score(
    partial: PartialObject,
    logprobs: Sequence[float],
    expected: NormalizedBox | None,
    spread: tuple[float, float, float, float] | None,
) -> float:
    """The model's confidence in an object: p(label) * exp(-mean(spread / side)).

    p(label) is the product of the probabilities of the label's tokens. The mean is over the four coordinates: spread is the
    standard deviation of a coordinate, and side is the width or height of the expected box. If spread is None, the second factor
    is the geometric mean of the probabilities of the four locations.

    The formula was chosen by the average precision of the `expected` boxes (IoU 0.50 to 0.95) on demo scenes. In this table,
    `spreads` is exp(-mean(spread / side)), `label` is p(label), and `locations` is the geometric mean of the locations'
    probabilities:

                                             no score  locations  locations * label  label  spreads  this formula
        400 scenes of seed 500                   .685       .712               .713   .701     .734          .734
        300 scenes of seed 501, which include
        questions for absent shapes              .510       .522               .581   .646     .580          .642

    Three more factors did not improve the precision: the smallest probability of a location, the probability of the separator
    before the object, and the probability that a box begins at all.
    """
    label_logprob = sum(logprobs[i] for i in partial.label_indices)
    if expected is None or spread is None:
        return math.exp(label_logprob + sum(logprobs[i] for i in partial.location_indices) / LOCATIONS_PER_BOX)
    smallest = 1 / NUM_LOCATIONS  # avoids a division by zero for a box without area
    sides = 2 * (max(expected.x_max - expected.x_min, smallest), max(expected.y_max - expected.y_min, smallest))
    x_min_ratio, y_min_ratio, x_max_ratio, y_max_ratio = (value / side for value, side in zip(spread, sides, strict=True))
    return math.exp(label_logprob - (y_min_ratio + x_min_ratio + y_max_ratio + x_max_ratio) / LOCATIONS_PER_BOX)


def finish(partial: PartialObject, denominator: int) -> tuple[ParsedObject | None, list[str]]:
    """(object, problems). The object is None if its box is incomplete, or if it has neither a box nor a label."""
    problems = []
    label = partial.label
    if not partial.locations:
        return ParsedObject(label, None, problems=(NO_BOX,)) if label else None, [NO_BOX]
    if len(partial.locations) < LOCATIONS_PER_BOX:
        return None, [CUT_BOX]
    y, x, y_end, x_end = partial.locations
    if y > y_end or x > x_end:
        problems.append(SWAPPED)
    if y == y_end or x == x_end:
        problems.append(NO_AREA)
    if partial.codes and len(partial.codes) != CODES_PER_MASK:
        problems.append(CUT_MASK if len(partial.codes) < CODES_PER_MASK else LONG_MASK)
    if not label:
        problems.append(NO_LABEL)
    codes = tuple(partial.codes[:CODES_PER_MASK]) if len(partial.codes) >= CODES_PER_MASK else None
    box = NormalizedBox.from_locations(partial.locations, denominator)
    return ParsedObject(label, box, (y, x, y_end, x_end), codes, problems=tuple(problems)), problems


def parse(
    lexemes: Iterable[Lexeme],
    text: str,
    denominator: int,
    logprobs: Sequence[float] | None = None,
    moments: Sequence[tuple[float, float] | None] | None = None,
) -> ParsedAnswer:
    """The objects of an answer that has been split into lexemes. The other arguments are as in parse_ids."""
    objects: list[ParsedObject] = []
    problems: list[str] = []
    seen = set()
    for partial in group_objects(lexemes):
        parsed, new_problems = finish(partial, denominator)
        if parsed is not None and (parsed.label, parsed.box) in seen:
            parsed, new_problems = None, [REPEATED]
        problems += new_problems
        if parsed is None:
            continue
        seen.add((parsed.label, parsed.box))
        if parsed.box is not None:
            location_moments = [] if moments is None else [moments[i] for i in partial.location_indices]
            expected, spread = expected_box(location_moments, denominator)
            score = None if logprobs is None else object_score(partial, logprobs, expected, spread)
            parsed = replace(parsed, score=score, expected=expected, spread=spread)
        objects.append(parsed)
    if any(parsed.box is not None for parsed in objects):
        return ParsedAnswer(objects, problems, "objects", text)
    return ParsedAnswer([], problems, "unparsable" if text.strip() else "nothing", text)


def split_ids(ids: list[int], processor: "PromptTokenizer") -> Iterator[Lexeme]:
    """One lexeme per token, with two exceptions: the byte tokens of a character form one lexeme; control tokens are left out."""
    stream = processor.stream()
    pending: tuple[int, ...] = ()
    # eos is appended, so that stream.end() also returns the bytes that are held back at the end of the answer.
    for index, token in enumerate([*ids, processor.eos_token_id]):
        is_text = not (token in processor.location_ids or token in processor.code_ids or token in processor.control_ids)
        text = stream.put(token) if is_text else stream.end()
        pending += (index,) if is_text else ()
        if text:
            yield Lexeme(pending, text=text)
            pending = ()
        if token in processor.location_ids:
            yield Lexeme((index,), location=token - processor.location_ids.start)
        elif token in processor.code_ids:
            yield Lexeme((index,), code=token - processor.code_ids.start)


def parse_ids(
    ids: Iterable[int],
    processor: "PromptTokenizer",
    logprobs: Sequence[float] | None = None,
    moments: Sequence[tuple[float, float] | None] | None = None,
    denominator: int = NUM_LOCATIONS - 1,
) -> ParsedAnswer:
    """The objects in the token ids of an answer. Everything after the first eos is ignored.

    Args:
        ids: a list, or int64[L].
        processor: a PaliGemmaProcessor.
        logprobs: float[L], one per token. Without logprobs, the objects have no scores.
        moments: as in generation.Answer: for each token that is a location, (mean, standard deviation) in units of locations;
            None for each other token.
        denominator: 1023, or 1024 to compare with code that divides by 1024.
    Raises: ValueError if logprobs or moments have another length than ids.
    """
    ids = ids.tolist() if hasattr(ids, "tolist") else list(ids)
    if logprobs is not None and hasattr(logprobs, "tolist"):
        logprobs = logprobs.tolist()
    for name, values in (("logprobs", logprobs), ("moments", moments)):
        if values is not None and len(values) != len(ids):
            raise ValueError(f"{len(values)} {name} were given for {len(ids)} ids. Pass one per id.")
    if processor.eos_token_id in ids:
        ids = ids[: ids.index(processor.eos_token_id)]
    return parse(split_ids(ids, processor), processor.decode(ids), denominator, logprobs, moments)


def split_text(text: str) -> Iterator[Lexeme]:
    """Lexemes for locations, mask codes and the text between them. <loc9999> is text, because it is not a token."""
    end = 0
    for token in LOCATION_OR_CODE.finditer(text):
        location, code = (None if digits is None else int(digits) for digits in token.groups())
        if token.start() > end:
            yield Lexeme((), text=text[end : token.start()])
        yield Lexeme((), location, code)
        end = token.end()
    yield Lexeme((), text=text[end:])


def parse_text(text: str, denominator: int = NUM_LOCATIONS - 1) -> ParsedAnswer:
    """The objects in the text of an answer. They have no scores, because scores are computed from tokens."""
    return parse(split_text(text), text, denominator)


# Writing


def to_suffix(objects: Iterable[ParsedObject]) -> str:
    """The answer that lists these objects, as in the training data. parse_text and parse_ids return the objects again.

    Locations are written in sorted order, even if the model generated them in another order. If an object has no box, only its
    label is written. Raises: DatasetError for a label with ";", a newline or <loc>, which would be parsed as something else.
    """
    texts = []
    for item in objects:
        if END_OF_OBJECT.search(item.label) or LOCATION_OR_CODE.search(item.label):
            raise DatasetError(f"the label {item.label!r} contains a separator or a location. Use words without ; and <loc>.")
        locations = () if item.box is None else sort_corners(item.locations) if item.locations else item.box.to_locations()
        tokens = [LOCATION_TOKENS[int(value)] for value in locations] + [CODE_TOKENS[code] for code in item.codes or ()]
        texts.append(f"{''.join(tokens)} {item.label.strip()}".strip())
    return " ; ".join(texts)


def as_json(item: ParsedObject, width: int, height: int) -> dict[str, Any]:
    """The object as a dict for JSON, as `inference` and `annotate` write it. Values that are None are left out.

    Args:
        width, height: size of the picture in pixels.
    Returns: label, box [x_min, y_min, x_max, y_max] in pixels, box_normalized (the same as fractions, 0 to 1), score,
        expected_box (in pixels), spread (in pixels, x y x y), codes, mask (COCO's run lengths), problems.
    """
    row: dict[str, Any] = {"label": item.label}
    if item.box is not None:
        row["box"] = [round(value, 2) for value in item.box.xyxy(width, height)]
        row["box_normalized"] = [round(value, 5) for value in item.box.xyxy(1, 1)]
    if item.score is not None:
        row["score"] = round(item.score, 5)
    if item.expected is not None:
        row["expected_box"] = [round(value, 2) for value in item.expected.xyxy(width, height)]
    if item.spread is not None:
        row["spread"] = [round(value * side, 2) for value, side in zip(item.spread, 2 * (width, height), strict=True)]
    if item.codes is not None:
        row["codes"] = list(item.codes)
    if item.mask is not None:
        from paligemma.objects.masks import to_rle  # imports numpy

        row["mask"] = to_rle(item.mask)
    return row | {"problems": list(item.problems)}
