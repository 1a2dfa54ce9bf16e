"""RankMonitor: how large and how wide the updates of adapters become while they train."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lora_ext import ops
from lora_ext._checks import require
from lora_ext.adapter import gram_figures
from lora_ext.layers import adapted_layers, adapter_factors, adapters_of, recomputing


class RankMonitor:
    """Records norm and participation rank of every adapted layer's update while it is entered.

    ``with monitor: ... training steps ...``, then :attr:`history`. Layers of
    :class:`lora_ext.nn.LoraLinear` and its kin, and of PEFT, alike. A record is taken before a
    forward of the model and reads each factor once, in one call of :func:`lora_ext.ops.lora_gram`
    for all layers; nothing is decomposed, and values stay on the device until they are read.
    Outputs are unchanged, and no hook stays on the model after the block. A compiled model is not
    seen.

    Args:
        model: holds the layers, or is one.
        adapter: whose factors to watch.
        every: record before the first of so many forwards of ``model``.

    Raises:
        ValueError: no layer of the model has the adapter, or ``every`` below 1.

    Source: arXiv 2412.00029, which reads effective ranks after training.
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
            raise RuntimeError("RankMonitor: entered already")
        self._handle = self.model.register_forward_pre_hook(self._before_forward)
        return self

    def __exit__(self, *_: object) -> None:
        self._handle.remove()
        self._handle = None

    @property
    def history(self) -> list[dict[str, Any]]:
        """One dictionary per record and layer, in order.

        ``step``; ``module``; ``fro``, the Frobenius norm of ``scaling * B A``; ``participation``,
        its participation rank, 0 while the update is zero. Reading it waits for the device.
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
        # The norm of a product whose factors all but cancel is lost in sums of float32.
        found = ops.lora_gram([a for a, _ in pairs], [b for _, b in pairs], dtype=torch.float64)
        grams = dict(zip(self._layers, zip(*found, strict=True), strict=True))
        alike: dict[Any, list[str]] = {}  # layers of one rank, measured together
        for name, (gram, _) in grams.items():
            alike.setdefault((gram.shape, gram.device), []).append(name)
        figures: dict[str, tuple[Tensor, Tensor]] = {}
        for names in alike.values():
            of_a, of_b = (torch.stack([grams[name][i] for name in names]) for i in (0, 1))
            figures.update(zip(names, zip(*gram_figures(of_a, of_b), strict=True), strict=True))
        for name, layer in self._layers.items():
            (fro, rank), scale = figures[name], abs(layer.scaling[self.adapter])
            self._records.append((self._step, name, fro * scale, rank * bool(scale)))
