"""DoRA: each row of ``W + s B A`` is rescaled to a trained norm, its magnitude.

``y = (m / norm) * ((W + s B A) x) + bias`` with ``norm = || W + s B A ||`` per row of the matrix.

Source: Liu et al. 2024, "DoRA: Weight-Decomposed Low-Rank Adaptation", eq. 5.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lora_ext import ops

from ._kind import After, Config, Factors, Part, Tensors, register_kind
from ._lora import Lora


class Dora(Lora):
    """LoRA with a magnitude for each output."""

    title, rescales = "DoRA", "a DoRA magnitude"
    when = "use_dora"
    reads = Lora.reads | {when}
    needs_weight = True
    vector = "lora_magnitude_vector"

    def parts(self, config: Config, spec: Any) -> dict[str, Part]:
        """Return the shapes of A, B and the magnitude."""
        ones = (1,) * len(spec.kernel)
        shape = (1, spec.out_features, *ones) if ones else (spec.out_features,)
        return {**super().parts(config, spec), self.vector: Part(shape)}

    def stems(self, embedding: bool) -> dict[str, str]:
        """Return the stems of LoRA's tensors and of the magnitude."""
        return super().stems(embedding) | {"after": self.vector}

    def after(self, parts: Tensors, factors: Factors, weight: Any) -> After | None:
        """Return ``m / norm``. The bias of the base layer is not scaled."""
        return After(normed(parts[self.vector], weight, *factors[:3]))


def normed(
    magnitude: Tensor, weight: Tensor, a: Tensor, b: Tensor, scaling: Any, norm: Any = None
) -> Tensor:
    """Return ``magnitude / norm``, the scales of the outputs, in the dtype of the magnitude.

    If ``norm`` is None, it is computed: the norm of each row of ``weight + scaling * b @ a``.
    """
    norm = ops.lora_dora_norm(weight, a, b, scaling) if norm is None else norm
    return magnitude / norm.to(magnitude.dtype)


register_kind(Dora())
