"""Training for many tenants on one base model: ``Service`` merges their calls, samples from their
adapters and keeps their saves. No HTTP is in here; :mod:`lora_ext.server.tinker` speaks it. What is
not in ``__all__`` is for other rooms."""

from lora_ext.serving import QueueFullError

from ._data import Datum, Result
from ._losses import LOSSES
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
