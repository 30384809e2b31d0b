"""The same rows through Ray Data, from two workers, one of which is killed; and what can be seen without Ray."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from paligemma.checkpoints import weights
from paligemma.errors import CheckpointError, PaliGemmaError
from paligemma.programs import annotate, cluster, commandline, job
from paligemma.programs.cluster import Flags
from paligemma.programs.journal import Journal, rows
from tests.tiny_checkpoint import make_checkpoint

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("cluster") / "model")


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """A folder of 60 small pictures, two of them bad, in the current one."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    for number in range(60):
        Image.effect_noise((16, 16), number + 1).convert("RGB").save(tmp_path / "photos" / f"{number:02}.png")
    for number in (3, 50):
        (tmp_path / "photos" / f"{number:02}.png").write_bytes(b"no picture")
    return tmp_path / "photos"


def run(program, flags, *argv):
    return commandline.run(flags, program, list(argv))


def sorted_rows(path):
    """The rows and, apart from them, their scores, which differ in the last digit with what runs beside them."""
    found = sorted(rows(path), key=lambda row: row["image"])
    return found, [row.pop("score") for row in found if "score" in row]


def workers_of(parent):
    """The processes of Ray that hold a model, by what they call themselves, among all that come from a process."""
    parents, names = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            names[int(folder.name)] = (folder / "cmdline").read_bytes()
        except OSError:  # it has ended meanwhile
            continue
    known, size = {parent}, 0
    while len(known) > size:
        size = len(known)
        known |= {pid for pid, above in parents.items() if above in known}
    return sorted(known - {parent}), [pid for pid in known if b"MapWorker" in names.get(pid, b"")]


def test_rows_are_those_of_one_process_though_a_worker_is_killed(photos, model):
    flags = ["photos", "--task=ask", "what?", f"--model_path={model}", "--max_tokens_to_generate=90", "--rows=2"]
    with tempfile.TemporaryDirectory() as temporary:  # a short path, for the names of sockets
        environment = os.environ | {"TMPDIR": temporary, "HOME": str(photos.parent / "home")}
        command = [sys.executable, "-m", "paligemma", "cluster", *flags, "--output=rows.jsonl", "--workers=2", "--cpus=1"]
        process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE)
        while process.poll() is None and (not os.path.exists("rows.jsonl") or Path("rows.jsonl").read_bytes().count(b"\n") < 5):
            time.sleep(0.002)
        everybody, workers = workers_of(process.pid)
        os.kill(workers[0], signal.SIGKILL)
        at_kill = len(list(rows("rows.jsonl")))
        err = process.communicate(timeout=300)[1].decode()
        assert process.returncode == 8 and "2 of 60 rows" in err, err
        assert os.listdir(temporary) == [] and not os.path.exists(photos.parent / "home")
    deadline = time.monotonic() + 20
    while any(os.path.exists(f"/proc/{pid}") for pid in everybody) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [pid for pid in everybody if os.path.exists(f"/proc/{pid}")]
    assert at_kill < 60 and len(workers) == 2
    assert run(annotate.program, annotate.Flags, *flags, "--output=alone.jsonl") == 8
    (found, scores), (alone, scores_alone) = sorted_rows("rows.jsonl"), sorted_rows("alone.jsonl")
    assert found == alone and scores == pytest.approx(scores_alone, abs=2e-6)
    assert len(found) == 60 and len(set(scores)) > 40  # the pictures do matter


@pytest.mark.usefixtures("photos")
def test_the_file_is_one_for_both_programs(model, monkeypatch, capsys):
    flags = ["photos", f"--model_path={model}", "--output=rows.jsonl", "--max_tokens_to_generate=4"]
    assert run(annotate.program, annotate.Flags, *flags) == 8
    before = Path("rows.jsonl").read_bytes()
    monkeypatch.setattr(cluster, "ray_running", lambda _: pytest.fail("Ray was started for nothing"))
    assert run(cluster.program, Flags, *flags) == 8
    assert Path("rows.jsonl").read_bytes() == before and "2 of 60 rows" in capsys.readouterr().err
    assert run(cluster.program, Flags, *flags, "--quantize=int8") == 2
    assert 'quantize was null and is "int8"' in capsys.readouterr().err
    with Journal("other.jsonl", {}):
        assert run(cluster.program, Flags, *flags, "--output=other.jsonl") == 7


def batch(flags):
    return {"question": [json.dumps(asdict(question)) for question in job.questions(flags, "other")]}


def test_a_worker_answers_a_list(photos, model):
    flags = Flags(positional=(str(photos),), model_path=str(model), output="-", max_tokens_to_generate=4)
    found = [cluster.read_row(row) for row in cluster.Worker(flags, os.getcwd())(batch(flags))["row"]]
    assert len(found) == 60 and len([row for row in found if "error" in row]) == 2


def test_what_is_wrong_with_the_model_comes_back_as_it_is(photos, model, tmp_path):
    broken = weights.load_model(model)
    with torch.no_grad():
        broken.language_model.model.norm.weight[0] = torch.nan
    weights.save_model(broken, tmp_path / "broken")
    for file in model.glob("*.json"):
        if not (tmp_path / "broken" / file.name).exists():
            (tmp_path / "broken" / file.name).write_bytes(file.read_bytes())
    flags = Flags(positional=(str(photos),), model_path=str(tmp_path / "broken"), output="-")
    (fault,) = cluster.Worker(flags, os.getcwd())(batch(flags))["row"]
    with pytest.raises(PaliGemmaError, match="NaN") as caught:
        cluster.read_row(fault)
    assert caught.value.code == CheckpointError.code


def test_lists_are_as_long_as_they_should_be():
    asked = [job.Question(str(n), str(n), "ocr", "ocr", "") for n in range(5)]
    lists = list(cluster.in_lists(asked, 2))
    assert [len(some) for some in lists] == [2, 2, 1]
    assert [job.Question(**json.loads(text)) for some in lists for text in some] == asked


@pytest.mark.parametrize("flag", ["workers=0", "address=", "cpus=0", "gpus=-1", "gpus=nan", "shard=1/2"])
def test_wrong_flags_are_2_and_named(flag, photos, capsys):
    argv = [str(photos), "--output=x", f"--{flag}"]
    assert commandline.run(Flags, lambda _: pytest.fail("it ran"), argv) == 2
    assert flag.partition("=")[0] in capsys.readouterr().err


@pytest.mark.usefixtures("photos")
def test_without_ray_it_says_how_to_install_it(monkeypatch, capsys):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "ray" else find_spec(name))
    assert run(cluster.program, Flags, "photos", "--output=x.jsonl") == 6
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and 'pip install "ray[data]"' in err
    assert not os.path.exists("x.jsonl")


@pytest.mark.usefixtures("photos")
def test_wrong_usage_is_answered_before_anything_slow_is_imported():
    script = (
        "import sys; from paligemma.programs import cluster; code = cluster.main(); "
        "print(code, sorted({'ray', 'torch', 'tokenizers', 'pyarrow'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script, "phots", "--output=x"], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "3 []", done.stderr


@pytest.mark.parametrize(
    "device, only_cpu, found, gpus",
    [("auto", False, 4, 1), ("cuda", False, 4, 1), ("cuda:0,cuda:1", False, 4, 2), ("auto", True, 4, 0), ("cpu", False, 4, 0),
     ("auto", False, 0, 0)],
)  # fmt: skip
def test_a_worker_gets_as_many_gpus_as_its_device_names(device, only_cpu, found, gpus, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(cluster_resources=lambda: {"GPU": found}))
    assert cluster.gpus_each(SimpleNamespace(gpus=None, only_cpu=only_cpu, device=device)) == gpus
