"""Sum layers of probabilistic circuits in log space, one formula per function.

Letters: ``B`` rows, ``I`` terms of a sum, ``O`` sums, ``G`` groups.

Log-weights and values may be ``-inf``. A sum whose terms are all ``-inf`` is ``-inf`` with gradient
zero, never NaN.
"""

from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor

from ._circuit import log_softmax, logsumexp
from ._lora import accumulator

NORMS = ("logits", "logprobs", "probs", "none")


class LogMax(NamedTuple):
    """Result of the max semiring.

    Attributes:
        values: ``max_i (log W[o, i] + values[i])``, in the shape of the sum.
        indices: Lowest ``i`` with this value, int64; 0 if all terms are ``-inf``.
    """

    values: Tensor
    indices: Tensor


def log_weights(w: Tensor, norm: str) -> Tensor:
    """Convert weights to log-weights, float32 (float64 for float64).

    ``norm`` is one of :data:`NORMS`, see :func:`lora_ext.ops.log_einsum_exp`.
    """
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
    """Compute the sum layer ``out[b, o] = log sum_i W[o, i] exp(values[b, i])``.

    The semiring "max" uses the largest term instead of the sum.
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
    """Compute ``out[m, n] = log sum_k exp(a[m, k] + b[k, n])`` per batch, ``(B, M, N)``."""
    dtype = accumulator(a.dtype)
    return logsumexp(a.to(dtype)[:, :, :, None] + b.to(dtype)[:, None], 2)
