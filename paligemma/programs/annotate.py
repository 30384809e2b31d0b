"""Writes one JSON row per picture: `python -m paligemma annotate photos --task detect cat --output cats.jsonl`.

The output file (journal.py) holds the whole state of a run. If the run is killed, the same command resumes after the last row,
and the rows are the same as those of an uninterrupted run. Rows are written in the order in which answers finish. Exit code 8:
the run is complete and some rows are errors. Reading order: Flags, program. Checked in tests/programs/test_annotate.py.
"""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING

from paligemma import files
from paligemma.errors import AccessError, ImageError, UsageError
from paligemma.objects.exports import digest, export, path_parts
from paligemma.pictures import folders
from paligemma.programs import commandline, job
from paligemma.programs.commandline import note, print_notes
from paligemma.programs.job import JobFlags, Question
from paligemma.programs.journal import Journal, key, rows
from paligemma.programs.options import DrawingFlags, require
from paligemma.tasks import task_warning

if TYPE_CHECKING:
    from PIL import Image

    from paligemma.objects.outputs import ParsedAnswer
    from paligemma.opened import Checkpoint

EXPORTS = {"coco": "_coco.json", "csv": ".csv", "voc": "_voc", "yolo": "_yolo"}  # endings of the exported files and folders
MAX_CHECKED = 1000  # this many pictures in --save_dir are checked: each must be a drawing of this program


@dataclass(frozen=True, kw_only=True)
class Flags(JobFlags, DrawingFlags):
    """Asks a PaliGemma model about many pictures and writes one JSON row per picture.

      python -m paligemma annotate photos --task detect "cat ; dog" --output pets.jsonl         a folder and the folders in it
      python -m paligemma annotate "2024/**/*.jpg" more.png --task caption --output captions.jsonl
      python -m paligemma annotate --list names.txt --task ask "is it raining?" --output rain.jsonl
      python -m paligemma annotate photos --questions questions.jsonl --output answers.jsonl    lines {"image": .., "prefix": ..}
      python -m paligemma annotate photos --task ocr --output text.jsonl --shard 2/4      the second quarter, to text-2-of-4.jsonl

    If it is killed or interrupted, run the same command again: it resumes after the last row, and no row is lost or repeated.
    A picture that cannot be read gets a row with its error. Exit code 8: the run is complete and some rows are errors.

    Args:
        shard: i/n: take the i-th of n equal parts of the pictures; each part has its own file
        save_dir: folder for drawings of the objects, which are named after their pictures
        export: coco, voc, yolo or csv: after the last row, also write the objects in this format, next to the rows
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
                raise UsageError(f"--{name} does not go with {self.chosen_task}. It goes with detect and segment.")

    @property
    def part(self) -> tuple[int, int] | None:
        """i and n of --shard; None if --shard is missing or invalid."""
        numbers = re.fullmatch(r"(\d{1,6})/(\d{1,6})", self.shard or "")
        i, n = map(int, numbers.groups()) if numbers else (0, 0)
        return (i, n) if 1 <= i <= n else None

    @property
    def file(self) -> Path:
        """The output file."""
        path = files.expand(self.output)
        return path.with_stem(f"{path.stem}-{self.part[0]}-of-{self.part[1]}") if self.part else path

    @property
    def exported(self) -> Path:
        """The file or folder of --export, next to the rows: results_coco.json, results.csv, results_voc, results_yolo."""
        return self.file.with_name(self.file.stem.replace(".", "-") + EXPORTS[self.export])


# Questions


def excluded_folders(flags: Flags) -> list[str]:
    """The folders that are not searched for pictures: the folder of the drawings."""
    return [] if flags.save_dir is None else [str(files.expand(flags.save_dir))]


def questions(flags: Flags, kind: str) -> Iterator[Question]:
    """The questions of this shard."""
    for question in job.questions(flags, kind, excluded_folders(flags)):
        if not flags.part or folders.shard_of(question.image, flags.part[1]) == flags.part[0]:
            yield question


# Drawings


def drawing_name(flags: Flags, row: dict) -> Path:
    """The file of a row's drawing: the path of the picture, followed by .png, always inside --save_dir.

    With --questions a picture may have several rows, so a hash of the prompt is added to the name.
    """
    path = files.expand(flags.save_dir).joinpath(*path_parts(row["image"]))
    question = f".{key('', row['prompt']).hex()[:8]}" if flags.questions is not None else ""
    return path.with_name(f"{path.name}{question}.png")


def make_save_dir(flags: Flags) -> None:
    """Makes --save_dir.

    Raises: OutputError if it cannot be made or written; UsageError if drawings would be written among the pictures.
    """
    folder = files.expand(flags.save_dir)
    files.make_folder(folder, "Choose another --save_dir.")
    files.check_writable(folder / "1.png")
    picture_folders = flags.pictures
    if flags.questions is not None and not picture_folders:
        picture_folders = (os.path.dirname(flags.questions) or ".",)
    for pictures in map(files.expand, picture_folders):
        # See drawing_name: the drawing of a picture /a/b/1.jpg is written to SAVE_DIR/a/b/1.jpg.png.
        drawing_folders = [files.file_key(path) for path in (folder, folder.joinpath(*path_parts(str(pictures))))]
        if os.path.isdir(pictures) and files.file_key(pictures) in drawing_folders:
            raise UsageError(f"--save_dir {flags.save_dir} would put drawings among the pictures. Choose another folder.")
        if os.path.isdir(pictures) and Path(os.path.realpath(folder)).is_relative_to(os.path.realpath(pictures)):
            check_drawings(flags, folder)


def check_drawings(flags: Flags, folder: Path) -> None:
    """Raises: UsageError if the folder holds a picture that this program did not draw.

    --save_dir is not searched for pictures, so it would be skipped.
    """
    from paligemma.objects.drawing import read_mark

    for picture in islice(folders.in_folder(str(folder)), MAX_CHECKED):
        if read_mark(picture) is None:
            advice = "the model would not be asked about it. Choose another folder."
            raise UsageError(f"{picture} was not drawn by this program and lies in --save_dir {flags.save_dir}: {advice}")


print_note_once = lru_cache(maxsize=1000)(print_notes)  # many pictures may cause the same note


def save_drawing(flags: Flags, row: dict, picture: "Image.Image", parsed: "ParsedAnswer") -> None:
    """Draws the objects of a row into a copy of its picture. Raises: OutputError.

    If another file already has the name of the drawing, a hash is added, because two pictures may lead to the same name
    (./1.png and 1.png; A.png and a.png on some disks).
    """
    from paligemma.objects import drawing

    path, source = drawing_name(flags, row), f"{row['image']}\0{row['prompt']}"
    files.make_folder(path.parent, "Choose another --save_dir.")
    if os.path.lexists(path) and drawing.read_mark(path) != drawing.source_mark(source):
        path = path.with_name(f"{path.stem}.{digest(source)}.png")
    notes: list[str] = []
    drawing.save(drawing.draw(picture, parsed.objects, flags.style, notes), path, source)
    for text in notes:
        print_note_once(text)


def check_folder(flags: Flags) -> None:
    """Raises: UsageError if an input file lies in the folder of --export; OutputError if the folder cannot be written."""
    folder = flags.exported
    files.check_writable(folder / "1.txt", makes_folders=True)
    for name, file in (("list", flags.list), ("questions", flags.questions)):
        if file is not None and Path(os.path.realpath(files.expand(file))).is_relative_to(os.path.realpath(folder)):
            raise UsageError(f"--{name} {file} lies in {folder}, which --export writes. Name another --output.")


# The run


def work(flags: Flags, checkpoint: "Checkpoint", journal: Journal) -> None:
    """Asks the questions that have no row yet. Writes each row as soon as its answer is complete."""
    known = len(journal.known)
    total = known + job.count_unanswered(questions(flags, checkpoint.kind), journal) if job.stderr_is_terminal() else None
    left = job.claim_unanswered(questions(flags, checkpoint.kind), journal)
    first = next(left, None)
    if first is None:
        return
    annotator = job.make_annotator(flags, checkpoint)
    with commandline.interruptible(), job.progress(known, total) as bar:
        for row, loaded, result in job.answer(annotator, chain([first], left), flags, flags.save_dir is not None):
            if flags.save_dir is not None and result.parsed is not None:
                try:
                    save_drawing(flags, row, loaded.original(), result.parsed)
                except (ImageError, AccessError) as error:  # someone changed or deleted the picture meanwhile
                    row = replace(result, error=error).to_json()
            journal.write(row)
            bar.update()


def program(flags: Flags) -> None:
    """Checks the outputs, the pictures and the model, so that errors are reported early; then runs the job."""
    commandline.relay_logs(flags.verbose)
    tables = [("--export", flags.exported)] if flags.export in ("coco", "csv") else []
    job.check_outputs(flags, flags.file, tables)
    if flags.export is not None and not tables:
        check_folder(flags)
    if flags.save_dir is not None:
        make_save_dir(flags)
    job.check_pictures(flags, excluded_folders(flags))
    checkpoint = flags.open()
    job.check_outputs(flags, flags.file, tables, checkpoint.files)
    warning = None if flags.questions is not None else task_warning(flags.chosen_task, checkpoint.kind)
    print_notes(*filter(None, (warning, flags.part and f"part {flags.shard} is written to {flags.file}.")))
    with job.open_rows(flags, checkpoint, flags.file) as journal:
        work(flags, checkpoint, journal)
    if flags.export is not None:
        export(rows(flags.file), flags.export, flags.exported)
        note(f"{flags.export} in {flags.exported}.")
    job.conclude(journal)


def main() -> int:
    return commandline.run(Flags, program)
