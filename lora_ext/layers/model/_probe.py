"""LoraProbe: recorder of the norms of adapters' inner features during training."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lora_ext._checks import require
from lora_ext._torch import exactly

from ._adapted import adapted_layers


class Decomposition(NamedTuple):
    """Three parts of the change of ``Z_B = B A x`` in one training step; their sum is the change.

    A' and B' are the factors before the step, A and B after it.
    """

    d1: Tensor  # B' (A - A') x, due to the change of A
    d2: Tensor  # (B - B') A' x, due to the change of B
    d3: Tensor  # (B - B') (A - A') x, due to both changes together


def decompose_step(x: Tensor, before: Sequence[Tensor], after: Sequence[Tensor]) -> Decomposition:
    """Split the change of ``B A x`` between two training steps into three parts ``(T, m)``.

    Args:
        x: input ``(T, n)`` of the adapter, for ``T`` rows.
        before: factors A ``(r, n)`` and B ``(m, r)`` at the first step.
        after: factors A and B at the second step.

    Source: Hayou et al. 2024, "The Impact of Initialization on LoRA Finetuning Dynamics".
    """
    (old_a, old_b), (a, b) = before, after
    moved, inner = x @ (a - old_a).T, x @ old_a.T  # (T, r)
    step = (b - old_b).T
    return Decomposition(moved @ old_b.T, inner @ step, moved @ step)


class LoraProbe:
    """Context manager that records norms of ``Z_A = A x`` and ``Z_B = B A x`` in linear layers.

    If B is initially zero (Init[A] in the paper) and the learning rate is optimal, ``Z_A`` grows
    with the width of the model and during training. The probe shows in which layers it grows.
    Run training steps inside ``with probe:``, then read :attr:`history` and :meth:`report`.

    The layers may be :class:`lora_ext.nn.LoraLinear` or layers of PEFT. The outputs of the model do
    not change, and all hooks are removed after the block, even after an exception. Each record
    recomputes the products of the adapter, in float32 and without dropout. Recorded values remain
    on the device until they are read. A compiled model is not recorded.

    Args:
        model: module that contains the layers, or a layer itself.
        adapter: name of the adapter.
        every: number of forwards of ``model`` per record.
        track_decomposition: whether to record the root mean squares of the parts of
            :func:`decompose_step` as well. This stores a copy of the factors at the previous
            record.

    Attributes:
        mask: bool tensor with the leading dimensions of the layers' inputs, or None. Rows that are
            False, such as padding, are excluded from the root mean squares and the maximum. The
            mask may be set before each forward.

    Raises:
        ValueError: If no layer of the model has the adapter, or ``every`` is below 1.

    Source: Hayou et al. 2024, "The Impact of Initialization on LoRA Finetuning Dynamics".
    """

    def __init__(
        self,
        model: nn.Module,
        adapter: str = "default",
        every: int = 1,
        track_decomposition: bool = False,
    ):
        require(every >= 1, "LoraProbe", "every", "a number of at least 1", every)
        self.model = model
        self.adapter = adapter
        self.every = every
        self.track_decomposition = track_decomposition
        self.mask: Tensor | None = None
        self._layers: list[tuple[str, nn.Module]] = []
        for name, layer in adapted_layers(model).items():
            stores = getattr(layer, "lora_A", None), getattr(layer, "lora_B", None)
            if all(isinstance(s, nn.ModuleDict) and adapter in s for s in stores):
                weights: list[Any] = [s[adapter].weight for s in stores]  # pyright: ignore[reportOptionalSubscript]
                if all(w.dim() == 2 for w in weights):
                    self._layers.append((name, layer))
        expected = f"linear layers with an adapter {adapter!r}"
        require(self._layers, "LoraProbe", "model", expected, f"none in {type(model).__name__}")
        self._step = -1
        self._records: list[tuple[int, str, dict[str, Tensor]]] = []
        self._before: dict[str, tuple[Tensor, Tensor]] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> LoraProbe:
        if self._handles:
            raise RuntimeError("LoraProbe: expected one `with probe` at a time, found a nested one")
        # The hook that counts steps is registered first, since ``model`` may be a recorded layer
        # itself.
        self._handles.append(self.model.register_forward_pre_hook(self._count))
        for name, layer in self._layers:
            hook = functools.partial(self._record, name)
            self._handles.append(layer.register_forward_pre_hook(hook))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    @property
    def history(self) -> list[dict[str, Any]]:
        """All records so far, in order, as dictionaries.

        The keys are ``step``; ``module``, the name of the layer; the root mean squares ``rms_Z_A``
        and ``rms_Z_B`` and the maximum ``max_Z_A`` over all rows and features; and the Frobenius
        norms ``fro_A``, ``fro_B`` and ``fro_BA``. With ``track_decomposition``, records after the
        first of each layer also have ``rms_d1``, ``rms_d2`` and ``rms_d3``. Reading this attribute
        synchronises with the device.
        """
        return [
            {"step": step, "module": name, **{key: value.item() for key, value in values.items()}}
            for step, name, values in self._records
        ]

    def report(self, threshold: float = 10.0) -> dict[str, float]:
        """Return the modules in which ``rms_Z_A`` has grown by a factor above ``threshold``.

        Returns:
            The factor between the first and the last record, by module name. It is infinity if any
            value is not finite, or if the first value is zero and the last is not.
        """
        first: dict[str, float] = {}
        growth: dict[str, float] = {}
        for record in self.history:
            name, rms = record["module"], record["rms_Z_A"]
            start = first.setdefault(name, rms)
            if not math.isfinite(rms):
                growth[name] = math.inf
            elif growth.get(name) != math.inf:
                growth[name] = rms / start if start else (math.inf if rms else 1.0)
        return {name: factor for name, factor in growth.items() if factor > threshold}

    def _count(self, *_: object) -> None:
        if not recomputing():
            self._step += 1

    @torch.no_grad()
    def _record(self, name: str, layer: Any, inputs: tuple[Any, ...]) -> None:
        if recomputing() or self._step % self.every:
            return
        x: Tensor = inputs[0]
        with exactly(x.device):
            # If steps are compared, copy the factors, since the optimiser changes them in place.
            factors = [layer.lora_A[self.adapter].weight, layer.lora_B[self.adapter].weight]
            a, b = (f.detach().to(torch.float32, copy=self.track_decomposition) for f in factors)
            rows = x.detach().reshape(-1, x.shape[-1]).float()  # (T, n)
            if self.mask is not None:
                rows = rows[self.mask.reshape(-1)]
            z = rows @ a.T  # (T, r)
            gram_a, gram_b = gram(a), gram(b.T)  # (r, r)
            # |B z|^2 is computed as z^T (B^T B) z, without B z (T, m).
            square = ((z.double() @ gram_b) * z).sum()
            values = {
                "rms_Z_A": _rms(z),
                "rms_Z_B": (square.clamp(min=0) / max(1, rows.shape[0] * b.shape[0])).sqrt(),
                "max_Z_A": z.abs().max() if z.numel() else z.new_zeros(()),
                "fro_A": gram_a.trace().sqrt(),
                "fro_B": gram_b.trace().sqrt(),
                "fro_BA": (gram_a * gram_b).sum().clamp(min=0).sqrt(),
            }
            if self.track_decomposition:
                before = self._before.get(name)
                if before is not None:
                    parts = decompose_step(rows, before, (a, b))
                    values |= {f"rms_{key}": _rms(d) for key, d in parts._asdict().items()}
                self._before[name] = a, b
        self._records.append((self._step, name, values))


def gram(rows: Tensor) -> Tensor:
    """Return ``rows @ rows^T`` in float64.

    The formula ``||B A||^2 = trace((B^T B) (A A^T))`` suffers from cancellation if the product is
    small compared with its factors. In float64, the error of the norm is 1e-8 relative to the
    factors; in float32 it would be 3e-4.
    """
    wide = rows.double()
    return wide @ wide.T


def _rms(z: Tensor) -> Tensor:
    return z.square().mean().sqrt() if z.numel() else z.new_zeros(())


def recomputing() -> bool:
    """Return whether a backward pass is running; forwards then recompute checkpointed layers."""
    return torch._C._current_graph_task_id() >= 0
