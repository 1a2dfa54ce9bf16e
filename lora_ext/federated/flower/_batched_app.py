"""A ClientApp that trains several clients as the rows of one batch."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from torch import Tensor

from lora_ext._checks import require

from .. import BatchedClients, ClientSpec, LayerPlan, Update
from .._update import Client
from ._model import Model
from ._records import who
from ._tasks import Settings, Task, failed

State = Mapping[str, Tensor]
#: Function that trains the clients of some tasks in one batch, starting from the global adapter.
#: Each task is paired with the value that ``prepare`` returned for it.
TrainFn = Callable[[list[tuple[Task, Any]], State], list[Update]]


class BatchedApp(ClientApp):
    """A ClientApp with a method that answers several training messages at once.

    Args:
        model: the model that the clients train.
        prepare: function that returns the values that ``train`` needs for one task, such as data.
        train: function that trains the clients of all tasks and returns their updates in the order
            of the tasks.
    """

    def __init__(self, model: Model, prepare: Callable[[Task], Any], train: TrainFn):
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
    """Return an app that trains a model, and creates its clients anew in each round."""

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
    """Return an app that trains existing clients. Partition i is the i-th client."""
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
