"""Probabilistic circuits with parameters that a network computes per row, one formula per function.

A circuit is a normalised joint distribution over a window of ``K`` tokens.

Letters: ``B`` rows, ``K`` positions of the window, ``C`` components (states of a latent), ``V``
vocabulary, ``M`` transition matrices.

=========  =====  ==================================================================================
kind       M      joint distribution
=========  =====  ==================================================================================
``ff``     0      ``prod_k leaf_k(x_k)``; fully factorised, ``C = 1``
``cp``     0      ``sum_z prior_z prod_k leaf_{k,z}(x_k)``; one latent for the whole window
``hmm``    K - 1  chain of latents; ``trans_k[z, z']`` is the transition from state k to k + 1
``btree``  K - 2  balanced binary tree with one latent per inner node, on which both children
                  depend; ``trans_m[z, z']`` is the transition from a parent to inner node m, in
                  pre-order without the root
=========  =====  ==================================================================================

Logits are normalised over their last axis: ``prior (B, C)``, ``trans (B, M, C, C)`` and
``leaf (B, K, C, V)``. Logits may be ``-inf``; a row of only ``-inf`` stays ``-inf``. Impossible
events have log-probability ``-inf`` and gradient zero, never NaN.

Source: "Fast and Expressive Multi-Token Prediction with Probabilistic Circuits" (arXiv 2511.11346).
Our choice: a scan from left to right, which takes one pass for all prefixes (docs/circuits.md).
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ._lora import accumulator

KINDS = ("ff", "cp", "hmm", "btree")


class CircuitScan(NamedTuple):
    """Result of one pass over a window.

    Attributes:
        prefix: ``log p(x_1 .. x_k)``, ``(B, K)``; the last column is the joint log-probability.
        conditional: ``log p(x_k | x_<k)``, ``(B, K)``; ``-inf`` if the prefix is impossible.
        posterior: ``p(state at k | x_<k)``, ``(B, K, C)``; it sums to one over the states, or is
            zero if the prefix is impossible.
    """

    prefix: Tensor
    conditional: Tensor
    posterior: Tensor


class CircuitSample(NamedTuple):
    """Drafted window with the values that its verification needs.

    Attributes:
        tokens: Drafted tokens, ``(B, K)`` int64.
        conditional: ``log q(x_k | x_<k)``, ``(B, K)``, for the circuit's distribution q.
        posterior: ``q(state at k | x_<k)``, ``(B, K, C)``, as in :class:`CircuitScan`.
    """

    tokens: Tensor
    conditional: Tensor
    posterior: Tensor


def num_transitions(kind: str, n_token: int) -> int:
    """Return ``M``, the number of transition matrices of a window of ``n_token`` positions."""
    return {"ff": 0, "cp": 0, "hmm": n_token - 1, "btree": max(n_token - 2, 0)}[kind]


def left_size(length: int) -> int:
    """Return the number of positions of the left child of a tree node of ``length`` positions.

    This is ``length / 2``, rounded to the even neighbour if it is not an integer.
    """
    return round(length / 2)


def logsumexp(t: Tensor, dim: int = -1) -> Tensor:
    """Compute ``log sum exp(t)``.

    If all entries are ``-inf``, the result is ``-inf`` with gradient zero.
    """
    top = t.amax(dim, keepdim=True).detach()
    top = torch.where(top == -torch.inf, 0, top)
    total = (t - top).exp().sum(dim, keepdim=True)
    possible = total > 0
    value = torch.where(possible, torch.where(possible, total, 1).log() + top, -torch.inf)
    return value.squeeze(dim)


def log_softmax(logits: Tensor) -> Tensor:
    """Compute the log-softmax over the last axis; a row of only ``-inf`` stays unchanged."""
    norm = logsumexp(logits)[..., None]
    return torch.where(norm == -torch.inf, -torch.inf, logits - torch.where(norm.isinf(), 0, norm))


def _observe(leaf: Tensor, x: Tensor) -> Tensor:
    """Gather log-probabilities ``leaf (B, ..., V)`` at tokens ``x``; 0 if a token is -1."""
    index = x.clamp(min=0)[..., None, None].expand(*leaf.shape[:-1], 1)
    return torch.where(x[..., None] < 0, 0, leaf.gather(-1, index).squeeze(-1))


def _walk(
    kind: str, n_token: int, prior: Tensor, trans: Tensor, observe: Callable[[int, Tensor], Tensor]
) -> None:
    """Call ``observe`` for all positions from left to right.

    ``observe(k, cur)`` receives ``cur (B, C) = log p(state at k, x_<k)`` and returns
    ``e (B, C) = log p(x_k | state)``, from which the next ``cur`` is computed.
    """

    def visit(lo: int, hi: int, cur: Tensor, node: int) -> tuple[Tensor, int]:
        """Call ``observe`` for the positions ``[lo, hi)`` of a tree node.

        Return ``log p(tokens | state)`` of the node, and the index of the next node in pre-order.
        """
        up = torch.zeros_like(cur)
        middle = lo + left_size(hi - lo)
        for first, last in ((lo, middle), (middle, hi)):
            if last - first == 1:
                u = observe(first, cur)
            else:
                step = trans[:, node]
                child = logsumexp(cur[:, :, None] + step, 1)
                below, node = visit(first, last, child, node + 1)
                u = logsumexp(step + below[:, None], 2)
            cur, up = cur + u, up + u
        return up, node

    if kind == "btree" and n_token > 1:
        visit(0, n_token, prior, 0)
        return
    cur = prior
    for k in range(n_token):
        if k > 0 and kind == "hmm":
            cur = logsumexp(cur[:, :, None] + trans[:, k - 1], 1)
        cur = cur + observe(k, cur)


def _normalised(leaf: Tensor, prior: Tensor | None, trans: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the log-probabilities of prior and transitions, float32 (float64 for float64)."""
    dtype = accumulator(leaf.dtype)
    rows, components = leaf.shape[0], leaf.shape[2]
    if prior is None:  # All components are equally likely.
        prior = leaf.new_zeros(rows, components)
    if trans is None:
        trans = leaf.new_zeros(rows, 0, components, components)
    return log_softmax(prior.to(dtype)), log_softmax(trans.to(dtype))


def circuit_scan(
    kind: str,
    leaf: Tensor,
    prior: Tensor | None = None,
    trans: Tensor | None = None,
    x: Tensor | None = None,
) -> CircuitScan:
    """Compute the result of :func:`lora_ext.ops.circuit_scan`, one position at a time."""
    e = leaf.to(accumulator(leaf.dtype))
    if x is not None:
        e = _observe(log_softmax(e), x)
    n_token = e.shape[1]
    log_prior, log_trans = _normalised(e, prior, trans)
    prefix: list[Tensor] = []
    conditional: list[Tensor] = []
    posterior: list[Tensor] = []

    def observe(k: int, cur: Tensor) -> Tensor:
        state = log_softmax(cur)
        prefix.append(logsumexp(cur + e[:, k]))
        conditional.append(logsumexp(state + e[:, k]))
        posterior.append(state.exp())
        return e[:, k]

    _walk(kind, n_token, log_prior, log_trans, observe)
    return CircuitScan(
        torch.stack(prefix, 1), torch.stack(conditional, 1), torch.stack(posterior, 1)
    )


def _mixture(posterior: Tensor, leaf: Tensor) -> Tensor:
    """Compute ``log sum_z posterior[z] softmax(leaf[z])``, ``(B, V)``."""
    return logsumexp(posterior.log()[:, :, None] + log_softmax(leaf), 1)


def circuit_conditional_dist(
    kind: str, leaf: Tensor, prior: Tensor | None, trans: Tensor | None, x: Tensor, k: Tensor
) -> Tensor:
    """Compute ``log q(. | x_<k)`` at the position ``k (B,)`` of each row, ``(B, V)``."""
    rows = torch.arange(leaf.shape[0], device=leaf.device)
    posterior = circuit_scan(kind, leaf, prior, trans, x).posterior
    return _mixture(posterior[rows, k], leaf[rows, k].to(posterior.dtype))


def draw(p: Tensor, uniform: Tensor) -> Tensor:
    """Draw an index with probability proportional to its weight.

    The result is the smallest index with a positive weight and a running sum above
    ``uniform * total``; the last index with a positive weight if rounding leaves no such sum; or 0
    if all weights are zero. Sums are float64, so that small weights after large ones are not lost.

    Args:
        p: Weights ``(B, N)`` of N indices.
        uniform: Uniform numbers ``(B,)`` in [0, 1).

    Returns:
        ``(B,)`` int64.
    """
    sums = p.double().cumsum(-1)
    hit = (sums > uniform[:, None].double() * sums[:, -1:]) & (p > 0)
    last = p.shape[1] - 1 - (p > 0).flip(-1).int().argmax(-1)
    return torch.where(hit.any(-1), hit.int().argmax(-1), torch.where((p > 0).any(-1), last, 0))


def circuit_sample(
    kind: str,
    leaf: Tensor,
    prior: Tensor | None,
    trans: Tensor | None,
    uniforms: Tensor,
    evidence: Tensor | None = None,
) -> CircuitSample:
    """Draw one exact sample per row, and compute ``log q`` of each token given its prefix.

    At each position, :func:`draw` samples ``z ~ posterior_k`` and ``x_k ~ leaf_{k,z}``. The scan
    then continues with the log-probabilities of the drawn token under all states, not only ``z``.
    Tokens of ``evidence`` are not drawn.
    """
    log_leaf = log_softmax(leaf.to(accumulator(leaf.dtype)))
    rows, n_token = leaf.shape[:2]
    row = torch.arange(rows, device=leaf.device)
    none = torch.full((rows, n_token), -1, device=leaf.device)
    tokens = none if evidence is None else evidence.clone()
    conditional: list[Tensor] = []
    posterior: list[Tensor] = []

    def observe(k: int, cur: Tensor) -> Tensor:
        state = log_softmax(cur)
        posterior.append(state.exp())
        z = draw(posterior[k], uniforms[:, k, 0])
        token = draw(log_leaf[row, k, z].exp(), uniforms[:, k, 1])
        tokens[:, k] = torch.where(tokens[:, k] < 0, token, tokens[:, k])
        e = _observe(log_leaf[:, k], tokens[:, k])
        conditional.append(logsumexp(state + e))
        return e

    _walk(kind, n_token, *_normalised(log_leaf, prior, trans), observe)
    return CircuitSample(tokens, torch.stack(conditional, 1), torch.stack(posterior, 1))


def circuit_argmax(
    kind: str,
    leaf: Tensor,
    prior: Tensor | None,
    trans: Tensor | None,
    evidence: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute the result of :func:`lora_ext.ops.circuit_argmax` by max-product.

    An upward pass computes the best values, and a downward pass reads the choices. No fast method
    is known for the most probable tokens alone, which maximise a sum over latents.
    """
    log_leaf = log_softmax(leaf.to(accumulator(leaf.dtype)))
    rows, n_token = leaf.shape[:2]
    row = torch.arange(rows, device=leaf.device)
    prior, trans = _normalised(log_leaf, prior, trans)
    best, mode = log_leaf.max(-1)  # (B, K, C)
    if evidence is not None:
        given = evidence[..., None] >= 0
        best = torch.where(given, _observe(log_leaf, evidence), best)
        mode = torch.where(given, evidence[..., None], mode)
    tokens = torch.empty(rows, n_token, dtype=torch.int64, device=leaf.device)

    def take(k: int, state: Tensor) -> None:
        tokens[:, k] = mode[row, k, state]

    def after(choice: Tensor, deeper: Callable[[Tensor], None]) -> Callable[[Tensor], None]:
        return lambda state: deeper(choice[row, state])

    # Return the best value of the positions [lo, hi) for each state of the parent, the index of the
    # next node, and a function that sets these tokens for a chosen state.
    def up(lo: int, hi: int, node: int) -> tuple[Tensor, int, Callable[[Tensor], None]]:
        if hi - lo == 1:
            return best[:, lo], node, lambda state: take(lo, state)
        middle = lo + left_size(hi - lo)
        parts: list[tuple[Tensor, Callable[[Tensor], None]]] = []
        for first, last in ((lo, middle), (middle, hi)):
            if last - first == 1:
                value, node, down = up(first, last, node)
            else:
                step = trans[:, node]
                below, node, deeper = up(first, last, node + 1)
                value, choice = (step + below[:, None]).max(2)
                down = after(choice, deeper)
            parts.append((value, down))

        def both(state: Tensor) -> None:
            for _, down in parts:
                down(state)

        return parts[0][0] + parts[1][0], node, both

    if kind == "btree":
        value, _, down = up(0, n_token, 0)
        value, state = (prior + value).max(1)
        down(state)
    elif kind == "hmm":
        value, choices = best[:, -1], list[Tensor]()
        for k in range(n_token - 1, 0, -1):
            value, choice = (trans[:, k - 1] + value[:, None]).max(2)
            value = value + best[:, k - 1]
            choices.append(choice)
        value, state = (prior + value).max(1)
        take(0, state)
        for k, choice in enumerate(reversed(choices), 1):
            state = choice[row, state]
            take(k, state)
    else:
        value, state = (prior + best.sum(1)).max(1)
        for k in range(n_token):
            take(k, state)
    return tokens, value


def spec_verify(
    target: Tensor,
    tokens: Tensor,
    conditional: Tensor,
    posterior: Tensor,
    leaf: Tensor,
    uniforms: Tensor,
    num_evidence: Tensor | None = None,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Compute the result of :func:`lora_ext.ops.spec_verify` by its formula.

    A token with ``q = 0`` is never accepted, because the circuit cannot have drawn it. With
    temperature 0, the uniform numbers are not used.
    """
    dtype = accumulator(target.dtype)
    rows, n_token = tokens.shape
    row, position = (torch.arange(n, device=target.device) for n in (rows, n_token))
    target = target.to(dtype)
    log_p = log_softmax(target / (temperature or 1.0))
    if temperature == 0:
        accept = target[:, :-1].argmax(-1) == tokens
    else:
        at = log_p[:, :-1].gather(-1, tokens[..., None]).squeeze(-1)
        ratio = (at - conditional.to(dtype)).exp()
        accept = (uniforms[:, :-1].to(dtype) < ratio) & (conditional > -torch.inf)
    if num_evidence is not None:
        accept = accept | (position < num_evidence[:, None])
    accepted = accept.int().cumprod(1).sum(1)
    if temperature == 0:
        return accepted, target[row, accepted].argmax(-1)
    p = log_p[row, accepted].exp()
    rejected = accepted.clamp(max=n_token - 1)
    q = _mixture(posterior[row, rejected].to(dtype), leaf[row, rejected].to(dtype)).exp()
    residual = (p - q).clamp(min=0)
    whole = (accepted == n_token) | (residual.sum(-1) == 0)
    return accepted, draw(torch.where(whole[:, None], p, residual), uniforms[:, -1])


def emission_gather(h: Tensor, emit: Tensor, x: Tensor) -> Tensor:
    """Compute ``e[b, k, z] = log softmax(emit[k, z] @ h[b])[x[b, k]]``, ``(B, K, C)``.

    ``e[b, k, z]`` is 0 if ``x[b, k]`` is -1.
    """
    wide = accumulator(h.dtype)
    logits = torch.einsum("bd,kcvd->bkcv", h.to(wide), emit.to(wide))
    return _observe(log_softmax(logits), x)
