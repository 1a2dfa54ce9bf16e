"""A ClientApp that trains the layers of the plans from :class:`LoraStrategy`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from flwr.app import ConfigRecord, Context, Message
from flwr.clientapp import ClientApp
from torch import nn

from lora_ext._checks import require

from .._plan import PATTERN
from ..batched import rows_in
from ._batched_app import in_one_batch
from ._model import Model
from ._records import who
from ._tasks import Metrics, Settings

WHERE = "make_client_app"
TrainFn = Callable[[nn.Module, Sequence[Any], ConfigRecord], Metrics]


def make_client_app(
    model_fn: Callable[[], nn.Module],
    data_fn: Callable[[int], Sequence[Any]],
    train_fn: TrainFn | None = None,
    *,
    backend: Literal["loop", "batched"] = "loop",
    pattern: str = PATTERN,
    adapter: str = "default",
    mods: list[Any] | None = None,
) -> ClientApp:
    """Create a ClientApp for :class:`LoraStrategy`, for any of Flower's engines and ``LocalGrid``.

    The app also answers the strategy's identity queries, with the integers ``partition-id`` and
    ``capability`` of its node's configuration.

    Args:
        model_fn: function that returns the base model with the adapter; called once in each
            process. The model stays in training or evaluation mode.
        data_fn: function that returns the batches of one epoch for a partition, one per optimizer
            step. A batch is a mapping with ``labels``, or ``(x, y)``. If a node has no partition,
            the argument is its node id.
        train_fn: ``train_fn(model, batches, config)`` trains the parameters that require gradients,
            which are those of the planned layers, and returns metrics: ``num-examples`` (default is
            the number of rows of the batches), ``train-loss`` and others. Default is AdamW on the
            cross entropy, with ``lr`` (1e-2), ``weight-decay`` (0) and ``epochs`` (1) from the
            ``train_config`` of the strategy.
        backend: "loop" trains one client at a time. "batched" trains with
            :class:`lora_ext.federated.BatchedClients`: all clients in one batch under
            ``LocalGrid``, one client at a time under other engines.
        pattern: regular expression whose first group is the index of a layer in a name.
        adapter: name of the adapter to train.
        mods: Flower's mods, applied to training.

    Raises:
        ValueError: If the backend is unknown, or ``train_fn`` or ``mods`` is set with "batched".
    """
    require(backend in ("loop", "batched"), WHERE, "backend", "'loop' or 'batched'", repr(backend))
    model = Model(model_fn, pattern, adapter)
    if backend == "batched":
        found = f"{train_fn!r:.100}"
        require(train_fn is None, WHERE, "train_fn", "None with backend 'batched'", found)
        require(not mods, WHERE, "mods", "None with backend 'batched'", f"{mods!r:.100}")
        return in_one_batch(model, data_fn)
    app = ClientApp()

    @app.train(mods=mods)
    def train(message: Message, context: Context) -> Message:
        return _train(model, data_fn, train_fn or adamw, message, context)

    app.query()(who)
    return app


def adamw(model: nn.Module, batches: Sequence[Any], config: ConfigRecord) -> dict[str, float]:
    """Train with AdamW on the cross entropy of each batch. This is the default ``train_fn``.

    Returns:
        ``num-examples``, the number of rows of all steps, and ``train-loss``, the mean loss over
        the steps.
    """
    settings = Settings.of(config)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=settings.lr, weight_decay=settings.weight_decay)
    losses: list[float] = []
    for batch in list(batches) * settings.epochs:
        named = isinstance(batch, Mapping)
        loss = model(**batch).loss if named else F.cross_entropy(model(batch[0]), batch[1])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    examples = sum(rows_in(batch, WHERE) for batch in batches) * settings.epochs
    return {"num-examples": examples, "train-loss": sum(losses) / max(len(losses), 1)}


def _train(
    model: Model,
    data_fn: Callable[[int], Sequence[Any]],
    train_fn: TrainFn,
    message: Message,
    context: Context,
) -> Message:
    began = time.perf_counter()
    manager = model.manager
    task, tensors = model.read(message, context)
    tensors.load(task.tensors)
    before = task.cut(tensors.state(task.plan.layers))
    manager.apply(task.plan, others=task.others)
    loaded = time.perf_counter()
    batches = data_fn(task.partition)
    if isinstance(batches, Iterator):  # the batches are used more than once
        batches = list(batches)
    found: dict[str, Any] = {"num-examples": 0}
    if batches:
        with torch.random.fork_rng(), tensors.trained(), manager.boundary():
            torch.manual_seed(task.seed)
            found = dict(train_fn(manager.model, batches, task.config))
        found.setdefault("num-examples", sum(rows_in(batch, WHERE) for batch in batches))
    found = {"train-time-s": time.perf_counter() - loaded, "down-time-s": loaded - began, **found}
    after = task.cut(tensors.state(task.plan.layers))
    changes = {key: value - before[key] for key, value in after.items()}
    return task.reply(changes, found)
