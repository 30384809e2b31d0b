"""Loads a picture from any source as 8-bit RGB, upright; or raises an error that says why this is not possible.

The steps, each in its own file:
    sources.py     path, address, data: URI or open file -> bytes
    decoding.py    bytes -> a decoded picture, after checks of format, size and effort
    rgb.py         pixels of any type -> 8-bit RGB
The picture that load_image returns has pixels but no metadata, so no later step can turn it a second time.

Checked in tests/pictures/test_images.py and tests/pictures/test_orientation.py.
"""

import math
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeGuard, TypeVar, overload

import numpy as np
from PIL import Image, ImageColor, ImageFile

from paligemma.errors import ImageError, UsageError
from paligemma.files import printable_path
from paligemma.pictures.decoding import MAX_PIXELS, check_size, decode, decoder_errors, open_picture, orientation, pillow_turns
from paligemma.pictures.rgb import from_array, to_rgb
from paligemma.pictures.sources import read_bytes

T = TypeVar("T")

MEMORY_BYTES = 1 << 30  # limit for all threads together that load pictures
BYTES_PER_PIXEL = 16  # to decode and convert: 4 as decoded, 4 as RGB, 8 for decoders that keep two frames
LARGE_FILE_BYTES = 32 << 20  # larger files are loaded one at a time
MAX_ASPECT = 20  # pictures whose sides have a larger ratio get a note, because the model sees every picture as a square
UPRIGHT = {  # EXIF orientation -> the operation that turns the picture upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
AS_STORED = UPRIGHT | {6: UPRIGHT[8], 8: UPRIGHT[6]}  # EXIF orientation -> the inverse operation


@overload
def load_image(
    source: object, *, background: str = ..., ignore_exif: bool = ..., max_pixels: int | None = ..., frame: int = ...,
    allow_truncated: bool = ..., stretch: bool = ..., is_typed: bool = ..., notes: list[str] | None = ...,
) -> Image.Image: ...  # fmt: skip
@overload
def load_image(
    source: object, *, background: str = ..., ignore_exif: bool = ..., max_pixels: int | None = ..., frame: int = ...,
    allow_truncated: bool = ..., stretch: bool = ..., is_typed: bool = ..., notes: list[str] | None = ...,
    then: Callable[[Image.Image], T],
) -> T: ...  # fmt: skip
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
    then: Callable[[Image.Image], T] | None = None,
) -> Image.Image | T:
    """A picture as 8-bit RGB, upright, without EXIF or other metadata.

    A picture that this function has returned is not changed by passing it in again, whatever the options are.

    Args:
        source: a path, an http(s) or file: address, a data: URI, the bytes of a file, an open file, a PIL image (its current
            frame is used), an array or a tensor (for shapes and values see rgb.from_array; if the shape of a
            tensor is ambiguous, its first axis is the channels), or a dict {"bytes": ..., "path": ...} of a Hugging Face
            dataset.
        background: the colour that transparent pixels show; "drop" ignores transparency, as transformers' load_image does.
        ignore_exif: leave the picture as the camera stored it.
        max_pixels: a picture with more pixels is refused before they are decoded. None means 50 million for a file, and no
            limit for a picture that is in memory already.
        frame: which frame of an animation or page of a TIFF, from 0.
        allow_truncated: accept a file that ends early; missing parts are grey.
        stretch: for pictures of more than 8 bits: the darkest value becomes black and the brightest white.
        is_typed: whether a user typed the source. A source from a dataset may name files and public addresses, but no addresses
            in the local network, no file: addresses and no ~.
        notes: gets a sentence for every conversion and choice.
        then: a function, such as a resize, that is called while the full picture still counts towards MEMORY_BYTES.
    Returns: what `then` returns; without it, the picture.
    Raises: ImageError if the picture does not exist or is refused, AccessError if an address cannot be read, UsageError for
        options out of range.
    """
    notes = [] if notes is None else notes
    check_options(background, frame, max_pixels)
    if is_loaded_picture(source):
        check_size(source.size, "the picture", max_pixels or math.inf)
        return source if then is None else then(source)
    is_large = is_large_file(source)
    with MEMORY.take(MEMORY.total if is_large else 0):
        picture, name = open_source(source, max_pixels, frame, is_typed, stretch, notes)
        limit = max_pixels or (MAX_PIXELS if isinstance(picture, ImageFile.ImageFile) else math.inf)
        check_size(picture.size, name, limit)
        with MEMORY.take(0 if is_large else BYTES_PER_PIXEL * math.prod(picture.size)):
            is_turned = pillow_turns(picture)
            number = decode(picture, name, limit, allow_truncated)
            if max(picture.size) > MAX_ASPECT * min(picture.size):
                width, height = picture.size
                notes.append(f"{name} is {width} x {height}; the model sees every picture squeezed into a square.")
            with decoder_errors(name):
                finished = turn(to_rgb(picture, name, background, stretch, notes), number, is_turned, ignore_exif)
                if finished is picture:  # it may belong to the caller
                    finished = picture.copy()
                finished.info = {}
            del picture
            return finished if then is None else then(finished)


def is_loaded_picture(picture: object) -> TypeGuard[Image.Image]:
    """Whether this is a picture as load_image returns it: 8-bit RGB in memory, with pixels and without metadata."""
    if type(picture) is not Image.Image or picture.mode != "RGB" or picture.info:
        return False
    return min(picture.size) > 0 and orientation(picture) == 1


def resize_to_square(picture: Image.Image, side: int) -> Image.Image:
    """The picture resized to the square that the model takes, with Pillow's bicubic filter; proportions are not kept."""
    return picture.resize((side, side), Image.Resampling.BICUBIC)


def turn(picture: Image.Image, number: int, is_turned: bool, ignore_exif: bool) -> Image.Image:
    """The picture upright or, with `ignore_exif`, as stored.

    Args:
        number: the EXIF orientation of the file.
        is_turned: whether Pillow has turned the picture upright already.
    """
    # True if Pillow has turned it and upright is wanted, or if it is unturned and must stay as stored.
    is_as_wanted = is_turned != ignore_exif
    if number not in UPRIGHT or is_as_wanted:
        return picture
    return picture.transpose((AS_STORED if is_turned else UPRIGHT)[number])


# Sources


def open_source(
    source: object, max_pixels: int | None, frame: int, is_typed: bool, stretch: bool, notes: list[str]
) -> tuple[Image.Image, str]:
    """The picture of a source at this frame, perhaps not decoded yet, and its name in messages.

    Raises: ImageError, AccessError.
    """
    name = None
    if isinstance(source, Image.Image):
        return source, "the picture"
    is_array = hasattr(source, "__array__") or hasattr(source, "__array_interface__")
    if is_array and not isinstance(source, str | bytes):  # np.str_ and np.bytes_ have __array__ as well
        values, channels_first = as_array(source, "the picture")
        return from_array(values, "the picture", stretch, notes, channels_first), "the picture"
    if isinstance(source, dict) and ("bytes" in source or "path" in source):  # from a Hugging Face dataset
        path = source.get("path")
        name = printable_path(path) if isinstance(path, str | os.PathLike) else None
        source, is_typed = path if source.get("bytes") is None else source["bytes"], False
        source = source.tobytes() if isinstance(source, np.ndarray) and source.dtype == np.uint8 else source
    if not (isinstance(source, str | os.PathLike | bytes | bytearray | memoryview) or hasattr(source, "read")):
        given = "an empty dict" if isinstance(source, dict) and not source else type(source).__name__
        known = "a path, an address, bytes, an open file, a PIL image, a numpy array or a tensor"
        raise ImageError(f"{given} is no picture. Give {known}.")
    data, own_name = read_bytes(source, is_typed)
    name = name or own_name
    return open_picture(data, name, frame, max_pixels or MAX_PIXELS, notes), name


def as_array(source: object, name: str) -> tuple[np.ndarray, bool]:
    """A tensor or any array as a numpy array, and whether its channels come first by convention. Raises: ImageError."""
    torch = sys.modules.get("torch")  # if the source is a tensor, torch has been imported
    with decoder_errors(name):
        if torch is None or not isinstance(source, torch.Tensor):
            return np.asarray(source), False
        values = source.detach().resolve_neg()
        values = values.dequantize() if values.is_quantized else values.to_dense() if values.is_sparse else values
        values = values.cpu()
        return (values.float() if values.is_floating_point() and values.itemsize < 4 else values).numpy(), True


# Limits


class Budget:
    """Bytes of memory that several threads share. A request above the total waits for the whole budget, and so runs alone."""

    def __init__(self, total: int):
        self.total = self.left = total
        self.changed = threading.Condition()

    @contextmanager
    def take(self, amount: int) -> Iterator[None]:
        """Waits until `amount` bytes are free, and frees them again at the end of the block."""
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


def is_large_file(source: object) -> bool:
    try:
        return isinstance(source, str | os.PathLike) and os.stat(source).st_size > LARGE_FILE_BYTES
    except (OSError, ValueError):
        return False


def check_options(background: str, frame: int, max_pixels: int | None) -> None:
    """Raises: UsageError unless the background is a colour or "drop", and the numbers are in range."""
    try:
        if background != "drop":
            ImageColor.getrgb(background)
    except (ValueError, AttributeError) as error:
        raise UsageError(f"background is {background!r}. Give a colour such as white or #808080, or drop.") from error
    if frame < 0 or (max_pixels is not None and max_pixels < 1):
        raise UsageError(f"frame is {frame} and max_pixels is {max_pixels}; frame must be at least 0, max_pixels at least 1.")
