"""A ServerApp that runs a strategy from the adapter of a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import Result
from torch import nn

from .. import LayerPlan
from .._plan import PATTERN
from ._model import Model, Tensors
from ._records import from_arrays, to_arrays
from .strategy import LoraStrategy

_OWN = {"num-server-rounds", "timeout"}


def make_server_app(
    strategy_fn: Callable[[], LoraStrategy],
    model_fn: Callable[[], nn.Module],
    eval_fn: Callable[[nn.Module], Mapping[str, float]] | None = None,
    *,
    num_rounds: int = 3,
    timeout: float = 3600.0,
    train_config: Mapping[str, Any] | None = None,
    on_result: Callable[[LoraStrategy, Result], None] | None = None,
    pattern: str = PATTERN,
    adapter: str = "default",
) -> ServerApp:
    """The server of a federation, for any of Flower's engines and for ``LocalGrid``.

    The run configuration of the app may say otherwise than ``num_rounds`` and ``timeout``, as
    ``num-server-rounds`` and ``timeout``; its other numbers join ``train_config``.

    Args:
        strategy_fn: the strategy, made when the app runs.
        model_fn: the base model with the adapter on it, from whose values the federation starts.
        eval_fn: numbers of the model with the global adapter, before the first round and after
            each; None evaluates nothing.
        timeout: seconds that a round is waited for. The first round of a simulation with Ray also
            waits for its start: give it 30 seconds at least.
        train_config: goes to the clients: ``lr``, ``epochs``, ``weight-decay``.
        on_result: gets the strategy, with its logs, and Flower's result at the end.
        pattern: finds the index of a layer in a name. adapter: the one that is federated.
    """
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        strategy = strategy_fn()
        manager = Model(model_fn, pattern, adapter).manager
        tensors = Tensors(manager, strategy.shared)
        said = {k: v for k, v in context.run_config.items() if isinstance(v, int | float)}
        settings = {**(train_config or {}), **said}

        def evaluate(round: int, arrays: ArrayRecord) -> MetricRecord | None:
            if eval_fn is None:
                return None
            tensors.load(from_arrays(arrays))
            manager.apply(LayerPlan(tuple(range(manager.num_layers))), mode="eval")
            return MetricRecord(dict(eval_fn(manager.model)))

        result = strategy.start(
            grid,
            to_arrays(tensors.state()),
            int(settings.get("num-server-rounds", num_rounds)),
            float(settings.get("timeout", timeout)),
            ConfigRecord({k: v for k, v in settings.items() if k not in _OWN}),
            evaluate_fn=evaluate,
        )
        context.state["lora"] = result.arrays
        if on_result is not None:
            on_result(strategy, result)

    return app
