"""Any boxes can be drawn on any picture: its size is kept, labels stay inside, colours are distinct and text is readable."""

import itertools
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from paligemma.errors import OutputError
from paligemma.objects import drawing, lettering, tables
from paligemma.objects.outputs import NormalizedBox, ParsedObject

GREY = (128, 128, 128)


def blank(width=300, height=200, color=GREY):
    return Image.new("RGB", (width, height), color)


def changed(picture, other):
    """bool[H, W], true where two pictures differ."""
    return (np.asarray(picture) != np.asarray(other)).any(-1)


fractions = st.floats(0, 1)
pairs = st.tuples(fractions, fractions)
boxes = st.builds(lambda y, x: NormalizedBox(min(x), min(y), max(x), max(y)), pairs, pairs)
labels = st.sampled_from(["", "cat", "日本 🐈", "\udcff\x1b[2J", "a very long label, longer than most"])
founds = st.builds(
    ParsedObject,
    st.one_of(st.text(max_size=12), labels),
    st.one_of(st.none(), boxes, boxes),
    score=st.one_of(st.none(), fractions),
    spread=st.one_of(st.none(), st.tuples(fractions, fractions, fractions, fractions)),
)
sides = st.one_of(st.integers(1, 12), st.integers(13, 300))


@settings(max_examples=120)
@given(sides, sides, st.lists(founds, max_size=6), st.booleans())
def test_any_objects_on_any_picture_are_drawn_without_a_change_of_size(width, height, objects, is_masked):
    if is_masked:
        mask = np.arange(width * height).reshape(height, width) % 3 == 0
        objects = [ParsedObject(found.label, found.box, score=found.score, spread=found.spread, mask=mask) for found in objects]
    picture = blank(width, height)
    before = picture.tobytes()
    out = drawing.draw(picture, objects)
    assert (out.mode, out.size) == ("RGB", (width, height)) and picture.tobytes() == before
    lines = tables.table(objects, width, height, True) + tables.listing(objects, width, height)
    assert lines.count("\n") == 2 * sum(found.box is not None for found in objects)


def test_nothing_found_changes_nothing():
    assert not changed(drawing.draw(blank(), []), blank()).any()


def test_a_frame_lies_just_inside_its_box():
    out = np.asarray(drawing.draw(blank(1000, 1000), [ParsedObject("", NormalizedBox(0.1, 0.2, 0.9, 0.6))]))
    color = drawing.PALETTE[0]
    assert tuple(out[200, 500]) == tuple(out[599, 500]) == tuple(out[400, 100]) == tuple(out[400, 899]) == color
    assert tuple(out[400, 500]) == GREY and tuple(out[190, 500]) == GREY


def test_lines_and_letters_grow_with_the_picture():
    frame, labelled = ([ParsedObject(label, NormalizedBox(0.2, 0.2, 0.8, 0.8))] for label in ("", "cat"))

    def covered(side):
        small, large = drawing.draw(blank(side, side), frame), drawing.draw(blank(side, side), labelled)
        return changed(small, blank(side, side)).mean(), changed(large, small).mean()

    assert covered(2000) == pytest.approx(covered(800), rel=0.15)


@settings(max_examples=60)
@given(st.tuples(fractions, fractions), st.integers(20, 400), st.integers(20, 400))
def test_labels_never_leave_the_picture(corner, width, height):
    letters = lettering.lettering()
    label = drawing.fit("a label 0.50", 12, width, height, letters)
    box = drawing.rectangle(NormalizedBox(corner[1], corner[0], corner[1], corner[0]), width, height)
    spot = drawing.place_label(box, drawing.measure(*label, letters)[:2], [], width, height)
    assert 0 <= spot[0] < spot[2] <= width and 0 <= spot[1] < spot[3] <= height


def test_labels_of_equal_boxes_do_not_cover_each_other():
    taken = []
    for _ in range(6):
        spot = drawing.place_label((40, 60, 200, 160), (90, 16), taken, 300, 200)
        assert not any(drawing.overlap(spot, other) for other in taken)
        taken.append(spot)


def test_a_label_shrinks_then_is_cut_then_left_out():
    letters = lettering.lettering()
    assert drawing.fit("cat", 12, 300, 200, letters) == ("cat", 12)
    text, size = drawing.fit("a cat on a mat", 12, 70, 200, letters)
    assert text == "a cat on a mat" and size < 12
    text, size = drawing.fit("a cat on a mat", 12, 40, 200, letters)
    assert text.endswith("…") and size == drawing.MIN_LETTER
    assert drawing.fit("a cat on a mat", 12, 300, 4, letters) is None and drawing.fit("a cat", 12, 3, 100, letters) is None


def test_an_unsure_edge_is_dashed_with_an_error_bar_and_sure_ones_are_not():
    box = NormalizedBox(0.3, 0.3, 0.7, 0.7)
    sure = drawing.draw(blank(), [ParsedObject("", box, spread=(0, 0, 0, 0))])
    unsure = np.asarray(drawing.draw(blank(), [ParsedObject("", box, spread=(0, 0.05, 0, 0))]))
    assert not changed(sure, drawing.draw(blank(), [ParsedObject("", box)])).any()
    colored = (unsure == drawing.PALETTE[0]).all(-1)
    assert 0.4 < colored[60, 90:210].mean() < 0.8 and colored[139, 90:210].all()  # the dashed upper edge and the solid lower edge
    bar = np.flatnonzero(colored[:60, 150])
    assert bar[0] == 50 and len(bar) >= 10  # it starts one standard deviation above the edge: 60 - 0.05 * 200
    assert colored[50, 147:154].all() and not colored[49].any()


def test_an_edge_that_may_be_anywhere_costs_no_memory():
    spread = (1e12, 1e12, 1e12, 1e12)
    out = drawing.draw(blank(), [ParsedObject("", NormalizedBox(0.3, 0.3, 0.7, 0.7), spread=spread)])
    assert changed(out, blank())[:, 150].all()  # the error bar goes from side to side


def test_plain_drawings_have_frames_and_outlines_only():
    mask = np.zeros((200, 300), bool)
    mask[70:130, 100:200] = True
    found = [ParsedObject("", NormalizedBox(0.3, 0.3, 0.7, 0.7), spread=(0.05, 0.05, 0.05, 0.05), mask=mask)]
    plain = drawing.draw(blank(), found, drawing.Style(is_plain=True))
    assert plain.getpixel((150, 100)) == GREY  # not filled
    assert not changed(plain, blank())[:60].any()  # nothing is drawn outside the frame
    assert plain.getpixel((150, 60)) == drawing.PALETTE[0]


def test_lines_are_as_wide_as_asked_for_and_labels_can_be_left_out():
    found = [ParsedObject("cat", NormalizedBox(0.25, 0.25, 0.75, 0.75))]
    out = drawing.draw(blank(400, 400), found, drawing.Style(line_width=7, has_labels=False))
    column = (np.asarray(out)[:, 200] == drawing.PALETTE[0]).all(-1)
    assert np.flatnonzero(column).tolist() == [*range(100, 107), *range(293, 300)]
    labelled = drawing.draw(blank(400, 400), found, drawing.Style(line_width=7))
    assert changed(out, labelled).any()


def test_labels_leave_most_of_a_small_picture_free_and_say_so():
    objects = [ParsedObject(f"thing {number}", NormalizedBox(0.1, 0.1 * number, 0.9, 0.9), score=0.5) for number in range(3)]
    notes = []
    style = drawing.Style(has_labels=False)
    covered = changed(drawing.draw(blank(40, 40), objects, notes=notes), drawing.draw(blank(40, 40), objects, style))
    assert covered.mean() <= drawing.LABEL_SHARE
    assert notes == ["40 x 40 pixels have no room for 2 of the labels, which are left out."]
    notes = []
    drawing.draw(blank(800, 800), objects, notes=notes)
    assert notes == []


def test_many_labels_shrink_before_any_is_left_out():
    objects = [ParsedObject(f"thing {number}", NormalizedBox(0.1, 0.01 * number, 0.9, 0.9)) for number in range(40)]
    notes = []
    drawing.draw(blank(500, 500), objects, notes=notes)
    assert notes == []


def test_a_letter_that_no_font_has_gets_a_note(monkeypatch):
    monkeypatch.setattr(lettering, "system_font", lambda _: "")
    lettering.lettering.cache_clear()
    notes = []
    drawing.draw(blank(), [ParsedObject("\U00013000", NormalizedBox(0.2, 0.2, 0.8, 0.8))], notes=notes)
    lettering.lettering.cache_clear()
    assert len(notes) == 1 and "\U00013000" in notes[0] and "--font" in notes[0]


def test_a_very_long_label_takes_no_longer_than_a_long_one():
    found = ParsedObject("a" * 1_000_000, NormalizedBox(0.2, 0.2, 0.8, 0.8), score=0.5)
    assert len(drawing.label_text(found)) <= drawing.MAX_LABEL + len(" 0.50")
    drawing.draw(blank(), [found])


def test_masks_are_coloured_and_outlined_where_they_are():
    mask = np.zeros((200, 300), bool)
    mask[50:150, 100:200] = True
    out = np.asarray(drawing.draw(blank(), [ParsedObject("", NormalizedBox(0, 0, 1, 1), mask=mask)]))
    inside, edge = out[100, 150], out[51, 150]
    assert tuple(out[20, 150]) == GREY and tuple(inside) != GREY
    assert np.abs(edge - np.array(drawing.PALETTE[0])).sum() < np.abs(inside - np.array(drawing.PALETTE[0])).sum()


def test_a_mask_of_another_picture_is_not_drawn():
    out = drawing.draw(blank(), [ParsedObject("", NormalizedBox(0, 0, 1, 1), mask=np.ones((20, 20), bool))])
    assert not changed(out, drawing.draw(blank(), [ParsedObject("", NormalizedBox(0, 0, 1, 1))])).any()


# Colours


def test_labels_have_their_own_colours_and_equal_labels_the_same():
    colors = drawing.palette(["cat", "dog", "cat", *map(str, range(12))])
    assert len(set(colors.values())) == len(colors) == 14


def test_text_on_every_colour_can_be_read():
    for color in drawing.palette(map(str, range(21))).values():
        assert drawing.contrast(drawing.text_color(color), color) >= 4.5
    assert drawing.contrast((0, 0, 0), (255, 255, 255)) == pytest.approx(21)


# Linear RGB as people without red, green or blue cones see it: Machado et al. 2009, severity 1.0.
DEFICIENCIES = {
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


@pytest.mark.parametrize("kind", sorted(DEFICIENCIES))
def test_the_seven_colours_differ_with_any_colour_vision(kind):
    linear = (np.array(drawing.PALETTE) / 255) ** 2.2 @ np.array(DEFICIENCIES[kind]).T
    seen = np.clip(linear, 0, 1) ** (1 / 2.2) * 255
    gaps = [np.linalg.norm(a - b) for a, b in itertools.combinations(seen, 2)]
    assert min(gaps) > 25  # of 441 between black and white; the least are 30 (green and blue, tritan), 50 and 51


# Files


@pytest.mark.parametrize("name", ["out.png", "out.JPG", "out.webp", "out.bmp", "out.tif"])
def test_the_ending_of_the_name_is_the_format(tmp_path, name):
    drawing.save(blank(), tmp_path / name)
    with Image.open(tmp_path / name) as written:
        assert written.size == (300, 200) and name.lower().endswith(drawing_suffixes(written.format))
    assert os.listdir(tmp_path) == [name]


def drawing_suffixes(kind):
    return {"PNG": ".png", "JPEG": ".jpg", "WEBP": ".webp", "BMP": ".bmp", "TIFF": ".tif"}[kind]


def test_a_file_that_cannot_be_written_is_7_and_leaves_what_was_there(tmp_path, monkeypatch):
    drawing.save(blank(), tmp_path / "out.png")
    before = (tmp_path / "out.png").read_bytes()

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(OutputError, match="No space left on device") as error:
        drawing.save(blank(color=(1, 2, 3)), tmp_path / "out.png")
    assert error.value.code == 7 and (tmp_path / "out.png").read_bytes() == before and os.listdir(tmp_path) == ["out.png"]
    with pytest.raises(OutputError):
        drawing.save(blank(), tmp_path / "gone" / "out.png")
