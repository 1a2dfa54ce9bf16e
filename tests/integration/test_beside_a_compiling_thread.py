"""Layers and ops give the usual results and errors while another thread compiles.

Meanwhile, ``torch.compiler.is_compiling()`` is true in all threads.
"""

import threading
from collections.abc import Callable, Iterator
from typing import Any

import mixtures
import pytest
import torch
from tiny import VOCAB, make_model, make_peft
from torch import Tensor, nn

import lora_ext
from lora_ext import ops
from lora_ext.methods.mtpc._shortlist import checkable
from lora_ext.nn import LoraLinear
from lora_ext.ops._grouped_mm import grouped_mm
from lora_ext.rows._rows import rows_of


@pytest.fixture
def compiling() -> Iterator[None]:
    """Keep another thread inside torch.compile until the test ends."""
    inside, leave = threading.Event(), threading.Event()

    def backend(graph: Any, inputs: Any) -> Callable[..., Any]:
        inside.set()
        assert leave.wait(60)
        return graph.forward

    thread = threading.Thread(
        target=torch.compile(torch.sin, backend=backend), args=(torch.ones(3),)
    )
    thread.start()
    assert inside.wait(60)
    assert torch.compiler.is_compiling(), "expected is_compiling() to be true in this thread"
    yield
    leave.set()
    thread.join()


def test_ids_are_checked_and_products_are_correct(compiling: None) -> None:
    with pytest.raises(ValueError, match="adapter_ids"):
        rows_of(torch.tensor([0, 5]), 2)
    assert rows_of(torch.tensor([1, 1]), 2).used == (1,)
    x, weight = torch.randn(3, 4), torch.randn(2, 4, 5)
    y = grouped_mm(x, weight, torch.tensor([1, 3], dtype=torch.int32))
    torch.testing.assert_close(y, torch.cat([x[:1] @ weight[0], x[1:] @ weight[1]]))
    assert checkable(torch.ones(1))


@torch.no_grad()
def test_op_without_forward_mode_derivative_raises_for_tangents(compiling: None) -> None:
    x, a, b = torch.randn(3, 4), torch.randn(2, 2, 4), torch.randn(2, 5, 2)
    with pytest.raises(NotImplementedError, match="lora_apply has no forward-mode derivative"):
        torch.func.jvp(lambda x: ops.lora_apply(x, a, b, torch.tensor([0, 1, 1])), (x,), (x,))


def test_several_active_and_merged_adapters_and_experts_work(compiling: None) -> None:
    layer = LoraLinear(nn.Linear(6, 5), "default", 2, init_lora_weights=False).requires_grad_(False)
    layer.add_adapter("other", 3, init_lora_weights=False)
    layer.set_adapter(["default", "other"], inference_mode=True)
    elsewhere = LoraLinear(nn.Linear(6, 5), "red", 2)
    x = torch.randn(2, 6)
    expected = layer(x)
    model = nn.Linear(2, 2)
    pool = lora_ext.AdapterPool(nn.Sequential(model), max_slots=1, max_rank=8)
    with lora_ext.adapters(None, pool=pool):  # A layer in a compiled graph would use this block.
        assert torch.equal(layer(x), expected)
        layer.merge()
        torch.testing.assert_close(layer(x), expected)
    del elsewhere
    model = mixtures.make_mixture("mixtral")
    pool = lora_ext.AdapterPool(model, max_slots=2, max_rank=8)
    pool.load("red", mixtures.make_peft(model, {"red": {"r": 4}}))
    ids = mixtures.tokens(2, 5)
    lora_ext.attach(model, pool, default="red")
    with torch.no_grad():
        with lora_ext.adapters("red", pool=pool):
            expected = model(ids).logits
        assert torch.equal(model(ids).logits, expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_keeps_its_names(reentrant: bool, compiling: None) -> None:
    """Check that layers look up the names in a recomputation, which does not receive
    ``adapter_names``."""
    configs = {n: {"r": 4, "target_modules": "all-linear"} for n in ("red", "green", "blue")}
    names = ["red", "green", "__base__", "blue", "green"]
    ids = torch.randint(1, VOCAB, (5, 7), generator=torch.Generator().manual_seed(3))

    def gradients(checkpointing: bool) -> dict[str, Tensor]:
        model: Any = make_peft(make_model("llama"), configs).double()
        for layer in model.base_model.model.model.layers:
            layer.self_attn.v_proj.__class__ = type("Other", (type(layer.self_attn.v_proj),), {})
        model = lora_ext.from_peft(model).train()
        model.set_requires_grad(["red", "green", "blue"])
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model(input_ids=ids, adapter_names=names).logits.square().sum().backward()
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    expected, found = gradients(False), gradients(True)
    assert expected.keys() == found.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient)
