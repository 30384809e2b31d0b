"""A job on many pictures: its flags, questions, settings and rows.

annotate.py runs a job on this machine, cluster.py on many machines. Both make rows with `answer`, so the rows are the same.
torch is imported only when a job runs. Checked in tests/programs/test_annotate.py.
"""

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from paligemma import files, machine
from paligemma.errors import ImageError, PaliGemmaError, UsageError, counted
from paligemma.pictures import folders
from paligemma.pictures.names import PICTURE_SUFFIXES, file_of, is_address, looks_like_picture
from paligemma.programs.commandline import Interrupted, Positional, note
from paligemma.programs.journal import PART, Journal
from paligemma.programs.options import AnswerFlags, ModelFlags, PictureFlags, require
from paligemma.tasks import OBJECT_TASKS, REQUIRED_TEXT, TASKS, Annotator, Request, Result, check_task, prompt

if TYPE_CHECKING:
    from tqdm import tqdm

    from paligemma.opened import Checkpoint

READERS = 8  # maximum number of threads that decode pictures; half as many are enough to keep most GPUs busy


@dataclass(frozen=True, kw_only=True)
class JobFlags(ModelFlags, PictureFlags, AnswerFlags):
    """What is asked, about which pictures, and where the rows go.

    Args:
        positional: the pictures (folders, files, patterns, addresses), then the text
        task: caption, ask, detect, segment, ocr or count
        text: the question, or the objects separated by semicolons; it may also be the last argument
        list: a file with one name of a picture per line
        questions: a JSONL file of lines {"image": "a.jpg", "prefix": "detect cat"}; each prefix is used unchanged
        output: the JSONL file for the rows; the same command resumes after its last row
        rows: number of pictures in one batch; a larger batch is faster, mainly on a GPU, and needs more memory
        retry_failed: ask again about each picture whose row is an error
        force: continue an output file that was begun with other settings
        verbose: print more notes
        debug: print the traceback of an error
    """

    positional: Positional = ()
    task: str | None = None
    text: str | None = None
    list: str | None = None
    questions: str | None = None
    output: str | None = None
    rows: int = 16
    retry_failed: bool = False
    force: bool = False
    verbose: bool = False
    debug: bool = False

    def __post_init__(self):
        for group in (ModelFlags, PictureFlags, AnswerFlags):
            group.__post_init__(self)
        require(
            self,
            ("rows", self.rows >= 1, "a whole number from 1 up"),
            ("list", self.list != "", "a file"),
            ("questions", self.questions != "", "a file"),
            ("output", files.expand(self.output or "").name, "a file for the rows, such as results.jsonl,"),
        )
        if self.questions is not None:
            for name in ("task", "text", "list"):
                if getattr(self, name) is not None:
                    raise UsageError(f"--questions has its own pictures and prompts. Drop --{name}.")
            if len(self.positional) > 1 or not all(os.path.isdir(files.expand(word)) for word in self.positional):
                raise UsageError("--questions takes at most one argument, the folder of its pictures. Drop the others.")
        else:
            check_task(self.chosen_task, self.text_asked)
            if not self.pictures and self.list is None:
                raise UsageError("no picture is given. Give a folder, a file or a pattern, or --list or --questions.")

    @property
    def chosen_task(self) -> str:
        return self.task or "caption"

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks that may be asked."""
        return (self.chosen_task,) if self.questions is None else TASKS

    @property
    def has_text_argument(self) -> bool:
        is_needed = self.questions is None and self.chosen_task in REQUIRED_TEXT and self.text is None
        if not is_needed or not self.positional:
            return False
        # A last argument such as "cat" is the text, even if a folder has this name.
        could_be_text = len(self.positional) > 1 and not set("/,.") & set(self.positional[-1])
        return could_be_text or not looks_like_picture(self.positional[-1])

    @property
    def text_asked(self) -> str:
        return self.positional[-1] if self.has_text_argument else self.text or ""

    @property
    def pictures(self) -> tuple[str, ...]:
        return self.positional[:-1] if self.has_text_argument else self.positional

    @property
    def has_objects(self) -> bool:
        """Whether answers may contain objects, which can be drawn and exported."""
        return self.questions is not None or self.chosen_task in OBJECT_TASKS


# Questions


@dataclass(frozen=True)
class Question:
    """A question about one picture. Image and prompt identify the row of the answer.

    Args:
        image: the name of the picture as the user gave it.
        location: the path or address of the picture.
        task, text: decide how the answer is parsed, see tasks.Request.
        is_typed: True if the user typed the name or its folder, False if the name is from a list or a JSONL file.
    """

    image: str
    location: str
    prompt: str
    task: str
    text: str
    is_typed: bool = False


def read_prompt(prefix: str) -> tuple[str, str]:
    """The task and the text of a prompt from --questions; they decide how the answer is parsed."""
    word, _, rest = prefix.strip().partition(" ")
    if word in OBJECT_TASKS and rest:
        return word, rest
    return ("ocr", "") if prefix.strip() == "ocr" else ("caption", "") if word == "caption" else ("ask", prefix)


def images(flags: JobFlags, without: Iterable[str] = ()) -> Iterator[tuple[str, bool]]:
    """The name of each picture, and whether the user typed it. A picture that is named twice is listed twice.

    Args:
        without: folders that are not searched, such as the folder of the drawings.
    """
    seen = [folders.identity(folder) for folder in without if os.path.isdir(folder)]
    for word in flags.pictures:
        yield from ((name, True) for name in folders.expand(word, seen))
    if flags.list is not None:
        yield from ((name, False) for name in folders.in_list(flags.list, seen))


def questions(flags: JobFlags, kind: str, without: Iterable[str] = ()) -> Iterator[Question]:
    """The questions, in the order in which the pictures are listed.

    Args:
        kind: what the checkpoint was trained for, as tasks.checkpoint_kind returns it.
        without: see images.
    """
    if flags.questions is not None:
        folder = files.expand(flags.positional[0]) if flags.positional else files.expand(flags.questions).parent
        for image, prefix in folders.questions(flags.questions):
            location = image if is_address(image) else os.path.join(folder, image)
            yield Question(image, location, prefix, *read_prompt(prefix))
        return
    prompt_text = prompt(flags.chosen_task, flags.text_asked, kind, flags.language)
    for image, is_typed in images(flags, without):
        yield Question(image, image, prompt_text, flags.chosen_task, flags.text_asked, is_typed)


def check_pictures(flags: JobFlags, without: Iterable[str] = ()) -> None:
    """Runs the checks that do not read a picture.

    Raises: ImageError if there is no picture, DatasetError for a list that cannot be read or has a damaged line.
    """
    if flags.questions is not None:
        names = [image for image, _ in folders.questions(flags.questions)][:1]
    else:
        folders.check_arguments(flags.pictures)
        names = [name for name, _ in islice(images(flags, without), 1)]
    if not names:
        raise ImageError(f"no picture was found. In folders, only names that end in {', '.join(PICTURE_SUFFIXES)} count.")


# Settings


def settings(flags: JobFlags, checkpoint: "Checkpoint") -> dict:
    """The settings that decide the answers, for the header of the output file. Image and prompt are in the rows instead."""
    from paligemma.objects.mask_codec import find_codec

    decisive = [field.name for group in (PictureFlags, AnswerFlags) for field in fields(group)]
    task = {"task": "questions"} if flags.questions is not None else {"task": flags.chosen_task, "text": flags.text_asked}
    codec = find_codec(checkpoint.base, flags.mask_codec)
    if not flags.stretch:  # so that files from before this flag existed can be continued
        decisive.remove("stretch")
    return (
        task
        | {"model": f"{Path(checkpoint.name).name} {checkpoint.fingerprint}"}
        | {name: getattr(flags, name) for name in ("dtype", "quantize", "quantize_vision", *decisive)}
        | {"max_tokens_to_generate": flags.max_new_tokens(flags.tasks), "mask_codec": None if codec is None else codec.name}
    )


def make_annotator(flags: JobFlags, checkpoint: "Checkpoint") -> Annotator:
    """Loads the weights and returns an Annotator for the job."""
    return flags.annotator(checkpoint, flags.load(checkpoint), flags.load_codec(checkpoint), flags.rows, flags.tasks)


# Rows


def answer(
    annotator: Annotator, questions: Iterable[Question], flags: JobFlags, keeps_original: bool = False
) -> Iterator[tuple[dict, folders.Loaded, Result]]:
    """The row, the picture and the result of each question, in the order in which the answers finish.

    If a picture cannot be read or a question cannot be asked, the row holds the error.
    """
    running: dict[int, folders.Loaded] = {}
    side = annotator.processor.image_size

    def read(picture: tuple[str, bool]) -> folders.Loaded:
        location, is_typed = picture
        return folders.load(location, side=side, keeps_original=keeps_original, is_typed=is_typed, **flags.picture_options)

    def requests() -> Iterator[Request]:
        threads = min(READERS, machine.available_cores())
        ahead = max(threads, annotator.rows)
        for index, (question, loaded) in enumerate(
            folders.read_ahead(questions, lambda q: (q.location, q.is_typed), read, threads, ahead)
        ):
            running[index] = loaded
            yield Request(
                picture=loaded.picture,
                task=question.task,
                text=question.text,
                prompt=question.prompt,
                image=question.image,
                size=loaded.size,
            )

    for index, result in annotator.run(requests()):
        loaded = running.pop(index)
        yield result.to_json() | ({"notes": loaded.notes} if loaded.notes else {}), loaded, result
    if running:
        raise RuntimeError(f"{len(running)} questions have no row")  # a bug in this project


# Steps before and after the answers


def count_unanswered(questions: Iterable[Question], journal: Journal) -> int:
    """The number of questions that have no row yet. Iterates over all questions, which may be slow."""
    return sum(not journal.knows(question.image, question.prompt) for question in questions)


def claim_unanswered(questions: Iterable[Question], journal: Journal) -> Iterator[Question]:
    """The questions that have no row yet, each once. Marks each of them as asked."""
    return (question for question in questions if journal.claim(question.image, question.prompt))


def stderr_is_terminal() -> bool:
    """Whether stderr can show a progress bar."""
    return sys.stderr.isatty()


def progress(known: int, total: int | None) -> "tqdm":
    """A progress bar of rows, if stderr is a terminal.

    The remaining time is estimated from all rows of this run (smoothing 0), without the `known` rows of earlier runs.
    """
    from tqdm import tqdm

    return tqdm(total=total, initial=known, unit="row", smoothing=0, dynamic_ncols=True, disable=not stderr_is_terminal())


def check_outputs(
    flags: JobFlags, rows: Path, others: Iterable[tuple[str, Path]] = (), model: Iterable[tuple[str, Path]] = ()
) -> None:
    """Checks that the output files can be written, are different files, and are not input files.

    Args:
        rows: the file for the rows.
        others: other output files, as pairs (description, path).
        model: the files of the model, as pairs (description, path).
    Raises: UsageError, OutputError.
    """
    part = ("the file that --retry_failed makes", rows.with_name(rows.name + PART))
    named = [("--list", flags.list), ("--questions", flags.questions), ("the mask codec", flags.mask_codec)]
    read = [(what, files.expand(file)) for what, file in named if file is not None]
    read += [("the picture", file) for file in map(file_of, flags.pictures) if file is not None]
    files.check_outputs([("--output", rows), part, *others], [*read, *model])


@contextmanager
def open_rows(flags: JobFlags, checkpoint: "Checkpoint", path: Path) -> Iterator[Journal]:
    """Opens the output file as a Journal. After an interruption, prints how many rows it has. Raises: the errors of Journal."""
    with Journal(path, settings(flags, checkpoint), is_forced=flags.force, retry_failed=flags.retry_failed) as journal:
        try:
            yield journal
        except Interrupted:
            rows = counted(journal.num_answered + journal.num_failed, "row")
            note(f"interrupted after {rows}. Run the same command again to resume.")
            raise


def conclude(journal: Journal) -> None:
    """Prints how many rows the file has. Raises: PaliGemmaError with exit code 8 if some rows are errors."""
    answered, failed = journal.num_answered, journal.num_failed
    if failed:
        advice = "--retry_failed tries again."
        verdict = "is an error and says why" if failed == 1 else "are errors and say why"
        failed_rows = f"{failed} of {counted(answered + failed, 'row')}"
        raise PaliGemmaError(f"{failed_rows} in {journal.path} {verdict}. {advice}", code=8)
    note(f"{counted(answered, 'row')} in {journal.path}.")
