"""Fine-tuning, one update at a time: the loss, the trained weights, the optimiser, and checkpoints for an exact resume.

    frozen weights     keep their values and the dtype of the file
    trained weights    are float32 (the master copy), with two moments each in AdamW; the computation may run in bfloat16

The master copy is needed because bfloat16 has 8 significant bits: an update of 1e-5 times the weight would be lost in rounding.

Everything random (the order of the examples, their augmentation, dropout) is a function of the seed and the number of the update.
So a checkpoint needs no random state: a run that is killed and resumed repeats the numbers of an uninterrupted run exactly.
Several processes (torchrun) shard the weights with FSDP2; each process computes its share of every batch.

The model is passed in; this file imports no model. Sources: AdamW (arXiv:1711.05101), FSDP (arXiv:2304.11277). The loss is
averaged over examples as in PaliGemma's official trainer (big_vision, trainers/proj/paligemma/train.py).
Checked in tests/learning/test_training.py.
Shapes: B rows of the micro-batch, L tokens of a row, T answer tokens of all rows together, D model width, V vocabulary size.
"""

import json
import logging
import math
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn

from paligemma.checkpoints.headers import read_header
from paligemma.devices import to_device
from paligemma.errors import CheckpointError, OutputError, UsageError
from paligemma.files import move_into_place, read_json, sync_folder
from paligemma.layers import lora
from paligemma.learning import processes
from paligemma.learning.run_folder import STATE_NAME, checkpoints
from paligemma.vocabulary import IGNORE_INDEX

PARTS = {  # part that can be trained -> pattern of its parameters' names; language_model includes attention
    "attention": re.compile(r"language_model\..*\.self_attn\..*"),
    "language_model": re.compile(r"language_model\..*"),
    "vision_tower": re.compile(r"vision_tower\..*"),
    "projector": re.compile(r"multi_modal_projector\..*"),
}
ALL = ("language_model", "vision_tower", "projector")  # parts that do not overlap and together form the whole model
UNREADABLE = (  # exceptions that torch's reader raises for files that are damaged, forged, or belong to another model
    OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, AssertionError, ArithmeticError, MemoryError,
)  # fmt: skip
MAX_BAD_STEPS = 10  # a run ends after this many consecutive updates whose loss or gradient is not finite


# The loss


def answer_losses(model: nn.Module, batch: dict, label_smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
    """The cross entropy of each answer token, in nats.

    Logits are computed for the answers only, because logits for image and prompt tokens are not needed and would take gigabytes.

    Args:
        batch: what the processor returns for pictures, prompts and suffixes, labels included.
        label_smoothing: probability that is moved from the target token to all other tokens together.
    Returns: float32[T], the losses, and int64[T] on the CPU, the row of each token.
    Source: PaliGemma (arXiv:2407.07726), section 3.2.4; label smoothing as in big_vision.
    """
    inputs = (batch.get(key) for key in ("input_ids", "pixel_values", "attention_mask", "token_type_ids"))
    x = model.hidden(*inputs, image_features=None)  # [B, L, D]
    # The answer tokens are found on the CPU, where the labels are. Finding them on a GPU would make the CPU wait.
    targets = batch["labels"][:, 1:]  # [B, L-1]
    rows, positions = (targets != IGNORE_INDEX).nonzero(as_tuple=True)  # [T], [T]
    x = x[to_device(rows, x.device), to_device(positions, x.device)]  # [T, D]
    logits = model.language_model.logits(x)  # [T, V]
    count = logits.shape[-1]
    # torch spreads the smoothing over all tokens, the target included; big_vision spreads it over the other tokens only.
    smoothing = label_smoothing * count / (count - 1)
    target_ids = to_device(targets[rows, positions], x.device)  # [T]
    return F.cross_entropy(logits, target_ids, reduction="none", label_smoothing=smoothing), rows


def token_weights(labels: Tensor, reduction: str) -> tuple[Tensor, float]:
    """The weights of tokens in the loss. All tokens of a row have the same weight.

    Args:
        labels: int64[B, L].
        reduction: with "example" every answer has the same total weight, with "token" every token has the weight 1.
    Returns: float32[B], the weight of a token in each row, and the sum of the weights of all tokens.
    """
    counts = (labels[:, 1:] != IGNORE_INDEX).sum(1)  # [B]
    if reduction == "token":
        return torch.ones(len(counts)), float(counts.sum())
    return 1 / counts.clamp(min=1).float(), float((counts > 0).sum())


# The trained weights


def freeze_except(model: nn.Module, parts: Sequence[str]) -> None:
    """Freezes all weights except those of the given parts, which become float32.

    Args:
        parts: names of PARTS.
    Raises: UsageError for a name that is not in PARTS.
    """
    unknown = [part for part in parts if part not in PARTS]
    if unknown or not parts:
        raise UsageError(f"--parts is {unknown[0] if unknown else ''!r}, but one or several of {', '.join(PARTS)} are needed.")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(PARTS[part].fullmatch(name) for part in parts))
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad:  # copied, because a weight that is mapped from a file must not be changed
                setattr(module, name, nn.Parameter(parameter.detach().to(torch.float32, copy=True)))


def add_adapter(
    model: nn.Module, config: lora.LoraConfig, parts: Sequence[str], matrices: Sequence[str] = (), seed: int = 0
) -> None:
    """Freezes the model and adds a LoRA adapter. Only the weights of the adapter are trained.

    Args:
        parts: language_model, vision_tower or both.
        matrices: the last parts of the names of the matrices to adapt, such as q_proj; if empty, all matrices are adapted.
        seed: seed of the initial values of the matrices A, which must be equal in all processes.
    Raises: UsageError for other parts, and for a name that no matrix has.
    """
    lora_part_of = {part: lora_part for lora_part, part in lora.PARTS.items()}  # layers/lora.py has other names for the parts
    if not set(parts) <= set(lora_part_of):
        raise UsageError(f"--parts is {','.join(parts)}. Adapters go into {' and '.join(lora_part_of)}; name one or both.")
    try:
        names = lora.targets(model, [lora_part_of[part] for part in parts], matrices or lora.MATRICES)
    except ValueError as error:
        raise UsageError(f"--lora_matrices: {error}") from error
    torch.manual_seed(seed)
    lora.inject(model, config, names)


def part_of(name: str) -> str:
    """The part of the model, a name of ALL, to which a parameter belongs."""
    return next(part for part in ALL if PARTS[part].fullmatch(name))


def checkpoint_activations(model: nn.Module) -> None:
    """Makes layers drop their activations and recompute them in the backward pass. This needs less memory and more time."""
    from torch.utils.checkpoint import checkpoint

    layers = [*model.language_model.model.layers, *model.vision_tower.vision_model.encoder.layers]
    for layer in layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)


def shard(model: nn.Module, device: torch.device) -> None:
    """Shards weights, gradients and moments over all processes, layer by layer (FSDP2).

    FSDP2's own mixed precision is not used: autocast decides what runs in bfloat16, as in a run with one process.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(device.type, (distributed.get_world_size(),))
    for layer in (*model.language_model.model.layers, *model.vision_tower.vision_model.encoder.layers):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    register_fsdp_forward_method(model, "hidden")  # answer_losses calls it


@dataclass(frozen=True)
class Plan:
    """The hyperparameters of a run.

    Args:
        steps: number of updates.
        batch_size: examples per update, over all processes and micro-batches.
        micro_batch_size: examples per forward and backward pass; their gradients are accumulated until the batch is complete.
        learning_rate: the highest learning rate of the schedule.
        rates: the learning rates of those parts (see ALL) whose rate differs from learning_rate.
        warmup: fraction of the updates in which the learning rate rises from 0; afterwards it falls to 0 along half a cosine.
        weight_decay: weight decay of matrices; norms and biases have none.
        clip: maximum norm of the gradient.
        reduction: see token_weights.
        label_smoothing: see answer_losses.
        dtype: dtype of the computation.
    """

    steps: int
    batch_size: int = 8
    micro_batch_size: int = 8
    learning_rate: float = 1e-5
    rates: dict[str, float] | None = None
    warmup: float = 0.05
    weight_decay: float = 0.0
    clip: float = 1.0
    reduction: str = "example"
    label_smoothing: float = 0.0
    seed: int = 0
    dtype: torch.dtype = torch.bfloat16

    def schedule_factor(self, step: int) -> float:
        """The factor by which all learning rates are multiplied in update `step`, counted from 0."""
        warm = self.warmup * self.steps
        if step < warm:
            return (step + 1) / (warm + 1)
        return 0.5 + 0.5 * math.cos(math.pi * (step - warm) / max(1, self.steps - warm))


# Cached, because shuffling a million examples takes longer than an update. A batch may need the orders of two epochs.
@lru_cache(2)
def draw_order(count: int, seed: int, epoch: int) -> Sequence[int]:
    """The order of `count` examples in an epoch."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch)).tolist()


def examples_of(step: int, count: int, batch_size: int, seed: int) -> list[tuple[int, int]]:
    """The examples of an update as (epoch, index). All epochs form one sequence, from which batches are cut."""
    positions = range(step * batch_size, (step + 1) * batch_size)
    orders = {epoch: draw_order(count, seed, epoch) for epoch in {position // count for position in positions}}
    return [(position // count, orders[position // count][position % count]) for position in positions]


@dataclass(frozen=True)
class Update:
    """The numbers of one update. They become a line of metrics.jsonl."""

    step: int  # number of updates so far, this update and skipped updates included; the first update has step 1
    loss: float
    grad_norm: float
    learning_rate: float  # the highest learning rate if the parts have different rates
    tokens: int
    is_skipped: bool  # whether the loss or the gradient was not finite, so that the weights were not changed
    skipped: int  # number of skipped updates so far


class Trainer:
    """A model in training and its optimiser.

    Args:
        model: weights with requires_grad are trained (see `freeze_except` and `add_adapter`). If there are several processes, the
            model must already be sharded (see `shard`).
        plan: the hyperparameters.
        make_batch: turns a list of (epoch, index) into what the processor returns for these examples, labels included.
        count: the number of examples.
    Raises: UsageError if a batch cannot be divided evenly among the processes: one process would wait forever for the others.
    """

    def __init__(self, model: nn.Module, plan: Plan, make_batch: Callable[[list[tuple[int, int]]], dict], count: int):
        self.model, self.plan, self.make_batch, self.count = model, plan, make_batch, count
        self.step = 0  # number of all updates, skipped updates included
        self.updates = 0  # number of updates that were not skipped
        self.bad_steps = 0  # number of updates skipped in a row until now
        self.rank, self.world_size = processes.rank(), processes.world_size()
        if plan.batch_size % self.world_size:
            raise UsageError(
                f"--batch_size {plan.batch_size} cannot be divided by {self.world_size} processes. "
                f"Take a multiple of {self.world_size}."
            )
        self.trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        for name, parameter in self.trained.items():
            rate = (plan.rates or {}).get(part_of(name), plan.learning_rate)
            groups.setdefault((rate, plan.weight_decay if parameter.dim() > 1 else 0.0), []).append(parameter)
        self.peaks = [rate for rate, _ in groups]
        self.device = next(iter(self.trained.values())).device
        # On CUDA, the fused form updates each weight in place. torch's default there would take 4 more bytes per weight.
        self.is_fused = self.device.type == "cuda"
        self.optimiser = torch.optim.AdamW(
            [{"params": parameters, "lr": rate, "weight_decay": decay} for (rate, decay), parameters in groups.items()],
            fused=self.is_fused or None,
        )

    def micro_batches(self) -> Iterator[tuple[dict, Tensor, float]]:
        """The micro-batches of this process in the next update. Yields: the batch, and both results of token_weights for it."""
        examples = examples_of(self.step, self.count, self.plan.batch_size, self.plan.seed)
        own_examples = examples[self.rank :: self.world_size]
        for first in range(0, len(own_examples), self.plan.micro_batch_size):
            batch = self.make_batch(own_examples[first : first + self.plan.micro_batch_size])
            yield batch, *token_weights(batch["labels"], self.plan.reduction)

    def autocast(self) -> torch.autocast:
        """The context in which losses are computed: matrix products are in plan.dtype.

        Each weight is used once, so its copy in plan.dtype is not kept for a second use. With gradient checkpointing, keeping it
        would take 2 bytes per weight.
        """
        is_enabled = self.plan.dtype != torch.float32
        return torch.autocast(self.device.type, self.plan.dtype, enabled=is_enabled, cache_enabled=False)

    def update(self) -> Update:
        """Makes one update of the weights, or skips it if the loss or the gradient is not finite.

        The CPU waits for a GPU once, to read the loss and the norm of the gradient. Until then it prepares the next micro-batch
        while the GPU computes.

        Raises: CheckpointError after MAX_BAD_STEPS skipped updates in a row.
        """
        loss, total_weight, tokens = torch.zeros((), device=self.device), 0.0, 0
        # For dropout, on the CPU and on every GPU. So a resumed run needs no state of a random generator.
        torch.manual_seed((self.plan.seed * 1_000_003 + self.step) * 1_009 + self.rank)
        self.model.train()
        for batch, token_weight, batch_weight in self.micro_batches():  # token_weight: [B]
            with self.autocast():
                losses, row = answer_losses(self.model, batch, self.plan.label_smoothing)  # [T], [T]
            weighted_loss = (losses * to_device(token_weight[row], self.device)).sum()
            (weighted_loss * self.world_size).backward()  # FSDP averages gradients over processes, but their sum is needed
            loss, total_weight, tokens = loss + weighted_loss.detach(), total_weight + batch_weight, tokens + len(losses)
        # Loss and gradient are divided now, because the total weight is known only after all micro-batches of all processes.
        total_weight, tokens = processes.sums(total_weight, tokens)
        for parameter in self.trained.values():
            if parameter.grad is not None:
                parameter.grad /= max(total_weight, 1.0)
        norm = nn.utils.clip_grad_norm_(self.trained.values(), self.plan.clip)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        own_loss, norm = torch.stack((loss, norm.to(loss.device))).tolist()
        loss = processes.sums(own_loss)[0] / max(total_weight, 1.0)
        is_skipped = not (math.isfinite(norm) and math.isfinite(loss))
        factor = self.plan.schedule_factor(self.step)
        for group, peak in zip(self.optimiser.param_groups, self.peaks, strict=True):
            group["lr"] = peak * factor
        if not is_skipped:
            self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self.step, self.updates = self.step + 1, self.updates + (not is_skipped)
        skipped = self.step - self.updates
        update = Update(self.step, loss, norm, max(self.peaks) * factor, int(tokens), is_skipped, skipped)
        self.bad_steps = self.bad_steps + 1 if is_skipped else 0
        if self.bad_steps >= MAX_BAD_STEPS:
            raise CheckpointError(
                f"{self.bad_steps} updates in a row had a loss or gradient that is not finite. The checkpoints are intact. "
                "Continue with --resume and a smaller --learning_rate, or with --dtype fp32."
            )
        return update

    # Checkpoints

    def tensors(self) -> dict[str, Tensor]:
        """The trained weights and both of their moments, by name."""
        tensors = {f"model.{name}": parameter.detach() for name, parameter in self.trained.items()}
        for name, parameter in self.trained.items():
            state = self.optimiser.state[parameter]
            if not state:  # before the first update
                device = self.device if self.is_fused else "cpu"  # where AdamW expects it
                state["step"] = torch.tensor(float(self.updates), device=device)
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
            tensors |= {f"{moment}.{name}": state[moment] for moment in ("exp_avg", "exp_avg_sq")}
        return tensors

    def save(self, folder: Path, keep: int = 2) -> Path:
        """Writes folder/step_N completely or not at all, and deletes all but the last `keep` checkpoints. Raises: OutputError."""
        from torch.distributed.checkpoint import CheckpointException, HuggingFaceStorageWriter, save

        target = folder / f"step_{self.step:08d}"
        temporary = target.with_suffix(".tmp")
        try:
            if self.rank == 0:
                for unfinished in folder.glob("step_*.tmp"):  # left by runs that were killed
                    shutil.rmtree(unfinished, ignore_errors=True)
                temporary.mkdir(parents=True)
            processes.barrier()
            # torch's writer copies tensors to the CPU without waiting, and then waits for the current card, not for that of the
            # tensors.
            with quiet(), torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext():
                writer = HuggingFaceStorageWriter(str(temporary), save_distributed=True)
                save(self.tensors(), storage_writer=writer, no_dist=self.world_size == 1)
            if self.rank == 0:
                state = {"step": self.step, "updates": self.updates, "bad_steps": self.bad_steps}
                (temporary / STATE_NAME).write_text(json.dumps(state) + "\n")
                sync_folder(temporary)
                shutil.rmtree(target, ignore_errors=True)
                move_into_place(temporary, target)
                for old in checkpoints(folder)[:-keep]:
                    shutil.rmtree(old)
            processes.barrier()
        except (OSError, CheckpointException) as error:
            shutil.rmtree(temporary, ignore_errors=True)
            earlier = f"{saved[-1].name} is intact." if (saved := checkpoints(folder)) else "There is no earlier checkpoint."
            text = f"{target} cannot be written: {reason(error)} {earlier} Make room and continue with --resume."
            raise OutputError(text, path=target) from error
        return target

    def restore(self, folder: Path) -> None:
        """Restores a checkpoint that `save` wrote, exactly. The run that saved it may have had another number of processes.

        Raises: CheckpointError.
        """
        from torch.distributed.checkpoint import CheckpointException, HuggingFaceStorageReader, load

        try:
            self.step, self.updates, self.bad_steps = read_state(folder)
            for file in folder.glob("*.safetensors"):
                read_header(file)  # torch's reader does not validate the header
        except CheckpointError as error:
            # These errors advise the user to download the model again, which is wrong for the checkpoint of a run.
            fault = re.sub(r"\. [^.]*\.$", "", error.message).rstrip(".")
            text = f"{fault}. Delete {folder.name}: the run resumes from the checkpoint before it."
            raise CheckpointError(text, path=error.path) from error
        try:
            with quiet():
                reader = HuggingFaceStorageReader(str(folder))
                load(self.tensors(), storage_reader=reader, no_dist=self.world_size == 1)
            for name, tensor in self.tensors().items():
                tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
                if not tensor.isfinite().all() or (name.startswith("exp_avg_sq.") and (tensor < 0).any()):
                    raise ValueError(f"{name} holds values that are not finite, or negative second moments.")
        except (*UNREADABLE, CheckpointException) as error:
            text = f"{folder} cannot be used to resume this run: {reason(error)} Delete that folder, or name another --output."
            raise CheckpointError(text, path=folder) from error
        for parameter in self.trained.values():
            self.optimiser.state[parameter]["step"].fill_(self.updates)


def read_state(folder: Path) -> tuple[int, int, int]:
    """The counters of a checkpoint: step, updates and bad_steps of its Trainer.

    Raises: CheckpointError if the numbers are impossible or do not match the name of the folder.
    """
    state = read_json(folder / STATE_NAME)
    numbers = tuple(state.get(name) for name in ("step", "updates", "bad_steps"))
    is_possible = all(type(number) is int and 0 <= number <= numbers[0] for number in numbers)
    if not is_possible or folder.name != f"step_{numbers[0]:08d}":
        raise CheckpointError(f"{folder / STATE_NAME} does not belong to {folder.name}.", path=folder / STATE_NAME)
    return numbers


@contextmanager
def quiet() -> Iterator[None]:
    """Suppresses torch's warnings about saving from a single process, and its log line for each tensor."""
    logging.getLogger("c10d-NullHandler-dcp_logger").propagate = False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def reason(error: BaseException) -> str:
    """The first line of an error's message. If several processes failed, the message of the first of these processes is used."""
    for failed, _ in getattr(error, "failures", {}).values():
        return reason(failed)
    return str(error).splitlines()[0].rstrip(".") + "." if str(error) else f"{type(error).__name__}."
