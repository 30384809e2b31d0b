"""A zoomed picture and its boxes: they must still frame what they framed."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from paligemma.learning import augmentation
from paligemma.objects.outputs import NormalizedBox, ParsedObject, parse_text, to_suffix

CODES = tuple(range(16))


def picture_of(boxes, size=(200, 160)):
    """White, each box filled with a colour of its own."""
    pixels = np.full((size[1], size[0], 3), 255, dtype=np.uint8)
    for number, box in enumerate(boxes):
        left, top, right, bottom = (round(value) for value in box.xyxy(*size))
        pixels[top:bottom, left:right] = (10 + number, 0, 0)
    return Image.fromarray(pixels)


def framed(picture, number):
    """The rectangle that a colour fills, in fractions, as NormalizedBox."""
    rows, columns = np.nonzero(np.asarray(picture)[..., 0] == 10 + number)
    height, width = picture.height, picture.width
    return NormalizedBox(columns.min() / width, rows.min() / height, (columns.max() + 1) / width, (rows.max() + 1) / height)


BOXES = [NormalizedBox(0.2, 0.1, 0.5, 0.4), NormalizedBox(0.6, 0.55, 0.9, 0.8)]
SUFFIX = to_suffix([ParsedObject("cat", BOXES[0], codes=CODES), ParsedObject("dog", BOXES[1])])


@pytest.mark.parametrize("seed", range(20))
def test_boxes_still_frame_their_objects(seed):
    picture, suffix = augmentation.zoom(picture_of(BOXES), SUFFIX, seed=(0, 0, seed))
    objects = parse_text(suffix).objects
    assert [found.label for found in objects] == ["cat", "dog"]
    for number, found in enumerate(objects):
        true = framed(picture, number)
        # Windows begin on whole pixels and boxes are rounded to 1/1023: below one pixel of some 100.
        gaps = [abs(a - b) for a, b in zip(found.box.xyxy(1, 1), true.xyxy(1, 1), strict=True)]
        assert max(gaps) < 0.012


def test_codes_of_masks_stay_and_the_window_differs():
    shown = {augmentation.zoom(picture_of(BOXES), SUFFIX, seed=(0, 0, seed))[1] for seed in range(20)}
    assert len(shown) > 15
    assert all(parse_text(suffix).objects[0].codes == CODES for suffix in shown)


def test_the_same_seed_gives_the_same():
    one, other = (augmentation.zoom(picture_of(BOXES), SUFFIX, seed=(3, 1, 7)) for _ in range(2))
    assert one[0].tobytes() == other[0].tobytes() and one[1] == other[1]
    assert augmentation.zoom(picture_of(BOXES), SUFFIX, seed=(3, 2, 7))[1] != one[1]


def test_a_picture_without_boxes_is_never_cut():
    for seed in range(20):
        picture, suffix = augmentation.zoom(picture_of([NormalizedBox(0, 0, 1, 1)]), "a red square", seed=(0, 0, seed))
        assert suffix == "a red square"
        assert (np.asarray(picture)[..., 0] == 10).sum() == 200 * 160


@pytest.mark.parametrize("suffix", ["<loc0001> cat", "<loc0900><loc0001><loc0100><loc0200> cat", "<loc0001><loc0002><loc0003>"])
def test_what_cannot_be_read_whole_stays(suffix):
    picture = picture_of(BOXES)
    assert augmentation.zoom(picture, suffix, seed=(0,)) == (picture, suffix)


def test_boxes_without_a_name_move_like_others():
    picture, suffix = augmentation.zoom(picture_of(BOXES), to_suffix([ParsedObject("", BOXES[0])]), seed=(0,))
    assert picture.size != (200, 160) and parse_text(suffix).objects[0].box != BOXES[0]


sides = st.tuples(st.floats(0, 1), st.floats(0, 1)).map(sorted)


@given(sides, sides, st.integers(0, 10**6), st.integers(1, 300), st.integers(1, 300))
def test_any_box_stays_a_box(rows, columns, seed, width, height):
    box = NormalizedBox(columns[0], rows[0], columns[1], rows[1])
    suffix = to_suffix([ParsedObject("x", box)])
    picture, moved = augmentation.zoom(Image.new("RGB", (width, height)), suffix, seed=(seed,))
    reading = parse_text(moved)
    assert picture.width >= 1 and len(reading.objects) == 1 and "swapped" not in reading.problems
