"""MoD's hooks under checkpoints, threads, copies and adapters give the same results as without."""

from __future__ import annotations

import copy
import pickle
import threading
from typing import Any

import peft
import pytest
import torch
from adapted_models import adapted
from methods.mod_models import IDS, explicit, hiddens_of, logits, make, shake, traces
from torch import Tensor, nn

import lora_ext
from lora_ext.methods import mod
from lora_ext.methods.mod import ModConfig
from lora_ext.nn import LoraConfig, decoder_layers, unwrap, wrap

# -------------------------------------------------------------------------------------------------
# Hooks


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_blocks_give_the_same_loss_and_gradients(family: str, reentrant: bool):
    found = []
    for checkpointing in (False, True):
        model = mod.apply(make(family)).train()
        shake(model)
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        out = model(input_ids=IDS, labels=IDS, use_cache=False)
        out.loss.backward()
        found.append([out.loss, out.logits, *(p.grad for p in model.parameters())])
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-6)


def test_reentrant_checkpoint_around_the_hooks_is_refused():
    model = mod.apply(make()).train()
    block = decoder_layers(model)[-2]
    kept = torch.is_grad_enabled()
    capture = next(iter(block._forward_hooks.values()))
    own = decoder_layers(model)[-1].forward

    def without_gradients(*args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            capture(block, args, args[0])
        return own(*args, **kwargs)

    decoder_layers(model)[-1].forward = without_gradients
    with pytest.raises(RuntimeError, match=r"mod: model: expected blocks whose outputs carry"):
        model(input_ids=IDS)
    assert torch.is_grad_enabled() == kept


def test_decoder_called_without_its_head_gives_the_base_models_states():
    model = make()
    base = model.model(input_ids=IDS).last_hidden_state
    mod.apply(model)
    shake(model)
    assert torch.equal(model.model(input_ids=IDS).last_hidden_state, base)


def test_nested_models_do_not_interfere():
    first, second = make("llama"), make("gpt2")
    mod.apply(first, ModConfig(k=2))
    mod.apply(second, ModConfig(k=4))
    shake(first), shake(second)
    alone = logits(first), logits(second)
    inner: list[Tensor] = []
    hook = decoder_layers(first)[-2].register_forward_hook(
        lambda *_: inner.append(logits(second)), prepend=True
    )
    assert torch.equal(logits(first), alone[0]) and torch.equal(inner[0], alone[1])
    hook.remove()
    shared = make()
    shared.config = first.config
    before = logits(shared)
    mod.remove(first)
    assert torch.equal(logits(second), alone[1]) and torch.equal(logits(shared), before)


def test_threads_on_one_model_do_not_interfere():
    model = mod.apply(make())
    shake(model)
    rows = [IDS[:1], IDS[1:, :4], IDS[1:], IDS[:1, :3]]
    expected = [model(input_ids=r).logits for r in rows]
    gate, wrong = threading.Barrier(len(rows)), []

    def run(place: int) -> None:
        for _ in range(10):
            gate.wait()
            out = model(input_ids=rows[place], labels=rows[place])
            if not torch.allclose(out.logits, expected[place], atol=1e-6):
                wrong.append(place)

    threads = [threading.Thread(target=run, args=(place,)) for place in range(len(rows))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_copies_are_independent(family: str):
    model = make(family)
    base = logits(model)
    mod.apply(model)
    shake(model)
    mixed = logits(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(other), mixed)
        shake(other, 1.0)
        assert not torch.allclose(logits(other), mixed)
        assert torch.equal(logits(model), mixed)
        mod.remove(other)
        assert torch.equal(logits(other), base)
        assert torch.equal(logits(model), mixed)


def test_model_is_freed_without_garbage_collection():
    import gc
    import weakref

    model = mod.apply(make())
    logits(model)
    seen = weakref.ref(model)
    gc.collect()
    gc.disable()
    try:
        del model
        assert seen() is None
    finally:
        gc.enable()


def test_wrapped_forward_works_after_remove():
    model = make()
    base = logits(model)
    mod.apply(model)
    inner = model.forward
    model.forward = lambda *args, **kwargs: inner(*args, **kwargs)
    mod.remove(model)
    assert torch.equal(logits(model), base)
    del model.forward
    model.forward = before = lambda **kwargs: type(model).forward(model, **kwargs)
    mod.apply(model, ModConfig(k=2))
    assert model.forward is not before
    mod.remove(model)
    assert model.forward is before


# -------------------------------------------------------------------------------------------------
# Adapters


@pytest.mark.parametrize("kind", ["ours", "peft", "fused"])
def test_only_adapters_and_the_mixture_train(kind: str):
    model = adapted(kind)
    base = model(input_ids=IDS % 11).logits
    before = traces(model)
    assert mod.apply(model) is model
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in n or ".mod." in f".{n}" for n in trained)
    assert any("lora_" in n for n in trained) and sum(".mod." in f".{n}" for n in trained) == 4
    model.train()
    out = model(input_ids=IDS % 11, labels=IDS % 11)
    out.loss.backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
    report = mod.trainable_report(model)
    d, k = 16, 3
    assert report["mod"] == (k - 1) * d + k * d + k
    assert report["lora"] == sum(p.numel() for n, p in model.named_parameters() if "lora_" in n)
    assert report["total"] == report["lora"] + report["mod"]
    assert report["ratio"] == report["total"] / sum(p.numel() for p in model.parameters())
    model.zero_grad()
    mod.remove(model.eval())
    assert traces(model) == before
    assert torch.equal(model(input_ids=IDS % 11).logits, base)


@pytest.mark.parametrize("fused", [False, True])
def test_peft_model_can_be_made_after_mod_and_saved(fused: bool, tmp_path: Any):
    model = mod.apply(make())
    shake(model)
    mixed = logits(model)
    config = peft.LoraConfig(target_modules="all-linear", r=2)
    wrapped: Any = peft.get_peft_model(model, config)
    wrapped = lora_ext.from_peft(wrapped) if fused else wrapped
    torch.testing.assert_close(logits(wrapped), mixed)
    assert isinstance(wrapped(input_ids=IDS), mod.ModOutput)
    assert wrapped.generate(input_ids=IDS, max_new_tokens=2, do_sample=False).shape[1] <= 9
    wrapped.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(mod.apply(make()), tmp_path)
    mod.load_state_dict(loaded, mod.state_dict(wrapped))
    torch.testing.assert_close(logits(loaded), mixed)
    base = logits(mod.remove(wrapped))
    torch.testing.assert_close(base, logits(make()))


def test_remove_and_unwrap_restore_the_model_step_by_step():
    model = make()
    before = traces(model)
    wrap(model, LoraConfig(target_modules=["q_proj"]))
    wrapped = traces(model)
    mod.apply(model)
    logits(model)
    mod.remove(model)
    assert traces(model) == wrapped
    assert traces(unwrap(model)) == before


@pytest.mark.parametrize("where", ["adapter", "copy"])
def test_trained_head_is_used_for_all_layers(where: str):
    settings = {"modules_to_save": ["lm_head"]} if where == "copy" else {}
    targets = ["q_proj"] if where == "copy" else ["q_proj", "lm_head"]
    config = peft.LoraConfig(target_modules=targets, r=2, init_lora_weights=False, **settings)
    model: Any = peft.get_peft_model(make(), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(torch.randn_like(parameter))
    mod.apply(model)
    shake(model)
    lm = model.base_model.model
    torch.testing.assert_close(logits(model), explicit(lm), rtol=1e-5, atol=1e-5)
    out = model(input_ids=IDS, labels=IDS)
    each = [lm.get_output_embeddings()(n) for n in lm.mod.normed(hiddens_of(lm, 3))]
    alone = [lm.loss_function(logits=z, labels=IDS, vocab_size=19) for z in each]
    torch.testing.assert_close(out.layer_losses, torch.stack(alone), rtol=1e-5, atol=1e-5)
    out.distill_loss.backward()
    trained = [p for n, p in lm.lm_head.named_parameters() if p.requires_grad]
    assert trained and all(p.grad is not None and p.grad.any() for p in trained)


def test_rows_may_have_different_head_adapters_if_no_loss_is_computed():
    config = peft.LoraConfig(target_modules=["lm_head"], r=2, init_lora_weights=False)
    model: Any = peft.get_peft_model(make(), config, adapter_name="a")
    model.add_adapter("b", config)
    mod.apply(model.eval())
    with torch.no_grad():
        mixed = model(input_ids=IDS, adapter_names=["a", "b"]).logits
    for row, name in enumerate(("a", "b")):
        model.set_adapter(name)
        torch.testing.assert_close(mixed[row], logits(model)[row], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_head_with_dropout_is_accepted(family: str):
    torch.manual_seed(0)
    config = peft.LoraConfig(target_modules=["lm_head"], lora_dropout=0.5, init_lora_weights=False)
    model: Any = peft.get_peft_model(make(family, tie_word_embeddings=False), config)
    mod.apply(model).train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    parts = [m for m in model.modules() if isinstance(m, nn.Dropout) and m.p]
    assert parts and all(m.training for m in parts)
