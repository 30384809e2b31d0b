"""Any picture is loaded as upright RGB, or refused in one sentence. The tests make all of their files."""

import io
import os
import socket
import struct
import sys
import threading
import time
import types
import warnings
import zlib
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile, ImageOps

from paligemma.errors import AccessError, ImageError, PaliGemmaError, UsageError
from paligemma.pictures import decoding, images, rgb, sources
from paligemma.pictures.images import load_image

COLOURS = np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [255, 255, 255]]], dtype=np.uint8)


def picture(width: int = 40, height: int = 30, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def blocks(size: int = 16) -> Image.Image:
    """A picture of four quarters, red, green, blue and white: lossy formats keep them, and they show the orientation."""
    return Image.fromarray(COLOURS.repeat(size, 0).repeat(size, 1))


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def corners(image: Image.Image) -> list[str]:
    """The colours of the quarters of `blocks`, by name, row by row."""
    width, height = image.size
    names = {(1, 0, 0): "red", (0, 1, 0): "green", (0, 0, 1): "blue", (1, 1, 1): "white"}
    places = [(x, y) for y in (height // 4, 3 * height // 4) for x in (width // 4, 3 * width // 4)]
    return [names.get(tuple(int(value > 127) for value in image.getpixel(place)), "?") for place in places]


def pixels(image: Image.Image) -> list[tuple[int, int, int]]:
    return [tuple(pixel) for pixel in np.asarray(image).reshape(-1, 3).tolist()]


def png(width: int, height: int, bits: int = 1) -> bytes:
    """A PNG of black pixels whose file is small, whatever size its header claims."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = zlib.compressobj(9)
    row = bytes(1 + (width * bits + 7) // 8)
    body = b"".join(rows.compress(row) for _ in range(min(height, 100))) + rows.flush()
    header = struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def refusal(source: object, **options: object) -> str:
    """The message with which a picture is refused: one line that ends in a full stop or a question."""
    with pytest.raises(ImageError) as caught:
        load_image(source, **options)
    message = str(caught.value)
    assert caught.value.code == 3
    assert "\n" not in message and message[-1] in ".?"
    return message


# Damaged files


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM"])
def test_half_a_file_is_refused_as_cut_off(kind):
    data = saved(picture(), kind)
    assert "image data ends early (file cut off?)" in refusal(data[: len(data) // 2])


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_half_a_file_is_taken_if_allowed(kind):
    data = saved(picture(), kind)
    image = load_image(data[: len(data) * 3 // 4], allow_truncated=True)
    assert pixels(image)[:40] == pixels(load_image(data))[:40]  # the first row was decoded
    assert not ImageFile.LOAD_TRUNCATED_IMAGES  # the switch of the whole process was restored


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "AVIF", "TIFF"])
def test_a_file_cut_in_its_header_is_no_readable_image(kind):
    message = refusal(saved(picture(), kind)[:20])
    assert "not a readable image" in message or "ends early" in message


def test_an_empty_file_is_called_empty(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"")
    assert "a.jpg is empty" in refusal(tmp_path / "a.jpg")


def test_the_name_of_a_file_says_nothing(tmp_path):
    (tmp_path / "a.jpg").write_bytes(saved(blocks(), "PNG"))
    assert corners(load_image(str(tmp_path / "a.jpg"))) == ["red", "green", "blue", "white"]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"<!DOCTYPE html><html><body>404</body></html>", "HTML page; did the download fail?"),
        (b"\xef\xbb\xbf  <html>", "HTML page"),
        (b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"/>', "Export it to PNG"),
        (b"<svg></svg>", "vector image"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
        (b"%PDF-1.7", "PDF"),
        (b"%!PS-Adobe-3.0 EPSF-3.0", "PostScript"),
        (b"\xc5\xd0\xd3\xc6\x1e\0\0\0", "EPS"),
        (b"8BPS\0\1", "Photoshop"),
        (b"SIMPLE  =                    T", "FITS"),
        (b"PK\3\4\x14\0", "ZIP"),
        (b"\x1f\x8b\x08\0", "gzip"),
        (b"\0\0\0\x18ftypmp42\0\0\0\0", "video"),
        (b"just a text", "a text"),
        (b"\0\1\2\3\4\5\6\7", "not a readable image"),
    ],
)
def test_what_is_no_picture_is_named(data, words):
    assert words in refusal(data)


@pytest.mark.parametrize("kind", ["EPS", "TGA", "PCX", "ICO", "SGI"])
def test_formats_that_are_not_for_photographs_are_not_decoded(kind):
    refusal(saved(picture(32, 32), kind))


def test_a_text_bomb_in_a_png_is_stopped_by_pillow():
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_itxt("comment", "a" * 2_000_000, zip=True)
    assert "not a readable image" in refusal(saved(picture(), "PNG", pnginfo=info))


def test_more_pixels_than_allowed_are_refused_before_they_are_decoded(monkeypatch):
    monkeypatch.setattr(images, "decode", pytest.fail)
    for width, height in ((12_000, 12_000), (20_000, 20_000), (100_000, 100_000)):
        message = refusal(png(width, height))
        assert str(width * height) in message and "over the limit of 50000000" in message


def test_max_pixels_moves_the_limit():
    assert "limit of 1199" in refusal(picture(40, 30), max_pixels=1199)
    assert load_image(picture(40, 30), max_pixels=1200).size == (40, 30)


def test_a_large_page_after_a_small_one_is_refused_too():
    pages = [Image.new("1", (8, 8)), Image.new("1", (200, 200))]
    data = saved(pages[0], "TIFF", save_all=True, append_images=pages[1:])
    assert load_image(data, max_pixels=1000).size == (8, 8)
    assert "200 x 200 = 40000 pixels" in refusal(data, max_pixels=1000, frame=1)


def test_a_frame_that_grows_beyond_pillows_own_limit_is_refused():
    frames = [Image.new("RGB", (9, 9), colour) for colour in ("red", "blue")]
    data = bytearray(saved(frames[0], "GIF", save_all=True, append_images=frames[1:]))
    second = data.rindex(b",\0\0\0\0\x09\0\x09\0")
    data[second + 5 : second + 9] = b"\xff\xff\xff\xff"
    assert "over the limit" in refusal(bytes(data), frame=1)


# Colours


def test_transparency_is_laid_on_white_or_another_colour_or_dropped():
    values = np.array([[[255, 0, 0, 0], [255, 0, 0, 255], [0, 0, 0, 128]]], dtype=np.uint8)
    data = saved(Image.fromarray(values), "PNG")
    notes = []
    assert pixels(load_image(data, notes=notes)) == [(255, 255, 255), (255, 0, 0), (127, 127, 127)]
    assert "show the background, white" in notes[0]
    assert pixels(load_image(data, background="#0000ff")) == [(0, 0, 255), (255, 0, 0), (0, 0, 127)]
    assert pixels(load_image(data, background="drop")) == [(255, 0, 0), (255, 0, 0), (0, 0, 0)]


def test_transparency_on_white_equals_transformers():
    from transformers.image_transforms import convert_to_rgb

    for mode in ("RGBA", "LA", "P"):
        values = np.random.default_rng(1).integers(0, 256, (9, 11, 4), dtype=np.uint8)
        image = Image.fromarray(values).convert(mode)
        if mode == "P":
            image.info["transparency"] = 3
        assert np.array_equal(np.asarray(load_image(image)), convert_to_rgb(image, return_numpy=True))


def test_transparency_without_effect_gets_no_note():
    notes = []
    load_image(blocks().convert("RGBA"), notes=notes)
    assert notes == []


@pytest.mark.parametrize("background", ["whitish", "#12", ""])
def test_a_background_that_is_no_colour_is_wrong_usage(background):
    with pytest.raises(UsageError):
        load_image(picture(), background=background)


def test_grey_with_transparency_becomes_grey_on_white():
    values = np.array([[[0, 0], [0, 255], [90, 255]]], dtype=np.uint8)
    image = load_image(saved(Image.fromarray(values, "LA"), "PNG"))
    assert pixels(image) == [(255, 255, 255), (0, 0, 0), (90, 90, 90)]


@pytest.mark.parametrize("options", [{}, {"transparency": 1}, {"transparency": b"\xff\x00\xff\xff"}])
def test_a_palette_with_and_without_transparency(options):
    image = Image.new("P", (4, 1))
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255, 9, 9, 9])
    image.putdata([0, 1, 2, 3])
    second = (255, 255, 255) if options else (0, 255, 0)
    assert pixels(load_image(saved(image, "PNG", **options))) == [(255, 0, 0), second, (0, 0, 255), (9, 9, 9)]


def test_a_cmyk_jpeg_keeps_its_colours():
    data = saved(blocks().convert("CMYK"), "JPEG", quality=95)
    assert b"Adobe" in data  # stored as the complement, as Adobe's programs do
    assert corners(load_image(data)) == ["red", "green", "blue", "white"]


@pytest.mark.parametrize("mode", ["1", "L"])
def test_black_and_white_and_grey_become_rgb(mode):
    image = load_image(saved(Image.fromarray(np.array([[0, 255]], dtype=np.uint8)).convert(mode), "PNG"))
    assert image.mode == "RGB" and pixels(image) == [(0, 0, 0), (255, 255, 255)]


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_16_bits_are_divided_by_257(kind):
    values = np.array([[0, 257, 128 * 257, 128 * 257 + 200, 65535]], dtype=np.uint16)
    notes = []
    image = load_image(saved(Image.fromarray(values), kind), notes=notes)
    assert [pixel[0] for pixel in pixels(image)] == [0, 1, 128, 129, 255]
    assert "from 0 to 65535" in notes[0]


def test_16_bits_keep_their_transparent_value():
    image = Image.fromarray(np.array([[0, 5000]], dtype=np.uint16))
    assert pixels(load_image(saved(image, "PNG", transparency=5000))) == [(0, 0, 0), (255, 255, 255)]


def test_a_float_tiff_needs_values_from_0_to_1_or_to_255():
    values = np.array([[0.0, 0.5, 1.0]], dtype=np.float32)
    for factor in (1, 255):
        notes = []
        image = load_image(saved(Image.fromarray(values * factor), "TIFF"), notes=notes)
        assert [pixel[0] for pixel in pixels(image)] == [0, 128, 255]
        assert "floats from 0" in notes[0]
    assert "from -3 to" in refusal(saved(Image.fromarray(values - 3), "TIFF"))
    assert "nan" in refusal(saved(Image.fromarray(values * np.nan), "TIFF"))


def test_32_bit_whole_numbers_beyond_16_bits_are_refused():
    assert "whole numbers" in refusal(saved(Image.fromarray(np.array([[0, 70_000]], dtype=np.int32)), "TIFF"))


# Animations, orientation, sizes


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF", "AVIF"])
def test_one_frame_of_an_animation_is_chosen(kind):
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "lime", "blue")]
    data = saved(frames[0], kind, save_all=True, append_images=frames[1:])
    for number, channel in ((0, 0), (1, 1), (2, 2)):
        notes = []
        image = load_image(data, frame=number, notes=notes)
        assert np.asarray(image).mean((0, 1)).argmax() == channel
        assert "has 3 frames, counted from 0" in notes[0] and f"frame {number} is shown" in notes[0]
    assert "has 3 frames" in refusal(data, frame=3)


def test_a_negative_frame_is_wrong_usage():
    with pytest.raises(UsageError):
        load_image(picture(), frame=-1)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("number", range(1, 9))
def test_the_exif_orientation_is_applied_unless_ignored(kind, number):
    stored = Image.fromarray(COLOURS.repeat(24, 0).repeat(16, 1))
    exif = Image.Exif()
    exif[0x0112] = number
    tagged = stored.copy()
    tagged.info["exif"] = exif.tobytes()
    data = saved(stored, kind, exif=exif)
    upright = ImageOps.exif_transpose(tagged)
    assert corners(load_image(data)) == corners(upright)
    assert load_image(data).size == upright.size
    assert corners(load_image(data, ignore_exif=True)) == corners(stored)
    assert load_image(data, ignore_exif=True).size == stored.size


def test_unreadable_exif_is_no_reason_to_refuse_a_picture():
    data = saved(blocks(), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff" + bytes(20))
    assert corners(load_image(data)) == ["red", "green", "blue", "white"]


def test_one_pixel_is_a_picture():
    assert load_image(saved(Image.new("RGB", (1, 1), "red"), "PNG")).getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize("size", [(1, 10_000), (10_000, 1)])
def test_a_strip_is_read_with_one_note(size):
    notes = []
    assert load_image(saved(Image.new("RGB", size), "PNG"), notes=notes).size == size
    assert len(notes) == 1 and "squeezed" in notes[0]


# Formats


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "AVIF", "PPM"])
def test_formats_of_photographs_are_read(kind):
    assert corners(load_image(saved(blocks(), kind))) == ["red", "green", "blue", "white"]


def test_a_phones_mpo_gives_its_first_picture_without_a_note():
    data = saved(blocks(), "MPO", save_all=True, append_images=[Image.new("RGB", (32, 32))])
    notes = []
    assert corners(load_image(data, notes=notes)) == ["red", "green", "blue", "white"]
    assert notes == []


HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(40)


def test_heic_without_its_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    assert "heic extra" in refusal(HEIC)


def test_heic_is_read_by_the_plugin_if_it_is_there(monkeypatch):
    def register_heif_opener() -> None:
        Image.register_open("HEIF", lambda _, __: HeifStandIn(), lambda start: start[4:8] == b"ftyp")

    class HeifStandIn(Image.Image):
        def __init__(self):
            super().__init__()
            image = blocks()
            self.im, self._mode, self._size = image.im, image.mode, image.size

    monkeypatch.setitem(sys.modules, "pillow_heif", types.SimpleNamespace(register_heif_opener=register_heif_opener))
    monkeypatch.setattr(Image, "OPEN", dict(Image.OPEN))
    monkeypatch.setattr(Image, "ID", list(Image.ID))
    assert corners(load_image(HEIC)) == ["red", "green", "blue", "white"]


# Paths


def test_a_folder_is_no_picture(tmp_path):
    assert "is a folder" in refusal(tmp_path)


def test_a_missing_file_is_told_with_names_like_it(tmp_path):
    (tmp_path / "Kitten_01.png").touch()
    assert "Did you mean Kitten_01.png?" in refusal(str(tmp_path / "kiten_01.png"))
    assert "Check the path" in refusal(tmp_path / "elephant.jpg")
    assert "nor does the folder" in refusal(tmp_path / "nowhere" / "a.png")


def test_a_fifo_a_device_and_a_socket_are_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
        for path in (tmp_path / "fifo", tmp_path / "socket", "/dev/zero", "/dev/null"):
            assert "not a regular file. Save its content to a file" in refusal(path)


def test_links_are_followed_unless_they_lead_nowhere(tmp_path):
    (tmp_path / "a.png").write_bytes(saved(blocks(), "PNG"))
    (tmp_path / "good").symlink_to("a.png")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "dangling").symlink_to("b.png")
    assert load_image(tmp_path / "good").size == (32, 32)
    assert "cannot be opened" in refusal(tmp_path / "loop")
    assert "link to a file that does not exist" in refusal(tmp_path / "dangling")


def test_a_file_that_may_not_be_read_is_refused(tmp_path, monkeypatch):
    (tmp_path / "a.png").touch()

    def forbidden(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", forbidden)  # root could open a file without permissions
    assert "may not be read" in refusal(tmp_path / "a.png")


def test_an_enormous_file_is_refused_unread(tmp_path):
    with open(tmp_path / "a.png", "wb") as file:
        file.truncate(sources.MAX_FILE_BYTES + 1)
    assert "268435456 is the limit" in refusal(tmp_path / "a.png")


@pytest.mark.parametrize("path", ["", "a\0b", "x" * 5000, "a\nb.png"])
def test_odd_names_are_refused_in_a_line(path):
    assert len(refusal(path)) < 500


@pytest.mark.parametrize("address", ["ftp://a/b.png", "s3://bucket/a.png"])
def test_other_schemes_are_refused(address):
    assert "Give a path" in refusal(address)


# Sources: data: URIs and addresses


def test_a_data_uri_is_a_picture():
    import base64
    import urllib.parse

    data = saved(blocks(), "PNG")
    encoded = base64.b64encode(data).decode()
    for uri in (
        "data:image/png;base64," + encoded,
        "data:image/png;base64," + encoded.rstrip("="),
        "data:;base64," + encoded[:40] + "\n" + encoded[40:],
        "data:image/png," + urllib.parse.quote(data),
    ):
        assert corners(load_image(uri)) == ["red", "green", "blue", "white"]


def test_a_damaged_tiff_is_one_error_and_nothing_of_libtiff(capfd):
    for compression in ("tiff_lzw", "tiff_deflate", "jpeg", "group4"):
        whole = saved(blocks().convert("1" if compression == "group4" else "RGB"), "TIFF", compression=compression)
        for start in range(8, len(whole), max(1, len(whole) // 30)):
            with suppress(ImageError):
                load_image(whole[:start] + b"\xa7\x00\xff" * 3 + whole[start + 9 :])
    assert capfd.readouterr().err == ""


def test_a_broken_data_uri_is_refused_without_repeating_it():
    for uri in ("data:image/png;base64", "data:image/png;base64,a" + "\u00e4" * 500, "data:image/png;base64," + "!" * 500):
        assert len(refusal(uri)) < 200
    for half in ("\udcff", "\ud800"):  # possible in an argument that is not UTF-8, or in JSON
        assert "beyond ASCII" in refusal("data:image/png," + half)
    assert "zero bytes" in refusal("data:image/png;base64,")


def test_a_huge_data_uri_is_refused_before_it_is_decoded(monkeypatch):
    monkeypatch.setattr(sources.base64, "b64decode", pytest.fail)
    assert "more than 32 MB" in refusal("data:image/png;base64," + "A" * 100_000_000)


def test_an_address_that_gives_no_picture_is_a_matter_of_access(monkeypatch):
    def answer(data: bytes, kind: str) -> None:
        monkeypatch.setattr("paligemma.pictures.fetch.fetch", lambda _, may_be_private: (data, kind) if may_be_private else None)

    address = "https://example.org/a.png"
    answer(saved(blocks(), "PNG"), "text/html")
    assert load_image(address).size == (32, 32)
    answer(b"<html>login</html>", "text/html")
    with pytest.raises(AccessError, match="200 OK with text/html: an HTML page"):
        load_image(address)
    answer(b"", "")
    with pytest.raises(AccessError, match="no type"):
        load_image(address)
    answer(saved(blocks(), "PNG")[:60], "image/png")
    refusal(address)


# Arrays and other objects


@pytest.mark.parametrize(
    "values",
    [
        COLOURS,
        COLOURS.astype(np.int64),
        COLOURS.astype(np.float32),
        COLOURS / 255,
        (COLOURS / 255).astype(np.float16),
        COLOURS.astype(np.uint16) * 257,
        COLOURS > 0,
        COLOURS[::-1][::-1],
        np.dstack([COLOURS, np.full((2, 2), 255, np.uint8)]),
    ],
)
def test_arrays_of_every_number_type_give_the_same_picture(values):
    assert np.array_equal(np.asarray(load_image(values)), COLOURS)


def test_arrays_may_have_their_channels_first():
    values = np.random.default_rng(0).integers(0, 256, (3, 5, 7), dtype=np.uint8)
    assert np.array_equal(np.asarray(load_image(values)), values.transpose(1, 2, 0))
    assert np.array_equal(np.asarray(load_image(values[:1]))[:, :, 2], values[0])
    assert np.array_equal(np.asarray(load_image(values[0]))[:, :, 1], values[0])


def test_an_array_of_four_channels_is_laid_on_the_background():
    values = np.array([[[0, 0, 0, 0]]], dtype=np.uint8)
    assert load_image(values).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize(
    "values",
    [
        np.zeros((0, 3, 3), np.uint8),
        np.zeros((2, 2, 5), np.uint8),
        np.zeros((1, 2, 2, 3), np.uint8),
        np.zeros(3, np.uint8),
        np.uint8(3)[...],
        np.full((2, 2), np.nan),
        np.full((2, 2), np.inf),
        np.full((2, 2), -0.1),
        np.full((2, 2), 256.0),
        np.full((2, 2), 256),
        np.full((2, 2), -1),
        np.full((2, 2), 1j),
        np.full((2, 2), "a"),
        np.full((2, 2), None),
    ],
)
def test_arrays_that_are_no_picture_are_refused(values):
    refusal(values)


@pytest.mark.parametrize("source", [None, 3, [1, 2], object(), io.BytesIO()])
def test_objects_that_are_no_picture_are_refused(source):
    assert type(source).__name__ in refusal(source)


def test_a_pil_image_is_taken_at_its_frame_and_left_alone():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    image = Image.open(io.BytesIO(saved(frames[0], "GIF", save_all=True, append_images=frames[1:])))
    image.seek(1)
    assert load_image(image).getpixel((0, 0)) == (0, 0, 255)
    assert image.tell() == 1


def test_a_pil_image_whose_file_was_closed_is_still_a_picture(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    (tmp_path / "a.gif").write_bytes(saved(frames[0], "GIF", save_all=True, append_images=frames[1:]))
    with Image.open(tmp_path / "a.gif") as image:
        image.load()
    assert load_image(image).getpixel((0, 0)) == (255, 0, 0)


def test_pillows_warnings_stay_out_of_sight(recwarn):
    tiff = saved(picture(), "TIFF")
    with pytest.raises(ImageError):
        load_image(tiff[:-30])
    with pytest.raises(ImageError):
        load_image(png(10_000, 10_000))
    assert not recwarn.list


# Any bytes


@settings(max_examples=150)
@given(st.binary(max_size=300), st.sampled_from([b"", *decoding.FORMATS, HEIC[:16], b"RIFF\xff\0\0\0WEBPVP8 "]))
def test_random_bytes_raise_nothing_but_our_errors(data, start):
    try:
        assert load_image(start + data, max_pixels=10_000).mode == "RGB"
    except PaliGemmaError:
        pass


@settings(max_examples=300)
@given(st.data(), st.sampled_from(["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "AVIF", "PPM"]))
def test_damaged_files_raise_nothing_but_our_errors(data, kind):
    content = bytearray(saved(picture(9, 7), kind))
    for place in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=6)):
        content[place] = data.draw(st.integers(0, 255))
    try:
        assert load_image(bytes(content), max_pixels=10_000).mode == "RGB"
    except PaliGemmaError:
        pass


# Limits on time and memory


def test_several_threads_keep_to_one_budget():
    budget, most, now, lock = images.Budget(100), [0], [0], threading.Lock()

    def use(amount: int) -> None:
        with budget.take(amount):
            with lock:
                now[0] += min(amount, 100)
                most[0] = max(most[0], now[0])
            time.sleep(0.002)
            with lock:
                now[0] -= min(amount, 100)

    threads = [threading.Thread(target=use, args=(amount,)) for amount in [30, 60, 1000, 50, 10] * 6]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert most[0] <= 100 and budget.left == 100


def test_a_large_picture_is_one_piece_of_memory_which_malloc_does_not_keep():
    assert Image.core.get_block_size() > 2**25  # the maximum of M_MMAP_THRESHOLD: malloc may keep freed blocks below it


def test_a_large_picture_is_decoded_alone_and_small_ones_together(monkeypatch, tmp_path):
    taken, take = [], images.MEMORY.take
    monkeypatch.setattr(images.MEMORY, "take", lambda amount: taken.append(amount) or take(amount))
    load_image(png(4000, 100, bits=8))
    assert taken == [0, images.BYTES_PER_PIXEL * 400_000]
    taken.clear()
    monkeypatch.setattr(images, "LARGE_FILE_BYTES", 10)
    (tmp_path / "a.png").write_bytes(saved(picture(), "PNG"))
    load_image(tmp_path / "a.png")
    assert taken == [images.MEMORY_BYTES, 0]  # the whole budget, before the file is read
    assert images.MEMORY.left == images.MEMORY_BYTES


def test_what_is_made_of_a_picture_is_made_within_the_budget():
    assert load_image(picture(), then=lambda image: image.size) == (40, 30)
    left = load_image(saved(picture(), "PNG"), then=lambda _: images.MEMORY.left)
    assert left < images.MEMORY.left == images.MEMORY_BYTES


@pytest.mark.parametrize("mode", ["LA", "RGBA", "P", "1", "CMYK", "I;16", "F", "RGB"])
def test_a_picture_converted_in_bands_is_the_picture_converted_whole(mode, monkeypatch):
    values = np.random.default_rng(3).integers(0, 256, (60, 40, 4), dtype=np.uint8)
    image = Image.fromarray(values[:, :, 0].astype({"I;16": np.uint16, "F": np.float32}[mode]) * 200) if mode in ("I;16", "F") \
        else Image.fromarray(values).convert(mode)  # fmt: skip
    image = image.point(lambda value: value * 0.005) if mode == "F" else image
    image.info["transparency"] = {"P": 3, "I;16": 400, "RGB": (1, 2, 3)}.get(mode)
    image.info = {name: value for name, value in image.info.items() if value is not None}
    whole = np.asarray(load_image(image))
    monkeypatch.setattr(rgb, "BAND_PIXELS", 90)
    notes = []
    assert np.array_equal(np.asarray(load_image(image, notes=notes)), whole)
    assert len(notes) == len(set(notes))


def tiff_pages(count: int, last: int = 0) -> bytes:
    """A TIFF with `count` pages of 8 x 8 grey pixels. Each page is a directory of nine entries; the last points to `last`."""
    entries = [(256, 8), (257, 8), (258, 8), (259, 1), (262, 1), (273, 8), (277, 1), (278, 8), (279, 64)]
    body = struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries)
    places = [8 + number * (len(body) + 4) for number in range(1, count)] + [last]
    return b"II*\0" + struct.pack("<I", 8) + b"".join(body + struct.pack("<I", place) for place in places)


MANY_PAGES = tiff_pages(250_000)


def test_the_pages_of_a_tiff_are_counted_in_one_walk_with_an_end():
    assert decoding.count_pages(tiff_pages(1)) == (1, True)
    assert decoding.count_pages(tiff_pages(500)) == (500, True)
    assert decoding.count_pages(tiff_pages(500, last=8)) == (500, True)  # a loop
    assert decoding.count_pages(tiff_pages(500, last=1 << 30)) == (500, True)  # beyond the end of the file
    count, is_all = decoding.count_pages(MANY_PAGES)
    assert count < 30_000 and not is_all
    big = io.BytesIO()
    picture().save(big, "TIFF", big_tiff=True, save_all=True, append_images=[picture()] * 2)
    assert decoding.count_pages(big.getvalue()) == (3, True)


def test_only_the_page_that_is_wanted_is_looked_at(monkeypatch):
    """Pillow's n_frames takes quadratic time: for a TIFF of 250,000 pages it took minutes."""
    from PIL.TiffImagePlugin import TiffImageFile

    seeks, seek = [], TiffImageFile._seek
    monkeypatch.setattr(TiffImageFile, "_seek", lambda self, frame: seeks.append(frame) or seek(self, frame))
    notes = []
    assert load_image(MANY_PAGES, notes=notes).size == (8, 8)
    assert seeks == [0] and "has more than" in notes[0] and "counted from 0; frame 0 is shown" in notes[0]
    assert "very many frames" in refusal(MANY_PAGES, frame=100_000)
    assert seeks == [0, 0]


def test_the_frames_of_a_gif_are_counted_without_decoding(monkeypatch):
    frames = [Image.new("RGB", (20, 20), (number, 0, 0)) for number in range(5)]
    data = saved(frames[0], "GIF", save_all=True, append_images=frames[1:], comment=b"," * 700)
    assert decoding.count_frames(data) == (5, True)
    assert decoding.count_frames(data[:-20])[0] in (4, 5)
    assert decoding.count_frames(saved(frames[0], "GIF")) == (1, True)
    monkeypatch.setattr(decoding, "MAX_STEPS", 10)
    assert decoding.count_frames(data)[1] is False


def test_a_frame_after_too_many_large_ones_is_refused(monkeypatch):
    frames = [Image.new("RGB", (40, 30), (0, 0, number)) for number in range(12)]
    for kind in ("GIF", "PNG", "WEBP"):
        data = saved(frames[0], kind, save_all=True, append_images=frames[1:], lossless=True)
        assert load_image(data, frame=11).size == (40, 30)
        with monkeypatch.context() as patch:
            patch.setattr(decoding, "MAX_FRAME_PIXELS", 11 * 40 * 30 - 1)
            assert "11 large frames must be decoded" in refusal(data, frame=11)
            assert load_image(data, frame=10).size == (40, 30)
        assert "not among them" in refusal(data, frame=10**9)


def test_a_jpeg_of_many_scans_is_refused(monkeypatch):
    data = saved(blocks(), "JPEG", progressive=True)
    scan = data[data.rindex(b"\xff\xda") : -2]
    many = data[:-2] + scan * 40 + data[-2:]
    assert corners(load_image(many)) == ["red", "green", "blue", "white"]
    monkeypatch.setattr(decoding, "MAX_FRAME_PIXELS", 32 * 32 * 30)
    assert corners(load_image(data)) == ["red", "green", "blue", "white"]
    assert "scans" in refusal(many)


def test_a_tile_that_is_larger_than_its_picture_is_refused(monkeypatch):
    entries = [(256, 100), (257, 100), (258, 8), (259, 8), (262, 1), (277, 1), (322, 65520), (323, 32752), (324, 200), (325, 50)]
    body = struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries)
    data = b"II*\0" + struct.pack("<I", 8) + body + bytes(4) + zlib.compress(bytes(30_000)) + bytes(200)
    monkeypatch.setattr(images, "decode", pytest.fail)
    assert "tiles of 2145911040 pixels" in refusal(data)


def test_forms_that_are_slow_to_read_are_refused_when_they_are_large(monkeypatch):
    plain = b"P3 # small\n2 1 255\n255 0 0  0 0 255"
    odd = b"P6 2 1 100 " + bytes([100, 0, 0, 0, 0, 100])
    assert pixels(load_image(plain)) == pixels(load_image(odd)) == [(255, 0, 0), (0, 0, 255)]
    assert "slow to read" in refusal(plain + b"#\n" * 2000)
    assert "not a readable image" in refusal(b"P6 #" + b"x" * 100_000 + b"\n2 1 255 " + bytes(6))
    monkeypatch.setattr(decoding, "MAX_SLOW_BYTES", 16)
    for data in (plain, odd):
        assert "slow to read" in refusal(data)
    raw = b"P6 2 1 255 " + bytes([255, 0, 0, 0, 0, 255])
    assert pixels(load_image(raw)) == [(255, 0, 0), (0, 0, 255)]


def test_an_address_of_a_file_may_name_no_machine():
    for address in ("file://[x/a.png", "FILE://host/a.png"):
        with pytest.raises(ImageError, match="names the machine"):
            load_image(address)


def test_a_missing_name_among_very_many_files_is_compared_with_few(tmp_path, monkeypatch):
    import difflib

    names = [f"IMG_{number:05d}.jpg" for number in range(20_000)]
    monkeypatch.setattr(sources, "names_in", lambda _: names)
    compared, close = [], difflib.get_close_matches

    def count(name: str, some: list, **more: object) -> list:
        compared.append(len(some))
        return close(name, some, **more)

    monkeypatch.setattr(difflib, "get_close_matches", count)
    assert "Did you mean IMG_" in refusal(tmp_path / "IMG_1234x.jpg")
    assert compared[0] <= 200


def test_sniffing_works_on_the_oldest_python():
    """int.from_bytes without a byte order needs Python 3.11. sniff calls it for HEIC, AVIF and MP4."""
    import ast
    from pathlib import Path

    tree = ast.parse(Path(decoding.__file__).read_text(encoding="utf-8"))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "from_bytes"]
    assert calls and all(len(call.args) == 2 for call in calls)


def test_two_threads_that_silence_warnings_leave_the_filters_as_they_were():
    """With catch_warnings alone, entered and left in this order, the filter of the second thread would stay on."""
    before = list(warnings.filters)
    decoding.NO_WARNINGS.__enter__()  # by the first thread
    decoding.NO_WARNINGS.__enter__()  # by the second one
    decoding.NO_WARNINGS.__exit__()  # by the first one
    assert warnings.filters[0][0] == "ignore"  # the second thread is still inside
    decoding.NO_WARNINGS.__exit__()
    assert warnings.filters == before


# --stretch


def test_stretch_makes_the_darkest_black_and_the_brightest_white():
    values = np.array([[0, 1024, 2048, 4095]], dtype=np.uint16)
    for kind in ("PNG", "TIFF"):
        data, notes = saved(Image.fromarray(values), kind), []
        assert [pixel[0] for pixel in pixels(load_image(data, notes=notes))] == [0, 4, 8, 16]
        assert "--stretch" in notes[0]
        notes.clear()
        assert [pixel[0] for pixel in pixels(load_image(data, stretch=True, notes=notes))] == [0, 64, 128, 255]
        assert notes == ["the picture: values from 0 to 4095, stretched so that they reach from black to white."]
    assert [pixel[0] for pixel in pixels(load_image(values, stretch=True))] == [0, 64, 128, 255]
    assert [pixel[0] for pixel in pixels(load_image(Image.fromarray(values), stretch=True))] == [0, 64, 128, 255]
    floats = np.array([[-3.0, 0.0, 1000.0]], dtype=np.float32)
    assert [pixel[0] for pixel in pixels(load_image(floats, stretch=True))] == [0, 1, 255]
    assert [pixel[0] for pixel in pixels(load_image(np.full((1, 2), 7, np.uint16), stretch=True))] == [0, 0]
    bright = np.array([[0, 40_000]], dtype=np.uint16)
    notes = []
    load_image(bright, notes=notes)
    assert "--stretch" not in notes[0]
    for wrong in (np.nan, np.inf):
        refusal(np.array([[0.0, wrong]]), stretch=True)


def test_stretch_leaves_8_bits_alone():
    image = picture()
    image.putpixel((0, 0), (9, 9, 9))
    assert np.array_equal(np.asarray(load_image(saved(image, "PNG"), stretch=True)), np.asarray(image))
    assert np.array_equal(np.asarray(load_image(np.full((2, 2), 9, np.uint8), stretch=True)), np.full((2, 2, 3), 9))


# Sources that other libraries accept


def test_open_files_are_read_from_their_beginning(tmp_path):
    data = saved(blocks(), "PNG")
    buffer = io.BytesIO(data)
    buffer.seek(0, io.SEEK_END)
    assert corners(load_image(buffer)) == corners(load_image(buffer)) == ["red", "green", "blue", "white"]
    (tmp_path / "a.png").write_bytes(data)
    with open(tmp_path / "a.png", "rb") as file:
        assert corners(load_image(file)) == ["red", "green", "blue", "white"]
    assert "cannot be read" in refusal(file)  # the file is closed
    with open(tmp_path / "a.png", encoding="latin-1") as text:
        assert 'mode "rb"' in refusal(text)
    read, write = os.pipe()
    os.write(write, data)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        assert corners(load_image(pipe)) == ["red", "green", "blue", "white"]
    in_pieces = io.BytesIO(data)  # raw pipes and sockets return what has arrived so far
    source = SimpleNamespace(read=lambda size: in_pieces.read(min(size, 10)))
    assert corners(load_image(source)) == ["red", "green", "blue", "white"]
    assert "cannot be read" in refusal(SimpleNamespace(read=lambda: data))


def test_the_dict_of_a_hugging_face_data_set_is_a_picture(tmp_path):
    data = saved(blocks(), "PNG")
    (tmp_path / "a.png").write_bytes(data)
    for source in ({"bytes": data, "path": "gone.png"}, {"bytes": data}, {"bytes": None, "path": str(tmp_path / "a.png")},
                   {"path": tmp_path / "a.png"}, {"bytes": np.frombuffer(data, np.uint8), "path": None},
                   np.bytes_(data), np.str_(tmp_path / "a.png")):  # fmt: skip
        assert corners(load_image(source)) == ["red", "green", "blue", "white"]
    for source in ({}, {"image": 3}, {"bytes": None, "path": None}, {"bytes": 7, "path": "a"}):
        refusal(source)


def test_a_path_may_begin_at_home_and_a_file_address_is_a_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "my cat.png").write_bytes(saved(blocks(), "PNG"))
    place = tmp_path.as_uri() + "/my%20cat.png"
    for source in ("~/my cat.png", Path("~/my cat.png"), place, place.replace("file://", "FILE://localhost")):
        assert corners(load_image(source)) == ["red", "green", "blue", "white"]
        refusal(source, is_typed=False)
    assert "names the machine" in refusal("file://elsewhere/a.png")
    assert "does not exist" in refusal("~nosuchuser/a.png")
    refusal("~\0/a.png")
    assert "names the machine" in refusal("file://[a/b.png")
    refusal("file:///a%00b.png")


def test_an_address_in_data_is_fetched_as_such(monkeypatch):
    asked = []
    def answer(_, may_be_private):
        asked.append(may_be_private)
        return saved(blocks(), "PNG"), ""

    monkeypatch.setattr("paligemma.pictures.fetch.fetch", answer)
    load_image("http://a/b.png")
    load_image("HTTP://a/b.png", is_typed=False)
    load_image({"path": "http://a/b.png"})
    load_image({"bytes": "http://a/b.png"})
    assert asked == [True, False, False, False]


def test_tensors_are_pictures():
    values = torch.from_numpy(np.asarray(picture(7, 5)).copy())
    first = values.permute(2, 0, 1)
    for tensor in (values, first, first.float(), first / 255, (first / 255).double(), first.to(torch.int64)):
        assert np.array_equal(np.asarray(load_image(tensor)), values.numpy())
    for dtype, worst in ((torch.bfloat16, 1), (torch.float16, 0)):
        loaded = np.asarray(load_image((first / 255).to(dtype))).astype(int)
        assert abs(loaded - values.numpy()).max() <= worst
    negated = torch.complex(first / 255, -(first / 255)).conj().imag  # torch stores the sign as a bit of the tensor
    for other in (torch.nn.Parameter(first / 255), negated, (first / 255).to_sparse()):
        assert np.array_equal(np.asarray(load_image(other)), values.numpy())
    square = torch.zeros(3, 4, 3)
    square[0] = 1
    assert load_image(square).size == (3, 4) and load_image(square).getpixel((0, 0)) == (255, 0, 0)
    for wrong in (torch.zeros(2, 3, 4, 4), torch.zeros(0), torch.full((3, 2, 2), -1.0), torch.zeros(3, 2, 2, device="meta")):
        refusal(wrong)


# Any object


MODES = ["1", "L", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "I", "F", "LA", "PA", "RGBX", "RGBa", "La", "I;16", "I;16L",
         "I;16B", "I;16N"]  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("info", [{}, {"transparency": 0}, {"transparency": b"\0\1"}, {"transparency": (1, 2, 3)}, {"exif": b"x"},
                                  {"transparency": "x", "exif": 3, "xmp": 4, "Raw profile type exif": 5}])  # fmt: skip
def test_a_pil_image_of_any_mode_is_rgb_or_refused(mode, info):
    image = Image.new(mode, (5, 4))
    image.info = dict(info)
    for options in ({}, {"background": "drop"}, {"stretch": True}):
        try:
            assert load_image(image, **options).mode == "RGB"
        except PaliGemmaError:
            assert mode == "LAB" or "transparency" in info


DTYPES = st.sampled_from([np.bool_, np.uint8, np.int8, np.uint16, np.int32, np.uint64, np.float16, np.float32, np.float64,
                          np.complex64, "M8[s]", "U3", "S2", object])  # fmt: skip


@settings(max_examples=150)
@given(DTYPES, st.lists(st.integers(0, 5), max_size=4), st.binary(max_size=800), st.booleans())
def test_any_array_is_rgb_or_refused(dtype, shape, content, stretch):
    size = int(np.prod(shape))
    values = np.resize(np.frombuffer(content + b"\0" * 16, np.uint8), size * np.dtype(dtype).itemsize)
    if dtype is object or not size:
        values = np.full(shape, None) if dtype is object else np.zeros(shape, dtype)
    else:
        values = values.view(dtype)[:size].reshape(shape)
    try:
        assert load_image(values, stretch=stretch).mode == "RGB"
    except PaliGemmaError as error:
        assert "\n" not in str(error)
