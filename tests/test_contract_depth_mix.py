"""Mixes of normed hidden states, with and without a router, compared with the formula."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from backends import Backend
from cases_depth_mix import (
    LARGE,
    POWERS,
    SMALL,
    Mix,
    each,
    gradients,
    make,
    norms,
    shapes_of,
    unit,
    upstream,
)
from contract import assert_same_bits, strided, transposed
from torch import Tensor

from lora_ext import ops, reference


def test_mix_of_small_vectors_has_the_known_value(backend: Backend) -> None:
    h = [torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0, 0.0]])]
    gammas = [torch.tensor([1.0, 2.0]), torch.tensor([1.0, 1.0])]
    mix = Mix(h, gammas, None, torch.tensor([[0.25, 0.75]]), eps=0.0)
    (u,) = mix.map(lambda t: t.to(backend.device)).run()
    assert torch.allclose(u.cpu(), torch.tensor([[1.27279221, 0.56568542]]), rtol=1e-6)


@norms
def test_equals_the_formula_bit_for_bit_if_norms_are_exact(backend: Backend, norm: str) -> None:
    """Check mixes with given weights, and with a router that gives all depths equal weights."""
    for dtype, scales in each(backend):
        for shape in shapes_of(backend):
            if norm == "layer" and shape[1] % 2:
                continue  # Plus and minus signs can have mean zero only at even widths.
            mix = make(shape, dtype, backend, norm=norm, scales=scales, exact=True)
            (got,), (formula,) = mix.run(), mix.wide().run(reference)
            assert got.device == mix.weights.device
            assert_same_bits(got, formula.to(dtype), f"{shape} {dtype}: ")
        for shape in [((5,), 8, 2), ((2, 3), 64, 4), ((3,), 33, 8), ((1,), 5, 1)]:
            mix = make(shape, dtype, backend, scales=scales, routed=True, exact=True)
            for got, formula in zip(mix.run(), mix.wide().run(reference), strict=True):
                assert_same_bits(got, formula.to(got.dtype), f"{shape} {dtype}: ")


def norm_bound(mix: Mix, width: int) -> list[Tensor]:
    """Return the largest |error| of each n_e against float64, before n_e is rounded.

    The sum of a row has at most one rounding per term, and the root halves its relative error. The
    error of a mean is bounded in the same way. Five products and sums follow.
    """
    u = unit(torch.float64 if mix.hiddens[0].dtype == torch.float64 else torch.float32)
    wide, found = mix.wide(), []
    for e, h in enumerate(wide.hiddens):
        mean = h.mean(-1, keepdim=True) if mix.norm == "layer" else torch.zeros(())
        rinv = torch.rsqrt((h - mean).square().mean(-1, keepdim=True) + mix.eps)
        x, gamma = (h - mean) * rinv, wide.gammas[e]
        beta = wide.betas[e].abs() if wide.betas else 0
        bound = (width / 2 + 8) * u * (gamma * x).abs() + 4 * u * beta
        if mix.norm == "layer":  # The error of the mean also changes the root.
            shift = (width + 1) * u * h.abs().mean(-1, keepdim=True) * rinv
            bound = bound + 2 * shift * (gamma.abs() + (gamma * x).abs())
        found.append(bound)
    return found


@norms
def test_errors_on_random_values_stay_within_bounds(backend: Backend, norm: str) -> None:
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
def test_router_agrees_with_the_formula(backend: Backend, norm: str) -> None:
    for dtype, scales in each(backend):
        for shape in SMALL if backend.small else [*SMALL, *LARGE[:3]]:
            mix = make(shape, dtype, backend, norm=norm, scales=scales, routed=True)
            (u, w), formula = mix.run(), mix.wide().run(reference)
            sums = torch.float64 if dtype == torch.float64 else torch.float32
            assert w.dtype == sums and u.dtype == dtype
            # The error of a logit grows with the width. It is the relative error of the weight.
            near = 4 * (shape[1] + 16) * unit(sums)
            assert torch.allclose(w.cpu().double(), formula[1], rtol=near, atol=0)
            assert torch.allclose(w.sum(-1), torch.ones_like(w[..., 0]), rtol=8 * unit(sums))
            largest = formula[0].abs().max().item() if formula[0].numel() else 0.0
            near = near * 8 * largest + unit(dtype) * largest
            assert torch.allclose(u.cpu().double(), formula[0], rtol=0, atol=near), (dtype, shape)


def test_mix_with_a_router_equals_the_mix_with_the_router_weights(backend: Backend) -> None:
    for dtype, scales in each(backend):
        mix = make(((7,), 48, 3), dtype, backend, scales=scales, routed=True)
        u, w = mix.run()
        (other,) = replace(mix, router=None, bias=None, weights=w).run()
        if backend.is_twin:
            assert_same_bits(u, other)
        else:  # With a router, kernels add the last depth first.
            near = 2 * unit(dtype) * u.abs().max().item() + 1e-5
            assert torch.allclose(u.float(), other.float(), rtol=0, atol=near)


def test_depths_may_be_permuted_and_hidden_states_scaled(backend: Backend) -> None:
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
    mix = replace(make(((9,), 72, 3), torch.float32, backend), eps=0.0)
    other = replace(mix, hiddens=[h * 2.0 ** (e - 1) for e, h in enumerate(mix.hiddens)])
    assert_same_bits(mix.run()[0], other.run()[0])


def last_token(t: Tensor) -> Tensor:
    """Return the values as the last position of a longer sequence."""
    longer = t.new_full((t.shape[0], 3, *t.shape[1:]), float("nan"))
    longer[:, -1] = t
    return longer[:, -1]


@pytest.mark.parametrize("layout", [strided, transposed, last_token])
@pytest.mark.parametrize("routed", [False, True], ids=["weights", "router"])
def test_layouts_change_no_bit_of_twins_and_only_rounding_of_kernels(
    backend: Backend, layout: Callable[[Tensor], Tensor], routed: bool
) -> None:
    """Check several layouts; kernels process unaligned rows separately, with other rounding."""
    for dtype, scales in each(backend):
        for shape in [((5,), 24, 3), ((20,), 40, 2), ((3,), 33, 4)]:
            mix = make(shape, dtype, backend, scales=scales, routed=routed)
            other = mix.map(layout)
            up = upstream(mix)
            pairs = [*zip(mix.run(), other.run(), strict=True)]
            pairs += zip(gradients(mix, up), gradients(other, up, copies=False), strict=True)
            for expected, got in pairs:
                if backend.is_twin or layout is not strided:
                    assert_same_bits(got, expected, f"{shape} {dtype}: ")
                else:
                    near = 2 * unit(expected.dtype) * expected.abs().max().item() + 1e-5
                    assert torch.allclose(got.cpu(), expected.cpu(), rtol=0, atol=near)


def test_expanded_arguments_and_gradients_equal_their_copies(
    backend: Backend,
) -> None:
    mix = make(((5,), 24, 2), torch.float32, backend)
    shown = replace(
        mix,
        hiddens=[mix.hiddens[0][:1].expand(5, 24), mix.hiddens[1][:, :1].expand(5, 24)],
        weights=mix.weights[:1].expand(5, 2),
        gammas=[mix.gammas[0], mix.gammas[1][:1].expand(24)],
    )
    assert_same_bits(shown.run()[0], shown.map(lambda t: t.contiguous()).run()[0])
    ones = [torch.ones_like(t) for t in mix.run()]
    expanded = [torch.ones((), device=backend.device).expand_as(t) for t in ones]
    for got, expected in zip(gradients(mix, expanded), gradients(mix, ones), strict=True):
        assert_same_bits(got, expected)


@pytest.mark.parametrize("routed", [False, True], ids=["weights", "router"])
def test_bits_of_a_row_do_not_depend_on_the_batch(backend: Backend, routed: bool) -> None:
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


def test_large_mix_is_bitwise_equal_to_the_mixes_of_its_parts() -> None:
    """Check mixes of at least 4 MiB, which CPU twins write with non-temporal stores (past the
    caches)."""
    for dtype, width in [(torch.float32, 2048), (torch.float32, 2052), (torch.float64, 1040)]:
        mix = make(((520,), width, 2), dtype)
        (together,) = mix.run()
        for start in range(0, 520, 130):
            rows = slice(start, start + 130)
            part = replace(mix, hiddens=[h[rows] for h in mix.hiddens], weights=mix.weights[rows])
            assert_same_bits(part.run()[0], together[rows])


@norms
@pytest.mark.parametrize("betas", [False, True], ids=["plain", "betas"])
def test_gradients_equal_the_formula_bit_for_bit_if_norms_are_exact(
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
    """Compare gradients with the formula. The bound of each gradient is proportional to its number
    of terms and its largest entry."""
    up = upstream(mix)
    formula = gradients(mix.wide(), [t.cpu().double() for t in up], reference)
    h = mix.hiddens[0]
    sums = torch.float64 if h.dtype == torch.float64 else torch.float32
    # The sums are over the entries of a row, then over rows. The error of a sum is at most one unit
    # of its largest term per term.
    terms = h.shape[-1] + math.prod(h.shape[:-1]) + 32
    for mine, exact, of in zip(gradients(mix, up), formula, mix.tensors(), strict=True):
        assert mine.dtype == of.dtype and mine.shape == of.shape
        if mine.numel() == 0:
            continue
        largest = exact.abs().max().item()
        allowed = (4 * terms * unit(sums) + unit(of.dtype)) * largest + 1e-6 * unit(of.dtype)
        assert (mine.cpu().double() - exact).abs().max().item() <= allowed, what


@pytest.mark.slow
@norms
def test_gradients_agree_with_the_formula(backend: Backend, norm: str) -> None:
    for dtype, scales in each(backend):
        for shape in SMALL if backend.small else [*SMALL, *LARGE[:-1]]:
            if shape[1] <= (3 if norm == "layer" else 1):
                continue  # Gradients of the norm of so few numbers are almost 0, by cancellation.
            near_formula(make(shape, dtype, backend, norm=norm, scales=scales), (dtype, shape))


@norms
def test_gradients_of_a_router_agree_with_the_formula(backend: Backend, norm: str) -> None:
    for dtype, scales in each(backend):
        for shape in SMALL[2:] if backend.small else [*SMALL[2:], *LARGE[:3]]:
            mix = make(shape, dtype, backend, norm=norm, scales=scales, routed=True)
            near_formula(mix, (dtype, shape))


def test_router_gradient_is_the_sum_of_the_gradients_of_both_results(backend: Backend) -> None:
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


def test_gradients_are_computed_only_for_tensors_that_require_them(backend: Backend) -> None:
    mix = make(((5,), 24, 3), torch.float32, backend)
    up = upstream(mix)
    all_of_them = gradients(mix, up)
    for at in range(len(all_of_them)):
        live = mix.map(lambda t: t.detach().clone())
        asked = live.tensors()[at].requires_grad_()
        (got,) = torch.autograd.grad(live.run(), asked, up)
        assert_same_bits(got, all_of_them[at])


def test_stacked_gammas_equal_a_list_of_rows(backend: Backend) -> None:
    mix = make(((5,), 24, 3), torch.bfloat16, backend, scales=torch.bfloat16)
    gammas = torch.stack(mix.gammas).requires_grad_()
    betas = torch.stack(mix.betas).requires_grad_()
    u = ops.depth_mix(mix.hiddens, gammas, mix.weights, mix.eps, betas)
    assert_same_bits(u, mix.run()[0])
    up = upstream(mix)
    found = torch.autograd.grad(u, (gammas, betas), up)
    each_alone = gradients(mix, up)
    for got, expected in zip([*found[0], *found[1]], each_alone[3:9], strict=True):
        assert_same_bits(got, expected)


def test_forward_saves_few_numbers_and_is_differentiable_once() -> None:
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
    mix = make(((5,), 24, 3), torch.float32).map(lambda t: t.requires_grad_())
    with pytest.raises(RuntimeError, match="gradient of depth_mix is not itself differentiable"):
        torch.autograd.grad(mix.run(), mix.tensors(), upstream(mix), create_graph=True)
