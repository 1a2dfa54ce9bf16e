"""Shared parameters, which every client trains in addition to its adapter, such as a head.

Each client has a copy, and a module with shared parameters is called once per client. Products of
a client's rows are therefore bitwise equal to those in training that client separately. The calls
cost little, since modules above the adapted layers are small.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lora_ext._checks import require
from lora_ext.adapter import parse_key
from lora_ext.layers import block_index

from .._layers import forwards
from ._banks import SharedBank
from ._client_layers import WHERE, BatchRows, supported


def shared_names(
    model: nn.Module, shared: str | Sequence[str] | None, pattern: str
) -> tuple[str, ...]:
    """Return the names of the shared parameters, in the order of ``model.named_parameters()``.

    ``shared`` contains these names, or is a regular expression for them.

    Raises:
        ValueError: If the regular expression is invalid or matches nothing, or if the model lacks a
            name.
        UnsupportedModule: If a parameter cannot have one copy per client: the parameter is in a
            layer; its module contains an adapted module or is inside such a module; two modules
            share the parameter; or the parameter is not floating-point.
    """
    if shared is None:
        return ()
    known = dict(model.named_parameters(remove_duplicate=False))
    outside = [name for name in known if parse_key(name) is None]
    if isinstance(shared, str):
        try:
            names = [name for name in outside if re.search(shared, name)]
        except re.error as error:
            expected, found = "expected a regular expression", f"{shared!r} ({error})"
            raise ValueError(f"{WHERE}: shared: {expected}, found {found}") from None
        expected = "a pattern that matches a parameter outside the adapters"
        require(bool(names), WHERE, "shared", expected, repr(shared))
    else:
        for name in shared:
            expected = "names of parameters outside the adapters"
            require(name in outside, WHERE, "shared", expected, repr(name))
        names = [name for name in outside if name in set(shared)]
    adapted = [f"{n}." for n, m in model.named_modules() if hasattr(m, "lora_A")]
    for name in names:
        layer = block_index(name, pattern)
        supported(layer is None, name, "a parameter outside the layers", f"it in layer {layer}")
        owner = name[: name.rfind(".") + 1]  # "" for the model itself
        near = [each for each in adapted if name.startswith(each) or each.startswith(owner)]
        supported(not near, name, "a module without adapters", f"adapters in {near[:3]}")
        twins = [n for n, p in known.items() if p is known[name] and n != name]
        supported(not twins, name, "a parameter that is not tied", f"one tied to {twins}")
        real = known[name].is_floating_point()
        supported(real, name, "a floating-point dtype", known[name].dtype)
    return tuple(names)


class SharedModules:
    """Modules with shared parameters, which compute each client's rows with that client's
    copies."""

    def __init__(self, model: nn.Module, banks: Sequence[SharedBank], rows: BatchRows):
        self.rows = rows
        self._called: set[str] = set()
        self._owners: dict[str, list[SharedBank]] = {}
        direct = {bank.name.rpartition(".")[0] for bank in banks}
        for bank in banks:  # Of nested modules, only the outermost is replaced.
            above = [each for each in direct if bank.name.startswith(f"{each}.")]
            self._owners.setdefault(min(above, key=len), []).append(bank)
        self._modules = {owner: model.get_submodule(owner) for owner in self._owners}

    def divided(self) -> AbstractContextManager[None]:
        """Return a context manager in which the modules run once per client."""
        return forwards({m: self._divided(owner, m) for owner, m in self._modules.items()})

    def check_called(self) -> None:
        """Raise for a module that the model's forward has not called. The clients' copies of its
        parameters would have no effect if other code reads the parameters."""
        for owner in self._owners:
            supported(owner in self._called, owner, "a module that the forward calls", "no call")

    def _divided(self, owner: str, module: nn.Module) -> Callable[..., Any]:
        original = {module: module.forward}
        names = {bank.name.removeprefix(f"{owner}."): bank for bank in self._owners[owner]}
        dtypes = {name: module.get_parameter(name).dtype for name in names}

        def forward(*args: Any, **kwargs: Any) -> Tensor:
            self._called.add(owner)
            self.rows.above = owner
            places, segments = self.rows.step
            sizes = [segment.rows for segment in segments]
            first = next((t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)), None)
            found = [] if first is None else [*first.shape]
            supported(found[:1] == [sum(sizes)], owner, f"input shape ({sum(sizes)}, ...)", found)
            # ``unbind`` returns the copies of all clients, so that the backward allocates the
            # gradient of the stacked tensor once and not once per client.
            copies = {name: bank.leaves[0].unbind() for name, bank in names.items()}
            outputs: list[Tensor] = []
            for place, part in zip(places, _parts(sizes), strict=True):
                values = {name: each[place].to(dtypes[name]) for name, each in copies.items()}
                own_args = tuple(_rows(value, part, sum(sizes)) for value in args)
                own_kwargs = {k: _rows(value, part, sum(sizes)) for k, value in kwargs.items()}
                with forwards(original):
                    output = functional_call(module, values, own_args, own_kwargs)
                kind = type(output).__name__
                supported(isinstance(output, Tensor), owner, "a module that returns a tensor", kind)
                outputs.append(output)
            return torch.cat(outputs)

        return forward


def _parts(sizes: Sequence[int]) -> Iterator[slice]:
    """Yield the slice of each client's rows."""
    for size, stop in zip(sizes, itertools.accumulate(sizes), strict=True):
        yield slice(stop - size, stop)


def _rows(value: Any, part: slice, total: int) -> Any:
    has_rows = isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == total
    return value[part] if has_rows else value


def start_of(
    name: str, model: nn.Module, state: Mapping[str, Tensor], dtype: torch.dtype | None
) -> Tensor:
    """Return the initial value of a shared parameter: that in ``state`` or, if ``state`` lacks the
    name, that in the model. Raises ValueError if the shapes differ."""
    parameter = model.get_parameter(name)
    value = state.get(name, parameter).detach()
    require(value.shape == parameter.shape, WHERE, name, parameter.shape, value.shape)
    return value.to(parameter.device, dtype or value.dtype)
