"""Untrusted expressions: they match the same names as with `re`, and none takes long."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paligemma.layers import patterns

NAMES = [
    "model.language_model.layers.11.self_attn.q_proj",
    "vision_tower.vision_model.encoder.layers.3.mlp.fc1",
    "multi_modal_projector.linear",
    "",
    "q_proj",
]
USUAL = [
    r".*language_model.*\.(q|k|v|o)_proj",
    r"(?:.*\.)?layers\.(1|2|3)?\d\.self_attn\.[qk]_proj",
    r"[^.]+\.linear",
    r".*?(up|gate|down)_proj|q_proj",
    r"\w{1,6}",
    r"q_proj",
    r"(.*\.)?((multi_modal_projector|vision_tower)\..*)",
    r"",
    r"[]a-z._0-9]*",
]


@pytest.mark.parametrize("text", USUAL)
def test_the_usual_expressions_fit_the_names_that_re_says(text):
    assert [patterns.Pattern(text).fullmatch(name) for name in NAMES] == [bool(re.fullmatch(text, name)) for name in NAMES]


LETTERS = st.sampled_from(["a", "b", ".", r"\.", "[ab]", "[^a]", r"\w"])
EXPRESSIONS = st.recursive(
    LETTERS,
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=3).map("".join),
        st.lists(inner, min_size=1, max_size=3).map(lambda ways: f"({'|'.join(ways)})"),
        st.tuples(inner, st.sampled_from(["*", "+", "?", "{2}", "{1,2}", "{1,}", "*?"])).map(lambda x: f"(?:{x[0]}){x[1]}"),
    ),
    max_leaves=6,
)


@settings(max_examples=200)
@given(EXPRESSIONS, st.text("ab.", max_size=6))
def test_any_expression_fits_the_names_that_re_says(text, name):
    assert patterns.Pattern(text).fullmatch(name) == bool(re.fullmatch(text, name))


@pytest.mark.parametrize("text", ["(([a-z_.0-9]+)+)+!", "(a|a)*" * 50, "(.*)*" * 20 + "!", "((a?){20}){15}", "(a|a)(a|a)" * 30])
def test_expressions_that_keep_re_busy_for_years_cost_little(text):
    pattern = patterns.Pattern(text)
    assert not pattern.fullmatch("a" * 60 + "!?")
    assert pattern.visits < patterns.MAX_VISITS / 2


def test_work_has_a_limit(monkeypatch):
    monkeypatch.setattr(patterns, "MAX_VISITS", 20)
    with pytest.raises(ValueError, match="too long to match"):
        patterns.Pattern("(a|b|c)*").fullmatch("abcabc")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("(", "not closed"),
        (")", "not opened"),
        ("a)", "not opened"),
        ("*", "no meaning"),
        ("a**", "may not follow"),
        ("a++", "may not follow"),
        ("a{3,2}", "a maximum below its minimum"),
        ("(?=a)", "only bracket with \\?"),
        (r"(a)\1", "not supported"),
        (r"\b", "not supported"),
        ("[", "no meaning"),
        ("[z-a]", "bad character range"),
        ("a{", "no meaning"),
        ("\\", "no meaning"),
        ("[[a]", "not supported"),
        ("a{1000}{2}", "may not follow"),
        ("(a{1000}){1000}", "too large"),
        ("(" * 500, "nested too deep"),
        ("a" * 1001, "1001 letters"),
    ],
)
def test_what_is_wrong_or_not_implemented_is_refused(text, says):
    with pytest.raises(ValueError, match=says):
        patterns.Pattern(text)


@settings(max_examples=300)
@given(st.text("ab.()[]{}*+?|^$\\,1-", max_size=12))
def test_random_text_is_a_pattern_or_a_value_error(text):
    try:
        pattern = patterns.Pattern(text)
    except ValueError:
        return
    assert pattern.fullmatch("ab") == bool(re.fullmatch(text, "ab"))
