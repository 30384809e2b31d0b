"""launch_inference.sh and run_tests.sh: from any folder, twice, with spaces in the path, after an interruption. Every script in
demo, notes and benchmarks answers --help and a wrong flag before it does anything.

Nothing is installed here. A copy of the shell scripts gets a fake python, which logs its calls, makes a .venv that contains
itself, and does what pip would do.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("launch_inference.sh", "run_tests.sh", "make_venv.sh", "requirements.txt", "requirements-dev.txt")
CLASSIC = "MODEL_PATH PROMPT IMAGE_FILE_PATH MAX_TOKENS_TO_GENERATE TEMPERATURE TOP_P DO_SAMPLE ONLY_CPU".split()
PYTEST = ["[-m]", "[pytest]", "[-n]", "[auto]", "[--dist]", "[loadfile]"]  # what run_tests.sh calls

STAND_IN = """#!/usr/bin/env bash
# A fake python with venv and pip. FAKE_VERSION=old is Python 3.9; FAKE_PIP=hang never finishes, FAKE_PIP=fail fails,
# FAKE_PIP=slow takes a second.
echo "$(basename "$0"): $*" >>"$FAKE_LOG"
case "$*" in
*version_info*) [ "${FAKE_VERSION:-}" != old ] ;;
"-m venv --clear "*) rm -rf "$4"; mkdir -p "$4/bin"; cp "$0" "$4/bin/python" ;;
"-m pip --version") ;;
"-m pip install "*)
    case "${FAKE_PIP:-}" in
    hang) echo started >"$FAKE_LOG.hang"; sleep 60 ;;
    fail) exit 1 ;;
    slow) sleep 1 ;;
    esac ;;
*) for argument in "$@"; do printf '[%s]\\n' "$argument"; done ;;
esac
"""


@pytest.fixture
def clone(tmp_path):
    """A clone in a folder with spaces, and an environment with the fake python."""
    folder = tmp_path / "a clone with spaces"
    folder.mkdir()
    for name in SCRIPTS:
        shutil.copy(ROOT / name, folder / name)
    (tmp_path / "bin").mkdir()
    stand_in = tmp_path / "bin" / "python3"
    stand_in.write_text(STAND_IN)
    stand_in.chmod(0o755)
    clean = {key: value for key, value in os.environ.items() if key not in CLASSIC}
    environment = clean | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "FAKE_LOG": str(tmp_path / "log")}
    return folder, environment


def run(clone, script, *arguments, cwd="/", **variables):
    folder, environment = clone
    command = ["bash", str(folder / script), *arguments]
    return subprocess.run(command, cwd=cwd, env=environment | variables, capture_output=True, text=True, timeout=120)


def calls(clone):
    """The calls of python so far."""
    log = Path(clone[1]["FAKE_LOG"])
    return log.read_text().splitlines() if log.exists() else []


def installs(clone):
    return [call for call in calls(clone) if "pip install" in call]


def test_first_run_installs_and_starts_inference_with_the_arguments_as_they_are(clone):
    arguments = ["--prompt", "a  b $HOME * 'c'", "--image_file_path=my cat.jpg", ""]
    done = run(clone, "launch_inference.sh", *arguments)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"[{clone[0] / 'inference.py'}]", *(f"[{argument}]" for argument in arguments)]
    assert len(installs(clone)) == 1 and installs(clone)[0].endswith(f"-r {clone[0] / 'requirements.txt'}")


def test_second_run_calls_nothing_but_inference(clone):
    run(clone, "launch_inference.sh")
    before = len(calls(clone))
    done = run(clone, "launch_inference.sh", "--json")
    assert done.stderr == ""
    assert calls(clone)[before:] == [f"python: {clone[0] / 'inference.py'} --json"]


def test_run_tests_installs_what_tests_need_and_calls_pytest_in_the_root(clone):
    done = run(clone, "run_tests.sh", "-k", "one thing")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [*PYTEST, "[-k]", "[one thing]"]
    assert installs(clone)[0].endswith(f"-r {clone[0] / 'requirements-dev.txt'}")
    run(clone, "launch_inference.sh")
    run(clone, "run_tests.sh")
    assert len(installs(clone)) == 1  # the packages of the tests include those of running


def test_changed_requirements_are_installed(clone):
    run(clone, "launch_inference.sh")
    with open(clone[0] / "requirements.txt", "a") as file:
        file.write("another\n")
    run(clone, "launch_inference.sh")
    run(clone, "launch_inference.sh")
    assert len(installs(clone)) == 2
    assert len([call for call in calls(clone) if "-m venv" in call]) == 1  # what is there is kept


def test_failed_install_is_an_error_and_the_next_run_starts_again(clone):
    done = run(clone, "launch_inference.sh", FAKE_PIP="fail")
    assert done.returncode != 0 and done.stdout == ""
    assert run(clone, "launch_inference.sh").returncode == 0
    assert len([call for call in calls(clone) if "-m venv" in call]) == 2


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_interrupted_install_is_finished_by_the_next_run(clone, signum):
    folder, environment = clone
    process = subprocess.Popen(
        ["bash", str(folder / "launch_inference.sh")], env=environment | {"FAKE_PIP": "hang"}, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not Path(environment["FAKE_LOG"] + ".hang").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signum)
    process.communicate(timeout=120)
    assert process.returncode != 0
    assert run(clone, "launch_inference.sh").returncode == 0
    assert len([call for call in calls(clone) if "-m venv" in call]) == 2  # pip takes half a package for a whole one
    assert len(installs(clone)) == 2
    run(clone, "launch_inference.sh")
    assert len(installs(clone)) == 2


def test_of_two_first_runs_at_once_one_installs(clone):
    folder, environment = clone
    if shutil.which("flock") is None:
        return
    command = ["bash", str(folder / "launch_inference.sh"), "--json"]
    both = [subprocess.Popen(command, env=environment | {"FAKE_PIP": "slow"}, stdout=subprocess.PIPE) for _ in range(2)]
    assert [process.communicate(timeout=120)[0].endswith(b"[--json]\n") for process in both] == [True, True]
    assert len(installs(clone)) == 1


def test_a_venv_whose_python_is_gone_is_made_again(clone):
    run(clone, "launch_inference.sh")
    (clone[0] / ".venv" / "bin" / "python").unlink()
    assert run(clone, "launch_inference.sh").returncode == 0
    assert len(installs(clone)) == 2


def test_old_python_is_refused_in_one_line(clone):
    done = run(clone, "launch_inference.sh", FAKE_VERSION="old")
    assert done.returncode == 6
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("error: Python 3.10 or newer is needed")
    assert not (clone[0] / ".venv").exists()


def test_variables_become_the_classic_flags_before_the_arguments(clone):
    done = run(clone, "launch_inference.sh", "--prompt=typed", **{name: f"{name.lower()} value" for name in CLASSIC})
    expected = [f"[--{name.lower()}={name.lower()} value]" for name in CLASSIC]  # of two equal flags inference.py takes the last
    assert done.stdout.splitlines()[1:] == [*expected, "[--prompt=typed]"]


def test_unset_and_empty_variables_set_no_flag(clone):
    assert run(clone, "launch_inference.sh", PROMPT="").stdout.splitlines() == [f"[{clone[0] / 'inference.py'}]"]


def test_the_program_is_told_how_it_was_started(clone, tmp_path):
    stand_in = tmp_path / "bin" / "python3"
    stand_in.write_text(STAND_IN.replace("*) for argument", '*) echo "$PALIGEMMA_COMMAND"; for argument'))
    first = run(clone, "launch_inference.sh").stdout.splitlines()[0]
    path = str(clone[0] / "launch_inference.sh").replace(" ", "\\ ")
    assert first == f"bash {path}"


def test_relative_paths_and_the_callers_folder_are_kept(clone, tmp_path):
    folder, environment = clone
    command = ["bash", os.path.relpath(folder / "launch_inference.sh", tmp_path), "--image_file_path=cat.jpg"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[--image_file_path=cat.jpg]"


def test_ci_runs_the_tests_without_a_terminal(clone):
    (clone[0] / ".ci").mkdir()
    shutil.copy(ROOT / ".ci" / "run", clone[0] / ".ci" / "run")
    assert run(clone, ".ci/run").stdout.splitlines() == PYTEST


@pytest.fixture
def launch(tmp_path):
    """Starts the launch_inference.sh of a clone that has this environment, in a folder of its own, without classic variables."""
    clone = tmp_path / "a clone with spaces"
    (clone / ".venv" / "bin").mkdir(parents=True)
    for path in ROOT.iterdir():
        if path.name not in (".git", ".venv"):
            (clone / path.name).symlink_to(path)
    shutil.copy(ROOT / "requirements.txt", clone / ".venv")
    python = clone / ".venv" / "bin" / "python"
    python.write_text(f'#!/usr/bin/env bash\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    clean = {key: value for key, value in os.environ.items() if key not in CLASSIC}

    def start(*arguments, **variables):
        command = ["bash", str(clone / "launch_inference.sh"), *arguments]
        return subprocess.run(command, cwd=tmp_path, env=clean | variables, capture_output=True, text=True, timeout=300)

    return start


def test_launch_answers_about_the_bundled_picture_with_the_bundled_checkpoint(launch):
    done = launch("--json", MAX_TOKENS_TO_GENERATE="20")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["model"].endswith("paligemma/bundled") and answer["text"] and len(answer["token_ids"]) <= 20
    assert "paligemma/bundled/shapes.png" in done.stderr


def test_launch_shows_itself_in_help_and_in_messages(launch, tmp_path):
    command = "bash " + str(tmp_path / "a clone with spaces" / "launch_inference.sh").replace(" ", "\\ ")
    assert f"\n  {command} detect street.jpg" in launch("--help").stdout
    done = launch("cat.png")
    assert done.returncode == 2 and f" {command} caption cat.png." in done.stderr


def test_launch_takes_verbs_and_variables_about_the_model(launch, tmp_path):
    picture, model = str(ROOT / "examples" / "shapes.png"), str(ROOT / "paligemma" / "bundled")
    done = launch("detect", picture, "circle", "--save", "out.png", MODEL_PATH=model, ONLY_CPU="true")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("circle\t") and (tmp_path / "out.png").exists()


def test_scripts_can_be_executed():
    for name in ("launch_inference.sh", "run_tests.sh", ".ci/run"):
        assert os.access(ROOT / name, os.X_OK), name


@pytest.mark.parametrize("name", ["finetune", "annotate", "cluster"])
def test_a_program_that_moved_says_what_to_type(name):
    done = subprocess.run([sys.executable, str(ROOT / f"{name}.py"), "--help"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and f"Type: python -m paligemma {name} " in done.stderr


PYTHON_SCRIPTS = [
    path.relative_to(ROOT).as_posix()
    for folder in ("notes", "demo", "benchmarks")
    for path in sorted((ROOT / folder).glob("*.py"))
    if "__main__" in path.read_text(encoding="utf-8")
]
# Runs a script with --help and with a wrong flag. torch and transformers cannot be imported; whatever changes files is printed.
ASKED = """
import os, runpy, sys

def watch(event, arguments):
    writes = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
    if writes or event in ("subprocess.Popen", "os.remove", "os.rename", "os.mkdir", "os.fork"):
        os.write(2, f"it did {event} {arguments}\\n".encode())

sys.modules["torch"] = sys.modules["transformers"] = None
name = sys.argv[1]
sys.addaudithook(watch)
for flag, code in (("--help", 0), ("--nonsense", 2)):
    sys.argv = [name, flag]
    try:
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        assert end.code == code, end.code
    else:
        raise AssertionError("it ran")
"""


@pytest.mark.parametrize("script", PYTHON_SCRIPTS)
def test_a_script_answers_help_and_a_wrong_flag_before_it_imports_torch_or_does_anything(script):
    name = script.removesuffix(".py").replace("/", ".")
    done = subprocess.run([sys.executable, "-B", "-c", ASKED, name], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "it did" not in done.stderr, done.stderr
    assert done.stdout.startswith("usage: ") and done.stderr.startswith("usage: ")


@pytest.mark.parametrize("flag", ["--help", "--nonsense"])
@pytest.mark.parametrize("script", ["benchmarks/all.sh", "benchmarks/gpu.sh", "demo/recipe.sh"])
def test_a_shell_script_answers_help_and_a_wrong_flag_before_it_does_anything(script, flag, tmp_path):
    environment = {"PATH": os.environ["PATH"], "PYTHON": "/nowhere/python", "TMPDIR": str(tmp_path)}
    done = subprocess.run(["bash", str(ROOT / script), flag], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == (0 if flag == "--help" else 2)
    assert f"bash {script}" in done.stdout if flag == "--help" else done.stderr.count("\n") == 1
    assert not (ROOT / flag).exists()


def test_an_installation_keeps_the_versions_that_are_there_and_brings_nothing_that_is_never_imported():
    from importlib.metadata import version

    from packaging.requirements import Requirement

    block = re.search(r"dependencies = \[\n(.*?)\]", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.DOTALL)[1]
    ranges = {each.name: each for each in map(Requirement, re.findall(r'"(.*)",\n', block))}
    lines = [line.split("#")[0].strip() for line in (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()]
    tested = {each.name: each for each in map(Requirement, filter(None, lines))}
    assert set(tested) - set(ranges) == {"transformers"} and set(ranges) <= set(tested)
    assert not any(part.operator in ("==", "===", "~=") for each in ranges.values() for part in each.specifier)
    assert all(each.specifier.contains(version(name)) for name, each in ranges.items())
