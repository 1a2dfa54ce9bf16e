"""LoKr: a Kronecker product whose second matrix has low rank.

Source: Yeh et al. 2024, "Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model
Evaluation".
"""

from __future__ import annotations

from typing import Any

import torch

from ._kind import Config, Factors, Part, Tensors, register_kind
from ._loha import Loha


class Lokr(Loha):
    """LoKr. The rank of ``kron(w1, w2_a w2_b)`` is at most r times the smaller size of ``w1``."""

    name, title = "LOKR", "LoKr"
    reads = frozenset({"decompose_both", "decompose_factor"})
    ignores = Loha.ignores | {"rank_dropout_scale"}

    def parts(self, config: Config, spec: Any) -> dict[str, Part]:
        """Return the shapes of w1 and w2, each as a full matrix and as two optional factors."""
        r, free = config.get("r"), Part((None, None), optional=True)
        left, right = Part((None, r), optional=True), Part((r, None), optional=True)
        first = {"lokr_w1": free, "lokr_w1_a": left, "lokr_w1_b": right}
        return first | {"lokr_w2": free, "lokr_w2_a": left, "lokr_w2_b": right}

    def factors(self, parts: Tensors, config: Config, spec: Any, weight: Any = None) -> Factors:
        """Return A = kron(I, w2_b) and B = kron(w1, w2_a); if w1 is wide, exchange I and w1."""
        if "lokr_w2" in parts:
            raise NotImplementedError(
                f"{spec.name}.lokr_w2: expected lokr_w2_a and lokr_w2_b, found a full matrix, "
                "whose Kronecker product has no low rank; PEFT's save_as_lora approximates it"
            )
        w1 = parts["lokr_w1"] if "lokr_w1" in parts else parts["lokr_w1_a"] @ parts["lokr_w1_b"]
        a, b = parts["lokr_w2_b"], parts["lokr_w2_a"]
        one = torch.eye(min(w1.shape), dtype=w1.dtype, device=w1.device)
        first, last = (one, w1) if w1.shape[1] <= w1.shape[0] else (w1, one)
        scaling = config.get("alpha") / config.get("r")
        return Factors(torch.kron(first, a), torch.kron(last, b), scaling)


register_kind(Lokr())
