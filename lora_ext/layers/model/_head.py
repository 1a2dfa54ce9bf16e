"""The output layer of a causal language model: where it is, and what it makes of a hidden state."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_ext._checks import require
from lora_ext._torch import linear

#: What models call the number that their logits are multiplied by or divided by.
_SCALES = ("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier")


@dataclass(frozen=True)
class Head:
    """``z = c tanh(s (W n + b) / c)``, or ``s (W n + b)`` without a cap.

    Attributes:
        softcap: c, or None.
        scale: s, for the models that scale their logits (Cohere, Granite).
    """

    softcap: float | None
    scale: float = 1.0

    def parameters(self, lm: Any) -> tuple[Tensor, Tensor | None]:
        """Return W ``(V, d)`` and b ``(V,)`` or None, as the model has them now, with their graph.

        Of a head that is no plain linear layer, one with adapters say, W is what the head makes of
        the unit vectors.
        """
        layer: Any = lm.get_output_embeddings()
        if type(layer) is nn.Linear:
            weight, bias = layer.weight, layer.bias
        else:
            width, like = head_width(layer), next(layer.parameters())
            units = torch.eye(width, dtype=like.dtype, device=like.device)
            columns = layer(torch.cat([units, units.new_zeros(1, width)]))  # (d + 1, V)
            weight, bias = (columns[:-1] - columns[-1:]).T, columns[-1]
        if self.scale == 1:
            return weight, bias
        return self.scale * weight, None if bias is None else self.scale * bias

    def logits(self, normed: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return the logits of normed states ``(..., d)``: ``(..., V)``, or those of the rows of W
        that are given."""
        return self.capped(linear(normed, weight, bias))

    def capped(self, z: Tensor) -> Tensor:
        """Return logits bounded by ``softcap tanh(z / softcap)``, or as they are without a cap."""
        return z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)


def causal_lm(model: Any, where: str) -> Any:
    """Return the causal LM of transformers in a model, which may be wrapped by PEFT or by others.

    Raises:
        ValueError: there is none. NotImplementedError: one with an encoder beside its decoder.
    """
    found = type(model).__name__
    module: Any
    for module in model.modules() if isinstance(model, nn.Module) else ():
        if not hasattr(type(module), "get_output_embeddings"):
            continue
        fits = not getattr(module.config, "is_encoder_decoder", False)
        other = f"an encoder beside it in {type(module).__name__}"
        require(fits, where, "model", "a decoder alone", other, NotImplementedError)
        if module.get_output_embeddings() is not None:
            return module
        found = f"{type(module).__name__}, which has no output embeddings"
        break
    raise ValueError(f"{where}: model: expected a causal LM of transformers, found {found}")


def measured_head(
    where: str, lm: Any, softcap: float | None, entered: Tensor, logits: Tensor
) -> Head:
    """Return the head of a model whose logits are known; those of the last position are looked at.

    Args:
        where: who asks, for its errors. lm: the causal LM. softcap: what its configuration says.
        entered: ``(..., d)``, what entered the head. logits: ``(..., V)``, what came out.

    Raises:
        NotImplementedError: the logits are no such function of ``W n + b``. ValueError: one is NaN.
    """
    layer: Any = lm.get_output_embeddings()
    with torch.no_grad():
        if type(layer) is nn.Linear:
            last = entered.flatten(0, -2)[-1].to(layer.weight)
            z = F.linear(last, layer.weight, layer.bias).float()
        else:  # each row may have adapters of its own, so that one alone would be another's
            z = layer(entered).flatten(0, -2)[-1].float()
        wanted = logits.flatten(0, -2)[-1].float()
        expected = "logits that are numbers in the first forward, which shows what the head does"
        found = f"NaN among those of {type(lm).__name__}"
        require(not bool(wanted.isnan().any()), where, "model", expected, found)
        heads = [Head(softcap, scale) for scale in _scales(lm)]
        nearest = min(heads, key=lambda h: float((h.capped(z * h.scale) - wanted).norm()))
        if _explains(nearest, z * nearest.scale, wanted):
            return nearest
    expected = "logits that are the head's product with the hidden state, scaled or soft-capped"
    found = f"others in {type(lm).__name__}"
    raise NotImplementedError(f"{where}: model: expected {expected}, found {found}")


def _explains(head: Head, z: Tensor, wanted: Tensor) -> bool:
    """Return whether the logits ``(V,)`` of a head, scaled but not capped, are those of the model
    but for rounding.

    Half precision, or autocast in the head alone, is the coarsest that is to be told apart. What
    rounding does points anywhere; another scale moves the logits along their derivative in it, and
    is seen where they move farther that way than rounding explains by what they do otherwise.
    """
    found, off = head.capped(z), wanted - head.capped(z)
    if not bool((off.abs() <= 0.02 * wanted.abs().max() + 1e-5).all()):
        return False
    slope = z if head.softcap is None else z * (1 - (found / head.softcap).square())
    along = F.normalize(slope, dim=0) @ off
    rest = (off.square().sum() - along.square()).clamp(min=0).sqrt()
    return bool(along.abs() <= 3 * rest + 1e-5 * slope.norm())


def softcap_of(lm: Any) -> float | None:
    """Return the ``final_logit_softcapping`` of a model or its configuration, None without one."""
    for holder in (lm, lm.config.get_text_config(decoder=True), lm.config):
        found = getattr(holder, "final_logit_softcapping", None)
        if found is not None:
            return float(found)
    return None


def _scales(lm: Any) -> Iterator[float]:
    yield 1.0
    holders = (lm, lm.config.get_text_config(decoder=True), lm.config)
    for value in (getattr(holder, name, None) for holder in holders for name in _SCALES):
        if isinstance(value, int | float) and value:
            yield from (float(value), 1 / value)


def head_width(layer: Any) -> int:
    """Return how many features an output layer takes, below PEFT's wrappers where it has them."""
    base = getattr(layer, "get_base_layer", lambda: layer)()
    base = getattr(base, "original_module", base)
    return getattr(base, "in_features", base.weight.shape[1])
