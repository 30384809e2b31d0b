"""A row of `paligemma doctor`: its lines, its exit code, exceptions that become rows, and texts without personal data."""

import pytest

from paligemma.checkup import rows
from paligemma.checkup.rows import FAILED, NOTE, OK, Row, failed, note, publishable, run_check, table_lines, without_personal_data
from paligemma.errors import CheckpointError


@pytest.fixture
def user(monkeypatch, tmp_path):
    """A user with a name and a home folder, on a machine with a name."""
    home = tmp_path / "zaphod"
    monkeypatch.setenv("HOME", str(home))
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.setenv(name, "zaphod")
    monkeypatch.setattr(rows.socket, "gethostname", lambda: "heart-of-gold")
    return home


def test_a_table_has_aligned_lines_of_at_most_100_characters():
    row = failed("order of copies", "19 of 20 copies " * 9, "Take --device cpu. " * 9)
    lines = table_lines(row)
    assert lines[0].startswith("FAILED  order of copies           19 of 20") and max(map(len, lines)) <= 100
    advice = next(i for i, line in enumerate(lines) if "->" in line)
    assert lines[advice].startswith(" " * 34 + "-> Take") and all(line.startswith(" " * 34) for line in lines[1:])
    assert table_lines(Row("python", "3.10")) == ["ok      python                    3.10"]
    long = table_lines(Row("a name of more than 26 letters", "value"))
    assert long == ["ok      a name of more than 26 letters", " " * 34 + "value"]
    assert table_lines(Row("nothing", "")) == ["ok      nothing"]


@pytest.mark.parametrize(("columns", "width"), [("60", 60), ("200", 100), ("20", 60)])
def test_a_table_is_as_narrow_as_the_terminal(monkeypatch, columns, width):
    monkeypatch.setenv("COLUMNS", columns)
    lines = table_lines(failed("order of copies", "19 of 20 copies " * 9, "Take --device cpu. " * 9))
    assert width - 10 <= max(map(len, lines)) <= width


def test_a_long_name_is_not_divided():
    name = "language_model.model.layers.0." * 4 + "weight"
    assert any(line.strip() == name for line in table_lines(Row("names", f"1 missing: {name}")))


def test_the_exit_code_is_that_of_the_first_failed_row():
    fine, noted = Row("a", "b"), note("a", "b")
    assert rows.exit_code([fine, noted]) == 0 and rows.worst_state([fine, noted]) == NOTE
    assert rows.exit_code([fine, failed("a", "b", "c", 4), failed("a", "b", "c", 6)]) == 4
    assert rows.worst_state([failed("a", "b", "c"), noted]) == FAILED and rows.worst_state([]) == OK


def test_an_exception_is_a_row_and_its_last_sentence_says_what_to_do():
    def broken_rows():
        raise CheckpointError("model.safetensors is damaged: it has 3 bytes. Really. Download it again.")

    (row,) = run_check(broken_rows, code=6)
    assert row == Row("broken", "model.safetensors is damaged: it has 3 bytes. Really.", FAILED, "Download it again.", 4)

    def more_broken():
        raise ZeroDivisionError("division\nby zero")

    calls = []
    (row,) = run_check(more_broken, on_error=lambda: calls.append(1))
    assert (row.value, row.state, row.code, calls) == ("ZeroDivisionError: division", FAILED, 6, [1])
    assert "--debug" in row.advice

    def silent():
        raise CheckpointError("Damaged.")

    assert run_check(silent)[0].advice and run_check(silent)[0].value == "Damaged."


@pytest.mark.usefixtures("user")
@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("{home}/.cache/paligemma, 3 GiB free", "~/.cache/paligemma, 3 GiB free"),
        ("{home}2/x", "{home}2/x"),
        ("/data/zaphod/models and /tmp/torchinductor_zaphod/x", "/data/<user>/models and /tmp/torchinductor_<user>/x"),
        ("zaphod@heart-of-gold: heart-of-gold.local", "<e-mail>: <machine>.local"),
        ("token hf_abcdefghijKLMNOP was refused", "token <token> was refused"),
        ("http://me:secret@hub.local/x", "http://hub.local/x"),
        ("http://127.0.0.1:8080/api, [fe80:0:0:0:1:2:3:4]:80", "http://<address>/api, <address>"),
        ("GPU-01234567-89ab-cdef-0123-456789abcdef", "<uuid>"),
        ("at 0x7f3a2c001000", "at 0x..."),
        ("torch 2.13.0, driver 580.65.06, cuDNN 9.20.0", "torch 2.13.0, driver 580.65.06, cuDNN 9.20.0"),
    ],
)
def test_no_text_holds_personal_data(text, shown, tmp_path):
    home = tmp_path / "zaphod"
    assert without_personal_data(text.format(home=home)) == shown.replace("{home}", str(home))


def test_value_and_advice_are_cleaned(user):
    row = failed("folder", f"{user}/x", f"Look into {user}.", 7)
    assert publishable(row) == Row("folder", "~/x", FAILED, "Look into ~.", 7)


def test_a_home_folder_without_a_name_and_a_superuser_hide_nothing(monkeypatch):
    monkeypatch.setenv("HOME", "/")
    monkeypatch.setenv("LOGNAME", "root")
    assert without_personal_data("/usr/lib /opt/root/x") == "/usr/lib /opt/root/x"
