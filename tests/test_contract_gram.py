"""Laws of the Gram matrices of adapters, in addition to ``test_contract.py``."""

from collections.abc import Callable

import pytest
import torch
from backends import Backend
from cases_gram import DTYPES, SMALL, adapters, grams, shapes_of, wide_grams
from contract import assert_same_bits, strided, transposed, wrong_calls
from torch import Tensor

from lora_ext import ops, reference


@pytest.mark.parametrize("asked", [None, torch.float64], ids=str)
def test_grams_stay_within_the_bound_on_random_values(
    backend: Backend, asked: torch.dtype | None
) -> None:
    """Check that a sum of n terms has at most min(n + 1, n / 32 + 140) roundings.

    CPU twins add spans of 256 terms in at least four lanes. CUDA kernels add steps of 32 to 128
    terms (128 up to 64 ranks). Then the lanes are added, and finally the spans or steps in order.
    Products are exact or part of a fused multiply-add; the emulator rounds them before the sum.
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
            # The float64 formula has a rounding error of n terms too.
            allowed = (min(n + 1, n / 32 + 140) * unit + n * 2.0**-53) * total
            assert ((got.cpu().double() - formula).abs() <= allowed).all(), (dtype, n)
            assert_same_bits(got, got.T)


def test_pair_stats_agree_with_dense_products(backend: Backend) -> None:
    for dtype in DTYPES:
        lists = adapters(shapes_of(backend), dtype, backend)
        for b, projected in zip(lists[1], lists[2], strict=True):
            projected.mul_(1e-3).add_(b)  # almost equal, so that |b|^2 - 2 b p + |p|^2 would cancel
        scaling = [1.0 + i for i in range(len(lists[0]))]
        got = ops.lora_pair_stats(*lists, scaling).cpu()
        dense = reference.lora_pair_stats(*([t.cpu() for t in kept] for kept in lists), scaling)
        assert torch.allclose(got, dense, rtol=1e-10, atol=1e-12)


def test_results_equal_known_values_and_empty_adapters_are_supported(backend: Backend) -> None:
    """Check values for a = (3, 4), b = (1, 1) and projected b = (2, 0): |D|^2 = 50, |PD|^2 = 100
    and d^2 = 50."""
    a = torch.tensor([[3.0, 4.0]], device=backend.device)
    b = torch.tensor([[1.0], [1.0]], device=backend.device)
    moved = torch.tensor([[2.0], [0.0]], device=backend.device)
    stats = ops.lora_pair_stats(a, b, moved)
    assert stats.shape == (4,) and stats.tolist() == [50.0, 100.0, 50.0, 50.0]
    assert ops.lora_pair_stats(a, b, moved, 2.0).tolist() == [200.0, 400.0, 200.0, 200.0]
    assert ops.lora_gram([], []) == ([], [])
    assert ops.lora_pair_stats([], [], []).shape == (0, 4)
    a, b, p = adapters([(24, 16, 0), (0, 6, 4), (0, 0, 0)], torch.float32, backend)
    first, second = ops.lora_gram(a, b)
    assert [t.shape for t in first] == [(0, 0), (4, 4), (0, 0)]
    assert (second[1] == 0).all() and (first[1] != 0).any()
    assert (ops.lora_pair_stats(a, b, p) == 0).all()


@pytest.mark.slow
@pytest.mark.parametrize("layout", [strided, transposed])
def test_layouts_change_no_bit(backend: Backend, layout: Callable[[Tensor], Tensor]) -> None:
    for dtype in DTYPES:
        lists = adapters(SMALL, dtype, backend)
        other = [[layout(t) for t in kept] for kept in lists]
        for got, expected in zip(grams(*other[:2]), grams(*lists[:2]), strict=True):
            assert_same_bits(got, expected, f"{dtype}: ")
        assert_same_bits(ops.lora_pair_stats(*other), ops.lora_pair_stats(*lists))


def test_factors_may_be_expanded_and_rows_may_overlap(backend: Backend) -> None:
    row = torch.arange(-3.0, 4.0, device=backend.device)
    windows = torch.arange(12.0, device=backend.device).unfold(0, 8, 1)  # (5, 8), row stride 1
    for a, b in ((row.expand(3, 7), row[:, None].expand(7, 3)), (windows, windows[:, :5])):
        for got, expected in zip(grams([a], [b]), wide_grams([a], [b]), strict=True):
            assert_same_bits(got, expected.float())


def test_stride_of_a_single_row_is_ignored_and_neighbouring_memory_is_not_read(
    backend: Backend,
) -> None:
    numbers = torch.arange(8.0, device=backend.device)
    a = numbers.as_strided((1, 5), (2**40 + 3, 1))
    b = numbers.as_strided((4, 1), (1, 2**40 + 3))
    assert [t.item() for t in grams([a], [b])] == [30.0, 14.0]
    assert ops.lora_pair_stats(a, b, 2 * b).tolist() == [420.0, 1680.0, 840.0, 420.0]
    bank = torch.full((4, 16, 40), float("nan"), device=backend.device)
    bank[1] = 1.0
    (gram,), _ = ops.lora_gram([bank[1]], [bank[1].T])
    assert torch.equal(gram, torch.full_like(gram, 40.0))


def test_rows_may_be_further_apart_than_int32_counts(backend: Backend) -> None:
    """Check rows at distances above 2^31 elements; memory between them is never touched."""
    far = torch.empty(2**31 + 8, dtype=torch.float16, device=backend.device)
    far[:4], far[2**31 : 2**31 + 4] = 1, 2
    rows = far.as_strided((2, 4), (2**31, 1))
    assert ops.lora_gram([rows], [rows[:, :2]])[0][0].tolist() == [[4.0, 8.0], [8.0, 16.0]]
    assert ops.lora_gram([rows[:, :2].T], [rows[:, :2]])[1][0].tolist() == [[5.0, 5.0], [5.0, 5.0]]


@pytest.mark.slow
def test_lists_single_adapters_and_repeated_calls_are_bitwise_equal(backend: Backend) -> None:
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


def test_dtypes_may_be_mixed_in_a_list_and_in_an_adapter(backend: Backend) -> None:
    kept = [adapters([(4, 5, 2)], DTYPES[i % 4], backend) for i in range(12)]
    a, b, p = ([lists[i][0] for lists in kept] for i in range(3))
    for i, gram in enumerate(ops.lora_gram(a, b)[0]):
        (alone,), _ = ops.lora_gram([a[i]], [b[i]])
        assert_same_bits(gram, alone)
    stats = ops.lora_pair_stats(a, b, p)
    assert_same_bits(stats[-1], ops.lora_pair_stats(a[-1], b[-1], p[-1]))
    (a,), (b,), (p,) = adapters([(6, 5, 3)], torch.bfloat16, backend)
    (gram,), _ = ops.lora_gram([a], [b.double()])
    assert gram.dtype == torch.float64
    assert_same_bits(
        ops.lora_pair_stats(a, b, p.float()),
        ops.lora_pair_stats(a.double(), b.double(), p.double()),
    )


@pytest.mark.slow
def test_list_may_be_longer_than_one_launch(backend: Backend) -> None:
    """Check 502 adapters of one dtype; a launch takes at most 500."""
    count = 40 if backend.small else 502
    shapes = [(20, 24, 65) if i == 500 else (4, 5 + i % 7, 1 + i % 3) for i in range(count)]
    a, b, p = adapters(shapes, torch.float32, backend)
    (first, second), stats = ops.lora_gram(a, b), ops.lora_pair_stats(a, b, p)
    for i in [i for i in (0, 1, 39, 499, 500, 501) if i < count]:
        (alone_a,), (alone_b,) = ops.lora_gram([a[i]], [b[i]])
        assert_same_bits(first[i], alone_a)
        assert_same_bits(second[i], alone_b)
        assert_same_bits(stats[i], ops.lora_pair_stats(a[i], b[i], p[i]))
    wide = torch.stack([t.double().square().sum().cpu() for t in a])
    assert torch.allclose(torch.stack([g.trace().double().cpu() for g in first]), wide, rtol=1e-5)


def test_adapters_of_a_list_may_be_on_different_devices() -> None:
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
    a[0], b[0] = a[0].to("meta"), b[0].to("meta")  # The error contains the index in the list.
    for at, wrong, message in [
        (2, b[2][:, 1:], r"b\[2\]: expected shape \(O, r\) with r = 2, found \[9, 1\]"),
        (1, b[1].to("meta"), r"b\[1\]: expected a tensor on cpu, found meta"),
        (0, b[0].int(), r"b\[0\]: expected float32, float16, bfloat16 or float64, found"),
    ]:
        with pytest.raises(ValueError, match=f"lora_gram: {message}"):
            ops.lora_gram(a, [wrong if i == at else t for i, t in enumerate(b)])


def test_non_finite_values_affect_only_their_adapter_and_infinity_stays_infinite(
    backend: Backend,
) -> None:
    a, b, p = adapters([(40, 32, 8), (40, 48, 8)], torch.float32, backend)
    a[0][3, 5] = float("nan")
    (gram, other), _ = ops.lora_gram(a, b)
    hit = torch.zeros(8, 8, dtype=torch.bool)
    hit[3, :] = hit[:, 3] = True
    assert torch.equal(gram.cpu().isnan(), hit) and other.isfinite().all()
    stats = ops.lora_pair_stats(a, b, p)
    assert stats[0].isnan().all() and stats[1].isfinite().all()
    for dtype in DTYPES:
        for rank in (1, 2, 3, 4, 5, 65):
            a = torch.full((rank, 9), 2.0, dtype=dtype, device=backend.device)
            a[-1, 4] = torch.inf
            b = torch.ones(6, rank, dtype=dtype, device=backend.device)
            assert ops.lora_pair_stats(a, b, 2 * b).tolist() == [torch.inf] * 4, (dtype, rank)


def test_autograd_autocast_and_inference_mode_change_nothing(backend: Backend) -> None:
    a, b, p = adapters([(40, 32, 8), (9, 4, 2)], torch.float32, backend)

    def run(a: list[Tensor], b: list[Tensor], p: list[Tensor]) -> list[Tensor]:
        return [*grams(a, b), ops.lora_pair_stats(a, b, p, [1.0, 3.0])]

    expected = run(a, b, p)
    with torch.inference_mode():
        inside = [[t.clone() for t in kept] for kept in (a, b, p)]
        found = [run(*inside)]
    found.append(run(*inside))
    a[0].requires_grad_()
    with torch.autocast(backend.device, torch.bfloat16):
        found.append(run(a, b, p))
    for got in found:
        for one, other in zip(got, expected, strict=True):
            assert not one.requires_grad
            assert_same_bits(one, other)


def test_tangents_and_gradients_raise(backend: Backend) -> None:
    a, b, _ = adapters([(5, 7, 3)], torch.float32, backend)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(b[0], torch.ones_like(b[0]))
        for call in (lambda: ops.lora_gram(a, [dual]), lambda: ops.lora_pair_stats(a, b, [dual])):
            with pytest.raises(NotImplementedError, match="has no forward-mode derivative"):
                call()
    a, b, p = adapters([(5, 7, 3)], torch.float32, Backend("cpu"))
    b[0].requires_grad_()
    for call in (
        lambda: torch.ops.lora_ext.lora_gram.default(a, b),
        lambda: torch.ops.lora_ext.lora_pair_stats.default(a, b, p),
    ):
        with pytest.raises(RuntimeError, match=r"has no backward; call it under torch.no_grad\(\)"):
            call()


def test_fake_kernels_raise_like_the_ops() -> None:
    a, b, p = (
        [t.to("meta") for t in kept] for kept in adapters([(5, 7, 3)], DTYPES[0], Backend("cpu"))
    )
    assert [t.shape for t in grams(a, b)] == [(3, 3), (3, 3)]
    assert ops.lora_pair_stats(a, b, p).shape == (1, 4)
    of_grams = [
        ("b: expected as many tensors as a, 1, found 2", a, b + b),
        (r"b\[0\]: expected shape \(O, r\) with r = 3", a, [b[0].T]),
        (r"a\[0\]: expected float32, float16", [a[0].int()], b),
        ("dtype: expected None, torch.float32", a, b, torch.half),
    ]
    of_stats = [(r"projected_b\[0\]: expected shape \(O, r\)", a, b, [p[0][1:]])]
    for message, call in [
        *wrong_calls("lora_gram", ops.lora_gram, of_grams),
        *wrong_calls("lora_pair_stats", ops.lora_pair_stats, of_stats),
    ]:
        with pytest.raises(ValueError, match=message):
            call()


def test_grams_and_stats_compile_without_a_graph_break() -> None:
    a, b, p = adapters([(5, 7, 3), (9, 4, 2)], torch.float32, Backend("cpu"))

    @torch.compile(fullgraph=True, backend="eager")
    def norms(a: list[Tensor], b: list[Tensor], p: list[Tensor]) -> Tensor:
        first, second = ops.lora_gram(a, b, torch.float64)
        squares = torch.stack([(g * h).sum() for g, h in zip(first, second, strict=True)])
        return squares - ops.lora_pair_stats(a, b, p)[:, 0]

    assert norms(a, b, p).abs().max() < 1e-10


@pytest.mark.parametrize("scaling", [2.0, [2.0, 3.0], torch.tensor([2.0, 3.0])], ids=str)
def test_stats_of_any_scaling_compile_without_a_graph_break(scaling: object) -> None:
    lists = adapters([(5, 7, 3), (9, 4, 2)], torch.float32, Backend("cpu"))
    traced = torch.compile(ops.lora_pair_stats, fullgraph=True, backend="eager")
    assert_same_bits(traced(*lists, scaling), ops.lora_pair_stats(*lists, scaling))
