"""Mixes of normed hidden states, with and without a router: every law, on every backend."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import pytest
import torch
from backends import Backend
from test_contract import assert_same_bits
from torch import Tensor

import lora_ext
from lora_ext import ops, reference

Shape = tuple[tuple[int, ...], int, int]  # (...), d, k

SMALL: list[Shape] = [
    ((1,), 1, 1), ((1,), 3, 2), ((5,), 8, 3), ((2, 3), 33, 4), ((19,), 24, 2), ((4,), 64, 8),
    ((1,), 200, 3), ((0,), 16, 3), ((), 16, 2), ((33,), 40, 3),
]  # fmt: skip
LARGE: list[Shape] = [
    ((40,), 257, 3), ((2, 17), 576, 3), ((5,), 4096, 3), ((3,), 8200, 2), ((3,), 16392, 1),
    ((4200,), 8, 2), ((6,), 1024, 8),
]  # fmt: skip
POWERS: list[Shape] = [((1,), 1, 1), ((5,), 8, 3), ((2, 9), 64, 8), ((35,), 32, 2), ((3,), 1024, 4)]
NORMS = ["rms", "layer"]
norms = pytest.mark.parametrize("norm", NORMS)


@dataclass(frozen=True)
class Mix:
    """The arguments of one call; ``router`` and ``bias`` stand where ``weights`` would."""

    hiddens: list[Tensor]
    gammas: list[Tensor]
    betas: list[Tensor] | None
    weights: Tensor
    router: Tensor | None = None
    bias: Tensor | None = None
    eps: float = 1e-6
    norm: str = "rms"

    def run(self, library: Any = ops) -> tuple[Tensor, ...]:
        rest = (self.eps, self.betas, self.norm)
        if self.router is None:
            return (library.depth_mix(self.hiddens, self.gammas, self.weights, *rest),)
        return library.depth_mix_routed(self.hiddens, self.gammas, self.router, self.bias, *rest)

    def map(self, change: Callable[[Tensor], Tensor]) -> Mix:
        def of(value: Any) -> Any:
            if isinstance(value, list):
                return [change(t) for t in value]
            return change(value) if isinstance(value, Tensor) else value

        return replace(self, **{f.name: of(getattr(self, f.name)) for f in fields(self)})

    def tensors(self) -> list[Tensor]:
        """Whatever has a gradient, in the order of the arguments."""
        last = [self.weights] if self.router is None else [self.router, self.bias]
        return [*self.hiddens, *self.gammas, *(self.betas or []), *last]  # type: ignore[list-item]

    def wide(self) -> Mix:
        return self.map(lambda t: t.detach().cpu().double())


def make(
    shape: Shape,
    dtype: torch.dtype,
    backend: Backend | None = None,
    *,
    norm: str = "rms",
    scales: torch.dtype | None = None,
    betas: bool = True,
    routed: bool = False,
    exact: bool = False,
) -> Mix:
    """Random values; ``exact``: rows of plus and minus a power of two, whose norms are exact."""
    lead, width, depths = shape
    g = torch.Generator().manual_seed(width + 31 * depths + 7 * len(lead))
    sums = torch.float64 if dtype == torch.float64 else torch.float32

    def numbers(*size: int, dtype: torch.dtype | None = None, spread: float = 1.0) -> Tensor:
        if exact:
            return torch.randint(-2, 3, size, generator=g).to(dtype or scales or sums)
        values = torch.randn(size, generator=g, dtype=torch.float64) * spread
        return values.to(dtype or scales or sums)

    hiddens = []
    for e in range(depths):
        if exact:  # as many plus as minus, so the mean is zero too
            signs = torch.rand((*lead, width), generator=g).argsort(-1) * 2 < width
            size = 2.0 ** torch.randint(-1, 2, (*lead, 1), generator=g)
            hiddens.append(torch.where(signs, size, -size).to(dtype))
        else:
            hiddens.append((numbers(*lead, width, dtype=torch.float64) * (1 + e) + e).to(dtype))
    weights = torch.randint(0, 3, (*lead, depths), generator=g).to(sums) / 2
    mix = Mix(
        hiddens,
        [numbers(width) for _ in range(depths)],
        [numbers(width) for _ in range(depths)] if betas else None,
        weights if exact else torch.randn((*lead, depths), generator=g).to(sums),
        eps=0.0 if exact else 1e-6,
        norm=norm,
    )
    if routed:
        spread = 0.0 if exact else width**-0.5
        router = numbers(depths, width, spread=spread) * (0 if exact else 1)
        mix = replace(mix, router=router, bias=numbers(depths) * (0 if exact else 1))
    return mix.map(lambda t: t.to(backend.device)) if backend else mix


def shapes_of(backend: Backend) -> list[Shape]:
    return SMALL if backend.small else SMALL + LARGE


def scale_dtypes(dtype: torch.dtype) -> list[torch.dtype]:
    """Those that gammas may have: the hiddens' and that of sums."""
    return [dtype] if dtype in (torch.float32, torch.float64) else [dtype, torch.float32]


def each(backend: Backend) -> Iterator[tuple[torch.dtype, torch.dtype]]:
    for dtype in backend.dtypes():
        for scales in scale_dtypes(dtype):
            yield dtype, scales


def gradients(mix: Mix, ups: Sequence[Tensor], library: Any = ops) -> list[Tensor]:
    mix = mix.map(lambda t: t.detach().clone().requires_grad_())
    out = mix.run(library)
    return list(torch.autograd.grad(out, mix.tensors(), list(ups)))


def upstream(mix: Mix, *, exact: bool = False) -> list[Tensor]:
    g = torch.Generator().manual_seed(5)
    found = []
    for t in mix.run():
        values = (
            torch.randint(-2, 3, t.shape, generator=g)
            if exact
            else torch.randn(t.shape, generator=g, dtype=torch.float64)
        )
        found.append(values.to(t.dtype).to(t.device))
    return found


def unit(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


# --- the formula --------------------------------------------------------------------------------
def test_a_known_answer(backend: Backend) -> None:
    h = [torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0, 0.0]])]
    gammas = [torch.tensor([1.0, 2.0]), torch.tensor([1.0, 1.0])]
    mix = Mix(h, gammas, None, torch.tensor([[0.25, 0.75]]), eps=0.0)
    (u,) = mix.map(lambda t: t.to(backend.device)).run()
    assert torch.allclose(u.cpu(), torch.tensor([[1.27279221, 0.56568542]]), rtol=1e-6)


@norms
def test_equals_the_formula_bit_for_bit_where_norms_are_exact(backend: Backend, norm: str) -> None:
    for dtype, scales in each(backend):
        for shape in shapes_of(backend):
            if norm == "layer" and shape[1] % 2:
                continue  # a row of plus and minus one has a mean of zero at even widths alone
            mix = make(shape, dtype, backend, norm=norm, scales=scales, exact=True)
            (got,), (formula,) = mix.run(), mix.wide().run(reference)
            assert got.device == mix.weights.device
            assert_same_bits(got, formula.to(dtype), f"{shape} {dtype}: ")


def test_equals_the_formula_bit_for_bit_where_the_router_is_even(backend: Backend) -> None:
    for dtype, scales in each(backend):
        for shape in [((5,), 8, 2), ((2, 3), 64, 4), ((3,), 33, 8), ((1,), 5, 1)]:
            mix = make(shape, dtype, backend, scales=scales, routed=True, exact=True)
            for got, formula in zip(mix.run(), mix.wide().run(reference), strict=True):
                assert_same_bits(got, formula.to(got.dtype), f"{shape} {dtype}: ")


def norm_bound(mix: Mix, width: int) -> list[Tensor]:
    """How far each n_e may be from its float64 value, before it is rounded.

    A row's sum rounds once a term at most, which moves a root by half as much; a mean, by its own
    terms; then five products and sums.
    """
    u = unit(torch.float64 if mix.hiddens[0].dtype == torch.float64 else torch.float32)
    wide, found = mix.wide(), []
    for e, h in enumerate(wide.hiddens):
        mean = h.mean(-1, keepdim=True) if mix.norm == "layer" else torch.zeros(())
        rinv = torch.rsqrt((h - mean).square().mean(-1, keepdim=True) + mix.eps)
        x, gamma = (h - mean) * rinv, wide.gammas[e]
        beta = wide.betas[e].abs() if wide.betas else 0
        bound = (width / 2 + 8) * u * (gamma * x).abs() + 4 * u * beta
        if mix.norm == "layer":  # the shift by a wrong mean also comes into the root
            shift = (width + 1) * u * h.abs().mean(-1, keepdim=True) * rinv
            bound = bound + 2 * shift * (gamma.abs() + (gamma * x).abs())
        found.append(bound)
    return found


@norms
def test_stays_within_the_bound_on_random_values(backend: Backend, norm: str) -> None:
    for dtype, scales in each(backend):
        for shape in shapes_of(backend):
            mix = make(shape, dtype, backend, norm=norm, scales=scales)
            got, formula = mix.run()[0], mix.wide().run(reference)[0]
            w = mix.wide().weights.abs()
            parts = [w[..., e, None] * b for e, b in enumerate(norm_bound(mix, shape[1]))]
            sums = torch.float64 if dtype == torch.float64 else torch.float32
            each_n = replace(mix.wide(), weights=torch.ones_like(w))
            total = sum(
                w[..., e, None]
                * reference.depth_norm(
                    each_n.hiddens[e], each_n.gammas[e], mix.eps, each_n.betas[e], norm
                ).abs()
                for e in range(shape[2])
            )
            allowed = sum(parts) + (shape[2] + 2) * unit(sums) * total
            allowed = allowed + unit(dtype) * (formula.abs() + allowed)
            tiny = torch.finfo(dtype).smallest_normal * unit(dtype)
            assert ((got.cpu().double() - formula).abs() <= allowed + tiny).all(), (dtype, shape)


@norms
def test_a_router_agrees_with_the_formula(backend: Backend, norm: str) -> None:
    for dtype, scales in each(backend):
        for shape in SMALL if backend.small else [*SMALL, *LARGE[:3]]:
            mix = make(shape, dtype, backend, norm=norm, scales=scales, routed=True)
            (u, w), formula = mix.run(), mix.wide().run(reference)
            sums = torch.float64 if dtype == torch.float64 else torch.float32
            assert w.dtype == sums and u.dtype == dtype
            # A logit errs by the terms of its row; so, relatively, does a weight.
            near = 4 * (shape[1] + 16) * unit(sums)
            assert torch.allclose(w.cpu().double(), formula[1], rtol=near, atol=0)
            assert torch.allclose(w.sum(-1), torch.ones_like(w[..., 0]), rtol=8 * unit(sums))
            largest = formula[0].abs().max().item() if formula[0].numel() else 0.0
            near = near * 8 * largest + unit(dtype) * largest
            assert torch.allclose(u.cpu().double(), formula[0], rtol=0, atol=near), (dtype, shape)


def test_a_router_mixes_as_its_weights_would(backend: Backend) -> None:
    for dtype, scales in each(backend):
        mix = make(((7,), 48, 3), dtype, backend, scales=scales, routed=True)
        u, w = mix.run()
        (other,) = replace(mix, router=None, bias=None, weights=w).run()
        if backend.is_twin:
            assert_same_bits(u, other)
        else:  # a kernel with a router adds the last depth first
            near = 2 * unit(dtype) * u.abs().max().item() + 1e-5
            assert torch.allclose(u.float(), other.float(), rtol=0, atol=near)


def test_depths_may_change_places(backend: Backend) -> None:
    mix = make(((9,), 72, 4), torch.float32, backend)
    order = [2, 0, 3, 1]
    other = replace(
        mix,
        hiddens=[mix.hiddens[e] for e in order],
        gammas=[mix.gammas[e] for e in order],
        betas=[mix.betas[e] for e in order] if mix.betas else None,
        weights=mix.weights[:, order],
    )
    assert torch.allclose(mix.run()[0], other.run()[0], rtol=1e-5, atol=1e-5)


def test_the_size_of_a_hidden_state_does_not_count(backend: Backend) -> None:
    mix = replace(make(((9,), 72, 3), torch.float32, backend), eps=0.0)
    other = replace(mix, hiddens=[h * 2.0 ** (e - 1) for e, h in enumerate(mix.hiddens)])
    assert_same_bits(mix.run()[0], other.run()[0])


# --- gradients ----------------------------------------------------------------------------------
@norms
@pytest.mark.parametrize("betas", [False, True], ids=["plain", "betas"])
def test_gradients_equal_the_formula_bit_for_bit_where_norms_are_exact(
    backend: Backend, norm: str, betas: bool
) -> None:
    for dtype, scales in each(backend):
        for shape in POWERS:
            if norm == "layer" and shape[1] == 1:
                continue
            if backend.small and shape[1] > 100:
                continue
            mix = make(shape, dtype, backend, norm=norm, scales=scales, betas=betas, exact=True)
            up = upstream(mix, exact=True)
            formula = gradients(mix.wide(), [t.cpu().double() for t in up], reference)
            for mine, exact, of in zip(gradients(mix, up), formula, mix.tensors(), strict=True):
                assert_same_bits(mine, exact.to(of.dtype), f"{shape} {dtype}: ")


def near_formula(mix: Mix, what: object) -> None:
    """Gradients within a multiple of the terms that are added up, of the largest of each kind."""
    up = upstream(mix)
    formula = gradients(mix.wide(), [t.cpu().double() for t in up], reference)
    h = mix.hiddens[0]
    sums = torch.float64 if h.dtype == torch.float64 else torch.float32
    # Terms of a row, then of rows: each sum errs by no more than a unit a term of its largest.
    terms = h.shape[-1] + math.prod(h.shape[:-1]) + 32
    for mine, exact, of in zip(gradients(mix, up), formula, mix.tensors(), strict=True):
        assert mine.dtype == of.dtype and mine.shape == of.shape
        if mine.numel() == 0:
            continue
        largest = exact.abs().max().item()
        allowed = (4 * terms * unit(sums) + unit(of.dtype)) * largest + 1e-6 * unit(of.dtype)
        assert (mine.cpu().double() - exact).abs().max().item() <= allowed, what


@norms
def test_gradients_agree_with_the_formula(backend: Backend, norm: str) -> None:
    for dtype, scales in each(backend):
        for shape in SMALL if backend.small else [*SMALL, *LARGE[:-1]]:
            if shape[1] <= (3 if norm == "layer" else 1):
                continue  # a norm of so few numbers is all but constant: nothing but cancellation
            near_formula(make(shape, dtype, backend, norm=norm, scales=scales), (dtype, shape))


@norms
def test_gradients_of_a_router_agree_with_the_formula(backend: Backend, norm: str) -> None:
    for dtype, scales in each(backend):
        for shape in SMALL[2:] if backend.small else [*SMALL[2:], *LARGE[:3]]:
            mix = make(shape, dtype, backend, norm=norm, scales=scales, routed=True)
            near_formula(mix, (dtype, shape))


def test_a_router_hears_of_both_results(backend: Backend) -> None:
    mix = make(((6,), 40, 3), torch.float32, backend, routed=True)
    up = upstream(mix)
    both = gradients(mix, up)
    for t, of_mix, of_weights in zip(
        both,
        gradients(mix, [up[0], torch.zeros_like(up[1])]),
        gradients(mix, [torch.zeros_like(up[0]), up[1]]),
        strict=True,
    ):
        assert torch.allclose(t, of_mix + of_weights, rtol=1e-4, atol=1e-5)
    live = mix.map(lambda t: t.detach().clone().requires_grad_())
    w = live.run()[1]
    assert live.router is not None
    (alone,) = torch.autograd.grad(w, live.router, up[1])
    expected = gradients(mix, [torch.zeros_like(up[0]), up[1]])[-2]
    assert_same_bits(alone, expected)


@norms
@pytest.mark.parametrize("routed", [False, True], ids=["weights", "router"])
def test_gradcheck_in_float64(norm: str, routed: bool) -> None:
    mix = make(((3, 2), 5, 3), torch.float64, norm=norm, routed=routed)
    live = [t.requires_grad_() for t in mix.tensors()]

    def run(*values: Tensor) -> tuple[Tensor, ...]:
        h, gammas, betas, *last = values[:3], values[3:6], values[6:9], *values[9:]
        if routed:
            return ops.depth_mix_routed(h, gammas, *last, mix.eps, betas, norm)
        return (ops.depth_mix(h, gammas, *last, mix.eps, betas, norm),)

    assert torch.autograd.gradcheck(run, live)


def test_gradients_come_to_those_that_ask_alone(backend: Backend) -> None:
    mix = make(((5,), 24, 3), torch.float32, backend)
    up = upstream(mix)
    all_of_them = gradients(mix, up)
    for at in range(len(all_of_them)):
        live = mix.map(lambda t: t.detach().clone())
        asked = live.tensors()[at].requires_grad_()
        (got,) = torch.autograd.grad(live.run(), asked, up)
        assert_same_bits(got, all_of_them[at])


def test_one_tensor_of_gammas_is_as_good_as_its_rows(backend: Backend) -> None:
    mix = make(((5,), 24, 3), torch.bfloat16, backend, scales=torch.bfloat16)
    assert mix.betas is not None
    gammas = torch.stack(mix.gammas).requires_grad_()
    betas = torch.stack(mix.betas).requires_grad_()
    u = ops.depth_mix(mix.hiddens, gammas, mix.weights, mix.eps, betas)
    assert_same_bits(u, mix.run()[0])
    up = upstream(mix)
    found = torch.autograd.grad(u, (gammas, betas), up)
    each_alone = gradients(mix, up)
    for got, expected in zip([*found[0], *found[1]], each_alone[3:9], strict=True):
        assert_same_bits(got, expected)


def test_the_forward_keeps_two_numbers_a_row_and_depth_at_most() -> None:
    for norm, routed, extra in [("rms", False, 1), ("layer", False, 2), ("layer", True, 3)]:
        mix = make(((6,), 40, 3), torch.float32, norm=norm, routed=routed)
        mix = mix.map(lambda t: t.requires_grad_())
        given = {t.data_ptr() for t in mix.tensors()}
        kept: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, kept=kept: (kept.append(t), t)[1], lambda t: t
        ):
            mix.run()
        assert sum(t.numel() for t in kept if t.data_ptr() not in given) == extra * 6 * 3


def test_is_differentiable_once() -> None:
    mix = make(((5,), 24, 3), torch.float32).map(lambda t: t.requires_grad_())
    with pytest.raises(RuntimeError, match="gradient of depth_mix is not itself differentiable"):
        torch.autograd.grad(mix.run(), mix.tensors(), upstream(mix), create_graph=True)


# --- layouts --------------------------------------------------------------------------------------
def strided(t: Tensor) -> Tensor:
    """The same values, rows further apart, at an address that is not aligned."""
    wide = t.new_full((*t.shape[:-1], t.shape[-1] + 3), float("nan"))
    wide[..., 1:-2] = t
    return wide[..., 1:-2]


def transposed(t: Tensor) -> Tensor:
    """The same values, the elements of a row apart."""
    return t.transpose(0, -1).contiguous().transpose(0, -1)


def last_token(t: Tensor) -> Tensor:
    """The same values as the last position of a longer sequence."""
    longer = t.new_full((t.shape[0], 3, *t.shape[1:]), float("nan"))
    longer[:, -1] = t
    return longer[:, -1]


@pytest.mark.parametrize("layout", [strided, transposed, last_token])
@pytest.mark.parametrize("routed", [False, True], ids=["weights", "router"])
def test_layouts_change_no_more_than_an_address_may(
    backend: Backend, layout: Callable[[Tensor], Tensor], routed: bool
) -> None:
    """Of twins no bit; kernels take rows that are not aligned another way."""
    for dtype, scales in each(backend):
        for shape in [((5,), 24, 3), ((20,), 40, 2), ((3,), 33, 4)]:
            mix = make(shape, dtype, backend, scales=scales, routed=routed)
            other = mix.map(layout)
            up = upstream(mix)
            pairs = [*zip(mix.run(), other.run(), strict=True)]
            pairs += zip(gradients(mix, up), other_gradients(other, up), strict=True)
            for expected, got in pairs:
                if backend.is_twin or layout is not strided:
                    assert_same_bits(got, expected, f"{shape} {dtype}: ")
                else:
                    near = 2 * unit(expected.dtype) * expected.abs().max().item() + 1e-5
                    assert torch.allclose(got.cpu(), expected.cpu(), rtol=0, atol=near)


def other_gradients(mix: Mix, ups: Sequence[Tensor]) -> list[Tensor]:
    """:func:`gradients` without the copies that would straighten a layout."""
    mix = mix.map(lambda t: t.detach().requires_grad_())
    return list(torch.autograd.grad(mix.run(), mix.tensors(), list(ups)))


def test_expanded_arguments_count_as_the_values_that_they_show(backend: Backend) -> None:
    mix = make(((5,), 24, 2), torch.float32, backend)
    shown = replace(
        mix,
        hiddens=[mix.hiddens[0][:1].expand(5, 24), mix.hiddens[1][:, :1].expand(5, 24)],
        weights=mix.weights[:1].expand(5, 2),
        gammas=[mix.gammas[0], mix.gammas[1][:1].expand(24)],
    )
    assert_same_bits(shown.run()[0], shown.map(lambda t: t.contiguous()).run()[0])


def test_a_gradient_may_be_expanded(backend: Backend) -> None:
    mix = make(((5,), 24, 2), torch.float32, backend)
    ones = [torch.ones_like(t) for t in mix.run()]
    live = mix.map(lambda t: t.detach().clone().requires_grad_())
    got = torch.autograd.grad(live.run()[0].sum(), live.tensors())
    for mine, expected in zip(got, gradients(mix, ones), strict=True):
        assert_same_bits(mine, expected)


# --- same input, same bits ------------------------------------------------------------------------
@pytest.mark.parametrize("routed", [False, True], ids=["weights", "router"])
def test_a_rows_bits_do_not_depend_on_its_batch(backend: Backend, routed: bool) -> None:
    for dtype, scales in each(backend):
        for width in (40, 33):
            mix = make(((7,), width, 3), dtype, backend, scales=scales, routed=routed)
            up = upstream(mix)
            together, found = mix.run(), gradients(mix, up)
            for rows in (slice(0, 1), slice(3, 6), slice(6, 7)):
                part = replace(
                    mix, hiddens=[h[rows] for h in mix.hiddens], weights=mix.weights[rows]
                )
                for got, expected in zip(part.run(), together, strict=True):
                    assert_same_bits(got, expected[rows])
                some = gradients(part, [t[rows] for t in up])
                for got, expected in zip(some[:3], found[:3], strict=True):
                    assert_same_bits(got, expected[rows])


@pytest.mark.parametrize("routed", [False, True], ids=["weights", "router"])
def test_no_bit_depends_on_the_threads(routed: bool) -> None:
    threads = torch.get_num_threads()
    for shape in [((2, 17), 576, 3), ((4200,), 8, 2), ((100,), 257, 3)]:
        mix = make(shape, torch.float32, routed=routed)
        up = upstream(mix)
        try:
            results = []
            for count in (1, 2, 3, 7):
                torch.set_num_threads(count)
                results.append([*mix.run(), *gradients(mix, up)])
        finally:
            torch.set_num_threads(threads)
        for one, *others in zip(*results, strict=True):
            for other in others:
                assert_same_bits(one, other)


def test_twice_gives_the_same_bits(backend: Backend) -> None:
    mix = make(((20,), 72, 3), torch.bfloat16, backend, routed=True)
    up = upstream(mix)
    for one, other in zip(
        [*mix.run(), *gradients(mix, up)], [*mix.run(), *gradients(mix, up)], strict=True
    ):
        assert_same_bits(one, other)


# --- nothing, and not a number --------------------------------------------------------------------
@pytest.mark.parametrize("routed", [False, True], ids=["weights", "router"])
def test_no_rows(backend: Backend, routed: bool) -> None:
    mix = make(((2, 0), 24, 3), torch.float32, backend, routed=routed)
    live = mix.map(lambda t: t.detach().clone().requires_grad_())
    u = live.run()[0]
    assert u.shape == (2, 0, 24)
    u.sum().backward()
    for t in live.tensors():
        assert t.grad is not None and t.grad.shape == t.shape and (t.grad == 0).all()


@norms
def test_a_row_of_zeros_gives_the_betas_and_finite_gradients(backend: Backend, norm: str) -> None:
    mix = make(((3,), 24, 2), torch.float32, backend, norm=norm)
    assert mix.betas is not None
    mix = replace(mix, hiddens=[torch.zeros_like(h) for h in mix.hiddens])
    (u,) = mix.run()
    w, (first, second) = mix.weights, mix.betas
    assert torch.allclose(u, w[:, :1] * first + w[:, 1:] * second, rtol=1e-6, atol=1e-6)
    assert all(t.isfinite().all() for t in gradients(mix, upstream(mix)))
    plain = replace(mix, betas=None)
    assert (plain.run()[0] == 0).all()
    assert replace(plain, eps=0.0).run()[0].isnan().all()  # 0 / 0, as the formula says


def test_what_is_not_finite_stays_in_its_row_whatever_its_weight(backend: Backend) -> None:
    """A weight of zero is a factor: zero times NaN is NaN, as in the formula."""
    for wrong in (math.nan, math.inf):
        mix = make(((5,), 24, 2), torch.float32, backend)
        mix.hiddens[1][2, 7] = wrong
        mix.weights[2, 1] = 0
        (u,), (formula,) = mix.run(), mix.wide().run(reference)
        assert torch.equal(u.cpu().isnan(), formula.isnan())
        assert u[2].isnan().any() and u[[0, 1, 3, 4]].isfinite().all()


def test_a_gamma_that_is_not_finite_stays_in_its_column(backend: Backend) -> None:
    mix = make(((5,), 24, 2), torch.float32, backend)
    mix.gammas[1][7] = math.nan
    (u,) = mix.run()
    assert u[:, 7].isnan().all() and u.isnan().sum() == 5


# --- autocast, tracing, faults --------------------------------------------------------------------
def test_autocast_leaves_them_alone(backend: Backend) -> None:
    for routed in (False, True):
        mix = make(((5,), 24, 3), torch.float32, backend, routed=routed)
        expected = mix.run()
        with torch.autocast(backend.device, torch.bfloat16):
            for got, one in zip(mix.run(), expected, strict=True):
                assert_same_bits(got, one)
    live = mix.map(lambda t: t.detach().clone().requires_grad_())
    with torch.autocast(backend.device, torch.bfloat16):
        u = live.run()[0]
        half = replace(live, hiddens=[h.bfloat16() for h in live.hiddens]).run()[0]
    assert u.dtype == torch.float32 and half.dtype == torch.bfloat16
    (u.sum() + half.float().sum()).backward()
    assert all(t.grad is not None and t.grad.dtype == torch.float32 for t in live.tensors())


def test_weights_may_be_narrower_than_sums(backend: Backend) -> None:
    mix = make(((5,), 24, 3), torch.bfloat16, backend, scales=torch.bfloat16)
    narrow = replace(mix, weights=mix.weights.bfloat16())
    wide = replace(mix, weights=narrow.weights.float())
    assert_same_bits(narrow.run()[0], wide.run()[0])
    assert gradients(narrow, upstream(narrow))[-1].dtype == torch.bfloat16


def test_gammas_of_several_dtypes_count_as_float32(backend: Backend) -> None:
    mix = make(((5,), 24, 3), torch.bfloat16, backend, scales=torch.bfloat16)
    mixed = replace(mix, gammas=[mix.gammas[0].float(), mix.gammas[1].half(), mix.gammas[2]])
    wide = replace(mixed, gammas=[t.float() for t in mixed.gammas])
    assert_same_bits(mixed.run()[0], wide.run()[0])
    found = gradients(mixed, upstream(mixed))[3:6]
    assert [t.dtype for t in found] == [torch.float32, torch.float16, torch.bfloat16]


def test_inference_mode_changes_no_bit(backend: Backend) -> None:
    mix = make(((5,), 24, 3), torch.float32, backend, routed=True)
    expected = mix.run()
    with torch.inference_mode():
        for got, one in zip(mix.map(lambda t: t.clone()).run(), expected, strict=True):
            assert_same_bits(got, one)


def test_a_tangent_is_refused(backend: Backend) -> None:
    mix = make(((5,), 24, 3), torch.float32, backend)
    with torch.autograd.forward_ad.dual_level():
        h = torch.autograd.forward_ad.make_dual(mix.hiddens[1], torch.ones_like(mix.hiddens[1]))
        with pytest.raises(NotImplementedError, match="depth_mix has no forward-mode derivative"):
            replace(mix, hiddens=[mix.hiddens[0], h, mix.hiddens[2]]).run()


@pytest.mark.parametrize("routed", [False, True], ids=["weights", "router"])
def test_passes_opcheck(routed: bool) -> None:
    for dtype, scales, norm in [
        (torch.float32, torch.float32, "rms"),
        (torch.bfloat16, torch.float32, "layer"),
        (torch.float64, torch.float64, "layer"),
    ]:
        mix = make(((2, 3), 24, 3), dtype, scales=scales, norm=norm, routed=routed)
        mix = mix.map(lambda t: t.requires_grad_())
        last = (None, mix.router, mix.bias) if routed else (mix.weights, None, None)
        args = (mix.hiddens, mix.gammas, mix.betas, *last, mix.eps, norm)
        torch.library.opcheck(torch.ops.lora_ext.depth_mix_forward.default, args)
        plain = mix.map(lambda t: t.detach())
        _, chosen, rinv, mean = torch.ops.lora_ext.depth_mix_forward.default(
            plain.hiddens,
            plain.gammas,
            plain.betas,
            *((None, plain.router, plain.bias) if routed else (plain.weights, None, None)),
            mix.eps,
            norm,
        )
        up = [t.detach() for t in upstream(plain)]
        for need in (True, False):
            torch.library.opcheck(
                torch.ops.lora_ext.depth_mix_backward.default,
                (
                    up[0],
                    up[1] if routed else None,
                    plain.hiddens,
                    plain.gammas,
                    plain.betas,
                    chosen if routed else plain.weights,
                    plain.router,
                    rinv,
                    mean,
                    need,
                ),
            )


@pytest.mark.parametrize("routed", [False, True], ids=["weights", "router"])
def test_compiles_without_a_graph_break(routed: bool) -> None:
    mix = make(((2, 3), 24, 3), torch.float32, routed=routed)

    def loss(h: list[Tensor], gammas: Tensor, *last: Tensor) -> Tensor:
        if routed:
            u, w = ops.depth_mix_routed([2 * t for t in h], gammas, *last, mix.eps)
            return (u.square().sum() + w.square().sum()).sin()
        return ops.depth_mix([2 * t for t in h], gammas, *last, mix.eps).square().sum().sin()

    def run(f: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        live = replace(mix, betas=None).map(lambda t: t.detach().clone().requires_grad_())
        last = (live.router, live.bias) if routed else (live.weights,)
        value = f(live.hiddens, torch.stack(live.gammas), *last)
        return value, *torch.autograd.grad(value, live.tensors())

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for got, expected in zip(run(compiled), run(loss), strict=True):
        assert torch.allclose(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.cuda
def test_a_captured_graph_replays_with_changed_contents(request: pytest.FixtureRequest) -> None:
    if not torch.cuda.is_available() or not lora_ext._C.has_kernels():
        if request.config.getoption("--require-gpu"):
            pytest.fail("--require-gpu: no CUDA device, or a build without kernels")
        pytest.skip("no CUDA device, or a build without kernels")
    backend = Backend("cuda", device="cuda")
    live = make(((40,), 576, 3), torch.bfloat16, backend, routed=True)
    up = upstream(live)
    gradients(live, up)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = live.run()
    for t in live.tensors():
        t.mul_(-0.5).add_(1)
    graph.replay()
    for got, expected in zip(captured, live.run(), strict=True):
        assert_same_bits(got, expected)


def faults(mix: Mix) -> Iterator[tuple[Mix, str]]:
    h, gammas, betas = mix.hiddens, mix.gammas, mix.betas
    assert betas is not None
    yield replace(mix, hiddens=[]), "depth_mix: hiddens: expected 1 to 8 tensors, found 0"
    yield replace(mix, hiddens=h * 3), "depth_mix: hiddens: expected 1 to 8 tensors, found 9"
    yield (
        replace(mix, hiddens=[t[0, 0] for t in h]),
        r"depth_mix: hiddens\[0\]: expected shape \(\.\.\., d\) with d >= 1, found \[\]",
    )
    yield (
        replace(mix, hiddens=[t[:, :0] for t in h]),
        r"depth_mix: hiddens\[0\]: expected shape \(\.\.\., d\) with d >= 1, found \[5, 0\]",
    )
    yield (
        replace(mix, hiddens=[h[0], h[1], h[2][1:]]),
        r"depth_mix: hiddens\[2\]: expected shape of hiddens\[0\] = \[5, 24\], found \[4, 24\]",
    )
    yield (
        replace(mix, hiddens=[h[0], h[1].half(), h[2]]),
        r"depth_mix: hiddens\[1\]: expected the dtype of hiddens\[0\], .*loat.*, found .*",
    )
    yield (
        replace(mix, hiddens=[t.int() for t in h]),
        r"depth_mix: hiddens\[0\]: expected .*float32.*, found .*[iI]nt",
    )
    yield (
        replace(mix, gammas=gammas[:2]),
        "depth_mix: gammas: expected as many as hiddens, 3, found 2",
    )
    yield (
        replace(mix, gammas=[gammas[0], gammas[1][1:], gammas[2]]),
        r"depth_mix: gammas\[1\]: expected shape \(d,\) = \[24\], found \[23\]",
    )
    yield (
        replace(mix, gammas=[gammas[0].double(), *gammas[1:]]),
        r"depth_mix: gammas\[0\]: expected a dtype that .*loat.* holds exactly, found .*ouble|64",
    )
    yield (
        replace(mix, betas=[*betas, betas[0]]),
        "depth_mix: betas: expected as many as hiddens, 3, found 4",
    )
    yield (
        replace(mix, betas=[*betas[:2], betas[2][:7]]),
        r"depth_mix: betas\[2\]: expected shape \(d,\) = \[24\], found \[7\]",
    )
    yield (
        replace(mix, weights=mix.weights[:, :2]),
        r"depth_mix: weights: expected shape \(\.\.\., k\) = \[5, 3\], found \[5, 2\]",
    )
    yield (
        replace(mix, weights=mix.weights.long()),
        r"depth_mix: weights: expected a dtype that .*loat.* holds exactly, found .*",
    )
    yield replace(mix, eps=-1.0), "depth_mix: eps: expected at least 0, found -1"
    yield replace(mix, eps=math.nan), "depth_mix: eps: expected at least 0, found nan"
    yield replace(mix, norm="batch"), "depth_mix: norm: expected 'rms' or 'layer', found 'batch'"


def routed_faults(mix: Mix) -> Iterator[tuple[Mix, str]]:
    assert mix.router is not None and mix.bias is not None
    yield (
        replace(mix, router=mix.router[:2]),
        r"depth_mix_routed: router: expected shape \(k, d\) = \[3, 24\], found \[2, 24\]",
    )
    yield (
        replace(mix, bias=mix.bias[:2]),
        r"depth_mix_routed: bias: expected shape \(k,\) = \[3\], found \[2\]",
    )
    yield (
        replace(mix, hiddens=[*mix.hiddens[:2], mix.hiddens[2][:1]]),
        r"depth_mix_routed: hiddens\[2\]: expected shape of hiddens\[0\]",
    )


def test_wrong_input_is_named(backend: Backend) -> None:
    mix = make(((5,), 24, 3), torch.float32, backend)
    routed = make(((5,), 24, 3), torch.float32, backend, routed=True)
    away = replace(mix, hiddens=[mix.hiddens[0], mix.hiddens[1].to("meta"), mix.hiddens[2]])
    for wrong, message in [*faults(mix), *routed_faults(routed)]:
        with pytest.raises(ValueError, match=message):
            wrong.run()
        with pytest.raises(ValueError, match=message):  # above autograd too
            wrong.map(lambda t: t.requires_grad_() if t.is_floating_point() else t).run()
    with pytest.raises(
        ValueError, match=r"depth_mix: hiddens\[1\]: expected a tensor on .*, found meta"
    ):
        away.run()


def test_the_fake_kernels_refuse_what_the_ops_refuse() -> None:
    mix = make(((5,), 24, 3), torch.float32)
    routed = make(((5,), 24, 3), torch.float32, routed=True)
    meta = mix.map(lambda t: t.to("meta"))
    assert meta.run()[0].shape == (5, 24)
    assert [t.shape for t in routed.map(lambda t: t.to("meta")).run()] == [(5, 24), (5, 3)]
    for wrong, message in [*faults(mix), *routed_faults(routed)]:
        with pytest.raises(ValueError, match=message):
            wrong.map(lambda t: t.to("meta")).run()
