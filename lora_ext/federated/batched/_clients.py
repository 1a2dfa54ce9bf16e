"""Simulated clients: their data, optimizer settings, progress in a round, and seeds."""

from __future__ import annotations

import hashlib
import math
import numbers
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lora_ext._checks import check_fields, require, within

from .._plan import Client, LayerPlan
from .._update import Update

# SplitMix64 (Steele et al. 2014): the increment of its state, and its two multipliers.
_GAMMA, _FIRST, _SECOND = (
    np.uint64(n) for n in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)


@dataclass(frozen=True, eq=False)
class ClientSpec:
    """The data of one client, in the order of its steps, and its optimizer settings.

    Attributes:
        client: unique name or number.
        batches: one batch per optimizer step: a mapping of tensors, ``(x, y)``, or x. All tensors
            of a mapping except ``labels`` are inputs of the model. The first dimension of each
            tensor is the rows of the batch.
        lr, weight_decay, betas, eps: settings of AdamW.
        max_grad_norm: norm to which larger gradients are scaled down; None for no limit.
        seed: seed of the dropout masks, which also depend on the round and on ``client``.

    Raises:
        ValueError: If a setting of AdamW, ``max_grad_norm`` or ``seed`` is not a number, or is out
            of range.
    """

    client: Client
    batches: Sequence[Any]
    lr: float
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    max_grad_norm: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        bounds = ("lr", "weight_decay", "eps", "max_grad_norm")
        table = dict.fromkeys(bounds, within(0, expected="a finite number from 0"))
        check_fields(self, {**table, "seed": {}})
        pair = isinstance(self.betas, tuple | list) and len(self.betas) == 2
        holds = pair and all(isinstance(b, numbers.Real) and 0 <= b < 1 for b in self.betas)
        require(holds, "ClientSpec", "betas", "two numbers in [0, 1)", repr(self.betas))


class ClientRound:
    """State of a client in one round: its plan, its progress, and ``shapes``, the shapes by name of
    the factors that it trains."""

    def __init__(
        self, spec: ClientSpec, plan: LayerPlan, shapes: Mapping[str, tuple[int, ...]], round: int
    ):
        self.spec = spec
        self.plan = plan
        self.shapes = shapes
        self.seed = client_seed(spec.seed, round, spec.client)
        self.lowest = plan.layers[0] if plan.layers else math.inf  # lowest trained layer
        self.failed = False
        self.finite = True
        self.examples = 0
        self.losses: list[float] = []
        self.changes: dict[str, Tensor] = {}  # filled at the end of the round

    @property
    def settings(self) -> tuple[Any, ...]:
        """Settings of the client's AdamW. Clients with equal settings can share a kernel call."""
        spec = self.spec
        return spec.lr, *spec.betas, spec.eps, spec.weight_decay

    @property
    def has_batch(self) -> bool:
        """True if the client has another step to do."""
        return not self.failed and len(self.losses) < len(self.spec.batches)

    @property
    def batch(self) -> Any:
        """Batch of the current step."""
        return self.spec.batches[len(self.losses)]

    def advance(self, rows: int, loss: float) -> None:
        """Record the number of rows and the loss of a step, and advance to the next batch."""
        self.examples += rows
        self.losses.append(loss)
        self.failed = not math.isfinite(loss)

    def update(self) -> Update:
        """Return the client's reply to the server."""
        failed = self.failed or not self.finite
        loss = sum(self.losses) / len(self.losses) if self.losses else math.nan
        sent = {} if failed else self.changes
        return Update(self.spec.client, self.examples, sent, self.plan, loss, failed)


def client_seed(seed: int, round: int, client: Client) -> int:
    """Return the 64-bit seed of a client in a round, a hash of ``seed``, ``round`` and ``client``.

    The seed is the same on every machine and does not depend on other clients.
    """
    named = repr(client) if isinstance(client, str) else operator.index(client)
    text = f"{operator.index(seed)}:{operator.index(round)}:{named}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def step_seeds(seeds: Sequence[int], step: int, modules: int) -> Tensor:
    """Return the dropout seeds of one step, non-negative int64 of shape ``(len(seeds), modules)``.

    Entry ``(i, j)`` is for the client with ``seeds[i]`` and module j of the adapter, in the order
    of ``LoraLayerManager.modules``. Each entry is a valid value of ``nn.LoraLinear.dropout_seed``.

    Source: SplitMix64 (Steele et al. 2014), output ``step * modules + j`` of each seed.
    """
    count = np.arange(1, modules + 1, dtype=np.uint64) + np.uint64(step * modules)
    mixed = np.array(seeds, dtype=np.uint64)[:, None] + _GAMMA * count
    mixed = (mixed ^ (mixed >> np.uint64(30))) * _FIRST
    mixed = (mixed ^ (mixed >> np.uint64(27))) * _SECOND
    mixed ^= mixed >> np.uint64(31)
    return torch.from_numpy((mixed >> np.uint64(1)).astype(np.int64))
