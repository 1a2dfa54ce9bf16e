"""`select_modules` selects in the last blocks, and the sweep trains a new model per setting."""

import peft
import pytest
import torch
from adapted_models import llama
from methods.byte_text import byte_gpt2
from torch import nn

from lora_ext.methods.reasoning import SymbolModel, rank_report, rank_sweep, select_modules
from lora_ext.nn import LoraConfig, LoraLinear, wrap

IDS = torch.tensor([[1, 2, 3, 4]])


def test_select_modules_returns_modules_of_the_last_blocks():
    model = byte_gpt2(layers=4, width=8)
    names = [f"transformer.h.{i}.mlp.c_proj" for i in range(4)]
    assert select_modules(model) == names
    assert [select_modules(model, last_n=n) for n in (1, 3, 4)] == [names[3:], names[1:], names]
    both = select_modules(model, ("c_proj",), 1)
    assert both == ["transformer.h.3.attn.c_proj", "transformer.h.3.mlp.c_proj"]


def test_blocks_without_a_selected_module_are_counted():
    model = nn.ModuleDict({"h": nn.ModuleList(nn.ModuleDict({"ln": nn.Identity()}) for _ in "abc")})
    model["h"][1]["fc"] = nn.Linear(2, 2)
    assert select_modules(model, ("fc",), 2) == ["h.1.fc"]
    assert select_modules(model, ("fc",), 1) == []


def test_last_blocks_are_selected_in_each_stack():
    model = nn.ModuleDict(
        {
            "vision": nn.ModuleList(nn.Sequential(nn.Linear(2, 2)) for _ in range(4)),
            "text": nn.ModuleList(nn.Sequential(nn.Linear(2, 2)) for _ in range(2)),
        }
    )
    assert select_modules(model, ("0",), 1)[-2:] == ["vision.3.0", "text.1.0"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"suffixes": ("up_proj",)}, r"suffixes: expected endings of names in SymbolModel, found"),
        ({"last_n": 0}, "last_n: expected 1 to 4 blocks, found 0"),
        ({"last_n": 5}, "last_n: expected 1 to 4 blocks, found 5"),
    ],
)
def test_errors_name_invalid_choices(arguments, message):
    with pytest.raises(ValueError, match=f"^select_modules: {message}"):
        select_modules(SymbolModel(), **arguments)


@pytest.mark.parametrize("by", ["wrap", "layer", "peft"])
def test_conv1d_of_gpt2_is_adapted_and_reported(by):
    model = byte_gpt2(width=16)
    names = select_modules(model, last_n=1)
    if by == "wrap":
        wrap(model, LoraConfig(r=3, target_modules=names, init_lora_weights=False))
    elif by == "layer":
        block = model.transformer.h[1].mlp
        block.c_proj = LoraLinear(block.c_proj, r=3, init_lora_weights=False)
    else:
        config = peft.LoraConfig(
            r=3, target_modules=names, init_lora_weights=False, fan_in_fan_out=True
        )
        model = peft.get_peft_model(model, config)
    (row,) = rank_report(model)
    assert row["module"] == "transformer.h.1.mlp.c_proj"
    assert (row["r"], row["shape"]) == (3, (16, 64)) and 1 <= row["entropy"] <= 3
    assert torch.isfinite(model(input_ids=IDS).logits).all()


def test_sweep_trains_each_setting_on_a_fresh_model():
    made, trained = [], []

    def make_model():
        made.append(llama())
        return made[-1]

    def train(model, task):
        parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        assert parameters and all("lora_" in name for name in parameters)
        optimizer = torch.optim.AdamW(parameters.values(), lr=1e-2)
        for _ in range(3):
            optimizer.zero_grad()
            model(input_ids=task, labels=task).loss.backward()
            optimizer.step()
        trained.append(model)

    @torch.no_grad()
    def score(model, task):
        return -model(input_ids=task, labels=task).loss.item()

    points = rank_sweep(
        make_model,
        IDS,
        (r for r in (2, 4)),
        train=train,
        score=score,
        layers=(1, None),
        suffixes=("down_proj",),
        kinds=("entropy",),
    )
    assert [(p.last_n, p.rank, p.alpha) for p in points] == [
        (1, 2, 1.0),
        (1, 4, 2.0),
        (None, 2, 1.0),
        (None, 4, 2.0),
    ]
    assert trained == made and len(set(map(id, made))) == 4
    assert [len(p.report) for p in points] == [1, 1, 3, 3]
    base = score(llama(), IDS)
    for point in points:
        assert point.score > base
        assert all(row["r"] == point.rank for row in point.report)
        entropies = [row["entropy"] for row in point.report]
        assert point.mean("entropy") == pytest.approx(sum(entropies) / len(entropies))
        assert 1 <= point.mean("entropy") <= point.rank
    a = trained[1].model.layers[2].mlp.down_proj.lora_A["default"].weight
    assert a.std().item() == pytest.approx(1 / 4, rel=0.2)  # N(0, 1) / r


def test_empty_sweep_is_refused():
    with pytest.raises(ValueError, match="rank_sweep: ranks and layers: expected at least one"):
        rank_sweep(llama, IDS, (), train=print, score=print)
