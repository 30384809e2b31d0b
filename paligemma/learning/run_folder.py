"""The output folder of a fine-tuning run: settings, log, curves, checkpoints, and checks that no run overwrites another run.

Imports no torch. Checked in tests/programs/test_finetune.py.
"""

import json
import logging
import math
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from paligemma.errors import OutputError, UsageError
from paligemma.files import (
    check_outputs,
    expand,
    is_file,
    make_folder,
    names_in,
    open_atomic,
    output_errors,
    parse_json,
    read_json,
    stat_path,
    write_atomic,
)
from paligemma.learning.processes import from_first

log = logging.getLogger(__name__)
FREE_TO_CHANGE = (  # flags that may differ in a resumed run, because they do not change the weights
    "config", "output", "resume", "device", "evaluate_every", "save_every", "num_scored", "scores", "tensorboard", "debug",
    "verbose", "preview", "skip_bad",
    # The training data and the model are compared by fingerprints, not by paths. valid and mask_codec do not affect the weights.
    "train", "valid", "image_dir", "mask_codec", "model_path", "base_model", "revision",
)  # fmt: skip
# These flags and the learning rates may differ in a resumed run, for instance after losses that are NaN, or after memory ran out.
# They change the weights, the last two only by rounding.
ADJUSTABLE = ("dtype", "clip", "micro_batch_size", "gradient_checkpointing")
RENAMED = {"rows": "micro_batch_size"}  # flags that had another name in earlier versions of settings.json
MAX_LOG_LINE_BYTES = 1 << 16
NO_ROOM, NEW_OUTPUT = "Make room, or name another --output.", "Name another --output."  # advice for error messages
OUTPUT_FILES = ("settings.json", "metrics.jsonl", "progress.svg", "preview.png")
OUTPUT_FOLDERS = ("checkpoints", "model", "adapter")
STATE_NAME = "state.json"  # written last, so a checkpoint with this file is complete
STEP_FOLDER = re.compile(r"step_\d{8}")


def copy_file(source: Path, file: Path) -> None:
    """Copies `source` to `file`, completely or not at all. Raises: OutputError."""
    with open_atomic(file, "Make room and continue with --resume.") as copy, open(source, "rb") as original:
        shutil.copyfileobj(original, copy)


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints in a folder, oldest first."""
    names = [name for name in names_in(folder) if STEP_FOLDER.fullmatch(name)]
    return [folder / name for name in names if stat_path(folder / name / STATE_NAME, OutputError)]


# Protection of earlier runs


def check_inputs(folder: Path, inputs: Iterable[tuple[str, str | None]]) -> None:
    """Checks that no input file of a run is one of its output files.

    Args:
        inputs: the flag of each input file ("--train"), and the path or None.
    Raises: UsageError if an input file is an output file, OutputError as files.check_outputs.
    """
    files = [(flag, expand(file)) for flag, file in inputs if file]
    check_outputs([], files, [("--output", folder / name) for name in OUTPUT_FILES])
    for flag, file in files:
        for name in OUTPUT_FOLDERS:
            is_inside = False
            with suppress(ValueError):  # the name contains NUL, so no such file can exist
                is_inside = Path(os.path.realpath(file)).is_relative_to(os.path.realpath(folder / name))
            if is_inside:
                raise UsageError(f"{flag} {file} lies in {folder / name}, which a run replaces. Name another --output.")


def check_unused(folder: Path, resume: bool) -> None:
    """Checks that a run does not overwrite an earlier run. Raises: UsageError if it would."""
    is_finished, is_started = stat_path(folder / "model", OutputError) is not None, bool(checkpoints(folder / "checkpoints"))
    if (is_started or is_finished) and not resume:
        raise UsageError(f"{folder} already contains a run. Name another --output, or continue with --resume.")
    if is_finished and not is_started:
        raise UsageError(f"{folder} contains the result of a run whose checkpoints were deleted. Name another --output.")
    if resume and not is_started:
        log.warning("%s contains no checkpoint yet; the run starts from the beginning.", folder)


def settings_of(flags: Any, data: str, model: str) -> dict:
    """The settings that are stored in settings.json and compared when a run is resumed.

    Args:
        flags: an instance of finetune.Flags.
        data: fingerprint of the training examples.
        model: fingerprint of the starting model.
    """
    settings = {name: value for name, value in asdict(flags).items() if name not in FREE_TO_CHANGE}
    return settings | {"data": data, "model": model}


def check_settings(folder: Path, settings: dict) -> None:
    """Checks that a resumed run has the settings with which it was started. ADJUSTABLE settings only give a warning.

    Args:
        settings: from settings_of.
    Raises: UsageError for different settings, different data or a different model.
    """
    if not (checkpoints(folder / "checkpoints") and stat_path(folder / "settings.json", OutputError)):
        return
    before = {RENAMED.get(name, name): value for name, value in read_json(folder / "settings.json").items()}
    common = [name for name in settings if name in before]  # because an earlier version of this program had fewer settings
    changed = {
        name: f"{name} was {before[name]!r} and is {settings[name]!r}" for name in common if before[name] != settings[name]
    }
    adjusted = [changed.pop(name) for name in [*changed] if name in ADJUSTABLE or name.startswith("learning_rate")]
    if changed:
        text = "; ".join(changed.values())
        raise UsageError(f"{folder} was started with other settings: {text}. Use the same settings, or name another --output.")
    if adjusted:
        log.warning("the run continues with other settings: %s.", "; ".join(adjusted))


@contextmanager
def claim(folder: Path, settings: dict) -> Iterator[None]:
    """A context manager: makes the folder, locks it against other runs, and writes settings.json.

    Raises: UsageError if the folder has other settings (check_settings), OutputError if another run has locked it.
    """
    with ExitStack() as stack:

        def start() -> None:
            make_folder(folder, NEW_OUTPUT)
            descriptor = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, descriptor)
            try:
                with suppress(ImportError):  # Windows has no fcntl
                    import fcntl

                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                text = f"{folder} is being written by another run. Wait for it, or name another --output."
                raise OutputError(text) from error
            check_settings(folder, settings)
            write_atomic(folder / "settings.json", json.dumps(settings, indent=1) + "\n", NO_ROOM)

        from_first(start)
        yield


# The log


def read_log(file: Path, step: int) -> list[dict]:
    """The lines of a metrics.jsonl up to `step`. Lines that are incomplete, or cannot be from this program, are left out."""
    lines = []
    with suppress(OSError):
        if is_file(file, OutputError):
            with open(file, "rb") as stream:
                while text := stream.readline(MAX_LOG_LINE_BYTES):  # a longer line is read in parts, which are not valid JSON
                    with suppress(ValueError):
                        lines.append(parse_json(text))
    lines = [line for line in lines if is_log_line(line)]
    counts_from_0 = any(line["step"] == 0 for line in lines)  # earlier versions gave the first update the number 0
    lines = [line | {"step": line["step"] + counts_from_0} for line in lines]
    return [line for line in lines if 0 < line["step"] <= step]


def is_log_line(line: object) -> bool:
    """Whether `Log.write` can have written this line: a step, numbers, null, true, false, and a short text named "scored"."""

    def is_possible(name: str, value: object) -> bool:
        if isinstance(value, float):
            return math.isfinite(value)
        is_short = isinstance(value, str) and name == "scored" and len(value) <= 200
        return value is None or is_short or (isinstance(value, int) and abs(value) < 2**53)

    return isinstance(line, dict) and type(line.get("step")) is int and all(map(is_possible, line.keys(), line.values()))


class Log:
    """metrics.jsonl, progress.svg and, if requested, a log for TensorBoard.

    Args:
        step: number of updates so far. Lines about later updates, which a run wrote after its last checkpoint, are removed.
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
        """Adds a line. NaN and infinity are written as null, because JSON cannot represent them. Raises: OutputError."""
        line = {name: None if isinstance(x, float) and not math.isfinite(x) else x for name, x in line.items()}
        self.lines.append(line)
        with output_errors(self.file, "Make room and continue with --resume."), open(self.file, "a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")
        if self.tensorboard is not None:
            for name, value in line.items():
                if name != "step" and isinstance(value, (int, float)):
                    self.tensorboard.add_scalar(name, value, line["step"])

    def draw(self) -> None:
        """Draws progress.svg. A failure only gives a warning, because metrics.jsonl has the same numbers."""
        from paligemma.learning.curves import draw_curves

        try:
            draw_curves(self.lines, self.folder / "progress.svg")
        except OutputError as error:
            log.warning(error.message)
