"""adapter_names of from_peft with several weighted adapters per row."""

import copy
from typing import Any

import mixtures
import peft
import pytest
import torch
from same_steps import CLOSE, checkpointed, gradients, logits, pair, step, tokens
from tiny import CONFIGS, make_model, make_peft

import lora_ext
from lora_ext.rows import UnknownAdapterError

ENTRIES: list[Any] = [{"red": 0.7, "blue": -0.3}, "green", "__base__", ("blue", 0.5), {"red": 1}]
FLOAT32 = 1e-6  # The weights of entries are float32.


def stacked(theirs: Any, entry: Any) -> Any:
    """Return PEFT's model in which all rows use an entry: its adapters, scaled by its weights."""
    model = copy.deepcopy(theirs)
    entry = {entry: 1.0} if isinstance(entry, str) else entry
    pairs = entry if isinstance(entry, dict) else dict([entry])
    members = [name for name in pairs if name != "__base__"]
    model.base_model.set_adapter(members or ["red"])
    for layer in model.modules():
        if hasattr(layer, "lora_A"):
            for name in layer.scaling:
                layer.scaling[name] *= pairs.get(name, 0.0)
    return model


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["plain", "new", "reentrant"])
def test_step_equals_pefts_models_of_each_entry(checkpointing: bool | None) -> None:
    theirs, ours = pair()
    ours.set_requires_grad(list(CONFIGS["llama"]))
    ours.train()
    checkpointed(ours, checkpointing)
    value = step(ours, lambda model: logits(model, adapter_names=ENTRIES))
    weights = torch.randn(value.shape, generator=torch.manual_seed(7), dtype=value.dtype)
    total: dict[str, Any] = {}
    for row, entry in enumerate(ENTRIES):
        model = stacked(theirs, entry)
        model.set_requires_grad(list(CONFIGS["llama"]))
        expected = logits(model)[row]
        assert (value[row] - expected).abs().max() < FLOAT32 * expected.abs().max()
        (expected * weights[row]).sum().backward()
        for name, gradient in gradients(model).items():
            if gradient is not None:
                total[name] = total.get(name, 0) + gradient
    for name, gradient in gradients(ours).items():
        if "lora_" in name and gradient is not None:
            difference = (gradient - total[name]).abs().max()
            assert difference <= FLOAT32 * total[name].abs().max(), name
    assert sum(g is not None and bool(g.any()) for g in gradients(ours).values()) > 10


def test_inference_beams_and_plain_rows() -> None:
    theirs, ours = pair()
    with torch.no_grad():
        value = logits(ours, adapter_names=ENTRIES)
        for row, entry in enumerate(ENTRIES):
            expected = logits(stacked(theirs, entry))[row]
            assert (value[row] - expected).abs().max() < FLOAT32 * expected.abs().max()
        names = ["red", "green", "__base__", "blue", "red"]
        ones = [{name: 1.0} if name != "__base__" else name for name in names]
        plain = logits(ours, adapter_names=names)
        assert (logits(ours, adapter_names=ones) - plain).abs().max() <= CLOSE * plain.abs().max()
        how = {"max_new_tokens": 3, "do_sample": False, "num_beams": 2, "pad_token_id": 0}
        found = ours.generate(input_ids=tokens(), adapter_names=ENTRIES, **how)
        for row, entry in enumerate(ENTRIES):
            alone = stacked(theirs, entry).generate(input_ids=tokens(), **how)[row]
            assert torch.equal(found[row], alone)
        with ours.disable_adapter():
            base = logits(ours, adapter_names=ENTRIES)
        assert torch.equal(base, logits(ours, adapter_names=["__base__"] * 5))
    assert not any(len(m._forward_pre_hooks) for m in ours.modules() if hasattr(m, "lora_A"))


def test_dora_alone_beside_a_mixture_is_computed() -> None:
    fields: dict[str, Any] = {"r": 4, "target_modules": ["q_proj", "down_proj"]}
    theirs, ours = pair("llama", {"plain": fields, "dora": {**fields, "use_dora": True}})
    names = ["dora", {"plain": 2.0}, "plain", "dora", "__base__"]
    found = logits(ours, adapter_names=names)
    plain = logits(ours, adapter_names=["dora", "plain", "plain", "dora", "__base__"])
    assert (found - plain)[1].abs().max() > 1e-3
    rows = [0, 2, 3, 4]
    assert (found - plain)[rows].abs().max() <= CLOSE * plain.abs().max()
    theirs.set_adapter("dora")
    assert (found - logits(theirs))[0].abs().max() <= CLOSE * plain.abs().max()


def test_a_mixture_may_be_changed_between_calls() -> None:
    _, ours = pair()
    mixture = {"red": 0.5, "blue": 1.0}
    names: list[Any] = [mixture] * 5
    with torch.no_grad():
        before = logits(ours, adapter_names=names)
        mixture["red"] = -2.0
        after = logits(ours, adapter_names=names)
        assert not torch.equal(after, before)
        assert torch.equal(after, logits(ours, adapter_names=[{**mixture} for _ in range(5)]))


def test_what_cannot_be_mixed_is_refused_by_name() -> None:
    fields: dict[str, Any] = {"r": 4, "target_modules": ["q_proj"]}
    configs = {
        "plain": fields,
        "dora": {**fields, "use_dora": True},
        "saved": {**fields, "modules_to_save": ["lm_head"]},
        "wide": {**fields, "target_modules": ["q_proj", "embed_tokens"]},
    }
    model: Any = lora_ext.from_peft(make_peft(make_model("llama"), configs))
    for name, why in (("dora", "DoRA"), ("saved", "ModulesToSave"), ("wide", "embed_tokens")):
        for entry in ({"plain": 1, name: 1}, (name, 0.5)):
            with pytest.raises(NotImplementedError, match=f"'{name}'.*{why}"):
                logits(model, adapter_names=[entry] * 5)
    for entry in ({"plain": 1, "unseen": 1}, {"plain": 1, "unseen": 0}, ("unseen", 0)):
        with pytest.raises(UnknownAdapterError, match="'unseen'"):
            logits(model, adapter_names=[entry] * 5)
    with pytest.raises(ValueError, match="adapter_names: expected a list"):
        logits(model, adapter_names={"plain": 1.0})
    with pytest.raises(ValueError, match="'plain': expected a finite weight"):
        logits(model, adapter_names=[{"plain": float("nan")}] * 5)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("Conv2d", "adapter_names: 'red': .*it has a Conv2d"),
        ("Embedding", "adapter_names: 'red': .*it has a Embedding"),
        ("experts", r"names: expected one .* for each row, found \('red', "),
    ],
)
def test_convolutions_embeddings_and_experts_refuse_mixtures(kind: str, message: str) -> None:
    torch.manual_seed(0)
    if kind == "experts":
        model = mixtures.make_peft(mixtures.make_mixture("qwen3"), {"red": {"r": 4}})
        given = {"input_ids": mixtures.tokens(2, 3)}
    else:
        conv = kind == "Conv2d"
        layer = torch.nn.Conv2d(3, 4, 2, 2) if conv else torch.nn.Embedding(5, 4)
        config, base = peft.LoraConfig(r=2, target_modules=["0"]), torch.nn.Sequential(layer)
        model = peft.get_peft_model(base, config, adapter_name="red")  # pyright: ignore
        given = {"input": torch.randn(2, 3, 4, 4) if conv else torch.ones(2, 3, dtype=torch.int64)}
    ours: Any = lora_ext.from_peft(model)
    ours(**given, adapter_names=["red", "__base__"])
    for entry in ({"red": 2.0}, ("red", 0.5)):
        with pytest.raises(NotImplementedError, match=message):
            ours(**given, adapter_names=[entry, "__base__"])
