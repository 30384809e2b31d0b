"""Fine-tunes a PaliGemma on your own pictures: `python -m paligemma finetune --train train.jsonl --output runs/mine`.

The data are JSONL lines of image, prefix, suffix (dataset.py), the settings flags or a YAML file. Everything about the data is
checked before the first step. What a run leaves in --output:

    settings.json      what was asked for; --resume refuses other settings
    metrics.jsonl      a line for each update and each evaluation
    progress.svg       the same as curves, drawn anew at each evaluation
    checkpoints/       weights and optimiser, for --resume; written beside and renamed, the last two are kept
    model/             the result: a checkpoint like any other, for this project and for transformers; with --method lora,
                       adapter/ beside it, in PEFT's form

Killed at any moment, the same command with --resume goes on, and its losses are bit for bit those of a run that was not (on one
kind of CPU). `torchrun --nproc_per_node N -m paligemma finetune ...` shares the work. Reading order: Flags, Run, program.
Checked in tests/programs/test_finetune.py.
"""

import sys

if sys.version_info < (3, 10):
    sys.exit("error: Python %d.%d is too old. This program needs 3.10 or newer." % sys.version_info[:2])
if __name__ == "__main__":
    from paligemma.programs import commandline

    commandline.leave_on_signals()  # before the rest is imported, which takes a while

import json
import os
import re
import shutil
import signal
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, fields, replace
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

from paligemma import machine
from paligemma.errors import DatasetError, DeviceError, ImageError, UsageError, counted
from paligemma.files import BUNDLED, expand, expand_text, is_file, is_folder, read_regular, stat_path, write_atomic
from paligemma.learning.run_folder import (
    NO_ROOM,
    Log,
    alone,
    check_inputs,
    check_settings,
    check_taken,
    copy_file,
    make_folder,
    settings_of,
)
from paligemma.programs import commandline
from paligemma.programs.commandline import note
from paligemma.programs.options import PictureFlags, picture_options, require

if TYPE_CHECKING:
    import torch
    import yaml
    from torch import nn

    from paligemma.layers import lora
    from paligemma.learning import dataset, training
    from paligemma.learning.evaluation import Judge
    from paligemma.opened import Checkpoint

METHODS = {"full": 1e-5, "lora": 2e-4}  # and the learning rate where none is given
SCORES = ("exact", "vqa", "anls", "relaxed", "cider", "map", "miou")
DOUBTS_SHOWN = 20
FAULTS_SHOWN = 1000
MOST_CONFIG_BYTES = 1 << 16
MOST = 10**9  # of anything that flags count
ADVICE = "Take --method lora, --gradient_checkpointing, fewer --rows, --dtype bf16, or another device."


@dataclass(frozen=True, kw_only=True)
class Flags(PictureFlags):
    """Fine-tunes a PaliGemma model on pictures with a prompt and its answer each.

      python -m paligemma finetune --train train.jsonl --output runs/x --preview                 look at what will be learned
      python -m paligemma finetune --train train.jsonl --valid valid.jsonl --output runs/x
      python -m paligemma finetune --config finetune.yaml --output runs/y --method lora          flags beat the file
      python -m paligemma finetune --config finetune.yaml --output runs/y --resume               continue after an interruption
      torchrun --nproc_per_node 2 -m paligemma finetune --config finetune.yaml --output runs/z

    Lines of a JSONL: {"image": "a.jpg", "prefix": "detect cat", "suffix": "<loc0104><loc0320><loc0458><loc0674> cat"}

    Args:
        train: the examples to learn from, a JSONL
        valid: examples to be scored on and never to be learned from
        image_dir: the folder that the names of pictures are relative to; that of the JSONL if not given
        output: a new folder for everything that comes of it
        config: a YAML file of these settings; examples/finetune.yaml has them all
        model_path: what to start from, a folder or a hub id; the bundled model if not given
        base_model: the model that an adapter belongs to, if it is not where the adapter says
        revision: branch, tag or commit of a hub id
        device: auto, cpu, cuda or cuda:N
        dtype: precision of the computation, bf16 or fp32; trained weights are kept in float32 anyway
        method: full, or lora for a small adapter
        parts: what is trained, of attention, language_model, vision_tower, projector, with commas; everything if not given, with
            lora the language model
        lora_r: rank of an adapter
        lora_alpha: an adapter counts lora_alpha / lora_r times
        lora_dropout: share of an adapter's inputs that is dropped while training
        lora_matrices: last words of the names of matrices to adapt, with commas; all if not given
        epochs: how often every example is seen
        steps: number of updates, instead of epochs
        batch_size: examples of an update
        rows: examples that are in memory at a time; a batch is made of several passes
        learning_rate: at its peak; 1e-5, and 2e-4 for an adapter, if not given
        learning_rate_language_model: of this part, where it differs
        learning_rate_vision_tower: of this part, where it differs
        learning_rate_projector: of this part, where it differs
        warmup: share of the updates in which the rate rises
        weight_decay: of matrices
        clip: longest gradient
        loss: example, the mean over answers, or token, the mean over all their tokens
        label_smoothing: probability that is taken from the right token and given to all others
        max_text_tokens: longest prefix and suffix together; an example that is longer is refused, never cut
        augment: none or zoom: pictures are cut or moved a little, and boxes move with them
        gradient_checkpointing: less memory, and one more forward pass in each update
        evaluate_every: updates between two evaluations; once an epoch if not given
        num_scored: how many questions of valid are answered for the scores, spread evenly over the file
        scores: of exact, vqa, anls, relaxed, cider, map, miou, with commas; chosen by what the answers hold if not given, map
            only if pycocotools is installed
        mask_codec: vae-oid.npz, which decodes masks for miou and --preview; looked for in the model's folder if not given
        save_every: updates between two checkpoints; there is one before each evaluation, too
        seed: of order, augmentation and dropout
        skip_bad: continue without lines that cannot be used
        preview: only draw a page of examples as they will be learned, boxes and masks from their tokens
        resume: continue from the last checkpoint of --output, or begin if there is none
        tensorboard: write a log for TensorBoard, too
        verbose: say more
        debug: print the traceback of an error
    """

    train: str | None = None
    valid: str | None = None
    image_dir: str | None = None
    output: str | None = None
    config: str | None = None
    model_path: str | None = None
    base_model: str | None = None
    revision: str | None = None
    device: str = "auto"
    dtype: str = "bf16"
    method: str = "full"
    parts: str | None = None
    lora_r: int = 8
    lora_alpha: float = 16
    lora_dropout: float = 0.0
    lora_matrices: str | None = None
    epochs: float = 1
    steps: int | None = None
    batch_size: int = 8
    rows: int = 4
    learning_rate: float | None = None
    learning_rate_language_model: float | None = None
    learning_rate_vision_tower: float | None = None
    learning_rate_projector: float | None = None
    warmup: float = 0.05
    weight_decay: float = 0.0
    clip: float = 1.0
    loss: str = "example"
    label_smoothing: float = 0.0
    max_text_tokens: int = 256
    augment: str = "none"
    gradient_checkpointing: bool = False
    evaluate_every: int | None = None
    num_scored: int = 200
    scores: str | None = None
    mask_codec: str | None = None
    save_every: int = 200
    seed: int = 0
    skip_bad: bool = False
    preview: bool = False
    resume: bool = False
    tensorboard: bool = False
    verbose: bool = False
    debug: bool = False

    def __post_init__(self):
        super().__post_init__()

        def is_rate(value: float | None) -> bool:
            return value is None or 0 < value < 1

        def is_count(value: int | None, least: int = 1) -> bool:
            return value is None or least <= value <= MOST

        require(
            self,
            ("train", self.train, "a JSONL of examples"),
            ("output", self.output, "a folder to write to"),
            *((name, getattr(self, name) != "", "a file or a folder") for name in READ),
            ("dtype", self.dtype in ("bf16", "bfloat16", "fp32", "float32"), "bf16 or fp32"),
            ("method", self.method in METHODS, "full or lora"),
            ("lora_alpha", 0 < self.lora_alpha <= MOST, f"a number above 0 and up to {MOST}"),
            ("lora_dropout", 0 <= self.lora_dropout < 1, "a number from 0 to below 1"),
            ("epochs", 0 < self.epochs <= 1_000_000, "a number above 0 and up to 1000000"),
            *((name, is_count(getattr(self, name)), f"a whole number from 1 to {MOST}") for name in COUNTS),
            ("batch_size", self.batch_size <= 1_000_000, "a whole number from 1 to 1000000"),
            *((name, is_rate(getattr(self, name)), "a number above 0 and below 1") for name in RATES),
            ("warmup", 0 <= self.warmup < 1, "a share from 0 to below 1"),
            ("weight_decay", 0 <= self.weight_decay < 1, "a number from 0 to below 1"),
            ("clip", self.clip > 0, "a number above 0"),
            ("loss", self.loss in ("example", "token"), "example or token"),
            ("label_smoothing", 0 <= self.label_smoothing < 1, "a number from 0 to below 1"),
            ("max_text_tokens", is_count(self.max_text_tokens, 4), f"a whole number from 4 to {MOST}"),
            ("augment", self.augment in ("none", "zoom"), "none or zoom"),
            ("scores", set(names(self.scores)) <= set(SCORES), f"of {', '.join(SCORES)}, one or several"),
            ("seed", 0 <= self.seed < 2**31, "a whole number from 0 to 2^31 - 1"),
        )

    @staticmethod
    def expand(argv: list[str]) -> list[str]:
        """The arguments, those that a --config file stands for before them, so that what is typed counts."""
        given = [argument.partition("=")[2] or following for argument, following in pairwise([*argv, ""])
                 if argument.partition("=")[0] == "--config"]  # fmt: skip
        return [*(read_config(given[-1]) if given else []), *argv]

    @property
    def trained_parts(self) -> list[str]:
        everything = ["language_model", "vision_tower", "projector"]
        return names(self.parts) or (everything if self.method == "full" else ["language_model"])

    @property
    def peak(self) -> float:
        return self.learning_rate or METHODS[self.method]


READ = ("valid", "image_dir", "model_path", "base_model", "mask_codec")
COUNTS = ("batch_size", "rows", "save_every", "num_scored", "steps", "evaluate_every", "lora_r")
RATES = [field.name for field in fields(Flags) if field.name.startswith("learning_rate")]


def names(text: str | None) -> list[str]:
    """What stands between the commas."""
    return [name.strip() for name in (text or "").split(",") if name.strip()]


def read_config(file: str) -> list[str]:
    """The settings of a YAML file as arguments.

    Only what settings need is taken: one mapping of names to values or lists of values, which stay text until the flags convert
    them. Aliases, tags and further nesting are refused before anything is built, so the work is linear in a bounded file.
    Raises: UsageError for a file that is none, and for a name that is no setting or stands there twice.
    """
    root, settings = read_yaml(file), {}
    known = [field.name for field in fields(Flags) if field.name != "config"]
    for key, value in root.value if root else ():
        where, name = f"{file}:{key.start_mark.line + 1}", key.value[:80] if key.id == "scalar" else f"a {key.id}"
        if name not in known:
            raise UsageError(f"{where}: unknown setting {name}.{commandline.suggestion(name, known, '')} --help lists all.")
        if name in settings:
            raise UsageError(f"{where}: {name} is given twice. Leave one.")
        if isinstance(value.value, list) and value.id == "mapping":
            raise UsageError(f"{where}: {name} holds further names. One value, or several with commas, is needed.")
        is_null = value.tag.endswith(":null")
        settings[name] = None if is_null else value.value if value.id == "scalar" else ",".join(one.value for one in value.value)
    return [f"--{name}={text}" for name, text in settings.items() if text is not None]


def read_yaml(file: str) -> "yaml.MappingNode | None":
    """The mapping of a YAML file, whose values are texts or lists of texts; None for a file of comments. Raises: UsageError."""
    import yaml

    advice, depth = "Write a line `name: value` for each setting.", 0
    try:
        text = read_regular(expand(file), MOST_CONFIG_BYTES, UsageError, "Name a YAML file of settings.").decode("utf-8-sig")
        for event in yaml.parse(text, yaml.SafeLoader):
            where = f"{file}:{event.start_mark.line + 1}:{event.start_mark.column + 1}"
            if getattr(event, "anchor", None) is not None or getattr(event, "tag", None) is not None:
                raise UsageError(f"{where}: aliases (& and *) and tags (!) are not taken. {advice}")
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > 2:
                raise UsageError(f"{where}: lists and names within lists and names are not taken. {advice}")
        root = yaml.compose(text, yaml.SafeLoader)
    except (ValueError, RecursionError, OverflowError, yaml.YAMLError) as error:  # no UTF-8; an escape like \UFFFFFFFF
        mark = getattr(error, "problem_mark", None)
        place = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        raise UsageError(f"{file}{place} is not YAML. {advice}") from error
    if isinstance(root, yaml.ScalarNode) and root.tag.endswith(":null"):  # nothing but dashes
        return None
    if root is not None and not isinstance(root, yaml.MappingNode):
        raise UsageError(f"{file} holds a {'list' if isinstance(root, yaml.SequenceNode) else 'text'}. {advice}")
    return root


# Data


def read_data(flags: Flags, processor: object, room: int) -> list["dataset.Split"]:
    """The examples to learn from and, if there are any, those to be scored on; all that is wrong with them is said.

    Args:
        room: tokens of the context that a picture leaves.
    Raises: DatasetError.
    """
    from paligemma.learning import dataset

    splits = [dataset.read_split(file, flags.image_dir) for file in (flags.train, flags.valid) if file]
    for split in splits:
        split.options = picture_options(flags)
        dataset.check_pictures(split)
        dataset.check_texts(split, processor, min(flags.max_text_tokens, room))
    if len(splits) == 2:
        splits[1].doubts += dataset.compare(*splits)
    for split in splits:
        for fault in split.faults[:FAULTS_SHOWN]:  # whoever fixes a file wants to know all of them at once
            note(f"fault: {fault}")
        if len(split.faults) > FAULTS_SHOWN:
            note(f"fault: ... and {counted(len(split.faults) - FAULTS_SHOWN, 'more fault')} in {split.file}")
        counts = Counter(doubt.text for doubt in split.doubts)
        alike = {doubt.text: doubt for doubt in reversed(split.doubts)}  # the first line of each kind
        for doubt in [doubt for doubt in split.doubts if alike[doubt.text] is doubt][:DOUBTS_SHOWN]:
            more = counts[doubt.text] - 1
            note(f"doubt: {doubt}" + f" (and {more} more line{'s' * (more > 1)} like it)" * (more > 0))
        if len(counts) > DOUBTS_SHOWN:
            note(f"doubt: ... and {counted(len(counts) - DOUBTS_SHOWN, 'more kind')} in {split.file}")
    dataset.require_usable(splits, flags.skip_bad, room)
    return splits


# The model


def memory_needed(model: "nn.Module", flags: Flags, world: int) -> int:
    """Bytes that a run will take in each process, estimated from the model on the meta device.

    Trained weights are float32 and have a gradient and two moments (16 bytes together); for each evaluation all of them are
    there once more as the plain model. Several processes share the 16 bytes, but each loads all weights before they do. Layers
    that are recomputed keep their input, and one of them at a time the rest. Attention with a soft cap (Gemma 2) is written out,
    and keeps about 10.5 bytes for each head and pair of tokens.
    """
    size = 2 if flags.dtype.startswith("b") else 4
    count = {is_it: sum(p.numel() for p in model.parameters() if p.requires_grad == is_it) for is_it in (True, False)}
    text, vision = model.config.text_config, model.config.vision_config
    is_thrifty = flags.gradient_checkpointing
    patches, tokens = model.config.num_image_tokens, model.config.num_image_tokens + flags.max_text_tokens
    layers = 0
    for part, length, mlp in ((text, tokens, 4), (vision, patches, 2)):
        whole = length * (12 * part.hidden_size + mlp * part.intermediate_size) * 4
        if part is text and text.attn_logit_softcapping is not None:
            whole += round(10.5 * text.num_attention_heads * length**2)
        count_whole, count_thrifty = (1, part.num_hidden_layers) if is_thrifty else (part.num_hidden_layers, 0)
        layers += flags.rows * (count_whole * whole + count_thrifty * length * part.hidden_size * 4)
    answers = flags.rows * min(flags.max_text_tokens, 64) * text.vocab_size * 4 * 3
    return count[True] * max(16 // world, 4) + count[False] * size + (count[True] + count[False]) * size + layers + answers


def prepare(model: "nn.Module", flags: Flags) -> "lora.LoraConfig | None":
    """Chooses what is trained; with --method lora puts the adapter in and returns what it is."""
    from paligemma.layers import lora
    from paligemma.learning import training

    if flags.method == "full":
        training.trainable(model, flags.trained_parts)
        return None
    config = lora.LoraConfig(flags.lora_r, flags.lora_alpha, flags.lora_dropout)
    parts = {whole: part for part, whole in lora.PARTS.items()}
    wanted = [parts.get(part, part) for part in flags.trained_parts]
    if not set(wanted) <= set(lora.PARTS):
        raise UsageError(f"--parts is {flags.parts}. Adapters go into {' and '.join(lora.PARTS.values())}; name one or both.")
    try:
        chosen = lora.targets(model, wanted, names(flags.lora_matrices) or lora.MATRICES)
    except ValueError as error:
        raise UsageError(f"--lora_matrices: {error}") from error
    import torch

    torch.manual_seed(flags.seed)  # of A, the same in all processes
    lora.inject(model, config, chosen)
    return config


def plain_model(model: "nn.Module", dtype: "torch.dtype") -> "nn.Module":
    """The model as it would be saved now: whole, in one process, adapters merged, every weight in `dtype`."""
    from paligemma.checkpoints import weights
    from paligemma.layers import lora

    tensors = {}
    for name, parameter in model.named_parameters():
        tensor = parameter.detach()
        tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        tensors[name] = tensor if ".lora_" in name else tensor.to(dtype)  # one by one: a float32 copy of all is not needed
    for name, layer in lora.adapted(model):
        a, b = (tensors.pop(f"{name}.{matrix}.weight") for matrix in ("lora_A", "lora_B"))
        tensors[f"{name}.weight"] = lora.merged_weight(tensors[f"{name}.weight"], a, b, layer.scaling)
    plain = weights.empty_model(model.config)
    plain.load_state_dict(tensors, assign=True)
    return plain.eval()


# The run


@contextmanager
def process_group(device: "torch.device") -> Iterator[int]:
    """Joins the other processes, if torchrun started several; yields how many there are."""
    if not is_one_of_several():
        yield 1
        return
    from torch import distributed

    distributed.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    try:
        yield distributed.get_world_size()
    except RuntimeError as error:
        if not re.search("Connection (closed|reset) by peer|Timed out waiting|NCCL", str(error)):
            raise
        raise DeviceError("another process has ended; its message is above. Continue with --resume.") from error


def is_one_of_several() -> bool:
    """Whether torchrun, or something like it, started this process."""
    return all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))


def is_first() -> bool:
    """Whether this process speaks and writes for all."""
    return not is_one_of_several() or os.environ["RANK"] == "0"


class Run:
    """A model being trained, its scores, and the folder where both are written.

    Args:
        flags: what was asked for.
        trainer: the model with its optimiser, perhaps restored.
        judge: None where there is no --valid.
        dtype: of the plain model that is scored and kept.
    """

    def __init__(self, flags: Flags, trainer: "training.Trainer", judge: "Judge | None", dtype: "torch.dtype"):
        self.flags, self.trainer, self.judge, self.dtype = flags, trainer, judge, dtype
        self.folder = Path(flags.output)
        self.checkpoints = self.folder / "checkpoints"
        self.log = Log(self.folder, trainer.step, flags.tensorboard) if is_first() else None
        self.every = flags.evaluate_every or max(1, trainer.count // flags.batch_size)
        self.stopped: int | None = None  # the signal that came

    def evaluate(self) -> None:
        """Scores of the model as it would be saved now, and the curves."""
        if self.judge is not None:
            plain = plain_model(self.trainer.model, self.dtype)  # whole in each process, which asks its share
            numbers = {name: round(value, 5) for name, value in self.judge(plain).items()}
            if is_first():
                self.log.write({"step": self.trainer.step} | numbers | {"scored": self.judge.scored})
                said = ", ".join(f"{name} {value:.4g}" for name, value in numbers.items())
                note(f"step {self.trainer.step}: {said} ({self.judge.scored})")
        if is_first():
            self.log.draw()

    def is_due(self) -> bool:
        """Whether there is an evaluation behind this update."""
        return self.trainer.step % self.every == 0 or self.trainer.step == self.trainer.plan.steps

    def misses_scores(self) -> bool:
        """Whether there should have been an evaluation behind the last update that was saved, and its line is not there."""
        at = self.trainer.step
        is_there = any(line["step"] == at and "valid_loss" in line for line in self.log.lines)
        return self.judge is not None and at > 0 and self.is_due() and not is_there

    def save(self) -> None:
        self.trainer.save(self.checkpoints)

    def loop(self) -> None:
        """Updates until the end, or until a signal: then the state is saved first. Raises: Interrupted."""
        steps, start, is_stopped = self.trainer.plan.steps, time.perf_counter(), False
        unscored = is_first() and self.misses_scores()

        def stop(signum: int, _frame: object) -> None:
            if self.stopped is not None:
                raise commandline.Interrupted(signum)
            self.stopped = signum
            if is_first():
                with suppress(OSError, ValueError):  # not print: the signal may have come in the middle of one
                    os.write(sys.stderr.fileno(), b"\nstops after this update and saves; a second signal stops at once.\n")

        with commandline.handlers(stop), progress(self.trainer.step, steps) as bar:
            if any(self.trainer.sums(unscored)):  # the run was stopped between saving and scoring
                self.evaluate()
            while self.trainer.step < steps and not is_stopped:
                try:
                    with machine.memory_errors("training", ADVICE):
                        update = self.trainer.update()
                except ImageError:  # a picture has gone or changed meanwhile
                    if self.trainer.world == 1 and self.trainer.step:
                        self.save()
                    raise
                is_stopped = any(self.trainer.sums(self.stopped is not None))  # all processes stop behind the same update
                if is_first():
                    self.log.write(asdict(update) | {"seconds": round(time.perf_counter() - start, 2)})
                    bar(update)
                is_last, is_due = self.trainer.step == steps, self.is_due()
                if self.trainer.step % self.flags.save_every == 0 or is_last or is_stopped or (is_due and self.judge):
                    self.save()  # before anything that takes long
                if is_due and (is_last or not is_stopped):
                    self.evaluate()
        if is_stopped and self.trainer.step < steps:
            if is_first():
                note(f"interrupted at step {self.trainer.step} of {steps}; it is saved. Add --resume to continue.")
            raise commandline.Interrupted(self.stopped or signal.SIGTERM)
        skipped = self.trainer.step - self.trainer.updates
        if skipped and is_first():
            note(f"{skipped} of {steps} updates were skipped: their loss or gradient was not finite.")

    def finish(self, checkpoint: "Checkpoint", adapter: "lora.LoraConfig | None") -> None:
        """Writes the result: model/, with the files of the processor, and adapter/ where there is one.

        Args:
            checkpoint: the model or adapter that training began with. An adapter's own files replace those of its base.
            adapter: settings of the adapter that was trained; None if the model itself was trained.
        """
        from paligemma.checkpoints import weights
        from paligemma.checkpoints.adapters import save_adapter
        from paligemma.checkpoints.file_names import SIDE_FILES
        from paligemma.layers import lora

        plain = plain_model(self.trainer.model, self.dtype)
        parts = lora.adapter_state(self.trainer.model)
        if not is_first():
            return
        result = self.folder / "model"
        for unfinished in self.folder.glob("*/.saving-*"):  # of a run that was killed
            shutil.rmtree(unfinished, ignore_errors=True)
        weights.save_model(plain, result)
        folders = dict.fromkeys((checkpoint.base, checkpoint.folder))
        for file in (folder / name for folder in folders for name in SIDE_FILES):  # tokenizer, mask codec, ...
            if is_file(file):
                copy_file(file, result / file.name)
        if adapter is not None:
            name = self.flags.model_path
            if name is None or is_folder(expand(name)):  # from wherever the adapter will be used
                name = os.path.realpath(checkpoint.base)
            save_adapter(parts, adapter, self.folder / "adapter", name, self.flags.revision)
        note(f"the result is in {result}. Try it: {commandline.command()} --model_path {result} "
             "--image_file_path PICTURE --prompt PREFIX")


@contextmanager
def progress(step: int, steps: int) -> Iterator:
    """Something to look at: a bar on a terminal, else a line now and then. Yields a function that takes an Update."""
    if sys.stderr is not None and sys.stderr.isatty() and is_first():
        from tqdm import tqdm

        with tqdm(total=steps, initial=step, unit="step", dynamic_ncols=True) as bar:

            def show(update: "training.Update") -> None:
                skipped = f", {update.skipped} skipped" if update.skipped else ""
                bar.set_postfix_str(f"loss {update.loss:.4f}, gradient {update.grad_norm:.2f}{skipped}")
                bar.update()

            yield show
        return
    often = max(1, steps // 20)

    def say(update: "training.Update") -> None:
        if update.step % often == 0 or update.step == steps:
            skipped = f", {update.skipped} skipped" if update.skipped else ""
            note(f"step {update.step} of {steps}: loss {update.loss:.4f}, gradient {update.grad_norm:.3g}{skipped}")

    yield say


def train(flags: Flags, device: "torch.device", world: int) -> None:
    """Flags, data, memory, model, updates, result: in this order, so that what is wrong is said before the slow part."""
    from paligemma.checkpoints import weights
    from paligemma.learning import training
    from paligemma.learning.dataset import Examples
    from paligemma.learning.evaluation import Judge
    from paligemma.learning.preview import draw_preview
    from paligemma.machine import require_memory
    from paligemma.objects.mask_codec import find_codec, load_codec
    from paligemma.opened import open_checkpoint

    folder, name = Path(flags.output), flags.model_path or str(BUNDLED)
    if not flags.preview:
        with nullcontext() if is_first() else silence():
            check_taken(folder, flags.resume)
    checkpoint = open_checkpoint(name, revision=flags.revision, base_model=flags.base_model)
    if checkpoint.stored_kind is not None:
        raise UsageError(f"{name} is stored as {checkpoint.stored_kind}, which cannot be trained. Name the plain checkpoint.")
    if flags.method == "lora" and checkpoint.adapter_config is not None:
        raise UsageError(
            f"{name} has an adapter, and a second one cannot be added to it. Name a merged model: finetune writes one "
            "next to each adapter, in model/."
        )
    config, processor = checkpoint.config, checkpoint.processor
    blueprint = weights.empty_model(config)
    prepare(blueprint, flags)
    room = config.text_config.max_position_embeddings - config.num_image_tokens
    with nullcontext() if is_first() else silence():
        splits = read_data(flags, processor, room)
    codec_file = find_codec(checkpoint.base, flags.mask_codec)
    codec = load_codec(codec_file) if codec_file else None
    examples = Examples(splits[0], processor, flags.augment, flags.seed)
    if flags.preview:
        make_folder(folder)
        draw_preview(examples, codec, folder / "preview.png")
        note(f"what will be learned is drawn in {folder / 'preview.png'}.")
        return
    judge = None
    if len(splits) == 2:
        scored = Examples(splits[1], processor)
        with nullcontext() if is_first() else silence():
            judge = Judge(scored, codec, rows=flags.rows, count=flags.num_scored, scores=names(flags.scores))

    beside = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if device.type == "cpu" else 1  # processes that share the memory
    require_memory(memory_needed(blueprint, flags, world) * beside, device, "fine-tuning takes", ADVICE)
    settings = settings_of(flags, splits[0].fingerprint(), checkpoint.fingerprint)
    with nullcontext() if is_first() else silence():
        check_settings(folder, settings)  # in each process, so that none waits for one that has given up
    training.barrier()
    with alone(folder) if is_first() else nullcontext():
        if is_first():
            write_atomic(folder / "settings.json", json.dumps(settings, indent=1) + "\n", NO_ROOM)
        training.barrier()
        learn(flags, device, world, checkpoint, examples, judge)


def learn(
    flags: Flags,
    device: "torch.device",
    world: int,
    checkpoint: "Checkpoint",
    examples: "dataset.Examples",
    judge: "Judge | None",
) -> None:
    """The second half of `train`: all is checked, and memory is taken.

    Args:
        checkpoint: the model, or the adapter, to begin with.
        judge: None where there is no --valid.
    """
    import torch

    from paligemma.learning import training

    dtype = torch.float32 if flags.dtype in ("fp32", "float32") else torch.bfloat16
    with machine.memory_errors("loading the weights", ADVICE):
        model = checkpoint.load(device=device, dtype=dtype)
    adapter = prepare(model, flags)
    if flags.gradient_checkpointing:
        training.checkpoint_activations(model)
    if world > 1:
        training.shard(model, device)
    count = len(examples.lines)
    rates = {part: getattr(flags, f"learning_rate_{part}") for part in training.ALL}
    plan = training.Plan(
        steps=flags.steps or max(1, round(flags.epochs * count / flags.batch_size)),
        batch_size=flags.batch_size,
        rows=flags.rows,
        learning_rate=flags.peak,
        rates={part: rate for part, rate in rates.items() if rate is not None},
        warmup=flags.warmup,
        weight_decay=flags.weight_decay,
        clip=flags.clip,
        reduction=flags.loss,
        label_smoothing=flags.label_smoothing,
        seed=flags.seed,
        dtype=dtype,
    )
    trainer = training.Trainer(model, plan, examples.batch, count)
    found = training.checkpoints(Path(flags.output) / "checkpoints")
    if flags.resume and found:
        trainer.restore(found[-1])
    if is_first():
        trained = sum(parameter.numel() for parameter in trainer.named.values())
        plans = f"{counted(count, 'example')}, {counted(plan.steps, 'update')} from {trainer.step} on"
        note(f"{plans}; {trained / 1e6:.4g} M weights learn, on {device}.")
    run = Run(flags, trainer, judge, dtype)
    run.loop()
    run.finish(checkpoint, adapter)
    training.barrier()  # whoever leaves earlier has torchrun end the first, which writes


@contextmanager
def silence() -> Iterator[None]:
    """For the processes that have nothing to add to what the first one says."""
    stream, sys.stderr = sys.stderr, SimpleNamespace(write=lambda _: None, flush=lambda: None, isatty=lambda: False)
    try:
        yield
    finally:
        sys.stderr = stream


def program(flags: Flags) -> None:
    commandline.relay_logs(flags.verbose)
    places = {name: getattr(flags, name) for name in ("train", "valid", "image_dir", "output", "mask_codec")}
    flags = replace(flags, **{name: expand_text(place) for name, place in places.items() if place})
    for name, file in (("train", flags.train), ("valid", flags.valid)):
        if file and stat_path(file, DatasetError) is None:
            raise DatasetError(f"{file} does not exist. Name a JSONL of examples with --{name}.", path=file)
    read = ("train", "valid", "config", "mask_codec", "model_path")
    check_inputs(Path(flags.output), [(f"--{name}", getattr(flags, name)) for name in read])
    if flags.tensorboard and find_spec("tensorboard") is None:
        raise DeviceError("--tensorboard needs a package. Install it: pip install tensorboard.")
    machine.use_cores()
    machine.check_torch()
    from paligemma.machine import find_device

    device = find_device(flags.device)
    with process_group(device) as world:
        train(flags, device, world)


def main() -> int:
    sys.excepthook = commandline.report_bug
    code = commandline.run(Flags, program)
    if is_one_of_several():  # without the interpreter's end, in which threads of torch.distributed now and then call abort()
        sys.stderr.flush()
        os._exit(code)
    return code
