"""Numbers of a server as Prometheus reads them, text format 0.0.4."""

from __future__ import annotations

from collections.abc import Mapping

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


def prometheus(stats: Mapping[str, int], refused: Mapping[int, int]) -> str:
    """A page of metrics, each with its type and a line that says what it is.

    Args:
        stats: of :meth:`Engine.stats`. refused: how many requests by the code of their error.
    """
    samples = {name: {"": value} for name, value in stats.items()}
    if refused:
        samples["refused_total"] = {f'{{code="{c}"}}': n for c, n in sorted(refused.items())}
    lines: list[str] = []
    for name, values in samples.items():
        kind, text = "gauge", _GAUGES.get(name)
        if text is None:
            kind, text = "counter", _COUNTERS[name]
        else:
            name = name.removesuffix("_total")  # Prometheus keeps it for counters
        lines += [f"# HELP lora_ext_{name} {text}", f"# TYPE lora_ext_{name} {kind}"]
        lines += [f"lora_ext_{name}{labels} {value}" for labels, value in values.items()]
    return "\n".join(lines) + "\n"
