"""Every picture of the world, or one sentence that says why not. All files are made here."""

import io
import os
import socket
import struct
import sys
import types
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile, ImageOps

import images
from errors import AccessError, ImageError, PaliGemmaError, UsageError
from images import load_image

COLOURS = np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [255, 255, 255]]], dtype=np.uint8)


def picture(width: int = 40, height: int = 30, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def blocks(size: int = 16) -> Image.Image:
    """Red, green, blue and white quarters: survive a lossy format, and show which way is up."""
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
    """A PNG of black pixels, small however large it claims to be."""

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


# Damaged files (FAULTS 1 to 6, 19 to 25)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM"])
def test_half_a_file_is_refused_as_cut_off(kind):
    data = saved(picture(), kind)
    assert "image data ends early (file cut off?)" in refusal(data[: len(data) // 2])


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_half_a_file_is_taken_if_allowed(kind):
    data = saved(picture(), kind)
    image = load_image(data[: len(data) * 3 // 4], allow_truncated=True)
    assert pixels(image)[:40] == pixels(load_image(data))[:40]  # the first line is there
    assert not ImageFile.LOAD_TRUNCATED_IMAGES  # the switch of the whole process is back where it was


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
def test_formats_that_nobody_photographs_in_are_not_decoded(kind):
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


def test_a_large_page_behind_a_small_one_is_refused_too():
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


# Colours (FAULTS 7 to 13)


def test_transparency_is_laid_on_white_or_another_colour_or_dropped():
    values = np.array([[[255, 0, 0, 0], [255, 0, 0, 255], [0, 0, 0, 128]]], dtype=np.uint8)
    data = saved(Image.fromarray(values), "PNG")
    notes = []
    assert pixels(load_image(data, notes=notes)) == [(255, 255, 255), (255, 0, 0), (127, 127, 127)]
    assert "laid on white" in notes[0]
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


def test_nothing_is_said_about_transparency_that_nobody_sees():
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


# Animations, orientation, sizes (FAULTS 14 to 18)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF", "AVIF"])
def test_one_frame_of_an_animation_is_chosen(kind):
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "lime", "blue")]
    data = saved(frames[0], kind, save_all=True, append_images=frames[1:])
    for number, channel in ((0, 0), (1, 1), (2, 2)):
        notes = []
        image = load_image(data, frame=number, notes=notes)
        assert np.asarray(image).mean((0, 1)).argmax() == channel
        assert f"frame {number + 1} of 3" in notes[0]
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


# Formats (FAULTS 22, 23)


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


# Paths (FAULTS 26 to 29)


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
            assert "not a regular file" in refusal(path)


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

    monkeypatch.setattr("builtins.open", forbidden)  # as root, a file without permissions would still open
    assert "may not be read" in refusal(tmp_path / "a.png")


def test_an_enormous_file_is_refused_unread(tmp_path):
    with open(tmp_path / "a.png", "wb") as file:
        file.truncate(images.MAX_FILE_BYTES + 1)
    assert "256 is the limit" in refusal(tmp_path / "a.png")


@pytest.mark.parametrize("path", ["", "a\0b", "x" * 5000, "a\nb.png"])
def test_odd_names_are_refused_in_a_line(path):
    assert len(refusal(path)) < 500


@pytest.mark.parametrize("address", ["file:///etc/passwd", "ftp://a/b.png", "s3://bucket/a.png"])
def test_other_schemes_are_refused(address):
    assert "Give a path" in refusal(address)


# data: URIs and addresses (FAULTS 30, 34)


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


def test_a_broken_data_uri_is_refused_without_repeating_it():
    for uri in ("data:image/png;base64", "data:image/png;base64,a" + "\u00e4" * 500, "data:image/png;base64," + "!" * 500):
        assert len(refusal(uri)) < 200
    assert "zero bytes" in refusal("data:image/png;base64,")


def test_a_huge_data_uri_is_refused_before_it_is_decoded(monkeypatch):
    monkeypatch.setattr(images.base64, "b64decode", pytest.fail)
    assert "more than 32 MB" in refusal("data:image/png;base64," + "A" * 100_000_000)


def test_an_address_that_gives_no_picture_is_a_matter_of_access(monkeypatch):
    def answer(data: bytes, kind: str) -> None:
        monkeypatch.setattr(images, "fetch", lambda _: (data, kind))

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


# Arrays (FAULTS 35) and other objects


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


# Whatever the bytes are


@settings(max_examples=150)
@given(st.binary(max_size=300), st.sampled_from([b"", *images.READ, HEIC[:16], b"RIFF\xff\0\0\0WEBPVP8 "]))
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
