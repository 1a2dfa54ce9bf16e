"""from_peft with models that mix adapters per token: PEFT's X-LoRA and Arrow."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.arrow import ArrowLoraLinearLayer
from peft.tuners.xlora.layer import XLoraLinearLayer
from peft_layers import assert_within
from routed_models import EXPERTS, TARGETS, arrow, expert_folders, xlora
from same_steps import assert_close, assert_same_gradients, gradients, logits, step, tokens
from tiny import WIDTH
from torch import Tensor, nn

import lora_ext
from lora_ext.interop.peft import report, to_peft

Make = Callable[..., Any]
ROUTERS = {xlora: XLoraLinearLayer, arrow: ArrowLoraLinearLayer}
makers = pytest.mark.parametrize("make", ROUTERS)
CASES: dict[str, tuple[Make, dict[str, Any]]] = {
    **{f"xlora-{k}": (xlora, {"top_k_lora": k}) for k in (None, 1, 2, 3, EXPERTS)},
    "xlora-softmax": (xlora, {"top_k_lora": 2, "enable_softmax_topk": True}),
    "xlora-softmax-all": (xlora, {"enable_softmax_topk": True, "enable_softmax": False}),
    "xlora-global": (xlora, {"top_k_lora": 2, "global_scaling_weight": 1.7}),
    "xlora-first-pass": (xlora, {"top_k_lora": 2, "scaling_pass_value": 0.3}),
    "xlora-one-router": (xlora, {"layerwise_scalings": False, "xlora_depth": 2, "xlora_size": 8}),
    **{f"arrow-{k}": (arrow, {"top_k": k, "router_temperature": 0.7}) for k in (1, 2, EXPERTS)},
}
cases = pytest.mark.parametrize(("make", "fields"), CASES.values(), ids=CASES)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return expert_folders(tmp_path_factory.mktemp("experts"))


def lora_layers(model: Any) -> dict[str, Any]:
    return {name: m for name, m in model.named_modules() if isinstance(m, LoraLayer)}


def trained(model: Any) -> Any:
    """Return the model with every adapter and the classifier trained, in evaluation mode."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name or "classifier" in name)
    return model


def pair(make: Make, folders: list[str], **fields: Any) -> tuple[Any, Any]:
    """Return a model twice: with PEFT's layers, and with ours."""
    theirs = trained(make(folders, **fields))
    return theirs, lora_ext.from_peft(copy.deepcopy(theirs))


def results(model: Any) -> dict[str, Tensor | None]:
    """Return the logits of a step and copies of its gradients."""
    found = {"logits": step(model, logits), **gradients(model)}
    return {name: None if t is None else t.clone() for name, t in found.items()}


@pytest.fixture
def peft_calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Return a list to which each call of a router's layer in PEFT is added."""
    calls: list[Any] = []
    for kind in ROUTERS.values():
        forward: Any = kind.forward

        def counted(self: Any, *args: Any, _forward: Any = forward, **kwargs: Any) -> Any:
            calls.append(self)
            return _forward(self, *args, **kwargs)

        monkeypatch.setattr(kind, "forward", counted)
    return calls


@cases
def test_step_equals_peft_and_calls_none_of_its_layers(
    make: Make, fields: dict[str, Any], folders: list[str], peft_calls: list[Any]
) -> None:
    theirs, ours = pair(make, folders, **fields)
    expected = results(theirs)
    assert peft_calls
    peft_calls.clear()
    found = results(ours)
    assert not peft_calls
    assert_within(found, expected, results(theirs.double()))


@makers
def test_float64_steps_differ_by_roundings(make: Make, folders: list[str]) -> None:
    theirs, ours = (m.double() for m in pair(make, folders))
    assert_close(step(ours, logits), step(theirs, logits))
    assert_same_gradients(ours, gradients(theirs), moved=10)


@makers
def test_report_names_every_layer_once(make: Make, folders: list[str]) -> None:
    model = lora_ext.from_peft(make(folders))
    assert not report(model).left
    assert list(report(model).taken) == list(lora_layers(model))
    assert not report(to_peft(model)).taken
    assert list(report(model).left) == list(lora_layers(model))


@pytest.mark.parametrize("own", [{"r": 11, "use_rslora": True}, {"target_modules": ["q_proj"]}])
def test_xlora_adapters_of_other_ranks_and_modules_equal_peft(
    own: dict[str, Any], tmp_path: Path
) -> None:
    some = expert_folders(tmp_path, {}, own)
    for top_k in (None, 2):
        theirs, ours = pair(xlora, some, top_k_lora=top_k)
        assert not report(ours).left
        expected, found = results(theirs), results(ours)
        assert_within(found, expected, results(theirs.double()))


@makers
def test_bfloat16_base_with_float32_adapters_equals_peft(make: Make, folders: list[str]) -> None:
    theirs, ours = pair(make, folders)
    for model in (theirs, ours):
        for name, parameter in model.named_parameters():
            if "lora_" not in name:
                parameter.data = parameter.data.bfloat16()
    expected, found = results(theirs), results(ours)
    assert not report(ours).left
    assert_within(found, expected, results(theirs.double()))


def test_autocast_of_xlora_equals_peft(folders: list[str]) -> None:
    theirs, ours = pair(xlora, folders, top_k_lora=2)  # PEFT's Arrow raises under autocast.
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        expected, found = logits(theirs), logits(ours)
    with torch.no_grad():
        exact = logits(theirs.double())
    assert_within({"logits": found}, {"logits": expected}, {"logits": exact})


def test_general_knowledge_is_subtracted_once_and_new_adapters_are_routed(
    folders: list[str], tmp_path: Path
) -> None:
    general = expert_folders(tmp_path)[:2]
    theirs, ours = pair(arrow, folders[:3], general=general, top_k=3)
    for _ in range(2):
        expected, found = results(theirs), results(ours)
        factors = [n for n in theirs.state_dict() if "task_" in n]
        for name in factors:
            assert torch.equal(ours.state_dict()[name], theirs.state_dict()[name])
        assert_within(found, expected, results(copy.deepcopy(theirs).double()))
        for model in (theirs, ours):  # From the second step on, there are more adapters than top_k.
            if "task_new" not in model.peft_config:
                model.load_adapter(folders[3], "task_new")
                trained(model)


@makers
def test_disabled_adapters_and_to_peft_give_the_logits_of_peft(
    make: Make, folders: list[str], peft_calls: list[Any]
) -> None:
    theirs, ours = pair(make, folders)
    with torch.no_grad():
        with theirs.disable_adapter(), ours.disable_adapter():
            assert_close(logits(ours), logits(theirs))
        expected = logits(theirs)
        peft_calls.clear()
        assert torch.equal(logits(to_peft(ours)), expected)
        assert peft_calls
        peft_calls.clear()
        logits(lora_ext.from_peft(ours))
        assert not peft_calls


@makers
def test_generated_tokens_equal_peft(make: Make, folders: list[str]) -> None:
    theirs, ours = pair(make, folders)
    how = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    found, expected = (model.generate(input_ids=tokens(), **how) for model in (ours, theirs))
    assert torch.equal(found, expected)


@makers
def test_saved_files_equal_those_of_peft(make: Make, folders: list[str], tmp_path: Path) -> None:
    theirs, ours = pair(make, folders)
    for model in (theirs, ours):
        logits(model)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    theirs.save_pretrained(str(tmp_path / "theirs"))
    ours.save_pretrained(str(tmp_path / "ours"))
    files = [f for f in (tmp_path / "theirs").rglob("*") if f.suffix in (".safetensors", ".json")]
    assert files
    for path in files:
        twin = tmp_path / "ours" / path.relative_to(tmp_path / "theirs")
        assert twin.read_bytes() == path.read_bytes()


def test_copies_are_independent_and_pickle_keeps_the_layers(folders: list[str]) -> None:
    ours = lora_ext.from_peft(xlora(folders))
    again = copy.deepcopy(ours)
    assert report(again) == report(ours)
    with torch.no_grad():
        expected = logits(ours)
        for layer in lora_layers(again).values():
            layer.lora_B["0"].weight.zero_()
        assert torch.equal(logits(ours), expected)
        assert not torch.equal(logits(again), expected)


LEFT: dict[str, tuple[Make, dict[str, Any], str]] = {
    "bias": (xlora, {"lora_bias": True, "target_modules": ["q_proj"]}, "has a bias"),
    "dora": (arrow, {"use_dora": True, "target_modules": TARGETS}, "DoraLinearVariant"),
}


@pytest.mark.parametrize(("make", "own", "reason"), LEFT.values(), ids=LEFT)
def test_layers_that_peft_computes_are_listed_and_equal(
    make: Make, own: dict[str, Any], reason: str, tmp_path: Path, peft_calls: list[Any]
) -> None:
    theirs, ours = pair(make, expert_folders(tmp_path, own))
    left = report(ours).left
    assert left and all(reason in why for why in left.values())
    assert all(name.endswith(tuple(own["target_modules"])) for name in left)
    assert len(left) + len(report(ours).taken) == len(lora_layers(ours))
    expected, found = results(theirs), results(ours)
    assert peft_calls
    assert_within(found, expected, results(theirs.double()))


def test_embeddings_of_xlora_and_other_dtypes_are_left_to_peft(tmp_path: Path) -> None:
    targets = ["q_proj", "embed_tokens"]
    theirs, ours = pair(xlora, expert_folders(tmp_path, target_modules=targets))
    assert all("embed_tokens" in name for name in report(ours).left) and report(ours).taken
    expected, found = results(theirs), results(ours)
    assert_within(found, expected, results(theirs.double()))
    for layer in lora_layers(ours).values():
        if "1" in layer.lora_A:
            layer.lora_A["1"].bfloat16()
    assert not report(ours).taken
    assert any("bfloat16" in why for why in report(ours).left.values())


def test_dropout_of_arrow_has_the_masks_of_peft(folders: list[str]) -> None:
    theirs, ours = pair(arrow, folders)
    for model in (theirs, ours):
        for layer in lora_layers(model).values():
            layer.lora_dropout["arrow_router"] = nn.Dropout(0.4)
        model.train()
    expected, found = results(theirs), results(ours)
    assert not report(ours).left
    assert_within(found, expected, results(theirs.double()))


@pytest.mark.parametrize("top_k", [None, 2])
def test_dropout_of_xlora_has_a_mask_for_each_adapter(top_k: int | None, tmp_path: Path) -> None:
    fields = {"r": WIDTH, "lora_dropout": 0.25, "target_modules": ["q_proj"]}
    model = xlora(expert_folders(tmp_path, **fields), top_k_lora=top_k)
    (layer, *_) = lora_layers(lora_ext.from_peft(model)).values()
    layer.train()
    with torch.no_grad():
        layer.base_layer.weight.zero_()
        for name in layer.lora_A:  # Adapter i multiplies its input, after dropout, by 10^i.
            layer.lora_A[name].weight.copy_(torch.eye(WIDTH) / layer.scaling[name])
            layer.lora_B[name].weight.copy_(torch.eye(WIDTH) * 10 ** int(name))
    scalings = torch.zeros(3, 50, len(lora_layers(model)), EXPERTS)
    scalings[..., 1], scalings[..., 3] = 0.75, 1.5  # 0.75 / (1 - p) = 1
    with torch.no_grad():
        torch.manual_seed(5)
        y = layer(torch.ones(3, 50, WIDTH), scalings=scalings)
        torch.manual_seed(5)
        assert torch.equal(layer(torch.ones(3, 50, WIDTH), scalings=scalings), y)
    y = y.round()
    assert set(y.unique().tolist()) == {0.0, 10.0, 2000.0, 2010.0}
    for value, share in ((2010, 0.75**2), (10, 0.75 * 0.25), (0, 0.25**2)):
        deviation = (share * (1 - share) / y.numel()) ** 0.5
        assert abs((y == value).float().mean().item() - share) < 5 * deviation


@pytest.mark.parametrize("top_k", [None, 0, 2])
def test_xlora_with_fewer_active_adapters_equals_peft(
    top_k: int | None, folders: list[str], peft_calls: list[Any]
) -> None:
    theirs, ours = pair(xlora, folders, enable_softmax_topk=True)
    for model in (theirs, ours):
        model.double().base_model.set_topk_lora(top_k)
        model.base_model.lora_model.set_adapter(["0", "2"])
        model.base_model.lora_model.delete_adapter("1")
    found = logits(ours)
    assert not peft_calls
    assert_close(found, logits(theirs))


def test_activated_names_and_merged_layers_run_pefts_forward(folders: list[str]) -> None:
    theirs, ours = pair(xlora, folders)
    for model in (theirs, ours):
        model.base_model.lora_model.merge_adapter()
    with torch.no_grad():
        assert_close(logits(ours), logits(theirs))
    assert isinstance(ours.base_model, peft.XLoraModel)
