"""The tree that data suggest for a hidden Chow-Liu tree."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lora_ext.circuits.errors import require


def chow_liu_parents(x: Tensor, num_categories: int) -> list[int]:
    """The tree of largest total mutual information between observed variables.

    Args:
        x: ``(B, n)`` integer tensor without missing values.
        num_categories: values run over ``0 .. num_categories - 1``.

    Returns:
        Parents for ``RegionGraph.hclt``; variable 0 is the root.

    Raises:
        ValueError: if ``x`` is no integer tensor of that shape and range, or has no rows.

    Source: Chow and Liu 1968.
    """
    where = "chow_liu_parents: x"
    is_tensor = isinstance(x, Tensor)
    found = (
        f"{type(x).__module__}.{type(x).__name__}; torch.as_tensor(x) makes one"
        if not is_tensor
        else ""
    )
    require(is_tensor, where, "a tensor", found)
    require(
        not x.is_floating_point() and not x.is_complex(),
        where,
        "integers",
        f"{x.dtype}; bin real numbers first, or call x.long() if these are whole",
    )
    require(x.dim() == 2 and x.numel() > 0, where, "shape (B, n), not empty", tuple(x.shape))
    x = x.long()
    low, high = int(x.min()), int(x.max())
    require(
        low >= 0 and high < num_categories,
        where,
        f"values in 0 .. {num_categories - 1}, none missing",
        f"{low} .. {high}",
    )
    one_hot = torch.nn.functional.one_hot(x, num_categories).double()  # (B, n, V)
    joint = torch.einsum("bnv,bmw->nmvw", one_hot, one_hot) / len(x)
    single = one_hot.mean(0)
    independent = single[:, None, :, None] * single[None, :, None, :]
    information = torch.xlogy(joint, joint) - torch.xlogy(joint, independent)
    gain = information.sum((2, 3))
    n = gain.shape[0]
    parents, best, link = [-1] * n, [-math.inf] * n, [0] * n
    outside, last = set(range(1, n)), 0
    while outside:
        for v in outside:
            if gain[last, v] > best[v]:
                best[v], link[v] = float(gain[last, v]), last
        last = max(sorted(outside), key=lambda v: best[v])
        parents[last] = link[last]
        outside.remove(last)
    return parents
