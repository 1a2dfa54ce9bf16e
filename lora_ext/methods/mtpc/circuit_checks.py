"""What a circuit head may be: its kinds, its sizes, and where its inputs can be looked at."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from lora_ext._checks import choice, integer, require
from lora_ext._torch import compiles
from lora_ext.reference import KINDS

from .emission import EMISSIONS

#: The families of circuits.
Kind = Literal["ff", "cp", "hmm", "btree"]
#: How leaves follow from hidden states: the keys of
#: :data:`~lora_ext.methods.mtpc.emission.EMISSIONS`.
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
    choice(where, "kind", kind, KINDS)
    choice(where, "emission", emission, tuple(EMISSIONS))
    least = 2 if kind in ("hmm", "btree") else 1
    few = "an int", f"at least {least} for {kind!r}"
    integer(where, "n_token", n_token, least, expected=few)
    integer(where, "rank", rank, least, expected=few)
    require(kind != "ff" or rank == 1, where, "rank", "1 for 'ff'", rank)
    integer(where, "adapter_rank", adapter_rank, 1, expected=("an int", "at least 1"))


def check_tensors(where: str, hidden_size: int, vocab_size: int, dtype: torch.dtype) -> None:
    """Raise ValueError where no head has these sizes, NotImplementedError for other dtypes."""
    integer(where, "hidden_size", hidden_size, 1, expected="at least 1")
    integer(where, "vocab_size", vocab_size, 2, expected="at least 2")
    require(dtype in _DTYPES, where, "dtype", f"one of {_DTYPES}", dtype, NotImplementedError)
