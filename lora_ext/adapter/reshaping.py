"""An adapter with other ranks, or in fewer modules."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Literal, get_args

import torch

from lora_ext._checks import choice, integer, require

from ._low_rank import asleep, check_matrices, resized
from ._peft_files import AdapterSource, Factors
from ._value import LoraAdapter

PruneMode = Literal["remove", "zero"]
_MOST = 2**31 - 1  # what a side of a tensor surely holds


@torch.no_grad()
def resize_adapter(
    adapter: LoraAdapter | AdapterSource,
    rank: int | Mapping[str, int],
    generator: torch.Generator | None = None,
    progress: Callable[[list[str]], Iterable[str]] = iter,
) -> tuple[LoraAdapter, dict[str, float]]:
    """The same adapter with other ranks: its update exactly, or the nearest that the rank allows.

    A smaller rank keeps the largest singular values of ``B A``, with their roots in either factor.
    A larger one keeps every bit, and adds rows to ``A`` and zeros to ``B``. A rank that would be 0
    in both gets a row as well, so that training moves every rank. The scale stays, so alpha
    changes. Rank 0 takes the module out. A bias and DoRA's magnitude stay as they are.

    Args:
        adapter: a value, a folder, or (config, state dict). It does not change.
        rank: for all modules, or by the full names of some; the others keep theirs.
        generator: of new rows of ``A``, on the CPU; default is one of seed 0.
        progress: is given the names of the modules, and iterated over.

    Returns:
        the adapter, in the dtypes that it had, and by module the error: the Frobenius norm of the
        change of ``scaling * B A`` (before rounding, and before DoRA's normalisation), 0 where the
        rank did not fall.

    Raises:
        ValueError: a rank that is no integer from 0; a module that the adapter lacks; values that
            are not finite. NotImplementedError: grouped convolutions.

    Source: LEGEND, re-ranking between rounds; Eckart and Young, 1936.
    """
    adapter = LoraAdapter.of(adapter)
    ranks = _ranks(adapter, rank)
    generator = generator or torch.Generator().manual_seed(0)
    modules: dict[str, Factors] = {}
    errors: dict[str, float] = {}
    for name in progress(list(adapter.modules)):
        found = factors = adapter.modules[name]
        errors[name] = 0.0
        product = factors.a.shape[0] == factors.b.shape[1]  # else a grouped convolution
        asks = ranks[name] != factors.a.shape[0]
        if asks or (product and bool(asleep(factors.a, factors.b).any())):
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


def _ranks(adapter: LoraAdapter, rank: int | Mapping[str, int]) -> dict[str, int]:
    where = "resize_adapter: rank"
    given = rank if isinstance(rank, Mapping) else dict.fromkeys(adapter.modules, rank)
    adapter.check_names(where, given)
    own = {name: factors.a.shape[0] for name, factors in adapter.modules.items()}
    return own | {name: integer(where, name, value, 0, _MOST) for name, value in given.items()}


@torch.no_grad()
def prune_adapter(
    adapter: LoraAdapter | AdapterSource,
    keep: Iterable[str] | Callable[[str], bool],
    mode: PruneMode = "remove",
) -> LoraAdapter:
    """Keep an adapter in some modules, and take its update off the others.

    Args:
        adapter: a value, a folder, or (config, state dict). It does not change.
        keep: full names of modules, or what is true of the names of those to keep. What is kept is
            kept as the very tensors.
        mode: "remove" leaves the others out, factors, bias and base weights of theirs, so that
            they cost nothing; "zero" keeps their place and sets ``B`` and bias to 0. A trained bias
            of the base layer goes with "remove" and PEFT's ``bias="lora_only"``, else it stays.

    Returns:
        the adapter; with "remove" its configuration names the survivors in full.

    Raises:
        ValueError: a name that the adapter lacks. TypeError: neither names nor a function.
        NotImplementedError: "zero" on DoRA, whose magnitude would remain.
    """
    where = "prune_adapter"
    adapter = LoraAdapter.of(adapter)
    choice(where, "mode", mode, get_args(PruneMode))
    kept = _names(adapter, keep)
    if mode == "remove":
        return adapter.with_modules({n: f for n, f in adapter.modules.items() if n in kept})
    modules = dict(adapter.modules)
    for name, factors in adapter.modules.items():
        if name in kept:
            continue
        expected = f"'remove' for {name}, which has a DoRA magnitude"
        found = "'zero': the base weight would still be scaled to it"
        require(factors.magnitude is None, where, "mode", expected, found, NotImplementedError)
        bias = None if factors.bias is None else torch.zeros_like(factors.bias)
        modules[name] = factors._replace(b=torch.zeros_like(factors.b), bias=bias)
    return LoraAdapter(adapter.config, modules, adapter.base_weights, adapter.replacements)


def _names(adapter: LoraAdapter, keep: Iterable[str] | Callable[[str], bool]) -> set[str]:
    where = "prune_adapter: keep"
    if callable(keep):
        return {name for name in adapter.modules if keep(name)}
    if isinstance(keep, str) or not isinstance(keep, Iterable):
        expected = "full names of modules or a function of a name"
        raise TypeError(f"{where}: expected {expected}, found {keep!r:.200}")
    names = list(keep)
    adapter.check_names(where, names)
    return set(names)
