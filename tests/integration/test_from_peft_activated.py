"""``from_peft`` of models with activated adapters: fused layers compared with PEFT's."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from activated import NAMES, activated_configs, activated_pair, prompts
from tiny import adapted, make_model

import lora_ext
from lora_ext.interop.peft import model as taken
from lora_ext.interop.peft._names import activated

GREEDY: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}


def made() -> Any:
    return adapted(make_model("llama"), activated_configs(), 0.3)


@pytest.fixture
def pair() -> Iterator[Any]:
    ours = lora_ext.from_peft(made())
    assert not taken.report(ours).left
    yield ours, made()


def test_forwards_and_generate_equal_peft(pair: Any) -> None:
    ids = prompts()
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    with torch.no_grad():
        for how in ({}, {"adapter_names": NAMES}, {"adapter_names": NAMES, "attention_mask": mask}):
            ours, theirs = (model(input_ids=ids, **how).logits for model in pair)
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
            ours, theirs = (model.generate(input_ids=ids, **how, **GREEDY) for model in pair)
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("named", [False, True])
def test_training_with_checkpoints_and_several_forwards(pair: Any, named: bool) -> None:
    ids = torch.stack([prompts(seed=seed) for seed in range(2)])
    names = NAMES if named else None
    found = []
    for model in (pair[0], pair[0], pair[1]):
        model.zero_grad()
        checkpoints = len(found) == 0
        model.train()
        model.set_adapter("act")
        if named:
            model.set_requires_grad(["act", "other", "plain"])
        if model is pair[1]:
            model.eval()  # PEFT accepts names only in evaluation; there is no dropout.
        toggle = (
            "gradient_checkpointing_enable" if checkpoints else "gradient_checkpointing_disable"
        )
        getattr(model, toggle)()
        if checkpoints:
            model.enable_input_require_grads()
        how = {"adapter_names": names} if named else {}
        # two forward passes before one backward
        outs = [model(input_ids=each, **how).logits for each in ids]
        sum(out.log_softmax(-1)[..., 3].sum() for out in outs).backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    checkpointed, plain, theirs = found
    assert checkpointed.keys() == plain.keys() == theirs.keys()
    for name, gradient in theirs.items():
        size = 2e-5 * max(1.0, float(gradient.abs().max()))
        for ours in (checkpointed, plain):
            torch.testing.assert_close(ours[name], gradient, atol=size, rtol=1e-4)


@pytest.mark.parametrize("how", [{"use_cache": False}, {"prefill_chunk_size": 7}])
def test_generation_that_peft_would_adapt_at_wrong_positions_raises(pair: Any, how: Any) -> None:
    ours, _ = pair
    with pytest.raises(NotImplementedError, match="from_peft: generate: expected use_cache=True"):
        ours.generate(input_ids=prompts()[:1], **GREEDY, **how)
    ours.set_adapter("plain")  # An ordinary adapter applies to all tokens.
    ours.generate(input_ids=prompts()[:1], **GREEDY, **how)


MANY = {"num_beams": 3, "num_return_sequences": 2}


@pytest.mark.parametrize("named", [False, True])
def test_beams_equal_those_of_an_attached_model(tmp_path: Path, named: bool) -> None:
    attached, theirs, _ = activated_pair(tmp_path)
    ours = lora_ext.from_peft(theirs)
    layer = ours.base_model.model.model.layers[0].self_attn.q_proj
    if named and not activated(layer, ["other"]):
        pytest.skip("PEFT 0.18 treats an activated adapter that was added second as ordinary")
    ids, names = prompts(), NAMES if named else ["act"] * 4
    with lora_ext.adapters(names, input_ids=ids):
        wanted = attached.generate(input_ids=ids, **MANY, **GREEDY)
    ours.set_adapter("act")
    how = {"adapter_names": names} if named else {}
    assert torch.equal(ours.generate(input_ids=ids, **how, **MANY, **GREEDY), wanted)
    if not named:  # PEFT repeats names only for the argument num_beams.
        config = transformers.GenerationConfig(**MANY, **GREEDY)
        assert torch.equal(ours.generate(input_ids=ids, generation_config=config), wanted)


def test_beams_of_the_model_config_and_wrong_offsets_raise(pair: Any) -> None:
    ours, _ = pair
    ours.base_model.model.generation_config.num_beams = 2
    with pytest.raises(NotImplementedError, match="from_peft: generate: expected num_beams"):
        ours.generate(input_ids=prompts(), **GREEDY)
    ours.generate(input_ids=prompts(), num_beams=2, **GREEDY)
    message = "from_peft: alora_offsets: expected one per row, for 4 rows, found 8"
    with pytest.raises(ValueError, match=message):
        ours(input_ids=prompts(), alora_offsets=[1] * 8)
