"""Where results go: text or JSON on stdout, drawings, files of annotations. The files are checked before the model runs.

Checked in tests/test_inference.py.
"""

import json
import os
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from paligemma import files, machine
from paligemma.errors import PaliGemmaError, UsageError
from paligemma.pictures.names import file_of
from paligemma.programs import commandline
from paligemma.programs.commandline import note, print_notes
from paligemma.tasks import OBJECT_TASKS, Result

if TYPE_CHECKING:
    from PIL import Image

    from paligemma.modeling_paligemma import PaliGemmaForConditionalGeneration
    from paligemma.objects.drawing import Style
    from paligemma.processing_paligemma import PaliGemmaProcessor

DRAWABLE = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp")
EXPORTABLE = {".json": "coco", ".xml": "voc", ".txt": "yolo", ".csv": "csv"}
LINE_END = re.compile("[\t\n\r\v\f\x1c-\x1e\x85\u2028\u2029]")  # line ends, and the tab, which separates columns


@dataclass(frozen=True)
class Query:
    """What is asked: each text about each picture.

    Args:
        task: the verb, or "prompt".
        pictures: their names.
        texts: questions, or objects separated by " ; "; one empty text if the task needs none.
        notes: remarks on words that have a second meaning.
    """

    task: str
    pictures: tuple[str, ...]
    texts: tuple[str, ...] = ("",)
    notes: tuple[str, ...] = ()

    @property
    def num_results(self) -> int:
        return len(self.pictures) * len(self.texts)


@dataclass(frozen=True, kw_only=True)
class OutputFlags:
    """What is printed, and which files are written.

    Args:
        json: print one JSON object per answer instead of text
        save: draw the objects into a copy of the picture: out.png; for several pictures out-1.png, out-2.png
        explain: draw what each word of the answer depends on: out.png; for several answers out-1.png, out-2.png
        export: write the objects as COCO (.json), Pascal VOC (.xml), YOLO (.txt) or a table (.csv)
        verbose: also print how long each part took, and how fast this machine could be at best
        debug: print the traceback of an error
    """

    json: bool = False
    save: str | None = None
    explain: str | None = None
    export: str | None = None
    verbose: bool = False
    debug: bool = False

    def __post_init__(self):
        for name, endings in (("save", DRAWABLE), ("export", EXPORTABLE), ("explain", DRAWABLE)):
            file = getattr(self, name)
            if file is not None and suffix_of(file) not in endings:
                raise UsageError(f"--{name} is {file!r}, but a name that ends in {', '.join(endings)} is needed.")

    @property
    def export_format(self) -> str | None:
        """coco, voc, yolo or csv."""
        return None if self.export is None else EXPORTABLE[suffix_of(self.export)]

    def drawings(self, query: Query) -> tuple[str, ...]:
        """The files of --save, one for each picture."""
        return numbered(self.save, len(query.pictures))

    def explanations(self, query: Query) -> tuple[str, ...]:
        """The files of --explain, one for each result."""
        return numbered(self.explain, query.num_results)

    def check_files(self, query: Query, inputs: Iterable[tuple[str, str | Path]] = ()) -> None:
        """Checks that the files to be written can be written, are different files, and are not files that are read.

        Args:
            inputs: the files that are read besides the pictures, as files.check_outputs takes them.
        Raises: UsageError, OutputError.
        """
        drawn = [("save", self.drawings(query)), ("explain", self.explanations(query))]
        outputs = [(f"--{flag}", Path(name)) for flag, names in drawn for name in names]
        exported: list[Path] = []
        if self.export is not None:
            from paligemma.objects.exports import files_of

            exported = files_of(self.export_format, files.expand(self.export), dict.fromkeys(query.pictures))
        read = [("the picture", file) for file in map(file_of, query.pictures) if file is not None]
        read += [(what, files.expand(file)) for what, file in inputs]
        new = [("--export", file) for file in exported]
        if len(new) == 1:  # a single file; the folder above it must exist
            outputs, new = outputs + new, []
        files.check_outputs(outputs, read, new)
        for flag, names in drawn:
            for name in names if len(names) > 1 else ():
                check_numbered(flag, name)


def suffix_of(file: str) -> str:
    """The suffix in small letters; ".png" has none."""
    return os.path.splitext(file)[1].lower()


def numbered(file: str | None, count: int) -> tuple[str, ...]:
    """The names of `count` files: the name itself for one file, out-1.png, out-2.png and so on for several."""
    if file is None:
        return ()
    file = str(files.expand(file))
    stem, suffix = os.path.splitext(file)
    return (file,) if count == 1 else tuple(f"{stem}-{i + 1}{suffix}" for i in range(count))


def check_numbered(flag: str, file: str) -> None:
    """Raises: UsageError if a numbered file exists that this program did not draw, since the user did not type its name."""
    if os.path.lexists(file) and not file.lower().endswith(".bmp"):  # BMP has no metadata that could hold our mark
        from paligemma.objects.drawing import read_mark

        if read_mark(file) is None:
            raise UsageError(f"--{flag} would overwrite {file}, which this program did not draw. Give another name.")


# The results


def with_polygons(result: Result) -> dict:
    """The result's JSON; objects with a mask also get its outline as polygons: x, y, x, y, ... in pixels."""
    row = result.to_json()
    masks = [found.mask for found in result.parsed.objects] if result.parsed else []
    if any(mask is not None for mask in masks):
        from paligemma.objects.masks import to_polygons

        for found, mask in zip(row["objects"], masks, strict=True):
            if mask is not None:
                found["polygons"] = to_polygons(mask)
    return row


def save_explanation(
    model: "PaliGemmaForConditionalGeneration", processor: "PaliGemmaProcessor", inputs: dict, picture: "Image.Image",
    token_ids: list[int], file: str,
) -> dict:  # fmt: skip
    """Draws what each word of an answer depends on into a file. Returns: {"explanation": ...}, a part of the answer's JSON."""
    from paligemma.explanation import explain
    from paligemma.explanation_sheet import draw_explanation
    from paligemma.objects.drawing import save

    with machine.memory_errors("explaining the answer"):
        explanation = explain(model, processor, inputs, token_ids)
    save(draw_explanation(picture, explanation), file)
    print_notes(*explanation.notes, *filter(None, [explanation.warning]), f"the explanation is in {file}.")
    return {"explanation": explanation.to_json()}


class ResultWriter:
    """Prints each result, draws it, and at the end writes all of them into a file of annotations, as the flags ask for.

    Args:
        query: what was asked.
        flags: where results go.
        style: of the drawings.
        extra: is added to each JSON object.
    """

    def __init__(self, query: Query, flags: OutputFlags, style: "Style", extra: dict):
        self.query, self.flags, self.style, self.extra = query, flags, style, extra
        self.rows: list[dict] = []
        self.drawings = iter(flags.drawings(query))
        self.num_failed = 0

    def write(self, result: Result, picture: "Image.Image | None", more: dict | None = None) -> None:
        """Prints one result and draws it. Raises: its error, if it is the only result.

        Args:
            picture: the objects are drawn into a copy of it.
            more: is added to the JSON of this result.
        """
        drawing = next(self.drawings, None)
        if result.error is not None:
            if self.query.num_results == 1:
                raise result.error
            self.num_failed += 1
            note(f"error: {result.error.message}")
        if self.flags.json:
            commandline.write(json.dumps(with_polygons(result) | self.extra | (more or {})) + "\n")
        elif result.error is None:
            self.print(result)
        if result.error is not None:
            return
        if self.flags.export:
            self.rows.append(result.to_json())
        if drawing is not None:
            from paligemma.objects.drawing import draw, save

            notes: list[str] = []
            save(draw(picture, result.parsed.objects, self.style, notes), drawing)
            print_notes(*notes, f"the drawing is in {drawing}.")

    def print(self, result: Result) -> None:
        """Prints text, or a table of objects on a terminal and one line per object elsewhere.

        If there are several pictures or several texts, their names come first in each line, separated by tabs.
        """
        several = [self.query.pictures, self.query.texts]
        parts = zip((result.image, result.asked), several, strict=True)
        head = [LINE_END.sub(" ", name) for name, values in parts if len(values) > 1]
        if result.parsed is None or self.query.task not in OBJECT_TASKS:
            text = result.text if result.count is None else str(result.count)
            commandline.write("\t".join([*head, " ".join(text.split()) if head else text]) + "\n")
            return
        if result.parsed.status == "nothing":
            print_notes(f"nothing found in {result.image}.")
        elif result.parsed.status == "unparsable":
            print_notes(f"the answer about {result.image} holds no box: {result.text!r}.")
        from paligemma.objects.tables import listing, table

        if sys.stdout.isatty() and (sys.stdout.encoding or "").lower().startswith("utf"):  # it can show the characters of bars
            title = f"{commandline.printable(result.image)}\n" if head else ""
            has_colors = not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"  # see no-color.org
            commandline.put(title + table(result.parsed.objects, result.width, result.height, has_colors))
        else:
            lines = listing(result.parsed.objects, result.width, result.height).splitlines(keepends=True)
            commandline.write("".join("\t".join([*head, line]) for line in lines))

    def close(self) -> None:
        """Writes the file of annotations. Raises: OutputError; PaliGemmaError with exit code 8 if some results are errors."""
        if self.flags.export:
            from paligemma.objects.exports import export

            kind = self.flags.export_format
            written = export(self.rows, kind, files.expand(self.flags.export), self.query.pictures)
            print_notes(f"{kind} is in {', '.join(map(str, written[:3]))}{' and so on' if len(written) > 3 else ''}.")
        if self.num_failed:
            raise PaliGemmaError(f"{self.num_failed} of {self.query.num_results} answers failed; the others are there.", code=8)
