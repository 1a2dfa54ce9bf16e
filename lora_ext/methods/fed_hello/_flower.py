"""Fed-HeLLo as a strategy of Flower's."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from lora_ext._checks import instance, require
from lora_ext.federated import PATTERN, Client, LoraLayerManager, check_layers, layer_pairs
from lora_ext.federated.flower import LoraStrategy
from lora_ext.layers import block_index

from . import HLA, EmptyProxySet, FedHelloConfig, fim_scores

WHERE = "FedHello"
_log = logging.getLogger("flwr")


class FedHello(LoraStrategy):
    """Each client trains as many layers as it can, by geometry, at random, or by importance.

    With ``kind="fim"`` the server scores the layers on samples of its own, in the rounds that
    :meth:`HLA.wants_scores` names, before it makes their plans. Scores that are not finite are
    warned of, and the weights of before stay.

    Args:
        allocator: an :class:`HLA`, or its settings, for as many layers as the global adapter has.
        model_fn: with "fim", the base model with the adapter on it. It is called once, and gets the
            global adapter whenever layers are scored.
        proxy: with "fim", the server's samples, in batches that :func:`fim_scores` takes; no client
            has them. A function of no argument gives them anew each time.
        adapter: the name of the adapter in that model.
        strategy: arguments of :class:`LoraStrategy`: capability and others.

    Raises:
        EmptyProxySet: "fim" without samples. ValueError: "fim" without a model; what
            :class:`LoraStrategy` refuses; at the start of a run, an allocator for another number of
            layers. TypeError: another kind of allocator.

    Warns:
        UserWarning: clients of these capabilities can never train some layer.

    Source: arXiv 2506.12213.
    """

    def __init__(
        self,
        allocator: HLA | FedHelloConfig,
        *,
        model_fn: Callable[[], nn.Module] | None = None,
        proxy: Sequence[Any] | Callable[[], Iterable[Any]] | None = None,
        adapter: str = "default",
        **strategy: Any,
    ):
        instance(WHERE, "allocator", allocator, (FedHelloConfig, HLA))
        self.config = allocator.config if isinstance(allocator, HLA) else allocator
        if self.config.kind == "fim":
            require(model_fn is not None, WHERE, "model_fn", "a model for kind 'fim'", None)
            if proxy is None or (not callable(proxy) and len(proxy) == 0):
                raise EmptyProxySet(f"{WHERE}: proxy: expected samples for kind 'fim', found none")
        super().__init__(allocator if isinstance(allocator, HLA) else None, **strategy)
        self._model_fn, self._proxy, self._adapter = model_fn, proxy, adapter
        self._pattern: str = strategy.get("pattern", PATTERN)
        self._scoring_model: LoraLayerManager | None = None
        self._logged = self._warned = False
        capability = strategy.get("capability")
        self._capabilities = {*capability.values()} if isinstance(capability, Mapping) else set()
        if isinstance(allocator, HLA) and self._capabilities:
            self._warn_uncovered(allocator, self._capabilities)

    def before_round(self, round: int, state: Mapping[str, Tensor]) -> None:
        """Make the allocator where there is none yet, and score the layers where it is due."""
        pairs = layer_pairs(WHERE, state, self._pattern)
        num_layers = check_layers(WHERE, {pair.layer for pair in pairs})
        hla = self._allocation(num_layers)
        require(hla.L == num_layers, WHERE, "allocator", f"one of {num_layers} layers", hla.L)
        if not self._logged:
            _log.info("%s: %s", WHERE, hla)
            self._logged = True
        if hla.wants_scores(round):
            self._score(hla, round, state)

    def select(self, round: int, clients: Mapping[Client, int]) -> list[Client]:
        """As :class:`LoraStrategy` does; warns first, once, of layers that nobody can train."""
        if isinstance(self.allocator, HLA) and not self._warned:
            self._warn_uncovered(self.allocator, self._capabilities or clients.values())
        return super().select(round, clients)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what ``state_dict`` gave, the allocation with it; JSON may lie between."""
        if "allocator" in state:
            self._allocation(state["allocator"]["L"])
        super().load_state_dict(state)

    def _allocation(self, num_layers: int) -> HLA:
        if not isinstance(self.allocator, HLA):
            self.allocator = HLA.of(self.config, num_layers)
        return self.allocator

    def _score(self, hla: HLA, round: int, state: Mapping[str, Tensor]) -> None:
        assert self._model_fn is not None and self._proxy is not None  # of the kind "fim"
        if self._scoring_model is None:
            self._scoring_model = LoraLayerManager(self._model_fn(), self._pattern, self._adapter)
        manager, config = self._scoring_model, self.config
        manager.load_slice({key: value for key, value in state.items() if key not in self.shared})
        batches = self._proxy() if callable(self._proxy) else self._proxy
        how: Any = {name: getattr(config, name) for name in ("score", "reduce", "chunk")}
        layer_of = partial(block_index, pattern=self._pattern)
        scores = fim_scores(manager.model, batches, layer_of, **how)
        if not bool(scores.isfinite().all()):
            _log.warning("round %d: scores %s: the weights of before stay", round, scores.tolist())
            return
        hla.update(round, scores)
        weights = [f"{g:.3f}" for g in hla.weights(round).tolist()]
        _log.info("round %d: weights by importance: %s", round, ", ".join(weights))

    def _warn_uncovered(self, hla: HLA, capabilities: Iterable[int]) -> None:
        self._warned = True
        if missing := hla.uncovered(capabilities):
            why = f"{hla!r} gives them to no client of these capabilities"
            never = f"layers {[*missing]} can never be trained: {why}"
            warnings.warn(f"{WHERE}: capability: {never}", stacklevel=3)
