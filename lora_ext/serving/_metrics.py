"""Numbers of a server as Prometheus reads them, text format 0.0.4."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

#: What the response's Content-Type is to say.
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_COUNTERS = {
    "requests_total": "Requests that have ended.",
    "tokens_total": "Tokens of the answers of requests that have ended.",
    "cancelled_total": "Requests that have ended because their client has gone.",
    "refused_total": "Requests that were answered by an error, by its code.",
    "pool_loads": "Adapters that were read.",
    "pool_evictions": "Adapters that made way for others.",
    "pool_cache_hits": "Adapters that came back from host memory.",
    "pool_dropped": "Adapters that host memory had no room for.",
}
_GAUGES = {
    "requests": "Requests that wait or run.",
    "pool_slots_used": "Adapters on the device.",
    "pool_slots_pinned": "Adapters on the device that requests hold.",
    "pool_pins": "Requests that hold an adapter.",
    "pool_modules_targeted": "Modules that an adapter has touched.",
    "pool_pages_total": "Pages that these modules may have.",
    "pool_pages_free": "Pages of these that no adapter has.",
    "pool_limit_bytes": "Bytes that the pool may take from its devices.",
    "pool_reserved_bytes": "Bytes that it has taken: pages, tables and replaced modules.",
    "pool_used_bytes": "Bytes that its adapters fill.",
    "pool_page_bytes": "Bytes taken for pages.",
    "pool_table_bytes": "Bytes taken for tables.",
    "pool_replaced_bytes": "Bytes taken for replaced modules.",
    "pool_cached": "Adapters in host memory.",
    "pool_cache_bytes": "Bytes of these.",
}


class Load(NamedTuple):
    """Load of an engine.

    Args:
        running: adapter of each running request; None is the base model.
        waiting: adapter of each waiting request.
        most_adapters: number of adapters that fit at a time.
        cache: share of the cache that requests hold.
    """

    running: Sequence[str | None]
    waiting: Sequence[str | None]
    most_adapters: int
    cache: float


def prometheus(stats: Mapping[str, int], refused: Mapping[int, int], load: Load) -> str:
    """Return a page of metrics, each with its type and a line of help.

    Args:
        stats: of :meth:`Engine.stats`. refused: how many requests by the code of their error.
        load: of :meth:`Engine.load`; it is told under vLLM's names, which routers know.
    """
    samples = {name: {"": value} for name, value in stats.items()}
    if refused:
        samples["refused_total"] = {f'{{code="{c}"}}': n for c, n in sorted(refused.items())}
    lines: list[str] = []
    for name, values in samples.items():
        if name in _GAUGES:
            short = name.removesuffix("_total")  # Prometheus keeps it for counters
            lines += _lines(f"lora_ext_{short}", "gauge", _GAUGES[name], values)
        else:
            lines += _lines(f"lora_ext_{name}", "counter", _COUNTERS[name], values)
    # Gauges of vLLM's names, by which the Gateway API's inference extension places requests:
    # https://github.com/kubernetes-sigs/gateway-api-inference-extension,
    # docs/proposals/003-model-server-protocol.
    labels = (
        f'{{max_lora="{load.most_adapters}",running_lora_adapters="{_names(load.running)}",'
        f'waiting_lora_adapters="{_names(load.waiting)}"}}'
    )
    info = "Adapters of requests; its value is the time."
    lines += _lines("vllm:lora_requests_info", "gauge", info, {labels: time.time()})
    gauges = {
        "num_requests_running": ("Requests that run.", len(load.running)),
        "num_requests_waiting": ("Requests that wait.", len(load.waiting)),
        "kv_cache_usage_perc": ("Share of the cache that requests hold.", load.cache),
    }
    for name, (text, value) in gauges.items():
        lines += _lines(f"vllm:{name}", "gauge", text, {"": value})
    return "\n".join(lines) + "\n"


def _lines(name: str, kind: str, text: str, values: Mapping[str, float]) -> list[str]:
    samples = [f"{name}{labels} {value}" for labels, value in values.items()]
    return [f"# HELP {name} {text}", f"# TYPE {name} {kind}", *samples]


def _names(names: Sequence[str | None]) -> str:
    """Return names as the value of a label.

    Readers split it at commas, so a comma inside a name is escaped.
    """
    listed = ",".join(sorted({name.replace(",", "%2C") for name in names if name is not None}))
    return listed.replace("\\", r"\\").replace('"', r"\"")
