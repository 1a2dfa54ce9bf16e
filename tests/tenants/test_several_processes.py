"""Eight tenants that train adapters of a tiny Llama in two processes, compared with training
alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from data_parallel import WAYS, assert_same, trained
from processes import TwoProcesses
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import lora_ext
from lora_ext.nn import wrap

BOUND = 1e-6  # relative to the largest change; Llama's angles and norms are in float32
TENANTS = [f"tenant{i}" for i in range(8)]
#: Tenant of each row. The first process has the rows 0 to 3. No tenant has rows in both processes.
SPREADS = {
    "one row each": [5, 0, 3, 6, 1, 7, 2, 4],
    "some without": [2, 2, 2, 0, 7, 7, 5, 5],
}
VOCAB = 97
ROWS = torch.randint(0, VOCAB, (8, 7), generator=torch.Generator().manual_seed(2))


def make() -> Any:
    """Return a model with eight trainable adapters of different ranks."""
    torch.manual_seed(0)
    sizes: Any = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = LlamaConfig(vocab_size=VOCAB, num_attention_heads=2, eos_token_id=None, **sizes)
    model: Any = LlamaForCausalLM(config).eval().double()
    for i, name in enumerate(TENANTS):
        modules = ["q_proj", "down_proj"] if i % 2 else ["q_proj", "v_proj", "gate_proj"]
        wrap(model, lora_ext.LoraConfig(r=1 + i, target_modules=modules), name)
    generator = torch.Generator().manual_seed(3)
    for key, parameter in model.named_parameters():
        if "lora_" in key:
            parameter.requires_grad_(True)
            nn.init.normal_(parameter, std=0.1, generator=generator)
    return model


def step(rank: int | None, way: str | None, spread: list[int]) -> dict[str, Tensor]:
    """Return the parameters of all tenants after a training step in one of two processes or, if
    ``rank`` is None, in a single process with all rows."""
    model = make()
    own = slice(None) if rank is None else slice(rank * 4, rank * 4 + 4)
    names = [TENANTS[i] for i in spread[own]]

    def loss(wrapped: nn.Module) -> Tensor:
        with lora_ext.adapters(names):
            return wrapped(input_ids=ROWS[own], labels=ROWS[own], use_cache=False).loss

    return trained(model, way, model.model.layers, loss)


def alone(tenant: int, spread: list[int]) -> dict[str, Tensor]:
    """Return the parameters of a tenant after a training step with its rows only, weighted as in
    the whole batch."""
    model, rows = make(), [k for k, i in enumerate(spread) if i == tenant]

    def loss(wrapped: nn.Module) -> Tensor:
        with lora_ext.adapters([TENANTS[tenant]] * len(rows)):
            mean = wrapped(input_ids=ROWS[rows], labels=ROWS[rows], use_cache=False).loss
        return mean * len(rows) / len(spread)

    found = trained(model, None, [], loss)
    return {key: value for key, value in found.items() if f".{TENANTS[tenant]}." in f".{key}."}


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS[:2])
@pytest.mark.parametrize("case", SPREADS)
def test_training_on_two_processes_equals_one_process_and_each_tenant_alone(
    way: str, case: str, two_processes: TwoProcesses
) -> None:
    spread = SPREADS[case]
    start = {k: p.detach().clone() for k, p in make().named_parameters() if p.requires_grad}
    found, other = two_processes.run(step, way, spread)
    assert all(torch.equal(found[key], other[key]) for key in found)
    assert_same(found, step(None, None, spread), start, BOUND)
    for tenant, name in enumerate(TENANTS):
        keys = [key for key in start if f".{name}." in f".{key}."]
        if tenant in spread:
            mine = alone(tenant, spread)
            assert mine.keys() == set(keys)
            assert_same({k: found[k] for k in keys}, mine, {k: start[k] for k in keys}, BOUND)
        else:
            assert all(torch.equal(found[key], start[key]) for key in keys)
