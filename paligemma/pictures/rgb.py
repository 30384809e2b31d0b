"""Converts pixels of any type to 8-bit RGB: 16 bits, floats, arrays, transparency. `notes` gets a sentence per conversion.

Shapes: H W pixels, C channels. Checked in tests/pictures/test_images.py.
"""

import math
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageColor

from paligemma.errors import ImageError

BAND_PIXELS = 1 << 20  # number of pixels that are converted at a time, so that intermediate results take little memory
DARK = 1 << 14  # a 16-bit picture whose maximum is below this looks nearly black
NEARLY_BLACK = " That is nearly black; --stretch makes the brightest value white."

Converter = Callable[[np.ndarray], np.ndarray]  # pixels of some number type -> uint8 of the same shape


def bands(width: int, height: int) -> list[tuple[int, int, int, int]]:
    """Boxes (left, top, right, bottom) that divide a picture into bands of about BAND_PIXELS pixels."""
    rows = max(1, BAND_PIXELS // width)
    return [(0, top, width, min(top + rows, height)) for top in range(0, height, rows)]


def find_converter(dtype: np.dtype, low: float, high: float, name: str, stretch: bool, notes: list[str]) -> Converter:
    """The function that converts pixels of this type to 0 to 255.

    16-bit values are divided by 257. Floats are taken as 0 to 1 if none is above 1, else as 0 to 255. With `stretch`, every type
    except 8 bits is scaled so that `low` becomes 0 and `high` becomes 255.

    Args:
        low, high: the smallest and the largest value of the picture.
    Raises: ImageError if values lie outside these ranges or are NaN.
    """
    if dtype == np.uint8:
        return lambda values: values
    if dtype == np.bool_:
        return lambda values: values.astype(np.uint8) * np.uint8(255)
    if stretch and math.isfinite(float(high) - float(low)):
        notes.append(f"{name}: values from {low:g} to {high:g}, stretched so that they reach from black to white.")
        factor = 255 / ((float(high) - float(low)) or 1)
        return lambda values: np.rint((values.astype(np.float64) - low) * factor).astype(np.uint8)
    if dtype.kind == "f":
        if not (low >= 0 and high <= 255):  # also refuses NaN
            advice = "Scale them to 0 to 1, or to 0 to 255, without NaN, or add --stretch."
            raise ImageError(f"{name} holds floats from {low:g} to {high:g}. {advice}", path=name)
        top = 1 if high <= 1 else 255
        notes.append(f"{name}: floats from {low:g} to {high:g}, taken as 0 (black) to {top} (white).")
        return lambda values: np.rint(values * np.float32(255 / top)).astype(np.uint8)
    if dtype.kind == "u" and dtype.itemsize == 2:
        notes.append(f"{name}: 16 bits, values from {low} to {high}, divided by 257.{NEARLY_BLACK if 0 < high < DARK else ''}")
        return lambda values: ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)
    if low < 0 or high > 255:
        advice = "Scale them to 0 to 255, or add --stretch."
        raise ImageError(f"{name} holds whole numbers from {low} to {high}. {advice}", path=name)
    return lambda values: values.astype(np.uint8)


def from_array(values: np.ndarray, name: str, stretch: bool, notes: list[str], channels_first: bool = False) -> Image.Image:
    """A numpy array as a picture. Shapes: [H, W], [H, W, C] or [C, H, W], with C = 1 for grey, 3 for RGB, 4 for RGBA.

    If the channels could be the first or the last axis, they are the last axis unless `channels_first`. For the values, see
    find_converter.
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
    convert = find_converter(values.dtype, values.min().item(), values.max().item(), name, stretch, notes)
    out = np.empty(values.shape, np.uint8)
    for _, top, _, bottom in bands(values.shape[1], values.shape[0]):
        out[top:bottom] = convert(values[top:bottom])
    return Image.fromarray(out)


def grey_converter(picture: Image.Image, name: str, stretch: bool, notes: list[str]) -> Converter | None:
    """The function that converts a grey picture of 16 bits or of floats to 8 bits; None if the picture has 8 bits."""
    if picture.mode != "F" and not picture.mode.startswith("I"):
        return None
    extremes = []
    for box in bands(*picture.size):
        values = np.asarray(picture.crop(box))
        extremes += [values.min().item(), values.max().item()]
    low, high = np.min(extremes).item(), np.max(extremes).item()  # NaN if any value is NaN
    if picture.mode == "I" and 0 <= low and high < 1 << 16:  # Pillow opens some 16-bit files in its 32-bit mode "I"
        return find_converter(np.dtype(np.uint16), low, high, name, stretch, notes)
    return find_converter(values.dtype, low, high, name, stretch, notes)


def to_grey(picture: Image.Image, convert: Converter) -> Image.Image:
    """Converts a grey picture with more than 8 bits to 8 bits, and keeps its transparency."""
    values = np.asarray(picture)
    grey = Image.fromarray(convert(values))
    invisible = picture.info.get("transparency")
    if invisible is None:
        return grey
    return Image.merge("LA", (grey, Image.fromarray(np.where(values == invisible, 0, 255).astype(np.uint8))))


def to_rgb(picture: Image.Image, name: str, background: str, stretch: bool, notes: list[str]) -> Image.Image:
    """A picture of any mode as RGB. Transparent pixels show the background colour, or with "drop" their hidden colour."""
    if picture.mode == "RGB" and "transparency" not in picture.info:
        return picture
    convert = grey_converter(picture, name, stretch, notes)
    color = (0, 0, 0) if background == "drop" else ImageColor.getrgb(background)[:3]
    is_composited = False
    out = Image.new("RGB", picture.size)
    for box in bands(*picture.size):
        part = picture.crop(box)
        part = part if convert is None else to_grey(part, convert)
        if "transparency" in part.info or part.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
            part = (part.convert("LA") if part.mode == "La" else part).convert("RGBA")
            if background != "drop" and part.getextrema()[3] != (255, 255):
                is_composited = True
                part = Image.alpha_composite(Image.new("RGBA", part.size, color), part)
        out.paste(part.convert("RGB"), box)
    if is_composited:
        notes.append(f"{name}: transparent pixels show the background, {background}.")
    return out
