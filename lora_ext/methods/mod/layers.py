"""DepthMixer: a weighted sum of a language model's last hidden states, each with its own norm.

The kind of a norm is determined by the values that it computes, not by its class.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lora_ext import ops, reference
from lora_ext._checks import require
from lora_ext.rows import constant

from .config import ModConfig

_MAX_HIDDENS = 8  # maximum number of hidden states per call of the kernel


class DepthMixer(nn.Module):
    """Weighted sum of k hidden states, each after its own norm, with weights from a router.

    ``u[t] = sum_e w[t, e] norm_e(h_e[t])`` for position t and layer e, with
    ``w[t] = softmax(R norm_k(h_k[t]) + c)`` for the router "token", ``softmax(c)`` for "static",
    and given weights for "fixed". Initially ``R = 0``, and ``c`` gives the last hidden state the
    weight ``final_mass`` and all other hidden states equal weights.

    If ``k = 1``, the norm module itself is called, and the weight is 1.

    Shape letters: ``d`` hidden width, ``k`` hidden states.

    Args:
        norms: k modules that all compute RMSNorm, or all LayerNorm, in the order of the layers;
            the last is the model's final norm. The modules are not copied.
        config: settings; only k, router, final_mass, fixed_weights and share_final_norm are used.
            With share_final_norm, the last norm is not a child of the mixer: the norm's parameters
            are not in the mixer's state dict, but calls such as ``to`` on the mixer convert these
            parameters, too.

    Attributes:
        norms: norms that belong to the mixer.
        final_norm: norm of the last hidden state.
        router: R, ``(k, d)``, for the router "token", otherwise None.
        bias: c, ``(k,)``, for the routers "token" and "static", otherwise None.

    Raises:
        TypeError: If a norm computes neither RMSNorm nor LayerNorm.
        ValueError: If the number of norms is not k, or their widths, eps or formulas differ.

    Source: arXiv 2410.13077; router and initial values are our choice (docs/mod.md).
    """

    final_norm: nn.Module
    router: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(self, norms: Sequence[nn.Module], config: ModConfig):
        super().__init__()
        k = config.k
        require(len(norms) == k, "DepthMixer", "norms", f"k = {k} modules", len(norms))
        forms = [_norm_form(norm, f"DepthMixer: norms: {e}") for e, norm in enumerate(norms)]
        weights: list[Any] = [norm.weight for norm in norms]
        for e in range(k):
            found, wanted = (forms[e], *weights[e].shape), (forms[-1], *weights[-1].shape)
            require(found == wanted, "DepthMixer: norms", str(e), f"{wanted}, as the last", found)
        self.config = config
        self.form = forms[-1]
        self.norms = nn.ModuleList(norms[:-1] if config.share_final_norm else norms)
        # Not registered as a child: a shared norm is in the model's state dict already.
        self.__dict__["final_norm"] = norms[-1]
        width, wide = weights[-1].shape, torch.promote_types(weights[-1].dtype, torch.float32)
        settings: Any = {"dtype": wide, "device": weights[-1].device}
        self.router = self.bias = None
        if config.router == "token":
            self.router = nn.Parameter(torch.zeros(k, *width, **settings))
        if config.router != "fixed":
            bias = torch.zeros(k, **settings)
            if k > 1:
                bias[-1] = math.log(config.final_mass * (k - 1) / (1 - config.final_mass))
            self.bias = nn.Parameter(bias)

    def forward(self, hiddens: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Compute the mixture.

        Args:
            hiddens: k hidden states ``(..., d)`` before the norms, in the order of the layers.

        Returns:
            The mixture ``(..., d)`` in the dtype of the hidden states, to be used in place of the
            normed last hidden state; and the weights ``(..., k)``, float32 (float64 for float64).

        Raises:
            ValueError: If the number of hidden states is not k, or their shapes, dtypes or devices
                differ.
        """
        self._check(hiddens)
        if self.config.k == 1:
            return self.final_norm(hiddens[0]), self.weights(hiddens)
        (gammas, betas), (kind, eps, _) = self._affine(), self.form
        if self.router is not None and self.bias is not None and len(hiddens) <= _MAX_HIDDENS:
            return ops.depth_mix_routed(hiddens, gammas, self.router, self.bias, eps, betas, kind)
        weights = self.weights(hiddens)
        parts: list[Tensor] = []
        for start in range(0, len(hiddens), _MAX_HIDDENS):
            part = slice(start, start + _MAX_HIDDENS)
            own = hiddens[part], gammas[part], weights[..., part]
            shift = None if betas is None else betas[part]
            parts.append(ops.depth_mix(*own, eps, shift, kind))
        return (parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)), weights

    def weights(self, hiddens: Sequence[Tensor]) -> Tensor:
        """Compute only the weights ``(..., k)`` of the mixture; arguments and errors are those of
        :meth:`forward`."""
        self._check(hiddens)
        last, config = hiddens[-1], self.config
        wide = torch.promote_types(last.dtype, torch.float32)
        if config.k == 1:
            weights = torch.ones(1, dtype=wide, device=last.device)
        elif self.bias is None:
            weights = constant(tuple(config.fixed_weights or ()), wide, last.device)
        else:
            logits = self.bias.to(wide)
            if self.router is not None:
                with torch.autocast(last.device.type, enabled=False):
                    logits = self._normed(last, -1).to(wide) @ self.router.to(wide).T + logits
            weights = logits.softmax(-1)
        return weights.expand(*last.shape[:-1], config.k)

    def normed(self, hiddens: Sequence[Tensor]) -> list[Tensor]:
        """Return each hidden state after its norm, as in the mixture: k tensors ``(..., d)``.

        The model's head computes the logits of layer e from tensor e. Arguments and errors are
        those of :meth:`forward`.
        """
        self._check(hiddens)
        return [self._normed(hidden, e) for e, hidden in enumerate(hiddens)]

    def _normed(self, hidden: Tensor, place: int) -> Tensor:
        gammas, betas = self._affine()
        shift = None if betas is None else [betas[place]]
        one = hidden.new_ones(1).expand(*hidden.shape[:-1], 1)
        return ops.depth_mix([hidden], [gammas[place]], one, self.form.eps, shift, self.form.kind)

    def _affine(self) -> tuple[list[Tensor], list[Tensor] | None]:
        """Return the gammas of all norms, and their betas, or None if the norms have no bias."""
        norms = [*self.norms[: self.config.k - 1], self.final_norm]
        betas: list[Any] = [getattr(norm, "bias", None) for norm in norms]
        return [self.form.gamma(norm) for norm in norms], None if betas[-1] is None else betas

    def _check(self, hiddens: Sequence[Tensor]) -> None:
        expected = f"k = {self.config.k} tensors"
        require(len(hiddens) == self.config.k, "DepthMixer", "hiddens", expected, len(hiddens))
        wanted = hiddens[-1].shape, hiddens[-1].dtype, hiddens[-1].device
        for e, hidden in enumerate(hiddens):
            found = hidden.shape, hidden.dtype, hidden.device
            require(found == wanted, "DepthMixer: hiddens", str(e), f"{wanted}, as the last", found)

    def _apply(self, fn: Any, recurse: bool = True) -> DepthMixer:
        if self.config.share_final_norm:
            self.final_norm._apply(fn, recurse)
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        """Return k, the router and the form of the norms, for ``print``."""
        return f"k={self.config.k}, router={self.config.router!r}, form={tuple(self.form)}"


_EPS_NAMES = ("eps", "variance_epsilon", "epsilon", "norm_eps")


class _NormForm(NamedTuple):
    """Formula of a norm: ``(offset + weight) * h / sqrt(mean(h^2) + eps) + bias``. For the kind
    "layer", the mean of ``h`` is subtracted first."""

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


def _norm_form(norm: nn.Module, where: str) -> _NormForm:
    """Determine the form of a norm: RMSNorm with a weight or with 1 + weight, or LayerNorm.

    The norm is run on a few rows, and the result is compared with each formula.

    Args:
        norm: any module.
        where: start of error messages: function and argument.

    Raises:
        TypeError: If the module has no weight ``(d,)``, or computes none of these functions.
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
            form = _NormForm(kind, value, offset)
            wanted = reference.depth_norm(rows, form.gamma(norm), form.eps, bias, form.kind)
            if found.shape == wanted.shape and bool(((found - wanted).abs() <= bound).all()):
                return form
    raise _refusal(norm, where, "it computes another function")


def _refusal(norm: nn.Module, where: str, found: str) -> TypeError:
    return TypeError(
        f"{where}: expected a norm like RMSNorm or LayerNorm, with a weight of the width of the "
        f"hidden states, found {type(norm).__name__}: {found}"
    )
