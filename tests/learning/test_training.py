"""Loss and gradients against transformers, leaks, padding, and runs that are stopped anywhere and resumed bit for bit."""

import gc
import json
import os
import shutil
import struct
import subprocess
import sys
import weakref

import pytest
import torch
import torch.nn.functional as F

from paligemma.errors import CheckpointError, OutputError, UsageError
from paligemma.learning import run_folder, training
from paligemma.modeling_paligemma import suffix_loss
from tests.tiny import FAMILIES, in_double, make_batch, make_model, make_pair, positions, widen

ROWS = [(1, 5, 3), (2, 3, 6), (1, 9, 1)]
COUNT = 10  # examples of the toy dataset


# In float64 (tiny.in_double) two orders of one sum differ by 1e-13 or so in losses of 10; a missing term moves them by 1e-3.
SAME = 1e-9


def with_labels(batch):
    is_answer = batch["token_type_ids"] * batch["attention_mask"] == 1
    return batch | {"labels": torch.where(is_answer, batch["input_ids"], -100)}


def toy_batch(examples):
    """A batch padded on the left; the tokens of an example do not depend on the rest of the batch."""
    alone = [with_labels(make_batch([(1, 5, 2 + index % 4)], seed=index)) for _, index in examples]
    longest = max(row["input_ids"].shape[1] for row in alone)
    fill = {"input_ids": 0, "attention_mask": 0, "token_type_ids": 0, "labels": -100}
    batch = {
        key: torch.cat([F.pad(row[key], (longest - row[key].shape[1], 0), value=value) for row in alone])
        for key, value in fill.items()
    }
    return batch | {"pixel_values": torch.cat([row["pixel_values"] for row in alone])}


def make_trainer(family="gemma", parts=training.ALL, **plan):
    model = make_model(family)
    training.freeze_except(model, parts)
    settings = {"steps": 8, "batch_size": 4, "micro_batch_size": 2, "learning_rate": 1e-2, "dtype": torch.float32} | plan
    return training.Trainer(model, training.Plan(**settings), toy_batch, COUNT)


def weights(trainer):
    return {name: parameter.detach().clone() for name, parameter in trainer.trained.items()}


@pytest.fixture
def double():
    with in_double():
        yield


# The loss


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_equal_those_of_transformers(family):
    model, reference = make_pair(family)
    model, reference = model.double(), widen(reference)
    batch = with_labels(make_batch(ROWS))
    with in_double():
        losses, _ = training.answer_losses(model, batch)
        losses.mean().backward()
        theirs = reference(**batch, position_ids=positions(batch), use_cache=False).loss
        theirs.backward()
    assert losses.mean().item() == pytest.approx(theirs.item(), abs=SAME)
    expected = {name: parameter.grad for name, parameter in reference.named_parameters() if parameter.grad is not None}
    for name, parameter in model.named_parameters():
        other = "model." + name.replace("language_model.model.", "language_model.").replace("vision_model.", "")
        torch.testing.assert_close(parameter.grad, expected[other], rtol=0, atol=SAME)


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("reduction", ["example", "token"])
def test_weights_give_the_means_of_suffix_loss(reduction):
    model, batch = make_model("gemma"), with_labels(make_batch(ROWS))
    losses, row = training.answer_losses(model, batch)
    weight, total = training.token_weights(batch["labels"], reduction)
    expected = suffix_loss(model(**{key: value for key, value in batch.items() if key != "labels"}), batch["labels"], reduction)
    torch.testing.assert_close((losses * weight[row]).sum() / total, expected, rtol=0, atol=SAME)


def test_an_answer_token_never_reaches_what_comes_before_it():
    # If a token of the answer changes, the logits that predict it and all earlier logits must stay equal. A leak would make a
    # loss of zero meaningless. Later logits do change.
    model, batch = make_model("gemma"), with_labels(make_batch([(1, 5, 6)]))
    before, _ = training.answer_losses(model, batch)
    changed = {key: value.clone() for key, value in batch.items()}
    changed["input_ids"][0, -3] += 1
    after, _ = training.answer_losses(model, changed | {"labels": batch["labels"]})
    assert torch.equal(before[:4], after[:4])
    assert (before[4:] != after[4:]).all()


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(side):
    model, batch = make_model("gemma"), with_labels(make_batch([(1, 5, 6)]))
    alone, _ = training.answer_losses(model, batch)
    pad = (300, 0) if side == "left" else (0, 300)
    padded = {key: F.pad(value, pad, value=-100 if key == "labels" else 0) for key, value in batch.items() if value.dim() == 2}
    losses, _ = training.answer_losses(model, padded | {"pixel_values": batch["pixel_values"]})
    torch.testing.assert_close(losses, alone, rtol=0, atol=SAME)


@pytest.mark.usefixtures("double")
def test_label_smoothing_is_that_of_big_vision():
    model, batch = make_model("gemma"), with_labels(make_batch(ROWS))
    losses, _ = training.answer_losses(model, batch, label_smoothing=0.3)
    targets = batch["labels"][:, 1:]
    logprobs = model(**{key: value for key, value in batch.items() if key != "labels"})[:, :-1][targets != -100].log_softmax(-1)
    wanted = torch.full_like(logprobs, 0.3 / (logprobs.shape[1] - 1)).scatter(1, targets[targets != -100][:, None], 0.7)
    torch.testing.assert_close(losses, -(wanted * logprobs).sum(-1), rtol=0, atol=SAME)


def test_only_answers_get_logits(monkeypatch):
    model, batch = make_model("gemma"), with_labels(make_batch(ROWS))
    seen = []
    made = model.language_model.logits
    monkeypatch.setattr(model.language_model, "logits", lambda x: seen.append(x.shape) or made(x))
    training.answer_losses(model, batch)
    assert seen == [(10, 40)]  # 3 + 6 + 1 tokens


# What is trained


@pytest.mark.parametrize("parts", [("attention",), ("vision_tower",), ("projector",), ("language_model", "projector")])
def test_parts_that_are_not_trained_stay_to_the_last_bit(parts):
    trainer = make_trainer(parts=parts)
    before = {name: parameter.clone() for name, parameter in trainer.model.named_parameters()}
    trainer.update()
    moved = {name for name, parameter in trainer.model.named_parameters() if not torch.equal(parameter, before[name])}
    chosen = {name for name in before if any(training.PARTS[part].fullmatch(name) for part in parts)}
    assert moved and moved <= chosen
    # Only rows of the embedding that were seen, and no bias of keys (it cancels in the softmax), may stay as they were.
    assert {name for name in chosen - moved if "k_proj.bias" not in name} == set()


def test_an_unknown_part_is_refused():
    with pytest.raises(UsageError, match="'tower'.*attention, language_model, vision_tower, projector"):
        training.freeze_except(make_model("gemma"), ("tower",))


def test_trained_weights_are_float32_and_frozen_ones_stay_as_stored():
    model = make_model("gemma", dtype=torch.bfloat16)
    training.freeze_except(model, ("projector",))
    dtypes = {parameter.dtype: parameter.requires_grad for parameter in model.parameters()}
    assert dtypes == {torch.bfloat16: False, torch.float32: True}


def test_small_updates_are_not_lost_to_bfloat16():
    model = make_model("gemma", dtype=torch.bfloat16)
    before = model.multi_modal_projector.linear.weight.float().clone()
    training.freeze_except(model, ("projector",))
    trainer = training.Trainer(model, training.Plan(steps=8, learning_rate=1e-6, warmup=0), toy_batch, COUNT)
    trainer.update()
    assert (model.multi_modal_projector.linear.weight != before).float().mean() > 0.99


def test_rates_of_parts_and_decay_of_matrices_only():
    trainer = make_trainer(rates={"vision_tower": 5e-3}, weight_decay=0.1)
    rate = {id(p): (group["lr"], group["weight_decay"]) for group in trainer.optimiser.param_groups for p in group["params"]}
    for name, parameter in trainer.trained.items():
        assert rate[id(parameter)] == (5e-3 if "vision" in name else 1e-2, 0.1 if parameter.dim() > 1 else 0.0)


def test_recomputed_activations_give_the_same_gradients():
    plain, thrifty = make_trainer(), make_trainer()
    training.checkpoint_activations(thrifty.model)
    assert [plain.update().loss for _ in range(3)] == [thrifty.update().loss for _ in range(3)]


# Updates


def test_the_rate_rises_and_falls():
    plan = training.Plan(steps=100, warmup=0.1)
    rates = [plan.schedule_factor(step) for step in range(100)]
    assert rates[0] == pytest.approx(1 / 11) and rates[10] == 1 and rates[55] == pytest.approx(0.5) and rates[99] < 0.001
    assert rates[:11] == sorted(rates[:11]) and rates[10:] == sorted(rates[10:], reverse=True)


def test_every_example_comes_once_in_an_epoch():
    seen = [place for step in range(5) for place in training.examples_of(step, COUNT, 4, seed=3)]
    for epoch in range(2):
        assert sorted(index for of, index in seen if of == epoch) == list(range(COUNT))
    assert training.draw_order(COUNT, 3, 0) != training.draw_order(COUNT, 3, 1) != training.draw_order(COUNT, 4, 1)


def test_a_batch_larger_than_the_dataset_takes_from_the_next_epochs():
    places = training.examples_of(0, 3, 8, seed=0)
    assert [epoch for epoch, _ in places] == [0, 0, 0, 1, 1, 1, 2, 2]


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("reduction", ["example", "token"])
def test_accumulated_micro_batches_are_one_batch(reduction):
    whole, parts = make_trainer(micro_batch_size=4, reduction=reduction), make_trainer(micro_batch_size=1, reduction=reduction)
    for _ in range(2):
        one, many = whole.update(), parts.update()
        assert many.loss == pytest.approx(one.loss, abs=SAME) and many.grad_norm == pytest.approx(one.grad_norm, abs=SAME)
        assert one.tokens == many.tokens


@pytest.mark.parametrize("clip", [0.01, 1e9])
def test_only_gradients_above_the_maximum_norm_are_clipped(clip, monkeypatch):
    trainer, lengths = make_trainer(clip=clip), []
    step = trainer.optimiser.step

    def measure():
        lengths.append(float(torch.cat([p.grad.flatten() for p in trainer.trained.values()]).norm()))
        step()

    monkeypatch.setattr(trainer.optimiser, "step", measure)
    before = trainer.update().grad_norm
    assert before > 0.1 and lengths == [pytest.approx(min(clip, before), rel=1e-3)]


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("reduction", ["example", "token"])
def test_the_gradient_is_that_of_the_mean_over_the_whole_batch(reduction):
    trainer = make_trainer(batch_size=6, micro_batch_size=2, reduction=reduction)
    batch = toy_batch(training.examples_of(0, COUNT, 6, 0))
    labels = batch.pop("labels")
    loss = suffix_loss(trainer.model(**batch), labels, reduction)
    expected = torch.cat([grad.flatten() for grad in torch.autograd.grad(loss, list(trainer.trained.values()))]).norm()
    done = trainer.update()
    assert done.loss == pytest.approx(loss.item(), abs=SAME) and done.grad_norm == pytest.approx(expected.item(), abs=SAME)


def test_only_the_pictures_of_one_micro_batch_are_in_memory():
    trainer, alive, most = make_trainer(batch_size=8, micro_batch_size=2), weakref.WeakSet(), []

    def make_batch(examples):
        batch = toy_batch(examples)
        most.append(len(alive))
        alive.add(batch["pixel_values"])
        return batch

    trainer.make_batch = make_batch
    trainer.update()
    gc.collect()
    assert len(most) == 4 and max(most) <= 1


def test_the_loss_falls():
    trainer = make_trainer(steps=30)
    losses = [trainer.update().loss for _ in range(30)]
    assert sum(losses[-5:]) < 0.3 * sum(losses[:5])


def test_an_update_that_is_not_finite_is_skipped_and_ten_in_a_row_end_the_run():
    trainer = make_trainer(steps=40)
    trainer.update()
    before, clean = weights(trainer), trainer.make_batch
    trainer.make_batch = lambda examples: clean(examples) | {"pixel_values": torch.full((len(examples), 3, 28, 28), torch.nan)}
    done = trainer.update()
    assert done.is_skipped and (trainer.step, trainer.updates) == (2, 1)
    assert all(torch.equal(value, before[name]) for name, value in weights(trainer).items())
    trainer.make_batch = clean
    assert not trainer.update().is_skipped and trainer.bad_steps == 0
    trainer.make_batch = lambda examples: clean(examples) | {"pixel_values": torch.full((len(examples), 3, 28, 28), torch.nan)}
    with pytest.raises(CheckpointError, match="10 updates in a row"):
        for _ in range(10):
            trainer.update()


# Stopping and resuming


def test_a_resumed_run_is_bit_for_bit_an_uninterrupted_one(tmp_path):
    whole = make_trainer()
    expected = [whole.update() for _ in range(8)]
    first = make_trainer()
    for _ in range(3):
        first.update()
    second = make_trainer()
    second.restore(first.save(tmp_path))
    assert [second.update() for _ in range(5)] == expected[3:]
    assert all(torch.equal(value, weights(whole)[name]) for name, value in weights(second).items())


def test_a_trainer_can_go_back_to_an_earlier_checkpoint(tmp_path):
    """The optimiser already has a state, whose count of updates must go back, too."""
    trainer = make_trainer()
    trainer.update()
    folder = trainer.save(tmp_path)
    expected = [trainer.update() for _ in range(4)]
    trainer.restore(folder)
    assert [trainer.update() for _ in range(4)] == expected


def make_dropping():
    """A trainer of an adapter that drops half of its inputs."""
    from paligemma.layers import lora

    model = make_model("gemma")
    config = lora.LoraConfig(r=2, lora_dropout=0.5)
    torch.manual_seed(0)
    lora.inject(model, config, lora.targets(model))
    return training.Trainer(model, training.Plan(steps=6, learning_rate=1e-2, dtype=torch.float32), toy_batch, COUNT)


def test_each_update_drops_other_inputs(monkeypatch):
    trainer, drawn = make_dropping(), []
    monkeypatch.setattr(trainer, "micro_batches", lambda: iter(()))
    for _ in range(3):
        trainer.update()
        drawn.append(float(torch.rand(())))  # drawn from the seed of the update, as dropout is
    assert len(set(drawn)) == 3


def test_dropout_of_an_adapter_is_resumed_bit_for_bit(tmp_path):
    whole, first, second = make_dropping(), make_dropping(), make_dropping()
    expected = [whole.update().loss for _ in range(6)]
    for _ in range(2):
        first.update()
    second.restore(first.save(tmp_path))
    assert [second.update().loss for _ in range(4)] == expected[2:]


def test_old_checkpoints_are_deleted_and_incomplete_ones_ignored(tmp_path):
    trainer = make_trainer()
    for _ in range(4):
        trainer.update()
        trainer.save(tmp_path, keep=2)
    (tmp_path / "step_00000009.tmp").mkdir()
    (tmp_path / "step_00000008").mkdir()  # without a state, so it is incomplete
    assert [path.name for path in run_folder.checkpoints(tmp_path)] == ["step_00000003", "step_00000004"]
    trainer.save(tmp_path)
    assert not list(tmp_path.glob("*.tmp"))  # it may be as large as the others


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    trainer = make_trainer()
    trainer.update()
    trainer.save(tmp_path)
    trainer.update()

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(training, "sync_folder", full)
    with pytest.raises(OutputError, match="No space left"):
        trainer.save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    trainer = make_trainer(parts=("projector",))
    trainer.update()
    folder = trainer.save(tmp_path)
    with pytest.raises(CheckpointError, match="cannot be used to resume this run") as caught:
        make_trainer(parts=("attention",)).restore(folder)
    assert "\n" not in caught.value.message


WRONG = [{"step": wrong} for wrong in (1.0, True, 2, 10**400)] + [{"updates": wrong} for wrong in (-1, 2, None)]
WRONG += [{"bad_steps": wrong} for wrong in (10**400, float("nan"), [])]
HOSTILE_STATES = [
    *("{", "[]", "{}", "[" * 50_000, '{"step": 1e999, "updates": 1, "bad_steps": 0}', "\x00", '{"step": "1"}'),
    *(json.dumps({"step": 1, "updates": 1, "bad_steps": 0} | wrong) for wrong in WRONG),
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The checkpoint of one update of the projector."""
    trainer = make_trainer(parts=("projector",))
    trainer.update()
    return trainer.save(tmp_path_factory.mktemp("saved"))


@pytest.mark.parametrize("text", HOSTILE_STATES)
def test_a_state_that_is_not_of_its_checkpoint_is_refused(saved, tmp_path, text):
    folder = shutil.copytree(saved, tmp_path / saved.name)
    (folder / "state.json").write_text(text)
    with pytest.raises(CheckpointError) as caught:
        make_trainer(parts=("projector",)).restore(folder)
    assert "\n" not in caught.value.message and len(caught.value.message) < 500
    assert caught.value.message.endswith(f". Delete {saved.name}: the run resumes from the checkpoint before it.")
    assert "ownload" not in caught.value.message  # a checkpoint of a run cannot be downloaded


def with_header(change):
    """A function that rewrites the header of a safetensors file."""

    def rewrite(data):
        size = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + size])
        change(header)
        text = json.dumps(header).encode()
        return len(text).to_bytes(8, "little") + text + data[8 + size :]

    return rewrite


def with_values(name, value):
    """A function that replaces the first number of a tensor."""

    def rewrite(data):
        size = int.from_bytes(data[:8], "little")
        start = 8 + size + json.loads(data[8 : 8 + size])[name]["data_offsets"][0]
        return data[:start] + struct.pack("<f", value) + data[start + 4 :]

    return rewrite


WEIGHT = "multi_modal_projector.linear.weight"


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[: len(data) // 2],
        lambda data: data[:4],
        lambda _: b"",
        lambda data: (2**62).to_bytes(8, "little") + data[8:],
        lambda data: (2**64 - 1).to_bytes(8, "little") + data[8:],
        with_header(lambda header: header.pop(f"exp_avg.{WEIGHT}")),
        with_header(lambda header: header[f"exp_avg.{WEIGHT}"].update(shape=[10**400])),
        with_header(lambda header: header[f"exp_avg.{WEIGHT}"].update(shape="x")),
        with_header(lambda header: header[f"exp_avg.{WEIGHT}"].update(dtype="F1")),
        with_header(lambda header: header[f"exp_avg.{WEIGHT}"].update(data_offsets=[1e308, 2])),
        with_header(lambda header: header.update({"__metadata__": {"DCP_SHARDING_INFO": "["}})),
        with_header(lambda header: header.update({"__metadata__": {"DCP_SHARDING_INFO": '{"x": {"saved_offsets": 1}}'}})),
        with_values(f"exp_avg.{WEIGHT}", float("nan")),
        with_values(f"exp_avg_sq.{WEIGHT}", -1.0),
        with_values(f"model.{WEIGHT}", float("inf")),
    ],
)
def test_a_damaged_or_forged_checkpoint_is_refused(saved, tmp_path, damage):
    folder = shutil.copytree(saved, tmp_path / saved.name)
    (file,) = folder.glob("*.safetensors")
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(CheckpointError) as caught:
        make_trainer(parts=("projector",)).restore(folder)
    assert "\n" not in caught.value.message and len(caught.value.message) < 500


WORKER = """
import contextlib, sys, torch
from torch import distributed
torch.set_num_threads(1)
from paligemma.learning import run_folder, training
from tests.learning import test_training
from pathlib import Path
distributed.init_process_group("gloo")
import torch.distributed.fsdp, torch.distributed.checkpoint
stack = contextlib.ExitStack()
stack.enter_context(test_training.in_double())
model = test_training.make_model({family!r})
training.freeze_except(model, training.ALL)
training.shard(model, torch.device("cpu"))
plan = training.Plan(steps=8, batch_size=4, micro_batch_size=2, learning_rate=1e-2, dtype=torch.float32)
trainer = training.Trainer(model, plan, test_training.toy_batch, test_training.COUNT)
folder = Path(sys.argv[1])
if run_folder.checkpoints(folder):
    trainer.restore(run_folder.checkpoints(folder)[-1])
updates = [trainer.update() for _ in range(4)]
trainer.save(folder)
stack.close()
if trainer.rank == 0:
    numbers = [[update.loss for update in updates], [update.grad_norm for update in updates]]
    (folder / "numbers.json").write_text(__import__("json").dumps(numbers))
distributed.destroy_process_group()
"""


def test_two_processes_have_the_losses_of_one_and_continue_from_its_checkpoint(tmp_path, family="gemma2"):
    """In float64 on both sides: sums over processes have another order, which after eight updates is 1e-12 there."""

    def require_same(folder, updates):
        losses, norms = json.loads((folder / "numbers.json").read_text())
        assert losses == pytest.approx([update.loss for update in updates], rel=1e-8)
        # The losses alone would not show a constant factor of the gradient, which cancels in AdamW.
        assert norms == pytest.approx([update.grad_norm for update in updates], rel=1e-8)

    def updates_of(trainer):
        with in_double():
            return [trainer.update() for _ in range(4)]

    with in_double():
        one, back = make_trainer(family), make_trainer(family)
    first = updates_of(one)
    one.save(tmp_path)
    (tmp_path / "worker.py").write_text(WORKER.format(family=family))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    command = [*launcher, str(tmp_path / "worker.py")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    both = tmp_path / "both"
    both.mkdir()
    subprocess.run([*command, str(both)], check=True, env=environment, timeout=240)
    require_same(both, first)
    later = updates_of(one)
    # Two processes continue from the checkpoint of one process, and one process from theirs.
    subprocess.run([*command, str(tmp_path)], check=True, env=environment, timeout=240)
    require_same(tmp_path, later)
    back.restore(run_folder.checkpoints(both)[-1])
    assert [update.loss for update in updates_of(back)] == pytest.approx([update.loss for update in later], rel=1e-8)


# Random numbers, also on a GPU


def test_a_resumed_run_seeds_the_generators_of_all_gpus_as_an_uninterrupted_one(tmp_path, monkeypatch):
    """Dropout on a GPU draws from the generator of the GPU, whose state no checkpoint contains."""
    seeds = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeds.append)

    def seeds_of(trainer, updates, rank=0):
        trainer.rank = rank
        seeds.clear()
        for _ in range(updates):
            trainer.update()
        return seeds[:]

    expected = seeds_of(make_dropping(), 4)
    first, second = make_dropping(), make_dropping()
    assert seeds_of(first, 2) == expected[:2]
    second.restore(first.save(tmp_path))
    assert seeds_of(second, 2) == expected[2:] and len(set(expected)) == 4
    assert not set(seeds_of(make_dropping(), 4, rank=1)) & set(expected)  # another process drops other inputs


def test_recomputed_activations_have_the_same_dropout():
    plain, thrifty = make_dropping(), make_dropping()
    training.checkpoint_activations(thrifty.model)
    assert [plain.update().loss for _ in range(3)] == [thrifty.update().loss for _ in range(3)]
    assert all(torch.equal(value, weights(thrifty)[name]) for name, value in weights(plain).items())


def test_weights_are_cast_without_a_copy_that_outlives_its_use(monkeypatch):
    trainer, found = make_trainer(dtype=torch.bfloat16), []
    hidden = trainer.model.hidden

    def record(*given, **named):
        found.append(torch.is_autocast_cache_enabled())
        return hidden(*given, **named)

    monkeypatch.setattr(trainer.model, "hidden", record)
    trainer.update()
    assert found == [False, False]
