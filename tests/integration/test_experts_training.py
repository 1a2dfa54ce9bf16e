"""Training of adapters on routed experts: from_peft compared with PEFT, in float64."""

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from mixtures import CONFIGS, DOWN, FAMILIES, UP, make_mixture, make_peft, tokens
from same_steps import assert_close, assert_same_gradients, checkpointed, gradients, step
from tiny import only
from torch import Tensor

import lora_ext
from lora_ext.interop.peft import report, to_peft
from lora_ext.nn import LayerGroups, adapter_factors

NAMES = ["red", "green", "__base__", "blue", "green"]


def pair(family: str, configs: Any = CONFIGS, **extra: Any) -> tuple[Any, Any]:
    theirs = make_peft(make_mixture(family), configs, **extra).double()
    return theirs, lora_ext.from_peft(copy.deepcopy(theirs))


def logits(model: Any, **kwargs: Any) -> Tensor:
    return model(input_ids=tokens(5, 6), **kwargs).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_every_wrapper_is_replaced(family: str) -> None:
    _, ours = pair(family)
    found = report(ours)
    assert not found.left
    assert sum(".experts" in name for name in found.taken) == 4  # two parameters, two layers
    layer = ours.base_model.model.model.layers[0].mlp.experts
    with pytest.raises(NotImplementedError, match=r"pair for each of [45] experts"):
        adapter_factors(layer, "red")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("adapter", CONFIGS)
def test_forward_and_gradients_equal_peft(family: str, adapter: str) -> None:
    theirs, ours = pair(family)
    for model in (theirs, ours):
        model.set_adapter(adapter)
        model.train()
    assert_close(step(ours, logits), step(theirs, logits))
    assert_same_gradients(ours, gradients(theirs), moved=8)


@pytest.mark.parametrize("parameter", [UP, DOWN])
def test_single_parameter_equals_peft(parameter: str) -> None:
    configs = {"red": {"r": 4, "target_parameters": [parameter]}}
    for family in FAMILIES:
        theirs, ours = pair(family, configs)
        assert_close(step(ours, logits), step(theirs, logits))
        expected = gradients(theirs)
        assert sum(g is not None for g in expected.values()) == 4
        for name, gradient in expected.items():
            if gradient is not None:
                assert_close(ours.get_parameter(name).grad, gradient, name)


def test_several_active_adapters_are_added() -> None:
    theirs, ours = pair("gpt_oss")
    for model in (theirs, ours):
        model.base_model.set_adapter(["red", "green", "blue"])
    assert_close(step(ours, logits), step(theirs, logits))
    assert_same_gradients(ours, gradients(theirs), moved=8)


def trained_alone(theirs: Any, ids: Tensor, names: list[str]) -> tuple[Tensor, dict[str, Any]]:
    """Return logits and gradients of PEFT in a loop over the rows, each with its adapter."""
    theirs.zero_grad(set_to_none=True)
    weights = torch.randn((*ids.shape, 61), generator=torch.manual_seed(7), dtype=torch.float64)
    rows = []
    for row, name in enumerate(names):
        with only(theirs, name):
            rows.append(theirs(input_ids=ids[row : row + 1]).logits)
        if name != "__base__":
            (rows[-1] * weights[row]).sum().backward()
    return torch.cat(rows).detach(), gradients(theirs)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_adapters_per_row_train_as_in_separate_runs(family: str, checkpointing: bool) -> None:
    theirs, ours = pair(family)
    theirs.train()
    ours.train()
    ours.set_requires_grad([name for name in CONFIGS])
    checkpointed(ours, False if checkpointing else None)
    got = step(ours, lambda model: logits(model, adapter_names=NAMES))
    expected, wanted = trained_alone(theirs, tokens(5, 6), NAMES)
    assert_close(got, expected)
    assert_same_gradients(ours, wanted, moved=8)


def test_adapter_names_raise_the_error_of_peft_if_peft_runs_the_experts() -> None:
    """Check experts with a hook: PEFT runs such a module, and does not support adapters per row."""
    _, ours = pair("mixtral")
    experts = ours.base_model.model.model.layers[0].mlp.experts.get_base_layer()
    handle = experts.register_forward_hook(lambda *_: None)
    left = report(ours).left
    assert [name for name in left if "layers.0.mlp.experts" in name] == sorted(left)
    assert all("hooks" in reason for reason in left.values())
    with pytest.raises(ValueError, match="mixed adapter batches"):
        logits(ours, adapter_names=NAMES)
    theirs = to_peft(copy.deepcopy(ours))
    assert_close(step(ours, logits), step(theirs, logits))
    assert_same_gradients(ours, gradients(theirs), moved=8)
    handle.remove()
    assert not report(ours).left


def test_other_functions_of_peft_layers_are_unchanged(tmp_path: Path) -> None:
    theirs, ours = pair("qwen3")
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    with torch.no_grad():
        for model in (theirs, ours):
            model.set_adapter("green")
        with ours.disable_adapter(), theirs.disable_adapter():
            base = logits(theirs)
            assert torch.equal(logits(ours), base)
        expected = logits(theirs)
        assert_close(logits(ours), expected)
        assert (expected - base).abs().max() > 0.5

        ours.save_pretrained(tmp_path)
        loaded: Any = peft.PeftModel.from_pretrained(
            make_mixture("qwen3").double(), tmp_path / "green", autocast_adapter_dtype=False
        )
        assert_close(logits(loaded.eval()), expected)
        assert_close(logits(lora_ext.from_peft(loaded)), expected)

        assert_close(logits(copy.deepcopy(ours)), expected)
        merged = copy.deepcopy(ours).merge_and_unload()
        assert_close(merged(input_ids=tokens(5, 6)).logits, expected)
        ours.delete_adapter("green")
        ours.set_adapter("red")
        theirs.set_adapter("red")
        assert_close(logits(ours), logits(theirs))
        assert_close(logits(to_peft(ours)), logits(theirs))


def test_switched_off_adapter_has_no_effect() -> None:
    _, ours = pair("mixtral")
    ours.set_adapter("red")
    groups = LayerGroups(ours, "red")
    with torch.no_grad():
        with ours.disable_adapter():
            base = logits(ours)
        changed = logits(ours)
        with groups.masked([False, False]):
            assert torch.equal(logits(ours), base)
            assert torch.equal(logits(ours, adapter_names=["red"] * 5), base)
        assert torch.equal(logits(ours), changed)


def test_bfloat16_experts_keep_adapters_in_float32() -> None:
    """Check float32 adapters, as in PEFT. Only the update is rounded, while PEFT rounds W + BA."""
    model = make_mixture("mixtral")
    exact = lora_ext.from_peft(make_peft(model.double(), {"red": {"r": 4}}))
    ours = copy.deepcopy(exact).bfloat16()
    for name, parameter in ours.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    layers = (m.base_model.model.model.layers[0].mlp.experts for m in (exact, ours))
    generator = torch.manual_seed(5)
    x = torch.randn(8, 24, generator=generator, dtype=torch.bfloat16)
    index = torch.randint(0, 4, (8, 2), generator=generator)
    weights = torch.rand(8, 2, generator=generator, dtype=torch.bfloat16)
    expected, got = (
        layer(x.to(dtype), index, weights.to(dtype)).detach().double()
        for layer, dtype in zip(layers, (torch.float64, torch.bfloat16), strict=True)
    )
    # Weights and both products are rounded to 2^-9 each.
    assert (got - expected).abs().max() < 0.03 * expected.abs().max()


@pytest.mark.parametrize("how", ["eager", "grouped_mm"])
def test_results_under_autocast_equal_those_of_peft(how: str) -> None:
    """Check that the grouped product, and PEFT's update, use the dtype of the weights."""
    theirs = make_peft(make_mixture("gpt_oss", how), {"red": {"r": 4}})
    ours = lora_ext.from_peft(copy.deepcopy(theirs))
    layers = [m.base_model.model.model.layers[0].mlp.experts for m in (theirs, ours)]
    generator = torch.manual_seed(5)
    x = torch.randn(8, 24, generator=generator)
    scores = torch.rand(8, 4, generator=generator)
    weights, index = scores.topk(2)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected, got = (layer(x, index, weights) for layer in layers)
    assert got.dtype == expected.dtype
    bound = 0.02 if how == "eager" else 1e-5  # In eager mode, two products are in bfloat16.
    assert (got - expected).abs().max() < bound * expected.abs().max()


def test_from_peft_model_generates_with_an_adapter_per_row() -> None:
    theirs, ours = pair("qwen3")
    ids, how = tokens(5, 4), {"max_new_tokens": 5, "do_sample": False}
    mixed = ours.generate(input_ids=ids, adapter_names=NAMES, **how)
    for row, name in enumerate(NAMES):
        with only(theirs, name):
            alone = theirs.generate(input_ids=ids[row : row + 1], **how)
        assert mixed[row].tolist() == alone[0].tolist()


def test_parameters_that_are_not_experts_stay_with_peft() -> None:
    """Check a router's parameter, since PEFT wraps any parameter in ``target_parameters``."""
    fields = {"r": 2, "target_parameters": [UP, DOWN, "mlp.gate.weight"]}
    theirs, ours = pair("qwen3", {"red": fields})
    found = report(ours)
    assert {name.rpartition(".")[2] for name in found.left} == {"gate"}
    assert all("is not a floating-point matrix" in why for why in found.left.values())
    assert len(found.taken) == 4
    assert_close(step(ours, logits), step(theirs, logits))
    assert_same_gradients(ours, gradients(theirs), moved=8)
    with pytest.raises(ValueError, match="mixed adapter batches"):
        logits(ours, adapter_names=["red"] * 5)
