"""Runs a command-line program: reads its flags with Fire, reports errors, handles signals and writes output.

Fire by itself parses values as Python literals: "cat # dog" becomes "cat", "None" becomes None, and `--do_sample false` gives the
string "false", which counts as true. Fire also reads "-" as a separator, and reports a mistyped flag only after the whole job.
Therefore this module first checks every flag against the fields and passes it to Fire as --name=value, with a converter for its
annotation (bool, int, float, str, each with or without None). Nothing slow is imported before these checks.

A program is `sys.exit(commandline.run(Flags, program))`. A field annotated `Positional` takes the positional arguments.
Base classes hold the flags that programs share; --help shows each class as a group, under the first line of its docstring.
Exit codes: 0 success, 1 a bug in this project, 130 Ctrl-C, 143 SIGTERM, 141 closed output pipe; errors.py lists the others.
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
from paligemma.errors import (
    DeviceError,
    OutputError,
    PaliGemmaError,
    PromptError,
    UsageError,
    is_gpu_error,
    shorten,
    unexpected,
)

PROGRAMS = ("finetune", "annotate", "cluster", "doctor")  # modules of paligemma.programs; the command line starts them by name
TRUE, FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")
SIGNALS = (signal.SIGINT, signal.SIGTERM)
COLUMN = 34  # the texts of --help begin here
# Characters of the Unicode categories Cc and Cf that `printable` keeps: newline, tab, joiners, and visible Arabic signs.
KEPT = "\n\t\u200c\u200d\u0600\u0601\u0602\u0603\u0604\u0605\u06dd\u070f\u08e2"
RENAMED = {"rows": "micro_batch_size"}  # flags of earlier versions, for which `suggestion` names the new flag
Positional = tuple[str, ...]  # annotates the field for positional arguments; without such a field they are refused


class Interrupted(BaseException):
    """A signal arrived during `interruptible`. This is a BaseException, so that `except Exception` does not catch it."""

    def __init__(self, signum: int):
        super().__init__(signum)
        self.code = 128 + signum


# The command that the user typed


def command(program: str = "") -> str:
    """The command line for inference.py or `program`, in the form that the user typed, for help and messages.

    If the user typed "paligemma", this begins with "paligemma"; otherwise with "python -m paligemma" or "python inference.py".
    launch_inference.sh passes "bash launch_inference.sh" in the variable PALIGEMMA_COMMAND.
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


def with_typed_commands(text: str) -> str:
    """Replaces "python inference.py", "python -m paligemma finetune" and so on by what the function `command` returns."""
    programs = "|".join(PROGRAMS)
    return re.sub(rf"python (?:inference\.py|-m paligemma(?: ({programs}))?)\b", lambda match: command(match[1] or ""), text)


# Arguments


def as_utf8(text: str) -> str:
    """Decodes the typed bytes as UTF-8, whatever the encoding of the locale. Raises: PromptError if they are not UTF-8."""
    try:
        return os.fsencode(text).decode()
    except UnicodeError as error:
        raise PromptError("the prompt is not valid UTF-8. Type it in a terminal that uses UTF-8.") from error


def base_type(parameter: inspect.Parameter) -> type:
    """The annotation without `| None`: bool, int, float, str or Positional."""
    if parameter.annotation == Positional:
        return Positional
    kinds = [kind for kind in get_args(parameter.annotation) if kind is not type(None)]
    return kinds[0] if kinds else parameter.annotation


def converter(name: str, kind: type) -> Callable[[str], object]:
    """A function that converts the value of --name. It raises UsageError for a value of another type."""
    if kind == Positional:
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
    """The text " Did you mean --name?", or "" if no name is similar."""
    import difflib  # only needed for a mistyped flag

    name = RENAMED.get(name, name)
    close = [known for known in names if name and known.startswith(name)] or difflib.get_close_matches(name, names, n=1)
    return f" Did you mean {dashes}{close[0]}?" if close else ""


def separate(argv: list[str], flags: dict[str, type], takes_positional: bool) -> tuple[dict[str, str], list[str]]:
    """The value of each flag, and the positional arguments. The last value of a repeated flag counts.

    Every argument after -- is positional.
    Raises: UsageError for an unknown flag, a missing value, or a positional argument if the program takes none.
    """
    values: dict[str, str] = {}
    positional: list[str] = []
    rest = deque(argv)
    while rest:
        argument = rest.popleft()
        if argument == "--" and takes_positional:
            positional += rest
            break
        if not argument.startswith("-") or argument == "-":
            positional.append(argument)
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
    if positional and not takes_positional:
        raise UsageError(
            f"{positional[0]!r} belongs to no flag. Write --NAME before each value, and put text with spaces in quotes; "
            "--help lists the flags."
        )
    return values, positional


def is_on(name: str, argv: list[str]) -> bool:
    """Whether a boolean flag is set. Ignores the other arguments, because they may be wrong."""
    state = False
    for argument, following in pairwise([*argv, ""]):
        if argument == f"--{name}":
            state = following.lower() not in FALSE
        elif argument.startswith(f"--{name}="):
            state = argument.partition("=")[2].lower() in TRUE
    return state


def described(flags: type, parameters: dict[str, inspect.Parameter]) -> list[str]:
    """The lines of --help for the flags in this class's own docstring."""
    from fire import docstrings

    documented = docstrings.parse(inspect.getdoc(flags)).args or []
    lines = []
    for name, text in ((argument.name, argument.description) for argument in documented):
        if base_type(parameters[name]) == Positional:
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
    """The text of --help: `about` (default: the docstring of the class), then the flags of the class and its bases in groups."""
    parameters = dict(inspect.signature(flags).parameters)
    if about is None:
        about = inspect.getdoc(flags).partition("\nArgs:")[0]
    lines = [with_typed_commands(about.strip())]
    for part in flags.__mro__[:-1]:
        title = "Flags" if part is flags else inspect.getdoc(part).splitlines()[0].rstrip(".")
        if texts := described(part, parameters):
            lines += ["", f"{title}:", *texts]
    return "\n".join(lines) + "\n"


def read_flags(flags: type, argv: list[str]) -> object:
    """Reads argv into an instance of the class, using Fire. Raises: UsageError.

    If the class has a function `expand`, argv is replaced by expand(argv). If the class has a function `check_positional`, it
    checks the positional arguments before Fire is imported, so that errors are reported early.
    """
    argv = getattr(flags, "expand", list)(argv)
    kinds = {name: base_type(parameter) for name, parameter in inspect.signature(flags).parameters.items()}
    field = next((name for name, kind in kinds.items() if kind == Positional), None)
    values, positional = separate(argv, {name: kind for name, kind in kinds.items() if name != field}, field is not None)
    if positional:
        getattr(flags, "check_positional", lambda _: None)(tuple(positional))
        values[field] = json.dumps(positional)
    try:
        import fire  # slow, so after the checks
    except ModuleNotFoundError:  # all checks have been made, so Fire is not necessary, except for --help
        return flags(**{name: converter(name, kinds[name])(value) for name, value in values.items()})
    decorated = fire.decorators.SetParseFns(**{name: converter(name, kind) for name, kind in kinds.items()})(flags)
    # In the form --name=value nothing is ambiguous.
    return fire.Fire(decorated, command=[f"--{name}={value}" for name, value in values.items()], serialize=lambda _: None)


# Output


def printable(text: str) -> str:
    """The text without characters that could hide parts of it on a terminal or control the terminal.

    Removed are control characters, characters that change the direction of writing (U+202E) or have no width (category Cf), and
    line ends other than newline. The characters in KEPT, which some scripts and emoji need, stay.
    """
    hidden = ("Cc", "Cf", "Zl", "Zp")
    return "".join(c for c in text if c in KEPT or unicodedata.category(c) not in hidden)


def write_raw(text: str) -> None:
    """Writes text to stdout unchanged, and flushes it. Raises: OutputError, BrokenPipeError."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OutputError(f"stdout cannot be written. {error.strerror}. Make room, or write elsewhere.") from error


def write(text: str) -> None:
    """Writes text to stdout; without control characters if stdout is a terminal."""
    write_raw(printable(text) if sys.stdout.isatty() else text)


def note(text: str, is_uncut: bool = False) -> None:
    """Writes one line to stderr. Shortens a long line unless `is_uncut`."""
    text = printable(" ".join(text.splitlines()))
    with contextlib.suppress(OSError):  # there is no other place for the text
        print(text if is_uncut else shorten(text), file=sys.stderr, flush=True)


def print_notes(*texts: str) -> None:
    """Prints each text as a line "note: ..." on stderr."""
    for text in texts:
        note(f"note: {text}")


def relay_logs(is_verbose: bool) -> None:
    """Prints log messages of library code: always warnings; other messages and Python's own warnings only if verbose."""
    import logging

    class Relay(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            note(f"{'note' if record.levelno < logging.WARNING else 'warning'}: {record.getMessage()}")

    logging.basicConfig(level=logging.INFO if is_verbose else logging.WARNING, handlers=[Relay()], force=True)
    logging.captureWarnings(True)
    logging.getLogger("py.warnings").disabled = not is_verbose


def report(error: PaliGemmaError, as_json: bool, is_debug: bool) -> int:
    """Prints an error as one line. --json also prints a JSON object; --debug prints the traceback and the whole message.

    Never raises: ignores a stream that cannot be written. Returns: the exit code.
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
    """A sys.excepthook: prints an unexpected exception as one line, and its traceback with --debug. Python then exits with 1."""
    report(unexpected(error), is_on("json", sys.argv), is_on("debug", sys.argv))


# Signals and streams


@contextlib.contextmanager
def handlers(handler: Callable) -> Iterator[None]:
    """In the `with` block, Ctrl-C and SIGTERM call the handler. A signal that was ignored at the start (nohup) stays ignored."""
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
    """A signal handler that ends the process at once. Raising is not enough: some libraries catch exceptions when imported."""
    os._exit(128 + signum)


def leave_on_signals() -> None:
    """From now on, signals end the process at once, even while Python exits. Call this before slow imports."""
    for signum in SIGNALS:
        if signal.getsignal(signum) is not signal.SIG_IGN:
            signal.signal(signum, leave)


def interruptible() -> contextlib.AbstractContextManager[None]:
    """In the `with` block, a signal raises Interrupted, so that the output generated so far can be saved."""

    def interrupt(signum: int, _frame: object) -> None:
        raise Interrupted(signum)

    return handlers(interrupt)


@contextlib.contextmanager
def repeated_signals() -> Iterator[None]:
    """Sends a signal again every 0.05 s until the `with` block ends.

    Once is not enough, because input() misses a signal that arrives just before it blocks.
    """
    main, (read_end, write_end) = threading.get_ident(), os.pipe()
    os.set_blocking(write_end, False)  # required by set_wakeup_fd
    before = signal.set_wakeup_fd(write_end)  # Python writes the number of each signal to this pipe as soon as it arrives

    def repeat() -> None:
        while number := os.read(read_end, 1):
            time.sleep(0.05)
            signal.pthread_kill(main, number[0])
        os.close(read_end)

    threading.Thread(target=repeat, daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(write_end)


def prepare_streams() -> None:
    """Makes stdin, stdout and stderr accept all characters.

    Characters that the locale cannot encode are written as escapes. Input bytes that the locale cannot decode become surrogates,
    which `as_utf8` decodes. os.devnull replaces a closed output stream.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))
        with contextlib.suppress(AttributeError):  # the streams of a test have no reconfigure
            getattr(sys, name).reconfigure(errors="backslashreplace")
    with contextlib.suppress(AttributeError):
        sys.stdin.reconfigure(errors="surrogateescape")


def run_guarded(flags: type, program: Callable, argv: list[str], topics: dict[str, str]) -> int:
    """Runs the program, or prints its help or version. Prints an error as one line. Returns: the exit code."""
    as_json, is_debug = is_on("json", argv), is_on("debug", argv)
    try:
        with handlers(leave):
            if "--help" in argv or "-h" in argv:
                write(help_text(flags, next((topics[word] for word in argv if word in topics), None)))
            elif "--version" in argv:
                write(f"paligemma {paligemma.__version__}\n")
            else:
                return program(read_flags(flags, argv)) or 0
        return 0
    except PaliGemmaError as error:
        return report(error, as_json, is_debug)
    except ModuleNotFoundError as error:
        advice = "Install it with pip install -r requirements.txt, or use launch_inference.sh, which installs it."
        return report(DeviceError(f"the package {error.name!r} is not installed. {advice}", path=error.name), as_json, is_debug)
    except (MemoryError, RuntimeError) as error:
        if not (isinstance(error, MemoryError) or is_gpu_error(error)):
            raise
        return report(unexpected(error), as_json, is_debug)
    except Interrupted as stop:
        return stop.code


def run(flags: type, program: Callable, argv: list[str] | None = None, topics: dict[str, str] | None = None) -> int:
    """Calls the program with the flags in argv (default: sys.argv). From now on report_bug prints unexpected exceptions.

    Returns: the exit code.

    Args:
        flags: a dataclass with keyword-only fields, one per flag. Its docstring is the help; its __post_init__ checks ranges.
        program: is called with an instance of `flags`. It may return an exit code; None counts as 0.
        topics: for a word in argv, the text that --help shows instead of the docstring.
    """
    sys.excepthook = report_bug
    prepare_streams()
    try:
        return run_guarded(flags, program, sys.argv[1:] if argv is None else argv, topics or {})
    except BrokenPipeError:
        return 141  # the exit code of a process that SIGPIPE ended
