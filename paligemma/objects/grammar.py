"""What an answer of boxes may look like, token by token: an answer that is held to it cannot be malformed. Takes a processor.

    answer := (item separator)* item eos  |  eos            item := location{4} code{16}? label      (codes: only for masks)

The four locations are y_min, x_min, y_max, x_max: the third is never below the first, nor the fourth below the second. A label is
one of those asked for. No label gets the same four locations twice. An object is begun only if the longest of the labels, and the
eos behind it, would still fit, so that an answer always ends with eos, however few tokens it may have; were only the short
labels left for want of room, the grammar would put a wrong word into the model's mouth.

Tokenizers merge letters across word ends, so " cat" and " ; " side by side need not be the ids of " cat ; ". A model saw its
training answers tokenised as a whole; therefore a label is here the ids of the text from one location to the next (`followed`)
or to the end (`last`), and what is allowed next is read off all of those that begin with what was said.

`Grammar` belongs to a question and is shared; `ConstraintState` is how far one answer has come. generation.py asks it for
the ids allowed (`allowed_tokens`) and tells it which was chosen (`advance`); neither ever looks at the whole vocabulary.
Checked in tests/objects/test_grammar.py.
"""

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from paligemma.errors import GenerationError, PromptError
from paligemma.vocabulary import CODES_PER_MASK, LOCATIONS_PER_BOX

if TYPE_CHECKING:
    from paligemma.processing_paligemma import PaliGemmaProcessor

MAX_OBJECTS = 100  # of an answer: what COCO's evaluation looks at
SEPARATOR = " ; "
NOT_IN_A_LABEL = re.compile("[;\n]")  # what ends an object for whoever reads the answer


@dataclass(frozen=True)
class Ending:
    """One way in which an object can end: a label's number, and the ids from behind the box (and its codes) to the next object,
    or to the end of the answer, eos included."""

    label: int
    ids: tuple[int, ...]
    is_last: bool


@dataclass(frozen=True)
class Grammar:
    """What answers to one question may look like.

    Args:
        locations: the ids of <loc0000> to <loc1023>.
        segments: the ids of <seg000> to <seg127>.
        eos: the id that ends an answer.
        endings: for each label two, the last and the followed one.
        num_codes: of each object; 0 = boxes only.
        max_objects: the most in one answer.
    """

    locations: range
    segments: range
    eos: int
    endings: tuple[Ending, ...]
    num_codes: int = 0
    max_objects: int = MAX_OBJECTS

    @classmethod
    def for_objects(
        cls,
        processor: "PaliGemmaProcessor",
        labels: Sequence[str],
        with_masks: bool = False,
        max_objects: int = MAX_OBJECTS,
    ) -> "Grammar":
        """The grammar of answers to "detect a ; b" (or "segment a ; b") for the labels ["a", "b"].

        The label "" is an object without one, as refcoco checkpoints answer.
        Raises: PromptError for no label at all, and for one that nobody could read out of an answer again; GenerationError with
            exit code 2 for a max_objects below 1.
        """
        if not (type(max_objects) is int and max_objects > 0):
            raise GenerationError(f"max_objects is {max_objects!r}; a whole number from 1 up is needed.", code=2)
        if isinstance(labels, str) or not labels:
            raise PromptError(f"the labels are {labels!r}. A list with at least one is needed.")
        places = {*processor.locations, *processor.segments}
        spellings = {}  # two texts may have the same ids: one label then
        for label in (label.strip() for label in labels):
            text = f" {label}" if label else ""
            last, followed = (tuple(processor.encode(spelled)) for spelled in (text, text + SEPARATOR))
            if NOT_IN_A_LABEL.search(label) or not places.isdisjoint(last):
                raise PromptError(f"the label {label!r} holds a separator or a location. Use words without ; and <loc>.")
            spellings[followed] = (*last, processor.eos_token_id)
        endings = []
        for number, (followed, last) in enumerate(spellings.items()):
            endings += [Ending(number, last, True), Ending(number, followed, False)]
        num_codes = CODES_PER_MASK if with_masks else 0
        return cls(processor.locations, processor.segments, processor.eos_token_id, tuple(endings), num_codes, max_objects)

    @cached_property
    def num_labels(self) -> int:
        return len({ending.label for ending in self.endings})

    @cached_property
    def object_length(self) -> int:
        """Tokens of the longest object that ends an answer, eos included."""
        return LOCATIONS_PER_BOX + self.num_codes + max(len(ending.ids) for ending in self.endings if ending.is_last)

    @cached_property
    def location_ids(self) -> Tensor:
        return torch.arange(self.locations.start, self.locations.stop)

    @cached_property
    def segment_ids(self) -> Tensor:
        return torch.arange(self.segments.start, self.segments.stop)

    def start(self, limit: int) -> "ConstraintState":
        """The beginning of an answer of at most `limit` tokens."""
        return ConstraintState(self, limit)


class ConstraintState:
    """Where one answer stands in its grammar.

    Args:
        limit: the most tokens of the answer.
    """

    def __init__(self, grammar: Grammar, limit: int):
        self.grammar = grammar
        self.left = limit
        self.is_over = limit < grammar.object_length
        self.num_objects = 0  # begun
        self.bins: list[int] = []  # of the object that is being said, as the next two
        self.num_codes = 0
        self.num_words = 0
        self.endings: list[Ending] = []  # those that begin with the words said
        self.labels_at: defaultdict[tuple[int, ...], set[int]] = defaultdict(set)  # a box's bins -> the labels it was given
        self.taken: defaultdict[tuple[int, ...], set[int]] = defaultdict(set)  # first bins -> the next that lead to no free box

    def allowed_tokens(self) -> Tensor:
        """The ids that may come next, at least one: int64[C] in main memory."""
        if self.is_over:
            return torch.tensor([self.grammar.eos])
        if not self.bins:  # nothing was said: perhaps nothing will be found
            return torch.cat((torch.tensor([self.grammar.eos]), self.allowed_locations()))
        if len(self.bins) < LOCATIONS_PER_BOX:
            return self.allowed_locations(*self.bins)
        if self.num_codes < self.grammar.num_codes:
            return self.grammar.segment_ids
        words = {ending.ids[self.num_words] for ending in self.endings if len(ending.ids) > self.num_words}
        ids = torch.tensor(sorted(words), dtype=torch.int64)
        return torch.cat((ids, self.allowed_locations())) if self.finished() else ids

    def allowed_locations(self, *bins: int) -> Tensor:
        """The ids of the bins that may follow the first of a box."""
        low = self.lowest(bins)
        ids = self.grammar.location_ids[low:]
        taken = self.taken.get(bins)
        if not taken:
            return ids
        is_free = torch.ones(len(ids), dtype=torch.bool)
        is_free[torch.tensor(list(taken)) - low] = False
        return ids[is_free]

    def lowest(self, bins: tuple[int, ...]) -> int:
        """The least bin that may come next: the third of a box is no smaller than the first, nor the fourth than the second."""
        return bins[len(bins) - 2] if len(bins) >= 2 else 0

    def finished(self) -> Ending | None:
        """The ending that has been said in full, separator included, so that the next object may begin."""
        return next((ending for ending in self.endings if len(ending.ids) == self.num_words), None)

    def advance(self, token: int) -> None:
        """Takes one of the allowed ids as said."""
        grammar = self.grammar
        self.left -= 1
        if token == grammar.eos:
            self.is_over = True
        elif token in grammar.locations:
            if len(self.bins) == LOCATIONS_PER_BOX:
                self.close()
            self.bins.append(token - grammar.locations.start)
            if len(self.bins) == LOCATIONS_PER_BOX:
                self.num_objects += 1
                self.endings = self.possible_endings()
        elif token in grammar.segments:
            self.num_codes += 1
        else:
            at = self.num_words
            self.endings = [ending for ending in self.endings if len(ending.ids) > at and ending.ids[at] == token]
            self.num_words += 1

    def possible_endings(self) -> list[Ending]:
        """How the object can end whose box was just said: with labels that the box did not get yet, and room for what follows."""
        grammar, said = self.grammar, self.labels_at.get(tuple(self.bins), ())
        room = self.left - grammar.num_codes - grammar.object_length if self.num_objects < grammar.max_objects else -1
        return [ending for ending in grammar.endings if ending.label not in said and (ending.is_last or len(ending.ids) <= room)]

    def close(self) -> None:
        """Remembers the object that is complete and makes place for the next."""
        box = tuple(self.bins)
        self.labels_at[box].add(self.finished().label)
        if len(self.labels_at[box]) == self.grammar.num_labels:
            self.take(box)
        self.bins, self.num_codes, self.num_words = [], 0, 0

    def take(self, box: tuple[int, ...]) -> None:
        """Closes a box to all labels, and with it every beginning that leads to no other box.

        Without that a model that says <loc1023> <loc1023> <loc1023> for a second time would find no location left to go on.
        """
        for length in reversed(range(LOCATIONS_PER_BOX)):
            first = box[:length]
            self.taken[first].add(box[length])
            if len(self.taken[first]) < len(self.grammar.locations) - self.lowest(first):
                return
