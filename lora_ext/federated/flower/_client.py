"""ClientApps that train the layers of the plans from :class:`LoraStrategy`.

A :class:`BatchedApp` trains several clients as the rows of one batch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from flwr.app import ConfigRecord, Context, Message
from flwr.clientapp import ClientApp
from torch import Tensor, nn

from lora_ext._checks import require

from .. import BatchedClients, ClientSpec, LayerPlan, Update
from .._plan import PATTERN
from .._update import Client
from ..batched import rows_in
from ._records import who
from ._tasks import Metrics, Model, Settings, Task, failed

WHERE = "make_client_app"
TrainFn = Callable[[nn.Module, Sequence[Any], ConfigRecord], Metrics]

State = Mapping[str, Tensor]
#: Function that trains the clients of some tasks in one batch, starting from the global adapter.
#: Each task is paired with the value that ``prepare`` returned for it.
TrainTogether = Callable[[list[tuple[Task, Any]], State], list[Update]]


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
        mods: Flower mods for training messages.

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


class BatchedApp(ClientApp):
    """A ClientApp with a method that answers several training messages at once.

    Args:
        model: the model that the clients train.
        prepare: function that returns the values that ``train`` needs for one task, such as data.
        train: function that trains the clients of all tasks and returns their updates in the order
            of the tasks.
    """

    def __init__(self, model: Model, prepare: Callable[[Task], Any], train: TrainTogether):
        super().__init__()
        self._model = model
        self._prepare = prepare
        self._train = train
        self.train()(self._alone)
        self.query()(who)

    def train_together(self, pairs: Sequence[tuple[Message, Context]]) -> list[Message]:
        """Train the receivers of all messages in one batch, and return the replies in the order of
        the messages. The reply of a failed client is an error.

        In each reply, ``train-time-s`` is the total time divided by the number of clients.
        """
        began = time.perf_counter()
        replies: dict[int, Message] = {}
        tasks: dict[int, tuple[Task, Any]] = {}
        for place, (message, context) in enumerate(pairs):
            try:
                task, _ = self._model.read(message, context)
                tasks[place] = task, self._prepare(task)
            except Exception as error:
                replies[place] = failed(message, error)
        loaded = time.perf_counter()
        try:
            whole = _union([task for task, _ in tasks.values()])
            updates = self._train([*tasks.values()], whole) if tasks else []
        except Exception as error:
            return [replies.get(i, failed(message, error)) for i, (message, _) in enumerate(pairs)]
        share = len(tasks) or 1
        seconds = {
            "train-time-s": (time.perf_counter() - loaded) / share,
            "down-time-s": (loaded - began) / share,
        }
        for (place, (task, _)), update in zip(tasks.items(), updates, strict=True):
            if update.failed:
                error = ArithmeticError("the loss or the update is not finite")
                replies[place] = failed(task.message, error)
                continue
            metrics = {"num-examples": update.num_examples, "train-loss": update.loss}
            replies[place] = task.reply(task.cut(update.tensors), {**seconds, **metrics})
        return [replies[place] for place in range(len(pairs))]

    def _alone(self, message: Message, context: Context) -> Message:
        return self.train_together([(message, context)])[0]


def in_one_batch(model: Model, data_fn: Callable[[int], Sequence[Any]]) -> BatchedApp:
    """Return an app that creates and trains new `BatchedClients` in each round."""

    def prepare(task: Task) -> ClientSpec:
        settings = Settings.of(task.config)
        return ClientSpec(
            task.client,
            [*data_fn(task.partition)] * settings.epochs,
            settings.lr,
            settings.weight_decay,
            seed=settings.seed,
        )

    def train(tasks: list[tuple[Task, Any]], state: State) -> list[Update]:
        first = tasks[0][0]
        batched = BatchedClients(
            model.manager.model,
            [spec for _, spec in tasks],
            pattern=model.pattern,
            adapter=model.adapter,
            shared=first.shared or None,
            others=first.others,
        )
        plans: dict[Client, LayerPlan] = {task.client: task.plan for task, _ in tasks}
        return batched.run_round(plans, state, first.round)

    return BatchedApp(model, prepare, train)


def of_clients(batched: BatchedClients) -> BatchedApp:
    """Return an app that trains the clients of ``batched``. Partition i is the i-th client."""
    names = list(batched.clients)
    model = Model(lambda: batched.model, batched.pattern, batched.adapter)
    _ = model.manager  # errors of the model are raised here, not in a client

    def prepare(task: Task) -> Any:
        found, expected = task.others, batched.others
        same = f"others={found!r}, as in the strategy"
        require(found == expected, "LocalGrid", "client_app", same, repr(expected))
        asked, own = sorted(task.shared), sorted(batched.shared)
        require(asked == own, "LocalGrid", "client_app", f"shared={asked}, as in the strategy", own)
        return names[task.partition]

    def train(tasks: list[tuple[Task, Any]], state: State) -> list[Update]:
        plans = {name: task.plan for task, name in tasks}
        updates = {u.client: u for u in batched.run_round(plans, state, tasks[0][0].round)}
        return [updates[name] for _, name in tasks]

    return BatchedApp(model, prepare, train)


def _union(tasks: Sequence[Task]) -> dict[str, Tensor]:
    """Return the global adapter, assembled from the parts in the messages. Parts that no message
    contains are zeros, and no client uses them."""
    found: dict[str, Tensor] = {}
    sizes: dict[str, int] = {}
    for task in tasks:
        for key, value in task.whole().items():
            size = task.tensors[key].numel() if key in task.tensors else 0
            if size >= sizes.get(key, 0):
                found[key], sizes[key] = value, size
    return found
