"""A check of `paligemma doctor` and its result: rows with a name, a value, a state, and what to do if something is wrong.

A check is a function that returns rows. If a check raises an exception, `run_check` turns it into a row, and the other
checks still run. Rows are printed as lines of a table or as JSON, which people paste into issue reports. Therefore
`without_personal_data` removes names, folders, addresses and tokens from every text. Checked in tests/checkup/test_rows.py.
"""

import getpass
import os
import re
import shutil
import socket
import textwrap
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from paligemma.errors import DeviceError, PaliGemmaError, one_line

WIDTH, MIN_WIDTH = 100, 60  # the table is as wide as the terminal, but at most WIDTH and at least MIN_WIDTH characters
NAME_COLUMN, VALUE_COLUMN = 8, 34
OK, NOTE, FAILED = "ok", "note", "failed"
REPORT = "Run the command again with --debug and report its output."
SECRETS = (  # (what is replaced, by what)
    (re.compile(r"hf_\w{8,}"), "<token>"),
    (re.compile(r"(?<=://)[^/\s@]+@"), ""),  # user and password in an address
    (re.compile(r"[\w.+-]+@[\w-]+(\.[\w-]+)*"), "<e-mail>"),
    (re.compile(r"(GPU-|MIG-)?\b[0-9a-fA-F]{8}-([0-9a-fA-F]{4}-){3}[0-9a-fA-F]{12}\b"), "<uuid>"),
    (re.compile(r"\b((25[0-5]|2[0-4]\d|1?\d?\d)\.){3}(25[0-5]|2[0-4]\d|1?\d?\d)\b(:\d+)?"), "<address>"),
    (re.compile(r"\[?\b([0-9a-fA-F]{1,4}:){4,7}[0-9a-fA-F:]+\]?(:\d+)?"), "<address>"),
    (re.compile(r"\b0x[0-9a-fA-F]{6,}"), "0x..."),
)


@dataclass(frozen=True)
class Row:
    """One line of the result.

    Attributes:
        name: what was checked.
        value: what was found.
        state: OK, NOTE (works, but could be improved, or the user should know it) or FAILED.
        advice: what to do; "" only if the state is OK or the value needs no reaction.
        code: the exit code that a failed row asks for, see errors.py; otherwise 0.
    """

    name: str
    value: str
    state: str = OK
    advice: str = ""
    code: int = 0

    def to_json(self) -> dict[str, str]:
        return {"name": self.name, "value": self.value, "state": self.state, "advice": self.advice}


def note(name: str, value: str, advice: str = "") -> Row:
    return Row(name, value, NOTE, advice)


def failed(name: str, value: str, advice: str, code: int = DeviceError.code) -> Row:
    return Row(name, value, FAILED, advice, code)


def failed_by(name: str, error: Exception, code: int = DeviceError.code) -> Row:
    """The row for an exception. The last sentence of a PaliGemmaError says what to do."""
    if isinstance(error, PaliGemmaError):
        sentences = re.split(r"(?<=[.?]) (?=[A-Z])", " ".join(error.message.split()))
        advice = sentences.pop() if len(sentences) > 1 else REPORT
        return failed(name, " ".join(sentences), advice, error.code)
    lines = str(error).strip().splitlines() or [""]
    return failed(name, one_line(f"{type(error).__name__}: {lines[0]}"), REPORT, code)


def run_check(
    check: Callable[..., list[Row]], *args: Any, code: int = DeviceError.code, on_error: Callable[[], object] | None = None
) -> list[Row]:
    """The rows of a check; if it raises an exception, one failed row with the name of the check.

    Args:
        code: the exit code of that row, if the exception has none.
        on_error: is called while the exception is handled, for --debug.
    """
    try:
        return check(*args)
    except Exception as error:  # noqa: BLE001  (whatever is broken on this machine, the other checks must run)
        if on_error is not None:
            on_error()
        return [failed_by(check.__name__.removesuffix("_rows").replace("_", " "), error, code)]


# Personal data


def home_folders() -> set[str]:
    """The user's home folder, as written in $HOME and with links resolved."""
    found = {os.environ.get("HOME", "")}
    with suppress(RuntimeError):  # no home folder
        found.add(str(Path.home()))
    return {form for path in found if len(path) > 1 for form in (path, os.path.realpath(path)) if len(form) > 1}


def user_name() -> str:
    """The name of the user; "" if it is unknown. Names such as root, which say nothing, are not hidden."""
    with suppress(ImportError, KeyError, OSError):
        name = getpass.getuser()
        return "" if name in ("root", "nobody") else name
    return ""


def without_personal_data(text: str) -> str:
    """The text with ~ for the home folder, and without the names of user and machine, addresses, tokens and serial numbers."""
    for home in sorted(home_folders(), key=len, reverse=True):
        text = re.sub(rf"{re.escape(home)}(?![\w-]|\.\w)", "~", text)
    for pattern, shown in SECRETS:
        text = pattern.sub(shown, text)
    if user := user_name():  # replaced in paths and addresses only, because it may be an ordinary word
        text = re.sub(rf"(?<=[/\\_@-]){re.escape(user)}(?![A-Za-z0-9])", "<user>", text)
    host = socket.gethostname()
    if host not in ("", "localhost"):
        text = re.sub(rf"(?<![A-Za-z0-9]){re.escape(host)}(?![A-Za-z0-9])", "<machine>", text)
    return text


def publishable(row: Row) -> Row:
    """The row with texts that are free of personal data."""
    return replace(row, value=without_personal_data(row.value), advice=without_personal_data(row.advice))


# Output


def table_lines(row: Row) -> list[str]:
    """The lines of one row: state, name and value, then the advice on lines of its own."""
    state = row.state.upper() if row.state == FAILED else row.state
    first = f"{state:<{NAME_COLUMN}}{row.name:<{VALUE_COLUMN - NAME_COLUMN}}"
    space = " " * VALUE_COLUMN
    if len(first) > VALUE_COLUMN:  # a long name: the value begins on the next line
        first += "\n" + space
    width = min(WIDTH, max(shutil.get_terminal_size((WIDTH, 0)).columns, MIN_WIDTH))
    # A name or path that is longer than a line is not divided, so that it can be copied.
    options: dict[str, Any] = {
        "width": width, "break_on_hyphens": False, "break_long_words": False, "subsequent_indent": space,
    }  # fmt: skip
    lines = first.splitlines()[:-1]
    lines += textwrap.wrap(row.value, initial_indent=first.splitlines()[-1], **options) or [first.rstrip()]
    if row.advice:
        lines += textwrap.wrap(row.advice, initial_indent=f"{space}-> ", **options | {"subsequent_indent": f"{space}   "})
    return lines


def worst_state(rows: Iterable[Row]) -> str:
    states = {row.state for row in rows}
    return next((state for state in (FAILED, NOTE) if state in states), OK)


def exit_code(rows: Iterable[Row]) -> int:
    """0 if no row failed, otherwise the code of the first failed row."""
    return next((row.code for row in rows if row.state == FAILED), 0)
