"""Scores of a model on questions whose answers are known. Works on any model that is passed in; imports no model.

Checked in tests/learning/test_evaluation.py, with a whole run in tests/programs/test_finetune.py.
"""

import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from paligemma.errors import DeviceError, UsageError
from paligemma.learning import processes, scores
from paligemma.learning.dataset import Examples, spread
from paligemma.learning.scores import TEXT_SCORES, lacks_pycocotools
from paligemma.learning.training import answer_losses, token_weights
from paligemma.objects.mask_codec import MaskCodec, with_masks
from paligemma.objects.outputs import parse_text
from paligemma.pictures.folders import load
from paligemma.tasks import Annotator, Request, Result, in_order

log = logging.getLogger(__name__)
EXTRA_TOKENS = 8  # a generated answer may be longer than the longest reference by this many tokens


def sample_text(count: int, total: int, noun: str) -> str:
    """How many were chosen of how many: "200 of 5000 lines, spread evenly"."""
    return f"{count} of {total} {noun}{'s' * (total != 1)}" + ", spread evenly" * (count < total)


class Judge:
    """Scores a model on examples that it is not trained on.

    References with boxes or masks are scored as objects, all others as texts. An empty reference is scored as both: any text and
    any box in the answer is an error. Several processes answer a share of the questions each; all of them get all scores.

    Args:
        examples: lines with the same picture and prompt are one question: their suffixes are its references, or its objects.
        codec: decodes masks, or None.
        batch_size: questions that are answered at the same time.
        count: at most this many questions are answered, and the loss is computed on at most this many lines. Both are chosen
            evenly from all of them (dataset.spread).
        scores: names of scores.TEXT_SCORES and OBJECT_SCORES. If empty, they are chosen by the kind of the references and the
            installed packages, and what cannot be scored is logged as a warning.
    Raises: UsageError for a score that these examples cannot have, DeviceError if the package of a requested score is missing.
    """

    def __init__(
        self, examples: Examples, codec: MaskCodec | None, *, batch_size: int, count: int, scores: Sequence[str] = ()
    ):
        self.examples, self.codec, self.batch_size = examples, codec, batch_size
        self.rank, self.world_size = processes.rank(), processes.world_size()
        self.lines = spread(len(examples.lines), count)
        references: dict[tuple[Path, str], list[str]] = {}
        for line in examples.lines:
            references.setdefault((line.image, line.prefix), []).append(line.suffix)
        questions = [*references]
        self.references = {questions[i]: references[questions[i]] for i in spread(len(questions), count)}
        self.scored = sample_text(len(self.lines), len(examples.lines), "line")  # for the screen and the log
        if len(questions) != len(examples.lines):
            self.scored = f"{sample_text(len(self.references), len(questions), 'question')}; loss of {self.scored}"
        suffixes = [suffix for group in self.references.values() for suffix in group]
        self.scores = self.choose_scores(scores, suffixes)
        self.max_new_tokens = max(len(examples.processor.encode(suffix)) for suffix in suffixes) + 1 + EXTRA_TOKENS

    def choose_scores(self, asked: Sequence[str], suffixes: Sequence[str]) -> list[str]:
        """The names of the scores for these references: those that were asked for, if any. Raises: see the class."""
        has_boxes, has_masks = (any(token in suffix for suffix in suffixes) for token in ("<loc", "<seg"))
        has_texts = any("<loc" not in suffix for suffix in suffixes)  # an empty one counts as a text
        has_words = any(suffix and "<loc" not in suffix for suffix in suffixes)
        no_map = lacks_pycocotools() if has_boxes else None
        if not asked:
            if no_map:
                log.warning("boxes are not scored: %s", no_map)
            if has_masks and self.codec is None:
                log.warning("masks are not scored: miou needs a mask codec. Name vae-oid.npz with --mask_codec.")
            chosen = ["exact", "anls"] * (has_words or not has_boxes) + ["map"] * (has_boxes and no_map is None)
            return chosen + ["miou"] * (has_masks and self.codec is not None)
        if "miou" in asked and self.codec is None:
            raise UsageError("--scores miou needs a mask codec. Name vae-oid.npz with --mask_codec, or leave miou out.")
        possible = [*TEXT_SCORES] * has_texts + ["map"] * has_boxes + ["miou"] * has_masks
        if impossible := [name for name in asked if name not in possible]:
            text = f"--scores {','.join(impossible)} has nothing to score"
            raise UsageError(f"{text}. The possible scores of these answers are {', '.join(possible)}.")
        if "map" in asked and no_map:
            raise DeviceError(f"--scores {','.join(asked)}: {no_map}")
        return [*asked]

    def loss(self, model: nn.Module) -> float:
        """The mean over answers of their mean cross entropy per token, in nats."""
        total, mine = 0.0, self.lines[self.rank :: self.world_size]
        with torch.no_grad():
            for first in range(0, len(mine), self.batch_size):
                batch = self.examples.batch([(0, i) for i in mine[first : first + self.batch_size]])
                losses, row = answer_losses(model, batch)
                weights, _ = token_weights(batch["labels"], "example")
                total += float((losses * weights.to(losses.device)[row]).sum())
        return sum(processes.gather(total)) / len(self.lines)

    def ask(self, model: nn.Module) -> list[Result]:
        """The model's greedy answers in the order of the questions. Raises: the first error, in all processes."""
        annotator = Annotator(model, self.examples.processor, rows=self.batch_size, max_new_tokens=self.max_new_tokens)
        mine = list(self.references)[self.rank :: self.world_size]
        side, options = self.examples.processor.image_size, self.examples.options
        pictures = ((load(str(image), side, is_typed=False, **options), prefix) for image, prefix in mine)
        requests = (
            Request(picture=loaded.picture, size=loaded.size, task="ask", text=prefix, prompt=prefix)
            for loaded, prefix in pictures
        )
        shares = processes.gather(list(in_order(annotator.run(requests), len(mine))))
        results = [shares[i % self.world_size][i // self.world_size] for i in range(len(self.references))]
        for result in results:  # after the gather, so that no process waits for one that has failed
            if result.error is not None:
                raise result.error
        return results

    def __call__(self, model: nn.Module) -> dict[str, float]:
        """The loss ("valid_loss") and every score, by name."""
        numbers = {"valid_loss": self.loss(model)}
        if not self.scores:
            return numbers
        pairs = list(zip(self.ask(model), self.references.values(), strict=True))
        objects = [(result, group) for result, group in pairs if any("<loc" in text for text in group) or not any(group)]
        texts = [(result.text, group) for result, group in pairs if not any("<loc" in text for text in group)]
        for name in self.scores:
            if name in TEXT_SCORES and texts:
                numbers[name] = TEXT_SCORES[name](*zip(*texts, strict=True))
        return numbers | (self.score_objects(objects) if objects else {})

    def score_objects(self, pairs: list[tuple[Result, list[str]]]) -> dict[str, float]:
        """Average precision of boxes and mean IoU of masks, as far as they are among the scores."""
        predictions = [result.parsed.objects if result.parsed else [] for result, _ in pairs]
        references = [[one for suffix in dict.fromkeys(group) for one in parse_text(suffix).objects] for _, group in pairs]
        numbers = scores.detection_map(predictions, references) if "map" in self.scores else {}
        if "miou" in self.scores:
            overlaps = []
            for (result, _), *both in zip(pairs, predictions, references, strict=True):
                if any(found.codes for found in both[1]):  # decoded for one picture at a time: masks are as large as pictures
                    masks = [with_masks(objects, self.codec, result.width, result.height) for objects in both]
                    overlaps.append(scores.segmentation_miou([masks[0]], [masks[1]]))
            numbers["miou"] = scores.mean(overlaps)
        return numbers
