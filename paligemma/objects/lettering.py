"""Draws text of any script with Pillow. Each character is drawn in the first font that has it.

This module imports only errors.py of this project. The fonts are tried in this order:
    - the font that the user names;
    - Pillow's own font, which has little more than the letters of English;
    - DejaVu Sans, which comes with this project (the other alphabets of Europe, Arabic, Hebrew);
    - the fonts of the system: on Linux the fonts that fontconfig finds, on macOS those in SYSTEM_FONTS.
Checked in tests/objects/test_lettering.py.
"""

import math
import os
import re
import subprocess
import unicodedata
from contextlib import suppress
from functools import lru_cache
from itertools import groupby
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from paligemma.errors import UsageError

SYSTEM_FONTS = ("Arial Unicode.ttf", "PingFang.ttc", "Apple Color Emoji.ttc")  # on macOS; Pillow knows their folders
BITMAP_SIZES = (109, 136, 160, 128, 96, 64)  # pixels: the sizes in which fonts store coloured emoji
PROBE_SIZE = 32  # pixels: the size at which glyphs are compared, to find out whether a font has a character
NO_CHARACTER = "\U0010fffe"  # a code point that no font has
UNKNOWN = "?"  # drawn for a character that no font has


@lru_cache(maxsize=256)
def opened(file: str | None, size: float) -> ImageFont.FreeTypeFont:
    """Pillow's object for a font file at this size; None means Pillow's own font. Raises: OSError."""
    return ImageFont.load_default(size) if file is None else ImageFont.truetype(file, size)


class Font:
    """One font at any size.

    Args:
        file: a path, or a file name in the system's font folders; None for Pillow's own font.
    Raises: OSError if the file is not a font.
    """

    def __init__(self, file: str | None):
        if file and os.path.dirname(file) and not os.path.isfile(file):
            raise OSError(f"{file} does not exist")  # Pillow would search the system's font folders for the base name
        self.file = file
        self.bitmap_size = None  # pixels: the only size of a bitmap font, which has no outlines
        if file is not None and not self.has_size(PROBE_SIZE):
            self.bitmap_size = next((size for size in BITMAP_SIZES if self.has_size(size)), None)
            if self.bitmap_size is None:
                raise OSError(f"{file} has no size that can be drawn")
        self.missing_glyph = self.pixels(NO_CHARACTER)  # a font draws this glyph for every character that it does not have
        self.known: dict[str, bool] = {}

    def has_size(self, size: int) -> bool:
        try:
            opened(self.file, size)
        except OSError as error:
            if "pixel size" not in str(error):
                raise
            return False
        return True

    def at(self, size: float) -> ImageFont.FreeTypeFont:
        """Pillow's font object at this size or, for a bitmap font, at its only size."""
        return opened(self.file, self.bitmap_size or size)

    def pixels(self, character: str) -> tuple[tuple[int, int], bytes]:
        """The size and the grey levels of a character's glyph."""
        mask = self.at(PROBE_SIZE).getmask(character)
        return mask.size, bytes(mask)

    def has(self, text: str) -> bool:
        """Whether the font has a glyph for every character."""
        for character in set(text) - self.known.keys():
            self.known[character] = self.pixels(character) != self.missing_glyph
        return all(self.known[character] for character in text)

    def scale(self, size: float) -> float:
        """The factor that converts lengths at the only size of a bitmap font to lengths at `size`; 1 for other fonts."""
        return size / self.bitmap_size if self.bitmap_size else 1


def clusters(text: str) -> list[str]:
    """The text divided into characters, each with the marks, joiners and skin tones that belong to it."""
    found: list[str] = []
    for character in text:
        is_mark = unicodedata.category(character)[0] == "M" or character == "\u200d" or "\U0001f3fb" <= character <= "\U0001f3ff"
        if found and (is_mark or found[-1][-1] == "\u200d"):
            found[-1] += character
        else:
            found.append(character)
    return found


class Lettering:
    """Measures and draws text.

    Args:
        file: a font file that is tried first. Raises: UsageError if it cannot be read as a font.
    """

    def __init__(self, file: str | None = None):
        self.fonts = [Font(None)]
        if file is not None:
            try:
                self.fonts.insert(0, Font(file))
            except (OSError, ValueError) as error:  # ValueError: the name holds a NUL
                raise UsageError(f"--font {file} is not a font that can be read. Give a .ttf, .otf or .ttc file.") from error
        for name in (str(Path(__file__).with_name("DejaVuSans.ttf")), *SYSTEM_FONTS):
            self.add(name)
        self.choices: dict[str, Font | None] = {}

    def add(self, file: str) -> None:
        """Adds a font as the last one; does nothing if there is no such font."""
        with suppress(OSError):
            self.fonts.append(Font(file))

    def choose(self, cluster: str) -> Font | None:
        """The font for a character and its marks; None if no font has the character."""
        if cluster not in self.choices:
            wanted = cluster.replace("\u200d", "").replace("\ufe0f", "").replace("\ufe0e", "")
            found = next((font for font in self.fonts if font.has(wanted)), None)
            if found is None and wanted:
                self.add(system_font(wanted[0]))
                found = next((font for font in self.fonts if font.has(wanted)), None)
                found = found or next((font for font in self.fonts if font.has(wanted[0])), None)
            self.choices[cluster] = found
        return self.choices[cluster]

    def missing(self, text: str) -> str:
        """The characters of the text that no font has, each once."""
        pieces = clusters(unicodedata.normalize("NFC", text))
        return "".join(dict.fromkeys(cluster[0] for cluster in pieces if self.choose(cluster) is None))

    def runs(self, text: str) -> list[tuple[Font, str]]:
        """The text divided into pieces, each with its font. A word is not divided if one font has all of its characters."""
        pieces = []
        for word in re.split("( )", unicodedata.normalize("NFC", text)):
            whole = next((font for font in self.fonts if font.has(word)), None)
            found = [(whole, word)] if whole else [(self.choose(cluster), cluster) for cluster in clusters(word)]
            pieces += [(font or self.fonts[0], piece if font else UNKNOWN) for font, piece in found]
        return [(font, "".join(piece for _, piece in group)) for font, group in groupby(pieces, key=lambda piece: piece[0])]

    def width(self, text: str, size: float) -> float:
        """The width in pixels of text at this letter size."""
        return sum(font.at(size).getlength(piece) * font.scale(size) for font, piece in self.runs(text))

    def height(self, text: str, size: float) -> tuple[float, float]:
        """The height in pixels of text above and below its baseline."""
        metrics = [[font.scale(size) * value for value in font.at(size).getmetrics()] for font, _ in self.runs(text or " ")]
        return max(above for above, _ in metrics), max(below for _, below in metrics)

    def write(
        self, picture: Image.Image, place: tuple[float, float], text: str, size: float, fill: object, anchor: str = "la"
    ) -> None:  # fmt: skip
        """Draws text into an RGB picture.

        Args:
            place: x and y in pixels.
            fill: a colour in any form that Pillow accepts.
            anchor: the point of the text that is at `place`: "l" for the left or "r" for the right end, followed by "a" for the
                upper edge or "m" for the middle.
        """
        x, y = place
        above, below = self.height(text, size)
        if anchor[0] == "r":
            x -= self.width(text, size)
        line = y + above if anchor[1] == "a" else y + (above - below) / 2
        for font, piece in self.runs(text):
            if font.bitmap_size:
                paste_bitmaps(picture, font, piece, size, (x, line))
            else:
                ImageDraw.Draw(picture).text((x, line), piece, fill, font.at(size), anchor="ls")
            x += font.at(size).getlength(piece) * font.scale(size)


def paste_bitmaps(picture: Image.Image, font: Font, text: str, size: float, place: tuple[float, float]) -> None:
    """Draws emoji in their own colours; `place` is the left end of the baseline."""
    letters, scale = font.at(size), font.scale(size)
    above, below = letters.getmetrics()
    drawn = Image.new("RGBA", (max(1, math.ceil(letters.getlength(text))), above + below))
    ImageDraw.Draw(drawn).text((0, above), text, font=letters, anchor="ls", embedded_color=True)
    small = drawn.resize((max(1, round(drawn.width * scale)), max(1, round(drawn.height * scale))), Image.Resampling.BOX)
    picture.paste(small.convert("RGB"), (round(place[0]), round(place[1] - above * scale)), small.getchannel("A"))


@lru_cache(maxsize=1024)
def system_font(character: str) -> str:
    """The file of a system font that has the character, according to fontconfig; "" if fontconfig is not installed."""
    command = ["fc-match", "--format=%{file}", f":charset={ord(character):x}"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


@lru_cache(maxsize=8)
def lettering(file: str | None = None) -> Lettering:
    """The Lettering whose first font is this file (None: only the default fonts). It is made once for each file."""
    return Lettering(file)
