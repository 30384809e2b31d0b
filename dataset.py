"""Examples to learn from: a JSONL with a picture, a prompt and its answer a line, read and checked before the first step.

    {"image": "a.jpg", "prefix": "detect cat", "suffix": "<loc0104><loc0320><loc0458><loc0674> cat"}

is the form of Roboflow's PaliGemma export and of big_vision, with pictures named relative to the JSONL's folder. A run that dies
of line 40,000 after two hours, or that learns from boxes in another order, is what this file is there to prevent: every line and
every picture is looked at, and all that is wrong is named at once. A fault stops the run unless the user says to skip such lines;
a doubt is said and changes nothing.

`Examples` makes batches of what is left. Checked in tests/test_dataset.py.
"""

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import compress, pairwise
from pathlib import Path

from PIL import Image

from augmentation import zoom
from errors import DatasetError, ImageError
from images import load_image, read_file, squeeze
from outputs import CUT_BOX, CUT_MASK, LONG_MASK, NO_AREA, SWAPPED, read_text

FIELDS = ("image", "prefix", "suffix")
MOST_LINE_BYTES = 1 << 20
LIKE_A_PLACE = re.compile(r"<(?:loc|seg)[^<>\s]{0,8}>")
A_PLACE = re.compile(r"<loc(?:0\d{3}|10[01]\d|102[0-3])>|<seg(?:0\d\d|1[01]\d|12[0-7])>")
WRONG_PLACES = {
    SWAPPED: "a box whose second corner lies before its first; the order is y_min, x_min, y_max, x_max",
    NO_AREA: "a box without area",
    CUT_BOX: "a box of fewer than four <loc> tokens",
    CUT_MASK: "a mask of fewer than sixteen <seg> tokens",
    LONG_MASK: "a mask of more than sixteen <seg> tokens",
}
OTHER_ORDER = 0.2  # share of boxes with exchanged corners from which the whole file is likely in another order
FEW_PREFIXES = 50  # a file with so few different prompts has a fixed form, from which the other split should not differ
READERS = 8
GOLDEN_RATIO = 0.5 + 5**0.5 / 2
ADVICE = re.compile(r"(?<=[^.])\. [^.]*\.$")  # the last sentence of an error about a picture: it names flags of other programs
CONTROL = re.compile(r"<(?:image|bos|eos|pad)>")


@dataclass(frozen=True)
class Example:
    """One line: a picture, what is asked about it, what is to be answered."""

    image: Path
    prefix: str
    suffix: str
    line: int


@dataclass(frozen=True)
class Fault:
    """What is wrong in a line; line 0 stands for the whole file."""

    file: Path
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.text}" if self.line else f"{self.file}: {self.text}"


@dataclass
class Split:
    """A JSONL that was read: what can be used of it, what cannot, what is doubtful.

    Args:
        hashes: of each picture's bytes, in the order of `examples`; filled by check_pictures.
    """

    file: Path
    examples: list[Example]
    faults: list[Fault]
    doubts: list[Fault]
    hashes: list[bytes]

    def drop(self, faults: Iterable[Fault]) -> None:
        """Takes faulty lines out of the examples and notes why."""
        faults = list(faults)
        bad = {fault.line for fault in faults}
        self.faults += faults
        is_kept = [example.line not in bad for example in self.examples]
        self.examples = list(compress(self.examples, is_kept))
        self.hashes = list(compress(self.hashes, is_kept))

    def fingerprint(self) -> str:
        """The same for the same examples in the same order, and for no others."""
        digest = hashlib.sha256()
        for example, picture in zip(self.examples, self.hashes, strict=True):
            digest.update(repr((example.prefix, example.suffix)).encode() + picture)
        return f"{len(self.examples)} examples, {digest.hexdigest()[:16]}"


# Lines


def parse_line(text: bytes, folder: Path, line: int) -> Example:
    """The example in a line. Raises: ValueError, with what is wrong."""
    if len(text) > MOST_LINE_BYTES:
        raise ValueError(f"the line has {len(text)} bytes; {MOST_LINE_BYTES} is the limit")
    try:
        record = json.loads(text.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 (byte {error.start})") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} (column {error.colno})") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not usable JSON: {error}") from error
    if not isinstance(record, dict):
        raise ValueError(f"a {type(record).__name__}, not an object in braces")
    for name in FIELDS:
        if name not in record:
            raise ValueError(f"no {name!r}; it has {', '.join(map(repr, record)) or 'nothing'}")
        if not isinstance(record[name], str):
            raise ValueError(f"{name} is a {type(record[name]).__name__}; text is needed")
        if any(0xD800 <= ord(letter) < 0xE000 for letter in record[name]):
            raise ValueError(f"{name} holds half a surrogate pair; it cannot be written as UTF-8")
    return Example(inside(folder, record["image"]), record["prefix"], record["suffix"], line)


def inside(folder: Path, name: str) -> Path:
    """The picture of that name in the dataset's folder. Raises: ValueError for one that lies elsewhere."""
    if not name or "\0" in name:
        raise ValueError(f"image is {name!r}; the name of a file is needed")
    if "://" in name:
        raise ValueError(f"image {name!r} is an address; download it into the dataset's folder")
    if os.path.isabs(name):
        raise ValueError(f"image {name!r} is an absolute name; one relative to the dataset's folder is needed")
    path = Path(os.path.normpath(folder / name))
    if not Path(os.path.abspath(path)).is_relative_to(os.path.abspath(folder)):
        raise ValueError(f"image {name!r} lies outside the dataset's folder")
    return path


def read_split(file: str | Path) -> Split:
    """The lines of a JSONL, the faulty ones named. Blank lines and a byte order mark are passed over.

    Raises: DatasetError when there is no such file, or when no line can be used.
    """
    file = Path(file)
    split = Split(file, [], [], [], [])
    try:
        lines = file.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except OSError as error:
        raise DatasetError(f"{file} cannot be read: {error.strerror}. Name a JSONL of examples.", path=file) from error
    for line, text in enumerate(lines, start=1):
        if not text.strip():
            continue
        try:
            split.examples.append(parse_line(text, file.parent, line))
        except ValueError as error:
            split.faults.append(Fault(file, line, str(error)))
    if not split.examples and not split.faults:
        raise DatasetError(f"{file} is empty. Lines with image, prefix and suffix are needed.", path=file)
    return split


# Pictures


def look_at(path: Path) -> tuple[bytes, str | None]:
    """The hash of a picture file, and what is wrong with it. It is read as it will be, to the last pixel and with its colours."""
    try:
        load_image(path, notes=[])
        return hashlib.sha256(read_file(path)).digest(), None
    except ImageError as error:
        return b"", ADVICE.sub("", error.message)


def check_pictures(split: Split) -> None:
    """Drops the lines whose picture is missing, damaged or none."""
    paths = list(dict.fromkeys(example.image for example in split.examples))
    with ThreadPoolExecutor(READERS) as readers:
        seen = dict(zip(paths, readers.map(look_at, paths), strict=True))
    wrong = {path: why for path, (_, why) in seen.items() if why is not None}
    split.drop(Fault(split.file, example.line, wrong[example.image]) for example in split.examples if example.image in wrong)
    split.hashes = [seen[example.image][0] for example in split.examples]


# Texts


def check_texts(split: Split, processor: object, max_text_tokens: int) -> None:
    """Drops the lines whose prompt and answer are too long; doubts answers that a model would learn nothing good from.

    Args:
        processor: a PaliGemmaProcessor.
        max_text_tokens: the most tokens of <bos>, prefix, newline, suffix and <eos> together. A longer example is a fault and is
            never cut in silence: without its <eos> it would teach the model not to stop.
    """
    faults, num_boxes, num_swapped = [], 0, 0
    for example in split.examples:
        prefix, suffix = processor.encode(example.prefix.strip()), processor.encode(example.suffix)
        count = len(prefix) + len(suffix) + 3
        if count > max_text_tokens:
            text = f"prefix ({len(prefix)}) and suffix ({len(suffix)}) take {count} tokens, over the {max_text_tokens} allowed"
            faults.append(Fault(split.file, example.line, text))
            continue
        said = doubts_of(example.prefix, example.suffix)
        split.doubts += [Fault(split.file, example.line, text) for text in said]
        reading = read_text(example.suffix)
        num_boxes += len(reading.objects)
        num_swapped += sum(SWAPPED in found.problems for found in reading.objects)
    if num_boxes and num_swapped / num_boxes > OTHER_ORDER:
        text = f"{num_swapped} of {num_boxes} boxes have their corners exchanged: are they x, y, width, height (YOLO, COCO)?"
        split.doubts.insert(0, Fault(split.file, 0, f"{text} <loc> tokens are y_min, x_min, y_max, x_max"))
    answers = {(example.image, example.prefix, example.suffix) for example in split.examples if A_PLACE.search(example.suffix)}
    asked = Counter((image, prefix) for image, prefix, _ in answers)
    several = sum(count > 1 for count in asked.values())
    if several:
        text = f"{several} questions have boxes in several lines; put them into one answer, ' ; ' between, in the order to say"
        split.doubts.append(Fault(split.file, 0, text))
    empty = sum(not example.suffix.strip() for example in split.examples)
    if empty:
        text = f"{empty} of {len(split.examples)} answers are empty; they teach the model to find nothing"
        split.doubts.append(Fault(split.file, 0, text))
    split.drop(faults)


def doubts_of(prefix: str, suffix: str) -> list[str]:
    """What is odd about a prompt and its answer, above all about the places in it."""
    unknown = [token for token in dict.fromkeys(LIKE_A_PLACE.findall(suffix)) if not A_PLACE.fullmatch(token)]
    said = [f"{token} is no token; <loc0000> to <loc1023> and <seg000> to <seg127> are" for token in unknown]
    letters = dict.fromkeys(CONTROL.findall(f"{prefix} {suffix}"))
    said += [f"{token} is read as letters; where it is needed the processor adds it, so leave it out" for token in letters]
    said += ["the suffix begins or ends with white space, which would be learned"] * (suffix.strip() not in ("", suffix))
    if A_PLACE.search(suffix):
        said += [WRONG_PLACES[problem] for problem in dict.fromkeys(read_text(suffix).problems) if problem in WRONG_PLACES]
    return said


# Some of many


def spread(total: int, count: int) -> list[int]:
    """At most `count` of the numbers below `total`, evenly spread, the first and the last among them; always the same ones.

    The first `count` of a sorted file would stand for its beginning only, and every n-th one of a file that repeats itself
    (picture 1: detect, caption, count; picture 2: ...) for one kind only. So the numbers are cut into `count` runs of equal
    length, and one is taken from each, at the fractions of the golden ratio's multiples.
    """
    count = min(count, total)
    starts = [total * i // count for i in range(count)] if count else []
    taken = [start + int((end - start) * (i * GOLDEN_RATIO % 1)) for i, (start, end) in enumerate(pairwise([*starts, total]))]
    return [*taken[:-1], total - 1] if count > 1 else taken


# Splits beside each other


def compare(train: Split, valid: Split) -> list[Fault]:
    """What makes scores on `valid` mean less than they seem to: pictures that are in both, prompts that only one has."""
    doubts = []
    known = set(train.hashes)
    lines = [example.line for example, digest in zip(valid.examples, valid.hashes, strict=True) if digest in known]
    if lines:
        text = f"{len(lines)} of {len(valid.examples)} pictures are in {train.file.name}, too (first in line {lines[0]})"
        doubts.append(Fault(valid.file, 0, f"{text}: scores will be better than they should"))
    learned = Counter(example.prefix.strip() for example in train.examples)
    if len(learned) <= FEW_PREFIXES:
        new = dict.fromkeys(example.prefix.strip() for example in valid.examples if example.prefix.strip() not in learned)
        if new:
            doubts.append(Fault(valid.file, 0, f"{len(new)} prompts are not in {train.file.name}, such as {next(iter(new))!r}"))
    return doubts


def require_usable(splits: Sequence[Split], skip_bad: bool) -> None:
    """Lets a run begin. Raises: DatasetError when lines cannot be used and are not to be skipped, or when none is left."""
    faults = [fault for split in splits for fault in split.faults]
    if faults and not skip_bad:
        first = str(faults[0]).rstrip(".")
        text = f"{len(faults)} lines cannot be used; the first: {first}. Mend them, or go on without them: --skip_bad."
        raise DatasetError(text, path=faults[0].file)
    for split in splits:
        if not split.examples:
            raise DatasetError(
                f"{split.file} has no line that can be used. The first: {split.faults[0].text.rstrip('.')}.", path=split.file
            )


# Batches


class Examples:
    """The lines of a split as they are learned.

    Args:
        split: read and checked.
        processor: a PaliGemmaProcessor.
        augment: "none", or "zoom" (augmentation.py), drawn anew in each epoch and always the same for seed, epoch and line.
    """

    def __init__(self, split: Split, processor: object, augment: str = "none", seed: int = 0):
        self.lines, self.processor, self.augment, self.seed = split.examples, processor, augment, seed

    def __getitem__(self, place: tuple[int, int]) -> tuple[Image.Image, str, str]:
        """Picture, prefix and suffix of the line `index` in the epoch `epoch`, given as (epoch, index)."""
        line = self.lines[place[1]]
        picture, suffix = load_image(line.image, notes=[]), line.suffix
        if self.augment == "zoom":
            picture, suffix = zoom(picture, suffix, seed=(self.seed, *place))
        return picture, line.prefix, suffix

    def batch(self, places: Sequence[tuple[int, int]]) -> dict:
        """What the processor makes of some of them, labels included."""
        side, rows = self.processor.image_size, (self[place] for place in places)
        # Squeezed one by one: a batch of large photos would take gigabytes.
        pictures, prefixes, suffixes = zip(*((squeeze(picture, side), *texts) for picture, *texts in rows), strict=True)
        return self.processor(list(pictures), list(prefixes), list(suffixes), notes=[])
