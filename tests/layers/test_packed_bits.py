"""Linear layers with packed weights of 8 and 4 bits, with and without their plain weights."""

import copy
import logging
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from backends import Backend
from cases_packed_linear import FORMATS, bits_dtypes
from torch import Tensor, nn

import lora_ext
from lora_ext import ops
from lora_ext.layers.base import _packed_only, _packing_choice
from lora_ext.layers.base._packed_weight import why_not_packed
from lora_ext.nn import (
    LoraConfig,
    LoraLinear,
    pack_linears,
    packed_bytes,
    packing,
    unpack_linears,
    wrap,
)

pytestmark = pytest.mark.hosts


class Model(nn.Module):
    """Model of an embedding, two linear layers, and a head tied to the embedding."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.tokens = nn.Embedding(70, 64)
        self.inner, self.outer = nn.Linear(64, 128), nn.Linear(128, 64, bias=False)
        self.head = nn.Linear(64, 70, bias=False)
        self.head.weight = self.tokens.weight
        self.to(dtype)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.outer(self.inner(self.tokens(ids)).relu()))


IDS = torch.arange(40) % 70


def model(dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    return Model(dtype).eval().requires_grad_(False)


def dequantised(plain: Any, **how: Any) -> Any:
    """Return a copy of a model whose linear layers have the weights of a packed copy."""
    twin = copy.deepcopy(plain)
    twin.head.weight = nn.Parameter(twin.head.weight.clone(), requires_grad=False)
    for layer in (twin.inner, twin.outer, twin.head):
        packed = ops.pack_weight(layer.weight, **how)
        layer.weight.copy_(ops.unpack_weight(packed, *layer.weight.shape))
    return twin


@pytest.mark.parametrize(("bits", "minimum"), FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("keep", [True, False])
def test_products_use_the_dequantised_weight_for_any_number_of_rows(
    bits: int, minimum: bool, dtype: torch.dtype, keep: bool
) -> None:
    how = {"bits": bits, "group": 32, "minimum": minimum}
    plain, packed = model(dtype), pack_linears(model(dtype), **how, keep=keep)
    expected = dequantised(plain.float(), **how)(IDS)
    found = packed(IDS)
    assert torch.equal(packed(IDS[:3]), found[:3])  # Bits do not depend on the number of rows.
    size = torch.finfo(dtype).eps * expected.abs().max()
    assert (found - expected).abs().max() <= 8 * size
    assert (expected - plain(IDS)).abs().max() > 8 * torch.finfo(torch.float32).eps


def test_packed_bytes_count_codes_and_scales() -> None:
    values = 128 * 64 + 64 * 128 + 96 * 64  # The outputs of the head are rounded up to 96.
    for group in (32, 64):
        for bits, minimum in FORMATS:
            packed = pack_linears(model(), bits=bits, group=group, minimum=minimum)
            expected = values * bits // 8 + values // group * (4 if minimum else 2)
            assert packed_bytes(packed) == expected
            unpack_linears(packed)
            assert packed_bytes(packed) == 0
    only = pack_linears(model(), bits=8, group=32, keep=False)
    assert packed_bytes(only) == values + values // 32 * 2


@pytest.mark.parametrize("bits", [8, 4])
def test_error_of_the_weight_is_that_of_rounding_to_the_nearest(bits: int) -> None:
    weight, most = torch.randn(96, 256, generator=torch.Generator().manual_seed(1)), 127
    for scale in (1.0, 1e-5, 1e3):
        w = weight * scale
        groups = w.view(96, -1, 64)
        step = groups.abs().amax(2, keepdim=True) / (most if bits == 8 else 7)
        rounded = ((groups / step).round() * step).view_as(w)
        found = ops.unpack_weight(ops.pack_weight(w, bits=bits, group=64), 96, 256)
        limit = 1.05 if scale >= 1 else 1.3  # float16 has few bits for scales below 6e-5
        assert (found - w).norm() <= limit * (rounded - w).norm()
        if bits == 4:
            found = ops.unpack_weight(ops.pack_weight(w, bits=4, minimum=True), 96, 256)
            assert (found - w).norm() <= limit * (rounded - w).norm()


def test_int8_activations_change_results_within_their_bound() -> None:
    plain = dequantised(model(), bits=8, group=32)
    x, layer = torch.randn(5, 64), model().inner
    packed = pack_linears(layer, bits=8, group=32, activations="int8")
    bound = x.abs().amax(1, keepdim=True) / 254 * plain.inner.weight.abs().sum(1)
    off = (packed(x) - plain.inner(x)).abs()
    assert (off <= bound * (1 + 1e-4)).all() and off.max() > 1e-5
    assert "int8 activations" in str(packing(packed))


def test_training_uses_plain_weights_or_without_them_the_dequantised() -> None:
    x = torch.randn(4, 64)
    for keep in (True, False):
        plain = model()
        other = plain if keep else dequantised(plain, bits=8, group=32)
        reference, layer = copy.deepcopy(other.inner), pack_linears(plain.inner, bits=8, group=32,
                                                                    keep=keep)  # fmt: skip
        for each in (reference, layer):
            each.train().bias.requires_grad_()
        xs = [x.clone().requires_grad_() for _ in range(2)]
        for each, own in zip((reference, layer), xs, strict=True):
            each(own).square().sum().backward()
        torch.testing.assert_close(xs[0].grad, xs[1].grad)
        torch.testing.assert_close(reference.bias.grad, layer.bias.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["inner", "outer"])  # with a bias and without
def test_weight_that_is_only_packed_is_read_as_it_is(name: str, dtype: torch.dtype) -> None:
    base = pack_linears(getattr(model(dtype), name), bits=8, group=32, keep=False)
    layer = LoraLinear(base, "red", 4, use_dora=True).eval()
    assert torch.equal(layer.base_weight.matrix(), base.dequantised())
    x = torch.randn(3, base.in_features, dtype=dtype)
    torch.testing.assert_close(layer(x), base(x), atol=0.05, rtol=0.05)
    layer.merge()


def test_lora_trains_and_merges_over_a_weight_that_is_only_packed() -> None:
    base = pack_linears(model().inner, bits=8, group=32, keep=False)
    before = base.dequantised()
    lora = LoraLinear(base).eval()
    nn.init.normal_(lora.lora_B["default"].weight, std=0.1)  # pyright: ignore
    x = torch.randn(3, 64)
    expected = lora(x)
    lora(x).sum().backward()
    assert lora.lora_A["default"].weight.grad is not None
    lora.merge(keep_copy=True)
    merged = before + lora.get_delta_weight("default")
    step = merged.view(128, 2, 32).abs().amax(2, keepdim=True) / 127
    assert ((base.dequantised() - merged).view(128, 2, 32).abs() <= 0.51 * step).all()
    torch.testing.assert_close(lora(x), expected, atol=0.1, rtol=0.1)
    lora.unmerge()
    assert torch.equal(base.dequantised(), before)


def test_only_packed_layers_refuse_saving_moving_and_unpacking(tmp_path: Path) -> None:
    packed = pack_linears(model(), bits=4, group=32, keep=False)
    refused: list[Callable[[], object]] = [
        packed.state_dict,
        lambda: pickle.dumps(packed),
        lambda: torch.save(packed, tmp_path / "model"),
        lambda: packed.inner.to("meta"),
    ]
    for call in refused:
        with pytest.raises(RuntimeError, match="keep=False"):
            call()
    with pytest.raises(ValueError, match=r"unpack_linears: keep: .*keep=False"):
        unpack_linears(packed)
    with pytest.raises(RuntimeError, match="packed already"):
        pack_linears(packed)
    with pytest.raises(RuntimeError, match="keep=False"):
        packed.inner.weight.data += 1
    with pytest.raises(RuntimeError, match="keep=False"):
        packed.inner.weight.mul_(2)
    twin = copy.deepcopy(packed)
    assert torch.equal(twin(IDS), packed(IDS))
    assert "packed to 4 bits" in str(packing(packed))


def test_only_packed_model_serves_a_pool() -> None:
    plain = model()
    packed = pack_linears(plain, bits=8, group=32, keep=False)
    pool = lora_ext.AdapterPool(packed, max_slots=2, max_rank=8, targets=["inner", "head"])
    a, b = torch.randn(4, 64), torch.randn(128, 4)
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["inner"]}
    key = "base_model.model.inner.lora_"
    pool.load("a", (config, {f"{key}A.weight": a, f"{key}B.weight": b}))
    before = packed(IDS[:4])
    lora_ext.attach(packed, pool)
    with lora_ext.adapters([None, "a", None, None]):
        found = packed(IDS[:4, None])[:, 0]
    assert torch.equal(found[[0, 2, 3]], before[[0, 2, 3]]) and not torch.equal(found[1], before[1])
    with pytest.raises(RuntimeError, match="keep=False"):
        packed.state_dict()


def test_tied_head_that_trains_raises_without_its_plain_weight() -> None:
    packed = Model().eval()
    pack_linears(packed, bits=4, group=32, keep=False)
    packed.train()
    with pytest.raises(ValueError, match=r"weight: expected a frozen weight, found .*tied"):
        packed(IDS)
    packed.tokens.requires_grad_(False)
    packed(IDS).sum().backward()


def with_nan() -> Any:
    broken = model()
    broken.outer.weight[3, 5] = torch.nan
    return broken


@pytest.mark.parametrize(
    ("make", "how", "message"),
    [
        (model, {"bits": 3}, "bits: expected None, 8 or 4, found 3"),
        (model, {"bits": 8, "group": 48}, "group: expected 32, 64 or 128, found 48"),
        (model, {"bits": 8, "group": 128}, "inner: .* group: expected a divisor.* 64 .*found 128"),
        (with_nan, {"bits": 8, "group": 32}, "outer: .* weight: expected finite.*from -?nan"),
        (model, {"bits": 8, "minimum": True}, "minimum: expected False if bits is 8"),
        (model, {"keep": False}, "keep: expected True if bits is None"),
        (model, {"activations": "int8"}, "activations: expected 'float' if bits is None"),
        (model, {"bits": 8, "activations": "int4"}, "activations: expected .*found 'int4'"),
        (lambda: model().train(), {"bits": 4, "group": 32}, "'inner': expected evaluation mode"),
    ],
)  # fmt: skip
def test_wrong_arguments_raise_and_change_nothing(
    make: Callable[[], Any], how: dict[str, Any], message: str
) -> None:
    wrong = make()
    kinds = [type(m) for m in wrong.modules()]
    with pytest.raises(ValueError, match=f"pack_linears: .*{message}"):
        pack_linears(wrong, **how)
    assert [type(m) for m in wrong.modules()] == kinds


def test_exact_refuses_layers_of_8_and_4_bits() -> None:
    for keep in (True, False):
        packed = pack_linears(model(), bits=8, group=32, keep=keep)
        packed.config = type("Config", (), {"_attn_implementation": "sdpa"})()
        with pytest.raises(ValueError, match=r"exact: model: 'inner'.*packed to 8 or 4.*to 8 bits"):
            lora_ext.exact(packed)


@pytest.mark.parametrize("bits", [8, 4])
def test_attach_packs_to_bits_and_detach_unpacks(bits: int) -> None:
    plain = model()
    pool = lora_ext.AdapterPool(plain, max_slots=2, max_rank=8, targets=["inner"])
    expected = dequantised(plain, bits=bits, group=64)(IDS)
    lora_ext.attach(plain, pool, pack_base=bits)
    torch.testing.assert_close(plain(IDS), expected)
    assert f"packed to {bits} bits" in str(packing(plain))
    lora_ext.detach(plain)
    assert packed_bytes(plain) == 0 and "packed to" not in str(packing(plain))


@pytest.mark.parametrize("faster", [True, False])
def test_attach_measures_and_keeps_what_is_faster(
    faster: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    measured = _packing_choice._seconds

    def seconds(model: Any, packed: bool) -> list[float]:
        slower = packed != faster
        return [t + 1000 * slower for t in measured(model, packed)]

    monkeypatch.setattr(_packing_choice, "_seconds", seconds)
    plain = model()
    pool = lora_ext.AdapterPool(plain, max_slots=2, max_rank=8, targets=["inner"])
    with caplog.at_level(logging.INFO, "lora_ext"):
        lora_ext.attach(plain, pool, pack_base=None)
    said = str(packing(plain))
    assert said.startswith(f"the base model is {'packed' if faster else 'plain'}: ")
    assert " ms" in said and said in caplog.text
    assert (packed_bytes(plain) > 0) == faster
    lora_ext.detach(plain)
    assert packed_bytes(plain) == 0 and " ms" not in str(packing(plain))


def test_changed_weight_is_packed_again_before_its_next_product() -> None:
    layer = pack_linears(model().outer, bits=8, group=32)
    x = torch.randn(3, 128)
    before = layer(x)
    with torch.no_grad():
        layer.weight.mul_(2)
    torch.testing.assert_close(layer(x), 2 * before)


def test_wrapping_a_packed_model_keeps_its_weights() -> None:
    how: Any = {"bits": 4, "group": 32}
    expected = dequantised(model(), **how)(IDS)
    for keep in (True, False):
        packed = pack_linears(model(), **how, keep=keep)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            wrapped = wrap(packed, LoraConfig(r=4, target_modules=["inner", "outer"]))
        with torch.no_grad():
            torch.testing.assert_close(wrapped(IDS), expected)


@pytest.mark.parametrize(("bits", "minimum"), FORMATS)
@pytest.mark.parametrize("keep", [True, False])
def test_kernels_compute_up_to_64_rows_and_torch_more_with_the_same_weights(
    backend: Backend, bits: int, minimum: bool, keep: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if backend.is_twin:
        pytest.skip("CPU twins accept any number of rows")
    # The tensors of an emulator are on the CPU, where layers do not limit rows.
    monkeypatch.setattr(_packed_only, "limits_rows", lambda x: True)
    how: dict[str, Any] = {"bits": bits, "group": 32, "minimum": minimum}
    for dtype in bits_dtypes(backend) if backend.device == "cuda" else [torch.bfloat16]:
        packed = pack_linears(model(dtype).to(backend.device), **how, keep=keep)
        expected = dequantised(model(dtype).float(), **how)(IDS)
        ids = IDS.to(backend.device)
        few, many = packed(ids), packed(torch.cat([ids, ids]))
        size = torch.finfo(dtype).eps * expected.abs().max()
        for found in (few, many[:40], many[40:]):
            assert (found.cpu() - expected).abs().max() <= 8 * size
        assert torch.equal(packed(ids[:3]), few[:3])
        packed.inner.train()
        x = torch.randn(70, 64, dtype=dtype, device=backend.device, requires_grad=True)
        packed.inner(x).sum().backward()
        assert x.grad is not None and x.grad.isfinite().all()


@pytest.mark.parametrize("bits", [8, 4])
def test_attached_layers_use_the_kernel_below_the_adapters(backend: Backend, bits: int) -> None:
    if backend.is_twin:
        pytest.skip("see test_attach_packs_to_bits_and_detach_unpacks")
    plain, ids = model().to(backend.device), IDS[:7].to(backend.device)
    expected = dequantised(model(), bits=bits, group=64)(IDS[:7])
    pool = lora_ext.AdapterPool(plain, max_slots=2, max_rank=8, targets=["inner"])
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["inner"]}
    key = "base_model.model.inner.lora_"
    pool.load(
        "a", (config, {f"{key}A.weight": torch.eye(4, 64), f"{key}B.weight": torch.eye(128, 4)})
    )
    lora_ext.attach(plain, pool, pack_base=bits)
    torch.testing.assert_close(plain(ids).cpu(), expected)
    with lora_ext.adapters([None, "a", *[None] * 5]):
        found = plain(ids[:, None])[:, 0].cpu()
    torch.testing.assert_close(found[[0, *range(2, 7)]], expected[[0, *range(2, 7)]])
    assert (found[1] - expected[1]).abs().max() > 1e-3
    lora_ext.detach(plain)


def test_weights_on_cuda_are_packed_to_8_or_4_bits_only() -> None:
    weight: Any = SimpleNamespace(device=torch.device("cuda:0"), is_cuda=True, dtype=torch.int8)
    text = "a weight on the CPU, found one on cuda:0; pack it to 8 or 4 bits"
    assert why_not_packed(weight) == text
    assert "float32, bfloat16 or float16, found" in str(why_not_packed(weight, bits=8))
    half = model(torch.float16)
    with pytest.raises(ValueError, match="expected a weight of float32 or bfloat16, found"):
        pack_linears(half, bits=8)


def test_packing_with_bits_reports_the_smaller_copies() -> None:
    plain = packing(model()).bytes
    assert [packing(model(), bits=bits).bytes for bits in (8, 4)] == [plain // 4, plain // 8]
