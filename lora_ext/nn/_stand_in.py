"""``ops.lora_linear`` by the ops that exist; gone when the fused op lands."""

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_ext import ops


def lora_linear(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    adapter_ids: Tensor,
    scale: Tensor | None = None,
    ranks: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    plan: Tensor | None = None,
) -> Tensor:
    """``base + update`` of every row, ``(T, O)``."""
    dropped = lora_dropout(x, dropout_p, seed) if dropout_p else x
    y = ops.lora_apply(dropped, a, b, adapter_ids, scale, ranks, None, plan)
    return y if weight is None else y + F.linear(x, weight, bias)


def lora_dropout(x: Tensor, p: float, seed: Tensor | None) -> Tensor:
    """Inverted dropout, a function of the seed."""
    assert seed is not None
    generator = torch.Generator(x.device).manual_seed(int(seed))
    keep = torch.rand(x.shape, generator=generator, device=x.device) >= p
    return torch.where(keep, x / (1 - p), 0)
