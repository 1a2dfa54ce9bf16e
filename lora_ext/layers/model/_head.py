"""Output head of a causal language model, which computes logits from hidden states.

Shape letters: ``V`` tokens in the vocabulary, ``d`` hidden features.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_ext._checks import require
from lora_ext._torch import linear

#: Attributes of models or configurations that multiply or divide the logits.
_SCALES = ("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier")


@dataclass(frozen=True)
class Head:
    """Output head with logits ``z = c tanh(s (W n + b) / c)``, or ``s (W n + b)`` without a cap.

    n is the normalised hidden state, W and b are the weight and bias of the output layer.

    Attributes:
        softcap: c, the bound of the logits, or None.
        scale: s, which some models apply to their logits (Cohere, Granite).
    """

    softcap: float | None
    scale: float = 1.0

    def parameters(self, lm: Any) -> tuple[Tensor, Tensor | None]:
        """Return the current ``s W (V, d)`` and ``s b (V,)`` or None, with their autograd graph.

        If the output layer is not a plain ``nn.Linear``, for example with adapters, W is computed
        by applying the layer to the unit vectors.
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
        """Return logits of normalised states ``(..., d)``; ``weight`` is all or part of s W."""
        return self.capped(linear(normed, weight, bias))

    def capped(self, z: Tensor) -> Tensor:
        """Return ``softcap * tanh(z / softcap)``, or ``z`` if there is no cap."""
        return z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)


def causal_lm(model: Any, where: str) -> Any:
    """Return the causal LM of transformers inside a model that PEFT or others may have wrapped.

    Raises:
        ValueError: If the model contains no causal LM.
        NotImplementedError: If the model is an encoder-decoder model.
    """
    found = type(model).__name__
    module: Any
    for module in model.modules() if isinstance(model, nn.Module) else ():
        if not hasattr(type(module), "get_output_embeddings"):
            continue
        fits = not getattr(module.config, "is_encoder_decoder", False)
        other = f"a {type(module).__name__} with an encoder"
        require(fits, where, "model", "a decoder-only model", other, NotImplementedError)
        if module.get_output_embeddings() is not None:
            return module
        found = f"{type(module).__name__}, which has no output embeddings"
        break
    raise ValueError(f"{where}: model: expected a causal LM of transformers, found {found}")


def measured_head(
    where: str, lm: Any, softcap: float | None, entered: Tensor, logits: Tensor
) -> Head:
    """Return the output head of a model, determined from the logits of the last position.

    Args:
        where: start of error messages.
        lm: causal LM of transformers.
        softcap: bound of the logits in the model's configuration, or None.
        entered: input of the output layer in a forward, ``(..., d)``.
        logits: output of the model in this forward, ``(..., V)``.

    Raises:
        NotImplementedError: If :class:`Head` cannot represent how the logits depend on ``W n + b``.
        ValueError: If a logit is NaN.
    """
    layer: Any = lm.get_output_embeddings()
    with torch.no_grad():
        if type(layer) is nn.Linear:
            last = entered.flatten(0, -2)[-1].to(layer.weight)
            z = F.linear(last, layer.weight, layer.bias).float()
        else:  # rows may have different adapters, so the layer needs all rows
            z = layer(entered).flatten(0, -2)[-1].float()
        wanted = logits.flatten(0, -2)[-1].float()
        expected = "logits without NaN in the first forward, which determines the head"
        found = f"NaN among the logits of {type(lm).__name__}"
        require(not bool(wanted.isnan().any()), where, "model", expected, found)
        heads = [Head(softcap, scale) for scale in _scales(lm)]
        nearest = min(heads, key=lambda h: float((h.capped(z * h.scale) - wanted).norm()))
        if _explains(nearest, z * nearest.scale, wanted):
            return nearest
    expected = "logits that are the head's product with the hidden state, scaled or soft-capped"
    found = f"other logits from {type(lm).__name__}"
    raise NotImplementedError(f"{where}: model: expected {expected}, found {found}")


def _explains(head: Head, z: Tensor, wanted: Tensor) -> bool:
    """Return whether a head gives the model's logits ``wanted (V,)``, up to rounding.

    ``z`` are the scaled logits before the cap. The tolerance allows for half precision, or autocast
    only in the head. Rounding errors have arbitrary directions, but a wrong scale changes the
    logits along their derivative with respect to the scale. The error along this direction must
    therefore be of the same size as the remaining error.
    """
    found, off = head.capped(z), wanted - head.capped(z)
    if not bool((off.abs() <= 0.02 * wanted.abs().max() + 1e-5).all()):
        return False
    slope = z if head.softcap is None else z * (1 - (found / head.softcap).square())
    along = F.normalize(slope, dim=0) @ off
    rest = (off.square().sum() - along.square()).clamp(min=0).sqrt()
    return bool(along.abs() <= 3 * rest + 1e-5 * slope.norm())


def softcap_of(lm: Any) -> float | None:
    """Return ``final_logit_softcapping`` of a model or its configuration, or None if not set."""
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
    """Return the number of input features of an output layer that PEFT may have wrapped."""
    base = getattr(layer, "get_base_layer", lambda: layer)()
    base = getattr(base, "original_module", base)
    return getattr(base, "in_features", base.weight.shape[1])
