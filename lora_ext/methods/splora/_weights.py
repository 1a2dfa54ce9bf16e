"""Layers of an adapter with their weights in the base and the aligned model, which are read from
files or from modules."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from torch import Tensor

from lora_ext._checks import require
from lora_ext.adapter import (
    AdapterSource,
    Factors,
    LoraAdapter,
    ModelSource,
    ModelWeights,
    factor_keys,
    natural_order,
    open_adapter,
    parse_key,
    patterns,
)
from lora_ext.kinds import variants

from ._projection import (
    Projected,
    ZeroAlignmentError,
    check_finite,
    check_floating,
    check_shapes,
    project_wide,
    warn_of_identity,
)
from .config import SploraConfig

#: Adapter: an object, a folder in PEFT's format, a pair ``(config, state dict)``, or only a state
#: dict, for which the scaling is 1.
Source = LoraAdapter | AdapterSource | Mapping[str, Tensor]


def read_adapter(where: str, source: Source) -> LoraAdapter:
    """Read the adapter into memory; raise KeyError if a module lacks one of its two factors."""
    if isinstance(source, LoraAdapter):
        return source
    if isinstance(source, Mapping):
        source = _with_config(where, source)
    with open_adapter(source) as (_, tensors):
        factor_keys(where, tensors.infos)
    return LoraAdapter.load(source)


def _with_config(where: str, state: Mapping[str, Tensor]) -> AdapterSource:
    """Return a configuration with the ranks of a state dict and scaling 1, and its LoRA tensors."""
    keys = {key: parsed for key in state if (parsed := parse_key(key)) is not None}
    if not keys:
        expected, found = "names such as <module>.lora_A.weight", ", ".join(list(state)[:4])
        raise ValueError(f"{where}: expected {expected}, found {found}")
    ranks: dict[str, int] = {}
    factor_keys(where, keys)
    for key, (module, role, _) in keys.items():
        check_floating(where, **{key: state[key]})
        if role in ("A.weight", "embedding_A"):
            ranks[module] = state[key].shape[0] if state[key].dim() else 0
            require(ranks[module] != 0, where, key, "a rank of at least 1", "0")
    for key, (module, role, _) in keys.items():
        if role == "B.weight":  # factor_keys has checked that A exists
            shape, rank = tuple(state[key].shape), ranks[module]
            fits = len(shape) != 2 or shape[1] == rank
            require(fits, where, key, f"shape (m, {rank}), since A has rank {rank}", shape)
    r, rank_pattern = patterns(ranks)
    roles = {key.stem for key in keys.values()}
    config = {
        "peft_type": "LORA",
        "r": r,
        "rank_pattern": rank_pattern,
        "lora_alpha": r,
        "alpha_pattern": rank_pattern,
        "target_modules": sorted(ranks),
        **{kind.when: kind.vector in roles for kind in variants("LORA")},
        "lora_bias": "lora_B.bias" in roles,
    }
    return config, {key: state[key] for key in keys}


# -------------------------------------------------------------------------------------------------
# Layers that can be compared


class Layer(NamedTuple):
    """Adapted layer with the keys of its weights in the base and the aligned model."""

    name: str
    factors: Factors
    base_key: str
    aligned_key: str
    transposed: bool  # True if the weights are stored as (n, m)


#: Function that yields the given layers one by one and may show progress, such as ``tqdm.tqdm``.
Progress = Callable[[Iterable[Layer]], Iterable[Layer]]


def project_layers(
    where: str,
    adapter: LoraAdapter,
    base: ModelSource,
    aligned: ModelSource,
    config: SploraConfig,
    progress: Progress,
    names: Iterable[str] | None = None,
    columns: Callable[[Factors], Tensor] = lambda factors: factors.b,
) -> tuple[list[Layer], list[Projected]]:
    """Return the layers in the natural order of their names, and the projections of their factors.

    All shapes are checked before any weight is read. At most two weights are in memory at a time.
    For other arguments and errors, see :func:`ediem_scores`.

    Args:
        names: names of the adapter's modules to project; default is all of them.
        columns: function that returns the matrix ``(m, k)`` that P is applied to; default is B.
    """
    kinds = {
        adapter.config.kind.rescales: [n for n, f in adapter.modules.items() if not f.sums],
        "an embedding": [n for n, f in adapter.modules.items() if f.embedding],
        "a convolution": [n for n, f in adapter.modules.items() if f.a.dim() > 2],
    }
    for kind, others in kinds.items():
        expected = "plain LoRA on linear layers"
        at = f"{kind} at {', '.join(others[:4])}"
        require(not others, where, "adapter", expected, at, NotImplementedError)
    found: list[Layer] = []
    projected: list[Projected] = []
    declared = adapter.config.fan_in_fan_out
    with (
        ModelWeights(base, f"{where}: base") as base_weights,
        ModelWeights(aligned, f"{where}: aligned") as aligned_weights,
    ):
        wanted = sorted(adapter.modules if names is None else names, key=natural_order)
        both = (base_weights.keys(wanted).values(), aligned_weights.keys(wanted).values())
        layers: list[Layer] = []
        for name, key, aligned_key in zip(wanted, *both, strict=True):
            known = base_weights.is_transposed(key) or aligned_weights.is_transposed(aligned_key)
            layers.append(Layer(name, adapter.modules[name], key, aligned_key, declared or known))
            shapes = base_weights.shape(key), aligned_weights.shape(aligned_key)
            _check(f"{where}: {name}", layers[-1], *shapes)
        for layer in progress(layers):
            w0 = base_weights.read(layer.base_key)
            wa = aligned_weights.read(layer.aligned_key)
            if layer.transposed:
                w0, wa = w0.T, wa.T
            try:
                of = f"{where}: {layer.name}"
                projected.append(project_wide(of, columns(layer.factors), w0, wa, config))
            except ZeroAlignmentError:
                if config.on_zero_alignment == "raise":
                    raise
                continue
            finally:
                del w0, wa  # freed before the next weights are read
            found.append(layer)
    pairs = zip(found, projected, strict=True)
    if identities := [layer.name for layer, one in pairs if one.is_identity]:
        warn_of_identity(where, identities)
    return found, projected


def _check(where: str, layer: Layer, base: tuple[int, ...], aligned: tuple[int, ...]) -> None:
    a, b, bias = layer.factors.a, layer.factors.b, layer.factors.bias
    stored = (base[::-1], aligned[::-1]) if layer.transposed else (base, aligned)
    check_shapes(where, b.shape, *stored, a.shape)
    named = {"lora_A.weight": a, "lora_B.weight": b}
    named |= {} if bias is None else {"lora_B.bias": bias}
    check_floating(where, **named)
    check_finite(where, **named)
