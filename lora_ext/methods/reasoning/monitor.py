"""RankMonitor, which records norms and participation ranks of adapter updates during training."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lora_ext import ops
from lora_ext._checks import require
from lora_ext.adapter import gram_figures
from lora_ext.layers import adapted_layers, adapter_factors, adapters_of, recomputing


class RankMonitor:
    """Context manager that records the norm and the participation rank of every layer's update.

    The update of a layer is ``scaling * B A``; with its singular values s, the participation rank
    is ``(sum s^2)^2 / sum s^4``. Train in ``with monitor:``, then read :attr:`history`.
    The adapted layers of :mod:`lora_ext.nn` and of PEFT are supported. A record is made before a
    forward and reads each factor once, in one call of :func:`lora_ext.ops.lora_gram`, without a
    decomposition. The values stay on the device until they are read. The model's outputs do not
    change, and the hook is removed after the block. Forwards of a compiled model are not recorded.

    Args:
        model: model that contains the layers, or one layer.
        adapter: name of the adapter to monitor.
        every: number of forwards of ``model`` per record; the first forward is recorded.

    Raises:
        ValueError: If no layer of the model has the adapter, or ``every`` is below 1.

    Source: arXiv 2412.00029, which computes effective ranks after training.
    """

    def __init__(self, model: nn.Module, adapter: str = "default", every: int = 1):
        require(every >= 1, "RankMonitor", "every", "at least 1", every)
        self.model, self.adapter, self.every = model, adapter, every
        layers = adapted_layers(model).items()
        self._layers: dict[str, Any] = {n: m for n, m in layers if adapter in adapters_of(m)}
        require(self._layers, "RankMonitor", "model", f"layers with an adapter {adapter!r}", "none")
        self._step = -1
        self._records: list[tuple[int, str, Tensor, Tensor]] = []
        self._handle: Any = None

    def __enter__(self) -> RankMonitor:
        if self._handle is not None:
            raise RuntimeError("RankMonitor: already entered; leave its `with` block first")
        self._handle = self.model.register_forward_pre_hook(self._before_forward)
        return self

    def __exit__(self, *_: object) -> None:
        self._handle.remove()
        self._handle = None

    @property
    def history(self) -> list[dict[str, Any]]:
        """List of dictionaries, one per record and layer, in the order of the records.

        The keys are ``step`` (index of the forward), ``module`` (name of the layer), ``fro``
        (Frobenius norm of the update) and ``participation`` (participation rank of the update, 0 if
        the update is zero). Reading the property synchronizes with the device.
        """
        return [
            {"step": step, "module": name, "fro": fro.item(), "participation": rank.item()}
            for step, name, fro, rank in self._records
        ]

    def _before_forward(self, *_: object) -> None:
        if not recomputing():
            self._step += 1
            if self._step % self.every == 0:
                self._record()

    @torch.no_grad()
    def _record(self) -> None:
        pairs = [adapter_factors(layer, self.adapter) for layer in self._layers.values()]
        # Float32 sums would lose the norm of a product whose factors nearly cancel.
        found = ops.lora_gram([a for a, _ in pairs], [b for _, b in pairs], dtype=torch.float64)
        grams = dict(zip(self._layers, zip(*found, strict=True), strict=True))
        alike: dict[Any, list[str]] = {}  # by rank and device, computed together
        for name, (gram, _) in grams.items():
            alike.setdefault((gram.shape, gram.device), []).append(name)
        figures: dict[str, tuple[Tensor, Tensor]] = {}
        for names in alike.values():
            of_a, of_b = (torch.stack([grams[name][i] for name in names]) for i in (0, 1))
            figures.update(zip(names, zip(*gram_figures(of_a, of_b), strict=True), strict=True))
        for name, layer in self._layers.items():
            (fro, rank), scale = figures[name], abs(layer.scaling[self.adapter])
            self._records.append((self._step, name, fro * scale, rank * bool(scale)))
