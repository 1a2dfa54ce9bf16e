"""Fused layers have PEFT's repr, errors and warnings; unsupported layers stay with PEFT."""

import copy
import pickle
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import Linear as PeftLinear
from peft.tuners.lora.model import LoraModel
from same_steps import logits, pair
from tiny import CONFIGS, make_model, make_pair, make_peft
from torch import Tensor, nn

import lora_ext
from lora_ext.interop.peft import report, to_peft
from lora_ext.interop.peft._layers import FusedLinear
from lora_ext.interop.peft.model import _FusedLoraModel

NAMES = ["red", "green", "__base__", "blue", "green"]


def fused_layers(model: nn.Module) -> Iterator[Any]:
    return (m for m in model.modules() if isinstance(m, FusedLinear))


def test_repr_pickle_and_status_equal_peft() -> None:
    theirs, ours = pair()
    assert repr(ours) == repr(theirs)
    assert "FusedLinear" in repr(FusedLinear) and "FusedLoraModel" in repr(_FusedLoraModel)
    assert FusedLinear is not PeftLinear and _FusedLoraModel is not LoraModel
    assert ours.get_model_status() == theirs.get_model_status()
    assert ours.get_layer_status() == theirs.get_layer_status()
    assert {status.module_type for status in ours.get_layer_status()} == {"lora.Linear"}
    for twin in (pickle.loads(pickle.dumps(ours)), copy.deepcopy(ours)):
        assert type(twin.base_model) is _FusedLoraModel
        assert len(list(fused_layers(twin))) == len(list(fused_layers(ours)))
        assert torch.equal(logits(twin, adapter_names=NAMES), logits(ours, adapter_names=NAMES))


@pytest.mark.parametrize("names", [[], ["__base__"], ["__base__"] * 7, ["red"]], ids=len)
def test_wrong_number_of_names_raises_the_error_of_peft(names: list[str]) -> None:
    theirs, ours = pair()
    with pytest.raises(ValueError) as expected:
        logits(theirs, adapter_names=names)
    with pytest.raises(ValueError) as found:
        logits(ours, adapter_names=names)
    assert str(found.value) == str(expected.value)
    ours.set_requires_grad(["red", "green", "blue"])
    with pytest.raises(ValueError) as found:
        logits(ours.train(), adapter_names=names)
    assert str(found.value) == str(expected.value)


def test_block_of_a_pool_around_the_model_warns(tmp_path: Path) -> None:
    _attached, _, pool = make_pair("llama", tmp_path)
    pool.load("other", tmp_path / "red")
    _, ours = pair()
    ours.set_adapter("red")
    alone = logits(ours)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with lora_ext.adapters("red"):  # The block gives all rows the active adapter.
            assert torch.equal(logits(ours), alone)
        with lora_ext.adapters(None):
            assert torch.equal(logits(ours), alone)
        with lora_ext.adapters(["blue"] * 5):
            logits(ours, adapter_names=NAMES)
            with ours.disable_adapter():
                logits(ours)
    with lora_ext.adapters("other"):  # The block may be for another model.
        assert_one_warning(lambda: logits(ours), alone)


@pytest.mark.parametrize("names", [["red", "green", None, "blue", "green"], "blue"])
def test_block_of_another_model_with_equal_adapter_name_warns(names: Any, tmp_path: Path) -> None:
    """Check a teacher with an active adapter inside the block of its student."""
    student, _, _ = make_pair("llama", tmp_path)
    _, teacher = pair()
    teacher.set_adapter("red")
    alone = logits(teacher)
    with lora_ext.adapters(names):
        logits(student)
        assert_one_warning(lambda: logits(teacher), alone)


def assert_one_warning(forward: Callable[[], Tensor], expected: Tensor) -> None:
    with pytest.warns(UserWarning, match="found a model of from_peft") as caught:
        assert torch.equal(forward(), expected)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        forward()


def test_block_of_a_pool_that_serves_layers_of_the_same_model_raises(
    tmp_path: Path,
) -> None:
    base = make_model("llama")
    make_peft(base, {"red": {"target_modules": ["v_proj"]}}).save_pretrained(tmp_path)
    pool = lora_ext.AdapterPool(base, targets=["v_proj"], max_slots=2)
    pool.load("red", tmp_path / "red")
    config = peft.LoraConfig(target_modules=["q_proj"])
    attached: Any = lora_ext.attach(base, pool)
    ours = lora_ext.from_peft(peft.get_peft_model(attached, config, adapter_name="red"))
    with lora_ext.adapters(["red", None] * 2 + ["red"]):
        with pytest.raises(RuntimeError, match="pass adapter_names="):
            logits(ours)


@pytest.mark.parametrize("kind", ["learned", "per output", "per token"])
def test_scaling_that_is_not_a_plain_number_uses_peft(kind: str) -> None:
    theirs, ours = pair(configs={"red": CONFIGS["llama"]["red"]})
    found: list[Tensor] = []
    for model in (theirs, ours):
        torch.manual_seed(0)
        for layer in model.modules():
            if isinstance(layer, PeftLinear):
                width = {"learned": (), "per output": (layer.out_features,), "per token": (7, 1)}
                scaling = torch.rand(width[kind], dtype=torch.float64) + 0.5
                layer.scaling["red"] = nn.Parameter(scaling) if kind == "learned" else scaling
        found.append(logits(model))
        found[-1].square().sum().backward()
    assert torch.equal(*found)
    for own, other in zip(
        fused_layers(ours), fused_layers(lora_ext.from_peft(theirs)), strict=True
    ):
        if kind == "learned":
            assert own.scaling["red"].grad.abs() > 0
            assert torch.equal(own.scaling["red"].grad, other.scaling["red"].grad)
        assert torch.equal(own.lora_A["red"].weight.grad, other.lora_A["red"].weight.grad)
    assert all("scaling" in reason for reason in report(ours).left.values())
    assert report(ours).left and not report(ours).taken


def test_output_projection_that_attention_never_calls_is_left_to_peft() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mha, self.head = nn.MultiheadAttention(8, 2), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.mha(x, x, x)[0])

    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules=["mha", "head"], init_lora_weights=False)
    theirs: Any = peft.get_peft_model(Attention(), config).eval()
    ours: Any = lora_ext.from_peft(copy.deepcopy(theirs))
    found = report(ours)
    assert found.taken == ("base_model.model.head",)
    assert "never calls it" in found.left["base_model.model.mha.base_layer.out_proj"]
    assert repr(ours) == repr(theirs)
    x = torch.randn(3, 5, 8)
    torch.testing.assert_close(ours(x), theirs(x))


def test_model_without_a_supported_layer_warns() -> None:
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Embedding(11, 8), nn.Conv1d(8, 8, 1), nn.Conv1d(8, 8, 1))
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["0", "1", "2"]))
    with pytest.warns(UserWarning, match="expected layers that lora_ext can run") as caught:
        lora_ext.from_peft(model)
    text = str(caught[0].message)
    assert "peft.tuners.lora.layer.Embedding: base_model.model.0" in text
    assert "peft.tuners.lora.layer.Conv1d: base_model.model.1, base_model.model.2" in text
    assert caught[0].filename == __file__


def test_training_by_name_warns_only_about_frozen_adapters() -> None:
    _, ours = pair()
    ours.set_adapter("red")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        logits(ours, adapter_names=NAMES)  # evaluation does not warn
        with torch.no_grad():
            logits(ours.train(), adapter_names=NAMES)
        logits(ours, adapter_names=["red", "__base__", "red", "red", "red"])
        ours.set_requires_grad(["red", "green", "blue"])
        logits(ours, adapter_names=NAMES)
    _, ours = pair()
    ours.train().set_adapter("red")  # PEFT freezes the other adapters.
    with pytest.warns(
        UserWarning, match=r"adapter_names: .*found 'blue', 'green' frozen"
    ) as caught:
        logits(ours, adapter_names=NAMES)
    assert len(caught) == 1 and "set_requires_grad" in str(caught[0].message)


def test_replacing_is_silent_and_undoing_restores_the_types_of_peft() -> None:
    model = make_peft(make_model("llama"), CONFIGS["llama"])
    kinds = [type(m) for m in model.modules()]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lora_ext.from_peft(model)
    assert [type(m) for m in to_peft(model).modules()] == kinds


def test_names_raise_while_a_trainer_runs_its_reference_adapter() -> None:
    """Check TRL's case: ``ref``, a copied adapter, is active in a forward without gradients."""
    _, ours = pair(configs={**CONFIGS["llama"], "ref": CONFIGS["llama"]["red"]})
    ours.train().set_adapter("ref")
    with torch.no_grad(), pytest.raises(ValueError, match=r"adapter_names: .*'ref' is active"):
        logits(ours, adapter_names=NAMES)
    with torch.no_grad():
        alone = logits(ours)
        assert torch.equal(logits(ours, adapter_names=["ref"] * 5), alone)
        with ours.disable_adapter():
            base = logits(ours)
        # Names are accepted if all of them are the base model.
        assert torch.equal(logits(ours, adapter_names=["__base__"] * 5), base)
        ours.set_adapter("red")
        trained = logits(ours, adapter_names=NAMES)
        ours.eval().set_adapter("ref")
        assert torch.equal(logits(ours, adapter_names=NAMES), trained)
    with torch.no_grad(), ours.train().disable_adapter():
        assert torch.equal(logits(ours, adapter_names=NAMES), logits(ours))


@pytest.mark.parametrize("name", ["default", "other-name"])
def test_layers_with_bare_parameters_as_factors_equal_peft(name):
    """Check AdaLora, whose LoRA layers in PEFT have parameters instead of modules as factors."""
    torch.manual_seed(0)
    config = peft.AdaLoraConfig(target_modules=["0"], init_lora_weights=False, total_step=1)
    base = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3))
    model = peft.get_peft_model(base, config, adapter_name=name).eval()
    x = torch.randn(4, 6)
    wanted = model(x)
    lora_ext.from_peft(model)
    assert lora_ext.interop.peft.report(model).taken
    torch.testing.assert_close(model(x), wanted)


@pytest.mark.parametrize("tied", [False, True])
def test_trainable_tokens_stay_with_peft_beside_fused_layers(tied: bool) -> None:
    model = make_model("llama")
    if tied:
        model.config.tie_word_embeddings = True
        model.tie_weights()
    config = peft.LoraConfig(
        r=4, target_modules=["q_proj"], trainable_token_indices=[3, 5], init_lora_weights=False
    )
    theirs = peft.get_peft_model(model, config)
    theirs.add_adapter("b", config)
    for name, parameter in theirs.named_parameters():
        if "trainable_tokens_delta" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    ours = lora_ext.from_peft(copy.deepcopy(theirs))
    ids, found = torch.tensor([[3, 4, 5, 6], [5, 9, 3, 1]]), []
    for each in (ours.eval(), theirs.eval()):
        with torch.no_grad():
            mixed = each(input_ids=ids, adapter_names=["default", "b"]).logits
        loss = each(input_ids=ids, labels=ids).loss
        loss.backward()
        kept = [p.grad for n, p in each.named_parameters() if n.endswith("tokens_delta.default")]
        found.append([mixed, loss.detach(), *kept])
    assert len(found[0]) >= 3 and all(bool(gradient.any()) for gradient in found[0][2:])
    for mine, wanted in zip(*found, strict=True):
        torch.testing.assert_close(mine, wanted, atol=1e-5, rtol=1e-5)


def test_warning_of_peft_about_an_unknown_layer_is_kept() -> None:
    class OwnLayer(nn.Module, LoraLayer):
        def __init__(self, base_layer: nn.Module, adapter_name: str, **kwargs: Any):
            super().__init__()
            LoraLayer.__init__(self, base_layer, **kwargs)
            self._active_adapter = adapter_name

    config = peft.LoraConfig(target_modules=["lstm"])
    config._register_custom_module({nn.LSTM: OwnLayer})
    with pytest.warns(UserWarning) as caught:
        base = nn.ModuleDict({"lstm": nn.LSTM(10, 20)})
        lora_ext.from_peft(peft.get_peft_model(base, config))
    said = [str(warning.message) for warning in caught]
    assert any("Unsupported layer type" in text and "LSTM" in text for text in said)
    assert any("expected layers that lora_ext can run, found none" in text for text in said)
