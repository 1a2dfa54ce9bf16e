"""Functions that change the ranks of an adapter, or remove modules."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Literal, get_args

import torch

from lora_ext._checks import choice, integer, require
from lora_ext.kinds import Factors

from ._low_rank import asleep, check_matrices, resized
from ._peft_files import AdapterSource
from ._value import LoraAdapter

PruneMode = Literal["remove", "zero"]
_MAX_RANK = 2**31 - 1  # a tensor size that every backend supports


@torch.no_grad()
def resize_adapter(
    adapter: LoraAdapter | AdapterSource,
    rank: int | Mapping[str, int],
    generator: torch.Generator | None = None,
    progress: Callable[[list[str]], Iterable[str]] = iter,
) -> tuple[LoraAdapter, dict[str, float]]:
    """Return an adapter with new ranks and the same updates, or their best approximations.

    A smaller rank keeps the largest singular values of ``B A``, with their square roots in each
    factor. A larger rank appends random rows to ``A`` and zeros to ``B``. If a row of ``A`` and the
    corresponding column of ``B`` are both 0, the row is drawn at random too, so that training can
    change it. The scale is kept, so alpha changes. Rank 0 removes the module. A bias and a
    magnitude do not change.

    Args:
        adapter: adapter, as a value, a folder, or (config, state dict). It is not changed.
        rank: new rank of all modules, or ranks by full module name. Modules without an entry keep
            their rank.
        generator: generator on the CPU for new rows of ``A``; default is a generator of seed 0.
        progress: function that wraps the list of module names, as ``tqdm`` does.

    Returns:
        the new adapter, in the same dtypes, and the error by module. The error is the Frobenius
        norm of the change of ``scaling * B A`` (before rounding and before outputs are scaled),
        or 0 if the rank is not smaller.

    Raises:
        ValueError: If a rank is not an integer of at least 0, if the adapter lacks a module, or if
            values are not finite.
        NotImplementedError: If a module is a grouped convolution.

    Source: LEGEND, which changes ranks between rounds; Eckart and Young, 1936.
    """
    adapter = LoraAdapter.of(adapter)
    at = "resize_adapter: rank"
    given = rank if isinstance(rank, Mapping) else dict.fromkeys(adapter.modules, rank)
    adapter.check_names(at, given)
    ranks = {name: factors.a.shape[0] for name, factors in adapter.modules.items()}
    ranks |= {name: integer(at, name, value, 0, _MAX_RANK) for name, value in given.items()}
    generator = generator or torch.Generator().manual_seed(0)
    modules: dict[str, Factors] = {}
    errors: dict[str, float] = {}
    for name in progress(list(adapter.modules)):
        found = factors = adapter.modules[name]
        errors[name] = 0.0
        product = factors.a.shape[0] == factors.b.shape[1]  # False for a grouped convolution
        changes = ranks[name] != factors.a.shape[0]
        if changes or (product and bool(asleep(factors.a, factors.b).any())):
            where = f"resize_adapter: {name}"
            check_matrices(factors, where)
            matrices = factors.a.flatten(1), factors.b.flatten(1)
            a, b, error = resized(where, *matrices, ranks[name], generator)
            errors[name] = abs(factors.scaling) * error
            a = a.unflatten(1, factors.a.shape[1:])
            b = b.reshape(len(b), ranks[name], *factors.b.shape[2:])
            found = factors._replace(a=a, b=b)
        if ranks[name]:
            modules[name] = found
    return adapter.with_modules(modules), errors


@torch.no_grad()
def prune_adapter(
    adapter: LoraAdapter | AdapterSource,
    keep: Iterable[str] | Callable[[str], bool],
    mode: PruneMode = "remove",
) -> LoraAdapter:
    """Remove an adapter's update from all modules except those in ``keep``.

    Args:
        adapter: adapter, as a value, a folder, or (config, state dict). It is not changed.
        keep: full names of the modules to keep, or a function that receives a name and returns
            whether to keep the module. The tensors of these modules are not copied.
        mode: "remove" removes the other modules with their factors, biases and base weights;
            "zero" keeps them and sets ``B`` and the bias to 0. A trained bias of the base layer is
            removed by "remove" if PEFT's setting is ``bias="lora_only"``, and kept otherwise.

    Returns:
        the new adapter. With "remove", its configuration contains the full names of the remaining
        modules.

    Raises:
        ValueError: If a name in ``keep`` is not a module of the adapter.
        TypeError: If ``keep`` is neither names nor a function.
        NotImplementedError: If "zero" is used on a module whose outputs or inputs are scaled,
            which would still change the base weight.
    """
    where = "prune_adapter"
    adapter = LoraAdapter.of(adapter)
    choice(where, "mode", mode, get_args(PruneMode))
    if callable(keep):
        kept = {name for name in adapter.modules if keep(name)}
    elif isinstance(keep, str) or not isinstance(keep, Iterable):
        expected = "full names of modules or a function of a name"
        raise TypeError(f"{where}: keep: expected {expected}, found {keep!r:.200}")
    else:
        kept = tuple(keep)
        adapter.check_names(f"{where}: keep", kept)
    if mode == "remove":
        return adapter.with_modules({n: f for n, f in adapter.modules.items() if n in kept})
    modules = dict(adapter.modules)
    for name, factors in adapter.modules.items():
        if name in kept:
            continue
        expected = f"'remove' for {name}, which has {adapter.config.kind.rescales}"
        found = "'zero', which would still scale the base weight"
        require(factors.sums, where, "mode", expected, found, NotImplementedError)
        bias = None if factors.bias is None else torch.zeros_like(factors.bias)
        modules[name] = factors._replace(b=torch.zeros_like(factors.b), bias=bias)
    if adapter.parts:
        return adapter.with_modules(modules)
    return LoraAdapter(adapter.config, modules, adapter.base_weights, adapter.replacements)
