"""Asks a model questions whose answers are known, and scores what it says. Takes a model, imports none.

Checked in tests/learning/test_evaluation.py, with a whole run in tests/programs/test_finetune.py.
"""

import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import distributed, nn

from paligemma.errors import DeviceError, UsageError
from paligemma.learning import scores
from paligemma.learning.dataset import Examples, spread
from paligemma.learning.scores import TEXT_SCORES, lacks_pycocotools
from paligemma.learning.training import answer_losses, rank_and_world, weights_of
from paligemma.objects.mask_codec import MaskCodec, with_masks
from paligemma.objects.outputs import parse_text
from paligemma.pictures.folders import load
from paligemma.tasks import Annotator, Request, Result, in_order

log = logging.getLogger(__name__)
ANSWER_ROOM = 8  # tokens that an answer may be longer than the longest right one


def part_of(count: int, total: int, noun: str) -> str:
    """How many of how many, and which: "200 of 5000 lines, spread evenly"."""
    return f"{count} of {total} {noun}{'s' * (total != 1)}" + ", spread evenly" * (count < total)


class Judge:
    """Scores of a model on examples that it does not learn from.

    Right answers with boxes or masks are scored as objects, all others as texts. An empty one is both: the right text is none,
    and a box there is one too many. Several processes ask a share of the questions each; all of them get all scores.

    Args:
        examples: lines with the same picture and prompt are right answers to one question, or hold the objects of one.
        codec: decodes masks, if there is one.
        rows: questions in flight.
        count: the most questions to ask, and the most lines whose loss is taken; both spread evenly over all (dataset.spread).
        scores: names of scores.TEXT_SCORES and OBJECT_SCORES; chosen by what the right answers hold, and by what is installed,
            if empty. What cannot be scored is logged as a warning.
    Raises: UsageError for a score that these examples do not have, DeviceError for a named one whose package is not there.
    """

    def __init__(self, examples: Examples, codec: MaskCodec | None, *, rows: int, count: int, scores: Sequence[str] = ()):
        self.examples, self.codec, self.rows = examples, codec, rows
        self.lines = spread(len(examples.lines), count)
        answers: dict[tuple[Path, str], list[str]] = {}
        for line in examples.lines:
            answers.setdefault((line.image, line.prefix), []).append(line.suffix)
        questions = [*answers]
        self.answers = {questions[i]: answers[questions[i]] for i in spread(len(questions), count)}
        self.scored = part_of(len(self.lines), len(examples.lines), "line")  # in words, for the screen and the log
        if len(questions) != len(examples.lines):
            self.scored = f"{part_of(len(self.answers), len(questions), 'question')}; loss of {self.scored}"
        said = [suffix for suffixes in self.answers.values() for suffix in suffixes]
        has_boxes, has_masks = (any(token in suffix for suffix in said) for token in ("<loc", "<seg"))
        has_texts = any("<loc" not in suffix for suffix in said)  # an empty one is a text
        chosen = ["exact", "anls"] * (any(suffix and "<loc" not in suffix for suffix in said) or not has_boxes)
        no_map = lacks_pycocotools() if has_boxes else None
        self.scores = list(scores) or [
            *chosen, *["map"] * (has_boxes and no_map is None), *["miou"] * (has_masks and codec is not None)
        ]  # fmt: skip
        if no_map and not scores:
            log.warning("boxes are not scored: %s", no_map)
        if has_masks and codec is None and not scores:
            log.warning("masks are not scored: miou needs a mask codec. Name vae-oid.npz with --mask_codec.")
        if "miou" in self.scores and codec is None:
            raise UsageError("--scores miou needs a mask codec. Name vae-oid.npz with --mask_codec, or leave miou out.")
        measured = [*TEXT_SCORES] * has_texts + ["map"] * has_boxes + ["miou"] * has_masks
        strange = [name for name in self.scores if name not in measured]
        if strange:
            raise UsageError(f"--scores {','.join(strange)} has nothing to score. These answers have {', '.join(measured)}.")
        if "map" in self.scores and no_map:
            raise DeviceError(f"--scores {','.join(self.scores)}: {no_map}")
        self.longest = max(len(examples.processor.encode(suffix)) for suffix in said) + 1 + ANSWER_ROOM
        self.rank, self.world = rank_and_world()

    def loss(self, model: nn.Module) -> float:
        """Mean over answers, in nats a token."""
        total, mine = 0.0, self.lines[self.rank :: self.world]
        with torch.no_grad():
            for first in range(0, len(mine), self.rows):
                batch = self.examples.batch([(0, i) for i in mine[first : first + self.rows]])
                losses, row = answer_losses(model, batch)
                of_token, _ = weights_of(batch["labels"], "example")
                total += float((losses * of_token.to(losses.device)[row]).sum())
        return sum(self.of_all(total)) / len(self.lines)

    def of_all(self, mine: object) -> list:
        """What each of the processes has come to, by their rank."""
        if self.world == 1:
            return [mine]
        everything = [None] * self.world
        distributed.all_gather_object(everything, mine)
        return everything

    def ask(self, model: nn.Module) -> list[Result]:
        """The answers, said greedily, in the order of the questions. Raises: the error of the first that could not be asked."""
        run = Annotator(model, self.examples.processor, rows=self.rows, max_new_tokens=self.longest)  # masks are for later
        mine = list(self.answers)[self.rank :: self.world]
        side, options = self.examples.processor.image_size, self.examples.options
        read = ((load(str(image), side, is_typed=False, **options), prefix) for image, prefix in mine)
        requests = (
            Request(picture=found.picture, size=found.size, task="ask", text=prefix, prompt=prefix) for found, prefix in read
        )
        shares = self.of_all(list(in_order(run.run(requests), len(mine))))
        results = [shares[i % self.world][i // self.world] for i in range(len(self.answers))]
        for result in results:  # only now, where all processes know of it
            if result.error is not None:
                raise result.error
        return results

    def __call__(self, model: nn.Module) -> dict[str, float]:
        """The loss and every score."""
        numbers = {"valid_loss": self.loss(model)}
        if not self.scores:
            return numbers
        pairs = list(zip(self.ask(model), self.answers.values(), strict=True))
        of_objects = [(result, right) for result, right in pairs if any("<loc" in text for text in right) or not any(right)]
        of_words = [(result, right) for result, right in pairs if not any("<loc" in text for text in right)]
        for name in self.scores:
            if name in TEXT_SCORES and of_words:
                said, right = zip(*((result.text, answers) for result, answers in of_words), strict=True)
                numbers[name] = TEXT_SCORES[name](said, right)
        return numbers | (self.score_objects(of_objects) if of_objects else {})

    def score_objects(self, pairs: list[tuple[Result, list[str]]]) -> dict[str, float]:
        said = [result.parsed.objects if result.parsed else [] for result, _ in pairs]
        right = [[found for suffix in dict.fromkeys(answers) for found in parse_text(suffix).objects] for _, answers in pairs]
        numbers = scores.detection_map(said, right) if "map" in self.scores else {}
        if "miou" in self.scores:
            overlaps = []
            for (result, _), ours, theirs in zip(pairs, said, right, strict=True):  # one by one: masks are as large as pictures
                if any(found.codes for found in theirs):
                    masks = [with_masks(objects, self.codec, result.width, result.height) for objects in (ours, theirs)]
                    overlaps.append(scores.segmentation_miou([masks[0]], [masks[1]]))
            numbers["miou"] = scores.mean(overlaps)
        return numbers
