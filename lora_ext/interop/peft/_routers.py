"""PEFT's layers that mix several adapters per token: X-LoRA and Arrow.

A router computes the weight of each adapter for a token. X-LoRA's router is a classifier; Arrow's
compares the token with a prototype of each adapter. PEFT computes every adapter for every token.
Here, a grouped op computes only K adapters per token. If all are used, their factors are stacked.
Shape letters: ``T`` tokens, ``A`` adapters, ``K`` adapters per token, ``I`` input features.

Sources: X-LoRA (Buehler and Buehler 2024), Arrow (Ostapenko et al. 2024).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from peft.tuners.xlora.layer import XLoraLayer, XLoraLinearLayer
from torch import Tensor

from lora_ext.layers import LoraFactors, base_product, dropout_now, lora_forward, lora_update
from lora_ext.rows import Rows, planned, renumbered

from ._adapters import refuse_exact


def router_of(layer: Any) -> Any:
    """Return the object of X-LoRA that replaces the forward of ``layer``, or None."""
    owner = getattr(layer.__dict__.get("forward"), "__self__", None)
    return owner if isinstance(owner, XLoraLayer) else None


def unmixable(layer: Any, names: Sequence[str]) -> str | None:
    """Return why lora_ext cannot mix these adapters of a fused layer; None if it can."""
    for name in names:
        variant = layer.lora_variant.get(name)
        if variant is not None:
            return f"adapter {name!r} is a {type(variant).__name__}"
        why = layer.uncovered(name)
        if why is not None:
            return why
    dtypes = {a.weight.dtype for name, a in layer.lora_A.items() if name in names}
    if len(dtypes) > 1:
        return f"its adapters have the dtypes {', '.join(sorted(map(str, dtypes)))}"
    return None


class FusedXLora(XLoraLinearLayer):
    """PEFT's X-LoRA layer, with all updates of a token in one op."""

    of_peft = XLoraLinearLayer

    @property
    def names(self) -> list[str]:
        """Names of the layer's adapters, in the order of the classifier's outputs."""
        return list(filter(self.target.lora_A.__contains__, self.target.active_adapters))

    def uncovered(self) -> str | None:
        """Return why PEFT must run the layer; None if lora_ext can run it."""
        if not hasattr(type(self.target), "uncovered"):
            return f"lora_ext does not run a {type(self.target).__name__}"
        b = self.target.lora_B
        biased = [name for name in self.names if b[name].bias is not None]
        if biased:
            return f"adapter {biased[0]!r} has a bias, to which X-LoRA gives no weight"
        return unmixable(self.target, self.names)

    def forward(self, x: Tensor, *args: Any, scalings: Tensor | None = None, **kwargs: Any) -> Any:
        """Map ``(B, L, I)`` to ``(B, L, O)`` with ``scalings (B, L, layers, A)`` as in PEFT."""
        target: Any = self.target
        why = self.uncovered()
        refuse_exact(target.base_layer, why)
        fits = scalings is None or x.shape[:-1] == scalings.shape[:2]
        if why or args or kwargs or not fits or target.merged or self.model.disabled:
            return super().forward(x, *args, scalings=scalings, **kwargs)
        names, top_k = self.names, self.config.top_k_lora
        factors = [target.factors_of(name) for name in names]
        if not factors or (top_k == 0 and scalings is not None):
            return base_product(target.base_layer, x)
        if scalings is None:
            return lora_forward(x, target.base_layer, factors)
        weights, ids = scalings[:, :, self.layer_number].flatten(0, 1), None  # (T, outputs)
        active = [*target.active_adapters, *[""] * weights.shape[1]][: weights.shape[1]]
        if top_k is not None:
            weights, ids = weights.topk(top_k, -1)  # (T, K)
        if self.config.enable_softmax_topk:  # over the weights that are not 0
            none = weights == 0
            weights = weights.masked_fill(none, float("-inf")).softmax(-1).masked_fill(none, 0)
        weights = weights * self.config.global_scaling_weight
        if ids is None:
            if len(active) > len(names):
                weights = weights[:, [i for i, name in enumerate(active) if name in names]]
        elif len(active) > len(names):
            ids = renumbered(ids, [names.index(n) if n in names else -1 for n in active])
        return lora_forward(x, target.base_layer, factors, *_mixture(len(names), ids, weights))


def _mixture(count: int, ids: Tensor | None, w: Tensor) -> tuple[Rows | None, Tensor | None]:
    """Return the last two arguments of `lora_forward`; ``ids (T, K)`` is None if all are used."""
    return (None, w) if ids is None else (planned(tuple(range(count)), ids.int(), w), None)


def arrow_uncovered(layer: Any, name: str) -> str | None:
    """Return why PEFT must run a layer with the Arrow router ``name``; None if lora_ext can."""
    if getattr(layer.base_layer, "exact", False):
        return f"adapter {name!r} routes tokens by a product that is not exact"
    return unmixable(layer, layer.lora_arrow[name].task_adapter_names)


def arrow_forward(layer: Any, x: Tensor, name: str) -> Tensor:
    """Return the output of a fused layer with the Arrow router ``name``; ``x`` is ``(..., I)``."""
    arrow = layer.lora_arrow[name]
    a, b, scaling = layer.lora_A, layer.lora_B, layer.scaling
    arrow.gen_know_sub(a, b)
    arrow.build_prototypes(a, b)
    names = arrow.task_adapter_names
    factors = [LoraFactors(a[n].weight, b[n].weight, scaling[n]) for n in names]
    tokens = x.reshape(-1, x.shape[-1]).to(factors[0].a.dtype)  # (T, I)
    similar = (tokens @ arrow.prototypes.T).abs()  # (T, A)
    ids = None
    if arrow.top_k != len(names):
        similar, ids = similar.topk(arrow.top_k, 1)  # (T, K)
    mixture = _mixture(len(names), ids, (similar / arrow.temperature).softmax(1))
    dropout = layer.lora_dropout[name]
    if not dropout_now(dropout):
        return lora_forward(x, layer.base_layer, factors, *mixture)
    y = base_product(layer.base_layer, x)  # Arrow's dropout is applied to the update, not to x.
    return (y + dropout(lora_update(x, factors, *mixture))).to(y.dtype)
