"""Fine-tunes a PaliGemma model: `python -m paligemma finetune --train train.jsonl --output runs/mine`.

The data are a JSONL file with image, prefix and suffix in each line (learning/dataset.py). Settings are flags or lines of a YAML
file. All data are checked before the first update. A run writes to --output:

    settings.json      the settings; --resume refuses to continue with other settings
    metrics.jsonl      one line for each update and each evaluation
    progress.svg       the same numbers as curves, drawn again after each evaluation
    checkpoints/       weights and optimiser state for --resume; every checkpoint is complete, and the last two are kept
    model/             the result: a checkpoint that this project and transformers can load
    adapter/           with --method lora, the adapter alone, in PEFT's format

A run that was interrupted or killed at any moment continues with --resume. Its losses then equal those of a run without
interruption, bit for bit (on the same kind of CPU). `torchrun --nproc_per_node N -m paligemma finetune ...` divides the work
among N processes. To read this file, begin with Flags and train. Checked in tests/programs/test_finetune.py.
"""

import logging
import signal
from dataclasses import dataclass, fields, replace
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from paligemma import machine
from paligemma.devices import find_device, profile, use_exact_float32
from paligemma.errors import DatasetError, DeviceError, UsageError, counted
from paligemma.files import expand_text, make_folder, stat_path
from paligemma.learning import run_folder
from paligemma.learning.processes import (
    barrier,
    check_device,
    connect_processes,
    exit_process,
    from_first,
    is_first,
    num_local_processes,
    own_device,
    world_size,
)
from paligemma.programs import commandline
from paligemma.programs.config_file import read_config
from paligemma.programs.options import PictureFlags, require
from paligemma.programs.progress import progress, show, stop_signals

if TYPE_CHECKING:
    import torch

    from paligemma.learning.training import Plan

LEARNING_RATES = {"full": 1e-5, "lora": 2e-4}  # method -> default learning rate
SCORES = ("exact", "vqa", "anls", "relaxed", "cider", "map", "miou")
MAX_COUNT = 10**9  # maximum of the flags that are whole numbers


@dataclass(frozen=True, kw_only=True)
class Flags(PictureFlags):
    """Fine-tunes a PaliGemma model on pictures, each with a prompt and the answer to learn.

      python -m paligemma finetune --train train.jsonl --output runs/x --preview                 look at the examples first
      python -m paligemma finetune --train train.jsonl --valid valid.jsonl --output runs/x
      python -m paligemma finetune --config finetune.yaml --output runs/y --method lora          flags override the file
      python -m paligemma finetune --config finetune.yaml --output runs/y --resume               continue after an interruption
      torchrun --nproc_per_node 2 -m paligemma finetune --config finetune.yaml --output runs/z   two processes

    Each line of the JSONL files: {"image": "a.jpg", "prefix": "detect cat", "suffix": "<loc0104><loc0320><loc0458><loc0674> cat"}

    Args:
        train: JSONL file of the training examples; required
        valid: JSONL file of validation examples, which are scored during the run and never trained on
        image_dir: folder that contains the pictures; default: the folder of each JSONL file
        output: new folder for all output of the run; required
        config: YAML file of settings, named like these flags; examples/finetune.yaml lists all of them
        model_path: starting model, a folder or a hub id; default: the bundled model
        base_model: base model of the adapter in --model_path; default: the base model that the adapter names
        revision: branch, tag or commit of a hub id
        device: auto, cpu, mps, cuda or cuda:N; with torchrun, process i of a machine takes card i
        dtype: precision of the computation, bf16 or fp32; trained weights are always kept in float32
        method: full trains the weights themselves, lora trains a small adapter instead
        parts: parts to train, separated by commas: attention, language_model, vision_tower, projector; default: the whole model.
            An adapter allows only language_model and vision_tower, and the default with lora is language_model
        lora_r: rank of the adapter
        lora_alpha: the output of the adapter is scaled by lora_alpha / lora_r
        lora_dropout: probability of dropping each input of the adapter during training, from 0 to below 1
        lora_matrices: matrices to adapt, by the last part of their names, separated by commas (q_proj,v_proj); default: all
        epochs: number of passes over the training examples; fractions are allowed
        steps: number of updates; overrides --epochs
        batch_size: examples per update, over all processes
        micro_batch_size: examples per forward and backward pass; gradients are accumulated up to --batch_size, so a smaller
            value needs less memory
        learning_rate: highest learning rate of the schedule, between 0 and 1; default: 1e-5, with lora 2e-4
        learning_rate_language_model: highest learning rate of the language model; default: --learning_rate
        learning_rate_vision_tower: highest learning rate of the vision tower; default: --learning_rate
        learning_rate_projector: highest learning rate of the projector; default: --learning_rate
        warmup: fraction of the updates that are used for warm-up (0 <= warmup < 1): the learning rate rises from 0, then falls to
            0 along half a cosine
        weight_decay: weight decay of matrices (AdamW), from 0 to below 1; biases and norms have none
        clip: maximum norm of the gradient; a longer gradient is scaled down to it
        loss: example gives every answer the same weight in the loss; token gives every answer token the same weight
        label_smoothing: probability that is moved from the right token to all other tokens, from 0 to below 1
        max_text_tokens: maximum number of tokens of prefix and suffix together; longer examples are refused, never truncated
        augment: none, or zoom: pictures are cropped or shifted a little at random, and boxes move with them
        gradient_checkpointing: recompute activations in the backward pass, which needs less memory and more time
        evaluate_every: number of updates between two evaluations; default: one epoch
        num_scored: maximum number of validation questions in an evaluation, spread evenly over the file
        scores: scores to compute, separated by commas: exact, vqa, anls, relaxed, cider, map, miou; default: the scores that fit
            the answers (map needs pycocotools)
        mask_codec: vae-oid.npz, which decodes masks for miou and --preview; default: the file in the model's folder
        save_every: number of updates between two checkpoints; a checkpoint is also saved before each evaluation
        seed: seed of the order of examples, of augmentation and of dropout, from 0 to 2^31 - 1
        skip_bad: train without the lines that cannot be used, instead of stopping
        preview: draw a page of examples as the model will see them, then stop; boxes and masks are decoded from the tokens of
            the answers
        resume: continue from the last checkpoint in --output, or start if there is none
        tensorboard: also write a log for TensorBoard
        verbose: print more messages
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
    micro_batch_size: int = 4
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
            return value is None or least <= value <= MAX_COUNT

        require(
            self,
            ("train", self.train, "a JSONL file of examples"),
            ("output", self.output, "a folder to write to"),
            *((name, getattr(self, name) != "", "a file or a folder") for name in PATHS),
            ("dtype", self.dtype in ("bf16", "bfloat16", "fp32", "float32"), "bf16 or fp32"),
            ("method", self.method in LEARNING_RATES, "full or lora"),
            ("lora_alpha", 0 < self.lora_alpha <= MAX_COUNT, f"a number above 0 and up to {MAX_COUNT}"),
            ("lora_dropout", 0 <= self.lora_dropout < 1, "a number from 0 to below 1"),
            ("epochs", 0 < self.epochs <= 1_000_000, "a number above 0 and up to 1000000"),
            *((name, is_count(getattr(self, name)), f"a whole number from 1 to {MAX_COUNT}") for name in COUNTS),
            ("batch_size", self.batch_size <= 1_000_000, "a whole number from 1 to 1000000"),
            ("lora_r", self.lora_r < 1 << 20, f"a whole number from 1 to {(1 << 20) - 1}"),
            *((name, is_rate(getattr(self, name)), "a number above 0 and below 1") for name in RATES),
            ("warmup", 0 <= self.warmup < 1, "a fraction from 0 to below 1"),
            ("weight_decay", 0 <= self.weight_decay < 1, "a number from 0 to below 1"),
            ("clip", self.clip > 0, "a number above 0"),
            ("loss", self.loss in ("example", "token"), "example or token"),
            ("label_smoothing", 0 <= self.label_smoothing < 1, "a number from 0 to below 1"),
            ("max_text_tokens", is_count(self.max_text_tokens, 4), f"a whole number from 4 to {MAX_COUNT}"),
            ("augment", self.augment in ("none", "zoom"), "none or zoom"),
            ("scores", set(names(self.scores)) <= set(SCORES), f"one or several of {', '.join(SCORES)}"),
            ("seed", 0 <= self.seed < 2**31, "a whole number from 0 to 2^31 - 1"),
        )

    @staticmethod
    def expand(argv: list[str]) -> list[str]:
        """The settings of the --config file, then argv. The last value of a flag counts, so argv overrides the file."""
        files = [argument.partition("=")[2] or following for argument, following in pairwise([*argv, ""])
                 if argument.partition("=")[0] == "--config"]  # fmt: skip
        return [*(read_config(files[-1], SETTINGS) if files else []), *argv]

    @property
    def trained_parts(self) -> list[str]:
        everything = ["language_model", "vision_tower", "projector"]
        return names(self.parts) or (everything if self.method == "full" else ["language_model"])

    def plan(self, num_examples: int) -> "Plan":
        """The hyperparameters of a run over this many training examples."""
        import torch

        from paligemma.learning.training import ALL, Plan

        rates = {part: getattr(self, f"learning_rate_{part}") for part in ALL}
        return Plan(
            steps=self.steps or max(1, round(self.epochs * num_examples / self.batch_size)),
            batch_size=self.batch_size,
            micro_batch_size=self.micro_batch_size,
            learning_rate=self.learning_rate or LEARNING_RATES[self.method],
            rates={part: rate for part, rate in rates.items() if rate is not None},
            warmup=self.warmup,
            weight_decay=self.weight_decay,
            clip=self.clip,
            reduction=self.loss,
            label_smoothing=self.label_smoothing,
            seed=self.seed,
            dtype=torch.bfloat16 if self.dtype.startswith("b") else torch.float32,
        )


PATHS = ("valid", "image_dir", "model_path", "base_model", "mask_codec")
COUNTS = ("batch_size", "micro_batch_size", "save_every", "num_scored", "steps", "evaluate_every", "lora_r")
RATES = [field.name for field in fields(Flags) if field.name.startswith("learning_rate")]
SETTINGS = [field.name for field in fields(Flags) if field.name != "config"]


def names(text: str | None) -> list[str]:
    """Splits a text at its commas into names."""
    return [name.strip() for name in (text or "").split(",") if name.strip()]


def train(flags: Flags, device: "torch.device") -> None:
    """The steps of a run, in order. Everything is checked before the weights are loaded, because loading takes long."""
    from paligemma.checkpoints.weights import empty_model
    from paligemma.layers.lora import LoraConfig
    from paligemma.learning import dataset, preview, training
    from paligemma.learning.evaluation import Judge
    from paligemma.learning.run import ADVICE, Run, memory_needed
    from paligemma.objects.mask_codec import find_codec, load_codec
    from paligemma.opened import open_checkpoint

    folder = Path(flags.output)
    if not flags.preview:
        from_first(lambda: run_folder.check_unused(folder, flags.resume))

    # 1. The starting model: its settings, and a copy without weights (on the meta device).
    checkpoint = open_checkpoint(flags.model_path, revision=flags.revision, base_model=flags.base_model)
    config, stored_quantization = checkpoint.config, checkpoint.stored_kind
    if stored_quantization is not None:
        advice = "Name the checkpoint that has not been quantized."
        raise UsageError(f"{checkpoint.name} is stored as {stored_quantization}, which cannot be trained. {advice}")
    if flags.method == "lora" and checkpoint.adapter_config is not None:
        advice = "Name the merged model, which a run with --method lora writes to model/."
        raise UsageError(f"{checkpoint.name} has an adapter, and a second adapter cannot be added to it. {advice}")
    adapter = LoraConfig(flags.lora_r, flags.lora_alpha, flags.lora_dropout) if flags.method == "lora" else None

    def choose_trained(model: "torch.nn.Module") -> None:
        if adapter is None:
            training.freeze_except(model, flags.trained_parts)
        else:
            training.add_adapter(model, adapter, flags.trained_parts, names(flags.lora_matrices), flags.seed)

    blueprint = empty_model(config)
    choose_trained(blueprint)

    # 2. The data. Besides the image tokens, the model's context has room for max_tokens text tokens.
    max_tokens = config.text_config.max_position_embeddings - config.num_image_tokens
    limit = min(flags.max_text_tokens, max_tokens)

    def read_data() -> list[dataset.Split]:
        paths = [path for path in (flags.train, flags.valid) if path]
        splits = dataset.read_splits(paths, flags.image_dir, flags.picture_options, checkpoint.processor, limit)
        for line in (line for split in splits for line in dataset.report(split)):
            show(line)
        dataset.require_usable(splits, flags.skip_bad, max_tokens)
        return splits

    splits = from_first(read_data)
    codec_file = find_codec(checkpoint.base, flags.mask_codec)
    codec = load_codec(codec_file) if codec_file else None
    examples = dataset.Examples(splits[0], checkpoint.processor, flags.augment, flags.seed)
    if flags.preview:
        make_folder(folder, run_folder.NEW_OUTPUT)
        preview.draw_preview(examples, codec, folder / "preview.png")
        show(f"the drawing of the examples is in {folder / 'preview.png'}.")
        return
    judge = None
    if flags.valid:
        questions, scores = dataset.Examples(splits[1], checkpoint.processor), names(flags.scores)
        judge = Judge(questions, codec, batch_size=flags.micro_batch_size, count=flags.num_scored, scores=scores)

    # 3. The memory.
    plan = flags.plan(len(examples.items))
    used = profile(device)
    if plan.dtype not in used.dtypes:
        show(f"bfloat16 is slow on {used.name}, which emulates it. If the memory suffices, --dtype fp32 is faster.")
    needed_bytes = memory_needed(blueprint, plan, flags.max_text_tokens, flags.gradient_checkpointing)
    needed_bytes *= num_local_processes() if device.type == "cpu" else 1
    machine.require_memory(needed_bytes, device, "fine-tuning takes", ADVICE)

    settings = run_folder.settings_of(flags, splits[0].fingerprint(), checkpoint.fingerprint)
    with run_folder.claim(folder, settings):
        # 4. The weights, and the optimiser.
        with machine.memory_errors("loading the weights", ADVICE):
            model = checkpoint.load(device=device, dtype=plan.dtype)
        choose_trained(model)
        if flags.gradient_checkpointing:
            training.checkpoint_activations(model)
        if world_size() > 1:
            training.shard(model, device)
        trainer = training.Trainer(model, plan, examples.batch, len(examples.items))
        saved = run_folder.checkpoints(folder / "checkpoints")
        if flags.resume and saved:
            trainer.restore(saved[-1])
        num_trained = sum(parameter.numel() for parameter in trainer.trained.values())
        updates = counted(plan.steps, "update") + (f", of which {trainer.step} are done" if trainer.step else "")
        show(f"{counted(trainer.count, 'example')}, {updates}; {num_trained / 1e6:.4g} M trained parameters, on {device}.")

        # 5. The updates, with evaluations and checkpoints.
        evaluate_every = flags.evaluate_every or max(1, trainer.count // flags.batch_size)
        run = Run(trainer, judge, folder, evaluate_every, flags.save_every, flags.tensorboard)
        with stop_signals() as signals, progress(trainer.step, plan.steps) as show_line:
            for line in run.updates(should_stop=lambda: bool(signals)):
                show_line(line)
        if trainer.step < plan.steps:
            show(f"interrupted at step {trainer.step} of {plan.steps}, which is saved. Add --resume to continue.")
            raise commandline.Interrupted(signals[0] if signals else signal.SIGTERM)
        if skipped := trainer.step - trainer.updates:
            show(f"{skipped} of {plan.steps} updates were skipped: their loss or gradient was not finite.")

        # 6. The result.
        result = run.save_result(checkpoint, adapter, flags.revision)
        command = f"{commandline.command()} --model_path {result} --image_file_path PICTURE --prompt PREFIX"
        show(f"the result is in {result}. Try it: {command}")
        # Wait until the first process has written the result, because torchrun ends it as soon as another process ends.
        barrier()


def program(flags: Flags) -> None:
    commandline.relay_logs(flags.verbose)
    if not is_first():
        logging.disable()  # because the first process logs the same messages
    paths = {name: getattr(flags, name) for name in ("train", "valid", "image_dir", "output", "mask_codec")}
    flags = replace(flags, **{name: expand_text(path) for name, path in paths.items() if path})
    for name, file in (("train", flags.train), ("valid", flags.valid)):
        if file and stat_path(file, DatasetError) is None:
            raise DatasetError(f"{file} does not exist. Name a JSONL file of examples with --{name}.", path=file)
    inputs = ("train", "valid", "config", "mask_codec", "model_path")
    run_folder.check_inputs(Path(flags.output), [(f"--{name}", getattr(flags, name)) for name in inputs])
    check_device(flags.device)
    if flags.tensorboard and find_spec("tensorboard") is None:
        raise DeviceError("--tensorboard needs a package. Install it: pip install tensorboard.")
    machine.use_cores()
    machine.check_torch()
    use_exact_float32()
    device = find_device(own_device(flags.device))
    with connect_processes(device):
        train(flags, device)


def main() -> int:
    return exit_process(commandline.run(Flags, program))
