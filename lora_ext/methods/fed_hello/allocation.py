"""HLA, heterogeneous layer allocation: the plan of every client in every round."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from lora_ext._checks import integer, require
from lora_ext.federated import LayerPlan

from ._patterns import (
    Pattern,
    Weights,
    checked_weights,
    gd_layers,
    normalised,
    pattern_weights,
    rgd_layers,
)
from .clusters import cluster_weights
from .config import FedHelloConfig, Kind


class HLA:
    """Gives each client as many layers as it can train: by geometry, at random, or by importance.

    A plan is a function of the settings, the seed, the round, the client, its capability and the
    importance that :meth:`update` was told up to that round. Nothing else counts: neither the other
    clients nor the order of the calls.

    Args:
        pattern: P, one of :class:`Pattern` or its name; :meth:`of` takes a configuration instead.
        L: the number of layers.
        kind: "gd", "rgd" or "fim".
        seed, weights, prior_rounds, every, hold, mix, k, levels: of :class:`FedHelloConfig`.

    Attributes:
        config: the settings. L: the number of layers.

    Raises:
        ValueError, TypeError: what :class:`FedHelloConfig` refuses; L below 1 or no integer;
            weights of another number than L.

    Source: arXiv 2506.12213, GD-HLA, RGD-HLA and FIM-HLA.
    """

    def __init__(
        self,
        pattern: Pattern | str,
        L: int,
        *,
        kind: Kind = "gd",
        seed: int = 0,
        weights: Weights | None = None,
        prior_rounds: int = 50,
        every: int = 50,
        hold: bool = True,
        mix: float = 1.0,
        k: int = 3,
        levels: Sequence[float] = (1, 2, 3),
    ):
        given = None if weights is None else tuple(checked_weights("HLA", weights).tolist())
        config = FedHelloConfig(
            pattern, kind, seed, given, prior_rounds, every, hold, mix, k, tuple(levels)
        )
        self._set(config, L)

    @classmethod
    def of(cls, config: FedHelloConfig, L: int) -> HLA:
        """Return the allocation that ``config``, a :class:`FedHelloConfig`, describes for a model
        of L layers; errors are the class's."""
        found = cls.__new__(cls)  # __init__ takes the settings one by one
        found._set(config, L)
        return found

    def _set(self, config: FedHelloConfig, L: int) -> None:
        self.L = integer("HLA", "L", L, 1)
        self.config = config
        if config.weights is None:
            self._prior = pattern_weights(config.pattern, L)
        else:
            self._prior = normalised(checked_weights("HLA", config.weights, L))
        self._importance: dict[int, Tensor] = {}  # by the round from which it holds

    def weights(self, round: int) -> Tensor:
        """The g of a round, ``(L,)`` float64 of sum 1; with "gd" it is the pattern's.

        Raises:
            ValueError: a round below 0. TypeError: one that is no integer.
        """
        round = integer("HLA", "round", round, 0)
        known = [r for r in self._importance if (r <= round if self.config.hold else r == round)]
        if self.config.kind != "fim" or round < self.config.prior_rounds or not known:
            return self._prior.clone()
        mix = self.config.mix
        return mix * self._importance[max(known)] + (1 - mix) * self._prior

    def wants_scores(self, round: int) -> bool:
        """Whether importance is to be computed, and told to :meth:`update`, before a round's plans.

        Raises:
            ValueError: a round below 0. TypeError: one that is no integer.
        """
        round = integer("HLA", "round", round, 0)
        config = self.config
        due = round >= config.prior_rounds and round % config.every == 0
        return config.kind == "fim" and due

    def update(self, round: int, scores: Tensor | Sequence[float]) -> None:
        """Take the importance of all layers, which holds from this round on.

        Args:
            round: the one whose plans come next.
            scores: F, ``(L,)``, of :func:`fim_scores`.

        Raises:
            ValueError: another number of scores than L, or one that is not finite; a round below 0.
                Nothing has changed then. TypeError: a round that is no integer.
        """
        round = integer("HLA.update", "round", round, 0)
        values = torch.as_tensor(scores, dtype=torch.float64)
        fits = values.shape == (self.L,)
        require(fits, "HLA.update", "scores", f"shape ({self.L},)", list(values.shape))
        self._importance[round] = cluster_weights(values, self.config.k, self.config.levels)

    def plan(self, round: int, client: int | str, capability: int) -> LayerPlan:
        """The layers that a client trains in a round.

        Args:
            round: from 0. client: its name, which is all that tells it from the others.
            capability: c, how many layers it can train; with 0 the plan is empty: it is not to be
                selected.

        Raises:
            ValueError: a round below 0, a capability outside ``[0, L]``, fewer than c layers of a
                weight above 0. TypeError: a round or capability that is no integer.
        """
        c = integer("HLA.plan", f"capability of client {client!r}", capability, 0, self.L)
        weights = self.weights(round)
        if self.config.kind == "gd":
            return LayerPlan(self._fixed(c))
        return LayerPlan(rgd_layers(weights, c, seed=self.config.seed, round=round, client=client))

    def uncovered(self, capabilities: Iterable[int]) -> tuple[int, ...]:
        """Layers that no client of these capabilities can ever be given.

        Raises:
            ValueError, TypeError: a capability that :meth:`plan` refuses.
        """
        classes = {integer("HLA.uncovered", "capabilities", c, 0, self.L) for c in capabilities}
        if self.config.kind == "gd":
            found = {layer for c in classes for layer in self._fixed(c)}
        elif not any(classes):
            found = set[int]()
        else:
            every = self.config.kind == "fim" and self.config.mix > 0
            found = {i for i, g in enumerate(self._prior.tolist()) if g > 0 or every}
        return tuple(layer for layer in range(self.L) if layer not in found)

    def _fixed(self, c: int) -> tuple[int, ...]:
        if self.config.weights is None:
            return gd_layers(self.config.pattern, self.L, c)
        g = self._prior.tolist()
        require(sum(w > 0 for w in g) >= c, "HLA.plan", "weights", f"at least {c} above 0", g)
        return tuple(sorted(sorted(range(self.L), key=lambda layer: -g[layer])[:c]))

    def __repr__(self) -> str:
        weights = ", ".join(f"{g:.3f}" for g in self._prior.tolist())
        shape = self.config.pattern if self.config.weights is None else "given weights"
        return f"HLA({self.config.kind}, {shape}, {self.L} layers of weights {weights})"

    def state_dict(self) -> dict[str, Any]:
        """All that plans depend on, as JSON holds it."""
        importance = [[round, g.tolist()] for round, g in self._importance.items()]
        config = asdict(self.config) | {"pattern": str(self.config.pattern)}
        return {"L": self.L, "config": config, "importance": importance}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up ``state``, which :meth:`state_dict` gave: plans are then those of the one that it
        came from.

        Raises:
            ValueError: another number of layers; settings or weights that are none. Nothing has
                changed then. KeyError: an entry is missing.
        """
        where = "HLA.load_state_dict"
        require(state["L"] == self.L, where, "L", self.L, state["L"])
        fresh = HLA.of(FedHelloConfig(**state["config"]), self.L)
        for round, weights in state["importance"]:
            g = checked_weights(where, weights, self.L)
            fresh._importance[integer(where, "round", round, 0)] = g
        self.__dict__.update(fresh.__dict__)  # at once, now that nothing can raise
