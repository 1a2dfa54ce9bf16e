"""Initial values: the distribution of each scheme, equality with PEFT and torch, and undoing."""

import copy
import math
import warnings

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora import Linear as PeftLinear
from peft_layers import CLOSE, gradients
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_ext.layers._init import FREE
from lora_ext.nn import LoraLinear, init_lora_

ZERO_PRODUCT = [s for s in FREE if s not in ("init_ab", "orthogonal")]


def factors(r: int, n: int, m: int, dtype=torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """Return factors filled with values that an initialisation must overwrite."""
    return torch.full((r, n), 7.0, dtype=dtype), torch.full((m, r), 7.0, dtype=dtype)


def drawn(scheme, r=8, n=64, m=48, dtype=torch.float32, **settings):
    a, b = factors(r, n, m, dtype)
    init_lora_(a, b, scheme, generator=torch.Generator().manual_seed(3), **settings)
    return a, b


def generator():
    return torch.Generator().manual_seed(3)


@pytest.mark.parametrize("scheme", [True, "init_a", "INIT_A"])
def test_init_a_equals_the_kaiming_uniform_of_torch(scheme):
    a, b = drawn(scheme)
    expected = nn.init.kaiming_uniform_(torch.empty(8, 64), a=math.sqrt(5), generator=generator())
    assert torch.equal(a, expected) and not b.any()
    assert a.abs().max() <= 1 / math.sqrt(64)


@pytest.mark.parametrize("scheme", ["init_ab", False])
def test_random_factors_equal_the_initial_weights_of_two_linear_layers(scheme):
    torch.manual_seed(3)
    first, second = nn.Linear(64, 8, bias=False), nn.Linear(8, 48, bias=False)
    torch.manual_seed(3)
    a, b = factors(8, 64, 48)
    init_lora_(a, b, scheme)
    assert torch.equal(a, first.weight) and torch.equal(b, second.weight)


@pytest.mark.parametrize(
    ("scheme", "factor", "variance"),
    [
        ("init_a", 0, 1 / (3 * 4096)),
        ("init_a_normal", 0, 1 / 4096),
        ("gaussian", 0, 1 / 64**2),
        ("init_b", 1, 1 / (3 * 64)),
        ("init_b_normal", 1, 1 / 64),
    ],
)
def test_one_factor_has_the_documented_variance_and_the_other_is_zero(scheme, factor, variance):
    found = drawn(scheme, r=64, n=4096, m=4096)
    assert found[factor].var().item() == pytest.approx(variance, rel=0.03)
    assert not found[1 - factor].any()


def test_orthogonal_factors_have_a_zero_product():
    a, b = drawn("orthogonal")
    assert a.any() and b.any()
    assert (b @ a).norm() <= 1e-5 * b.norm() * a.norm()


def test_fan_in_may_be_given():
    a, _ = drawn("init_a", fan_in=16)
    assert torch.equal(a, 2 * drawn("init_a", fan_in=64)[0])


@pytest.mark.parametrize("scheme", [True, False, *FREE])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_factors_of_every_dtype_are_casts_of_the_float32_factors(scheme, dtype):
    for found, wide in zip(drawn(scheme, dtype=dtype), drawn(scheme), strict=True):
        assert torch.equal(found, wide.to(dtype))


def adapter(base: nn.Module, scheme, **settings) -> LoraLinear:
    return LoraLinear(base, init_lora_weights=scheme, r=4, **settings)


@pytest.mark.parametrize("scheme", [True, *ZERO_PRODUCT])
@pytest.mark.parametrize("base", [nn.Linear(24, 17), Conv1D(17, 24)], ids=["Linear", "Conv1D"])
def test_training_starts_at_the_base_model_bit_for_bit(scheme, base):
    ours = adapter(base, scheme, lora_alpha=3, use_rslora=True).eval()
    x = torch.randn(5, 24)
    assert torch.equal(ours(x), base(x))


@pytest.mark.parametrize(("scheme", "still"), [("init_a", "lora_A"), ("init_b", "lora_B")])
def test_random_factor_has_gradient_zero_in_the_first_step(scheme, still):
    ours = adapter(nn.Linear(24, 17), scheme)
    x = torch.randn(5, 24, requires_grad=True)
    found = gradients(ours(x), ours, x)
    for name in ("lora_A", "lora_B"):
        assert found[f"{name}.default.weight"].any() == (name != still)


def test_fan_in_of_a_conv1d_is_its_in_features():
    ours = adapter(Conv1D(512, 16), "init_a")
    a = ours.lora_A["default"].weight
    assert a.shape == (4, 16) and 0.5 / 4 < a.abs().max() <= 1 / 4


SCHEMES_OF_PEFT = [True, False, "gaussian", "orthogonal", "pissa", "pissa_niter_4", "olora"]


@pytest.mark.parametrize("scheme", SCHEMES_OF_PEFT)
@pytest.mark.parametrize("base", [nn.Linear(24, 17), nn.Linear(12, 40)], ids=["wide", "tall"])
def test_values_equal_those_of_peft(scheme, base):
    config = LoraConfig(r=4, lora_alpha=6, init_lora_weights=scheme)
    torch.manual_seed(1)
    theirs = PeftLinear(copy.deepcopy(base), "default", config, r=4, lora_alpha=6)
    if scheme in (True, "gaussian"):  # PEFT first initialises two linear layers, then resets them.
        torch.manual_seed(1)
        theirs.reset_lora_parameters("default", scheme)
    torch.manual_seed(1)
    if scheme in ("orthogonal", "pissa_niter_4"):
        nn.Linear(base.in_features, 4, bias=False), nn.Linear(4, base.out_features, bias=False)
    ours = LoraLinear(copy.deepcopy(base), r=4, lora_alpha=6, init_lora_weights=scheme)
    exact = scheme in (True, False, "gaussian", "orthogonal")
    close = {"rtol": 0, "atol": 0} if exact else CLOSE
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), **close)


DECOMPOSING = ["pissa", "pissa_niter_16", "olora"]


@pytest.mark.parametrize("scheme", DECOMPOSING)
@pytest.mark.parametrize("base", [nn.Linear(24, 17), Conv1D(17, 24)], ids=["Linear", "Conv1D"])
def test_layer_with_a_split_weight_has_the_same_output_and_its_weight_is_restored(scheme, base):
    base = copy.deepcopy(base)
    x = torch.randn(5, 24)
    expected, weight = base(x), base.weight.detach().clone()
    ours = adapter(base, scheme, lora_alpha=6)
    torch.testing.assert_close(ours(x), expected, **CLOSE)
    assert not torch.allclose(base.weight, weight)
    with pytest.raises(ValueError, match="of 'default' has changed the base weight"):
        ours.add_adapter("b", init_lora_weights=scheme)
    assert ours.adapter_names == ("default",)
    ours.delete_adapter("default")
    assert torch.equal(base.weight, weight)
    with pytest.raises(ValueError, match="no initialisation has changed"):
        ours.restore_base_weight()


def test_pissa_update_is_the_leading_part_of_the_weight():
    base = nn.Linear(24, 17)
    u, s, vh = torch.linalg.svd(base.weight.detach())
    ours = adapter(base, "pissa", lora_alpha=6)
    torch.testing.assert_close(ours.get_delta_weight("default"), u[:, :4] * s[:4] @ vh[:4], **CLOSE)


def test_preserve_base_output_subtracts_the_first_update_from_the_weight():
    base = nn.Linear(24, 17)
    x = torch.randn(5, 24)
    expected, weight = base(x), base.weight.detach().clone()
    ours = adapter(base, "init_ab", preserve_base_output=True)
    torch.testing.assert_close(ours(x), expected, **CLOSE)
    ours.restore_base_weight()
    assert torch.equal(base.weight, weight) and not torch.allclose(ours(x), expected)


@pytest.mark.parametrize("scheme", [True, False, *FREE, *DECOMPOSING])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_error_of_merging_and_unmerging_is_within_two_roundings(scheme, dtype):
    ours = adapter(nn.Linear(24, 17, dtype=dtype), scheme, lora_alpha=6, use_rslora=True)
    with torch.no_grad():
        for factor in (ours.lora_A["default"].weight, ours.lora_B["default"].weight):
            factor += torch.randn(factor.shape)
    weight = ours.base_layer.weight.detach().clone()
    ours.merge()
    merged = ours.base_layer.weight.detach().clone()
    assert not torch.equal(merged, weight)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # unmerge warns that the subtraction may lose bits.
        ours.unmerge()
    # The merged weight and the remaining weight are each rounded once.
    rounding = torch.finfo(dtype).eps * (merged.abs() + weight.abs())
    assert ((ours.base_layer.weight - weight).abs() <= rounding).all()


@pytest.mark.parametrize("scheme", ["init_a", "init_b_normal", "gaussian", "orthogonal"])
def test_adapters_of_one_seed_agree_for_weights_of_any_dtype(scheme):
    wide, narrow = (
        adapter(nn.Linear(24, 17, dtype=d), scheme, generator=generator())
        for d in (torch.float32, torch.bfloat16)
    )
    for name in ("lora_A", "lora_B"):
        expected = getattr(wide, name)["default"].weight.bfloat16()
        assert torch.equal(getattr(narrow, name)["default"].weight, expected)


def test_reset_draws_new_values_with_a_generator():
    ours = adapter(nn.Linear(24, 17), "init_b", lora_bias=True)
    nn.init.ones_(ours.lora_B["default"].bias)
    ours.reset_lora_parameters("default", "init_a_normal", generator=generator())
    a, b = factors(4, 24, 17)
    init_lora_(a, b, "init_a_normal", generator=generator())
    assert torch.equal(ours.lora_A["default"].weight, a)
    assert not ours.lora_B["default"].weight.any() and not ours.lora_B["default"].bias.any()


def test_layer_on_meta_has_no_values_and_init_raises():
    ours = LoraLinear(nn.Linear(24, 17, device="meta"), init_lora_weights="pissa")
    assert all(p.is_meta for p in ours.parameters())
    ours.add_adapter("b", use_dora=True)
    ours.set_adapter(["default", "b"])
    assert ours(torch.empty(3, 24, device="meta")).shape == (3, 17)
    with pytest.raises(RuntimeError, match="meta"):
        init_lora_(ours.lora_A["default"].weight, ours.lora_B["default"].weight)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"init_lora_weights": "init_c"}, ValueError, "'init_a', .*'pissa'.*found 'init_c'"),
        ({"init_lora_weights": "pissa_niter_x"}, ValueError, "found 'pissa_niter_x'"),
        ({"init_lora_weights": "loftq"}, NotImplementedError, "'loftq' is not impl"),
        ({"init_lora_weights": 1.0}, TypeError, "a bool or a str, found 1.0"),
        ({"init_lora_weights": "orthogonal", "r": 3}, ValueError, "even r, found 3"),
        ({"init_lora_weights": "pissa", "r": 18}, ValueError, "at most 17"),
        ({"init_lora_weights": "olora", "preserve_base_output": True}, ValueError, "already pre"),
        ({"r": 0}, ValueError, "positive rank, found 0"),
        ({"r": True}, TypeError, "an int, found True"),
        ({"r": 4.0}, TypeError, "an int, found 4.0"),
        ({"lora_alpha": math.nan}, ValueError, "lora_alpha: expected a finite"),
        ({"lora_dropout": 1.0}, ValueError, r"lora_dropout: .* in \[0, 1\), found 1.0"),
        ({"lora_bias": True, "use_dora": True}, ValueError, "lora_bias"),
        ({"adapter_dtype": torch.float8_e4m3fn}, ValueError, "adapter_dtype: .*found torch.float8"),
        ({"fan_in_fan_out": True}, ValueError, "fan_in_fan_out"),
        ({"adapter_name": "a.b"}, ValueError, "without dots"),
        ({"adapter_name": "__base__"}, ValueError, "__base__"),
    ],
    ids=str,
)
def test_invalid_arguments_raise(arguments, error, text):
    base = nn.Linear(24, 17)
    weight = base.weight.detach().clone()
    with pytest.raises(error, match=text):
        LoraLinear(base, **arguments)
    assert torch.equal(base.weight, weight)
    if arguments.keys() & {"fan_in_fan_out", "adapter_name"}:
        return
    ours = LoraLinear(base, "a")
    state = ours.state_dict()
    with pytest.raises(error, match=text):
        ours.add_adapter("b", **arguments)
    assert ours.adapter_names == ("a",) and ours.state_dict().keys() == state.keys()


@pytest.mark.parametrize(
    ("a", "b", "error"),
    [
        (torch.empty(4, 8), torch.empty(8, 3), ValueError),
        (torch.empty(4), torch.empty(8, 4), ValueError),
        (torch.empty(0, 8), torch.empty(8, 0), ValueError),
        (torch.empty(4, 8, dtype=torch.int32), torch.empty(8, 4), TypeError),
        (torch.empty(4, 8), torch.empty(8, 4, dtype=torch.complex64), TypeError),
        (torch.empty(4, 8, dtype=torch.float8_e4m3fn), torch.empty(8, 4), TypeError),
    ],
)
def test_factors_that_do_not_fit_raise(a, b, error):
    with pytest.raises(error, match="init_lora_"):
        init_lora_(a, b)
    with pytest.raises(ValueError, match="splits the base weight"):
        init_lora_(torch.empty(4, 8), torch.empty(8, 4), "pissa")


def test_unreadable_base_raises_for_schemes_that_need_its_weight():
    class Quantised(nn.Module):
        in_features, out_features = 24, 17

        def __init__(self):
            super().__init__()
            self.register_buffer("weight", torch.zeros(17, 24, dtype=torch.int8))

        def forward(self, x):
            return torch.zeros(*x.shape[:-1], 17)

    ours = LoraLinear(Quantised(), "a", init_lora_weights=False)
    assert ours(torch.randn(3, 24)).any() and ours.lora_A["a"].weight.dtype == torch.float32
    for settings in ({"use_dora": True}, {"init_lora_weights": "pissa"}):
        with pytest.raises(
            ValueError, match=r"floating-point .* Quantised with one of torch\.int8"
        ):
            ours.add_adapter("b", **settings)
    with pytest.raises(ValueError, match="Quantised"):
        ours.merge()
    with pytest.raises(ValueError, match=r"in_features and out_features.* found ReLU"):
        LoraLinear(nn.ReLU())
