"""Training of activated adapters (aLoRA): layers of lora_ext.nn against PEFT's, and errors."""

import gc
from typing import Any

import peft
import pytest
import torch
from activated import TARGETS, words
from tiny import adapted, make_model
from torch import Tensor, nn

import lora_ext
from lora_ext.adapter import LoraAdapter, merge_adapters
from lora_ext.nn import LoraConfig, LoraConv, LoraEmbedding, LoraLinear, layer_names, wrap

FIELDS: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS}
INVOKED = {**FIELDS, "alora_invocation_tokens": [7, 8]}


def texts() -> Tensor:
    """Return three texts. The first two invoke the adapter, at positions 12 and 3; the last does
    not."""
    rows = [[*words(12, 0), 7, 8, *words(6, 1)], [*words(3, 2), 7, 8, *words(15, 3)], words(20, 4)]
    return torch.tensor(rows)


def gradients(model: Any, logits: Tensor, weights: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    (logits * weights).sum().backward()
    found = {n: p.grad for n, p in model.named_parameters() if "lora_" in n}
    return {n.removeprefix("base_model.model."): g for n, g in found.items() if g is not None}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_wrapped_layers_train_like_those_of_peft(checkpointing: bool) -> None:
    config = peft.LoraConfig(**INVOKED, task_type="CAUSAL_LM")
    reference = adapted(make_model("llama"), {"default": config}, 0.3).double().train()
    model = wrap(make_model("llama").double(), LoraConfig(**INVOKED)).train()
    values = {k.removeprefix("base_model.model."): v for k, v in reference.state_dict().items()}
    model.load_state_dict(values)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    ids, weights = (
        texts(),
        torch.randn(3, 20, 97, generator=torch.Generator().manual_seed(0)).double(),
    )
    warned = pytest.warns(UserWarning, match="lacks the invocation of adapter 'default'")
    for rows in ([0, 1, 2], [2]):  # The last row has zero gradients, as in PEFT.
        theirs = gradients(reference, reference(input_ids=ids[rows]).logits, weights[rows])
        with warned, lora_ext.adapters("default", input_ids=ids[rows], pool=layer_names):
            logits = model(ids[rows]).logits
        ours = gradients(model, logits, weights[rows])
        assert ours.keys() == theirs.keys()
        for name, gradient in theirs.items():
            torch.testing.assert_close(ours[name], gradient, atol=1e-8, rtol=1e-8)
        assert any(g.any() for g in theirs.values()) == (len(rows) > 1)


@pytest.mark.slow
def test_deleted_model_does_not_define_an_adapter_of_its_name() -> None:
    gone = wrap(make_model("llama"), LoraConfig(**FIELDS))
    model, ids = wrap(make_model("llama"), LoraConfig(**INVOKED)), texts()[:2]
    with pytest.raises(ValueError, match=r"expected one invocation of 'default'.*\(7, 8\)"):
        with lora_ext.adapters("default", input_ids=ids, pool=layer_names):
            pass
    gc.disable()
    try:
        gone.itself = [gone]  # A cycle: only the garbage collector can free the object.
        del gone
        with lora_ext.adapters("default", input_ids=ids, pool=layer_names):
            model(ids)
    finally:
        gc.enable()


def test_labels_that_are_all_before_the_start_of_the_adapter_warn() -> None:
    model, ids = wrap(make_model("llama"), LoraConfig(**INVOKED)), texts()[:2]
    labels = ids.clone()
    # The remaining labels, up to the starts 12 and 3, are predicted by tokens before the starts.
    labels[0, 13:] = labels[1, 4:] = -100
    with lora_ext.adapters("default", input_ids=ids, pool=layer_names):
        with pytest.warns(UserWarning, match="labels: expected labels after the sta"):
            model(input_ids=ids, labels=labels)
        labels[1, 4] = 8
        model(input_ids=ids, labels=labels)  # Warnings are errors here.
    lora_ext.nn.unwrap(model)
    assert not model._forward_pre_hooks


def test_unsupported_calls_of_an_activated_adapter_raise() -> None:
    ids = texts()
    model = wrap(make_model("llama"), LoraConfig(**INVOKED))
    layer: Any = model.model.layers[0].self_attn.q_proj
    with pytest.raises(ValueError, match=r"merge: adapter_names: .*'default'.*begin in mid-seq"):
        layer.merge()
    with pytest.raises(ValueError, match="input_ids: expected the prompts, because 'default'"):
        model(ids)
    with pytest.raises(ValueError, match=r"starts: expected .*'default'"):
        with lora_ext.adapters("default", pool=layer_names):
            model(ids)
    with lora_ext.adapters("default", input_ids=ids[:2], pool=layer_names):
        with pytest.raises(ValueError, match="input_ids: expected activations of 2 rows of 20"):
            model(ids[:2, :7])
    layer.delete_adapter("default")
    assert layer.alora_invocation_tokens == {}
    with pytest.raises(ValueError, match="below the vocabulary size 97, found 97"):
        wrap(make_model("llama"), LoraConfig(**{**INVOKED, "alora_invocation_tokens": [97]}))
    with pytest.raises(ValueError, match="use_dora: expected false for an activated adapter"):
        LoraConfig(**INVOKED, use_dora=True)
    for base, kind in ((nn.Embedding(9, 4), LoraEmbedding), (nn.Conv2d(3, 4, 2, 2), LoraConv)):
        with pytest.raises(NotImplementedError, match="alora_invocation_tokens"):
            kind(base, alora_invocation_tokens=[1])
    with pytest.raises(ValueError, match="use_dora: expected False for an activated"):
        LoraLinear(nn.Linear(3, 4), use_dora=True, alora_invocation_tokens=[1])


def test_saving_and_merging_keep_the_invocation(tmp_path: Any) -> None:
    model = wrap(make_model("llama"), LoraConfig(**INVOKED))
    value = LoraAdapter.from_model(model)
    value.save(tmp_path / "act")
    assert peft.LoraConfig.from_pretrained(tmp_path / "act").alora_invocation_tokens == [7, 8]
    assert LoraAdapter.load(tmp_path / "act") == value
    both = merge_adapters([value, value], [0.5, 0.5])
    assert both.config.invocation == (7, 8)
    plain = LoraAdapter.from_model(wrap(make_model("llama"), LoraConfig(**FIELDS)))
    assert "alora_invocation_tokens" not in plain.config.to_dict()
    with pytest.raises(ValueError, match=r"adapters\[1\]: alora_inv.* \[7, 8\]"):
        merge_adapters([value, plain], [0.5, 0.5])
