"""The KV cache of a running batch: rows end, move and are refilled at any time, and decoding steps can be recorded on a GPU.

KVCache in modeling_gemma.py is enough for rows that start and end together. generation.RunningBatch needs more: it works on the
first rows of a larger cache, prefills some rows while others keep their tokens, and closes gaps. Checked in
tests/layers/test_batch_cache.py.
Shapes: B batch rows.
"""

from copy import copy

import torch
from torch import Tensor

from paligemma.configuration import GemmaConfig
from paligemma.modeling_gemma import KVCache


class BatchCache(KVCache):
    """A KVCache of which slices can be used, and whose rows can be moved.

    Attributes:
        host_lengths: int64[B], the same numbers as `lengths`, on the CPU: reading them from a GPU would stall.
    """

    def __init__(self, config: GemmaConfig, batch: int, slots: int, *, device: torch.device, dtype: torch.dtype):
        super().__init__(config, batch, slots, device=device, dtype=dtype)
        self.host_lengths = torch.zeros(batch, dtype=torch.int64)

    def __getitem__(self, rows: slice) -> "BatchCache":
        """Some of the rows as a cache that shares the memory of this one."""
        view = copy(self)
        view.keys, view.values = self.keys[:, rows], self.values[:, rows]
        view.lengths, view.host_lengths = self.lengths[rows], self.host_lengths[rows]
        return view

    def fill(self, lengths: Tensor) -> None:
        self.host_lengths.copy_(lengths)
        super().fill(self.host_lengths)

    def reserve(self) -> None:
        self.measure(self.host_lengths)  # rows may have been filled or moved through another slice
        super().reserve()
        self.host_lengths += 1

    def move_row(self, source: int, target: int) -> None:
        """Copies one row over another, so that the rows in use stay side by side when a row in the middle ends."""
        used = int(self.host_lengths[source])
        self.keys[:, target, :, :used] = self.keys[:, source, :, :used]
        self.values[:, target, :, :used] = self.values[:, source, :, :used]
        self.lengths[target] = self.lengths[source]
        self.host_lengths[target] = self.host_lengths[source]

    def copy_from(self, smaller: "BatchCache") -> None:
        """Copies the contents of a cache with the same number of rows and fewer slots."""
        self.keys[:, :, :, : smaller.slots] = smaller.keys
        self.values[:, :, :, : smaller.slots] = smaller.values
        self.lengths.copy_(smaller.lengths)
        self.host_lengths.copy_(smaller.host_lengths)

    def fixed(self, slots_read: int) -> "BatchCache":
        """A view of the same memory that always reads `slots_read` slots and always makes a mask, whatever the row lengths.

        A decoding step with it has the same shapes every time and needs no synchronisation, so it can be recorded (graphs.py).
        Each layer is a tensor of its own here: with one tensor for all layers, a compiler would copy every layer to write to one.
        """
        view = copy(self)
        view.keys, view.values = self.keys.unbind(), self.values.unbind()
        view.slots_read, view.same_length = slots_read, False
        return view
