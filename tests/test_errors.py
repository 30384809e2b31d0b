"""Texts for messages: whatever comes from outside, a message is one short line."""

from paligemma.errors import listed, one_line


def test_names_from_outside_are_listed_on_one_line():
    assert listed(["a\nb", "\ud800", "\x1b[2J"]) == r"a\nb, \ud800, \x1b[2J"
    assert listed([*"abcdefg"]) == "a, b, c, d, e and 2 more"
    assert listed(["x" * 1000]) == "x" * 120 + "..." + "x" * 60


def test_a_text_from_outside_is_one_short_line():
    assert one_line(" two  spaces ") == "two  spaces"
    assert one_line("a\n\x1b[2J") == r"a\n\x1b[2J"
    assert len(one_line("x" * 1000)) < 200
