"""One exception family for everything a user can get wrong, each with the exit code that the programs return.

Library code raises these at the door (picture, prompt, file, device); a program prints `error: message` on one line and
exits with `code`. The modeling files raise plain ValueError, so that they can be copied out alone.
"""


import os
import traceback

LONGEST_MESSAGE = 500  # characters of a message on a screen or in a row; --debug shows the whole
LONGEST_PATH = 4096


def shorten(text: str, longest: int = LONGEST_MESSAGE) -> str:
    """The text, without its middle if it is longer: what is wrong stands at the beginning, what to do at the end."""
    last = longest // 3
    return text if len(text) <= longest else f"{text[: longest - last - 5]} ... {text[-last:]}"


def counted(number: int, thing: str) -> str:
    """A number and what it counts: "1 row", "2 rows", "1 more doubt"."""
    return f"{number} {thing}{'' if number == 1 else 's'}"


class PaliGemmaError(Exception):
    """What came, what was needed, what to do: one sentence each, on one line.

    Args:
        message: the text a user sees.
        path: the file or address it is about, for the JSON form of the message.
        code: exit code, where one instance needs another than its class.
    """

    code = 1

    def __init__(self, message: str, *, path: object = None, code: int | None = None):
        super().__init__(message)
        self.message = message
        self.path = None if path is None else str(path)
        if code is not None:
            self.code = code

    def to_json(self, is_whole: bool = False) -> dict:
        """The error as an object, for --json and for rows of results; a long message is cut unless it `is_whole`."""
        message, path = self.message, self.path
        if not is_whole:
            message, path = shorten(message), None if path is None else shorten(path, LONGEST_PATH)
        return {"code": self.code, "type": type(self).__name__, "message": message, "path": path}


class UsageError(PaliGemmaError):
    """A flag or an argument that makes no sense."""

    code = 2


class ImageError(PaliGemmaError):
    """A picture that cannot be read, or is refused."""

    code = 3


class PromptError(PaliGemmaError):
    """A prompt that cannot be tokenised, or does not fit."""

    code = 3


class DatasetError(PaliGemmaError):
    """A list of examples with a fault in it."""

    code = 3


class CheckpointError(PaliGemmaError):
    """A model folder with something missing, unexpected or misshapen."""

    code = 4


class TokenizerError(PaliGemmaError):
    """Tokenizer files that are absent, broken, or of another model."""

    code = 4


class AccessError(PaliGemmaError):
    """No network, no permission, or a server that says no."""

    code = 5


class DeviceError(PaliGemmaError):
    """A device that is not there, or memory that is too small."""

    code = 6


class GenerationError(PaliGemmaError):
    """Logits that are not numbers; with code 2, sampling arguments out of range."""

    code = 6


class OutputError(PaliGemmaError):
    """A file that cannot be written."""

    code = 7


def unexpected(error: BaseException) -> PaliGemmaError:
    """An unexpected exception, as one that says so; memory that ran out, as a DeviceError."""
    if isinstance(error, MemoryError):
        found: PaliGemmaError = DeviceError("memory ran out. Close other programs, or take --dtype bf16 or --quantize int8.")
    else:
        frames = traceback.extract_tb(error.__traceback__)
        place = f"{os.path.basename(frames[-1].filename)} line {frames[-1].lineno}" if frames else "no place"
        advice = "This is a bug: please report what --debug prints."
        found = PaliGemmaError(f"internal error ({place}). {type(error).__name__}: {error}. {advice}", path=place)
    found.__cause__ = error
    return found
