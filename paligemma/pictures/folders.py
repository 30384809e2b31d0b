"""Many pictures: which they are, and reading them while the model is busy with others. Imports images when it reads.

Names are made one after the other, folder by folder, so that a million pictures take no more memory than the names of the
largest folder. Reading is a few threads that stay a few pictures ahead: Pillow lets other threads run while it decodes.
Checked in tests/pictures/test_folders.py.
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
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from paligemma import files
from paligemma.errors import DatasetError, ImageError, PaliGemmaError
from paligemma.pictures.names import PICTURE_SUFFIXES, is_address

if TYPE_CHECKING:
    from PIL import Image

T = TypeVar("T")
P = TypeVar("P")
LONGEST_LINE = 64 << 20  # characters; a picture as a data: URI may be as long
UTF16 = ("\udcff\udcfe", "\udcfe\udcff")  # how such a file begins, read as UTF-8


# Which


def identity(folder: str) -> tuple[int, int]:
    """What a folder is, by whatever name it is reached. Raises: OSError."""
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def is_folder(entry: os.DirEntry) -> bool:
    """Whether it is a folder or a link to one."""
    try:
        return entry.is_dir()
    except OSError:  # links in a circle
        return False


def in_folder(folder: str, seen: Collection[tuple[int, int]] = ()) -> Iterator[str]:
    """The pictures in a folder and its folders, in the order of their names; what ends like none, or is hidden, is passed over.

    Args:
        seen: identities of folders that are not to be listed; nor is one that is met twice, through a link.
    Yields: paths that begin with `folder`; also a folder that cannot be listed, so that reading it says so.
    """
    left, seen = [folder], set(seen)
    while left:
        folder = left.pop()
        folders, files = [], []
        try:
            number = identity(folder)
            if number in seen:
                continue
            seen.add(number)
            with os.scandir(folder) as entries:
                for entry in entries:
                    if entry.name.startswith("."):
                        continue
                    if is_folder(entry):
                        folders.append(entry.name)
                    elif entry.name.lower().endswith(PICTURE_SUFFIXES):
                        files.append(entry.name)
        except OSError:
            yield folder
            continue
        for name in sorted(files):
            yield os.path.join(folder, name)
        left += [os.path.join(folder, name) for name in sorted(folders, reverse=True)]


def matches(pattern: str) -> Iterator[str]:
    """The paths that a pattern matches. Several ** in a row mean one, but glob takes exponential time for them."""
    try:
        os.lstat(pattern)
    except OSError:
        pass
    except ValueError:  # a NUL or half a character, which no name holds
        return iter(())
    return glob.iglob(re.sub(r"(?<![^/])\*\*(/+\*\*)+(?![^/])", "**", pattern), recursive=True)


def lies_in(folder: str, seen: Collection[tuple[int, int]]) -> bool:
    """Whether a folder is one of those identities, or in one of them."""
    place = Path(os.path.realpath(folder))
    with suppress(OSError):
        return bool(seen) and any(identity(str(above)) in seen for above in (place, *place.parents))
    return False


def expand(word: str, seen: Collection[tuple[int, int]] = ()) -> Iterator[str]:
    """The pictures that a word means: a folder, a file, an address, or a pattern with * ? [ ] and ** for any depth."""
    if is_address(word):
        yield word
        return
    word = os.fspath(files.expand(word))  # "photos/" and "./photos" are photos
    if os.path.isdir(word):
        yield from in_folder(word, seen)
    elif os.path.lexists(word) or not glob.has_magic(word):
        yield word
    else:
        inside: dict[str, bool] = {}  # folder -> whether it is one of `seen`, or in one
        for match in matches(word):
            folder = os.path.dirname(match)
            if folder not in inside:
                inside[folder] = lies_in(folder, seen)
            if not inside[folder]:
                yield from expand(match, seen)


def check_words(words: Iterable[str]) -> None:
    """Raises: ImageError for a word that means no file at all. What is in the files is seen later, one by one."""
    for word in words:
        place = str(files.expand(word))
        if is_address(word) or os.path.lexists(place):
            continue
        if not glob.has_magic(word):
            from paligemma.pictures.sources import explain_missing

            raise ImageError(explain_missing(Path(place)), path=word)
        if next(matches(place), None) is None:
            raise ImageError(f"no file matches {word}. Check the pattern, and put it in quotes.", path=word)


def read_text_lines(path: str) -> Iterator[str]:
    """The lines of a list, without their ends and the empty ones. Raises: DatasetError.

    It is read several times, which a pipe cannot be.
    """
    place = files.expand(path)
    if not files.is_file(place, DatasetError):
        what = "does not exist" if files.stat_path(place, DatasetError) is None else "is a folder or a pipe"
        raise DatasetError(f"{path} cannot be read: it {what}. Name a text file.", path=path)
    try:
        with open(place, encoding="utf-8-sig", errors="surrogateescape", newline="\n") as file:
            for number in count(1):
                line = file.readline(LONGEST_LINE)
                if number == 1 and line.startswith(UTF16):
                    raise DatasetError(f"{path} is in UTF-16, and UTF-8 is needed. Save it as UTF-8.", path=path)
                if len(line) == LONGEST_LINE:
                    too_long = f"line {number} of {path} is longer than {LONGEST_LINE >> 20} million characters"
                    raise DatasetError(f"{too_long}. It is no list: name another file.", path=path)
                if not line:
                    return
                if text := line.rstrip("\r\n"):
                    yield text
    except OSError as error:
        raise DatasetError(f"{path} cannot be read: {error.strerror}. Name a text file.", path=path) from error


def in_list(path: str, seen: Collection[tuple[int, int]] = ()) -> Iterator[str]:
    """The pictures of a list, one a line, as they stand there; a folder stands for its pictures. Raises: DatasetError."""
    for line in read_text_lines(path):
        if is_address(line) or not os.path.isdir(line):
            yield line
        else:
            yield from in_folder(line, seen)


def questions(path: str) -> Iterator[tuple[str, str]]:
    """The image and the prompt of every line {"image": "x.jpg", "prefix": "detect cat", ...}. Raises: DatasetError."""
    for number, line in enumerate(read_text_lines(path), 1):
        try:
            record = files.parse_json(line)
            image, prefix = record["image"], record["prefix"]
            is_fine = isinstance(image, str) and isinstance(prefix, str) and image
        except (ValueError, KeyError):
            is_fine = False
        if not is_fine:
            needed = 'An object with "image" and "prefix", both text, is needed.'
            raise DatasetError(f"line {number} of {path} is no question. {needed}", path=path)
        yield image, prefix


def shard_of(name: str, count: int) -> int:
    """Which of `count` equal shares a picture belongs to, from 1; the same on every machine and in every order."""
    return int.from_bytes(blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little") % count + 1


# Reading


@dataclass(frozen=True)
class Loaded:
    """A picture for the model, or the error that says why there is none.

    Args:
        picture: squeezed to the model's square, so that little memory waits.
        size: width and height of the picture itself; None if there is none.
        original: reads the picture itself once more, if that is wanted later; kept, it would take far more memory than its file.
        notes: what was converted or chosen.
    """

    picture: "Image.Image | PaliGemmaError"
    size: tuple[int, int] | None = None
    original: "Callable[[], Image.Image] | None" = None
    notes: list[str] = field(default_factory=list)


def version_of(place: str) -> tuple[int, int, int] | None:
    """What changes when a file does; None for an address, or when there is no file.

    Raises: ImageError for a folder, which is asked for only if it could not be listed.
    """
    if is_address(place):
        return None
    try:
        status = os.stat(place)
    except (OSError, ValueError):  # load_image finds the words for it
        return None
    if stat.S_ISDIR(status.st_mode):
        raise ImageError(f"the folder {place} cannot be listed. Change its permissions.", path=place)
    return status.st_ino, status.st_size, status.st_mtime_ns


@contextmanager
def one_picture(place: object) -> Iterator[None]:
    """Makes every exception within an error of ours, for a fault in a decoder, or in this program, must not end a run of many.

    Raises: PaliGemmaError; those of ours as they are, any other as one that says where to report it.
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


def load(place: str | bytes, side: int, keeps_original: bool = False, is_typed: bool = True, **options: object) -> Loaded:
    """Reads a picture and squeezes it as the processor does: it then has nothing left to do, and its pixels are the same.

    Whatever goes wrong is this picture's error and ends nothing else.

    Args:
        place: a path or an address, or the bytes of a file.
        side: of the model's square.
        is_typed: whether a user typed the place, see load_image.
        options: of load_image.
    """
    from paligemma.pictures.images import load_image, resize_to_square
    from paligemma.pictures.sources import read_bytes

    notes: list[str] = []
    try:
        with one_picture(place):
            before = version_of(place) if isinstance(place, str) else None
            source = place
            if keeps_original and isinstance(place, str) and is_address(place):  # not to be fetched twice
                source = {"bytes": read_bytes(place, is_typed)[0], "path": place}
            resize = lambda picture: (resize_to_square(picture, side), picture.size)  # noqa: E731
            small, size = load_image(source, is_typed=is_typed, notes=notes, then=resize, **options)
            if isinstance(place, str) and version_of(place) != before:
                raise ImageError(f"{place} changed while it was read. Ask again with --retry_failed.", path=place)
    except PaliGemmaError as error:
        return Loaded(error)
    return Loaded(small, size, partial(load_again, source, before, is_typed, options) if keeps_original else None, notes)


def load_again(source: object, before: tuple[int, int, int] | None, is_typed: bool, options: dict) -> "Image.Image":
    """The picture itself, once more. Raises: PaliGemmaError, also if the file is another one than before."""
    from paligemma.pictures.images import load_image

    with one_picture(source):
        picture = load_image(source, is_typed=is_typed, **options)
    if isinstance(source, str) and version_of(source) != before:
        raise ImageError(f"{source} changed while it was asked about. Ask again.", path=source)
    return picture


class Readers:
    """Threads that read. They end with the program: one that waits for a slow server holds nothing up.

    Args:
        read: called with what is submitted.
        count: of the threads.
    """

    def __init__(self, read: Callable[[P], Loaded], count: int):
        self.read, self.count = read, count
        self.tasks: queue.SimpleQueue[tuple[P, Future] | None] = queue.SimpleQueue()
        for _ in range(count):
            threading.Thread(target=self.work, name="reader", daemon=True).start()

    def submit(self, place: P) -> Future:
        """What `read` returns for a place, later."""
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
        """What has not begun is not read; what has begun is not waited for."""
        with suppress(queue.Empty):
            while True:
                self.tasks.get_nowait()
        for _ in range(self.count):
            self.tasks.put(None)


def read_ahead(
    items: Iterable[T], place: Callable[[T], P], read: Callable[[P], Loaded], threads: int, ahead: int
) -> Iterator[tuple[T, Loaded]]:
    """Every item with its picture, in order. Items in a row about the same place share one picture object.

    Args:
        items: taken one by one, `ahead` before they are asked for.
        place: where the picture of an item is, as `read` takes it.
        read: called in `threads` threads.
        ahead: how many pictures are read, or being read, before they are asked for.
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
