"""One exception family for everything a user can get wrong, each with the exit code that the programs return.

Library code raises these at the door (picture, prompt, file, device); a program prints `error: message` on one line and
exits with `code`. The modeling files raise plain ValueError, so that they can be copied out alone.
"""


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

    def to_json(self) -> dict:
        """The error as an object, for --json and for rows of results."""
        return {"code": self.code, "type": type(self).__name__, "message": self.message, "path": self.path}


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
