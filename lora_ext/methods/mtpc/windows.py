"""Training windows and their loss. The window of a token is the next K tokens of its document.

``c_k = log q(x_k | x_<k, h)`` is the head's log-probability of the target at position k of a
window, ``p_k`` is the frozen model's distribution at that position, and b is the index of a window.
A target is *counted* unless it is ignored or outside the head's shortlist:

    CE_k = - sum_b c[b, k] / max(1, number of targets counted at k)
    KL_k = sum_b KL(p_k || q(. | x_<k, h)) / max(1, number of targets counted at k)
    loss = sum_k gamma^(k-1) (beta KL_k + (1 - beta) CE_k) / sum_k gamma^(k-1)

Shape letters: ``B`` sequences, ``S`` tokens per sequence, ``K`` tokens per window, ``D`` hidden
width, ``V`` vocabulary, ``L`` tokens of the shortlist, ``C`` components.

Source: arXiv 2511.11346 (docs/mtpc.md, "Objective").
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from lora_ext import reference
from lora_ext._checks import require
from lora_ext.layers import IGNORE, recomputed, rows_per_chunk
from lora_ext.reference import log_softmax

from .layers import CircuitHead


def unfold_windows(
    labels: Tensor, n: int, eos_id: int | None = None, ignore: int = IGNORE
) -> Tensor:
    """Return the window of every position: ``w[b, t, k] = labels[b, t + k]``.

    Targets beyond the sequence, or after an end-of-sequence token in the window, are set to
    ``ignore``; the end token itself is a target. Therefore no window contains targets of the next
    document of a packed sequence.

    Args:
        labels: ``(B, S)`` int64, the inputs shifted by one; ``ignore`` for positions
            without a target.
        n: ``K``, number of tokens in a window.
        eos_id: id of the token that ends a document; with None, documents do not end.
        ignore: value of ignored targets.

    Returns:
        ``(B, S, K)`` int64.

    Raises:
        ValueError: If ``n`` is below 1, or ``labels`` is not a matrix.
    """
    require(n >= 1, "unfold_windows", "n", "at least 1", n)
    require(labels.dim() == 2, "unfold_windows", "labels", "shape (B, S)", tuple(labels.shape))
    windows = F.pad(labels, (0, n - 1), value=ignore).unfold(1, n, 1)  # (B, S, K)
    if eos_id is None:
        return windows
    ends = (windows == eos_id).long()
    return torch.where(ends.cumsum(-1) > ends, ignore, windows)


def unfold_teacher(logits: Tensor, n: int) -> Tensor:
    """Arrange the verifier's logits as windows, which are views of one padded copy.

    Row ``(t, k)`` is the verifier's prediction of ``labels[t + k]``. Rows beyond the sequence are
    zero; their targets are ignored.

    Args:
        logits: ``(B, S, V)``, the verifier's logits.
        n: ``K``, number of tokens in a window.

    Returns:
        ``(B, S, K, V)``.
    """
    return F.pad(logits, (0, 0, 0, n - 1)).unfold(1, n, 1).movedim(-1, 2)


def pack_documents(documents: Iterable[Sequence[int]], length: int, eos_id: int) -> Tensor:
    """Concatenate documents, each followed by ``eos_id``, and cut them into rows.

    Args:
        documents: token ids of each document.
        length: number of tokens per row.
        eos_id: id of the token that ends a document.

    Returns:
        ``(rows, length)`` int64; the tokens of an incomplete last row are dropped.

    Raises:
        ValueError: If ``length`` is below 1.
    """
    require(length >= 1, "pack_documents", "length", "at least 1", length)
    stream = [token for document in documents for token in (*document, eos_id)]
    rows = len(stream) // length
    return torch.tensor(stream[: rows * length], dtype=torch.int64).view(rows, length)


def frequent_tokens(ids: Tensor, size: int) -> Tensor:
    """Return the most frequent tokens of a text, for the shortlist of a draft.

    Args:
        ids: int64 token ids of any shape; negative ids, such as ignored labels, are not counted.
        size: number of tokens, at least 1.

    Returns:
        ``(L,)`` int64, ascending; ``L`` is ``size``, or less if the text has fewer distinct tokens.
        Of equally frequent tokens, those with smaller ids are preferred.

    Raises:
        ValueError: If ``size`` is below 1.
        TypeError: If ``ids`` is not int64.
    """
    require(size >= 1, "frequent_tokens", "size", "at least 1", size)
    require(ids.dtype == torch.int64, "frequent_tokens", "ids", "int64", ids.dtype, TypeError)
    tokens, counts = ids[ids >= 0].unique(return_counts=True)
    order = counts.argsort(descending=True, stable=True)
    return tokens[order[:size]].sort().values


def window_loss(
    head: CircuitHead,
    h: Tensor,
    windows: Tensor,
    gamma: float = 0.9,
    beta: float = 0.0,
    teacher_logits: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute the objective of a head on hidden states and the windows that follow them.

    Args:
        head: the circuit head.
        h: hidden states ``(..., D)``.
        windows: targets ``(..., K)``, from :func:`unfold_windows`. Tokens outside the shortlist are
            marginalised, like ignored tokens.
        gamma: discount per position of a window, in (0, 1].
        beta: weight of the distillation, in [0, 1].
        teacher_logits: logits ``(..., K, V)`` of the verifier, from :func:`unfold_teacher`;
            required if ``beta > 0``. With a shortlist, the head learns the teacher's distribution
            conditioned on the list. Distillation uses torch operations on chunks of rows, and
            computes ``K C L`` logits per row.

    Returns:
        the loss, and ``beta KL_k + (1 - beta) CE_k`` of each position ``(K,)``.

    Raises:
        ValueError: If gamma or beta is out of range, if the teacher's logits are missing or have
            the wrong shape, or as for :meth:`CircuitHead.log_prob`.
    """
    require(0 < gamma <= 1, "window_loss", "gamma", "a number in (0, 1]", gamma)
    require(0 <= beta <= 1, "window_loss", "beta", "a number in [0, 1]", beta)
    lacking = head.listed.lacks(head.tokens(h, windows)).view(windows.shape)
    targets = torch.where(lacking, IGNORE, windows)
    count = (targets != IGNORE).reshape(-1, head.n_token).sum(0).clamp(min=1)
    each = -head.conditionals(h, targets).view(-1, head.n_token).sum(0) / count  # (K,)
    if beta > 0:
        each = beta * _divergence(head, h, targets, teacher_logits) / count + (1 - beta) * each
    weight = gamma ** torch.arange(head.n_token, dtype=each.dtype, device=each.device)
    return (weight * each).sum() / weight.sum(), each


def _divergence(head: CircuitHead, h: Tensor, windows: Tensor, teacher: Tensor | None) -> Tensor:
    """Return ``sum_b KL(p_k || q(. | x_<k, h))`` over the targets counted at k, ``(K,)``. Arguments
    and errors are those of :func:`window_loss`."""
    shape = (*windows.shape, head.vocab_size)
    if teacher is None or tuple(teacher.shape) != shape:
        found = "none" if teacher is None else tuple(teacher.shape)
        expected = f"shape {shape} with beta > 0"
        raise ValueError(f"window_loss: teacher_logits: expected {expected}, found {found}")
    if windows.numel() == 0:
        return teacher.new_zeros(head.n_token)
    if windows.dim() > 2:  # the teacher's windows share memory; flattening would copy them
        parts = zip(h, windows, teacher, strict=True)
        return torch.stack([_divergence(head, *part) for part in parts]).sum(0)

    chunk = rows_per_chunk(head.n_token * head.rank * head.listed.size)
    parts = zip(h.split(chunk), windows.split(chunk), teacher.split(chunk), strict=True)
    of_chunk = partial(_chunk_divergence, head)
    return torch.stack([recomputed(of_chunk, *part) for part in parts]).sum(0)


def _chunk_divergence(head: CircuitHead, h: Tensor, windows: Tensor, teacher: Tensor) -> Tensor:
    circuit = head.narrow_circuit(h)
    places = head.listed.places(head.tokens(h, windows))
    posterior = reference.circuit_scan(head.kind, *circuit, places).posterior
    leaf = circuit.leaf.to(posterior.dtype).softmax(-1)
    q = torch.einsum("nkc,nkcv->nkv", posterior, leaf)
    log_q = q.clamp(min=torch.finfo(q.dtype).tiny).log()
    log_p = log_softmax(head.listed.narrow(teacher).to(posterior.dtype))
    gap = torch.where(log_p == -torch.inf, 0, log_p - log_q)
    return ((log_p.exp() * gap).sum(-1) * (places >= 0)).sum(0)
