"""The preallocated cache equals transformers' dynamic cache and copies no past keys."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")
from transformers import DynamicCache

from lora_ext.methods.mtpc._trunk import roomy_cache


def both(room: int = 8):
    return roomy_cache(room), DynamicCache()


def feed(caches, count: int, rows: int = 2, seed: int = 0) -> None:
    g = torch.Generator().manual_seed(seed)
    for layer in range(2):
        new = [torch.randn(rows, 3, count, 4, generator=g) for _ in range(2)]
        got, expected = (cache.update(*new, layer) for cache in caches)
        for mine, theirs in zip(got, expected, strict=True):
            assert torch.equal(mine, theirs)


def test_updates_crops_and_selections_equal_those_of_the_dynamic_cache():
    caches = both()
    feed(caches, 5)
    feed(caches, 2, seed=1)
    for cache in caches:
        cache.crop(-1)
    feed(caches, 1, seed=2)
    for cache in caches:
        cache.batch_select_indices(torch.tensor([1]))
    feed(caches, 4, rows=1, seed=3)  # more positions than are allocated
    assert [cache.get_seq_length() for cache in caches] == [11, 11]
    feed(caches, 9, rows=1, seed=4)


def test_nothing_is_copied_within_the_allocated_size():
    cache, _ = both(room=6)
    one = torch.ones(1, 1, 1, 2)
    places = {cache.update(one * k, one, 0)[0].data_ptr() for k in range(6)}
    assert len(places) == 1
    cache.crop(-3)
    keys, _ = cache.update(one * 7, one, 0)
    assert keys.data_ptr() in places and keys[0, 0, :, 0].tolist() == [0, 1, 2, 7]
