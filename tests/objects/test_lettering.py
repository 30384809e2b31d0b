"""Text in any script: each character gets a font that has it, marks stay with their letters, and broken fonts are refused."""

import numpy as np
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from PIL import Image

from paligemma.errors import UsageError
from paligemma.objects import lettering


@pytest.fixture(autouse=True)
def no_system_fonts(monkeypatch):
    monkeypatch.setattr(lettering, "system_font", lambda _: "")


def make_font(path, characters: str) -> str:
    """A font in which the glyph of each character is a filled square."""
    names = {ord(character): f"square{ord(character)}" for character in characters}
    pen = TTGlyphPen(None)
    pen.moveTo((0, 0))
    for corner in ((0, 1000), (1000, 1000), (1000, 0)):
        pen.lineTo(corner)
    pen.closePath()
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder([".notdef", *names.values()])
    builder.setupCharacterMap(names)
    builder.setupGlyf({".notdef": TTGlyphPen(None).glyph(), **dict.fromkeys(names.values(), pen.glyph())})
    builder.setupHorizontalMetrics({name: (1000, 0) for name in (".notdef", *names.values())})
    builder.setupHorizontalHeader(ascent=1000, descent=0)
    builder.setupNameTable({"familyName": "Squares", "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(path)
    return str(path)


def written(letters: lettering.Lettering, text: str, anchor: str = "la") -> np.ndarray:
    """bool[60, 400], true where black text of letter size 20, drawn at (200, 20), is."""
    picture = Image.new("RGB", (400, 60), "white")
    letters.write(picture, (200, 20), text, 20, "black", anchor)
    return np.asarray(picture.convert("L")) < 128


def test_english_is_in_the_font_of_pillow_and_the_rest_of_europe_in_one_that_comes_with_this_project():
    letters = lettering.Lettering()
    for text, file in (("cat 0.98", None), ("été", "DejaVuSans.ttf"), ("щука", "DejaVuSans.ttf"), ("λόγος", "DejaVuSans.ttf")):
        [(font, piece)] = letters.runs(text)
        assert piece == text and (font.file is None if file is None else font.file.endswith(file))
    assert letters.missing("cat été щука λόγος قطة חתול") == ""


def test_a_font_of_the_users_comes_first_and_the_others_fill_in(tmp_path):
    letters = lettering.Lettering(make_font(tmp_path / "squares.ttf", "猫犬"))
    assert [piece for _, piece in letters.runs("猫犬 cat")] == ["猫犬", " cat"]
    assert letters.missing("猫犬 cat") == "" and letters.missing("猫鳥犬鳥") == "鳥"
    assert letters.width("猫犬", 20) == 40
    shape = written(letters, "猫")
    assert shape[20:40, 200:220].all() and not shape[:, 221:].any() and not shape[:19].any()


def test_a_character_that_no_font_has_is_a_question_mark():
    letters = lettering.Lettering()
    assert (written(letters, "猫") == written(letters, "?")).all() and letters.missing("a猫") == "猫"


def test_fonts_of_the_system_are_asked_for_what_the_others_lack(tmp_path, monkeypatch):
    asked = []

    def system_font(character):
        asked.append(character)
        return make_font(tmp_path / "squares.ttf", "猫犬")

    monkeypatch.setattr(lettering, "system_font", system_font)
    letters = lettering.Lettering()
    assert letters.missing("猫犬 cat") == "" and asked == ["猫"]  # the font that was found has the second one, too


def test_each_font_is_taken_once():
    files = [font.file for font in lettering.Lettering().fonts]
    assert len([file for file in files if file and file.endswith("DejaVuSans.ttf")]) == 1


def test_marks_stay_with_their_letters():
    assert lettering.clusters("ne\u0301") == ["n", "e\u0301"]
    assert lettering.clusters("👩\u200d💻👍🏽☂\ufe0f") == ["👩\u200d💻", "👍🏽", "☂\ufe0f"]


def test_text_can_end_at_a_place_or_lie_around_it():
    letters = lettering.Lettering()
    left, right, middle = (written(letters, "cat été", anchor) for anchor in ("la", "ra", "lm"))
    assert not left[:, :199].any() and left[20:].any() and not left[:19].any()
    assert not right[:, 201:].any() and right.any()
    rows = np.flatnonzero(middle.any(1))
    assert rows[0] < 20 < rows[-1]


def test_a_file_that_is_no_font_is_a_wrong_flag(tmp_path):
    (tmp_path / "no.ttf").write_bytes(b"no font")
    for name in (tmp_path / "no.ttf", tmp_path / "absent.ttf", tmp_path / "DejaVuSans.ttf", tmp_path, "a\0b", "n" * 300):
        with pytest.raises(UsageError, match="--font"):
            lettering.Lettering(str(name))


def test_without_fontconfig_there_is_no_font_of_the_system(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setenv("PATH", "")
    assert lettering.system_font.__wrapped__("猫") == ""
