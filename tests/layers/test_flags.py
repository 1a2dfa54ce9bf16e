"""Boolean arguments: values other than bools raise, because "no" would count as True."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import lora_ext
from lora_ext.adapter import LoraAdapter
from lora_ext.nn import LayerGroups, LoraConfig, LoraLinear, adapted_layers, set_active, wrap


def model() -> nn.Module:
    return nn.ModuleDict({"up": nn.Linear(4, 8), "down": nn.Linear(8, 4)})


def adapter() -> LoraAdapter:
    return LoraAdapter.from_model(wrap(model(), LoraConfig()))


def attach(**flags: Any) -> object:
    base = model()
    return lora_ext.attach(base, lora_ext.AdapterPool(base, 1, 8), **flags)


def in_pool(method: str, *flags: Any) -> object:
    pool = lora_ext.AdapterPool(model(), 1, 8)
    if method == "update":
        pool.load("a", adapter())
    given = [{"a": adapter()}] if method == "prefetch" else ["a", adapter()]
    return getattr(pool, method)(*given, *flags)


def some_layer() -> nn.Module:
    return next(iter(adapted_layers(wrap(model(), LoraConfig())).values()))


def linear(**flags: Any) -> None:
    LoraLinear(nn.Linear(4, 8)).add_adapter("a", 2, **flags)


CALLS: list[tuple[str, Callable[[Any], object]]] = [
    ("attach: fuse_siblings", lambda flag: attach(fuse_siblings=flag)),
    ("attach: overlap", lambda flag: attach(overlap=flag)),
    ("AdapterPool.load: strict", lambda flag: in_pool("load", flag)),
    ("AdapterPool.update: strict", lambda flag: in_pool("update", flag)),
    ("AdapterPool.prefetch: strict", lambda flag: in_pool("prefetch", flag)),
    ("LoraAdapter.load: strict", lambda flag: LoraAdapter.load((adapter().config, {}), flag)),
    (
        "wrap: autocast_adapter_dtype",
        lambda f: wrap(model(), LoraConfig(), autocast_adapter_dtype=f),
    ),
    ("set_active: active", lambda flag: set_active(some_layer(), "default", flag)),
    ("set_active: training_only", lambda f: set_active(some_layer(), "default", True, f)),
    (
        "LayerGroups: training_only",
        lambda flag: LayerGroups(wrap(model(), LoraConfig())).set_mask([True, True], flag),
    ),
    *(
        (f"add_adapter: {name}", lambda flag, name=name: linear(**{name: flag}))
        for name in ("use_rslora", "use_dora", "lora_bias", "preserve_base_output")
    ),
]


@pytest.mark.parametrize(("argument", "call"), CALLS, ids=[argument for argument, _ in CALLS])
def test_flag_that_is_not_a_bool_raises(argument: str, call: Callable[[Any], object]) -> None:
    for value in ("no", 1, None, torch.tensor(1), torch.tensor([True]), np.array([True])):
        with pytest.raises(TypeError, match=rf"^{argument}: expected True or False, found "):
            call(value)


@pytest.mark.parametrize("value", ["no", 1, 3, torch.tensor(1), np.array([True])])
def test_pack_base_that_is_not_a_choice_raises(value: Any) -> None:
    with pytest.raises(TypeError, match=r"^attach: pack_base: expected True, False, None, 8 or 4"):
        attach(pack_base=value)


def test_flags_from_arrays_are_accepted() -> None:
    layer: Any = some_layer()
    for parameter in layer.parameters():
        nn.init.ones_(parameter)
    x = torch.ones(1, 4)
    for on in (True, False):
        for value in (torch.tensor(on), np.bool_(on)):
            set_active(layer, "default", not on)
            set_active(layer, "default", value)  # pyright: ignore[reportArgumentType]
            assert torch.equal(layer(x), layer.get_base_layer()(x)) is not on


def test_overlap_is_deprecated_and_has_no_effect() -> None:
    with pytest.warns(DeprecationWarning, match="attach: overlap has no effect") as found:
        attached: Any = attach(overlap=True)
    assert found[0].filename == __file__  # The warning names the caller's line.
    lora_ext.detach(attached)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attach(overlap=False)
