"""Gradients of mixes of normed hidden states: every law, on every backend."""

from __future__ import annotations

import math

import pytest
import torch
from backends import Backend
from cases_depth_mix import LARGE, POWERS, SMALL, Mix, each, gradients, make, norms, unit, upstream
from contract import assert_same_bits
from torch import Tensor

from lora_ext import ops, reference


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


@pytest.mark.slow
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
