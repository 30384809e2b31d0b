"""Which words of a command line are pictures, and where a comma divides two of them."""

import pytest

from paligemma.errors import UsageError
from paligemma.pictures import names


def test_pictures_are_split_at_commas_but_not_within_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a,b.png", "c.png", "d,e,f.png"):
        (tmp_path / name).touch()
    split = names.split_pictures
    assert split("c.png") == ["c.png"]
    assert split("c.png,a,b.png") == ["c.png", "a,b.png"]
    assert split("d,e,f.png,c.png,missing.png") == ["d,e,f.png", "c.png", "missing.png"]
    assert split("https://x.org/a?b=1,2,c.png,-") == ["https://x.org/a?b=1,2", "c.png", "-"]
    assert split("https://x.org/a,https://x.org/b") == ["https://x.org/a", "https://x.org/b"]
    assert split("data:image/png;base64,AAAA,c.png") == ["data:image/png;base64,AAAA", "c.png"]


@pytest.mark.parametrize("text", ["a.png,,b.png", "a.png,", ",", "-,-"])
def test_a_comma_without_a_name_or_two_stdins_are_refused(text):
    with pytest.raises(UsageError):
        names.split_pictures(text)


def test_names_with_commas_are_found_in_folders_with_commas_and_thousands_of_names_take_few_looks(tmp_path, monkeypatch):
    (tmp_path / "a,b" / "c,d").mkdir(parents=True)
    (tmp_path / "a,b" / "c,d" / "e,f.png").touch()
    monkeypatch.chdir(tmp_path)
    assert names.split_pictures("x.png,a,b/c,d/e,f.png,a,b/c,d") == ["x.png", "a,b/c,d/e,f.png", "a,b/c,d"]
    looks = []
    monkeypatch.setattr(names.os.path, "exists", lambda name: looks.append(name) or False)
    many = [f"n{i}.png" for i in range(1500)] + [f"sub/n{i}.png" for i in range(1500)]
    assert names.split_pictures(",".join(many)) == many
    assert len(looks) < 50 * len(many)  # checking every end of 3,000 names would take 4.5 million
    looks.clear()
    short = ["a"] * 20_000
    assert names.split_pictures(",".join(short)) == short and len(looks) < 4 * len(short)
