"""Decodes the bytes of a picture file with Pillow, after checks of its format, its size and the work that decoding takes.

A file may be cut off, have a wrong suffix, be huge when it is unpacked, or be no picture at all. So the format is recognised by
the first bytes and never by the name, only formats of photographs and drawings are decoded, and the number of pixels is checked
in the header.
Checked in tests/pictures/test_images.py.
"""

import ctypes
import io
import math
import re
import struct
import threading
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache

from PIL import Image, ImageFile, _imaging

from paligemma.errors import ImageError, one_line

MAX_PIXELS = 50_000_000
MAX_STEPS = 500_000  # limit on the frames and parts of frames that are counted; a file can hold millions
MAX_FRAME_PIXELS = 1_000_000_000  # limit on the pixels decoded before the wanted frame, and on pixels times scans of a JPEG
MAX_PPM_HEADER_BYTES = 1 << 16
MAX_PPM_COMMENTS = 1000  # each comment makes Pillow search its buffer from the beginning again, which takes quadratic time
MAX_SLOW_BYTES = 4 << 20  # the largest file of a format that Pillow decodes in Python, such as PPM written as text
ORIENTATION = 0x0112  # the tag's number in EXIF and TIFF
# Decoders raise all these exceptions for damaged files.
DECODER_ERRORS = (
    OSError, SyntaxError, ValueError, ArithmeticError, LookupError, TypeError, AttributeError, AssertionError, RuntimeError,
    MemoryError, EOFError, NameError, BufferError, StopIteration, struct.error, zlib.error,
)  # fmt: skip

FORMATS = {  # first bytes of the formats that are decoded -> Pillow's name of the format
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"\xff\xd8\xff": "JPEG",  # also the MPO files of phones: several JPEGs in one file
    b"GIF87a": "GIF",
    b"GIF89a": "GIF",
    b"BM": "BMP",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"II+\0": "TIFF",
    b"MM\0+": "TIFF",
} | {b"P%d%c" % (kind, space): "PPM" for kind in range(1, 7) for space in b" \t\n\r"}
OTHER_FORMATS = {  # first bytes of other files -> what the file is and what to do
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

# By default Pillow allocates pictures in blocks of 16 MB. After a picture is freed, malloc keeps such small blocks for each
# thread: 1.6 GB after eight large pictures. Larger blocks are returned to the system immediately.
Image.core.set_block_size(2**28)


# Process-wide switches and errors


class NoWarnings:
    """Hides Python warnings while at least one thread is inside the block.

    Pillow warns of odd metadata, which does no harm, and of many pixels, which this module checks itself. warnings.catch_warnings
    alone is not safe in threads: if two blocks overlap, its filter may stay on for the whole process.
    """

    def __init__(self):
        self.lock, self.depth = threading.Lock(), 0

    def __enter__(self) -> None:
        with self.lock:
            if self.depth == 0:
                self.filters = warnings.catch_warnings()
                self.filters.__enter__()
                warnings.simplefilter("ignore")
            self.depth += 1

    def __exit__(self, *_: object) -> None:
        with self.lock:
            self.depth -= 1
            if self.depth == 0:
                self.filters.__exit__(None, None, None)


NO_WARNINGS = NoWarnings()
TRUNCATED_LOCK = threading.Lock()


@contextmanager
def truncated_allowed(is_allowed: bool) -> Iterator[None]:
    """If allowed, Pillow fills the missing part of a file with grey inside the block.

    Pillow has one switch for the whole process, so only one thread at a time can be in such a block.
    """
    if not is_allowed:
        yield
        return
    with TRUNCATED_LOCK:
        before, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, True
        try:
            yield
        finally:
            ImageFile.LOAD_TRUNCATED_IMAGES = before


@cache
def quiet_libtiff() -> None:
    """Stops the C library libtiff from writing to stderr about a damaged file; Pillow raises an exception anyway."""
    with suppress(OSError, AttributeError):  # this build of Pillow does not contain libtiff's function
        ctypes.CDLL(_imaging.__file__).TIFFSetErrorHandler(None)


@contextmanager
def decoder_errors(name: str) -> Iterator[None]:
    """Turns the exceptions of a decoder inside the block into an ImageError, and hides its warnings."""
    try:
        with NO_WARNINGS:
            yield
    except Image.DecompressionBombError as error:
        raise ImageError(f"{name} has an enormous frame, over the limit of Pillow. Make it smaller.", path=name) from error
    except DECODER_ERRORS as error:
        reason = one_line(error) or type(error).__name__
        if re.search("truncat|premature|not processed|broken|end of file|corrupt data", reason, re.IGNORECASE):
            advice = "Copy or download it again, or add --allow_truncated to use what is there."
            raise ImageError(f"{name}: image data ends early (file cut off?). {advice}", path=name) from error
        raise ImageError(f"{name} cannot be decoded: {reason}. Copy it again or save it as PNG.", path=name) from error


# Formats


def sniff(data: bytes) -> str | None:
    """Pillow's name of the format, recognised by the first bytes; None if the format is not decoded here."""
    for start, kind in FORMATS.items():
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
    """For a file whose format sniff does not recognise: what it is, and what to do. The text has no full stop at the end."""
    if not data:
        return "empty, it has zero bytes. Copy or download it again"
    for start, what in OTHER_FORMATS.items():
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


# Checks before decoding


def too_many_pixels(name: str, size: str, max_pixels: int) -> ImageError:
    return ImageError(f"{name} has {size}, over the limit of {max_pixels}. Make it smaller or raise --max_pixels.", path=name)


def check_size(size: tuple[int, int], name: str, max_pixels: float) -> None:
    """Raises: ImageError if the picture has no pixels or too many."""
    width, height = size
    if not width or not height:
        raise ImageError(f"{name} is {width} x {height}: it has no pixels. Name another picture.", path=name)
    if width * height > max_pixels:
        raise too_many_pixels(name, f"{width} x {height} = {width * height} pixels", max_pixels)


def open_header(data: bytes, name: str, max_pixels: int) -> Image.Image:
    """The picture, not yet decoded: only the header is read. Raises: ImageError."""
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
        with NO_WARNINGS:
            if kind == "PPM":  # Pillow reads this header byte by byte, so a long header is refused
                Image.open(io.BytesIO(data[:MAX_PPM_HEADER_BYTES]), formats=[kind])
            return Image.open(io.BytesIO(data), formats=[kind])
    except Image.DecompressionBombError as error:
        pixels = re.search(r"\d+", str(error))[0]
        limit = min(max_pixels, 2 * Image.MAX_IMAGE_PIXELS)  # Pillow's own limit always applies, too
        raise too_many_pixels(name, f"{pixels} pixels", limit) from error
    except DECODER_ERRORS as error:
        raise ImageError(
            f"{name} is not a readable image: it begins like a {kind}, but is damaged or cut off. Copy or download it again.",
            path=name,
        ) from error


def count_pages(data: bytes) -> tuple[int, bool]:
    """The number of pages of a TIFF, and whether all were counted. Pillow's own count takes quadratic time."""
    order = "<" if data[:1] == b"I" else ">"
    is_big = data[2:4] in (b"+\0", b"\0+")
    # The bytes of an offset, the struct codes of a count and of an offset, and the bytes of an entry.
    size, head, tail, entry = (8, "Q", "Q", 20) if is_big else (4, "H", "I", 12)
    seen, steps = set(), 0
    try:
        [offset] = struct.unpack_from(order + tail, data, size)
        while offset and offset not in seen:
            [count] = struct.unpack_from(order + head, data, offset)
            seen.add(offset)
            steps += count + 16
            if steps > MAX_STEPS:
                return len(seen), False
            [offset] = struct.unpack_from(order + tail, data, offset + struct.calcsize(head) + entry * count)
    except struct.error:  # the file ends here
        pass
    return max(len(seen), 1), True


def count_frames(data: bytes) -> tuple[int, bool]:
    """The number of frames of a GIF, and whether all were counted. No frame is decoded."""
    offset, count, steps = 13 + color_table_bytes(data, 10), 0, 0
    while offset < len(data) and data[offset : offset + 1] != b";":
        kind = data[offset : offset + 1]
        count += kind == b","
        offset += {b",": 11 + color_table_bytes(data, offset + 9), b"!": 2}.get(kind, 1)
        if kind in b",!":  # data blocks follow; each begins with its length, and a length of 0 ends them
            while offset < len(data) and data[offset] and steps < MAX_STEPS:
                offset, steps = offset + 1 + data[offset], steps + 1
            offset += 1
        steps += 1
        if steps >= MAX_STEPS:
            return max(count, 1), False
    return max(count, 1), True


def color_table_bytes(data: bytes, offset: int) -> int:
    """The size of a colour table in a GIF, whose flags are at `offset`."""
    flags = data[offset] if offset < len(data) else 0
    return 3 << ((flags & 7) + 1) if flags & 128 else 0


def seek(picture: Image.Image, data: bytes, name: str, frame: int, notes: list[str]) -> None:
    """Goes to a frame of an animation or a page of a TIFF. If there are several, a note says which frame is used.

    There is no note for an MPO, the file of a phone, because its second picture is only a preview or another view.
    """
    count = {"TIFF": count_pages, "GIF": count_frames}.get(picture.format)
    num_frames, is_all = count(data) if count else (getattr(picture, "n_frames", 1), True)
    if frame >= num_frames:
        found = f"has {num_frames} frames" if is_all else f"has very many frames, of which only {num_frames} are counted"
        raise ImageError(f"{name} {found}, counted from 0; --frame {frame} is not among them.", path=name)
    if picture.format not in ("TIFF", "MPO") and frame * math.prod(picture.size) > MAX_FRAME_PIXELS:
        advice = "Save that frame as a PNG with another program."
        raise ImageError(f"{name}: {frame} large frames must be decoded to get to --frame {frame}. {advice}", path=name)
    if frame:
        picture.seek(frame)
    if num_frames > 1 and picture.format != "MPO":
        total = f"{'' if is_all else 'more than '}{num_frames} frames, counted from 0"
        notes.append(f"{name} has {total}; frame {frame} is shown to the model.")


def check_effort(picture: Image.Image, data: bytes, name: str, max_pixels: int) -> None:
    """Raises: ImageError if decoding would take much longer than the number of pixels suggests.

    The tile of a TIFF may be larger than its picture. Each scan of a JPEG may take as long as the whole picture. And Pillow
    decodes some formats in Python, byte by byte, such as PPM written as text.
    """
    if picture.format == "TIFF":
        tags = getattr(picture, "tag_v2", {})
        with decoder_errors(name):
            tile = math.prod(int(tags.get(tag, 1)) for tag in (322, 323))  # width and length
        if tile > max_pixels:
            raise too_many_pixels(name, f"tiles of {tile} pixels", max_pixels)
    is_slow = any(tile[0] in Image.DECODERS for tile in getattr(picture, "tile", ()))
    if is_slow and (len(data) > MAX_SLOW_BYTES or (picture.format == "PPM" and data.count(b"#") > MAX_PPM_COMMENTS)):
        kind = f"a {picture.format} of {len(data) >> 20} MB in a format that is slow to read"
        raise ImageError(f"{name} is {kind}. Save it as PNG or JPEG.", path=name)
    scans = data.count(b"\xff\xda") if picture.format in ("JPEG", "MPO") else 0
    if scans * math.prod(picture.size) > MAX_FRAME_PIXELS and scans > 20:
        raise ImageError(f"{name} is drawn in {scans} scans, which takes too long. Save it again as JPEG or PNG.", path=name)


def open_picture(data: bytes, name: str, frame: int, max_pixels: int, notes: list[str]) -> Image.Image:
    """The picture in these bytes at this frame, checked, but not decoded yet. Raises: ImageError."""
    picture = open_header(data, name, max_pixels)
    with decoder_errors(name):
        seek(picture, data, name, frame, notes)
    check_effort(picture, data, name, max_pixels)
    return picture


# Decoding


def pillow_turns(picture: Image.Image) -> bool:
    """Whether Pillow turns the picture upright while decoding and then removes the tag. Pillow does this only for TIFF."""
    return picture.format == "TIFF"


def orientation(picture: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1 (upright) if there is none. Pillow searches EXIF, then the text of a PNG, then XMP."""
    try:
        with NO_WARNINGS:
            return picture.getexif().get(ORIENTATION, 1)
    except DECODER_ERRORS:
        return 1


def decode(picture: Image.Image, name: str, max_pixels: float, allow_truncated: bool) -> int:
    """Decodes the current frame, in place. Returns: the EXIF orientation of this frame.

    Raises: ImageError if the file is damaged or ends early, or the frame is too large.
    """
    if picture.format == "TIFF":
        quiet_libtiff()
    with decoder_errors(name), truncated_allowed(allow_truncated):
        check_size(picture.size, name, max_pixels)  # each page of a TIFF has its own size
        number = orientation(picture) if pillow_turns(picture) else 1
        picture.load()
        # In a PNG the EXIF chunk may come after the pixels, so it is read last.
        return number if pillow_turns(picture) else orientation(picture)
