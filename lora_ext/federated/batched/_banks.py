"""Banks, which stack one parameter of all clients in one tensor, and an AdamW for all banks.

A layer uses a bank in place, without copies of the clients' factors, and an optimizer step takes
few calls for any number of clients. Shape letters: ``A`` adapters of a bank, ``R`` largest rank of
the bank, ``I`` inputs, ``O`` outputs. The *place* of a client is its index when clients are sorted
by decreasing number of steps.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from .._plan import Pair
from ._clients import ClientRound, ClientSpec

_CLIP_EPS = 1e-6  # as in torch.nn.utils.clip_grad_norm_


class Bank:
    """Stacked factors of one module: the global factors, if a client needs them, followed by the
    factors of each client that trains the module.

    Args:
        pair: names of the module and its factors.
        clients: all clients of the round, sorted by decreasing number of steps; a client's index in
            this list is its place.
        start: global factors, ``(r, I)`` and ``(O, r)``, on the module's device.
        others_use_global: whether clients that do not train the module use the global factors;
            otherwise they use no factors.
        scaling: scale of the adapter.
        p: dropout probability of the adapter.

    Attributes:
        a, b: stacked factors, ``(A, R, I)`` and ``(A, O, R)``. Entries above a client's rank are 0.
        members: places of the clients that train the module, in ascending order.
        num_global: number of copies of the global factors in the bank: 1, or with dropout one per
            client that needs them, since each client has separate masks.
        table: for each place, the index of the client's factors in the bank; -1 for no factors.
    """

    def __init__(
        self,
        pair: Pair,
        clients: Sequence[ClientRound],
        start: tuple[Tensor, Tensor],
        others_use_global: bool,
        scaling: float,
        p: float = 0.0,
    ):
        self.pair = pair
        self.start = start
        self.scaling = scaling
        self.p = p
        self.seeds: Tensor | None = None  # (A,), seeds of the dropout masks
        self.members = [place for place, c in enumerate(clients) if pair.a in c.shapes]
        others = [place for place, c in enumerate(clients) if pair.a not in c.shapes]
        others = others if others_use_global else []
        self._places = [*(others if p else others[:1]), *self.members]
        self.num_global = len(self._places) - len(self.members)
        self.ranks = [start[0].shape[0]] * self.num_global
        self.ranks += [clients[place].shapes[pair.a][0] for place in self.members]
        index = dict.fromkeys(others, 0) | {own: i for i, own in enumerate(self._places)}
        self.table = tuple(index.get(place, -1) for place in range(len(clients)))
        largest = max(self.ranks, default=0)
        a, b = (t[..., :largest] if axis else t[:largest] for axis, t in enumerate(start))
        self.a, self.b = (t.expand(len(self.ranks), *t.shape).clone() for t in (a, b))
        self._ranks = self._scale = None
        if min(self.ranks, default=0) < largest:
            self._cut(self.a, self.b)
            self._ranks = torch.tensor(self.ranks, dtype=torch.int32, device=a.device)
        if scaling != 1:
            self._scale = a.new_full((len(self.ranks),), scaling, dtype=torch.float32)
        own = self.a[self.num_global :], self.b[self.num_global :]
        self.moments = [torch.zeros_like(t) for t in own for _ in range(2)]
        self.activate(len(clients))

    @property
    def values(self) -> tuple[Tensor, Tensor]:
        """Tensors that the optimizer changes."""
        return self.a, self.b

    def activate(self, count: int) -> None:
        """Restrict later steps to the first ``count`` clients in the order of places."""
        self.trained = sum(place < count for place in self.members)
        self.size = self.num_global + self.trained
        # Autograd's leaves share the bank's memory, which the optimizer changes without a graph.
        self.leaves = [t[: self.size].detach() for t in (self.a, self.b)]
        for leaf in self.leaves:
            leaf.requires_grad_(self.trained > 0)
        self.call_ranks, self.call_scale = (
            None if t is None else t[: self.size] for t in (self._ranks, self._scale)
        )

    def draw(self, seeds: Tensor) -> None:
        """Set the dropout seeds of a step; ``seeds[place]`` is the seed of the client at this
        place."""
        self.seeds = seeds[self._places[: self.size]].to(self.a.device)

    def give(self, clients: Sequence[ClientRound]) -> None:
        """Copy the change of the factors of each client that trains the module to
        ``client.changes``, and set ``client.finite`` to False if the change is not finite."""
        found: list[Tensor] = []
        for values, start in zip((self.a, self.b), self.start, strict=True):
            own = values[self.num_global :].cpu()
            found.append(own - start.cpu()[: own.shape[1], : own.shape[2]])
        a, b = found
        if self._ranks is not None:
            self._cut(a, b)
        finite = (a.isfinite().flatten(1).all(1) & b.isfinite().flatten(1).all(1)).tolist()
        for i, place in enumerate(self.members):
            client, rank = clients[place], self.ranks[self.num_global + i]
            client.finite &= finite[i]
            for key, own in ((self.pair.a, a[i, :rank]), (self.pair.b, b[i, :, :rank])):
                client.changes[key] = own.clone(memory_format=torch.contiguous_format)

    def _cut(self, a: Tensor, b: Tensor) -> None:
        """Set the entries above each adapter's rank to zero; ``a`` and ``b`` contain the last
        adapters of the bank."""
        ranks = torch.tensor(self.ranks[-len(a) :], device=a.device)
        beyond = torch.arange(a.shape[1], device=a.device) >= ranks[:, None]  # (adapters, R)
        a.masked_fill_(beyond[:, :, None], 0)
        b.masked_fill_(beyond[:, None, :], 0)


class SharedBank:
    """Stacked copies ``(A, ...)`` of one parameter outside the adapters, one per client.

    The optimizer uses it like a :class:`Bank`. ``start`` is the global value of the parameter, on
    the parameter's device.
    """

    num_global = 0

    def __init__(self, name: str, start: Tensor, count: int):
        self.name = name
        self.start = start
        self.members = list(range(count))
        self.values = (start.expand(count, *start.shape).clone(),)
        self.moments = [torch.zeros_like(self.values[0]) for _ in range(2)]
        self.activate(count)

    def activate(self, count: int) -> None:
        """Restrict later steps to the first ``count`` clients in the order of places."""
        self.trained = count
        self.leaves = [self.values[0][:count].detach().requires_grad_()]

    def give(self, clients: Sequence[ClientRound]) -> None:
        """Store the change of each client's copy in ``client.changes``; set ``client.finite``."""
        changes = self.values[0].cpu() - self.start.cpu()
        for client, own in zip(clients, changes, strict=True):
            client.finite &= bool(own.isfinite().all())
            client.changes[self.name] = own.clone()


class _Run(NamedTuple):
    """Part of a bank's tensor that belongs to clients with adjacent places and equal settings."""

    gradient: int  # index of the tensor's gradient among all gradients
    at: slice  # indices of the clients in the tensor
    values: Tensor
    average: Tensor  # AdamW's moving average of the gradient
    square: Tensor  # AdamW's moving average of the squared gradient
    steps: Tensor  # number of steps done


class ClientsAdamW:
    """AdamW that keeps separate state for each client and updates the banks in place.

    All clients start together, so all clients that are still training have done the same number of
    steps. Clients with adjacent places and equal settings form a group. One call of torch's fused
    kernel updates all tensors of a group, each element independently. The parameters of a client
    that has finished stay bitwise unchanged. A client that failed stays in its group, without an
    effect on other clients, and its values are not used.
    """

    def __init__(self, banks: Sequence[Bank | SharedBank], clients: Sequence[ClientRound]):
        self.banks = banks
        self.clients = clients
        self._done = 0
        self._places = 0
        self._runs: list[tuple[ClientSpec, list[_Run]]] = []

    def activate(self, count: int) -> None:
        """Restrict later steps to the first ``count`` clients in the order of places."""
        if count == self._places:
            return
        self._places = count
        for bank in self.banks:
            bank.activate(count)
        self._trained = [bank for bank in self.banks if bank.trained]
        self._runs = []
        first = 0
        for _, group in itertools.groupby(self.clients[:count], lambda c: c.settings):
            alike = [*group]
            self._runs.append((alike[0].spec, self._runs_of(first, first + len(alike))))
            first += len(alike)

    @property
    def leaves(self) -> list[Tensor]:
        """Tensors that need gradients, in the order in which :meth:`step` expects the gradients."""
        return [leaf for bank in self._trained for leaf in bank.leaves]

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor | None]) -> None:
        """Do one step for every active client. Tensors with the gradient None do not change."""
        if any(c.spec.max_grad_norm is not None for c in self.clients[: self._places]):
            self._clip(gradients)
        self._done += 1
        for spec, runs in self._runs:
            found = [(gradients[run.gradient], run) for run in runs]
            going = [(g[run.at], run) for g, run in found if g is not None]
            adamw(
                [run.values for _, run in going],
                [g for g, _ in going],
                [run.average for _, run in going],
                [run.square for _, run in going],
                [],
                [run.steps for _, run in going],
                fused=True,
                amsgrad=False,
                beta1=spec.betas[0],
                beta2=spec.betas[1],
                lr=spec.lr,
                weight_decay=spec.weight_decay,
                eps=spec.eps,
                maximize=False,
            )

    def _runs_of(self, first: int, last: int) -> list[_Run]:
        """Return one run per tensor, for the clients at places ``first`` to ``last - 1``."""
        runs: list[_Run] = []
        gradients = itertools.count()
        for bank in self._trained:
            places = [next(gradients) for _ in bank.values]
            begin, end = (bisect.bisect_left(bank.members, p) for p in (first, last))
            if begin == end:
                continue
            at = slice(bank.num_global + begin, bank.num_global + end)
            for axis, (place, values) in enumerate(zip(places, bank.values, strict=True)):
                average, square = (t[begin:end] for t in bank.moments[2 * axis :][:2])
                steps = torch.full((), float(self._done), device=values.device)
                runs.append(_Run(place, at, values[at], average, square, steps))
        return runs

    def _clip(self, gradients: Sequence[Tensor | None]) -> None:
        """Scale each client's gradient to at most its ``max_grad_norm``, like
        ``torch.nn.utils.clip_grad_norm_``."""
        owners = [bank for bank in self._trained for _ in bank.values]
        home = owners[0].values[0].device if owners else torch.device("cpu")
        parts = [
            (g[bank.num_global :], torch.tensor(bank.members[: bank.trained], device=home))
            for bank, g in zip(owners, gradients, strict=True)
            if g is not None
        ]
        total = torch.zeros(len(self.clients), dtype=torch.float64, device=home)
        for g, places in parts:
            norms = torch.linalg.vector_norm(g.reshape(len(g), -1), dim=1).to(home, torch.float64)
            total.index_add_(0, places, norms.square())
        bounds = [c.spec.max_grad_norm for c in self.clients]
        most = total.new_tensor([math.inf if bound is None else bound for bound in bounds])
        factors = (most / (total.sqrt() + _CLIP_EPS)).clamp(max=1)
        factors = torch.where(most.isinf(), 1.0, factors)
        for g, places in parts:
            own = factors[places].to(g.device, g.dtype)
            g.mul_(own.view(-1, *[1] * (g.dim() - 1)))
