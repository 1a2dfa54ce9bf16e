"""Probabilistic circuits with parameters that a network computes per row: likelihood and gradient.

Letters: ``B`` rows, ``K`` positions of a window of tokens, ``C`` components (states of a latent),
``V`` vocabulary, ``M`` transition matrices. :mod:`lora_ext.reference._circuit` defines the kinds of
circuits, their structure and the meaning of ``-inf``.

Source: "Fast and Expressive Multi-Token Prediction with Probabilistic Circuits" (arXiv 2511.11346).
Our choice: the one-pass scan (docs/circuits.md).
"""

from typing import Any

import torch
from torch import Tensor

from lora_ext._checks import (
    FLOATS,
    require,
    require_dim,
    require_dtype,
    require_shape,
    require_tensor,
)
from lora_ext.reference import KINDS, CircuitScan, accumulator, num_transitions

from ._registration import fake

_c = torch.ops.lora_ext


def check_circuit(
    op: str, kind: str, leaf: Tensor, name: str, prior: Tensor | None, trans: Tensor | None
) -> None:
    """Raise ValueError unless the kind exists and the parameters match ``leaf (B, K, C, ...)``."""
    require(kind in KINDS, op, "kind", "'ff', 'cp', 'hmm' or 'btree'", repr(kind))
    require_dtype(op, name, leaf, *FLOATS)
    rows, n_token, components = leaf.shape[:3]
    require(kind != "ff" or components == 1, op, name, "one component for kind 'ff'", components)
    matrices = num_transitions(kind, n_token)
    what = f"the transitions of kind '{kind}' over {n_token} positions"
    require(matrices <= 0 or trans is not None, op, "trans", what, None)
    if prior is not None:
        require_dtype(op, "prior", prior, *FLOATS)
        require_shape(op, "prior", prior, "(B, C)", (rows, components))
    if trans is not None:
        require_dtype(op, "trans", trans, *(FLOATS if prior is None else (prior.dtype,)))
        shape = rows, max(matrices, 0), components, components
        require_shape(op, "trans", trans, "(B, M, C, C)", shape)


def circuit_scan(
    kind: str,
    leaf: Tensor,
    prior: Tensor | None = None,
    trans: Tensor | None = None,
    x: Tensor | None = None,
) -> CircuitScan:
    """Return prefix marginals, conditionals and state posteriors of every window, in one pass.

    With ``cur_k[z] = log p(state_k = z, x_<k)`` and ``e_k[z] = log softmax(leaf_{k,z})[x_k]``:
    ``prefix_k = logsumexp_z(cur_k + e_k)``, ``posterior_k = softmax(cur_k)``, and ``conditional_k``
    is ``log p(x_k | x_<k)``.

    Differentiable once in ``leaf``, ``prior`` and ``trans`` through ``prefix`` and ``conditional``;
    ``posterior`` has no gradient. Impossible events have log-probability ``-inf`` and gradient
    zero. The only allocated tensor of the size of ``leaf`` is its gradient. A row's bits depend
    neither on its batch nor on the number of threads. Logits of ``+inf`` or NaN make the results of
    their row NaN. All tensors may have any batch stride, including 0, and are not copied.

    Args:
        kind: Kind of circuit: ``"ff"``, ``"cp"``, ``"hmm"`` or ``"btree"``.
        leaf: Logits ``(B, K, C, V)``, float32, float16, bfloat16, or float64 on the CPU. If ``x``
            is None, log-probabilities ``(B, K, C)`` of the observed tokens. ``C = 1`` for ``ff``.
        prior: Logits ``(B, C)`` of the first state in any dtype allowed for ``leaf``, or None if
            all states are equally likely.
        trans: Transition logits ``(B, M, C, C)`` in the dtype of ``prior``, one row per parent
            state; None if ``M = 0``. ``M`` is ``K - 1`` for ``hmm``, ``K - 2`` for ``btree``,
            otherwise 0.
        x: Tokens ``(B, K)`` int64 in ``[-1, V)``; -1 marginalises the position. On CUDA the range
            is checked only in debug mode; otherwise a token out of range is treated as -1.

    Returns:
        :class:`CircuitScan` of ``prefix (B, K)``, ``conditional (B, K)`` and
        ``posterior (B, K, C)``, float32 (float64 for float64 ``leaf``), computed in this precision.

    Raises:
        ValueError: If a kind, shape, dtype, device or token is wrong.
        RuntimeError: On double backward.

    Source: arXiv 2511.11346, section 3; the scan for all prefixes at once: docs/circuits.md.
    """
    if x is None:
        e = leaf if leaf.dtype == torch.float64 else leaf.float()
    else:
        e = _c.circuit_leaf.default(leaf, x)[0]  # (B, K, C)
    return CircuitScan(*_c.circuit_scan.default(kind, e, prior, trans)[:3])


@fake("circuit_leaf")
def _fake_leaf(leaf: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    require_tensor("circuit_leaf", "leaf", leaf, "(B, K, C, V)", None, *FLOATS)
    require_tensor("circuit_leaf", "x", x, "(B, K)", leaf.shape[:2], torch.int64)
    e = leaf.new_empty(leaf.shape[:3], dtype=accumulator(leaf.dtype))
    return e, e.new_empty(2, *e.shape)


@fake("circuit_leaf_backward")
def _fake_leaf_backward(de: Tensor, leaf: Tensor, *_: Any) -> Tensor:
    return leaf.new_empty(leaf.shape)


@fake("circuit_scan")
def _fake_scan(
    kind: str, e: Tensor, prior: Tensor | None, trans: Tensor | None, save: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    require_dtype("circuit_scan", "e", e, torch.float32, torch.float64)
    require_dim("circuit_scan", "e", e, "(B, K, C)")
    check_circuit("circuit_scan", kind, e, "e", prior, trans)
    rows, n_token, components = e.shape
    tree = kind == "btree" and n_token > 2
    slots = 3 * (n_token - 2) if tree else n_token
    return (
        e.new_empty(rows, n_token),
        e.new_empty(rows, n_token),
        e.new_empty(e.shape),
        e.new_empty((rows, slots, components) if save else (0,)),
    )


@fake("circuit_scan_backward")
def _fake_scan_backward(
    dprefix: Any, dconditional: Any, kind: str, e: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    prior, trans, _, need_prior, need_trans = rest
    dprior, dtrans = (
        t.new_empty(t.shape) if need and t is not None else e.new_empty(0)
        for t, need in ((prior, need_prior), (trans, need_trans))
    )
    return e.new_empty(e.shape), dprior, dtrans


def emission_gather(h: Tensor, emit: Tensor, x: Tensor) -> Tensor:
    """Compute log-probabilities of observed tokens under a linear head, with logits in chunks.

    ``e[b, k, z] = log softmax(emit[k, z] @ h[b])[x[b, k]]``, or 0 if ``x[b, k]`` is -1. Pass the
    result to :func:`circuit_scan` as ``leaf``, without ``x``.

    Differentiable once in ``h`` and ``emit``. Forward and backward process one position and one
    chunk of rows at a time. The logits ``(rows, C, V)`` of a chunk, in the dtype of ``h``, take at
    most 64 MiB if the chunk has more than one row. A library GEMM writes them into one buffer, on
    which the leaf kernels run in place; the backward recomputes the logits. Sums over positions and
    chunks are float32. The bits of the GEMM, and therefore of the result, may depend on the batch
    and the number of threads.

    Args:
        h: Hidden states ``(B, D)`` of D features, float16, bfloat16, float32, or float64 on the
            CPU.
        emit: Output weights ``(K, C, V, D)``, dtype and device of ``h``: one matrix per position
            and component.
        x: Tokens ``(B, K)`` int64 in ``[-1, V)``, as in :func:`circuit_scan`.

    Returns:
        ``(B, K, C)`` float32 (float64 for float64).

    Raises:
        ValueError: If a shape, dtype, device or token is wrong.
        RuntimeError: On double backward.

    Source: arXiv 2511.11346, the full-rank linear head.
    """
    return _c.emission_gather.default(h, emit, x)


@fake("emission_gather")
def _fake_emission_gather(h: Tensor, emit: Tensor, x: Tensor) -> Tensor:
    op = "emission_gather"
    require_tensor(op, "h", h, "(B, D)", None, *FLOATS)
    require_tensor(op, "emit", emit, "(K, C, V, D)", None, h.dtype)
    require_shape(op, "h", h, "(B, D)", (h.shape[0], emit.shape[3]))
    require_tensor(op, "x", x, "(B, K)", (h.shape[0], emit.shape[0]), torch.int64)
    return h.new_empty(h.shape[0], *emit.shape[:2], dtype=accumulator(h.dtype))


@fake("emission_gather_backward")
def _fake_emission_gather_backward(
    de: Tensor, h: Tensor, emit: Tensor, x: Tensor, need_h: bool, need_emit: bool
) -> tuple[Tensor, Tensor]:
    dh, demit = (
        t.new_empty(t.shape if need else 0) for t, need in ((h, need_h), (emit, need_emit))
    )
    return dh, demit
