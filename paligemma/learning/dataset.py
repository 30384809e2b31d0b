"""Training examples from a JSONL file, with one picture, prompt and answer per line, checked completely before the first update.

    {"image": "a.jpg", "prefix": "detect cat", "suffix": "<loc0104><loc0320><loc0458><loc0674> cat"}

This is the format of Roboflow's PaliGemma export and of big_vision. Names of pictures are relative to the folder of the JSONL
file, or to --image_dir; neither names nor links may lead out of that folder. A suffix may be a number, which is used as text.

Without these checks a run could fail at line 40,000 after two hours, or learn boxes whose coordinates are in the wrong order. So
every line and every picture is checked, and all problems are reported at once. A fault stops the run, unless the user chooses to
skip faulty lines; a warning does not stop it.

`Examples` makes batches of the remaining lines. Checked in tests/learning/test_dataset.py.
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
from typing import TYPE_CHECKING, Any

from PIL import Image

from paligemma.errors import DatasetError, PaliGemmaError, PromptError, counted
from paligemma.files import JSONFault, is_file, is_folder, json_kind, parse_json, refuse_nan_and_infinity, stat_path
from paligemma.learning.augmentation import zoom
from paligemma.objects.outputs import CUT_BOX, CUT_MASK, LONG_MASK, NO_AREA, SWAPPED, parse_text
from paligemma.pictures.folders import picture_errors
from paligemma.pictures.images import load_image, resize_to_square
from paligemma.pictures.rgb import NEARLY_BLACK
from paligemma.pictures.sources import read_file
from paligemma.vocabulary import LOCATION_OR_CODE

if TYPE_CHECKING:
    from paligemma.processing_paligemma import PaliGemmaProcessor

FIELDS = ("image", "prefix", "suffix")
MAX_LINE_BYTES = 1 << 20
HEAD_BYTES = 1 << 16  # number of bytes read from a file to recognise its format
MAX_QUOTED = 60  # maximum number of characters of a text that is quoted in a message
MAX_FAULTS_SHOWN, MAX_WARNINGS_SHOWN = 1000, 20
NEEDED = "A line of JSON for each example is needed: {\"image\": \"a.jpg\", \"prefix\": \"detect cat\", \"suffix\": \"...\"}."
MAGIC = {  # first bytes of files that are not UTF-8 text
    b"PAR1": "a Parquet table",
    b"PK\x03\x04": "a ZIP archive",
    b"\x1f\x8b": "compressed (gzip)",
    b"BZh": "compressed (bzip2)",
    b"\xfd7zXZ": "compressed (xz)",
    b"\x28\xb5\x2f\xfd": "compressed (zstd)",
    b"ARROW1": "an Arrow table",
    b"SQLite format 3": "an SQLite database",
    b"version https://git-lfs": "a Git LFS pointer (git lfs pull fetches the file)",
    b"\xff\xfe": "text in UTF-16 (save it as UTF-8)",
    b"\xfe\xff": "text in UTF-16 (save it as UTF-8)",
    b"{\0": "text in UTF-16 (save it as UTF-8)",
    b"\0{": "text in UTF-16 (save it as UTF-8)",
}
LOOKS_LIKE_LOCATION_OR_CODE = re.compile(r"<(?:loc|seg)[^<>\s]{0,8}>")
WARNINGS = {  # problem of an answer, from objects/outputs.py -> text of the warning
    SWAPPED: "a box whose second corner lies before its first; the order is y_min, x_min, y_max, x_max",
    NO_AREA: "a box without area",
    CUT_BOX: "a box of fewer than four <loc> tokens",
    CUT_MASK: "a mask of fewer than sixteen <seg> tokens",
    LONG_MASK: "a mask of more than sixteen <seg> tokens",
}
MAX_SWAPPED = 0.2  # if a larger fraction of the boxes has swapped corners, the file probably uses another order of coordinates
MAX_PROMPTS = 50  # if the training file has at most 50 different prompts, other prompts in the validation file give a warning
NUM_THREADS = 4  # for checking pictures; images.MEMORY limits the memory of all threads together
GOLDEN_RATIO = 0.5 + 5**0.5 / 2
# Matches the last sentence of an error message, which is removed, because it may recommend flags that finetune does not have.
LAST_SENTENCE = re.compile(r"(?<=[^.])\. [^.]*\.$")
CONTROL_TOKEN = re.compile(r"<(?:image|bos|eos|pad)>")


@dataclass(frozen=True)
class Example:
    """One line: a picture, a prompt and the answer to be learned."""

    image: Path
    prefix: str
    suffix: str
    line: int


@dataclass(frozen=True)
class Problem:
    """A fault or a warning. Line 0 means the whole file. `tokens` is the length of an example that is too long, otherwise 0."""

    file: Path
    line: int
    text: str
    tokens: int = 0

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.text}" if self.line else f"{self.file}: {self.text}"


@dataclass
class Split:
    """The content of a JSONL file: usable examples, faults (of lines that cannot be used), and warnings.

    Args:
        hashes: the hash of each picture's bytes, in the order of `examples`; filled by check_pictures.
        folder: names of pictures are relative to this folder and must not lead out of it.
        options: arguments of load_image, for all pictures.
    """

    file: Path
    examples: list[Example]
    faults: list[Problem]
    warnings: list[Problem]
    hashes: list[bytes]
    folder: Path | None = None
    options: dict = field(default_factory=dict)

    def drop(self, faults: Iterable[Problem]) -> None:
        """Adds faults, and removes the examples of their lines."""
        faults = list(faults)
        faulty_lines = {fault.line for fault in faults}
        self.faults += faults
        is_kept = [example.line not in faulty_lines for example in self.examples]
        self.examples = list(compress(self.examples, is_kept))
        self.hashes = list(compress(self.hashes, is_kept))

    def fingerprint(self) -> str:
        """A text that identifies the examples and their order."""
        digest = hashlib.sha256()
        for example, picture in zip(self.examples, self.hashes, strict=True):
            digest.update(repr((example.prefix, example.suffix)).encode() + picture)
        return f"{len(self.examples)} examples, {digest.hexdigest()[:16]}"


# Lines


class Number(str):
    """A JSON number as it is written in the file: 1.50 stays 1.50, and any number of digits is kept."""


class Record(dict):
    """A JSON object. `repeated` lists the names that it contains more than once; json keeps the last value of each."""

    def __init__(self, pairs: list[tuple[str, object]]):
        super().__init__(pairs)
        counts = Counter(name for name, _ in pairs) if len(pairs) > len(self) else {}
        self.repeated = [name for name, count in counts.items() if count > 1]


JSON_HOOKS = {"object_pairs_hook": Record, "parse_int": Number, "parse_float": Number, "parse_constant": refuse_nan_and_infinity}


def quote(text: str) -> str:
    """The text in quotes for a message, cut after MAX_QUOTED characters."""
    return repr(text if len(text) <= MAX_QUOTED else f"{text[:MAX_QUOTED]}...")


def parse_line(text: bytes, folder: Path, line: int) -> Example:
    """The example in a line. Raises: ValueError, whose message is the fault."""
    try:
        record: Any = parse_json(text, MAX_LINE_BYTES, **JSON_HOOKS)
    except JSONFault as fault:
        raise ValueError(f"{fault} (column {fault.column})") from fault
    if record.repeated:
        raise ValueError(f"{quote(record.repeated[0])} is given twice; remove one of the two")
    for name in FIELDS:
        if name not in record:
            raise ValueError(explain_missing(name, record))
        if isinstance(record[name], Number) and name == "suffix":
            record[name] = str(record[name])
        if type(record[name]) is not str:
            raise ValueError(f'{name} is {json_kind(record[name])}; text in quotes is needed, or "" for an empty text')
        if any(0xD800 <= ord(letter) < 0xE000 for letter in record[name]):
            raise ValueError(f"{name} contains half of a surrogate pair, which UTF-8 cannot encode")
    return Example(path_inside(folder, record["image"]), record["prefix"], record["suffix"], line)


def explain_missing(name: str, record: Record) -> str:
    """The message for a missing field, with a guess at the actual format."""
    if isinstance(record.get("images"), list) and "annotations" in record:
        return f"a COCO file, which describes all pictures in one object. {NEEDED}"
    chat = next((key for key in ("messages", "conversations") if key in record), None)
    if chat is not None:
        return f"a chat ({quote(chat)}). Write its question as prefix, its answer as suffix, and the name of its picture as image"
    has = ", ".join(quote(key) for key in [*record][:6]) + f" and {len(record) - 6} more" * (len(record) > 6)
    return f"no {name!r}; the object has {has or 'nothing'}"


def path_inside(folder: Path, name: str) -> Path:
    """The path of a picture in the dataset's folder. Raises: ValueError for a name that leads out of the folder."""
    if not name or "\0" in name:
        raise ValueError(f"image is {quote(name)}, but the name of a file is needed")
    if "://" in name:
        raise ValueError(f"image {quote(name)} is a URL; download the picture into the dataset's folder")
    if os.path.isabs(name):
        raise ValueError(f"image {quote(name)} is an absolute path, but a path relative to the dataset's folder is needed")
    path = Path(os.path.normpath(folder / name))
    if not Path(os.path.abspath(path)).is_relative_to(os.path.abspath(folder)):
        raise ValueError(f"image {quote(name)} lies outside the dataset's folder")
    return path


def check_links(path: Path, folder: Path) -> str | None:
    """The message for a path that leads out of the dataset's folder through a link; None for all other paths.

    In a snapshot of the hub's cache every file is a link to a file in ../../blobs. Such links are allowed.
    """
    root, real = (Path(os.path.realpath(place)) for place in (folder, path))
    snapshot = next((above for above in (root, *root.parents) if above.parent.name == "snapshots"), None)
    blobs = [snapshot.parent.parent / "blobs"] if snapshot else []
    if any(real.is_relative_to(place) for place in (root, *blobs)):
        return None
    problem = f"{path} is a link that leads out of the dataset's folder"
    return f"{problem}; use --image_dir to name the folder that contains the pictures"


def read_lines(file: Path) -> Iterable[bytes]:
    """The lines of a file without line ends.

    Of a line longer than MAX_LINE_BYTES only the first MAX_LINE_BYTES + 2 bytes are returned, and parse_json refuses the line.
    """
    with open(file, "rb") as stream:
        while line := stream.readline(MAX_LINE_BYTES + 2):
            rest = line
            while rest and not rest.endswith(b"\n"):
                rest = stream.readline(MAX_LINE_BYTES)
            yield line.removesuffix(b"\n")


def read_split(file: str | Path, image_dir: str | Path | None = None) -> Split:
    """The examples and faults of a JSONL file. Blank lines and a byte order mark are ignored.

    Args:
        image_dir: the folder to which names of pictures are relative; default: the folder of the file.
    Raises: DatasetError if the file is missing, empty, or recognised as another format.
    """
    file = Path(file)
    folder = file.parent if image_dir is None else Path(image_dir)
    if not is_file(file, DatasetError):
        what = "is not a regular file" if stat_path(file, DatasetError) else "does not exist"
        raise DatasetError(f"{file} {what}. Name a JSONL file of examples.", path=file)
    if not is_folder(folder, DatasetError):
        raise DatasetError(f"{folder} is not a folder. Name the folder that contains the pictures.", path=folder)
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
                split.faults.append(Problem(file, line, str(error)))
    except OSError as error:
        raise DatasetError(f"{file} cannot be read: {error.strerror}. Name a JSONL file of examples.", path=file) from error
    if len(split.faults) >= len(split.examples):
        explain_unusable(split, head.removeprefix(b"\xef\xbb\xbf").decode("utf-8", errors="replace").lstrip())
    return split


def kind_of_fault(text: str) -> str:
    """The message without quoted texts, numbers and the list of existing fields, so that messages of the same kind are equal."""
    return re.sub(r"'[^']*'|\"[^\"]*\"|\d+", "", text.partition("; the object has")[0])


def fault_in_array(head: str) -> str | None:
    """The message for the first field that is missing in the first object of a JSON array.

    Returns: None if this object has all fields, or does not fit into `head`.
    """
    try:
        record, _ = json.JSONDecoder(**JSON_HOOKS).raw_decode(head[1:].lstrip())
    except (ValueError, RecursionError):
        return None
    return next((explain_missing(name, record) for name in FIELDS if name not in record), None)


def explain_unusable(split: Split, head: str) -> None:
    """Raises: DatasetError for a file that is not a JSONL file of examples, if its format is recognised.

    Args:
        split: a split in which at least half of the lines are faulty.
        head: the beginning of the file.
    """
    first, _, rest = head.partition("\n")
    is_broken = bool(split.faults) and split.faults[0].text.startswith("not JSON")  # the first faulty line is not JSON
    name, what = split.file.name, None
    if not head:
        what = f"is empty. {NEEDED}"
    elif split.examples and not is_broken:
        return
    elif re.match(r'\s*\{\s*"(info|licenses|categories|images|annotations)"\s*:\s*[\[{]', head):
        what = f"is a COCO file, which describes all pictures in one object. {NEEDED}"
    elif re.match(r"\[\s*\{", head) and (fault := fault_in_array(head)):
        what = f"is one JSON array whose objects are not examples: {fault.rstrip('.')}. {NEEDED}"
    elif re.match(r"\[\s*\{", head):
        code = f"import json; [print(json.dumps(x)) for x in json.load(open({name!r}))]"
        what = f"is one JSON array, but one line for each example is needed. Convert it: python -c \"{code}\" > examples.jsonl."
    elif is_broken and head.startswith("{") and re.search(r'^\s*"(images|annotations)"\s*:\s*\[', rest, re.MULTILINE):
        what = f"is a COCO file, which describes all pictures in one object. {NEEDED}"
    elif is_broken and head.startswith("{") and re.match(r'\s*["}]', rest):
        what = f"has objects that extend over several lines. Write each in one line: jq -c . {name} > examples.jsonl."
    elif head.startswith("<"):
        what = f"is HTML or XML. {NEEDED}"
    elif head[0] not in "{[" and re.match(r"(- |---|\w+:(\s|$))", first):
        what = f"is YAML. {NEEDED}"
    elif head[0] not in "{[" and re.search(r"[,;\t]", first) and "{" not in first:
        what = f"is a table (CSV). {NEEDED}"
    elif not split.examples and (split.faults[0].text.startswith("not UTF-8") or "\0" in head):
        what = f"is not text in UTF-8. {NEEDED}"
    elif is_broken and head.startswith("{") and re.fullmatch(r".*\}\s*,\s*", first):
        what = "has a comma at the end of each line. Remove it: a line of JSONL is one object and nothing else."
    elif not split.examples and len(split.faults) > 1 and len({kind_of_fault(fault.text) for fault in split.faults}) == 1:
        what = f"has no usable line. All {len(split.faults)} lines have the same fault: {split.faults[0].text.rstrip('.')}."
    if what:
        raise DatasetError(f"{split.file} {what}", path=split.file)


# Pictures


def check_picture(path: Path, folder: Path, options: dict) -> tuple[bytes, str | None, bool]:
    """Decodes a picture as in training. Returns: the hash of its file, its fault or None, and whether it is nearly black."""
    if fault := check_links(path, folder):
        return b"", fault, False
    notes: list[str] = []
    try:
        with picture_errors(str(path)):
            load_image(path, notes=notes, then=lambda picture: picture.size, **options)
            is_dark = any(text.endswith(NEARLY_BLACK) for text in notes)
            return hashlib.sha256(read_file(path)).digest(), None, is_dark
    except PaliGemmaError as error:
        return b"", LAST_SENTENCE.sub("", error.message), False


def check_pictures(split: Split) -> None:
    """Drops the lines whose picture is missing, damaged or not a picture; warns about pictures that are nearly black."""
    paths = list(dict.fromkeys(example.image for example in split.examples))
    with ThreadPoolExecutor(NUM_THREADS) as threads:
        check = partial(check_picture, folder=split.folder, options=split.options)
        results = dict(zip(paths, threads.map(check, paths), strict=True))
    faults = {path: fault for path, (_, fault, _) in results.items() if fault is not None}
    if num_dark := sum(is_dark for _, _, is_dark in results.values()):
        text = f"{num_dark} of {counted(len(paths), 'picture')} have 16 bits and are nearly black"
        split.warnings.append(Problem(split.file, 0, f"{text}; --stretch shows their brightest value as white"))
    bad = [example for example in split.examples if example.image in faults]
    split.drop(Problem(split.file, example.line, faults[example.image]) for example in bad)
    split.hashes = [results[example.image][0] for example in split.examples]


# Texts


def check_texts(split: Split, processor: "PaliGemmaProcessor", max_text_tokens: int) -> None:
    """Drops the lines whose prompt and answer together are too long; warns about answers that would harm the training.

    Args:
        max_text_tokens: maximum number of tokens of <bos>, prefix, newline, suffix and <eos> together. A longer example is a
            fault. It is never truncated, because an example without <eos> would teach the model not to stop.
    """
    faults, num_boxes, num_swapped = [], 0, 0
    for example in split.examples:
        try:
            prefix, suffix = processor.encode(example.prefix.strip()), processor.encode(example.suffix)
        except PromptError as error:  # the text is too long to be tokenised
            faults.append(Problem(split.file, example.line, LAST_SENTENCE.sub("", error.message)))
            continue
        count = len(prefix) + len(suffix) + 3
        if count > max_text_tokens:
            text = f"prefix ({len(prefix)}) and suffix ({len(suffix)}) take {count} tokens, over the {max_text_tokens} allowed"
            faults.append(Problem(split.file, example.line, text, count))
            continue
        split.warnings += [Problem(split.file, example.line, text) for text in text_warnings(example.prefix, example.suffix)]
        parsed = parse_text(example.suffix)
        num_boxes += len(parsed.objects)
        num_swapped += sum(SWAPPED in obj.problems for obj in parsed.objects)
    if num_boxes and num_swapped / num_boxes > MAX_SWAPPED:
        text = f"{num_swapped} of {num_boxes} boxes have swapped corners: is their order x, y, width, height (YOLO, COCO)?"
        split.warnings.insert(0, Problem(split.file, 0, f"{text} The order of <loc> tokens is y_min, x_min, y_max, x_max"))
    with_boxes = (example for example in split.examples if LOCATION_OR_CODE.search(example.suffix))
    answers = {(example.image, example.prefix, example.suffix) for example in with_boxes}
    num_answers = Counter((image, prefix) for image, prefix, _ in answers)
    if num_split_questions := sum(number > 1 for number in num_answers.values()):
        have = f"{counted(num_split_questions, 'question')} {'have' if num_split_questions > 1 else 'has'}"
        text = f"{have} boxes in several lines; join them into one answer with ' ; ', in the order that the model should generate"
        split.warnings.append(Problem(split.file, 0, text))
    if num_empty := sum(not example.suffix.strip() for example in split.examples):
        text = f"{num_empty} of {len(split.examples)} answers are empty; they teach the model to find nothing"
        split.warnings.append(Problem(split.file, 0, text))
    split.drop(faults)


def text_warnings(prefix: str, suffix: str) -> list[str]:
    """The warnings about a prompt and its answer, above all about the location and mask tokens of the answer."""
    tokens = dict.fromkeys(LOOKS_LIKE_LOCATION_OR_CODE.findall(suffix))
    unknown = [token for token in tokens if not LOCATION_OR_CODE.fullmatch(token)]
    more = f" (and {counted(len(unknown) - 3, 'other')} like it)" if len(unknown) > 3 else ""
    allowed = "the tokens are <loc0000> to <loc1023> and <seg000> to <seg127>"
    texts = [f"{token} is not a token{more}; {allowed}" for token in unknown[:3]]
    control = dict.fromkeys(CONTROL_TOKEN.findall(f"{prefix} {suffix}"))
    texts += [f"{token} is treated as plain text; the processor adds this token where needed, so remove it" for token in control]
    texts += ["the suffix begins or ends with white space, which would be learned"] * (suffix.strip() not in ("", suffix))
    if LOCATION_OR_CODE.search(suffix):
        texts += [WARNINGS[problem] for problem in dict.fromkeys(parse_text(suffix).problems) if problem in WARNINGS]
    return texts


# Samples of a file


def spread(total: int, count: int) -> list[int]:
    """At most `count` indices below `total`, evenly spread, including the first and the last. Nothing is random.

    The first lines of a sorted file are not representative. Every n-th line is not representative either if the file is periodic
    (picture 1: detect, caption, count; picture 2: ...). So the indices are divided into `count` ranges of equal length, and one
    index is taken from each range. Its position in the range is the fractional part of a multiple of the golden ratio.
    """
    count = min(count, total)
    starts = [total * i // count for i in range(count)] if count else []
    taken = [start + int((end - start) * (i * GOLDEN_RATIO % 1)) for i, (start, end) in enumerate(pairwise([*starts, total]))]
    return [*taken[:-1], total - 1] if count > 1 else taken


# All files of a run


def compare(train: Split, valid: Split) -> list[Problem]:
    """Warnings about two causes of misleading scores: pictures in both files, and prompts that are only in `valid`."""
    warnings = []
    train_hashes = set(train.hashes)
    lines = [example.line for example, digest in zip(valid.examples, valid.hashes, strict=True) if digest in train_hashes]
    if lines:
        text = f"{len(lines)} of {len(valid.examples)} pictures are in {train.file.name}, too (first in line {lines[0]})"
        warnings.append(Problem(valid.file, 0, f"{text}: scores will be too high"))
    known = {example.prefix.strip() for example in train.examples}
    if len(known) <= MAX_PROMPTS:
        new = dict.fromkeys(example.prefix.strip() for example in valid.examples if example.prefix.strip() not in known)
        if new:
            text = f"{len(new)} prompt{'s are' if len(new) > 1 else ' is'} not in {train.file.name}"
            warnings.append(Problem(valid.file, 0, f"{text}, such as {quote(next(iter(new)))}"))
    return warnings


def read_splits(
    paths: Sequence[str], image_dir: str | None, options: dict, processor: "PaliGemmaProcessor", max_text_tokens: int
) -> list[Split]:
    """The splits of the training file and, if there is one, of the validation file, with all faults and warnings.

    Args:
        image_dir: see read_split.
        options: arguments of load_image.
        max_text_tokens: see check_texts.
    Raises: DatasetError as read_split. All other faults are stored in the splits, for `report` and `require_usable`.
    """
    splits = [read_split(path, image_dir) for path in paths]
    for split in splits:
        split.options = options
        check_pictures(split)
        check_texts(split, processor, max_text_tokens)
    if len(splits) == 2:
        splits[1].warnings += compare(*splits)
    return splits


def report(split: Split) -> list[str]:
    """The lines that a program prints about a split: every fault, and each kind of warning once."""
    lines = [f"fault: {fault}" for fault in split.faults[:MAX_FAULTS_SHOWN]]
    if len(split.faults) > MAX_FAULTS_SHOWN:
        lines.append(f"fault: ... and {counted(len(split.faults) - MAX_FAULTS_SHOWN, 'more fault')} in {split.file}")
    counts = Counter(warning.text for warning in split.warnings)
    first_of_kind = {warning.text: warning for warning in reversed(split.warnings)}
    for text in [*counts][:MAX_WARNINGS_SHOWN]:
        more = f" (and {counted(counts[text] - 1, 'more line')} like it)" if counts[text] > 1 else ""
        lines.append(f"warning: {first_of_kind[text]}{more}")
    if len(counts) > MAX_WARNINGS_SHOWN:
        lines.append(f"warning: ... and {counted(len(counts) - MAX_WARNINGS_SHOWN, 'more kind')} in {split.file}")
    return lines


def require_usable(splits: Sequence[Split], skip_bad: bool, max_tokens: int | None = None) -> None:
    """Stops a run if a file has no usable line, or if there are faulty lines and the user has not chosen to skip them.

    Args:
        max_tokens: the number of text tokens that fit into the model's context after a picture; None if it is unknown.
    Raises: DatasetError if the run must stop.
    """
    faults = [fault for split in splits for fault in split.faults]
    if faults and not skip_bad:
        longest, num_long = max(fault.tokens for fault in faults), sum(fault.tokens > 0 for fault in faults)
        advice = []
        if longest and (max_tokens is None or longest <= max_tokens):
            advice.append(f"Lines that are too long: {num_long}. Raise the limit: --max_text_tokens {longest}.")
        elif longest:
            advice.append(f"The longest line needs {longest} tokens, but the model has room for {max_tokens}: shorten it.")
        if num_long < len(faults):
            if not any(split.examples for split in splits) and all("does not exist" in fault.text for fault in faults):
                advice.append("Name the folder that contains the pictures: --image_dir.")
            advice.append(f"Fix {'the others' if num_long else 'them'}, or continue without them: --skip_bad.")
        text = f"{counted(len(faults), 'line')} cannot be used; the first: {str(faults[0]).rstrip('.')}."
        raise DatasetError(f"{text} {' '.join(advice)}", path=faults[0].file)
    for split in splits:
        if not split.examples:
            text = f"{split.file} has no usable line. The first fault: {split.faults[0].text.rstrip('.')}."
            raise DatasetError(text, path=split.file)


# Batches


class Examples:
    """The examples of a split in the form in which the model is trained on them: resized, augmented and tokenised.

    Args:
        split: from read_splits.
        augment: "none", or "zoom" (augmentation.py), which chooses the window by the seed, the epoch and the example.
    """

    def __init__(self, split: Split, processor: "PaliGemmaProcessor", augment: str = "none", seed: int = 0):
        self.items, self.options = split.examples, split.options
        self.processor, self.augment, self.seed = processor, augment, seed

    def __getitem__(self, key: tuple[int, int]) -> tuple[Image.Image, str, str]:
        """Picture, prefix and suffix of the example (epoch, index)."""
        example = self.items[key[1]]
        picture, suffix = load_image(example.image, notes=[], **self.options), example.suffix
        if self.augment == "zoom":
            picture, suffix = zoom(picture, suffix, seed=(self.seed, *key))
        return picture, example.prefix, suffix

    def batch(self, keys: Sequence[tuple[int, int]]) -> dict:
        """What the processor returns for these examples, labels included. Each key is (epoch, index)."""
        side = self.processor.image_size
        # The pictures are resized one by one, because a batch of large photos would take gigabytes.
        resized = ((resize_to_square(picture, side), *texts) for picture, *texts in (self[key] for key in keys))
        pictures, prefixes, suffixes = zip(*resized, strict=True)
        return self.processor(list(pictures), list(prefixes), list(suffixes), notes=[])
