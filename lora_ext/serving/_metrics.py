"""Metrics of a server in Prometheus's text format 0.0.4."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from lora_ext.rows import Name

#: Content-Type of the response.
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_COUNTERS = {
    "requests_total": "Requests that have ended.",
    "tokens_total": "Generated tokens of requests that have ended.",
    "cancelled_total": "Requests that have ended because their client has disconnected.",
    "refused_total": "Requests that were rejected, by HTTP status code.",
    "pool_loads": "Adapters that were read.",
    "pool_evictions": "Adapters that were evicted to make room for others.",
    "pool_cache_hits": "Adapters that were loaded from host memory.",
    "pool_dropped": "Adapters that did not fit into host memory.",
}
_GAUGES = {
    "requests": "Waiting and running requests.",
    "pool_slots_used": "Adapters on the device.",
    "pool_slots_pinned": "Adapters on the device that requests pin.",
    "pool_pins": "Requests that pin an adapter.",
    "pool_modules_targeted": "Modules that an adapter has targeted.",
    "pool_pages_total": "Maximum number of pages of targeted modules.",
    "pool_pages_free": "Free pages of targeted modules.",
    "pool_limit_bytes": "Maximum number of bytes that the pool may allocate on its devices.",
    "pool_reserved_bytes": "Bytes that the pool has allocated: pages, tables, replaced modules.",
    "pool_used_bytes": "Bytes that the adapters of the pool use.",
    "pool_page_bytes": "Bytes allocated for pages.",
    "pool_table_bytes": "Bytes allocated for tables.",
    "pool_replaced_bytes": "Bytes allocated for replaced modules.",
    "pool_cached": "Adapters in host memory.",
    "pool_cache_bytes": "Bytes of the adapters in host memory.",
    "pool_cache_limit_bytes": "Maximum number of bytes of the adapters in host memory.",
}


class Load(NamedTuple):
    """Load of an engine: its running and waiting requests, and its use of memory.

    Args:
        running: for each running request, the adapter name, the tuple of names of a mixture, or
            None for the base model.
        waiting: the same for each waiting request.
        most_adapters: maximum number of adapters on the device.
        cache: used fraction of the KV cache.
    """

    running: Sequence[Name | None]
    waiting: Sequence[Name | None]
    most_adapters: int
    cache: float


def prometheus(stats: Mapping[str, int], refused: Mapping[int, int], load: Load) -> str:
    """Return the text of all metrics, each with its type and a line of help.

    Args:
        stats: result of :meth:`Engine.stats`.
        refused: number of rejected requests by HTTP status code.
        load: result of :meth:`Engine.load`. Its metrics have vLLM's names, which routers support.
    """
    samples = {name: {"": value} for name, value in stats.items()}
    if refused:
        samples["refused_total"] = {f'{{code="{c}"}}': n for c, n in sorted(refused.items())}
    lines: list[str] = []
    for name, values in samples.items():
        if name in _GAUGES:
            short = name.removesuffix("_total")  # in Prometheus only counters have this suffix
            lines += _lines(f"lora_ext_{short}", "gauge", _GAUGES[name], values)
        else:
            lines += _lines(f"lora_ext_{name}", "counter", _COUNTERS[name], values)
    # Gauges with vLLM's names, which the Gateway API's inference extension uses to route requests:
    # https://github.com/kubernetes-sigs/gateway-api-inference-extension,
    # docs/proposals/003-model-server-protocol.
    labels = (
        f'{{max_lora="{load.most_adapters}",running_lora_adapters="{_names(load.running)}",'
        f'waiting_lora_adapters="{_names(load.waiting)}"}}'
    )
    info = "Adapters of running and waiting requests; the value is the Unix time."
    lines += _lines("vllm:lora_requests_info", "gauge", info, {labels: time.time()})
    gauges = {
        "num_requests_running": ("Running requests.", len(load.running)),
        "num_requests_waiting": ("Waiting requests.", len(load.waiting)),
        "kv_cache_usage_perc": ("Fraction of the cache that requests use.", load.cache),
    }
    for name, (text, value) in gauges.items():
        lines += _lines(f"vllm:{name}", "gauge", text, {"": value})
    return "\n".join(lines) + "\n"


def _lines(name: str, kind: str, text: str, values: Mapping[str, float]) -> list[str]:
    samples = [f"{name}{labels} {value}" for labels, value in values.items()]
    return [f"# HELP {name} {text}", f"# TYPE {name} {kind}", *samples]


def _names(names: Sequence[Name | None]) -> str:
    """Return adapter names as the value of a label, separated by commas.

    A comma inside a name is escaped, because readers split the value at commas.
    """
    each = {n for name in names for n in (name if isinstance(name, tuple) else (name,))}
    listed = ",".join(sorted(name.replace(",", "%2C") for name in each if name is not None))
    return listed.replace("\\", r"\\").replace('"', r"\"")
