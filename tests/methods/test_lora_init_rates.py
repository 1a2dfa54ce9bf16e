"""Learning rates by width, and LoRA+ parameter groups compared with PEFT's."""

import math

import pytest
import torch
from adapted_models import KINDS, adapted, llama
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from torch import nn

import lora_ext
from lora_ext.methods import lora_init
from lora_ext.methods.lora_init import loraplus_param_groups, suggest_lr


@pytest.mark.parametrize(
    ("scheme", "expected"),
    [
        (True, 5e-5),
        ("init_a", 5e-5),
        ("INIT_A", 5e-5),
        ("init_a_normal", 5e-5),
        ("init_b", 2.5e-5),
        ("init_b_normal", 2.5e-5),
    ],
)
def test_rate_decreases_with_the_width_by_the_scheme(scheme, expected):
    assert suggest_lr(1e-4, 1024, 4096, scheme) == expected
    assert suggest_lr(expected, 4096, 1024, scheme) == pytest.approx(1e-4)
    assert suggest_lr(1e-4, 1024, 1024, scheme) == 1e-4


@pytest.mark.parametrize("scheme", [True, "init_b"])
def test_only_the_rate_of_a_is_transferred_with_lora_plus(scheme):
    found = suggest_lr(1e-4, 1024, 4096, scheme, loraplus_ratio=16)
    assert found == (2.5e-5, 1.6e-3)


def test_rank_changes_the_rate_only_with_rank_rule_inverse():
    ranks = {"rank": 16, "base_rank": 8}
    assert suggest_lr(1e-4, 64, 64, True, **ranks) == 1e-4
    assert suggest_lr(1e-4, 64, 64, True, **ranks, rank_rule="inverse") == 5e-5
    both = suggest_lr(1e-4, 64, 64, True, **ranks, rank_rule="inverse", loraplus_ratio=4)
    assert both == (5e-5, 2e-4)


@pytest.mark.parametrize(
    ("changed", "error", "text"),
    [
        ({"scheme": "init_c"}, ValueError, "scheme: expected .*'olora', found 'init_c'"),
        ({"scheme": False}, ValueError, "scheme: expected True or .*found False.*no rule is known"),
        ({"scheme": "init_ab"}, ValueError, "scheme: .*found 'init_ab'.*no rule is known"),
        ({"scheme": "gaussian"}, ValueError, "scheme: .*found 'gaussian'.*no rule is known"),
        ({"scheme": "orthogonal"}, ValueError, "scheme: .*found 'orthogonal'.*no rule is known"),
        ({"scheme": "pissa"}, ValueError, "scheme: .*found 'pissa'.*no rule is known"),
        ({"base_lr": 0.0}, ValueError, "base_lr: expected a number above 0, found 0.0"),
        ({"base_lr": math.nan}, ValueError, "base_lr: .*found nan"),
        ({"base_width": -1}, ValueError, "base_width: .*found -1"),
        ({"width": math.inf}, ValueError, "width: .*found inf"),
        ({"width": True}, TypeError, "width: expected a number above 0, found True"),
        ({"width": "64"}, TypeError, "width: .*found '64'"),
        ({"loraplus_ratio": 0}, ValueError, "loraplus_ratio: .*found 0"),
        ({"loraplus_ratio": math.inf}, ValueError, "loraplus_ratio: .*found inf"),
        ({"rank_rule": "linear"}, ValueError, "rank_rule: expected one of .*found 'linear'"),
        ({"rank_rule": "inverse", "rank": 8}, ValueError, "base_rank: .*found None"),
        ({"rank_rule": "inverse", "base_rank": 8}, ValueError, "rank: .*found None"),
        ({"rank_rule": "inverse", "rank": 0, "base_rank": 8}, ValueError, "rank: .*found 0"),
    ],
    ids=str,
)
def test_invalid_arguments_of_suggest_lr_are_refused(changed, error, text):
    arguments = {"base_lr": 1e-4, "base_width": 64, "width": 128, "scheme": True, **changed}
    with pytest.raises(error, match=f"suggest_lr: {text}"):
        suggest_lr(**arguments)


def grouped(model, groups):
    """Return (learning rate, weight decay) by name; check that each parameter occurs once."""
    names = {id(p): name for name, p in model.named_parameters()}
    found = [(names[id(p)], g["lr"], g["weight_decay"]) for g in groups for p in g["params"]]
    assert len(dict.fromkeys(name for name, *_ in found)) == len(found)
    return {name: rest for name, *rest in found}


def of_peft(model, lr, ratio, decay, embedding):
    optimizer = create_loraplus_optimizer(
        model,
        torch.optim.AdamW,
        lr=lr,
        loraplus_lr_ratio=ratio,
        loraplus_weight_decay=decay,
        loraplus_lr_embedding=embedding,
    )
    return optimizer.param_groups


class Classifier(nn.Module):
    """Classifier of an embedding, a norm, a linear layer and a head."""

    def __init__(self):
        super().__init__()
        self.embed, self.norm = nn.Embedding(11, 8), nn.LayerNorm(8)
        self.inner, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.norm(self.inner(self.embed(x))))


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["embed", "inner"], "modules_to_save": ["head", "norm"]},
        {"target_modules": ["inner", "head"], "lora_bias": True},
        {"target_modules": ["embed", "inner"], "use_dora": True},
        {"target_modules": ["inner"], "bias": "all"},
    ],
    ids=["embedding and whole modules", "biases of B", "DoRA", "all biases"],
)
@pytest.mark.parametrize("fused", [False, True])
def test_groups_equal_those_of_peft(settings, fused):
    model = get_peft_model(Classifier(), LoraConfig(r=4, **settings))
    if fused:
        lora_ext.from_peft(model)
    found = loraplus_param_groups(model, 1e-3, 16, weight_decay=0.1, lr_embedding=1e-5)
    expected = of_peft(model, 1e-3, 16, 0.1, 1e-5)
    assert grouped(model, found) == grouped(model, expected)
    assert [len(g["params"]) for g in found] == [len(g["params"]) for g in expected]
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert grouped(model, found).keys() == trained


@pytest.mark.parametrize("kind", KINDS)
def test_rate_of_b_is_the_ratio_times_that_of_a(kind):
    model = adapted(kind)
    found = grouped(model, loraplus_param_groups(model, 1e-3, 16))
    assert found and found.keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    for name, (lr, decay) in found.items():
        assert lr == (16e-3 if "lora_B" in name else 1e-3) and decay == 0


def test_optimizer_accepts_the_groups_and_uses_their_rates():
    model = adapted("ours", init_lora_weights=True)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(loraplus_param_groups(model, 1e-3, 8), eps=0)
    model(torch.arange(10)[None], labels=torch.arange(10)[None]).loss.backward()
    optimizer.step()
    for name, parameter in model.named_parameters():
        moved = (parameter.detach() - before[name]).abs().max().item()
        if "lora_B" in name:  # Adam's first step is the learning rate; dA is 0 while B is 0.
            assert moved == pytest.approx(8e-3, rel=1e-3)


def test_our_embeddings_have_a_separate_rate():
    model = lora_ext.nn.wrap(Classifier(), lora_ext.LoraConfig(target_modules=["embed", "inner"]))
    groups = loraplus_param_groups(model, 1e-3, 16)
    assert [(len(g["params"]), g["lr"]) for g in groups] == [
        (1, 1e-3),
        (2, 1e-6),
        (1, 16e-3),
        (0, 16e-3),
    ]


def test_ratio_below_one_warns():
    model = adapted("ours")
    with pytest.warns(UserWarning, match="loraplus_lr_ratio: expected at least 1.*found 0.5"):
        groups = loraplus_param_groups(model, 1e-3, 0.5)
    assert groups[2]["lr"] == 5e-4
    with pytest.warns(UserWarning, match="loraplus_ratio: expected at least 1.*found 0.5"):
        suggest_lr(1e-4, 64, 64, True, loraplus_ratio=0.5)


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"lr": 0.0}, "lr: expected a number above 0, found 0.0"),
        ({"lr": math.inf}, "lr: .*found inf"),
        ({"loraplus_lr_ratio": math.nan}, "loraplus_lr_ratio: .*found nan"),
        ({"loraplus_lr_ratio": -2}, "loraplus_lr_ratio: .*found -2"),
        ({"weight_decay": -0.1}, "weight_decay: .*from 0, found -0.1"),
        ({"lr_embedding": 0}, "lr_embedding: .*found 0"),
        ({"model": llama().requires_grad_(False)}, "model: expected trainable parameters"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_invalid_arguments_of_loraplus_param_groups_are_refused(changed, text):
    arguments = {"model": adapted("ours"), "lr": 1e-3, "loraplus_lr_ratio": 4, **changed}
    with pytest.raises(ValueError, match=f"loraplus_param_groups: {text}"):
        loraplus_param_groups(**arguments)


def test_lora_init_exports_its_related_functions():
    assert lora_init.init_lora_ is lora_ext.nn.init_lora_
    assert lora_init.LoraProbe is lora_ext.nn.LoraProbe
    assert lora_ext.methods.lora_init is lora_init
