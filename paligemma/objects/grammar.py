"""The grammar of answers that list objects. An answer that is constrained by this grammar is always well-formed.

    answer := (object separator)* object eos | eos        object := location{4} code{16}? label        (codes: for masks only)

The four locations are y_min, x_min, y_max, x_max; y_max is never below y_min, and x_max never below x_min. A label is one of the
labels in the question, and no label gets the same four locations twice. An object may begin only if there are enough tokens left
for an object with the longest label and for eos. Therefore every answer ends with eos within its limit of tokens. With less
room, only short labels would be allowed, and the right label might not be among them.

Tokenizers merge characters across word boundaries, so the ids of " cat" followed by the ids of " ; " can differ from the ids of
" cat ; ". The training answers were tokenised as a whole. Therefore each label is tokenised here together with the text after it:
up to the next location (`followed`) or up to the end of the answer (`last`). An ending of an object is the ids of its label and
of what follows, the separator or eos. After the box and the mask codes, the allowed tokens are the next ids of all endings that
begin with the ids generated so far.

A `Grammar` belongs to a question and is shared by all its answers; a `ConstraintState` belongs to one answer. generation.py calls
`allowed_tokens` of the state before it chooses a token, and `advance` afterwards. Neither method loops over the vocabulary.
Checked in tests/objects/test_grammar.py. Shapes: A candidates for the next token.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from paligemma.errors import GenerationError, PromptError
from paligemma.objects.outputs import END_OF_OBJECT
from paligemma.vocabulary import CODES_PER_MASK, LOCATIONS_PER_BOX

if TYPE_CHECKING:
    from paligemma.tokenization import PromptTokenizer

MAX_OBJECTS = 100  # per answer; COCO's evaluation ignores further objects
SEPARATOR = " ; "


@dataclass(frozen=True)
class Ending:
    """One way in which an object can end.

    Args:
        label: index of the label in the question.
        ids: all ids after the box and the mask codes: up to the next object or, for the last object, up to and including eos.
        is_last: whether the object is the last object of the answer.
    """

    label: int
    ids: tuple[int, ...]
    is_last: bool


@dataclass(frozen=True)
class Grammar:
    """The answers that one question allows.

    Args:
        location_ids: the ids of <loc0000> to <loc1023>.
        code_ids: the ids of <seg000> to <seg127>.
        eos: the id that ends an answer.
        endings: two per label: one for the last object of an answer, one for an object that another object follows.
        num_codes: number of mask codes per object; 0 = boxes only.
        max_objects: the maximum number of objects per answer.
    """

    location_ids: range
    code_ids: range
    eos: int
    endings: tuple[Ending, ...]
    num_codes: int = 0
    max_objects: int = MAX_OBJECTS

    @classmethod
    def for_objects(
        cls,
        processor: "PromptTokenizer",
        labels: Sequence[str],
        with_masks: bool = False,
        max_objects: int = MAX_OBJECTS,
    ) -> "Grammar":
        """The grammar of answers to "detect a ; b" (or "segment a ; b") for the labels ["a", "b"].

        The label "" allows objects without a label, which refcoco checkpoints generate.
        Raises: PromptError if there is no label, or a label that outputs.py could not parse in an answer; GenerationError with
            exit code 2 if max_objects is below 1.
        """
        if not (type(max_objects) is int and max_objects > 0):
            raise GenerationError(f"max_objects is {max_objects!r}; a whole number from 1 up is needed.", code=2)
        if isinstance(labels, str) or not labels:
            raise PromptError(f"the labels are {labels!r}. A list with at least one label is needed.")
        special_ids = {*processor.location_ids, *processor.code_ids}
        # Key: the ids of a label if another object follows. Value: the ids of the same label if it ends the answer. Labels with
        # equal ids are merged.
        label_ids = {}
        for label in (label.strip() for label in labels):
            text = f" {label}" if label else ""
            last, followed = (tuple(processor.encode(part)) for part in (text, text + SEPARATOR))
            if END_OF_OBJECT.search(label) or not special_ids.isdisjoint(last):
                raise PromptError(f"the label {label!r} contains a separator or a location. Use words without ; and <loc>.")
            label_ids[followed] = (*last, processor.eos_token_id)
        endings = []
        for number, (followed, last) in enumerate(label_ids.items()):
            endings += [Ending(number, last, True), Ending(number, followed, False)]
        num_codes = CODES_PER_MASK if with_masks else 0
        return cls(processor.location_ids, processor.code_ids, processor.eos_token_id, tuple(endings), num_codes, max_objects)

    @cached_property
    def num_labels(self) -> int:
        return len({ending.label for ending in self.endings})

    @cached_property
    def max_last_object_length(self) -> int:
        """The number of tokens of the longest possible last object of an answer, including eos."""
        return LOCATIONS_PER_BOX + self.num_codes + max(len(ending.ids) for ending in self.endings if ending.is_last)

    @cached_property
    def location_tensor(self) -> Tensor:
        return torch.arange(self.location_ids.start, self.location_ids.stop, device="cpu")

    @cached_property
    def code_tensor(self) -> Tensor:
        return torch.arange(self.code_ids.start, self.code_ids.stop, device="cpu")

    def start(self, limit: int) -> "ConstraintState":
        """The state before the first token of an answer that may have at most `limit` tokens."""
        return ConstraintState(self, limit)


class ConstraintState:
    """The state of one answer: it determines which tokens may come next.

    Args:
        limit: the maximum number of tokens of the answer.
    """

    def __init__(self, grammar: Grammar, limit: int):
        self.grammar = grammar
        self.tokens_left = limit
        self.is_over = limit < grammar.max_last_object_length
        self.num_objects = 0  # objects with a complete box
        # The locations, the number of mask codes and the number of label tokens of the current object so far.
        self.locations: list[int] = []
        self.num_codes = 0
        self.num_label_tokens = 0
        self.endings: list[Ending] = []  # endings that begin with the label tokens generated so far
        self.labels_of: defaultdict[tuple[int, ...], set[int]] = defaultdict(set)  # labels of each box so far
        # Key: the first locations of a box. Value: the excluded next locations. A next location is excluded if the answer already
        # contains every box that begins with the key and this location, and each of these boxes with every label.
        self.excluded: defaultdict[tuple[int, ...], set[int]] = defaultdict(set)

    def allowed_tokens(self) -> Tensor:
        """The ids that may come next, int64[A] on the CPU; there is always at least one."""
        if self.is_over:
            return torch.tensor([self.grammar.eos], device="cpu")
        if not self.locations:  # the first token of the answer; eos means that there is no object
            return torch.cat((torch.tensor([self.grammar.eos], device="cpu"), self.allowed_locations()))
        if len(self.locations) < LOCATIONS_PER_BOX:
            return self.allowed_locations(*self.locations)
        if self.num_codes < self.grammar.num_codes:
            return self.grammar.code_tensor
        next_ids = {ending.ids[self.num_label_tokens] for ending in self.endings if len(ending.ids) > self.num_label_tokens}
        ids = torch.tensor(sorted(next_ids), dtype=torch.int64, device="cpu")
        return torch.cat((ids, self.allowed_locations())) if self.generated_ending() else ids

    def allowed_locations(self, *locations: int) -> Tensor:
        """The ids of the locations that may come next in a box that begins with the given locations."""
        lowest = self.lowest_location(locations)
        ids = self.grammar.location_tensor[lowest:]
        excluded = self.excluded.get(locations)
        if not excluded:
            return ids
        is_allowed = torch.ones(len(ids), dtype=torch.bool, device="cpu")
        is_allowed[torch.tensor(list(excluded), device="cpu") - lowest] = False
        return ids[is_allowed]

    def lowest_location(self, locations: tuple[int, ...]) -> int:
        """The lowest location that may come next: y_max is at least y_min, and x_max at least x_min."""
        return locations[len(locations) - 2] if len(locations) >= 2 else 0

    def generated_ending(self) -> Ending | None:
        """The ending whose ids have all been generated, or None. After this ending, the next object may begin."""
        return next((ending for ending in self.endings if len(ending.ids) == self.num_label_tokens), None)

    def advance(self, token: int) -> None:
        """Updates the state with the chosen token, which must be one of allowed_tokens()."""
        grammar = self.grammar
        self.tokens_left -= 1
        if token == grammar.eos:
            self.is_over = True
        elif token in grammar.location_ids:
            if len(self.locations) == LOCATIONS_PER_BOX:
                self.finish_object()
            self.locations.append(token - grammar.location_ids.start)
            if len(self.locations) == LOCATIONS_PER_BOX:
                self.num_objects += 1
                self.endings = self.possible_endings()
        elif token in grammar.code_ids:
            self.num_codes += 1
        else:
            at = self.num_label_tokens
            self.endings = [ending for ending in self.endings if len(ending.ids) > at and ending.ids[at] == token]
            self.num_label_tokens += 1

    def possible_endings(self) -> list[Ending]:
        """The endings that fit into the tokens left. Endings with a label that the current box already has are left out."""
        grammar, used = self.grammar, self.labels_of.get(tuple(self.locations), ())
        # An ending with at most this many tokens leaves room for another object; -1 = no other object is allowed.
        room = -1
        if self.num_objects < grammar.max_objects:
            room = self.tokens_left - grammar.num_codes - grammar.max_last_object_length
        return [ending for ending in grammar.endings if ending.label not in used and (ending.is_last or len(ending.ids) <= room)]

    def finish_object(self) -> None:
        """Stores the box and label of the current object, which is complete, and prepares the state for the next object."""
        box, ending = tuple(self.locations), self.generated_ending()
        assert ending is not None  # a location is allowed only after an ending
        self.labels_of[box].add(ending.label)
        if len(self.labels_of[box]) == self.grammar.num_labels:
            self.exclude(box)
        self.locations, self.num_codes, self.num_label_tokens = [], 0, 0

    def exclude(self, box: tuple[int, ...]) -> None:
        """Excludes a box that has all labels, so that it is not generated again.

        If all locations that could come after the box's first three are then excluded, the third is excluded too, and so on up
        to the first. Otherwise an answer could get stuck: for example, only one box begins with <loc1023> <loc1023> <loc1023>. If
        this box is excluded, no fourth location is allowed, so the third must not be <loc1023> again.
        """
        for length in reversed(range(LOCATIONS_PER_BOX)):
            first = box[:length]
            self.excluded[first].add(box[length])
            if len(self.excluded[first]) < len(self.grammar.location_ids) - self.lowest_location(first):
                return
