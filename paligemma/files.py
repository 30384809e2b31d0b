"""Paths that users type, and files that are complete or absent. Checked in tests/test_files.py.

Path.exists() and its relatives raise OSError for a name of 300 letters or a folder that may not be searched, and expanduser()
raises RuntimeError for the ~ of a user that does not exist. Use the functions here for every path that came from outside.
"""

import errno
import json
import os
import re
import stat
import unicodedata
import urllib.parse
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from heapq import nlargest
from itertools import islice
from pathlib import Path

from paligemma.errors import AccessError, CheckpointError, OutputError, PaliGemmaError, UsageError

BUNDLED = Path(__file__).with_name("bundled")  # the checkpoint, the picture and the font that come with this code
MAX_JSON_BYTES = 10_000_000  # parsed, what others write takes up to 25 times as much memory; the largest real one has 0.3 MB
MAX_TOKENIZER_BYTES = 50_000_000  # Gemma's has 35 MB
MOST_NAMES = 100_000  # of a folder, looked through for a similar name
MOST_COMPARED = 100  # of them, compared letter by letter


def expand_text(name: str) -> str:
    """The name with ~ and ~user replaced, else letter by letter as it is; a ~user that does not exist stays."""
    try:
        return os.path.expanduser(name)
    except ValueError:  # a NUL or half a character in it
        return name


def expand(name: str | os.PathLike) -> Path:
    """The path with ~ and ~user replaced; a ~user that does not exist stays as it is, like any other name."""
    return Path(expand_text(os.fspath(name)))


def split_file_address(address: str) -> tuple[str, Path]:
    """The machine ("" for this one) and the path in an address that begins with file://."""
    host, slash, path = address[len("file://") :].partition("/")
    path = re.split("[?#]", path, maxsplit=1)[0]
    return "" if host.lower() == "localhost" else host, Path(urllib.parse.unquote(slash + path))


def look(path: str | os.PathLike, error_class: type[PaliGemmaError] = CheckpointError) -> os.stat_result | None:
    """What lies at a path (links followed), None if there is nothing.

    Raises: error_class where the system cannot say: a name too long or with a NUL, a loop of links, a folder that may not be
        searched. The last is an AccessError where error_class is CheckpointError.
    """
    try:
        return os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except PermissionError as error:
        denied = AccessError if error_class is CheckpointError else error_class
        raise denied(f"{path} may not be read by this user. Change its permissions.", path=path) from error
    except (OSError, ValueError) as error:
        reason = {errno.ELOOP: "its links lead in a circle", errno.ENAMETOOLONG: "the name is too long"}.get(
            getattr(error, "errno", None), getattr(error, "strerror", None) or error
        )
        name = ascii(os.fspath(path))[1:-1] if isinstance(error, ValueError) else os.fspath(path)  # a NUL, a lone surrogate
        raise error_class(f"{name} cannot be opened: {reason}. Check the path.", path=path) from error


def is_file(path: str | os.PathLike, error_class: type[PaliGemmaError] = CheckpointError) -> bool:
    """Whether a regular file, or a link to one, lies there. Raises: as `look`."""
    status = look(path, error_class)
    return status is not None and stat.S_ISREG(status.st_mode)


def is_folder(path: str | os.PathLike, error_class: type[PaliGemmaError] = CheckpointError) -> bool:
    """Whether a folder, or a link to one, lies there. Raises: as `look`."""
    status = look(path, error_class)
    return status is not None and stat.S_ISDIR(status.st_mode)


def names_in(folder: str | os.PathLike) -> list[str]:
    """The names in a folder, in order; the first MOST_NAMES of them. None of a folder that is absent or cannot be read."""
    try:
        with os.scandir(folder) as entries:
            return sorted(entry.name for entry in islice(entries, MOST_NAMES))
    except (OSError, ValueError):
        return []


def similar_names(name: str, names: list[str]) -> list[str]:
    """Up to three of the names that differ from this one by little, whatever their case.

    Names are first compared by their letters without order, which is fast, and only the nearest by difflib, which is slow.
    """
    import difflib  # only a mistyped name pays for it

    letters, lower = Counter(name.lower()), {other.lower(): other for other in names}
    nearest = nlargest(MOST_COMPARED, lower, key=lambda other: (letters & Counter(other)).total() * 2 - len(other))
    return [lower[other] for other in difflib.get_close_matches(name.lower(), nearest, n=3, cutoff=0.7)]


def read_regular(
    path: Path,
    most_bytes: int,
    error_class: type[PaliGemmaError] = CheckpointError,
    advice: str = "Download it again, or name another folder.",
) -> bytes:
    """The content of a regular file or of a link to one; never waits for a pipe, never takes more memory than most_bytes.

    Raises: error_class if it is missing, of another kind, too large or unreadable; AccessError as `look`.
    """
    status = look(path, error_class)
    if status is None:
        what = "is a link to nothing" if os.path.islink(path) else "is missing"
        raise error_class(f"{path} {what}. {advice}", path=path)
    if not stat.S_ISREG(status.st_mode):
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a pipe or a device"
        raise error_class(f"{path} is {kind}, not a file. Replace it by a regular file.", path=path)
    try:
        with open(path, "rb") as stream:
            content = stream.read(most_bytes + 1)
    except PermissionError as error:
        denied = AccessError if error_class is CheckpointError else error_class
        raise denied(f"{path} may not be read by this user. Change its permissions.", path=path) from error
    except OSError as error:
        raise error_class(f"{path} cannot be read: {error.strerror}. Check the disk, or download it again.", path=path) from error
    if len(content) > most_bytes:
        raise error_class(f"{path} has {status.st_size} bytes, and {most_bytes} is the limit. {advice}", path=path)
    return content


def impostor(head: bytes) -> str | None:
    """What a file is that only stands for the one that was wanted, by its first bytes, and what to do; None for all others."""
    if head.startswith(b"version https://git-lfs"):
        return "is a pointer of git-lfs, not the file itself. Fetch the files: git lfs pull, or download the model again"
    if head.lstrip()[:14].lower().startswith((b"<!doctype html", b"<html")):
        return "is a web page: the download failed. Download it again, logged in if the model needs that"
    return None


def read_json(
    path: Path, error_class: type[PaliGemmaError] = CheckpointError, most_bytes: int = MAX_JSON_BYTES
) -> dict:
    """The object in a JSON file. Raises: error_class, with line and column, for anything else; AccessError as `look`."""
    content = read_regular(path, most_bytes, error_class)
    try:
        value = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise error_class(f"{path}{explain_json(content, error)}.", path=path) from error
    if not isinstance(value, dict):
        raise error_class(f"{path}:1:1 holds a {type(value).__name__}, not an object in braces. Download it again.", path=path)
    return value


def explain_json(content: bytes, error: Exception) -> str:
    """Why these bytes are no JSON, to be put after the file's name."""
    what = impostor(content)
    if what is not None:
        return f" {what}"
    if isinstance(error, UnicodeDecodeError):
        return f" is not text in UTF-8 (byte {error.start}). Download it again"
    if isinstance(error, json.JSONDecodeError):
        return f":{error.lineno}:{error.colno} is not JSON: {error.msg}. Correct it, or download it again"
    return f" is not usable JSON: {error}. Download it again"  # numbers of thousands of digits, brackets nested without end


# Files to be written


def place_of(path: str | os.PathLike) -> tuple:
    """What a path names: equal for all its spellings and for links, hard ones too, whether or not anything is there yet.

    Names that differ in case alone are equal where nothing is there: on some disks they are one file.

    Raises: OutputError, as `look`.
    """
    status = look(path, OutputError)
    if status is not None:
        return status.st_dev, status.st_ino
    folder, name = os.path.split(os.path.realpath(path))  # of a link to nothing, what it names
    status = look(folder, OutputError)
    return folder if status is None else (status.st_dev, status.st_ino), unicodedata.normalize("NFC", name).casefold()


def check_writable(path: str | os.PathLike, makes_folders: bool = False) -> None:
    """Raises: OutputError for a file that could not be written later, as far as that can be seen now.

    Args:
        makes_folders: whether the folders above it will be made if they are not there.
    """
    status, folder = look(path, OutputError), os.path.dirname(path) or "."
    while (above := look(folder, OutputError)) is None and makes_folders:
        folder = os.path.dirname(folder) or "."
    if above is None:
        raise OutputError(f"{path} cannot be written: there is no folder {folder}. Make it first.", path=path)
    if not stat.S_ISDIR(above.st_mode):
        raise OutputError(f"{path} cannot be written: {folder} is a file. Name a folder.", path=path)
    if status is not None and stat.S_ISDIR(status.st_mode):
        raise OutputError(f"{path} is a folder. Name a file in it.", path=path)
    if status is not None and not stat.S_ISREG(status.st_mode):
        raise OutputError(f"{path} is not a regular file but a pipe or a device. Name another file.", path=path)
    if not os.access(folder, os.W_OK | os.X_OK) or (status is not None and not os.access(path, os.W_OK)):
        raise OutputError(f"{path} cannot be written: permission denied. Change it, or write elsewhere.", path=path)


def check_outputs(
    outputs: Iterable[tuple[str, Path]],
    inputs: Iterable[tuple[str, str | os.PathLike]] = (),
    nested: Iterable[tuple[str, Path]] = (),
) -> None:
    """Makes sure that files to be written can be, and that none of them is another one, or a file that is read.

    Args:
        outputs: what a file is ("--save"), and its path.
        inputs: the same of files that are read ("the picture"); they need not be there.
        nested: as outputs, with folders that are made if they are not there.
    Raises: UsageError for two that are one file (stdout and stderr may go to files, too), OutputError as check_writable.
    """
    taken: dict[tuple, tuple[str, Path]] = {}
    for name, path, makes_folders in (*((*output, False) for output in outputs), *((*output, True) for output in nested)):
        check_writable(path, makes_folders)
        place = place_of(path)
        if place in taken:
            other, _ = taken[place]
            both = f"{name} would write {path} twice" if name == other else f"{other} and {name} would both write {path}"
            raise UsageError(f"{both}. Give another name.")
        taken[place] = name, path
    for number, what in (1, "stdout"), (2, "stderr"):
        with suppress(OSError):  # it is closed
            status = os.fstat(number)
            if place := taken.get((status.st_dev, status.st_ino)):
                raise UsageError(f"{what} goes to {place[1]} already, and {place[0]} would overwrite it. Give another name.")
    for what, path in inputs if taken else ():
        with suppress(OutputError):  # a name that no file can have
            if place := taken.get(place_of(path)):
                raise UsageError(f"{place[0]} {place[1]} would overwrite {what} {path}. Give another name.")


@contextmanager
def whole(path: Path, advice: str = "Make room, or write elsewhere.") -> Iterator[Path]:
    """A name beside a file's place to write to, which takes that place at the end; whoever looks sees the old one or the new one.

    Raises: OutputError, which ends with advice, for every OSError within; nothing is left then, and what was there stays.
    """
    beside = path.with_name(f".{path.name[:50]}.{os.getpid()}")  # so short that a name of any length has room for more
    try:
        yield beside
        os.replace(beside, path)
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror or error}. {advice}", path=path) from error
    finally:
        with suppress(OSError):
            os.unlink(beside)
