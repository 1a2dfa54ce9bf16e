"""Losses over a vocabulary, computed from all logits at once.

Letters: ``N`` rows, ``d`` features, ``V`` vocabulary, ``k`` hidden states per row.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ._lora import accumulator


def vocab_logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None
) -> Tensor:
    """Compute ``z = hidden @ weight^T + bias``, or ``c * tanh(z / c)`` with a softcap ``c``.

    The result is float32 (float64 for float64).
    """
    wide = accumulator(torch.promote_types(hidden.dtype, weight.dtype))
    z = F.linear(hidden.to(wide), weight.to(wide), None if bias is None else bias.to(wide))
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def chunked_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    ignore_index: int = -100,
    softcap: float | None = None,
) -> Tensor:
    """Compute ``mean_n (log sum_v exp z[n, v] - z[n, y_n])`` over the rows that are not ignored.

    ``z`` are the logits and ``y`` the labels. The loss is 0 if all rows are ignored.
    """
    valid = labels != ignore_index
    log_p = vocab_logits(hidden, weight, bias, softcap).log_softmax(-1)
    rows = -log_p.gather(-1, labels.where(valid, 0)[:, None]).squeeze(-1)
    return rows.where(valid, 0).sum() / valid.sum().clamp(min=1)


def chunked_kl(
    hiddens: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    tau: float = 1.0,
    mask: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Compute ``tau^2`` times the mean of ``KL(softmax(z_k / tau) || softmax(z_e / tau))``.

    The mean is over the students ``e < k`` and the rows that ``mask`` selects. The last of
    ``hiddens`` is the teacher and has no gradient. The loss is 0 if ``mask`` selects no row, or if
    there is no student.
    """
    *students, teacher = (vocab_logits(h, weight, bias, softcap) / tau for h in hiddens)
    log_p = teacher.detach().log_softmax(-1)  # (N, V)
    valid = torch.ones_like(log_p[:, 0], dtype=torch.bool) if mask is None else mask
    rows = log_p.new_zeros(len(log_p))
    for student in students:
        gap = log_p - student.log_softmax(-1)
        rows = rows + (log_p.exp() * gap).where(log_p > -torch.inf, 0).sum(-1)
    count = valid.sum().clamp(min=1) * max(len(students), 1)
    return tau**2 * rows.where(valid, 0).sum() / count
