"""Objects as lines of text: aligned for people, separated by tabs for programs."""

from paligemma.objects import tables
from paligemma.objects.outputs import NormalizedBox, ParsedObject


def test_bars_are_as_long_as_the_score():
    bars = [tables.score_bar(score) for score in (0, 0.5, 1, 7, 0.0625)]
    assert bars == [" " * 10, "█████     ", "█" * 10, "█" * 10, "▋         "]


def test_a_table_is_aligned_whatever_letters_labels_have():
    objects = [ParsedObject(label, NormalizedBox(0, 0, 0.5, 0.5), score=0.5) for label in ("cat", "日本", "e\u0301", "")]
    lines = tables.table(objects, 100, 100, False).splitlines()
    places = [tables.terminal_width(line[: line.index("0.50")]) for line in lines]
    assert len(set(places)) == 1 and "(no label)" in lines[3]


def test_a_listing_has_six_columns_and_no_object_without_a_box():
    objects = [
        ParsedObject("a\tcat\n", NormalizedBox(0.2, 0.1, 1, 0.5), score=0.25),
        ParsedObject("dog", None),
        ParsedObject("x", NormalizedBox(0, 0, 1, 1)),
    ]
    assert tables.listing(objects, 200, 100) == "a cat\t0.2500\t40.0\t10.0\t200.0\t50.0\nx\t\t0.0\t0.0\t200.0\t100.0\n"
