"""A fine-tuning run: the memory that it needs, its updates with evaluations and checkpoints, and the model that it saves.

Checked in tests/programs/test_finetune.py.
Shapes: L tokens of a row, D model width, F MLP width, N query heads, T tokens of the answer, V vocabulary size.
"""

import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn

from paligemma.checkpoints import weights
from paligemma.checkpoints.adapters import save_adapter
from paligemma.checkpoints.file_names import SIDE_FILES
from paligemma.errors import ImageError
from paligemma.files import expand, is_file, is_folder
from paligemma.layers import lora
from paligemma.learning.evaluation import Judge
from paligemma.learning.processes import from_first, is_first, sums, world_size
from paligemma.learning.run_folder import Log, copy_file
from paligemma.learning.training import Plan, Trainer
from paligemma.machine import memory_errors
from paligemma.opened import Checkpoint

ADVICE = "Take --method lora, --gradient_checkpointing, a smaller --micro_batch_size, --dtype bf16, or another device."
RESUME = "The last checkpoint is kept. Continue with --resume and --gradient_checkpointing or a smaller --micro_batch_size."


def bytes_of_copies(model: nn.Module, plan: Plan, gradient_checkpointing: bool) -> int:
    """The bytes of the copies that a computation in bfloat16 makes of trained weights and keeps until the backward pass.

    With gradient checkpointing, the copies in a layer are made again in the backward pass, and only those outside are kept.
    """
    trained = [(name, parameter.numel()) for name, parameter in model.named_parameters() if parameter.requires_grad]
    kept = [count for name, count in trained if not (gradient_checkpointing and ".layers." in name)]
    return 2 * sum(kept) if plan.dtype == torch.bfloat16 else 0


def memory_needed(model: nn.Module, plan: Plan, max_text_tokens: int, gradient_checkpointing: bool) -> int:
    """The bytes of memory that a run needs in each process, estimated from the model on the meta device.

    A trained weight takes 16 bytes: the weight, its gradient and two moments, all in float32, updated in place. Several
    processes divide these bytes among them, but each process first loads all weights (4 bytes). An evaluation makes one more copy
    of all weights. With gradient checkpointing every layer stores only its input, and only one layer at a time stores all its
    activations. Attention with a soft cap (Gemma 2) does not use a fused kernel: it stores about 10.5 bytes for each head and
    pair of tokens.
    """
    bytes_per_weight = 2 if plan.dtype == torch.bfloat16 else 4
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    total = sum(parameter.numel() for parameter in model.parameters())
    text, vision = model.config.text_config, model.config.vision_config
    patches = model.config.num_image_tokens
    activations = 0
    for part, length, num_mlp in ((text, patches + max_text_tokens, 4), (vision, patches, 2)):
        # 12 tensors of shape [L, D] and num_mlp tensors of shape [L, F], in float32
        layer = length * (12 * part.hidden_size + num_mlp * part.intermediate_size) * 4
        if part is text and text.attn_logit_softcapping is not None:
            layer += round(10.5 * text.num_attention_heads * length**2)  # [N, L, L]
        if gradient_checkpointing:
            activations += layer + part.num_hidden_layers * length * part.hidden_size * 4
        else:
            activations += part.num_hidden_layers * layer
    # An answer is assumed to have at most 64 tokens. Its logits, their softmax and their gradient are tensors of shape [T, V].
    logits = min(max_text_tokens, 64) * text.vocab_size * 4 * 3
    model_bytes = trained * max(16 // world_size(), 4) + (total - trained) * bytes_per_weight
    copies = bytes_of_copies(model, plan, gradient_checkpointing)
    copy_for_evaluation = total * bytes_per_weight  # it is freed before the next update
    return model_bytes + max(copy_for_evaluation, copies + plan.micro_batch_size * (activations + logits))


def merged_model(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The model as it would be saved now: not sharded, with adapters merged, and with every weight in `dtype`."""
    tensors = {}
    for name, parameter in model.named_parameters():
        tensor = parameter.detach()
        tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        tensors[name] = tensor if ".lora_" in name else tensor.to(dtype)  # one by one, to avoid a float32 copy
    for name, layer in lora.adapted(model):
        a, b = (tensors.pop(f"{name}.{matrix}.weight") for matrix in ("lora_A", "lora_B"))
        tensors[f"{name}.weight"] = lora.merged_weight(tensors[f"{name}.weight"], a, b, layer.scaling)
    merged = weights.empty_model(model.config)
    merged.load_state_dict(tensors, assign=True)
    if merged.device.type != "cpu":
        weights.suit_device(merged, merged.device)
    return merged.eval()


class Run:
    """A model in training, its scores, and the folder to which both are written.

    Args:
        trainer: the model and its optimiser, new or restored from a checkpoint.
        judge: scores the model; None if there are no validation data.
        folder: the output folder (run_folder.py).
        evaluate_every, save_every: numbers of updates.
    """

    def __init__(
        self, trainer: Trainer, judge: Judge | None, folder: Path, evaluate_every: int, save_every: int, with_tensorboard: bool
    ):
        self.trainer, self.judge, self.folder = trainer, judge, folder
        self.evaluate_every, self.save_every = evaluate_every, save_every
        self.log = Log(folder, trainer.step, with_tensorboard) if is_first() else None

    def updates(self, should_stop: Callable[[], bool]) -> Iterator[dict]:
        """Trains until the last update, or until should_stop() is true in any process, and saves checkpoints.

        Yields: each line of metrics.jsonl after it was written; a line describes an update or an evaluation.
        Raises: ImageError if a picture was deleted or changed during the run, DeviceError if memory runs out, and
            CheckpointError as Trainer.update does.
        """
        trainer, start, is_stopped = self.trainer, time.perf_counter(), False
        if from_first(self.lacks_evaluation):  # the interrupted run was stopped after it saved and before it evaluated
            yield from self.evaluate()
        while trainer.step < trainer.plan.steps and not is_stopped:
            try:
                with memory_errors("training", RESUME):
                    update = trainer.update()
            except ImageError:
                if world_size() == 1 and trainer.step:
                    self.save()
                raise
            is_stopped = any(sums(should_stop()))  # so that all processes stop after the same update
            yield self.write(asdict(update) | {"seconds": round(time.perf_counter() - start, 2)})
            is_last, is_due = trainer.step == trainer.plan.steps, self.is_evaluation_due()
            if trainer.step % self.save_every == 0 or is_last or is_stopped or (is_due and self.judge):
                self.save()  # before the evaluation, which takes long
            if is_due and (is_last or not is_stopped):
                yield from self.evaluate()

    def is_evaluation_due(self) -> bool:
        """Whether an evaluation is due after the update that was just made."""
        return self.trainer.step % self.evaluate_every == 0 or self.trainer.step == self.trainer.plan.steps

    def lacks_evaluation(self) -> bool:
        """Whether an evaluation was due after the last saved update, but metrics.jsonl has no line about it."""
        step = self.trainer.step
        is_logged = any(line["step"] == step and "valid_loss" in line for line in self.log.lines)
        return self.judge is not None and step > 0 and self.is_evaluation_due() and not is_logged

    def evaluate(self) -> Iterator[dict]:
        """Scores the model as it would be saved now, and draws the curves. Yields: the new line of metrics.jsonl."""
        if self.judge is not None:
            # Every process holds the whole model and answers its share of the questions.
            with memory_errors("evaluating", ADVICE):
                values = self.judge(merged_model(self.trainer.model, self.trainer.plan.dtype))
            rounded = {name: round(value, 5) for name, value in values.items()}
            yield self.write({"step": self.trainer.step} | rounded | {"scored": self.judge.sample_description})
        if self.log is not None:
            self.log.draw()

    def write(self, line: dict) -> dict:
        """Adds the line to metrics.jsonl (only the first process does this), and returns it."""
        if self.log is not None:
            self.log.write(line)
        return line

    def save(self) -> None:
        self.trainer.save(self.folder / "checkpoints")

    def save_result(self, checkpoint: Checkpoint, adapter: lora.LoraConfig | None, revision: str | None) -> Path:
        """Writes model/ with the processor's files, and adapter/ if an adapter was trained. Raises: OutputError.

        Args:
            checkpoint: the starting model. If it is an adapter, the processor's files in its folder replace those of its base.
            adapter: the configuration of the adapter that was trained; None if the model itself was trained.
            revision: revision of the starting model, to be stored with the adapter.
        Returns: the folder model/.
        """
        # All processes must call these two functions, because the shards are gathered from all processes.
        merged = merged_model(self.trainer.model, self.trainer.plan.dtype)
        matrices = lora.adapter_state(self.trainer.model)
        result = self.folder / "model"
        if not is_first():
            return result
        for unfinished in self.folder.glob("*/.saving-*"):  # left by a run that was killed
            shutil.rmtree(unfinished, ignore_errors=True)
        weights.save_model(merged, result)
        for file in (folder / name for folder in dict.fromkeys((checkpoint.base, checkpoint.folder)) for name in SIDE_FILES):
            if is_file(file):
                copy_file(file, result / file.name)
        if adapter is not None:
            name = checkpoint.name
            if is_folder(expand(name)):  # the absolute path lets the adapter find its base from any directory
                name = os.path.realpath(checkpoint.base)
            save_adapter(matrices, adapter, self.folder / "adapter", name, revision)
        return result
