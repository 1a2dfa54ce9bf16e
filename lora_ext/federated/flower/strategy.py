"""The strategy that Fed-HeLLo and LEGEND share: a plan for each client, a mean for each layer."""

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
from .._payload import bytes_of, shapes_of
from .._plan import PATTERN, Allocator, check_layers, layer_pairs
from .._update import Client, NanPolicy, RankAgg, Rules, Settings, Upload
from . import _records
from ._masked_replies import aggregate_replies
from ._nodes import Capability, Nodes, connected, drawn
from ._round import Round, Sending

WHERE = "LoraStrategy"
Payload = Literal["sliced", "dense_masked"]

_OWN = {"arrayrecord_key": _records.LORA, "configrecord_key": _records.CONFIG}
_LEAST = {
    "min_train_nodes": 1,
    "min_available_nodes": 1,
    "train_metrics_aggr_fn": _records.mean_metrics,
    "evaluate_metrics_aggr_fn": _records.mean_metrics,
}
_log = logging.getLogger("flwr")


class LoraStrategy(FedAvg):
    """Federated averaging in which each client has a plan of its own.

    A client gets the layers that it needs, trains those of its plan and sends these back; each
    layer is averaged over the clients that trained it (:func:`lora_ext.federated.aggregate`). A
    reply that does not hold what its plan says is rejected by itself, with the reason in
    ``history``; a round with too few replies leaves the global adapter as it was, and the run goes
    on. ``start`` takes the global adapter as :func:`lora_ext.federated.flower.to_arrays` gives it.

    A subclass says what differs by overriding the hooks :meth:`select`, :meth:`plan_round`,
    :meth:`before_round`, :meth:`observe` and :meth:`timed_out`.

    Args:
        allocator: has ``plan(round, client, capability) -> LayerPlan``; None is for a subclass with
            a :meth:`plan_round` of its own.
        capability: by client how many layers it can train: a mapping, a function, or None for what
            the nodes say of themselves, and all layers where they say nothing. 0: never asked.
        weighted_by: as for :func:`lora_ext.federated.aggregate`; so are ``rank_agg``, ``upload``,
            ``max_update_norm``, ``nan_policy``, ``min_replies``, ``server_lr``, ``partial_ok``,
            ``pattern`` and ``shared``.
        scaling: s of ``s B A``, for all modules or by each one's name. One number is compared with
            the client's model, which otherwise answers with an error; None is not compared.
        send_frozen: whether a client also gets the layers that it does not train, and applies them
            (Fed-HeLLo); without them it trains as if the adapter had its planned layers alone
            (LEGEND).
        pack: sends all tensors of a message as one array, which saves framing.
        payload: "dense_masked" has every client send all layers, times its weight and zeros where
            it trained nothing, of which the server needs the sums alone (``masked_payload``): the
            "covered" mean at the price of all bytes, and the only one.
        seed: of the draw of clients and, on the clients, of dropout.
        on_reject: ``on_reject(round, client, reason)`` for each rejected reply.
        fedavg: further arguments of Flower's ``FedAvg``. By default clients do not evaluate, and a
            round takes whichever nodes are connected. ``min_available_nodes`` are waited for before
            the first round, no longer than the timeout.

    Attributes:
        comm: the bytes of all messages; those of the queries that ask new nodes who they are stand
            in round 0. history: a :class:`RoundLog` for each round. round: the last finished one.

    Raises:
        ValueError, TypeError: settings out of range, naming the argument, the expected and the
            found. "stack" is refused: no client would have what the base weight takes up.

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
        super().__init__(**{**_LEAST, **fedavg, **_OWN})
        if "fraction_evaluate" not in fedavg:
            self.fraction_evaluate, self.min_evaluate_nodes = 0.0, 0
        fraction = self.fraction_train
        require(0 < fraction <= 1, WHERE, "fraction_train", "above 0, up to 1", fraction)
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
        require(rank_agg != "stack", WHERE, "rank_agg", "one whose result is an adapter", rank_agg)
        choice(WHERE, "payload", payload, get_args(Payload))
        if payload == "dense_masked":
            require(rank_agg == "covered", WHERE, "rank_agg", "'covered' where masked", rank_agg)
            require(not shared, WHERE, "shared", "none where masked", [*shared])
        self._sending = Sending(self._averaging, send_frozen, pack, self.seed, payload, scaling)
        self.comm = CommLog()
        self.history: list[RoundLog] = []
        self.round = 0
        self._nodes = Nodes(capability, self.comm)
        self._before = 0  # rounds before Flower's first
        self._timeout: float | None = None
        self._current: Round | None = None

    # --- hooks -------------------------------------------------------------------------------

    def before_round(self, round: int, state: Mapping[str, Tensor]) -> Mapping[str, Tensor] | None:
        """Hook: is called before the plans of a round are made.

        Args:
            round: its number, from 1. state: the global adapter, by PEFT's names.

        Returns:
            None, or the adapter to go on with, such as one of other ranks.
        """

    def select(self, round: int, clients: Mapping[Client, int]) -> list[Client]:
        """Those of the connected clients that are asked, out of all with a capability above 0.

        The draw of ``fraction_train`` depends on seed, round and client alone: one that leaves
        changes nothing for those who are drawn before it.
        """
        count = max(int(len(clients) * self.fraction_train), self.min_train_nodes)
        return drawn(clients, count, self.seed, round)

    def plan_round(self, round: int, clients: Mapping[Client, int]) -> dict[Client, LayerPlan]:
        """The plans of a round, by client; one without a plan, or without a layer, is not asked.

        Args:
            clients: the selected ones, and the capability of each.
        """
        if self.allocator is None:
            raise ValueError(f"{WHERE}: allocator: expected one, or an own plan_round, found None")
        return {c: self.allocator.plan(round, c, count) for c, count in clients.items()}

    def observe(
        self, round: int, client: Client, plan: LayerPlan, metrics: Mapping[str, float]
    ) -> None:
        """Hook: is called for each accepted reply.

        Args:
            round: its number. client: who replied. plan: what it was asked for.
            metrics: the numbers that the client reports, ``train-time-s``, ``down-time-s`` and
                others, unchecked: any may be missing, negative or NaN. ``bytes`` is the strategy's
                own: those of the planned tensors, one way.
        """

    def timed_out(self, round: int, client: Client, plan: LayerPlan, seconds: float) -> None:
        """Hook: is called for each client that has not answered, or whose node the server has lost.

        Args:
            round: its number. client: who is silent. plan: what it was asked for.
            seconds: how long it was waited for: the timeout where one is known.
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
        """Run rounds, as Flower's ``Strategy.start`` does.

        After :meth:`load_state_dict`, or a second time, rounds go on where they ended: with r
        rounds before, Flower's round 1 is the clients' and the hooks' round r + 1.

        Args:
            grid: Flower's, or a :class:`LocalGrid`.
            initial_arrays: the global adapter, of :func:`lora_ext.federated.flower.to_arrays`.
            num_rounds: how many. timeout: seconds that a round waits for replies.
            train_config, evaluate_config: further settings for the clients, ``lr`` and ``epochs``
                say.
            evaluate_fn: ``evaluate_fn(round, arrays)`` gives the server's own figures.

        Returns:
            Flower's ``Result``: the last adapter is its ``arrays``.

        Raises:
            ValueError, TypeError: an adapter or a plan that does not fit, naming it.
        """
        self._before, self._timeout = self.round, timeout
        rest = train_config, evaluate_config, evaluate_fn
        return super().start(grid, initial_arrays, num_rounds, timeout, *rest)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Write one message for each selected client, with its own plan. Flower calls it.

        Raises:
            ValueError, TypeError: a state without layers, a plan that does not fit it, a capability
                that is not known. Nothing has been sent to train then.
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
        """Make the new global adapter of the replies, and the means of what the accepted clients
        report. Where the round is skipped, the adapter is the very record of before. Flower calls
        it, with error messages among the replies.

        Raises:
            ValueError: no round is under way; with ``nan_policy="raise"`` what it says.
        """
        current, self._current = self._current, None
        number = self._before + server_round
        if current is None or current.number != number:
            under_way = "none" if current is None else current.number
            raise ValueError(f"{WHERE}: round: expected {under_way}, under way, found {number}")
        replies = list(replies)
        updates, contents, reasons, silent = current.collect(replies)
        for reply in replies:  # who a node is, where its echo says it, for the rounds to come
            node = reply.metadata.src_node_id
            if node in current.nodes and reply.has_content():
                self._nodes.learn(node, reply.content.config_records.get(_records.ECHO, {}))
        rules = Rules(current.state, current.pairs, self._averaging)
        masked = self._sending.payload == "dense_masked"
        result = aggregate_replies(rules, updates) if masked else average(rules, updates)
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
        # A tensor that is the same keeps its very array.
        moved = {key: t for key, t in result.state.items() if t is not current.state[key]}
        arrays = {**current.record, **_records.to_arrays(moved)}
        return ArrayRecord({key: arrays[key] for key in result.state}), means

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Send the whole global adapter to ``fraction_evaluate`` of the connected nodes, to none
        unless that is set: the app then needs an ``evaluate`` of its own. Arguments are
        :meth:`configure_train`'s."""
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
        """Take the means of what the clients report in ``replies``, weighted by their examples; an
        odd report does not end the run, and without any the result is None."""
        valid, _ = self._check_and_log_replies(replies, is_train=False, validate=False)
        for reply in valid:
            client = self._nodes.client(reply.metadata.src_node_id)
            number = self._before + server_round
            self.comm.record(number, client, up=_records.count_bytes(reply.content))
        contents = [reply.content for reply in valid]
        return self.evaluate_metrics_aggr_fn(contents, self.weighted_by_key) if valid else None

    # --- what a restarted server needs -------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What a run is continued from, beside the global adapter: plain JSON.

        It has the number of the last round, the clients behind the nodes, both logs, and the
        allocator's own ``state_dict()`` where it has one.
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
        """Continue from ``state``, which :meth:`state_dict` gave, by way of JSON or not.

        Raises:
            KeyError, ValueError, TypeError: no such state.
        """
        self.comm.load_state_dict(state["comm"])
        self.history = [RoundLog.from_dict(entry) for entry in state["history"]]
        self._nodes.load_state_dict(state["nodes"])
        self.round = self._before = state["round"]
        if "allocator" in state:
            cast(Any, self.allocator).load_state_dict(state["allocator"])

    # --- inside ------------------------------------------------------------------------------

    def _write(self, current: Round, result: Aggregate, reasons: dict[Client, str]) -> None:
        """Write the round down."""
        number = current.number
        for client, reason in reasons.items():
            _log.warning("round %d: client %s: rejected: %s", number, client, reason)
            if self.on_reject is not None:
                self.on_reject(number, client, reason)
        for client, factor in result.clipped.items():
            _log.info("round %d: client %s: clipped by %.3g", number, client, factor)
        if result.skipped:
            _log.warning("round %d: skipped: %s", number, result.reason)
        num_layers = 1 + max(pair.layer for pair in current.pairs)
        entry = RoundLog.of(number, current.plans, result, num_layers)
        rejected = {c: why for c, why in reasons.items() if c not in result.accepted}
        self.history.append(dataclasses.replace(entry, rejected=rejected))
        self.round = number
