"""Training of many clients as the rows of one batch, on one base model."""

from ._batches import logits_of, merged, rows_in
from ._client_layers import UnsupportedModule
from ._clients import ClientSpec, client_seed, step_seeds
from .training import BatchedClients

__all__ = [
    "BatchedClients", "ClientSpec", "UnsupportedModule", "client_seed", "logits_of", "merged",
    "rows_in", "step_seeds",
]  # fmt: skip
