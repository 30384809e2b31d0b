"""Files that are there whole or not at all. Checked in tests/test_exports.py and tests/test_finetune.py."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from errors import OutputError


@contextmanager
def whole(path: Path, advice: str = "Make room, or write elsewhere.") -> Iterator[Path]:
    """A name beside a file's place to write to, which takes that place at the end; whoever looks sees the old one or the new one.

    Raises: OutputError, which ends with advice, for every OSError within; nothing is left then, and what was there stays.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield beside
        os.replace(beside, path)
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror or error}. {advice}", path=path) from error
    finally:
        with suppress(OSError):
            os.unlink(beside)
