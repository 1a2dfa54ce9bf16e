"""Training for many tenants on one base model.

``Service`` merges the calls of tenants, samples from their adapters and stores their saves.
:mod:`lora_ext.server.tinker` serves it over HTTP. Names that are not in ``__all__`` are for other
subpackages.
"""

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
