"""Fuzzers of pictures: the bytes of files, and the addresses and data: URIs that stand in their place."""

import base64
import io
import json
import struct
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random

import numpy as np
from PIL import Image

from paligemma.pictures import fetch, folders, names
from paligemma.pictures.images import MAX_PIXELS, load_image
from paligemma.programs import options
from tests.fuzz.harness import Files, Fuzzer
from tests.fuzz.mutations import damaged_bytes, text


def gradient(mode: str, width: int = 40, height: int = 30) -> Image.Image:
    """A picture in which every row and column differs."""
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    rgba = np.stack((x * 6, y * 8, (x + y) * 3, 255 - x * 3), axis=-1).astype(np.uint8)
    picture = Image.fromarray(rgba)
    if mode == "I;16":
        return Image.fromarray((x * 1500 + y).astype(np.uint16))
    if mode == "F":
        return Image.fromarray((x / width).astype(np.float32))
    return picture if mode == "RGBA" else picture.convert("RGB").convert(mode) if mode != "LA" else picture.convert("LA")


def encode(mode: str, form: str, frames: int = 0, **how: object) -> bytes:
    """The file of that picture; with `frames` so many more, each turned by another angle."""
    out = io.BytesIO()
    several = {"save_all": True, "append_images": [gradient(mode).rotate(90 * i) for i in range(frames)]} if frames else {}
    gradient(mode).save(out, form, **several, **how)
    return out.getvalue()


def valid_pictures() -> list[bytes]:
    """A file of every format and mode that is read."""
    exif = Image.Exif()
    exif[0x0112] = 6
    made = [
        *(encode(mode, "PNG") for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")), encode("P", "PNG", transparency=3),
        encode("RGB", "PNG", transparency=(0, 0, 0), exif=exif), encode("RGB", "PNG", frames=3),
        encode("RGB", "JPEG", exif=exif), encode("RGB", "JPEG", progressive=True), encode("L", "JPEG"), encode("CMYK", "JPEG"),
        encode("RGB", "MPO", frames=3), encode("P", "GIF", frames=3), encode("L", "GIF"), encode("RGB", "WEBP", exif=exif),
        encode("RGBA", "WEBP", lossless=True), encode("RGB", "WEBP", frames=3), encode("RGB", "BMP"), encode("P", "BMP"),
        encode("1", "BMP"), encode("RGBA", "BMP"),
        *(encode(mode, "TIFF", exif=exif) for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "F")),
        *(encode("RGB", "TIFF", compression=name) for name in ("tiff_lzw", "tiff_adobe_deflate", "jpeg", "packbits")),
        encode("1", "TIFF", compression="group4"), encode("RGB", "TIFF", frames=3), encode("RGB", "TIFF", big_tiff=True),
        encode("RGB", "PPM"), encode("L", "PPM"), encode("1", "PPM"), encode("I;16", "PPM"), b"P2 3 2 9\n1 2 3 4 5 6\n",
        b"P1 2 2\n1 0 0 1\n", b"P3 1 1 255\n1 2 3\n",
    ]  # fmt: skip
    return made + ([encode("RGB", "AVIF"), encode("RGBA", "AVIF")] if "AVIF" in Image.SAVE else [])


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def chunks(data: bytes) -> list[tuple[bytes, bytes]]:
    """Kind and body of each chunk of a valid PNG."""
    found, at = [], 8
    while at + 8 <= len(data):
        length = struct.unpack_from(">I", data, at)[0]
        found.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + length]))
        at += 12 + length
    return found


def png(parts: list[tuple[bytes, bytes]]) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(kind, body) for kind, body in parts)


def header(width: int, height: int, depth: int = 8, colours: int = 2) -> tuple[bytes, bytes]:
    return b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colours, 0, 0, 0)


def damaged_png(random: Random, data: bytes) -> bytes:
    """A PNG with another chunk or another body in a chunk, and with right checksums, so that the decoder gets to see it."""
    parts = chunks(data)
    at = random.randrange(len(parts))
    kind, body = parts[at]
    choice = random.randrange(5)
    if choice == 0:
        parts[at] = kind, damaged_bytes(random, body)
    elif choice == 1 and kind == b"IDAT":
        parts[at] = kind, zlib.compress(damaged_bytes(random, zlib.decompress(body)) if len(parts) < 6 else body)
    elif choice == 2:
        extra = random.choice(
            (b"tEXt", b"zTXt", b"iTXt", b"iCCP", b"eXIf", b"tRNS", b"PLTE", b"acTL", b"fcTL", b"fdAT", b"gAMA", b"pHYs")
        )
        raw = (
            b"a\0\0"
            + (b"" if extra == b"tEXt" else b"\0" * random.randint(0, 4))
            + zlib.compress(b"x" * random.choice((0, 9, 10**6)))
        )
        parts.insert(random.randint(1, len(parts)), (extra, damaged_bytes(random, raw) if random.random() < 0.5 else raw))
    elif choice == 3:
        parts[0] = header(
            *(random.choice((0, 1, 40, 65535, 2**31 - 1, 2**32 - 1)) for _ in range(2)), *damaged_bytes(random, b"\x08\x02")[:2]
        )
    else:
        parts.insert(random.randrange(len(parts)), random.choice(parts))
    return png(parts)


def tiff_of_pages(count: int, size: int = 1) -> bytes:
    """A TIFF of so many grey pages, each `size` x `size`, that share their one strip."""
    strip = b"\x80" * (size * size)
    tags = (
        (256, 3, 1, size), (257, 3, 1, size), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (273, 4, 1, 8), (278, 3, 1, size),
        (279, 4, 1, size * size),
    )  # fmt: skip
    body = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags)
    start = 8 + len(strip) + len(strip) % 2
    length = len(body) + 4
    pages = [body + struct.pack("<I", start + length * (i + 1) if i + 1 < count else 0) for i in range(count)]
    return b"II*\0" + struct.pack("<I", start) + strip.ljust(start - 8, b"\0") + b"".join(pages)


def tiff_in_a_circle() -> bytes:
    """A TIFF whose second page is followed by its first."""
    data = bytearray(tiff_of_pages(2))
    data[-4:] = data[4:8]
    return bytes(data)


def gif_of_frames(count: int) -> bytes:
    """A GIF of so many frames of one pixel."""
    frame = b"\x21\xf9\x04\0\0\0\0\0" + b"\x2c\0\0\0\0\1\0\1\0\0" + b"\x02\x02\x44\x01\0"
    return b"GIF89a\1\0\1\0\x80\0\0\0\0\0\xff\xff\xff" + frame * count + b";"


class Pictures(Fuzzer):
    name, codes = "pictures", (3,)

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.valid = valid_pictures()

    def sound(self) -> Files:
        return {"picture": self.valid[0], "options.json": b"{}"}

    def known(self) -> list[Callable[[], Files]]:
        def of(make: Callable[[], bytes], **chosen: object) -> Callable[[], Files]:
            return lambda: {"picture": make(), "options.json": json.dumps(chosen).encode()}

        bomb = zlib.compress(b"\0" * (30 << 20), 9)
        idat = (b"IDAT", zlib.compress(b"\0" * 4))
        return [
            of(partial(tiff_of_pages, 250_000)),
            of(partial(tiff_of_pages, 250_000), frame=249_999),
            of(partial(gif_of_frames, 200_000)),
            of(partial(gif_of_frames, 20_000), frame=10**6),
            of(tiff_in_a_circle),
            of(tiff_in_a_circle, frame=5),
            of(lambda: png([header(100_000, 100_000), idat])),
            of(lambda: png([header(12_000, 12_000, 1, 0), (b"IDAT", zlib.compress(b"\0" * (1501 * 12_000), 9)), (b"IEND", b"")])),
            *(
                of(lambda kind=kind: png([header(1, 1), (kind, b"a\0\0" + bomb), idat, (b"IEND", b"")]))
                for kind in (b"zTXt", b"iCCP")
            ),
            of(lambda: png([header(1, 1), (b"iTXt", b"a\0\1\0\0\0" + bomb), idat, (b"IEND", b"")])),
            of(lambda: png([header(1, 1), *[(b"tEXt", b"a\0b")] * 300_000, idat, (b"IEND", b"")])),
            of(lambda: b"P6 " + b"0" * 10**6 + b"1 1 255\n\0\0\0"),
            of(lambda: b"P3 " + b"#" * 10**6 + b"\n" * 10**6 + b"1 1 255 1 2 3"),
            of(lambda: b"P5 1 1 65535\n\0\1"),
            of(lambda: b"\0\0\0\x1cftypheic" + b"\0" * 40),
            of(lambda: b"\xff\xff\xff\xffftypavif" + b"\0" * 40),
            of(lambda: b"RIFF\xff\xff\xff\x7fWEBPVP8 "),
            of(lambda: b""),
        ]

    def make(self, random: Random) -> Files:
        data = random.choice(self.valid)
        if data[:4] == b"\x89PNG" and random.random() < 0.5:
            data = damaged_png(random, data)
        elif random.random() < 0.05:
            other = random.choice(self.valid)
            data = data[: random.randrange(len(data))] + other[random.randrange(len(other)) :]
        else:
            data = damaged_bytes(random, data, most=random.choice((1, 4, 20)))
        chosen: dict = {}
        if random.random() < 0.3:
            chosen["frame"] = random.choice((1, 2, 3, 10**9))
        if random.random() < 0.3:
            chosen["allow_truncated"] = True
        if random.random() < 0.2:
            chosen["ignore_exif"] = True
        if random.random() < 0.2:
            chosen["background"] = random.choice(("drop", "red", "#12345678", "hsl(0,100%,50%)"))
        if random.random() < 0.1:
            chosen["max_pixels"] = random.choice((1, 1199, 1200))
        return {"picture": data, "options.json": json.dumps(chosen).encode()}

    def check(self, files: Files, folder: Path) -> None:
        chosen = json.loads(files["options.json"])
        path = folder / "picture"
        path.write_bytes(files["picture"])
        loaded = folders.load(str(path), side=28, **chosen)
        picture = load_image(files["picture"], notes=[], **chosen)
        width, height = picture.size
        assert picture.mode == "RGB" and 0 < width * height <= chosen.get("max_pixels", MAX_PIXELS), picture
        assert loaded.size == picture.size and loaded.picture.size == (28, 28), loaded
        again = load_image(picture, notes=[], max_pixels=max(1, width * height))
        assert again.tobytes() == picture.tobytes(), "a finished picture does not pass through unchanged"


HOSTS = (
    "localhost:1", "127.0.0.1:1", "[::1]:1", "[::127.0.0.1]", "[64:ff9b:1::7f00:1]", "[fec0::1]", "[fe80::1%eth0]", "0x7f.1",
    "2130706433", "a.example", "", "[", "[::", "user:p@ss@host", "a" * 300, "xn--", "\u3002", "a..b", "-", "*", "ä.example",
    "1.1.1.1:99999", "h:x", "h:0",
)  # fmt: skip
PARTS = (
    "http://", "https://", "HTTP://", "data:", "data:image/png;base64,", "file://", "ftp://", "://", "~", "~nosuchuser", "/",
    "//", ",", ";base64,", "?", "#", "%", "%00", "%zz", "a.png", "..", "*", "[", "]", "**/", "-", "iVBORw0KGgo=", "\\",
)  # fmt: skip


class Addresses(Fuzzer):
    """What stands where the name of a picture is meant: an address, a data: URI, a path, a pattern, several with commas."""

    name, codes = "addresses", (2, 3, 5)

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.png = encode("RGB", "PNG")

    def sound(self) -> Files:
        return {"name": b"data:image/png;base64," + base64.b64encode(self.png)}

    def known(self) -> list[Callable[[], Files]]:
        names = [
            "~nosuchuser/x.png", "~nosuchuser", "~", "a" * 300 + ".png", "/".join(["a" * 200] * 30), "\0", "a\0.png",
            "\ud800.png", "", "http://[", "http://[::1", "http://a b/", "http://\n/", "http://h:port/", "http://\u2100/",
            "data:", "data:,", "data:;base64,A", "data:;base64," + "A" * 100_000, "data:image/png;base64,\u00e9",
            "http://" + "a." * 5000, "http://h/" + "a" * 100_000, ",".join(f"name{i}.png" for i in range(3000)), "[" * 5000,
            "**/" * 50 + "x", "*" * 2000, "http://127.0.0.1:1/" + "\ud800",
        ]  # fmt: skip
        return [lambda name=name: {"name": name.encode("utf-8", "surrogatepass")} for name in names]

    def make(self, random: Random) -> Files:
        kind = random.random()
        if kind < 0.3:
            body = base64.b64encode(damaged_bytes(random, self.png)).decode()
            name = random.choice(("data:image/png;base64,", "data:;BASE64,", "DATA:x;base64,", "data:base64,")) + body
            name = damaged_bytes(random, name.encode()).decode("utf-8", "replace") if random.random() < 0.5 else name
        elif kind < 0.7:
            name = random.choice(("http://", "https://")) + random.choice(HOSTS) + "/" + text(random, PARTS, 5)
        else:
            name = text(random, PARTS + HOSTS, 8)
            name = name.lstrip("/") if "**" in name else name  # a search through the whole disk may take its time
        return {"name": name.encode("utf-8", "surrogatepass")}

    def check(self, files: Files, folder: Path) -> None:  # noqa: ARG002  (no file is written)
        name = files["name"].decode("utf-8", "surrogatepass")
        errors = []
        for read in (
            partial(load_image, notes=[]), partial(folders.load, side=28), names.looks_like_picture, names.split_pictures,
            lambda name: next(folders.expand(name), None), lambda name: folders.check_arguments([name]),
            lambda name: options.read_picture(name, options.PictureFlags()) if name != "-" else None,
        ):  # fmt: skip
            try:
                read(name)
            except fetch.AccessError as error:
                errors.append(error)
            except folders.PaliGemmaError as error:
                errors.append(error)
        for error in errors:
            raise error


FUZZERS = (Pictures, Addresses)
