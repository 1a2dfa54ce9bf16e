"""``Swap`` replaces modules and restores the original objects, either all or none."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lora_ext.nn import Swap


class Doubled(nn.Module):
    """Module that doubles the output of another module."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * self.inner(x)


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 3), nn.ModuleDict({"a": nn.Linear(3, 3)}), nn.Linear(3, 3))


def swapped(m: nn.Module, *names: str) -> Swap:
    return Swap(m, {name: Doubled(m.get_submodule(name)) for name in names}, "double")


def test_modules_are_replaced_and_restored_in_their_order():
    m = model()
    before = dict(m.named_modules())
    swap = swapped(m, "1.a", "2")
    assert isinstance(m[2], Doubled) and isinstance(m.get_submodule("1.a"), Doubled)
    assert m.get_submodule("1.a.inner") is swap.originals["1.a"] is before["1.a"]
    swap.restore(m, "single")
    after = dict(m.named_modules())
    assert list(after) == list(before)
    assert all(after[name] is module for name, module in before.items())


def test_module_with_two_names_is_replaced_under_the_given_name():
    m = model()
    m.register_module("tied", m[0])
    swap = swapped(m, "0")
    assert isinstance(m[0], Doubled) and m.tied is swap.originals["0"]
    swap.restore(m, "single")
    assert m.tied is m[0]


def test_module_of_two_parents_is_replaced_for_both():
    shared = nn.Sequential(nn.Linear(3, 3))
    m = nn.ModuleDict({"left": shared, "right": shared})
    swap = swapped(m, "left.0")
    assert m["right"][0] is m["left"][0] is swap.placed["left.0"]
    swap.restore(m, "single")
    assert m["right"][0] is swap.originals["left.0"]


def test_unknown_name_leaves_the_model_unchanged():
    m = model()
    before = dict(m.named_modules())
    for name in ("7", "1.b", "0.weight", ""):
        with pytest.raises(ValueError, match=rf"double: '{name}': expected the name of a submod"):
            Swap(m, {"2": Doubled(m[2]), name: nn.Identity()}, "double")
        assert dict(m.named_modules()) == before


def test_module_replaced_by_another_caller_stops_the_restore():
    m = model()
    swap = swapped(m, "1.a", "2")
    theirs = m[2] = nn.Linear(3, 3)
    with pytest.raises(
        RuntimeError, match=r"single: 2: expected the layer that double has ins.*, found Linear"
    ):
        swap.restore(m, "single")
    assert m.get_submodule("1.a") is swap.placed["1.a"] and m[2] is theirs
    m[2] = Doubled(theirs)
    with pytest.raises(RuntimeError, match=r"single: 2: .* found another Doubled"):
        swap.restore(m, "single")
    del m[2]
    with pytest.raises(RuntimeError, match=r"single: 2: .* found nothing"):
        swap.restore(m, "single")


def test_copy_of_the_model_restores_its_own_modules():
    m = model()
    m.__dict__["swap"] = swapped(m, "0")
    copied = copy.deepcopy(m)
    inner = copied[0].inner
    copied.__dict__["swap"].restore(copied, "single")
    assert copied[0] is inner and inner is not m[0].inner
    assert isinstance(m[0], Doubled)
