"""Norms of language models, classified by the function that they compute instead of by their
class."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lora_ext import reference

_EPS_NAMES = ("eps", "variance_epsilon", "epsilon", "norm_eps")


class NormForm(NamedTuple):
    """Formula of a norm: ``(offset + weight) * h / sqrt(mean(h^2) + eps) + bias``; "layer"
    subtracts the mean of ``h`` first."""

    kind: str  # "rms" or "layer"
    eps: float
    offset: int  # 1 in Gemma's norms, which store the weight minus 1

    def gamma(self, norm: nn.Module) -> Tensor:
        """Return ``offset + weight``, ``(d,)``. If the offset is 1, the sum of 16-bit weights is
        computed in float32, which is exact."""
        weight: Any = norm.weight
        if not self.offset:
            return weight
        return weight.to(torch.promote_types(weight.dtype, torch.float32)) + self.offset


def norm_form(norm: nn.Module, where: str) -> NormForm:
    """Determine the form of a norm: RMSNorm with a weight or with 1 + weight, or LayerNorm.

    The norm is run on a few rows, and the result is compared with each formula.

    Args:
        norm: any module.
        where: start of the message of an error: function and argument.

    Raises:
        TypeError: If the module has no weight ``(d,)``, or computes another function.
    """
    weight: Any = getattr(norm, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 1 or not weight.is_floating_point():
        shape = tuple(weight.shape) if isinstance(weight, Tensor) else None
        raise _refusal(norm, where, f"a weight of shape {shape}")
    if weight.is_meta:
        raise _refusal(norm, where, "a weight on the meta device, which has no values")
    bias: Any = getattr(norm, "bias", None)
    wide = torch.promote_types(weight.dtype, torch.float32)
    # Rows with a mean of zero would not distinguish RMSNorm from LayerNorm. The last row is so
    # small that eps matters.
    steps = torch.arange(3 * weight.numel(), device=weight.device, dtype=wide).view(3, -1)
    rows = (steps * 0.7548776662).frac() - 0.3
    rows[2] *= 1e-3
    rows = rows.to(weight.dtype)
    with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
        try:
            found = norm(rows).to(wide)
        except (RuntimeError, TypeError, ValueError, NotImplementedError) as error:
            raise _refusal(norm, where, f"an error for shape (3, d): {error!s:.200}") from None
        bound = 4 * torch.finfo(weight.dtype).eps * found.abs().max() + 1e-5
        # If eps is None, torch's RMSNorm uses the machine epsilon of its weight's dtype or of its
        # compute dtype.
        eps = next((getattr(norm, name) for name in _EPS_NAMES if hasattr(norm, name)), None)
        unknown = [torch.finfo(dtype).eps for dtype in (weight.dtype, wide)]
        values = unknown if eps is None else [float(eps)]
        for value, kind, offset in itertools.product(values, ("rms", "layer"), (0, 1)):
            form = NormForm(kind, value, offset)
            wanted = reference.depth_norm(rows, form.gamma(norm), form.eps, bias, form.kind)
            if found.shape == wanted.shape and bool(((found - wanted).abs() <= bound).all()):
                return form
    raise _refusal(norm, where, "it computes another function")


def _refusal(norm: nn.Module, where: str, found: str) -> TypeError:
    return TypeError(
        f"{where}: expected a norm like RMSNorm or LayerNorm, with a weight of the width of the "
        f"hidden states, found {type(norm).__name__}: {found}"
    )
