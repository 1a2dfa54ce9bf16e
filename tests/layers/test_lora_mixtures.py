"""Several adapters on one row of LoraLinear, with weights per row and adapter."""

from typing import Any

import pytest
import torch
from common import error_over_bound
from torch import Tensor, nn

import lora_ext
from lora_ext.nn import LoraConv, LoraEmbedding, LoraLinear
from lora_ext.rows import UnknownAdapterError, layer_names

IN, OUT, ROWS = 24, 17, 10
IDS = torch.tensor([[0, 2], [1, -1], [2, 2], [-1, -1], [1, 0]] * 2)


def made(dtype: torch.dtype = torch.float32, **third: Any) -> Any:
    torch.manual_seed(0)
    common = {"lora_alpha": 6, "init_lora_weights": False}
    layer: Any = LoraLinear(nn.Linear(IN, OUT), "a", r=4, **common)
    layer.add_adapter("b", r=11, lora_bias=True, **common)
    layer.add_adapter("c", r=2, **{**common, **third})
    for parameter in layer.parameters():
        parameter.requires_grad_()
    with torch.no_grad():
        layer.lora_B["b"].bias.normal_()
    return layer.to(dtype)


def formula(layer: Any, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """Compute the output from the definition; the weight of an entry with id -1 is ignored."""
    y = layer.base_layer(x)
    for i, name in enumerate(layer.adapter_names):
        weight = torch.where(ids == i, weights, 0).sum(1, keepdim=True)
        update = layer.lora_B[name](layer.lora_A[name](x)) * layer.scaling[name]
        y = y + weight * update
    return y


def step(run: Any, layer: Any, x: Tensor, weights: Tensor) -> list[Tensor]:
    """Return the output, and the gradients of x, the weights and all parameters."""
    x, weights = x.clone().requires_grad_(), weights.clone().requires_grad_()
    y = run(x, weights)
    dy = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
    return [y.detach(), *torch.autograd.grad(y, [x, weights, *layer.parameters()], dy)]


def test_step_equals_the_formula() -> None:
    layer, x, weights = made(), torch.randn(ROWS, IN), torch.randn(ROWS, 2)

    def by_formula(x: Tensor, w: Tensor) -> Tensor:
        return formula(layer, x, IDS, w)

    def ours(x: Tensor, w: Tensor) -> Tensor:
        return layer(x, IDS, adapter_weights=w)

    found, peer = step(ours, layer, x, weights), step(by_formula, layer, x, weights)
    layer.double()
    exact = step(by_formula, layer, x.double(), weights.double())
    for each in zip(found, peer, exact, strict=True):
        assert error_over_bound(*each) <= 1
    wide = step(ours, layer, x.double(), weights.double())
    for got, expected in zip(wide, exact, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_nan_reaches_its_row_alone_and_entries_without_adapter_are_not_read(
    dtype: torch.dtype,
) -> None:
    layer, x, weights = made(dtype), torch.randn(ROWS, IN, dtype=dtype), torch.ones(ROWS, 2)
    clean = layer(x, IDS, adapter_weights=weights)
    weights[3], weights[1, 1], weights[6, 0] = torch.nan, torch.nan, torch.nan
    y = layer(x, IDS, adapter_weights=weights)
    others = [row for row in range(ROWS) if row != 6]
    assert y[6].isnan().all() and torch.equal(y[others], clean[others])
    assert torch.equal(y[3], layer(x, torch.full((ROWS,), -1))[3])


def test_one_column_of_weight_one_keeps_every_bit() -> None:
    layer, x = made(), torch.randn(ROWS, IN)
    ids = torch.arange(ROWS) % 4 - 1
    plain = layer(x, ids)
    assert torch.equal(layer(x, ids[:, None], adapter_weights=torch.ones(ROWS, 1)), plain)
    assert torch.equal(layer(x, ids, adapter_weights=torch.ones(ROWS)), plain)
    assert torch.equal(layer(x, ids[:, None]), plain)


def test_adapters_that_are_off_are_left_out() -> None:
    layer, x = made(), torch.randn(ROWS, IN)
    layer.adapter_active["c"] = False
    weights = torch.rand(ROWS, 2)
    expected = layer(x, IDS.where(IDS != 2, -1), adapter_weights=weights)
    assert torch.equal(layer(x, IDS, adapter_weights=weights), expected)


def test_tokens_of_sequences_have_rows_of_ids() -> None:
    layer, x, weights = made(), torch.randn(2, 5, IN), torch.rand(ROWS, 2)
    flat = layer(x.view(ROWS, IN), IDS, adapter_weights=weights)
    assert torch.equal(layer(x, IDS, adapter_weights=weights), flat.view(2, 5, OUT))
    assert torch.equal(layer(x, IDS), layer(x.view(ROWS, IN), IDS).view(2, 5, OUT))


@pytest.mark.parametrize("names", [["b", None], [("b", 0.5), "a"], [{"a": 1, "b": 2}, None]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sequences_without_tokens_have_no_rows(dtype: torch.dtype, names: Any) -> None:
    layer, x = made(dtype), torch.randn(2, 0, IN, dtype=dtype, requires_grad=True)
    y = layer(x, names)  # "b" has a bias
    assert y.shape == (2, 0, OUT)
    y.sum().backward()
    embedding: Any = LoraEmbedding(nn.Embedding(7, OUT), "a", r=4)
    embedding.add_adapter("b", r=2)
    assert embedding(torch.zeros(2, 0, dtype=torch.int64), names).shape == (2, 0, OUT)


def test_columns_have_different_dropout_masks() -> None:
    layer: Any = LoraLinear(nn.Linear(IN, IN), "a", r=IN, lora_alpha=IN, lora_dropout=0.5)
    layer.train()
    with torch.no_grad():
        layer.base_layer.weight.zero_()
        layer.base_layer.bias.zero_()
        layer.lora_A["a"].weight.copy_(torch.eye(IN))
        layer.lora_B["a"].weight.copy_(torch.eye(IN))
    ids = torch.zeros(50, 2, dtype=torch.int64)
    y = layer(torch.ones(50, IN), ids, adapter_weights=torch.tensor([[0.5, 5.0]] * 50))
    assert set(y.detach().round().unique().tolist()) == {0.0, 1.0, 10.0, 11.0}


WRONG: dict[str, tuple[type[Exception], dict[str, Any], str]] = {
    "no ids": (ValueError, {"adapter_weights": torch.ones(ROWS, 2)}, "adapter_weights"),
    "names": (
        ValueError,
        {"adapter_names": ["a"] * ROWS, "adapter_weights": torch.ones(ROWS, 1)},
        "adapter_weights",
    ),
    "both": (ValueError, {"adapter_names": "a", "adapter_ids": IDS}, "adapter_ids"),
    "shape": (
        ValueError,
        {"adapter_ids": IDS, "adapter_weights": torch.ones(ROWS, 3)},
        "adapter_weights: .*10, 3",
    ),
    "dtype": (
        ValueError,
        {"adapter_ids": IDS, "adapter_weights": torch.ones(ROWS, 2, dtype=torch.int64)},
        "adapter_weights: .*int64",
    ),
    "range": (ValueError, {"adapter_ids": IDS + 2}, "adapter_ids: .*found 1 to 4"),
    "rows": (ValueError, {"adapter_ids": IDS[:7]}, "adapter_ids: .*7, 2"),
    "columns": (ValueError, {"adapter_ids": IDS[:, :1].repeat(1, 65)}, "adapter_ids"),
}


@pytest.mark.parametrize(("error", "given", "message"), WRONG.values(), ids=WRONG)
def test_wrong_arguments_are_named(
    error: type[Exception], given: dict[str, Any], message: str
) -> None:
    with pytest.raises(error, match=message):
        made()(torch.randn(ROWS, IN), **given)


def test_dora_is_refused_by_name() -> None:
    layer, x = made(use_dora=True), torch.randn(ROWS, IN)
    with pytest.raises(NotImplementedError, match="'c', which uses DoRA"):
        layer(x, IDS)
    ids = IDS.where(IDS != 2, -1)
    weights = torch.rand(ROWS, 2)
    expected = formula(layer, x, ids, weights)
    torch.testing.assert_close(layer(x, ids, adapter_weights=weights), expected)


ENTRIES = [{"a": 0.7, "c": -0.3}, "b", None, ("c", 0.5), {"c": 2, "b": 1}]
WEIGHTS = {"a": [0.7, 0, 0, 0, 0], "b": [0, 1, 0, 0, 1], "c": [-0.3, 0, 0, 0.5, 2]}


def expected_of(layer: Any, x: Tensor) -> Tensor:
    """Return the output of five sequences with the entries :data:`ENTRIES`."""
    ids = torch.arange(3).expand(x[..., 0].numel(), 3)
    weights = torch.tensor([WEIGHTS[name] for name in "abc"]).T.to(x.dtype)
    rows = weights.repeat_interleave(x[0, ..., 0].numel(), 0)
    return formula(layer, x.reshape(-1, IN), ids, rows).view(*x.shape[:-1], OUT)


@pytest.mark.parametrize("lead", [(5,), (5, 3)])
def test_entries_equal_the_formula_and_give_every_member_its_gradient(lead: Any) -> None:
    layer, x = made(torch.float64), torch.randn(*lead, IN, dtype=torch.float64)
    found, expected = layer(x, adapter_names=ENTRIES), expected_of(layer, x)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)  # weights are float32
    ours, theirs = made(torch.float64), made(torch.float64)
    ours(x, adapter_names=ENTRIES).square().sum().backward()
    expected_of(theirs, x).square().sum().backward()
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert p.grad is not None, name
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=1e-5)


def test_embeddings_without_the_adapters_of_a_mixture_run_beside_it() -> None:
    torch.manual_seed(0)
    layer, embedding = (
        LoraLinear(nn.Linear(IN, 4), "a", r=2),
        LoraEmbedding(nn.Embedding(5, 4), "c", r=2, init_lora_weights=False),
    )
    layer.add_adapter("b", 2)
    layer.add_adapter("c", 2)
    ids = torch.arange(2)
    with lora_ext.adapters([{"a": 0.5, "b": 0.5}, "c"]):
        layer(torch.ones(2, IN))
        y = embedding(ids)
    assert torch.equal(y, embedding(ids, adapter_ids=[None, "c"]))


def other(kind: type, dtype: torch.dtype = torch.float64, **third: Any) -> tuple[Any, Tensor]:
    """Return a layer that is not linear, with three adapters, and five sequences of three rows."""
    torch.manual_seed(0)
    base = nn.Embedding(7, OUT) if kind is LoraEmbedding else nn.Conv1d(2, OUT, 4, 4)
    layer = kind(base, "a", r=4, init_lora_weights=False)
    layer.add_adapter("b", r=3, init_lora_weights=False)
    layer.add_adapter("c", r=2, init_lora_weights=False, **third)
    for parameter in layer.parameters():
        parameter.requires_grad_()
    x = torch.randint(7, (5, 3)) if kind is LoraEmbedding else torch.randn(5, 2, 12)
    return layer.to(dtype), x if kind is LoraEmbedding else x.to(dtype)


def sum_of(layer: Any, x: Tensor, rows: list[dict[str, float]]) -> Tensor:
    """Return the base output plus the weighted sum of the updates of single adapters."""
    base = layer.base_layer(x)
    total = base.clone()
    for name in "abc":
        weight = torch.tensor([row.get(name, 0.0) for row in rows], dtype=base.dtype)
        total = total + weight.view(-1, 1, 1) * (layer(x, [name] * len(rows)) - base)
    return total


@pytest.mark.parametrize("kind", [LoraEmbedding, LoraConv])
def test_embeddings_and_convolutions_take_mixtures(kind: type) -> None:
    rows = [{name: WEIGHTS[name][row] for name in "abc"} for row in range(5)]
    found: list[list[Tensor]] = []
    for block in (False, True):
        layer, x = other(kind)
        if block:
            with lora_ext.adapters(ENTRIES, pool=layer_names):
                y = layer(x)
        else:
            y = layer(x, ENTRIES)
        found.append([y, *torch.autograd.grad(y.square().sum(), [*layer.parameters()])])
        expected = sum_of(layer, x, rows)
        expected = [
            expected,
            *torch.autograd.grad(expected.square().sum(), [*layer.parameters()]),
        ]
        for ours, theirs in zip(found[-1], expected, strict=True):  # weights are float32
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert all(map(torch.equal, *found))
    ids = torch.tensor([[0, 1], [1, 1], [2, -1], [-1, -1], [2, 0]]).repeat_interleave(3, 0)
    counts = [{"a": 1, "b": 1}, {"b": 2}, {"c": 1}, {}, {"a": 1, "c": 1}]
    torch.testing.assert_close(layer(x, ids), sum_of(layer, x, counts))
    layer, x = other(kind, use_dora=True)
    mixed = layer(x, [{"a": 1, "b": 1}, "c", "c", "c", "c"])
    torch.testing.assert_close(mixed[1:], layer(x, ["c"] * 5)[1:])
    for entry in ({"a": 1, "c": 1}, ("c", 0.5)):
        with pytest.raises(NotImplementedError, match="found 'c', which uses DoRA"):
            layer(x, [entry, *["a"] * 4])
    with pytest.raises(NotImplementedError, match="found 'c', which uses DoRA"):
        layer(x, ids)


def test_blocks_give_entries_to_layers_and_plain_rows_keep_their_bits() -> None:
    layer, x = made(), torch.randn(5, IN)
    with torch.no_grad():
        y = layer(x, adapter_names=ENTRIES)
        with lora_ext.adapters(ENTRIES, pool=layer_names):
            assert torch.equal(layer(x), y)
        turned = [dict(reversed(e.items())) if isinstance(e, dict) else e for e in ENTRIES]
        assert torch.equal(layer(x, adapter_names=turned), y)
        names = ["a", "b", None, "c", "a"]
        assert torch.equal(layer(x, adapter_names=[n and {n: 1} for n in names]), layer(x, names))
        mixed = layer(x, adapter_names=[*ENTRIES[:3], "c", "a"])
        assert torch.equal(mixed[1:], layer(x, names)[1:])


def test_dora_beside_a_mixture_is_computed_and_in_one_is_refused() -> None:
    layer, x = made(use_dora=True), torch.randn(5, IN)
    with torch.no_grad():
        y = layer(x, adapter_names=[{"a": 0.5, "b": 2}, "c", "c", ("a", 3), None])
        assert torch.equal(y[1:3], layer(x, adapter_names=["c"] * 5)[1:3])
        weights = torch.tensor([[0.5, 2.0], [0, 0], [0, 0], [3, 0], [0, 0]])
        ids = torch.tensor([[0, 1], [-1, -1], [-1, -1], [0, -1], [-1, -1]])
        torch.testing.assert_close(y[3:], layer(x, ids, adapter_weights=weights)[3:])
    for entry in ({"a": 1, "c": 1}, ("c", 0.5)):
        with pytest.raises(NotImplementedError, match="found 'c', which uses DoRA"):
            layer(x, adapter_names=[entry, *["a"] * 4])
        with (
            lora_ext.adapters([entry, *["a"] * 4], pool=layer_names),
            pytest.raises(NotImplementedError, match="found 'c', which uses DoRA"),
        ):
            layer(x)


def test_unknown_members_and_activated_adapters_of_a_set_are_refused() -> None:
    layer, x = made(), torch.randn(5, IN)
    layer.add_adapter("judge", r=2, alora_invocation_tokens=[3])
    with pytest.raises(ValueError, match="unseen"):
        layer(x, adapter_names={"a": 1, "unseen": 2})
    with pytest.raises(UnknownAdapterError, match="unseen"):
        lora_ext.adapters({"a": 1, "unseen": 2}, pool=layer_names).__enter__()
    with pytest.raises(NotImplementedError, match="aLoRA adapter 'judge'"):
        lora_ext.adapters({"a": 1, "judge": 2}, pool=layer_names).__enter__()
