"""Makes the mistakes that finetuning.md describes, on purpose, and prints their effects: `python -m notes.finetuning_figures`.

mistakes.svg  for each run, the training loss and the share of right answers

Every run starts from the demo checkpoint and learns "what is the largest shape?" (demo/transfer.py) with the trainer that
`paligemma finetune` uses. Each mistake changes one line of code or one setting. All runs together take a quarter of an hour on
two cores; --quick only shows that the script works.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

if __name__ == "__main__":  # --help and wrong flags are answered before the slow imports
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="make only a few updates, and store nothing")
    parser.add_argument("--only", help="repeat this run only, and keep the stored results of the others")
    parser.add_argument("--stored", action="store_true", help="run nothing; print and draw the results stored in mistakes.json")
    options = parser.parse_args()

import numpy as np
import torch
from PIL import Image

from demo import evaluate, shapes
from paligemma.checkpoints import weights
from paligemma.files import read_json
from paligemma.layers import lora
from paligemma.learning import curves, dataset, training
from paligemma.learning.evaluation import Judge
from paligemma.learning.run import merged_model
from paligemma.processing_paligemma import PaliGemmaProcessor
from paligemma.svg import BLUE, FAINT, GREEN, ORANGE, PURPLE, SOFT, Axes, Drawing
from paligemma.tasks import Annotator
from paligemma.vocabulary import IGNORE_INDEX

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
CHECKPOINT = ROOT / "paligemma" / "bundled"
RESULTS = HERE / "mistakes.json"
IMAGE_TOKEN = weights.ModelFiles(CHECKPOINT).config.image_token_index
PLAN = training.Plan(steps=200, batch_size=8, micro_batch_size=8, learning_rate=5e-4)
OLD_SCENES = 24  # scenes with questions that the checkpoint was trained on; they show what fine-tuning makes it forget


def unchanged(batch: dict) -> dict:
    return batch


def leak(batch: dict) -> dict:
    """The whole row is marked as prompt, so that every token attends to the whole answer."""
    return batch | {"token_type_ids": torch.zeros_like(batch["token_type_ids"])}


def no_end(batch: dict) -> dict:
    """The loss ignores the last token of each row, <eos>, as if the text had been cut at some length."""
    labels = batch["labels"].clone()
    last = (batch["attention_mask"].cumsum(1) * (labels != IGNORE_INDEX)).argmax(1)
    labels[torch.arange(len(labels)), last] = IGNORE_INDEX
    return batch | {"labels": labels}


def with_prompt(batch: dict) -> dict:
    """The loss also counts the tokens of the prompt."""
    is_text = (batch["attention_mask"] == 1) & (batch["input_ids"] != IMAGE_TOKEN)
    return batch | {"labels": torch.where(is_text, batch["input_ids"], IGNORE_INDEX)}


def causal(batch: dict) -> dict:
    """The whole row is marked as answer: picture and prompt attend only to earlier tokens, as in an ordinary decoder."""
    return batch | {"token_type_ids": torch.ones_like(batch["token_type_ids"])}


@dataclass(frozen=True)
class Run:
    """The settings of one run."""

    name: str  # in the table and in the figure
    change: Callable[[dict], dict] = unchanged
    plan: training.Plan = PLAN
    method: str = "full"
    is_rounded: bool = False  # round the weights to bfloat16 after each update
    count: int | None = None  # number of training examples; None = all
    with_old: bool = False  # add to each batch an equal number of old questions (questions that the checkpoint was trained on)
    on_train: bool = False  # score the model on the training examples


RUNS = [
    Run("correct"),
    Run("LoRA adapter", plan=replace(PLAN, learning_rate=5e-3), method="lora"),
    Run("plus as many old questions", with_old=True),
    Run("the prompt sees the answer", leak),
    Run("the answer has no <eos>", no_end),
    Run("causal mask for the whole row", causal),
    Run("loss also on the prompt", with_prompt),
    Run("learning rate times 10", plan=replace(PLAN, learning_rate=5e-3)),
    Run("learning rate / 100", plan=replace(PLAN, learning_rate=5e-6)),
    Run("learning rate / 100, bfloat16 weights", plan=replace(PLAN, learning_rate=5e-6), is_rounded=True),
    Run("only 40 examples", count=40),
    Run("only 40 examples, scored on the same", count=40, on_train=True),
]


@dataclass
class Outcome:
    """The results of one run."""

    losses: list[float] = field(default_factory=list)
    valid_loss: float = 0.0
    exact: float = 0.0  # share of answers to the new question that equal the expected text
    old: float = 0.0  # share of right answers to questions that the checkpoint was trained on
    changed: float = 0.0  # share of the trained weights that differ from those at the start
    generated: list[str] = field(default_factory=list)  # three answers


def old_example(seed: tuple[int, int]) -> tuple[Image.Image, str, str]:
    """Picture, prefix and suffix of a question that the checkpoint was trained on, about a new scene."""
    rng = np.random.default_rng([9000, *seed])
    scene = shapes.make_scene(rng)
    asked = shapes.ask(scene, rng, list(evaluate.ANSWERS))
    return shapes.draw(scene, 112), *asked[rng.integers(len(asked))]


def score_old_questions(model: torch.nn.Module, processor: PaliGemmaProcessor, count: int) -> float:
    """Share of right answers to the questions that the checkpoint was trained on."""
    asked = evaluate.questions(count, seed=1000)
    asked = [(scene, [question for question in questions if question.kind in evaluate.ANSWERS]) for scene, questions in asked]
    results = evaluate.answers(Annotator(model, processor, codec=None, rows=32, max_new_tokens=24), asked)
    flat = [question for _, questions in asked for question in questions]
    return sum(evaluate.score(question, result) for question, result in zip(flat, results, strict=True)) / len(flat)


def finetune(
    run: Run, train: dataset.Split, valid: dataset.Split, processor: PaliGemmaProcessor, options: argparse.Namespace
) -> Outcome:
    """Makes the updates of one run and measures the model that results."""
    model = weights.load_model(CHECKPOINT, dtype=torch.bfloat16)
    if run.method == "lora":
        torch.manual_seed(0)
        lora.inject(model, lora.LoraConfig(), lora.targets(model))
    else:
        training.freeze_except(model, training.ALL)
    examples = dataset.Examples(train, processor)
    count = run.count or len(train.examples)
    plan = replace(run.plan, steps=options.steps)

    def make_batch(keys: list[tuple[int, int]]) -> dict:
        rows = [examples[key] for key in keys]
        if run.with_old:
            rows += [old_example(key) for key in keys]
        return run.change(processor(*map(list, zip(*rows, strict=True)), notes=[]))

    trainer = training.Trainer(model, plan, make_batch, count)
    before = {name: parameter.detach().clone() for name, parameter in trainer.trained.items()}
    found = Outcome()
    for _ in range(plan.steps):
        found.losses.append(round(trainer.update().loss, 5))
        if run.is_rounded:
            for parameter in trainer.trained.values():
                parameter.data.copy_(parameter.data.bfloat16())
    changed = sum(int((parameter != before[name]).sum()) for name, parameter in trainer.trained.items())
    found.changed = round(changed / sum(parameter.numel() for parameter in trainer.trained.values()), 4)
    plain = merged_model(model, torch.bfloat16)
    scored = dataset.Examples(train if run.on_train else valid, processor)
    judge = Judge(scored, None, batch_size=32, count=run.count if run.on_train else options.scored, scores=["exact"])
    numbers = judge(plain)
    found.valid_loss, found.exact = round(numbers["valid_loss"], 4), round(numbers["exact"], 4)
    found.generated = [result.text for result in judge.ask(plain)[:3]]
    found.old = round(score_old_questions(plain, processor, options.old), 4)
    return found


def draw_mistakes() -> None:
    """Draws mistakes.svg: for each run, the training loss on the left and the share of right answers on the right."""
    results = read_json(RESULTS)
    drawing = Drawing(980, 60 + 30 * len(results))
    most = max(len(found["losses"]) for found in results.values())
    axes = Axes(drawing, (60, 50, 380, 10 + 30 * len(results)), (0, most), (0, 3))
    axes.frame([0, most / 2, most], [0, 1, 2, 3], "updates", "training loss, nats per token")
    drawing.text(970, 38, "right answers to the new question, and to the old ones", anchor="end")
    for number, (name, found) in enumerate(results.items()):
        color = (BLUE, GREEN, ORANGE, PURPLE)[number] if number < 4 else FAINT
        smoothed = curves.smooth([(step, min(loss, 3.0)) for step, loss in enumerate(found["losses"], 1)])
        axes.curve(smoothed, color if number < 4 else SOFT)
        y = 52 + 30 * number
        drawing.text(650, y + 10, name, anchor="end", size=12)
        drawing.rect(660, y, 220 * found["exact"], 11, color if number < 4 else SOFT)
        drawing.rect(660, y + 12, 220 * found["old"], 6, FAINT, SOFT)
        drawing.text(890, y + 10, f"{found['exact']:.1%}, {found['old']:.0%}", size=12)
    drawing.save(HERE / "mistakes.svg")


def report(results: dict[str, dict]) -> None:
    print(f"{'':42}{'train loss':>10}{'valid loss':>11}{'exact':>8}{'old':>7}{'changed':>9}  generated")
    for name, found in results.items():
        last = found["losses"][-20:]
        print(f"{name:42}{sum(last) / len(last):10.3f}{found['valid_loss']:11.3f}{found['exact']:8.1%}{found['old']:7.1%}"
              f"{found['changed']:9.1%}  {found['generated'][0][:40]!r}")  # fmt: skip


def main(options: argparse.Namespace) -> None:
    if options.stored:
        draw_mistakes()
        return report(read_json(RESULTS))
    options.steps, options.scored, options.old = (3, 8, 2) if options.quick else (PLAN.steps, 200, OLD_SCENES)
    processor = PaliGemmaProcessor.from_pretrained(CHECKPOINT)
    with tempfile.TemporaryDirectory() as folder:
        count = 40 if options.quick else 800
        command = [sys.executable, "-m", "demo.transfer", "--out", folder, "--count", str(count)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        train, valid = (dataset.read_split(Path(folder) / f"{name}.jsonl") for name in ("train", "valid"))
        before = read_json(RESULTS) if options.only else {}
        results = {run.name: before.get(run.name) for run in RUNS}
        for run in (run for run in RUNS if options.only in (None, run.name)):
            results[run.name] = finetune(run, train, valid, processor, options).__dict__
            print(f"done: {run.name}", file=sys.stderr)
    if not options.quick:
        RESULTS.write_text(json.dumps(results) + "\n", encoding="utf-8")
        draw_mistakes()
    report(results)


if __name__ == "__main__":
    main(options)
