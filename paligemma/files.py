"""Checks paths, reads JSON, and writes files atomically: a file is complete or absent. Checked in tests/test_files.py.

Use these functions for every path that a user, a dataset or a checkpoint gives. Path.exists() and similar methods raise OSError
for a name of 300 characters or for a folder without search permission, and expanduser() raises RuntimeError for an unknown ~user.
"""

import errno
import json
import os
import re
import stat
import threading
import unicodedata
import urllib.parse
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from heapq import nlargest
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from paligemma.errors import AccessError, CheckpointError, OutputError, PaliGemmaError, UsageError, one_line

BUNDLED = Path(__file__).with_name("bundled")  # the checkpoint, the picture and the font that come with this code
CODEC_NAME = "vae-oid.npz"  # the file with the mask codec, in the folder of a model
MAX_JSON_BYTES = 10_000_000  # a parsed JSON file can take 25 times its size in memory; the largest real config has 0.3 MB
MAX_TOKENIZER_BYTES = 50_000_000  # Gemma's tokenizer.json has 35 MB
MAX_NAMES = 100_000  # how many names of a folder are searched for similar names
MAX_COMPARED = 100  # how many of these names are compared with difflib
MAKE_ROOM = "Make room, or write elsewhere."


# Paths


def expand_text(name: str) -> str:
    """The name with ~ and ~user replaced by home folders. The ~user of an unknown user stays as it is."""
    try:
        return os.path.expanduser(name)
    except ValueError:  # the name holds a NUL or a lone surrogate
        return name


def as_text(path: str | bytes | os.PathLike[str]) -> str:
    """The path as text. Raises: UsageError if it is no path."""
    try:
        return os.fsdecode(path)
    except TypeError:
        raise UsageError(f"{path!r:.40} is not a path. Text or a pathlib.Path is needed.") from None


def expand(name: str | os.PathLike[str]) -> Path:
    """The path, with ~ and ~user replaced as in expand_text."""
    return Path(expand_text(as_text(name)))


def split_file_address(address: str) -> tuple[str, Path]:
    """The host ("" for this machine) and the path in an address that begins with file://."""
    host, slash, path = address[len("file://") :].partition("/")
    path = re.split("[?#]", path, maxsplit=1)[0]
    return "" if host.lower() == "localhost" else host, Path(urllib.parse.unquote(slash + path))


def printable_path(path: str | os.PathLike[str]) -> str:
    """The path in a form for messages: one printable line."""
    return one_line(os.fsdecode(path))


def stat_path(path: str | os.PathLike[str], error_class: type[PaliGemmaError] = CheckpointError) -> os.stat_result | None:
    """The status of the file at a path (links are followed), or None if there is no file.

    Raises: error_class if the path cannot be checked, because the name is too long or holds a NUL, links form a loop, or a
        folder has no search permission. Missing permission for a checkpoint is an AccessError, see not_permitted.
    """
    try:
        return os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except PermissionError as error:
        raise not_permitted(path, error_class) from error
    except (OSError, ValueError) as error:
        known = {errno.ELOOP: "its links form a loop", errno.ENAMETOOLONG: "the name is too long"}
        reason = known.get(getattr(error, "errno", None) or 0) or getattr(error, "strerror", None) or error
        raise error_class(f"{printable_path(path)} cannot be opened: {reason}. Check the path.", path=path) from error


def not_permitted(path: str | os.PathLike[str], error_class: type[PaliGemmaError]) -> PaliGemmaError:
    """The error for a file that may not be read.

    Returns: an AccessError if error_class is CheckpointError, because the file is not damaged; otherwise an error of error_class.
    """
    denied = AccessError if error_class is CheckpointError else error_class
    return denied(f"{printable_path(path)} may not be read by this user. Change its permissions.", path=path)


def is_file(path: str | os.PathLike[str], error_class: type[PaliGemmaError] = CheckpointError) -> bool:
    """Whether the path is a regular file or a link to one. Raises: as stat_path."""
    status = stat_path(path, error_class)
    return status is not None and stat.S_ISREG(status.st_mode)


def is_folder(path: str | os.PathLike[str], error_class: type[PaliGemmaError] = CheckpointError) -> bool:
    """Whether the path is a folder or a link to one. Raises: as stat_path."""
    status = stat_path(path, error_class)
    return status is not None and stat.S_ISDIR(status.st_mode)


def names_in(folder: str | os.PathLike[str]) -> list[str]:
    """The first MAX_NAMES names in a folder, sorted. The list is empty if the folder does not exist or cannot be read."""
    try:
        with os.scandir(folder) as entries:
            return sorted(entry.name for entry in islice(entries, MAX_NAMES))
    except (OSError, ValueError):
        return []


def similar_names(name: str, names: list[str]) -> list[str]:
    """Up to three of `names` that are spelled almost like `name`; upper and lower case count as equal.

    The names are first ranked by the number of letters that they share with `name`. Only the best are compared by difflib,
    because it is slow.
    """
    import difflib  # imported only for a mistyped name

    letters, lower = Counter(name.lower()), {other.lower(): other for other in names}
    nearest = nlargest(MAX_COMPARED, lower, key=lambda other: (letters & Counter(other)).total() * 2 - len(other))
    return [lower[other] for other in difflib.get_close_matches(name.lower(), nearest, n=3, cutoff=0.7)]


# Reading


def read_regular(
    path: str | os.PathLike[str],
    max_bytes: int,
    error_class: type[PaliGemmaError] = CheckpointError,
    advice: str = "Download it again, or name another folder.",
) -> bytes:
    """The content of a regular file or of a link to one. This function never waits for a pipe and reads at most max_bytes.

    Raises: error_class if the file is missing, of another kind, too large or unreadable; AccessError as in stat_path.
    """
    status, name = stat_path(path, error_class), printable_path(path)
    if status is None:
        what = "is a broken link" if os.path.islink(path) else "is missing"
        raise error_class(f"{name} {what}. {advice}", path=path)
    if not stat.S_ISREG(status.st_mode):
        pipe = "a pipe or a device", "Save its content to a file, and name that file."
        kind, advice = ("a folder", advice) if stat.S_ISDIR(status.st_mode) else pipe
        raise error_class(f"{name} is {kind}, not a regular file. {advice}", path=path)
    try:
        with open(path, "rb") as stream:
            content = stream.read(max_bytes + 1)
    except PermissionError as error:
        raise not_permitted(path, error_class) from error
    except OSError as error:
        raise error_class(f"{name} cannot be read: {error.strerror}. Check the disk, or download it again.", path=path) from error
    if len(content) > max_bytes:
        raise error_class(f"{name} has {status.st_size} bytes, and {max_bytes} is the limit. {advice}", path=path)
    return content


def describe_wrong_download(head: bytes) -> str | None:
    """What was downloaded instead of the real file, and what to do. None unless it is a Git LFS pointer or a web page.

    Args:
        head: the first bytes of the file.
    """
    if head.startswith(b"version https://git-lfs"):
        return "is a pointer of git-lfs, not the file itself. Fetch the files: git lfs pull, or download the model again"
    if head.lstrip()[:14].lower().startswith((b"<!doctype html", b"<html")):
        return "is a web page: the download failed. Download it again, logged in if the model needs that"
    return None


class JSONFault(ValueError):
    """A text is not a JSON object. The message completes the sentence "The text is ..."; `line` and `column` count from 1."""

    def __init__(self, reason: str, line: int = 1, column: int = 1):
        super().__init__(reason)
        self.line, self.column = line, column


def json_kind(value: object) -> str:
    """The kind of a JSON value in plain words: "a list", "true or false"."""
    kinds = {list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return "an object" if isinstance(value, dict) else kinds.get(type(value), "a number")


def refuse_nan_and_infinity(name: str) -> None:
    """A hook for parse_json (parse_constant): Python's json accepts NaN, Infinity and -Infinity, which are not JSON."""
    raise ValueError(f"{name} is not a JSON number")


def parse_json(content: bytes | str, max_bytes: int = MAX_JSON_BYTES, **hooks: Any) -> dict[str, Any]:
    """The object in a JSON text: a whole file, or one line of a JSONL file.

    Args:
        max_bytes: the limit for len(content).
        hooks: as in json.loads: object_pairs_hook, parse_int, ...
    Raises: JSONFault, a ValueError, for any other text: not UTF-8, too large, nested too deeply, not an object.
    """
    if len(content) > max_bytes:
        raise JSONFault(f"longer than {max_bytes} bytes, which is the limit")
    try:
        value = json.loads(content if isinstance(content, str) else content.decode("utf-8"), **hooks)
    except UnicodeDecodeError as error:
        before = error.object[: error.start]
        line, column = before.count(b"\n") + 1, error.start - before.rfind(b"\n")
        raise JSONFault("not UTF-8", line, column) from error
    except json.JSONDecodeError as error:
        raise JSONFault(f"not JSON: {error.msg}", error.lineno, error.colno) from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets nested too deeply, a hook's refusal
        raise JSONFault(f"not usable JSON: {error}") from error
    if not isinstance(value, dict):
        raise JSONFault(f"{json_kind(value)}, not an object in braces")
    return value


def parse_json_file(
    content: bytes, path: Path, error_class: type[PaliGemmaError] = CheckpointError, max_bytes: int = MAX_JSON_BYTES
) -> dict[str, Any]:
    """Parses the content of a JSON file that is already in memory.

    Raises: error_class, with line and column, if it is not a JSON object.
    """
    try:
        return parse_json(content, max_bytes)
    except JSONFault as fault:
        what = describe_wrong_download(content)
        text = f"{path} {what}." if what else f"{path}:{fault.line}:{fault.column} is {fault}. Correct it, or download it again."
        raise error_class(text, path=path) from fault


def read_json(path: Path, error_class: type[PaliGemmaError] = CheckpointError, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """Reads and parses a JSON file. Raises: as parse_json_file; AccessError as in stat_path."""
    return parse_json_file(read_regular(path, max_bytes, error_class), path, error_class, max_bytes)


# Checks before writing


def name_key(name: str) -> str:
    """A key that ignores case and Unicode form, because some disks store names that differ only in these as one file."""
    return unicodedata.normalize("NFC", name).casefold()


def file_key(path: str | os.PathLike[str]) -> tuple[object, object]:
    """A key for the file that a path names. All spellings of the path and all links to the file, also hard links, have this key.

    The file need not exist. If it does not exist, names with the same name_key have the same key.

    Raises: OutputError as in stat_path.
    """
    status = stat_path(path, OutputError)
    if status is not None:
        return status.st_dev, status.st_ino
    folder, name = os.path.split(os.path.realpath(path))  # realpath: a broken link has the key of the path it points to
    status = stat_path(folder, OutputError)
    return folder if status is None else (status.st_dev, status.st_ino), name_key(name)


def check_writable(path: str | os.PathLike[str], makes_folders: bool = False) -> None:
    """Checks, as far as possible without writing, that a file can be written later. Raises: OutputError.

    Args:
        makes_folders: whether missing folders above the file will be made.
    """
    status, folder = stat_path(path, OutputError), os.path.dirname(path) or "."
    while (above := stat_path(folder, OutputError)) is None and makes_folders:
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
    inputs: Iterable[tuple[str, str | os.PathLike[str]]] = (),
    outputs_with_folders: Iterable[tuple[str, Path]] = (),
) -> None:
    """Checks that all output files can be written, are different files, and are not inputs.

    Args:
        outputs: pairs of a name for messages ("--save") and a path.
        inputs: the same for the files that are read ("the picture"); they need not exist.
        outputs_with_folders: further outputs, whose missing folders will be made.
    Raises: UsageError if two of the paths name the same file, or an output is the file that stdout or stderr is redirected to;
        OutputError as in check_writable.
    """
    taken: dict[tuple[object, object], tuple[str, Path]] = {}
    with_folders = ((*output, True) for output in outputs_with_folders)
    for name, path, makes_folders in (*((*output, False) for output in outputs), *with_folders):
        check_writable(path, makes_folders)
        key = file_key(path)
        if key in taken:
            other, _ = taken[key]
            both = f"{name} would write {path} twice" if name == other else f"{other} and {name} would both write {path}"
            raise UsageError(f"{both}. Give another name.")
        taken[key] = name, path
    for number, what in (1, "stdout"), (2, "stderr"):
        with suppress(OSError):  # the stream is closed
            status = os.fstat(number)
            if output := taken.get((status.st_dev, status.st_ino)):
                raise UsageError(f"{what} goes to {output[1]} already, and {output[0]} would overwrite it. Give another name.")
    for what, read in inputs if taken else ():
        with suppress(OutputError):  # no file can have this name
            if output := taken.get(file_key(read)):
                raise UsageError(f"{output[0]} {output[1]} would overwrite {what} {read}. Give another name.")


# Atomic writes: everything that may replace a file is written by these functions


def sync(path: str | os.PathLike[str]) -> None:
    """Flushes one file, or the list of names of one folder, to the disk. Raises: OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Flushes a folder and the files in it to the disk. Raises: OSError."""
    for path in (*folder.iterdir(), folder):
        sync(path)


def move_into_place(source: Path, target: Path) -> None:
    """Renames `source` (a file or a folder) to `target`. Even after a power cut, `target` has the complete old or new content.

    Raises: OSError.
    """
    # Without a flush, the new name could reach the disk before the content.
    sync_folder(source) if os.path.isdir(source) else sync(source)
    os.replace(source, target)
    with suppress(OSError):  # not an error: some file systems cannot flush a folder, and the new file is in place
        sync(target.parent)


@contextmanager
def output_errors(path: Path, advice: str = MAKE_ROOM) -> Iterator[None]:
    """Turns every OSError inside the block into an OutputError: "{path} cannot be written: ... {advice}"."""
    try:
        yield
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror or error}. {advice}", path=path) from error


def make_folder(folder: Path, advice: str = "Name another folder.") -> None:
    """Makes a folder and the missing folders above it. Raises: OutputError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:  # ValueError: the name holds a NUL
        reason = getattr(error, "strerror", None) or error
        raise OutputError(f"{folder} cannot be made: {reason}. {advice}", path=folder) from error


@contextmanager
def open_atomic(path: Path, advice: str = MAKE_ROOM) -> Iterator[BinaryIO]:
    """A binary stream to a temporary file, which replaces `path` at the end: readers see the old file or the new one.

    Raises: OutputError for every OSError inside the block. Then the old file stays and the temporary one is deleted.
    """
    # The name is cut, because disks allow at most 255 bytes for the whole temporary name.
    temporary = path.with_name(f".{path.name[:50]}.{os.getpid()}.{threading.get_ident()}")
    with output_errors(path, advice):
        try:
            with open(temporary, "wb") as stream:
                yield stream
            move_into_place(temporary, path)
        finally:
            with suppress(OSError):
                os.unlink(temporary)


def write_atomic(path: Path, content: str | bytes, advice: str = MAKE_ROOM) -> None:
    """Writes a whole file or leaves the old one. Text is written as UTF-8, with lone surrogates escaped. Raises: OutputError."""
    with open_atomic(path, advice) as stream:
        stream.write(content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content)


@contextmanager
def staging_folder(folder: Path, advice: str = MAKE_ROOM) -> Iterator[Path]:
    """A temporary folder inside `folder` for several files that belong together.

    Write all of them, call sync_folder, then move each with move_into_place: a full disk is noticed before the first old file is
    replaced. `folder` is made if it does not exist.

    Raises: OutputError for every OSError inside the block.
    """
    import tempfile  # imported only to write a checkpoint

    make_folder(folder, advice)
    with output_errors(folder, advice), tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as temporary:
        yield Path(temporary)
