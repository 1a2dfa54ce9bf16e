"""TinyLoRA: fixed factors A and B, with a few trained values per group of modules between them.

Source: Morris et al. 2026, "Learning to Reason in 13 Parameters".
"""

from __future__ import annotations

from typing import Any

from ._kind import Config, Factors, Kind, Part, Tensors, register_kind


class Tinylora(Kind):
    """TinyLoRA, read from a file that contains the fixed factors."""

    name, title = "TINYLORA", "TinyLoRA"
    shared = ("tinylora_v",)
    saves = ("save_projection",)
    ignores = Kind.ignores | {"projection_seed", "tinylora_dropout", "init_v_bound"}
    counts, numbers = ("r", "u"), ("weight_tying",)

    def parts(self, config: Config, spec: Any) -> dict[str, Part]:
        """Return the shapes of the fixed A, B and P. The trained values are shared by modules."""
        r, u = config.get("r"), config.get("u")
        a, b = Part((r, spec.in_features)), Part((spec.out_features, r))
        return {"tinylora_A": a, "tinylora_B": b, "tinylora_P": Part((u, r, r))}

    def factors(self, parts: Tensors, config: Config, spec: Any, weight: Any = None) -> Factors:
        """Return ``(sum_i v_i P_i) A`` and B, with the values v of the module's group."""
        group = 0
        if config.get("weight_tying") < 1:  # as in PEFT
            total = len(spec.order)
            count = max(1, round(total * (1 - config.get("weight_tying"))))
            group = min(spec.order.index(spec.name) // max(1, total // count), count - 1)
        values, matrices = parts[f"tinylora_v.{group}"], parts["tinylora_P"]
        if values.shape != matrices.shape[:1]:
            expected, found = tuple(matrices.shape[:1]), tuple(values.shape)
            at = f"base_model.tinylora_v.{group}: shape"
            raise ValueError(f"{at}: expected {expected}, found {found}")
        matrix = (values[:, None, None] * matrices).sum(0)
        return Factors(matrix @ parts["tinylora_A"], parts["tinylora_B"], 1.0)


register_kind(Tinylora())
