"""An adapter in fewer modules."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal, get_args

import torch

from .peft_files import AdapterSource, Factors
from .value import LoraAdapter

PruneMode = Literal["remove", "zero"]


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
    if mode not in get_args(PruneMode):
        raise ValueError(f"{where}: mode: expected one of {get_args(PruneMode)}, found {mode!r}")
    kept = _names(adapter, keep)
    if mode == "remove":
        return adapter.with_modules({n: f for n, f in adapter.modules.items() if n in kept})
    modules = {n: f if n in kept else _zero(n, f) for n, f in adapter.modules.items()}
    return LoraAdapter(adapter.config, modules, adapter.base_weights, adapter.replacements)


def _zero(name: str, factors: Factors) -> Factors:
    if factors.magnitude is not None:
        raise NotImplementedError(
            f"prune_adapter: mode: expected 'remove' for {name}, which has a DoRA magnitude, found "
            "'zero': the base weight would still be scaled to it"
        )
    bias = None if factors.bias is None else torch.zeros_like(factors.bias)
    return factors._replace(b=torch.zeros_like(factors.b), bias=bias)


def _names(adapter: LoraAdapter, keep: Iterable[str] | Callable[[str], bool]) -> set[str]:
    where = "prune_adapter: keep"
    if callable(keep):
        return {name for name in adapter.modules if keep(name)}
    if isinstance(keep, str) or not isinstance(keep, Iterable):
        raise TypeError(
            f"{where}: expected full names of modules or a function of a name, found {keep!r:.200}"
        )
    names = list(keep)
    adapter.check_names(where, names)
    return set(names)
