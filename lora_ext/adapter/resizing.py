"""An adapter with other ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch

from .low_rank import asleep, check_matrices, resized
from .peft_files import AdapterSource, Factors
from .value import LoraAdapter

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
            found, errors[name] = _resized(name, factors, ranks[name], generator)
        if ranks[name]:
            modules[name] = found
    return adapter.with_modules(modules), errors


def _resized(
    name: str, factors: Factors, rank: int, generator: torch.Generator
) -> tuple[Factors, float]:
    where = f"resize_adapter: {name}"
    check_matrices(factors, where)
    a, b, error = resized(where, factors.a.flatten(1), factors.b.flatten(1), rank, generator)
    a = a.unflatten(1, factors.a.shape[1:])
    b = b.reshape(len(b), rank, *factors.b.shape[2:])
    return factors._replace(a=a, b=b), abs(factors.scaling) * error


def _ranks(adapter: LoraAdapter, rank: int | Mapping[str, int]) -> dict[str, int]:
    where = "resize_adapter: rank"
    given = rank if isinstance(rank, Mapping) else dict.fromkeys(adapter.modules, rank)
    adapter.check_names(where, given)
    for name, value in given.items():
        if type(value) is not int or not 0 <= value <= _MOST:
            raise ValueError(
                f"{where}: {name}: expected an integer from 0 to {_MOST}, found {value!r:.100}"
            )
    own = {name: factors.a.shape[0] for name, factors in adapter.modules.items()}
    return {**own, **given}
