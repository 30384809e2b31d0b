"""Writes results: text or JSON on stdout, drawings, annotation files. The files are checked before the model runs.

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
from paligemma.pictures.names import DRAWABLE, file_of
from paligemma.programs import commandline
from paligemma.programs.commandline import note, print_notes
from paligemma.tasks import OBJECT_TASKS, Result

if TYPE_CHECKING:
    from PIL import Image

    from paligemma.modeling_paligemma import PaliGemmaForConditionalGeneration
    from paligemma.objects.drawing import Style
    from paligemma.processing_paligemma import PaliGemmaProcessor

EXPORTABLE = {".json": "coco", ".xml": "voc", ".txt": "yolo", ".csv": "csv"}
SEPARATOR = re.compile("[\t\n\r\v\f\x1c-\x1e\x85\u2028\u2029]")  # line ends, and the tab between columns


@dataclass(frozen=True)
class Query:
    """A task: each text is asked about each picture.

    Args:
        task: the verb, or "prompt".
        pictures: the names of the pictures.
        texts: questions, or objects separated by " ; "; one empty text if the task takes no text.
        notes: notes about arguments that could also be file names.
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
        save: draw the objects into a copy of the picture, out.png; for several pictures out-1.png, out-2.png
        explain: draw what each word of the answer depends on, out.png; for several answers out-1.png, out-2.png
        export: write the objects as COCO (.json), Pascal VOC (.xml), YOLO (.txt) or a table (.csv)
        verbose: also print how long each part took, and the shortest time that this machine could need
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
        """The files of --save, one per picture."""
        return numbered(self.save, len(query.pictures))

    def explanations(self, query: Query) -> tuple[str, ...]:
        """The files of --explain, one per result."""
        return numbered(self.explain, query.num_results)

    def check_files(self, query: Query, inputs: Iterable[tuple[str, str | Path]] = ()) -> None:
        """Checks that the output files can be written, are different files, and are not input files.

        Args:
            inputs: the input files other than the pictures, as pairs (description, path).
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
        files_in_new_folders = [("--export", file) for file in exported]
        if len(exported) == 1:  # no new folder is made for a single file, so its folder must exist
            outputs, files_in_new_folders = outputs + files_in_new_folders, []
        files.check_outputs(outputs, read, files_in_new_folders)
        for flag, names in drawn:
            for name in names if len(names) > 1 else ():
                check_numbered(flag, name)


def suffix_of(file: str) -> str:
    """The suffix in lower case. The name ".png" has no suffix."""
    return os.path.splitext(file)[1].lower()


def numbered(file: str | None, count: int) -> tuple[str, ...]:
    """The names of `count` files: `file` itself if count is 1, otherwise out-1.png, out-2.png and so on."""
    if file is None:
        return ()
    file = str(files.expand(file))
    stem, suffix = os.path.splitext(file)
    return (file,) if count == 1 else tuple(f"{stem}-{i + 1}{suffix}" for i in range(count))


def check_numbered(flag: str, file: str) -> None:
    """Refuses to overwrite a numbered file that this program did not draw, because the user did not type its name.

    Raises: UsageError.
    """
    if os.path.lexists(file) and not file.lower().endswith(".bmp"):  # BMP has no metadata that could name this program
        from paligemma.objects.drawing import read_mark

        if read_mark(file) is None:
            raise UsageError(f"--{flag} would overwrite {file}, which this program did not draw. Give another name.")


# Results


def with_polygons(result: Result) -> dict:
    """The JSON of the result. Objects with a mask also get polygons, the outline of the mask: x, y, x, y, ... in pixels."""
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
    """Saves a drawing of what each word of an answer depends on. Returns: {"explanation": ...} for the JSON of the answer."""
    from paligemma.explanation import explain
    from paligemma.explanation_sheet import draw_explanation
    from paligemma.objects.drawing import save

    with machine.memory_errors("explaining the answer"):
        explanation = explain(model, processor, inputs, token_ids)
    save(draw_explanation(picture, explanation), file)
    print_notes(*explanation.notes, *filter(None, [explanation.warning]), f"the explanation is in {file}.")
    return {"explanation": explanation.to_json()}


class ResultWriter:
    """Prints and draws each result, and at the end writes an annotation file with all results, as the flags ask.

    Args:
        query: the task, the pictures and the texts.
        flags: where results go.
        style: the style of the drawings.
        common: added to each JSON object.
    """

    def __init__(self, query: Query, flags: OutputFlags, style: "Style", common: dict):
        self.query, self.flags, self.style, self.common = query, flags, style, common
        self.rows: list[dict] = []
        self.drawings = iter(flags.drawings(query))
        self.num_failed = 0

    def write(self, result: Result, picture: "Image.Image | None", extra: dict | None = None) -> None:
        """Prints and draws one result. Raises: the error of the result, if the query has only one result.

        Args:
            picture: the picture; the objects are drawn into a copy of it.
            extra: added to the JSON object of this result.
        """
        drawing = next(self.drawings, None)
        if result.error is not None:
            if self.query.num_results == 1:
                raise result.error
            self.num_failed += 1
            note(f"error: {result.error.message}")
        if self.flags.json:
            commandline.write(json.dumps(with_polygons(result) | self.common | (extra or {})) + "\n")
        elif result.error is None:
            self.print_result(result)
        if result.error is not None:
            return
        if self.flags.export:
            self.rows.append(result.to_json())
        if drawing is not None:
            from paligemma.objects.drawing import draw, save

            notes: list[str] = []
            save(draw(picture, result.parsed.objects, self.style, notes), drawing)
            print_notes(*notes, f"the drawing is in {drawing}.")

    def print_result(self, result: Result) -> None:
        """Prints text; or the objects, as a table on a terminal and as one line per object elsewhere.

        If there are several pictures or texts, each line begins with the picture or the text, followed by a tab.
        """
        parts = zip((result.image, result.asked), (self.query.pictures, self.query.texts), strict=True)
        head = [SEPARATOR.sub(" ", name) for name, values in parts if len(values) > 1]
        if result.parsed is None or self.query.task not in OBJECT_TASKS:
            text = result.text if result.count is None else str(result.count)
            commandline.write("\t".join([*head, " ".join(text.split()) if head else text]) + "\n")
            return
        if result.parsed.status == "nothing":
            print_notes(f"nothing found in {result.image}.")
        elif result.parsed.status == "unparsable":
            print_notes(f"the answer about {result.image} holds no box: {result.text!r}.")
        from paligemma.objects.tables import listing, table

        if sys.stdout.isatty() and (sys.stdout.encoding or "").lower().startswith("utf"):
            # This terminal can show the block characters of the score bars.
            title = f"{commandline.printable(result.image)}\n" if head else ""
            has_colors = not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"  # see no-color.org
            commandline.write_raw(title + table(result.parsed.objects, result.width, result.height, has_colors))
        else:
            lines = listing(result.parsed.objects, result.width, result.height).splitlines(keepends=True)
            commandline.write("".join("\t".join([*head, line]) for line in lines))

    def close(self) -> None:
        """Writes the annotation file. Raises: OutputError; PaliGemmaError with exit code 8 if some results are errors."""
        if self.flags.export:
            from paligemma.objects.exports import export

            kind = self.flags.export_format
            written = export(self.rows, kind, files.expand(self.flags.export), self.query.pictures)
            print_notes(f"{kind} is in {', '.join(map(str, written[:3]))}{' and so on' if len(written) > 3 else ''}.")
        if self.num_failed:
            failed = f"{self.num_failed} of {self.query.num_results} answers failed"
            raise PaliGemmaError(f"{failed}; the others were written.", code=8)
