"""A disabled adapter runs no op. Merging and unmerging change the base weight as in PEFT."""

import copy
import warnings

import pytest
import torch
from adapted_models import operations
from peft import LoraConfig
from peft.tuners.lora import Linear as PeftLinear
from peft_layers import CLOSE, gradients
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from transformers.pytorch_utils import Conv1D

import lora_ext
from lora_ext.nn import LoraLinear


def layer(base: nn.Module | None = None, **settings) -> LoraLinear:
    torch.manual_seed(0)
    base = nn.Linear(24, 17) if base is None else base
    return LoraLinear(base, **{"r": 4, "lora_alpha": 6, "init_lora_weights": False, **settings})


def batch(*lead: int) -> torch.Tensor:
    return torch.randn(*lead, 24, requires_grad=True)


def switched_off(ours: LoraLinear) -> None:
    ours.adapter_active["default"] = False


def without_rows(ours: LoraLinear) -> None:
    ours.set_adapter([])


def disabled(ours: LoraLinear) -> None:
    ours.enable_adapters(False)


@pytest.mark.parametrize("off", [switched_off, without_rows, disabled])
@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"lora_dropout": 0.5}], ids=str)
def test_adapter_that_is_off_runs_no_further_op(off, settings):
    ours = layer(**settings)
    off(ours)
    x = batch(6)
    assert torch.equal(ours(x), ours.base_layer(x))
    assert type(ours(x).grad_fn) is type(ours.base_layer(x).grad_fn)
    assert operations(lambda: ours(x)) == operations(lambda: ours.base_layer(x))
    ours(x).sum().backward()
    assert all(p.grad is None for n, p in ours.named_parameters() if "lora" in n)


def test_active_adapter_runs_further_ops():
    ours, x = layer(), batch(6)
    assert operations(lambda: ours(x)) != operations(lambda: ours.base_layer(x))


def test_optimizer_does_not_change_a_disabled_adapter():
    ours = layer()
    optimizer = torch.optim.AdamW(ours.parameters(), lr=0.1, weight_decay=0.1)
    x = batch(6)
    ours(x).square().sum().backward()
    optimizer.step()
    a = ours.lora_A["default"].weight
    before = a.detach().clone(), copy.deepcopy(optimizer.state[a])
    optimizer.zero_grad()
    ours.adapter_active["default"] = False
    ours(x).square().sum().backward()
    optimizer.step()
    assert torch.equal(a, before[0])
    torch.testing.assert_close(optimizer.state[a], before[1], rtol=0, atol=0)


def test_disabled_adapter_does_not_affect_other_adapters():
    ours = layer()
    ours.add_adapter("b", r=2, init_lora_weights=False)
    ours.set_adapter(["default", "b"])
    x = batch(4)
    both = ours(x)
    ours.adapter_active["default"] = False
    alone = ours(x)
    gradients_of = gradients(alone, ours, x)
    assert gradients_of["lora_A.default.weight"] is None
    assert gradients_of["lora_A.b.weight"] is not None
    mixed = ours(x, ["default", "b", None, "b"])
    assert torch.equal(mixed[[0, 2]], ours.base_layer(x)[[0, 2]])
    torch.testing.assert_close(mixed[[1, 3]], alone[[1, 3]], **CLOSE)
    assert torch.equal(ours(x, torch.tensor([0, 1, -1, 1])), mixed)
    with lora_ext.adapters(["default", "b", None, "b"]):
        assert torch.equal(ours(x), mixed)
        ours.adapter_active["default"] = True
        assert not torch.equal(ours(x), mixed)
    torch.testing.assert_close(ours(x), both, rtol=0, atol=0)


def test_adapters_without_rows_get_no_gradient():
    ours = layer()
    ours.add_adapter("b", init_lora_weights=False)
    x = batch(4)
    ours.set_adapter(["default", "b"])
    found = gradients(ours(x, ["b", None, "b", None]), ours, x)
    assert found["lora_A.default.weight"] is None and found["lora_A.b.weight"] is not None
    assert torch.equal(ours(x, [None] * 4), ours.base_layer(x))


def test_exception_in_a_forward_leaves_everything_unchanged():
    ours = layer()
    ours.adapter_active["default"] = False
    before = dict(ours.adapter_active), ours.active_adapters, ours.merged_adapters
    with pytest.raises((ValueError, RuntimeError)):
        ours(torch.randn(3, 25))
    with pytest.raises(ValueError):
        ours(batch(3), ["nobody"] * 3)
    assert before == (dict(ours.adapter_active), ours.active_adapters, ours.merged_adapters)
    ours.adapter_active["default"] = True
    with pytest.raises((ValueError, RuntimeError)):
        ours(torch.randn(3, 48))
    assert ours(batch(3)).shape == (3, 17)


MERGES = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "bias": {"lora_bias": True},
    "dora": {"use_dora": True},
}


@pytest.mark.parametrize("settings", MERGES.values(), ids=MERGES)
@pytest.mark.parametrize("base", [nn.Linear(24, 17), Conv1D(17, 24)], ids=["Linear", "Conv1D"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_output_equals_unmerged_output(settings, base, dtype):
    ours = layer(copy.deepcopy(base).to(dtype), **settings)
    x = torch.randn(6, 24, dtype=dtype)
    expected, weight = ours(x).float(), ours.weight.detach().clone()
    ours.merge(safe_merge=True)
    assert ours.merged and ours.merged_adapters == ["default"]
    # The bound covers the rounding of every weight, in sums of 24 products of order one, and the
    # rounding of sums in float32.
    bound = 24**0.5 * 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(ours(x).float(), expected, rtol=bound, atol=bound)
    assert torch.equal(ours(x), ours.base_layer(x))
    merged = ours.weight.detach().clone()
    with pytest.warns(UserWarning, match="only up to rounding"):
        ours.unmerge()
    # The merged and the restored weight are each rounded by at most half a unit. DoRA divides the
    # first error by its factor, which is initially near 1. Operations in float32 add some units.
    largest = torch.maximum(merged.abs().max(), weight.abs().max())
    units = 1.2 * torch.finfo(dtype).eps + 4 * torch.finfo(torch.float32).eps
    assert (ours.weight - weight).abs().max() <= units * largest
    assert not ours.merged


def test_merged_weights_equal_those_of_peft():
    torch.manual_seed(0)
    base = nn.Linear(24, 17)
    config = LoraConfig(r=4, lora_alpha=6, init_lora_weights=False)
    theirs = PeftLinear(copy.deepcopy(base), "default", config, r=4, lora_alpha=6)
    ours = LoraLinear(base, r=4, lora_alpha=6)
    ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(ours.get_delta_weight("default"), theirs.get_delta_weight("default"))
    ours.merge()
    theirs.merge()
    torch.testing.assert_close(ours.weight, theirs.weight, **CLOSE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_unmerging_with_a_kept_copy_restores_every_bit(dtype):
    ours = layer(nn.Linear(24, 17, dtype=dtype), lora_bias=True)
    ours.add_adapter("b", use_dora=True, init_lora_weights=False)
    weight, bias = ours.weight.detach().clone(), ours.bias.detach().clone()
    place = ours.weight.data_ptr()
    ours.merge(keep_copy=True)
    ours.merge(adapter_names=["b"])
    assert ours.merged_adapters == ["default", "b"] and not torch.equal(ours.weight, weight)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours.unmerge()
    assert torch.equal(ours.weight, weight) and torch.equal(ours.bias, bias)
    assert ours.weight.data_ptr() == place


def test_weight_loaded_while_merged_is_not_replaced_by_the_kept_copy():
    ours, other, x = layer(), layer(), batch(3)
    with torch.no_grad():
        other.base_layer.weight.mul_(2)
    y = other(x)
    for each in (ours, other):
        each.merge(keep_copy=True)
    adapters = {k: v for k, v in ours.state_dict().items() if "lora_" in k}
    before = ours.weight.detach().clone()
    ours.load_state_dict(adapters, strict=False)
    copy.deepcopy(ours).unmerge()  # No base weight was loaded: no warning.
    ours.load_state_dict(other.state_dict())
    assert not torch.equal(ours.weight, before)
    with pytest.warns(UserWarning, match="no copy of the base weight was kept"):
        ours.unmerge()
    torch.testing.assert_close(ours(x), y, **CLOSE)


def test_merging_several_adapters_keeps_the_output():
    ours = layer()
    ours.add_adapter("b", r=2, use_dora=True, init_lora_weights=False)
    ours.add_adapter("c", r=8, init_lora_weights=False)
    ours.set_adapter(["default", "b", "c"])
    x = batch(6)
    expected, weight = ours(x), ours.weight.detach().clone()
    ours.merge(adapter_names=["default"])
    ours.merge()
    assert ours.merged_adapters == ["default", "b", "c"]
    torch.testing.assert_close(ours(x), expected, rtol=1e-4, atol=1e-4)
    with pytest.warns(UserWarning):
        ours.unmerge()
    torch.testing.assert_close(ours.weight, weight, **CLOSE)


def test_unmerging_uses_the_scaling_of_the_merge():
    ours = layer()
    weight = ours.weight.detach().clone()
    ours.merge()
    ours.set_scale("default", 3.0)
    with pytest.warns(UserWarning):
        ours.unmerge()
    torch.testing.assert_close(ours.weight, weight, **CLOSE)
    with pytest.warns(UserWarning, match="nothing is merged"):
        ours.unmerge()


@pytest.mark.parametrize("where", ["lora_A", "bias"])
def test_safe_merge_raises_for_non_finite_values(where):
    ours = layer(lora_bias=True)
    broken = ours.lora_A if where == "lora_A" else ours.lora_B
    parameter = getattr(broken["default"], "weight" if where == "lora_A" else "bias")
    nn.init.constant_(parameter, float("inf"))
    weight, bias = ours.weight.detach().clone(), ours.bias.detach().clone()
    with pytest.raises(ValueError, match="NaN or infinity"):
        ours.merge(safe_merge=True)
    assert torch.equal(ours.weight, weight) and torch.equal(ours.bias, bias) and not ours.merged


def test_unsupported_calls_of_merged_adapters_raise():
    ours = layer()
    x = batch(2)
    ours.merge(keep_copy=True)
    with pytest.raises(ValueError, match=r"\['default'\] are merged into the base weight"):
        ours(x, ["default", None])
    with lora_ext.adapters(["default", None]), pytest.raises(ValueError, match="unmerge them"):
        ours(x)
    ours.adapter_active["default"] = False
    with pytest.raises(ValueError, match=r"\['default'\] are merged .* cannot be switched off"):
        ours(x)
    with pytest.raises(ValueError, match="'default' is merged"):
        ours.delete_adapter("default")
    ours.adapter_active["default"] = True
    ours.enable_adapters(False)  # As in PEFT, disabling a layer unmerges it.
    ours(x)
    assert not ours.merged
    ours.merge()
    ours.add_adapter("b")
    with pytest.raises(ValueError, match="no copy was kept"):
        ours.merge(adapter_names=["b"], keep_copy=True)
    with pytest.raises(RuntimeError, match="the base layer has none"):
        layer(nn.Linear(24, 17, bias=False), lora_bias=True).merge()


@pytest.mark.parametrize(
    "reparametrize",
    [
        nn.utils.weight_norm,
        nn.utils.spectral_norm,
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
        parametrizations.orthogonal,
    ],
    ids=lambda f: f"{f.__module__.rpartition('.')[2]}.{f.__name__}",
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")
def test_weight_that_a_parametrization_computes_is_not_written(reparametrize):
    ours, x = layer(reparametrize(nn.Linear(24, 17))).eval(), batch(3)
    before = {k: v.clone() for k, v in ours.state_dict().items()}
    y = ours(x)
    assert (y - ours.base_layer(x)).abs().max() > 0.1
    with pytest.raises(ValueError, match=r"merge: base_layer\.weight: .*remove its p"):
        ours.merge()
    for options in ({"init_lora_weights": "pissa"}, {"preserve_base_output": True}):
        with pytest.raises(ValueError, match=r"init_lora_weights=.*: base_layer\.weight: "):
            ours.add_adapter("other", 4, **options)
    assert not ours.merged and ours.adapter_names == ("default",)
    assert before.keys() == ours.state_dict().keys()
    assert all(torch.equal(v, before[k]) for k, v in ours.state_dict().items())
    assert torch.equal(ours(x), y)


def test_weight_parametrized_since_the_merge_is_not_written():
    ours = layer()
    ours.merge(keep_copy=True)
    parametrizations.weight_norm(ours.base_layer)
    with pytest.raises(ValueError, match=r"unmerge: base_layer\.weight: expected a parameter"):
        ours.unmerge()
    assert ours.merged_adapters == ["default"]
    parametrize.remove_parametrizations(ours.base_layer, "weight")
    ours.unmerge()
    assert not ours.merged


def test_adapters_of_a_layer_with_adapters_merge_into_one_weight():
    ours, x = LoraLinear(layer(), "outer", r=2, init_lora_weights=False), batch(3)
    y = ours(x)
    ours.merge()
    torch.testing.assert_close(ours(x), y, **CLOSE)
