"""The benchmark of federated clients checks results before timing; a round copies no base
weight."""

from collections import OrderedDict

import pytest
import torch
from torch import nn

pytest.importorskip("peft", reason="the benchmark compares with peft")
import federated_clients
from federated_clients import Case

from lora_ext.federated import BatchedClients, ClientSpec, LayerPlan, LoraLayerManager
from lora_ext.nn import LoraLinear

SMALL = [
    Case(3, 2, 16),
    Case(3, 2, 16, llama=True),
    Case(4, 1, 16, llama=True, depths=True),
]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:There is a performance drop", "ignore::FutureWarning")
@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_every_provider_is_checked_and_timed(monkeypatch: pytest.MonkeyPatch, case: Case) -> None:
    monkeypatch.setattr(federated_clients, "STEPS", 2)
    rows = list(federated_clients.measure(case, "cpu", rounds=1))
    timed = [row["provider"] for row in rows if row["unit"] == "ms"]
    others = ["no staircase", "loop", "peft"] if case.depths else ["loop", "peft", "vmap"]
    assert timed == ["lora_ext", *others]
    assert all(row["worst_error"] <= 1 for row in rows if row["unit"] == "ms")
    assert all(row["median"] > 0 for row in rows)


def test_changes_that_are_slightly_wrong_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(federated_clients, "STEPS", 2)
    providers = federated_clients.Problem.providers

    def wrong(problem: federated_clients.Problem):
        found = providers(problem)
        peft = found["peft"]()
        next(iter(peft[1].values())).view(-1)[0] += 1e-8
        return {**found, "peft": lambda: peft}

    monkeypatch.setattr(federated_clients.Problem, "providers", wrong)
    with pytest.raises(SystemExit, match="3 clients x 2, d = 16: peft: changes are off by"):
        federated_clients.check(SMALL[0], "cpu")


def test_round_copies_no_weight_of_the_base() -> None:
    width, clients = 512, 4
    linears = [nn.Linear(width, width).requires_grad_(False) for _ in range(3)]
    layers = [LoraLinear(linear, r=1, init_lora_weights=False) for linear in linears]
    model = nn.Sequential(OrderedDict(layers=nn.Sequential(*layers)))
    state = LoraLayerManager(model).state_slice()
    data = [(torch.randn(2, width), torch.zeros(2, dtype=torch.long)) for _ in range(3)]
    specs = [ClientSpec(k, data, lr=0.1) for k in range(clients)]
    batched = BatchedClients(model, specs)

    def run() -> None:
        batched.run_round([LayerPlan((0, 1, 2))] * clients, state)

    weight = 4 * width * width
    factors = 3 * 2 * 4 * width  # bytes per client
    peak = federated_clients.peak_bytes(run)
    assert peak < weight / 2
    assert peak > 4 * clients * factors  # values, gradients, two AdamW moments
