"""from_peft with models that mix adapters per token: PEFT's X-LoRA and Arrow."""

from pathlib import Path
from typing import Any

import pytest
from peft.tuners.lora import LoraLayer
from peft.tuners.xlora import layer as xlora_layer
from routed_models import arrow, expert_folders, xlora
from same_steps import tokens

import lora_ext
from lora_ext.interop.peft import report


def lora_layers(model: Any) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, LoraLayer)]


@pytest.mark.parametrize("make", [xlora, arrow])
def test_report_names_every_layer_once(make: Any, tmp_path: Path) -> None:
    model = lora_ext.from_peft(make(expert_folders(tmp_path)))
    found = report(model)
    assert sorted([*found.taken, *found.left]) == sorted(lora_layers(model))


def test_report_says_which_layers_peft_computes(tmp_path: Path, monkeypatch: Any) -> None:
    calls: list[str] = []
    names: dict[int, str] = {}
    forward = xlora_layer.XLoraLinearLayer.forward

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(names[id(self.target)])
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(xlora_layer.XLoraLinearLayer, "forward", counted)
    model = lora_ext.from_peft(xlora(expert_folders(tmp_path)))
    names.update((id(m), n) for n, m in model.named_modules() if isinstance(m, LoraLayer))
    model(input_ids=tokens())
    assert set(calls) == set(report(model).left)
