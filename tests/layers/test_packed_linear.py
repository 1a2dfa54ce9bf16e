"""Linear layers with a packed copy of the weight, which they use for few rows."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.utils import parametrize

from lora_ext import ops
from lora_ext.layers.base import _packed_linear
from lora_ext.layers.base._packed_linear import MOST_ROWS, PackedLinear
from lora_ext.nn import LoraLinear, pack_linears, packed_bytes, packing, unpack_linears

pytestmark = pytest.mark.hosts


def small_integers(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return random small integers, whose products and sums are exact in float32 in any order."""
    return torch.randint(-4, 5, shape).to(dtype)


def layer(dtype: torch.dtype = torch.float32, bias: bool = True) -> nn.Linear:
    made = nn.Linear(48, 33, bias, dtype=dtype).eval().requires_grad_(False)
    made.weight.copy_(small_integers(33, 48))
    if bias:
        made.bias.copy_(small_integers(33))
    return made


class Tied(nn.Module):
    """Model of an embedding, a linear layer, and two heads tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(40, 16)
        self.inner = nn.Linear(16, 16)
        self.head, self.second = nn.Linear(16, 40, bias=False), nn.Linear(16, 40, bias=False)
        self.head.weight = self.second.weight = self.tokens.weight

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        x = self.inner(self.tokens(ids))
        return self.head(x), self.second(x)


def uses_copy(run: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch, x: Tensor) -> bool:
    """Return whether ``run(x)`` multiplies with a packed copy of a weight."""
    product, calls = ops.packed_linear, []

    def watched(*args: Any) -> Tensor:
        calls.append(args)
        return product(*args)

    with monkeypatch.context() as patch:
        patch.setattr(ops, "packed_linear", watched)
        run(x)
    return bool(calls)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_product_of_few_rows_of_integers_is_exact(dtype: torch.dtype, bias: bool) -> None:
    plain = layer(dtype, bias)
    packed = pack_linears(copy.deepcopy(plain))
    for leading in [(), (1,), (5,), (2, 3), (MOST_ROWS,), (MOST_ROWS + 1,), (0, 2)]:
        x = small_integers(*leading, 48, dtype=dtype)
        wide = x.double() @ plain.weight.double().t()
        expected = wide + plain.bias.double() if bias else wide
        assert torch.equal(packed(x), expected.to(dtype))


def test_copy_is_used_only_for_few_rows_in_inference(monkeypatch: pytest.MonkeyPatch) -> None:
    module = pack_linears(layer())
    x = small_integers(2, 48)
    assert uses_copy(module, monkeypatch, x)
    assert uses_copy(module, monkeypatch, small_integers(2, 96)[:, ::2])
    assert not uses_copy(module, monkeypatch, small_integers(MOST_ROWS + 1, 48))
    assert not uses_copy(module, monkeypatch, x.clone().requires_grad_())
    with torch.autocast("cpu", torch.bfloat16):
        assert not uses_copy(module, monkeypatch, x)
    module.weight.requires_grad_()
    assert not uses_copy(module, monkeypatch, x)
    with torch.no_grad():
        assert uses_copy(module, monkeypatch, x)


def change_in_place(module: nn.Linear) -> None:
    module.weight.mul_(2)


def change_address(module: nn.Linear) -> None:
    module.weight.data = module.weight * 2


def change_parameter(module: nn.Linear) -> None:
    module.weight = nn.Parameter(module.weight * 2, requires_grad=False)


def change_unseen(module: nn.Linear) -> None:
    # PEFT merges in this way, which does not increment the version counter of the weight.
    module.weight.data *= 2


def change_by_loading(module: nn.Linear) -> None:
    module.load_state_dict({k: v * 2 for k, v in module.state_dict().items()})


@pytest.mark.parametrize(
    "change", [change_in_place, change_address, change_parameter, change_unseen, change_by_loading]
)
def test_changed_weight_is_packed_again(
    change: Callable[[nn.Linear], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    module, x = layer(bias=False), small_integers(3, 48)
    before = module(x)
    pack_linears(module)
    assert torch.equal(module(x), before)
    change(module)
    for _ in range(3):
        assert torch.equal(module(x), 2 * before)
    assert uses_copy(module, monkeypatch, x)


# Parts of a weight (O, I) to write without incrementing its version counter.
WRITES = {
    "odd rows": (slice(1, None, 2),),
    "even rows": (slice(0, None, 2),),
    "every third row": (slice(2, None, 3),),
    "the first half of all rows": (slice(None, 96),),
    "the last eight rows": (slice(-8, None),),
    "eight rows": (slice(13, 21),),
    "odd columns": (slice(None), slice(1, None, 2)),
    "every fourth column": (slice(None), slice(3, None, 4)),
    "all but the first columns": (slice(None), slice(16, None)),
    "the last sixteen columns": (slice(None), slice(-16, None)),
    "sixteen columns": (slice(None), slice(101, 117)),
    "the white fields of a chess board": (slice(None, None, 2), slice(1, None, 2)),
    "its black fields": (slice(1, None, 2), slice(1, None, 2)),
    "a quarter": (slice(96, None), slice(96, None)),
    "a square": (slice(50, 90), slice(40, 140)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(192, 576), (576, 192), (400, 400)])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("name", WRITES)
def test_partial_writes_without_a_new_version_are_detected(
    name: str, turned: bool, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    module = nn.Linear(shape[1], shape[0], False, dtype=dtype).eval().requires_grad_(False)
    values = small_integers(*shape)
    module.weight.copy_(torch.where(values == 0, 1.0, values))  # Writing 0 over 0 changes nothing.
    if turned:
        module.weight.data = module.weight.t().contiguous().t()
    x = small_integers(2, shape[1], dtype=dtype)
    pack_linears(module)
    module.weight.data.view(torch.int32 if dtype == torch.float32 else torch.int16).numpy()[
        WRITES[name]
    ] = 0
    expected = nn.functional.linear(x, module.weight)
    assert torch.equal(module(x), expected)


def test_changes_of_single_values_of_small_weights_are_detected() -> None:
    module = pack_linears(layer(bias=False))
    x = small_integers(1, 48)
    for place in [(0, 0), (17, 29), (32, 47)]:
        module.weight.data[place] += 1
        assert torch.equal(module(x), nn.functional.linear(x, module.weight))
        module(x), module(x)


def test_changes_of_strided_weights_are_detected() -> None:
    module = layer(bias=False)
    module.weight.data = small_integers(200, 96)[:, ::2]
    pack_linears(module)
    x = small_integers(1, 48)
    module.weight.data[101, 31] += 1
    assert torch.equal(module(x), nn.functional.linear(x, module.weight))


def test_weight_that_changes_before_every_product_is_not_packed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = pack_linears(layer())
    for _ in range(3):
        module.weight.mul_(-1)
        assert not uses_copy(module, monkeypatch, small_integers(1, 48))
        assert packed_bytes(module) == 0


def test_training_drops_the_copy() -> None:
    module = pack_linears(layer())
    assert packed_bytes(module) >= module.weight.nbytes
    module.train()
    assert packed_bytes(module) == 0
    module(small_integers(1, 48))
    module(small_integers(1, 48))
    assert packed_bytes(module) == 0


@pytest.mark.parametrize("where", ["meta", torch.float64, torch.bfloat16])
def test_moving_the_weight_drops_the_copy(where: Any) -> None:
    module = pack_linears(layer())
    module.to(where)
    assert packed_bytes(module) == 0
    if where is torch.bfloat16:
        x = small_integers(2, 48, dtype=where)
        for _ in range(3):
            assert torch.equal(module(x), nn.functional.linear(x, module.weight, module.bias))
        assert packed_bytes(module) > 0


def test_unpacking_restores_the_same_modules() -> None:
    model = Tied().eval()
    modules, kinds = list(model.modules()), [type(m) for m in model.modules()]
    attributes = [set(m.__dict__) for m in modules]
    pack_linears(model)
    assert type(model.inner) is PackedLinear and type(model.tokens) is nn.Embedding
    unpack_linears(model)
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert [type(m) for m in modules] == kinds
    assert [set(m.__dict__) for m in modules] == attributes


def test_tied_weights_share_one_copy() -> None:
    model = Tied().eval()
    pack_linears(model)
    assert packed_bytes(model) == (64 * 16 + 32 * 16) * 4  # Outputs are padded to multiples of 32.
    assert model.head.weight is model.second.weight is model.tokens.weight
    with torch.no_grad():
        model.tokens.weight.mul_(3)
        for _ in range(3):
            first, second = model(torch.tensor([1, 2]))
    assert torch.equal(first, second)


def test_state_and_copies_equal_those_of_the_plain_model() -> None:
    model = Tied().eval().requires_grad_(False)
    ids = torch.tensor([3, 4])
    expected, keys = model(ids)[0], list(model.state_dict())
    names = [name for name, _ in model.named_parameters()]
    pack_linears(model)
    assert list(model.state_dict()) == keys and not list(model.buffers())
    assert [name for name, _ in model.named_parameters()] == names
    assert b"lora_ext" not in pickle.dumps(model.inner)  # It can be loaded without lora_ext.
    loaded = pickle.loads(pickle.dumps(model))
    twin = copy.deepcopy(model)
    assert twin.head.weight is twin.tokens.weight is not model.head.weight
    twin(ids), twin(ids)
    assert packed_bytes(twin) == packed_bytes(model)
    for other in (model, loaded, twin, unpack_linears(twin)):
        torch.testing.assert_close(other(ids)[0], expected)


def test_parametrized_layer_cannot_be_pickled_like_the_plain_one() -> None:
    module, x = pack_linears(layer()), small_integers(2, 48)
    expected = module(x)
    parametrize.register_parametrization(module, "weight", nn.Identity())
    assert torch.equal(module(x), expected)
    with pytest.raises(RuntimeError, match="parametrized modules is only supported through state"):
        pickle.dumps(module)
    parametrize.remove_parametrizations(module, "weight")
    assert torch.equal(unpack_linears(module)(x), expected) and type(module) is nn.Linear


def test_unpacking_a_parametrized_layer_raises() -> None:
    model = pack_linears(nn.Sequential(layer(), layer()))
    for packed in (model[0], model[1]):
        packed(small_integers(2, 48))
    before = packed_bytes(model)
    parametrize.register_parametrization(model[1], "weight", nn.Identity())
    assert packed_bytes(model) == before > 0
    with pytest.raises(RuntimeError, match=r"unpack_linears: .*'1'.*Parametrized.*remove_param"):
        unpack_linears(model)
    assert type(model[0]) is PackedLinear
    parametrize.remove_parametrizations(model[1], "weight")
    unpack_linears(model)
    assert [type(m) for m in model] == [nn.Linear] * 2


def test_compiled_graph_uses_the_plain_product() -> None:
    module, x = pack_linears(layer()), small_integers(2, 48)
    run = torch.compile(module, backend="eager", fullgraph=True)
    assert torch.equal(run(x), module(x))


def test_transforms_use_the_plain_product() -> None:
    module, x = pack_linears(layer()), small_integers(2, 48)
    expected, weight = module(x), module.weight
    stacked = {"weight": torch.stack([weight, 2 * weight]), "bias": torch.stack([module.bias] * 2)}
    each = torch.func.vmap(lambda p: torch.func.functional_call(module, p, (x,)))(stacked)
    assert torch.equal(each[0], expected) and torch.equal(each[1], 2 * expected - module.bias)
    _, tangent = torch.func.jvp(module, (x,), (x,))
    assert torch.equal(tangent, expected - module.bias)
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(module(forward_ad.make_dual(x, x)))
        assert torch.equal(dual.tangent, tangent)
    recorded = torch.jit.trace(module, x)
    assert recorded(small_integers(40, 48)).shape == (40, 33)
    assert "aten::linear" in str(recorded.graph)


def test_sparse_inputs_and_other_shapes_do_not_use_the_copy() -> None:
    layer, x = pack_linears(nn.Linear(64, 40).eval()), torch.randn(4, 64)
    with torch.no_grad():
        torch.testing.assert_close(layer(x.to_sparse()), layer(x))
        layer.exact = True
        with pytest.raises(ValueError, match=r"^packed_linear: packed: .* a weight \(40, 32\)"):
            layer(x[:, :32])
        layer.weight = nn.Parameter(torch.ones(48, 64), requires_grad=False)
        with pytest.raises(ValueError, match=r"^packed_linear: bias: .* \[48\], found \[40\]"):
            layer(x)


def test_factors_of_adapters_are_not_packed() -> None:
    ours = nn.Sequential(LoraLinear(layer(), "default", 4)).eval()
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["0"], modules_to_save=["1"])
    theirs = peft.get_peft_model(nn.Sequential(layer(), layer()), config).eval()
    for model, heads in ((ours, 0), (theirs, 2)):  # PEFT keeps the original head too.
        pack_linears(model.requires_grad_(False))
        packed = [name for name, m in model.named_modules() if isinstance(m, PackedLinear)]
        assert len(packed) == 1 + heads and not any("lora_" in name for name in packed)
    with pytest.raises(ValueError, match=r"name of a linear layer.*lora_A\.default"):
        pack_linears(ours, ["0.lora_A.default"])


@pytest.mark.parametrize("ids", [None, torch.tensor([0, 1, -1])])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_with_adapters_use_the_copy(
    ids: Tensor | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    lora = LoraLinear(layer(dtype), "default", 4, init_lora_weights=False)
    lora.add_adapter("other", 8, init_lora_weights=False)
    for parameter in (*lora.lora_A.parameters(), *lora.lora_B.parameters()):
        parameter.data.copy_(small_integers(*parameter.shape) / 4)
    lora.eval().requires_grad_(False)
    x = small_integers(3, 48, dtype=dtype)
    expected = lora(x, ids)
    pack_linears(lora)
    assert uses_copy(lambda x: lora(x, ids), monkeypatch, x)
    if dtype == torch.float32:
        assert torch.equal(lora(x, ids), expected)
    else:  # Base product, update and their sum may each be rounded.
        largest = max(lora.base_layer(x).abs().max(), expected.abs().max())
        assert (lora(x, ids) - expected).abs().max() <= 2.0**-7 * largest
    lora.requires_grad_(True)
    lora(x, ids).sum().backward()
    assert lora.lora_A["default"].weight.grad is not None  # pyright: ignore
    assert lora.base_layer.weight.grad is not None


def test_merging_and_unmerging_change_the_product() -> None:
    lora = LoraLinear(layer(), "default", 4, init_lora_weights=False).eval().requires_grad_(False)
    x = torch.randn(3, 48)
    base, adapted = lora.base_layer(x), lora(x)
    pack_linears(lora)
    lora.merge(keep_copy=True)
    for _ in range(3):
        torch.testing.assert_close(lora(x), adapted)
    lora.unmerge()
    for _ in range(3):
        torch.testing.assert_close(lora.base_layer(x), base)


def quantised() -> nn.Module:
    made = layer()
    made.weight = nn.Parameter(made.weight.to(torch.int8), requires_grad=False)
    return made


def in_inference_mode() -> nn.Module:
    with torch.inference_mode():
        return layer()


def offloaded() -> nn.Module:
    made = layer()
    made.forward = lambda x: x  # pyright: ignore[reportAttributeAccessIssue]
    return made


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: layer().train(), ValueError, r"'0'.*evaluation mode.*training.*eval\(\)"),
        (lambda: layer().to("meta"), ValueError, "'0'.*weight on the CPU, found one on meta"),
        (quantised, ValueError, "'0'.*float32 or bfloat16.*torch.int8"),
        (lambda: layer().half(), ValueError, "'0'.*float32 or bfloat16.*torch.float16"),
        (in_inference_mode, ValueError, "'0'.*created outside inference"),
        (offloaded, ValueError, "'0'.*replaced forward"),
        (lambda: nn.ReLU().eval(), ValueError, "linear layers, found none in Seq"),
        (lambda: pack_linears(layer()), RuntimeError, "'0'.*packed already.*unpack_linears"),
    ],
)
def test_layers_that_cannot_be_packed_raise(
    make: Callable[[], nn.Module], error: type[Exception], message: str
) -> None:
    model = nn.Sequential(make())
    kinds = [type(m) for m in model.modules()]
    with pytest.raises(error, match=f"pack_linears: model: .*{message}"):
        pack_linears(model)
    assert [type(m) for m in model.modules()] == kinds


def test_modules_to_pack_can_be_selected_by_name() -> None:
    model = Tied().eval()
    pack_linears(model, ["head"])
    assert type(model.head) is PackedLinear and type(model.inner) is nn.Linear
    pack_linears(model, ["inner"])
    with pytest.raises(ValueError, match=r"names: expected the name of a linear.*'tokens'"):
        pack_linears(model, ["tokens"])
    with pytest.raises(RuntimeError, match=r"unpack_linears: .*packed layers, found none"):
        unpack_linears(Tied())


def test_packing_reports_the_size_of_the_copy_and_whether_it_fits(monkeypatch):
    model = nn.Sequential(nn.Linear(16, 33, bias=False), nn.ReLU(), nn.Linear(16, 32)).eval()
    taken = (64 * 16 + 32 * 16) * 4
    monkeypatch.setattr(_packed_linear, "free_bytes", lambda device: 4 * taken)
    found = packing(model)
    assert found == (taken, 4 * taken, None) and found.fits
    assert str(found).startswith("the base model is packed for decoding, which takes 0.00 GB")
    assert packed_bytes(model) == 0
    pack_linears(model)
    assert packed_bytes(model) == found.bytes
    unpack_linears(model)
    small = packing(model, share=0.24)
    assert not small.fits and "GB, more than 24% of the" in str(small)
    assert "no plain linear layer" in str(packing(nn.ReLU()))
    assert not packing(model.half()).fits
    with pytest.raises(ValueError, match="packing: share: expected"):
        packing(model, share=0)
