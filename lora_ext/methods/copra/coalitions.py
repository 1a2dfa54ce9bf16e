"""Forwards in which the sequences of a batch have different sets of adapted layers.

A batch can be evaluated with K masks over the layers of a model in K forwards, or in one forward on
K copies of the batch. The second way reads each weight only once. It needs one adapter id per layer
and row, which is -1 if the row's mask switches the layer off.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lora_ext._checks import require
from lora_ext.layers import (
    LayerGroups,
    LoraLayer,
    adapters_of,
    dense_parameters,
    is_active,
    kind_of_layer,
)
from lora_ext.rows import BASE, Assignment, NamedRows


class RowwiseError(ValueError):
    """Raised if a layer can be switched on or off only for all rows of a batch together."""


@contextlib.contextmanager
def coalitions(groups: LayerGroups, masks: Tensor | Sequence, sequences: int) -> Iterator[None]:
    """Set different masks for the sequences of every batch in a ``with`` block.

    Every batch must consist of K copies of one batch; copy k uses ``masks[k]``. A group that is on
    in all masks runs its usual forward. A group that is off in all masks runs only its base layers.
    For all other groups, rows are grouped by adapter once for each group and input shape. At the
    end of the ``with`` block, every layer is restored.

    Args:
        groups: n groups of layers. In a layer on which the masks disagree, the groups' adapter must
            be the only active adapter, or be inactive.
        masks: ``(K, n)`` bool, True for the groups that are on.
        sequences: Number of sequences of the batch before it was copied.

    Raises:
        ValueError: If the masks have the wrong shape or are not bool, ``sequences`` is below 1, or
            the adapter is merged into a layer that would be switched off.
        RowwiseError: If a layer on which the masks disagree has further active adapters, or is a
            PEFT layer that accepts only one adapter for all rows. A forward in the ``with`` block
            raises this error if the rows of a layer are not the sequences of the batch.
    """
    table = torch.as_tensor(masks)
    fits = table.dtype == torch.bool and table.dim() == 2 and table.shape[1] == len(groups)
    found = f"{table.dtype} of shape {tuple(table.shape)}"
    require(fits, "coalitions", "masks", f"bools of shape (K, {len(groups)})", found)
    if not len(table) or sequences < 1:
        found = f"{len(table)} masks and {sequences} sequences"
        raise ValueError(f"coalitions: expected at least one mask and one sequence, found {found}")
    groups.checked(table.all(0))  # raises if a layer to switch off is merged
    with groups.masked(table.any(0)), contextlib.ExitStack() as hooks:
        for names, layers, column in zip(groups.names, groups.layers, table.T, strict=True):
            if column.all() or not column.any():
                continue
            names_of = (groups.adapter_name if on else BASE for on in column.tolist())
            entries = [entry for entry in names_of for _ in range(sequences)]
            rows = NamedRows(Assignment.of_entries(entries, (len(entries),)))
            for name, layer in zip(names, layers, strict=True):
                if _takes_part(name, layer, groups.adapter_name):
                    give = _GiveRows(name, layer, rows, groups.sees_tokens_first(name))
                    hooks.enter_context(layer.register_forward_pre_hook(give, with_kwargs=True))
                    if give.transposes:
                        hooks.enter_context(layer.register_forward_hook(_transpose_back))
        yield


def _takes_part(name: str, layer: Any, adapter_name: str) -> bool:
    """Return whether the layer uses the adapter if its group is on."""
    active = [n for n in layer.active_adapters if n in adapters_of(layer) and is_active(layer, n)]
    if layer.disable_adapters or adapter_name not in active:
        return False
    expected = f"{adapter_name!r} as the only active adapter"
    found = f"{active}; a row can use only one adapter"
    require(len(active) <= 1, "coalitions", name, expected, found, RowwiseError)
    kind = f"{type(layer).__module__}.{type(layer).__qualname__}"
    own = kind_of_layer(layer, adapter_name)
    found = kind if own.sums else f"{kind} with a {own.title} adapter"
    fits = isinstance(layer, LoraLayer) or _takes_names(layer, adapter_name)
    expected = "a layer whose adapter can be chosen for each row"
    require(fits, "coalitions", name, expected, found, RowwiseError)
    return True


def _takes_names(layer: Any, adapter_name: str) -> bool:
    """Return whether a PEFT layer accepts ``adapter_names``. Of the layers with an adapter that
    scales the output, only dense layers that ``from_peft`` has converted accept
    ``adapter_names``."""
    peft_layers: Any = sys.modules["peft.tuners.lora.layer"]
    if not isinstance(layer, peft_layers.Linear | peft_layers.Embedding | peft_layers._ConvNd):
        return False
    fused = getattr(type(layer), "asks_what_is_off", False)
    return kind_of_layer(layer, adapter_name).sums or (
        fused and dense_parameters(layer.base_layer) is not None
    )


class _GiveRows:
    """Forward pre-hook that passes the adapter of each row to the layer's own forward."""

    def __init__(self, name: str, layer: Any, rows: NamedRows, tokens_first: bool):
        self.name, self.rows = name, rows
        self.place = int(tokens_first)  # index of the batch dimension
        #: Whether to transpose input and output, since PEFT's own layers require the batch
        #: dimension to be the first.
        self.transposes = tokens_first and not hasattr(type(layer), "tokens_first")
        base = layer.get_base_layer()
        #: Smallest number of dimensions of an input with the batch dimension first.
        self.dims = 2
        if isinstance(base, nn.Embedding):
            self.dims = 1
        elif hasattr(base, "stride"):
            self.dims = base.weight.dim()
        self.ours = isinstance(layer, LoraLayer)

    def __call__(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        given = kwargs.get("adapter_ids"), kwargs.get("adapter_names")
        fits = len(args) == 1 and not any(value is not None for value in given)
        found = f"{len(args)} positional arguments and keywords {sorted(kwargs)}"
        require(fits, "coalitions", self.name, "a call with activations only", found, RowwiseError)
        x = args[0]
        fits = x.dim() >= self.dims + self.place and x.shape[self.place] == len(self.rows)
        expected = f"activations with {len(self.rows)} sequences in dimension {self.place}"
        found = f"shape {tuple(x.shape)}"
        require(fits, "coalitions", self.name, expected, found, RowwiseError)
        if self.transposes:
            args = (x.transpose(0, 1),)
        rows = {"adapter_ids": self.rows.assignment} if self.ours else {"adapter_names": self.rows}
        return args, {**kwargs, **rows}


def _transpose_back(_layer: nn.Module, _args: Any, output: Tensor) -> Tensor:
    return output.transpose(0, 1).contiguous()  # some models call `view` on the output
