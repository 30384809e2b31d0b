"""Flags are read as they are typed; errors are one line and an exit code; output works in every locale and terminal."""

import importlib
import io
import json
import os
import pty
import re
import signal
import subprocess
import sys
from dataclasses import dataclass
from inspect import signature
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import paligemma
from paligemma.errors import ImageError, UsageError, counted, shorten
from paligemma.programs import commandline

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, kw_only=True)
class Flags:
    """Does nothing.

    Args:
        prompt: a text
        image_file_path: another
        top_k: a count
        temperature: a number
        do_sample: yes or no
        stream: yes, no or neither
        json: yes or no
        debug: yes or no
    """

    prompt: str | None = None
    image_file_path: str = "here"
    top_k: int | None = None
    temperature: float = 0.8
    do_sample: bool = False
    stream: bool | None = None
    json: bool = False
    debug: bool = False


def read(*argv):
    return commandline.read_flags(Flags, list(argv))


def run(program, *argv):
    return commandline.run(Flags, program, list(argv))


# What the user typed


@pytest.mark.parametrize(
    ("script", "variable", "typed"),
    [
        ("inference.py", None, "python inference.py"), ("/a b/inference.py", None, "python '/a b/inference.py'"),
        ("/clone/inference.py", "bash launch_inference.sh", "bash launch_inference.sh"),
        ("/x/paligemma/__main__.py", None, "python -m paligemma"), ("/venv/bin/paligemma", None, "paligemma"),
    ],
)  # fmt: skip
def test_help_and_messages_show_the_command_as_it_was_typed(monkeypatch, script, variable, typed):
    monkeypatch.setattr(sys, "argv", [script])
    if variable:
        monkeypatch.setenv("PALIGEMMA_COMMAND", variable)
    module = "paligemma" if typed == "paligemma" else "python -m paligemma"
    assert (commandline.command(), commandline.command("finetune")) == (typed, f"{module} finetune")
    for name, command in {"inference": typed, "programs.finetune": f"{module} finetune"}.items():
        text = commandline.help_text(importlib.import_module(f"paligemma.{name}").Flags)
        examples = [line.strip() for line in text.splitlines() if line.startswith("  ") and " --" in line][:2]
        assert [line.startswith(f"{command} ") for line in examples] == [True, True]


@pytest.mark.parametrize("start", [["inference.py"], ["-m", "paligemma"], ["-m", "paligemma", "annotate"]])
def test_every_program_has_the_version_and_the_help_of_what_was_typed(start):
    def ask(flag):
        return subprocess.run([sys.executable, *start, flag], cwd=ROOT, capture_output=True, text=True, check=True).stdout

    assert ask("--version") == f"paligemma {paligemma.__version__}\n"
    assert f"\n  python {' '.join(start)} " in ask("--help")


# Reading flags


@pytest.mark.parametrize(
    "text", ["cat # dog", "None", "[a]", "12", "1e3", "{'a': 1}", "'quoted'", "", "a=b", "-", "-1 or 1?", "日本", "a\nb"]
)
def test_text_is_taken_as_it_stands(text):
    assert read(f"--prompt={text}").prompt == text
    assert read("--prompt", text).prompt == text


@settings(max_examples=30)
@given(st.text())
def test_any_text_after_the_equals_sign_is_taken_as_it_stands(text):
    assert read("--prompt=" + text).prompt == text


@pytest.mark.parametrize(
    ("argv", "value"),
    [
        (["--do_sample"], True), (["--do_sample", "false"], False), (["--do_sample", "False"], False), (["--do_sample=0"], False),
        (["--do_sample", "no"], False), (["--do_sample", "true"], True), (["--do_sample=yes"], True), (["--nodo_sample"], False),
        (["--no_do_sample"], False), (["--no-do-sample"], False), (["--do-sample", "--json"], True), ([], False),
    ],
)  # fmt: skip
def test_yes_or_no(argv, value):
    assert read(*argv).do_sample is value


def test_numbers_and_what_is_neither():
    flags = read("--top_k", "7", "--temperature=1e-1")
    assert (flags.top_k, flags.temperature, flags.stream, flags.image_file_path) == (7, 0.1, None, "here")


def test_the_last_of_equal_flags_counts():
    assert read("--top_k=1", "--prompt=a", "--top_k", "2").top_k == 2


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--promt", "x"], "unknown flag --promt. Did you mean --prompt?"),
        (["--image", "x"], "unknown flag --image. Did you mean --image_file_path?"),
        (["--zzz=5"], "unknown flag --zzz. --help"),
        (["-p", "x"], "unknown flag -p."),
        (["--", "--interactive"], "unknown flag --."),
        (["--nojson=true"], "unknown flag --nojson"),
        (["--noprompt"], "unknown flag --noprompt"),
        (["--prompt", "what", "color"], "'color' belongs to no flag"),
        (["upper"], "'upper' belongs to no flag"),
        (["--json", "maybe"], "'maybe' belongs to no flag"),
        (["--prompt"], "--prompt needs a value"),
        (["--prompt", "--json"], "--prompt needs a value"),
        (["--top_k", "1.5"], "--top_k is '1.5', but a whole number is needed"),
        (["--top_k="], "--top_k is '', but a whole number is needed"),
        (["--temperature", "warm"], "--temperature is 'warm', but a number is needed"),
        (["--do_sample=perhaps"], "--do_sample is 'perhaps', but true or false is needed"),
    ],
)  # fmt: skip
def test_wrong_usage_is_refused_before_the_program_runs(argv, message, capsys):
    assert run(lambda _: pytest.fail("it ran"), *argv) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {message}") and err.count("\n") == 1


def test_help_names_every_flag_and_its_default(capsys):
    assert run(lambda _: pytest.fail("it ran"), "--json", "--help") == 0
    out, _ = capsys.readouterr()
    for name in signature(Flags).parameters:
        assert f"--{name}" in out
    assert out.startswith("Does nothing.") and "another (default: here)" in out and "a number (default: 0.8)" in out


@pytest.mark.parametrize(
    ("argv", "state"),
    [
        (["--json"], True), (["--json=true"], True), (["--json", "false"], False), (["--json=no"], False), (["--jso"], False),
        (["--json", "--json=false"], False), ([], False),
    ],
)  # fmt: skip
def test_is_on_reads_one_flag_of_a_line_that_may_be_wrong(argv, state):
    assert commandline.is_on("json", argv) is state


# Words without a flag


@dataclass(frozen=True, kw_only=True)
class Shared:
    """What several programs take.

    Args:
        size: how large
    """

    size: int = 3


@dataclass(frozen=True, kw_only=True)
class Wordy(Shared):
    """Takes words.

      program.py detect cat.png

    Args:
        words: what to do
        json: yes or no
    """

    words: commandline.Positional = ()
    json: bool = False


def read_wordy(*argv):
    return commandline.read_flags(Wordy, list(argv))


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["detect", "a.png", "cat ; dog"], ("detect", "a.png", "cat ; dog")), (["detect", "-"], ("detect", "-")), ([], ()),
        (["a", "--json", "b", "--size", "7", "c"], ("a", "b", "c")), (["None", "[1]", "a=b", ""], ("None", "[1]", "a=b", "")),
        (["a", "--", "--json", "-x", "--"], ("a", "--json", "-x", "--")), (["\udcff", "日本"], ("\udcff", "日本")),
    ],
)  # fmt: skip
def test_words_are_taken_as_they_stand_and_in_their_order(argv, words):
    assert read_wordy(*argv).words == words


@settings(max_examples=30)
@given(st.lists(st.text().filter(lambda word: not word.startswith("-"))))
def test_any_words_are_taken_as_they_stand(words):
    assert read_wordy(*words).words == tuple(words)


def test_flags_stand_anywhere_among_words():
    assert read_wordy("--size=5", "detect", "--json", "cat") == Wordy(words=("detect", "cat"), json=True, size=5)


@pytest.mark.parametrize("argv", [["--words=a"], ["--words", "a"], ["-x"], ["a", "--jsn"]])
def test_words_have_no_flag_and_mistyped_flags_are_still_refused(argv):
    with pytest.raises(UsageError, match="unknown flag"):
        read_wordy(*argv)


def test_a_class_may_check_its_words_before_anything_else(monkeypatch):
    def check(words):
        raise UsageError(f"{words} are no words.")

    monkeypatch.setattr(Wordy, "check_positional", staticmethod(check), raising=False)
    monkeypatch.setitem(sys.modules, "fire", None)  # whose import fails
    with pytest.raises(UsageError, match="no words"):
        read_wordy("a", "b")


@pytest.mark.parametrize("argv", [["detect", "--json", "cat"], ["--size=5"], ["--nojson", "a # b", "None"], []])
def test_flags_are_read_without_fire_as_with_it(monkeypatch, argv):
    with_fire = read_wordy(*argv)
    monkeypatch.setitem(sys.modules, "fire", None)  # whose import fails
    assert read_wordy(*argv) == with_fire
    with pytest.raises(UsageError, match="a whole number is needed"):
        read_wordy("--size=many")


def test_a_program_may_return_its_exit_code():
    for code in (0, 6, None):
        assert commandline.run(Wordy, lambda _, code=code: code, []) == (code or 0)


def test_help_groups_the_flags_of_base_classes_and_leaves_the_words_out(capsys):
    assert commandline.run(Wordy, lambda _: pytest.fail("it ran"), ["--help"]) == 0
    out = capsys.readouterr().out
    assert out == (
        "Takes words.\n\n  program.py detect cat.png\n\nFlags:\n  --json                          yes or no\n\n"
        "What several programs take:\n  --size N                        how large (default: 3)\n"
    )


@pytest.mark.parametrize("name", ["inference", "programs.annotate", "programs.cluster", "programs.doctor", "programs.finetune"])
def test_the_text_about_a_flag_never_touches_its_name(name):
    flags = importlib.import_module(f"paligemma.{name}").Flags
    texts = commandline.help_text(flags)
    for flag in signature(flags).parameters:
        if flag != "positional":
            assert re.search(rf"^  --{flag}( N| X| TEXT)?(  +\S|$)", texts, re.MULTILINE), flag
    assert max(map(len, texts.splitlines())) <= 130


def test_help_about_a_word_begins_with_that_topic(capsys):
    topics = {"detect": "Finds things.", "ocr": "Reads."}
    assert commandline.run(Wordy, lambda _: pytest.fail("it ran"), ["detect", "--help"], topics) == 0
    out = capsys.readouterr().out
    assert out.startswith("Finds things.\n\nFlags:\n  --json") and "program.py" not in out


# Errors


def fail(_):
    raise ImageError("cat.jpg is not there.\nLook again.", path="cat.jpg")


def test_an_error_is_one_line_and_its_code(capsys):
    assert run(fail) == 3
    assert capsys.readouterr() == ("", "error: cat.jpg is not there. Look again.\n")


def test_an_error_is_an_object_too_for_json(capsys):
    assert run(fail, "--json") == 3
    out, err = capsys.readouterr()
    message = "cat.jpg is not there.\nLook again."
    assert json.loads(out) == {"error": {"code": 3, "type": "ImageError", "message": message, "path": "cat.jpg"}}
    assert err.count("\n") == 1


def test_debug_shows_the_traceback(capsys):
    assert run(fail, "--debug") == 3
    err = capsys.readouterr().err
    assert "Traceback" in err and err.endswith("error: cat.jpg is not there. Look again.\n")


def test_a_long_message_is_cut_unless_debug_asks_for_the_whole(capsys):
    long = f"{'x' * 50_000} is too long. Shorten it."

    def program(_):
        raise ImageError(long, path=long)

    assert run(program, "--json") == 3
    out, err = capsys.readouterr()
    error = json.loads(out)["error"]
    assert err.startswith("error: xxx") and err.endswith("is too long. Shorten it.\n") and len(err) <= 501
    assert len(error["message"]) == 500 and error["message"].endswith("Shorten it.") and len(error["path"]) == 4096
    assert run(program, "--json", "--debug") == 3
    out, err = capsys.readouterr()
    assert f"error: {long}\n" in err and json.loads(out)["error"]["message"] == long


@pytest.mark.parametrize("length", range(490, 511))
def test_a_text_is_cut_to_just_what_fits(length):
    text = "".join(chr(97 + i % 26) for i in range(length))
    short = shorten(text)
    assert short == text if length <= 500 else len(short) == 500 and short[:300] == text[:300] and short[-100:] == text[-100:]


def test_a_count_agrees_with_what_it_counts():
    assert [counted(n, "row") for n in (0, 1, 2, 12_345)] == ["0 rows", "1 row", "2 rows", "12345 rows"]


def test_a_missing_package_is_named(capsys):
    def program(_):
        raise ModuleNotFoundError("No module named 'fire'", name="fire")

    assert run(program) == 6
    assert "error: the package 'fire' is not installed. Install it with pip install -r" in capsys.readouterr().err


def test_a_gpu_that_fails_is_6_and_no_bug(capsys):
    class AcceleratorError(RuntimeError):
        """As torch.AcceleratorError."""

    def program(_):
        raise AcceleratorError("CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be reported later")

    assert run(program) == 6
    assert capsys.readouterr().err == (
        "error: the GPU failed. CUDA error: an illegal memory access was encountered. python -m paligemma doctor checks what "
        "works on it; --graphs off or --device cpu may help.\n"
    )


def test_running_out_of_memory_is_6(capsys):
    def program(_):
        raise MemoryError

    assert run(program) == 6
    assert "error: memory ran out." in capsys.readouterr().err


def test_usage_errors_of_the_flags_own_check_are_2(capsys):
    def program(_):
        raise UsageError("--a and --b exclude each other. Drop one.")

    assert run(program) == 2
    assert capsys.readouterr().err == "error: --a and --b exclude each other. Drop one.\n"


# Output


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_control_characters_do_not_reach_a_terminal(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    commandline.write("a\x1b]0;title\x07b\x1b[2Jc\r\x9bd\x7f\té\n")
    assert terminal.getvalue() == "a]0;titleb[2Jcd\té\n"


def test_what_is_not_a_terminal_gets_the_text_as_it_is(capsys):
    commandline.write("a\x1b[2Jb\r")
    assert capsys.readouterr().out == "a\x1b[2Jb\r"


def test_notes_are_one_line_without_control_characters(capsys):
    commandline.note("a\x1b[2J\nb\r\nc")
    assert capsys.readouterr().err == "a[2J b c\n"


def test_logs_become_notes_and_python_warnings_only_when_verbose(capsys):
    import logging

    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    try:
        for is_verbose in (False, True):
            commandline.relay_logs(is_verbose)
            logging.getLogger("weights").info("a detail")
            logging.getLogger("weights").warning("a %s", "worry")
            logging.getLogger("py.warnings").warning("of a library")
    finally:
        logging.captureWarnings(False)
        root.handlers[:], root.level = before, level
    quiet, verbose = ["warning: a worry"], ["note: a detail", "warning: a worry", "warning: of a library"]
    assert capsys.readouterr().err.splitlines() == quiet + verbose


# In a process of its own

PROGRAM = """
import sys
from dataclasses import dataclass
from paligemma.programs import commandline

@dataclass(frozen=True, kw_only=True)
class Flags:
    prompt: str = ""
    json: bool = False
    debug: bool = False

def program(flags):
    {body}

sys.excepthook = commandline.report_bug
sys.exit(commandline.run(Flags, program))
"""


def start(tmp_path, body, *argv, **options):
    script = tmp_path / "program.py"
    script.write_text(PROGRAM.format(root=str(ROOT), body=body.replace("\n", "\n    ")))
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | options
    return subprocess.Popen([sys.executable, str(script), *argv], **options)


def finish(*arguments, **options):
    process = start(*arguments, **options)
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def test_a_bug_is_one_line_and_1(tmp_path):
    code, out, err = finish(tmp_path, "{}['missing']", "--json")
    assert code == 1 and err.startswith("error: internal error (program.py line ") and err.count("\n") == 1
    assert "KeyError" in err and "--debug" in err
    assert json.loads(out)["error"]["code"] == 1


def test_a_bug_shows_its_traceback_with_debug(tmp_path):
    code, _, err = finish(tmp_path, "{}['missing']", "--debug")
    assert code == 1 and "Traceback" in err and "KeyError" in err


def test_a_reader_that_goes_away_is_no_error(tmp_path):
    process = start(tmp_path, "for _ in range(10**6): commandline.write('x' * 1000)")
    process.stdout.read(10)
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait(timeout=120) == 141


def test_a_full_disk_is_7(tmp_path):
    if not os.path.exists("/dev/full"):
        return
    with open("/dev/full", "w") as full:
        code, _, err = finish(tmp_path, "commandline.write('answer')", stdout=full)
    assert code == 7 and err.startswith("error: stdout cannot be written. No space left on device.") and err.count("\n") == 1


@pytest.mark.parametrize("where", [">/dev/full", "2>/dev/full", ">/dev/full 2>/dev/full", ">&-", "2>&-", ">&- 2>&-", "| true"])
@pytest.mark.parametrize(("body", "code"), [("raise commandline.UsageError('no. Do it.')", 2), ("{}['missing']", 1)])
@pytest.mark.parametrize("flags", ["", "--json", "--json --debug"])
def test_reporting_an_error_never_fails(tmp_path, where, body, code, flags):
    start(tmp_path, body).communicate()
    script = f'"{sys.executable}" "{tmp_path / "program.py"}" {flags} {where}; exit ${{PIPESTATUS[0]}}'
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == code
    if "debug" not in flags:
        assert done.stderr.count("\n") == ("2>" not in where)


@pytest.mark.parametrize("place", ["import", "exit"])
def test_ctrl_c_is_quiet_before_the_program_runs_and_after(tmp_path, place):
    slow = "import sys, time\nprint('ready', flush=True)\ntime.sleep(60)"
    (tmp_path / "slow.py").write_text(slow)
    script = "import sys\nfrom paligemma.programs import commandline\ncommandline.leave_on_signals()\n"
    script += "import slow" if place == "import" else f"import atexit\natexit.register(exec, {slow!r}, {{}})\nsys.exit(0)"
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "-c", script], **pipes, text=True, env=environment)
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "")


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_closed_streams_are_no_error(tmp_path, closed):
    start(tmp_path, "commandline.write('answer'); commandline.note('note')").communicate()
    script = f'exec "{sys.executable}" "{tmp_path / "program.py"}" {closed}'
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0
    assert done.stdout == ("answer" if closed == "2>&-" else "") and done.stderr == ("note\n" if closed == ">&-" else "")


def test_a_posix_locale_gets_escapes(tmp_path):
    environment = os.environ | {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    code, out, err = finish(tmp_path, "commandline.write('caf\\xe9 \\u2603'); commandline.note('\\u2603')", env=environment)
    assert (code, out, err) == (0, "caf\\xe9 \\u2603", "\\u2603\n")


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_end_the_process_quietly_while_it_loads(tmp_path, signum, code):
    stubborn = "import time\ncommandline.write('ready\\n')\ntry: time.sleep(20)\nexcept BaseException: time.sleep(20)"
    process = start(tmp_path, stubborn)
    process.stdout.readline()
    process.send_signal(signum)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (code, "", "")


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_can_be_caught_to_keep_what_was_printed(tmp_path, signum, code):
    body = (
        "import time\ntry:\n  with commandline.interruptible():\n    commandline.write('half')\n    commandline.note('ready')\n"
        "    time.sleep(20)\nfinally: commandline.write('\\n')"
    )
    process = start(tmp_path, body)
    process.stderr.readline()
    process.send_signal(signum)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (code, "half\n", "")


def test_ctrl_c_at_a_prompt_is_never_lost(tmp_path):
    # Without repeated_signals 25 of 60 were, because the signal comes before readline begins to wait: 5 tries find that.
    body = "import readline\nwith commandline.interruptible(), commandline.repeated_signals(): input('> ')"
    for _ in range(5):
        ours, theirs = pty.openpty()
        process = start(tmp_path, body, stdin=theirs, stdout=theirs, stderr=theirs)
        os.close(theirs)
        shown = ""
        while "> " not in shown:
            shown += os.read(ours, 100).decode()
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 130
        os.close(ours)


def test_an_ignored_signal_stays_ignored(tmp_path):
    script = start(tmp_path, "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\ncommandline.write('alive')").args
    done = subprocess.run(["bash", "-c", 'trap "" INT; exec "$@"', "bash", *script], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "alive")


def test_a_terminal_shows_no_text_in_another_order_than_it_has():
    hidden = "\x1b\x9b\x07\r\x7f"
    hidden += "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\u200e\u200f\u061c\u200b\u2060\ufeff\u00ad\u2028\u2029"
    assert commandline.printable("".join(f"a{letter}" for letter in hidden)) == "a" * len(hidden)
    kept = "a\tb\nשלום مرحبا ک\u200cها \U0001f469\u200d\U0001f467 é 漢字 \u0600 \U000f0000"
    assert commandline.printable(kept) == kept
