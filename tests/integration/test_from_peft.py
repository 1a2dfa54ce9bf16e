"""from_peft compared with PEFT in float64, in which they may differ by a few roundings only."""

import copy
import re
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import Linear as PeftLinear
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from same_steps import (
    assert_close,
    assert_same_gradients,
    checkpointed,
    gradients,
    logits,
    pair,
    step,
)
from tiny import CONFIGS, SIZES, enlarged, make_model, make_peft, maker
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lora_ext
from lora_ext.interop.peft import report, to_peft
from lora_ext.interop.peft._layers import FusedLinear
from lora_ext.nn import pack_linears, packed_bytes

ids = ["plain", "new", "reentrant"]
checkpointings = pytest.mark.parametrize("checkpointing", [None, False, True], ids=ids)
NAMES = ["red", "green", "__base__", "blue", "green"]


@pytest.mark.parametrize("family", CONFIGS)
def test_every_supported_layer_is_replaced(family: str) -> None:
    _, ours = pair(family)
    found = report(ours)
    biased = {name for name, fields in CONFIGS[family].items() if fields.get("lora_bias")}
    assert found.taken
    assert all(any(name in reason for name in biased) for reason in found.left.values())


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("adapter", ["red", "green", "blue"])
def test_forward_and_gradients_equal_peft(family: str, adapter: str) -> None:
    theirs, ours = pair(family)
    for model in (theirs, ours):
        model.set_adapter(adapter)
        model.train()
    assert_close(step(ours, logits), step(theirs, logits))
    assert_same_gradients(ours, gradients(theirs))


def test_dora_alone_and_beside_lora_in_one_batch() -> None:
    configs = {
        "red": {"r": 4, "target_modules": ["q_proj", "down_proj"]},
        "green": {"r": 6, "target_modules": ["q_proj", "o_proj"], "use_dora": True},
    }
    theirs: Any = make_peft(make_model("llama"), configs).double()
    ours: Any = lora_ext.from_peft(copy.deepcopy(theirs))
    assert not report(ours).left
    for name in configs:
        for model in (theirs, ours):
            model.set_adapter(name)
        assert_close(step(ours, logits), step(theirs, logits))
        assert_same_gradients(ours, gradients(theirs))
    mixed = logits(ours, adapter_names=["red", "green", "__base__", "green", "red"])
    for name, rows in (("red", [0, 4]), ("green", [1, 3])):
        theirs.set_adapter(name)
        assert_close(mixed[rows], logits(theirs)[rows])


def test_parameters_keys_and_modules_are_kept() -> None:
    model: Any = make_peft(make_model("llama"), CONFIGS["llama"])
    modules, parameters = list(model.named_modules()), dict(model.named_parameters())
    keys = list(model.state_dict())
    assert lora_ext.from_peft(model) is model
    assert [(n, id(m)) for n, m in model.named_modules()] == [(n, id(m)) for n, m in modules]
    assert all(parameters[n] is p for n, p in model.named_parameters())
    assert list(model.state_dict()) == keys
    lora_ext.from_peft(model)  # A second call changes nothing.
    assert any(type(m) is FusedLinear for m in model.modules())
    to_peft(model)
    assert not any(type(m).__module__.startswith("lora_ext") for m in model.modules())


def test_saved_files_equal_those_of_peft(tmp_path: Any) -> None:
    theirs, ours = pair("llama")
    for model, name in ((theirs, "theirs"), (ours, "ours")):
        model.save_pretrained(tmp_path / name)
    for path in (tmp_path / "theirs").rglob("*.safetensors"):
        twin = tmp_path / "ours" / path.relative_to(tmp_path / "theirs")
        assert twin.read_bytes() == path.read_bytes()


def test_hot_swapped_scalings_are_used(tmp_path: Any) -> None:
    configs = {"red": {"r": 4, "target_modules": ["q_proj"]}}
    for alpha in (16, 64):
        model = make_peft(make_model("llama"), configs)
        model.peft_config["red"].lora_alpha = alpha
        model.save_pretrained(tmp_path / str(alpha))
    theirs = peft.PeftModel.from_pretrained(make_model("llama"), tmp_path / "16" / "red")
    prepare_model_for_compiled_hotswap(theirs, target_rank=8)
    ours = lora_ext.from_peft(copy.deepcopy(theirs))
    with torch.no_grad():
        before = logits(ours)
        for each in (ours, theirs):
            hotswap_adapter(each, tmp_path / "64" / "red", adapter_name="default")
        # The layers apply float64 scalings to float32 at different points. Logits are near 1.
        torch.testing.assert_close(logits(ours), logits(theirs), rtol=0, atol=1e-4)
        assert (logits(ours) - before).abs().max() > 0.1


def trainable(model: Any) -> Any:
    model.set_requires_grad(["red", "green", "blue"])
    return model.train()


@checkpointings
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_names_in_training_give_the_gradients_of_separate_runs(
    family: str, checkpointing: bool | None
) -> None:
    theirs, ours = pair(family)
    theirs.train()
    trainable(ours)
    checkpointed(ours, checkpointing)
    value = step(ours, lambda m: logits(m, adapter_names=NAMES))
    weights = torch.randn(value.shape, generator=torch.manual_seed(7), dtype=value.dtype)
    for name in ("red", "green", "blue"):
        theirs.set_adapter(name)
        theirs.zero_grad(set_to_none=True)
        rows = [i for i, n in enumerate(NAMES) if n == name]
        expected = logits(theirs)[rows]
        assert_close(value[rows], expected)
        (expected * weights[rows]).sum().backward()
        found = gradients(ours)
        for key, gradient in gradients(theirs).items():
            if f".{name}." in key:
                assert_close(found[key], gradient, key)


def test_adapters_without_rows_get_no_gradient_and_two_forwards_keep_their_names() -> None:
    ours = trainable(pair("llama")[1])
    step(ours, lambda m: logits(m, adapter_names=["red"] * 5))
    assert all(g is None for n, g in gradients(ours).items() if ".green." in n or ".blue." in n)
    ours = trainable(pair("llama")[1])
    other = copy.deepcopy(ours)
    checkpointed(ours, False)
    for model in (ours, other):
        first = logits(model, adapter_names=NAMES)
        second = logits(model, adapter_names=NAMES[::-1])
        (first.square().sum() + second.square().sum()).backward()
    assert_same_gradients(ours, gradients(other))


@checkpointings
def test_forwards_without_and_then_with_names_equal_peft(checkpointing: bool | None) -> None:
    theirs, ours = pair("llama")
    theirs.set_adapter("red")
    trainable(ours).set_adapter("red")
    ours.set_requires_grad(["red", "green", "blue"])
    checkpointed(ours, checkpointing)
    for _ in range(2):
        for model in (ours, theirs.eval()):  # PEFT accepts names only in evaluation mode.
            model.set_requires_grad(["red", "green", "blue"])
            model.zero_grad(set_to_none=True)
            first, second = logits(model), logits(model, adapter_names=NAMES)
            (first.square().sum() + second.square().sum()).backward()
        assert_same_gradients(ours, gradients(theirs))


@checkpointings
def test_peft_layers_in_a_checkpointed_block_keep_the_names(checkpointing: bool | None) -> None:
    """Check a layer in ``modules_to_save`` and an unsupported layer, inside checkpointed blocks."""
    fields = {"r": 4, "target_modules": ["q_proj", "v_proj"], "modules_to_save": ["up_proj"]}
    theirs = make_peft(make_model("llama"), {"red": fields, "green": fields}).double()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if ".modules_to_save.green." in name:
                parameter.mul_(1.5)
    for layer in theirs.base_model.model.model.layers:
        layer.self_attn.v_proj.__class__ = type("Other", (PeftLinear,), {})
    ours = lora_ext.from_peft(copy.deepcopy(theirs)).train()
    checkpointed(ours, checkpointing)
    names, layers = ["red", "green", "__base__", "green", "red"], ours.base_model.model.model.layers
    for model in (ours, theirs.eval()):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_" in name or ".modules_to_save." in name)
    for _ in range(2):
        values = [step(m, lambda m: logits(m, adapter_names=names)) for m in (ours, theirs)]
        assert_close(*values)
        assert_same_gradients(ours, gradients(theirs))
        assert layers[0].mlp.up_proj.modules_to_save["green"].weight.grad.any()
    assert not any(m._forward_pre_hooks for m in to_peft(layers).modules())


class Checkpointed(nn.Module):
    """Model that calls ``checkpoint`` itself, so names do not reach the recomputation."""

    def __init__(self, reentrant: bool):
        super().__init__()
        self.first, self.second, self.reentrant = nn.Linear(8, 8), nn.Linear(8, 8), reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(
            lambda t: self.second(torch.tanh(self.first(t))), x, use_reentrant=self.reentrant
        )


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint_that_drops_the_names_raises(reentrant: bool) -> None:
    config = peft.LoraConfig(r=2, target_modules=["first", "second"], init_lora_weights=False)
    model: Any = peft.get_peft_model(Checkpointed(reentrant), config, "red")
    model.add_adapter("green", config)
    lora_ext.from_peft(model).train().set_requires_grad(["red", "green"])
    x = torch.randn(3, 4, 8, requires_grad=True)
    out = model(x, adapter_names=["green"] * 3)
    with pytest.raises(RuntimeError, match=r"recomputes a \w+ without the adapter_names"):
        out.sum().backward()
    model(x).sum().backward()  # Without names it still works.


def test_nan_in_the_bias_of_an_adapter_stays_in_its_rows() -> None:
    configs = {name: {"r": 4, "target_modules": ["c_fc"], "lora_bias": True} for name in "ab"}
    ours = lora_ext.from_peft(make_peft(make_model("gpt2"), configs))
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if "lora_B.b.bias" in name:
                parameter[0] = float("nan")
    rows = logits(ours, adapter_names=["a", "b", "a", "__base__", "b"]).isnan().flatten(1).any(1)
    assert rows.tolist() == [False, True, False, False, True]


@pytest.mark.parametrize(
    "dropout", [nn.Sequential(nn.Tanh()), nn.AlphaDropout(0.5), nn.Dropout(1.0)], ids=str
)
def test_unsupported_dropout_uses_peft(dropout: nn.Module) -> None:
    theirs, ours = pair("llama")
    for model in (theirs, ours):
        model.set_adapter("red")
        model.train()
        for module in model.modules():
            if isinstance(module, PeftLinear) and "red" in module.lora_dropout:
                module.lora_dropout["red"] = dropout
    assert report(ours).left
    assert_close(step(ours, logits), step(theirs, logits))
    if not isinstance(dropout, nn.Dropout):  # With p = 1, gradients are zero.
        assert_same_gradients(ours, gradients(theirs))


def test_layer_compiles_into_one_graph() -> None:
    _, ours = pair("llama")
    layer = next(m for m in ours.modules() if isinstance(m, FusedLinear))
    x = torch.randn(2, 3, layer.in_features, dtype=torch.float64)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert_close(compiled(x), layer(x))


@pytest.mark.slow
@pytest.mark.parametrize("training", [False, True])
def test_model_compiles_into_one_graph(training: bool) -> None:
    model = pair("llama")[1].train(training)
    model.set_adapter("green")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_close(logits(compiled), logits(model))


def test_wrong_names_and_names_of_merged_adapters_raise_and_leave_no_hooks() -> None:
    ours = trainable(pair("llama")[1])
    with pytest.raises(ValueError, match="non-existing"):
        logits(ours, adapter_names=["rot"] * 5)
    with pytest.raises(ValueError, match="same as the number of inputs"):
        logits(ours, adapter_names=["red"])
    with pytest.raises(ValueError, match="adapter_names: expected '__base__', found None"):
        logits(ours, adapter_names=["red", None, "red", "red", "red"])
    assert ours.base_model.training
    assert not any(m._forward_pre_hooks for m in ours.modules() if isinstance(m, FusedLinear))
    ours.merge_adapter()
    with pytest.raises(ValueError, match="merged"):
        logits(ours, adapter_names=NAMES)


@pytest.mark.filterwarnings("ignore")  # PEFT warns about tied embeddings.
def test_embeddings_stay_with_peft_and_other_models_raise() -> None:
    torch.manual_seed(0)
    configs = {"red": {"r": 4, "target_modules": ["q_proj", "embed_tokens"]}}
    theirs: Any = make_peft(make_model("llama"), configs).double()
    ours: Any = lora_ext.from_peft(copy.deepcopy(theirs))
    (reason,) = report(ours).left.values()
    assert "Embedding" in reason
    assert_close(step(ours, logits), step(theirs, logits))
    assert_same_gradients(ours, gradients(theirs))
    with pytest.raises(TypeError, match="model: expected a torch"):
        lora_ext.from_peft("red")  # pyright: ignore[reportArgumentType]  # the error under test
    with pytest.raises(ValueError, match="expected layers with LoRA adapters, found none"):
        lora_ext.from_peft(make_model("llama"))


@pytest.mark.parametrize("kind", [LoraConfig, peft.LoHaConfig])
@pytest.mark.parametrize("part", ["down_proj.base_layer.weight", r"(?i)down_proj\.\w+_a\b"])
def test_float8_factors_and_plain_base_weights_are_refused(kind: Any, part: str) -> None:
    model = get_peft_model(make_model("llama"), kind(r=4, target_modules=["q_proj", "down_proj"]))
    for name, parameter in model.named_parameters():
        if re.search(part, name):
            parameter.data = parameter.data.to(torch.float8_e4m3fn)
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=r"from_peft: .*: .*, found torch.float8_e4m3fn"):
        lora_ext.from_peft(model)
    assert [type(module) for module in model.modules()] == kinds


def merge_and_unmerge(model: Any) -> Any:
    model.merge_adapter()
    logits(model), logits(model)  # The merged weight is packed.
    model.unmerge_adapter()
    return model


CHANGES: dict[str, Callable[[Any], Any]] = {
    "merge": lambda model: model.merge_adapter() or model,
    "merge and unmerge": merge_and_unmerge,
    "merge and unload": lambda model: model.merge_and_unload(),
    "safe merge and unload": lambda model: model.merge_and_unload(safe_merge=True),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@torch.no_grad()
def test_products_change_after_merging(change: Callable[[Any], Any], dtype: torch.dtype) -> None:
    base = enlarged(maker("Llama", **SIZES), 1).to(dtype)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    plain: Any = get_peft_model(base, config).eval()
    packed = copy.deepcopy(plain)
    pack_linears(packed.get_base_model())
    adapted, expected = logits(packed), logits(change(plain))
    packed = change(packed)
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    for _ in range(3):
        torch.testing.assert_close(logits(packed), expected, atol=tolerance, rtol=tolerance)
    assert packed_bytes(packed) > 0
    assert (adapted - expected).abs().max() < 0.1
