"""A KV cache whose rows can end, move and be refilled at any time. Decoding steps with it can be captured as CUDA graphs.

KVCache in modeling_gemma.py is enough for rows that start and end together. generation.RunningBatch needs more: it uses only the
first rows of a larger cache, prefills some rows while others keep their tokens, and moves rows into the gaps of ended rows.
Checked in tests/layers/test_batch_cache.py.
Shapes: B batch rows.
"""

from copy import copy

import torch
from torch import Tensor

from paligemma.configuration import GemmaConfig
from paligemma.devices import to_device
from paligemma.modeling_gemma import KVCache


class BatchCache(KVCache):
    """A KVCache that can be sliced by rows, and whose rows can be moved.

    Attributes:
        host_lengths: int64[B], a copy of `lengths` on the CPU, which can be read without waiting for a GPU.
    """

    def __init__(self, config: GemmaConfig, batch: int, slots: int, *, device: torch.device, dtype: torch.dtype):
        super().__init__(config, batch, slots, device=device, dtype=dtype)
        self.host_lengths = torch.zeros(batch, dtype=torch.int64, device="cpu")

    def __getitem__(self, rows: slice) -> "BatchCache":
        """A cache of some of the rows, which shares its memory with this cache."""
        view = copy(self)
        view.keys, view.values = self.keys[:, rows], self.values[:, rows]
        view.lengths, view.host_lengths = self.lengths[rows], self.host_lengths[rows]
        return view

    def clear(self) -> None:
        """Empties the cache. Keys and values become 0, because a NaN would reach the results even if it is masked."""
        for tensor in (self.keys, self.values, self.lengths, self.host_lengths):
            tensor.zero_()
        self.slots_read, self.same_length = 0, True

    def set_lengths(self, lengths: Tensor) -> None:
        self.host_lengths.copy_(lengths)
        self.lengths.copy_(to_device(lengths, self.lengths.device))  # without waiting for a GPU
        self.set_slots_read(lengths)

    def reserve(self) -> None:
        self.set_slots_read(self.host_lengths)  # rows may have been set or moved through another slice
        super().reserve()
        self.host_lengths += 1

    def move_row(self, source: int, target: int) -> None:
        """Copies one row over another: when a row in the middle ends, the last row moves there, so that no gap is left."""
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

        A decoding step with this view has the same shapes every time and needs no synchronisation, so it can be captured as a
        CUDA graph (graphs.py). In the view, each layer has its own tensor. With one tensor for all layers, a compiler would copy
        all layers in order to write to one of them.
        """
        view = copy(self)
        view.keys, view.values = self.keys.unbind(), self.values.unbind()
        view.slots_read, view.same_length = slots_read, False
        return view
