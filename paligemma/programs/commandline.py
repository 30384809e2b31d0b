"""A command line made by Fire from a dataclass of flags; errors as one line and an exit code; signals; output.

Fire alone reads values as Python: "cat # dog" becomes "cat", "None" becomes None, and `--do_sample false` gives the string
"false", which counts as true. It takes "-" for a separator, and it runs the whole job before it reports a mistyped flag.
Therefore every argument is first brought into the form --name=value and checked against the fields, and values are converted by
their annotations (bool, int, float, str, each with or without None). All of this happens before anything slow is imported.

A program is `sys.exit(commandline.run(Flags, program))`. A field annotated `Words` takes the words that belong to no flag.
Flags that programs share are in base classes; --help shows each class as a group, titled by the first line of its docstring.
Exit codes: 0 success, 1 a bug of ours, 130 Ctrl-C, 143 SIGTERM, 141 the reader of the output has gone; errors.py has the others.
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
COLUMN = 34  # the texts of --help begin here
# Characters of the categories Cc and Cf that `printable` keeps: newline, tab, joiners, and Arabic signs, which are visible.
KEPT = "\n\t\u200c\u200d\u0600\u0601\u0602\u0603\u0604\u0605\u06dd\u070f\u08e2"
RENAMED = {"rows": "micro_batch_size"}  # flags of earlier versions, for which `suggestion` names the new flag
Words = tuple[str, ...]  # the annotation of the field for words that belong to no flag; without such a field they are refused


class Interrupted(BaseException):
    """A signal came during `interruptible`. It is a BaseException, so that `except Exception` does not catch it."""

    def __init__(self, signum: int):
        super().__init__(signum)
        self.code = 128 + signum


# What the user typed


def command(program: str = "") -> str:
    """The words that start inference.py, or another program, in the way in which this process was started.

    They are "paligemma" if that was typed, "python -m paligemma" or "python inference.py" otherwise. launch_inference.sh passes
    "bash launch_inference.sh" in the variable PALIGEMMA_COMMAND. Help and messages show these words, so that they can be copied.
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
    """The text with "python inference.py" and "python -m paligemma finetune" replaced by what this user types."""
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
    """The annotation without `| None`: bool, int, float, str or Words."""
    if parameter.annotation == Words:
        return Words
    kinds = [kind for kind in get_args(parameter.annotation) if kind is not type(None)]
    return kinds[0] if kinds else parameter.annotation


def converter(name: str, kind: type) -> Callable[[str], object]:
    """The function that converts the value of --name for Fire. It raises UsageError for a value of another type."""
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
    import difflib  # only needed for a mistyped flag

    name = RENAMED.get(name, name)
    close = [known for known in names if name and known.startswith(name)] or difflib.get_close_matches(name, names, n=1)
    return f" Did you mean {dashes}{close[0]}?" if close else ""


def separate(argv: list[str], flags: dict[str, type], takes_words: bool) -> tuple[dict[str, str], list[str]]:
    """The value of each flag (the last one if it is repeated), and the words that belong to no flag; after -- all are such words.

    Raises: UsageError for an unknown flag, a missing value, or a word if the program takes none.
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
            values[positive] = "false"  # --nojson and --no_json, as in Fire
        elif name not in flags or not argument.startswith("--"):
            raise UsageError(f"unknown flag {argument.partition('=')[0]}.{suggestion(name, list(flags))} --help lists all.")
        elif equals:
            values[name] = value
        elif flags[name] is bool:
            values[name] = rest.popleft() if rest and rest[0].lower() in TRUE + FALSE else "true"
        elif not rest or rest[0].startswith("--"):
            raise UsageError(f"--{name} needs a value. Write --{name}=VALUE if the value starts with dashes.")
        else:
            values[name] = rest.popleft()
    if words and not takes_words:
        raise UsageError(
            f"{words[0]!r} belongs to no flag. Put text with spaces in quotes and name every flag; --help lists them."
        )
    return values, words


def is_on(name: str, argv: list[str]) -> bool:
    """Whether a yes-or-no flag is set. The rest is not parsed, because it may be wrong."""
    state = False
    for argument, following in pairwise([*argv, ""]):
        if argument == f"--{name}":
            state = following.lower() not in FALSE
        elif argument.startswith(f"--{name}="):
            state = argument.partition("=")[2].lower() in TRUE
    return state


def described(flags: type, parameters: dict[str, inspect.Parameter]) -> list[str]:
    """The lines of --help for the flags that this class adds to its bases."""
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
        if len(flag) >= COLUMN:  # the text begins on the next line
            lines.append(flag)
            flag = ""
        lines += [f"{flag:<{COLUMN}}{wrapped[0]}", *(" " * COLUMN + line for line in wrapped[1:])]
    return lines


def help_text(flags: type, about: str | None = None) -> str:
    """The text of --help: `about`, or the docstring of the class, then its flags and those of its bases in groups."""
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

    If the class has a function `check_words`, it is called with the words first, so that its errors are reported before Fire is
    imported. If the class has a function `expand`, it is called with argv before that, and returns argv with added arguments.
    """
    argv = getattr(flags, "expand", list)(argv)
    kinds = {name: base_type(parameter) for name, parameter in inspect.signature(flags).parameters.items()}
    place = next((name for name, kind in kinds.items() if kind == Words), None)
    values, words = separate(argv, {name: kind for name, kind in kinds.items() if name != place}, place is not None)
    if words:
        getattr(flags, "check_words", lambda _: None)(tuple(words))
        values[place] = json.dumps(words)
    import fire  # after the checks, so that a mistyped flag is reported sooner

    decorated = fire.decorators.SetParseFns(**{name: converter(name, kind) for name, kind in kinds.items()})(flags)
    # All in the form --name=value, so that Fire has nothing to guess.
    return fire.Fire(decorated, command=[f"--{name}={value}" for name, value in values.items()], serialize=lambda _: None)


# Output


def printable(text: str) -> str:
    """The text without characters that could disguise it on a terminal or make the terminal write to the clipboard.

    These are control characters except newline and tab, characters that change the direction of writing (U+202E) or have no width
    (category Cf), and other line ends. Those that scripts and emoji need are kept: KEPT.
    """
    hidden = ("Cc", "Cf", "Zl", "Zp")
    return "".join(c for c in text if c in KEPT or unicodedata.category(c) not in hidden)


def put(text: str) -> None:
    """Writes text to stdout unchanged, and flushes it. Raises: OutputError, BrokenPipeError."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OutputError(f"stdout cannot be written. {error.strerror}. Make room, or write elsewhere.") from error


def write(text: str) -> None:
    """Writes text to stdout; on a terminal without control characters."""
    put(printable(text) if sys.stdout.isatty() else text)


def note(text: str, is_uncut: bool = False) -> None:
    """Writes one line to stderr. A long line is shortened unless it `is_uncut`."""
    text = printable(" ".join(text.splitlines()))
    with contextlib.suppress(OSError):  # if stderr cannot be written, there is no other place for it
        print(text if is_uncut else shorten(text), file=sys.stderr, flush=True)


def print_notes(*texts: str) -> None:
    """Prints each text as a line "note: ..." on stderr."""
    for text in texts:
        note(f"note: {text}")


def relay_logs(is_verbose: bool) -> None:
    """Prints what library code logs: warnings always; other messages, and Python's own warnings, only if verbose."""
    import logging

    class Relay(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            note(f"{'note' if record.levelno < logging.WARNING else 'warning'}: {record.getMessage()}")

    logging.basicConfig(level=logging.INFO if is_verbose else logging.WARNING, handlers=[Relay()], force=True)
    logging.captureWarnings(True)
    logging.getLogger("py.warnings").disabled = not is_verbose


def report(error: PaliGemmaError, as_json: bool, is_debug: bool) -> int:
    """Prints an error as one line, with --json also as an object, with --debug uncut and with its traceback.

    It never fails: a stream that cannot be written is passed over. Returns: the exit code.
    """
    if is_debug:
        with contextlib.suppress(OSError):
            traceback.print_exception(error)
    note(f"error: {error.message}", is_debug)
    if as_json:
        with contextlib.suppress(OSError, OutputError):
            write(json.dumps({"error": error.to_json(is_debug)}) + "\n")
    return error.code


def report_bug(_kind: type[BaseException], error: BaseException, _trail: object) -> None:
    """A sys.excepthook: prints an unexpected exception as one line, with --debug also its traceback. Python then exits with 1."""
    report(unexpected(error), is_on("json", sys.argv), is_on("debug", sys.argv))


# Signals and streams


@contextlib.contextmanager
def handlers(handler: Callable) -> Iterator[None]:
    """Inside, Ctrl-C and SIGTERM call the handler, unless the process was started with them ignored (nohup)."""
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
    """A signal handler that ends the process at once. An exception is not enough: some libraries swallow it when imported."""
    os._exit(128 + signum)


def leave_on_signals() -> None:
    """Makes signals end the process at once from now on, even while Python exits. To be called before slow imports."""
    for signum in SIGNALS:
        if signal.getsignal(signum) is not signal.SIG_IGN:
            signal.signal(signum, leave)


def interruptible() -> contextlib.AbstractContextManager[None]:
    """Inside, a signal raises Interrupted, so that the output generated so far can be saved."""

    def interrupt(signum: int, _frame: object) -> None:
        raise Interrupted(signum)

    return handlers(interrupt)


@contextlib.contextmanager
def repeated_signals() -> Iterator[None]:
    """Inside, a signal is repeated until it is handled, because input() misses a signal that arrives just before it blocks."""
    main, (ours, theirs) = threading.get_ident(), os.pipe()
    os.set_blocking(theirs, False)  # required by set_wakeup_fd
    before = signal.set_wakeup_fd(theirs)  # Python writes the number of each signal to this pipe as soon as it arrives

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
    """Makes the streams accept all characters.

    Characters that the locale cannot encode are written as escapes; input bytes that it cannot decode become surrogates, which
    `as_utf8` decodes; a closed output stream is replaced by os.devnull.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))
        with contextlib.suppress(AttributeError):  # the streams of a test have no reconfigure
            getattr(sys, name).reconfigure(errors="backslashreplace")
    with contextlib.suppress(AttributeError):
        sys.stdin.reconfigure(errors="surrogateescape")


def run_guarded(flags: type, program: Callable, argv: list[str], topics: dict[str, str]) -> int:
    """Runs the program, or prints its help or version; an error becomes one line and an exit code. Returns: the exit code."""
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
        advice = "Install it with pip install -r requirements.txt, or use launch_inference.sh, which does."
        return report(DeviceError(f"the package {error.name!r} is not installed. {advice}", path=error.name), *style)
    except MemoryError as error:
        return report(unexpected(error), *style)
    except Interrupted as stop:
        return stop.code


def run(flags: type, program: Callable, argv: list[str] | None = None, topics: dict[str, str] | None = None) -> int:
    """Calls the program with the flags in argv (default: those of the process). From now on report_bug prints bugs.

    Returns: the exit code.

    Args:
        flags: a dataclass with keyword-only fields, one per flag; its docstring is the help, its __post_init__ checks ranges.
        program: is called with an instance of `flags`.
        topics: word -> the beginning of --help if the word is in argv, in place of the docstring.
    """
    sys.excepthook = report_bug
    prepare_streams()
    try:
        return run_guarded(flags, program, sys.argv[1:] if argv is None else argv, topics or {})
    except BrokenPipeError:
        return 141  # the exit code of a process that SIGPIPE ended
