"""What a circuit head may be: its kinds, its sizes, and where its inputs can be looked at."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from lora_ext.reference.circuit import KINDS

from .emission import EMISSIONS

#: The families of circuits.
Kind = Literal["ff", "cp", "hmm", "btree"]
#: How leaves follow from hidden states: the keys of :data:`~lora_ext.nn.emission.EMISSIONS`.
EmissionName = Literal["full", "expander", "adapter"]


def looked_at(t: Tensor) -> bool:
    """Whether the numbers may be checked here, on the host. The ops check them again when they
    run."""
    return t.device.type == "cpu" and not torch.compiler.is_compiling()


def check_structure(
    where: str, n_token: int, rank: int, kind: str, emission: str, adapter_rank: int
) -> None:
    """Raise ValueError where no head has this structure; ``where`` starts the message."""

    def require(ok: bool, name: str, expected: str, found: object) -> None:
        if not ok:
            raise ValueError(f"{where}: {name}: expected {expected}, found {found!r}")

    require(kind in KINDS, "kind", f"one of {KINDS}", kind)
    require(emission in EMISSIONS, "emission", f"one of {tuple(EMISSIONS)}", emission)
    least = 2 if kind in ("hmm", "btree") else 1
    require(n_token >= least, "n_token", f"at least {least} for {kind!r}", n_token)
    require(rank >= least, "rank", f"at least {least} for {kind!r}", rank)
    require(kind != "ff" or rank == 1, "rank", "1 for 'ff'", rank)
    require(1 <= adapter_rank <= 256, "adapter_rank", "1 to 256", adapter_rank)
