"""Any picture, from anywhere, as 8-bit RGB, upright; or one sentence that says why not. Imports errors and fetch.

A file may be cut off, mislabelled, huge once unpacked, or no picture at all. So the format is told from the first bytes and
never from the name, only formats of photographs and drawings are decoded, and the number of pixels is checked in the header.
What is converted: transparency is laid on a colour, 16 bits become 8 by dividing by 257, floats count from 0 to 1 or from 0
to 255, one frame is taken from an animation (each of these is reported in `notes`), and the EXIF orientation is applied. What
comes out carries its pixels and nothing else, so that no later step can turn it again.

Checked in tests/test_images.py and tests/test_orientation.py.
"""

import base64
import io
import math
import os
import re
import stat
import struct
import threading
import urllib.parse
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageColor, ImageFile

from errors import AccessError, ImageError, UsageError
from fetch import MAX_DOWNLOAD_BYTES, fetch, one_line

MAX_FILE_BYTES = 256 << 20
MAX_PIXELS = 50_000_000
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
# Decoders meet files that nobody foresaw; whatever they then stumble over, the file is what is wrong.
DECODER_ERRORS = (
    OSError, SyntaxError, ValueError, ArithmeticError, LookupError, TypeError, AttributeError, AssertionError, RuntimeError,
    MemoryError, EOFError, struct.error, zlib.error,
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


# Where from: a path, an address, a data: URI


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
    import difflib  # only a mistyped name pays for it

    if path.is_symlink():
        return f"{shown(path)} is a link to a file that does not exist. Mend the link."
    if not path.parent.is_dir():
        return f"{shown(path)} does not exist, nor does the folder {shown(path.parent)}. Check the path."
    try:
        names = os.listdir(path.parent)
    except OSError:
        names = []
    lower = {name.lower(): name for name in names}
    close = difflib.get_close_matches(path.name.lower(), list(lower), n=3, cutoff=0.7)
    advice = f"Did you mean {' or '.join(shown(lower[name]) for name in close)}?" if close else "Check the path."
    return f"{shown(path)} does not exist. {advice}"


def read_data_uri(uri: str) -> bytes:
    """The bytes in a data: URI. Raises: ImageError; its text never holds the data."""
    head, comma, body = uri.partition(",")
    if not comma:
        raise ImageError("a data: URI has no comma. It is written data:image/png;base64,iVBOR...", path="data:")
    if len(body) > MAX_DOWNLOAD_BYTES * 4 // 3 + 4:
        raise ImageError(f"a data: URI holds more than {MAX_DOWNLOAD_BYTES >> 20} MB. Save it to a file.", path="data:")
    body = urllib.parse.unquote_to_bytes(body)
    if not head.lower().endswith(";base64"):
        return body
    body = bytes(body.translate(None, b" \t\r\n"))
    try:
        return base64.b64decode(body + b"=" * (-len(body) % 4), validate=True)
    except ValueError as error:
        raise ImageError(f"a data: URI is not valid base64: {error}. Encode the file again.", path="data:") from error


def read_bytes(source: str | os.PathLike | bytes) -> tuple[bytes, str]:
    """The bytes of a picture that is not decoded yet, and a name for it."""
    if isinstance(source, bytes | bytearray | memoryview):
        return bytes(source), "the picture"
    if isinstance(source, str) and source[:5].lower() == "data:":
        return read_data_uri(source), "data:"
    name = shown(source)
    scheme = None if isinstance(source, os.PathLike) else re.match("([A-Za-z][A-Za-z0-9+.-]+)://", source)
    if not scheme:  # nor one letter, which is a drive
        return read_file(source), name
    if scheme[1].lower() not in ("http", "https"):
        raise ImageError(f"{name} begins with {scheme[1]}:. Give a path, or an address with http(s).", path=name)
    data, kind = fetch(source)
    if sniff(data) is None and not kind.startswith("image/"):
        raise AccessError(f"{name} answered 200 OK with {one_line(kind) or 'no type'}: {describe(data)}.", path=name)
    return data, name


# What is it


def sniff(data: bytes) -> str | None:
    """Pillow's name of the format, by the first bytes; None if it is none of those that are read."""
    for start, kind in READ.items():
        if data.startswith(start):
            return kind
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    if data[4:8] == b"ftyp":
        brands = [data[i : i + 4] for i in (8, *range(16, min(int.from_bytes(data[:4]), 64), 4))]
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


def seek(picture: Image.Image, name: str, frame: int, notes: list[str]) -> None:
    """Goes to a frame of an animation or a page of a TIFF. A phone's second picture (MPO) is not worth a note."""
    num_frames = getattr(picture, "n_frames", 1)
    if frame >= num_frames:
        raise ImageError(f"{name} has {num_frames} frames, counted from 0; --frame {frame} is not among them.", path=name)
    if num_frames > 1:
        picture.seek(frame)
        if picture.format != "MPO":
            notes.append(f"{name}: frame {frame + 1} of {num_frames} is shown to the model.")


def decode(picture: Image.Image, name: str, frame: int | None, max_pixels: float, allow_truncated: bool, notes: list[str]) -> int:
    """Reads the pixels, of the frame where it stands if it is None, and returns the orientation that this frame had.

    Raises: ImageError when the file is damaged or ends early, or the frame is too large.
    """
    try:
        with silence(), truncated_allowed(allow_truncated):
            if frame is not None:
                seek(picture, name, frame, notes)
            check_size(picture.size, name, max_pixels)  # pages of a TIFF have sizes of their own
            number = orientation(picture) if is_turned_by_pillow(picture) else 1
            picture.load()
            return number if is_turned_by_pillow(picture) else orientation(picture)  # a PNG may say it after its pixels
    except Image.DecompressionBombError as error:
        raise too_many_pixels(name, "an enormous frame", max_pixels) from error
    except DECODER_ERRORS as error:
        if re.search("truncat|premature|not processed|broken|end of file|corrupt data", str(error), re.IGNORECASE):
            advice = "Copy or download it again, or add --allow_truncated to use what is there."
            raise ImageError(f"{name}: image data ends early (file cut off?). {advice}", path=name) from error
        raise ImageError(f"{name} cannot be decoded: {error}. Copy it again or save it as PNG.", path=name) from error


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


def to_bytes(values: np.ndarray, name: str, notes: list[str]) -> np.ndarray:
    """Pixels of any number type as uint8: 16 bits are divided by 257, floats count from 0 to 1 or from 0 to 255.

    Raises: ImageError for numbers outside of these ranges, or none.
    """
    if values.dtype == np.uint8:
        return values
    if values.dtype == np.bool_:
        return values.astype(np.uint8) * np.uint8(255)
    if values.dtype.kind not in "uif":
        raise ImageError(f"{name} holds {values.dtype}. Numbers are needed: uint8, or floats from 0 to 1.", path=name)
    low, high = values.min().item(), values.max().item()
    if values.dtype.kind == "f":
        if not (low >= 0 and high <= 255):  # false for NaN, too
            raise ImageError(
                f"{name} holds floats from {low:g} to {high:g}. Scale them to 0 to 1, or to 0 to 255, without NaN.", path=name
            )
        top = 1 if high <= 1 else 255
        notes.append(f"{name}: floats from {low:g} to {high:g}, taken as 0 (black) to {top} (white).")
        return np.rint(values * np.float32(255 / top)).astype(np.uint8)
    if values.dtype.itemsize == 2 and values.dtype.kind == "u":
        notes.append(f"{name}: 16 bits, values from {low} to {high}, divided by 257.")
        return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)
    if low < 0 or high > 255:
        raise ImageError(f"{name} holds whole numbers from {low} to {high}. Scale them to 0 to 255.", path=name)
    return values.astype(np.uint8)


def from_array(values: np.ndarray, name: str, notes: list[str]) -> Image.Image:
    """A numpy array as a picture. Shapes: [H, W] or [H, W, C] or [C, H, W], with C = 1 grey, 3 RGB, 4 RGBA.

    Where both readings are possible, channels are last. Numbers: see to_bytes.
    """
    if values.size == 0:
        raise ImageError(f"{name} is an array of shape {values.shape}: it has no pixels.", path=name)
    if values.ndim == 3 and values.shape[2] not in (1, 3, 4) and values.shape[0] in (1, 3, 4):
        values = values.transpose(1, 2, 0)
    if values.ndim not in (2, 3) or (values.ndim == 3 and values.shape[2] not in (1, 3, 4)):
        shape = list(values.shape)
        raise ImageError(
            f"{name} is an array of shape {shape}. [H, W], [H, W, C] or [C, H, W] is needed, with C 1, 3 or 4; "
            "give a batch as a list.",
            path=name,
        )
    values = to_bytes(values, name, notes)
    return Image.fromarray(np.ascontiguousarray(values[:, :, 0] if values.ndim == 3 and values.shape[2] == 1 else values))


def to_8_bits(picture: Image.Image, name: str, notes: list[str]) -> Image.Image:
    """Grey pictures of 16 bits or of floats as 8-bit grey, with their transparency; others as they are."""
    if picture.mode != "F" and not picture.mode.startswith("I"):
        return picture
    values = np.asarray(picture)
    if picture.mode == "I" and 0 <= values.min() and values.max() < 1 << 16:
        values = values.astype(np.uint16)  # Pillow's 32-bit mode is what it reads 16-bit files of some formats into
    grey = Image.fromarray(to_bytes(values, name, notes))
    invisible = picture.info.get("transparency")
    if invisible is None:
        return grey
    return Image.merge("LA", (grey, Image.fromarray(np.where(values == invisible, 0, 255).astype(np.uint8))))


def to_rgb(picture: Image.Image, name: str, background: str, notes: list[str]) -> Image.Image:
    """RGB of a picture of any mode. What shines through is the background; "drop" shows the hidden colours instead."""
    picture = to_8_bits(picture, name, notes)
    if picture.mode == "RGB" and "transparency" not in picture.info:
        return picture
    try:
        with silence():
            if "transparency" in picture.info or picture.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
                picture = picture.convert("RGBA")
                if background != "drop" and picture.getextrema()[3] != (255, 255):
                    notes.append(f"{name}: transparent pixels are laid on {background}.")
                    backdrop = Image.new("RGBA", picture.size, ImageColor.getrgb(background)[:3])
                    picture = Image.alpha_composite(backdrop, picture)
            return picture.convert("RGB")
    except DECODER_ERRORS as error:
        raise ImageError(f"{name} has the colours {picture.mode}: {error}. Save it as RGB.", path=name) from error


def is_finished(picture: Image.Image) -> bool:
    """Whether it is 8-bit RGB in memory that carries nothing else, as load_image returns it."""
    return type(picture) is Image.Image and picture.mode == "RGB" and not picture.info and orientation(picture) == 1


def bare(picture: Image.Image) -> Image.Image:
    """A picture with these pixels and nothing else: no metadata, no file. The one given is left as it is."""
    picture = picture.copy()
    picture.info = {}
    return picture


def check_background(background: str) -> None:
    """Raises: UsageError unless it is a colour or "drop"."""
    try:
        if background != "drop":
            ImageColor.getrgb(background)
    except (ValueError, AttributeError) as error:
        raise UsageError(f"background is {background!r}. Give a colour such as white or #808080, or drop.") from error


def load_image(
    source: str | os.PathLike | bytes | Image.Image | np.ndarray,
    *,
    background: str = "white",
    ignore_exif: bool = False,
    max_pixels: int | None = None,
    frame: int = 0,
    allow_truncated: bool = False,
    notes: list[str] | None = None,
) -> Image.Image:
    """A picture as 8-bit RGB, upright, and nothing but its pixels: no EXIF or other metadata that could turn it once more.

    What this returned is finished: given again, it comes back as it is, whatever the options.

    Args:
        source: a path, an http(s) address, a data: URI, the bytes of a file, a PIL image (taken at the frame where it
            stands), or an array (shapes: see from_array).
        background: the colour behind transparent pixels; "drop" ignores transparency, as transformers' load_image does.
        ignore_exif: leave the picture as the camera stored it.
        max_pixels: a larger picture is refused before its pixels are decoded. None stands for 50 million, and for no limit
            where the pixels are in memory already.
        frame: which frame of an animation, which page of a TIFF, from 0.
        allow_truncated: take a file that ends early, grey where it is missing.
        notes: gets a sentence for everything that was converted or chosen.
    Raises: ImageError when there is no such picture or it is refused, AccessError when an address does not give one,
        UsageError for options out of range.
    """
    notes = [] if notes is None else notes
    check_background(background)
    if frame < 0 or (max_pixels is not None and max_pixels < 1):
        raise UsageError(f"frame is {frame} and max_pixels {max_pixels}; they start at 0 and 1.")
    name = "the picture"
    if isinstance(source, np.ndarray):
        picture, frame = from_array(source, name, notes), None
    elif isinstance(source, Image.Image):
        picture, frame = source, None
    elif isinstance(source, str | os.PathLike | bytes | bytearray | memoryview):
        data, name = read_bytes(source)
        picture = open_picture(data, name, max_pixels or MAX_PIXELS)
    else:
        raise ImageError(f"{type(source).__name__} is no picture. Give a path, an address, bytes, a PIL image or a numpy array.")
    most = max_pixels or (MAX_PIXELS if isinstance(picture, ImageFile.ImageFile) else math.inf)
    check_size(picture.size, name, most)
    if picture is source and is_finished(picture):
        return picture
    is_turned = is_turned_by_pillow(picture)
    number = decode(picture, name, frame, most, allow_truncated, notes)
    if max(picture.size) > WIDEST * min(picture.size):
        width, height = picture.size
        notes.append(f"{name} is {width} x {height}; the model sees every picture squeezed into a square.")
    return bare(turn(to_rgb(picture, name, background, notes), number, is_turned, ignore_exif))
