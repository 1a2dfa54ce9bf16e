"""A ServerApp that runs a strategy, with a model's adapter as the initial global adapter."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import Result
from torch import nn

from .. import LayerPlan
from .._plan import PATTERN
from ._records import from_arrays, to_arrays
from ._tasks import Model, Tensors
from .strategy import LoraStrategy

_SERVER_SETTINGS = {"num-server-rounds", "timeout"}


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
    """Create the ServerApp of a federation, for any of Flower's engines and for ``LocalGrid``.

    In the app's run configuration, ``num-server-rounds`` and ``timeout`` override ``num_rounds``
    and ``timeout``. All other numbers there are added to ``train_config``.

    Args:
        strategy_fn: function that returns the strategy; called when the app runs.
        model_fn: function that returns the base model with the adapter. The adapter's values are
            the initial global adapter.
        eval_fn: function that returns metrics of the model with the global adapter. It is called
            before the first round and after each round. None for no evaluation.
        num_rounds: number of rounds.
        timeout: seconds to wait for the replies of a round. In a simulation with Ray, the first
            round includes the start of Ray, so use at least 30 seconds.
        train_config: settings for the clients: ``lr``, ``epochs``, ``weight-decay``.
        on_result: ``on_result(strategy, result)``, called at the end. The strategy contains the
            logs, and ``result`` is Flower's.
        pattern: regular expression whose first group is the index of a layer in a name.
        adapter: name of the adapter to train.
    """
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        strategy = strategy_fn()
        manager = Model(model_fn, pattern, adapter).manager
        tensors = Tensors(manager, strategy.shared)
        numbers = {k: v for k, v in context.run_config.items() if isinstance(v, int | float)}
        settings = {**(train_config or {}), **numbers}

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
            ConfigRecord({k: v for k, v in settings.items() if k not in _SERVER_SETTINGS}),
            evaluate_fn=evaluate,
        )
        context.state["lora"] = result.arrays
        if on_result is not None:
            on_result(strategy, result)

    return app
