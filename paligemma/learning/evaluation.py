"""Scores of a model on questions whose answers are known. The model is passed in; this file imports no model.

Checked in tests/learning/test_evaluation.py, with a whole run in tests/programs/test_finetune.py.
"""

import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from paligemma.devices import to_device
from paligemma.errors import DeviceError, UsageError
from paligemma.learning import processes, scores
from paligemma.learning.dataset import Examples, spread
from paligemma.learning.scores import TEXT_SCORES, pycocotools_problem
from paligemma.learning.training import answer_losses, token_weights
from paligemma.objects.mask_codec import MaskCodec, with_masks
from paligemma.objects.outputs import parse_text
from paligemma.pictures.folders import load
from paligemma.tasks import Annotator, Request, Result, in_order

log = logging.getLogger(__name__)
EXTRA_TOKENS = 8  # a generated answer may be this many tokens longer than the longest reference


def sample_text(count: int, total: int, noun: str) -> str:
    """The size of a sample as a text, such as "200 of 5000 lines, spread evenly"."""
    return f"{count} of {total} {noun}{'s' * (total != 1)}" + ", spread evenly" * (count < total)


class Judge:
    """Scores a model on examples that it is not trained on.

    References with boxes or masks are scored as objects, all others as texts. An empty reference is scored as both: any text and
    any box in the answer is an error. If there are several processes, each process answers a share of the questions, and all
    processes get all scores.

    Args:
        examples: examples with the same picture and prompt form one question. If their suffixes are texts, each suffix is a
            reference of the question. If their suffixes contain objects, the question has one reference: all these objects.
        codec: decodes masks; None if there is no codec.
        batch_size: number of questions that are answered at the same time.
        count: at most this many questions are answered, and the loss is computed on at most this many lines. Questions and lines
            are chosen by dataset.spread.
        scores: names from scores.TEXT_SCORES and OBJECT_SCORES. If empty, the scores are chosen by the kind of the references
            and the installed packages, and a warning is logged for boxes or masks that cannot be scored.
    Raises: UsageError for a score that these examples cannot have, DeviceError if the package of a requested score is missing.
    """

    def __init__(
        self, examples: Examples, codec: MaskCodec | None, *, batch_size: int, count: int, scores: Sequence[str] = ()
    ):
        self.examples, self.codec, self.batch_size = examples, codec, batch_size
        self.rank, self.world_size = processes.rank(), processes.world_size()
        self.lines = spread(len(examples.items), count)
        references: dict[tuple[Path, str], list[str]] = {}
        for example in examples.items:
            references.setdefault((example.image, example.prefix), []).append(example.suffix)
        questions = [*references]
        self.references = {questions[i]: references[questions[i]] for i in spread(len(questions), count)}
        self.sample_description = sample_text(len(self.lines), len(examples.items), "line")
        if len(questions) != len(examples.items):
            asked = sample_text(len(self.references), len(questions), "question")
            self.sample_description = f"{asked}; loss computed on {self.sample_description}"
        suffixes = [suffix for group in self.references.values() for suffix in group]
        self.scores = self.choose_scores(scores, suffixes)
        self.max_new_tokens = max(len(examples.processor.encode(suffix)) for suffix in suffixes) + 1 + EXTRA_TOKENS

    def choose_scores(self, requested: Sequence[str], suffixes: Sequence[str]) -> list[str]:
        """The names of the requested scores or, if none is requested, of the scores that fit. Raises: see the class."""
        has_boxes, has_masks = (any(token in suffix for suffix in suffixes) for token in ("<loc", "<seg"))
        has_text_references = any("<loc" not in suffix for suffix in suffixes)  # true for empty references, too
        has_nonempty_texts = any(suffix and "<loc" not in suffix for suffix in suffixes)
        map_problem = pycocotools_problem() if has_boxes else None
        if not requested:
            if map_problem:
                log.warning("boxes are not scored: %s", map_problem)
            if has_masks and self.codec is None:
                log.warning("masks are not scored: miou needs a mask codec. Name vae-oid.npz with --mask_codec.")
            chosen = ["exact", "anls"] * (has_nonempty_texts or not has_boxes) + ["map"] * (has_boxes and map_problem is None)
            return chosen + ["miou"] * (has_masks and self.codec is not None)
        if "miou" in requested and self.codec is None:
            raise UsageError("--scores miou needs a mask codec. Name vae-oid.npz with --mask_codec, or leave miou out.")
        possible = [*TEXT_SCORES] * has_text_references + ["map"] * has_boxes + ["miou"] * has_masks
        if impossible := [name for name in requested if name not in possible]:
            text = f"--scores {','.join(impossible)} has nothing to score"
            raise UsageError(f"{text}. The possible scores of these answers are {', '.join(possible)}.")
        if "map" in requested and map_problem:
            raise DeviceError(f"--scores {','.join(requested)}: {map_problem}")
        return [*requested]

    def loss(self, model: nn.Module) -> float:
        """The loss in nats: the mean cross entropy over the tokens of each answer, averaged over the answers."""
        total, own_lines = 0.0, self.lines[self.rank :: self.world_size]
        with torch.no_grad():
            for first in range(0, len(own_lines), self.batch_size):
                batch = self.examples.batch([(0, i) for i in own_lines[first : first + self.batch_size]])
                losses, row = answer_losses(model, batch)
                weights, _ = token_weights(batch["labels"], "example")
                total += float((losses * to_device(weights[row], losses.device)).sum())
        return sum(processes.gather(total)) / len(self.lines)

    def ask(self, model: nn.Module) -> list[Result]:
        """The model's greedy answers in the order of the questions. Raises: the error of the first question that failed."""
        annotator = Annotator(model, self.examples.processor, rows=self.batch_size, max_new_tokens=self.max_new_tokens)
        own_questions = list(self.references)[self.rank :: self.world_size]
        side, options = self.examples.processor.image_size, self.examples.options
        pictures = ((load(str(image), side, is_typed=False, **options), prefix) for image, prefix in own_questions)
        requests = (
            Request(picture=loaded.picture, size=loaded.size, task="ask", text=prefix, prompt=prefix)
            for loaded, prefix in pictures
        )
        shares = processes.gather(list(in_order(annotator.run(requests), len(own_questions))))
        results = [shares[i % self.world_size][i // self.world_size] for i in range(len(self.references))]
        for result in results:  # raised after the gather, so that no process waits for a process that has failed
            if result.error is not None:
                raise result.error
        return results

    def __call__(self, model: nn.Module) -> dict[str, float]:
        """The loss ("valid_loss") and every score, by name."""
        values = {"valid_loss": self.loss(model)}
        if not self.scores:
            return values
        pairs = list(zip(self.ask(model), self.references.values(), strict=True))
        objects = [(result, group) for result, group in pairs if any("<loc" in text for text in group) or not any(group)]
        texts = [(result.text, group) for result, group in pairs if not any("<loc" in text for text in group)]
        for name in self.scores:
            if name in TEXT_SCORES and texts:
                values[name] = TEXT_SCORES[name](*zip(*texts, strict=True))
        return values | (self.score_objects(objects) if objects else {})

    def score_objects(self, pairs: list[tuple[Result, list[str]]]) -> dict[str, float]:
        """The scores of boxes ("map", "map50") and of masks ("miou"), if self.scores contains "map" or "miou"."""
        predictions = [result.parsed.objects if result.parsed else [] for result, _ in pairs]
        references = [[obj for suffix in dict.fromkeys(group) for obj in parse_text(suffix).objects] for _, group in pairs]
        values = scores.detection_map(predictions, references) if "map" in self.scores else {}
        if "miou" in self.scores:
            overlaps = []
            # Masks are as large as pictures, so they are decoded for one picture at a time.
            for (result, _), predicted, expected in zip(pairs, predictions, references, strict=True):
                if any(obj.codes for obj in expected):
                    masks = [with_masks(objects, self.codec, result.width, result.height) for objects in (predicted, expected)]
                    overlaps.append(scores.segmentation_miou([masks[0]], [masks[1]]))
            values["miou"] = scores.mean(overlaps)
        return values
