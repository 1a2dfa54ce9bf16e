"""MoD on models of many families: outputs equal the formula, and remove restores the model."""

from __future__ import annotations

import copy
import inspect
import pickle
from typing import Any

import pytest
import torch
from methods.mod_models import (
    FAMILIES,
    IDS,
    explicit,
    hiddens_of,
    logits,
    make,
    shake,
    softcapped,
    traces,
)
from torch import nn

from lora_ext.methods import mod
from lora_ext.methods.mod import ModConfig

FIXED = {"router": "fixed", "fixed_weights": (0.0, 0.0, 1.0)}


# -------------------------------------------------------------------------------------------------
# The mixture


@pytest.mark.parametrize("family", FAMILIES)
def test_one_layer_equals_the_base_model_bitwise_and_remove_restores_it(family: str):
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
def test_mixture_equals_that_of_the_layers_logits(family: str, router: Any):
    model = make(family)
    mod.apply(model, ModConfig(router=router))
    shake(model)
    expected = explicit(model)
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
    assert mod.remove(model).__class__ is type(model)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "granite"])
def test_mixed_probabilities_equal_the_formula(family: str):
    model = make(family)
    mod.apply(model, ModConfig(mix="prob", vocab_chunk=5))
    shake(model)
    found = logits(model)
    torch.testing.assert_close(found, explicit(model, "prob"), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.logsumexp(-1), torch.zeros(2, 7), rtol=0, atol=1e-5)


def test_layers_of_zero_weight_are_skipped_in_mixed_probabilities():
    model = make("gpt2")
    base = logits(model)
    mod.apply(model, ModConfig(mix="prob", **FIXED))
    out = model(input_ids=IDS, labels=IDS)
    torch.testing.assert_close(out.logits, base.log_softmax(-1), rtol=1e-5, atol=1e-5)
    out.loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("chunk", [1, 7, 19, 24])
def test_mixing_before_the_head_equals_mixing_logits_in_float64(chunk: int):
    model = make("gpt2", torch.float64)  # has LayerNorm and tied embeddings
    head = nn.Linear(16, 19, dtype=torch.float64)  # adds a bias
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
    # transformers computes the loss in float32.
    torch.testing.assert_close(found["hidden"], found["chunked"], rtol=1e-5, atol=1e-6)


def test_auto_backend_is_exact_under_a_softcap():
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
def test_all_weight_on_the_last_layer_equals_the_base_model(family: str):
    for dtype, bound in ((torch.float32, 1e-6), (torch.bfloat16, 0.05)):
        model = make(family, dtype)
        base = logits(model)
        mod.apply(model, ModConfig(**FIXED))
        torch.testing.assert_close(logits(model), base, rtol=bound, atol=bound)


def test_nonlinear_head_is_refused():
    model = make()
    mod.apply(model)
    own = model.lm_head.forward
    model.lm_head.forward = lambda x: own(x).square()
    with pytest.raises(NotImplementedError, match=r"mod: model: expected logits that are the head"):
        logits(model)


@pytest.mark.parametrize("scale", [0.985, 0.9999, 1.01])
def test_scales_close_to_one_are_detected(scale: float):
    model = make("cohere", logit_scale=scale)
    base = logits(model)
    mod.apply(model, ModConfig(**FIXED))
    torch.testing.assert_close(logits(model), base, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_undeclared_scale_is_refused(family: str, dtype: torch.dtype):
    model = make(family, dtype)
    mod.apply(model)
    own = model.lm_head.forward
    model.lm_head.forward = lambda x: 1.015 * own(x)
    with pytest.raises(NotImplementedError, match=r"mod: model: expected logits that are the head"):
        logits(model)


# -------------------------------------------------------------------------------------------------
# Outputs


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_output_has_all_fields_of_the_model(family: str):
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
    again = type(out)((name, value) for name, value in out.items())  # as DataParallel constructs it
    assert list(again) == list(out) and torch.equal(again.logits, out.logits)
    assert model.forward.__signature__ == inspect.signature(type(model).forward.__get__(model))
    positional = model(IDS)
    assert torch.equal(positional.logits, out.logits)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize(
    "keep",
    [1, 3, torch.tensor([0, 4]), torch.tensor([[0, 1], [3, 5]]), IDS > 9],
    ids=["last", "last three", "positions", "positions of each", "mask"],
)
def test_logits_to_keep_selects_logits(family: str, keep: Any):
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
    fresh = mod.apply(make(family))  # has had no forward without logits_to_keep
    shake(fresh)
    for tried in (model, fresh):
        torch.testing.assert_close(logits(tried, logits_to_keep=keep), expected)
    assert model(input_ids=IDS, logits_to_keep=keep).routing_weights.shape == (2, 7, 3)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_generation_with_cache_beams_and_padding(family: str):
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
# Errors


def test_second_apply_raises_and_names_remove():
    model = mod.apply(make())
    before = traces(model)
    with pytest.raises(
        RuntimeError, match=r"apply: model: expected a model without MoD.*mod\.remove"
    ):
        mod.apply(model, ModConfig(k=2))
    assert traces(model) == before
    mod.remove(model)
    for use in (mod.remove, mod.state_dict, mod.trainable_report):
        with pytest.raises(RuntimeError, match=r": model: expected a model with MoD from mod"):
            use(model)


def test_models_other_than_causal_lms_are_refused_unchanged():
    import transformers

    llama = make()
    with pytest.raises(
        ValueError, match=r"apply: k: expected at most the number of layers, 4, found 5"
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
    with pytest.raises(NotImplementedError, match=r"apply: model: expected a decoder-only model"):
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


def test_error_names_head_of_another_width():
    # OPT-350m projects its hidden states to the width of its embeddings.
    model = make("opt", word_embed_proj_dim=8)
    before = traces(model)
    with pytest.raises(NotImplementedError, match=r"expected a head with 16 input .*found 8 in"):
        mod.apply(model)
    assert traces(model) == before


@pytest.mark.parametrize("how", ["auto", "chunked"])
def test_first_forward_with_nan_raises_and_later_ones_are_accepted(how: Any):
    model, other = mod.apply(make(), ModConfig(backend=how)), make()
    mod.apply(other, ModConfig(backend=how))
    embeds = model.get_input_embeddings()(IDS).detach()
    with torch.no_grad():
        with pytest.raises(ValueError, match=r"mod: model: expected logits without NaN in the"):
            model(inputs_embeds=embeds.clone().fill_(torch.nan))
        found = model(inputs_embeds=embeds).logits
        assert torch.equal(found, other(inputs_embeds=embeds).logits)
        assert model(inputs_embeds=embeds.clone().fill_(torch.nan)).logits.isnan().all()
