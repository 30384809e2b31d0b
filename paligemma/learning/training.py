"""Fine-tuning, one update at a time: the loss, what is trained, the optimiser, and stopping without losing a bit.

    frozen weights stay as they are, in the dtype of the file
    trained ones are float32 (the master copy), computed with in bfloat16 where that is asked for, and have two moments in AdamW

An update of 1e-5 is far below bfloat16's step of 1/256: on bfloat16 weights it would be rounded away. Hence the float32 copy.

Everything random is a function of the seed and the number of the update: the order of the examples, their augmentation, dropout.
So a run that was killed needs no random state to go on: with its weights and moments it repeats the very numbers of a run
that was not. Several processes (torchrun) share the weights with FSDP2; each sees its share of every batch.

Takes a model and imports none. Sources: AdamW (arXiv:1711.05101), FSDP (arXiv:2304.11277), the official trainer of PaliGemma
(big_vision, trainers/proj/paligemma/train.py) for the mean over examples. Checked in tests/learning/test_training.py.
Shapes: B rows, L tokens of a row, T answer tokens of all rows together, D width, V vocabulary.
"""

import json
import logging
import math
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn

from paligemma.checkpoints.safetensors_files import read_header
from paligemma.errors import CheckpointError, OutputError, UsageError
from paligemma.files import move_into_place, names_in, read_json, stat_path, sync_folder
from paligemma.vocabulary import IGNORE_INDEX

PARTS = {  # what may be trained, by the names of parameters; a part that is told apart from another one stands before it
    "attention": re.compile(r"language_model\..*\.self_attn\..*"),
    "language_model": re.compile(r"language_model\..*"),
    "vision_tower": re.compile(r"vision_tower\..*"),
    "projector": re.compile(r"multi_modal_projector\..*"),
}
ALL = ("language_model", "vision_tower", "projector")
STATE_NAME = "state.json"
STEP_FOLDER = re.compile(r"step_(\d{8})")
UNREADABLE = (  # what torch's reader of checkpoints raises for files that are damaged, of another model, or made up
    OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, AssertionError, ArithmeticError, MemoryError,
)  # fmt: skip
MOST_BAD_STEPS = 10  # in a row, whose loss or gradient is no number


# The loss


def answer_losses(model: nn.Module, batch: dict, label_smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
    """How surprised the model is by each token of the answers, in nats.

    Logits are made for the answers only: over pictures and prompts, which nobody asks for, they would be gigabytes.

    Args:
        batch: what the processor returned for pictures, prompts and suffixes, labels included.
        label_smoothing: probability that the target gives up to all other tokens together.
    Returns: float32[T], and int64[T], the row of each.
    Source: PaliGemma (arXiv:2407.07726), section 3.2.4; the smoothing of big_vision.
    """
    inputs = (batch.get(key) for key in ("input_ids", "pixel_values", "attention_mask", "token_type_ids"))
    x = model.hidden(*inputs, None)  # [B, L, D]
    targets = batch["labels"][:, 1:].to(x.device)  # [B, L-1]
    is_answer = targets != IGNORE_INDEX  # [B, L-1]
    logits = model.language_model.logits(x[:, :-1][is_answer])  # [T, V]
    count = logits.shape[-1]
    # torch gives the target a share of the smoothing, too; big_vision gives it to the others only.
    smoothing = label_smoothing * count / (count - 1)
    losses = F.cross_entropy(logits, targets[is_answer], reduction="none", label_smoothing=smoothing)  # [T]
    return losses, is_answer.nonzero()[:, 0]


def weights_of(labels: Tensor, reduction: str) -> tuple[Tensor, float]:
    """How much each row's mean counts, and the sum of that.

    Args:
        labels: int64[B, L].
        reduction: "example" = each answer counts as one, "token" = as its tokens.
    Returns: float32[B], the weight of one token of the row, and the total weight of the rows.
    """
    counts = (labels[:, 1:] != IGNORE_INDEX).sum(1)  # [B]
    if reduction == "token":
        return torch.ones(len(counts)), float(counts.sum())
    return 1 / counts.clamp(min=1).float(), float((counts > 0).sum())


# What is trained


def trainable(model: nn.Module, parts: Sequence[str]) -> None:
    """Freezes all but these parts; those become float32.

    Args:
        parts: names of PARTS.
    Raises: UsageError for another name.
    """
    unknown = [part for part in parts if part not in PARTS]
    if unknown or not parts:
        raise UsageError(f"parts is {unknown[0] if unknown else ''!r}. Of {', '.join(PARTS)}, one or several are needed.")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(PARTS[part].fullmatch(name) for part in parts))
    master_weights(model)


def master_weights(model: nn.Module) -> None:
    """Trained weights become float32: a copy that may be written to, where the model was mapped from a file."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad:
                setattr(module, name, nn.Parameter(parameter.detach().to(torch.float32, copy=True)))


def part_of(name: str) -> str:
    """The part of ALL that a parameter belongs to."""
    return next(part for part in ALL if PARTS[part].fullmatch(name))


def checkpoint_activations(model: nn.Module) -> None:
    """Layers forget what they computed and compute it again for the gradient: one more forward pass, less memory."""
    from torch.utils.checkpoint import checkpoint

    layers = [*model.language_model.model.layers, *model.vision_tower.vision_model.encoder.layers]
    for layer in layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)


def shard(model: nn.Module, device: torch.device) -> None:
    """Spreads weights, gradients and moments over all processes, layer by layer (FSDP2).

    What is computed in bfloat16 is left to autocast, as in one process, so that both do the same.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(device.type, (distributed.get_world_size(),))
    for layer in (*model.language_model.model.layers, *model.vision_tower.vision_model.encoder.layers):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    register_fsdp_forward_method(model, "hidden")  # what answer_losses calls


def rank_and_world() -> tuple[int, int]:
    """The rank of this process, and how many there are."""
    return (distributed.get_rank(), distributed.get_world_size()) if distributed.is_initialized() else (0, 1)


@dataclass(frozen=True)
class Plan:
    """How a model is trained.

    Args:
        steps: updates of the whole run.
        batch_size: examples of an update, all processes and accumulated passes together.
        rows: examples of one pass; the gradients of a batch are summed over its passes.
        learning_rate: at its peak. rates: of single parts, where they differ.
        warmup: share of the steps in which the rate rises from 0; then it falls to 0 along half a cosine.
        weight_decay: of matrices; norms and biases have none.
        clip: gradients longer than that are shortened to it.
        reduction, label_smoothing: of the loss.
        dtype: that is computed in.
    """

    steps: int
    batch_size: int = 8
    rows: int = 8
    learning_rate: float = 1e-5
    rates: dict[str, float] | None = None
    warmup: float = 0.05
    weight_decay: float = 0.0
    clip: float = 1.0
    reduction: str = "example"
    label_smoothing: float = 0.0
    seed: int = 0
    dtype: torch.dtype = torch.bfloat16

    def rate(self, step: int) -> float:
        """The factor on the learning rates in update `step`, from 0."""
        warm = self.warmup * self.steps
        if step < warm:
            return (step + 1) / (warm + 1)
        return 0.5 + 0.5 * math.cos(math.pi * (step - warm) / max(1, self.steps - warm))


@lru_cache(2)  # a batch may lie in two epochs; a million examples take longer to shuffle than a small model to learn from
def draw_order(count: int, seed: int, epoch: int) -> Sequence[int]:
    """The order of `count` examples in an epoch."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch)).tolist()


def examples_of(step: int, count: int, batch_size: int, seed: int) -> list[tuple[int, int]]:
    """The examples of an update as (epoch, index): the epochs one behind the other, cut into batches."""
    places = range(step * batch_size, (step + 1) * batch_size)
    orders = {epoch: draw_order(count, seed, epoch) for epoch in {place // count for place in places}}
    return [(place // count, orders[place // count][place % count]) for place in places]


@dataclass(frozen=True)
class Update:
    """What one update did: metrics.jsonl has a line of it."""

    step: int  # number of updates done, this one included: 1 after the first, everywhere (screen, log, checkpoints, curves)
    loss: float
    grad_norm: float
    learning_rate: float  # the highest, where parts have their own
    tokens: int
    is_skipped: bool  # loss or gradient was no number, and the weights stayed
    skipped: int  # updates so far of which that is true


class Trainer:
    """A model on its way, with its optimiser.

    Args:
        model: with requires_grad where it is to be trained (`trainable`, or lora.inject), sharded if there are several processes.
        plan: how.
        make_batch: from a list of (epoch, index) to what the processor returns for these examples, labels included.
        count: of the examples.
    Raises: UsageError for a batch that the processes cannot share evenly: one would wait for the others forever.
    """

    def __init__(self, model: nn.Module, plan: Plan, make_batch: Callable[[list[tuple[int, int]]], dict], count: int):
        self.model, self.plan, self.make_batch, self.count = model, plan, make_batch, count
        self.step, self.updates, self.bad_steps = 0, 0, 0
        self.rank, self.world = rank_and_world()
        if plan.batch_size % self.world:
            raise UsageError(
                f"--batch_size {plan.batch_size} cannot be shared by {self.world} processes. Take a multiple of that."
            )
        self.named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        for name, parameter in self.named.items():
            rate = (plan.rates or {}).get(part_of(name), plan.learning_rate)
            groups.setdefault((rate, plan.weight_decay if parameter.dim() > 1 else 0.0), []).append(parameter)
        self.peaks = [rate for rate, _ in groups]
        self.optimiser = torch.optim.AdamW(
            [{"params": parameters, "lr": rate, "weight_decay": decay} for (rate, decay), parameters in groups.items()]
        )

    def passes(self) -> Iterator[tuple[dict, Tensor, float]]:
        """The batches of this process in this update, each with the weight of a token in its rows, and of all of them."""
        examples = examples_of(self.step, self.count, self.plan.batch_size, self.plan.seed)
        mine = examples[self.rank :: self.world]
        for first in range(0, len(mine), self.plan.rows):
            batch = self.make_batch(mine[first : first + self.plan.rows])
            yield batch, *weights_of(batch["labels"], self.plan.reduction)

    def sums(self, *values: float) -> list[float]:
        """Each number's sum over all processes."""
        numbers = torch.tensor(values, dtype=torch.float64)
        if self.world > 1:
            distributed.all_reduce(numbers)
        return numbers.tolist()

    def update(self) -> Update:
        """One update of the weights, or none where the numbers are no numbers. Raises: CheckpointError after a run of those."""
        device, loss, total, tokens = next(iter(self.named.values())).device, torch.zeros(()), 0.0, 0
        torch.manual_seed((self.plan.seed * 1_000_003 + self.step) * 1_009 + self.rank)  # of dropout
        self.model.train()
        for batch, of_token, weight in self.passes():
            with torch.autocast(device.type, self.plan.dtype, enabled=self.plan.dtype != torch.float32):
                losses, row = answer_losses(self.model, batch, self.plan.label_smoothing)  # [T], [T]
            share = (losses * of_token.to(device)[row.to(device)]).sum()
            (share * self.world).backward()  # FSDP takes the mean over processes, and here the sum is meant
            loss, total, tokens = loss + share.detach().cpu(), total + weight, tokens + len(losses)
        loss, total, tokens = self.sums(float(loss), total, tokens)
        loss /= max(total, 1.0)
        for parameter in self.named.values():  # only now is it known how much there was in all passes and processes
            if parameter.grad is not None:
                parameter.grad /= max(total, 1.0)
        norm = nn.utils.clip_grad_norm_(self.named.values(), self.plan.clip)
        norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
        is_skipped = not (math.isfinite(norm) and math.isfinite(loss))
        rate = self.plan.rate(self.step)
        for group, peak in zip(self.optimiser.param_groups, self.peaks, strict=True):
            group["lr"] = peak * rate
        if not is_skipped:
            self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self.step, self.updates = self.step + 1, self.updates + (not is_skipped)
        skipped = self.step - self.updates
        done = Update(self.step, loss, norm, max(self.peaks) * rate, int(tokens), is_skipped, skipped)
        self.bad_steps = self.bad_steps + 1 if is_skipped else 0
        if self.bad_steps >= MOST_BAD_STEPS:
            raise CheckpointError(
                f"{self.bad_steps} updates in a row had a loss or gradient that is not finite. Checkpoints are intact. "
                "Continue with --resume and a smaller --learning_rate, or with --dtype fp32."
            )
        return done

    # Checkpoints

    def tensors(self) -> dict[str, Tensor]:
        """Weights and both moments of everything that is trained, by name."""
        found = {f"model.{name}": parameter.detach() for name, parameter in self.named.items()}
        for name, parameter in self.named.items():
            state = self.optimiser.state[parameter]
            if not state:  # before the first update
                state["step"] = torch.tensor(float(self.updates))
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
            found |= {f"{moment}.{name}": state[moment] for moment in ("exp_avg", "exp_avg_sq")}
        return found

    def save(self, runs: Path, keep: int = 2) -> Path:
        """Writes runs/step_N, whole or not at all, and deletes all but the last `keep`. Raises: OutputError."""
        from torch.distributed.checkpoint import CheckpointException, HuggingFaceStorageWriter, save

        folder = runs / f"step_{self.step:08d}"
        beside = folder.with_suffix(".tmp")
        try:
            if self.rank == 0:
                for unfinished in runs.glob("step_*.tmp"):  # of runs that were killed
                    shutil.rmtree(unfinished, ignore_errors=True)
                beside.mkdir(parents=True)
            barrier()
            with quiet():
                writer = HuggingFaceStorageWriter(str(beside), save_distributed=True)
                save(self.tensors(), storage_writer=writer, no_dist=self.world == 1)
            if self.rank == 0:
                state = {"step": self.step, "updates": self.updates, "bad_steps": self.bad_steps}
                (beside / STATE_NAME).write_text(json.dumps(state) + "\n")
                sync_folder(beside)
                shutil.rmtree(folder, ignore_errors=True)
                move_into_place(beside, folder)
                for old in checkpoints(runs)[:-keep]:
                    shutil.rmtree(old)
            barrier()
        except (OSError, CheckpointException) as error:
            shutil.rmtree(beside, ignore_errors=True)
            before = f"{found[-1].name} is intact." if (found := checkpoints(runs)) else "There is none before it."
            text = f"{folder} cannot be written: {reason(error)} {before} Make room and continue with --resume."
            raise OutputError(text, path=folder) from error
        return folder

    def restore(self, folder: Path) -> None:
        """Goes on where `save` stopped, bit for bit; on any number of processes. Raises: CheckpointError."""
        from torch.distributed.checkpoint import CheckpointException, HuggingFaceStorageReader, load

        try:
            self.step, self.updates, self.bad_steps = read_state(folder)
            for file in folder.glob("*.safetensors"):
                read_header(file)  # torch's reader takes every claim of a header for true
        except CheckpointError as error:  # whose advice is about models, which can be downloaded
            fault = re.sub(r"\. [^.]*\.$", "", error.message).rstrip(".")
            text = f"{fault}. Delete {folder.name}: the run resumes from the checkpoint before it."
            raise CheckpointError(text, path=error.path) from error
        try:
            with quiet():
                load(self.tensors(), storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=self.world == 1)
            for name, tensor in self.tensors().items():
                tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
                if not tensor.isfinite().all() or (name.startswith("exp_avg_sq.") and (tensor < 0).any()):
                    raise ValueError(f"{name} holds numbers that are not finite, or below 0 where none may be.")
        except (*UNREADABLE, CheckpointException) as error:
            text = f"{folder} does not continue this run: {reason(error)} Name another output, or delete that folder."
            raise CheckpointError(text, path=folder) from error
        for parameter in self.named.values():
            self.optimiser.state[parameter]["step"].fill_(self.updates)


def read_state(folder: Path) -> tuple[int, int, int]:
    """Steps, updates and skipped steps in a row of a checkpoint. Raises: CheckpointError unless they can be those of its name."""
    state = read_json(folder / STATE_NAME)
    numbers = tuple(state.get(name) for name in ("step", "updates", "bad_steps"))
    is_possible = all(type(number) is int and 0 <= number <= numbers[0] for number in numbers)
    if not is_possible or folder.name != f"step_{numbers[0]:08d}":
        raise CheckpointError(f"{folder / STATE_NAME} does not belong to {folder.name}.", path=folder / STATE_NAME)
    return numbers


@contextmanager
def quiet() -> Iterator[None]:
    """Without torch's warning that one process is one process."""
    logging.getLogger("c10d-NullHandler-dcp_logger").propagate = False  # it tells of each tensor, at the level of debugging
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def reason(error: BaseException) -> str:
    """The first line of what went wrong, that of the first process where several failed."""
    for failed, _ in getattr(error, "failures", {}).values():
        return reason(failed)
    return str(error).splitlines()[0].rstrip(".") + "." if str(error) else f"{type(error).__name__}."


def barrier() -> None:
    if distributed.is_initialized():
        distributed.barrier()


def checkpoints(runs: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    names = [name for name in names_in(runs) if STEP_FOLDER.fullmatch(name)]
    return [runs / name for name in names if stat_path(runs / name / STATE_NAME, OutputError)]
