"""Gram matrices of adapters and what follows from them: every law, on every backend."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from backends import Backend
from cases import _values
from test_contract import assert_same_bits
from torch import Tensor

from lora_ext import ops, reference

Shape = tuple[int, int, int]  # O, I, r

SMALL: list[Shape] = [
    (1, 1, 1), (1, 9, 2), (9, 1, 2), (5, 7, 3), (24, 16, 0), (0, 6, 4), (6, 0, 4), (40, 32, 8),
    (70, 257, 16), (33, 48, 24), (20, 72, 64), (18, 24, 65),
]  # fmt: skip
LARGE: list[Shape] = [
    (576, 1536, 16), (192, 576, 16), (1100, 300, 32), (300, 640, 100), (130, 90, 256),
    (64, 40, 300),
]  # fmt: skip
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]  # kernels take float64 too

Lists = tuple[list[Tensor], list[Tensor], list[Tensor]]


def adapters(
    shapes: Sequence[Shape], dtype: torch.dtype, backend: Backend, *, exact: bool = False
) -> Lists:
    """Factors a and b and the projected b of adapters of these shapes."""
    lists: Lists = ([], [], [])
    for out, wide, rank in shapes:
        g = torch.Generator().manual_seed(out + 7 * wide + 31 * rank)
        for kept, size in zip(lists, ((rank, wide), (out, rank), (out, rank)), strict=True):
            kept.append(_values(g, exact, size, dtype).to(backend.device))
    return lists


def shapes_of(backend: Backend) -> list[Shape]:
    return SMALL if backend.small else SMALL + LARGE


def grams(a: list[Tensor], b: list[Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
    first, second = ops.lora_gram(a, b, dtype)
    return [*first, *second]


def wide_grams(a: list[Tensor], b: list[Tensor]) -> list[Tensor]:
    first, second = reference.lora_gram([t.cpu() for t in a], [t.cpu() for t in b], torch.float64)
    return [*first, *second]


def strided(t: Tensor) -> Tensor:
    """The same values, rows further apart, at an address that is not aligned."""
    wide = t.new_full((t.shape[0], t.shape[1] + 3), float("nan"))
    wide[:, 1:-2] = t
    return wide[:, 1:-2]


def transposed(t: Tensor) -> Tensor:
    """The same values, columns contiguous."""
    return t.T.contiguous().T


# --- the formula --------------------------------------------------------------------------------
@pytest.mark.parametrize("asked", [None, torch.float32, torch.float64], ids=str)
def test_grams_equal_the_formula_bit_for_bit_on_small_integers(
    backend: Backend, asked: torch.dtype | None
) -> None:
    for dtype in DTYPES:
        a, b, _ = adapters(shapes_of(backend), dtype, backend, exact=True)
        expected = asked or (torch.float64 if dtype == torch.float64 else torch.float32)
        for got, formula in zip(grams(a, b, asked), wide_grams(a, b), strict=True):
            assert got.dtype == expected and got.device == a[0].device
            assert_same_bits(got, formula.to(expected), f"{dtype}: ")


@pytest.mark.parametrize("asked", [None, torch.float64], ids=str)
def test_grams_stay_within_the_bound_on_random_values(
    backend: Backend, asked: torch.dtype | None
) -> None:
    """No sum rounds more often than once for each of its n terms, nor than n / 32 + 140 times.

    Twins add a span of 256 in four lanes or more, kernels a step of 32 to 128 at 64 ranks; then
    the lanes meet, and the spans, or steps, follow each other. A product is exact, or rounded with
    its sum; on the emulator once before.
    """
    for dtype in DTYPES:
        shapes = shapes_of(backend)
        a, b, _ = adapters(shapes, dtype, backend)
        lengths = [*(s[1] for s in shapes), *(s[0] for s in shapes)]
        exact = wide_grams(a, b)
        magnitude = wide_grams([t.abs() for t in a], [t.abs() for t in b])
        for got, formula, total, n in zip(
            grams(a, b, asked), exact, magnitude, lengths, strict=True
        ):
            unit = 2.0**-53 if got.dtype == torch.float64 else 2.0**-24
            # The formula in float64 is itself a sum of n terms.
            allowed = (min(n + 1, n / 32 + 140) * unit + n * 2.0**-53) * total
            assert ((got.cpu().double() - formula).abs() <= allowed).all(), (dtype, n)


def test_pair_stats_equal_the_formula_on_small_integers(backend: Backend) -> None:
    for dtype in DTYPES:
        lists = adapters(shapes_of(backend), dtype, backend, exact=True)
        scaling = [0.5 * 2.0 ** (i % 3) for i in range(len(lists[0]))]
        got = ops.lora_pair_stats(*lists, scaling)
        assert got.dtype == torch.float64 and got.device == lists[0][0].device
        formula = reference.lora_pair_stats(*([t.cpu() for t in kept] for kept in lists), scaling)
        assert_same_bits(got, formula, f"{dtype}: ")


def test_pair_stats_agree_with_the_dense_products(backend: Backend) -> None:
    for dtype in DTYPES:
        lists = adapters(shapes_of(backend), dtype, backend)
        for b, projected in zip(lists[1], lists[2], strict=True):
            projected.mul_(1e-3).add_(b)  # all but the same: the expanded form would cancel
        scaling = [1.0 + i for i in range(len(lists[0]))]
        got = ops.lora_pair_stats(*lists, scaling).cpu()
        dense = reference.lora_pair_stats(*([t.cpu() for t in kept] for kept in lists), scaling)
        assert torch.allclose(got, dense, rtol=1e-10, atol=1e-12)


def test_a_known_answer(backend: Backend) -> None:
    """V = diag(2, 0) takes b = (1, 1) to (2, 0): |D|^2 = 50, |PD|^2 = 100, d^2 = 50."""
    a = torch.tensor([[3.0, 4.0]], device=backend.device)
    b = torch.tensor([[1.0], [1.0]], device=backend.device)
    moved = torch.tensor([[2.0], [0.0]], device=backend.device)
    stats = ops.lora_pair_stats(a, b, moved)
    assert stats.shape == (4,) and stats.tolist() == [50.0, 100.0, 50.0, 50.0]
    assert ops.lora_pair_stats(a, b, moved, 2.0).tolist() == [200.0, 400.0, 200.0, 200.0]


# --- layouts --------------------------------------------------------------------------------------
@pytest.mark.parametrize("layout", [strided, transposed])
def test_layouts_change_no_bit(backend: Backend, layout: object) -> None:
    for dtype in DTYPES:
        lists = adapters(SMALL, dtype, backend)
        other = [[layout(t) for t in kept] for kept in lists]  # type: ignore[operator]
        for got, expected in zip(grams(*other[:2]), grams(*lists[:2]), strict=True):
            assert_same_bits(got, expected, f"{dtype}: ")
        assert_same_bits(ops.lora_pair_stats(*other), ops.lora_pair_stats(*lists))


def test_expanded_factors_count_as_the_values_that_they_show(backend: Backend) -> None:
    row = torch.arange(-3.0, 4.0, device=backend.device)
    a, b = row.expand(3, 7), row[:, None].expand(7, 3)
    for got, expected in zip(grams([a], [b]), wide_grams([a], [b]), strict=True):
        assert_same_bits(got, expected.float())


def test_what_lies_beside_a_factor_is_not_read_into_it(backend: Backend) -> None:
    bank = torch.full((4, 16, 40), float("nan"), device=backend.device)
    bank[1] = 1.0
    (gram,), _ = ops.lora_gram([bank[1]], [bank[1].T])
    assert torch.equal(gram, torch.full_like(gram, 40.0))


# --- same input, same bits ------------------------------------------------------------------------
def test_together_and_alone_and_again_give_the_same_bits(backend: Backend) -> None:
    for dtype in DTYPES:
        a, b, p = adapters(shapes_of(backend), dtype, backend)
        together, stats = ops.lora_gram(a, b), ops.lora_pair_stats(a, b, p, 3.0)
        for got, expected in zip(grams(a, b), [*together[0], *together[1]], strict=True):
            assert_same_bits(got, expected)
        for i in range(len(a)):
            (alone_a,), (alone_b,) = ops.lora_gram([a[i]], [b[i]])
            assert_same_bits(alone_a, together[0][i])
            assert_same_bits(alone_b, together[1][i])
            assert_same_bits(ops.lora_pair_stats(a[i], b[i], p[i], 3.0), stats[i])


def test_no_bit_depends_on_the_threads() -> None:
    a, b, p = adapters(SMALL + LARGE, torch.float32, Backend("cpu"))
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 3):
            torch.set_num_threads(count)
            results.append([*grams(a, b), ops.lora_pair_stats(a, b, p)])
    finally:
        torch.set_num_threads(threads)
    for one, three in zip(*results, strict=True):
        assert_same_bits(one, three)


def test_grams_are_symmetric_to_the_bit(backend: Backend) -> None:
    a, b, _ = adapters(shapes_of(backend), torch.float32, backend)
    for gram in grams(a, b):
        assert_same_bits(gram, gram.T)


def test_a_list_may_mix_dtypes_and_be_longer_than_one_launch_holds(backend: Backend) -> None:
    count = 12 if backend.small else 1000
    kept: list[Lists] = [adapters([(4, 5, 2)], DTYPES[i % 4], backend) for i in range(count)]
    a, b, p = ([lists[i][0] for lists in kept] for i in range(3))
    for i, gram in enumerate(ops.lora_gram(a, b)[0]):
        (alone,), _ = ops.lora_gram([a[i]], [b[i]])
        assert_same_bits(gram, alone)
    stats = ops.lora_pair_stats(a, b, p)
    assert_same_bits(stats[-1], ops.lora_pair_stats(a[-1], b[-1], p[-1]))


def test_a_list_may_be_spread_over_devices() -> None:
    shapes = [(6, 5, 3), (4, 7, 2), (9, 4, 2)]
    a, b, p = adapters(shapes, torch.float32, Backend("cpu"))
    spread = [[kept[0], kept[1].to("meta"), kept[2]] for kept in (a, b, p)]
    for got, expected in zip(ops.lora_gram(*spread[:2]), ops.lora_gram(a, b), strict=True):
        assert [t.device.type for t in got] == ["cpu", "meta", "cpu"]
        assert got[1].shape == (2, 2)
        assert_same_bits(got[0], expected[0])
        assert_same_bits(got[2], expected[2])
    with pytest.raises(ValueError, match=r"lora_pair_stats: a\[1\]: expected a tensor on meta"):
        ops.lora_pair_stats(*(kept[1:] + kept[:1] for kept in spread))


def test_factors_of_two_dtypes_count_in_the_wider_one(backend: Backend) -> None:
    (a,), (b,), (p,) = adapters([(6, 5, 3)], torch.bfloat16, backend)
    (gram,), _ = ops.lora_gram([a], [b.double()])
    assert gram.dtype == torch.float64
    assert_same_bits(
        ops.lora_pair_stats(a, b, p.float()),
        ops.lora_pair_stats(a.double(), b.double(), p.double()),
    )


# --- nothing, and not a number --------------------------------------------------------------------
def test_empty_lists_and_empty_adapters(backend: Backend) -> None:
    assert ops.lora_gram([], []) == ([], [])
    assert ops.lora_pair_stats([], [], []).shape == (0, 4)
    a, b, p = adapters([(24, 16, 0), (0, 6, 4), (0, 0, 0)], torch.float32, backend)
    first, second = ops.lora_gram(a, b)
    assert [t.shape for t in first] == [(0, 0), (4, 4), (0, 0)]
    assert (second[1] == 0).all() and (first[1] != 0).any()
    assert (ops.lora_pair_stats(a, b, p) == 0).all()


def test_what_is_not_finite_stays_with_its_adapter_and_its_rank(backend: Backend) -> None:
    a, b, p = adapters([(40, 32, 8), (40, 48, 8)], torch.float32, backend)
    a[0][3, 5] = float("nan")
    (gram, other), _ = ops.lora_gram(a, b)
    hit = torch.zeros(8, 8, dtype=torch.bool)
    hit[3, :] = hit[:, 3] = True
    assert torch.equal(gram.cpu().isnan(), hit) and other.isfinite().all()
    stats = ops.lora_pair_stats(a, b, p)
    assert stats[0].isnan().all() and stats[1].isfinite().all()


# --- autograd, autocast, faults -------------------------------------------------------------------
def test_autograd_and_autocast_leave_them_alone(backend: Backend) -> None:
    a, b, p = adapters([(40, 32, 8)], torch.float32, backend)
    expected = [*grams(a, b), ops.lora_pair_stats(a, b, p)]
    a[0].requires_grad_()
    with torch.autocast(backend.device, torch.bfloat16):
        got = [*grams(a, b), ops.lora_pair_stats(a, b, p)]
    for one, other in zip(got, expected, strict=True):
        assert not one.requires_grad
        assert_same_bits(one, other)


def test_wrong_input_is_named(backend: Backend) -> None:
    (a,), (b,), (p,) = adapters([(5, 7, 3)], torch.float32, backend)
    for call, message in [
        (lambda: ops.lora_gram([a], []), "lora_gram: b: expected as many tensors as a, 1, found 0"),
        (
            lambda: ops.lora_gram([a, a], [b, b[:, 1:]]),
            r"lora_gram: b\[1\]: expected shape \(O, r\) with r = 3, found \[5, 2\]",
        ),
        (lambda: ops.lora_gram([a[0]], [b]), r"lora_gram: a\[0\]: expected shape \(r, I\), found"),
        (
            lambda: ops.lora_gram([a.int()], [b]),
            r"lora_gram: a\[0\]: expected float32, .*, found Int",
        ),
        (lambda: ops.lora_gram([a], [b.to("meta")]), r"lora_gram: b\[0\]: expected a tensor on .*"),
        (
            lambda: ops.lora_gram([a], [b], torch.bfloat16),
            "lora_gram: dtype: expected None, float32 or float64, found BFloat16",
        ),
        (
            lambda: ops.lora_pair_stats([a], [b], []),
            "lora_pair_stats: projected_b: expected as many tensors as a, 1, found 0",
        ),
        (
            lambda: ops.lora_pair_stats(a, b, p[1:]),
            r"projected_b\[0\]: expected shape \(O, r\) = \[5, 3\], found \[4, 3\]",
        ),
        (
            lambda: ops.lora_pair_stats([a], [b], [p], [1.0, 2.0]),
            r"lora_pair_stats: scaling: expected shape \(L,\) = \[1\], found \[2\]",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            call()


def test_passes_opcheck() -> None:
    for dtype in DTYPES:
        a, b, p = adapters([(5, 7, 3), (9, 4, 2)], dtype, Backend("cpu"))
        for args in ((a, b), (a, b, torch.float64)):
            torch.library.opcheck(torch.ops.lora_ext.lora_gram.default, args)
        torch.library.opcheck(torch.ops.lora_ext.lora_pair_stats.default, (a, b, p))


def test_the_fake_kernels_refuse_what_the_ops_refuse() -> None:
    a, b, p = (
        [t.to("meta") for t in kept] for kept in adapters([(5, 7, 3)], DTYPES[0], Backend("cpu"))
    )
    assert [t.shape for t in grams(a, b)] == [(3, 3), (3, 3)]
    assert ops.lora_pair_stats(a, b, p).shape == (1, 4)
    for call, message in [
        (
            lambda: ops.lora_gram(a, b + b),
            "lora_gram: b: expected as many tensors as a, 1, found 2",
        ),
        (
            lambda: ops.lora_gram(a, [b[0].T]),
            r"lora_gram: b\[0\]: expected shape \(O, r\) with r = 3",
        ),
        (lambda: ops.lora_gram([a[0].int()], b), r"lora_gram: a\[0\]: expected float32, float16"),
        (lambda: ops.lora_gram(a, b, torch.half), "lora_gram: dtype: expected None, torch.float32"),
        (
            lambda: ops.lora_pair_stats(a, b, [p[0][1:]]),
            r"projected_b\[0\]: expected shape \(O, r\)",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            call()


def test_the_ops_themselves_refuse_a_gradient() -> None:
    a, b, p = adapters([(5, 7, 3)], torch.float32, Backend("cpu"))
    b[0].requires_grad_()
    for call in (
        lambda: torch.ops.lora_ext.lora_gram.default(a, b),
        lambda: torch.ops.lora_ext.lora_pair_stats.default(a, b, p),
    ):
        with pytest.raises(RuntimeError, match=r"has no backward; call it under torch.no_grad\(\)"):
            call()


def test_traces_without_a_break() -> None:
    a, b, p = adapters([(5, 7, 3), (9, 4, 2)], torch.float32, Backend("cpu"))

    @torch.compile(fullgraph=True, backend="eager")
    def norms(a: list[Tensor], b: list[Tensor], p: list[Tensor]) -> Tensor:
        first, second = ops.lora_gram(a, b, torch.float64)
        squares = torch.stack([(g * h).sum() for g, h in zip(first, second, strict=True)])
        return squares - ops.lora_pair_stats(a, b, p)[:, 0]

    assert norms(a, b, p).abs().max() < 1e-10
