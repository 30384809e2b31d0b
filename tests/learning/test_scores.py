"""Each score on an example that can be computed by hand, and compared with the original code if there is one."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paligemma.learning import scores
from paligemma.objects.outputs import NormalizedBox, ParsedObject

# Exact


def test_exact_match_needs_equal_letters():
    assert scores.exact_match(["cat", " cat\n", "Cat", "dog"], [["cat"], ["cat"], ["cat"], ["cat", "dog"]]) == 0.75
    assert scores.exact_match([], []) == 0


# VQA


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ("The red car.", "red car"),
        ("Two dogs", "2 dogs"),
        ("none", "0"),
        ("dont", "don't"),
        ("couldnt've", "couldn't've"),
        ("couldn'tve", "couldn't've"),
        ("yes, it is", "yes it is"),
        ("a/b", "b"),  # a slash without spaces around it becomes a space, and "a" is then an article
        ("1,000", "1000"),
        ("3.5 m.", "3.5 m"),
        ("an apple\nand the pear", "apple and pear"),
        ("left-hand", "left hand"),
    ],
)
def test_answers_are_normalised_as_in_vqa(answer, words):
    assert scores.vqa_words(answer) == words


@pytest.mark.parametrize(("agreeing", "accuracy"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (9, 1.0)])
def test_vqa_accuracy_of_ten_people(agreeing, accuracy):
    # Leaving out each of ten in turn: with three who agree, 7 times 3/3 and 3 times 2/3, which is 0.9.
    people = ["red"] * agreeing + ["blue"] * (10 - agreeing)
    assert scores.vqa_accuracy(["The Red"], [people]) == pytest.approx(accuracy)


def test_vqa_accuracy_compares_letters_where_all_agree():
    """As vqaEval.py does: it processes answers only if they differ."""
    said = ["The Red", "red", "red\n", "Red"]
    assert [scores.vqa_accuracy([text], [["red"] * 10]) for text in said] == [0, 1, 1, 0]


def test_vqa_accuracy_with_one_reference_is_equality():
    assert scores.vqa_accuracy(["Two", "three"], [["2"], ["2"]]) == 0.5


# ANLS


def test_anls_worked_example():
    # "recieve" for "receive": two letters of seven differ; 1 - 2/7. "xyz" is further off than half, so 0.
    said, right = ["recieve", "xyz", "Total  Sum"], [["receive"], ["abcd"], ["total sum"]]
    assert scores.anls(said, right) == pytest.approx((5 / 7 + 0 + 1) / 3)
    assert scores.anls(["ab"], [["ac"]]) == 0  # off by exactly half
    assert scores.anls([""], [[""]]) == 1


@given(st.text(max_size=12), st.text(max_size=12))
def test_edit_distance_is_a_distance(a, b):
    distance = scores.edit_distance(a, b)
    assert distance == scores.edit_distance(b, a) and abs(len(a) - len(b)) <= distance <= max(len(a), len(b))
    assert (distance == 0) == (a == b)


@pytest.mark.parametrize(("a", "b", "distance"), [("kitten", "sitting", 3), ("", "abc", 3), ("flaw", "lawn", 2)])
def test_edit_distance_of_known_pairs(a, b, distance):
    assert scores.edit_distance(a, b) == distance


# Relaxed accuracy


@pytest.mark.parametrize(
    ("said", "right", "is_right"),
    [
        ("95", "100", True),
        ("94.9", "100", False),
        ("1,050", "1000", False),
        ("1,050", "1,050", True),
        ("25%", "0.25", True),
        ("-10", "10", False),
        ("0", "0", True),
        ("0.01", "0", False),
        ("Yes", "yes", True),
        ("2019", "yes", False),
        ("nan", "nan", True),
        ("inf", "3", False),
    ],
)
def test_relaxed_accuracy_forgives_numbers_five_percent(said, right, is_right):
    assert scores.relaxed_accuracy([said], [[right]]) == is_right


# CIDEr-D


SAID = [
    "a red circle and a blue star",
    "a dog runs over the green grass",
    "two people",
    "a cat a cat a cat",
    "",
    "the man's hat is well-made, isn't it?",
]
RIGHT = [
    ["a red circle and a blue star", "a blue star beside a red circle"],
    ["a brown dog runs across grass", "a dog running over green grass", "the dog runs"],
    ["two people on a bench", "a couple sits"],
    ["a cat on a sofa"],
    ["a green cross"],
    ["a man with a well-made hat", "the man's hat"],
]
# What pycocoevalcap 1.2's CiderScorer gives for the same tokens.
CIDER = [7.333333333333334, 2.2288523454810796, 1.4494422572322043, 0.9053407106928512, 0.0, 2.124724336217467]


def test_cider_equals_that_of_pycocoevalcap():
    assert scores.cider_d(SAID, RIGHT) == pytest.approx(sum(CIDER) / len(CIDER), abs=1e-12)


def test_captions_are_cut_into_words():
    assert scores.caption_words("The man's hat: well-made, isn't it? 3 cafés") == [
        "the", "man's", "hat", "well-made", "isn't", "it", "3", "cafés",
    ]  # fmt: skip


def test_cider_prefers_rare_words():
    right = [["a red kite"], ["a red car"], ["a red bus"], ["a red door"]]
    assert scores.cider_d(["a blue kite", *["x"] * 3], right) > scores.cider_d(["a red thing", *["x"] * 3], right)


# Boxes and masks


def box(label, y, x, y_end, x_end, score=None):
    return ParsedObject(label, NormalizedBox(x, y, x_end, y_end), score=score)


def test_perfect_boxes_have_a_precision_of_one_and_none_of_zero():
    right = [[box("cat", 0.1, 0.1, 0.5, 0.5)], [box("dog", 0.2, 0.2, 0.9, 0.9)], []]
    assert scores.detection_map(right, right) == pytest.approx({"map": 1.0, "map50": 1.0})
    assert scores.detection_map([[], [], []], right) == {"map": 0.0, "map50": 0.0}
    assert scores.detection_map([[], []], [[], []]) == {"map": 1.0, "map50": 1.0}


def test_precision_worked_example():
    # One picture, one true box. A right prediction of score 0.9 and a wrong one of 0.8 have precision 1, because the right one is
    # ranked first. With the scores swapped the precision is a half.
    right = [[box("cat", 0.1, 0.1, 0.5, 0.5)]]
    good, wrong = (0.1, 0.1, 0.5, 0.5), (0.6, 0.6, 0.9, 0.9)
    assert scores.detection_map([[box("cat", *good, 0.9), box("cat", *wrong, 0.8)]], right)["map50"] == pytest.approx(1.0)
    assert scores.detection_map([[box("cat", *good, 0.8), box("cat", *wrong, 0.9)]], right)["map50"] == pytest.approx(0.5)


def test_overlap_decides_which_thresholds_are_met():
    # A box of 0.4 x 0.4 moved by 0.1 overlaps with 0.12 / 0.20 = 0.6: three of the ten thresholds, 0.50, 0.55 and 0.60.
    right, said = [[box("cat", 0.1, 0.1, 0.5, 0.5)]], [[box("cat", 0.1, 0.2, 0.5, 0.6, 1.0)]]
    found = scores.detection_map(said, right)
    assert found["map50"] == pytest.approx(1.0) and found["map"] in (pytest.approx(0.2), pytest.approx(0.3))


def test_a_label_that_is_wrong_is_no_hit():
    assert scores.detection_map([[box("dog", 0.1, 0.1, 0.5, 0.5)]], [[box("cat", 0.1, 0.1, 0.5, 0.5)]])["map50"] == 0


def masked(label, rows):
    return ParsedObject(label, NormalizedBox(0, 0, 1, 1), mask=np.array(rows, dtype=bool))


def test_mean_overlap_of_masks():
    half, left = masked("a", [[1, 1], [0, 0]]), masked("a", [[1, 0], [1, 0]])
    assert scores.segmentation_miou([[half]], [[half]]) == 1
    assert scores.segmentation_miou([[half]], [[left]]) == pytest.approx(1 / 3)  # one pixel of three
    assert scores.segmentation_miou([[half], []], [[half], [left]]) == 0.5
    assert scores.segmentation_miou([[left, half]], [[half, left]]) == 1
    assert scores.segmentation_miou([[half, left, left]], [[half, left]]) == pytest.approx(2 / 3)  # one too many
    assert scores.segmentation_miou([[half, left]], [[half]]) == 1  # with one reference, only the first prediction counts
    assert scores.segmentation_miou([[left, half]], [[half]]) == pytest.approx(1 / 3)
    assert scores.segmentation_miou([[]], [[]]) == 1
    assert scores.segmentation_miou([[masked("b", half.mask)]], [[half]]) == 0
