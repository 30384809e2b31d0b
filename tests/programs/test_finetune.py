"""The whole program: what is refused before it starts, what a run writes, and runs that are killed and resumed."""

import errno
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import fields
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file

from paligemma.checkpoints import adapters, weights
from paligemma.configuration import PaliGemmaConfig
from paligemma.errors import DatasetError, UsageError
from paligemma.layers import lora
from paligemma.learning import curves, run_folder, training
from paligemma.learning.run import bytes_of_copies, memory_needed
from paligemma.modeling_paligemma import PaliGemmaForConditionalGeneration
from paligemma.programs import finetune
from paligemma.programs.config_file import read_config
from tests.tiny import FAMILIES, make_batch, make_model
from tests.tiny_checkpoint import make_checkpoint

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("model"), context=512)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder with six pictures of one colour each, train.jsonl and valid.jsonl."""
    folder = tmp_path_factory.mktemp("data")
    lines = []
    for number, color in enumerate(("red", "green", "blue", "white", "black", "gray")):
        Image.new("RGB", (20, 20), color).save(folder / f"{number}.png")
        lines.append({"image": f"{number}.png", "prefix": "color", "suffix": color})
    lines.append({"image": "0.png", "prefix": "detect x", "suffix": "<loc0100><loc0100><loc0500><loc0500> x"})
    (folder / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "valid.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines[2:]))
    return folder


def arguments(model, data, output, *more):
    given = [f"--model_path={model}", f"--train={data / 'train.jsonl'}", f"--output={output}", "--dtype=fp32", "--batch_size=4"]
    return [*given, "--micro_batch_size=2", "--steps=6", "--learning_rate=3e-3", "--seed=1", "--device=cpu", *more]


def run(capsys, *given):
    """Runs the program in this process; returns the exit code and stderr."""
    code = finetune.commandline.run(finetune.Flags, finetune.program, [*given])
    return code, capsys.readouterr().err


@pytest.fixture
def start():
    """Starts a process that does not outlive its test: start(ONE, *flags), or TWO, or a program's text."""
    started = []

    def begin(launcher, *given):
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        options = {"stderr": subprocess.PIPE, "text": True, "env": environment, "start_new_session": True}
        started.append(subprocess.Popen([sys.executable, *launcher, *given], **options))
        return started[-1]

    yield begin
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


ONE = ["-m", "paligemma", "finetune"]
TWO = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", *ONE]
KILLED = """
import os, signal, sys
from paligemma.learning import training
from paligemma.programs import finetune

plain = training.Trainer.update

def update(self):
    if self.step == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return plain(self)

training.Trainer.update = update
sys.exit(finetune.main())
"""  # kills itself in its sixth update


def losses(output):
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines if "loss" in line]


@pytest.fixture(scope="module")
def whole(model, data, tmp_path_factory):
    """The folder of an uninterrupted run."""
    output = tmp_path_factory.mktemp("runs") / "whole"
    given = arguments(model, data, output, f"--valid={data / 'valid.jsonl'}", "--evaluate_every=3", "--save_every=2")
    assert finetune.commandline.run(finetune.Flags, finetune.program, given) == 0
    return output


# What a run writes


def test_a_run_leaves_everything_that_its_header_names(whole):
    found = {path.name for path in whole.iterdir()}
    assert found == {"settings.json", "metrics.jsonl", "progress.svg", "checkpoints", "model"}
    assert [path.name for path in sorted((whole / "checkpoints").iterdir())] == ["step_00000004", "step_00000006"]
    assert [step for step, _ in losses(whole)] == [1, 2, 3, 4, 5, 6]
    scored = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines() if "valid_loss" in line]
    assert [line["step"] for line in scored] == [3, 6] and {"exact", "anls", "map"} <= scored[0].keys()
    assert {line["scored"] for line in scored} == {"5 of 5 lines"}
    drawn = (whole / "progress.svg").read_text()
    assert drawn.startswith("<svg") and "valid_loss" in drawn and "exact" in drawn and "scores on 5 of 5 lines" in drawn


def test_a_step_has_the_same_number_everywhere(model, data, tmp_path, capsys, monkeypatch):
    """On the screen, in metrics.jsonl, in TensorBoard's log, in the curves, and in the names and the state of checkpoints."""
    output, tensorboard = tmp_path / "run", []
    writer = SimpleNamespace(add_scalar=lambda name, _, step: tensorboard.append((step, name)))
    monkeypatch.setattr(finetune, "find_spec", bool)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=lambda _: writer))
    flags = [f"--valid={data / 'valid.jsonl'}", "--evaluate_every=3", "--save_every=3", "--tensorboard"]
    code, said = run(capsys, *arguments(model, data, output, *flags))
    assert code == 0
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    shown = [(int(step), float(loss)) for step, loss in re.findall(r"^step (\d+) of 6: loss ([\d.]+)", said, re.MULTILINE)]
    assert shown == [(line["step"], round(line["loss"], 4)) for line in lines if "loss" in line]
    assert [step for step, _ in shown] == [1, 2, 3, 4, 5, 6]
    scored = [line["step"] for line in lines if "valid_loss" in line]
    assert scored == [int(step) for step in re.findall(r"^step (\d+): valid_loss", said, re.MULTILINE)] == [3, 6]
    assert [step for step, name in tensorboard if name == "valid_loss"] == scored
    assert [step for step, name in tensorboard if name == "loss"] == [1, 2, 3, 4, 5, 6]
    for step, folder in zip(scored, run_folder.checkpoints(output / "checkpoints"), strict=True):
        assert folder.name == f"step_{step:08}" and json.loads((folder / "state.json").read_text())["step"] == step
    drawn = []
    monkeypatch.setattr(curves, "draw_plot", lambda *given: drawn.append(given[3]))
    curves.draw_curves(lines, tmp_path / "progress.svg")
    assert [step for step, _ in drawn[0]["loss"]] == [1, 2, 3, 4, 5, 6] and [step for step, _ in drawn[1]["exact"]] == scored


def test_a_log_that_counted_from_zero_is_continued_from_one(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps({"step": step, "loss": 1.0}) + "\n" for step in range(5)))
    assert [line["step"] for line in run_folder.Log(tmp_path, 4, with_tensorboard=False).lines] == [1, 2, 3, 4]


HOSTILE_LINES = [
    *(f'{{"step": {zero}, "loss": 1}}' for zero in ("false", "0.0", "-0.0")),  # none of them is the first update of an old log
    *('{"step": %s, "loss": 1}' % step for step in ("1e999", '"1"', "-1", "true", "null", "1" + "0" * 5000)),
    *('{"step": 1, "loss": %s}' % loss for loss in ("1e999", "NaN", "[1]", '"x"', "1" + "0" * 400, '"\\ud800"')),
    *('{"loss": 1}', "[" * 50_000, "7", "null", '{"step": 1, "note": "x"}', '{"step": 1, "scored": "' + "x" * 300 + '"}'),
]


def test_lines_of_a_log_that_this_program_did_not_write_are_left_out(tmp_path):
    good = '{"step": 2, "loss": 0.5, "is_skipped": false, "grad_norm": null}'
    (tmp_path / "metrics.jsonl").write_text("\n".join([*HOSTILE_LINES, good, "x" * 100_000, good[:-5]]))
    log = run_folder.Log(tmp_path, 9, with_tensorboard=False)
    assert log.lines == [json.loads(good)] and (tmp_path / "metrics.jsonl").read_text() == good + "\n"
    log.draw()
    assert (tmp_path / "progress.svg").exists()


def test_the_result_loads_here_and_in_transformers_with_equal_logits(whole):
    from transformers import PaliGemmaForConditionalGeneration

    from paligemma.processing_paligemma import PaliGemmaProcessor

    inputs = PaliGemmaProcessor.from_pretrained(whole / "model")(Image.new("RGB", (20, 20), "red"), "color")
    ours = weights.load_model(whole / "model")(**inputs)
    reference = PaliGemmaForConditionalGeneration.from_pretrained(whole / "model").eval()
    with torch.no_grad():
        theirs = reference(**inputs).logits.float()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)  # as in test_modeling_paligemma.py


def test_learning_changes_the_weights(whole, model):
    before, after = (load_file(folder / "model.safetensors") for folder in (model, whole / "model"))
    assert before.keys() == after.keys()
    assert all(not torch.equal(before[name], after[name]) for name in before if "k_proj.bias" not in name)


def test_overfitting_a_few_examples_answers_them(model, data, tmp_path, capsys):
    given = [*arguments(model, data, tmp_path / "run", f"--valid={data / 'train.jsonl'}"), "--steps=150", "--learning_rate=1e-2"]
    code, said = run(capsys, *given, "--batch_size=7", "--micro_batch_size=7", "--evaluate_every=150")
    assert code == 0
    numbers = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert numbers["exact"] == 1 and numbers["map50"] == pytest.approx(1) and numbers["valid_loss"] < 0.2, said


# Resuming


def test_a_killed_run_resumes_with_the_losses_of_an_uninterrupted_one(model, data, tmp_path, whole, start):
    given = arguments(model, data, tmp_path / "run", f"--valid={data / 'valid.jsonl'}", "--evaluate_every=3", "--save_every=2")
    first = start(["-c", KILLED], *given)
    assert first.communicate(timeout=240) and first.returncode == -signal.SIGKILL
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == ["step_00000003", "step_00000004"]
    second = start(ONE, *given, "--resume")
    said = second.communicate(timeout=240)[1]
    assert second.returncode == 0, said
    assert losses(tmp_path / "run") == losses(whole)  # bit for bit, and no step twice
    ours, theirs = (load_file(folder / "model" / "model.safetensors") for folder in (tmp_path / "run", whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def send_after(monkeypatch, step, signum):
    """Sends this process a signal while update number `step` is being made."""
    plain = training.Trainer.update

    def update(trainer):
        if trainer.step == step:
            os.kill(os.getpid(), signum)
        return plain(trainer)

    monkeypatch.setattr(training.Trainer, "update", update)


@pytest.mark.parametrize(("signum", "expected"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_the_same_command_resumes(model, data, tmp_path, whole, capsys, monkeypatch, signum, expected):
    given = arguments(model, data, tmp_path / "run", "--save_every=1000")
    with monkeypatch.context() as patch:
        send_after(patch, 1, signum)
        code, said = run(capsys, *given)
    assert code == expected and "interrupted at step 2 of 6, which is saved." in said
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_00000002"]
    assert run(capsys, *given, "--resume")[0] == 0
    assert losses(tmp_path / "run") == losses(whole)


def test_other_settings_and_used_folders_are_refused(model, data, whole, capsys):
    given = arguments(model, data, whole, f"--valid={data / 'valid.jsonl'}", "--evaluate_every=3", "--save_every=2")
    assert run(capsys, *given)[0] == 2
    code, said = run(capsys, *given, "--resume", "--seed=2", "--loss=token")
    assert code == 2 and "seed was 1 and is 2" in said and "loss was 'example' and is 'token'" in said


def test_other_data_are_refused(model, data, whole, tmp_path, capsys):
    shutil.copytree(whole, tmp_path / "run")
    (data / "fewer.jsonl").write_text("\n".join((data / "train.jsonl").read_text().splitlines()[:-1]))
    code, said = run(capsys, *arguments(model, data, tmp_path / "run"), f"--train={data / 'fewer.jsonl'}", "--resume")
    assert code == 2 and re.search(r"data was '7 examples, \w{16}' and is '6 examples", said)


def test_a_run_resumes_with_the_same_weights_in_any_folder_and_with_no_others(model, data, whole, tmp_path, capsys):
    shutil.copytree(whole, tmp_path / "run")
    shutil.copytree(model, tmp_path / "model")
    given = [*arguments(tmp_path / "model", data, tmp_path / "run"), "--resume"]
    assert run(capsys, *given)[0] == 0
    changed = weights.load_model(model)
    with torch.no_grad():
        changed.multi_modal_projector.linear.weight *= 1.01
    weights.save_model(changed, tmp_path / "model")
    code, said = run(capsys, *given)
    assert code == 2 and re.search(r"other settings: model was '\w{12}' and is '\w{12}'\.", said)


def test_a_run_may_resume_with_a_smaller_learning_rate(model, data, whole, tmp_path, capsys):
    shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_00000006")
    code, said = run(capsys, *arguments(model, data, tmp_path / "run"), "--resume", "--learning_rate=1e-4", "--clip=2")
    assert code == 0 and "continues with other settings: learning_rate was 0.003 and is 0.0001; clip was 1.0 and is 2.0" in said
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["learning_rate"] < 1e-4 for line in lines if "loss" in line] == [False] * 4 + [True] * 2


def test_a_run_of_an_earlier_version_resumes(model, data, whole, tmp_path, capsys):
    """The setting micro_batch_size was called rows."""
    shutil.copytree(whole, tmp_path / "run")
    file = tmp_path / "run" / "settings.json"
    file.write_text(file.read_text().replace("micro_batch_size", "rows"))
    code, said = run(capsys, *arguments(model, data, tmp_path / "run"), "--resume", "--micro_batch_size=1")
    assert code == 0 and "the run continues with other settings: micro_batch_size was 2 and is 1" in said


def test_a_start_that_failed_or_was_killed_leaves_the_folder_free(model, data, tmp_path, capsys, monkeypatch):
    given = arguments(model, data, tmp_path / "run", "--method=lora")
    assert run(capsys, *given, "--lora_matrices=q_prj")[0] == 2
    with monkeypatch.context() as patch:
        patch.setattr("paligemma.machine.free_memory", lambda _: 1000)
        assert run(capsys, *given)[0] == 6
    code, said = run(capsys, *given, "--resume")
    assert code == 0 and "contains no checkpoint yet; the run starts from the beginning" in said
    assert len(losses(tmp_path / "run")) == 6
    for name in ("checkpoints", "model", "adapter"):  # as if it had been killed before the first of them
        shutil.rmtree(tmp_path / "run" / name)
    assert run(capsys, *given, "--seed=2")[0] == 0


def test_a_result_whose_checkpoints_are_gone_is_not_overwritten(model, data, whole, tmp_path, capsys):
    shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    given = arguments(model, data, tmp_path / "run")
    code, said = run(capsys, *given)
    assert code == 2 and "already contains a run. Name another --output, or continue with --resume." in said
    code, said = run(capsys, *given, "--resume")
    assert code == 2 and "whose checkpoints were deleted. Name another --output" in said
    assert losses(tmp_path / "run") == losses(whole)


def test_an_incomplete_result_is_completed(model, data, whole, tmp_path, capsys, monkeypatch):
    shutil.copytree(whole, tmp_path / "run")
    files = {path.name: path.read_bytes() for path in (whole / "model").iterdir()}
    for name in files:  # killed while it was written
        (tmp_path / "run" / "model" / name).write_bytes(files[name][:100])
    given = [*arguments(model, data, tmp_path / "run"), "--resume"]
    with monkeypatch.context() as patch:
        patch.setattr(run_folder.shutil, "copyfileobj", full_disk)
        code, said = run(capsys, *given)
    assert code == 7 and "cannot be written: No space left on device. Make room and continue with --resume." in said
    assert run(capsys, *given)[0] == 0
    assert {path.name: path.read_bytes() for path in (tmp_path / "run" / "model").iterdir()} == files


def full_disk(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_curves_that_cannot_be_drawn_do_not_end_the_run(model, data, tmp_path, capsys, monkeypatch):
    (tmp_path / "run" / "progress.svg").mkdir(parents=True)
    flags = arguments(model, data, tmp_path / "run", f"--valid={data / 'valid.jsonl'}")
    assert run(capsys, *flags)[0] == 7  # noticed before the first update
    monkeypatch.setattr(run_folder, "check_inputs", lambda *_: None)  # as if it had come after the beginning
    code, said = run(capsys, *flags)
    assert code == 0 and "progress.svg cannot be written: Is a directory." in said


def test_a_run_that_is_stopped_before_an_evaluation_makes_it_when_it_is_resumed(
    model, data, tmp_path, capsys, monkeypatch
):
    flags = [f"--valid={data / 'valid.jsonl'}", "--evaluate_every=2", "--save_every=1000"]
    assert run(capsys, *arguments(model, data, tmp_path / "whole", *flags))[0] == 0
    with monkeypatch.context() as patch:
        send_after(patch, 1, signal.SIGTERM)
        assert run(capsys, *arguments(model, data, tmp_path / "run", *flags))[0] == 143
    assert len(losses(tmp_path / "run")) == 2 and "valid_loss" not in (tmp_path / "run" / "metrics.jsonl").read_text()
    assert run(capsys, *arguments(model, data, tmp_path / "run", *flags, "--resume"))[0] == 0
    lines = [
        [json.loads(line) | {"seconds": 0} for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("whole", "run")
    ]
    assert lines[0] == lines[1] and len(lines[0]) == 9  # six updates, three evaluations


def test_a_second_signal_stops_at_once(model, data, tmp_path, capsys, monkeypatch):
    send_after(monkeypatch, 1, signal.SIGINT)
    plain = training.Trainer.update

    def again(trainer):  # still in the same update
        done = plain(trainer)
        if trainer.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return done

    monkeypatch.setattr(training.Trainer, "update", again)
    code, _ = run(capsys, *arguments(model, data, tmp_path / "run"))
    assert code == 143 and not (tmp_path / "run" / "checkpoints").exists()


def test_a_picture_that_is_deleted_during_a_run_loses_no_update(model, data, tmp_path, capsys, monkeypatch):
    shutil.copytree(data, tmp_path / "data")
    given = arguments(model, tmp_path / "data", tmp_path / "run", "--save_every=1000")
    plain = training.Trainer.update

    def update(trainer):
        if trainer.step == 2:
            for file in (tmp_path / "data").glob("*.png"):
                file.unlink()
        return plain(trainer)

    with monkeypatch.context() as patch:
        patch.setattr(training.Trainer, "update", update)
        code, said = run(capsys, *given)
    assert code == 3 and "does not exist" in said
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_00000002"]
    shutil.copytree(data, tmp_path / "data", dirs_exist_ok=True)
    assert run(capsys, *given, "--resume")[0] == 0


def test_a_second_run_in_the_same_folder_is_refused(model, data, tmp_path, capsys):
    given = arguments(model, data, tmp_path / "run")
    with run_folder.claim(tmp_path / "run", {}):
        code, said = run(capsys, *given)
    assert code == 7 and "is being written by another run. Wait for it, or name another --output." in said
    assert run(capsys, *given)[0] == 0


def test_damaged_files_of_a_run_are_one_line_or_repaired(model, data, whole, tmp_path, capsys):
    shutil.copytree(whole, tmp_path / "run")
    given = [*arguments(model, data, tmp_path / "run"), "--resume"]
    with open(tmp_path / "run" / "metrics.jsonl", "ab") as file:
        file.write(b'[1]\n"x"\n\xff\n{"step"')
    (tmp_path / "run" / "model" / ".saving-x").mkdir()
    assert run(capsys, *given)[0] == 0
    assert losses(tmp_path / "run") == losses(whole) and not (tmp_path / "run" / "model" / ".saving-x").exists()
    (tmp_path / "run" / "checkpoints" / "step_00000006" / "state.json").write_text("[]")
    code, said = run(capsys, *given)
    assert code == 4 and "state.json:1:1 is a list" in said
    (tmp_path / "run" / "settings.json").write_text("{")
    code, said = run(capsys, *given)
    assert code == 4 and "settings.json:1:2 is not JSON" in said


def test_the_rate_that_is_logged_is_one_that_was_used(model, data, tmp_path, capsys):
    given = arguments(model, data, tmp_path / "run", "--parts=projector", "--learning_rate_projector=2e-4", "--warmup=0")
    assert run(capsys, *given, "--steps=1")[0] == 0
    (line,) = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line)["learning_rate"] == pytest.approx(2e-4)


def test_detection_is_learned_and_scored_without_pycocotools(model, data, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocotools.coco", None)
    (data / "boxes.jsonl").write_text((data / "train.jsonl").read_text().splitlines()[-1] + "\n")
    given = [*arguments(model, data, tmp_path / "run", f"--valid={data / 'boxes.jsonl'}"), f"--train={data / 'boxes.jsonl'}"]
    code, said = run(capsys, *given, "--steps=1", "--batch_size=1")
    assert code == 0 and said.count("pip install pycocotools") == 1 and "valid_loss" in said
    assert said.index("pip install pycocotools") < said.index("step 1")


def test_scores_of_a_sample_name_the_sample(model, data, tmp_path, capsys):
    flags = [f"--valid={data / 'valid.jsonl'}", "--num_scored=2", "--evaluate_every=6"]
    code, said = run(capsys, *arguments(model, data, tmp_path / "run", *flags))
    assert code == 0 and re.search(r"step 6: valid_loss .* \(2 of 5 lines, spread evenly\)", said)
    (line,) = (line for line in map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) if "exact" in line)
    assert line["scored"] == "2 of 5 lines, spread evenly"


def test_values_that_are_not_finite_are_null_in_the_log(tmp_path):
    run_folder.Log(tmp_path, 0, with_tensorboard=False).write({"step": 1, "loss": math.nan, "grad_norm": math.inf, "tokens": 3})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "loss": null, "grad_norm": null, "tokens": 3}\n'


def test_a_run_whose_evaluation_fails_is_saved_first(model, data, tmp_path, capsys, monkeypatch):
    from paligemma.learning import evaluation

    given = arguments(model, data, tmp_path / "run", f"--valid={data / 'valid.jsonl'}", "--evaluate_every=3")

    def fail(*_):
        raise DatasetError("no.")

    with monkeypatch.context() as patch:
        patch.setattr(evaluation.Judge, "ask", fail)
        assert run(capsys, *given)[0] == 3
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_00000003"]
    assert run(capsys, *given, "--resume")[0] == 0


def test_tensorboard_gets_every_number_and_is_required_before_the_run_starts(model, data, tmp_path, capsys, monkeypatch):
    given = arguments(model, data, tmp_path / "run", f"--valid={data / 'valid.jsonl'}", "--evaluate_every=3", "--tensorboard")
    monkeypatch.setattr(finetune, "find_spec", lambda _: None)
    assert run(capsys, *given) == (6, "error: --tensorboard needs a package. Install it: pip install tensorboard.\n")
    assert not (tmp_path / "run").exists()
    scalars = []

    class SummaryWriter:
        def __init__(self, folder):
            assert folder == str(tmp_path / "run" / "tensorboard")

        def add_scalar(self, name, value, step):
            scalars.append((step, name, value))

    monkeypatch.setattr(finetune, "find_spec", bool)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=SummaryWriter))
    assert run(capsys, *given)[0] == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    numbers = [(line["step"], name, value) for line in lines for name, value in line.items()]
    assert scalars == [found for found in numbers if found[1] not in ("step", "scored")]


# Adapters


def test_an_adapter_and_its_merged_model_have_equal_logits(model, data, tmp_path, capsys):
    code, said = run(capsys, *arguments(model, data, tmp_path / "run", "--method=lora", "--lora_r=2", "--lora_dropout=0.1"))
    assert code == 0, said
    from paligemma.processing_paligemma import PaliGemmaProcessor

    inputs = PaliGemmaProcessor.from_pretrained(model)(Image.new("RGB", (20, 20), "red"), "color")
    merged, adapted = (weights.load_model(tmp_path / "run" / name) for name in ("model", "adapter"))
    assert torch.equal(merged(**inputs), adapted(**inputs))  # the same matrices, merged by the same function
    assert not torch.equal(merged(**inputs), weights.load_model(model)(**inputs))
    config = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert config["r"] == 2 and config["base_model_name_or_path"] == str(model) and "vision_tower" not in config["target_modules"]


def test_an_adapter_finds_its_base_from_any_folder_and_takes_no_second_adapter(model, data, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(model.parent)
    assert run(capsys, *arguments(model.name, data, tmp_path / "run", "--method=lora"))[0] == 0
    monkeypatch.chdir(tmp_path)
    weights.load_model("run/adapter")
    code, said = run(capsys, *arguments("run/adapter", data, tmp_path / "second", "--method=lora"))
    assert code == 2 and "run/adapter has an adapter, and a second adapter cannot be added to it" in said
    assert not (tmp_path / "second").exists()
    assert run(capsys, *arguments("run/adapter", data, tmp_path / "second"))[0] == 0  # all weights, from the merged ones on


def test_only_the_processor_s_files_are_copied_to_the_result(model, data, whole, tmp_path, capsys):
    import transformers

    folder = tmp_path / "both"
    shutil.copytree(model, folder)
    adapted = weights.load_model(model)
    lora.inject(adapted, lora.LoraConfig(r=2), lora.targets(adapted))
    adapters.save_adapter(lora.adapter_state(adapted), lora.LoraConfig(r=2), tmp_path / "adapter", None)
    for file in (tmp_path / "adapter").iterdir():
        shutil.copy(file, folder)
    (folder / "trainer_state.json").write_text("{}")
    assert run(capsys, *arguments(folder, data, tmp_path / "run"))[0] == 0
    result = tmp_path / "run" / "model"
    assert {file.name for file in result.iterdir()} == {file.name for file in (whole / "model").iterdir()}
    assert not {"adapter_config.json", "trainer_state.json"} & {file.name for file in result.iterdir()}
    transformers.PaliGemmaForConditionalGeneration.from_pretrained(result)
    code, said = run(capsys, *arguments(folder, data, tmp_path / "second", "--method=lora"))
    assert code == 2 and "both has an adapter, and a second adapter cannot be added to it" in said


@pytest.mark.parametrize("flag", ["model_path", "base_model", "train", "output", "mask_codec"])
@pytest.mark.parametrize("name", ["~nosuchuser/x", "x" * 300])
def test_names_that_no_folder_can_have_are_one_line(model, data, tmp_path, capsys, monkeypatch, flag, name):
    monkeypatch.chdir(tmp_path)
    code, said = run(capsys, *arguments(model, data, tmp_path / "run", "--preview", f"--{flag}={name}"))
    assert code in ((0,) if flag == "output" and name.startswith("~") else (2, 3, 4, 7)), said
    assert "Traceback" not in said and "internal" not in said


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_two_processes_score_and_save_what_one_does(model, data, tmp_path, dtype, start):
    """Each process answers a share of the questions; in bfloat16 the frozen weights have another dtype than the trained ones."""
    flags = ("--method=lora", "--lora_r=2", f"--valid={data / 'valid.jsonl'}", "--evaluate_every=3", f"--dtype={dtype}")
    for name, launcher in (("one", ONE), ("two", TWO)):
        process = start(launcher, *arguments(model, data, tmp_path / name, *flags))
        _, said = process.communicate(timeout=240)
        assert process.returncode == 0, said
    lines = {
        name: [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    }
    assert len(lines["one"]) == 8  # six updates and two evaluations
    for one, two in zip(lines["one"], lines["two"], strict=True):
        for measured in ("loss", "tokens", "valid_loss", "exact", "map"):
            # Sums in another order. A loss below 16 has float32 steps of 2^-20, and about a hundred sums lie between weights
            # and loss in six updates. A bfloat16 logit from 8 to 16 has steps of 2^-4; half of one, in logit and sum, each.
            bound = {"fp32": 100 * 2**-20, "bf16": 2**-4}[dtype]
            assert two.get(measured) == pytest.approx(one.get(measured), abs=bound)
    if dtype == "bf16":
        return
    first, second = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("one", "two"))
    assert first.keys() == second.keys()
    # AdamW turns gradients of almost 0 into steps of full size and of either sign, so single weights may differ by a few steps.
    gaps = torch.cat([(first[name] - second[name]).abs().flatten() for name in first])
    assert gaps.mean() < 1e-4 and all(tensor.abs().max() > 0 for tensor in second.values())


def test_two_processes_stop_after_the_same_update(model, data, tmp_path, start):
    given = [*arguments(model, data, tmp_path / "run"), "--steps=100000", "--save_every=100000"]
    both = start(TWO, *given)
    deadline = time.monotonic() + 120
    while len(losses(tmp_path / "run") if (tmp_path / "run" / "metrics.jsonl").exists() else []) < 3:
        assert time.monotonic() < deadline and both.poll() is None
        time.sleep(0.05)
    both.send_signal(signal.SIGTERM)  # torchrun passes it on to both
    _, said = both.communicate(timeout=120)
    (saved,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert f"interrupted at step {int(saved.name[5:])} of" in said
    assert len(losses(tmp_path / "run")) == int(saved.name[5:])


def test_two_processes_refuse_a_used_folder_in_one_message(model, data, whole, start):
    both = start(TWO, *arguments(model, data, whole))
    _, said = both.communicate(timeout=240)
    assert both.returncode != 0 and said.count("already contains a run") == 1 and "internal error" not in said


def test_a_batch_that_two_processes_cannot_share_is_refused(model, data, tmp_path, start):
    both = start(TWO, *arguments(model, data, tmp_path / "run"), "--batch_size=5")
    _, said = both.communicate(timeout=120)
    assert both.returncode != 0 and said.count("--batch_size 5 cannot be divided by 2 processes") == 1


def test_names_of_no_matrix_are_refused(model, data, tmp_path, capsys):
    code, said = run(capsys, *arguments(model, data, tmp_path / "a", "--method=lora", "--lora_matrices=q_prj"))
    assert code == 2 and "q_prj names no matrix" in said
    assert run(capsys, *arguments(model, data, tmp_path / "b", "--parts=tower"))[0] == 2
    code, said = run(capsys, *arguments(model, data, tmp_path / "c", "--method=lora", "--parts=attention"))
    assert code == 2 and "Adapters go into language_model and vision_tower" in said


def test_scores_of_masks_without_a_codec_are_refused_before_the_weights_are_loaded(model, data, tmp_path, capsys):
    code, said = run(capsys, *arguments(model, data, tmp_path / "a", f"--valid={data / 'valid.jsonl'}", "--scores=miou"))
    assert code == 2 and "--mask_codec" in said and not (tmp_path / "a").exists()
    assert run(capsys, *arguments(model, data, tmp_path / "a", "--mask_codec=none.npz"))[0] == 4


# What is refused before a run starts


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_quantised_model_is_refused(model, data, tmp_path, capsys, method):
    weights.save_model(weights.load_model(model, quantize="int8"), tmp_path / "int8")
    for name in ("tokenizer.json", "preprocessor_config.json"):
        shutil.copy(model / name, tmp_path / "int8" / name)
    code, said = run(capsys, *arguments(tmp_path / "int8", data, tmp_path / "run", f"--method={method}"))
    assert code == 2 and "is stored as int8, which cannot be trained. Name the checkpoint that has not been quantized." in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flag", "says"),
    [
        ("--lerning_rate=1", "Did you mean --learning_rate?"),
        ("--rows=1", "unknown flag --rows. Did you mean --micro_batch_size?"),
        ("--learning_rate=2", "--learning_rate is 2.0"),
        ("--method=qlora", "full or lora"),
        ("--loss=mean", "example or token"),
        ("--scores=bleu", "one or several of exact, vqa"),
        ("--augment=flip", "none or zoom"),
        ("--epochs=0", "--epochs is 0.0"),
        ("--micro_batch_size=0", "--micro_batch_size is 0"),
        ("--num_scored=0", "--num_scored is 0"),
        ("--lora_alpha=nan", "--lora_alpha is nan"),
        ("--lora_r=1048576", "--lora_r is 1048576"),
        ("--output=", "--output is ''"),
        ("--dtype=fp16", "bf16 or fp32"),
    ],
)
def test_flags_that_make_no_sense(model, data, tmp_path, capsys, flag, says):
    code, said = run(capsys, *arguments(model, data, tmp_path / "run"), flag)
    assert code == 2 and says in said and not (tmp_path / "run").exists()


def test_faulty_lines_are_all_named_and_can_be_skipped(model, data, tmp_path, capsys):
    lines = (data / "train.jsonl").read_text().splitlines()
    bad = [*lines, "{", json.dumps({"image": "none.png", "prefix": "x", "suffix": "y"}), *["["] * 30]
    (data / "bad.jsonl").write_text("\n".join(bad))
    given = [*arguments(model, data, tmp_path / "run"), f"--train={data / 'bad.jsonl'}", "--steps=1"]
    code, said = run(capsys, *given)
    assert code == 3 and not (tmp_path / "run").exists()
    assert re.search(r"fault: .*bad.jsonl:8: not JSON", said)
    assert re.search(r"fault: .*bad.jsonl:9: .*none.png does not exist", said)
    assert re.findall(r"bad.jsonl:(\d+): not JSON", said)[:31] == [str(line) for line in (8, *range(10, 40))]
    assert run(capsys, *given, "--skip_bad")[0] == 0


def test_warnings_of_one_kind_are_one_line(model, data, tmp_path, capsys):
    line = {"image": "0.png", "prefix": "detect x", "suffix": "<loc0100><loc0100><loc0500> x"}
    lines = [json.dumps(line | {"prefix": f"detect {i}"}) for i in range(50)] + [json.dumps(line | {"suffix": " red"})]
    (data / "warnings.jsonl").write_text("\n".join(lines))
    given = [*arguments(model, data, tmp_path / "run", "--preview"), f"--train={data / 'warnings.jsonl'}"]
    said = [line for line in run(capsys, *given)[1].splitlines() if line.startswith("warning: ")]
    assert len(said) == 2 and said[0].endswith("(and 49 more lines like it)")
    assert "warnings.jsonl:1: a box of fewer than four" in said[0]
    assert "warnings.jsonl:51: the suffix begins or ends with white space" in said[1]


def test_pictures_are_found_in_another_folder(model, data, tmp_path, capsys):
    for name in ("train", "valid"):
        shutil.copy(data / f"{name}.jsonl", tmp_path)
    given = [*arguments(model, tmp_path, tmp_path / "run", f"--valid={tmp_path / 'valid.jsonl'}"), "--steps=1"]
    assert run(capsys, *given)[0] == 3
    code, said = run(capsys, *given, f"--image_dir={tmp_path / 'none'}")
    assert code == 3 and "none is not a folder" in said
    assert run(capsys, *given, f"--image_dir={data}")[0] == 0


def test_no_flags_at_all_are_told_what_is_needed():
    done = subprocess.run([sys.executable, *ONE], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (2, "error: --train is None, but a JSONL file of examples is needed.\n")


def test_a_home_folder_and_a_rank_without_others_are_understood(model, data, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RANK", "1")
    shutil.copytree(data, tmp_path / "data")
    given = [*arguments(model, data, "~/run"), "--train=~/data/train.jsonl", "--valid=~/data/valid.jsonl", "--steps=1"]
    assert run(capsys, *given)[0] == 0
    assert (tmp_path / "run" / "model").exists()


def test_a_missing_file_is_reported_before_torch_is_imported():
    code = "import sys; from paligemma.programs import finetune; sys.argv[1:] = ['--train', 'none.jsonl', '--output', 'x']; "
    code += "code = finetune.main(); "
    code += "sys.exit(code if 'torch' not in sys.modules else 99)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == DatasetError.code and "none.jsonl does not exist" in done.stderr


def test_a_gpu_without_memory_ends_a_run_whose_last_checkpoint_is_kept(model, data, tmp_path, capsys, monkeypatch):
    plain, given = training.Trainer.update, arguments(model, data, tmp_path / "run", "--save_every=2")

    def update(self):
        if self.step == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore lines")
        return plain(self)

    with monkeypatch.context() as patch:
        patch.setattr(training.Trainer, "update", update)
        code, said = run(capsys, *given)
    assert code == 6 and "memory ran out while training. CUDA out of memory. Tried to allocate 2.00 GiB. The last check" in said
    assert [folder.name for folder in run_folder.checkpoints(tmp_path / "run" / "checkpoints")] == ["step_00000002"]
    code, said = run(capsys, *given, "--resume", "--micro_batch_size=1", "--gradient_checkpointing")
    assert code == 0 and "micro_batch_size was 2 and is 1; gradient_checkpointing was False and is True" in said
    assert [step for step, _ in losses(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]


def test_a_gpu_without_memory_for_an_evaluation_ends_the_run_after_its_checkpoint(model, data, tmp_path, capsys, monkeypatch):
    def fail(*_arguments):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr("paligemma.learning.run.merged_model", fail)
    code, said = run(capsys, *arguments(model, data, tmp_path / "run", f"--valid={data / 'valid.jsonl'}", "--evaluate_every=2"))
    assert code == 6 and "error: memory ran out while evaluating. CUDA out of memory. Take --method lora" in said
    assert [folder.name for folder in run_folder.checkpoints(tmp_path / "run" / "checkpoints")] == ["step_00000002"]


def test_memory_is_estimated_before_it_is_taken(model, data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("paligemma.machine.free_memory", lambda _: 10_000)
    code, said = run(capsys, *arguments(model, data, tmp_path / "run"))
    assert code == 6 and "fine-tuning takes 0.0" in said and "0.00 GiB free. Take --method lora, --gradient_checkpointing" in said


@pytest.mark.parametrize("family", ["gemma", "gemma2"])
def test_the_estimate_of_memory_is_what_layers_keep_for_the_gradient(family):
    """What autograd stores for two more rows, counted by its hooks. Attention with a soft cap stores several score matrices."""
    tokens, patches = 200, 64
    text = {"model_type": family, "hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 2, "num_attention_heads": 4}
    text |= {"num_key_value_heads": 1, "head_dim": 64, "max_position_embeddings": 512, "vocab_size": 320}
    vision = {"hidden_size": 144, "intermediate_size": 432, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 112}
    vision |= {"patch_size": 14, "projection_dim": 192}
    raw = {"model_type": "paligemma", "vision_config": vision, "text_config": text, "image_token_index": 300}
    model = PaliGemmaForConditionalGeneration(PaliGemmaConfig.from_hf(raw))
    training.freeze_except(model, training.ALL)
    kept, estimated, weighing = {}, {}, {parameter.data_ptr() for parameter in model.parameters()}
    for rows in (1, 3):
        found = {}
        ids = torch.full((rows, patches + tokens), 5)
        ids[:, :patches] = 300
        is_token, is_answer = torch.ones_like(ids), (torch.arange(patches + tokens) >= patches + tokens - 3).expand_as(ids).long()
        keep = partial(lambda found, x: found.setdefault(x.untyped_storage().data_ptr(), x), found)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            model.hidden(ids, torch.randn(rows, 3, 112, 112), is_token, is_answer, None)
        kept[rows] = sum(x.untyped_storage().nbytes() for place, x in found.items() if place not in weighing)
        plan = training.Plan(steps=1, micro_batch_size=rows, dtype=torch.float32)
        logits = rows * 64 * 320 * 4 * 3
        estimated[rows] = memory_needed(model, plan, tokens, False) - logits
    assert estimated[3] - estimated[1] == pytest.approx(kept[3] - kept[1], rel=0.15)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_estimate_counts_the_copies_of_weights_that_bfloat16_makes(family, checkpointing):
    """What autograd keeps for the backward pass, counted by its hooks."""
    model, kept = make_model(family), {}
    training.freeze_except(model, training.ALL)
    matrices = {shape for p in model.parameters() if p.dim() > 1 for shape in (p.shape, p.shape[::-1])}
    estimated = bytes_of_copies(model, training.Plan(steps=1), checkpointing)
    if checkpointing:
        training.checkpoint_activations(model)

    def keep(x):
        if x.dtype == torch.bfloat16 and x.shape in matrices:
            kept[x.untyped_storage().data_ptr()] = x
        return x

    batch = make_batch([(1, 5, 3)])
    batch["labels"] = torch.where(batch["token_type_ids"] == 1, batch["input_ids"], -100)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x), torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        training.answer_losses(model, batch)
    assert sum(x.untyped_storage().nbytes() for x in kept.values()) == pytest.approx(estimated, rel=0.02)
    assert bytes_of_copies(model, training.Plan(steps=1, dtype=torch.float32), checkpointing) == 0


# Settings


def test_the_example_of_settings_has_them_all_with_their_defaults():
    text = (ROOT / "examples" / "finetune.yaml").read_text()
    settings = yaml.safe_load(text)
    defaults = {field.name: field.default for field in fields(finetune.Flags)}
    assert {name: defaults[name] for name in settings} == settings
    named = set(re.findall(r"^(?:# )?(\w+):", text, re.MULTILINE))
    others = {"config", "revision", "steps", "preview", "resume", "tensorboard", "verbose", "debug"}
    assert named | others | {name for name in defaults if name.startswith("learning_rate_")} == set(defaults)


def test_flags_beat_the_file_and_lists_become_commas(tmp_path):
    (tmp_path / "c.yaml").write_text("epochs: 3\nclip: 0.5\nparts: [attention, projector]\nskip_bad: true\nvalid: null\n")
    given = ["--config", str(tmp_path / "c.yaml"), "--train=t", "--output=o", "--clip=2"]
    flags = finetune.commandline.read_flags(finetune.Flags, given)
    assert (flags.epochs, flags.clip, flags.parts, flags.skip_bad, flags.valid) == (3, 2, "attention,projector", True, None)


ALIASES = "\n".join(["a0: &a0 [x]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 10))])  # 9^9 texts


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("learning_rat: 1", "c.yaml:1: unknown setting learning_rat. Did you mean learning_rate?"),
        ("rows: 1", "c.yaml:1: unknown setting rows. Did you mean micro_batch_size?"),
        ("config: x", "unknown setting config"),
        ("x" * 1000 + ": 1", "unknown setting x{80}[.]"),
        ("- a", "contains a list"),
        ("a", "contains a text"),
        ("a: [", r"c.yaml:\d+:\d+ is not YAML"),
        ("a: 1\n--- \nb: 2", "is not YAML"),
        ("clip: 1\nclip: 2", "c.yaml:2: clip is given twice"),
        ("clip: {a: 1}", "c.yaml:1: clip is a mapping"),
        ("? [a]\n: 1", "unknown setting"),
        ("parts: [[a]]", "c.yaml:1:9: a value may be a list, but not"),
        ("[" * 3000, "but not a list of lists or mappings"),
        ("{a: " * 3000, "but not a list of lists or mappings"),
        (ALIASES, "c.yaml:1:5: aliases"),
        ("<<: *a", "aliases"),
        ("output: &a x", "aliases"),
        ("!!python/object/apply:os.system ['true']", "tags"),
        *((f"seed: {value}", "tags") for value in ("!!int ''", "!!bool maybe", "!!timestamp x", "! x", "!!binary x")),
        ("!!map {}", "tags"),
        ("%TAG ! tag:x,2000:\n---\nseed: !a 1", "tags"),
        ("a: \"\\ud800\"", "unknown setting a"),
        ("output: \"\\UFFFFFFFF\"", "is not YAML"),
        ("? {a: b}\n: 1", "c.yaml:1: unknown setting a mapping"),
        ("\0", "is not YAML"),
        (b"\xff\xfes\0e\0", "is not YAML"),
        ("#" * 70_000, "has 70000 bytes, and 65536 is the limit"),
    ],
)
def test_texts_that_are_not_settings_are_refused(tmp_path, text, says):
    (tmp_path / "c.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UsageError, match=says) as caught:
        read_config(str(tmp_path / "c.yaml"), finetune.SETTINGS)
    assert "\n" not in caught.value.message and len(caught.value.message) < 500


def test_paths_without_a_settings_file_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "dangling.yaml").symlink_to("nowhere")
    for name in ("none.yaml", "pipe.yaml", "dangling.yaml", ".", "x" * 300, "a\0b"):
        with pytest.raises(UsageError):
            read_config(str(tmp_path / name), finetune.SETTINGS)


NO_NUMBERS = ["f" * 5000, "9" * 5000, "1" + "0" * 400, "1e999", ".inf", ".nan", "2024-13-45", "1:30", "0x1f"]


@pytest.mark.parametrize("value", NO_NUMBERS)
@pytest.mark.parametrize("name", [*finetune.COUNTS, "epochs", "seed", "lora_alpha", "warmup", "skip_bad", "max_text_tokens"])
def test_a_value_that_is_not_a_number_is_a_usage_error(tmp_path, name, value):
    (tmp_path / "c.yaml").write_text(f"{name}: {value}")
    with pytest.raises(UsageError, match=f"--{name} is"):
        finetune.commandline.read_flags(finetune.Flags, [f"--config={tmp_path / 'c.yaml'}", "--train=t", "--output=o"])


@pytest.mark.parametrize("name", finetune.PATHS)
def test_an_empty_path_is_refused_and_one_with_a_nul_does_not_exist(tmp_path, name):
    with pytest.raises(UsageError, match=f"--{name} is ''"):
        finetune.commandline.read_flags(finetune.Flags, [f"--{name}=", "--train=t", "--output=o"])
    run_folder.check_inputs(tmp_path, [(f"--{name}", "a\0b")])


@given(st.binary(max_size=300) | st.text(alphabet="ab:-[]{},&*!?|>'\"%#@ \n\t0.~<", max_size=300))
def test_no_settings_raise_anything_else(tmp_path_factory, text):
    file = tmp_path_factory.mktemp("settings") / "c.yaml"
    file.write_bytes(text.encode() if isinstance(text, str) else text)
    with suppress(UsageError):
        read_config(str(file), finetune.SETTINGS)


@pytest.mark.parametrize("text", ["", "# nothing\n", "---\n", "\ufeff", "valid: ~\nseed: null\nclip:\n", "{}"])
def test_settings_that_set_nothing(tmp_path, text):
    (tmp_path / "c.yaml").write_text(text, encoding="utf-8")
    assert read_config(str(tmp_path / "c.yaml"), finetune.SETTINGS) == []


def test_texts_of_settings_stay_as_they_are(tmp_path):
    (tmp_path / "c.yaml").write_text("output: 2024-01-02\nvalid: 'null'\nseed: 010\nskip_bad: yes\ntrain: no\n")
    expected = ["--output=2024-01-02", "--valid=null", "--seed=010", "--skip_bad=yes", "--train=no"]
    assert read_config(str(tmp_path / "c.yaml"), finetune.SETTINGS) == expected


# The preview


def test_a_preview_is_drawn_and_nothing_is_learned(model, data, tmp_path, capsys):
    code, said = run(capsys, *arguments(model, data, tmp_path / "run", "--preview", "--augment=zoom"))
    assert code == 0 and [path.name for path in (tmp_path / "run").iterdir()] == ["preview.png"]
    with Image.open(tmp_path / "run" / "preview.png") as page:
        assert page.width == 4 * 336 and page.height == 2 * (336 + 48)
    assert run(capsys, *arguments(model, data, tmp_path / "run"), "--steps=1")[0] == 0  # and then the run may begin


def test_default_rates_are_those_of_the_method():
    flags = finetune.commandline.read_flags(finetune.Flags, ["--train=t", "--output=o", "--method=lora"])
    assert flags.plan(8).learning_rate == 2e-4 and flags.trained_parts == ["language_model"]
    assert lora.LoraConfig(flags.lora_r, flags.lora_alpha, flags.lora_dropout) == lora.LoraConfig()


@pytest.mark.parametrize("place", ["metrics.jsonl", "model/train.jsonl", "link.jsonl"])
def test_a_run_never_writes_over_what_it_reads(tmp_path, capsys, place):
    (tmp_path / "run" / "model").mkdir(parents=True)
    (tmp_path / "link.jsonl").symlink_to("run/metrics.jsonl")
    file = tmp_path / place if place == "link.jsonl" else tmp_path / "run" / place
    file.write_text('{"image": "0.png", "prefix": "", "suffix": ""}\n')
    code, err = run(capsys, f"--train={file}", f"--output={tmp_path / 'run'}")
    assert code == 2 and err.startswith("error: --") and err.count("\n") == 1 and file.stat().st_size == 47
