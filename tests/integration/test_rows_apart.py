"""A NaN in one row of a batch stays in that row, even if torch's matrix products read past the end
of rows."""

import copy
import pickle
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import peft
import pytest
import torch
from reading_behind import reading_behind
from service_held import held
from tiny import TEXT, enlarged, maker
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

import lora_ext
from lora_ext import ops
from lora_ext._torch import linear, spaced
from lora_ext.interop.peft import to_peft
from lora_ext.layers import space_products
from lora_ext.tenants import Datum, Service

pytestmark = pytest.mark.hosts

WIDTHS = (33, 80, 144, 172)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ROWS, BAD, RANK, OTHER = 40, 20, 5, 48
INNOCENT = [t for t in range(ROWS) if t != BAD]

widths = pytest.mark.parametrize("width", WIDTHS)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


@pytest.fixture(params=[False, True], ids=["torch", "planted"], autouse=True)
def planted(request: pytest.FixtureRequest) -> Iterator[bool]:
    """Run a test with torch's products, and with a substitute that always reads past row ends."""
    with reading_behind() if request.param else nullcontext():
        yield request.param


def randn(seed: int, *shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def one_bad(x: Tensor) -> Tensor:
    x = x.clone()
    x[BAD] = torch.nan
    return x


def assert_apart(y: Tensor, clean: Tensor | None = None) -> None:
    """Check that all rows except the bad one are finite, and equal ``clean`` up to rounding."""
    y = y.detach().reshape(ROWS, -1)
    assert y[BAD].isnan().any()
    assert y[INNOCENT].isfinite().all()
    if clean is not None:
        torch.testing.assert_close(y[INNOCENT], clean.detach().reshape(ROWS, -1)[INNOCENT])


def assert_apart_both_ways(f: Callable[[Tensor], Tensor], x: Tensor, out: int) -> None:
    """Check a forward with NaN in one row of ``x`` and a backward with NaN in one of ``dy``."""
    assert_apart(f(one_bad(x)), f(x))
    x = x.clone().requires_grad_()
    y = f(x)
    dy = randn(9, *y.shape, dtype=y.dtype)
    assert y.shape[-1] == out
    (clean,) = torch.autograd.grad(y, x, dy, retain_graph=True)
    (dx,) = torch.autograd.grad(y, x, one_bad(dy.view(ROWS, -1)).view(dy.shape))
    assert_apart(dx, clean)


@widths
def test_substitute_reads_past_row_ends(planted: bool, width: int) -> None:
    if not planted:
        pytest.skip("this test runs only with the substitute")
    x = one_bad(randn(0, ROWS, width, dtype=torch.bfloat16))
    weight = randn(1, OTHER, width, dtype=torch.bfloat16)
    for y in (torch.nn.functional.linear(x, weight), torch.addmm(weight[:, 0], x, weight.t())):
        assert y[BAD - 1].isnan().all()
    assert_apart(x[:, :32] @ weight[:, :32].t())


@widths
def test_product_of_3d_rows_is_bitwise_equal_to_that_of_2d_rows(planted: bool, width: int) -> None:
    """Check strided inputs in three dimensions. For these, torch adds the bias with a second
    rounding."""
    layer = nn.Linear(width, OTHER).bfloat16().requires_grad_(False)
    x = randn(0, 4, 10, width, dtype=torch.bfloat16)
    expected = linear(x.view(ROWS, width), layer.weight, layer.bias).view(4, 10, OTHER)
    assert torch.equal(linear(x, layer.weight, layer.bias), expected)
    space_products(layer)
    shapes: list[torch.Size] = []
    layer.register_forward_hook(lambda _module, _args, y: shapes.append(y.shape))
    assert torch.equal(layer(x), expected)
    assert shapes == [expected.shape]


@widths
@dtypes
def test_spaced_rows_are_unchanged_and_followed_by_zeros(width: int, dtype: torch.dtype) -> None:
    x = randn(0, 2, 3, width, dtype=dtype)
    y = spaced(x)
    assert torch.equal(x, y)
    if dtype == torch.float32:
        assert y is x
        return
    behind = y.as_strided((6, 32), (y.stride(1), 1), y.storage_offset() + width)
    assert not behind.any() and y.stride(1) % 32 == 0
    assert spaced(x[..., :32]).data_ptr() == x.data_ptr()


@widths
@dtypes
def test_guarded_product_has_the_gradients_of_the_formula(width: int, dtype: torch.dtype) -> None:
    shapes = (2, ROWS // 2, width), (OTHER + 1, width), (OTHER + 1,)
    leaves = [randn(i, *shape, dtype=dtype).requires_grad_() for i, shape in enumerate(shapes)]
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    y, exact = linear(*leaves), torch.nn.functional.linear(*wide)
    dy = randn(5, *y.shape, dtype=dtype)
    found = torch.autograd.grad(y, leaves, dy)
    # One rounding of the result, and roundings of float32 sums relative to the sum of magnitudes.
    magnitudes = [leaf.detach().abs().requires_grad_() for leaf in wide]
    bound = torch.autograd.grad(
        torch.nn.functional.linear(*magnitudes), magnitudes, dy.abs().double()
    )
    expected = torch.autograd.grad(exact, wide, dy.double())
    for name, one, ideal, most in zip("xwb", found, expected, bound, strict=True):
        allowed = torch.finfo(dtype).eps * ideal.abs() + 256 * torch.finfo(torch.float32).eps * most
        if dtype != torch.float32 and name == "b":  # torch sums a bias's gradient in another order.
            allowed = allowed + torch.finfo(dtype).eps * most
        assert ((one.double() - ideal).abs() <= allowed).all(), name


@widths
@dtypes
@pytest.mark.parametrize("turned", [False, True], ids=["in", "out"])
def test_ops_keep_rows_apart(width: int, dtype: torch.dtype, turned: bool) -> None:
    i, o = (OTHER, width) if turned else (width, OTHER)
    x, weight = randn(0, ROWS, i, dtype=dtype), randn(1, o, i, dtype=dtype)
    a, b = randn(2, 2, RANK, i, dtype=dtype), randn(3, 2, o, RANK, dtype=dtype)
    bias, ids = randn(4, o, dtype=dtype), torch.arange(ROWS) % 3 - 1

    def run(x: Tensor) -> Tensor:
        return ops.lora_linear(x, weight, bias, a, b, ids)

    assert_apart_both_ways(run, x, o)
    assert_apart_both_ways(lambda x: linear(x, weight, bias), x, o)
    ends = torch.tensor([3, 3, ROWS], dtype=torch.int32)
    experts = torch.stack([weight.t()] * 3)
    assert_apart_both_ways(lambda x: ops.grouped_mm(x, experts, ends), x, o)


@widths
@dtypes
def test_chunked_loss_and_leaves_keep_rows_apart(width: int, dtype: torch.dtype) -> None:
    hidden, weight = randn(0, ROWS, width, dtype=dtype), randn(1, 77, width, dtype=dtype)
    labels = torch.arange(ROWS) % 77

    def gradient(hidden: Tensor) -> Tensor:
        hidden = hidden.clone().requires_grad_()
        return torch.autograd.grad(
            ops.chunked_cross_entropy(hidden, weight, None, labels, chunk=50), hidden
        )[0]

    assert_apart(gradient(one_bad(hidden)), gradient(hidden))
    h, emit = randn(0, ROWS, width, dtype=dtype), randn(1, 2, 3, 7, width, dtype=dtype)
    places = torch.arange(ROWS * 2).view(ROWS, 2) % 7
    clean = h.clone().requires_grad_(), one_bad(h).requires_grad_()
    y, bad = (ops.emission_gather(leaf, emit, places) for leaf in clean)
    assert_apart(bad, y)
    (dh,) = torch.autograd.grad(bad.sum(), clean[1])
    assert_apart(dh)


@widths
def test_dora_adapter_and_embedding_keep_rows_apart(width: int) -> None:
    dtype = torch.bfloat16
    base = nn.Linear(width, OTHER).to(dtype)
    layer = lora_ext.nn.LoraLinear(base, r=RANK, use_dora=True, lora_dropout=0.5)
    torch.manual_seed(0)
    assert_apart(layer(one_bad(randn(0, ROWS, width, dtype=dtype))))
    table = nn.Embedding(ROWS, width).to(dtype)
    embedding = lora_ext.nn.LoraEmbedding(table, r=RANK)
    with torch.no_grad():
        embedding.lora_embedding_A["default"].normal_()[:, BAD] = torch.nan
        embedding.lora_embedding_B["default"].normal_()
    assert_apart(embedding(torch.arange(ROWS)))


class Three(nn.Module):
    """Model of a layer with adapters, a layer without, transformers' ``Conv1D`` and a head."""

    def __init__(self, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(width)
        self.up = nn.Linear(width, 172)
        self.down = nn.Linear(172, width, bias=False)
        self.turn = Conv1D(80, width)
        self.head = nn.Linear(80, 33)
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.turn(self.down(torch.tanh(self.up(x)))))


CONFIG: dict[str, Any] = {"r": RANK, "lora_alpha": 8, "target_modules": ["up"]}


def wrapped(model: nn.Module) -> nn.Module:
    found = lora_ext.nn.wrap(model, lora_ext.LoraConfig(**CONFIG), autocast_adapter_dtype=False)
    return found


def from_peft(model: nn.Module) -> nn.Module:
    config = peft.LoraConfig(**CONFIG, init_lora_weights=False)
    made = peft.get_peft_model(model, config, autocast_adapter_dtype=False)  # pyright: ignore
    return lora_ext.from_peft(made)


def attached(model: Any) -> nn.Module:
    pool = lora_ext.AdapterPool(model.eval(), max_slots=2, max_rank=8, targets=["up"])
    weight = model.up.weight
    state = {
        "base_model.model.up.lora_A.weight": randn(1, RANK, weight.shape[1], dtype=weight.dtype),
        "base_model.model.up.lora_B.weight": randn(2, weight.shape[0], RANK, dtype=weight.dtype),
    }
    pool.load("a", ({"peft_type": "LORA", **CONFIG}, state))
    return lora_ext.attach(model, pool, default="a")


WAYS = {"wrap": wrapped, "from_peft": from_peft, "attach": attached}
ways = pytest.mark.parametrize("way", WAYS)


@widths
@dtypes
@ways
def test_models_keep_rows_apart(way: str, width: int, dtype: torch.dtype) -> None:
    model = WAYS[way](Three(width, dtype))
    x = randn(0, ROWS, width, dtype=dtype)
    assert_apart_both_ways(model, x, 33)
    assert_apart_both_ways(lambda x: model(x.view(2, ROWS // 2, width)).view(ROWS, -1), x, 33)
    copied = copy.deepcopy(model)
    assert_apart(copied(one_bad(x)), model(x))


@ways
def test_base_alone_keeps_rows_apart(way: str) -> None:
    model: Any = WAYS[way](Three(144, torch.bfloat16))
    x = one_bad(randn(0, ROWS, 144, dtype=torch.bfloat16))
    if way == "attach":
        with lora_ext.adapters([None] * ROWS):
            assert_apart(model(x))
    elif way == "wrap":
        model.up.set_adapter([])
        assert_apart(model(x))
    else:
        with model.disable_adapter():
            assert_apart(model(x))


@ways
def test_layers_get_the_hooks_they_need_and_undoing_removes_them(way: str) -> None:
    undo: dict[str, Callable[[Any], Any]] = {
        "wrap": lora_ext.nn.unwrap,
        "from_peft": to_peft,
        "attach": lora_ext.detach,
    }

    def hooks(model: Any) -> int:
        layers = [getattr(module, "base", module) for module in model.modules()]
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in layers)

    assert hooks(WAYS[way](Three(144, torch.float32))) == 0
    model = WAYS[way](Three(144, torch.bfloat16))
    assert hooks(model) == 8  # two for each of the four layers
    assert hooks(undo[way](model)) == 0


@pytest.mark.parametrize("merge", [False, True], ids=["unload", "merge_and_unload"])
def test_model_unloaded_by_peft_has_no_hooks_of_this_package(merge: bool) -> None:
    fused: Any = from_peft(Three(144, torch.bfloat16))
    plain: nn.Module = fused.merge_and_unload() if merge else fused.unload()
    assert type(plain) is Three
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in plain.modules())
    assert b"lora_ext" not in pickle.dumps(plain)


class Grouped(nn.Linear):
    """Linear layer that calls ``view`` on its input, which fails if there are gaps between rows."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.view(-1, 16).view(input.shape))


@ways
@pytest.mark.parametrize("adapted", [False, True], ids=["beside", "adapted"])
def test_subclass_that_views_its_input_runs(way: str, adapted: bool) -> None:
    model = Three(80, torch.bfloat16)
    setattr(model, "up" if adapted else "head", Grouped(80, 172 if adapted else 33).bfloat16())
    x = randn(0, 2, 20, 80, dtype=torch.bfloat16)
    expected = model(x)
    model = WAYS[way](model)
    assert model(x).shape == expected.shape
    if way == "attach":
        with lora_ext.adapters([None] * ROWS):
            torch.testing.assert_close(model(x), expected)


class CountedOps(TorchDispatchMode):
    """Mode that counts the calls of each op."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[op.overloadpacket.__name__] += 1
        return op(*args, **(kwargs or {}))


def test_base_layer_spaces_its_rows_once_and_is_part_of_the_fused_op() -> None:
    model: Any = wrapped(Three(144, torch.bfloat16))
    model.up.set_adapter([])
    x = randn(0, 2, 20, 144, dtype=torch.bfloat16).requires_grad_()
    with CountedOps() as forward:
        y = model.up(x)
    dy = randn(1, *y.shape, dtype=torch.bfloat16)
    with CountedOps() as backward:
        torch.autograd.grad(y, x, dy, retain_graph=True)
    assert forward.calls["constant_pad_nd"] == 1
    # one for dy, one in the backward of the copy of x
    assert backward.calls["constant_pad_nd"] == 2
    base: Any = wrapped(Three(144, torch.bfloat16)).get_submodule("up.base_layer")
    assert base._forward_pre_hooks and lora_ext.layers.dense_parameters(base) is not None
    base.register_forward_hook(lambda *_: None)
    assert lora_ext.layers.dense_parameters(base) is None


@ways
def test_product_of_a_packed_weight_has_no_spaced_copy(planted: bool, way: str) -> None:
    if planted:
        pytest.skip("this test counts the ops of torch's products")
    model: Any = WAYS[way](Three(144, torch.bfloat16)).eval().requires_grad_(False)
    lora_ext.nn.pack_linears(model)
    if way == "wrap":
        model.up.set_adapter([])
    x = randn(0, 2, 144, dtype=torch.bfloat16)
    model(x)
    with CountedOps() as counted:
        model(x)
    assert counted.calls["packed_linear"] + counted.calls["packed_lora_linear"] == 3
    assert counted.calls["constant_pad_nd"] == 1  # The copy is for Conv1D, which is not packed.
    assert_apart_both_ways(model, randn(0, ROWS, 144, dtype=torch.bfloat16), 33)
    lora_ext.nn.unpack_linears(model)
    assert_apart_both_ways(model, randn(0, ROWS, 144, dtype=torch.bfloat16), 33)


@pytest.mark.slow
def test_compiled_model_keeps_rows_in_three_dimensions_apart(planted: bool) -> None:
    if planted:
        pytest.skip("a compiled graph does not call the substitute")
    model = wrapped(Three(144, torch.bfloat16)).eval()
    x = one_bad(randn(0, ROWS, 144, dtype=torch.bfloat16)).view(2, 20, 144)
    torch._dynamo.reset()
    with torch.no_grad():
        assert_apart(torch.compile(model)(x))


def llama() -> Any:
    sizes = {"vocab_size": 77, "hidden_size": 144, "intermediate_size": 172}
    make = maker("Llama", **{**TEXT, **sizes, "max_position_embeddings": 128})
    return enlarged(make, 1).to(torch.bfloat16)


@pytest.mark.slow
def test_overflowing_tenant_does_not_affect_other_tenants() -> None:
    def datum(seed: int) -> Datum:
        x = torch.randint(0, 77, (21,), generator=torch.Generator().manual_seed(seed))
        return Datum(x[:-1], {"target_tokens": x[1:]})

    with Service(llama()) as service:
        bad, good = service.create(4, seed=1), service.create(4)
        with torch.no_grad():  # Each factor is finite, but their product is not.
            for parameter in bad.adapter.parameters.values():
                parameter.normal_().mul_(1e30)
        with held(service):
            calls = [t.forward_backward([datum(k)]) for k in range(3) for t in (bad, good)]
        for k, call in enumerate(calls):
            if k % 2:
                assert call.result().logprobs[0].isfinite().all()
            else:
                with pytest.raises(ValueError, match="expected a finite number"):
                    call.result()
        good.optim_step(1e-3).result()
        samplers = good.sampler(), bad.sampler()
        spoilt = samplers[1].begin(list(range(20)), 8, 2, temperature=1.0)
        fine = [samplers[0].begin(list(range(19)), 8, 1, seed=k) for k in range(3)]
        for future in (f for each in fine for f in each):
            assert all(map(torch.isfinite, torch.tensor(future.result().logprobs)))
        for future in spoilt:
            with pytest.raises(ValueError, match="logprobs: expected finite"):
                future.result()
