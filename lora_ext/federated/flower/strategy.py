"""Strategy that Fed-HeLLo and LEGEND share: one plan per client, one average per layer."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, cast, get_args

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, Result
from torch import Tensor

from lora_ext._checks import choice, integer, require

from .. import Aggregate, CommLog, LayerPlan, RoundLog
from .._aggregation import average
from .._masked import average_masked
from .._payload import bytes_of, shapes_of
from .._plan import PATTERN, Allocator, check_layers, layer_pairs
from .._update import Client, NanPolicy, RankAgg, Rules, Settings, Upload
from . import _records
from ._nodes import Capability, Nodes, connected, drawn
from ._round import Round, Sending

WHERE = "LoraStrategy"
Payload = Literal["sliced", "dense_masked"]

_RECORD_KEYS = {"arrayrecord_key": _records.LORA, "configrecord_key": _records.CONFIG}
_DEFAULTS = {
    "min_train_nodes": 1,
    "min_available_nodes": 1,
    "train_metrics_aggr_fn": _records.mean_metrics,
    "evaluate_metrics_aggr_fn": _records.mean_metrics,
}
_log = logging.getLogger("flwr")


class LoraStrategy(FedAvg):
    """Flower strategy for federated averaging with a separate plan for each client.

    A client receives the layers that it needs, trains the layers of its plan, and returns them.
    Each layer is averaged over the clients that trained it (:func:`lora_ext.federated.aggregate`).
    A reply that does not match its plan is rejected, with the reason in ``history``. A round with
    too few replies leaves the global adapter unchanged, and the run continues. ``start`` expects
    the global adapter from :func:`lora_ext.federated.flower.to_arrays`.

    Subclasses can override the hooks :meth:`select`, :meth:`plan_round`, :meth:`before_round`,
    :meth:`observe` and :meth:`timed_out`.

    Args:
        allocator: object with ``plan(round, client, capability) -> LayerPlan``; None for a subclass
            that overrides :meth:`plan_round`.
        capability: number of layers that each client can train: a mapping by client, or a function
            of the client. None uses the number that each node reports, or all layers if a node
            reports none. A client with capability 0 is never asked to train.
        weighted_by, rank_agg, upload, max_update_norm, nan_policy, min_replies, server_lr: see
            :func:`lora_ext.federated.aggregate`.
        partial_ok, pattern, shared: see :func:`lora_ext.federated.aggregate`.
        scaling: scale s of ``s B A``, one number or numbers by module name. With one number,
            clients with a different scale reply with an error. None means 1, without this check.
        send_frozen: whether a client also receives the layers that it does not train, and applies
            them (Fed-HeLLo). Otherwise its adapter has only the planned layers (LEGEND).
        pack: whether to send all tensors of a message as one array, which reduces framing (the
            bytes that are not tensor data).
        payload: "sliced", with which clients send only the layers of their plans; or
            "dense_masked", with which each client sends all layers, multiplied by its weight, with
            zeros for untrained layers. The server then needs only the sums over the clients (see
            ``masked_payload``). "dense_masked" supports only ``rank_agg="covered"``.
        seed: seed for the selection of clients and, on the clients, for dropout.
        on_reject: ``on_reject(round, client, reason)``, called for each rejected reply.
        fedavg: other arguments of Flower's ``FedAvg``. By default, clients do not evaluate, and
            each round uses all connected nodes. Before the first round, the strategy waits for
            ``min_available_nodes``, at most until the timeout.

    Attributes:
        comm: log of the bytes of all messages. Queries that identify new nodes are in round 0.
        history: list with a :class:`RoundLog` for each round.
        round: number of the last finished round.

    Raises:
        ValueError: If an argument is out of range. ``rank_agg="stack"`` is not supported, since
            clients would lack the changes of the base weight.
        TypeError: If an argument has the wrong type.

    Sources: Fed-HeLLo (arXiv 2506.12213); LEGEND (arXiv 2412.20004).
    """

    def __init__(
        self,
        allocator: Allocator | None = None,
        *,
        capability: Capability = None,
        weighted_by: Literal["num-examples"] | None = "num-examples",
        rank_agg: RankAgg = "covered",
        upload: Upload = "delta",
        max_update_norm: float | None = None,
        nan_policy: NanPolicy = "drop_client",
        min_replies: int = 1,
        server_lr: float = 1.0,
        scaling: float | Mapping[str, float] | None = None,
        partial_ok: bool = False,
        pattern: str = PATTERN,
        shared: Sequence[str] = (),
        send_frozen: bool = True,
        pack: bool = False,
        payload: Payload = "sliced",
        seed: int = 0,
        on_reject: Callable[[int, Client, str], None] | None = None,
        **fedavg: Any,
    ):
        super().__init__(**{**_DEFAULTS, **fedavg, **_RECORD_KEYS})
        if "fraction_evaluate" not in fedavg:
            self.fraction_evaluate, self.min_evaluate_nodes = 0.0, 0
        fraction = self.fraction_train
        require(0 < fraction <= 1, WHERE, "fraction_train", "a number above 0, up to 1", fraction)
        self.seed = integer(WHERE, "seed", seed, 0)
        self.allocator = allocator
        self.on_reject = on_reject
        self.shared = tuple(shared)
        self._averaging = Settings(
            rank_agg=rank_agg,
            upload=upload,
            weighted_by=weighted_by,
            server_lr=server_lr,
            scaling=1.0 if scaling is None else scaling,
            nan_policy=nan_policy,
            max_update_norm=max_update_norm,
            min_replies=min_replies,
            partial_ok=partial_ok,
            pattern=pattern,
            shared=self.shared,
        )
        require(rank_agg != "stack", WHERE, "rank_agg", "a method returning an adapter", rank_agg)
        choice(WHERE, "payload", payload, get_args(Payload))
        if payload == "dense_masked":
            expected = f"'covered' with payload {payload!r}"
            require(rank_agg == "covered", WHERE, "rank_agg", expected, rank_agg)
            require(not shared, WHERE, "shared", f"no names with payload {payload!r}", [*shared])
        self._sending = Sending(self._averaging, send_frozen, pack, self.seed, payload, scaling)
        self.comm = CommLog()
        self.history: list[RoundLog] = []
        self.round = 0
        self._nodes = Nodes(capability, self.comm)
        self._before = 0  # number of rounds before Flower's round 1
        self._timeout: float | None = None
        self._current: Round | None = None

    # --- hooks -------------------------------------------------------------------------------

    def before_round(self, round: int, state: Mapping[str, Tensor]) -> Mapping[str, Tensor] | None:
        """Change the global adapter before the plans of a round are made. The default does nothing.

        Args:
            round: number of the round, starting at 1.
            state: the global adapter, by PEFT's names.

        Returns:
            the adapter to continue with, such as one with other ranks; None for no change.
        """

    def select(self, round: int, clients: Mapping[Client, int]) -> list[Client]:
        """Select ``fraction_train`` of the clients at random, but at least ``min_train_nodes``.

        ``clients`` contains the capabilities of the connected clients with a capability above 0.
        The random number of a client depends only on seed, round and client, and does not change if
        other clients leave.
        """
        count = max(int(len(clients) * self.fraction_train), self.min_train_nodes)
        return drawn(clients, count, self.seed, round)

    def plan_round(self, round: int, clients: Mapping[Client, int]) -> dict[Client, LayerPlan]:
        """Return the plan of each client. A client without a plan, or with a plan without layers,
        does not take part in the round.

        Args:
            round: number of the round, starting at 1.
            clients: capabilities of the selected clients.
        """
        if self.allocator is None:
            expected = "expected an allocator, or a subclass that overrides plan_round"
            raise ValueError(f"{WHERE}: allocator: {expected}, found None")
        return {c: self.allocator.plan(round, c, count) for c, count in clients.items()}

    def observe(
        self, round: int, client: Client, plan: LayerPlan, metrics: Mapping[str, float]
    ) -> None:
        """Receive the metrics of an accepted reply. The default does nothing.

        Args:
            round: number of the round.
            client: the client that replied.
            plan: the plan that the client received.
            metrics: numbers that the client reports, such as ``train-time-s`` and ``down-time-s``.
                The numbers are unchecked: each may be missing, negative or NaN. The strategy adds
                ``bytes``, the size of the planned tensors in one direction.
        """

    def timed_out(self, round: int, client: Client, plan: LayerPlan, seconds: float) -> None:
        """Handle a client that did not reply or is on a lost node. The default does nothing.

        Args:
            round: number of the round.
            client: the client without a reply.
            plan: the plan that the client received.
            seconds: time that the strategy waited for the reply, which is the timeout if one is
                set.
        """

    # --- Flower's interface ------------------------------------------------------------------

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
    ) -> Result:
        """Run rounds, like Flower's ``Strategy.start``.

        In repeated calls, and after :meth:`load_state_dict`, the numbers of rounds continue. If r
        rounds were run before, clients and hooks get the number r + 1 for Flower's round 1.

        Args:
            grid: Flower's grid, or a :class:`LocalGrid`.
            initial_arrays: the global adapter, from :func:`lora_ext.federated.flower.to_arrays`.
            num_rounds: number of rounds to run.
            timeout: seconds to wait for the replies of a round.
            train_config: additional settings for training on the clients, such as ``lr`` and
                ``epochs``.
            evaluate_config: additional settings for evaluation on the clients.
            evaluate_fn: ``evaluate_fn(round, arrays)`` returns the server's metrics.

        Returns:
            Flower's ``Result``. Its ``arrays`` are the adapter after the last round.

        Raises:
            ValueError: If the adapter has no layers, or a plan does not fit it.
            TypeError: If a plan is not a :class:`LayerPlan`, or a capability is not an integer.
        """
        self._before, self._timeout = self.round, timeout
        rest = train_config, evaluate_config, evaluate_fn
        return super().start(grid, initial_arrays, num_rounds, timeout, *rest)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Create a message with the plan for each selected client. Flower calls this method.

        If an error is raised, no training message is sent.

        Raises:
            ValueError: If the adapter has no layers, a plan does not fit it, or, in the first
                round, a capability is missing or out of range.
            TypeError: If a plan is not a :class:`LayerPlan`, or a capability is not an integer.
        """
        number = self._before + server_round
        state = _records.from_arrays(arrays, f"{WHERE}: arrays")
        changed = self.before_round(number, state)
        if changed is not None:
            state, arrays = dict(changed), _records.to_arrays(changed)
        pairs = layer_pairs(f"{WHERE}: arrays", state, self._averaging.pattern)
        num_layers = check_layers(WHERE, {pair.layer for pair in pairs})
        first = server_round == 1
        nodes = connected(grid, self.min_available_nodes if first else 1, self._timeout)
        self._nodes.meet(grid, nodes, self._timeout)
        capable = self._nodes.capable(nodes, num_layers, strict=first)
        by_client: dict[Client, int] = {self._nodes.client(node): node for node in capable}
        clients = {client: capable[by_client[client]] for client in sorted(by_client, key=int)}
        chosen = {c: clients[c] for c in self.select(number, clients)} if clients else {}
        made = self.plan_round(number, chosen) if chosen else {}
        for client, plan in made.items():
            if not isinstance(plan, LayerPlan):
                name = f"{WHERE}: plan of client {client}"
                raise TypeError(f"{name}: expected a LayerPlan, found {plan!r:.100}")
        plans = {client: plan for client, plan in made.items() if plan.layers}
        asked = {by_client[client]: client for client in plans}
        self._current = Round(number, arrays, state, pairs, asked, plans, self._sending, self.comm)
        messages = self._current.messages(config)
        _log.info("configure_train: asked %d of %d nodes", len(messages), len(nodes))
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Compute the new global adapter and the mean of the clients' metrics from the replies.

        Flower calls this method. ``replies`` include error messages. If the round is skipped, the
        adapter does not change, and None is returned instead of the metrics.

        Raises:
            ValueError: If ``server_round`` is not the round in progress, or if a value is not
                finite and ``nan_policy="raise"``.
        """
        current, self._current = self._current, None
        number = self._before + server_round
        if current is None or current.number != number:
            expected = "none" if current is None else current.number
            raise ValueError(f"{WHERE}: round: expected {expected} (in progress), found {number}")
        replies = list(replies)
        updates, contents, reasons, silent = current.collect(replies)
        for reply in replies:  # the echo may contain the node's identity, to use in later rounds
            node = reply.metadata.src_node_id
            if node in current.nodes and reply.has_content():
                self._nodes.learn(node, reply.content.config_records.get(_records.ECHO, {}))
        rules = Rules(current.state, current.pairs, self._averaging)
        masked = self._sending.payload == "dense_masked"
        result = (average_masked if masked else average)(rules, updates)
        waited = float(self._timeout or time.monotonic() - current.sent)
        for client in silent:
            node = current.node(client)
            reasons.setdefault(client, f"node {node}: no reply within {waited:g} s")
        for client, reason in result.rejected.items():
            reasons[client] = f"node {current.node(client)}: {reason}"
        self._write(current, result, reasons)
        for client in result.accepted:
            reported = _records.numbers(contents[client].metric_records[_records.METRICS])
            plan = current.plans[client]
            sent = bytes_of(current.state, shapes_of(current.pairs, current.state, plan))
            self.observe(number, client, plan, {**reported, "bytes": float(sent)})
        for client in silent:
            self.timed_out(number, client, current.plans[client], waited)
        if result.skipped:
            return current.record, None
        reports = [contents[client] for client in result.accepted]
        means = self.train_metrics_aggr_fn(reports, self.weighted_by_key)
        # Only changed tensors are converted; all other tensors keep their arrays.
        moved = {key: t for key, t in result.state.items() if t is not current.state[key]}
        arrays = {**current.record, **_records.to_arrays(moved)}
        return ArrayRecord({key: arrays[key] for key in result.state}), means

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Create messages with the whole global adapter for evaluation on the clients.

        The share ``fraction_evaluate`` of the connected nodes receives a message; the default is 0.
        With a share above 0, the client app needs an ``evaluate`` function. Flower calls this
        method.
        """
        if not self.fraction_evaluate:
            return []
        number = self._before + server_round
        nodes: dict[Client, int] = {self._nodes.client(n): n for n in grid.get_node_ids()}
        count = max(int(len(nodes) * self.fraction_evaluate), self.min_evaluate_nodes)
        chosen = drawn(nodes, count, self.seed, number, 1)
        settings = ConfigRecord({**config, "server-round": number})
        content = RecordDict({_records.LORA: arrays, _records.CONFIG: settings})
        for client in chosen:
            self.comm.record(number, client, down=_records.count_bytes(content))
        return [Message(content, nodes[client], MessageType.EVALUATE) for client in chosen]

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Compute the means of the clients' metrics, weighted by their numbers of examples.

        Invalid replies are skipped. Returns None if no reply is valid. Flower calls this method.
        """
        valid, _ = self._check_and_log_replies(replies, is_train=False, validate=False)
        for reply in valid:
            client = self._nodes.client(reply.metadata.src_node_id)
            number = self._before + server_round
            self.comm.record(number, client, up=_records.count_bytes(reply.content))
        contents = [reply.content for reply in valid]
        return self.evaluate_metrics_aggr_fn(contents, self.weighted_by_key) if valid else None

    # --- state of a restarted server ---------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the state of a run, except the global adapter, as values that JSON can store.

        The state contains the number of the last round, the client of each node, ``comm``,
        ``history``, and the allocator's ``state_dict()`` if it has that method.
        """
        found: dict[str, Any] = {
            "round": self.round,
            "nodes": self._nodes.state_dict(),
            "comm": self.comm.state_dict(),
            "history": [entry.to_dict() for entry in self.history],
        }
        if hasattr(self.allocator, "state_dict"):
            found["allocator"] = cast(Any, self.allocator).state_dict()
        return found

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load a state that :meth:`state_dict` returned, also after a conversion to JSON and back.

        Raises:
            KeyError: If ``state`` lacks an entry.
            ValueError: If a log in ``state`` is invalid.
            TypeError: If a value has the wrong type.
        """
        self.comm.load_state_dict(state["comm"])
        self.history = [RoundLog.from_dict(entry) for entry in state["history"]]
        self._nodes.load_state_dict(state["nodes"])
        self.round = self._before = state["round"]
        if "allocator" in state:
            cast(Any, self.allocator).load_state_dict(state["allocator"])

    # --- inside ------------------------------------------------------------------------------

    def _write(self, current: Round, result: Aggregate, reasons: dict[Client, str]) -> None:
        """Write the round to the logs, and call ``on_reject`` for each rejected reply."""
        number = current.number
        for client, reason in reasons.items():
            _log.warning("round %d: client %s: rejected: %s", number, client, reason)
            if self.on_reject is not None:
                self.on_reject(number, client, reason)
        for client, factor in result.clipped.items():
            _log.info("round %d: client %s: update scaled by %.3g", number, client, factor)
        if result.skipped:
            _log.warning("round %d: skipped: %s", number, result.reason)
        num_layers = 1 + max(pair.layer for pair in current.pairs)
        entry = RoundLog.of(number, current.plans, result, num_layers)
        rejected = {c: why for c, why in reasons.items() if c not in result.accepted}
        self.history.append(dataclasses.replace(entry, rejected=rejected))
        self.round = number
