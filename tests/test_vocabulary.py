"""The added tokens, against names written out by hand."""

from paligemma.vocabulary import CODE_TOKENS, LOCATION_OR_CODE, LOCATION_TOKENS, NUM_CODES, NUM_LOCATIONS


def test_names_are_those_of_the_official_vocabulary():
    assert (len(LOCATION_TOKENS), len(CODE_TOKENS)) == (NUM_LOCATIONS, NUM_CODES) == (1024, 128)
    assert [LOCATION_TOKENS[0], LOCATION_TOKENS[1023]] == ["<loc0000>", "<loc1023>"]
    assert [CODE_TOKENS[0], CODE_TOKENS[127]] == ["<seg000>", "<seg127>"]


def test_the_pattern_matches_every_name_and_gives_its_number():
    assert [int(LOCATION_OR_CODE.fullmatch(token)[1]) for token in LOCATION_TOKENS] == list(range(1024))
    assert [int(LOCATION_OR_CODE.fullmatch(token)[2]) for token in CODE_TOKENS] == list(range(128))


def test_the_pattern_matches_nothing_else():
    others = "<loc1024> <loc9999> <loc1> <loc00001> <seg128> <seg1> <seg0001> <loc-001> <loc٠٠٠١> <LOC0001> <image>"
    assert LOCATION_OR_CODE.search(others) is None
