"""`RankMonitor`: exact values, one grouped call per record, and no remaining hooks."""

import pytest
import torch
from adapted_models import KINDS, adapted
from methods.byte_text import byte_gpt2
from torch import nn
from torch.utils.checkpoint import checkpoint

from lora_ext import ops
from lora_ext.adapter import effective_rank
from lora_ext.methods.reasoning import RankMonitor
from lora_ext.nn import LoraConfig, LoraLinear, adapted_layers, wrap

IDS = torch.tensor([[1, 2, 3, 4]])


def hooks(model):
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())


@pytest.mark.parametrize("kind", KINDS)
def test_recorded_values_equal_those_of_the_update(kind):
    model = adapted(kind, targets=("q_proj", "down_proj"))
    before = hooks(model)
    with RankMonitor(model) as watch:
        model(IDS)
    assert hooks(model) == before
    layers = adapted_layers(model)
    assert [row["module"] for row in watch.history] == list(layers)
    for row in watch.history:
        layer = layers[row["module"]]
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        update = layer.scaling["default"] * b.double() @ a.double()
        assert row.pop("module") and row == {
            "step": 0,
            "fro": pytest.approx(update.norm().item(), rel=1e-9),
            "participation": pytest.approx(effective_rank(a, b, "participation"), rel=1e-9),
        }


def test_history_follows_training_and_outputs_are_unchanged():
    def run(watch: bool):
        torch.manual_seed(0)
        model = wrap(byte_gpt2(), LoraConfig(r=4, target_modules=["mlp.c_proj"]))
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
        rows = RankMonitor(model, every=2)
        losses = []
        with rows if watch else torch.enable_grad():
            for _ in range(5):
                optimizer.zero_grad()
                loss = model(IDS, labels=IDS).loss
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
        return losses, rows.history

    losses, history = run(True)
    assert losses == run(False)[0] and run(False)[1] == []
    assert [row["step"] for row in history] == [0, 0, 2, 2, 4, 4]
    assert {row["module"] for row in history} == {f"transformer.h.{i}.mlp.c_proj" for i in (0, 1)}
    assert [row["fro"] for row in history[:2]] == [row["participation"] for row in history[:2]]
    assert history[0]["fro"] == 0
    norms = [row["fro"] for row in history[::2]]
    assert norms == sorted(set(norms))
    assert all(1 <= row["participation"] <= 4 for row in history[2:])


def test_record_is_one_grouped_call(monkeypatch):
    model = adapted("ours")
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.add_adapter("other", r=7)
    calls = []
    inner = ops.lora_gram
    monkeypatch.setattr(
        ops, "lora_gram", lambda a, b, **o: calls.append(len(a)) or inner(a, b, **o)
    )
    with RankMonitor(model):
        model(IDS)
        model(IDS)
    assert calls == [6, 6]


def test_different_ranks_are_supported_and_scale_zero_records_zero():
    model = nn.Sequential(
        LoraLinear(nn.Linear(6, 6), r=2, init_lora_weights=False),
        LoraLinear(nn.Linear(6, 6), r=3, init_lora_weights=False),
    )
    model[0].scaling["default"] = 0.0
    model[1].scaling["default"] = -1.0
    with RankMonitor(model) as watch:
        model(torch.randn(2, 6))
    first, second = watch.history
    assert (first["fro"], first["participation"]) == (0, 0)
    assert second["fro"] > 0 and 1 <= second["participation"] <= 3


def test_norm_of_a_vanishing_product_is_small():
    layer = LoraLinear(nn.Linear(64, 48), r=8, init_lora_weights="orthogonal")
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    with RankMonitor(layer) as watch:
        layer(torch.randn(2, 64))
    assert watch.history[0]["fro"] <= 1e-5 * (a.norm() * b.norm()).item()


def test_recomputed_forward_is_not_counted():
    layer = LoraLinear(nn.Linear(6, 6), init_lora_weights=False)
    with RankMonitor(layer) as watch:
        for _ in range(2):
            checkpoint(layer, torch.randn(2, 6), use_reentrant=False).sum().backward()
    assert [row["step"] for row in watch.history] == [0, 1]


def test_exception_leaves_no_hook_and_the_monitor_can_be_reentered():
    model = adapted("ours")
    watch = RankMonitor(model)
    with pytest.raises(ZeroDivisionError), watch:
        model(IDS)
        raise ZeroDivisionError
    assert hooks(model) == 0 and len(watch.history) == 6
    with watch:
        model(IDS)
        with pytest.raises(RuntimeError, match="RankMonitor: already entered"):
            watch.__enter__()
    assert [row["step"] for row in watch.history] == [0] * 6 + [1] * 6


def test_errors_name_invalid_arguments():
    with pytest.raises(ValueError, match="RankMonitor: every: expected at least 1, found 0"):
        RankMonitor(adapted("ours"), every=0)
    with pytest.raises(
        ValueError, match=r"RankMonitor: model: expected layers .* 'red', found none"
    ):
        RankMonitor(adapted("ours"), adapter="red")
