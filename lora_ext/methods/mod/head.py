"""The output layer of a model: what makes logits of a normed hidden state, and mixes of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_ext._checks import require
from lora_ext.layers import recomputed

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
        """W ``(V, d)`` and b ``(V,)`` or None, as the model has them now, with their graph.

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
        return self.capped(F.linear(normed, weight, bias))

    def capped(self, z: Tensor) -> Tensor:
        """Return logits bounded by ``softcap tanh(z / softcap)``, or as they are without a cap."""
        return z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)


class Layers(NamedTuple):
    """The head's parameters, and each layer's normed hidden states ``(..., d)``, the last layer's
    last, in the dtype of W."""

    head: Head
    weight: Tensor
    bias: Tensor | None
    normed: Sequence[Tensor]

    def flat(self) -> Layers:
        """Return the same with all positions in one dimension: states ``(N, d)``."""
        return self._replace(normed=[n.flatten(0, -2) for n in self.normed])

    def late(self) -> Layers:
        """Return the same without the last layer, from which the others are distilled."""
        return self._replace(normed=self.normed[:-1])


def mixed_logits(layers: Layers, weights: Tensor, chunk: int, probabilities: bool) -> Tensor:
    """The mix of the layers' own logits, or the logarithm of that of their probabilities.

    ``sum_e w_e z_e``, or ``log sum_e w_e softmax(z_e)``, a chunk of the vocabulary at a time: only
    one tensor of ``(..., V)`` stands in memory. The backward computes each chunk again.

    Args:
        layers: k of them. weights: ``(..., k)``. chunk: columns. probabilities: mix these.

    Returns:
        ``(..., V)`` in the dtype of the head.
    """
    head, weight, bias, normed = layers
    chunks = [
        (weight[start : start + chunk], None if bias is None else bias[start : start + chunk])
        for start in range(0, len(weight), chunk)
    ]

    def mix(columns: Tensor, bias: Tensor | None, w: Tensor, *hiddens: Tensor) -> Tensor:
        parts = [w[..., e, None] * head.logits(n, columns, bias) for e, n in enumerate(hiddens)]
        return torch.stack(parts).sum(0).to(columns.dtype)

    def normaliser(columns: Tensor, bias: Tensor | None, *hiddens: Tensor) -> Tensor:
        logits = (head.logits(n, columns, bias).to(weights.dtype) for n in hiddens)
        return torch.stack([z.logsumexp(-1) for z in logits], -1)

    def log_mix(columns: Tensor, bias: Tensor | None, shift: Tensor, *hiddens: Tensor) -> Tensor:
        logits = (head.logits(n, columns, bias).to(weights.dtype) for n in hiddens)
        parts = [shift[..., e, None] + z for e, z in enumerate(logits)]
        return torch.stack(parts).logsumexp(0).to(columns.dtype)

    if not probabilities:
        return torch.cat([recomputed(mix, *c, weights, *normed) for c in chunks], -1)
    lse = torch.stack([recomputed(normaliser, *c, *normed) for c in chunks]).logsumexp(0)
    least = torch.finfo(weights.dtype).tiny
    log_w = weights.clamp(min=least).log().where(weights > 0, -torch.inf)
    shift = log_w - lse  # (..., k)
    return torch.cat([recomputed(log_mix, *c, shift, *normed) for c in chunks], -1)


@contextmanager
def still(layer: nn.Module) -> Iterator[None]:
    """A block in which an output layer draws no dropout, that of its adapters say."""
    drawing = [] if type(layer) is nn.Linear else [m for m in layer.modules() if m.training]
    for module in drawing:
        module.training = False
    try:
        yield
    finally:
        for module in drawing:
            module.training = True


def measured_head(lm: Any, softcap: float | None, entered: Tensor, logits: Tensor) -> Head:
    """The head of a model whose logits are known; those of the last position are looked at.

    Args:
        lm: the causal LM. softcap: what its configuration says.
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
        require(not bool(wanted.isnan().any()), "mod", "model", expected, found)
        heads = [Head(softcap, scale) for scale in _scales(lm)]
        nearest = min(heads, key=lambda h: float((h.capped(z * h.scale) - wanted).norm()))
        if _explains(nearest, z * nearest.scale, wanted):
            return nearest
    raise NotImplementedError(
        f"mod: model: expected logits that are the head's product with the hidden state, scaled or "
        f"soft-capped, found others in {type(lm).__name__}"
    )


def _explains(head: Head, z: Tensor, wanted: Tensor) -> bool:
    """Whether the logits ``(V,)`` of a head, scaled but not capped, are those of the model but for
    rounding.

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
