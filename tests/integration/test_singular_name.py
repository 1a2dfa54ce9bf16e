"""``adapter_name=`` where ``adapter_names=`` is meant: a model would swallow it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
from tiny import make_model, make_pair, tokens

import lora_ext

MESSAGE = "expected adapter_names=.* found adapter_name='red'"
GREEDY: dict[str, Any] = {"max_new_tokens": 2, "do_sample": False}


def test_an_attached_model_names_the_argument_that_is_meant(tmp_path: Path) -> None:
    model, _, _ = make_pair("llama", tmp_path)
    ids = tokens(2, 3)
    for call in (model, model.model, model.forward):
        with pytest.raises(TypeError, match=f"forward: {MESSAGE}"):
            call(ids, adapter_name="red")
    with pytest.raises(TypeError, match=f"generate: {MESSAGE}"):
        model.generate(ids, adapter_name="red", **GREEDY)
    with pytest.raises(TypeError, match=f"generate_batch: {MESSAGE}"):
        model.generate_batch(ids.tolist(), adapter_name="red")
    with lora_ext.adapters("red"), pytest.raises(TypeError, match=MESSAGE):
        model(ids, adapter_name="red")


def test_a_model_of_from_peft_does_too() -> None:
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
    model: Any = lora_ext.from_peft(peft.get_peft_model(make_model("llama"), config, "red"))
    ids = tokens(2, 3)
    with pytest.raises(TypeError, match=f"from_peft: {MESSAGE}"):
        model(ids, adapter_name="red")
    with pytest.raises(TypeError, match=f"from_peft: {MESSAGE}"):
        model.generate(input_ids=ids, adapter_name="red", **GREEDY)
    with pytest.raises(TypeError, match=f"generate_batch: {MESSAGE}"):
        model.generate_batch(ids.tolist(), adapter_name="red")
