"""LoraLinear on every backend of the ops, compared with plain torch: forward, gradients, masks."""

import sys

import pytest
import torch
from backends import Backend
from peft_layers import CLOSE
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lora_ext
from lora_ext.nn import LoraLinear, lora_forward
from lora_ext.reference.lora_train import dropout_keep

NAMES = ["b", None, "a", "c", "b"]


def layer(device: str, **settings) -> LoraLinear:
    torch.manual_seed(0)
    made = LoraLinear(nn.Linear(40, 24), "a", r=4, init_lora_weights=False, **settings)
    made.add_adapter("b", r=8, lora_alpha=4, init_lora_weights=False, **settings)
    made.add_adapter("c", r=3, use_dora=True, init_lora_weights=False)
    return made.to(device).requires_grad_()


def formula(made: LoraLinear, x: Tensor, names: list[str | None], dropped: Tensor) -> Tensor:
    rows = []
    for row, name in enumerate(names):
        y = made.base_layer(x[row])
        if name is not None:
            f = made.factors(name)
            update = f.scaling * (dropped[row] @ f.a.T) @ f.b.T
            if made.use_dora[name]:
                norm = (made.weight + f.scaling * f.b @ f.a).norm(dim=1).detach()
                scale = made.lora_magnitude_vector[name].weight / norm
                y = scale * (y - made.bias + update) + made.bias
            else:
                y = y + update
        rows.append(y)
    return torch.stack(rows)


def gradients(y: Tensor, dy: Tensor, made: LoraLinear, x: Tensor) -> dict[str, Tensor]:
    named = {"x": x, **dict(made.named_parameters())}
    found = torch.autograd.grad(y, list(named.values()), dy, allow_unused=True)
    return {name: g for name, g in zip(named, found, strict=True) if g is not None}


@pytest.mark.parametrize("names", [["a"] * 5, NAMES], ids=["one adapter", "mixed"])
def test_layers_equal_the_formula(backend: Backend, names):
    made = layer(backend.device)
    x = torch.randn(5, 2, 40, device=backend.device, requires_grad=True)
    dy = torch.randn(5, 2, 24, device=backend.device)
    made.set_adapter("a")
    made.requires_grad_()  # Parameters of inactive adapters also require gradients.
    y = made(x) if names == ["a"] * 5 else made(x, names)
    expected = formula(made, x, names, x)
    torch.testing.assert_close(y, expected, **CLOSE)
    torch.testing.assert_close(
        gradients(y, dy, made, x), gradients(expected, dy, made, x), rtol=1e-5, atol=1e-4
    )


def test_dropout_equals_the_mask_of_its_seed(backend: Backend, monkeypatch):
    made = layer(backend.device, lora_dropout=0.25)
    x = torch.randn(5, 40, device=backend.device, requires_grad=True)
    dy = torch.randn(5, 24, device=backend.device)
    names = ["b", None, "a", "a", "b"]
    seed = torch.tensor([2**40 + 5], device=backend.device)
    module = sys.modules[lora_forward.__module__]
    monkeypatch.setattr(module, "draw_seed", lambda device: seed)
    keep = dropout_keep(5, 40, 0.25, seed).to(backend.device)
    y = made(x, names)
    expected = formula(made, x, names, torch.where(keep, x / 0.75, 0))
    torch.testing.assert_close(y, expected, **CLOSE)
    torch.testing.assert_close(
        gradients(y, dy, made, x), gradients(expected, dy, made, x), rtol=1e-5, atol=1e-4
    )


def test_checkpoint_recomputes_with_the_same_rows_and_masks(backend: Backend):
    made = layer(backend.device, lora_dropout=0.25)
    x = torch.randn(5, 40, device=backend.device, requires_grad=True)
    dy = torch.randn(5, 24, device=backend.device)
    found = []
    for run in (made, lambda x: checkpoint(made, x, use_reentrant=False)):
        torch.manual_seed(3)
        with lora_ext.adapters(["b", None, "a", "b", "b"]):
            found.append(gradients(run(x), dy, made, x))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)
