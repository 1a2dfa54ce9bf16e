"""Seeds of the clients' dropout: they know of no other client, nor of the order of clients."""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .update import Client

# SplitMix64 (Steele et al. 2014): the increment of its state, and its two multipliers.
_GAMMA, _FIRST, _SECOND = (
    np.uint64(n) for n in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)


def client_seed(seed: int, round: int, client: Client) -> int:
    """What a client draws from in a round, 64 bits of (seed, round, client) alone."""
    named = repr(client) if isinstance(client, str) else operator.index(client)
    text = f"{operator.index(seed)}:{operator.index(round)}:{named}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def step_seeds(seeds: Sequence[int], step: int, modules: int) -> Tensor:
    """The seeds of one step: ``(len(seeds), modules)`` int64 from 0 on, one for each client's seed
    and each of the adapter's modules, in the order of ``LoraLayerManager.modules``. An entry is
    what ``nn.LoraLinear.dropout_seed`` takes.

    Source: SplitMix64 (Steele et al. 2014), number ``step * modules + module`` of each seed.
    """
    count = np.arange(1, modules + 1, dtype=np.uint64) + np.uint64(step * modules)
    mixed = np.array(seeds, dtype=np.uint64)[:, None] + _GAMMA * count
    mixed = (mixed ^ (mixed >> np.uint64(30))) * _FIRST
    mixed = (mixed ^ (mixed >> np.uint64(27))) * _SECOND
    mixed ^= mixed >> np.uint64(31)
    return torch.from_numpy((mixed >> np.uint64(1)).astype(np.int64))
