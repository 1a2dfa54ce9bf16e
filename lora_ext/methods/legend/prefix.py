"""Cache of the inputs of the trained layers, which is kept between epochs and rounds."""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora_ext._checks import require
from lora_ext.federated import LoraLayerManager
from lora_ext.layers import Swap, adapted_layers, adapter_parameters, is_active

WHERE = "PrefixCache"


@dataclass(eq=False, repr=False)
class PrefixCache:
    """Cache of each sample's activations after the blocks below the trained layers.

    A device that trains the last k of L layers runs only the base model in the first L - k blocks.
    The activations after these blocks therefore depend only on the sample. These activations are
    computed once, and later epochs and rounds start from them. A training step costs about as much
    as ``L + 2k`` forwards of a block, of which the cache saves ``L - k``. If k decreases, the cache
    is still used, and the blocks between the cached activations and the trained layers run again.
    If k increases, the cached activations are of no use and are dropped.

        manager.apply(plan, others="disabled")
        with manager.boundary(), cache.batch(samples):
            loss = loss_of(model(x), y)

    If a sample is always in the same batch, updates are bitwise equal to those without the cache.
    Otherwise updates differ by rounding, since matrix products may round differently in other
    batches.

    Args:
        manager: Manager of a model to which a plan has been applied, by this or another manager.
        dtype: Dtype of the cached activations; None keeps the dtype of the model's activations,
            which is exact. bfloat16 needs half the memory of float32.
        device: Device of the cached activations; None keeps the device of the model's activations.

    Attributes:
        hits: Number of batches that used the cache.
        misses: Number of batches whose activations were computed and cached.

    Source: LEGEND (arXiv 2412.20004) trains a suffix of the layers; this cache is our choice.
    """

    manager: LoraLayerManager
    dtype: torch.dtype | None = None
    device: torch.device | str | None = None

    def __post_init__(self) -> None:
        self.hits = self.misses = 0
        self._blocks = 0  # number of blocks below the cached activations
        self._in_tuple = False
        self._rows: dict[Hashable, Tensor] = {}

    def __len__(self) -> int:
        """Return the number of cached samples."""
        return len(self._rows)

    @property
    def nbytes(self) -> int:
        """Size of the cached activations in bytes."""
        return sum(row.numel() * row.element_size() for row in self._rows.values())

    def clear(self) -> None:
        """Drop all activations; required after a change of the samples or of the base model."""
        self._rows.clear()

    @contextlib.contextmanager
    def batch(self, samples: Sequence[Hashable]) -> Iterator[None]:
        """Use the cache in a ``with`` block, in which the model is called once with one batch.

        Args:
            samples: Name of the sample in each row. Rows with the same name must have the same
                content, including padding.

        Raises:
            ValueError: If a module outside the trained blocks has dropout or batch normalisation
                and is in training mode; if an adapter below the trained blocks is active; if the
                number of rows differs from the number of names; if a block returns more than its
                hidden state; or if a cached sample now has another sequence length.
        """
        names = list(samples)
        lowest = self._lowest()
        if lowest == 0:
            yield
            return
        # The following checks ensure that activations depend only on their sample.
        manager = self.manager
        blocks = [f"{name}." for name in self.manager.blocks]
        below, above = tuple(blocks[:lowest]), tuple(blocks[lowest:])
        expected = "no active adapter below the trained layers (apply(plan, others='disabled'))"
        for name, layer in adapted_layers(manager.model, manager.adapter).items():
            off = not name.startswith(below) or not is_active(layer, manager.adapter)
            require(off, WHERE, name, expected, repr(manager.adapter))
        for name, module in manager.model.named_modules():
            inside = f"{name}.".startswith(above) or ".lora_dropout." in name
            found = _randomness(module) if module.training and not inside else ""
            require(not found, WHERE, name, "no dropout or batch normalisation in training", found)
        if self._blocks > lowest:
            self._rows.clear()
        if not self._rows:
            self._blocks = lowest
        known = all(name in self._rows for name in names)
        if known and len({self._rows[name].shape for name in names}) == 1:
            self.hits += 1
            with self._skipping(torch.stack([self._rows[name] for name in names])):
                yield
        else:
            self.misses += 1
            with self._recording(names):
                yield

    def _lowest(self) -> int:
        """Return the number of blocks below the lowest block with a trained adapter."""
        manager = self.manager
        trained = [
            f"{name}."
            for name, layer in adapted_layers(manager.model, manager.adapter).items()
            if any(p.requires_grad for p in adapter_parameters(layer, manager.adapter))
        ]
        for index, block in enumerate(manager.blocks):
            if any(name.startswith(f"{block}.") for name in trained):
                return index
        return manager.num_layers

    @contextlib.contextmanager
    def _skipping(self, rows: Tensor) -> Iterator[None]:
        model, names = self.manager.model, self.manager.blocks[: self._blocks]
        skipped: dict[str, nn.Module] = {}
        for name in names:
            skipped[name] = _Skipped(self._in_tuple, rows if name == names[-1] else None)
            skipped[name].train(model.get_submodule(name).training)
        swap = Swap(model, skipped, WHERE)
        try:
            yield
        finally:
            swap.restore(model, WHERE)

    @contextlib.contextmanager
    def _recording(self, names: list[Hashable]) -> Iterator[None]:
        def keep(module: nn.Module, args: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            alone = hidden is output or all(part is None for part in output[1:])
            require(alone, WHERE, "model", "blocks that return only a hidden state", type(output))
            require(len(hidden) == len(names), WHERE, "samples", f"{len(hidden)} names", len(names))
            self._in_tuple = hidden is not output
            # A copy is necessary, since the next block may write into its input.
            found = hidden.detach().to(self.device, self.dtype or hidden.dtype, copy=True)
            self._rows.update(zip(names, found.unbind(), strict=True))

        block = self.manager.model.get_submodule(self.manager.blocks[self._blocks - 1])
        with block.register_forward_hook(keep):
            yield


def _randomness(module: nn.Module) -> str:
    """Return what makes a row of a module's output depend on more than its sample in training mode,
    such as "p = 0.1", or "" if nothing does."""
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return "batch normalisation"
    drops = {"p": module.p} if isinstance(module, nn.modules.dropout._DropoutNd) else {}
    drops |= {name: p for name, p in vars(module).items() if "dropout" in name}
    found = (f"{name} = {p}" for name, p in drops.items() if isinstance(p, int | float) and p > 0)
    return next(found, "")


class _Skipped(nn.Module):
    """Replacement of a block that is skipped. The replacement of the last skipped block returns the
    cached rows of the batch; all other replacements return their input."""

    def __init__(self, in_tuple: bool, rows: Tensor | None = None):
        super().__init__()
        self.in_tuple, self.rows = in_tuple, rows

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.rows is not None:
            expected, found = self.rows.shape[:-1], hidden_states.shape[:-1]
            require(expected == found, WHERE, "samples", f"cached shape {[*expected]}", [*found])
            hidden_states = self.rows.to(hidden_states.device, hidden_states.dtype)
        return (hidden_states,) if self.in_tuple else hidden_states
