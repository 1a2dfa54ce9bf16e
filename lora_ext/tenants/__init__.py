"""Training for many tenants on one base model.

A tenant is a user of the service with one trainable adapter. ``Service`` computes the calls of
several tenants in one forward, samples from their adapters, and writes checkpoints: folders with an
adapter and its optimizer's state. :mod:`lora_ext.server.tinker` serves tenants over HTTP. Names
that are not in ``__all__`` are for other subpackages.
"""

from lora_ext.serving import QueueFullError

from ._data import LOSSES, Datum, Result
from ._sampler import Sample, Sampler
from ._scheduler import settle
from .service import Service, Tenant

__all__ = [
    "LOSSES",
    "Datum",
    "QueueFullError",
    "Result",
    "Sample",
    "Sampler",
    "Service",
    "Tenant",
]
