"""``adapters(names, token_ids=...)``, which selects an adapter per token by a tensor of ids."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from two_layers import formula, inputs, make

import lora_ext
from lora_ext.nn import LoraEmbedding, LoraLinear, layer_names

NAMES = ["red", "blue", None, "green"]
IDS = torch.tensor([[0, -1, 1], [3, 2, 1]])
ROWS = ["red", None, "blue", "green", None, "blue"]


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.int8])
@pytest.mark.parametrize("flat", [False, True])
def test_tokens_of_pool_layers_equal_the_formula(dtype: torch.dtype, flat: bool) -> None:
    model, x = make(torch.float64), inputs(2, 3, dtype=torch.float64)
    expected, ids = formula(model, x, ROWS), IDS.to(dtype)
    if flat:
        x, expected, ids = x.flatten(0, 1), expected.flatten(0, 1), ids.flatten()
    with torch.no_grad(), lora_ext.adapters(NAMES, token_ids=ids):
        torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)
        # A model may flatten the batch internally.
        flattened = model(x.reshape(6, -1))
    torch.testing.assert_close(flattened, expected.reshape(6, -1), rtol=1e-12, atol=1e-12)


def own() -> LoraLinear:
    torch.manual_seed(0)
    layer = LoraLinear(nn.Linear(24, 9), "red", r=3, init_lora_weights=False)
    layer.add_adapter("blue", r=2, init_lora_weights=False, use_dora=True)
    return layer.double()


def test_lora_layers_accept_token_ids() -> None:
    layer, x = own(), inputs(2, 3, dtype=torch.float64)
    with lora_ext.adapters(
        ["blue", "red"], torch.tensor([[0, -1, 1], [1, 1, 0]]), pool=layer_names
    ):
        y = layer(x)
    rows = ["blue", None, "red", "red", "red", "blue"]
    assert torch.equal(y.flatten(0, 1), layer(x.flatten(0, 1), rows))
    table = LoraEmbedding(nn.Embedding(11, 5), "red", r=3, init_lora_weights=False)
    tokens = torch.tensor([[1, 2, 3], [4, 5, 10]])
    for ids in (torch.tensor([[0, -1, 0], [-1, -1, 0]]), torch.tensor([[-1, -1, 0]])):
        with lora_ext.adapters("red", ids, pool=layer_names):
            found = table(tokens[: len(ids)]).flatten(0, 1)
        names = [None if i < 0 else "red" for i in ids.flatten().tolist()]
        assert torch.equal(found, table(tokens[: len(ids)].flatten(), names))


def test_adapters_without_a_token_get_no_gradient() -> None:
    layer, x = own(), inputs(2, 3, dtype=torch.float64)
    with lora_ext.adapters(["blue", "red"], torch.full((2, 3), 1), pool=layer_names):
        layer(x).sum().backward()
    assert layer.lora_A["blue"].weight.grad is None
    assert layer.lora_A["red"].weight.grad is not None


WRONG: list[tuple[Any, str]] = [
    (IDS.float(), r"token_ids: expected integers, found torch.float32"),
    (IDS > 0, r"token_ids: expected integers, found torch.bool"),
    (IDS.tolist(), r"token_ids: expected a tensor of integers, found list"),
    (torch.tensor(1), r"token_ids: expected the shape \(B, T\) or .*found \(\)"),
    (IDS + 1, r"token_ids: expected ids in \[-1, 4\), found 0 to 4"),
    (IDS - 1, r"token_ids: expected ids in \[-1, 4\), found -2 to 2"),
    (IDS[:1], r"token_ids: expected activations of shape \(1, 3, fe.*found .*\(2, 3, features"),
    (IDS.t(), r"token_ids: expected activations of shape \(3, 2, fe.*found .*\(2, 3, features"),
    (IDS[:, 0], r"token_ids: expected activations of shape \(2, feat.*found .*\(2, 3, features"),
]


@pytest.mark.parametrize(("ids", "message"), WRONG)
@pytest.mark.parametrize("pooled", [True, False])
def test_wrong_ids_raise_and_name_the_argument(ids: Any, message: str, pooled: bool) -> None:
    model: Any = make() if pooled else own().float()
    pool, names = (model.up.pool, NAMES) if pooled else (layer_names, ["red", "blue", None, "red"])
    with torch.no_grad(), pytest.raises(ValueError, match=message):
        with lora_ext.adapters(names, token_ids=ids, pool=pool):
            model(inputs(2, 3))
    with pytest.raises(ValueError, match="names: expected one list of names with token_ids"):
        lora_ext.adapters([names], IDS, pool=pool).__enter__()


def test_rows_are_grouped_once_for_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = make(), []
    plan = lora_ext.ops.lora_plan
    monkeypatch.setattr(lora_ext.ops, "lora_plan", lambda *a: calls.append(a) or plan(*a))
    layers = [own().float() for _ in range(3)]
    with torch.no_grad(), lora_ext.adapters(NAMES, IDS, pool=model.up.pool):
        for _ in range(3):
            model(inputs(2, 3))
        assert len(calls) == 1
        with lora_ext.adapters(["blue", "red"], IDS.clamp(max=1), pool=layer_names):
            for layer in layers:
                layer(inputs(2, 3))
    subsets = 2  # Each DoRA layer makes a plan for the rows with DoRA and one for the other rows.
    assert len(calls) - 2 <= subsets * len(layers)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("pooled", [True, False])
def test_checkpoints_use_the_ids_of_their_forward(reentrant: bool, pooled: bool) -> None:
    # The backward runs after the block, when ids are overwritten and several forwards are pending.
    model: Any = make(torch.float64) if pooled else own()
    pool = model.up.pool if pooled else layer_names
    names = ["red", "blue"]
    batches = [torch.tensor([[0, -1, 1], [1, 1, 0]]), torch.tensor([[-1, 0, 0], [0, 1, -1]])]

    def grads(*runs: Tensor) -> list[Tensor | None]:
        inner = [p for n, p in model.named_parameters() if "lora" in n]
        return list(torch.autograd.grad(sum(y.square().sum() for y in runs), [x, *inner]))

    x = inputs(2, 3, dtype=torch.float64).requires_grad_()
    if not pooled:
        model.set_adapter(["red", "blue"])
    expected = []
    for ids in batches:
        with lora_ext.adapters(names, ids, pool=pool):
            expected.append(grads(model(x)))
    runs = []
    for ids in batches:
        given = ids.clone()
        with lora_ext.adapters(names, given, pool=pool):
            runs.append(checkpoint(model, x, use_reentrant=reentrant))
        given.fill_(-1)
    if reentrant:  # Reentrant checkpoints do not support torch.autograd.grad.
        found = []
        for run in runs:
            model.zero_grad()
            x.grad = None
            run.square().sum().backward()
            inner = [p.grad for n, p in model.named_parameters() if "lora" in n]
            found.append([x.grad, *inner])
    else:
        found = [grads(run) for run in runs]
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert not torch.equal(expected[0][0], expected[1][0])
    if pooled:
        assert pool.stats()["pins"] == 0


def test_compiled_graph_reads_the_ids_of_the_current_block() -> None:
    torch._dynamo.reset()
    model, x = make(), inputs(2, 3)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        for ids in (IDS, IDS.flip(0), torch.full_like(IDS, -1)):
            with lora_ext.adapters(NAMES, ids):
                torch.testing.assert_close(compiled(x), model(x))
