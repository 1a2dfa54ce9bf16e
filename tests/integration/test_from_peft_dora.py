"""New DoRA adapters in ``from_peft`` change no bit, and norms are cached as in PEFT."""

import copy
from typing import Any

import peft
import peft.helpers
import pytest
import torch
from same_steps import logits, tokens
from tiny import make_model, make_peft
from torch import Tensor, nn

import lora_ext
from lora_ext.interop.peft import report
from lora_ext.interop.peft._layers import FusedLinear

caching = pytest.mark.skipif(
    not hasattr(peft.helpers, "DoraCaching"), reason="PEFT 0.18 does not cache the norms of DoRA"
)
DTYPES = [torch.float32, torch.float64, torch.bfloat16]


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "bert"])
def test_fresh_adapter_is_bitwise_the_identity(
    family: str, dtype: torch.dtype, training: bool
) -> None:
    torch.manual_seed(0)
    base: Any = make_model(family).to(dtype).eval()
    expected = logits(base)
    targets = {"gpt2": ["c_attn", "c_fc"], "bert": ["query", "dense"]}.get(
        family, ["q_proj", "o_proj"]
    )
    config = peft.LoraConfig(r=4, use_dora=True, target_modules=targets)
    model: Any = peft.get_peft_model(base, config, autocast_adapter_dtype=False)
    theirs = logits(model.eval())
    lora_ext.from_peft(model)
    assert report(model).taken and not report(model).left
    if training:
        for module in model.modules():
            if isinstance(module, FusedLinear):  # Dropout in the rest of the model stays off.
                module.train()
    assert torch.equal(theirs, expected)
    assert torch.equal(logits(model), expected)


def test_fresh_adapter_beside_a_trained_one_is_the_identity_on_its_rows() -> None:
    fields = {"r": 4, "target_modules": ["q_proj", "down_proj"], "use_dora": True}
    model: Any = make_peft(make_model("llama"), {"trained": fields})
    torch.manual_seed(1)
    model.add_adapter("fresh", peft.LoraConfig(**fields))
    lora_ext.from_peft(model)
    with torch.no_grad():
        with model.disable_adapter():
            base = logits(model)
        names = ["fresh", "trained", "fresh", "__base__", "trained"]
        found = model(input_ids=tokens(), adapter_names=names).logits
    assert torch.equal(found[[0, 2]], base[[0, 2]])
    assert (found[[1, 4]] - base[[1, 4]]).abs().max() > 0.1


def caches(model: nn.Module) -> list[dict[str, Tensor]]:
    return [m._dora_cache for m in model.modules() if hasattr(m, "_dora_cache")]


@caching
def test_norms_are_cached_only_while_dora_caching_is_on() -> None:
    fields = {"r": 4, "target_modules": ["q_proj", "down_proj"], "use_dora": True}
    model: Any = lora_ext.from_peft(make_peft(make_model("llama"), {"red": fields})).eval()
    plain = logits(model)
    assert not any(caches(model))
    with peft.helpers.DoraCaching():
        first, second = logits(model), logits(model)
        assert all(caches(model))
        kept = [{k: id(v) for k, v in c.items()} for c in caches(model)]
        logits(model)
        assert kept == [{k: id(v) for k, v in c.items()} for c in caches(model)]
    assert torch.equal(first, plain) and torch.equal(second, plain)
    assert torch.equal(logits(model), plain)
    assert not any(caches(model))  # As in PEFT, the next forward clears the cache.


@caching
def test_next_forward_uses_the_cached_norm() -> None:
    fields = {"r": 4, "target_modules": ["q_proj"], "use_dora": True}
    model: Any = lora_ext.from_peft(make_peft(make_model("llama"), {"red": fields})).eval()
    plain = logits(model)
    with peft.helpers.DoraCaching():
        logits(model)
        for cache in caches(model):
            for norm in cache.values():
                norm.mul_(2.0)
        assert (logits(model) - plain).abs().max() > 0.01
        model.train()  # This clears the cache immediately.
        assert not any(caches(model))
        assert torch.equal(logits(model), plain) and not any(caches(model))


@caching
def test_cache_changes_nothing_for_an_adapter_run_by_peft() -> None:
    fields = {"r": 4, "target_modules": ["q_proj"], "use_dora": True}
    theirs: Any = make_peft(make_model("llama"), {"red": fields}).eval()
    ours: Any = lora_ext.from_peft(copy.deepcopy(theirs))
    with peft.helpers.DoraCaching():
        for model in (theirs, ours):
            logits(model)
        for found, expected in zip(caches(ours), caches(theirs), strict=True):
            key = "weight-norm-red"
            torch.testing.assert_close(found[key], expected[key])
