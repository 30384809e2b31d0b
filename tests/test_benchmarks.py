"""The scripts of benchmarks/ work on a tiny checkpoint, with few rounds. No speed is asserted.

Two sides are started once, and every script uses them instead of starting its own.
"""

import contextlib
import gc
import itertools
import json
import os
import runpy
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ROOT / "benchmarks"
SIDES = ["ours bf16", "transformers bf16"]


@pytest.fixture(scope="module")
def tools():
    """The modules of benchmarks/, imported under one thread."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.syspath_prepend(str(BENCHMARKS))
        from benchmarks import make_checkpoint, sides, turns

        yield {"make_checkpoint": make_checkpoint, "sides": sides, "turns": turns}


@pytest.fixture(scope="module")
def folder(tools, tmp_path_factory):
    path = tmp_path_factory.mktemp("bench") / "tiny"
    tools["make_checkpoint"].write_checkpoint(path, size="tiny")
    return path


@pytest.fixture(scope="module")
def pair(tools, folder):
    """Our side and transformers', loaded, each in its own process."""
    with tools["turns"].start(SIDES, folder, "cpu") as sides:
        yield sides


@pytest.fixture
def run(tools, folder, pair, monkeypatch, capsys):
    """Runs a script in this process with the two sides above. Returns its document and its output."""
    turns = tools["turns"]

    @contextmanager
    def start(names, model, device):  # noqa: ARG001  (the signature is that of turns.start)
        yield {name: pair.get(name, pair["ours bf16"]) for name in names}

    def run_script(script: str, *flags: str) -> tuple[dict, str]:
        monkeypatch.setattr(turns, "start", start)
        arguments = ["--model", str(folder), "--quick", "--sides", ",".join(SIDES), *flags]
        monkeypatch.setattr(sys, "argv", [str(BENCHMARKS / f"{script}.py"), *arguments])
        capsys.readouterr()
        runpy.run_path(sys.argv[0], run_name="__main__")
        printed = capsys.readouterr().out
        return json.loads(printed.splitlines()[-1]), printed

    return run_script


def test_decode_gives_each_side_its_floor_and_its_ratio(run):
    document, printed = run("decode")
    assert set(document["ways"]) == {*SIDES, "transformers bf16, mkldnn off"}
    for row in document["ways"].values():
        assert row["share"] == pytest.approx(row["floor"] / row["ms"]["median"], rel=1e-2)
        assert (
            0 < row["floor"] and 0 < row["ms"]["low"] <= row["ms"]["median"] <= row["ms"]["high"] and row["ratio"]["median"] > 0
        )
    assert document["floors"]["read_GB_per_s"] > 0 and "transformers" in document["versions"]
    assert "ours bf16" in printed and document["command"].startswith("python -m benchmarks.decode --model")


@pytest.fixture
def fake_python(tmp_path):
    """An interpreter that has every library: it imports everything and replies to everything."""
    interpreter, script = tmp_path / "python", tmp_path / "script.py"
    script.write_text(
        "import sys\nfor _ in sys.stdin if '--serve' in sys.argv else ():\n"
        """    print('{"seconds": 0.5, "version": "1.0"}', flush=True)\n"""
    )
    interpreter.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{script}" "$@"\n')  # the path may hold a space
    interpreter.chmod(0o755)
    return str(interpreter)


def test_peers_are_compared_with_as_many_bits(run, fake_python, folder):
    from safetensors.torch import load_file

    document, printed = run("peers", "--openvino", fake_python, "--onnxruntime", fake_python)
    assert list(document["peers"]) == ["OpenVINO int8", "OpenVINO int4", "ONNX Runtime int8", "ONNX Runtime int4"]
    assert "times as fast as ONNX Runtime int4" in printed
    assert list(document["ways"])[:2] == ["OpenVINO int8", "ours int8, beside OpenVINO int8"]
    assert document["ways"]["OpenVINO int8"]["ms"]["median"] == 250  # two tokens
    text = load_file(folder.with_name(f"{folder.name}-text") / "model.safetensors")  # what the libraries export
    assert "model.embed_tokens.weight" in text and not any("vision" in name for name in text)


def test_llama_is_compared_with_as_many_bits(run, tmp_path, fake_python):
    document, printed = run("llama", "--gguf", str(tmp_path), "--python", fake_python)
    for theirs, name in (("llama.cpp BF16", "ours bf16"), ("llama.cpp Q8_0", "ours int8"), ("llama.cpp Q4_0", "ours int4")):
        assert document["ways"][theirs]["ratio"]["median"] == 1 < document["ways"][name]["ratio"]["median"]
        assert document["ways"][theirs]["floor"] > 0 and document["ways"][name]["floor"] > 0
    assert document["llama_cpp_python"] == "1.0" and "times as fast as llama.cpp Q4_0" in printed


def test_llama_names_the_packages_that_are_missing(folder):
    command = [sys.executable, "-m", "benchmarks.llama", "--model", str(folder), "--python", "false"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr.startswith("false cannot import gguf and llama_cpp,") and result.stderr.count("\n") == 1


@pytest.fixture
def same_processes(pair, monkeypatch, tools):
    """A script that starts a side of its own gets the one that runs already, and does not end it."""
    monkeypatch.setattr(tools["turns"], "Side", lambda name, *_: pair[name])
    for side in pair.values():
        monkeypatch.setattr(side, "close", lambda: None)


@pytest.mark.usefixtures("same_processes")
def test_prefill_is_tower_and_decoder(run):
    document, _ = run("prefill")
    for side in SIDES:
        assert document["cold"][side]["ms"]["median"] > document["cold"][side]["floor"] > 0
        whole, tower, decoder = (document[part][side]["ms"]["median"] for part in ("whole", "tower", "decoder"))
        assert decoder == pytest.approx(whole - tower, rel=1e-2)
    assert document["decoder"][SIDES[0]]["floor"] > document["tower"][SIDES[0]]["floor"] > 0


def test_batch_counts_pictures(run):
    document, _ = run("batch", "--rows", "1,2", "--pictures", "3")
    assert set(document["rows"]) == {"1", "2"} and set(document["best_pictures_per_s"]) == set(SIDES)


def test_growth_goes_through_contexts_and_sizes(run):
    document, _ = run("growth")
    assert [run["tokens"] for run in document["context"]] == [266, 512] and [run["layers"] for run in document["layers"]] == [
        1,
        2,
    ]


def test_quality_of_a_form_is_its_distance_from_float32(run):
    document, _ = run("quality", "--count", "0")
    rows = document["logits"]
    assert rows["ours fp32"]["relative_distance"] == 0 and rows["ours bf16"]["same_best"] == 1


@pytest.mark.usefixtures("same_processes")
def test_memory_counts_what_is_mapped(run):
    document, _ = run("memory")
    row = document["ways"]["ours bf16"]
    assert row["peak_GB"] == row["VmHWM"] > row["weights_GB"] > 0


def test_start_asks_both_for_the_same_token(folder, tmp_path):
    from PIL import Image

    Image.new("RGB", (32, 32), "red").save(tmp_path / "red.png")
    command = [sys.executable, "-m", "benchmarks.start", "--model", str(folder), "--quick", "--sides", ",".join(SIDES)]
    command += ["--picture", str(tmp_path / "red.png")]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert set(json.loads(output.splitlines()[-1])["ways"]) == {*SIDES, "import torch"}


def test_the_plot_of_a_class_is_drawn_from_what_was_stored(run, tools, tmp_path, monkeypatch):
    monkeypatch.setattr(tools["turns"], "HERE", tmp_path)
    for script in ("decode", "growth"):
        run(script, "--save")
    folder = tmp_path / "results" / tools["turns"].class_of("cpu")
    assert sorted(file.name for file in folder.iterdir()) == ["decode.json", "growth.json"]
    monkeypatch.setattr(sys, "argv", ["plot.py"])
    from benchmarks import plot

    monkeypatch.setattr(plot, "HERE", tmp_path)
    plot.main()
    assert (folder / "speed.svg").read_text().count("<rect") == 7  # the sheet, three bars, three floors


def test_sides_that_say_different_tokens_stop_the_script(tools):
    with pytest.raises(SystemExit, match="same tokens"):
        tools["turns"].require_same({"a": {"tokens": [1, 2]}, "b": {"tokens": [1, 3]}})


def test_generate_waits_between_turns(pair):
    """Else transformers would compute its next token while the other side is measured."""
    side = pair["transformers bf16"]
    assert side.ask("begin", context=266, most=4)["tokens"] == [108]
    assert side.ask("decode", count=2)["tokens"] == [108, 108]
    assert side.ask("begin", context=270, most=2)["tokens"] == [108]  # the first answer was never finished


def test_rows_end_at_their_own_length_on_both_sides(pair):
    for side in pair.values():
        answers = side.ask("batch", rows=2, lengths=[3, 1, 2], context=266)["tokens"]
        assert [len(answer) for answer in answers] == [3, 1, 2]


def test_cpu_agrees_with_itself():
    command = [sys.executable, "-m", "benchmarks.agree", "--device", "cpu"]
    output = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}).stdout
    rows = json.loads(output.splitlines()[-1])["rows"]
    assert [row["distance"] for row in rows if row["way"] == "device"] == [0] * 8
    assert {row["way"] for row in rows} == {"device", "recorded", "open", "masked", "open, capped", "masked, capped"}
    assert all(row["is_fine"] for row in rows)


def test_a_gpu_agrees_with_the_cpu(folder):
    """On a simulated GPU: recorded steps are really used, and none of the unquantised variants differs."""
    from benchmarks import agree
    from tests.gpu.pretend import pretend

    with pretend("cuda:0"):
        rows = list(itertools.islice(agree.compare_precisions(folder, "paligemma", "cuda:0"), 4))
        gc.collect()  # models refer to themselves, and must be freed while the GPU exists
    assert [(row["way"], row["form"]) for row in rows] == [
        (way, form) for form in ("fp32", "bf16") for way in ("device", "recorded")
    ]
    assert all(row["distance"] <= row["bound"] and row["is_as_intended"] for row in rows), rows


def test_a_comparison_that_raises_is_wrong_and_the_next_ones_follow():
    from benchmarks import agree

    def fails():
        yield {"way": "first"}
        raise RuntimeError("no kernel\nmore")

    rows = [*agree.attempts("paligemma", fails()), *agree.attempts("attention", iter([{"way": "last"}]))]
    assert [row["way"] for row in rows] == ["first", "RuntimeError: no kernel", "last"] and not rows[1]["is_as_intended"]


@pytest.fixture
def floors(tools, monkeypatch):
    """Floors of a machine whose rates in each measurement are the numbers that the test appends to the list `rates`."""
    from paligemma import roofline

    rates = [5.0]
    monkeypatch.setattr(roofline, "read_bandwidth", lambda _: rates[-1])
    monkeypatch.setattr(roofline, "matrix_rate", lambda _, dtype: rates[-1] * dtype.itemsize)
    made = tools["turns"].Floors("cpu")
    made.rates = rates
    made.beside = {"a": [], "b": []}
    return made


def test_a_floor_is_computed_from_the_rates_beside_the_turn(floors):
    for rate in (2.0, 4.0, 3.0, 3.0):
        floors.rates.append(rate)
        floors.measure("a" if rate < 4 else "b")
    assert [rates["read"] for rates in floors.beside["a"]] == [5, 4, 3] and floors.beside["b"][0]["read"] == 4
    assert floors.best == {"read": 5, "float32": 20, "bfloat16": 10, "int8": 5}
    assert floors.least({"a": [99.0] * 3}, lambda _, rates: 100 / rates["bfloat16"]) == {"a": [10] * 3}
    seconds = {"a": [70.0, 80.0, 90.0], "b": [90.0]}
    assert floors.least(seconds, lambda _, rates: 240 / rates["read"]) == {"a": [48, 60, 80], "b": [60]}
    assert floors.document()["read_GB_per_s"] == 0 and floors.reading(20) == 4


def test_a_floor_that_was_beaten_is_measured_again(floors):
    floors.rates.append(1.0)
    floors.measure()
    floors.measure("a")
    floors.rates.append(20.0)
    assert floors.least({"a": [50.0]}, lambda _, rates: 240 / rates["read"]) == {"a": [48]}  # the best of all measurements
    assert floors.least({"a": [14.0]}, lambda _, rates: 240 / rates["read"]) == {"a": [12]}  # a new measurement
    with pytest.raises(SystemExit, match="^a took 11 s, less than the floor of 12 s"):
        floors.least({"a": [11.0]}, lambda _, rates: 240 / rates["read"])


def test_a_copy_has_a_bandwidth(tools):
    assert tools["turns"].copy_bandwidth(tools["sides"].torch.device("cpu"), size=2**20) > 10**8


def test_sides_that_work_at_the_same_time_say_the_same(pair, tools):
    for side in pair.values():
        side.ask("begin", context=266, most=9)
    replies = tools["turns"].together(pair, "decode", count=3)
    assert {name: reply["tokens"] for name, reply in replies.items()} == dict.fromkeys(SIDES, [108] * 3)


def test_a_grammar_is_measured_where_it_changes_nothing():
    command = [sys.executable, "-m", "benchmarks.grammar_cost", "--quick", "--rows", "2"]
    output = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}).stdout
    document = json.loads(output.splitlines()[-1])
    for rows in (document["rows"]["2"], document["demo"]):
        assert set(rows) == {"free", "moments", "constrained", "constrained, moments"}
        assert all(row["us"]["median"] > 0 for row in rows.values()) and rows["free"]["added_us"]["median"] == 0


def test_a_random_checkpoint_has_the_published_size(tools):
    from paligemma.checkpoints.weights import empty_model
    from paligemma.configuration import PaliGemmaConfig

    config = PaliGemmaConfig.from_hf(tools["make_checkpoint"].make_config("paligemma", "3b", 224, None))
    assert sum(parameter.numel() for parameter in empty_model(config).parameters()) == 2_923_466_480


def test_gpu_script_says_when_there_is_nothing_to_measure():
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHON": sys.executable}
    result = subprocess.run(["bash", str(BENCHMARKS / "gpu.sh")], capture_output=True, text=True, env=environment)
    assert result.returncode == 6 and "no CUDA device" in result.stderr


def test_gpu_script_says_when_its_interpreter_has_no_torch(tmp_path):
    (tmp_path / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "$@"\n')  # without the installed packages
    (tmp_path / "python").chmod(0o755)
    environment = os.environ | {"PYTHON": str(tmp_path / "python"), "PYTHONPATH": ""}
    result = subprocess.run(["bash", str(BENCHMARKS / "gpu.sh")], capture_output=True, text=True, env=environment)
    assert result.returncode == 6 and result.stderr.startswith(f"gpu.sh: {tmp_path}/python has no torch.")
    assert result.stderr.count("\n") == 1


def run_gpu_script(*flags: str) -> subprocess.CompletedProcess:
    """benchmarks/gpu.sh on the CPU."""
    environment = os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    command = ["bash", str(BENCHMARKS / "gpu.sh"), "--quick", "--device", "cpu", *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)


def test_gpu_script_ends_the_running_step_when_it_is_stopped(folder, tmp_path):
    environment = os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    flags = ["--quick", "--device", "cpu", "--model", str(folder), "--out", str(tmp_path), "--steps", "decode"]
    running = subprocess.Popen(["bash", str(BENCHMARKS / "gpu.sh"), *flags], env=environment, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while len(processes_with(tmp_path)) < 2:  # timeout and Python
        assert time.monotonic() < deadline and running.poll() is None
        time.sleep(0.05)
    running.terminate()
    _, told = running.communicate(timeout=30)
    assert running.returncode == 143 and told.endswith(f"stopped. Measurements and output of each step: {tmp_path}\n")
    while left := processes_with(tmp_path):
        assert time.monotonic() < deadline, left
        time.sleep(0.05)


def processes_with(folder: Path) -> list[str]:
    """The command lines of benchmarks that run and name this folder. Each ends at once when it gets a signal."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            found.append(file.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
    return [line for line in found if "benchmarks.decode" in line and str(folder) in line]


def test_gpu_script_leaves_every_measurement(folder, tmp_path):
    done = run_gpu_script("--model", str(folder), "--out", str(tmp_path), "--steps", "checkpoint,decode")
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "measurements.jsonl").read_text().splitlines()]
    assert [row["side"] for row in rows[:-1]] == [*SIDES, "transformers bf16, mkldnn off"]
    assert all(row["script"] == "decode" and row["seconds"] > 0 for row in rows[:-1])
    assert set(rows[-1]["ways"]) == {row["side"] for row in rows[:-1]}
    assert (tmp_path / "decode.txt").read_text().splitlines()[-1] in done.stdout
    assert [line.split(",")[0] for line in done.stdout.splitlines() if line.startswith("==")] == ["== decode"]


def test_gpu_script_goes_on_after_a_step_that_fails(tmp_path):
    done = run_gpu_script("--model", str(tmp_path / "none"), "--out", str(tmp_path), "--steps", "quantised,compiled")
    assert done.returncode == 1 and done.stderr == "failed: quantised (exit code 1) compiled (exit code 1)\n"
    assert run_gpu_script("--wrong").returncode == run_gpu_script("--steps").returncode == 2


def test_all_script_asks_for_a_model():
    result = subprocess.run(["bash", str(BENCHMARKS / "all.sh")], capture_output=True, text=True)
    assert result.returncode == 2 and "--model" in result.stderr


def test_learning_compares_updates_that_begin_with_the_same_loss(folder):
    command = [sys.executable, "-m", "benchmarks.learning", "--model", str(folder), "--quick", "--rows", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    ways = json.loads(done.stdout.splitlines()[-1])["ways"]
    assert list(ways) == ["full", "lora"]
    for method, names in (("full", ["ours full", "transformers full"]), ("lora", ["ours lora", "transformers + peft lora"])):
        assert list(ways[method]) == names and ways[method][names[1]]["peak_ratio"] == 1
        assert all(row["examples_per_s"]["median"] > 0 and row["peak_GB"]["median"] > 0.1 for row in ways[method].values())


@pytest.mark.parametrize(
    ("script", "flags"), [("parsing", []), ("annotate", ["--quick"]), ("resume", ["--kills", "1", "--steps", "4"])]
)
def test_scripts_that_need_no_checkpoint_end_with_a_line_of_json(script, flags):
    command = [sys.executable, "-m", f"benchmarks.{script}", *flags]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    numbers = json.loads(done.stdout.splitlines()[-1])
    assert isinstance(numbers, dict) and numbers.get("equal") == numbers.get("runs")  # resume.py alone has these
