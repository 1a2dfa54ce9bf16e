"""from_peft on models that accelerate offloads: fused layers, layers left to PEFT, and errors."""

from pathlib import Path
from typing import Any

import accelerate
import peft
import pytest
import torch
from peft.tuners.lora import LoraLayer
from tiny import VOCAB, make_model
from torch import Tensor

import lora_ext
from lora_ext.interop.peft import report

CPU = torch.device("cpu")
CONFIG = {
    "r": 4,
    "lora_alpha": 8,
    "target_modules": ["q_proj", "v_proj", "down_proj"],
    "init_lora_weights": False,
}


def adapted() -> Any:
    torch.manual_seed(0)
    return peft.get_peft_model(make_model("llama"), peft.LoraConfig(**CONFIG))


def step(model: Any) -> dict[str, Tensor]:
    ids = torch.randint(1, VOCAB, (3, 6), generator=torch.Generator().manual_seed(3))
    x = model.get_input_embeddings()(ids).detach().requires_grad_()
    y = model(inputs_embeds=x).logits
    y.square().sum().backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"logits": y.detach(), "inputs": x.grad, **grads}


def test_base_layers_offloaded_after_the_adapters_train_as_in_memory() -> None:
    expected, model = step(adapted()), adapted()
    for layer in list(model.modules()):
        if isinstance(layer, LoraLayer):
            accelerate.cpu_offload(layer.base_layer, execution_device=CPU)
            assert layer.base_layer.weight.is_meta
    lora_ext.from_peft(model)
    assert len(report(model).taken) == 6
    found = step(model)
    assert found.keys() == expected.keys() and len(expected) == 2 + 12
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_adapters_lost_on_an_offloaded_base_raise_with_the_remedy() -> None:
    torch.manual_seed(0)
    model = accelerate.cpu_offload(make_model("llama"), execution_device=CPU)
    model = peft.get_peft_model(model, peft.LoraConfig(**CONFIG))
    kinds = [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match=r"q_proj: .*on meta.*cpu_offload\(layer\.base_layer"):
        lora_ext.from_peft(model)
    assert [type(m) for m in model.modules()] == kinds


def test_offloaded_adapters_stay_with_peft_and_are_listed(
    tmp_path: Path,
) -> None:
    expected, model = adapted(), adapted()
    accelerate.cpu_offload(model, execution_device=CPU)
    with pytest.warns(UserWarning, match=r"found none; PEFT runs 6 of them \(.*hooks.*q_proj"):
        lora_ext.from_peft(model)
    ids = torch.arange(1, 13).view(2, 6)
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, expected(input_ids=ids).logits)
