"""Commands that write an adapter: merge, resize and prune."""

from __future__ import annotations

import math
from argparse import Namespace

from lora_ext.adapter import (
    LoraAdapter,
    merge_adapters,
    product_norm,
    prune_adapter,
    resize_adapter,
)

from ._output import progress, show
from ._reports import describe

_REMEDIES = {
    "SploraConfig(on_zero_alignment='skip')": "--on-zero-alignment skip",
    "SploraConfig(allow_degenerate=True)": "--allow-degenerate",
}


def merge(arguments: Namespace) -> None:
    """Merge several adapters of one base model into one.

    The modes, with weights w and updates s B A:
      delta      exact sum of w s B A; the ranks add up
      delta_svd  best approximation of that sum with a smaller rank
      factors    sum of the A and sum of the B; modules and ranks must be equal
      ties       mean of the largest values of each update that have the sign of
                 their sum (TIES), truncated to a rank
      dare       sum of randomly kept, rescaled values of each update, truncated
                 to a rank
    """
    _check_out(arguments.out)
    adapters = [LoraAdapter.load(folder) for folder in arguments.adapters]
    if arguments.weights is None:
        # By default, "ties" and "dare" sum the updates, and the other modes average them.
        sums = arguments.mode in ("ties", "dare")
        weights = [1.0 if sums else 1 / len(adapters)] * len(adapters)
    else:
        weights = [w for group in arguments.weights for w in group]
    options = {name: getattr(arguments, name) for name in ("mode", "rank", "density", "seed")}
    merged = merge_adapters(adapters, weights, progress=progress, **options)
    _save(merged, arguments.out)
    rows = [
        {
            "module": name,
            "ranks": [_rank(adapter, name) for adapter in adapters],
            "r": factors.a.shape[0],
            "norm": product_norm(factors),
        }
        for name, factors in merged.modules.items()
    ]
    used = {"mode": arguments.mode, "weights": weights}
    show({"out": arguments.out, **used, **describe(merged)}, rows, arguments.json)


def resize(arguments: Namespace) -> None:
    """Change the rank of an adapter and show the error.

    A smaller rank keeps the largest singular values of each update, which is the
    best approximation; `error` is the Frobenius norm of the change. A larger rank
    does not change the updates. A rank that no module can use is an error: an
    update of I inputs and O outputs has rank min(I, O) at most.
    """
    _check_out(arguments.out)
    if arguments.rank < 1:
        raise ValueError(f"--rank: expected at least 1, found {arguments.rank}")
    adapter = LoraAdapter.load(arguments.adapter)
    # A module of I inputs and O outputs can use the rank min(I, O). If the adapter was trained with
    # a larger rank, that rank is also accepted.
    most = max(
        max(f.a.shape[0], min(f.a.flatten(1).shape[1], f.b.shape[0]))
        for f in adapter.modules.values()
    )
    if arguments.rank > most:
        reason = f"no module of {arguments.adapter} can use more: an update has rank min(I, O)"
        raise ValueError(f"--rank: expected at most {most}, found {arguments.rank}: {reason}")
    resized, errors = resize_adapter(adapter, arguments.rank, progress=progress)
    _save(resized, arguments.out)
    norms = {name: product_norm(factors) for name, factors in adapter.modules.items()}
    rows = [
        {
            "module": name,
            "r before": adapter.modules[name].a.shape[0],
            "r": resized.modules[name].a.shape[0],
            "norm": norm,
            "error": errors[name],
            "relative": errors[name] / norm if norm else None,
        }
        for name, norm in norms.items()
    ]
    show({"out": arguments.out, **describe(resized)}, rows, arguments.json)


def prune(arguments: Namespace) -> None:
    """Remove an adapter's update from the layers in which it undoes safety.

    This is SPLoRA. It scores layers by the distance of their update from the change
    by alignment: the weights of the aligned model, on which the adapter was
    trained, minus those of the base model. It needs no data, and reads one layer
    of the models at a time. With --project, the method is Safe LoRA.
    """
    from lora_ext.methods import splora

    _check_out(arguments.out)
    adapter = LoraAdapter.load(arguments.adapter)
    # Options have the names of the config's fields.
    fields = splora.SploraConfig.__dataclass_fields__
    config = splora.SploraConfig(**{k: v for k, v in vars(arguments).items() if k in fields})
    models = arguments.base, arguments.aligned
    try:
        stats = splora.ediem_scores(adapter, *models, config, progress=progress)
        chosen = splora.select_layers(stats, config)
        if arguments.project:
            found = splora.project(adapter, *models, chosen, config, progress=progress)
        else:
            found = prune_adapter(adapter, lambda name: name not in chosen)
    except (TypeError, KeyError, ValueError) as error:
        # The causes are quantised weights and missing layers, for example. In the message, settings
        # of the config are replaced by the options of the command.
        message = str(error.args[0])
        for setting, option in _REMEDIES.items():
            message = message.replace(setting, option)
        raise ValueError(message) from error
    _save(found, arguments.out)
    what = "projected" if arguments.project else "pruned"
    rows = [
        {
            "module": each.name,
            "score": each.score,
            "distance": each.dist,
            "norm": each.norm,
            "cosine": each.cos,
            "alignment": each.alignment,
            "verdict": what if each.name in chosen else "kept",
        }
        for each in stats
    ]
    correlation = splora.size_correlation(stats)
    used = {
        "direction": arguments.direction,
        "score": arguments.score,
        "size correlation": None if math.isnan(correlation) else correlation,
        what: len(chosen),
    }
    show({"out": arguments.out, **used, **describe(found)}, rows, arguments.json)


def _rank(adapter: LoraAdapter, module: str) -> int | None:
    """Return the rank of a module, 0 if the adapter lacks it, or None if the rank is not known."""
    if not adapter.complete:
        return None
    return adapter.modules[module].a.shape[0] if module in adapter.modules else 0


def _check_out(out: str) -> None:
    if not out:  # An empty path would mean the current folder.
        raise ValueError("--out: expected a folder, found ''")


def _save(adapter: LoraAdapter, out: str) -> None:
    if not adapter.modules:
        raise ValueError(f"{out}: expected an adapter with modules to write, found no modules")
    try:
        adapter.save(out)
    except OSError as error:
        raise ValueError(f"{out}: cannot be written: {error.strerror or error}") from error
