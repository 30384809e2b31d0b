"""Asks a PaliGemma about many pictures, a row of JSON for each: `annotate.py photos --task detect cat --output cats.jsonl`.

The file of rows (journal.py) is all there is to a run: killed at any moment, the same command goes on where it ends, and the rows
are then those of an uninterrupted run. Rows come in the order in which answers end. Exit code 8 means that the run is
through and some rows are errors. Reading order: Flags, then program (what happens, in order).
Checked in tests/programs/test_annotate.py.
"""

import sys

if sys.version_info < (3, 10):
    sys.exit("error: Python %d.%d is too old. This program needs 3.10 or newer." % sys.version_info[:2])
if __name__ == "__main__":
    from paligemma.programs import commandline

    commandline.leave_on_signals()  # before the rest is imported, which takes a while

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING

from paligemma import files
from paligemma.errors import AccessError, ImageError, OutputError, UsageError
from paligemma.objects.exports import digest, export, path_parts
from paligemma.pictures import folders
from paligemma.programs import commandline, job
from paligemma.programs.commandline import note
from paligemma.programs.job import JobFlags, Question
from paligemma.programs.journal import Journal, key, rows
from paligemma.programs.options import DrawingFlags, require
from paligemma.tasks import task_warning

if TYPE_CHECKING:
    from PIL import Image

    from paligemma.objects.outputs import ParsedAnswer
    from paligemma.opened import Checkpoint

EXPORTS = {"coco": "_coco.json", "csv": ".csv", "voc": "_voc", "yolo": "_yolo"}  # how files and folders are named

MOST_CHECKED = 1000  # pictures that lie in --save_dir


@dataclass(frozen=True, kw_only=True)
class Flags(JobFlags, DrawingFlags):
    """Asks a PaliGemma model about many pictures and writes a row of JSON for each.

      python -m paligemma annotate photos --task detect "cat ; dog" --output pets.jsonl         a folder, with all folders in it
      python -m paligemma annotate "2024/**/*.jpg" more.png --task caption --output captions.jsonl
      python -m paligemma annotate --list names.txt --task ask "is it raining?" --output rain.jsonl
      python -m paligemma annotate photos --questions questions.jsonl --output answers.jsonl    lines {"image": .., "prefix": ..}
      python -m paligemma annotate photos --task ocr --output text.jsonl --shard 2/4      the second quarter, to text-2-of-4.jsonl

    If it is killed or interrupted, run the same command again: it resumes after the last row, and no row is lost or repeated.
    A picture that cannot be read gets a row with its error. Exit code 8: all is asked, and some rows are errors.

    Args:
        shard: i/n, which of n equal parts of the pictures to take; each has a file of its own
        save_dir: a folder for pictures with boxes and masks drawn in, under the names of their sources
        export: coco, voc, yolo or csv: when all is asked, the objects in that form too, beside the rows
    """

    shard: str | None = None
    save_dir: str | None = None
    export: str | None = None

    def __post_init__(self):
        for group in (JobFlags, DrawingFlags):
            group.__post_init__(self)
        self.check_drawing("save_dir")
        require(
            self,
            ("shard", self.shard is None or self.part, "i/n with i from 1 to n, such as 2/4,"),
            ("save_dir", self.save_dir != "", "a folder"),
            ("export", self.export in (None, *EXPORTS), "coco, voc, yolo or csv"),
        )
        for name in ("save_dir", "export"):
            if getattr(self, name) is not None and not self.has_objects:
                raise UsageError(f"--{name} means nothing to {self.chosen_task}. It goes with detect and segment.")

    @property
    def part(self) -> tuple[int, int] | None:
        """The i and the n of --shard."""
        numbers = re.fullmatch(r"(\d{1,6})/(\d{1,6})", self.shard or "")
        i, n = map(int, numbers.groups()) if numbers else (0, 0)
        return (i, n) if 1 <= i <= n else None

    @property
    def file(self) -> Path:
        """Where the rows go."""
        path = files.expand(self.output)
        return path.with_stem(f"{path.stem}-{self.part[0]}-of-{self.part[1]}") if self.part else path

    @property
    def exported(self) -> Path:
        """The file or the folder of --export, beside the rows: results_coco.json, results.csv, results_voc, results_yolo."""
        return self.file.with_name(self.file.stem.replace(".", "-") + EXPORTS[self.export])


# Questions


def without(flags: Flags) -> list[str]:
    """The folders that are not listed: drawings are no pictures to be asked about."""
    return [] if flags.save_dir is None else [str(files.expand(flags.save_dir))]


def questions(flags: Flags, kind: str) -> Iterator[Question]:
    """Those of this part."""
    for question in job.questions(flags, kind, without(flags)):
        if not flags.part or folders.shard_of(question.image, flags.part[1]) == flags.part[0]:
            yield question


# Drawings


def drawing_name(flags: Flags, row: dict) -> Path:
    """Where the drawing of a row goes: the picture's own path below --save_dir, never above it, with .png after it.

    Several questions about one picture have a drawing each.
    """
    path = files.expand(flags.save_dir).joinpath(*path_parts(row["image"]))
    question = f".{key('', row['prompt']).hex()[:8]}" if flags.questions is not None else ""
    return path.with_name(f"{path.name}{question}.png")


def make_folder(folder: Path) -> None:
    """Makes it and those above it, if they are not there. Raises: OutputError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:  # a ValueError: a NUL in the name
        reason = getattr(error, "strerror", None) or error
        raise OutputError(f"{folder} cannot be made: {reason}. Choose another --save_dir.", path=folder) from error


def make_save_dir(flags: Flags) -> None:
    """Raises: OutputError if it cannot be made or written to, UsageError if drawings would come to lie among the pictures."""
    folder = files.expand(flags.save_dir)
    make_folder(folder)
    files.check_writable(folder / "1.png")
    homes = flags.pictures or [os.path.dirname(flags.questions or "") or "."] * (flags.questions is not None)
    for word in map(files.expand, homes):
        places = [files.file_key(place) for place in (folder, folder.joinpath(*path_parts(str(word))))]
        if os.path.isdir(word) and files.file_key(word) in places:
            raise UsageError(f"--save_dir {flags.save_dir} would put drawings among the pictures. Choose another folder.")
        if os.path.isdir(word) and Path(os.path.realpath(folder)).is_relative_to(os.path.realpath(word)):
            check_drawings(flags, folder)


def check_drawings(flags: Flags, folder: Path) -> None:
    """Raises: UsageError for a folder within that of the pictures, which is passed over, with other pictures than drawings."""
    from paligemma.objects.drawing import read_mark

    for picture in islice(folders.in_folder(str(folder)), MOST_CHECKED):
        if read_mark(picture) is None:
            advice = "it would not be asked about. Choose another folder."
            raise UsageError(f"{picture} is no drawing of this program and lies in --save_dir {flags.save_dir}: {advice}")


@lru_cache(maxsize=1000)
def note_once(text: str) -> None:
    """A note that many pictures would repeat."""
    note(text)


def save_drawing(flags: Flags, row: dict, picture: "Image.Image", reading: "ParsedAnswer") -> None:
    """Draws the objects of a row into its picture. Raises: OutputError.

    Where another picture's drawing, or any other file, has its name (./1.png and 1.png; A.png and a.png on some disks), it gets
    one with a few more letters.
    """
    from paligemma.objects import drawing

    path, source = drawing_name(flags, row), f"{row['image']}\0{row['prompt']}"
    make_folder(path.parent)
    if os.path.lexists(path) and drawing.read_mark(path) != drawing.source_mark(source):
        path = path.with_name(f"{path.stem}.{digest(source)}.png")
    notes: list[str] = []
    drawing.save(drawing.draw(picture, reading.objects, flags.style, notes), path, source)
    for text in notes:
        note_once(f"note: {text}")


def check_folder(flags: Flags) -> None:
    """Raises: UsageError for a file that is read from the folder of --export; OutputError if that cannot be written."""
    folder = flags.exported
    files.check_writable(folder / "1.txt", makes_folders=True)
    for name, file in (("list", flags.list), ("questions", flags.questions)):
        if file is not None and Path(os.path.realpath(files.expand(file))).is_relative_to(os.path.realpath(folder)):
            raise UsageError(f"--{name} {file} lies in {folder}, which --export writes. Name another --output.")


# The run


def work(flags: Flags, checkpoint: "Checkpoint", journal: Journal) -> None:
    """Asks what has no row yet and writes rows as answers end."""
    known = len(journal.known)
    total = known + job.count_left(questions(flags, checkpoint.kind), journal) if job.is_watched() else None
    left = job.claim_left(questions(flags, checkpoint.kind), journal)
    first = next(left, None)
    if first is None:
        return
    annotator = job.make_annotator(flags, checkpoint)
    with commandline.interruptible(), job.progress(known, total) as bar:
        for row, loaded, result in job.answer(annotator, chain([first], left), flags, flags.save_dir is not None):
            if flags.save_dir is not None and result.parsed is not None:
                try:
                    save_drawing(flags, row, loaded.original(), result.parsed)
                except (ImageError, AccessError) as error:  # the file has changed or gone meanwhile
                    row = replace(result, error=error).to_json()
            journal.write(row)
            bar.update()


def program(flags: Flags) -> None:
    """Pictures, model, file, rows: in this order, so that what is wrong is said before the slow part."""
    commandline.relay_logs(flags.verbose)
    tables = [("--export", flags.exported)] if flags.export in ("coco", "csv") else []
    job.check_outputs(flags, flags.file, tables)
    if flags.export is not None and not tables:
        check_folder(flags)
    if flags.save_dir is not None:
        make_save_dir(flags)
    job.check_pictures(flags, without(flags))
    checkpoint = flags.open()
    job.check_outputs(flags, flags.file, tables, checkpoint.files)
    about = None if flags.questions is not None else task_warning(flags.chosen_task, checkpoint.kind)
    for text in filter(None, (about, flags.part and f"part {flags.shard} goes to {flags.file}.")):
        note(f"note: {text}")
    with job.open_rows(flags, checkpoint, flags.file) as journal:
        work(flags, checkpoint, journal)
    if flags.export is not None:
        export(rows(flags.file), flags.export, flags.exported)
        note(f"{flags.export} in {flags.exported}.")
    job.conclude(journal)


def main() -> int:
    sys.excepthook = commandline.report_bug
    return commandline.run(Flags, program)
