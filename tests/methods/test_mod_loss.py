"""The loss of MoD: its terms compared with dense expressions, and cases in which it is zero."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from methods.mod_models import IDS, make, shake, softcapped
from torch import Tensor
from torch.nn.functional import cross_entropy

from lora_ext.methods import mod
from lora_ext.methods.mod import ModConfig
from lora_ext.methods.mod._ensemble import Capture
from lora_ext.nn import decoder_layers

LABELS = IDS.masked_fill(
    torch.rand(IDS.shape, generator=torch.Generator().manual_seed(0)) < 0.3, -100
)


def layers_logits(model: Any, **inputs: Any) -> list[Tensor]:
    """Return the logits of the last k layers, computed with the model's norms and head."""
    found: list[Tensor] = []
    hooks = [
        block.register_forward_hook(
            lambda _, __, out: found.append(out[0] if isinstance(out, tuple) else out)
        )
        for block in list(decoder_layers(model))[-model.mod.config.k :]
    ]
    model(input_ids=IDS, **inputs)
    for hook in hooks:
        hook.remove()
    norms = [*model.mod.norms, model.mod.final_norm]
    cap = getattr(model.config, "final_logit_softcapping", None)
    normed = (n(h) for n, h in zip(norms, found, strict=True))
    return [softcapped(model.get_output_embeddings()(n), cap) for n in normed]


def dense_kl(each: list[Tensor], tau: float, mask: Tensor) -> Tensor:
    *late, last = ((z / tau).log_softmax(-1) for z in each)
    rows = [(last.detach().exp() * (last.detach() - z)).sum(-1)[mask].mean() for z in late]
    return tau**2 * torch.stack(rows).mean()


def ce(logits: Tensor, labels: Tensor = LABELS) -> Tensor:
    return cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)


def shifted_mask(labels: Tensor = LABELS) -> Tensor:
    return torch.cat([labels[:, 1:] != -100, torch.zeros(2, 1, dtype=torch.bool)], 1)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("training", [False, True])
def test_loss_is_the_weighted_sum_of_terms_that_equal_dense_ones(family: str, training: bool):
    model = make(family, attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0).train(training)
    config = ModConfig(distill_weight=0.3, tau=2.0, layer_ce=0.2, vocab_chunk=8)
    mod.apply(model, config).requires_grad_(True)
    shake(model)
    out = model(input_ids=IDS, labels=LABELS)
    each = layers_logits(model)
    kl = dense_kl(each, 2.0, shifted_mask())
    losses = torch.stack([ce(z) for z in each])
    expected = {"ce_loss": ce(out.logits), "distill_loss": kl, "layer_ce_loss": losses[:-1].mean()}
    for name, value in expected.items():
        torch.testing.assert_close(out[name], value, rtol=1e-5, atol=1e-6, msg=name)
    total = expected["ce_loss"] + 0.3 * kl + 0.2 * losses[:-1].mean()
    torch.testing.assert_close(out.loss, total, rtol=1e-5, atol=1e-6)
    assert (out.layer_losses is None) == training
    if not training:
        torch.testing.assert_close(out.layer_losses, losses, rtol=1e-5, atol=1e-6)

    found, wanted = (
        torch.autograd.grad(loss, list(model.parameters()), retain_graph=True, allow_unused=True)
        for loss in (out.loss, total)
    )
    for name, a, b in zip(dict(model.named_parameters()), found, wanted, strict=True):
        assert (a is None) == (b is None), name
        if a is not None and b is not None:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=name)


def test_terms_without_weight_are_not_computed():
    model = mod.apply(make(), ModConfig(distill_weight=0.0)).train()
    out = model(input_ids=IDS, labels=LABELS)
    assert list(out) == ["loss", "logits", "cache", "ce_loss", "routing_weights"]
    assert torch.equal(out.loss, out.ce_loss)
    assert list(model(input_ids=IDS)) == ["logits", "cache", "routing_weights"]


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_distillation_can_use_all_positions_of_the_attention_mask(family: str):
    model = mod.apply(make(family), ModConfig(distill_on="all"))
    shake(model)
    mask = torch.ones_like(IDS)
    mask[0, :2] = 0
    out = model(input_ids=IDS, labels=LABELS, attention_mask=mask)
    expected = dense_kl(layers_logits(model, attention_mask=mask), 1.0, mask.bool())
    torch.testing.assert_close(out.distill_loss, expected, rtol=1e-5, atol=1e-6)
    whole = model(input_ids=IDS, labels=LABELS)
    expected = dense_kl(layers_logits(model), 1.0, torch.ones_like(mask).bool())
    torch.testing.assert_close(whole.distill_loss, expected, rtol=1e-5, atol=1e-6)


def test_distillation_gives_the_last_layer_no_gradient():
    model = mod.apply(make())
    shake(model)
    model(input_ids=IDS, labels=LABELS).distill_loss.backward()
    moved = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert "mod.norms.0.weight" in moved and "mod.norms.1.weight" in moved
    assert "model.layers.2.mlp.up_proj.weight" in moved
    assert not any(n.startswith(("model.layers.3.", "model.norm", "mod.router")) for n in moved)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("mix", ["logit", "prob"])
@pytest.mark.parametrize("count", [None, 0, 5])
def test_batch_without_labels_gives_zero_loss_and_gradients(family: str, mix: Any, count: Any):
    model = mod.apply(make(family), ModConfig(mix=mix, layer_ce=0.5))
    shake(model)
    more = {} if count is None else {"num_items_in_batch": torch.tensor(count)}
    out = model(input_ids=IDS, labels=torch.full_like(IDS, -100), **more)
    assert out.ce_loss == 0
    if count != 0:
        assert out.loss == out.distill_loss == out.layer_ce_loss == 0
        out.loss.backward()
        assert not any(p.grad.any() for p in model.parameters() if p.grad is not None)
    assert not out.layer_losses.any()
    single = mod.apply(make(family), ModConfig(k=1))
    assert single(input_ids=IDS, labels=torch.full_like(IDS, -100)).loss == 0


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("positions", ["labels", "all"])
def test_accumulated_micro_batches_equal_the_whole_batch(family: str, positions: Any):
    model = mod.apply(make(family), ModConfig(distill_weight=0.5, layer_ce=0.3))
    shake(model)
    whole = model(input_ids=IDS, labels=LABELS)
    count = shifted_mask().sum()
    parts = [
        model(input_ids=i[None], labels=y[None], num_items_in_batch=count)
        for i, y in zip(IDS, LABELS, strict=True)
    ]
    for name in ("loss", "ce_loss", "distill_loss", "layer_ce_loss"):
        total = parts[0][name] + parts[1][name]
        torch.testing.assert_close(total, whole[name], rtol=1e-5, atol=1e-6, msg=name)
    as_int = model(input_ids=IDS, labels=LABELS, num_items_in_batch=int(count))
    torch.testing.assert_close(as_int.loss, whole.loss, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_given_shift_labels_are_used_unchanged(family: str):
    model = mod.apply(make(family))
    shake(model)
    out = model(input_ids=IDS, labels=LABELS)
    shifted = torch.cat([LABELS[:, 1:], torch.full((2, 1), -100)], 1)
    same = model(input_ids=IDS, labels=LABELS, shift_labels=shifted)
    for name in ("loss", "ce_loss", "distill_loss", "layer_losses"):
        torch.testing.assert_close(same[name], out[name])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_half_precision_and_autocast_train(family: str, dtype: torch.dtype):
    exact = mod.apply(make(family, attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0)).train()
    model = mod.apply(make(family, dtype, attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0)).train()
    wanted = exact(input_ids=IDS, labels=LABELS)
    out = model(input_ids=IDS, labels=LABELS)
    with torch.autocast("cpu", dtype):
        cast = exact(input_ids=IDS, labels=LABELS)
    for found in (out, cast):
        for name in ("loss", "ce_loss", "distill_loss"):
            torch.testing.assert_close(
                found[name].float(), wanted[name], rtol=0.1, atol=0.05, msg=name
            )
        found.loss.backward()
    for name, p in (*model.named_parameters(), *exact.named_parameters()):
        assert not p.requires_grad or (p.grad is not None and p.grad.isfinite().all()), name
    assert model.mod.router.dtype == torch.float32


def test_distillation_trains_the_late_norms():
    model = make().requires_grad_(False)
    mod.apply(model)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 0.05)
    losses = []
    for _ in range(30):
        loss = model(input_ids=IDS, labels=LABELS).distill_loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_unshared_norm_is_a_copy_that_trains_instead_of_the_models():
    model = make()
    mod.apply(model, ModConfig(share_final_norm=False, train_final_norm=True))
    assert model.mod.final_norm is not model.model.norm
    assert not model.model.norm.weight.requires_grad
    model(input_ids=IDS, labels=LABELS).loss.backward()
    assert model.mod.norms[2].weight.grad.any() and model.model.norm.weight.grad is None
    mod.remove(model)
    mod.apply(model, ModConfig(share_final_norm=False))
    assert not model.mod.norms[2].weight.requires_grad and model.mod.norms[1].weight.requires_grad
    mod.remove(model)
    mod.apply(model, ModConfig(train_final_norm=True))
    model(input_ids=IDS, labels=LABELS).loss.backward()
    assert model.model.norm.weight.grad.any()
    assert isinstance(next(iter(decoder_layers(model)[-1]._forward_hooks.values())), Capture)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"k": 0}, "k: expected an integer from 1, found 0"),
        ({"k": True}, "k: expected an integer from 1, found True"),
        ({"k": 2.0}, "k: expected an integer from 1, found 2.0"),
        ({"router": "top"}, "router: expected one of ('token', 'static', 'fixed'), found 'top'"),
        ({"mix": "mean"}, "mix: expected one of ('logit', 'prob'), found 'mean'"),
        ({"distill_on": "none"}, "distill_on: expected one of ('labels', 'all'), found 'none'"),
        ({"backend": "gpu"}, "backend: expected one of ('auto', 'hidden', 'chunked'), found 'gpu'"),
        ({"final_mass": 0.0}, "final_mass: expected a number in (0, 1), found 0.0"),
        ({"final_mass": 1}, "final_mass: expected a number in (0, 1), found 1"),
        ({"final_mass": float("nan")}, "final_mass: expected a finite number, found nan"),
        ({"distill_weight": -0.1}, "distill_weight: expected a number from 0, found -0.1"),
        ({"layer_ce": -1}, "layer_ce: expected a number from 0, found -1"),
        ({"tau": 0}, "tau: expected a number above 0, found 0"),
        ({"tau": "1"}, "tau: expected a number above 0, found '1'"),
        ({"tau": 10**400}, "tau: expected a number above 0, found 1000"),
        ({"vocab_chunk": 0}, "vocab_chunk: expected an int in [1, 2^63), found 0"),
        ({"vocab_chunk": 2**63}, "vocab_chunk: expected an int in [1, 2^63), found 9223372"),
        ({"share_final_norm": 1}, "share_final_norm: expected True or False, found 1"),
        ({"fixed_weights": (1.0,)}, "fixed_weights: expected None unless the router is 'fixed'"),
        ({"router": "fixed"}, "fixed_weights: expected k = 3 numbers of at least 0 that sum to 1"),
        *(
            (
                {"router": "fixed", "fixed_weights": weights},
                f"fixed_weights: expected k = 3 numbers of at least 0 that sum to 1, "
                f"found {weights!r}",
            )
            for weights in (
                *((0.5, 0.5), (-0.5, 0.5, 1.0), (0.1, 0.2, 0.3), (0.0, 0.0, 0.0)),
                *((0, 0, 10**400), "001", {0.0: "a", 0.25: "b", 0.75: "c"}),
            )
        ),
    ],
)
def test_errors_name_invalid_settings(fields: dict, message: str):
    with pytest.raises(ValueError, match=re.escape(f"ModConfig: {message}")):
        ModConfig(**fields)


def test_settings_at_their_limits_are_accepted():
    assert ModConfig(k=1, final_mass=1.0).k == 1
    assert ModConfig(router="fixed", fixed_weights=(0.5, 0.5 + 5e-7, 0.0)).fixed_weights is not None
    with pytest.raises(
        mod.InexactMixError, match=r"ModConfig: backend: expected 'auto' or 'chunked'"
    ):
        ModConfig(mix="prob", backend="hidden")
