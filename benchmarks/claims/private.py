"""FedAvg with client-level differential privacy, from Flower's components.

Flower's mod clips a client's changes to a norm, its strategy adds noise to the mean, and opacus'
accountant computes epsilon. The accountant assumes that each client joins a round independently at
random. Here, as in Flower, a fixed number of clients is drawn, so epsilon is an estimate.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from federated_digits import Run, World, client_spec, load_state, right, shared_state, trimmed
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord
from flwr.clientapp.mod import fixedclipping_mod
from flwr.serverapp.strategy import DifferentialPrivacyClientSideFixedClipping
from torch import Tensor

from lora_ext.federated import LocalGrid, LoraLayerManager, LoraStrategy, make_client_app
from lora_ext.federated.flower import from_arrays, to_arrays
from lora_ext.methods.fed_hello import HLA

#: Arms, with their noise as a multiple of the clipping norm.
NOISE = {"private, no noise": 0.0, "private, noise 0.01": 0.01, "private, noise 1": 1.0}
CLIP = 8.0  # about the norm of three Adam steps of 81,000 parameters at rate 0.01
DELTA = 1e-5


def run(
    world: World,
    shares: Sequence[Any],
    noise: float,
    clip: float = CLIP,
    seen: Callable[[Mapping[str, Tensor]], object] = lambda state: None,
) -> Run:
    """Run all rounds with all layers on every client.

    ``seen`` is called with the initial state, and with the state after each round.
    """
    sizes, found, rounds = world.sizes, Run(), Counter[int]()
    model = world.adapted()
    manager, head = LoraLayerManager(model), shared_state(world, model)

    def batches(client: int) -> list[Any]:
        rounds[client] += 1
        spec = client_spec(world, shares[client], client, rounds[client])
        return [(trimmed(x), y) for x, y in spec.batches]

    def evaluate(round: int, arrays: ArrayRecord) -> MetricRecord:
        state = from_arrays(arrays)
        seen(state)
        load_state(manager, head, state)
        if round:
            found.right.append(right(model, world.testing))
            found.accuracy.append(found.right[-1].float().mean().item())
        return MetricRecord({})

    strategy = LoraStrategy(
        HLA("uniform", sizes.blocks, kind="gd"),  # all layers, since clients have no capability
        upload="value",
        send_frozen=False,
        weighted_by=None,
        shared=tuple(head),
        fraction_train=sizes.per_round / sizes.clients,
        seed=world.seed,
    )
    private = DifferentialPrivacyClientSideFixedClipping(strategy, noise, clip, sizes.per_round)
    app = make_client_app(world.adapted, batches, mods=[fixedclipping_mod])
    start = to_arrays({**manager.state_slice(), **head})
    grid, config = LocalGrid(app, sizes.clients), ConfigRecord({"lr": sizes.lr})
    logging.getLogger("flwr").setLevel(logging.WARNING)  # Flower logs every round.
    np.random.seed(world.seed)  # Flower draws the noise from NumPy's global generator
    private.start(grid, start, sizes.rounds, train_config=config, evaluate_fn=evaluate)
    found.comm = strategy.comm
    return found


def epsilon(world: World, noise: float) -> float:
    """Return the epsilon of a client's participation at delta 1e-5."""
    if not noise:
        return float("inf")
    from opacus.accountants import RDPAccountant

    accountant, sizes = RDPAccountant(), world.sizes
    for _ in range(sizes.rounds):
        rate = sizes.per_round / sizes.clients
        accountant.step(noise_multiplier=noise, sample_rate=rate)
    return accountant.get_epsilon(DELTA)
