"""PEFT adapters per row, trained by two processes on different rows, learn as in one process."""

from typing import Any

import mixtures
import pytest
import tiny
import torch
from data_parallel import WAYS, assert_same, trained
from processes import TwoProcesses
from torch import Tensor, nn

import lora_ext

NAMES = ["red", "red", "green", "blue"]
_DORA = {n: {**c, "use_dora": n != "red"} for n, c in tiny.CONFIGS["llama"].items()}


def make(kind: str) -> Any:
    if kind == "experts":
        model: Any = mixtures.make_peft(mixtures.make_mixture("qwen3"), mixtures.CONFIGS)
    else:
        configs = _DORA if kind == "dora" else tiny.CONFIGS["llama"]
        model = tiny.make_peft(tiny.make_model("llama"), configs)
    model = lora_ext.from_peft(model.train())
    model.set_requires_grad(["red", "green", "blue"])
    if kind == "checkpoints":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def step(
    rank: int | None, way: str | None, kind: str, names: list[str], seeds: int = 0
) -> dict[str, Tensor]:
    model = make(kind)
    rows = tiny.tokens(len(names), 6, seeds) % (mixtures.VOCAB - 2) + 2
    own = slice(None) if rank is None else slice(rank * 2, rank * 2 + 2)

    def loss(wrapped: nn.Module) -> Tensor:
        return wrapped(input_ids=rows[own], labels=rows[own], adapter_names=names[own]).loss

    return trained(model, way, model.base_model.model.model.layers, loss)


def check(
    two: TwoProcesses, way: str, kind: str, names: list[str] | None = None, bound: float = 1e-4
) -> None:
    names = NAMES if names is None else names
    start = {k: p.detach().clone() for k, p in make(kind).named_parameters() if p.requires_grad}
    found, other = two.run(step, way, kind, names)
    assert all(torch.equal(found[key], other[key]) for key in found)
    assert_same(found, step(None, None, kind, names), start, bound)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["linears", "dora", "experts", "checkpoints"])
def test_peft_adapters_learn_on_two_processes_as_on_one(
    kind: str, way: str, two_processes: TwoProcesses
) -> None:
    check(two_processes, way, kind)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "names", [["green", "red", "red", "green"], ["__base__", "__base__", "blue", "red"]]
)
def test_names_may_be_in_any_order_and_beside_base_rows(
    names: list[str], way: str, two_processes: TwoProcesses
) -> None:
    check(two_processes, way, "linears", names)


def _refused(rank: int) -> str:
    fields = {"r": 4, "target_modules": ["embed_tokens", "q_proj"]}
    model = lora_ext.from_peft(tiny.make_peft(tiny.make_model("llama"), {"red": fields}).train())
    model.set_requires_grad(["red"])
    with pytest.raises(NotImplementedError) as caught:
        model(input_ids=tiny.tokens(2, 3), adapter_names=["red", "red"])
    return str(caught.value)


def test_error_for_layers_run_by_peft_names_them(two_processes: TwoProcesses) -> None:
    for found in two_processes.run(_refused):
        assert found.startswith("from_peft: adapter_names: expected lora_ext to run")
        assert "embed_tokens" in found
