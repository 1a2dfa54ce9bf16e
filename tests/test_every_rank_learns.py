"""One training step changes every rank of an adapter, whichever function made its factors.

The gradient of a row of A is a multiple of its column of B, and vice versa. A rank that is 0 in
both can therefore never change, and no error reports it.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from adapted_models import adapted
from made_adapters import SHAPES, Q, V, adapter, delta
from torch import Tensor

from lora_ext import cli
from lora_ext.adapter import (
    LoraAdapter,
    _low_rank,
    interpolate_adapters,
    merge_adapters,
    resize_adapter,
)
from lora_ext.federated import LayerPlan, LoraLayerManager, Update, aggregate
from lora_ext.methods import legend

RANK = 4
Products = dict[str, Tensor]
Way = Callable[[LoraAdapter, LoraAdapter, Path], tuple[LoraAdapter, Products]]


def changed(
    value: LoraAdapter, change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
) -> LoraAdapter:
    made = {n: (f, *change(f.a.clone(), f.b.clone())) for n, f in value.modules.items()}
    return LoraAdapter(value.config, {n: f._replace(a=a, b=b) for n, (f, a, b) in made.items()})


def with_a_rank_twice(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    a[1], b[:, 1] = a[0], b[:, 0]
    return a, b


#: Changes to the factors (a, b) of the two adapters before an operation.
STARTS: dict[str, tuple[Callable, Callable]] = {
    "trained": (lambda a, b: (a, b), lambda a, b: (a.flip(0), b + 1)),
    "fresh": (lambda a, b: (a, b * 0), lambda a, b: (a.flip(0), b * 0)),
    "fresh, of one draw": (lambda a, b: (a, b * 0), lambda a, b: (a, b * 0)),
    "B drawn and A zero": (lambda a, b: (a * 0, b), lambda a, b: (a * 0, b.flip(1))),
    "a rank twice": (with_a_rank_twice, with_a_rank_twice),
    "equal": (lambda a, b: (a, b), lambda a, b: (a, b)),
    "opposite": (lambda a, b: (a, b), lambda a, b: (-a, -b)),
    "all zero": (lambda a, b: (a * 0, b * 0), lambda a, b: (a * 0, b * 0)),
}


def nearest(products: Products, rank: int | dict[str, int]) -> Products:
    found = {}
    for name, product in products.items():
        u, s, vh = torch.linalg.svd(product, full_matrices=False)
        kept = rank if isinstance(rank, int) else rank.get(name, RANK)
        found[name] = u[:, :kept] * s[:kept] @ vh[:kept]
    return found


def deltas(value: LoraAdapter) -> Products:
    return {name: delta(value, name) for name in SHAPES}


def summed(one: LoraAdapter, two: LoraAdapter, weights: tuple[float, float]) -> Products:
    return {n: weights[0] * delta(one, n) + weights[1] * delta(two, n) for n in SHAPES}


def of_means(one: LoraAdapter, two: LoraAdapter, weights: tuple[float, float]) -> Products:
    """Return ``s (sum w B) (sum w A)`` for each module, with the weights w and the scale s."""
    found = {}
    for name, factors in one.modules.items():
        other = two.modules[name]
        a, b = (
            weights[0] * getattr(factors, k).double() + weights[1] * getattr(other, k).double()
            for k in "ab"
        )
        found[name] = factors.scaling * b @ a
    return found


def resized(rank: int | dict[str, int]) -> Way:
    def way(one: LoraAdapter, two: LoraAdapter, folder: Path):
        return resize_adapter(one, rank)[0], nearest(deltas(one), rank)

    return way


def resized_by_command(rank: int) -> Way:
    def way(one: LoraAdapter, two: LoraAdapter, folder: Path):
        one.save(folder / "one")
        where = [str(folder / "one"), "--rank", str(rank), "--out", str(folder / "out")]
        assert cli.main(["resize", *where, "--json"]) == 0
        return LoraAdapter.load(folder / "out"), nearest(deltas(one), rank)

    return way


def merged(mode: str, weights: tuple[float, float], rank: int | None = None) -> Way:
    def way(one: LoraAdapter, two: LoraAdapter, folder: Path):
        found = merge_adapters([one, two], weights, mode, rank)
        if mode == "factors":
            return found, of_means(one, two, weights)
        total = summed(one, two, weights)
        return found, total if mode == "delta" else nearest(total, rank or RANK)

    return way


def merged_by_command(mode: str) -> Way:
    def way(one: LoraAdapter, two: LoraAdapter, folder: Path):
        one.save(folder / "one")
        two.save(folder / "two")
        pieces = [str(folder / "one"), str(folder / "two"), "--mode", mode]
        assert cli.main(["merge", *pieces, "--out", str(folder / "out"), "--json"]) == 0
        return LoraAdapter.load(folder / "out"), merged(mode, (0.5, 0.5))(one, two, folder)[1]

    return way


def interpolated(space: str, lam: float) -> Way:
    def way(one: LoraAdapter, two: LoraAdapter, folder: Path):
        products = summed if space == "delta" else of_means
        return interpolate_adapters(one, two, lam, space), products(one, two, (1 - lam, lam))

    return way


def with_state(value: LoraAdapter, state: dict[str, Tensor]) -> LoraAdapter:
    """Return the adapter with the factors of a state dict, which may have other ranks."""
    modules = {
        name: f._replace(
            a=state[f"base_model.model.{name}.lora_A.weight"],
            b=state[f"base_model.model.{name}.lora_B.weight"],
        )
        for name, f in value.modules.items()
    }
    return LoraAdapter(value.config, modules)


def aggregated(rank_agg: str, server_lr: float = 1.0, rank: int = RANK) -> Way:
    """Return a function that aggregates two adapters, which two clients with equal weights upload.
    The first adapter is the server's state."""

    def way(one: LoraAdapter, two: LoraAdapter, folder: Path):
        state, plan = one.state_dict(), LayerPlan((0,), None if rank == RANK else (rank,))
        cut = {
            k: v[:rank] if "lora_A" in k else v[:, :rank].contiguous()
            for k, v in two.state_dict().items()
        }
        full = LayerPlan((0,))
        replies = [Update(1, 10, state, full), Update(2, 10, cut, plan)]
        found = aggregate(state, replies, rank_agg=rank_agg, upload="value", server_lr=server_lr)
        assert not found.rejected and not found.skipped
        short = with_state(two, {k: v[:rank] if "_A" in k else v[:, :rank] for k, v in cut.items()})
        share = server_lr / 2
        expected = {}
        if rank_agg == "svd":
            expected = nearest(summed(one, short, (1 - share, share)), RANK)
        elif rank_agg == "stack":
            expected = {name: torch.zeros(SHAPES[name]) for name in SHAPES}
        elif rank_agg == "covered" and rank == RANK:
            expected = of_means(one, two, (1 - share, share))
        return with_state(one, found.state), expected

    return way


def resized_by_legend(rank: int, whole_state: bool) -> Way:
    def way(one: LoraAdapter, two: LoraAdapter, folder: Path):
        state = one.state_dict()
        if whole_state:
            state, _ = legend.resize_state(state, (rank,))
        else:
            for name in SHAPES:
                a, b = (f"base_model.model.{name}.lora_{k}.weight" for k in "AB")
                state[a], state[b], _ = legend.resize_lora(state[a], state[b], rank)
        return with_state(one, state), nearest(deltas(one), rank)

    return way


WAYS: dict[str, Way] = {
    "resize, smaller": resized(2),
    "resize, larger": resized(7),
    "resize, the same rank": resized(RANK),
    "resize, beyond the layer": resized(40),
    "resize by dict": resized({Q: 3, V: 6}),
    "resize by dict, one module": resized({V: 1}),
    "resize by command, smaller": resized_by_command(2),
    "resize by command, larger": resized_by_command(6),
    **{
        f"merge {mode}, {weights}": merged(mode, weights)
        for mode in ("delta", "factors", "delta_svd")
        for weights in ((0.5, 0.5), (1.0, -1.0), (0.0, 0.0))
    },
    "merge delta_svd, smaller": merged("delta_svd", (0.3, 0.7), 2),
    "merge delta_svd, larger": merged("delta_svd", (0.3, 0.7), 6),
    **{f"merge {m} by command": merged_by_command(m) for m in ("delta", "factors", "delta_svd")},
    "interpolate factors": interpolated("factors", 0.5),
    "interpolate delta": interpolated("delta", 0.5),
    "interpolate factors, beyond": interpolated("factors", 2.0),
    **{
        f"aggregate {rule}, server_lr {lr}": aggregated(rule, lr)
        for rule in ("covered", "fro", "svd", "stack")
        for lr in (1.0, 0.5)
    },
    **{
        f"aggregate {rule}, unequal ranks": aggregated(rule, rank=2)
        for rule in ("covered", "fro", "svd", "stack")
    },
    "LEGEND's resizing of a module, smaller": resized_by_legend(2, whole_state=False),
    "LEGEND's resizing of a module, larger": resized_by_legend(6, whole_state=False),
    "LEGEND's resizing of a state, smaller": resized_by_legend(3, whole_state=True),
    "LEGEND's resizing of a state, larger": resized_by_legend(9, whole_state=True),
}


def gradients_of_a_step(a: Tensor, b: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    a, b = (t.detach().double().clone().requires_grad_() for t in (a, b))
    g = torch.Generator().manual_seed(7)
    x = torch.randn(16, a.shape[1], generator=g, dtype=torch.float64)
    y = torch.randn(16, b.shape[0], generator=g, dtype=torch.float64)
    (scaling * x @ a.T @ b.T - y).square().mean().backward()
    return a.grad, b.grad


def assert_a_step_moves_every_rank(a: Tensor, b: Tensor, scaling: float, where: str) -> None:
    of_a, of_b = gradients_of_a_step(a, b, scaling)
    moved = of_a.any(1) | of_b.any(0)
    assert bool(moved.all()), f"{where}: gradient 0 at ranks {(~moved).nonzero()[:, 0].tolist()}"


@pytest.mark.parametrize(
    ("start", "dtype"),
    [
        *((start, torch.float32) for start in STARTS),
        *((start, torch.bfloat16) for start in ("trained", "fresh")),
        ("trained", torch.float64),
    ],
    ids=str,
)
@pytest.mark.parametrize("way", WAYS)
def test_one_step_changes_every_rank_and_the_product_is_as_expected(
    way: str, start: str, dtype: torch.dtype, tmp_path: Path
):
    one, two = (changed(adapter(0, RANK, dtype=dtype), change) for change in STARTS[start])
    found, expected = WAYS[way](one, two, tmp_path)
    for name, factors in found.modules.items():
        assert_a_step_moves_every_rank(factors.a, factors.b, factors.scaling, name)
        if name in expected:
            size = max(
                float(f.a.double().norm() * f.b.double().norm()) * f.scaling
                for f in (one.modules[name], two.modules[name])
            )
            off = (delta(found, name) - expected[name]).norm()
            # The product is rounded to the dtype once, after rounding errors of both SVDs in
            # float64.
            eps = max(8 * torch.finfo(dtype).eps, 64 * torch.finfo(torch.float64).eps)
            assert off <= eps * size
    again, _ = WAYS[way](one, two, tmp_path / "again")
    assert again == found, "expected equal results of two calls"


def of_two_ranks(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return factors in which all rows of A are combinations of two rows, up to rounding."""
    g = torch.Generator().manual_seed(3)
    mix = torch.randn(RANK, 2, generator=g, dtype=torch.float64)
    return (mix @ a[:2].double()).to(a.dtype), b


@pytest.mark.parametrize(
    "way",
    [
        "resize, three of four",
        "merge delta_svd, (0.5, 0.5)",
        "aggregate svd, server_lr 0.5",
        "LEGEND's resizing of a module, smaller",
        "LEGEND's resizing of a state, smaller",
    ],
)
def test_ranks_with_a_singular_value_of_rounding_size_get_gradients(way: str, tmp_path: Path):
    ways = WAYS | {
        "resize, three of four": resized(3),
        "LEGEND's resizing of a module, smaller": resized_by_legend(3, whole_state=False),
    }
    one = changed(adapter(0, RANK), of_two_ranks)
    found, expected = ways[way](one, one, tmp_path)
    eps = torch.finfo(torch.float32).eps
    for name, factors in found.modules.items():
        gradients = gradients_of_a_step(factors.a, factors.b, factors.scaling)
        sizes = torch.hypot(gradients[0].norm(dim=1), gradients[1].norm(dim=0))
        # Both factors contain the root of the singular value. If that is only rounding (about eps),
        # the smallest gradient is about sqrt(eps) of the largest.
        assert sizes.min() >= 10 * eps**0.5 * sizes.max(), f"{name}: {sizes.tolist()}"
        size = one.modules[name].a.norm() * one.modules[name].b.norm() * factors.scaling
        assert (delta(found, name) - expected[name]).norm() <= 8 * eps * size


@pytest.mark.parametrize("rank", [16, 64, 256])
def test_no_rank_of_independent_factors_counts_as_rounding(rank: int):
    g = torch.Generator().manual_seed(0)
    a = (0.1 * torch.randn(rank, 512, generator=g) / 512**0.5).bfloat16()
    b = (0.05 * torch.randn(512, rank, generator=g)).bfloat16()
    found_a, found_b, _ = _low_rank.resized("resize", a, b, rank // 2)
    ratio = found_a.double().norm(dim=1) / found_b.double().norm(dim=0)
    # Both factors contain the root of the singular value, up to the rounding of their entries.
    assert (ratio - 1).abs().max() <= 2 * torch.finfo(torch.bfloat16).eps


def test_random_rows_replace_only_lost_ranks_and_zeros_of_zero_pad_stay():
    """Check HetLoRA's aggregation "zero_pad", which counts missing ranks of a client as zeros, and
    merging of adapters with a lost rank."""
    one = adapter(0, RANK)
    state = one.state_dict()
    cut = {k: v[:2] if "lora_A" in k else v[:, :2] for k, v in state.items()}
    reply = Update(1, 10, cut, LayerPlan((0,), (2,)))
    found = aggregate(state, [reply], rank_agg="zero_pad", upload="value").state
    for key, value in found.items():
        assert not (value[2:] if "lora_A" in key else value[:, 2:]).any()
    value = changed(adapter(0, RANK), with_a_rank_twice)
    found, _ = resize_adapter(value, 3)
    for factors in found.modules.values():
        assert factors.b.any(0).all() and factors.a.any(1).all(), "found ranks that are 0"
    merged_value = merge_adapters([value, value], [0.5, 0.5], "delta_svd")
    for factors in merged_value.modules.values():
        assert factors.b.any(0).tolist() == [True] * 3 + [False]
        assert factors.a.any(1).all() and factors.a[3].abs().max() <= 20**-0.5


@pytest.mark.parametrize("total", [3, 6, 9])
def test_legend_round_changes_every_rank_of_the_trained_layers(total: int):
    """Check a resized, untrained adapter that is trained on cached activations."""
    model = adapted("ours", init_lora_weights=True)
    manager = LoraLayerManager(model)
    ranks = legend.LegendConfig(total=total).ranks(manager.num_layers)
    state, errors = legend.resize_state(manager.state_slice(), ranks)
    assert set(errors.values()) == {0.0}
    plan = LayerPlan(tuple(range(1, manager.num_layers)), ranks[1:])
    manager.load_slice(state)
    manager.apply(plan, others="disabled")
    cache = legend.PrefixCache(manager)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    ids = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
    for _ in range(2):  # The first step fills the cache, which the second one reads.
        before = {k: v.clone() for k, v in manager.state_slice(plan.layers, plan.ranks).items()}
        with manager.boundary(), cache.batch([0, 1]):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        after = manager.state_slice(plan.layers, plan.ranks)
        for key in after:
            if "lora_A" in key:
                a, b = (after[k] - before[k] for k in (key, key.replace("lora_A", "lora_B")))
                assert bool((a.any(1) | b.any(0)).all()), key
    assert cache.hits == 1
