"""TokenBridge: a hidden state, moved to where one more token would bring it.

A draft that starts behind a decided token cannot have that token's hidden state: the model has not
seen it yet. The bridge guesses it from the state before the token and the token's embedding.

Source: draft heads that read the token before theirs are Hydra's (Ankner et al. 2024, arXiv
2402.05109) and EAGLE's (Li et al. 2024, arXiv 2401.15077); a circuit behind one is ours
(docs/mtpc.md, "Bridge").
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_ext._checks import require
from lora_ext.reference import accumulator


class TokenBridge(nn.Module):
    """``h + |h| (skip z + down (silu(gate z) * up z))`` with ``z = [h / |h|; e / |e|]``.

    ``|.|`` is the root of the mean square. The three products with ``z`` are one. ``down`` and
    ``skip`` start at zero, so that a new bridge changes nothing.

    Args:
        hidden_size: ``D``, of states and embeddings. width: ``W``, of the gated layer, at least 1.
        dtype, device: of the parameters.

    Attributes:
        read: ``(2 W + D, 2 D)``: gate, up and skip, one below the other.
        down: ``(D, W)``.

    Raises:
        ValueError: a size below 1.
    """

    def __init__(
        self,
        hidden_size: int,
        width: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        for name, size in (("hidden_size", hidden_size), ("width", width)):
            require(size >= 1, "TokenBridge", name, "at least 1", size)
        options: dict[str, Any] = {"dtype": dtype, "device": device}
        self.hidden_size, self.width = hidden_size, width
        self.read = nn.Linear(2 * hidden_size, 2 * width + hidden_size, bias=False, **options)
        self.down = nn.Linear(width, hidden_size, bias=False, **options)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """New initial values, from torch's generator."""
        self.read.reset_parameters()
        nn.init.zeros_(self.read.weight[2 * self.width :])
        nn.init.zeros_(self.down.weight)

    def forward(self, h: Tensor, embedded: Tensor) -> Tensor:
        """States ``(..., D)`` and the embeddings of the tokens that follow, ``(..., D)``, to states
        ``(..., D)`` in the dtype of the parameters."""
        h, embedded = (t.to(self.down.weight.dtype) for t in (h, embedded))
        shape = (self.hidden_size,)
        z = torch.cat([F.rms_norm(h, shape), F.rms_norm(embedded, shape)], -1)
        gate, up, skip = self.read(z).split([self.width, self.width, self.hidden_size], -1)
        moved = skip + self.down(F.silu(gate) * up)
        # As the norm's own sum: squares of halves overflow, and a root at zero has no gradient.
        length = torch.linalg.vector_norm(h, dim=-1, keepdim=True, dtype=accumulator(h.dtype))
        size = (length / math.sqrt(self.hidden_size)).to(h.dtype)
        return torch.addcmul(h, size, moved)

    def extra_repr(self) -> str:
        """Sizes."""
        return f"{self.hidden_size}, width={self.width}"
