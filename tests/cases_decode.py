"""Inputs, error bounds and table row of the decoding ops."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from contract import Check, Op, Outputs, wide
from torch import Tensor

from lora_ext import ops, reference
from lora_ext.reference._circuit import CircuitSample, log_softmax, num_transitions

Inputs = dict[str, Any]
# Two devices may draw different tokens if a uniform number is this close to the border between two
# tokens, relative to the sum of all weights.
BAND = 1e-5


@dataclass(frozen=True)
class Shape:
    kind: str
    rows: int
    tokens: int  # K, the window length
    components: int
    vocabulary: int

    def __str__(self) -> str:
        return f"{self.kind}-B{self.rows}-K{self.tokens}-C{self.components}-V{self.vocabulary}"


SMALL = [
    Shape("ff", 3, 4, 1, 7),
    Shape("ff", 1, 1, 1, 1),
    Shape("cp", 2, 3, 5, 11),
    Shape("cp", 1, 2, 1, 1),
    Shape("hmm", 3, 4, 5, 9),
    Shape("hmm", 2, 1, 3, 5),
    Shape("hmm", 0, 3, 2, 4),
    Shape("btree", 2, 5, 4, 6),
    Shape("btree", 2, 2, 3, 17),
    Shape("btree", 2, 7, 3, 33),
    # Kernels verify drafts of this shape, the next one and MEDIUM[-2:] with a grid of blocks.
    Shape("cp", 2, 2, 3, 6001),
    Shape("ff", 1, 1, 1, 11264),
]
MEDIUM = [
    Shape("ff", 4, 8, 1, 320),
    Shape("cp", 3, 8, 33, 259),
    Shape("hmm", 5, 8, 32, 320),
    Shape("hmm", 2, 4, 130, 40),
    Shape("btree", 2, 9, 40, 321),
    # For this shape and the next, a separate kernel computes the log sums of the logits.
    Shape("btree", 1, 4, 16, 3008),
    Shape("hmm", 1, 2, 2, 49152),
]


def make_inputs(
    shape: Shape,
    dtype: torch.dtype,
    *,
    weights: torch.dtype | None = None,
    seed: int = 0,
    exact: bool = False,
    device: str = "cpu",
) -> Inputs:
    """Return all arguments of all ops, by name. A tenth of the logits are -inf, but never the first
    logit of a row.

    If ``exact``, logits are 0 or -inf, the number of zeros in a row is a power of two, and uniforms
    are odd multiples of 2^-18. No uniform is then close to a border between two tokens, so every
    device draws the same token.
    """
    g = torch.Generator().manual_seed(seed)
    b, k, c, v = shape.rows, shape.tokens, shape.components, shape.vocabulary
    sums = torch.float64 if dtype == torch.float64 else torch.float32

    def logits(*size: int, dtype: torch.dtype = dtype) -> Tensor:
        if not exact:
            values = torch.randn(size, generator=g, dtype=torch.float64) * 2
            hidden = torch.rand(size, generator=g) < 0.1
            hidden[..., :1] = False
            return values.masked_fill(hidden, -torch.inf).to(dtype)
        kept = 1 << (size[-1].bit_length() - 1)
        order = torch.rand(size, generator=g).argsort(-1)
        return torch.where(order < kept, 0.0, -torch.inf).to(dtype)

    def uniform(*size: int) -> Tensor:
        if not exact:
            return torch.rand(size, generator=g, dtype=sums)
        return (2 * torch.randint(0, 1 << 17, size, generator=g) + 1) / 2.0**18

    weights = weights or dtype
    evidence = torch.full((b, k), -1)
    x = torch.randint(-1, v, (b, k), generator=g)
    # Evidence tokens must be possible. The likeliest token of component 0 always is, because the
    # first logit of a row is never -inf.
    given = torch.arange(k) < torch.randint(0, k + 1, (b, 1), generator=g)
    leaf = logits(b, k, c, v)
    possible = leaf[:, :, 0].argmax(-1)
    inputs: Inputs = {
        "kind": shape.kind,
        "leaf": leaf,
        "prior": logits(b, c, dtype=weights),
        "trans": logits(b, num_transitions(shape.kind, k), c, c, dtype=weights),
        "uniforms": uniform(b, k, 2),
        "evidence": torch.where(given, possible, evidence),
        "x": torch.where(x < 0, x, possible),
        "k": torch.randint(0, k, (b,), generator=g),
        "target": logits(b, k + 1, v),
        "accept": uniform(b, k + 1),
        "num_evidence": given.sum(1),
    }
    return {n: t.to(device) if isinstance(t, Tensor) else t for n, t in inputs.items()}


def circuit(i: Inputs) -> tuple[Any, ...]:
    return i["kind"], i["leaf"], i["prior"], i["trans"]


def draft(i: Inputs, sample: CircuitSample) -> tuple[Tensor, ...]:
    """Return the arguments of ``spec_verify`` up to the uniforms."""
    return i["target"], *sample, i["leaf"], i["accept"]


def log_bound(exact: Tensor, dtype: torch.dtype, shape: Shape) -> Tensor:
    """Return the largest |error| of a log-probability.

    Each position adds a shift (|logit - max| below 20), two transitions and a logarithm. Each of
    these values is at most 20 and has a relative error of a few units of 2^-24. Sums of C or V
    terms are accumulated in the lanes of vectors or warps.
    """
    unit = 2.0**-53 if dtype == torch.float64 else 2.0**-24
    sums = (shape.vocabulary**0.5 + shape.components**0.5) / 4
    return unit * (shape.tokens * (60 + sums) + 4 * exact.abs())


def within_band(weights: Tensor, uniform: Tensor, index: Tensor) -> Tensor:
    """Return whether ``uniform`` draws ``index`` from ``weights (..., N)``, up to :data:`BAND`,
    computed in float64."""
    sums = weights.cumsum(-1)
    total = sums[..., -1]
    at = index[..., None]
    above = sums.gather(-1, at).squeeze(-1)
    own = weights.gather(-1, at).squeeze(-1)
    limit, slack = uniform.double() * total, BAND * total
    fits = (above > limit - slack) & (above - own <= limit + slack) & (own > 0)
    return torch.where(total > 0, fits, index == 0)


def sample_within_band(i: Inputs, tokens: Tensor) -> Tensor:
    """Return, for each row, whether its uniforms draw every token of the sample given the tokens
    before it, up to :data:`BAND`."""
    w = wide(i)
    posterior = reference.circuit_scan(*circuit(w), tokens).posterior
    emit = log_softmax(w["leaf"]).exp()  # (B, K, C, V)
    c = posterior.shape[-1]
    u_state, u_token = w["uniforms"].unbind(-1)
    states = torch.arange(c).expand(*tokens.shape, c)
    by_state = within_band(
        posterior[:, :, None].expand(*tokens.shape, c, c),
        u_state[..., None].expand_as(states),
        states,
    )
    by_token = within_band(
        emit, u_token[..., None].expand_as(states), tokens[..., None].expand_as(states)
    )
    return (by_state & by_token).any(-1)


def verify_within_band(
    i: Inputs, sample: CircuitSample, accepted: Tensor, next_token: Tensor, given: Tensor, t: float
) -> Tensor:
    """Return, for each row of a verification, whether its uniforms lead to this result, up to
    :data:`BAND`, computed in float64."""
    w = wide(i)
    rows, n_token = sample.tokens.shape
    row, position = torch.arange(rows), torch.arange(n_token)
    p = log_softmax(w["target"] / t).exp()
    scan = reference.circuit_scan(*circuit(w), sample.tokens)
    at = p[:, :-1].gather(-1, sample.tokens[..., None]).squeeze(-1)
    ratio, u = at / scan.conditional.exp(), w["accept"]
    slack = BAND * (1 + ratio)
    tested = position >= given[:, None]
    kept, stopped = position < accepted[:, None], position == accepted[:, None]
    good = ~(tested & kept & ~(u[:, :-1] < ratio + slack)).any(1)
    good &= ~(stopped & ~(tested & (u[:, :-1] >= ratio - slack))).any(1)
    last = accepted.clamp(max=n_token - 1)
    emit = log_softmax(w["leaf"][row, last]).exp()
    q = (scan.posterior[row, last][..., None] * emit).sum(1)
    whole = p[row, accepted]
    residual = (whole - q).clamp(min=0)
    from_whole = (accepted == n_token) | (residual.sum(-1) == 0)
    weights = torch.where(from_whole[:, None], whole, residual)
    return good & within_band(weights, u[:, -1], next_token)


def run_all(i: Inputs, temperature: float = 0.75) -> Outputs:
    """Return every result of every op, for bitwise comparisons."""
    sample = ops.circuit_sample(*circuit(i), i["uniforms"], i["evidence"])
    accepted, token = ops.spec_verify(*draft(i, sample), i["num_evidence"], temperature)
    greedy = ops.spec_verify(*draft(i, sample), i["num_evidence"], 0.0)
    tokens, value = ops.circuit_argmax(*circuit(i), i["evidence"])
    return {
        "dist": ops.circuit_conditional_dist(*circuit(i), i["x"], i["k"]),
        **sample._asdict(),
        "accepted": accepted,
        "next_token": token,
        "greedy_accepted": greedy[0],
        "greedy_token": greedy[1],
        "argmax": tokens,
        "value": value,
    }


CALLS: dict[str, Callable[[Inputs], tuple[Any, ...]]] = {
    "circuit_conditional_dist": lambda i: (*circuit(i), i["x"], i["k"]),
    "circuit_sample": lambda i: (*circuit(i), i["uniforms"], i["evidence"]),
    "circuit_argmax": lambda i: (*circuit(i), i["evidence"]),
    "spec_verify": lambda i: (
        *draft(i, reference.circuit_sample(*circuit(i), i["uniforms"])),
        i["num_evidence"],
        0.7,
    ),
}


def checks() -> Iterator[Check]:
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        i = make_inputs(Shape("btree", 3, 4, 3, 5), dtype, seed=14)
        yield from ((name, call(i)) for name, call in CALLS.items())


# Draws are compared with BAND instead of a formula: see test_contract_circuit_decode.py.
OPS = [
    Op(
        "decode",
        make_inputs,
        run_all,
        small=SMALL,
        replays=SMALL[2:] + MEDIUM,
        checks=checks,
    )
]
