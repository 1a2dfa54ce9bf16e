"""Fed-HeLLo as a strategy of Flower."""

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
    """Flower strategy in which each client trains as many layers as it can.

    The layers are chosen by position, at random, or by importance. With ``kind="fim"`` in the
    configuration, the server scores the layers on its own samples, before it makes the plans of
    each round for which :meth:`HLA.wants_scores` returns True. If a score is not finite, a warning
    is logged and the weights of the layers do not change.

    Args:
        allocator: An :class:`HLA` for the number of layers of the global adapter, or a
            :class:`FedHelloConfig`, from which an HLA is created in the first round.
        model_fn: Function that returns the base model with the adapter, required by "fim". The
            function is called once. The global adapter is loaded into the returned model whenever
            layers are scored.
        proxy: Batches of the server's samples for :func:`fim_scores`, or a function without
            arguments that returns the batches. Required by "fim".
        adapter: Name of the adapter in the model of ``model_fn``.
        strategy: Arguments of :class:`LoraStrategy`, such as ``capability``.

    Raises:
        EmptyProxySet: If ``kind`` is "fim" and there are no samples.
        ValueError: If ``kind`` is "fim" and ``model_fn`` is None; if :class:`LoraStrategy` raises
            it; or, at the start of a run, if the global adapter has the wrong number of layers.
        TypeError: If the allocator has the wrong type.

    Warns:
        UserWarning: If there are layers that no client can ever train, given the capabilities of
            the clients.

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
            require(model_fn is not None, WHERE, "model_fn", "a function, for kind 'fim'", None)
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
        """Create the allocator if it does not exist yet, and score the layers if the round needs
        new scores."""
        pairs = layer_pairs(WHERE, state, self._pattern)
        num_layers = check_layers(WHERE, {pair.layer for pair in pairs})
        hla = self._allocation(num_layers)
        require(hla.L == num_layers, WHERE, "allocator", f"an HLA of {num_layers} layers", hla.L)
        if not self._logged:
            _log.info("%s: %s", WHERE, hla)
            self._logged = True
        if hla.wants_scores(round):
            self._score(hla, round, state)

    def select(self, round: int, clients: Mapping[Client, int]) -> list[Client]:
        """Select clients as :class:`LoraStrategy` does; warn once about layers that no client can
        train."""
        if isinstance(self.allocator, HLA) and not self._warned:
            self._warn_uncovered(self.allocator, self._capabilities or clients.values())
        return super().select(round, clients)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load a state returned by ``state_dict``, including the allocation. The state may have
        been stored as JSON in between."""
        if "allocator" in state:
            self._allocation(state["allocator"]["L"])
        super().load_state_dict(state)

    def _allocation(self, num_layers: int) -> HLA:
        if not isinstance(self.allocator, HLA):
            self.allocator = HLA.of(self.config, num_layers)
        return self.allocator

    def _score(self, hla: HLA, round: int, state: Mapping[str, Tensor]) -> None:
        assert self._model_fn is not None and self._proxy is not None  # required by "fim"
        if self._scoring_model is None:
            self._scoring_model = LoraLayerManager(self._model_fn(), self._pattern, self._adapter)
        manager, config = self._scoring_model, self.config
        manager.load_slice({key: value for key, value in state.items() if key not in self.shared})
        batches = self._proxy() if callable(self._proxy) else self._proxy
        how: Any = {name: getattr(config, name) for name in ("score", "reduce", "chunk")}
        layer_of = partial(block_index, pattern=self._pattern)
        scores = fim_scores(manager.model, batches, layer_of, **how)
        if not bool(scores.isfinite().all()):
            _log.warning("round %d: scores %s not finite, weights kept", round, scores.tolist())
            return
        hla.update(round, scores)
        weights = [f"{g:.3f}" for g in hla.weights(round).tolist()]
        _log.info("round %d: weights by importance: %s", round, ", ".join(weights))

    def _warn_uncovered(self, hla: HLA, capabilities: Iterable[int]) -> None:
        self._warned = True
        if missing := hla.uncovered(capabilities):
            why = f"{hla!r} assigns them to no client with the given capabilities"
            never = f"layers {[*missing]} can never be trained: {why}"
            warnings.warn(f"{WHERE}: capability: {never}", stacklevel=3)
