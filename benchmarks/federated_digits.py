"""A federation small enough for two cores: scikit-learn's digits, a frozen transformer, LoRA.

A picture of 8 x 8 is a sequence of eight rows. The base model (6 blocks, width 32, 2 heads) learns
the transposed pictures in 150 steps and is frozen, its head too. Twelve clients then train LoRA of
rank 4 on the queries and values of the upright pictures: six a round, one epoch each, batches of
32, AdamW with a rate of 1e-2 and without decay. All clients of a round are the rows of one batch.

alpha is the authors' 16, so that the scaling alpha / r is 4. Of 1, 2 and 4, tried on seeds 100 and
101 with all layers trained by all clients and nothing else, it learned the most.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_ext import nn as lora_nn
from lora_ext.federated import (
    BatchedClients,
    ClientSpec,
    CommLog,
    LayerPlan,
    LoraLayerManager,
    RoundLog,
    aggregate,
    partition_dirichlet,
    partition_pathological,
    plan_bytes,
)

SCALING = 4
CAPABILITIES = (3, 4, 6)  # of client i: that of i % 3
Plans = Mapping[int, LayerPlan]
#: ``planner(round, clients)``: the plans of the clients that were drawn; one may be left out.
Planner = Callable[[int, Sequence[int]], Plans]


@dataclass(frozen=True)
class Sizes:
    """Of the model, the federation and the training."""

    blocks: int = 6
    width: int = 32
    heads: int = 2
    base_steps: int = 150
    clients: int = 12
    per_round: int = 6
    rounds: int = 30
    batch: int = 32
    lr: float = 1e-2
    testing: int = 360  # pictures, which no client has

    def capability(self, client: int) -> int:
        """c: how many layers a client can train."""
        return min(self.blocks, CAPABILITIES[client % len(CAPABILITIES)])


QUICK = Sizes(base_steps=3, rounds=2)


class Block(nn.Module):
    """Attention over the rows of a picture, and an MLP; both after a norm."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, h: Tensor) -> Tensor:
        """``(n, 8, width)`` to the same."""
        x = self.norm1(h)
        q, k, v = (
            f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v)
        )
        h = h + self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return h + self.mlp(self.norm2(h))


class Transformer(nn.Module):
    """``(n, 8, 8)`` to logits ``(n, 10)``."""

    def __init__(self, sizes: Sizes):
        super().__init__()
        self.embed = nn.Linear(8, sizes.width)
        self.place = nn.Parameter(0.1 * torch.randn(8, sizes.width))
        self.layers = nn.ModuleList(Block(sizes.width, sizes.heads) for _ in range(sizes.blocks))
        self.norm = nn.LayerNorm(sizes.width)
        self.head = nn.Linear(sizes.width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        h = self.embed(x) + self.place
        for layer in self.layers:
            h = layer(h)
        return self.head(self.norm(h).mean(1))


@dataclass(frozen=True)
class World:
    """What the runs of one seed share: pictures, and the frozen base model."""

    seed: int
    sizes: Sizes
    training: tuple[Tensor, Tensor]
    testing: tuple[Tensor, Tensor]
    base: Transformer

    def adapted(self, ranks: int | Sequence[int] = 4) -> Transformer:
        """A copy of the base model with LoRA of these ranks, one or by layer, on q and v."""
        each = [ranks] * self.sizes.blocks if isinstance(ranks, int) else list(ranks)
        config = lora_nn.LoraConfig(
            target_modules=["q", "v"],
            rank_pattern={rf"layers\.{i}\..*": r for i, r in enumerate(each)},
            alpha_pattern={rf"layers\.{i}\..*": SCALING * r for i, r in enumerate(each)},
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return lora_nn.wrap(copy.deepcopy(self.base), config).eval()

    def shares(self, partition: str) -> list[np.ndarray]:
        """For each client the indices of its pictures: "iid", "3 classes", or "dirichlet 0.3"."""
        labels, clients = self.training[1].numpy(), self.sizes.clients
        if partition == "iid":
            order = np.random.default_rng(self.seed).permutation(len(labels))
            return np.array_split(order, clients)
        if partition.endswith(" classes"):
            count = int(partition.removesuffix(" classes"))
            return partition_pathological(labels, clients, count, seed=self.seed)
        alpha = float(partition.removeprefix("dirichlet "))
        return partition_dirichlet(labels, clients, alpha, seed=self.seed, min_size=8)


@dataclass
class Run:
    """What came of a federation."""

    accuracy: list[float] = field(default_factory=list)  # of the global adapter after each round
    history: list[RoundLog] = field(default_factory=list)
    comm: CommLog = field(default_factory=CommLog)

    @property
    def best(self) -> float:
        """The best accuracy over the rounds."""
        return max(self.accuracy)


def make_world(seed: int, sizes: Sizes) -> World:
    """Pictures split at random, and a base model that knows the transposed ones."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(labels))
    x = torch.tensor(pixels[order] / 16, dtype=torch.float32).view(-1, 8, 8)
    y = torch.tensor(labels[order])
    cut = len(y) - sizes.testing
    training, testing = (x[:cut], y[:cut]), (x[cut:], y[cut:])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        base = Transformer(sizes)
        optimizer = torch.optim.AdamW(base.parameters(), lr=3e-3)
        for _ in range(sizes.base_steps):
            rows = torch.randint(cut, (64,))
            loss = F.cross_entropy(base(training[0][rows].transpose(1, 2)), training[1][rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return World(seed, sizes, training, testing, base.eval().requires_grad_(False))


@torch.no_grad()
def accuracy(model: nn.Module, pictures: tuple[Tensor, Tensor]) -> float:
    """The share of pictures whose largest logit is the right one."""
    x, y = pictures
    return (model(x).argmax(-1) == y).float().mean().item()


def federate(
    world: World,
    shares: Sequence[np.ndarray],
    planner: Planner,
    *,
    clients: Sequence[int] | None = None,
    model: Transformer | None = None,
    before: Callable[[int, Mapping[str, Tensor]], object] | None = None,
    others: Literal["frozen", "disabled"] = "frozen",
    tick: Callable[[], object] = lambda: None,
    **aggregation: Any,
) -> Run:
    """Train a global adapter in ``world.sizes.rounds`` rounds, from 1.

    Args:
        shares: of each client; ``world.shares(...)``.
        planner: gets the round and the clients that were drawn, and gives their plans. One with an
            empty plan, or none, trains nothing and costs nothing.
        clients: who may be drawn; None for all. Draws depend on seed, round and these alone.
        model: ``world.adapted()`` unless said; its adapter is that of the server at first.
        before: called with the round and the global adapter before the planner is.
        others: layers outside a plan. "frozen" ones travel down as well, "disabled" ones do not.
        tick: called after every round.
        aggregation: settings of :func:`aggregate`.
    """
    sizes = world.sizes
    model = world.adapted() if model is None else model
    manager = LoraLayerManager(model)
    whole = LayerPlan(tuple(range(manager.num_layers)))
    state = manager.state_slice()
    eligible = range(sizes.clients) if clients is None else clients
    run = Run()
    for round in range(1, sizes.rounds + 1):
        if before is not None:
            before(round, state)
        draw = np.random.default_rng([world.seed, round])
        size = min(sizes.per_round, len(eligible))
        drawn = sorted(int(c) for c in draw.choice(eligible, size, replace=False))
        plans = {c: p for c, p in planner(round, drawn).items() if p.layers}
        specs = [client_spec(world, shares[c], c, round) for c in plans]
        updates = []
        if specs:
            batched = BatchedClients(model, specs, others=others)
            updates = batched.run_round(plans, state, round=round)
        result = aggregate(state, updates, **aggregation)
        for client, plan in plans.items():
            full = plan_bytes(state, whole)
            up = plan_bytes(state, plan)
            down = full if others == "frozen" else up
            run.comm.record(round, client, up=up, down=down, full=2 * full)
        state = result.state
        manager.load_slice(state)
        run.history.append(RoundLog.of(round, plans, result, manager.num_layers))
        run.accuracy.append(accuracy(model, world.testing))
        tick()
    return run


def client_spec(world: World, share: np.ndarray, client: int, round: int) -> ClientSpec:
    """One epoch of a client's pictures, in an order of its own in every round."""
    x, y = world.training
    order = np.random.default_rng([world.seed, round, client]).permutation(share)
    batches = [(x[rows], y[rows]) for rows in torch.tensor(order).split(world.sizes.batch)]
    return ClientSpec(client, batches, lr=world.sizes.lr)
