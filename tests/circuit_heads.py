"""Circuit heads with random parameters, for the tests of the head and its objective."""

import itertools
from typing import Any

import torch
from torch import Tensor

from lora_ext.nn import CircuitHead

KINDS = {"ff": 1, "cp": 3, "hmm": 3, "btree": 3}  # rank of each kind
D, V, K = 6, 3, 4
DOUBLE = torch.float64


def make(kind: str, emission: str = "full", n_token: int = K, **options: Any) -> CircuitHead:
    """Return a head with parameters of order one, so that components and contexts differ."""
    torch.manual_seed(7)
    options = {"rank": KINDS[kind], "adapter_rank": 2, "dtype": DOUBLE, **options}
    head = CircuitHead(D, V, n_token, kind=kind, emission=emission, **options)
    with torch.no_grad():
        for p in head.parameters():
            p.copy_(torch.randn(p.shape, dtype=DOUBLE))
        if emission == "adapter":
            head.unembed.copy_(torch.randn(head.unembed.shape, dtype=DOUBLE))
    return head


def hidden(*leading: int) -> Tensor:
    return torch.randn(*leading, D, dtype=DOUBLE, generator=torch.Generator().manual_seed(3))


def windows(n_token: int = K) -> Tensor:
    return torch.tensor(list(itertools.product(range(V), repeat=n_token)))
