"""``lora_forward``, the functional forward of layers with adapters, compared with PEFT's layer."""

import copy
import sys
from collections.abc import Callable

import pytest
import torch
from peft.tuners.lora import Linear as PeftLinear
from peft_layers import CLOSE, assert_as_exact, assert_same, peft_layer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from lora_ext.layers._lora_forward import LoraFactors, dense_parameters, lora_forward
from lora_ext.reference.lora_train import dropout_keep
from lora_ext.rows._rows import rows_of

pytestmark = pytest.mark.hosts


def factors(layer: PeftLinear) -> list[LoraFactors]:
    found = []
    for name in layer.lora_A:
        dropout = layer.lora_dropout[name]
        p = dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
        b = layer.lora_B[name]
        found.append(
            LoraFactors(layer.lora_A[name].weight, b.weight, layer.scaling[name], p, b.bias)
        )
    return found


def assert_as_peft(layer: PeftLinear, x: Tensor) -> None:
    assert_same(
        layer, x, lambda: lora_forward(x, layer.base_layer, factors(layer)), lambda: layer(x)
    )


SETTINGS = {
    "plain": [{}],
    "rslora": [{"use_rslora": True, "r": 3}],
    "bias": [{"lora_bias": True}],
    "above one span of ranks": [{"r": 300, "lora_alpha": 300, "lora_bias": True}, {"r": 2}],
    "summed, one scaling": [{}, {"r": 8, "lora_alpha": 12}],
    "summed, two scalings and biases": [{"lora_bias": True}, {"r": 2, "lora_bias": True}, {}],
}


@pytest.mark.parametrize("kind", SETTINGS)
@pytest.mark.parametrize("lead", [(), (5,), (2, 3), (2, 1, 3), (0, 3)], ids=str)
@pytest.mark.parametrize("has_bias", [True, False])
def test_all_adapters_on_all_rows_equal_peft(kind, lead, has_bias):
    layer = peft_layer(nn.Linear(24, 17, bias=has_bias), *SETTINGS[kind])
    x = torch.randn(*lead, 24, requires_grad=True)
    assert_same(
        layer, x, lambda: lora_forward(x, layer.base_layer, factors(layer)), lambda: layer(x)
    )


@pytest.mark.parametrize("kind", SETTINGS)
def test_conv1d_equals_peft(kind):
    base = Conv1D(17, 24)
    layer = peft_layer(base, *({**s, "fan_in_fan_out": True} for s in SETTINGS[kind]))
    assert dense_parameters(base) is not None
    x = torch.randn(2, 3, 24, requires_grad=True)
    assert_same(layer, x, lambda: lora_forward(x, base, factors(layer)), lambda: layer(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tensor_scaling_is_read_at_every_call(dtype):
    layer = peft_layer(nn.Linear(24, 17), {}, {"r": 2}).to(dtype)
    x, ids = torch.randn(4, 24, dtype=dtype, requires_grad=True), torch.tensor([1, 0, -1, 1])
    both = ["0", "1"]
    for value in (2.25, 1.0, 9.0):  # PEFT's hot swap changes scales in this way.
        for name in both:
            scaling = layer.scaling[name]
            if isinstance(scaling, Tensor):
                scaling.fill_(value)
            else:
                layer.scaling[name] = torch.tensor(value)
        assert_as_peft(layer, x)
        layer.set_adapter("0")
        one = factors(layer)[:1]
        assert_same(
            layer, x, lambda one=one: lora_forward(x, layer.base_layer, one), lambda: layer(x)
        )
        layer.set_adapter(both)
        by_number = [factors(layer)[i]._replace(scaling=value) for i in (0, 1)]
        assert_same(
            layer,
            x,
            lambda: lora_forward(x, layer.base_layer, factors(layer), ids),
            lambda f=by_number: lora_forward(x, layer.base_layer, f, ids),
        )


def test_base_that_is_not_a_plain_linear_is_called():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    layer = peft_layer(Doubled(24, 17), {}, {"r": 2})
    assert dense_parameters(layer.base_layer) is None
    x = torch.randn(2, 3, 24, requires_grad=True)
    assert_same(
        layer, x, lambda: lora_forward(x, layer.base_layer, factors(layer)), lambda: layer(x)
    )


def test_hook_of_the_base_is_called_every_time():
    layer = peft_layer(nn.Linear(24, 17), {})
    calls = []
    handle = layer.base_layer.register_forward_hook(lambda *_: calls.append(1))
    x = torch.randn(3, 24, requires_grad=True)
    assert_same(
        layer, x, lambda: lora_forward(x, layer.base_layer, factors(layer)), lambda: layer(x)
    )
    assert len(calls) == 3  # by lora_ext, by PEFT, and by PEFT in float64
    handle.remove()
    assert dense_parameters(layer.base_layer) is not None


@pytest.mark.parametrize("names", [["0", "1", "2"], ["2", "__base__", "0"], ["1"] * 3])
@pytest.mark.parametrize(
    "kind", ["equal ranks", "ranks and scalings", "biases", "one of them", "large"]
)
def test_adapter_of_each_row_equals_peft(kind, names):
    settings = {
        "equal ranks": [{}, {}, {}],
        "ranks and scalings": [{"r": 8}, {"r": 2}, {"r": 5, "use_rslora": True}],
        "biases": [{"lora_bias": True}, {"lora_bias": True, "r": 3}, {"r": 2}],
        "one of them": [{}, {}, {}],
        "large": [{"r": 300, "lora_alpha": 300}, {"r": 2}, {"r": 257, "lora_bias": True}],
    }[kind]
    layer = peft_layer(nn.Linear(24, 17), *settings)
    x = torch.randn(3, 4, 24, requires_grad=True)
    ids = torch.tensor([int(n) if n != "__base__" else -1 for n in names]).repeat_interleave(4)
    assert_same(
        layer,
        x,
        lambda: lora_forward(x, layer.base_layer, factors(layer), ids),
        lambda: layer(x, adapter_names=names),
    )


def test_rows_without_adapters_equal_the_base():
    layer = peft_layer(nn.Linear(24, 17), {})
    x = torch.randn(4, 24)
    none = torch.full((4,), -1)
    assert torch.equal(lora_forward(x, layer.base_layer, factors(layer), none), layer.base_layer(x))
    assert torch.equal(lora_forward(x, layer.base_layer, []), layer.base_layer(x))


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_equal_those_of_peft(x_dtype, adapter_dtype):
    layer = peft_layer(nn.Linear(24, 17), {}, {"r": 2})
    layer.base_layer.to(x_dtype)
    layer.lora_A.to(adapter_dtype)
    layer.lora_B.to(adapter_dtype)
    x = torch.randn(2, 3, 24, dtype=x_dtype, requires_grad=True)
    unit = max(torch.finfo(d).eps for d in (x_dtype, adapter_dtype))
    assert_as_exact(
        lambda x: lora_forward(x, layer.base_layer, factors(layer)), layer, layer, x, unit
    )


@pytest.mark.parametrize("plain_base", [True, False])
def test_autocast_is_as_exact_as_peft(plain_base):
    layer = peft_layer(nn.Linear(24, 17), {}, {"r": 2})
    if not plain_base:
        layer.base_layer.register_forward_hook(lambda *_: None)
    x = torch.randn(2, 3, 24, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        unit = torch.finfo(torch.bfloat16).eps
        run = lambda x: lora_forward(x, layer.base_layer, factors(layer))  # noqa: E731
        assert_as_exact(run, layer, layer, x, unit)


def test_float64_is_not_rounded_to_float32():
    layer = peft_layer(nn.Linear(24, 17), {"r": 3}).double()  # float32 would round 1 / 3.
    layer.scaling["0"] = 1 / 3
    x = torch.randn(5, 24, dtype=torch.float64)
    y = lora_forward(x, layer.base_layer, factors(layer))
    torch.testing.assert_close(y, layer(x), rtol=1e-13, atol=1e-13)


def test_dropout_depends_on_the_seed_of_torch_and_drops_the_expected_share():
    torch.manual_seed(0)
    base, a, b = nn.Linear(64, 64), torch.eye(64), torch.eye(64)
    x = torch.ones(200, 64)
    f = LoraFactors(a, b, 1.0, 0.25)

    def dropped():
        torch.manual_seed(7)
        return lora_forward(x, base, [f]) - base(x)

    first = dropped()
    assert torch.equal(first, dropped())
    second = lora_forward(x, base, [f]) - base(x)
    assert not torch.equal(first, second)
    kept = first.abs() > 0.5
    torch.testing.assert_close(first[kept], torch.full_like(first[kept], 1 / 0.75), **CLOSE)
    # Five standard deviations of the share among 12800 elements are 0.019.
    assert abs(kept.float().mean() - 0.75) < 0.019


@pytest.mark.parametrize("plain_base", [True, False])
def test_dropout_equals_the_formula_with_the_mask_of_its_seed(plain_base, monkeypatch):
    torch.manual_seed(0)
    base = nn.Linear(24, 17)
    if not plain_base:
        base.register_forward_hook(lambda *_: None)
    a, b = torch.randn(4, 24, requires_grad=True), torch.randn(17, 4, requires_grad=True)
    x = torch.randn(6, 24, requires_grad=True)
    seed = torch.tensor([2**40 + 5])
    module = sys.modules[lora_forward.__module__]  # The function hides the module of the same name.
    monkeypatch.setattr(module, "draw_seed", lambda device: seed)
    keep = dropout_keep(6, 24, 0.25, seed)
    assert 0 < keep.sum() < keep.numel()
    y = lora_forward(x, base, [LoraFactors(a, b, 1.5, 0.25)])
    expected = base(x) + 1.5 * (torch.where(keep, x / 0.75, 0) @ a.T) @ b.T
    torch.testing.assert_close(y, expected, **CLOSE)
    dy = torch.randn(6, 17)
    found, true = (torch.autograd.grad(t, (x, a, b), dy) for t in (y, expected))
    torch.testing.assert_close(found, true, **CLOSE)


def test_adapters_with_dropout_on_the_same_rows_have_separate_masks():
    base, eye = nn.Linear(64, 64, bias=False), torch.eye(64)
    nn.init.zeros_(base.weight)
    x = torch.ones(200, 64)
    y = lora_forward(x, base, [LoraFactors(eye, eye, 1.0, 0.5), LoraFactors(eye, eye, 1.0, 0.5)])
    share = [(y.round() == v).float().mean().item() for v in (0, 2, 4)]
    assert share == pytest.approx([0.25, 0.5, 0.25], abs=0.025)  # five standard deviations


def test_rows_may_have_adapters_with_different_dropout():
    base, eye = nn.Linear(8, 8, bias=False), torch.eye(8)
    nn.init.zeros_(base.weight)
    x = torch.ones(4, 8)
    parts = [LoraFactors(eye, eye, s, p) for s, p in ((1.0, 0.0), (3.0, 0.5), (2.0, 0.0))]
    y = lora_forward(x, base, parts, torch.tensor([2, -1, 1, 0]))
    assert (y[0] == 2).all() and (y[1] == 0).all() and (y[3] == 1).all()
    assert set(y[2].tolist()) <= {0.0, 6.0}


def test_checkpointing_recomputes_with_the_same_mask():
    torch.manual_seed(0)
    base = nn.Linear(24, 17)
    a, b = torch.randn(4, 24, requires_grad=True), torch.randn(17, 4, requires_grad=True)
    x = torch.randn(6, 24, requires_grad=True)

    def run(x: Tensor) -> Tensor:
        return lora_forward(x, base, [LoraFactors(a, b, 1.5, 0.5)])

    torch.manual_seed(1)
    expected = torch.autograd.grad(run(x).square().sum(), (x, a, b))
    torch.manual_seed(1)
    found = torch.autograd.grad(checkpoint(run, x, use_reentrant=False).square().sum(), (x, a, b))
    assert all(torch.equal(f, e) for f, e in zip(found, expected, strict=True))


def test_gradients_of_a_bank_share_its_memory():
    layer = peft_layer(nn.Linear(24, 17), {}, {})
    x = torch.randn(4, 24)
    lora_forward(x, layer.base_layer, factors(layer), torch.tensor([0, 1, 1, 0])).sum().backward()
    grads = [layer.lora_A[n].weight.grad for n in ("0", "1")]
    assert grads[0].untyped_storage().data_ptr() == grads[1].untyped_storage().data_ptr()


@pytest.mark.slow
def test_compiles_into_one_graph():
    layer = peft_layer(nn.Linear(24, 17), {}, {"r": 2})
    ids = torch.tensor([0, 1, -1, 1])
    x = torch.randn(4, 24, requires_grad=True)
    compiled = torch.compile(lora_forward, fullgraph=True, backend="aot_eager")
    for i in (None, ids):
        f = factors(layer)
        assert_same(
            layer,
            x,
            lambda f=f, i=i: compiled(x, layer.base_layer, f, i),
            lambda f=f, i=i: lora_forward(x, layer.base_layer, f, i),
        )


def test_rows_are_grouped_once_and_again_after_a_change_of_ids():
    ids = torch.tensor([3, -1, 1, 3])
    rows = rows_of(ids, 4)
    assert rows.used == (1, 3) and rows.ids.tolist() == [1, -1, 0, 1]
    assert rows_of(ids, 4) is rows
    ids[0] = 0
    assert rows_of(ids, 4).used == (0, 1, 3)
    ids.data[1] = 2  # This does not increment the version counter.
    assert rows_of(ids, 4).used == (0, 1, 2, 3)
    ids.numpy()[:] = 1
    assert rows_of(ids, 4).used == (1,)
    ids.resize_(2)
    assert rows_of(ids, 4).ids.tolist() == [0, 0]
    with torch.inference_mode():
        ids = torch.tensor([0, 0])
        assert rows_of(ids, 4) is rows_of(ids, 4)
        ids[1] = 3
        assert rows_of(ids, 4).used == (0, 3)


@pytest.mark.parametrize(
    ("ids", "error", "text"),
    [
        (torch.zeros(3, dtype=torch.int64), ValueError, "one id for each of 4 rows"),
        (torch.zeros(2, 2, dtype=torch.int64), ValueError, "one id for each of 4 rows"),
        (torch.zeros(4), TypeError, "int64 or int32"),
        (torch.tensor([0, 0, 0, 1]), ValueError, r"ids in \[-1, 1\), found 0 to 1"),
        (torch.tensor([0, 0, 0, -2]), ValueError, r"ids in \[-1, 1\), found -2 to 0"),
    ],
)
def test_wrong_ids_raise(ids, error, text):
    layer = peft_layer(nn.Linear(24, 17), {})
    with pytest.raises(error, match=text):
        lora_forward(torch.randn(4, 24), layer.base_layer, factors(layer), ids)


def test_wrong_width_raises_even_if_the_sizes_divide():
    layer = peft_layer(nn.Linear(24, 17), {})
    with pytest.raises((ValueError, RuntimeError)):
        lora_forward(torch.randn(4, 48), layer.base_layer, factors(layer))


def test_values_cached_in_inference_mode_work_in_training():
    layer = peft_layer(nn.Linear(24, 17), {})
    x = torch.randn(11, 24)
    with torch.inference_mode():
        lora_forward(x, layer.base_layer, factors(layer))
    lora_forward(x, copy.deepcopy(layer.base_layer), factors(layer)).sum().backward()
    assert layer.lora_A["0"].weight.grad is not None


def test_backward_saves_no_more_bytes_per_row_than_plain_torch():
    x, w = torch.randn(96, 24, requires_grad=True), nn.Linear(24, 17, bias=False)
    w.requires_grad_(False)
    a, b = torch.randn(4, 24, requires_grad=True), torch.randn(17, 4, requires_grad=True)

    def kept(forward: Callable[[], Tensor]) -> int:
        memory: dict[int, int] = {}

        def pack(t: Tensor) -> Tensor:
            memory[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            forward()
        return sum(memory.values())

    plain = kept(lambda: w(x) + x @ a.T @ b.T)
    assert kept(lambda: lora_forward(x, w, [LoraFactors(a, b, 1.0)])) <= plain + 4
    dropped = kept(lambda: lora_forward(x, w, [LoraFactors(a, b, 1.0, p=0.5)]))
    assert dropped <= plain + 4 + 8  # an id (4 bytes) and a seed (8 bytes)
