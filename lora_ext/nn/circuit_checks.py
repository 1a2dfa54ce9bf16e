"""What a circuit head may be: its kinds, its sizes, and where its inputs can be looked at."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from lora_ext.ops._compiling import compiles
from lora_ext.reference.circuit import KINDS

from .emission import EMISSIONS

#: The families of circuits.
Kind = Literal["ff", "cp", "hmm", "btree"]
#: How leaves follow from hidden states: the keys of :data:`~lora_ext.nn.emission.EMISSIONS`.
EmissionName = Literal["full", "expander", "adapter"]

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def looked_at(t: Tensor) -> bool:
    """Whether the numbers may be checked here, on the host. The ops check them again when they
    run."""
    return t.device.type == "cpu" and not compiles()


def check_structure(
    where: str, n_token: int, rank: int, kind: str, emission: str, adapter_rank: int
) -> None:
    """Raise ValueError where no head has this structure; ``where`` starts the message."""
    _require(kind in KINDS, where, "kind", f"one of {KINDS}", kind)
    _require(emission in EMISSIONS, where, "emission", f"one of {tuple(EMISSIONS)}", emission)
    for name, size in (("n_token", n_token), ("rank", rank), ("adapter_rank", adapter_rank)):
        _require(isinstance(size, int), where, name, "an int", size)
    least = 2 if kind in ("hmm", "btree") else 1
    _require(n_token >= least, where, "n_token", f"at least {least} for {kind!r}", n_token)
    _require(rank >= least, where, "rank", f"at least {least} for {kind!r}", rank)
    _require(kind != "ff" or rank == 1, where, "rank", "1 for 'ff'", rank)
    _require(adapter_rank >= 1, where, "adapter_rank", "at least 1", adapter_rank)


def check_tensors(where: str, hidden_size: int, vocab_size: int, dtype: torch.dtype) -> None:
    """Raise ValueError where no head has these sizes, NotImplementedError for other dtypes."""
    _require(hidden_size >= 1, where, "hidden_size", "at least 1", hidden_size)
    _require(vocab_size >= 2, where, "vocab_size", "at least 2", vocab_size)
    if dtype not in _DTYPES:
        raise NotImplementedError(f"{where}: dtype: expected one of {_DTYPES}, found {dtype}")


def _require(ok: bool, where: str, name: str, expected: str, found: object) -> None:
    if not ok:
        raise ValueError(f"{where}: {name}: expected {expected}, found {found!r}")
