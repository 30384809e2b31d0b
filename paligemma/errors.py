"""The exceptions for everything that a user can get wrong, each with an exit code; and functions that shorten texts for messages.

Library code raises these when it checks its inputs (picture, prompt, file, device). A program prints `error: message` on one line
and exits with the `code` of the error. The modeling files raise plain ValueError instead, so that another project can use them
without this file.
"""

import os
from collections.abc import Sequence

MAX_MESSAGE = 500  # characters of a message on the screen or in a row of results; --debug shows the whole message
MAX_PATH = 4096  # characters of a path in a row of results
MAX_LISTED = 5  # names in a list


# Texts for messages


def shorten(text: str, max_length: int = MAX_MESSAGE) -> str:
    """Cuts the middle out of a text that is too long, because a message begins with the problem and ends with the advice."""
    last = max_length // 3
    return text if len(text) <= max_length else f"{text[: max_length - last - 5]} ... {text[-last:]}"


def one_line(text: object) -> str:
    """A text from outside (an address, another library's error) in a form for our messages: printable, at most 200 characters."""
    line = str(text).strip()
    line = line if line.isprintable() else repr(line)[1:-1]
    return line if len(line) <= 200 else f"{line[:120]}...{line[-60:]}"


def listed(names: Sequence[str]) -> str:
    """The first few names, each as in one_line, and the number of the others: "a, b and 3 more"."""
    more = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    return ", ".join(map(one_line, names[:MAX_LISTED])) + more


def counted(number: int, thing: str) -> str:
    """A number and what it counts: "1 row", "2 rows"."""
    return f"{number} {thing}{'' if number == 1 else 's'}"


# Exceptions


class PaliGemmaError(Exception):
    """An error that a user can understand. Its message says on one line what was given, what was expected, and what to do.

    Args:
        message: the text that the user sees.
        path: the file or address that the error is about, for the JSON form of the error.
        code: the exit code, if it differs from the code of the class.
    """

    code = 1

    def __init__(self, message: str, *, path: object = None, code: int | None = None):
        super().__init__(message)
        self.message = message
        self.path = None if path is None else str(path)
        if code is not None:
            self.code = code

    def to_json(self, is_whole: bool = False) -> dict[str, int | str | None]:
        """The error as an object, for --json and for rows of results. Message and path are shortened unless `is_whole`."""
        message, path = self.message, self.path
        if not is_whole:
            message, path = shorten(message), None if path is None else shorten(path, MAX_PATH)
        return {"code": self.code, "type": type(self).__name__, "message": message, "path": path}


class UsageError(PaliGemmaError):
    """A flag or an argument has a value that makes no sense."""

    code = 2


class ImageError(PaliGemmaError):
    """A picture cannot be read, or is not accepted."""

    code = 3


class PromptError(PaliGemmaError):
    """A prompt cannot be tokenised, or does not fit."""

    code = 3


class DatasetError(PaliGemmaError):
    """A list of examples has a fault."""

    code = 3


class CheckpointError(PaliGemmaError):
    """Something in a model folder is missing, unexpected or of the wrong shape."""

    code = 4


class TokenizerError(PaliGemmaError):
    """Tokenizer files are missing, broken, or belong to another model."""

    code = 4


class AccessError(PaliGemmaError):
    """There is no network or no permission, or a server does not send the file."""

    code = 5


class DeviceError(PaliGemmaError):
    """A device is not available, or its memory is too small."""

    code = 6


class GenerationError(PaliGemmaError):
    """The logits are not finite. With code 2: a sampling argument is out of range."""

    code = 6


class OutputError(PaliGemmaError):
    """A file cannot be written."""

    code = 7


def is_gpu_error(error: BaseException) -> bool:
    """Whether this is torch.AcceleratorError: an operation on a GPU failed, which all later operations then report, too."""
    return any(kind.__name__ == "AcceleratorError" for kind in type(error).__mro__)  # torch may not be imported


def unexpected(error: BaseException) -> PaliGemmaError:
    """Converts another exception: to a DeviceError if memory ran out or a GPU failed, else to an error that asks for a report."""
    if isinstance(error, MemoryError):
        found: PaliGemmaError = DeviceError("memory ran out. Close other programs, or take --dtype bf16 or --quantize int8.")
    elif is_gpu_error(error):
        advice = "python -m paligemma doctor checks what works on it; --graphs off or --device cpu may help."
        found = DeviceError(f"the GPU failed. {(str(error).splitlines() or [''])[0]}. {advice}")
    else:
        import traceback  # imported only for a bug

        frames = traceback.extract_tb(error.__traceback__)
        place = f"{os.path.basename(frames[-1].filename)} line {frames[-1].lineno}" if frames else "no traceback"
        advice = "This is a bug: please report what --debug prints."
        found = PaliGemmaError(f"internal error ({place}). {type(error).__name__}: {error}. {advice}", path=place)
    found.__cause__ = error
    return found
