"""IA3: scales of the outputs of a module, or of the inputs of a feed-forward module.

Source: Liu et al. 2022, "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than
In-Context Learning".
"""

from __future__ import annotations

import operator
from typing import Any

from torch import Tensor

from ._kind import After, Config, Factors, Kind, Part, Tensors, register_kind


class Ia3(Kind):
    """IA3. Its tensor is ``(1, I)`` for a feed-forward module and ``(O, 1)`` for other modules."""

    name, rescales = "IA3", "IA3's scales"
    reads = frozenset({"feedforward_modules"})
    ignores = frozenset({"init_ia3_weights", "fan_in_fan_out"})

    def parts(self, config: Config, spec: Any) -> dict[str, Part]:
        """Return the shape of the scales: a matrix, whose sizes :meth:`factors` checks."""
        return {"ia3_l": Part((None, None))}

    def factors(self, parts: Tensors, config: Config, spec: Any, weight: Any = None) -> Factors:
        """Return factors of rank 0, since the scales are the whole adapter."""
        sizes, scales = (spec.in_features, spec.out_features), parts["ia3_l"]
        inputs, outputs = map(operator.index, sizes)
        if tuple(scales.shape) not in ((outputs, 1), (1, inputs)):
            expected, found = f"{(outputs, 1)} or {(1, inputs)}", tuple(scales.shape)
            raise ValueError(f"{spec.name}.ia3_l: shape: expected {expected}, found {found}")
        return Factors(scales.new_zeros(0, inputs), scales.new_zeros(outputs, 0), 1.0)

    def after(self, parts: Tensors, factors: Factors, weight: Any) -> After | None:
        """Return the scales of the outputs, which also multiply the base layer's bias, or None."""
        scales = parts["ia3_l"]
        return After(scales.flatten(), True) if scales.shape[1] == 1 else None

    def before(self, parts: Tensors) -> Tensor | None:
        """Return the scales of the inputs, or None."""
        scales = parts["ia3_l"]
        return None if scales.shape[1] == 1 else scales.flatten()


register_kind(Ia3())
