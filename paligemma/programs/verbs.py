"""Verbs, as in `inference.py detect street.jpg car person --save out.png`: their arguments, their flags, and the run.

A verb is a task of tasks.py. The arguments after the verb are first pictures, then the question or the names of objects.
Reading order: HELP, parse_positional and VerbFlags (both run before torch is imported), run.
Checked in tests/test_inference.py.
"""

import os
import time
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import TYPE_CHECKING

from paligemma import files
from paligemma.errors import ImageError, PaliGemmaError, UsageError, counted
from paligemma.pictures.names import is_address, looks_like_picture, split_pictures
from paligemma.programs.commandline import PROGRAMS, Positional, as_utf8, command, note, print_notes, suggestion
from paligemma.programs.options import AnswerFlags, DrawingFlags, ModelFlags, PictureFlags, SamplingFlags, find_picture
from paligemma.programs.results import OutputFlags, Query, ResultWriter, save_explanation
from paligemma.tasks import OBJECT_TASKS, REQUIRED_TEXT, TASKS, Request, check_task, in_order, prompt, split_objects, task_warning

if TYPE_CHECKING:
    from paligemma.modeling_paligemma import PaliGemmaForConditionalGeneration
    from paligemma.opened import Checkpoint
    from paligemma.pictures.folders import Loaded

ROWS = 4  # requests in one batch
OBJECT_FLAGS = ("save", "line_width", "no_labels", "plain", "font", "export", "grammar", "min_score", "denominator")
# The verbs that take a flag; a flag that is not listed here works with every verb.
VERBS_OF_FLAG = dict.fromkeys(OBJECT_FLAGS, OBJECT_TASKS) | {"mask_codec": ("segment",), "language": ("caption", "ask")}
WITHOUT_VERB = ("prompt", "image_file_path", "stream", "truncate_prompt")  # no verb takes these flags

HELP = {
    "caption": """Describes a picture in a sentence.

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
  python inference.py detect street.jpg car --grammar                  only valid boxes with one of the labels

On a terminal it prints a table. Elsewhere it prints a line for each object, separated by tabs: label, score, x_min, y_min,
x_max, y_max, in pixels of the original picture. The score is the probability that the model gives to the tokens of the box.
""",
    "segment": """Finds objects and their outlines.

  python inference.py segment cat.jpg cat --save masks.png
  python inference.py segment cat.jpg "cat ; table" --json              masks as COCO run lengths and as polygons
  python inference.py segment cat.jpg cat --mask_codec vae-oid.npz

It prints the same lines as detect. Masks need vae-oid.npz, either in the model's folder or given by --mask_codec.
""",
    "ocr": """Reads the text in a picture.

  python inference.py ocr receipt.jpg
""",
    "count": """Counts objects.

  python inference.py count street.jpg cars
  python inference.py count street.jpg "red cars ; people" --json
""",
}


# The positional arguments


def is_bare(word: str) -> bool:
    """Whether the name of a file could also be a text: it has neither a folder nor a suffix, as in "cat"."""
    return word != "-" and not is_address(word) and not set("/,.") & set(word)


def holds_picture(file: str) -> bool:
    """Whether a file begins with the bytes of a picture format."""
    from paligemma.pictures.decoding import sniff

    with suppress(PaliGemmaError, OSError):
        if files.is_file(files.expand(file)):
            with open(files.expand(file), "rb") as stream:
                return sniff(stream.read(64)) is not None
    return False


def is_further_picture(word: str, task: str) -> bool:
    """Whether an argument after the first picture is another picture.

    The name of a folder is a text. The name of a file without a suffix is a text too, unless the file holds a picture.
    """
    if not looks_like_picture(word) or os.path.isdir(files.expand(word)):
        return False
    return task not in REQUIRED_TEXT or not is_bare(word) or holds_picture(word)


def unknown_verb(word: str) -> UsageError:
    """The error for a first argument that is no verb."""
    hint = suggestion(word, [*TASKS, *PROGRAMS], dashes="")
    for program in PROGRAMS:
        hint = hint.replace(f" {program}?", f" {command(program)}?")
    if not hint and looks_like_picture(word):
        hint = f" Write a verb before the picture: {command()} caption {word}."
    return UsageError(f"{word!r} is not a verb.{hint} Verbs are {', '.join(TASKS)}; put text with spaces in quotes.")


def parse_positional(positional: tuple[str, ...]) -> Query:
    """The Query from the positional arguments. Raises: UsageError."""
    task, *rest = positional
    if task not in TASKS:
        raise unknown_verb(task)
    usage = f"{command()} {task} PICTURE{' TEXT' if task in REQUIRED_TEXT else ''}"
    if not rest:
        raise UsageError(f"{task} needs a picture: {usage}.")
    if not looks_like_picture(rest[0]):
        raise UsageError(f"{task} needs a picture first, but {rest[0]!r} is not an existing picture: {usage}.")
    count = next((i for i, word in enumerate(rest) if i and not is_further_picture(word, task)), len(rest))
    # If the task needs a text: the last argument is the text if it has no folder and no suffix, even if a file has this name.
    if count == len(rest) > 1 and task in REQUIRED_TEXT and is_bare(rest[-1]):
        count -= 1
    pictures = [name for word in rest[:count] for name in split_pictures(word)]
    if pictures.count("-") > 1:
        raise UsageError("- is given twice, but stdin can be read only once. Give it once.")
    texts = rest[count:]
    notes = [
        f"{word!r} is used as the text ({REQUIRED_TEXT[task]}), although a file has this name."
        for word in texts
        if task in REQUIRED_TEXT and is_bare(word) and os.path.isfile(files.expand(word))
    ]
    text = " ; ".join(split_objects(" ; ".join(texts))) if task in OBJECT_TASKS else " ".join(texts)
    if task in REQUIRED_TEXT and not text.replace(";", "").strip():
        listed = ", ".join(map(repr, pictures))
        taken = f"{listed} was read as a picture" if len(pictures) == 1 else f"{listed} were read as pictures"
        raise UsageError(f"{task} needs {REQUIRED_TEXT[task]} after the picture, but {taken}: {usage}.")
    check_task(task, text)
    return Query(task, tuple(pictures), tuple(split_objects(text)) if task == "count" else (text,), tuple(notes))


# The flags


@dataclass(frozen=True, kw_only=True)
class VerbFlags(ModelFlags, PictureFlags, AnswerFlags, SamplingFlags, OutputFlags, DrawingFlags):
    """All flags that a verb can take.

    Args:
        positional: the verb, the pictures, the text
    """

    positional: Positional = ()

    check_positional = staticmethod(parse_positional)

    def __post_init__(self):
        for group in (ModelFlags, PictureFlags, AnswerFlags, SamplingFlags, OutputFlags, DrawingFlags):
            group.__post_init__(self)
        given = {each.name for each in fields(self) if getattr(self, each.name) != each.default}
        if self.positional:
            self.check_verb(self.positional[0], given)
            self.check_drawing("save")
        elif early := [name for name in VERBS_OF_FLAG if name in given]:
            name, verb = early[0], VERBS_OF_FLAG[early[0]][0]
            raise UsageError(f"--{name} needs a verb. Write {command()} {verb} PICTURE ... --{name} ...")

    def check_verb(self, verb: str, given: set[str]) -> None:
        """Raises: UsageError if one of the given flags does not go with the verb."""
        for name in WITHOUT_VERB:
            if name in given:
                raise UsageError(f"--{name} and the verb {verb} exclude each other. Drop one.")
        for name, verbs in VERBS_OF_FLAG.items():
            if name in given and verb not in verbs:
                raise UsageError(f"--{name} does not go with {verb}. It goes with {' and '.join(verbs)}.")

    @cached_property
    def query(self) -> Query:
        """The Query from the positional arguments. Raises: UsageError, PromptError."""
        return parse_positional(tuple(map(as_utf8, self.positional)))

    def open(self) -> "Checkpoint":
        """Does what ModelFlags.open does, and checks that no output would overwrite a file of the model."""
        checkpoint = super().open()
        self.check_files(self.query, checkpoint.files)
        return checkpoint

    def load(self, checkpoint: "Checkpoint") -> "PaliGemmaForConditionalGeneration":
        """Does what ModelFlags.load does. With --verbose, prints how long loading took."""
        import torch

        start = time.perf_counter()
        model = super().load(checkpoint)
        if self.verbose:
            spent = time.perf_counter() - start
            note(f"loaded {checkpoint.name} in {spent:.2f} s: {model.dtype}, {model.device}, threads: {torch.get_num_threads()}")
        return model


# The run


def print_query(flags: VerbFlags, query: Query) -> None:
    """Prints notes on how the arguments were understood, and a warning if the checkpoint may not know the task."""
    print_notes(*query.notes)
    if flags.verbose:
        pictures = f"{counted(len(query.pictures), 'picture')} {', '.join(query.pictures)}"
        print_notes(f"{' '.join((query.task, ' ; '.join(query.texts))).strip()} in the {pictures}")
    if warning := task_warning(query.task, flags.kind):
        print_notes(warning)


def plain_prompt(flags: VerbFlags, query: Query) -> str | None:
    """The prompt, if there is exactly one answer and it is plain text, which can be streamed; else None."""
    if query.num_results > 1 or query.task not in ("caption", "ask", "ocr") or flags.json:
        return None
    return prompt(query.task, query.texts[0], flags.kind, flags.language)


def load_picture(name: str, flags: VerbFlags, side: int | None) -> "Loaded":
    """The picture, or its error. It is resized to `side` (the model's input), so that waiting pictures need little memory."""
    from paligemma.pictures import folders

    try:
        source = find_picture(name)
    except ImageError as error:
        return folders.Loaded(error)
    loaded = folders.load(source, side, keeps_original=bool(flags.save or flags.explain), **flags.picture_options)
    print_notes(*loaded.notes)
    return loaded


def run(flags: VerbFlags, query: Query) -> None:
    """Answers the query and writes the results. A picture that cannot be read does not stop the others.

    Raises: if there is only one result, its error; otherwise, at the end, PaliGemmaError with exit code 8 if any result is an
        error.
    """
    first = load_picture(query.pictures[0], flags, None)  # before the model is loaded, so that an error is reported early
    error = first.picture if isinstance(first.picture, PaliGemmaError) else None
    if error is not None and (query.num_results == 1 or isinstance(error, UsageError)):
        raise error
    first = replace(first, original=lambda: first.picture)  # so that the file is not read again for a drawing
    checkpoint = flags.open()
    codec = flags.load_codec(checkpoint) if query.task == "segment" else None
    if query.task == "segment" and codec is None:
        print_notes("boxes only, because vae-oid.npz, which decodes masks, is not in the model's folder; see --mask_codec.")
    sampling = flags.sampling()
    rows = min(ROWS, query.num_results)
    annotator = flags.annotator(checkpoint, flags.load(checkpoint), codec, rows, [query.task], sampling)
    writer = ResultWriter(query, flags, flags.style, {"model": checkpoint.name, "seed": sampling.seed})
    waiting: deque[Loaded] = deque()  # the pictures of the requests that have no result yet

    def requests() -> Iterator[Request]:
        for i, name in enumerate(query.pictures):
            loaded = load_picture(name, flags, checkpoint.processor.image_size) if i else first
            for text in query.texts:
                waiting.append(loaded)
                yield Request(picture=loaded.picture, task=query.task, text=text, image=name, size=loaded.size)

    explanations = iter(flags.explanations(query))
    for result in in_order(annotator.run(requests()), query.num_results):
        loaded, extra, picture = waiting.popleft(), {}, None
        explanation = next(explanations, None)
        if result.error is None and (flags.save or flags.explain):
            try:
                picture = loaded.original()
            except PaliGemmaError as error:
                result = replace(result, error=error)
        if explanation is not None and result.error is None:
            inputs = checkpoint.processor(picture, result.prompt, notes=[])
            extra = save_explanation(annotator.model, checkpoint.processor, inputs, picture, result.token_ids, explanation)
        writer.write(result, picture, extra)
    writer.close()
