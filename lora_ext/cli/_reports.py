"""Commands that print a report and write no files: doctor, inspect and diff."""

from __future__ import annotations

import math
from argparse import Namespace
from typing import Any

from lora_ext import doctor as devices
from lora_ext.adapter import LoraAdapter, compare_adapters, rank_report

from ._output import Fault, progress, show

_LISTED = 8  # maximum number of tensors with NaN or inf that a message lists


def doctor(arguments: Namespace) -> int:
    """Show the installed versions and test each device.

    Paste the output into a bug report. The exit status is 1 if an op failed.
    """
    return devices.main(as_json=arguments.json)


def inspect(arguments: Namespace) -> None:
    """Show the modules of an adapter: ranks, norms, bad values.

      norm  Frobenius norm of the update, scaling * B A
      bad   number of values that are NaN or infinite; if there are any, nothing
            else is measured and the exit status is 1

    The other columns are effective ranks: the number of directions that the update
    uses.
    """
    adapter = LoraAdapter.load(arguments.adapter)
    rows: list[dict[str, Any]] = []
    for name in progress(list(adapter.modules)):
        factors = adapter.modules[name]
        bad = sum(map(_bad, factors.tensors.values()))
        row = {
            "module": name,
            "r": factors.a.shape[0],
            "shape": (factors.b.shape[0], *factors.a.shape[1:]),  # shape of the adapted weight
            "scaling": factors.scaling,
            **_ranks(adapter, name, arguments, measured=not bad),
            "bad": bad,
        }
        rows.append(row)
    summary = {"adapter": str(arguments.adapter), **describe(adapter)}
    counts = {row["module"]: row["bad"] for row in rows}
    whole = {**adapter.base_weights, **adapter.replacements}
    counts |= {key: _bad(value) for key, value in whole.items()}
    summary["bad values"] = sum(counts.values())
    if not arguments.json:
        rows = [{**row, "shape": " x ".join(map(str, row["shape"]))} for row in rows]
    show(summary, rows, arguments.json)
    bad = [f"{name:.200} ({count})" for name, count in counts.items() if count]
    if bad:
        more = f" and {len(bad) - _LISTED} more" if len(bad) > _LISTED else ""
        places = f"{', '.join(bad[:_LISTED])}{more}"
        raise Fault(f"{arguments.adapter}: expected finite values, found NaN or inf in {places}")


def diff(arguments: Namespace) -> None:
    """Compare two adapters of one base model.

    The columns of a module:

      distance  Frobenius norm of the difference of the updates
      cosine    cosine of the updates: 1 for equal directions, 0 for orthogonal ones
      angles    principal angles between their column spaces, in degrees: the
                smallest and the largest, or all of them with --json
    """
    first, second = LoraAdapter.load(arguments.first), LoraAdapter.load(arguments.second)
    found = compare_adapters(first, second, progress=progress)
    rows: list[dict[str, Any]] = []
    for each in found:
        degrees = [math.degrees(angle) for angle in each.angles]
        row = {
            "module": each.module,
            "ranks": each.ranks,
            "norm A": each.norms[0],
            "norm B": each.norms[1],
            "distance": each.distance,
            "cosine": each.cosine,
        }
        if arguments.json:
            row["angles"] = degrees
        else:
            row["ranks"] = "/".join(map(str, each.ranks))
            row["angles"] = f"{degrees[0]:.1f} .. {degrees[-1]:.1f}" if degrees else None
        rows.append(row)
    norms = [math.hypot(*(each.norms[i] for each in found)) for i in (0, 1)]
    inner = sum((each.cosine or 0.0) * each.norms[0] * each.norms[1] for each in found)
    every = [factors for v in (first, second) for factors in v.modules.values()]
    beyond = {
        "bias": any(factors.bias is not None for factors in every),
        "magnitude": not all(factors.sums for factors in every),
        "replaced weights": bool(first.replacements or second.replacements),
    }
    summary = {
        "A": str(arguments.first),
        "B": str(arguments.second),
        "norm A": norms[0],
        "norm B": norms[1],
        "distance": math.hypot(*(each.distance for each in found)),
        "cosine": inner / (norms[0] * norms[1]) if norms[0] * norms[1] else None,
        "not compared": [what for what, there in beyond.items() if there] or None,
    }
    show(summary, rows, arguments.json)


def describe(adapter: LoraAdapter) -> dict[str, Any]:
    """Return the properties of an adapter by title, for a summary."""
    tensors = [t for factors in adapter.modules.values() for t in factors.tensors.values()]
    config = adapter.config
    kinds = {
        "rsLoRA": config.use_rslora,
        config.kind.title: config.kind.when or config.peft_type != "LORA",
        "bias": config.lora_bias,
        "embedding": any(f.embedding for f in adapter.modules.values()),
        "convolution": any(f.a.dim() > 2 for f in adapter.modules.values()),
        "modules_to_save": bool(config.modules_to_save),
        f"bias={config.base_bias}": config.base_bias != "none",
    }
    return {
        "base model": config.base_model or None,
        "modules": len(adapter.modules),
        "ranks": sorted({factors.a.shape[0] for factors in adapter.modules.values()}),
        "parameters": sum(t.numel() for t in tensors),
        "bytes": sum(t.nbytes for t in tensors),
        "invocation": list(config.invocation) or None,
        "dtypes": sorted({str(t.dtype).removeprefix("torch.") for t in tensors}),
        "with": [kind for kind, there in kinds.items() if there] or None,
        "weights of the base model": len(adapter.base_weights) or None,
        "replaced weights": len(adapter.replacements) or None,
    }


def _ranks(
    adapter: LoraAdapter, name: str, arguments: Namespace, measured: bool
) -> dict[str, float | int | None]:
    """Return the norm of a module's update and its effective ranks, by title.

    All are None if ``measured`` is False, or for a grouped convolution.
    """
    factors = adapter.modules[name]
    figures: dict[str, Any] = {}
    grouped = factors.a.shape[0] != factors.b.shape[1]  # A grouped convolution's update is not B A.
    if measured and not grouped:
        one = LoraAdapter(adapter.config, {name: factors})
        figures = dict(rank_report(one, kinds=arguments.kinds, taus=(arguments.tau,))[0])
    counts = ("threshold", "absolute")
    keys = {k: f"{k}@{arguments.tau:g}" if k in counts else k for k in arguments.kinds}
    return {"norm": figures.get("fro"), **{key: figures.get(key) for key in keys.values()}}


def _bad(tensor: Any) -> int:
    return int((~tensor.isfinite()).sum())
