"""Examples to learn from: a JSONL with a picture, a prompt and its answer a line, read and checked before the first step.

    {"image": "a.jpg", "prefix": "detect cat", "suffix": "<loc0104><loc0320><loc0458><loc0674> cat"}

is the form of Roboflow's PaliGemma export and of big_vision. Pictures are named relative to the JSONL's folder or to --image_dir,
which neither names nor links may leave. A number as suffix stands for its text.

A run that fails at line 40,000 after two hours, or that learns from boxes in another order, is what this file is there to
prevent: every line and every picture is looked at, and all that is wrong is named at once. A fault stops the run unless the user
says to skip such lines; a doubt is reported and changes nothing.

`Examples` makes batches of what is left. Checked in tests/learning/test_dataset.py.
"""

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import compress, pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from paligemma import files
from paligemma.errors import DatasetError, PaliGemmaError, PromptError, counted
from paligemma.learning.augmentation import zoom
from paligemma.objects.outputs import CUT_BOX, CUT_MASK, LONG_MASK, NO_AREA, SWAPPED, parse_text
from paligemma.pictures.folders import one_picture
from paligemma.pictures.images import load_image, resize_to_square
from paligemma.pictures.rgb import NEARLY_BLACK
from paligemma.pictures.sources import read_file
from paligemma.vocabulary import LOCATION_OR_CODE

if TYPE_CHECKING:
    from paligemma.processing_paligemma import PaliGemmaProcessor

FIELDS = ("image", "prefix", "suffix")
MOST_LINE_BYTES = 1 << 20
HEAD_BYTES = 1 << 16  # of a file, to tell what it is
SHOWN = 60  # characters of a text from the file in a message
NEEDED = "A line of JSON for each example is needed: {\"image\": \"a.jpg\", \"prefix\": \"detect cat\", \"suffix\": \"...\"}."
MAGIC = {  # how files begin that are no text in UTF-8
    b"PAR1": "a Parquet table",
    b"PK\x03\x04": "a ZIP archive",
    b"\x1f\x8b": "compressed (gzip)",
    b"BZh": "compressed (bzip2)",
    b"\xfd7zXZ": "compressed (xz)",
    b"\x28\xb5\x2f\xfd": "compressed (zstd)",
    b"ARROW1": "an Arrow table",
    b"SQLite format 3": "an SQLite database",
    b"version https://git-lfs": "a pointer of Git LFS (git lfs pull fetches the file)",
    b"\xff\xfe": "text in UTF-16 (save it as UTF-8)",
    b"\xfe\xff": "text in UTF-16 (save it as UTF-8)",
    b"{\0": "text in UTF-16 (save it as UTF-8)",
    b"\0{": "text in UTF-16 (save it as UTF-8)",
}
LIKE_A_PLACE = re.compile(r"<(?:loc|seg)[^<>\s]{0,8}>")
WRONG_PLACES = {
    SWAPPED: "a box whose second corner lies before its first; the order is y_min, x_min, y_max, x_max",
    NO_AREA: "a box without area",
    CUT_BOX: "a box of fewer than four <loc> tokens",
    CUT_MASK: "a mask of fewer than sixteen <seg> tokens",
    LONG_MASK: "a mask of more than sixteen <seg> tokens",
}
OTHER_ORDER = 0.2  # share of boxes with exchanged corners from which the whole file is likely in another order
FEW_PREFIXES = 50  # a file with so few different prompts has a fixed form, from which the other split should not differ
READERS = 4  # threads that look at pictures; images.MEMORY bounds what they hold together
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
    """What is wrong in a line; line 0 stands for the whole file. `tokens`: how many it would need, where it is too long."""

    file: Path
    line: int
    text: str
    tokens: int = 0

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.text}" if self.line else f"{self.file}: {self.text}"


@dataclass
class Split:
    """A JSONL that was read: what can be used of it, what cannot, what is doubtful.

    Args:
        folder: which the names of pictures are relative to, and which they may not leave.
        hashes: of each picture's bytes, in the order of `examples`; filled by check_pictures.
        options: of load_image, for all pictures.
    """

    file: Path
    examples: list[Example]
    faults: list[Fault]
    doubts: list[Fault]
    hashes: list[bytes]
    folder: Path | None = None
    options: dict = field(default_factory=dict)

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


class Number(str):
    """A number of JSON as it is written in the file: 1.50 stays 1.50, and no digits are too many."""


class Record(dict):
    """An object of JSON; `twice` are the names that it has more than once, of which json takes the last."""

    def __init__(self, pairs: list[tuple[str, object]]):
        super().__init__(pairs)
        counts = Counter(name for name, _ in pairs) if len(pairs) > len(self) else {}
        self.twice = [name for name, count in counts.items() if count > 1]


def no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number of JSON")


HOOKS = {"object_pairs_hook": Record, "parse_int": Number, "parse_float": Number, "parse_constant": no_constant}


def short(text: object) -> str:
    """A text from the file as a message shows it: quoted, and not longer than SHOWN."""
    return repr(text if len(text) <= SHOWN else f"{text[:SHOWN]}...")


def parse_line(text: bytes, folder: Path, line: int) -> Example:
    """The example in a line. Raises: ValueError, with what is wrong."""
    try:
        record = files.parse_json(text, MOST_LINE_BYTES, **HOOKS)
    except files.JSONFault as fault:
        raise ValueError(f"{fault} (column {fault.column})") from fault
    if record.twice:
        raise ValueError(f"{short(record.twice[0])} is there twice; leave one")
    for name in FIELDS:
        if name not in record:
            raise ValueError(lacking(name, record))
        if isinstance(record[name], Number) and name == "suffix":
            record[name] = str(record[name])
        if type(record[name]) is not str:
            raise ValueError(f'{name} is {files.json_kind(record[name])}; text in quotes is needed, and "" where there is none')
        if any(0xD800 <= ord(letter) < 0xE000 for letter in record[name]):
            raise ValueError(f"{name} holds half a surrogate pair; it cannot be written as UTF-8")
    return Example(inside(folder, record["image"]), record["prefix"], record["suffix"], line)


def lacking(name: str, record: Record) -> str:
    """That an object has no such field, and what it seems to be instead."""
    if isinstance(record.get("images"), list) and "annotations" in record:
        return f"a COCO file, which holds all pictures in one object. {NEEDED}"
    chat = next((key for key in ("messages", "conversations") if key in record), None)
    if chat is not None:
        return f"a chat ({short(chat)}). Write its question as prefix, its answer as suffix, the name of its picture as image"
    has = ", ".join(short(key) for key in [*record][:6]) + f" and {len(record) - 6} more" * (len(record) > 6)
    return f"no {name!r}; it has {has or 'nothing'}"


def inside(folder: Path, name: str) -> Path:
    """The picture of that name in the dataset's folder. Raises: ValueError for one that lies elsewhere."""
    if not name or "\0" in name:
        raise ValueError(f"image is {short(name)}; the name of a file is needed")
    if "://" in name:
        raise ValueError(f"image {short(name)} is an address; download it into the dataset's folder")
    if os.path.isabs(name):
        raise ValueError(f"image {short(name)} is an absolute name; one relative to the dataset's folder is needed")
    path = Path(os.path.normpath(folder / name))
    if not Path(os.path.abspath(path)).is_relative_to(os.path.abspath(folder)):
        raise ValueError(f"image {short(name)} lies outside the dataset's folder")
    return path


def check_links(path: Path, folder: Path) -> str | None:
    """Why a picture's name must not be followed: it is a link, or lies below one, that leads out of the folder.

    In a snapshot of the hub's cache every file is a link to ../../blobs, beside the snapshots; that is not out of it.
    """
    root, real = (Path(os.path.realpath(place)) for place in (folder, path))
    snapshot = next((above for above in (root, *root.parents) if above.parent.name == "snapshots"), None)
    blobs = [snapshot.parent.parent / "blobs"] if snapshot else []
    if any(real.is_relative_to(place) for place in (root, *blobs)):
        return None
    return f"{path} is a link that leads out of the dataset's folder; --image_dir names another folder for the pictures"


def read_lines(file: Path) -> Iterable[bytes]:
    """The lines of a file without their ends; of one that is too long the beginning, which is too long, too."""
    with open(file, "rb") as stream:
        while line := stream.readline(MOST_LINE_BYTES + 2):
            rest = line
            while rest and not rest.endswith(b"\n"):
                rest = stream.readline(MOST_LINE_BYTES)
            yield line.removesuffix(b"\n")


def read_split(file: str | Path, image_dir: str | Path | None = None) -> Split:
    """The lines of a JSONL, the faulty ones named. Blank lines and a byte order mark are passed over.

    Args:
        image_dir: what names of pictures are relative to; the file's own folder if not given.
    Raises: DatasetError when there is no such file, when it is empty, and when it is recognised as something else.
    """
    file = Path(file)
    folder = file.parent if image_dir is None else Path(image_dir)
    if not files.is_file(file, DatasetError):
        what = "is no regular file" if files.stat_path(file, DatasetError) else "does not exist"
        raise DatasetError(f"{file} {what}. Name a JSONL of examples.", path=file)
    if not files.is_folder(folder, DatasetError):
        raise DatasetError(f"{folder} is no folder. Name the one that the pictures' names are relative to.", path=folder)
    split = Split(file, [], [], [], [], folder)
    try:
        with open(file, "rb") as stream:
            head = stream.read(HEAD_BYTES)
        if what := next((what for magic, what in MAGIC.items() if head.startswith(magic)), None):
            raise DatasetError(f"{file} is {what}. {NEEDED}", path=file)
        for line, text in enumerate(read_lines(file), start=1):
            text = text.removeprefix(b"\xef\xbb\xbf") if line == 1 else text
            if not text.strip():
                continue
            try:
                split.examples.append(parse_line(text, folder, line))
            except ValueError as error:
                split.faults.append(Fault(file, line, str(error)))
    except OSError as error:
        raise DatasetError(f"{file} cannot be read: {error.strerror}. Name a JSONL of examples.", path=file) from error
    if len(split.faults) >= len(split.examples):
        explain_unusable(split, head.removeprefix(b"\xef\xbb\xbf").decode("utf-8", errors="replace").lstrip())
    return split


def common(text: str) -> str:
    """What a fault has in common with faults of its kind: all but what it quotes, numbers, and the names that an object has."""
    return re.sub(r"'[^']*'|\"[^\"]*\"|\d+", "", text.partition("; it has")[0])


def lacking_in_array(head: str) -> str | None:
    """What the first object of a JSON array lacks to be an example; None if nothing, or if it is not whole in `head`."""
    try:
        record, _ = json.JSONDecoder(**HOOKS).raw_decode(head[1:].lstrip())
    except (ValueError, RecursionError):
        return None
    return next((lacking(name, record) for name in FIELDS if name not in record), None)


def explain_unusable(split: Split, head: str) -> None:
    """Raises: DatasetError for a file that is no JSONL of examples, if one sentence says what it is instead.

    Args:
        split: of which less than half can be used.
        head: the beginning of the file.
    """
    first, _, rest = head.partition("\n")
    is_broken = bool(split.faults) and split.faults[0].text.startswith("not JSON")  # the first line is not JSON by itself
    name, what = split.file.name, None
    if not head:
        what = f"is empty. {NEEDED}"
    elif split.examples and not is_broken:
        return
    elif re.match(r'\s*\{\s*"(info|licenses|categories|images|annotations)"\s*:\s*[\[{]', head):
        what = f"is a COCO file, which holds all pictures in one object. {NEEDED}"
    elif re.match(r"\[\s*\{", head) and (lacks := lacking_in_array(head)):
        what = f"is one JSON array, and not of examples: {lacks.rstrip('.')}. {NEEDED}"
    elif re.match(r"\[\s*\{", head):
        code = f"import json; [print(json.dumps(x)) for x in json.load(open({name!r}))]"
        what = f"is one JSON array, not a line for each example. Convert it: python -c \"{code}\" > examples.jsonl."
    elif is_broken and head.startswith("{") and re.search(r'^\s*"(images|annotations)"\s*:\s*\[', rest, re.MULTILINE):
        what = f"is a COCO file, which holds all pictures in one object. {NEEDED}"
    elif is_broken and head.startswith("{") and re.match(r'\s*["}]', rest):
        what = f"has objects that are spread over several lines. Write each in one line: jq -c . {name} > examples.jsonl."
    elif head.startswith("<"):
        what = f"is HTML or XML. {NEEDED}"
    elif head[0] not in "{[" and re.match(r"(- |---|\w+:(\s|$))", first):
        what = f"is YAML. {NEEDED}"
    elif head[0] not in "{[" and re.search(r"[,;\t]", first) and "{" not in first:
        what = f"is a table (CSV). {NEEDED}"
    elif not split.examples and (split.faults[0].text.startswith("not UTF-8") or "\0" in head):
        what = f"is no text in UTF-8. {NEEDED}"
    elif is_broken and head.startswith("{") and re.fullmatch(r".*\}\s*,\s*", first):
        what = "has a comma at the ends of its lines. Leave it out: a line of JSONL is an object and nothing else."
    elif not split.examples and len(split.faults) > 1 and len({common(fault.text) for fault in split.faults}) == 1:
        what = f"has no line that can be used. All {len(split.faults)} have the same fault: {split.faults[0].text.rstrip('.')}."
    if what:
        raise DatasetError(f"{split.file} {what}", path=split.file)


# Pictures


def look_at(path: Path, folder: Path, options: dict) -> tuple[bytes, str | None, bool]:
    """The hash of a picture file, what is wrong with it, and whether it is nearly black.

    It is read as it will be, to the last pixel and with its colours.
    """
    if why := check_links(path, folder):
        return b"", why, False
    notes: list[str] = []
    try:
        with one_picture(str(path)):
            load_image(path, notes=notes, then=lambda picture: picture.size, **options)
            is_dark = any(text.endswith(NEARLY_BLACK) for text in notes)
            return hashlib.sha256(read_file(path)).digest(), None, is_dark
    except PaliGemmaError as error:
        return b"", ADVICE.sub("", error.message), False


def check_pictures(split: Split) -> None:
    """Drops the lines whose picture is missing, damaged or none; doubts those that are nearly black."""
    paths = list(dict.fromkeys(example.image for example in split.examples))
    with ThreadPoolExecutor(READERS) as readers:
        seen = dict(zip(paths, readers.map(partial(look_at, folder=split.folder, options=split.options), paths), strict=True))
    wrong = {path: why for path, (_, why, _) in seen.items() if why is not None}
    if num_dark := sum(is_dark for _, _, is_dark in seen.values()):
        text = f"{num_dark} of {counted(len(paths), 'picture')} with 16 bits, nearly black; --stretch makes their brightest white"
        split.doubts.append(Fault(split.file, 0, text))
    split.drop(Fault(split.file, example.line, wrong[example.image]) for example in split.examples if example.image in wrong)
    split.hashes = [seen[example.image][0] for example in split.examples]


# Texts


def check_texts(split: Split, processor: "PaliGemmaProcessor", max_text_tokens: int) -> None:
    """Drops the lines whose prompt and answer are too long; doubts answers that a model would learn nothing good from.

    Args:
        processor: a PaliGemmaProcessor.
        max_text_tokens: the most tokens of <bos>, prefix, newline, suffix and <eos> together. A longer example is a fault and is
            never cut in silence: without its <eos> it would teach the model not to stop.
    """
    faults, num_boxes, num_swapped = [], 0, 0
    for example in split.examples:
        try:
            prefix, suffix = processor.encode(example.prefix.strip()), processor.encode(example.suffix)
        except PromptError as error:  # so long that it was not even tokenised
            faults.append(Fault(split.file, example.line, ADVICE.sub("", error.message)))
            continue
        count = len(prefix) + len(suffix) + 3
        if count > max_text_tokens:
            text = f"prefix ({len(prefix)}) and suffix ({len(suffix)}) take {count} tokens, over the {max_text_tokens} allowed"
            faults.append(Fault(split.file, example.line, text, count))
            continue
        said = doubts_of(example.prefix, example.suffix)
        split.doubts += [Fault(split.file, example.line, text) for text in said]
        reading = parse_text(example.suffix)
        num_boxes += len(reading.objects)
        num_swapped += sum(SWAPPED in found.problems for found in reading.objects)
    if num_boxes and num_swapped / num_boxes > OTHER_ORDER:
        text = f"{num_swapped} of {num_boxes} boxes have their corners exchanged: are they x, y, width, height (YOLO, COCO)?"
        split.doubts.insert(0, Fault(split.file, 0, f"{text} <loc> tokens are y_min, x_min, y_max, x_max"))
    placed = (example for example in split.examples if LOCATION_OR_CODE.search(example.suffix))
    answers = {(example.image, example.prefix, example.suffix) for example in placed}
    asked = Counter((image, prefix) for image, prefix, _ in answers)
    several = sum(count > 1 for count in asked.values())
    if several:
        have = f"{counted(several, 'question')} {'have' if several > 1 else 'has'}"
        text = f"{have} boxes in several lines; put them into one answer, ' ; ' between, in the order to say"
        split.doubts.append(Fault(split.file, 0, text))
    empty = sum(not example.suffix.strip() for example in split.examples)
    if empty:
        text = f"{empty} of {len(split.examples)} answers are empty; they teach the model to find nothing"
        split.doubts.append(Fault(split.file, 0, text))
    split.drop(faults)


def doubts_of(prefix: str, suffix: str) -> list[str]:
    """What is odd about a prompt and its answer, above all about the places in it."""
    unknown = [token for token in dict.fromkeys(LIKE_A_PLACE.findall(suffix)) if not LOCATION_OR_CODE.fullmatch(token)]
    more = f", and {counted(len(unknown) - 3, 'other')} like it" if len(unknown) > 3 else ""
    said = [f"{token} is no token; <loc0000> to <loc1023> and <seg000> to <seg127> are{more}" for token in unknown[:3]]
    letters = dict.fromkeys(CONTROL.findall(f"{prefix} {suffix}"))
    said += [f"{token} is read as letters; where it is needed the processor adds it, so leave it out" for token in letters]
    said += ["the suffix begins or ends with white space, which would be learned"] * (suffix.strip() not in ("", suffix))
    if LOCATION_OR_CODE.search(suffix):
        said += [WRONG_PLACES[problem] for problem in dict.fromkeys(parse_text(suffix).problems) if problem in WRONG_PLACES]
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
            text = f"{len(new)} prompt{'s are' if len(new) > 1 else ' is'} not in {train.file.name}"
            doubts.append(Fault(valid.file, 0, f"{text}, such as {short(next(iter(new)))}"))
    return doubts


def require_usable(splits: Sequence[Split], skip_bad: bool, room: int | None = None) -> None:
    """Lets a run begin.

    Args:
        room: tokens of text that the model has room for beside a picture.
    Raises: DatasetError when lines cannot be used and are not to be skipped, or when none is left.
    """
    faults = [fault for split in splits for fault in split.faults]
    if faults and not skip_bad:
        first, longest = str(faults[0]).rstrip("."), max(fault.tokens for fault in faults)
        num_long, advice = sum(fault.tokens > 0 for fault in faults), []
        if longest and (room is None or longest <= room):
            advice.append(f"Give room to the {num_long} that are too long: --max_text_tokens {longest}.")
        elif longest:
            advice.append(f"The longest needs {longest} tokens, and the model has room for {room}: shorten it.")
        if num_long < len(faults):
            if not any(split.examples for split in splits) and all("does not exist" in fault.text for fault in faults):
                advice.append("Name the folder that the pictures' names are relative to: --image_dir.")
            advice.append(f"Fix {'the others' if num_long else 'them'}, or continue without them: --skip_bad.")
        number = counted(len(faults), "line")
        raise DatasetError(f"{number} cannot be used; the first: {first}. {' '.join(advice)}", path=faults[0].file)
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

    def __init__(self, split: Split, processor: "PaliGemmaProcessor", augment: str = "none", seed: int = 0):
        self.lines, self.options = split.examples, split.options
        self.processor, self.augment, self.seed = processor, augment, seed

    def __getitem__(self, place: tuple[int, int]) -> tuple[Image.Image, str, str]:
        """Picture, prefix and suffix of the line `index` in the epoch `epoch`, given as (epoch, index)."""
        line = self.lines[place[1]]
        picture, suffix = load_image(line.image, notes=[], **self.options), line.suffix
        if self.augment == "zoom":
            picture, suffix = zoom(picture, suffix, seed=(self.seed, *place))
        return picture, line.prefix, suffix

    def batch(self, places: Sequence[tuple[int, int]]) -> dict:
        """What the processor makes of some of them, labels included."""
        side, rows = self.processor.image_size, (self[place] for place in places)
        # Squeezed one by one: a batch of large photos would take gigabytes.
        pictures, prefixes, suffixes = zip(*((resize_to_square(picture, side), *texts) for picture, *texts in rows), strict=True)
        return self.processor(list(pictures), list(prefixes), list(suffixes), notes=[])
