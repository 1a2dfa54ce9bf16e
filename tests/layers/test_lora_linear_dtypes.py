"""LoraLinear in 16 bits, under autocast and in float64: its errors are at most PEFT's."""

import copy

import pytest
import torch
from peft_layers import assert_as_exact, peft_layer
from torch import nn

from lora_ext.nn import LoraLinear

KINDS = {
    "plain": [{}],
    "several": [{}, {"r": 2, "use_rslora": True}],
    "dora": [{"use_dora": True}],
    "dora, plain": [{"use_dora": True}, {"r": 2}],
}


def pair(kind: str, dtype: torch.dtype, adapter_dtype: torch.dtype):
    torch.manual_seed(0)
    base = nn.Linear(24, 17, dtype=dtype)
    theirs = peft_layer(copy.deepcopy(base), *KINDS[kind])
    common = {"r": 4, "lora_alpha": 6, "init_lora_weights": False, "adapter_dtype": adapter_dtype}
    ours = LoraLinear(base, "0", **{**common, **KINDS[kind][0]})
    for i, s in enumerate(KINDS[kind][1:], 1):
        ours.add_adapter(str(i), **{**common, **s})
    ours.set_adapter([str(i) for i in range(len(KINDS[kind]))])
    for store in (theirs.lora_A, theirs.lora_B, theirs.lora_magnitude_vector):
        store.to(adapter_dtype)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("adapter_dtype", [torch.float32, None], ids=["float32 adapter", "same"])
def test_sixteen_bit_layers_are_as_exact_as_peft(kind, dtype, adapter_dtype):
    ours, theirs = pair(kind, dtype, dtype if adapter_dtype is None else adapter_dtype)
    x = torch.randn(2, 3, 24, dtype=dtype, requires_grad=True)
    assert_as_exact(ours, ours, theirs, x, torch.finfo(dtype).eps)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
def test_autocast_is_as_exact_as_peft(kind, base):
    ours, theirs = pair(kind, base, torch.float32)
    x = torch.randn(2, 3, 24, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert_as_exact(ours, ours, theirs, x, torch.finfo(torch.bfloat16).eps)


@pytest.mark.parametrize("kind", KINDS)
def test_float64_equals_peft(kind):
    ours, theirs = pair(kind, torch.float64, torch.float64)
    x = torch.randn(5, 24, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-12, atol=1e-12)
