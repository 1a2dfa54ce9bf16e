"""MoD on models of many families: the mixture is what it says, and nothing else changes."""

from __future__ import annotations

import copy
import inspect
import pickle
import threading
from typing import Any

import peft
import pytest
import torch
from adapted_models import adapted
from methods.mod_models import FAMILIES, IDS, make, shake, softcapped
from torch import Tensor, nn

import lora_ext
from lora_ext.methods import mod
from lora_ext.methods.mod import ModConfig
from lora_ext.nn import LoraConfig, decoder_layers, unwrap, wrap

FIXED = {"router": "fixed", "fixed_weights": (0.0, 0.0, 1.0)}


def logits(model: Any, **inputs: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, **inputs).logits


def hiddens_of(model: Any, k: int) -> list[Tensor]:
    """What leaves the last k blocks, by hooks of our own."""
    found: list[Tensor] = []
    hooks = [
        block.register_forward_hook(
            lambda _, __, out: found.append(out[0] if isinstance(out, tuple) else out)
        )
        for block in list(decoder_layers(model))[-k:]
    ]
    logits(model)
    for hook in hooks:
        hook.remove()
    return found


def explicit(model: Any, mix: str = "logit") -> Tensor:
    """The mixture of k tensors of logits, by the model's own norms and head."""
    mixer = model.mod
    norms = [*mixer.norms, mixer.final_norm]
    normed = [n(h) for n, h in zip(norms, hiddens_of(model, mixer.config.k), strict=True)]
    cap = getattr(model.config, "final_logit_softcapping", None)
    scale = {"cohere": 0.25, "granite": 0.25}.get(model.config.model_type, 1.0)
    each = [softcapped(scale * model.get_output_embeddings()(n), cap) for n in normed]
    weights = mixer.bias.expand(*normed[0].shape[:-1], -1)
    if mixer.router is not None:
        weights = weights + normed[-1].to(mixer.router.dtype) @ mixer.router.T
    weights = weights.softmax(-1)
    if mix == "prob":
        each = [z.log_softmax(-1) + weights[..., e, None].log() for e, z in enumerate(each)]
        return torch.stack(each).logsumexp(0)
    return torch.stack([weights[..., e, None] * z for e, z in enumerate(each)]).sum(0)


def traces(model: nn.Module) -> list[Any]:
    """Modules by name and identity, flags, values, hooks, and what lies in each ``__dict__``."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_state_dict_hooks")
    return [
        [(name, id(module), sorted(module.__dict__)) for name, module in model.named_modules()],
        [(name, id(p), p.requires_grad, p.tolist()) for name, p in model.named_parameters()],
        [list(getattr(m, hook)) for m in model.modules() for hook in hooks],
        [list(m._modules) for m in model.modules()],
        model.config.to_dict(),
    ]


# -------------------------------------------------------------------------------------------------
# The mixture


@pytest.mark.parametrize("family", FAMILIES)
def test_one_layer_is_the_base_model_bit_for_bit_and_remove_leaves_nothing(family: str):
    model = make(family)
    base, before = model(input_ids=IDS, labels=IDS), traces(model)
    mod.apply(model, ModConfig(k=1))
    out = model(input_ids=IDS, labels=IDS)
    assert torch.equal(out.logits, base.logits) and torch.equal(out.loss, base.loss)
    assert out.routing_weights.shape == (2, 7, 1) and bool((out.routing_weights == 1).all())
    assert out.distill_loss == 0 and torch.equal(out.layer_losses, base.loss[None])
    mod.remove(model)
    mod.apply(model, ModConfig(train_final_norm=True))
    shake(model)
    with torch.no_grad():
        model.mod.final_norm.weight.add_(1.0)
    assert not torch.allclose(logits(model), base.logits)
    assert mod.remove(model) is model
    assert traces(model) == before
    assert torch.equal(logits(model), base.logits)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("router", ["token", "static"])
def test_the_mixture_is_that_of_the_layers_logits(family: str, router: Any):
    model = make(family)
    mod.apply(model, ModConfig(router=router))
    shake(model)
    expected = explicit(model)
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
    assert mod.remove(model).__class__ is type(model)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "granite"])
def test_probabilities_are_mixed_too(family: str):
    model = make(family)
    mod.apply(model, ModConfig(mix="prob", vocab_chunk=5))
    shake(model)
    found = logits(model)
    torch.testing.assert_close(found, explicit(model, "prob"), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.logsumexp(-1), torch.zeros(2, 7), rtol=0, atol=1e-5)


def test_probabilities_of_layers_without_weight_are_left_out():
    model = make("gpt2")
    base = logits(model)
    mod.apply(model, ModConfig(mix="prob", **FIXED))
    out = model(input_ids=IDS, labels=IDS)
    torch.testing.assert_close(out.logits, base.log_softmax(-1), rtol=1e-5, atol=1e-5)
    out.loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("chunk", [1, 7, 19, 24])
def test_mixing_before_the_head_is_mixing_logits_in_float64(chunk: int):
    model = make("gpt2", torch.float64)  # LayerNorm, tied embeddings
    head = nn.Linear(16, 19, dtype=torch.float64)  # and a bias
    head.weight = model.lm_head.weight
    model.lm_head = head
    found = {}
    for backend in ("hidden", "chunked"):
        mod.apply(model, ModConfig(backend=backend, vocab_chunk=chunk))
        shake(model)
        out = model(input_ids=IDS, labels=IDS)
        torch.testing.assert_close(out.logits, explicit(model), rtol=1e-11, atol=1e-11)
        model.zero_grad()
        out.loss.backward()
        found[backend] = [out.loss, *(p.grad for p in model.parameters())]
        mod.remove(model)
    # The model's own loss is in float32.
    torch.testing.assert_close(found["hidden"], found["chunked"], rtol=1e-5, atol=1e-6)


def test_under_a_soft_cap_the_two_differ_and_auto_takes_the_exact_one():
    model = make("gemma2")
    mod.apply(model, ModConfig(vocab_chunk=4))
    shake(model, 1.0)
    right = explicit(model)
    torch.testing.assert_close(logits(model), right, rtol=1e-5, atol=1e-5)
    mixed, _ = model.mod(hiddens_of(model, 3))
    before_the_head = softcapped(model.lm_head(mixed), 3.0)
    assert (before_the_head - right).abs().max() > 1e-2
    mod.remove(model)
    with pytest.raises(mod.InexactMixError, match=r"apply: backend: expected 'auto' or 'chunked'"):
        mod.apply(model, ModConfig(backend="hidden"))
    assert issubclass(mod.InexactMixError, ValueError)
    assert mod.apply(model, ModConfig(k=1, backend="hidden")) is model


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_all_weight_on_the_last_layer_is_the_base_model(family: str):
    for dtype, bound in ((torch.float32, 1e-6), (torch.bfloat16, 0.05)):
        model = make(family, dtype)
        base = logits(model)
        mod.apply(model, ModConfig(**FIXED))
        torch.testing.assert_close(logits(model), base, rtol=bound, atol=bound)


def test_a_head_that_is_something_else_is_refused():
    model = make()
    mod.apply(model)
    own = model.lm_head.forward
    model.lm_head.forward = lambda x: own(x).square()
    with pytest.raises(NotImplementedError, match=r"mod: model: expected logits that are the head"):
        logits(model)


# -------------------------------------------------------------------------------------------------
# What a model returns


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_the_output_has_all_that_the_model_returns(family: str):
    model = make(family, attn_implementation="eager")
    asked = {"output_hidden_states": True, "output_attentions": True, "use_cache": True}
    model.requires_grad_(False)
    base = model(input_ids=IDS, labels=IDS, **asked)
    mod.apply(model).requires_grad_(False)
    shake(model)
    out = model(input_ids=IDS, labels=IDS, **asked)
    assert isinstance(out, mod.ModOutput) and isinstance(out, type(base))
    assert list(out)[: len(base)] == list(base)
    assert all(
        torch.equal(a, b) for a, b in zip(out.hidden_states, base.hidden_states, strict=True)
    )
    assert all(torch.equal(a, b) for a, b in zip(out.attentions, base.attentions, strict=True))
    assert out.routing_weights.shape == (2, 7, 3)
    torch.testing.assert_close(out.routing_weights.sum(-1), torch.ones(2, 7))
    for same in (pickle.loads(pickle.dumps(out)), copy.deepcopy(out)):
        assert type(same) is type(out) and list(same) == list(out)
    as_tuple = model(input_ids=IDS, labels=IDS, return_dict=False, **asked)
    assert isinstance(as_tuple, tuple) and len(as_tuple) == len(out)
    assert torch.equal(as_tuple[0], out.loss) and torch.equal(as_tuple[1], out.logits)
    again = type(out)((name, value) for name, value in out.items())  # as a gather makes it
    assert list(again) == list(out) and torch.equal(again.logits, out.logits)
    assert model.forward.__signature__ == inspect.signature(type(model).forward.__get__(model))
    positional = model(IDS)
    assert torch.equal(positional.logits, out.logits)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize(
    "keep",
    [
        1,
        3,
        torch.tensor([0, 4]),
        torch.tensor([[0, 1], [3, 5]]),
        IDS > 9,
    ],
    ids=["last", "last three", "positions", "positions of each", "mask"],
)
def test_logits_to_keep_keeps_those_logits(family: str, keep: Any):
    model = mod.apply(make(family))
    shake(model)
    full = logits(model)
    if isinstance(keep, int):
        expected = full[:, -keep:]
    elif keep.dtype == torch.bool:
        expected = full[keep]
    else:
        rows = torch.arange(2)[:, None] if keep.dim() == 2 else slice(None)
        expected = full[rows, keep]
    fresh = mod.apply(make(family))  # whose first forward this is
    shake(fresh)
    for tried in (model, fresh):
        torch.testing.assert_close(logits(tried, logits_to_keep=keep), expected)
    assert model(input_ids=IDS, logits_to_keep=keep).routing_weights.shape == (2, 7, 3)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_generation_with_a_cache_beams_and_padding(family: str):
    model = mod.apply(make(family))
    shake(model)
    model.generation_config.eos_token_id = None
    settings: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    mask = torch.ones_like(IDS)
    cached = model.generate(IDS, attention_mask=mask, **settings)
    assert torch.equal(
        cached, model.generate(IDS, attention_mask=mask, use_cache=False, **settings)
    )
    beams = model.generate(IDS, attention_mask=mask, num_beams=3, **settings)
    assert beams.shape == cached.shape
    alone = [model(input_ids=row[None]).logits[0] for row in (IDS[0], IDS[1, :4])]
    padded = torch.stack([IDS[0], torch.cat([IDS.new_zeros(3), IDS[1, :4]])])
    mask = (padded != 0).long()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    both = model(input_ids=padded, attention_mask=mask, position_ids=positions).logits
    torch.testing.assert_close(both[0], alone[0], rtol=0, atol=1e-4)
    torch.testing.assert_close(both[1, 3:], alone[1], rtol=0, atol=1e-4)
    together = model.generate(padded, attention_mask=mask, **settings)
    single = model.generate(IDS[1:, :4], attention_mask=torch.ones(1, 4).long(), **settings)
    assert torch.equal(together[1, 7:], single[0, 4:])


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


def test_a_reentrant_checkpoint_around_the_hooks_is_refused_by_name():
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


def test_the_decoder_by_itself_is_the_base_models():
    model = make()
    base = model.model(input_ids=IDS).last_hidden_state
    mod.apply(model)
    shake(model)
    assert torch.equal(model.model(input_ids=IDS).last_hidden_state, base)


def test_two_models_do_not_meet_even_where_one_calls_the_other():
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


def test_two_threads_on_one_model_do_not_meet():
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
def test_a_copy_is_a_model_of_its_own(family: str):
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


def test_a_model_is_gone_with_its_last_name():
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


def test_a_wrapped_forward_goes_on_after_remove():
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
def test_with_adapters_only_they_and_the_mixture_train(kind: str):
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
def test_peft_may_come_later_and_saves(fused: bool, tmp_path: Any):
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


def test_a_model_that_we_have_wrapped_comes_back_step_by_step():
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
def test_a_head_that_is_trained_is_the_head_of_all_layers(where: str):
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


def test_rows_may_have_adapters_of_their_own_on_the_head_as_long_as_no_loss_is_asked_for():
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
def test_dropout_in_the_head_does_not_hide_what_the_head_is(family: str):
    torch.manual_seed(0)
    config = peft.LoraConfig(target_modules=["lm_head"], lora_dropout=0.5, init_lora_weights=False)
    model: Any = peft.get_peft_model(make(family, tie_word_embeddings=False), config)
    mod.apply(model).train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    parts = [m for m in model.modules() if isinstance(m, nn.Dropout) and m.p]
    assert parts and all(m.training for m in parts)


# -------------------------------------------------------------------------------------------------
# Errors


def test_a_second_apply_raises_and_names_remove():
    model = mod.apply(make())
    before = traces(model)
    with pytest.raises(
        RuntimeError, match=r"apply: model: expected a model without MoD.*mod\.remove"
    ):
        mod.apply(model, ModConfig(k=2))
    assert traces(model) == before
    mod.remove(model)
    for use in (mod.remove, mod.state_dict, mod.trainable_report):
        with pytest.raises(RuntimeError, match=r": model: expected a model of mod\.apply"):
            use(model)


def test_what_is_no_causal_lm_is_refused_and_stays_as_it_was():
    import transformers

    llama = make()
    with pytest.raises(
        ValueError, match=r"apply: k: expected at most the model's 4 layers, found 5"
    ):
        mod.apply(llama, ModConfig(k=5))
    with pytest.raises(TypeError, match=r"apply: config: expected a ModConfig, found dict"):
        mod.apply(llama, {"k": 2})  # pyright: ignore
    with pytest.raises(ValueError, match=r"apply: model: expected a causal LM.*found LlamaModel"):
        mod.apply(llama.model)
    with pytest.raises(ValueError, match=r"apply: model: expected a causal LM.*found Linear"):
        mod.apply(nn.Linear(2, 2))
    config = transformers.T5Config(
        d_model=8, d_kv=4, d_ff=8, num_layers=2, num_heads=2, vocab_size=9
    )
    with pytest.raises(NotImplementedError, match=r"apply: model: expected a decoder alone"):
        mod.apply(transformers.T5ForConditionalGeneration(config))
    with pytest.raises(TypeError, match=r"a weight on the meta device, which has no values"):
        mod.apply(make().to("meta"))
    llama.mod = nn.Identity()
    with pytest.raises(ValueError, match=r"apply: model: expected no attribute 'mod'"):
        mod.apply(llama)
    del llama.mod
    before = traces(llama)
    for norm in (nn.Identity(), nn.Linear(16, 16), nn.BatchNorm1d(16, eps=0.5)):
        own, llama.model.norm = llama.model.norm, norm
        with pytest.raises(TypeError, match=r"expected a (final )?norm like RMSNorm or LayerNorm"):
            mod.apply(llama)
        llama.model.norm = own
    assert traces(llama) == before


def test_labels_of_another_shape_are_refused():
    model = mod.apply(make())
    for labels in (IDS[:, :-1], IDS[:1], IDS[0]):
        with pytest.raises(ValueError, match=r"mod: labels: expected shape \(B, T\) = \(2, 7\)"):
            model(input_ids=IDS, labels=labels)
