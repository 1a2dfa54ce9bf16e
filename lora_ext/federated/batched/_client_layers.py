"""A layer that applies each client's factors to the client's rows, the assignment of rows to
clients, and a check for modules that would make a client's results depend on other clients.

The *place* of a client is its index in a bank's table.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from lora_ext import ops
from lora_ext._checks import require
from lora_ext._torch import autocast_dtype
from lora_ext.layers import adapted_layers, block_index, dense_parameters, kind_of_layer
from lora_ext.rows import Kept

from .._layers import assigned
from ._banks import Bank
from ._batches import WHERE, Segment

_KEPT = 64


class BatchRows:
    """Assignment of the sequences of a step to clients. All layers share one object.

    :meth:`only` restricts the layers to a part of the batch. In the backward pass, checkpointing
    may recompute a block outside that context. The recomputed sequences are always the first of
    the batch, because the other sequences have no graph.

    Attributes:
        above: name of the last shared module that the forward has called; None before the first.
        step: places of the clients that take part in the step, and their segments.
    """

    def __init__(self) -> None:
        self.above: str | None = None
        self.step: tuple[Sequence[int], Sequence[Segment]] = (), ()
        self._part = slice(0, 0)
        self._backward = False
        self._kept = Kept(_KEPT)

    def set(self, places: Sequence[int], segments: Sequence[Segment]) -> None:
        """Start a step in which ``segments[i]`` belongs to the client at ``places[i]``."""
        self._part = slice(0, sum(segment.rows for segment in segments))
        if (places, segments) != self.step:  # the cached ids and plans are for the previous rows
            self.step, self._kept = (places, segments), Kept(_KEPT)

    def check_below(self, module: str) -> None:
        """Raise if the layer ``module`` runs after a shared module. The shared parameters would not
        get gradients from rows that are excluded from the graph in that layer."""
        if self.above is not None:
            expected = "shared parameters above the layers"
            supported(self._backward, self.above, expected, f"that {module} runs after them")

    def owners(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return the number of sequences of each client, and the client of each sequence."""
        return self._kept.get("owners", device, self._owners, device)

    def _owners(self, device: torch.device) -> tuple[Tensor, Tensor]:
        sizes = torch.tensor([segment.rows for segment in self.step[1]])
        owners = torch.arange(len(sizes)).repeat_interleave(sizes)
        return sizes.to(device), owners.to(device)

    def only(self, first: int, last: int) -> AbstractContextManager[None]:
        """Return a context manager in which layers receive only sequences ``first`` to
        ``last - 1``."""
        return assigned(self, "_part", slice(first, last))

    def backward(self) -> AbstractContextManager[None]:
        """Return a context manager in which the backward pass must run."""
        return assigned(self, "_backward", True)

    def ids(
        self, bank: Bank, leading: torch.Size, device: torch.device, tokens_first: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Return the index in the bank of each row's client, ``(rows,)``, and the plan that the op
        needs, which groups the rows by index.

        ``leading`` is the shape of the input without its last dimension: sequences first, or tokens
        first. With dropout, padding up to the length of other clients' sequences has the index -1
        (no adapter). The dropout mask of a row depends on the row's number among the rows with the
        same index, and this number must not depend on other clients.
        """
        of_bank, part = (bank.table, bank.size, bank.p > 0), (self._part.start, self._part.stop)
        key = of_bank, part, leading, tokens_first
        return self._kept.get(key, device, self._ids, bank, leading, device, tokens_first)

    def _ids(
        self, bank: Bank, leading: torch.Size, device: torch.device, tokens_first: bool
    ) -> tuple[Tensor, Tensor]:
        if tokens_first and len(leading) > 1:
            upright = torch.Size((leading[1], leading[0], *leading[2:]))
            ids, _ = self._ids(bank, upright, device, False)
            ids = ids.view(upright).transpose(0, 1).flatten()
            return ids, ops.lora_plan(ids, bank.size)
        places, segments = self.step
        sizes = torch.tensor([segment.rows for segment in segments])
        own = torch.tensor([bank.table[place] for place in places], dtype=torch.int32)
        own = own.repeat_interleave(sizes)[self._part]
        found = leading[0] if leading else 0
        if self._backward:
            own = own[:found]
        require(found == len(own), WHERE, "model", f"layer inputs of {len(own)} sequences", found)
        lengths = [segment.length for segment in segments if segment.length is not None]
        if bank.p and lengths and leading[1:2] == (max(lengths),):
            ends = torch.tensor(lengths).repeat_interleave(sizes)[self._part][: len(own)]
            beyond = torch.arange(leading[1]) >= ends[:, None]
            own = own[:, None].masked_fill(beyond, -1).flatten()  # (sequences * length,)
        ids = own.repeat_interleave(leading.numel() // max(len(own), 1)).to(device)
        return ids, ops.lora_plan(ids, bank.size)


class ClientsLayer(nn.Module):
    """A base layer that applies to each row the factors of its client, the global factors, or no
    factors, as the bank specifies."""

    def __init__(
        self, base_layer: nn.Module, bank: Bank, rows: BatchRows, tokens_first: bool = False
    ):
        super().__init__()
        self.base_layer = base_layer
        self.bank = bank
        self.rows = rows
        self.tokens_first = tokens_first
        self.train(base_layer.training)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(sequences, ..., I)`` to ``(sequences, ..., O)``: I inputs and O outputs.

        With ``tokens_first``, sequences are the second dimension. The output has the dtype of
        ``base_layer(x)``.
        """
        bank = self.bank
        self.rows.check_below(bank.pair.module)
        if not bank.size:
            return self.base_layer(x)
        ids, plan = self.rows.ids(bank, x.shape[:-1], x.device, self.tokens_first)
        a, b = bank.leaves
        dense = dense_parameters(self.base_layer)
        compute = autocast_dtype(x)
        fused = dense is not None and (compute is not None or x.dtype == dense[0].dtype == a.dtype)
        dtype = compute or torch.promote_types(a.dtype, b.dtype)
        weight, bias = dense if fused and dense is not None else (None, None)
        scale = bank.call_scale
        if scale is not None and dtype == torch.float64:  # the op stores scales in float32
            b, scale = b * bank.scaling, None
        y = ops.lora_linear(
            x.reshape(-1, x.shape[-1]).to(dtype),
            None if weight is None else weight.to(dtype),
            None if bias is None else bias.to(dtype),
            a.to(dtype),
            b.to(dtype),
            ids,
            scale,
            bank.call_ranks,
            bank.p,
            bank.seeds,
            plan,
        )  # (rows, O)
        y = y.view(*x.shape[:-1], y.shape[-1])
        if fused:
            return y
        base = self.base_layer(x)
        return (base + y).to(base.dtype)


class UnsupportedModule(ValueError):
    """Raised for a module with which a client's results would differ from those of training the
    client separately."""


def check_model(model: nn.Module, adapter: str, pattern: str) -> None:
    """Raise for modules that mix rows or apply dropout, and for adapters with parameters that
    payloads do not contain."""
    own = {
        id(layer.lora_dropout[adapter])
        for name, layer in _layers(model, adapter, pattern)
        if isinstance(layer.lora_dropout[adapter], nn.Dropout)
    }
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            alone = not module.training and module.running_mean is not None
            supported(alone, name, "a module that does not mix rows", "batch normalisation")
        for setting, p in _dropouts(module) if id(module) not in own else []:
            off = not module.training or p == 0
            supported(off, name, "no dropout of the base model in training", f"{setting} = {p}")
    for name, layer in _layers(model, adapter, pattern):
        linear = adapter in layer.lora_A and layer.lora_A[adapter].weight.dim() == 2
        linear &= not hasattr(layer, "parameter_name")  # a layer of PEFT's target_parameters
        supported(linear, name, "a linear layer", type(layer).__name__)
        kind = kind_of_layer(layer, adapter)
        supported(kind.sums, name, f"LoRA without {kind.title}", kind.title)
        supported(not layer.lora_bias[adapter], name, "only lora_A and lora_B", "a bias")
        active = [other for other in layer.active_adapters if other in layer.lora_A]
        supported({*active} <= {adapter}, name, f"no active adapter except {adapter!r}", active)
        merged_in = list(layer.merged_adapters)
        supported(not merged_in, name, "no adapter merged into the base weight", merged_in)


def _layers(model: nn.Module, adapter: str, pattern: str) -> list[tuple[str, Any]]:
    """Return names and modules of the layers that a round replaces: adapted layers in blocks."""
    found = adapted_layers(model, adapter).items()
    return [(n, m) for n, m in found if block_index(f"{n}.lora_A.weight", pattern) is not None]


def _dropouts(module: nn.Module) -> list[tuple[str, float]]:
    """Return the dropout probabilities that a module applies or passes to functions."""
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return [("p", module.p)]
    own = module.__dict__.items()  # e.g. attention_dropout, layerdrop, drop_prob
    return [(name, p) for name, p in own if "drop" in name and isinstance(p, float)]


def supported(holds: bool, name: str, expected: object, found: object) -> None:
    """Raise :class:`UnsupportedModule` for the module or parameter ``name`` unless ``holds``."""
    require(holds, WHERE, name, expected, found, UnsupportedModule)
