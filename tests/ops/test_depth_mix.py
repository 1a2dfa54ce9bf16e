"""``depth_mix`` with non-finite values, under autocast and tracing, and its errors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from backends import Backend
from cases_depth_mix import Mix, gradients, make, norms, upstream
from contract import assert_same_bits
from torch import Tensor

from lora_ext import ops, reference


# --- empty and non-finite inputs ------------------------------------------------------------------
@pytest.mark.parametrize("routed", [False, True], ids=["weights", "router"])
def test_empty_batch_gives_empty_results(backend: Backend, routed: bool) -> None:
    mix = make(((2, 0), 24, 3), torch.float32, backend, routed=routed)
    live = mix.map(lambda t: t.detach().clone().requires_grad_())
    u = live.run()[0]
    assert u.shape == (2, 0, 24)
    u.sum().backward()
    for t in live.tensors():
        assert t.grad is not None and t.grad.shape == t.shape and (t.grad == 0).all()


@norms
def test_row_of_zeros_gives_the_betas_and_finite_gradients(backend: Backend, norm: str) -> None:
    mix = make(((3,), 24, 2), torch.float32, backend, norm=norm)
    assert mix.betas is not None
    mix = replace(mix, hiddens=[torch.zeros_like(h) for h in mix.hiddens])
    (u,) = mix.run()
    w, (first, second) = mix.weights, mix.betas
    assert torch.allclose(u, w[:, :1] * first + w[:, 1:] * second, rtol=1e-6, atol=1e-6)
    assert all(t.isfinite().all() for t in gradients(mix, upstream(mix)))
    plain = replace(mix, betas=None)
    assert (plain.run()[0] == 0).all()
    assert replace(plain, eps=0.0).run()[0].isnan().all()  # 0 / 0, as in the formula


def test_non_finite_values_affect_only_their_row_whatever_their_weight(backend: Backend) -> None:
    """Check that a row with NaN in a hidden state of weight zero is NaN, as in the formula."""
    for wrong in (math.nan, math.inf):
        mix = make(((5,), 24, 2), torch.float32, backend)
        mix.hiddens[1][2, 7] = wrong
        mix.weights[2, 1] = 0
        (u,), (formula,) = mix.run(), mix.wide().run(reference)
        assert torch.equal(u.cpu().isnan(), formula.isnan())
        assert u[2].isnan().any() and u[[0, 1, 3, 4]].isfinite().all()


def test_non_finite_gamma_affects_only_its_column(backend: Backend) -> None:
    mix = make(((5,), 24, 2), torch.float32, backend)
    mix.gammas[1][7] = math.nan
    (u,) = mix.run()
    assert u[:, 7].isnan().all() and u.isnan().sum() == 5


# --- autocast, tracing, errors --------------------------------------------------------------------
def test_autocast_changes_nothing(backend: Backend) -> None:
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


def test_tangent_raises(backend: Backend) -> None:
    mix = make(((5,), 24, 3), torch.float32, backend)
    with torch.autograd.forward_ad.dual_level():
        h = torch.autograd.forward_ad.make_dual(mix.hiddens[1], torch.ones_like(mix.hiddens[1]))
        with pytest.raises(NotImplementedError, match="depth_mix has no forward-mode derivative"):
            replace(mix, hiddens=[mix.hiddens[0], h, mix.hiddens[2]]).run()


@pytest.mark.slow
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
        "depth_mix: gammas: expected 3 tensors, as hiddens, found 2",
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
        "depth_mix: betas: expected 3 tensors, as hiddens, found 4",
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


def test_wrong_input_raises(backend: Backend) -> None:
    mix = make(((5,), 24, 3), torch.float32, backend)
    routed = make(((5,), 24, 3), torch.float32, backend, routed=True)
    away = replace(mix, hiddens=[mix.hiddens[0], mix.hiddens[1].to("meta"), mix.hiddens[2]])
    for wrong, message in [*faults(mix), *routed_faults(routed)]:
        with pytest.raises(ValueError, match=message):
            wrong.run()
        with pytest.raises(ValueError, match=message):  # The op raises with autograd too.
            wrong.map(lambda t: t.requires_grad_() if t.is_floating_point() else t).run()
    with pytest.raises(
        ValueError, match=r"depth_mix: hiddens\[1\]: expected a tensor on .*, found meta"
    ):
        away.run()


def test_fake_kernels_raise_like_the_ops() -> None:
    mix = make(((5,), 24, 3), torch.float32)
    routed = make(((5,), 24, 3), torch.float32, routed=True)
    meta = mix.map(lambda t: t.to("meta"))
    assert meta.run()[0].shape == (5, 24)
    assert [t.shape for t in routed.map(lambda t: t.to("meta")).run()] == [(5, 24), (5, 3)]
    for wrong, message in [*faults(mix), *routed_faults(routed)]:
        with pytest.raises(ValueError, match=message):
            wrong.map(lambda t: t.to("meta")).run()
