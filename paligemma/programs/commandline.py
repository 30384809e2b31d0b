"""A command line that Fire makes from a dataclass, with Fire's traps closed; errors as one line and an exit code.

Left alone, Fire reads values as Python ("cat # dog" becomes "cat", "None" becomes None, `--do_sample false` a text that is
true), takes "-" for a separator, and runs the whole job before it complains about a mistyped flag. Here every argument is
first brought into the form --name=value and checked against the fields, and values are converted by their annotations
(bool, int, float, str, each with or without None). All of this happens before anything slow is imported.

A program is `sys.exit(commandline.run(Flags, program))`. A field annotated `Words` takes the words that belong to no flag.
Flags that programs share stand in a base class, and --help shows each class as a group under its docstring's first line.
Exit codes: 0 fine, 1 a bug of ours, 130 Ctrl-C, 143 SIGTERM, 141 the reader of the output is gone; the others are in errors.py.
Checked in tests/programs/test_commandline.py.
"""

import contextlib
import inspect
import json
import os
import re
import signal
import sys
import textwrap
import threading
import time
import traceback
import unicodedata
from collections import deque
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import get_args

import paligemma
from paligemma.errors import DeviceError, OutputError, PaliGemmaError, PromptError, UsageError, shorten, unexpected

PROGRAMS = ("finetune", "annotate", "cluster")  # modules of paligemma.programs that are started by their name
TRUE, FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")
SIGNALS = (signal.SIGINT, signal.SIGTERM)
COLUMN = 34  # where the texts of --help begin
KEPT = "\n\t\u200c\u200d\u0600\u0601\u0602\u0603\u0604\u0605\u06dd\u070f\u08e2"  # joiners, and Arabic signs, which show
Words = tuple[str, ...]  # the annotation of the field for words without a flag; without such a field they are refused


class Interrupted(BaseException):
    """A signal that came during `interruptible`. Not an Exception, so that nothing takes it for a fault it can mend."""

    def __init__(self, signum: int):
        super().__init__(signum)
        self.code = 128 + signum


# What the user typed


def command(program: str = "") -> str:
    """The words that start inference.py, or the program of that name, in the way in which this process was started.

    "paligemma" if it is installed, else "python -m paligemma", "python inference.py", or, as launch_inference.sh leaves it in
    PALIGEMMA_COMMAND, "bash launch_inference.sh". Help and messages show these words, so that they can be copied.
    """
    script = os.path.basename(sys.argv[0])
    if script == "paligemma":
        start = script
    elif script == "inference.py" and not program:
        from shlex import quote

        start = os.environ.get("PALIGEMMA_COMMAND") or f"python {quote(sys.argv[0])}"
    else:
        start = "python -m paligemma"
    return f"{start} {program}".rstrip()


def as_typed(text: str) -> str:
    """The text, in which "python inference.py" and "python -m paligemma finetune" become the words that this user types."""
    programs = "|".join(PROGRAMS)
    return re.sub(rf"python (?:inference\.py|-m paligemma(?: ({programs}))?)\b", lambda match: command(match[1] or ""), text)


# Arguments


def as_utf8(text: str) -> str:
    """The text as the bytes that were typed, independent of the locale's encoding. Raises: PromptError if they are not UTF-8."""
    try:
        return os.fsencode(text).decode()
    except UnicodeError as error:
        raise PromptError("the prompt is not valid UTF-8. Type it in a terminal that uses UTF-8.") from error


def base_type(parameter: inspect.Parameter) -> type:
    """bool, int, float or str, or Words: the annotation without its `| None`."""
    if parameter.annotation == Words:
        return Words
    kinds = [kind for kind in get_args(parameter.annotation) if kind is not type(None)]
    return kinds[0] if kinds else parameter.annotation


def converter(name: str, kind: type) -> Callable[[str], object]:
    """What Fire calls for the value of --name. Raises: UsageError for a value of another type."""
    if kind == Words:
        return lambda value: tuple(json.loads(value))
    needed = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}[kind]

    def convert(value: str) -> object:
        if kind is bool:
            if value.lower() in TRUE + FALSE:
                return value.lower() in TRUE
        else:
            with contextlib.suppress(ValueError):
                return kind(value)
        raise UsageError(f"--{name} is {value!r}, but {needed} is needed.")

    return convert


def suggestion(name: str, names: list[str], dashes: str = "--") -> str:
    """" Did you mean --this?", or nothing."""
    import difflib  # only a mistyped flag pays for it

    close = [known for known in names if name and known.startswith(name)] or difflib.get_close_matches(name, names, n=1)
    return f" Did you mean {dashes}{close[0]}?" if close else ""


def separate(argv: list[str], flags: dict[str, type], takes_words: bool) -> tuple[dict[str, str], list[str]]:
    """The value of each flag in argv, of a repeated one the last, and the words without a flag; behind -- all are such words.

    Raises: UsageError for an unknown flag, a missing value, or a word where there must be none.
    """
    values: dict[str, str] = {}
    words: list[str] = []
    rest = deque(argv)
    while rest:
        argument = rest.popleft()
        if argument == "--" and takes_words:
            words += rest
            break
        if not argument.startswith("-") or argument == "-":
            words.append(argument)
            continue
        name, equals, value = argument.lstrip("-").partition("=")
        name = name.replace("-", "_")
        positive = name.removeprefix("no").removeprefix("_")
        if name not in flags and flags.get(positive) is bool and not equals:
            values[positive] = "false"  # --nojson and --no_json, as Fire has it
        elif name not in flags or not argument.startswith("--"):
            raise UsageError(f"unknown flag {argument.partition('=')[0]}.{suggestion(name, list(flags))} --help lists all.")
        elif equals:
            values[name] = value
        elif flags[name] is bool:
            values[name] = rest.popleft() if rest and rest[0].lower() in TRUE + FALSE else "true"
        elif not rest or rest[0].startswith("--"):
            raise UsageError(f"--{name} needs a value. A value that starts with dashes is written --{name}=--so.")
        else:
            values[name] = rest.popleft()
    if words and not takes_words:
        raise UsageError(
            f"{words[0]!r} belongs to no flag. Put text with spaces in quotes and name every flag; --help lists them."
        )
    return values, words


def is_on(name: str, argv: list[str]) -> bool:
    """Whether a yes-or-no flag is set, judged without parsing the rest, which may be what is wrong."""
    state = False
    for argument, following in pairwise([*argv, ""]):
        if argument == f"--{name}":
            state = following.lower() not in FALSE
        elif argument.startswith(f"--{name}="):
            state = argument.partition("=")[2].lower() in TRUE
    return state


def described(flags: type, parameters: dict[str, inspect.Parameter]) -> list[str]:
    """The part of the help screen about the flags that this class itself adds: a line or two for each."""
    from fire import docstrings

    documented = docstrings.parse(inspect.getdoc(flags)).args or []
    lines = []
    for name, text in ((argument.name, argument.description) for argument in documented):
        if base_type(parameters[name]) == Words:
            continue
        default = parameters[name].default
        text += "" if default is None or default is False else f" (default: {default})"
        value = {bool: "", int: " N", float: " X", str: " TEXT"}[base_type(parameters[name])]
        flag, wrapped = f"  --{name}{value}", textwrap.wrap(text, 78)
        if len(flag) >= COLUMN:  # no room for the text beside it
            lines.append(flag)
            flag = ""
        lines += [f"{flag:<{COLUMN}}{wrapped[0]}", *(" " * COLUMN + line for line in wrapped[1:])]
    return lines


def help_text(flags: type, about: str | None = None) -> str:
    """The help screen: `about` or what the docstring of the flags says, then each class's flags, those of its bases last."""
    parameters = dict(inspect.signature(flags).parameters)
    if about is None:
        about = inspect.getdoc(flags).partition("\nArgs:")[0]
    lines = [as_typed(about.strip())]
    for part in flags.__mro__[:-1]:
        title = "Flags" if part is flags else inspect.getdoc(part).splitlines()[0].rstrip(".")
        if texts := described(part, parameters):
            lines += ["", f"{title}:", *texts]
    return "\n".join(lines) + "\n"


def read_flags(flags: type, argv: list[str]) -> object:
    """The flags in argv as an instance of the class, made by Fire. Raises: UsageError.

    If the class has a function check_words, it sees the words first: what it refuses is answered before Fire is imported. If it
    has a function expand, that sees the arguments before anybody else, and may put more in front of them.
    """
    argv = getattr(flags, "expand", list)(argv)
    kinds = {name: base_type(parameter) for name, parameter in inspect.signature(flags).parameters.items()}
    place = next((name for name, kind in kinds.items() if kind == Words), None)
    values, words = separate(argv, {name: kind for name, kind in kinds.items() if name != place}, place is not None)
    if words:
        getattr(flags, "check_words", lambda _: None)(tuple(words))
        values[place] = json.dumps(words)
    import fire  # after the check, so that a mistyped flag is answered sooner

    decorated = fire.decorators.SetParseFns(**{name: converter(name, kind) for name, kind in kinds.items()})(flags)
    # As --name=value each, so that nothing is left for Fire to guess.
    return fire.Fire(decorated, command=[f"--{name}={value}" for name, value in values.items()], serialize=lambda _: None)


# Output


def printable(text: str) -> str:
    """The text without what could make a terminal show another text than this one, or write its clipboard.

    That is: control characters but newline and tab, characters that turn the direction of writing (U+202E) or have no width
    (category Cf), and other line ends. What scripts and emoji need stays: KEPT.
    """
    hidden = ("Cc", "Cf", "Zl", "Zp")
    return "".join(c for c in text if c in KEPT or unicodedata.category(c) not in hidden)


def put(text: str) -> None:
    """Puts text on stdout at once, as it is. Raises: OutputError, BrokenPipeError."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OutputError(f"stdout cannot be written. {error.strerror}. Make room, or write elsewhere.") from error


def write(text: str) -> None:
    """Puts text on stdout; on a terminal, without control characters."""
    put(printable(text) if sys.stdout.isatty() else text)


def note(text: str, is_whole: bool = False) -> None:
    """Says something besides the answer: one line on stderr, cut if it is long unless it `is_whole`."""
    text = printable(" ".join(text.splitlines()))
    with contextlib.suppress(OSError):  # with stderr gone there is no other place to say it
        print(text if is_whole else shorten(text), file=sys.stderr, flush=True)


def print_notes(*texts: str) -> None:
    """Prints each text as a line "note: ..." on stderr."""
    for text in texts:
        note(f"note: {text}")


def relay_logs(is_verbose: bool) -> None:
    """What library code logs becomes notes: warnings always, the rest, and Python's own warnings, when verbose."""
    import logging

    class Relay(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            note(f"{'note' if record.levelno < logging.WARNING else 'warning'}: {record.getMessage()}")

    logging.basicConfig(level=logging.INFO if is_verbose else logging.WARNING, handlers=[Relay()], force=True)
    logging.captureWarnings(True)
    logging.getLogger("py.warnings").disabled = not is_verbose


def report(error: PaliGemmaError, as_json: bool, is_whole: bool) -> int:
    """Says what went wrong, as a line and for --json also as an object; `is_whole`, with the traceback and uncut.

    Never fails: where a stream cannot be written, there is nothing left to say it on. Returns the exit code.
    """
    if is_whole:
        with contextlib.suppress(OSError):
            traceback.print_exception(error)
    note(f"error: {error.message}", is_whole)
    if as_json:
        with contextlib.suppress(OSError, OutputError):
            write(json.dumps({"error": error.to_json(is_whole)}) + "\n")
    return error.code


def report_bug(_kind: type[BaseException], error: BaseException, _trail: object) -> None:
    """sys.excepthook: an unexpected exception, in one line, with the traceback for those who ask. Python then exits with 1."""
    report(unexpected(error), is_on("json", sys.argv), is_on("debug", sys.argv))


# Signals and streams


@contextlib.contextmanager
def handlers(handler: Callable) -> Iterator[None]:
    """Ctrl-C and SIGTERM go to the handler, unless whoever started us (nohup) had them ignored."""
    before = {signum: signal.getsignal(signum) for signum in SIGNALS}
    for signum in SIGNALS:
        if before[signum] is not signal.SIG_IGN:
            signal.signal(signum, handler)
    try:
        yield
    finally:
        for signum in SIGNALS:
            signal.signal(signum, before[signum])


def leave(signum: int, _frame: object) -> None:
    """Ends the process at once. While libraries are imported an exception is not enough: some of them swallow it."""
    os._exit(128 + signum)


def leave_on_signals() -> None:
    """From now on, also while Python ends, a signal ends the process at once; for a program to call before its imports."""
    for signum in SIGNALS:
        if signal.getsignal(signum) is not signal.SIG_IGN:
            signal.signal(signum, leave)


def interruptible() -> contextlib.AbstractContextManager[None]:
    """Inside, a signal raises Interrupted, so that what was said so far can be kept."""

    def interrupt(signum: int, _frame: object) -> None:
        raise Interrupted(signum)

    return handlers(interrupt)


@contextlib.contextmanager
def repeated_signals() -> Iterator[None]:
    """Inside, a signal is sent again until somebody heeds it: input() sleeps through one that comes just before it waits."""
    main, (ours, theirs) = threading.get_ident(), os.pipe()
    os.set_blocking(theirs, False)  # as set_wakeup_fd demands
    before = signal.set_wakeup_fd(theirs)  # Python writes each signal's number there, at once, whatever the program is doing

    def repeat() -> None:
        while number := os.read(ours, 1):
            time.sleep(0.05)
            signal.pthread_kill(main, number[0])
        os.close(ours)

    threading.Thread(target=repeat, daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(theirs)


def prepare_streams() -> None:
    """Streams that fail on no character: out go escapes where the locale has none, or nothing where a stream is closed; in come
    also bytes that are no characters, for the program to judge."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))
        with contextlib.suppress(AttributeError):  # a test's stand-in has no reconfigure
            getattr(sys, name).reconfigure(errors="backslashreplace")
    with contextlib.suppress(AttributeError):
        sys.stdin.reconfigure(errors="surrogateescape")


def run_guarded(flags: type, program: Callable, argv: list[str], topics: dict[str, str]) -> int:
    """Runs the program; what it raises becomes a line and an exit code."""
    style = is_on("json", argv), is_on("debug", argv)
    try:
        with handlers(leave):
            if "--help" in argv or "-h" in argv:
                write(help_text(flags, next((topics[word] for word in argv if word in topics), None)))
            elif "--version" in argv:
                write(f"paligemma {paligemma.__version__}\n")
            else:
                program(read_flags(flags, argv))
        return 0
    except PaliGemmaError as error:
        return report(error, *style)
    except ModuleNotFoundError as error:
        advice = "Install what requirements.txt names (pip install -r requirements.txt), or start with launch_inference.sh."
        return report(DeviceError(f"the package {error.name!r} is not installed. {advice}", path=error.name), *style)
    except MemoryError as error:
        return report(unexpected(error), *style)
    except Interrupted as stop:
        return stop.code


def run(flags: type, program: Callable, argv: list[str] | None = None, topics: dict[str, str] | None = None) -> int:
    """Calls the program with the flags in argv (default: the process's own) and returns the exit code.

    Args:
        flags: a dataclass with keyword-only fields, one a flag; its docstring is the help, its __post_init__ checks ranges.
        program: takes an instance of it.
        topics: what --help says instead of the docstring's beginning if this word stands beside it.
    """
    prepare_streams()
    try:
        return run_guarded(flags, program, sys.argv[1:] if argv is None else argv, topics or {})
    except BrokenPipeError:
        return 141  # as a process that SIGPIPE has ended
