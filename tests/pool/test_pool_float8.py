"""Pages of float8_e4m3fn in a pool: the bound of the error, exact data, moves, and refusals."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from backends import Backend
from pool_support import Base, config, state
from torch import Tensor

import lora_ext
from lora_ext.pool import unpack
from lora_ext.pool._pages import quantised

E4M3 = torch.float8_e4m3fn
Adapter = tuple[dict[str, Any], dict[str, Tensor]]


def make(of_model: torch.dtype = torch.float32, device: str = "cpu", /, **fields: Any) -> Any:
    torch.manual_seed(0)
    model = Base().to(device, of_model).eval().requires_grad_(False)
    fields = {"max_slots": 4, "max_rank": 32, "dtype": E4M3} | fields
    return lora_ext.AdapterPool(model, **fields), model


def exact_adapter(seed: int, rank: int = 12) -> Adapter:
    """Return an adapter of small integers times a power of two for each rank."""
    g, tensors = torch.Generator().manual_seed(seed), state(seed, rank)
    for key, value in tensors.items():
        shape = (rank, 1) if "lora_A" in key else (1, rank)
        power = 2.0 ** torch.randint(-9, 0, shape, generator=g)
        tensors[key] = torch.randint(-15, 16, value.shape, generator=g) * power
    return config(rank), tensors


def outputs(pool: Any, model: Any, entries: Any, x: Tensor) -> Tensor:
    lora_ext.attach(model, pool)
    try:
        with torch.no_grad(), lora_ext.adapters(entries):
            return model.down(model.up(x))
    finally:
        lora_ext.detach(model)


def exponents(values: Tensor, dim: int) -> Tensor:
    """Return the least exponents e with ``abs(values) <= 448 * 2**e``."""
    largest = values.abs().amax(dim)
    return torch.ceil(torch.log2(largest / 448))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_exact_data_has_the_bits_of_an_ordinary_pool(backend: Backend, dtype: torch.dtype) -> None:
    x = torch.randn(5, 12, generator=torch.Generator().manual_seed(9)).to(backend.device, dtype)
    entries = ["r", "s", {"r": 0.5, "s": -2.0}, ("s", 3.0), None]
    found = []
    for page_dtype in (E4M3, None):
        pool, model = make(dtype, backend.device, dtype=page_dtype)
        for name, seed in (("r", 1), ("s", 2)):
            pool.load(name, exact_adapter(seed))
        found.append(outputs(pool, model, entries, x))
    assert torch.isfinite(found[0]).all() and torch.equal(*found)


@pytest.mark.parametrize("spread", [0, 6, 40])
def test_rounding_keeps_the_derived_bound(spread: int) -> None:
    # 2**i and 2**k are recovered from the result: a used rank is scaled by powers of two.
    g = torch.Generator().manual_seed(spread)
    shapes = (5, 8, 1), (5, 1, 8)
    e, f = (torch.randint(-spread, spread + 1, shape, generator=g) for shape in shapes)
    a = torch.randn(5, 8, 300, generator=g) * 2.0**e
    b = torch.randn(5, 200, 8, generator=g) * 2.0**f
    a *= 2.0 ** torch.randint(-12, 1, a.shape, generator=g)  # subnormals as well
    a[0, 2], b[1, :, 3] = 0, 0  # ranks without effect
    a[2], b[2] = 0, 0
    a8, b8, product = quantised(a, b)
    assert product[2] == 0 and not a8[2].float().any() and not b8[2].float().any()
    own = exponents(a, 2) + exponents(b, 1)
    used = torch.isfinite(own)
    assert torch.equal(
        product[used.any(1)], own.where(used, -torch.inf).amax(1)[used.any(1)].long()
    )
    more = (product[:, None] - own).where(used, 0)
    i, k = exponents(a, 2) + more // 2, exponents(b, 1) + (more + 1) // 2
    for wide, small, e, dim in ((a, a8, i, 2), (b, b8, k, 1)):
        step = torch.where(used, 2.0**e, 1).double().unsqueeze(dim)
        error = (small.double() * step - wide).abs()
        bound = torch.maximum(wide.abs() / 16, step / 1024)
        assert (error <= bound).where(used.unsqueeze(dim), True).all()
        assert (small.float().abs() <= 448).all()
    # The rank with the largest product in a page is not divided by a larger power than it needs.
    assert (more.where(used, 1 << 20).amin(1)[used.any(1)] == 0).all()


def test_update_keeps_the_bound_against_float64() -> None:
    rank, name = 12, "up"
    pool, model = make(targets=["up"])
    tensors = state(3, rank, ("up",))
    pool.load("x", (config(rank, ("up",)), tensors))
    a, b = (tensors[f"base_model.model.{name}.lora_{k}.weight"].double() for k in "AB")
    x = torch.randn(50, 12, generator=torch.Generator().manual_seed(4))
    base = model.up(x).double()
    lora_ext.attach(model, pool)
    with torch.no_grad(), lora_ext.adapters("x"):
        found = model.up(x).double()
    scale = 8 / rank
    exact = base + scale * x.double() @ a.T @ b.T
    # |error| <= sum of |b| eps_a + eps_b |a| + eps_b eps_a, with eps = max(|w| / 16, 2^i / 1024)
    e = torch.stack([exponents(a, 1), exponents(b, 0)])
    for page in range(0, rank, 8):
        part = e[:, page : page + 8]
        more = part.sum(0).max() - part.sum(0)
        part += torch.stack([more // 2, (more + 1) // 2])
    eps_a = torch.maximum(a.abs() / 16, 2.0 ** e[0][:, None] / 1024)
    eps_b = torch.maximum(b.abs() / 16, 2.0 ** e[1] / 1024)
    of_x = x.double().abs()
    bound = of_x @ eps_a.T @ (b.abs() + eps_b).T + of_x @ a.abs().T @ eps_b.T
    sums = of_x @ a.abs().T @ b.abs().T  # of float32, of 12 products each
    error = (found - exact).abs()
    assert (error <= scale * bound + 2.0**-20 * (scale * sums + base.abs())).all()
    largest = (a.abs().amax(1) * b.abs().amax(0)).max()
    simple = 33 / 256 * sums + rank * 2.0**-14 * largest * of_x.sum(1, keepdim=True)
    assert (error <= scale * simple).all() and (error.max() > 1e-3 * exact.abs().max())


def test_pages_take_a_quarter_of_float32() -> None:
    pools = [make(dtype=dtype, targets=["up", "down"])[0] for dtype in (E4M3, torch.float16, None)]
    for pool in pools:
        pool.load("x", (config(16), state(0, 16)))
    small, half, full = (pool._store.slabs["up"].page_bytes for pool in pools)
    assert (small, half, full) == (8 * 32, 8 * 64, 8 * 128)
    small, half, full = (pool.limit_bytes for pool in pools)
    assert 4 * small == 2 * half == full
    own = [pool.stats()["adapters"]["x"]["bytes"] for pool in pools]
    assert own[2] == 4 * own[0]


def test_moves_through_host_memory_keep_the_bits() -> None:
    x = torch.randn(2, 12, generator=torch.Generator().manual_seed(9))
    pool, model = make(max_slots=1)
    sources = {
        name: (config(12, lora_bias=True), state(i, 12, bias=True)) for i, name in enumerate("pq")
    }
    pool.prefetch(sources)
    before = {n: outputs(pool, model, n, x) for n in "pq"}
    assert not torch.equal(before["p"], before["q"])
    again = {n: outputs(pool, model, n, x) for n in "pq"}  # each load evicts the other adapter
    assert pool.stats()["evictions"] >= 3
    assert all(torch.equal(before[n], again[n]) for n in "pq")
    pool.update("p", sources["q"])
    assert torch.equal(outputs(pool, model, "p", x), before["q"])
    # The scale of the bias is that of the adapter, not that of a page.
    zero = {k: v if "bias" in k else torch.zeros_like(v) for k, v in sources["p"][1].items()}
    pool.update("p", (sources["p"][0], zero))
    expected = model.up(x) + 8 / 12 * zero["base_model.model.up.lora_B.bias"]
    lora_ext.attach(model, pool)
    with torch.no_grad(), lora_ext.adapters("p"):
        torch.testing.assert_close(model.up(x), expected)


def test_embeddings_and_graphs_have_the_bits_of_an_ordinary_pool() -> None:
    g = torch.Generator().manual_seed(5)
    a, b = (torch.randint(-7, 8, (12, columns), generator=g) for columns in (7, 12))
    stem = "base_model.model.embed.lora_embedding_"
    tensors = {f"{stem}A": a / 4, f"{stem}B": b * 8.0}
    found = []
    for dtype in (E4M3, None):
        pool, model = make(dtype=dtype)
        pool.load("x", (config(12, ("embed",)), tensors))
        lora_ext.attach(model, pool)
        with torch.no_grad(), lora_ext.adapters(["x", None]):
            found.append(model.embed(torch.tensor([[1, 6], [2, 1]])))
    assert torch.equal(*found)


def test_first_mixture_does_not_move_the_tables() -> None:
    # A captured graph holds the addresses of the scales of pages.
    pool, _ = make()
    pool.load("r", exact_adapter(1))
    slab = pool.modules["up"]
    tables = slab.page_scale, slab.groups, slab.members
    address = [t.data_ptr() for t in tables]
    pool.load("s", exact_adapter(2))
    with pool.acquire([{"r": 1.0, "s": 2.0}]):
        now = [t.data_ptr() for t in (slab.page_scale, slab.groups, slab.members)]
    assert address == now


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("factor", "AB")
def test_values_that_are_not_finite_are_refused(factor: str, value: float) -> None:
    pool, _ = make()
    tensors = state(0, 4)
    tensors[f"base_model.model.up.lora_{factor}.weight"][1, 2] = value
    tensors["base_model.model.up.lora_A.weight"][3] = 0
    with pytest.raises(ValueError, match=rf"up.lora_{factor}.weight: expected finite values"):
        pool.load("x", (config(4), tensors))
    assert pool.names == []


@pytest.mark.parametrize("power", [90.0, -90.0])
def test_scales_outside_float32_are_refused(power: float) -> None:
    pool, _ = make()
    tensors = {k: v * 2.0**power for k, v in state(0, 4).items()}
    with pytest.raises(ValueError, match=r"up: expected products of scales that are normal"):
        pool.load("x", (config(4), tensors))
    zero = {k: v if "lora_A" in k else v * 0 for k, v in tensors.items()}
    pool.load("x", (config(4), zero))  # a new adapter: B is zero
    pool.load("y", (config(4, lora_alpha=0), state(0, 4)))


def test_new_adapter_adds_nothing() -> None:
    pool, model = make()
    tensors = {k: v if "lora_A" in k else v * 0 for k, v in state(0, 4).items()}
    pool.load("x", (config(4), tensors))
    x = torch.randn(2, 12)
    assert torch.equal(outputs(pool, model, "x", x), model.down(model.up(x)))


def test_dora_large_ranks_and_other_dtypes_are_refused() -> None:
    pool, model = make()
    tensors = state(0, 4, dora=True)
    message = "up: expected an ordinary adapter in pages of torch.float8_e4m3fn, found DoRA"
    with pytest.raises(NotImplementedError, match=message):
        pool.load("x", (config(4, use_dora=True), tensors))
    refused = "dtype=torch.float8_e4m3fn: model: expected a max_rank of at most 256 .*, found "
    with pytest.raises(NotImplementedError, match=f"{refused}max_rank=264"):
        make(max_rank=264)
    with pytest.raises(NotImplementedError, match=f"{refused}'up' in torch.float64"):
        make(torch.float64)
    with pytest.raises(ValueError, match=r"dtype: expected one of .*, found torch.float8_e5m2"):
        make(dtype=torch.float8_e5m2)
    pool.load("y", (config(4), state(0, 4)))
    slab = pool.modules["up"]
    message = "unpack: a_pages: expected pages without scales, found torch.float8_e4m3fn"
    with pytest.raises(TypeError, match=message):
        unpack(slab.a_pages, slab.b_pages, [0], 4)
    small = {key: value.to(E4M3) for key, value in state(0, 4).items()}
    with pytest.raises(ValueError, match=r"weight: dtype: expected .*found torch.float8_e4m3fn"):
        pool.load("z", (config(4), small))
    lora_ext.attach(model, pool)
    assert model.state_dict().keys() == Base().state_dict().keys()  # pages are not saved
    for saved in (pool, model):
        with pytest.raises(TypeError, match="AdapterPool: a pool cannot be copied, pickled or"):
            pickle.dumps(saved)
