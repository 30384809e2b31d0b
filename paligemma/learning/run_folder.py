"""The folder of a fine-tune: its settings, its log, its curves, and that nothing of it is lost or half-written.

Imports torch only where checkpoints are looked for. Checked in tests/programs/test_finetune.py.
"""

import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from paligemma.errors import OutputError, UsageError
from paligemma.files import check_outputs, expand, is_file, open_atomic, parse_json, stat_path, write_atomic
from paligemma.programs.commandline import note

FREE_TO_CHANGE = (  # when a run goes on: what has no influence on the weights
    "config", "output", "resume", "device", "evaluate_every", "save_every", "num_scored", "scores", "tensorboard", "debug",
    "verbose", "preview", "skip_bad",
    "train", "valid", "image_dir", "mask_codec", "model_path", "base_model", "revision",  # known by what is in them
)  # fmt: skip
MOST_LOG_BYTES = 1 << 16  # of a line of metrics.jsonl
WRITTEN = ("settings.json", "metrics.jsonl", "progress.svg", "preview.png")
WRITTEN_FOLDERS = ("checkpoints", "model", "adapter")
ADJUSTABLE = ("dtype", "clip")  # and the learning rates: the way out of updates that are no numbers


# Files

NO_ROOM = "Make room, or name another --output."


def make_folder(folder: Path) -> None:
    """Raises: OutputError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:  # a ValueError: a NUL in the name
        reason = getattr(error, "strerror", None) or error
        raise OutputError(f"{folder} cannot be made: {reason}. Name another --output.") from error


def copy_file(source: Path, file: Path) -> None:
    """Copies a file; `file` is complete or unchanged. Raises: OutputError."""
    with open_atomic(file, "Make room and continue with --resume.") as copy, open(source, "rb") as original:
        shutil.copyfileobj(original, copy)


# Whose folder it is


def check_inputs(folder: Path, read: Iterable[tuple[str, str | None]]) -> None:
    """Makes sure that no file that a run reads is one that it writes.

    Args:
        read: what a file is ("--train"), and its path or None.
    Raises: UsageError; OutputError where the folder could not be written to.
    """
    given = [(what, expand(file)) for what, file in read if file]
    check_outputs([], given, [("--output", folder / name) for name in WRITTEN])
    for what, file in given:
        for name in WRITTEN_FOLDERS:
            is_inside = False
            with suppress(ValueError):  # a NUL in the name: there is no such file
                is_inside = Path(os.path.realpath(file)).is_relative_to(os.path.realpath(folder / name))
            if is_inside:
                raise UsageError(f"{what} {file} lies in {folder / name}, which a run replaces. Name another --output.")


def settings_of(flags: Any, data: str, model: str) -> dict:
    """What must be the same for a run to go on.

    Args:
        flags: a dataclass.
        data, model: fingerprints of the examples and of the model to begin with.
    """
    settings = {name: value for name, value in asdict(flags).items() if name not in FREE_TO_CHANGE}
    return settings | {"data": data, "model": model}


def check_taken(folder: Path, resume: bool) -> None:
    """Sees to it that no run is lost to this one. Raises: UsageError for a folder that holds one already."""
    from paligemma.learning.training import checkpoints

    is_ended, is_begun = stat_path(folder / "model", OutputError) is not None, bool(checkpoints(folder / "checkpoints"))
    if (is_begun or is_ended) and not resume:
        raise UsageError(f"{folder} holds a run already. Name another --output, or continue with --resume.")
    if is_ended and not is_begun:
        raise UsageError(f"{folder} holds the result of a run whose checkpoints are gone. Name another --output.")
    if resume and not is_begun:
        note(f"{folder} holds no checkpoint yet; the run begins.")


def check_settings(folder: Path, now: dict) -> None:
    """Sees to it that a run goes on as it began. Raises: UsageError for other settings, other data or another model.

    Args:
        now: from settings_of.
    """
    from paligemma.files import read_json
    from paligemma.learning.training import checkpoints

    if not (checkpoints(folder / "checkpoints") and stat_path(folder / "settings.json", OutputError)):
        return
    before = read_json(folder / "settings.json")
    common = [name for name in now if name in before]  # an older version of this program may have had fewer
    changed = {name: f"{name} was {before[name]!r} and is {now[name]!r}" for name in common if before[name] != now[name]}
    adjusted = [changed.pop(name) for name in [*changed] if name in ADJUSTABLE or name.startswith("learning_rate")]
    if changed:
        raise UsageError(f"{folder} ran with other settings: {'; '.join(changed.values())}. Take the same, or another --output.")
    if adjusted:
        note(f"continues with other settings: {'; '.join(adjusted)}.")


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Makes the folder, and holds it against other runs. Raises: OutputError where one of them holds it."""
    make_folder(folder)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(ImportError):  # not there on Windows
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise OutputError(f"{folder} is being written by another run. Wait for it, or name another --output.") from error
    finally:
        os.close(descriptor)


# The log


def read_log(file: Path, step: int) -> list[dict]:
    """The lines of a metrics.jsonl up to this step. A line that was cut off, or that this program did not write, is left out."""
    lines = []
    with suppress(OSError):
        if is_file(file, OutputError):
            with open(file, "rb") as stream:
                while text := stream.readline(MOST_LOG_BYTES):  # of a longer one, parts that are no JSON
                    with suppress(ValueError):
                        lines.append(parse_json(text))
    lines = [line for line in lines if is_log_line(line)]
    is_old = any(line["step"] == 0 for line in lines)  # before, the first update was step 0
    lines = [line | {"step": line["step"] + is_old} for line in lines]
    return [line for line in lines if 0 < line["step"] <= step]


def is_log_line(line: object) -> bool:
    """Whether it holds what `Log.write` writes: the step, and numbers, null, true, false, or what was scored."""

    def is_written(name: str, value: object) -> bool:
        if isinstance(value, float):
            return math.isfinite(value)
        is_short = isinstance(value, str) and name == "scored" and len(value) <= 200
        return value is None or is_short or (isinstance(value, int) and abs(value) < 2**53)

    return isinstance(line, dict) and type(line.get("step")) is int and all(map(is_written, line.keys(), line.values()))


class Log:
    """metrics.jsonl and progress.svg, and TensorBoard's log if it is wanted.

    Args:
        step: number of updates done; lines of later ones, from a run that was killed after its last checkpoint, are dropped.
    """

    def __init__(self, folder: Path, step: int, with_tensorboard: bool):
        self.folder, self.file = folder, folder / "metrics.jsonl"
        self.lines = read_log(self.file, step)
        write_atomic(self.file, "".join(json.dumps(line) + "\n" for line in self.lines), NO_ROOM)
        self.tensorboard = None
        if with_tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.tensorboard = SummaryWriter(str(folder / "tensorboard"))

    def write(self, line: dict) -> None:
        """Numbers that are none become null, as JSON has it. Raises: OutputError."""
        line = {name: None if isinstance(x, float) and not math.isfinite(x) else x for name, x in line.items()}
        self.lines.append(line)
        try:
            with open(self.file, "a", encoding="utf-8") as stream:
                stream.write(json.dumps(line) + "\n")
        except OSError as error:
            raise OutputError(f"{self.file} cannot be written: {error.strerror}. Make room and add --resume.") from error
        if self.tensorboard is not None:
            for name, value in line.items():
                if name != "step" and isinstance(value, (int, float)):
                    self.tensorboard.add_scalar(name, value, line["step"])

    def draw(self) -> None:
        from paligemma.learning.curves import draw_curves

        try:
            draw_curves(self.lines, self.folder / "progress.svg")
        except OutputError as error:  # the numbers are in metrics.jsonl
            note(error.message)
