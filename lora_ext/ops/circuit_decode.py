"""Drafting of tokens from circuits, and verification of the drafts with a language model.

Letters: ``B`` rows, ``K`` positions of a window of tokens, ``C`` components (states of a latent),
``V`` vocabulary, ``M`` transition matrices.

Parameters are logits, float32, float16, bfloat16 or (on the CPU) float64: ``leaf (B, K, C, V)``,
``prior (B, C)`` and ``trans (B, M, C, C)``. ``prior`` and ``trans`` have one dtype, which may
differ from that of ``leaf``. If rows share parameters, the tensors may be views of stride 0. Sums
and results are float32 (float64 for float64).

Uniform numbers are float32 in [0, 1), or float64 with float64 logits; 1 is accepted because
rounding can produce it. The same numbers give the same tokens. Numbers out of range raise an error
on the CPU and, in debug mode, on other devices. The result of a row does not depend on its batch. A
row with NaN logits gets an arbitrary token of the vocabulary. The ops have no gradient.

Sources: arXiv 2511.11346; speculative sampling (Leviathan et al. 2023; Chen et al. 2023).
"""

from typing import Any

import torch
from torch import Tensor

from lora_ext._checks import FLOATS, number, require_dim, require_tensor
from lora_ext.reference import CircuitSample, accumulator

from ._circuit import check_circuit
from ._registration import fake

_c = torch.ops.lora_ext


def circuit_conditional_dist(
    kind: str, leaf: Tensor, prior: Tensor | None, trans: Tensor | None, x: Tensor, k: Tensor
) -> Tensor:
    """Compute ``log q(x_k | x_<k)`` of every token at position ``k`` of each row, ``(B, V)``.

    Args:
        kind: Kind of circuit: ``"ff"``, ``"cp"``, ``"hmm"`` or ``"btree"``, see
            :mod:`lora_ext.reference._circuit`.
        leaf: Logits ``(B, K, C, V)`` of the tokens.
        prior: Logits ``(B, C)`` of the first state, or None if all states are equally likely.
        trans: Logits ``(B, M, C, C)`` of the transitions, or None if ``M = 0``.
        x: Tokens ``(B, K)`` int64 in [-1, V); -1 marginalises the position. Tokens at positions
            ``k`` and above are ignored.
        k: Position of the token in each row, ``(B,)`` int64 in [0, K).

    Raises:
        ValueError: If a shape, dtype or device is wrong. The ranges of tokens and ``k`` are checked
            on the CPU, and on other devices only in debug mode.
    """
    return _c.circuit_conditional_dist(kind, leaf, prior, trans, x, k)


def _check(
    op: str, kind: str, leaf: Tensor, prior: Any, trans: Any, **tokens: Tensor | None
) -> None:
    """Check the arguments that the ops share; each of ``tokens`` must be ``(B, K)`` int64."""
    require_dim(op, "leaf", leaf, "(B, K, C, V)")
    check_circuit(op, kind, leaf, "leaf", prior, trans)
    for name, t in tokens.items():
        if t is not None:
            require_tensor(op, name, t, "(B, K)", leaf.shape[:2], torch.int64)


@fake("circuit_conditional_dist")
def _fake_conditional_dist(
    kind: str, leaf: Tensor, prior: Tensor | None, trans: Tensor | None, x: Tensor, k: Tensor
) -> Tensor:
    op = "circuit_conditional_dist"
    _check(op, kind, leaf, prior, trans, x=x)
    require_tensor(op, "k", k, "(B,)", leaf.shape[:1], torch.int64)
    return leaf.new_empty(leaf.shape[0], leaf.shape[3], dtype=accumulator(leaf.dtype))


def circuit_sample(
    kind: str,
    leaf: Tensor,
    prior: Tensor | None,
    trans: Tensor | None,
    uniforms: Tensor,
    evidence: Tensor | None = None,
) -> CircuitSample:
    """Draw one exact sample per row, and compute the values that :func:`spec_verify` needs.

    One pass over the positions draws ``z ~ q(state | x_<k)``, then ``x_k ~ softmax(leaf[k, z])``. A
    draw selects the smallest index with a positive weight and a running sum above ``u`` times the
    total. Two devices can draw different tokens only if the running sum differs from this limit by
    less than 1e-5 of the total.

    Args:
        kind: Kind of circuit, see :func:`circuit_conditional_dist`.
        leaf: Logits ``(B, K, C, V)`` of the tokens.
        prior: Logits ``(B, C)`` of the first state, or None if all states are equally likely.
        trans: Logits ``(B, M, C, C)`` of the transitions, or None if ``M = 0``.
        uniforms: Uniform numbers ``u (B, K, 2)``, for the state and for the token.
        evidence: Given tokens, which are not drawn, at the start of each row, then -1 for all
            tokens to draw: ``(B, K)`` int64 in [-1, V). None if no token is given.

    Returns:
        ``tokens (B, K)`` int64; ``conditional (B, K)``, ``log q(x_k | x_<k)``;
        ``posterior (B, K, C)``, ``q(state at k | x_<k)``, zero if the prefix is impossible.

    Raises:
        ValueError: As for :func:`circuit_conditional_dist`. On the CPU also if a token of the
            evidence follows a -1.
    """
    return CircuitSample(*_c.circuit_sample(kind, leaf, prior, trans, uniforms, evidence))


@fake("circuit_sample")
def _fake_sample(
    kind: str, leaf: Tensor, prior: Any, trans: Any, uniforms: Tensor, evidence: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    op, shape, dtype = "circuit_sample", leaf.shape, accumulator(leaf.dtype)
    _check(op, kind, leaf, prior, trans, evidence=evidence)
    floats = torch.float32, dtype
    require_tensor(op, "uniforms", uniforms, "(B, K, 2)", (*shape[:2], 2), *floats)
    tokens = leaf.new_empty(shape[:2], dtype=torch.long)
    return tokens, leaf.new_empty(shape[:2], dtype=dtype), leaf.new_empty(shape[:3], dtype=dtype)


def circuit_argmax(
    kind: str,
    leaf: Tensor,
    prior: Tensor | None,
    trans: Tensor | None,
    evidence: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Find the most probable tokens *and* latents of each window, by max-product.

    Except for ``ff``, these tokens need not be the mode of the distribution over tokens alone. Ties
    resolve to the lowest index.

    Args:
        kind: Kind of circuit, see :func:`circuit_conditional_dist`.
        leaf: Logits ``(B, K, C, V)`` of the tokens.
        prior: Logits ``(B, C)`` of the first state, or None if all states are equally likely.
        trans: Logits ``(B, M, C, C)`` of the transitions, or None if ``M = 0``.
        evidence: Given tokens, see :func:`circuit_sample`.

    Returns:
        ``tokens (B, K)`` int64 and ``value (B,)``, the log-probability of tokens and latents.

    Raises:
        ValueError: As for :func:`circuit_sample`.
    """
    return _c.circuit_argmax(kind, leaf, prior, trans, evidence)


@fake("circuit_argmax")
def _fake_argmax(
    kind: str, leaf: Tensor, prior: Any, trans: Any, evidence: Tensor | None
) -> tuple[Tensor, Tensor]:
    _check("circuit_argmax", kind, leaf, prior, trans, evidence=evidence)
    value = leaf.new_empty(leaf.shape[0], dtype=accumulator(leaf.dtype))
    return leaf.new_empty(leaf.shape[:2], dtype=torch.long), value


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
    """Accept a prefix of every draft and draw the next token, by speculative sampling.

    With ``p = softmax(target / temperature)``, position k is accepted if all earlier positions are
    accepted and ``u_k < p_k(x_k) / q(x_k | x_<k)``. At the first rejected position, the next token
    is drawn from ``max(0, p - q)``, or from ``p`` if this is zero everywhere. If all positions are
    accepted, the next token is drawn from ``p`` after the last position. Always output the next
    token: without it, the output does not have the verifier's distribution. With temperature 0, a
    position is accepted if its token is the verifier's argmax, and the next token is the argmax.

    Args:
        target: Logits ``(B, K + 1, V)`` of the verifier, float32, float16 or bfloat16; float64 if
            ``leaf`` is float64.
        tokens: Draft ``(B, K)`` int64 in [0, V), from :func:`circuit_sample`.
        conditional: ``conditional (B, K)`` from :func:`circuit_sample`.
        posterior: ``posterior (B, K, C)`` from :func:`circuit_sample`.
        leaf: Logits ``(B, K, C, V)``, the argument of :func:`circuit_sample`.
        uniforms: Uniform numbers ``u (B, K + 1)``; the last one draws the next token.
        num_evidence: Number of leading tokens to accept without a test, ``(B,)`` int64 in [0, K],
            or None for 0.
        temperature: Temperature of the verifier, at least 0.

    Returns:
        ``accepted (B,)`` int64, the number of accepted leading tokens, including ``num_evidence``;
        and ``next_token (B,)`` int64.

    Raises:
        ValueError: As for :func:`circuit_conditional_dist`.
    """
    return _c.spec_verify(
        target, tokens, conditional, posterior, leaf, uniforms, num_evidence, temperature
    )


@fake("spec_verify")
def _fake_verify(
    target: Tensor,
    tokens: Tensor,
    conditional: Tensor,
    posterior: Tensor,
    leaf: Tensor,
    uniforms: Tensor,
    num_evidence: Tensor | None,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    op = "spec_verify"
    require_tensor(op, "leaf", leaf, "(B, K, C, V)", None, *FLOATS)
    rows, n_token, components, vocab = leaf.shape
    wide = accumulator(leaf.dtype)
    floats = (wide,) if wide == torch.float64 else FLOATS[:3]
    require_tensor(op, "target", target, "(B, K + 1, V)", (rows, n_token + 1, vocab), *floats)
    require_tensor(op, "tokens", tokens, "(B, K)", (rows, n_token), torch.int64)
    require_tensor(op, "conditional", conditional, "(B, K)", (rows, n_token), wide)
    require_tensor(op, "posterior", posterior, "(B, K, C)", (rows, n_token, components), wide)
    floats = torch.float32, wide
    require_tensor(op, "uniforms", uniforms, "(B, K + 1)", (rows, n_token + 1), *floats)
    if num_evidence is not None:
        require_tensor(op, "num_evidence", num_evidence, "(B,)", (rows,), torch.int64)
    number(op, "temperature", temperature, 0, expected="a finite number of at least 0")
    return tokens.new_empty(rows), tokens.new_empty(rows)
