"""One simulated client: its data and its optimizer, and where it is in a round."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora_ext.ops._checks import require

from .batches import rows_in
from .keys import Pair
from .payload import plan_shapes
from .plan import LayerPlan
from .update import Client, Update


@dataclass(frozen=True, eq=False)
class ClientSpec:
    """One client: its data in the order of its steps, and its optimizer.

    Attributes:
        client: its name, the client's alone.
        batches: one optimizer step each. A mapping of tensors, of which all but ``labels`` go to
            the model; ``(x, y)``; or x alone. Rows come first in every tensor.
        lr, weight_decay, betas, eps: of AdamW.
        max_grad_norm: its gradient is scaled down to this norm; None leaves it.
        seed: of its dropout, which :class:`BatchedClients` refuses so far.

    Raises:
        ValueError: a rate or bound out of range.
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
        bounds = {"lr": self.lr, "weight_decay": self.weight_decay, "eps": self.eps}
        if self.max_grad_norm is not None:
            bounds["max_grad_norm"] = self.max_grad_norm
        for name, value in bounds.items():
            holds = math.isfinite(value) and value >= 0
            require(holds, "ClientSpec", name, "a finite number from 0", value)


class ClientRound:
    """One client in one round: its factors, its optimizer, and where it is in its data."""

    def __init__(
        self,
        spec: ClientSpec,
        plan: LayerPlan,
        global_lora: Mapping[str, Tensor],
        pattern: str,
        dtype: torch.dtype | None,
    ):
        self.spec = spec
        self.plan = plan
        self.failed = False
        self.examples = 0
        self.losses: list[float] = []
        self.tensors: dict[str, Tensor] = {}
        for key, shape in plan_shapes(global_lora, plan, pattern).items():
            start = global_lora[key].detach()[tuple(map(slice, shape))]
            self.tensors[key] = start.to(dtype or start.dtype, copy=True)

    def to(self, pair: Pair, device: torch.device) -> None:
        """Move the factors of one module to where its layer is."""
        for key in (pair.a, pair.b):
            self.tensors[key] = self.tensors[key].to(device).requires_grad_(True)

    @property
    def has_batch(self) -> bool:
        """Whether it has a step to do."""
        return not self.failed and len(self.losses) < len(self.spec.batches)

    @property
    def batch(self) -> Any:
        """The batch of the step that it is at."""
        return self.spec.batches[len(self.losses)]

    def clip(self) -> None:
        """Scale the gradient down to its bound; one that failed has none."""
        if self.spec.max_grad_norm is not None and not self.failed:
            nn.utils.clip_grad_norm_(self.tensors.values(), self.spec.max_grad_norm)

    def advance(self, loss: float) -> None:
        """Go on to the next batch, after the step whose loss this is."""
        self.examples += rows_in(self.batch, f"ClientSpec: client {self.spec.client}")
        self.losses.append(loss)

    def update(self, global_lora: Mapping[str, Tensor]) -> Update:
        """The reply of the client."""
        changes: dict[str, Tensor] = {}
        for key, value in self.tensors.items():
            end = value.detach().cpu()
            start = global_lora[key].detach().cpu()[tuple(map(slice, end.shape))].to(end.dtype)
            changes[key] = end - start
        failed = self.failed or not all(bool(t.isfinite().all()) for t in changes.values())
        loss = sum(self.losses) / len(self.losses) if self.losses else math.nan
        sent = {} if failed else changes
        return Update(self.spec.client, self.examples, sent, self.plan, loss, failed)


def adamw(states: list[ClientRound]) -> torch.optim.Optimizer | None:
    """One optimizer for all: it works tensor by tensor, each with its own count of steps, and
    leaves those alone that have no gradient."""
    groups: dict[tuple[Any, ...], list[Tensor]] = {}
    for state in states:
        spec = state.spec
        key = spec.lr, spec.betas, spec.eps, spec.weight_decay
        groups.setdefault(key, []).extend(state.tensors.values())
    rates = [
        {"params": tensors, "lr": lr, "betas": betas, "eps": eps, "weight_decay": decay}
        for (lr, betas, eps, decay), tensors in groups.items()
        if tensors
    ]
    return torch.optim.AdamW(rates, foreach=True) if rates else None
