"""masks.py: pasting and cropping equal to Google's code, COCO run lengths equal to pycocotools, polygons and back."""

import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco

from paligemma.errors import DatasetError
from paligemma.objects import masks

ROOT = Path(__file__).resolve().parents[2]


def box(y_min: float, x_min: float, y_max: float, x_max: float) -> SimpleNamespace:
    return SimpleNamespace(y_min=y_min, x_min=x_min, y_max=y_max, x_max=x_max)


def blobs(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """A mask of a few smooth regions, some with holes."""
    noise = rng.normal(size=(max(2, height // 12), max(2, width // 12))).astype(np.float32)
    return np.array(Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)) > rng.normal() * 0.5


def iou(a: np.ndarray, b: np.ndarray) -> float:
    return float((a & b).sum() / (a | b).sum())


def rasterised_by_coco(polygons: list[list[float]], height: int, width: int) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # numpy warns of an argument that pycocotools lacks
        return coco.decode(coco.merge(coco.frPyObjects(polygons, height, width))).astype(bool)


def picture(text: str) -> np.ndarray:
    """A mask from text: `.` is outside, `#` inside, spaces separate the rows."""
    return np.array([[character == "#" for character in line] for line in text.split()])


def test_masks_need_no_torch():
    code = "import sys; from paligemma.objects import masks; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


# Paste and crop


def test_corners_of_a_decoded_box_are_truncated_and_corners_of_a_target_rounded():
    where = box(0.19, 0.28, 0.59, 0.68)  # pixels 1.9 to 5.9 and 2.8 to 6.8 of 10
    pasted = masks.paste(np.ones((64, 64), dtype=np.float32), where, 10, 10)
    rows, columns = np.nonzero(pasted)
    assert (rows.min(), rows.max() + 1, columns.min(), columns.max() + 1) == (1, 5, 2, 6)
    only = np.zeros((10, 10), dtype=bool)
    only[2:6, 3:7] = True
    np.testing.assert_array_equal(masks.crop(only, where), np.ones((64, 64), dtype=np.float32))


def test_a_mask_is_compared_with_zero_after_it_was_resized():
    steep = np.where(np.arange(64) < 32, -0.1, 5.0).astype(np.float32) * np.ones((64, 1), dtype=np.float32)
    pasted = masks.paste(steep, box(0, 0, 1, 1), 8, 640)
    # Between the centres of columns 31 and 32 (pixels 315 and 325) the value crosses 0 after 1/50 of the distance. A threshold
    # applied before resizing would cross in the middle, at 320.
    assert np.flatnonzero(pasted[0])[0] == 315


def test_paste_is_the_evaluators_arithmetic_on_random_masks():
    """A second implementation from the description: PIL on the float mask, locations instead of fractions."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        height, width = rng.integers(20, 300, 2)
        locations = np.sort(rng.integers(0, 1024, (2, 2)), axis=0)  # y, x of the upper corner, then of the lower
        mask = rng.normal(size=(64, 64)).astype(np.float32)
        (top, left), (bottom, right) = (locations / 1023 * (height, width)).astype(int)
        expected = np.zeros((height, width), dtype=bool)
        if bottom > top and right > left:
            small = Image.fromarray(mask).resize((int(right - left), int(bottom - top)), Image.Resampling.BILINEAR)
            expected[top:bottom, left:right] = np.asarray(small) > 0
        (y0, x0), (y1, x1) = locations / 1023
        np.testing.assert_array_equal(masks.paste(mask, box(y0, x0, y1, x1), int(height), int(width)), expected)


@pytest.mark.parametrize("empty", [box(0.5, 0.2, 0.5, 0.8), box(0.8, 0.2, 0.1, 0.9), box(0.501, 0.2, 0.509, 0.8)])
def test_a_box_without_pixels_gives_an_empty_mask_and_cannot_be_encoded(empty):
    assert not masks.paste(np.ones((64, 64), dtype=np.float32), empty, 20, 20).any()
    with pytest.raises(DatasetError, match="holds no pixel of a mask of 20 x 20"):
        masks.crop(np.ones((20, 20), dtype=bool), empty)


def test_a_crop_that_shrinks_takes_means():
    stripes = np.arange(640) % 10 < 3
    np.testing.assert_allclose(masks.crop(np.tile(stripes, (64, 1)), box(0, 0, 1, 1))[:, 1:-1], 0.3, atol=0.1)


# Run lengths


def test_run_lengths_equal_pycocotools_and_decode_to_the_mask():
    rng = np.random.default_rng(1)
    for _ in range(150):
        height, width = rng.integers(1, 90, 2)
        mask = rng.random((height, width)) < rng.random()
        theirs = coco.encode(np.asfortranarray(mask, dtype=np.uint8))
        ours = masks.to_rle(mask)
        assert ours == {"size": [height, width], "counts": theirs["counts"].decode()}
        np.testing.assert_array_equal(masks.from_rle(ours), mask)


def test_run_lengths_of_a_large_mask_equal_pycocotools():
    mask = blobs(np.random.default_rng(2), 1500, 2000)  # runs of more than ten bits
    theirs = coco.encode(np.asfortranarray(mask, dtype=np.uint8))["counts"].decode()
    assert masks.to_rle(mask)["counts"] == theirs
    np.testing.assert_array_equal(masks.from_rle({"size": [1500, 2000], "counts": theirs.encode()}), mask)


def test_run_lengths_go_column_by_column_and_start_outside():
    mask = picture("#. ## .#")
    assert masks.run_lengths(mask) == [0, 2, 2, 2]
    np.testing.assert_array_equal(masks.from_rle({"size": [3, 2], "counts": [0, 2, 2, 2]}), mask)


@pytest.mark.parametrize(
    ("counts", "message"),
    [([1, 2], "sum to 3, but 2 x 3 has 6"), ([8, -2], "not from"), ("6o", "in the middle of a number"), ("6é", "'é' is not")],
)
def test_run_lengths_that_do_not_fit_the_mask_are_refused_in_one_line(counts, message):
    with pytest.raises(DatasetError, match=message) as raised:
        masks.from_rle({"size": [2, 3], "counts": counts})
    assert "\n" not in str(raised.value)


NO_RUN_LENGTHS = [
    {}, [], {"size": 30, "counts": "6"}, {"size": [6], "counts": "6"}, {"size": [2, 3]}, {"size": ["2", 3], "counts": "6"},
    {"size": [1.5, 4], "counts": "6"}, {"size": [2, 3], "counts": None}, {"size": [2, 3], "counts": 6},
    {"size": [2, 3], "counts": [[6]]}, {"size": [2, 3], "counts": [6.0]}, {"size": [2, 3], "counts": [10**400]},
    {"size": [10**5, 10**5], "counts": [10**10]}, {"size": [2, 3], "counts": "o" * 10**6},
]  # fmt: skip


@pytest.mark.parametrize("rle", NO_RUN_LENGTHS)
def test_run_lengths_of_another_form_are_refused_before_memory_is_allocated(rle):
    with pytest.raises(DatasetError, match="Run lengths cannot be read") as raised:
        masks.from_rle(rle)
    assert len(str(raised.value)) < 300


# Polygons


def test_polygons_without_simplification_equal_the_mask():
    rng = np.random.default_rng(3)
    for _ in range(60):
        height, width = rng.integers(1, 40, 2)
        mask = rng.random((height, width)) < rng.random()  # regions that touch at corners, holes in holes
        np.testing.assert_array_equal(masks.fill(masks.to_polygons(mask, simplification=0), int(height), int(width)), mask)


def test_polygons_give_nearly_the_same_mask_here_and_in_pycocotools():
    rng, ours, theirs, points = np.random.default_rng(4), [], [], []
    for _ in range(40):
        height, width = (int(side) for side in rng.integers(60, 300, 2))
        mask = blobs(rng, height, width)
        if mask.sum() < 200:
            continue
        polygons = masks.to_polygons(mask)
        ours.append(iou(masks.fill(polygons, height, width), mask))
        theirs.append(iou(rasterised_by_coco(polygons, height, width), mask))
        points.append(sum(map(len, polygons)) / sum(map(len, masks.to_polygons(mask, simplification=0))))
    assert len(ours) > 30
    assert min(ours) >= 0.99 and min(theirs) >= 0.99  # the smallest measured: 0.993 and 0.994
    assert np.mean(points) < 0.75  # the polygons are shorter: 0.68


def test_a_polygon_changes_the_area_by_no_more_than_was_allowed():
    rows, columns = np.indices((120, 160))
    disc = (rows - 60) ** 2 + (columns - 80) ** 2 < 50**2
    (whole,) = masks.to_polygons(disc, simplification=0)
    for share in (0.001, 0.005, 0.05):
        (polygon,) = masks.to_polygons(disc, simplification=share)
        area = masks.area(np.array(polygon).reshape(-1, 2))
        assert abs(area - masks.area(np.array(whole).reshape(-1, 2))) <= share * disc.sum()
    assert len(polygon) < len(whole) / 8


def test_a_hole_is_joined_to_the_outline_around_it():
    mask = picture("####### #.....# #.###.# #.#.#.# #.###.# #.....# #######")  # a ring in a ring
    polygons = masks.to_polygons(mask, simplification=0)
    assert len(polygons) == 2
    np.testing.assert_array_equal(masks.fill(polygons, 7, 7), mask)
    outer, inner = (masks.area(np.array(polygon).reshape(-1, 2)) for polygon in polygons)
    # The number of pixels, minus 1/8 for each corner of an outline, plus 1/8 for each corner of a hole.
    assert (outer, inner) == (24 - 4 / 8 + 4 / 8, 8 - 4 / 8 + 4 / 8)


def test_pixels_that_touch_at_a_corner_are_two_polygons_and_an_empty_mask_has_none():
    assert len(masks.to_polygons(picture("#. .#"))) == 2
    assert masks.to_polygons(picture("... ...")) == []


def test_a_polygon_covers_the_pixels_whose_centres_are_inside():
    square = [0.4, 0.6, 2.6, 0.6, 2.6, 2.4, 0.4, 2.4]
    assert masks.fill([square], 4, 4).astype(int).tolist() == [[0, 0, 0, 0], [1, 1, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    outside = [-3, -3, 9, -3, 9, 9, -3, 9]
    assert masks.fill([outside], 2, 3).all()
