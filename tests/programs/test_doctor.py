"""`paligemma doctor` as a program: table, JSON, exit codes, what it says on broken machines, and what it keeps private."""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch

from paligemma import devices
from paligemma.checkup import arithmetic, network, system
from paligemma.checkup.rows import FAILED, NOTE, OK, Row, failed
from paligemma.errors import DeviceError
from paligemma.layers import compiling, instruction_sets
from paligemma.programs import commandline, doctor
from tests.gpu.pretend import pretend
from tests.tiny_checkpoint import make_checkpoint

ROOT = Path(__file__).resolve().parents[2]
KEYS = {"paligemma", "state", "exit_code", "seconds", "checks"}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """The speed is not measured, and no program such as nvidia-smi is asked."""
    monkeypatch.setattr(arithmetic, "read_bandwidth", lambda _: 40e9)
    monkeypatch.setattr(arithmetic, "matrix_rate", lambda *_: 2e12)
    monkeypatch.setattr(arithmetic, "busy", lambda device: lambda: torch.ones(2, device=device) + 1)
    monkeypatch.setattr(system, "output_of", lambda *_: None)
    monkeypatch.setattr(devices, "missed_gpu", lambda: None)


@pytest.fixture
def short(monkeypatch):
    """Only the checks of the machine are made."""
    monkeypatch.setattr(doctor, "arithmetic_rows", lambda *_: [])
    monkeypatch.setattr(doctor, "model_rows", lambda *_: [])


def run(*argv):
    return commandline.run(doctor.Flags, doctor.program, list(argv))


def report(capsys, *argv):
    """The exit code, and the checks by name."""
    code = run(*argv, "--json")
    found = json.loads(capsys.readouterr().out)
    assert found.keys() == KEYS and found["exit_code"] == code
    for check in found["checks"]:
        assert check.keys() == {"group", "name", "value", "state", "advice"} and check["state"] in (OK, NOTE, FAILED)
        assert check["advice"] or check["state"] != FAILED
    return code, {check["name"]: check for check in found["checks"]}


# What is printed


def test_a_healthy_machine_gets_a_table_and_the_exit_code_0(capsys):
    assert run() == 0
    out = capsys.readouterr().out
    assert re.findall(r"^[a-z]+$", out, re.MULTILINE) == ["machine", "arithmetic", "model"]
    assert max(map(len, out.splitlines())) <= 100 and FAILED.upper() not in out
    assert re.search(r"^0 of \d+ lines failed(, \d+ notes?)?\. \d+\.\d s\.$", out.splitlines()[-1])
    for name in ("torch", "device", "cores", "int4 products", "tokenizer", "norms of vectors"):
        assert re.search(rf"^(ok|note) +{name} ", out, re.MULTILINE), name


def test_json_is_one_object_with_the_same_rows(capsys):
    code, found = report(capsys)
    assert code == 0
    assert {check["group"] for check in found.values()} == {"machine", "arithmetic", "model"}
    assert found["torch"]["value"].startswith(torch.__version__)


@pytest.mark.usefixtures("short")
def test_each_row_is_printed_as_soon_as_it_is_known(monkeypatch):
    printed, known = [], []
    monkeypatch.setattr(doctor, "write", printed.append)

    def rows(*_):
        for number in range(3):
            known.append(len("".join(printed)))
            yield Row(f"row {number}", "value")

    monkeypatch.setattr(doctor, "arithmetic_rows", rows)
    assert run() == 0
    assert known[0] < known[1] < known[2]


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize(("arithmetic_code", "model_code", "code"), [(None, None, 0), (6, None, 6), (None, 4, 4), (6, 4, 6)])
def test_the_exit_code_says_what_failed(monkeypatch, arithmetic_code, model_code, code):
    for name, found in (("arithmetic_rows", arithmetic_code), ("model_rows", model_code)):
        rows = [] if found is None else [failed("a check", "wrong", "Do this.", found)]
        monkeypatch.setattr(doctor, name, lambda *_, rows=rows: rows)
    assert run() == code


def test_a_broken_model_gives_4_and_its_name(tmp_path, capsys):
    folder = make_checkpoint(tmp_path / "mine")
    os.truncate(folder / "model.safetensors", 100)
    code, found = report(capsys, "--model_path", str(folder))
    assert code == 4 and found["weights"]["state"] == FAILED and found["int8 products"]["state"] == OK
    assert run("--model_path", str(folder)) == 4
    out = capsys.readouterr().out
    assert re.search(r"^FAILED +weights .*\n(.*\n)* +-> Download", out, re.MULTILINE)


@pytest.mark.parametrize("flag", ["--device=tpu", "--device=cuda:0,cuda:1", "--model_path=", "--jsn"])
def test_a_wrong_flag_is_2(flag):
    assert run(flag) == 2


def test_the_program_is_found_by_its_name_and_a_similar_one():
    meant = "Did you mean python -m paligemma doctor?"
    for words, code, text in ((["doctor", "--help"], 0, "Checks this machine"), (["doctr"], 2, meant)):
        done = subprocess.run([sys.executable, "-m", "paligemma", *words], cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert done.returncode == code and text in done.stdout + done.stderr


# Personal data


def test_the_output_holds_no_personal_data(tmp_path, monkeypatch, capsys):
    home = tmp_path / "zaphod"
    folder = make_checkpoint(home / "models" / "mine")
    os.truncate(folder / "model.safetensors", 100)
    monkeypatch.setenv("HOME", str(home))
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.setenv(name, "zaphod")
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / ".cache"))
    monkeypatch.setenv("HF_TOKEN", "hf_averysecrettoken")
    monkeypatch.setattr("paligemma.checkup.rows.socket.gethostname", lambda: "heart-of-gold")
    smi = "580.65.06, NVIDIA L4, 23034 MiB"
    monkeypatch.setattr(system, "output_of", lambda *command: smi if "nvidia-smi" in command else None)
    for flags in (["--json"], []):
        assert run("--model_path", str(folder), *flags) == 4
        said = capsys.readouterr()
        for secret in ("zaphod", "heart-of-gold", "averysecret", str(tmp_path), "GPU-"):
            assert secret not in said.out + said.err, secret
        assert "~/models/mine" in said.out and "NVIDIA L4" in said.out and re.search('hub token("|  )', said.out)
    queries = []
    monkeypatch.setattr(system, "output_of", lambda *command: queries.append(command))
    system.driver_rows()
    assert not {"uuid", "serial"} & set(re.split(r"\W", " ".join(queries[0])))


# GPUs


@pytest.mark.parametrize(("device", "capability"), [("cuda:0", (9, 0)), ("cuda:0", (8, 9)), ("mps", None)])
def test_a_healthy_pretended_gpu(monkeypatch, capsys, device, capability):
    monkeypatch.setattr(devices, "has_triton", lambda: True)
    options = {} if capability is None else {"capability": capability, "name": "NVIDIA X"}
    with pretend(device, late_copies=True, **options) as gpu:
        code, found = report(capsys)
        assert gpu.mismatches == []
    assert {name: check for name, check in found.items() if check["state"] == FAILED} == {} and code == 0
    assert found["device"]["value"].startswith(("cuda", "mps")) and found["order of copies"]["state"] == OK
    if capability:
        assert "NVIDIA X, sm_" in found["cuda:0"]["value"] and found["recorded steps"]["state"] == OK
        assert "bfloat16" in found["device"]["value"] and "CUDA graphs" in found["use of the device"]["value"]


@pytest.mark.usefixtures("short")
def test_a_card_that_the_wheel_does_not_know_is_failed(monkeypatch, capsys):
    monkeypatch.setattr(devices, "nvidia_hardware", lambda *_: devices.Hardware(580, (("NVIDIA P100", (6, 0)),)))
    with pretend("cuda:0", capability=(6, 0), name="NVIDIA P100"):
        monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_80"])
        code, found = report(capsys)
        assert code == 6 and "sm_60" in found["cuda:0"]["value"] and "--index-url" in found["cuda:0"]["advice"]
        assert found["device"]["value"].startswith("cpu (--device auto)")
        code, found = report(capsys, "--device", "cuda:0")
        assert code == 6 and found["device"]["value"].startswith("cpu")


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("device", ["auto", "cpu", "cuda"])
def test_a_gpu_that_torch_cannot_use_is_failed_unless_the_cpu_was_asked_for(monkeypatch, capsys, device):
    text = "The CPU is used although this machine has an NVIDIA GPU. It is a CPU build. Run: pip install torch --index-url X"
    monkeypatch.setattr(devices, "missed_gpu", lambda: text)
    code, found = report(capsys, "--device", device)
    assert code == (0 if device == "cpu" else 6)
    assert found["GPU"]["state"] == (NOTE if device == "cpu" else FAILED)
    assert "CPU build" in found["GPU"]["value"] and (device == "cpu" or "--index-url" in found["GPU"]["advice"])


# Broken installations


def run_without(tmp_path, *packages, error="ModuleNotFoundError(f'No module named {name}', name=name)", flags=("--json",)):
    """Runs the program in a process in which these packages cannot be imported. Returns the exit code and the checks."""
    code = (
        "import sys\n"
        "class Breaks:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.partition('.')[0] in {packages!r}:\n"
        f"            raise {error}\n"
        "sys.meta_path.insert(0, Breaks())\n"
        "from paligemma.programs import doctor\n"
        "sys.exit(doctor.main())\n"
    )
    command, environment = [sys.executable, "-c", code, *flags], os.environ | {"HOME": str(tmp_path)}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, env=environment)
    assert "Traceback" not in done.stderr, done.stderr
    found = json.loads(done.stdout) if done.stdout.startswith("{") else {"checks": []}
    return done.returncode, {check["name"]: check for check in found["checks"]}


@pytest.mark.parametrize(
    "error",
    ["ModuleNotFoundError('No module named torch', name='torch')", "OSError('libcudart.so.13: cannot open shared object')"],
)
def test_a_torch_that_cannot_be_imported_is_a_failed_row(tmp_path, error):
    code, found = run_without(tmp_path, "torch", error=error)
    assert code == 6 and found["torch"]["state"] == FAILED and "requirements.txt" in found["torch"]["advice"]
    assert error.partition("(")[0] in found["torch"]["value"]
    assert found["other checks"]["state"] == NOTE and found["packages"]["state"] == OK


@pytest.mark.parametrize("package", ["numpy", "safetensors", "tokenizers", "PIL", "huggingface_hub"])
def test_a_missing_package_is_a_failed_row(tmp_path, package):
    code, found = run_without(tmp_path, package)
    name = system.NEEDED[package]
    assert code == 6 and found[name]["state"] == FAILED and "requirements.txt" in found[name]["advice"]
    assert found["torch"]["state"] == OK and found["cores"]["state"] == OK


def test_it_runs_without_fire_and_transformers(tmp_path):
    code, found = run_without(tmp_path, "fire", "transformers", flags=("--json", "--device=cpu"))
    assert code == 0 and found["fire"]["state"] == NOTE and found["tokenizer"]["state"] == OK


@pytest.mark.usefixtures("short")
def test_an_old_torch_is_a_failed_row(monkeypatch, capsys):
    monkeypatch.setattr(torch, "__version__", "2.8.1+cpu")
    code, found = report(capsys)
    assert code == 6 and "2.8.1+cpu is too old" in found["torch"]["value"] and "pip install" in found["torch"]["advice"]


@pytest.mark.usefixtures("short")
def test_a_machine_without_a_compiler_and_with_folders_that_cannot_be_written(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(compiling, "find_compiler", list)
    monkeypatch.setattr(compiling, "cache_folders", lambda: iter(()))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "file" / "hub"))
    (tmp_path / "file").write_text("")
    code, found = report(capsys)
    assert found["C++ compiler"]["state"] == NOTE and "g++" in found["C++ compiler"]["advice"]
    assert found["cache of kernels"]["state"] == NOTE
    assert found["cache of the hub"]["state"] == FAILED and "HF_HOME" in found["cache of the hub"]["advice"] and code == 7


@pytest.mark.usefixtures("short")
def test_an_exception_in_a_check_is_a_failed_row_and_debug_prints_its_traceback(monkeypatch, capsys):
    def broken():
        raise DeviceError("the group has no name. Give it one.")

    monkeypatch.setattr(instruction_sets, "cpu_flags", broken)
    code, found = report(capsys)
    assert code == 6 and found["cores"] == {
        "group": "machine", "name": "cores", "value": "the group has no name.", "state": FAILED, "advice": "Give it one.",
    }  # fmt: skip
    assert run("--debug") == 6
    assert "Traceback" in capsys.readouterr().err


def test_an_interrupted_check_leaves_no_temporary_folder(monkeypatch, tmp_path):
    def interrupted(folder, *_):
        assert folder.parent == tmp_path
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(arithmetic, "model_rows", interrupted)
    assert run() == 130 and list(tmp_path.glob("paligemma-*")) == []


def test_a_device_that_is_not_compiled_for_gets_a_note(capsys):
    code, found = report(capsys, "--compile", "--device", "cpu")
    assert code == 0 and found["torch.compile"]["state"] == NOTE and "cpu does not use it" in found["torch.compile"]["value"]
    assert "torch.compile" not in report(capsys)[1]


# The hub


@pytest.mark.usefixtures("short")
def test_the_hub_is_asked_only_on_request(monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(network, "hub_rows", lambda name: asked.append(name) or [failed("hub", "gone", "Look.", 5)])
    assert report(capsys)[0] == 0 and asked == []
    code, found = report(capsys, "--network")
    assert code == 5 and asked == [None] and found["hub"]["group"] == "hub"
