"""Base class that merges adapters into the weight of their base layer, and unmerges them."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lora_ext import ops
from lora_ext._checks import require
from lora_ext.kinds import normed

from ._weight import BaseWeight


class _Merged(NamedTuple):
    """Values of a merged adapter that are needed to unmerge it."""

    name: str
    scaling: float
    factor: Tensor | None  # (O,), scales of the outputs, or None


class Merging(nn.Module):
    """Base class of :class:`LoraLayer` that merges adapters into the base weight."""

    base_layer: nn.Module
    r: dict[str, int]
    scaling: dict[str, float]
    lora_bias: dict[str, bool]
    #: Token ids that start each activated adapter.
    alora_invocation_tokens: dict[str, tuple[int, ...]]
    lora_magnitude_vector: nn.ModuleDict
    _active: list[str]

    def __init__(self) -> None:
        super().__init__()
        self._merged: list[_Merged] = []
        self._copy: tuple[Tensor, Tensor | None] | None = None  # weight and bias before merging

    @property
    def merged_adapters(self) -> list[str]:
        """Names of the adapters that are merged into the base weight."""
        return [m.name for m in self._merged]

    @property
    def merged(self) -> bool:
        """True if any adapter is merged into the base weight."""
        return bool(self._merged)

    @property
    def weight(self) -> Tensor:
        """Weight of the base layer."""
        return self.base_weight.weight

    @property
    def bias(self) -> Tensor | None:
        """Bias of the base layer."""
        return self.base_weight.bias

    def merge(
        self,
        safe_merge: bool = False,
        adapter_names: Sequence[str] | None = None,
        *,
        keep_copy: bool = False,
    ) -> None:
        """Add adapters to the base weight: ``weight + sum of scaling * B A``, rounded once.

        Args:
            safe_merge: whether to raise an error if a merged value is not finite; the layer is then
                unchanged.
            adapter_names: names of the adapters to merge; default is the active adapters. Adapters
                that are merged already are skipped.
            keep_copy: whether to keep a copy of the weight, so that :meth:`unmerge` restores every
                bit.

        Raises:
            ValueError: If the layer does not have one of the adapters; one is an activated adapter
                (aLoRA); the base weight cannot be read or is computed by a parametrization;
                ``safe_merge`` is set and a merged value is not finite; or ``keep_copy`` is set and
                adapters have been merged without a copy.
            RuntimeError: If an adapter has a bias (``lora_bias``) and the base layer has none.
        """
        names = self._active if adapter_names is None else list(adapter_names)
        self._check_known(names)
        names = [n for n in names if n not in self.merged_adapters]
        if not names:
            return
        if keep_copy and self._merged and self._copy is None:
            found = f"{self.merged_adapters} are merged already, and no copy was kept"
            raise ValueError(f"merge: keep_copy: {found}; unmerge them first")
        begins = [n for n in names if n in self.alora_invocation_tokens]
        expected = "adapters that apply to all tokens, as the base weight does"
        found = f"{begins}, which begin in mid-sequence (alora_invocation_tokens)"
        require(not begins, "merge", "adapter_names", expected, found)
        base = self.base_weight
        base.check_writable("merge")
        weight, bias = base.matrix().detach(), base.bias
        new, new_bias = _widened(weight), None if bias is None else _widened(bias)
        records: list[_Merged] = []
        for name in names:
            delta, of_bias = self._deltas(name, self.scaling[name])
            factor = self._factor(name) if name in self.lora_magnitude_vector else None
            new = new + delta if factor is None else factor[:, None] * (new + delta)
            if of_bias is not None:
                if new_bias is None:
                    found = f"adapter {name!r} has a bias (lora_bias=True)"
                    raise RuntimeError(f"merge: {found}, but the base layer has none")
                new_bias = new_bias + of_bias
            records.append(_Merged(name, self.scaling[name], factor))
        # The sum is rounded once, and written after all checks, so that an error changes nothing.
        new = new.to(weight.dtype)
        results = [new] if bias is None or new_bias is None else [new, new_bias.to(bias.dtype)]
        if safe_merge and not all(bool(torch.isfinite(r).all()) for r in results):
            found = f"NaN or infinity after merging the adapters {names}"
            raise ValueError(f"merge: expected finite merged weights, found {found}")
        if keep_copy and self._copy is None:
            kept = None if bias is None else bias.detach().clone()
            self._copy = base.weight.detach().clone(), kept
        base.write(base.as_stored(new), new_bias)
        self._merged += records

    def unmerge(self) -> None:
        """Remove the merged adapters from the base weight.

        After ``merge(keep_copy=True)``, every bit is restored if no other base weight has been
        loaded since. Otherwise the updates are recomputed and subtracted, which restores the
        weight up to rounding, and a UserWarning is issued. In this case the parameters of the
        adapters must not have changed since they were merged.
        """
        if not self._merged:
            warnings.warn("unmerge: nothing is merged, so the layer is unchanged", stacklevel=2)
            return
        base = self.base_weight
        base.check_writable("unmerge")
        if self._copy is not None:
            base.write(*self._copy)
        else:
            warnings.warn(
                "unmerge: no copy of the base weight was kept, so it is restored only up to "
                "rounding; after merge(keep_copy=True) every bit is restored",
                stacklevel=2,
            )
            weight, bias = self._unmerged()
            base.write(base.as_stored(weight), bias)
        self._merged, self._copy = [], None

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Return ``scaling * B @ A`` in the layout of the base weight, rounded once.

        The result has the dtype of the factors. Raises ValueError if the layer does not have the
        adapter.
        """
        self._check_known([adapter])
        a, b, _ = self._raw_factors(adapter)
        delta = ops.lora_delta(a.flatten(1), b.flatten(1), self.scaling[adapter])
        return self.base_weight.as_stored(delta)

    # ---------------------------------------------------------------------------------------------

    def _deltas(self, name: str, scaling: float) -> tuple[Tensor, Tensor | None]:
        """Return an adapter's updates of weight ``(O, I)`` and bias, in float32 or float64."""
        a, b, bias = self._raw_factors(name)
        delta = ops.lora_delta(_widened(a.flatten(1)), _widened(b.flatten(1)), scaling)
        return delta, None if bias is None else _widened(bias) * scaling

    def _factor(self, name: str) -> Tensor:
        """Return a DoRA adapter's output scales ``(O,)``, computed from the unmerged weight."""
        a, b, _ = self._raw_factors(name)
        weight, _ = self._unmerged()
        magnitude = self._magnitude(name).detach().flatten().to(_widened(weight[:0]).dtype)
        return normed(magnitude, weight, a.flatten(1), b.flatten(1), self.scaling[name])

    def _magnitude(self, name: str) -> Tensor:
        return self.lora_magnitude_vector[name].weight  # pyright: ignore[reportReturnType]

    def _unmerged(self) -> tuple[Tensor, Tensor | None]:
        """Return the base weight ``(O, I)`` and bias without merged adapters."""
        if self._copy is not None:
            weight, bias = self._copy
            return self.base_weight.as_matrix(weight), bias
        weight, bias = _widened(self.base_weight.matrix()), self.bias
        bias = None if bias is None else _widened(bias)
        for m in reversed(self._merged):
            if m.factor is not None:
                weight = weight / m.factor[:, None]
            delta, of_bias = self._deltas(m.name, m.scaling)
            weight = weight - delta
            bias = bias if bias is None or of_bias is None else bias - of_bias
        return weight, bias

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        if any(key.startswith(f"{prefix}base_layer.") for key in state_dict):
            self._copy = None  # a copy of the weight before loading is not valid any more
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    # ---------------------------------------------------------------------------------------------
    # One adapter

    @property
    def base_weight(self) -> BaseWeight:
        """View of the base layer's weight as a matrix."""
        raise NotImplementedError

    def _check_known(self, names: Sequence[str | None]) -> None:
        for name in names:
            if name not in self.r:
                known, where = list(self.r), type(self).__name__
                raise ValueError(f"{where}: expected one of the adapters {known}, found {name!r}")

    def _stores(self) -> list[Any]:
        """Return the dictionaries that contain A and B by adapter name."""
        return [getattr(self, name) for name in self.base_weight.stores]

    def _raw_factors(self, name: str) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return A, B and bias of an adapter. A can be flattened to ``(r, I)``, B to ``(O, r)``."""
        a, b = (store[name] for store in self._stores())
        return getattr(a, "weight", a), getattr(b, "weight", b), getattr(b, "bias", None)

    def _parameters_of(self, name: str) -> list[Tensor]:
        found = [p for p in self._raw_factors(name) if p is not None]
        if name in self.lora_magnitude_vector:
            found.append(self._magnitude(name))
        return found


def _widened(tensor: Tensor) -> Tensor:
    """Return a detached tensor for merging: float64 stays float64, any other becomes float32."""
    return tensor.detach().to(torch.float64 if tensor.dtype == torch.float64 else torch.float32)
