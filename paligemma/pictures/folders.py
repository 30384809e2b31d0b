"""Lists many pictures (of folders, patterns and lists), and reads them ahead in threads while the model runs.

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
        seen: identities of folders that are skipped. A folder that is reached twice (through a link) is listed only once.
    Yields: paths that begin with `folder`. A folder that cannot be listed is yielded itself: reading it raises the error.
    """
    seen, unreadable = set(seen), []
    for place, folders, names in os.walk(folder, followlinks=True, onerror=lambda error: unreadable.append(error.filename)):
        yield from unreadable
        unreadable.clear()
        try:
            number = identity(place)
        except OSError:  # it was deleted meanwhile
            continue
        if number in seen:
            folders.clear()  # os.walk then goes no deeper
            continue
        seen.add(number)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        pictures = sorted(name for name in names if name.lower().endswith(PICTURE_SUFFIXES) and not name.startswith("."))
        yield from (os.path.join(place, name) for name in pictures)
    yield from unreadable


def matches(pattern: str) -> Iterator[str]:
    """The paths that match a pattern. Repeated ** are reduced to one, because glob takes exponential time for them."""
    try:
        os.lstat(pattern)
    except OSError:
        pass
    except ValueError:  # a NUL or a lone surrogate, which no file name can hold
        return iter(())
    return glob.iglob(re.sub(r"(?<![^/])\*\*(/+\*\*)+(?![^/])", "**", pattern), recursive=True)


def lies_in(folder: str, seen: Collection[tuple[int, int]]) -> bool:
    """Whether a folder is one of those with these identities, or lies in one of them."""
    place = Path(os.path.realpath(folder))
    with suppress(OSError):
        return bool(seen) and any(identity(str(above)) in seen for above in (place, *place.parents))
    return False


def expand(word: str, seen: Collection[tuple[int, int]] = ()) -> Iterator[str]:
    """The pictures that a word names: it may be a folder, a file, an address, or a pattern with * ? [ ] and ** (any depth).

    Args:
        seen: as in in_folder.
    """
    if is_address(word):
        yield word
        return
    word = os.fspath(files.expand(word))  # "photos/" and "./photos" become "photos"
    if os.path.isdir(word):
        yield from in_folder(word, seen)
    elif os.path.lexists(word) or not glob.has_magic(word):
        yield word
    else:
        inside: dict[str, bool] = {}  # folder -> whether it lies in one of `seen`
        for match in matches(word):
            folder = os.path.dirname(match)
            if folder not in inside:
                inside[folder] = lies_in(folder, seen)
            if not inside[folder]:
                yield from expand(match, seen)


def check_words(words: Iterable[str]) -> None:
    """Raises: ImageError for a word that names no file. The content of the files is checked when they are read."""
    for word in words:
        place = str(files.expand(word))
        if is_address(word) or os.path.lexists(place):
            continue
        if not glob.has_magic(word):
            from paligemma.pictures.sources import explain_missing

            raise ImageError(explain_missing(Path(place)), path=word)
        if next(matches(place), None) is None:
            raise ImageError(f"no file matches {word}. Check the pattern, and put it in quotes.", path=word)


def read_text_lines(path: str) -> Iterator[tuple[int, str]]:
    """The numbers of the lines of a text file, and the lines without their line ends. Empty lines are skipped.

    Raises: DatasetError, also for a pipe, because lists are read several times.
    """
    place = files.expand(path)
    if not files.is_file(place, DatasetError):
        what = "does not exist" if files.stat_path(place, DatasetError) is None else "is a folder or a pipe"
        raise DatasetError(f"{path} cannot be read: it {what}. Name a text file.", path=path)
    try:
        with open(place, encoding="utf-8-sig", errors="surrogateescape", newline="\n") as file:
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
        original: a function that reads the original picture again; to keep the pixels would take far more memory.
        notes: what was converted or chosen, see load_image.
    """

    picture: "Image.Image | PaliGemmaError"
    size: tuple[int, int] | None = None
    original: "Callable[[], Image.Image] | None" = None
    notes: list[str] = field(default_factory=list)


def file_version(place: str) -> tuple[int, int, int] | None:
    """Inode, size and modification time of a file, to notice a change; None for an address or a missing file.

    Raises: ImageError for a folder. in_folder yields a folder only if it could not be listed.
    """
    if is_address(place):
        return None
    try:
        status = os.stat(place)
    except (OSError, ValueError):  # load_image will raise the error
        return None
    if stat.S_ISDIR(status.st_mode):
        raise ImageError(f"the folder {place} cannot be listed. Change its permissions.", path=place)
    return status.st_ino, status.st_size, status.st_mtime_ns


@contextmanager
def picture_errors(place: object) -> Iterator[None]:
    """Turns every exception inside the block into a PaliGemmaError, so that one bad picture does not stop a long run.

    A PaliGemmaError stays as it is. Any other exception is a bug here or in a decoder: it becomes an ImageError that asks the
    user to report it.
    """
    try:
        yield
    except PaliGemmaError:
        raise
    except Exception as error:
        place = place if isinstance(place, str) else "the picture"
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        message = f"reading {place} failed ({reason}). Save it as PNG, and please report this with the file."
        raise ImageError(message, path=place) from error


def load(place: str | bytes, side: int | None, keeps_original: bool = False, is_typed: bool = True, **options: Any) -> Loaded:
    """Reads a picture and resizes it as the processor does. Nothing is raised: an error is returned as `picture`.

    Args:
        place: a path or an address, or the bytes of a file.
        side: of the square that the model takes, in pixels; None = the picture is not resized.
        keeps_original: whether to provide `original`.
        is_typed: whether a user typed the place, see load_image.
        options: for load_image.
    """
    from paligemma.pictures.images import load_image, resize_to_square
    from paligemma.pictures.sources import read_bytes

    notes: list[str] = []
    try:
        with picture_errors(place):
            before = file_version(place) if isinstance(place, str) else None
            source = place
            if keeps_original and isinstance(place, str) and is_address(place):  # so that it is downloaded only once
                source = {"bytes": read_bytes(place, is_typed)[0], "path": place}
            resize = lambda picture: (resize_to_square(picture, side) if side else picture, picture.size)  # noqa: E731
            small, size = load_image(source, is_typed=is_typed, notes=notes, then=resize, **options)
            if isinstance(place, str) and file_version(place) != before:
                raise ImageError(f"{place} changed while it was read. Ask again with --retry_failed.", path=place)
    except PaliGemmaError as error:
        return Loaded(error)
    return Loaded(small, size, partial(load_again, source, before, is_typed, options) if keeps_original else None, notes)


def load_again(source: object, before: tuple[int, int, int] | None, is_typed: bool, options: dict) -> "Image.Image":
    """The original picture, read again. Raises: PaliGemmaError, also if the file has changed."""
    from paligemma.pictures.images import load_image

    with picture_errors(source):
        picture = load_image(source, is_typed=is_typed, **options)
    if isinstance(source, str) and file_version(source) != before:
        raise ImageError(f"{source} changed while it was asked about. Ask again.", path=source)
    return picture


class Readers:
    """A pool of daemon threads. Unlike threads of ThreadPoolExecutor, they do not delay the program's end if a server is slow.

    Args:
        read: the function that is called with each submitted place.
        count: number of threads.
    """

    def __init__(self, read: Callable[[P], Loaded], count: int):
        self.read, self.count = read, count
        self.tasks: queue.SimpleQueue[tuple[P, Future] | None] = queue.SimpleQueue()
        for _ in range(count):
            threading.Thread(target=self.work, name="reader", daemon=True).start()

    def submit(self, place: P) -> Future:
        """A future for what `read` returns for this place."""
        future: Future = Future()
        self.tasks.put((place, future))
        return future

    def work(self) -> None:
        while (task := self.tasks.get()) is not None:
            place, future = task
            try:
                future.set_result(self.read(place))
            except BaseException as error:  # noqa: BLE001 (raised where the result is asked for)
                future.set_exception(error)

    def close(self) -> None:
        """Cancels the tasks that have not begun; does not wait for the others."""
        with suppress(queue.Empty):
            while True:
                self.tasks.get_nowait()
        for _ in range(self.count):
            self.tasks.put(None)


def read_ahead(
    items: Iterable[T], place: Callable[[T], P], read: Callable[[P], Loaded], threads: int, ahead: int
) -> Iterator[tuple[T, Loaded]]:
    """Each item with its picture, in order. Consecutive items with the same place share one picture object.

    Args:
        items: taken one at a time.
        place: returns the place of an item's picture, as `read` takes it.
        read: reads a picture; called in `threads` threads.
        ahead: how many items are taken, and their pictures read, before they are asked for.
    """
    pool = Readers(read, threads)
    waiting: deque = deque()
    last = None
    try:
        for item in items:
            if last is None or last[0] != place(item):
                last = place(item), pool.submit(place(item))
            waiting.append((item, last[1]))
            if len(waiting) > ahead:
                first, picture = waiting.popleft()
                yield first, picture.result()
        while waiting:
            first, picture = waiting.popleft()
            yield first, picture.result()
    finally:
        pool.close()
