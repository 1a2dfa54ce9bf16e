"""LoraProbe: its numbers, compared with plain torch, and the removal of its hooks."""

import copy
import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint

from lora_ext.layers.model._probe import decompose_step, gram
from lora_ext.nn import LoraLinear, LoraProbe


class Model(nn.Module):
    def __init__(self, r: int = 4, checkpointed: bool = False):
        super().__init__()
        torch.manual_seed(0)
        settings = {"r": r, "init_lora_weights": False}
        self.first = LoraLinear(nn.Linear(24, 17), **settings)
        self.second = LoraLinear(nn.Linear(17, 9), **settings, lora_dropout=0.5)
        self.checkpointed = checkpointed

    def forward(self, x):
        run = (lambda f, x: checkpoint(f, x, use_reentrant=False)) if self.checkpointed else None
        x = run(self.first, x) if run else self.first(x)
        return self.second(x.tanh())


def train(model, steps, x):
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()


def rms(z):
    return z.square().mean().sqrt().item()


@pytest.mark.parametrize("r", [1, 4, 64])  # The last rank exceeds the width.
def test_values_equal_plain_torch(r):
    model = Model(r).eval()
    x = torch.randn(2, 5, 24)
    with LoraProbe(model) as probe:
        model(x)
    inputs = {"first": x, "second": model.first(x).tanh()}
    assert [record["module"] for record in probe.history] == ["first", "second"]
    for record in probe.history:
        layer = getattr(model, record["module"])
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        z_a = inputs[record["module"]] @ a.T
        expected = {
            "step": 0,
            "rms_Z_A": rms(z_a),
            "rms_Z_B": rms(z_a @ b.T),
            "max_Z_A": z_a.abs().max().item(),
            "fro_A": a.norm().item(),
            "fro_B": b.norm().item(),
            "fro_BA": (b @ a).norm().item(),
        }
        assert record.pop("module") and record == pytest.approx(expected, rel=1e-5)


def test_norm_of_a_zero_product_is_small():
    layer = LoraLinear(nn.Linear(64, 48), r=8, init_lora_weights="orthogonal")
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    product = (gram(a) * gram(b.T)).sum().clamp(min=0).sqrt()
    assert product <= 1e-5 * a.norm() * b.norm()


def test_masked_rows_do_not_affect_the_values():
    layer = LoraLinear(nn.Linear(24, 17), init_lora_weights=False)
    x = torch.randn(2, 5, 24)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 0, 0, 0, 0]]).bool()
    probe = LoraProbe(layer)
    probe.mask = mask
    with probe:
        layer(torch.where(mask[..., None], x, torch.inf))
    z = x[mask] @ layer.lora_A["default"].weight.T
    assert probe.history[0]["rms_Z_A"] == pytest.approx(rms(z), rel=1e-5)
    assert probe.history[0]["module"] == "" and math.isfinite(probe.history[0]["rms_Z_B"])


def test_parts_of_the_change_in_a_step_sum_to_the_change():
    torch.manual_seed(0)
    x, before, after = torch.randn(6, 24), [], []
    for factors in (before, after):
        factors += [torch.randn(4, 24), torch.randn(17, 4)]
    parts = decompose_step(x, before, after)
    change = x @ after[0].T @ after[1].T - x @ before[0].T @ before[1].T
    torch.testing.assert_close(sum(parts), change, rtol=1e-5, atol=1e-4)

    layer = LoraLinear(nn.Linear(24, 17), r=4)
    with LoraProbe(layer, track_decomposition=True) as probe:
        for a, b in (before, after):
            layer.lora_A["default"].weight.data.copy_(a)
            layer.lora_B["default"].weight.data.copy_(b)
            layer(x)
    first, second = probe.history
    assert "rms_d1" not in first
    for name, part in parts._asdict().items():
        assert second[f"rms_{name}"] == pytest.approx(rms(part), rel=1e-5)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_training_is_the_same_with_a_probe_and_leaves_no_hooks(checkpointed):
    x = torch.randn(6, 24)
    plain, probed = Model(checkpointed=checkpointed), Model(checkpointed=checkpointed)
    torch.manual_seed(1)
    train(plain, 4, x)
    torch.manual_seed(1)
    with LoraProbe(probed, every=2, track_decomposition=True) as probe:
        train(probed, 4, x)
    torch.testing.assert_close(plain.state_dict(), probed.state_dict(), rtol=0, atol=0)
    steps = [(record["step"], record["module"]) for record in probe.history]
    assert steps == [(0, "first"), (0, "second"), (2, "first"), (2, "second")]
    assert not any(module._forward_pre_hooks for module in probed.modules())


def test_exception_leaves_no_hooks():
    model = Model()
    probe = LoraProbe(model)
    with pytest.raises(ZeroDivisionError), probe:
        with pytest.raises(RuntimeError, match="one `with probe` at a time"):
            probe.__enter__()
        model(torch.randn(2, 24))
        1 / 0  # noqa: B018
    assert not any(module._forward_pre_hooks for module in model.modules())
    model(torch.randn(2, 24))
    assert len(probe.history) == 2
    with probe:  # Entering it again continues the count of steps.
        model(torch.randn(2, 24))
    assert probe.history[-1]["step"] == 1


def test_report_lists_values_that_have_grown():
    model = Model()
    x = torch.randn(6, 24)
    with LoraProbe(model) as probe:
        model(x)
        model.first.lora_A["default"].weight.data.mul_(20)
        model(x)
    assert probe.report() == {"first": pytest.approx(20, rel=1e-5)}
    assert not probe.report(threshold=30)
    with probe:
        model.second.lora_A["default"].weight.data.fill_(torch.nan)
        model(x)
    assert probe.report()["second"] == math.inf


def test_peft_layers_are_measured_too():
    model = get_peft_model(
        nn.Sequential(nn.Linear(24, 17), nn.ReLU(), nn.Linear(17, 3)),
        LoraConfig(target_modules=["0", "2"], r=4),
    )
    with LoraProbe(model) as probe:
        model(torch.randn(5, 24))
    assert [record["fro_BA"] for record in probe.history] == [0.0, 0.0]


def test_model_without_the_adapter_raises():
    with pytest.raises(ValueError, match="adapter 'default', found none"):
        LoraProbe(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="adapter 'b', found none"):
        LoraProbe(Model(), "b")
    with pytest.raises(ValueError, match="every"):
        LoraProbe(Model(), every=0)
    LoraProbe(copy.deepcopy(Model()))
