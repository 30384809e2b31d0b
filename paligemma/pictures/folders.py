"""Lists many pictures (from folders, patterns and lists), and reads them ahead in threads while the model runs.

Names are produced one at a time, folder by folder, so that a million pictures take no more memory than the names of the largest
folder. A few threads read a few pictures ahead; Pillow lets other threads run while it decodes. images.py is imported when the
first picture is read. Checked in tests/pictures/test_folders.py.
"""

import glob
import os
import queue
import re
import stat
import threading
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from paligemma import files
from paligemma.errors import DatasetError, ImageError, PaliGemmaError
from paligemma.pictures.names import PICTURE_SUFFIXES, is_address

if TYPE_CHECKING:
    from PIL import Image

T = TypeVar("T")
P = TypeVar("P")
MAX_LINE = 64 << 20  # characters; a line may hold a picture as a data: URI
UTF16 = ("\udcff\udcfe", "\udcfe\udcff")  # the beginning of a UTF-16 file that is read as UTF-8
NEEDED = 'An object with "image" and "prefix", both text, is needed.'


# Finding pictures


def identity(folder: str) -> tuple[int, int]:
    """A key for a folder that does not depend on the path by which it is reached. Raises: OSError."""
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def in_folder(folder: str, seen: Collection[tuple[int, int]] = ()) -> Iterator[str]:
    """The pictures in a folder and in the folders below it, ordered by name.

    Hidden files, and files without a picture's suffix, are skipped.

    Args:
        seen: identities of the folders to leave out. A folder that is reached twice (through a link) is listed only once.
    Yields: paths that begin with `folder`. A folder that cannot be listed is yielded too; file_version raises ImageError for it.
    """
    seen, unreadable = set(seen), []
    for current, folders, names in os.walk(folder, followlinks=True, onerror=lambda error: unreadable.append(error.filename)):
        yield from unreadable
        unreadable.clear()
        try:
            number = identity(current)
        except OSError:  # it was deleted meanwhile
            continue
        if number in seen:
            folders.clear()  # os.walk then goes no deeper
            continue
        seen.add(number)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        pictures = sorted(name for name in names if name.lower().endswith(PICTURE_SUFFIXES) and not name.startswith("."))
        yield from (os.path.join(current, name) for name in pictures)
    yield from unreadable


def matches(pattern: str) -> Iterator[str]:
    """The paths that match a pattern. Repeated ** are reduced to one, because glob takes exponential time for them."""
    try:
        os.lstat(pattern)  # only to find out whether the pattern holds a NUL or a lone surrogate, which no file name can hold
    except OSError:
        pass
    except ValueError:
        return iter(())
    return glob.iglob(re.sub(r"(?<![^/])\*\*(/+\*\*)+(?![^/])", "**", pattern), recursive=True)


def lies_in(folder: str, seen: Collection[tuple[int, int]]) -> bool:
    """Whether a folder, or a folder above it, has one of these identities."""
    path = Path(os.path.realpath(folder))
    with suppress(OSError):
        return bool(seen) and any(identity(str(above)) in seen for above in (path, *path.parents))
    return False


def expand(argument: str, seen: Collection[tuple[int, int]] = ()) -> Iterator[str]:
    """The pictures that an argument names: a folder, a file, an address, or a pattern with * ? [ ] and ** (any depth).

    Args:
        seen: as in in_folder.
    """
    if is_address(argument):
        yield argument
        return
    path = os.fspath(files.expand(argument))  # "photos/" and "./photos" become "photos"
    if os.path.isdir(path):
        yield from in_folder(path, seen)
    elif os.path.lexists(path) or not glob.has_magic(path):
        yield path
    else:
        inside: dict[str, bool] = {}  # folder -> whether it lies in one of `seen`
        for match in matches(path):
            folder = os.path.dirname(match)
            if folder not in inside:
                inside[folder] = lies_in(folder, seen)
            if not inside[folder]:
                yield from expand(match, seen)


def check_arguments(arguments: Iterable[str]) -> None:
    """Raises: ImageError for an argument that names no file. The content of the files is checked when they are read."""
    for argument in arguments:
        path = str(files.expand(argument))
        if is_address(argument) or os.path.lexists(path):
            continue
        if not glob.has_magic(argument):
            from paligemma.pictures.sources import explain_missing

            raise ImageError(explain_missing(Path(path)), path=argument)
        if next(matches(path), None) is None:
            raise ImageError(f"no file matches {argument}. Check the pattern, and put it in quotes.", path=argument)


def read_text_lines(path: str) -> Iterator[tuple[int, str]]:
    """The lines of a text file, each with its number and without its line end. Empty lines are skipped.

    Raises: DatasetError, also for a pipe, because lists are read several times.
    """
    expanded = files.expand(path)
    if not files.is_file(expanded, DatasetError):
        what = "does not exist" if files.stat_path(expanded, DatasetError) is None else "is a folder or a pipe"
        raise DatasetError(f"{path} cannot be read: it {what}. Name a text file.", path=path)
    try:
        with open(expanded, encoding="utf-8-sig", errors="surrogateescape", newline="\n") as file:
            for number, line in enumerate(iter(partial(file.readline, MAX_LINE), ""), 1):
                if number == 1 and line.startswith(UTF16):
                    raise DatasetError(f"{path} is in UTF-16, and UTF-8 is needed. Save it as UTF-8.", path=path)
                if len(line) == MAX_LINE:
                    too_long = f"{path}:{number} is longer than {MAX_LINE >> 20} million characters"
                    raise DatasetError(f"{too_long}. This is not a list: name another file.", path=path)
                if text := line.rstrip("\r\n"):
                    yield number, text
    except OSError as error:
        raise DatasetError(f"{path} cannot be read: {error.strerror}. Name a text file.", path=path) from error


def in_list(path: str, seen: Collection[tuple[int, int]] = ()) -> Iterator[str]:
    """The pictures of a list with one name per line; a folder is replaced by its pictures. Raises: DatasetError."""
    for _, line in read_text_lines(path):
        if is_address(line) or not os.path.isdir(line):
            yield line
        else:
            yield from in_folder(line, seen)


def questions(path: str) -> Iterator[tuple[str, str]]:
    """The image and the prompt of every line {"image": "x.jpg", "prefix": "detect cat", ...}. Raises: DatasetError."""
    for number, line in read_text_lines(path):
        try:
            record = files.parse_json(line, MAX_LINE)
        except files.JSONFault as fault:
            raise DatasetError(f"{path}:{number}:{fault.column} is {fault}. {NEEDED}", path=path) from fault
        image, prefix = record.get("image"), record.get("prefix")
        if not (isinstance(image, str) and isinstance(prefix, str) and image):
            raise DatasetError(f"{path}:{number} lacks an image or a prefix. {NEEDED}", path=path)
        yield image, prefix


def shard_of(name: str, count: int) -> int:
    """The shard of a picture, from 1 to `count`. It depends only on the name, and shards are about equally large."""
    return int.from_bytes(blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little") % count + 1


# Reading


@dataclass(frozen=True)
class Loaded:
    """A picture for the model, or the error that was raised when it was read.

    Args:
        picture: resized to the square that the model takes, so that waiting pictures need little memory; or an error.
        size: width and height of the original picture; None after an error.
        original: a function that reads the original picture again, because keeping its pixels would take far more memory.
        notes: sentences about conversions and choices, see load_image.
    """

    picture: "Image.Image | PaliGemmaError"
    size: tuple[int, int] | None = None
    original: "Callable[[], Image.Image] | None" = None
    notes: list[str] = field(default_factory=list)


def file_version(source: str) -> tuple[int, int, int] | None:
    """Inode, size and modification time of a file, to notice a change; None for an address or a missing file.

    Raises: ImageError for a folder. in_folder yields a folder only if it could not be listed.
    """
    if is_address(source):
        return None
    try:
        status = os.stat(source)
    except (OSError, ValueError):  # load_image will raise the error
        return None
    if stat.S_ISDIR(status.st_mode):
        raise ImageError(f"the folder {source} cannot be listed. Change its permissions.", path=source)
    return status.st_ino, status.st_size, status.st_mtime_ns


@contextmanager
def picture_errors(source: object) -> Iterator[None]:
    """Turns every exception inside the block into a PaliGemmaError, because a long run must not stop at a bad picture.

    A PaliGemmaError stays as it is. Any other exception is a bug here or in a decoder, so it becomes an ImageError that asks the
    user for a report.
    """
    try:
        yield
    except PaliGemmaError:
        raise
    except Exception as error:  # whatever a decoder raises must not end a run over many pictures
        name = source if isinstance(source, str) else "the picture"
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        message = f"reading {name} failed ({reason}). Save it as PNG, and please report this with the file."
        raise ImageError(message, path=name) from error


def load(source: str | bytes, side: int | None, keeps_original: bool = False, is_typed: bool = True, **options: Any) -> Loaded:
    """Reads a picture and resizes it as the processor does. Nothing is raised: an error is returned as `picture`.

    Args:
        source: a path or an address, or the bytes of a file.
        side: the side of the square that the model takes, in pixels; None = the picture is not resized.
        keeps_original: whether to provide `original`.
        is_typed: whether a user typed the source, see load_image.
        options: for load_image.
    """
    from paligemma.pictures.images import load_image, resize_to_square
    from paligemma.pictures.sources import read_bytes

    def resize(picture: "Image.Image") -> tuple["Image.Image", tuple[int, int]]:
        return (resize_to_square(picture, side) if side else picture), picture.size

    notes: list[str] = []
    try:
        with picture_errors(source):
            before = file_version(source) if isinstance(source, str) else None
            readable: object = source
            if keeps_original and isinstance(source, str) and is_address(source):  # so that it is downloaded only once
                readable = {"bytes": read_bytes(source, is_typed)[0], "path": source}
            small, size = load_image(readable, is_typed=is_typed, notes=notes, then=resize, **options)
            if isinstance(source, str) and file_version(source) != before:
                raise ImageError(f"{source} changed while it was read. Ask about it again.", path=source)
    except PaliGemmaError as error:
        return Loaded(error)
    return Loaded(small, size, partial(load_again, readable, before, is_typed, options) if keeps_original else None, notes)


def load_again(source: object, before: tuple[int, int, int] | None, is_typed: bool, options: dict) -> "Image.Image":
    """The original picture, read again. Raises: PaliGemmaError, also if the file has changed."""
    from paligemma.pictures.images import load_image

    with picture_errors(source):
        picture = load_image(source, is_typed=is_typed, **options)
    if isinstance(source, str) and file_version(source) != before:
        raise ImageError(f"{source} changed while the question was being answered. Run it again.", path=source)
    return picture


class Readers:
    """A pool of daemon threads. Unlike with ThreadPoolExecutor, the program can end while a thread is still in a slow download.

    Args:
        read: the function that is called with each submitted source.
        count: number of threads.
    """

    def __init__(self, read: Callable[[P], Loaded], count: int):
        self.read, self.count = read, count
        self.tasks: queue.SimpleQueue[tuple[P, Future] | None] = queue.SimpleQueue()
        for _ in range(count):
            threading.Thread(target=self.work, name="reader", daemon=True).start()

    def submit(self, source: P) -> Future:
        """A future for the result of `read` for this source."""
        future: Future = Future()
        self.tasks.put((source, future))
        return future

    def work(self) -> None:
        while (task := self.tasks.get()) is not None:
            source, future = task
            try:
                future.set_result(self.read(source))
            except BaseException as error:  # noqa: BLE001 (future.result() raises it)
                future.set_exception(error)

    def close(self) -> None:
        """Cancels the tasks that have not begun. Does not wait for running tasks."""
        with suppress(queue.Empty):
            while True:
                self.tasks.get_nowait()
        for _ in range(self.count):
            self.tasks.put(None)


def read_ahead(
    items: Iterable[T], get_source: Callable[[T], P], read: Callable[[P], Loaded], threads: int, ahead: int
) -> Iterator[tuple[T, Loaded]]:
    """Each item with its picture, in order. Consecutive items with the same source share one picture object.

    Args:
        items: an iterable from which one item is taken at a time.
        get_source: returns the source of an item's picture, the argument of `read`.
        read: reads a picture; called in `threads` threads.
        ahead: how many items are read in advance.
    """
    pool = Readers(read, threads)
    waiting: deque = deque()
    last = None
    try:
        for item in items:
            source = get_source(item)
            if last is None or last[0] != source:
                last = source, pool.submit(source)
            waiting.append((item, last[1]))
            if len(waiting) > ahead:
                first, picture = waiting.popleft()
                yield first, picture.result()
        while waiting:
            first, picture = waiting.popleft()
            yield first, picture.result()
    finally:
        pool.close()
