"""Parses answers such as `<loc0102><loc0204>...<seg007>... cat ; ...` into labels, boxes, mask codes and scores; writes them too.

`parse_ids` parses the token ids of an answer, in which a location is a single token and cannot be confused with ordinary text.
`parse_text` parses the text if there are no ids. The grammar of an answer is

    answer := object (";" object)*        object := location{4} (code{16})? label       location := y_min, x_min, y_max, x_max

but models stop too early, repeat themselves and swap the corners of a box. None of this raises an error: faults are repaired if
possible, otherwise the object is left out, and `problems` lists the faults by the names below. An empty answer has the status
"nothing" (no object was found); an answer with words but without a box has the status "unparsable".

Only locations are y first, as in the tokens; everything else is x first. A location as a fraction of the picture's side is
location / 1023, as in the official code (big_vision, pp/proj/paligemma/segmentation.py). Imports neither torch nor numpy. Checked
in tests/objects/test_outputs.py.
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

SWAPPED = "swapped"  # y_min > y_max or x_min > x_max: exchanged
NO_AREA = "no area"  # two equal sides: kept, but the box covers no pixel
NO_LABEL = "no label"  # usual for refcoco checkpoints; from others, it means that the answer stopped too early
NO_BOX = "no box"  # a label or mask codes without locations before them
CUT_BOX = "cut box"  # fewer than four locations: the object is left out
CUT_MASK = "cut mask"  # fewer than sixteen mask codes: the box is kept, the codes are dropped
LONG_MASK = "long mask"  # more than sixteen mask codes: the first sixteen are kept
REPEATED = "repeated"  # same label and box as an earlier object: left out
PROBLEMS = (SWAPPED, NO_AREA, NO_LABEL, NO_BOX, CUT_BOX, CUT_MASK, LONG_MASK, REPEATED)


def sort_corners(locations: Sequence[float]) -> tuple[float, float, float, float]:
    """The four values y x y x, with the smaller y and the smaller x first."""
    y, x, y_end, x_end = locations
    return min(y, y_end), min(x, x_end), max(y, y_end), max(x, x_end)


@dataclass(frozen=True)
class NormalizedBox:
    """A rectangle in fractions, 0 to 1, of the picture's width (x) and height (y)."""

    x_min: float
    y_min: float
    x_max: float
    y_max: float

    @classmethod
    def from_locations(cls, locations: Sequence[float], denominator: float = NUM_LOCATIONS - 1) -> "NormalizedBox":
        """The box of four locations: y x y x, sorted or not. The denominator 1024 is for comparison with code that uses it."""
        y_min, x_min, y_max, x_max = (value / denominator for value in sort_corners(locations))
        return cls(x_min, y_min, x_max, y_max)

    def to_locations(self) -> tuple[int, int, int, int]:
        """The nearest locations, 0 to 1023, in the order of the tokens: y x y x."""
        last = NUM_LOCATIONS - 1
        sides = (self.y_min, self.x_min, self.y_max, self.x_max)
        y_min, x_min, y_max, x_max = (min(max(round(value * last), 0), last) for value in sides)
        return y_min, x_min, y_max, x_max

    def xyxy(self, width: float, height: float) -> tuple[float, float, float, float]:
        """x_min, y_min, x_max, y_max in pixels of a picture of this size."""
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
        locations: the numbers of the four location tokens, 0 to 1023, y x y x, in the generated order (not sorted).
        codes: the sixteen mask codes, 0 to 127.
        score: probability 0 to 1, computed from the log-probabilities of the object's tokens by `object_score`.
        expected: a box that is more precise than the locations: each coordinate is the mean of the locations near the generated
            one, weighted by their probabilities.
        spread: standard deviation of each coordinate, x y x y, in fractions of the picture's width and height.
        problems: words of PROBLEMS.
        mask: bool[H, W] of the whole picture, if the codes were decoded.
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
        objects: in the order of the answer.
        problems: words of PROBLEMS for all objects, in the order of the answer, also for objects that were left out.
        status: "objects"; "nothing" for an empty answer; "unparsable" for words without a single complete box.
        text: the answer.
    """

    objects: list[ParsedObject]
    problems: list[str]
    status: str
    text: str


# Parsing


@dataclass(frozen=True)
class Lexeme:
    """A location, a mask code or some text (exactly one of the three), with the indices of its tokens in the answer."""

    tokens: tuple[int, ...]
    location: int | None = None
    code: int | None = None
    text: str | None = None


@dataclass
class PartialObject:
    """An object while it is parsed: its values, and the indices of the tokens of its locations and of its label."""

    locations: list[int] = field(default_factory=list)
    location_tokens: list[int] = field(default_factory=list)
    codes: list[int] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    label_tokens: list[int] = field(default_factory=list)
    has_label: bool = False  # stored: computing `label` for each lexeme would take quadratic time

    @property
    def label(self) -> str:
        return "".join(self.texts).strip()

    def has_begun(self) -> bool:
        return bool(self.locations or self.codes or self.has_label)

    def accepts(self, lexeme: Lexeme) -> bool:
        """Whether the lexeme can belong to this object; if not, it begins the next one."""
        if lexeme.location is not None:
            return not (self.has_label or self.codes or len(self.locations) == LOCATIONS_PER_BOX)
        return lexeme.code is None or not self.has_label

    def add(self, lexeme: Lexeme) -> None:
        if lexeme.location is not None:
            self.locations.append(lexeme.location)
            self.location_tokens += lexeme.tokens
        elif lexeme.code is not None:
            self.codes.append(lexeme.code)
        elif lexeme.text is not None:
            self.texts.append(lexeme.text)
            if lexeme.text.strip():
                self.has_label = True
                self.label_tokens += lexeme.tokens


def group_objects(lexemes: Iterable[Lexeme]) -> Iterator[PartialObject]:
    """Groups lexemes into objects. A new object begins after a separator and at a lexeme that the current one cannot accept."""
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
    """`expected` and `spread` of an object from (mean, standard deviation) of its four locations, y x y x.

    Returns (None, None) if the moments of any location are unknown.
    """
    known = [pair for pair in moments if pair is not None]
    if len(known) < LOCATIONS_PER_BOX:
        return None, None
    (y_min, y_max), (x_min, x_max) = sorted(known[::2]), sorted(known[1::2])
    box = NormalizedBox.from_locations([y_min[0], x_min[0], y_max[0], x_max[0]], denominator)
    left, top, right, bottom = (deviation / denominator for _, deviation in (x_min, y_min, x_max, y_max))
    return box, (left, top, right, bottom)


def object_score(
    partial: PartialObject,
    logprobs: Sequence[float],
    expected: NormalizedBox | None,
    spread: tuple[float, float, float, float] | None,
) -> float:
    """The model's confidence in an object: p(label) * exp(-mean of (spread / side)).

    p(label) is the product over the label's tokens. A spread is the standard deviation of one coordinate, and the side is the
    width or height of the expected box: the more certain the coordinates are, relative to the size of the box, the higher the
    score. Without spreads the second factor is the geometric mean of the probabilities of the four locations.

    Chosen by average precision (IoU 0.50 to 0.95, expected boxes) on 400 demo scenes of seed 500, and on 300 of seed 501 that
    include questions for absent shapes:   no score .685 / .510,   locations .712 / .522,   locations x label .713 / .581,
    label .701 / .646,   spreads .734 / .580,   this formula .734 / .642. Three more factors were tried and improved nothing: the
    smallest probability of a location, the probability of the separator before the object, that of starting a box at all.
    """
    label = sum(logprobs[token] for token in partial.label_tokens)
    if expected is None or spread is None:
        return math.exp(label + sum(logprobs[token] for token in partial.location_tokens) / LOCATIONS_PER_BOX)
    smallest = 1 / NUM_LOCATIONS  # avoids a division by zero for a box without area
    sides = 2 * (max(expected.x_max - expected.x_min, smallest), max(expected.y_max - expected.y_min, smallest))
    left, top, right, bottom = (deviation / side for deviation, side in zip(spread, sides, strict=True))
    return math.exp(label - (top + left + bottom + right) / LOCATIONS_PER_BOX)


def complete(partial: PartialObject, denominator: int) -> tuple[ParsedObject | None, list[str]]:
    """The object, or None if too little of it was generated; and its problems."""
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
    """The objects of an answer that was split into lexemes; the arguments are those of parse_ids."""
    objects: list[ParsedObject] = []
    problems: list[str] = []
    seen = set()
    for partial in group_objects(lexemes):
        found, its_problems = complete(partial, denominator)
        if found is not None and (found.label, found.box) in seen:
            found, its_problems = None, [REPEATED]
        problems += its_problems
        if found is None:
            continue
        seen.add((found.label, found.box))
        if found.box is not None:
            of_locations = [] if moments is None else [moments[token] for token in partial.location_tokens]
            expected, spread = expected_box(of_locations, denominator)
            score = None if logprobs is None else object_score(partial, logprobs, expected, spread)
            found = replace(found, score=score, expected=expected, spread=spread)
        objects.append(found)
    if any(found.box is not None for found in objects):
        return ParsedAnswer(objects, problems, "objects", text)
    return ParsedAnswer([], problems, "unparsable" if text.strip() else "nothing", text)


def split_ids(ids: list[int], processor: "PromptTokenizer") -> Iterator[Lexeme]:
    """One lexeme per token. The byte tokens of one character form one lexeme; control tokens (<bos>, <pad>, ...) form none."""
    stream = processor.stream()
    pending: tuple[int, ...] = ()
    for token, number in enumerate([*ids, processor.eos_token_id]):
        is_text = not (number in processor.location_ids or number in processor.code_ids or number in processor.control_ids)
        text = stream.put(number) if is_text else stream.end()
        pending += (token,) if is_text else ()
        if text:
            yield Lexeme(pending, text=text)
            pending = ()
        if number in processor.location_ids:
            yield Lexeme((token,), location=number - processor.location_ids.start)
        elif number in processor.code_ids:
            yield Lexeme((token,), code=number - processor.code_ids.start)


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
        logprobs: float[L], one per token; with them the objects get scores.
        moments: mean and standard deviation, in locations, for each token that is a location, None for the others; as in
            generation.Answer.
        denominator: 1023, or 1024 for comparison with code that divides by it.
    Raises: ValueError if logprobs or moments have another length than ids.
    """
    ids = ids.tolist() if hasattr(ids, "tolist") else list(ids)
    if logprobs is not None and hasattr(logprobs, "tolist"):
        logprobs = logprobs.tolist()
    for name, values in (("logprobs", logprobs), ("moments", moments)):
        if values is not None and len(values) != len(ids):
            raise ValueError(f"{len(values)} {name} came for {len(ids)} ids. Pass one for each id.")
    if processor.eos_token_id in ids:
        ids = ids[: ids.index(processor.eos_token_id)]
    return parse(split_ids(ids, processor), processor.decode(ids), denominator, logprobs, moments)


def split_text(text: str) -> Iterator[Lexeme]:
    """Locations, mask codes, and the text between them. <loc9999>, which no tokenizer knows, is text."""
    end = 0
    for token in LOCATION_OR_CODE.finditer(text):
        location, code = (None if digits is None else int(digits) for digits in token.groups())
        if token.start() > end:
            yield Lexeme((), text=text[end : token.start()])
        yield Lexeme((), location, code)
        end = token.end()
    yield Lexeme((), text=text[end:])


def parse_text(text: str, denominator: int = NUM_LOCATIONS - 1) -> ParsedAnswer:
    """The objects in the text of an answer with its <loc> and <seg>. They have no scores, because scores need the tokens."""
    return parse(split_text(text), text, denominator)


# Writing


def to_suffix(objects: Iterable[ParsedObject]) -> str:
    """The answer that names these objects, in the form used for training; parse_text and parse_ids parse it back.

    Locations are written sorted, even if the model generated them in another order. An object without a box is written as its
    label only. Raises: DatasetError for a label that would be parsed as something else, because it has a ";", a newline or <loc>.
    """
    texts = []
    for found in objects:
        if END_OF_OBJECT.search(found.label) or LOCATION_OR_CODE.search(found.label):
            raise DatasetError(f"the label {found.label!r} holds a separator or a location. Use words without ; and <loc>.")
        locations = () if found.box is None else sort_corners(found.locations) if found.locations else found.box.to_locations()
        tokens = [LOCATION_TOKENS[int(value)] for value in locations] + [CODE_TOKENS[code] for code in found.codes or ()]
        texts.append(f"{''.join(tokens)} {found.label.strip()}".strip())
    return " ; ".join(texts)


def as_json(found: ParsedObject, width: int, height: int) -> dict[str, Any]:
    """The object as the programs write it, for a picture of this size; unknown values are left out.

    Returns: label, box [x_min, y_min, x_max, y_max] in pixels, box_normalized (the same, 0 to 1), score, expected_box (pixels),
        spread (pixels, x y x y), codes, mask (COCO's run lengths), problems.
    """
    row: dict[str, Any] = {"label": found.label}
    if found.box is not None:
        row["box"] = [round(value, 2) for value in found.box.xyxy(width, height)]
        row["box_normalized"] = [round(value, 5) for value in found.box.xyxy(1, 1)]
    if found.score is not None:
        row["score"] = round(found.score, 5)
    if found.expected is not None:
        row["expected_box"] = [round(value, 2) for value in found.expected.xyxy(width, height)]
    if found.spread is not None:
        row["spread"] = [round(value * side, 2) for value, side in zip(found.spread, 2 * (width, height), strict=True)]
    if found.codes is not None:
        row["codes"] = list(found.codes)
    if found.mask is not None:
        from paligemma.objects.masks import to_rle  # imports numpy, which is needed only for masks

        row["mask"] = to_rle(found.mask)
    return row | {"problems": list(found.problems)}
