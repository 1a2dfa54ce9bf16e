"""`VoraLinear` compared with its dense formula: routes, masks, gradients, merging, base layers."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from backends import Backend
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

import lora_ext
from lora_ext.nn import LoraLinear, UnmergeableRouteError, VoraLinear, modality

IN, OUT, RANK = 24, 40, 6
MASKS = {
    "none": torch.zeros(2, 7, dtype=torch.bool),
    "all": torch.ones(2, 7, dtype=torch.bool),
    "alternating": torch.arange(14).view(2, 7) % 2 == 0,
    "random": torch.rand(2, 7, generator=torch.Generator().manual_seed(3)) < 0.5,
}


def make(
    route: Any = "vision",
    rank: int = RANK,
    scale: float = 0.5,
    bias: bool = True,
    dtype: torch.dtype = torch.float32,
    kind: str = "linear",
    trained: bool = True,
) -> VoraLinear:
    torch.manual_seed(0)
    base: Any = nn.Linear(IN, OUT, bias) if kind == "linear" else Conv1D(OUT, IN)
    base.to(dtype).requires_grad_(False)
    layer = VoraLinear.from_linear(base, rank, route, scale)
    if trained:
        with torch.no_grad():
            layer.B.normal_()
    return layer


def inputs(*leading: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*leading, IN, generator=torch.Generator().manual_seed(7)).to(dtype)


def formula(layer: VoraLinear, x: Tensor, mask: Tensor) -> Tensor:
    base: Any = layer.base_layer
    wide = torch.promote_types(x.dtype, torch.float32)
    weight = base.weight if isinstance(base, nn.Linear) else base.weight.t()
    bias = None if base.bias is None else base.bias.to(wide)
    x, a, b = x.to(wide), layer.A.to(wide), layer.B.to(wide)
    update = layer.scale * F.linear(F.linear(x, a), b)
    return F.linear(x, weight.to(wide), bias) + torch.where(mask[..., None], update, 0.0)


# -------------------------------------------------------------------------------------------------
# Initial values


@pytest.mark.parametrize("route", ["all", "vision"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_initial_layer_equals_the_base_layer_bitwise(
    route: str, bias: bool, dtype: torch.dtype
) -> None:
    layer, x = make(route, bias=bias, dtype=dtype, trained=False), inputs(2, 7, dtype=dtype)
    with modality(MASKS["random"]):
        assert torch.equal(layer(x), layer.base_layer(x))
    assert layer.A.shape == (RANK, IN) and layer.B.shape == (OUT, RANK)
    assert layer.A.abs().max() <= IN**-0.5 and not layer.B.any()
    assert (layer.base_layer.bias is not None) is bias
    assert [n for n, p in layer.named_parameters() if p.requires_grad] == [
        "lora_A.default.weight",
        "lora_B.default.weight",
    ]


def test_base_layer_is_not_copied() -> None:
    base = nn.Linear(IN, OUT)
    layer = VoraLinear.from_linear(base, 4)
    assert layer.base_layer is base and isinstance(layer, LoraLinear)
    assert (layer.route, layer.scale) == ("all", 1.0)


# -------------------------------------------------------------------------------------------------
# Comparison with the formula


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("rank", [6, 300, 1024])
@pytest.mark.parametrize(
    ("dtype", "atol"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=["fp32", "bf16"]
)
@pytest.mark.parametrize("name", MASKS)
def test_masked_layer_equals_the_dense_formula(
    name: str, dtype: torch.dtype, atol: float, rank: int, kind: str
) -> None:
    layer, mask = make(rank=rank, kind=kind, scale=0.1 / rank, dtype=dtype), MASKS[name]
    x = inputs(2, 7, dtype=dtype)
    expected = formula(layer, x, mask)
    scale = max(1.0, expected.abs().max().item())
    with modality(mask):
        found = layer(x)
    assert found.dtype == dtype
    assert (found.float() - expected).abs().max() <= atol * scale
    assert torch.equal(layer(x, mask), found)
    assert torch.equal(layer(x, mask.int()), found)
    if name == "none":
        assert torch.equal(found, layer.base_layer(x))


def test_route_all_ignores_masks() -> None:
    layer, x = make("all"), inputs(2, 7)
    expected = formula(layer, x, MASKS["all"])
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-5)
    with modality(MASKS["none"]):
        assert torch.equal(layer(x), layer(x, MASKS["alternating"]))
        assert torch.equal(layer(x), layer(x, torch.ones(3)))


def test_tokens_outside_a_block_are_text() -> None:
    layer, x = make("vision"), inputs(2, 7)
    assert torch.equal(layer(x), layer.base_layer(x))


def test_explicit_mask_takes_precedence_over_the_block() -> None:
    layer, x = make("vision"), inputs(2, 7)
    expected = layer(x, MASKS["alternating"])
    with modality(MASKS["random"]):
        assert torch.equal(layer(x, MASKS["alternating"]), expected)
        assert not torch.equal(layer(x), expected)


@pytest.mark.parametrize("rank", [RANK, 300])
@pytest.mark.parametrize("name", MASKS)
def test_gradients_equal_those_of_the_formula(name: str, rank: int) -> None:
    layer, mask = make(rank=rank).double(), MASKS[name]
    x = inputs(2, 7, dtype=torch.float64).requires_grad_()
    wanted = [x, layer.A, layer.B]
    expected = torch.autograd.grad(formula(layer, x, mask).square().sum(), wanted)
    with modality(mask):
        y = layer(x)
    found = torch.autograd.grad(y.square().sum(), wanted, allow_unused=True)
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(torch.zeros_like(e) if f is None else f, e)


@pytest.mark.slow
def test_gradcheck_in_float64() -> None:
    layer, mask = make(rank=3).double(), MASKS["random"]
    x = inputs(2, 7, dtype=torch.float64).requires_grad_()

    def run(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        parameters = {"lora_A.default.weight": a, "lora_B.default.weight": b}
        return torch.func.functional_call(layer, parameters, (x, mask))

    assert torch.autograd.gradcheck(run, (x, layer.A, layer.B))


@pytest.mark.parametrize("rank", [RANK, 300])
def test_text_rows_are_never_read(backend: Backend, rank: int) -> None:
    # NaN in text rows (m = 0) must not reach the adapter's gradients or other rows.
    layer, mask = make(rank=rank).to(backend.device), MASKS["random"].to(backend.device)
    x = inputs(2, 7).to(backend.device)
    clean_x = x.clone()
    x[~mask] = torch.nan
    x.requires_grad_()
    gradient = torch.ones(2, 7, OUT, device=backend.device)
    with modality(mask):
        y = layer(x)
    assert y[mask].isfinite().all() and y[~mask].isnan().all()
    gradient[~mask] = 0
    y.backward(gradient)
    for grad in (layer.A.grad, layer.B.grad, x.grad):
        assert grad is not None and grad.isfinite().all()
    clean = copy.deepcopy(layer)
    clean.zero_grad()
    with modality(mask):
        found = clean(clean_x)
        found.backward(gradient)
    assert torch.equal(clean.A.grad, layer.A.grad) and torch.equal(clean.B.grad, layer.B.grad)
    assert torch.equal(found[mask], y[mask])
    torch.testing.assert_close(found, formula(layer, clean_x, mask), rtol=0, atol=1e-4)


def test_batch_without_vision_builds_no_graph_for_the_adapter() -> None:
    layer, x = make("vision"), inputs(2, 7)
    with modality(MASKS["none"]):
        assert not layer(x).requires_grad


# -------------------------------------------------------------------------------------------------
# Vision adapter together with text adapters


def both(*text: str) -> VoraLinear:
    layer = make("vision")
    for i, name in enumerate(text):
        layer.add_adapter(name, r=3 + i, lora_alpha=5)
        with torch.no_grad():
            layer.lora_B[name].weight.normal_(generator=torch.Generator().manual_seed(i))
    return layer


def rows(layer: VoraLinear, x: Tensor, names: list[str | None]) -> Tensor:
    """Return the output, computed row by row with the adapter of each row in ``names``."""
    out: list[Tensor] = []
    for each, name in zip(x.reshape(-1, IN), names, strict=True):
        y = layer.base_layer(each)
        if name is not None:
            a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
            y = y + layer.scaling[name] * (b @ (a @ each))
        out.append(y)
    return torch.stack(out).view(*x.shape[:-1], OUT)


def test_image_text_and_base_rows_share_one_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, mask, x = both("red", "blue"), MASKS["random"], inputs(2, 7)
    calls: list[Any] = []
    op = lora_ext.ops.lora_linear_apart
    monkeypatch.setattr(
        lora_ext.ops,
        "lora_linear_apart",
        lambda *args, **how: calls.append(args) or op(*args, **how),
    )
    for of_text in (["red", "blue"], ["blue", None], [None, None], ["default", "red"]):
        names = [
            "default" if sees else of_text[row] for row, line in enumerate(mask) for sees in line
        ]
        calls.clear()
        with lora_ext.adapters(of_text), modality(mask):
            found = layer(x)
        assert len(calls) == 1
        torch.testing.assert_close(found, rows(layer, x, names), rtol=1e-5, atol=1e-5)
        with modality(mask), lora_ext.adapters(of_text):
            assert torch.equal(layer(x), found)
        # A batch without images uses the names of the block.
        with lora_ext.adapters(of_text), torch.no_grad():
            every = [name for name in of_text for _ in range(7)]
            torch.testing.assert_close(layer(x), rows(layer, x, every), rtol=1e-5, atol=1e-5)


def test_vision_tokens_beside_text_with_weights_and_mixtures() -> None:
    layer, mask, x = both("red", "blue"), MASKS["random"], inputs(2, 7)
    red, blue, vision = (rows(layer, x, [name] * 14) for name in ("red", "blue", "default"))
    base = rows(layer, x, [None] * 14)
    mixture = base + 0.5 * (red - base) - 2 * (blue - base)
    for names, text in (
        ([("red", 0.5), None], [base + 0.5 * (red - base), base]),
        ([{"red": 0.5, "blue": -2.0}, "red"], [mixture, red]),
    ):
        expected = torch.stack([text[0][0], text[1][1]])
        expected = torch.where(mask[..., None], vision, expected)
        with lora_ext.adapters(names), modality(mask):
            torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)


def test_token_ids_can_select_the_vision_adapter() -> None:
    layer, mask, x = both("red"), MASKS["random"], inputs(2, 7)
    ids = torch.where(mask, 0, torch.tensor([[1], [-1]]))
    names = [("default", "red", None)[i] for i in ids.flatten()]
    with lora_ext.adapters(["default", "red"], ids):
        torch.testing.assert_close(layer(x), rows(layer, x, names), rtol=1e-5, atol=1e-5)


def test_second_active_adapter_is_used_for_text() -> None:
    layer, mask, x = both("red", "blue"), MASKS["random"], inputs(2, 7)
    layer.set_adapter(["default", "red"])
    names = ["default" if sees else "red" for sees in mask.flatten()]
    with modality(mask):
        torch.testing.assert_close(layer(x), rows(layer, x, names), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer(x), rows(layer, x, ["red"] * 14), rtol=1e-5, atol=1e-5)
    layer.set_adapter("red")  # turns the vision adapter off
    with modality(mask):
        torch.testing.assert_close(layer(x), rows(layer, x, ["red"] * 14), rtol=1e-5, atol=1e-5)
    layer.set_adapter(["default", "red", "blue"])
    with pytest.raises(NotImplementedError, match=r"one active adapter for text.*'red', 'blue'"):
        layer(x)


def test_permuted_samples_give_permuted_outputs() -> None:
    layer, mask, x = both("red"), MASKS["random"], inputs(2, 7)
    with lora_ext.adapters(["red", None]), modality(mask):
        expected = layer(x)
    with lora_ext.adapters([None, "red"]), modality(mask.flip(0)):
        assert torch.equal(layer(x.flip(0)), expected.flip(0))
    for i, name in enumerate(["red", None]):
        with lora_ext.adapters([name]), modality(mask[i : i + 1]):
            torch.testing.assert_close(layer(x[i : i + 1]), expected[i : i + 1])


@pytest.mark.slow
@pytest.mark.parametrize("text", [(), ("red",)])
def test_one_compiled_graph_serves_every_mask(text: tuple[str, ...]) -> None:
    torch._dynamo.reset()
    layer, x = both(*text), inputs(2, 7)
    layer.requires_grad_(False)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    names = ["red", None] if text else [None, None]
    for mask in MASKS.values():
        with modality(mask):
            torch.testing.assert_close(compiled(x), layer(x))
            with lora_ext.adapters(names):
                torch.testing.assert_close(compiled(x), layer(x))
    torch.testing.assert_close(compiled(x), layer(x))


# -------------------------------------------------------------------------------------------------
# Merging


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unmerge_restores_every_bit_after_merge(dtype: torch.dtype, kind: str) -> None:
    layer, x = make("all", dtype=dtype, kind=kind), inputs(2, 7, dtype=dtype)
    base: Any = layer.base_layer
    before, expected = base.weight.clone(), layer(x)
    once = layer.scale * (layer.B.float() @ layer.A.float())
    once = (before.float() + (once if kind == "linear" else once.t())).to(dtype)
    assert layer.merge() is base
    torch.testing.assert_close(base.weight, once, rtol=0, atol=1e-6 if dtype.itemsize == 4 else 0)
    atol = 1e-4 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(base(x), expected, rtol=0.05, atol=atol)
    assert torch.equal(layer(x), base(x))
    with pytest.raises(RuntimeError, match=r"merge: .*'default' merged already"):
        layer.merge()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer.unmerge()
    assert torch.equal(base.weight, before)
    assert torch.equal(layer(x), expected)


def test_route_vision_is_merged_only_with_force() -> None:
    layer, x = make("vision"), inputs(2, 7)
    before = layer.base_layer.weight.clone()
    with pytest.raises(UnmergeableRouteError, match="merge: route: expected 'all', found 'vision'"):
        layer.merge()
    assert issubclass(UnmergeableRouteError, RuntimeError)
    assert torch.equal(layer.base_layer.weight, before)
    everywhere = layer(x, MASKS["all"])
    assert layer.merge(force=True) is layer.base_layer
    for mask in MASKS.values():  # Now all tokens use the adapter.
        with modality(mask):
            torch.testing.assert_close(layer(x), everywhere, rtol=0, atol=1e-4)
    layer.unmerge()
    assert torch.equal(layer.base_layer.weight, before)


class Int8Linear(nn.Linear):
    """Quantised linear layer: int8 weights and one scale per output."""

    def __init__(self, plain: nn.Linear):
        super().__init__(plain.in_features, plain.out_features)
        scale = plain.weight.detach().abs().amax(1, keepdim=True) / 127
        self.scale_of_outputs = scale
        whole = (plain.weight.detach() / scale).round().to(torch.int8)
        self.weight = nn.Parameter(whole, requires_grad=False)
        self.bias = plain.bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.scale_of_outputs, self.bias)


class Foreign(nn.Module):
    """Layer other than ``nn.Linear``, with a packed weight."""

    def __init__(self, plain: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = IN, OUT
        self.inner = [plain]
        self.register_buffer("qweight", torch.zeros(4, dtype=torch.int32))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner[0](x)


@pytest.mark.parametrize("kind", [Int8Linear, Foreign])
@pytest.mark.parametrize("route", ["all", "vision"])
def test_quantised_layers_run_but_do_not_merge(route: Any, kind: Any) -> None:
    base = kind(nn.Linear(IN, OUT).requires_grad_(False))
    layer, x, mask = VoraLinear.from_linear(base, 4, route, 2.0), inputs(2, 7), MASKS["random"]
    assert layer.A.dtype == torch.float32
    nn.init.normal_(layer.B)
    with modality(mask):
        found = layer(x)
    seen = torch.ones_like(mask) if route == "all" else mask
    update = torch.where(seen[..., None], 2.0 * F.linear(F.linear(x, layer.A), layer.B), 0.0)
    torch.testing.assert_close(found, base(x) + update)
    found.sum().backward()
    assert layer.A.grad is not None and layer.B.grad is not None
    with pytest.raises(NotImplementedError, match=f"merge: base_layer: .*{kind.__name__}"):
        layer.merge(force=True)


def test_invalid_extra_bias_keeps_the_old_one() -> None:
    layer = make(bias=False)
    layer.set_extra_bias(torch.ones(OUT))
    with pytest.raises(AttributeError):
        layer.set_extra_bias([1.0] * OUT)  # pyright: ignore[reportArgumentType]
    assert layer.has_extra_bias and torch.equal(layer.extra_bias, torch.ones(OUT))


def test_extra_bias_is_merged_and_removed_with_the_adapter() -> None:
    layer, x = make("all", bias=False), inputs(2, 7)
    plain, extra = layer(x), torch.randn(OUT)
    layer.set_extra_bias(extra)
    torch.testing.assert_close(layer(x), plain + extra)
    torch.testing.assert_close(layer.extra_bias, extra)
    base: Any = layer.merge()
    torch.testing.assert_close(base(x), plain + extra, rtol=0, atol=1e-4)
    layer.unmerge()
    assert base.bias is None
    layer.set_extra_bias(None)
    assert torch.equal(layer(x), plain) and layer.extra_bias is None


# -------------------------------------------------------------------------------------------------
# Errors and copies


@pytest.mark.parametrize("rank", [0, -1, 2.0, True])
def test_error_names_invalid_rank(rank: Any) -> None:
    with pytest.raises(ValueError, match=f"VoraLinear: rank: expected .*found {rank!r}"):
        VoraLinear.from_linear(nn.Linear(2, 3), rank)


def test_error_names_unknown_route() -> None:
    with pytest.raises(ValueError, match=r"VoraLinear: route: expected .*found 'text'"):
        VoraLinear.from_linear(nn.Linear(2, 3), 2, "text")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    "make_module",
    [
        lambda: nn.Embedding(3, 4),
        lambda: nn.Conv2d(3, 4, 1),
        lambda: nn.LayerNorm(3),
        lambda: LoraLinear(nn.Linear(2, 2)),
    ],
)
def test_other_modules_are_refused(make_module: Callable[[], nn.Module]) -> None:
    module = make_module()
    with pytest.raises(TypeError, match=f"base_layer: expected .*found {type(module).__name__}"):
        VoraLinear.from_linear(module, 2)


@pytest.mark.parametrize(
    "mask",
    [torch.ones(2, 6), torch.full((2, 7), 2), torch.ones(2, 7), torch.ones(2, 6, dtype=torch.bool)],
    ids=["floats of another shape", "twos", "floats", "another shape"],
)
def test_error_names_invalid_mask(mask: Tensor) -> None:
    with pytest.raises(ValueError, match="vision_mask: expected"):
        make("vision")(inputs(2, 7), mask)


def test_mask_together_with_adapter_ids_is_refused() -> None:
    with pytest.raises(ValueError, match="token_mask: expected None with adapter_ids"):
        make("vision")(inputs(2, 7), MASKS["all"], adapter_ids=["default", None])


def test_copies_are_independent() -> None:
    layer, x = make("vision"), inputs(2, 7)
    twin = copy.deepcopy(layer)
    with torch.no_grad():
        layer.B.zero_()
    with modality(MASKS["all"]):
        assert torch.equal(layer(x), layer.base_layer(x))
        assert not torch.equal(twin(x), layer(x))
    assert "route=vision" in repr(twin)
