"""LoHa: the elementwise product of two low-rank updates.

Source: Hyeon-Woo et al. 2022, "FedPara: Low-Rank Hadamard Product for Communication-Efficient
Federated Learning".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ._kind import Config, Factors, Kind, Part, Tensors, register_kind


class Loha(Kind):
    """LoHa. The update has rank r^2, since the elementwise product of two sums of r terms is the
    sum over all pairs of terms."""

    name, title = "LOHA", "LoHa"
    ignores = Kind.ignores | {"rank_dropout", "module_dropout", "use_effective_conv2d"}
    patterns: Mapping[str, str] = {"rank_pattern": "r", "alpha_pattern": "alpha"}
    counts, numbers = ("r",), ("alpha",)

    def parts(self, config: Config, spec: Any) -> Mapping[str, Part]:
        """Return the shapes of the factors ``a`` and ``b`` of both updates."""
        r = config.get("r")
        shapes = {"a": (spec.out_features, r), "b": (r, spec.in_features)}
        return {f"hada_w{i}_{side}": Part(s) for i in (1, 2) for side, s in shapes.items()}

    def factors(self, parts: Tensors, config: Config, spec: Any, weight: Any = None) -> Factors:
        """Return A with products of all pairs of rows, and B with products of pairs of columns."""
        (a1, b1), (a2, b2) = ([parts[f"hada_w{i}_{side}"] for side in "ab"] for i in (1, 2))
        a = (b1[:, None] * b2[None]).flatten(0, 1)
        return Factors(
            a, (a1[:, :, None] * a2[:, None]).flatten(1), config.get("alpha") / config.get("r")
        )


register_kind(Loha())
