"""Draws of tokens whose weights are small compared with the cumulative sum, and impossible
drafts."""

from __future__ import annotations

import pytest
import torch
from backends import Backend

from lora_ext import ops, reference
from lora_ext.reference._circuit import draw

HEAD, V = 320, 49152  # likely tokens, then a tail with 0.14 % in total
TAIL = 0.0014


def long_tail() -> torch.Tensor:
    """Return logits ``(V,)`` for which each token of the tail has a probability below 2^-25."""
    p = torch.full((V,), TAIL / (V - HEAD), dtype=torch.float64)
    p[:HEAD] = (1 - TAIL) / HEAD
    return p.log().float()


def tail_uniforms(rows: int) -> torch.Tensor:
    return (1 - TAIL) + TAIL * (torch.arange(rows) + 0.5) / rows


def assert_drawn_by_mass(tokens: torch.Tensor, uniforms: torch.Tensor) -> None:
    below = long_tail().double().softmax(-1).cumsum(-1)
    off = (below[tokens.cpu()] - uniforms.double()).abs()
    assert off.max() < 1e-6, f"a token is off its uniform by {off.max():.1e}"
    assert len(tokens.unique()) == len(tokens)


ROWS = 8


def test_sample_reaches_every_token_of_a_long_tail(backend: Backend) -> None:
    leaf = long_tail().to(backend.device).expand(ROWS, 1, 1, V)
    uniforms = torch.stack([torch.full((ROWS,), 0.5), tail_uniforms(ROWS)], -1)[:, None]
    got = ops.circuit_sample("ff", leaf, None, None, uniforms.to(backend.device))
    assert_drawn_by_mass(got.tokens[:, 0], tail_uniforms(ROWS))


def test_verify_reaches_every_token_of_a_long_tail(backend: Backend) -> None:
    target = torch.zeros(ROWS, 2, V)
    target[:, 1] = long_tail()
    device = backend.device
    uniforms = torch.stack([torch.zeros(ROWS), tail_uniforms(ROWS)], -1)
    accepted, token = ops.spec_verify(
        target.to(device),
        torch.zeros(ROWS, 1, dtype=torch.long, device=device),
        torch.full((ROWS, 1), -9.0, device=device),
        torch.ones(ROWS, 1, 1, device=device),
        torch.zeros(1, 1, 1, V, device=device).expand(ROWS, 1, 1, V),
        uniforms.to(device),
    )
    assert (accepted == 1).all()
    assert_drawn_by_mass(token, tail_uniforms(ROWS))


def test_reference_draw_counts_weights_below_the_rounding_of_their_sum() -> None:
    p = torch.full((1, 1 << 12), 2.0**-26)
    p[0, 0] = 1.0
    total = p.double().sum()
    for index in (5, 100, 4095):
        u = ((1 + (index - 0.5) * 2.0**-26) / total).view(1)
        assert int(draw(p, u)) == index


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_draft_of_probability_zero_is_rejected(backend: Backend, temperature: float) -> None:
    """Check evidence that is impossible under the circuit, for which q is 0 and p / q undefined.
    Every draft must be rejected, and the emitted tokens must follow p."""
    rows, v = 64, 4
    target = torch.tensor([0.1, 0.2, 0.3, 0.4]).log().expand(rows, 3, v)
    draft = torch.zeros(rows, 2, dtype=torch.long)
    leaf = torch.zeros(rows, 2, 1, v)
    leaf[:, 0, :, 0] = -torch.inf  # makes the evidence token impossible
    uniforms = torch.stack([torch.zeros(rows), torch.zeros(rows), torch.arange(rows) / rows], -1)
    scan = reference.circuit_scan("ff", leaf, None, None, draft)
    assert (scan.conditional == -torch.inf).all()
    given = torch.ones(rows, dtype=torch.long)
    arguments = (target, draft, scan.conditional, scan.posterior, leaf, uniforms, given)
    on_device = [t.to(backend.device) for t in arguments]
    for verify, args in ((ops.spec_verify, on_device), (reference.spec_verify, arguments)):
        accepted, token = verify(*args, temperature)
        assert (accepted == 1).all()
        p = (target[0, 0] / temperature).softmax(-1)
        law = torch.bincount(token.cpu(), minlength=v) / rows
        assert (law - p).abs().max() <= 1.5 / rows
