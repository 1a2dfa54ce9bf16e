"""AdaLoRA: LoRA with a singular value for each rank; training removes unimportant ranks.

Source: Zhang et al. 2023, "AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient
Fine-Tuning".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lora_ext._checks import require

from ._kind import Config, Factors, Kind, Part, Tensors, register_kind
from ._lora import Lora

_TRAINED = "target_r init_r total_step tinit tfinal deltaT beta1 beta2 orth_reg_weight"


class Adalora(Kind):
    """AdaLoRA. ``rank_pattern`` maps a module to a list of bools: which initial ranks are kept."""

    name, title = "ADALORA", "AdaLoRA"
    reads = frozenset({"r", "rank_pattern"})
    ignores = Lora.ignores | Kind.ignores | {*_TRAINED.split(), "alpha_pattern"}
    refuses: Mapping[str, str] = {
        **Lora.refuses,
        **dict.fromkeys(
            ("use_dora", "use_rslora", "lora_bias", "alora_invocation_tokens"), "PEFT ignores it"
        ),
        "target_parameters": "PEFT has no AdaLoRA on experts",
        "trainable_token_indices": "only LoRA is supported with it",
    }
    counts, numbers = ("init_r",), ("lora_alpha",)

    def parts(self, config: Config, spec: Any) -> Mapping[str, Part]:
        """Return the shapes of A, B and the singular values, with only the ranks that are kept."""
        r, table = config.get("init_r"), config.get("rank_pattern") or {}
        pairs: Any = table.items() if isinstance(table, Mapping) else [(table, None)]
        fits = all(isinstance(n, str) and isinstance(k, list | tuple | Tensor) for n, k in pairs)
        expected = "a list of booleans for each module"
        require(fits, self.title, "rank_pattern", expected, f"{table!r:.200}")
        for name, kept in pairs:
            if f"{spec.name}.lora_E" == name.removeprefix("base_model.model."):
                r = sum(map(bool, kept))
        a, b = Part((r, spec.in_features)), Part((spec.out_features, r))
        return {"lora_A": a, "lora_B": b, "lora_E": Part((r, 1))}

    def factors(self, parts: Tensors, config: Config, spec: Any, weight: Any = None) -> Factors:
        """Return A times the singular values, B, and the scaling ``alpha / (init_r + 1e-5)``.

        As in PEFT, the rank replaces an alpha that is not above 0.
        """
        a, b, values = (parts[f"lora_{each}"] for each in "ABE")
        alpha = config.get("lora_alpha")
        scaling = (alpha if alpha > 0 else float(len(a))) / (config.get("init_r") + 1e-5)
        return Factors(a * values, b, scaling)


register_kind(Adalora())
