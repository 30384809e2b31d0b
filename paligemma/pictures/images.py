"""Any picture, from anywhere, as 8-bit RGB, upright; or one sentence that says why not. Imports errors, fetch and files.

A file may be cut off, mislabelled, huge once unpacked, or no picture at all. So the format is told from the first bytes and
never from the name, only formats of photographs and drawings are decoded, and the number of pixels is checked in the header.
What is converted: transparency is laid on a colour, 16 bits become 8 by dividing by 257, floats count from 0 to 1 or from 0
to 255, one frame is taken from an animation (each of these is reported in `notes`), and the EXIF orientation is applied. What
comes out carries its pixels and nothing else, so that no later step can turn it again.

Checked in tests/pictures/test_images.py and tests/pictures/test_orientation.py.
"""

import base64
import ctypes
import io
import math
import os
import re
import stat
import struct
import sys
import threading
import urllib.parse
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import IO, TypeGuard, TypeVar

import numpy as np
from PIL import Image, ImageColor, ImageFile, _imaging

from paligemma.errors import AccessError, ImageError, UsageError, one_line
from paligemma.files import expand_text, names_in, similar_names, split_file_address
from paligemma.pictures.fetch import MAX_DOWNLOAD_BYTES, fetch

T = TypeVar("T")

MAX_FILE_BYTES = 256 << 20
MAX_PIXELS = 50_000_000
MEMORY_BYTES = 1 << 30  # what all threads that read pictures may take together
BYTES_PER_PIXEL = 16  # of decoding and converting one: 4 as it is decoded, 4 as RGB, the rest for decoders that keep two frames
LARGE_FILE = 32 << 20  # bytes; a larger one is read while no other picture is
BAND_PIXELS = 1 << 20  # converted at a time, so that the steps in between take little memory
MOST_STEPS = 500_000  # frames and their parts that are counted; a file can hold millions
MOST_FRAME_PIXELS = 1_000_000_000  # of all the frames that must be decoded to get to one, and of all the scans of a JPEG
MOST_HEADER_BYTES = 1 << 16  # of a PPM
MOST_COMMENTS = 1000  # in a PPM; its decoder begins anew with each
MOST_SLOW_BYTES = 4 << 20  # of a file in a form whose decoder is written in Python
DARK = 1 << 14  # 16 bits whose brightest value is lower are nearly black
NEARLY_BLACK = " That is nearly black; --stretch makes the brightest of them white."
WIDEST = 20  # sides in a relation beyond this are worth a note: the model sees every picture as a square
UPRIGHT = {  # EXIF orientation -> what turns the picture upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
TURNED = UPRIGHT | {6: UPRIGHT[8], 8: UPRIGHT[6]}
ORIENTATION = 0x0112  # the tag's number in EXIF and TIFF
# Decoders fail in many ways on damaged files: whatever they raise, the file is what is wrong.
DECODER_ERRORS = (
    OSError, SyntaxError, ValueError, ArithmeticError, LookupError, TypeError, AttributeError, AssertionError, RuntimeError,
    MemoryError, EOFError, NameError, BufferError, StopIteration, struct.error, zlib.error,
)  # fmt: skip

READ = {  # how files begin that are decoded -> Pillow's name of the format
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"\xff\xd8\xff": "JPEG",  # a phone's MPO, too: a JPEG with further ones behind it
    b"GIF87a": "GIF",
    b"GIF89a": "GIF",
    b"BM": "BMP",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"II+\0": "TIFF",
    b"MM\0+": "TIFF",
} | {b"P%d%c" % (kind, space): "PPM" for kind in range(1, 7) for space in b" \t\n\r"}
REFUSED = {  # how other files begin -> what to say about them
    b"%PDF": "a PDF. Export the page as PNG",
    b"%!PS": "PostScript. Export it as PNG",
    b"\xc5\xd0\xd3\xc6": "an EPS file. Export it as PNG",
    b"8BPS": "a Photoshop file. Export it as PNG",
    b"SIMPLE  =": "a FITS file. Export it as PNG",
    b"\0\0\0\x0cjP  ": "JPEG 2000, which is not read here. Save it as PNG",
    b"\xff\x4f\xff\x51": "JPEG 2000, which is not read here. Save it as PNG",
    b"\0\0\0\x0cJXL ": "JPEG XL, which is not read here. Save it as PNG",
    b"\xff\x0a": "JPEG XL, which is not read here. Save it as PNG",
    b"\0\0\1\0": "an icon. Save it as PNG",
    b"\x1aE\xdf\xa3": "a video. Save one of its frames as PNG",
    b"PK\3\4": "a ZIP archive. Unpack it first",
    b"\x1f\x8b": "a gzip archive. Unpack it first",
    b"version https://git-lfs": "a pointer of Git LFS instead of the file. Run git lfs pull",
}
HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")


# How much at once


class Budget:
    """Bytes that several threads share. Whoever wants more than there are gets all of them, and is then alone."""

    def __init__(self, total: int):
        self.total = self.left = total
        self.changed = threading.Condition()

    @contextmanager
    def take(self, amount: float) -> Iterator[None]:
        """Waits until so many are left, and gives them back at the end."""
        amount = min(amount, self.total)
        with self.changed:
            self.changed.wait_for(lambda: self.left >= amount)
            self.left -= amount
        try:
            yield
        finally:
            with self.changed:
                self.left += amount
                self.changed.notify_all()


MEMORY = Budget(MEMORY_BYTES)
# Pillow's own 16 MB pieces of a picture are small enough for malloc to keep them, for each thread, after the picture is gone:
# 1.6 GB after eight large ones. What is above 32 MB it gives back at once.
Image.core.set_block_size(2**28)


# Where from: a path, an address, a data: URI, an open file


def shown(path: str | os.PathLike) -> str:
    """A path for messages."""
    return one_line(os.fsdecode(path))


def read_file(path: str | os.PathLike) -> bytes:
    """The bytes of a regular file. Raises: ImageError for anything that is not one, or is too large."""
    name = shown(path)
    try:
        status = os.stat(path)
        if stat.S_ISDIR(status.st_mode):
            raise ImageError(f"{name} is a folder. A picture is needed: name a file in it.", path=name)
        if not stat.S_ISREG(status.st_mode):
            raise ImageError(f"{name} is not a regular file. Pipe the picture in, or save it to a file first.", path=name)
        if status.st_size > MAX_FILE_BYTES:
            size, most = status.st_size >> 20, MAX_FILE_BYTES >> 20
            raise ImageError(f"{name} has {size} MB, and {most} is the limit. Make the picture smaller.", path=name)
        with open(path, "rb") as file:
            return file.read(MAX_FILE_BYTES)
    except FileNotFoundError as error:
        raise ImageError(explain_missing(Path(os.fsdecode(path))), path=name) from error
    except PermissionError as error:
        raise ImageError(f"{name} may not be read by this user. Change its permissions.", path=name) from error
    except (OSError, ValueError) as error:  # a loop of links, a name too long, a NUL in it
        reason = error.strerror if isinstance(error, OSError) else error
        raise ImageError(f"{name} cannot be opened: {reason}. Name another file.", path=name) from error


def explain_missing(path: Path) -> str:
    """That there is no such file, and what has a name like it."""
    name = shown(path)
    try:
        if path.is_symlink():
            return f"{name} is a link to a file that does not exist. Correct the link."
        if not os.path.isdir(path.parent):
            return f"{name} does not exist, nor does the folder {shown(path.parent)}. Check the path."
    except (OSError, ValueError):  # a name that is too long, a folder that may not be searched
        return f"{name} does not exist. Check the path."
    close = similar_names(path.name, names_in(path.parent))
    return f"{name} does not exist. " + (f"Did you mean {' or '.join(map(shown, close))}?" if close else "Check the path.")


def read_data_uri(uri: str) -> bytes:
    """The bytes in a data: URI. Raises: ImageError; its text never holds the data."""
    head, comma, body = uri.partition(",")
    if not comma:
        raise ImageError("a data: URI has no comma. It is written data:image/png;base64,iVBOR...", path="data:")
    if not body.isascii():
        raise ImageError("a data: URI holds characters beyond ASCII. Encode the file again, in base64.", path="data:")
    if len(body) > MAX_DOWNLOAD_BYTES * 4 // 3 + 4:
        raise ImageError(f"a data: URI holds more than {MAX_DOWNLOAD_BYTES >> 20} MB. Save it to a file.", path="data:")
    data = urllib.parse.unquote_to_bytes(body)
    if not head.lower().endswith(";base64"):
        return data
    data = bytes(data.translate(None, b" \t\r\n"))
    try:
        return base64.b64decode(data + b"=" * (-len(data) % 4), validate=True)
    except ValueError as error:
        raise ImageError(f"a data: URI is not valid base64: {error}. Encode the file again.", path="data:") from error


def read_object(source: IO[bytes], name: str) -> bytes:
    """The bytes of an open file, from its beginning where it can go there. Raises: ImageError."""
    try:
        with suppress(OSError, AttributeError):  # a pipe, or an answer from the network
            source.seek(0)
        parts, left = [], MAX_FILE_BYTES + 1
        while left > 0 and (part := source.read(left)) != b"":  # a pipe gives what is there by now
            if not isinstance(part, bytes):
                raise ImageError(f'{name} gives {type(part).__name__}, not bytes. Open the file with mode "rb".', path=name)
            parts.append(part)
            left -= len(part)
    except (OSError, ValueError, TypeError) as error:  # ValueError: it is closed; TypeError: another kind of read()
        raise ImageError(f"{name} cannot be read: {one_line(error).rstrip('.')}. Open it again.", path=name) from error
    if left <= 0:
        raise ImageError(f"{name} has over {MAX_FILE_BYTES >> 20} MB, which is the limit. Make the picture smaller.", path=name)
    return b"".join(parts)


def read_address(source: str, name: str, is_typed: bool) -> bytes:
    """The bytes at an http(s) address. Raises: AccessError, also for an answer that is no picture."""
    data, kind = fetch(source, may_be_private=is_typed)
    if sniff(data) is None and not kind.startswith("image/"):
        raise AccessError(f"{name} answered 200 OK with {one_line(kind) or 'no type'}: {describe(data)}.", path=name)
    return data


def local_path(address: str, name: str) -> str:
    """The path in a file:// address. Raises: ImageError for one that names another machine."""
    host, path = split_file_address(address)
    if host:
        raise ImageError(f"{name} names the machine {one_line(host)}. Write file:///, then the path.", path=name)
    return str(path)


def as_path(source: str, is_typed: bool) -> str:
    """A path as it is meant: ~ stands for a home folder where a user wrote it."""
    try:
        return expand_text(source) if is_typed and source.startswith("~") and not os.path.lexists(source) else source
    except ValueError:  # a NUL in it
        return source


def read_bytes(source: object, is_typed: bool) -> tuple[bytes, str]:
    """The bytes of a picture that is not decoded yet, and a name for it. Raises: ImageError, AccessError."""
    if isinstance(source, bytes | bytearray | memoryview):
        return bytes(source), "the picture"
    if not isinstance(source, str | os.PathLike):
        name = f"the {type(source).__name__}"
        return read_object(source, name), name
    if not isinstance(source, str):
        path = os.fspath(source)
        return read_file(as_path(path, is_typed) if isinstance(path, str) else path), shown(source)
    if source[:5].lower() == "data:":
        return read_data_uri(source), "data:"
    name = shown(source)
    scheme = re.match("([A-Za-z][A-Za-z0-9+.-]+)://", source)
    if not scheme:  # nor one letter, which is a drive
        return read_file(as_path(source, is_typed)), name
    kind = scheme[1].lower()
    if kind in ("http", "https"):
        return read_address(source, name, is_typed), name
    if kind != "file":
        raise ImageError(f"{name} begins with {kind}:. Give a path, or an address with http(s).", path=name)
    if not is_typed:
        raise ImageError(f"{name} stands in data, where file: is not allowed. Write the path instead.", path=name)
    return read_file(local_path(source, name)), name


# What is it


def sniff(data: bytes) -> str | None:
    """Pillow's name of the format, by the first bytes; None if it is none of those that are read."""
    for start, kind in READ.items():
        if data.startswith(start):
            return kind
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    if data[4:8] == b"ftyp":
        brands = [data[i : i + 4] for i in (8, *range(16, min(int.from_bytes(data[:4], "big"), 64), 4))]
        if b"avif" in brands or b"avis" in brands:
            return "AVIF"
        if any(brand in HEIC_BRANDS for brand in brands):
            return "HEIF"
    return None


def describe(data: bytes) -> str:
    """What a file is that is no picture, and what to do, without a full stop."""
    if not data:
        return "empty, it has zero bytes. Copy or download it again"
    for start, what in REFUSED.items():
        if data.startswith(start):
            return what
    if data[4:8] == b"ftyp" or data[:4] == b"RIFF":
        return "a video or sound. Save a frame of it as PNG"
    text = data[:1000].removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith((b"<svg", b"<?xml")) and b"<svg" in text:
        return "a vector image (SVG). Export it to PNG"
    if text.startswith((b"<!doctype html", b"<html", b"<head", b"<?xml")):
        return "an HTML page; did the download fail? Open the address in a browser"
    if text and all(byte >= 32 or byte in b"\t\r\n\f" for byte in text):
        return "a text, not a picture. Name a picture"
    return "not a readable image: its first bytes are of no known format. Save it as PNG or JPEG"


@contextmanager
def silence() -> Iterator[None]:
    """Pillow's warnings (odd metadata, many pixels) are either no fault or raised here as an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def too_many_pixels(name: str, size: str, max_pixels: int) -> ImageError:
    return ImageError(f"{name} has {size}, over the limit of {max_pixels}. Make it smaller or raise --max_pixels.", path=name)


def check_size(size: tuple[int, int], name: str, max_pixels: float) -> None:
    """Raises: ImageError for a picture without pixels, or with too many."""
    width, height = size
    if not width or not height:
        raise ImageError(f"{name} is {width} x {height}: it has no pixels. Name another picture.", path=name)
    if width * height > max_pixels:
        raise too_many_pixels(name, f"{width} x {height} = {width * height} pixels", max_pixels)


def open_picture(data: bytes, name: str, max_pixels: int) -> Image.Image:
    """A picture of which only the header is read yet. Raises: ImageError."""
    kind = sniff(data)
    if kind is None:
        raise ImageError(f"{name} is {describe(data)}.", path=name)
    if kind == "HEIF":
        try:
            from pillow_heif import register_heif_opener
        except ImportError as error:
            advice = "Install the heic extra (pip install pillow-heif) or save it as JPEG."
            raise ImageError(f"{name} is a HEIC picture. {advice}", path=name) from error
        register_heif_opener()
    if kind == "WEBP" and len(data) < int.from_bytes(data[4:8], "little"):
        raise ImageError(f"{name}: image data ends early (file cut off?). Copy or download it again.", path=name)
    try:
        with silence():
            if kind == "PPM":  # Pillow reads its header byte by byte, and comments in it may be long
                Image.open(io.BytesIO(data[:MOST_HEADER_BYTES]), formats=[kind])
            return Image.open(io.BytesIO(data), formats=[kind])
    except Image.DecompressionBombError as error:
        pixels = re.search(r"\d+", str(error))[0]
        limit = min(max_pixels, 2 * Image.MAX_IMAGE_PIXELS)  # Pillow's own limit is never lifted
        raise too_many_pixels(name, f"{pixels} pixels", limit) from error
    except DECODER_ERRORS as error:
        raise ImageError(
            f"{name} is not a readable image: it begins like a {kind}, but is damaged or cut off. Copy or download it again.",
            path=name,
        ) from error


# Decoding


TRUNCATED_LOCK = threading.Lock()  # Pillow knows only one switch for the whole process


@contextmanager
def truncated_allowed(is_allowed: bool) -> Iterator[None]:
    """Pillow fills what is missing of a file with grey, if asked to."""
    if not is_allowed:
        yield
        return
    with TRUNCATED_LOCK:
        before, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, True
        try:
            yield
        finally:
            ImageFile.LOAD_TRUNCATED_IMAGES = before


def is_turned_by_pillow(picture: Image.Image) -> bool:
    """Whether Pillow turns it upright as it decodes it, and then takes the tag away. It does so for TIFF alone."""
    return picture.format == "TIFF"


def orientation(picture: Image.Image) -> int:
    """1 to 8 as EXIF counts; 1, upright, where nothing readable is said. Pillow looks into EXIF, then PNG's text, then XMP."""
    try:
        with silence():
            return picture.getexif().get(ORIENTATION, 1)
    except DECODER_ERRORS:
        return 1


def count_pages(data: bytes) -> tuple[int, bool]:
    """How many pages a TIFF has, and whether all were counted. Pillow's own way takes the square of their number."""
    order = "<" if data[:1] == b"I" else ">"
    is_big = data[2:4] in (b"+\0", b"\0+")
    size, head, tail, entry = (8, "Q", "Q", 20) if is_big else (4, "H", "I", 12)
    seen, steps = set(), 0
    try:
        [place] = struct.unpack_from(order + tail, data, size)
        while place and place not in seen:
            [count] = struct.unpack_from(order + head, data, place)
            seen.add(place)
            steps += count + 16
            if steps > MOST_STEPS:
                return len(seen), False
            [place] = struct.unpack_from(order + tail, data, place + struct.calcsize(head) + entry * count)
    except struct.error:  # the file ends here
        pass
    return max(len(seen), 1), True


def count_frames(data: bytes) -> tuple[int, bool]:
    """How many frames a GIF has, and whether all were counted. No frame is decoded."""
    place, count, steps = 13 + color_bytes(data, 10), 0, 0
    while place < len(data) and data[place : place + 1] != b";":
        kind = data[place : place + 1]
        count += kind == b","
        place += {b",": 11 + color_bytes(data, place + 9), b"!": 2}.get(kind, 1)
        if kind in b",!":  # blocks follow, each behind its length; the last has none
            while place < len(data) and data[place] and steps < MOST_STEPS:
                place, steps = place + 1 + data[place], steps + 1
            place += 1
        steps += 1
        if steps >= MOST_STEPS:
            return max(count, 1), False
    return max(count, 1), True


def color_bytes(data: bytes, place: int) -> int:
    """The size of the table of colours in a GIF, by the flags that stand there."""
    flags = data[place] if place < len(data) else 0
    return 3 << ((flags & 7) + 1) if flags & 128 else 0


def seek(picture: Image.Image, data: bytes, name: str, frame: int, notes: list[str]) -> None:
    """Goes to a frame of an animation or a page of a TIFF. A phone's second picture (MPO) is not worth a note."""
    count = {"TIFF": count_pages, "GIF": count_frames}.get(picture.format)
    num_frames, is_all = count(data) if count else (getattr(picture, "n_frames", 1), True)
    if frame >= num_frames:
        found = f"has {num_frames} frames" if is_all else f"has very many frames, of which {num_frames} are looked at"
        raise ImageError(f"{name} {found}, counted from 0; --frame {frame} is not among them.", path=name)
    if picture.format not in ("TIFF", "MPO") and frame * math.prod(picture.size) > MOST_FRAME_PIXELS:
        advice = "Save that frame as a PNG with another program."
        raise ImageError(f"{name}: {frame} large frames must be decoded to get to --frame {frame}. {advice}", path=name)
    if frame:
        picture.seek(frame)
    if num_frames > 1 and picture.format != "MPO":
        notes.append(f"{name}: frame {frame + 1} of {'' if is_all else 'more than '}{num_frames} is shown to the model.")


def check_effort(picture: Image.Image, data: bytes, name: str, max_pixels: int) -> None:
    """Raises: ImageError where decoding takes far more than the pixels themselves do.

    The tile of a TIFF may be larger than its picture, each scan of a JPEG may take as long as the whole picture, and two forms
    are decoded by Python, byte by byte.
    """
    if picture.format == "TIFF":
        tags = getattr(picture, "tag_v2", {})
        with explained(name):
            tile = math.prod(int(tags.get(tag, 1)) for tag in (322, 323))  # width and length
        if tile > max_pixels:
            raise too_many_pixels(name, f"tiles of {tile} pixels", max_pixels)
    is_slow = any(tile[0] in Image.DECODERS for tile in getattr(picture, "tile", ()))
    if is_slow and (len(data) > MOST_SLOW_BYTES or (picture.format == "PPM" and data.count(b"#") > MOST_COMMENTS)):
        kind = f"a {picture.format} of {len(data) >> 20} MB in a form that is slow to read"
        raise ImageError(f"{name} is {kind}. Save it as PNG or JPEG.", path=name)
    scans = data.count(b"\xff\xda") if picture.format in ("JPEG", "MPO") else 0
    if scans * math.prod(picture.size) > MOST_FRAME_PIXELS and scans > 20:
        raise ImageError(f"{name} is drawn in {scans} scans, which takes too long. Save it again as JPEG or PNG.", path=name)


@contextmanager
def explained(name: str) -> Iterator[None]:
    """Whatever a decoder stumbles over becomes an ImageError."""
    try:
        with silence():
            yield
    except Image.DecompressionBombError as error:
        raise ImageError(f"{name} has an enormous frame, over the limit of Pillow. Make it smaller.", path=name) from error
    except DECODER_ERRORS as error:
        reason = one_line(error) or type(error).__name__
        if re.search("truncat|premature|not processed|broken|end of file|corrupt data", reason, re.IGNORECASE):
            advice = "Copy or download it again, or add --allow_truncated to use what is there."
            raise ImageError(f"{name}: image data ends early (file cut off?). {advice}", path=name) from error
        raise ImageError(f"{name} cannot be decoded: {reason}. Copy it again or save it as PNG.", path=name) from error


@cache
def quiet_libtiff() -> None:
    """libtiff, which is C, writes lines of its own to stderr for a damaged file; that Pillow fails is all we need to know."""
    with suppress(OSError, AttributeError):  # a Pillow that was built in another way
        ctypes.CDLL(_imaging.__file__).TIFFSetErrorHandler(None)


def decode(picture: Image.Image, name: str, max_pixels: float, allow_truncated: bool) -> int:
    """Reads the pixels of the frame where it stands, and returns the orientation that this frame had.

    Raises: ImageError when the file is damaged or ends early, or the frame is too large.
    """
    if picture.format == "TIFF":
        quiet_libtiff()
    with explained(name), truncated_allowed(allow_truncated):
        check_size(picture.size, name, max_pixels)  # pages of a TIFF have sizes of their own
        number = orientation(picture) if is_turned_by_pillow(picture) else 1
        picture.load()
        return number if is_turned_by_pillow(picture) else orientation(picture)  # a PNG may say it after its pixels


def turn(picture: Image.Image, number: int, is_turned: bool, ignore_exif: bool) -> Image.Image:
    """Upright, or as stored with `ignore_exif`.

    Args:
        number: the orientation that the file has.
        is_turned: whether Pillow has turned the picture upright already.
    """
    if number not in UPRIGHT or is_turned != ignore_exif:
        return picture
    return picture.transpose((TURNED if is_turned else UPRIGHT)[number])


# Anything to 8 bits


Levels = Callable[[np.ndarray], np.ndarray]  # pixels of any number type -> uint8


def bands(width: int, height: int) -> list[tuple[int, int, int, int]]:
    """The picture in boxes of whole rows, each of few pixels."""
    rows = max(1, BAND_PIXELS // width)
    return [(0, top, width, min(top + rows, height)) for top in range(0, height, rows)]


def find_levels(dtype: np.dtype, low: float, high: float, name: str, stretch: bool, notes: list[str]) -> Levels:
    """How pixels of this number type, which reach from `low` to `high`, become 0 to 255.

    16 bits are divided by 257, floats count from 0 to 1 or from 0 to 255. With `stretch`, all but 8 bits from `low` to `high`.
    Raises: ImageError for numbers outside of these ranges, or none.
    """
    if dtype == np.uint8:
        return lambda values: values
    if dtype == np.bool_:
        return lambda values: values.astype(np.uint8) * np.uint8(255)
    is_16_bits = dtype.kind == "u" and dtype.itemsize == 2
    if stretch and math.isfinite(float(high) - float(low)):
        notes.append(f"{name}: values from {low:g} to {high:g}, stretched so that they reach from black to white.")
        factor = 255 / ((float(high) - float(low)) or 1)
        return lambda values: np.rint((values.astype(np.float64) - low) * factor).astype(np.uint8)
    if dtype.kind == "f":
        if not (low >= 0 and high <= 255):  # false for NaN, too
            advice = "Scale them to 0 to 1, or to 0 to 255, without NaN, or add --stretch."
            raise ImageError(f"{name} holds floats from {low:g} to {high:g}. {advice}", path=name)
        top = 1 if high <= 1 else 255
        notes.append(f"{name}: floats from {low:g} to {high:g}, taken as 0 (black) to {top} (white).")
        return lambda values: np.rint(values * np.float32(255 / top)).astype(np.uint8)
    if is_16_bits:
        notes.append(f"{name}: 16 bits, values from {low} to {high}, divided by 257.{NEARLY_BLACK if 0 < high < DARK else ''}")
        return lambda values: ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)
    if low < 0 or high > 255:
        advice = "Scale them to 0 to 255, or add --stretch."
        raise ImageError(f"{name} holds whole numbers from {low} to {high}. {advice}", path=name)
    return lambda values: values.astype(np.uint8)


def from_array(values: np.ndarray, name: str, stretch: bool, notes: list[str], channels_first: bool = False) -> Image.Image:
    """A numpy array as a picture. Shapes: [H, W] or [H, W, C] or [C, H, W], with C = 1 grey, 3 RGB, 4 RGBA.

    Where both readings are possible, channels are last unless `channels_first`. Numbers: see find_levels.
    """
    if values.dtype.kind not in "uifb":
        raise ImageError(f"{name} holds {values.dtype}. Numbers are needed: uint8, or floats from 0 to 1.", path=name)
    if values.size == 0:
        raise ImageError(f"{name} is an array of shape {values.shape}: it has no pixels.", path=name)
    channels = (1, 3, 4)
    if values.ndim == 3 and values.shape[0] in channels and (channels_first or values.shape[2] not in channels):
        values = values.transpose(1, 2, 0)
    if values.ndim not in (2, 3) or (values.ndim == 3 and values.shape[2] not in channels):
        shape = list(values.shape)
        raise ImageError(
            f"{name} is an array of shape {shape}. [H, W], [H, W, C] or [C, H, W] is needed, with C 1, 3 or 4; "
            "give a batch as a list.",
            path=name,
        )
    values = values[:, :, 0] if values.shape[2:] == (1,) else values
    levels = find_levels(values.dtype, values.min().item(), values.max().item(), name, stretch, notes)
    out = np.empty(values.shape, np.uint8)
    for _, top, _, bottom in bands(values.shape[1], values.shape[0]):
        out[top:bottom] = levels(values[top:bottom])
    return Image.fromarray(out)


def wide_levels(picture: Image.Image, name: str, stretch: bool, notes: list[str]) -> Levels | None:
    """How a grey picture of 16 bits or of floats becomes one of 8 bits; None for one that is of 8 bits."""
    if picture.mode != "F" and not picture.mode.startswith("I"):
        return None
    ends = []
    for box in bands(*picture.size):
        values = np.asarray(picture.crop(box))
        ends += [values.min().item(), values.max().item()]
    low, high = np.min(ends).item(), np.max(ends).item()  # NaN if one of them is
    if picture.mode == "I" and 0 <= low and high < 1 << 16:  # Pillow's 32 bits are what it reads some files of 16 bits into
        return find_levels(np.dtype(np.uint16), low, high, name, stretch, notes)
    return find_levels(values.dtype, low, high, name, stretch, notes)


def to_grey(picture: Image.Image, levels: Levels) -> Image.Image:
    """8-bit grey of a picture of more bits, with its transparency."""
    values = np.asarray(picture)
    grey = Image.fromarray(levels(values))
    invisible = picture.info.get("transparency")
    if invisible is None:
        return grey
    return Image.merge("LA", (grey, Image.fromarray(np.where(values == invisible, 0, 255).astype(np.uint8))))


def to_rgb(picture: Image.Image, name: str, background: str, stretch: bool, notes: list[str]) -> Image.Image:
    """RGB of a picture of any mode. Behind transparent pixels is the background; "drop" shows their hidden colours instead."""
    if picture.mode == "RGB" and "transparency" not in picture.info:
        return picture
    levels = wide_levels(picture, name, stretch, notes)
    color, is_laid = (0, 0, 0) if background == "drop" else ImageColor.getrgb(background)[:3], False
    out = Image.new("RGB", picture.size)
    for box in bands(*picture.size):
        part = picture.crop(box)
        part = part if levels is None else to_grey(part, levels)
        if "transparency" in part.info or part.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
            part = (part.convert("LA") if part.mode == "La" else part).convert("RGBA")
            if background != "drop" and part.getextrema()[3] != (255, 255):
                is_laid = True
                part = Image.alpha_composite(Image.new("RGBA", part.size, color), part)
        out.paste(part.convert("RGB"), box)
    if is_laid:
        notes.append(f"{name}: transparent pixels are laid on {background}.")
    return out


def is_finished(picture: object) -> TypeGuard[Image.Image]:
    """Whether it is 8-bit RGB in memory that carries nothing else, as load_image returns it."""
    return type(picture) is Image.Image and picture.mode == "RGB" and not picture.info and orientation(picture) == 1


def check_background(background: str) -> None:
    """Raises: UsageError unless it is a colour or "drop"."""
    try:
        if background != "drop":
            ImageColor.getrgb(background)
    except (ValueError, AttributeError) as error:
        raise UsageError(f"background is {background!r}. Give a colour such as white or #808080, or drop.") from error


def as_array(source: object, name: str) -> tuple[np.ndarray, bool]:
    """A tensor or another array as a numpy array, and whether its channels come first by custom. Raises: ImageError."""
    torch = sys.modules.get("torch")  # whoever has a tensor has imported it
    if torch is None or not isinstance(source, torch.Tensor):
        with explained(name):
            return np.asarray(source), False
    with explained(name):
        values = source.detach().resolve_neg()
        values = values.dequantize() if values.is_quantized else values.to_dense() if values.is_sparse else values
        values = values.cpu()
        return (values.float() if values.is_floating_point() and values.itemsize < 4 else values).numpy(), True


def open_source(
    source: object, max_pixels: int | None, frame: int, is_typed: bool, stretch: bool, notes: list[str]
) -> tuple[Image.Image, str]:
    """The picture that a source stands for, at its frame, perhaps not decoded yet; and its name.

    Raises: ImageError, AccessError.
    """
    name = None
    if isinstance(source, Image.Image):
        return source, "the picture"
    is_array = hasattr(source, "__array__") or hasattr(source, "__array_interface__")
    if is_array and not isinstance(source, str | bytes):  # numpy's own str and bytes are both
        values, channels_first = as_array(source, "the picture")
        return from_array(values, "the picture", stretch, notes, channels_first), "the picture"
    if isinstance(source, dict) and ("bytes" in source or "path" in source):  # of a data set of Hugging Face
        path = source.get("path")
        name = shown(path) if isinstance(path, str | os.PathLike) else None
        source, is_typed = path if source.get("bytes") is None else source["bytes"], False
        source = source.tobytes() if isinstance(source, np.ndarray) and source.dtype == np.uint8 else source
    if not (isinstance(source, str | os.PathLike | bytes | bytearray | memoryview) or hasattr(source, "read")):
        given = "an empty dict" if isinstance(source, dict) and not source else type(source).__name__
        known = "a path, an address, bytes, an open file, a PIL image, a numpy array or a tensor"
        raise ImageError(f"{given} is no picture. Give {known}.")
    data, own_name = read_bytes(source, is_typed)
    name = name or own_name
    picture = open_picture(data, name, max_pixels or MAX_PIXELS)
    with explained(name):
        seek(picture, data, name, frame, notes)
    check_effort(picture, data, name, max_pixels or MAX_PIXELS)
    return picture, name


def squeeze(picture: Image.Image, side: int) -> Image.Image:
    """The picture as the model's square, with Pillow's bicubic filter."""
    return picture.resize((side, side), Image.Resampling.BICUBIC)


def is_large_file(source: object) -> bool:
    try:
        return isinstance(source, str | os.PathLike) and os.stat(source).st_size > LARGE_FILE
    except (OSError, ValueError):
        return False


def itself(picture: Image.Image) -> Image.Image:
    return picture


def load_image(
    source: object,
    *,
    background: str = "white",
    ignore_exif: bool = False,
    max_pixels: int | None = None,
    frame: int = 0,
    allow_truncated: bool = False,
    stretch: bool = False,
    is_typed: bool = True,
    notes: list[str] | None = None,
    then: Callable[[Image.Image], T] = itself,
) -> T:
    """A picture as 8-bit RGB, upright, and nothing but its pixels: no EXIF or other metadata that could turn it once more.

    What this returned is finished: given again, it comes back as it is, whatever the options.

    Args:
        source: a path, an http(s) or file: address, a data: URI, the bytes of a file, an open file, a PIL image (taken at the
            frame where it stands), an array or tensor (shapes: see from_array; of a tensor, channels are first where both
            readings are possible), or the dict {"bytes": ..., "path": ...} that data sets of Hugging Face hold.
        background: the colour behind transparent pixels; "drop" ignores transparency, as transformers' load_image does.
        ignore_exif: leave the picture as the camera stored it.
        max_pixels: a larger picture is refused before its pixels are decoded. None stands for 50 million, and for no limit
            where the pixels are in memory already.
        frame: which frame of an animation, which page of a TIFF, from 0.
        allow_truncated: take a file that ends early, grey where it is missing.
        stretch: for pictures of more than 8 bits: the darkest value becomes black and the brightest white.
        is_typed: whether a user wrote the source. One that stands in data may name files and public addresses, but nothing
            inside the own network, no file: address and no ~.
        notes: gets a sentence for everything that was converted or chosen.
        then: what to make of the picture while its memory is counted; several threads together keep to MEMORY_BYTES until then.
    Returns: what `then` returns; the picture without it.
    Raises: ImageError when there is no such picture or it is refused, AccessError when an address does not give one,
        UsageError for options out of range.
    """
    notes = [] if notes is None else notes
    check_background(background)
    if frame < 0 or (max_pixels is not None and max_pixels < 1):
        raise UsageError(f"frame is {frame} and max_pixels {max_pixels}; they start at 0 and 1.")
    if is_finished(source):
        check_size(source.size, "the picture", max_pixels or math.inf)
        return then(source)
    is_large = is_large_file(source)
    with MEMORY.take(MEMORY.total if is_large else 0):
        picture, name = open_source(source, max_pixels, frame, is_typed, stretch, notes)
        most = max_pixels or (MAX_PIXELS if isinstance(picture, ImageFile.ImageFile) else math.inf)
        check_size(picture.size, name, most)
        with MEMORY.take(0 if is_large else BYTES_PER_PIXEL * math.prod(picture.size)):
            is_turned = is_turned_by_pillow(picture)
            number = decode(picture, name, most, allow_truncated)
            if max(picture.size) > WIDEST * min(picture.size):
                width, height = picture.size
                notes.append(f"{name} is {width} x {height}; the model sees every picture squeezed into a square.")
            with explained(name):
                finished = turn(to_rgb(picture, name, background, stretch, notes), number, is_turned, ignore_exif)
                if finished is picture:  # perhaps the caller's
                    finished = picture.copy()
                finished.info = {}
            del picture
            return then(finished)
