"""Layers of a pool over a packed base: one op computes the product and the update of each row."""

import contextlib
import copy
from collections.abc import Callable
from typing import Any
from unittest.mock import Mock, patch

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd import forward_ad
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode
from two_layers import random_adapter

import lora_ext
from lora_ext import ops
from lora_ext.layers.base._packed_linear import PackedLinear
from lora_ext.layers.base._packed_weight import _sample_of
from lora_ext.nn import MultiLoraLinear, pack_linears
from lora_ext.serving.layers import _multi_lora

pytestmark = pytest.mark.hosts

WIDE, OUT = 64, 40
NAMES = ["a", None, "b", "a"]
UPDATE = "MultiLoraLinear: head: lora_apply_: "
#: Arguments of ``pack_linears``.
FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "8": {"bits": 8, "group": 32},
    "4": {"bits": 4, "group": 64},
    "4 with a minimum": {"bits": 4, "group": 32, "minimum": True},
    "8, int8": {"bits": 8, "group": 32, "activations": "int8"},
}


class Head(nn.Module):
    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.head = nn.Linear(WIDE, OUT, bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x)


def make(
    form: str = "plain", dtype: torch.dtype = torch.float32, bias: bool = True, **fields: Any
) -> Any:
    """Return a model of one packed layer, attached to a pool with the adapters "a" and "b"."""
    torch.manual_seed(0)
    model = Head(bias).to(dtype).eval().requires_grad_(False)
    pool = lora_ext.AdapterPool(model, max_slots=3, max_rank=32)
    for name, rank in (("a", 4), ("b", 12)):
        pool.load(name, random_adapter({"head": (WIDE, OUT)}, rank, rank, **fields))
    pack_linears(model, **FORMS[form])
    return lora_ext.attach(model, pool)


def inputs(*leading: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*leading, WIDE, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Return a list to which each call of the op appends its output."""
    op, outputs = ops.packed_lora_linear, []

    def counted(*args: Any) -> Tensor:
        outputs.append(op(*args))
        return outputs[-1]

    monkeypatch.setattr(ops, "packed_lora_linear", counted)
    return outputs


def by_two_ops(model: Any, x: Tensor) -> Tensor:
    """Return the model's output, computed by a product and an update in place."""
    with patch.object(_multi_lora, "packed_sum", lambda *_: None):
        return model(x)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fields", [{}, {"lora_bias": True}])
def test_one_op_has_the_bits_of_two(
    form: str, dtype: torch.dtype, fields: dict[str, bool], calls: list[Tensor]
) -> None:
    for bias in (True, False):
        model = make(form, dtype, bias, **fields)
        for leading in [(4,), (4, 1), (4, 3), (4, 2, 2)]:
            x = inputs(*leading, dtype=dtype)
            apart = torch.cat([x, x], -1)[..., :WIDE]  # rows that are not adjacent
            with torch.no_grad(), lora_ext.adapters(NAMES):
                expected = by_two_ops(model, x)
                assert not calls
                for mode in (torch.no_grad, torch.inference_mode):
                    with mode():
                        found = [model(x), model(apart), model(torch.stack([x, x], -1)[..., 0])]
                    assert len(calls) == 3
                    for y in found:
                        assert torch.equal(y, expected) and y.is_contiguous()
                        assert fields or not y._is_view()
                    calls.clear()


@pytest.mark.parametrize(
    "leading, names", [((), "b"), ((3, 2), [("a", 0.5), {"a": 0.25, "b": -2.0}, None])]
)
def test_single_rows_and_mixtures_have_the_bits_of_two_ops(
    leading: tuple[int, ...], names: Any, calls: list[Tensor]
) -> None:
    model, x = make("8"), inputs(*leading)
    with torch.no_grad(), lora_ext.adapters(names):
        assert torch.equal(model(x), by_two_ops(model, x)) and len(calls) == 1


def test_scaled_inputs_have_the_bits_of_two_ops(calls: list[Tensor]) -> None:
    model, x = make("8"), inputs(4)
    model.head.slab.before = torch.rand(len(model.head.slab.scale), WIDE) + 0.5
    with torch.no_grad(), lora_ext.adapters(NAMES):
        assert torch.equal(model(x), by_two_ops(model, x)) and len(calls) == 1


def test_rows_that_all_use_the_base_model_need_no_update(calls: list[Tensor]) -> None:
    model, x = make("8"), inputs(2)
    with torch.no_grad(), lora_ext.adapters(None):
        assert torch.equal(model(x), model.head.base(x)) and not calls


class Halved(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


def doubles(base: Any) -> Any:
    """Return a forward hook that doubles the output of ``base``."""
    return lambda module, args, y: 2 * y if module is base else None


#: Changes of a base layer that double its output or halve its weight.
REPLACED: dict[str, Callable[[Any, contextlib.ExitStack], Any]] = {
    "hook": lambda base, undo: undo.callback(base.register_forward_hook(doubles(base)).remove),
    "hook before": lambda base, undo: undo.callback(
        base.register_forward_pre_hook(lambda module, args: (2 * args[0],)).remove
    ),
    "hook of all modules": lambda base, undo: undo.callback(
        register_module_forward_hook(doubles(base)).remove
    ),
    "own forward": lambda base, undo: undo.enter_context(
        patch.multiple(base, forward=lambda x: 2 * PackedLinear.forward(base, x))
    ),
    "forward of the class": lambda _, undo, forward=PackedLinear.forward: undo.enter_context(
        patch.multiple(PackedLinear, forward=lambda base, x: 2 * forward(base, x))
    ),
    "compiled": lambda base, undo: undo.enter_context(
        patch.multiple(base, _compiled_call_impl=lambda x: 2 * PackedLinear.forward(base, x))
    ),
    "parametrized": lambda base, _: parametrize.register_parametrization(base, "weight", Halved()),
}
#: Changes of a base layer or of torch, and inputs, of which the op does not compute the product.
OTHER: dict[str, Callable[[Any, contextlib.ExitStack], Any]] = {
    "autocast": lambda _, undo: undo.enter_context(torch.autocast("cpu", torch.bfloat16)),
    "gradients": lambda _, undo: (
        undo.enter_context(torch.enable_grad()) or inputs(4, 2).requires_grad_()
    ),
    "tangents": lambda _, undo: undo.enter_context(forward_ad.dual_level()),
    "training": lambda base, undo: undo.callback(base.train().eval),
    "another dtype": lambda base, _: inputs(4, 2, dtype=base.bfloat16().weight.dtype),
    "no rows": lambda *_: inputs(4, 0),
    "many rows": lambda *_: inputs(4, 9),
    "a device with few rows": lambda _, undo: undo.enter_context(
        patch.multiple(_multi_lora, limits_rows=lambda x: True, MAX_CUDA_ROWS=3)
    ),
    "exact": lambda base, undo: undo.enter_context(patch.multiple(base, exact=True)),
}


@pytest.mark.parametrize("change", [*REPLACED, *OTHER])
def test_everything_else_is_computed_by_two_ops(change: str, calls: list[Tensor]) -> None:
    model, x = make(), inputs(4, 2)
    with torch.no_grad(), lora_ext.adapters(NAMES):
        plain = model(x)
        assert calls.pop() is plain and not calls
        with contextlib.ExitStack() as undo:
            other = {**REPLACED, **OTHER}[change](model.head.base, undo)
            changed = other if isinstance(other, Tensor) else x
            expected, found = by_two_ops(model, changed), model(changed)
        assert torch.equal(found, expected) and not calls
        assert change not in REPLACED or not torch.allclose(found, plain)
        if change not in ("parametrized", "another dtype"):
            model(x)
            model(x)  # Training drops the copy, which the second product packs again.
            assert calls and torch.equal(calls[-1], plain)


def test_a_changed_weight_is_packed_at_its_second_product(
    calls: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, pack = make(), Mock(wraps=ops.pack_weight)
    monkeypatch.setattr(ops, "pack_weight", pack)
    with torch.no_grad(), lora_ext.adapters(NAMES):
        for packs, products in ((0, 0), (0, 0), (0, 0), (1, 1), (1, 2)):
            if packs == 0:
                model.head.base.weight.mul_(2)
            model(inputs(4))
            assert (pack.call_count, len(calls)) == (packs, products)


@pytest.mark.parametrize("form", ["plain", "8"])
def test_a_copy_without_values_is_not_kept(form: str, calls: list[Tensor]) -> None:
    model, x = make(form), inputs(4)
    with torch.no_grad(), lora_ext.adapters(NAMES):
        model.head.base.weight.mul_(2)
        for _ in range(2):
            with FakeTensorMode(allow_non_fake_inputs=True):
                assert isinstance(model(x), FakeTensor)
        assert not calls and torch.equal(by_two_ops(model, x), model(x)) and len(calls) == 1


def frozen(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.ones(shape), requires_grad=False)


@pytest.mark.parametrize("form", ["plain", "8"])
@pytest.mark.parametrize(
    "owner, values, error, text",
    [
        ("base", {"weight": None}, TypeError, "must be Tensor, not NoneType"),
        ("base", {"weight": frozen(48, WIDE)}, RuntimeError, "48"),
        ("base", {"weight": frozen(48, WIDE), "bias": None}, ValueError, f"^{UPDATE}b.shape"),
        ("base", {"weight": frozen(OUT, 48), "bias": None}, RuntimeError, "4x64 and 48x40"),
        ("base", {"bias": frozen(39)}, ValueError, r"^packed_linear: bias: .*, found \[39\]"),
        ("slab", {"ranks": torch.ones(4)}, ValueError, f"^{UPDATE}ranks: .*, found Float"),
    ],
)
def test_errors_are_those_of_two_ops(
    form: str, owner: str, values: dict[str, Any], error: type[Exception], text: str
) -> None:
    model = make(form)
    changed = patch.multiple(getattr(model.head, owner), **values)
    with torch.no_grad(), lora_ext.adapters(NAMES), changed:
        for _ in range(3):  # The second product packs a changed weight.
            with pytest.raises(error, match=text):
                model(inputs(4))


@pytest.mark.parametrize("form", ["plain", "8"])
def test_transforms_and_tracing_of_torch_run_two_ops(form: str, calls: list[Tensor]) -> None:
    model, x = make(form), inputs(4, 2)
    with torch.no_grad(), lora_ext.adapters(NAMES):
        plain = by_two_ops(model, x)
        mapped = torch.vmap(lambda x: model.head.base(x))(x)
        traced: Any = torch.jit.trace(model, x, check_trace=False)
        compiled: Any = torch.compile(model, backend="eager")
        calls.clear()
        for run in (traced, compiled):
            torch.testing.assert_close(run(x), plain, rtol=2e-2, atol=2e-2)
    assert mapped.shape == plain.shape and not calls


def test_modes_and_profilers_of_torch_see_the_op() -> None:
    model, x, seen = make("8"), inputs(4, 2), []
    name = "lora_ext::packed_lora_linear"

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), how: Any = None) -> Any:
            seen.append(func.name())
            return func(*args, **(how or {}))

    with torch.no_grad(), lora_ext.adapters(NAMES):
        expected = by_two_ops(model, x)
        with Mode():
            found = model(x)
        assert torch.equal(found, expected) and seen.count(name) == 1
        with torch.profiler.profile() as profile:
            model(x)
    assert [event.count for event in profile.key_averages() if event.key == name] == [1]


def test_copies_and_tied_weights_use_the_op(calls: list[Tensor]) -> None:
    model, x = make("8"), inputs(4)
    twin, tied = copy.deepcopy(model), MultiLoraLinear(model.head.base, model.head.pool, "head")
    with torch.no_grad(), lora_ext.adapters(NAMES):
        expected = by_two_ops(model, x)
        twin(x)  # The deep copy packs its weight.
        for each in (model, twin, tied):
            assert torch.equal(each(x), expected)
        assert len(calls) == 4
        model.head.weight.mul_(2)
        assert torch.equal(tied(x), model(x)) and not torch.equal(model(x), expected)
        assert torch.equal(twin(x), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(3, 5), (192, 576), (576, 192)])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("strided", [False, True])
def test_a_sample_equals_its_copy_until_a_bit_changes(
    dtype: torch.dtype, shape: tuple[int, int], turned: bool, strided: bool
) -> None:
    weight = torch.randn(shape).to(dtype)
    weight[0, 0] = torch.nan
    weight = weight[:, ::2] if strided else weight
    weight = weight.t() if turned else weight
    sample = _sample_of(weight)
    values = sample.clone()
    assert ops.same_bits(sample, values) and torch.equal(sample, values)
    last = tuple(size - 1 for size in sample.shape)
    for place in ((0,) * sample.dim(), tuple(size // 2 for size in sample.shape), last):
        before = sample[place].clone()
        sample[place] ^= 1
        assert not ops.same_bits(sample, values)
        sample[place] = before
    assert ops.same_bits(sample, values)


def test_float8_pages_take_the_same_op(calls: list[Tensor]) -> None:
    torch.manual_seed(0)
    model, x = Head(True).eval().requires_grad_(False), inputs(4)
    pool = lora_ext.AdapterPool(model, max_slots=2, max_rank=16, dtype=torch.float8_e4m3fn)
    pool.load("a", random_adapter({"head": (WIDE, OUT)}, 12, 1))
    pack_linears(model)
    layer: Any = lora_ext.attach(model, pool).head
    slab = layer.slab
    with torch.no_grad(), lora_ext.adapters("a"), pool.acquire(["a"]) as slots:
        y, base = model(x), layer.base(x)
        rest = torch.tensor(slots * 4), slab.page_scale, slab.ranks, slab.page_table
        expected = ops.lora_apply_(base.clone(), x, slab.a_pages, slab.b_pages, *rest)
    assert len(calls) == 1 and torch.equal(y, expected) and not torch.equal(y, base)
