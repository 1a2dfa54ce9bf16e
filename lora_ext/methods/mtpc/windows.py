"""Training windows: the next tokens of every position, cut at the ends of documents."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from lora_ext._checks import require
from lora_ext.layers import IGNORE


def unfold_windows(
    labels: Tensor, n: int, eos_id: int | None = None, ignore: int = IGNORE
) -> Tensor:
    """The window of every position: ``w[b, t, k] = labels[b, t + k]``.

    What lies beyond the sequence, or after an end-of-sequence token inside the window, is ignored;
    the end itself is predicted. So no window crosses into the next document of a packed sequence.

    Args:
        labels: ``(B, S)`` int64, the inputs shifted by one; ``ignore`` where nothing is predicted.
        n: ``K``, the length of a window.
        eos_id: the token that ends a document, or None: no document ends.

    Returns:
        ``(B, S, K)`` int64.

    Raises:
        ValueError: n below 1, or labels that are no matrix.
    """
    require(n >= 1, "unfold_windows", "n", "at least 1", n)
    require(labels.dim() == 2, "unfold_windows", "labels", "shape (B, S)", tuple(labels.shape))
    windows = F.pad(labels, (0, n - 1), value=ignore).unfold(1, n, 1)  # (B, S, K)
    if eos_id is None:
        return windows
    ends = (windows == eos_id).long()
    return torch.where(ends.cumsum(-1) > ends, ignore, windows)


def unfold_teacher(logits: Tensor, n: int) -> Tensor:
    """Show the verifier's logits in the shape of windows, without copying.

    Row ``(t, k)`` is the verifier's prediction of ``labels[t + k]``. Beyond the sequence it is
    zero, where windows are ignored.

    Args:
        logits: ``(B, S, V)``. n: K, tokens of a window.

    Returns:
        ``(B, S, K, V)``.
    """
    return F.pad(logits, (0, 0, 0, n - 1)).unfold(1, n, 1).movedim(-1, 2)


def pack_documents(documents: Iterable[Sequence[int]], length: int, eos_id: int) -> Tensor:
    """Put documents one after the other, each closed by ``eos_id``, into rows.

    Args:
        documents: token ids of each. length: tokens of a row. eos_id: what ends a document.

    Returns:
        ``(rows, length)`` int64; tokens that do not fill a last row are left out.

    Raises:
        ValueError: length below 1.
    """
    require(length >= 1, "pack_documents", "length", "at least 1", length)
    stream = [token for document in documents for token in (*document, eos_id)]
    rows = len(stream) // length
    return torch.tensor(stream[: rows * length], dtype=torch.int64).view(rows, length)


def frequent_tokens(ids: Tensor, size: int) -> Tensor:
    """The most frequent tokens of a text, for the shortlist of a draft.

    Args:
        ids: int64 of any shape; negative ones, as ignored labels are, do not count.
        size: how many, at least 1.

    Returns:
        ``(L,)`` int64, ascending; ``L`` is ``size``, or less where the text has fewer tokens.
        Among equally frequent tokens the smaller ids are taken.

    Raises:
        ValueError: size below 1. TypeError: another dtype.
    """
    require(size >= 1, "frequent_tokens", "size", "at least 1", size)
    require(ids.dtype == torch.int64, "frequent_tokens", "ids", "int64", ids.dtype, TypeError)
    tokens, counts = ids[ids >= 0].unique(return_counts=True)
    order = counts.argsort(descending=True, stable=True)
    return tokens[order[:size]].sort().values
