"""A model that is too large for one card: the layers of its decoder are divided among several.

    cuda:0    vision tower, projector, embedding (which is also the output matrix), the first layers, the last norm
    cuda:1    the layers that follow
    ...

The cards compute one after the other, so two cards hold a larger model than one but are no faster. Where the layers of another
card begin, the hidden vectors, the positions and the masks are copied to that card, and the output of the last layer is copied
back to the first card. A copy between two cards does not make the CPU wait. The keys and values of a layer are on its card.

`place` decides which layers each card gets, before any weight is loaded; the loader then reads each tensor onto its own card
(checkpoints/weights.py), and `use_cards` makes the model run there. Checked in tests/gpu/test_split.py and, on two simulated
cards, in tests/gpu/test_cards.py.
Shapes: B batch rows, L tokens fed in this call, S slots of the KV cache that are read, D model width, K key/value heads,
E width of one head.
"""

import logging
import re
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

import torch
from torch import Tensor, nn

from paligemma import machine
from paligemma.configuration import GemmaConfig
from paligemma.devices import usable_cards
from paligemma.errors import DeviceError, UsageError
from paligemma.layers.batch_cache import BatchCache
from paligemma.layers.replacing import extended
from paligemma.machine import GIB
from paligemma.modeling_gemma import GemmaModel, KVCache
from paligemma.modeling_paligemma import PaliGemmaForConditionalGeneration

LAYER = re.compile(r"language_model\.model\.layers\.(\d+)\b")

log = logging.getLogger(__name__)


# Which card gets which layers


def divide(layers: Sequence[int], rest: int, free: Sequence[int]) -> list[int]:
    """The index of the card of each layer, chosen so that the fullest card uses as small a share of its memory as possible.

    Args:
        layers: the bytes of each layer, in order. A card gets layers that follow each other, and at least one.
        rest: the bytes of everything else, which the first card holds.
        free: the free bytes of each card; there are at most as many cards as layers.
    """
    ends = list(accumulate(layers, initial=0))
    # best[end] is the best way to put the first `end` layers on the cards from 0 to `card`: the share of its memory that the
    # fullest card uses, and for each card the index after its last layer.
    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}
    for card, bytes_free in enumerate(free):
        fixed = rest if card == 0 else 0
        last_end = len(layers) - (len(free) - 1 - card)  # each of the cards that follow needs a layer
        best = {
            end: min(
                (max(fullest, (ends[end] - ends[start] + fixed) / max(bytes_free, 1)), (*earlier, end))
                for start, (fullest, earlier) in best.items()
                if start < end
            )
            for end in range(card + 1, last_end + 1)
        }
    starts = (0, *best[len(layers)][1])
    return [card for card, (start, end) in enumerate(pairwise(starts)) for _ in range(start, end)]


def bytes_per_card(layers: Sequence[int], rest: int, cards: Sequence[int]) -> list[int]:
    """The bytes on each card. Args: as in `divide`; cards: its result."""
    return [sum(size for size, own in zip(layers, cards, strict=True) if own == card) + (0 if card else rest)
            for card in range(max(cards) + 1)]  # fmt: skip


def fewest_cards(layers: Sequence[int], rest: int, free: Sequence[int]) -> list[int]:
    """The cards, as indices of `free`, that hold the model: the fewest that suffice, those with most free memory first.

    If all cards together do not suffice, the result is all of them. Args: as in `divide`.
    """
    order = sorted(range(len(free)), key=lambda card: -free[card])[: len(layers)]
    for count in range(1, len(order) + 1):
        room = [free[card] for card in order[:count]]
        needed = bytes_per_card(layers, rest, divide(layers, rest, room))
        if all(need <= have for need, have in zip(needed, room, strict=True)):
            return order[:count]
    return order


@dataclass(frozen=True)
class Placement:
    """The device of each module of a model.

    Attributes:
        devices: the devices that are used. The first one holds everything except the layers of the decoder.
        cards: for each layer of the decoder, the index of its device in `devices`.
    """

    devices: tuple[torch.device, ...]
    cards: tuple[int, ...]

    def device(self, name: str) -> torch.device:
        """The device of the module, or of the tensor, with this name."""
        found = LAYER.match(name)
        return self.devices[self.cards[int(found[1])] if found else 0]


def place(
    sizes: dict[str, int], devices: Sequence[torch.device], spare: Sequence[torch.device] = (), room: int = 0
) -> Placement:
    """Divides a model among devices, by the memory that is free on each of them now.

    Args:
        sizes: the bytes of each module of the model, without those of its submodules, by name.
        devices: one device, or several cards, which are all used.
        spare: cards that may be used instead if one device was named and is too small.
        room: bytes that each device needs besides the weights, for the KV cache and for intermediate results.
    Raises: DeviceError if a device is too small, UsageError if there are more cards than layers.
    """
    in_layers = {name: int(found[1]) for name in sizes if (found := LAYER.match(name))}
    layers = [0] * (max(in_layers.values(), default=-1) + 1)
    for name, layer in in_layers.items():
        layers[layer] += sizes[name]
    total = sum(sizes.values())
    rest = total - sum(layers)
    if len(devices) > max(1, len(layers)):
        text = f"device is {','.join(map(str, devices))}, but the decoder has {len(layers)} layers, and each card needs one"
        raise UsageError(f"{text}. Name fewer cards.")
    if len(devices) == 1 and len(spare) > 1:
        have = machine.free_memory(devices[0])
        if have is not None and total > have - room:
            free = [free_bytes(card) for card in spare]
            devices = [spare[card] for card in fewest_cards(layers, rest, [have - room for have in free])]
    if len(devices) == 1:
        what = "the weights and one answer take" if room else "the weights take"
        machine.require_memory(total + room, devices[0], what, advice_if_too_large(devices[0]))
        return Placement(tuple(devices), (0,) * len(layers))
    free = [free_bytes(card) for card in devices]
    cards = divide(layers, rest, [have - room for have in free])
    needed = [need + room for need in bytes_per_card(layers, rest, cards)]
    if any(need > have for need, have in zip(needed, free, strict=True)):
        each = "; ".join(
            f"{need / GIB:.2f} GiB on {card}, which has {have / GIB:.2f} GiB free"
            for card, need, have in zip(devices, needed, free, strict=True)
        )
        raise DeviceError(f"the weights, divided among {len(devices)} cards, and one answer take {each}. {machine.SAVE_MEMORY}")
    for index, (card, need) in enumerate(zip(devices, needed, strict=True)):
        first, last = cards.index(index), len(cards) - 1 - cards[::-1].index(index)
        log.info("%s holds layers %d to %d of the decoder: %.2f GiB.", card, first, last, (need - room) / GIB)
    return Placement(tuple(devices), tuple(cards))


def advice_if_too_large(device: torch.device) -> str:
    """What to do if a model does not fit into the memory of a device: with several cards, to use them together."""
    cards = usable_cards() if device.type == "cuda" else []
    if len(cards) < 2:
        return machine.SAVE_MEMORY
    free = sum(free_bytes(torch.device("cuda", card)) for card in cards) / GIB
    together = f"The {len(cards)} GPUs of this machine have {free:.2f} GiB free together"
    names = ",".join(f"cuda:{card}" for card in cards)
    return f"{together}: take --device {names}. Or {machine.SAVE_MEMORY[0].lower()}{machine.SAVE_MEMORY[1:]}"


def free_bytes(card: torch.device) -> int:
    return machine.free_memory(card) or 0


# A model on several cards


class SplitCache(BatchCache):
    """A KV cache of which each card holds a part: the keys and values of its own layers. The lengths are on the first card.

    Args:
        placement: the card of each layer.
    """

    def __init__(self, config: GemmaConfig, batch: int, slots: int, *, placement: Placement, dtype: torch.dtype):
        counts = [placement.cards.count(card) for card in range(len(placement.devices))]
        self.parts = [
            BatchCache(replace(config, num_hidden_layers=count), batch, slots, device=device, dtype=dtype)
            for device, count in zip(placement.devices, counts, strict=True)
        ]
        # for each layer of the decoder: its card, and its index in the part of that card
        self.places = [(card, layer) for card, count in enumerate(counts) for layer in range(count)]
        self.lengths, self.host_lengths = self.parts[0].lengths, self.parts[0].host_lengths
        for part in self.parts:
            part.host_lengths = self.host_lengths
        self.slots_read, self.same_length = 0, True

    @property
    def slots(self) -> int:
        return self.parts[0].slots

    def __getitem__(self, rows: slice) -> "SplitCache":
        view = copy(self)
        view.parts = [part[rows] for part in self.parts]
        view.lengths, view.host_lengths = view.parts[0].lengths, view.parts[0].host_lengths
        return view

    def write(self, layer: int, slots: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        index, own_layer = self.places[layer]
        part = self.parts[index]
        part.slots_read = self.slots_read
        return part.write(own_layer, slots, k, v)  # [B, K, S, E], [B, K, S, E]

    def move_row(self, source: int, target: int) -> None:
        for part in self.parts:
            part.move_row(source, target)

    def copy_from(self, smaller: "SplitCache") -> None:  # type: ignore[override]
        for part, small in zip(self.parts, smaller.parts, strict=True):
            part.copy_from(small)


def part_of(decoder: GemmaModel, layers: Sequence[nn.Module]) -> GemmaModel:
    """A decoder of the same class that has some of the layers, and no last norm."""
    part = copy(decoder)
    part._modules = decoder._modules | {"layers": nn.ModuleList(layers), "norm": nn.Identity()}
    return part


class SplitGemma(GemmaModel):
    """A decoder whose layers are on several cards.

    Attributes:
        parts: the device and the layers of each card. A tuple, because a ModuleList would register each layer a second time,
            under another name than in `layers`.
    """

    parts: tuple[tuple[torch.device, GemmaModel], ...]

    def forward(
        self,
        inputs_embeds: Tensor,
        position_ids: Tensor,
        mask: Tensor | None = None,
        cache: KVCache | None = None,
        window_mask: Tensor | None = None,
    ) -> Tensor:
        x = inputs_embeds  # [B, L, D]
        for device, part in self.parts:
            x, position_ids = x.to(device), position_ids.to(device)
            mask = None if mask is None else mask.to(device)
            window_mask = None if window_mask is None else window_mask.to(device)
            x = part(x, position_ids, mask, cache, window_mask)
        return self.norm(x.to(inputs_embeds.device))


class SplitPaliGemma(PaliGemmaForConditionalGeneration):
    """PaliGemma on several cards. Its device is the first card, which takes the inputs and gives the logits."""

    placement: Placement

    def _apply(self, fn, recurse: bool = True):
        super()._apply(fn, recurse)  # model.to(device) moves all layers to one device
        decoder: SplitGemma = self.language_model.model
        decoder.parts = tuple((part.layers[0].input_layernorm.weight.device, part) for _, part in decoder.parts)
        self.placement = replace(self.placement, devices=tuple(device for device, _ in decoder.parts))
        return self

    def new_cache(self, batch: int, slots: int, kind: type[KVCache] = KVCache) -> KVCache:
        if not issubclass(SplitCache, kind):
            raise ValueError(f"a {kind.__name__} is on one device, but this model is on several.")
        return SplitCache(self.config.text_config, batch, slots, placement=self.placement, dtype=self.dtype)


def use_cards(model: PaliGemmaForConditionalGeneration, placement: Placement) -> SplitPaliGemma:
    """The same model on several cards. Use it instead of `model`: both share modules and parameters.

    Args:
        placement: the device of each module. The modules must be on these devices already.
    """
    decoder = model.language_model.model
    new, split_decoder = extended(model, SplitPaliGemma), extended(decoder, SplitGemma)
    split_decoder.parts = tuple(
        (device, part_of(decoder, [layer for layer, own in zip(decoder.layers, placement.cards, strict=True) if own == card]))
        for card, device in enumerate(placement.devices)
    )
    new.language_model.model, new.placement = split_decoder, placement
    return new
