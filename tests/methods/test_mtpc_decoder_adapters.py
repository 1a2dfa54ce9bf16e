"""`SpeculativeDecoder` in ``adapters`` blocks: unfinished rows keep their adapters."""

from typing import Any

import pytest
import torch
from methods.toy import make_draft, make_model, prompts
from torch import nn

import lora_ext
from lora_ext.nn import LoraLinear, layer_names

NAMES = ["red", None, "blue"]
NEW = 24


def with_pool(**fields: Any) -> tuple[Any, Any]:
    model = make_model("llama")
    generator = torch.Generator().manual_seed(3)
    pool = lora_ext.AdapterPool(model, max_slots=2, max_rank=8, targets=["q_proj", "down_proj"])
    for name in ("red", "blue"):
        state = {}
        for module, spec in pool.index.linear.items():
            stem = f"base_model.model.{module}"
            a = torch.randn(2, spec.in_features, generator=generator, dtype=torch.double)
            state[f"{stem}.lora_A.weight"] = a
            b = torch.randn(spec.out_features, 2, generator=generator, dtype=torch.double)
            state[f"{stem}.lora_B.weight"] = 3 * b
        targets = ["q_proj", "down_proj"]
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": targets}
        config |= fields
        pool.load(name, (config, state))
    return lora_ext.attach(model, pool), pool


def with_layers() -> tuple[Any, Any]:
    model = make_model("llama")
    generator = torch.Generator().manual_seed(3)
    for layer in model.model.layers:
        own = LoraLinear(layer.mlp.down_proj, "red", r=2)
        own.add_adapter("blue", r=2)
        for name in ("red", "blue"):
            for factors in (own.lora_A, own.lora_B):
                nn.init.normal_(factors[name].weight, generator=generator, std=2.0)
        own.set_adapter([])
        layer.mlp.down_proj = own
    return model, layer_names


@pytest.mark.parametrize("window", ["condition", "restart"])
@pytest.mark.parametrize("kind", [with_pool, with_layers])
def test_remaining_rows_keep_their_adapters(kind: Any, window: str) -> None:
    model, pool = kind()
    ids, mask = prompts(3)
    decoder = make_draft(model).decoder(mode="greedy", window=window)
    how: dict[str, Any] = {"max_new_tokens": NEW, "eos_token_id": 3}
    with lora_ext.adapters(NAMES, pool=pool):
        found = decoder.generate(ids, mask, **how)
        with torch.no_grad():
            model(ids)  # The block applies to its three rows again.
    answers = []
    for row, name in enumerate(NAMES):
        with lora_ext.adapters(name, pool=pool):
            prompt = ids[row, mask[row].bool()][None]
            seen = torch.ones_like(prompt)
            alone = model.generate(prompt, attention_mask=seen, do_sample=False, **how)
        alone = alone[0, prompt.shape[1] :]
        mine = found.sequences[row, ids.shape[1] :]
        assert torch.equal(mine[: len(alone)], alone)
        answers.append(len(alone))
    assert len(set(answers)) == 3  # Rows end at different steps: the batch shrinks twice.
    base = model.generate(ids, attention_mask=mask, do_sample=False, **how)
    assert not torch.equal(base, found.sequences)


@pytest.mark.parametrize("kind", [with_pool, with_layers])
def test_adapter_names_of_a_call_act_like_a_block_around_it(kind: Any) -> None:
    model, pool = kind()
    decoder = make_draft(model).decoder(mode="greedy")
    ids, mask = prompts(3)
    with lora_ext.adapters(NAMES, pool=pool):
        expected = decoder.generate(ids, mask, max_new_tokens=NEW).sequences
    found = decoder.generate(ids, mask, max_new_tokens=NEW, adapter_names=NAMES)
    assert torch.equal(found.sequences, expected)
    with lora_ext.adapters("red", pool=pool):  # Names passed to the call take precedence.
        found = decoder.generate(ids, mask, max_new_tokens=NEW, adapter_names=NAMES)
    assert torch.equal(found.sequences, expected)
    assert not torch.equal(expected, decoder.generate(ids, mask, max_new_tokens=NEW).sequences)
    with pytest.raises(KeyError, match="'bleu'"):
        decoder.generate(ids, mask, max_new_tokens=NEW, adapter_names=["red", "bleu", None])


def test_one_head_drafts_for_rows_of_two_adapters() -> None:
    # Each row must equal the row sampled alone with its seed and adapter.
    model, pool = with_pool()
    decoder = make_draft(model).decoder(mode="sample")
    ids, mask = prompts(4)
    names = ["red", "blue", "blue", "red"]
    how: dict[str, Any] = {"max_new_tokens": NEW, "eos_token_id": 3}
    found = decoder.generate(ids, mask, seed=[5, 6, 7, 8], adapter_names=names, **how)
    for row, name in enumerate(names):
        prompt = ids[row, mask[row].bool()][None]
        alone = decoder.generate(prompt, seed=[5 + row], adapter_names=[name], **how)
        mine, its = found.sequences[row, ids.shape[1] :], alone.sequences[0, prompt.shape[1] :]
        assert torch.equal(mine[: len(its)], its)
    assert sum(found.accepted) > 0  # At least one draft is accepted.
    assert pool.stats()["pins"] == 0


def test_draft_tail_on_an_attached_model_is_refused() -> None:
    model, _ = with_pool()
    with pytest.raises(ValueError, match=r"DraftTail: model: .*attached.*draft_layers=0"):
        make_draft(model, draft_layers=1)


def test_activated_adapters_start_in_the_prompt_only() -> None:
    model, _ = with_pool(alora_invocation_tokens=[1])
    ids, mask = prompts(3)
    ids[ids == 1] = 2
    ids[0, 2] = ids[2, 5] = 1  # the second row has no invocation
    how: dict[str, Any] = {"max_new_tokens": NEW, "eos_token_id": None}
    decoder = make_draft(model).decoder(mode="greedy")
    found = decoder.generate(ids, mask, adapter_names=NAMES, **how).sequences[:, ids.shape[1] :]
    given = {"attention_mask": mask, "do_sample": False, "pad_token_id": 0, **how}
    expected = model.generate(ids, adapter_names=NAMES, **given)[:, ids.shape[1] :]
    base = model.generate(ids, **given)[:, ids.shape[1] :]
    assert torch.equal(found, expected)
    assert 1 in expected[0] and not torch.equal(expected, base)
