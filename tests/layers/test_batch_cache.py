"""The cache of a running batch: slices share memory, rows move, lengths on device and CPU agree."""

import pytest
import torch

from paligemma.configuration import GemmaConfig
from paligemma.layers.batch_cache import BatchCache
from tests.tiny import draw, raw_config


def make_cache(batch=3, slots=6):
    config = GemmaConfig.from_hf(raw_config("gemma2")["text_config"])
    return BatchCache(config, batch, slots, device=torch.device("cpu"), dtype=torch.float32)


def test_a_cleared_cache_is_as_new():
    cache = make_cache()
    cache.set_lengths(torch.tensor([2, 6, 5]))
    cache.keys.fill_(torch.nan), cache.values.fill_(torch.inf)
    cache.clear()
    for name, value in vars(make_cache()).items():
        found = getattr(cache, name)
        assert torch.equal(found, value) if isinstance(value, torch.Tensor) else found == value, name


def test_slices_share_the_memory():
    cache = make_cache()
    cache[1:].set_lengths(torch.tensor([2, 5]))
    assert cache.lengths.tolist() == cache.host_lengths.tolist() == [0, 2, 5]
    cache[1:2].keys.fill_(7)
    assert (cache.keys[:, 1] == 7).all() and not cache.keys[:, 0].any() and not cache.keys[:, 2].any()


def test_a_slice_reads_as_many_slots_as_its_own_rows_have():
    cache = make_cache()
    cache.set_lengths(torch.tensor([2, 2, 5]))
    first = cache[:2]
    first.reserve()
    first.lengths.add_(1)
    assert first.slots_read == 3 and first.mask() is None
    assert cache.lengths.tolist() == cache.host_lengths.tolist() == [3, 3, 5]
    cache.reserve()
    assert cache.slots_read == 6 and cache.mask().shape == (3, 1, 1, 6)


def test_a_token_too_many_is_refused_and_changes_nothing():
    cache = make_cache(batch=2, slots=3)
    cache.set_lengths(torch.tensor([1, 3]))
    with pytest.raises(ValueError, match="a row would hold 4 tokens, but the cache has 3 slots"):
        cache.reserve()
    assert cache.lengths.tolist() == cache.host_lengths.tolist() == [1, 3] and cache.slots_read == 3


def test_a_row_moves_and_a_smaller_cache_is_copied():
    cache = make_cache(slots=4)
    cache.set_lengths(torch.tensor([1, 2, 3]))
    cache.keys.copy_(draw(*cache.keys.shape))
    cache.values.copy_(draw(*cache.values.shape, seed=1))
    cache.move_row(2, 0)
    assert cache.lengths.tolist() == cache.host_lengths.tolist() == [3, 2, 3]
    assert torch.equal(cache.keys[:, 0, :, :3], cache.keys[:, 2, :, :3])
    assert torch.equal(cache.values[:, 0, :, :3], cache.values[:, 2, :, :3])
    larger = make_cache(slots=9)
    larger.copy_from(cache)
    assert larger.lengths.tolist() == larger.host_lengths.tolist() == [3, 2, 3]
    assert torch.equal(larger.keys[:, :, :, :4], cache.keys) and torch.equal(larger.values[:, :, :, :4], cache.values)


def test_a_fixed_view_reads_as_many_slots_as_it_was_told_and_always_makes_a_mask():
    cache = make_cache()
    cache.set_lengths(torch.tensor([2, 2, 2]))
    view = cache.fixed(5)
    assert view.mask().int().tolist() == [[[[1, 1, 0, 0, 0]]]] * 3
    k = draw(3, 2, 1, 16)
    keys, _ = view.write(1, torch.full((3, 1), 2), k, k)
    assert keys.shape == (3, 2, 5, 16) and torch.equal(cache.keys[1, :, :, 2], k[:, :, 0])
