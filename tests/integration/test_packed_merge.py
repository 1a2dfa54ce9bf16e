"""PEFT merges into a base whose weights are packed."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import SIZES, enlarged, maker

from lora_ext.nn import pack_linears, packed_bytes

IDS = torch.tensor([[5, 6, 7], [8, 9, 10]])


CHANGES: dict[str, Callable[[Any], Any]] = {
    "merge": lambda model: model.merge_adapter() or model,
    "merge and unmerge": lambda model: merge_and_unmerge(model),
    "merge and unload": lambda model: model.merge_and_unload(),
    "safe merge and unload": lambda model: model.merge_and_unload(safe_merge=True),
}


def merge_and_unmerge(model: Any) -> Any:
    model.merge_adapter()
    logits(model), logits(model)  # the merged weight is packed
    model.unmerge_adapter()
    return model


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(IDS).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_merging_reaches_the_products(change: Callable[[Any], Any], dtype: torch.dtype) -> None:
    base = enlarged(maker("Llama", **SIZES), 1).to(dtype)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    plain: Any = get_peft_model(base, config).eval()
    packed = copy.deepcopy(plain)
    pack_linears(packed.get_base_model())
    adapted, expected = logits(packed), logits(change(plain))
    packed = change(packed)
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    for _ in range(3):
        torch.testing.assert_close(logits(packed), expected, atol=tolerance, rtol=tolerance)
    assert packed_bytes(packed) > 0
    assert (adapted - expected).abs().max() < 0.1
