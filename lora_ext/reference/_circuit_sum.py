"""Sum layers of probabilistic circuits in log space, one formula per function.

Letters: ``B`` rows, ``I`` units summed over, ``O`` sums, ``G`` groups. ``-inf`` is a legal
log-weight and a legal value: what is impossible stays ``-inf``, with gradient zero and no NaN.
"""

from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor

from ._circuit import log_softmax, logsumexp
from ._lora import accumulator

NORMS = ("logits", "logprobs", "probs", "none")


class LogMax(NamedTuple):
    """What the max semiring gives.

    Attributes:
        values: ``max_i (log W[o, i] + values[i])``, shaped like the sum.
        indices: int64, the lowest ``i`` that attains it; 0 where nothing is possible.
    """

    values: Tensor
    indices: Tensor


def log_weights(w: Tensor, norm: str) -> Tensor:
    """The log-weights that ``w`` stands for, in the accumulator's dtype."""
    w = w.to(accumulator(w.dtype))
    if norm == "logits":
        return log_softmax(w)
    if norm == "probs":
        return torch.where(w > 0, torch.where(w > 0, w, 1).log(), -torch.inf)
    return w


@overload
def log_einsum_exp(
    w: Tensor, values: Tensor, norm: str = "logits", semiring: Literal["sum"] = "sum"
) -> Tensor: ...
@overload
def log_einsum_exp(w: Tensor, values: Tensor, norm: str, semiring: Literal["max"]) -> LogMax: ...
def log_einsum_exp(
    w: Tensor, values: Tensor, norm: str = "logits", semiring: str = "sum"
) -> Tensor | LogMax:
    """``out[b, o] = log sum_i W[o, i] exp(values[b, i])``, a sum layer.

    The semiring "max" takes the largest term in place of their sum.
    """
    if norm not in NORMS:
        raise ValueError(f"log_einsum_exp: norm: expected one of {NORMS}, found {norm!r}")
    log_w = log_weights(w, norm)
    if w.dim() == 2 or values.dim() == 3:  # (..., 1, O, I)
        log_w = log_w[..., None, :, :]
    terms = log_w + values.to(log_w.dtype)[..., None, :]  # (..., B, O, I)
    if semiring == "sum":
        return logsumexp(terms)
    best, indices = terms.max(-1)
    return LogMax(best, torch.where(best == -torch.inf, 0, indices))


def log_bmm(a: Tensor, b: Tensor) -> Tensor:
    """``out[m, n] = log sum_k exp(a[m, k] + b[k, n])`` of every batch, ``(B, M, N)``."""
    dtype = accumulator(a.dtype)
    return logsumexp(a.to(dtype)[:, :, :, None] + b.to(dtype)[:, None], 2)
