"""`inference.py detect street.jpg car person --save out.png`: what the words mean, which flags go with them, and their help.

A verb is a task of tasks.py. The words behind it that look like pictures are pictures, the rest is the question, or names of
objects. Reading order: HELP, read_words and check_flags (all of which comes before torch is imported), Desk (what is done with
the results). Checked in tests/test_inference.py.
"""

import json
import os
import re
import sys
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from paligemma import files
from paligemma.errors import PaliGemmaError, UsageError
from paligemma.pictures.names import file_of, is_address, looks_like_picture, split_pictures
from paligemma.programs import commandline
from paligemma.programs.commandline import PROGRAMS, command, note, suggestion
from paligemma.tasks import OBJECT_TASKS, REQUIRED_TEXT, TASKS, Result, check_task, split_objects

if TYPE_CHECKING:
    from PIL import Image

    from paligemma.objects.drawing import Style

DRAWABLE = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp")
LINE_END = re.compile("[\t\n\r\v\f\x1c-\x1e\x85\u2028\u2029]")  # and what separates columns
EXPORTABLE = {".json": "coco", ".xml": "voc", ".txt": "yolo", ".csv": "csv"}
# Which verbs a flag means something to; flags that are not here go with each of them, or with none (CLASSIC).
FITS = {
    "save": OBJECT_TASKS,
    "line_width": OBJECT_TASKS,
    "no_labels": OBJECT_TASKS,
    "plain": OBJECT_TASKS,
    "font": OBJECT_TASKS,
    "export": OBJECT_TASKS,
    "grammar": OBJECT_TASKS,
    "min_score": OBJECT_TASKS,
    "denominator": OBJECT_TASKS,
    "mask_codec": ("segment",),
    "language": ("caption", "ask"),
}
CLASSIC = ("prompt", "image_file_path", "stream", "truncate_prompt")

HELP = {
    "caption": """Says in a sentence what a picture shows.

  python inference.py caption cat.jpg
  python inference.py caption cat.jpg --language fr
  python inference.py caption photos/*.jpg --json          one JSON object per line
""",
    "ask": """Answers a question about a picture.

  python inference.py ask cat.jpg "what is on the table?"
  python inference.py ask cat.jpg what is on the table
  python inference.py ask https://example.com/cat.jpg "is it raining?" --json
""",
    "detect": """Finds objects: a label, a score and a box for each.

  python inference.py detect street.jpg car person
  python inference.py detect street.jpg "traffic light ; person" --save boxes.png
  python inference.py detect street.jpg car --min_score 0.3 --json
  python inference.py detect photos/*.jpg car --export cars.json       COCO; .xml Pascal VOC, .txt YOLO, .csv a table
  python inference.py detect street.jpg car --grammar                  only whole boxes with the label asked for

On a terminal it prints a table; elsewhere a line for each object, separated by tabs: label, score, x_min, y_min, x_max, y_max
in pixels of the picture as it is. A score is the probability of the box by the model's own account.
""",
    "segment": """Finds objects and their outlines.

  python inference.py segment cat.jpg cat --save masks.png
  python inference.py segment cat.jpg "cat ; table" --json              masks as COCO run lengths and as polygons
  python inference.py segment cat.jpg cat --mask_codec vae-oid.npz

It prints what detect prints. Masks need vae-oid.npz in the model's folder, or where --mask_codec says.
""",
    "ocr": """Reads the text in a picture.

  python inference.py ocr receipt.jpg
""",
    "count": """Counts things.

  python inference.py count street.jpg cars
  python inference.py count street.jpg "red cars ; people" --json
""",
}


@dataclass(frozen=True)
class Job:
    """What the words ask for: each of the texts about each of the pictures.

    Args:
        task: the verb.
        pictures: names.
        texts: questions, or objects with " ; " between them; one empty text where the task needs none.
        notes: which words could have been taken for something else.
    """

    task: str
    pictures: tuple[str, ...]
    texts: tuple[str, ...]
    notes: tuple[str, ...] = ()

    @property
    def is_single(self) -> bool:
        return len(self.pictures) == len(self.texts) == 1


def read_words(words: tuple[str, ...]) -> Job:
    """The words behind the program's name, understood. Raises: UsageError."""
    task, *rest = words
    if task not in TASKS:
        close = suggestion(task, [*TASKS, *PROGRAMS], dashes="")
        for program in PROGRAMS:
            close = close.replace(f" {program}?", f" {command(program)}?")
        if not close and looks_like_picture(task):
            close = f" Write one before the picture: {command()} caption {task}."
        raise UsageError(
            f"{task!r} belongs to no flag and is no verb.{close} Verbs are {', '.join(TASKS)}; put text with spaces in quotes."
        )
    rule = f"{command()} {task} PICTURE{' TEXT' if task in REQUIRED_TEXT else ''}"
    if not rest:
        raise UsageError(f"{task} needs a picture: {rule}.")
    if not looks_like_picture(rest[0]):
        raise UsageError(f"{task} needs a picture first, and {rest[0]!r} is none that is there: {rule}.")
    count = next((i for i, word in enumerate(rest) if i and not is_further_picture(word, task)), len(rest))
    # A file named "cat" must not be taken for a second picture where a text is needed.
    if count == len(rest) > 1 and task in REQUIRED_TEXT and is_bare(rest[-1]):
        count -= 1
    pictures = [name for word in rest[:count] for name in split_pictures(word)]
    if pictures.count("-") > 1:
        raise UsageError("- stands twice, but stdin can be read only once. Give it once.")
    said = rest[count:]
    notes = [
        f"{word!r} is taken for {REQUIRED_TEXT[task]}, not for the file of that name."
        for word in said
        if task in REQUIRED_TEXT and is_bare(word) and os.path.isfile(files.expand(word))
    ]
    text = " ; ".join(split_objects(" ; ".join(said))) if task in OBJECT_TASKS else " ".join(said)
    if task in REQUIRED_TEXT and not text.replace(";", "").strip():
        listed = ", ".join(map(repr, pictures))
        taken = f"{listed} is taken for a picture" if len(pictures) == 1 else f"{listed} are taken for pictures"
        raise UsageError(f"{task} needs {REQUIRED_TEXT[task]}, and {taken}. Put it after the picture: {rule}.")
    check_task(task, text)
    return Job(task, tuple(pictures), tuple(split_objects(text)) if task == "count" else (text,), tuple(notes))


def is_further_picture(word: str, task: str) -> bool:
    """Whether a word after the first picture is one, too. The name of a folder may be what is looked for, and so may that of
    any file without an ending, unless a picture is in it."""
    if not looks_like_picture(word) or os.path.isdir(files.expand(word)):
        return False
    return task not in REQUIRED_TEXT or not is_bare(word) or holds_picture(word)


def holds_picture(file: str) -> bool:
    """Whether a file begins like a picture."""
    from paligemma.pictures.decoding import sniff

    with suppress(PaliGemmaError, OSError):
        if files.is_file(files.expand(file)):
            with open(files.expand(file), "rb") as stream:
                return sniff(stream.read(64)) is not None
    return False


def is_bare(word: str) -> bool:
    """Whether a word that is a file's name could as well be a text: it has no folder and no ending in it."""
    return word != "-" and not is_address(word) and not set("/,.") & set(word)


@dataclass(frozen=True)
class Outputs:
    """The files that a job writes.

    Args:
        save: a drawing of each picture.
        explain: a drawing of each answer.
        export: one file, or one for each picture and what goes with them.
    """

    save: tuple[str, ...] = ()
    explain: tuple[str, ...] = ()
    export: tuple[str, ...] = ()


def save_names(file: str, count: int) -> tuple[str, ...]:
    """Where the drawings go: the file itself, or, of several pictures, out-1.png, out-2.png and so on."""
    file = str(files.expand(file))
    if count == 1:
        return (file,)
    stem, suffix = os.path.splitext(file)
    return tuple(f"{stem}-{i + 1}{suffix}" for i in range(count))


def outputs(job: Job, save: str | None, export: str | None, explain: str | None) -> Outputs:
    """What the flags of those names mean to a job. Raises: UsageError for a name with another ending."""
    for name, file, endings in (("save", save, DRAWABLE), ("export", export, EXPORTABLE), ("explain", explain, DRAWABLE)):
        if file is not None and os.path.splitext(file)[1].lower() not in endings:  # ".png" is a name without an ending
            raise UsageError(f"--{name} is {file!r}, but a name that ends in {', '.join(endings)} is needed.")
    exported: list[Path] = []
    if export is not None:
        from paligemma.objects.exports import files_of

        kind = EXPORTABLE[os.path.splitext(export)[1].lower()]
        exported = files_of(kind, files.expand(export), dict.fromkeys(job.pictures))
    return Outputs(
        save_names(save, len(job.pictures)) if save is not None else (),
        save_names(explain, len(job.pictures) * len(job.texts)) if explain is not None else (),
        tuple(map(str, exported)),
    )


def check_outputs(job: Job, written: Outputs, others: Iterable[tuple[str, str | Path]] = ()) -> None:
    """Makes sure that no file that a job writes is another one, or one that it reads.

    Args:
        others: what else it reads: what it is ("the mask codec"), and its path.
    Raises: UsageError; OutputError for a file that could not be written later.
    """
    single = [("--save", file) for file in written.save] + [("--explain", file) for file in written.explain]
    exported = [("--export", Path(file)) for file in written.export]
    read = [("the picture", file) for file in map(file_of, job.pictures) if file is not None]
    read += [(what, files.expand(file)) for what, file in others]
    if len(exported) == 1:
        single += exported
        exported = []
    files.check_outputs([(flag, Path(file)) for flag, file in single], read, exported)
    for flag, names in (("save", written.save), ("explain", written.explain)):
        for file in names if len(names) > 1 else ():
            check_derived(flag, file)


def check_derived(flag: str, file: str) -> None:
    """Raises: UsageError for a name that was made of another and is there already, unless a drawing of this program has it."""
    if os.path.lexists(file) and not file.lower().endswith(".bmp"):  # which has no room for a mark
        from paligemma.objects.drawing import read_mark

        if read_mark(file) is None:
            raise UsageError(f"--{flag} would overwrite {file}, which is no drawing of this program. Give another name.")


def check_flags(job: Job, given: set[str]) -> None:
    """Raises: UsageError for a flag that means nothing to the verb."""
    for name in CLASSIC:
        if name in given:
            raise UsageError(f"--{name} and the verb {job.task} exclude each other. Drop one.")
    for name, verbs in FITS.items():
        if name in given and job.task not in verbs:
            raise UsageError(f"--{name} means nothing to {job.task}. It goes with {' and '.join(verbs)}.")


# Results


class ResultWishes(Protocol):
    """The flags that say where results go."""

    json: bool
    style: "Style"
    save: str | None
    export: str | None


def is_fancy() -> bool:
    """Whether stdout is a terminal that shows bars."""
    return sys.stdout.isatty() and (sys.stdout.encoding or "").lower().startswith("utf")


def has_colors() -> bool:
    """Whether that terminal wants colours (no-color.org)."""
    return not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def with_polygons(result: Result) -> dict:
    """The result's JSON, with each mask as polygons, too: x, y, x, y, ... in pixels."""
    row = result.to_json()
    masks = [found.mask for found in result.parsed.objects] if result.parsed else []
    if any(mask is not None for mask in masks):
        from paligemma.objects.masks import to_polygons

        for found, mask in zip(row["objects"], masks, strict=True):
            if mask is not None:
                found["polygons"] = to_polygons(mask)
    return row


class Desk:
    """Puts results where the flags want them: on stdout, into drawings, into a file of annotations.

    Args:
        job: what was asked.
        flags: where results go.
        extra: goes into each JSON object.
    """

    def __init__(self, job: Job, flags: ResultWishes, extra: dict):
        self.job = job
        self.flags = flags
        self.extra = extra
        self.rows: list[dict] = []
        self.drawings = iter(save_names(flags.save, len(job.pictures)) if flags.save else ())
        self.num_failed = 0

    def take(self, result: Result, picture: "Image.Image | None", more: dict | None = None) -> None:
        """Deals with one result; `picture` is what is drawn on, `more` goes into its JSON. Raises: the error of the only one."""
        drawing = next(self.drawings, None)
        if result.error is not None:
            if self.job.is_single:
                raise result.error
            self.num_failed += 1
            note(f"error: {result.error.message}")
        if self.flags.json:
            commandline.write(json.dumps(with_polygons(result) | self.extra | (more or {})) + "\n")
        elif result.error is None:
            self.say(result)
        if result.error is not None:
            return
        if self.flags.export:
            self.rows.append(result.to_json())
        if drawing is not None:
            from paligemma.objects.drawing import draw, save

            notes: list[str] = []
            save(draw(picture, result.parsed.objects, self.flags.style, notes), drawing)
            for text in (*notes, f"the drawing is in {drawing}."):
                note(f"note: {text}")

    def say(self, result: Result) -> None:
        """Text for people, or a line for each thing found for programs, behind what tells the results apart."""
        several = [self.job.pictures, self.job.texts]
        parts = zip((result.image, result.asked), several, strict=True)
        head = [LINE_END.sub(" ", name) for name, values in parts if len(values) > 1]
        if result.parsed is None or self.job.task not in OBJECT_TASKS:
            said = result.text if result.count is None else str(result.count)
            commandline.write("\t".join([*head, " ".join(said.split()) if head else said]) + "\n")
            return
        if result.parsed.status == "nothing":
            note(f"note: nothing found in {result.image}.")
        elif result.parsed.status == "unparsable":
            note(f"note: the answer about {result.image} holds no box: {result.text!r}.")
        from paligemma.objects.tables import listing, table

        if is_fancy():
            title = f"{commandline.printable(result.image)}\n" if head else ""
            commandline.put(title + table(result.parsed.objects, result.width, result.height, has_colors()))
        else:
            lines = listing(result.parsed.objects, result.width, result.height).splitlines(keepends=True)
            commandline.write("".join("\t".join([*head, line]) for line in lines))

    def close(self) -> None:
        """What is left to do after the last result. Raises: OutputError; PaliGemmaError with code 8 when results failed."""
        if self.flags.export:
            from paligemma.objects.exports import export

            kind = EXPORTABLE[os.path.splitext(self.flags.export)[1].lower()]
            written = export(self.rows, kind, files.expand(self.flags.export), self.job.pictures)
            note(f"note: {kind} is in {', '.join(map(str, written[:3]))}{' and so on' if len(written) > 3 else ''}.")
        if self.num_failed:
            count = len(self.job.pictures) * len(self.job.texts)
            raise PaliGemmaError(f"{self.num_failed} of {count} answers failed; the others are there.", code=8)
