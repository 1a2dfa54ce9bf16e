"""SPLoRA: selection of an adapter's layers by their scores. Selected layers are pruned, projected
as in Safe LoRA, or switched off (and on again) in a model in memory."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Sequence
from statistics import fmean
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lora_ext._checks import require
from lora_ext.adapter import (
    Factors,
    LoraAdapter,
    ModelSource,
    base_name,
    natural_order,
    prune_adapter,
)
from lora_ext.layers import LayerGroups, adapted_layers, adapters_of, block_name, set_active

from ._weights import Progress, Source, project_layers, read_adapter
from .config import Direction, SploraConfig
from .scores import LayerStats, Pairs, ediem_scores, size_correlation

log = logging.getLogger(__name__)


class SploraResult(NamedTuple):
    """Result of :func:`apply`: measurements of the layers (``stats``), names of the pruned and of
    the kept layers, and the pruned ``adapter``.

    ``str(result)`` is a summary in one line. For a table of all layers, use
    ``[row._asdict() for row in result.stats]``.
    """

    stats: list[LayerStats]  # one row for each scored layer, in the natural order of the names
    pruned: list[str]
    kept: list[str]
    adapter: LoraAdapter
    config: SploraConfig

    @property
    def direction(self) -> Direction:
        """Direction of the configuration: the "smallest" or "largest" scores were pruned."""
        return self.config.direction

    @property
    def size_correlation(self) -> float:
        """Rank correlation between the scores and the sizes of the updates, see
        :func:`size_correlation`."""
        return size_correlation(self.stats)

    @property
    def unscored(self) -> list[str]:
        """Names of the layers with equal weights in the base and the aligned model, which
        ``on_zero_alignment="skip"`` keeps without a score."""
        scored = {layer.name for layer in self.stats}
        return [name for name in self.kept if name not in scored]

    def __str__(self) -> str:
        """Return a line with the numbers of pruned and of all layers, the settings, and the rank
        correlation of score and size."""
        config, total = self.config, len(self.pruned) + len(self.kept)
        rule = f"threshold={config.threshold}" if config.num is None else f"num={config.num}"
        unscored = f", {len(self.unscored)} not scored" if self.unscored else ""
        return (
            f"SPLoRA pruned {len(self.pruned)} of {total} layers, those with the "
            f"{self.direction} scores (direction={self.direction!r}, {rule}, "
            f"granularity={config.granularity!r}, score={config.score!r}, "
            f"projection={config.projection!r}, reference={config.reference!r}; rank correlation "
            f"of score and size {self.size_correlation:.2f}){unscored}"
        )


@torch.no_grad()
def apply(
    adapter: Source,
    base: ModelSource,
    aligned: ModelSource,
    config: SploraConfig,
    *,
    pairs: Pairs | None = None,
    progress: Progress = iter,
) -> SploraResult:
    """Score an adapter's layers, and prune those that the configuration selects.

    Args:
        adapter, base, aligned, pairs, progress: as for :func:`ediem_scores`. They are not changed.
        config: settings, with num or threshold.

    Returns:
        the result; ``result.adapter`` shares the tensors of the kept layers with ``adapter``, and
        its configuration lists their full names.

    Raises:
        ValueError: If neither num nor threshold is given, or num is above the number of units.
        ValueError, TypeError, KeyError, NotImplementedError: If :func:`ediem_scores` raises it.

    Source: arXiv 2506.18931.
    """
    value = read_adapter("apply: adapter", adapter)
    stats = ediem_scores(value, base, aligned, config, pairs=pairs, progress=progress)
    pruned = select_layers(stats, config)
    kept = [name for name in sorted(value.modules, key=natural_order) if name not in set(pruned)]
    left = prune_adapter(value, kept, config.mode)
    result = SploraResult(stats, pruned, kept, left, config)
    log.info("%s", result)
    return result


@torch.no_grad()
def project(
    adapter: Source,
    base: ModelSource,
    aligned: ModelSource,
    names: Iterable[str],
    config: SploraConfig | None = None,
    *,
    progress: Progress = iter,
) -> LoraAdapter:
    """Replace B by ``P B`` in some layers, as Safe LoRA does; all other layers are unchanged.

    P is the projection of a layer, see :class:`SploraConfig`.

    Args:
        adapter, base, aligned, progress: as for :func:`ediem_scores`. They are not changed.
        names: full names of the layers, such as those that :func:`select_layers` returns.
        config: settings; only projection, rank, energy, device and on_zero_alignment are used. A
            skipped layer keeps its B.

    Returns:
        the new adapter. Each B has the dtype and device of the old B, and is rounded once. Our
        choice: a bias of B (``lora_bias``) is mapped by P as well, since it is added to the same
        outputs.

    Raises:
        ValueError: If the adapter has no layer of a given name.
        ValueError, TypeError, KeyError, NotImplementedError: If :func:`ediem_scores` would raise it
            for one of the layers.

    Source: Safe LoRA (arXiv 2405.16833), eq. 2 and its code.
    """
    where = "project"
    config = SploraConfig(direction="smallest") if config is None else config
    value = read_adapter(f"{where}: adapter", adapter)
    chosen = [names] if isinstance(names, str) else list(names)
    value.check_names(f"{where}: names", chosen)
    layers, projected = project_layers(
        where, value, base, aligned, config, progress, set(chosen), _columns
    )
    modules = dict(value.modules)
    for layer, one in zip(layers, projected, strict=True):
        old = layer.factors
        b = one.columns[:, : old.b.shape[1]].to(old.b)
        bias = None if old.bias is None else one.columns[:, -1].to(old.bias)
        modules[layer.name] = old._replace(b=b, bias=bias)
    return dataclasses.replace(value, modules=modules)


def _columns(factors: Factors) -> Tensor:
    """Return the matrix that P is applied to: B ``(m, r)``, or with a bias ``(m, r + 1)``."""
    if factors.bias is None:
        return factors.b
    return torch.cat([factors.b, factors.bias.to(factors.b)[:, None]], dim=1)


def select_layers(stats: Sequence[LayerStats], config: SploraConfig) -> list[str]:
    """Return the names of the layers to prune, in the order of ``stats``.

    A unit is a module, or with ``granularity="block"`` a block. A block's score is the mean of its
    modules' scores; all of its modules are pruned or none. A module outside all blocks is a unit.

    Args:
        stats: measurements of the layers, from :func:`ediem_scores`.
        config: settings; only num, threshold, direction and granularity are used.

    Raises:
        ValueError: If neither num nor threshold is given, or num is above the number of units.
    """
    where = "select_layers"
    units: dict[str, list[LayerStats]] = {}
    for layer in stats:
        block = block_name(layer.name) if config.granularity == "block" else None
        units.setdefault(layer.name if block is None else block, []).append(layer)
    scores = {unit: fmean(layer.score for layer in layers) for unit, layers in units.items()}
    sign = -1 if config.direction == "largest" else 1
    if config.num is not None:
        expected = f"at most {len(units)}, the number of {config.granularity}s that were scored"
        require(config.num <= len(units), where, "num", expected, config.num)
        # The sort is stable: of units with equal scores, the first in `stats` is pruned.
        chosen = set(sorted(scores, key=lambda unit: sign * scores[unit])[: config.num])
    elif config.threshold is not None:
        limit = sign * config.threshold
        chosen = {unit for unit, score in scores.items() if sign * score <= limit}
    else:
        expected, found = "one of num and threshold", "None for both"
        raise ValueError(f"{where}: config: expected {expected}, found {found}")
    names = {layer.name for unit in chosen for layer in units[unit]}
    return [layer.name for layer in stats if layer.name in names]


_KEY = "_lora_ext_splora"


class _Applied(NamedTuple):
    """State that :func:`apply_to` stores on a model. The state contains only names, so that
    :func:`remove` also works on a copy of the model."""

    adapter: str
    switched: tuple[str, ...]  # layers that were on before and are off now


def apply_to(
    model: nn.Module,
    base: ModelSource,
    aligned: ModelSource,
    config: SploraConfig,
    adapter: str = "default",
    *,
    pairs: Pairs | None = None,
    progress: Progress = iter,
) -> SploraResult:
    """Score the layers of a model's adapter, and switch off those that are selected for pruning.

    A layer that is off runs only its base layer, so that its outputs are bitwise equal to those of
    the base layer. Parameters and their ``requires_grad`` do not change.

    Args:
        model: model with layers of :class:`lora_ext.nn.LoraLinear` or of PEFT's ``lora.Linear``,
            before or after :func:`lora_ext.from_peft`.
        base, aligned, pairs, progress: as for :func:`ediem_scores`; ``model`` itself may be the
            aligned model, since the weights of its base layers are compared.
        config: settings, with num or threshold; ``mode`` is not used.
        adapter: name of the adapter.

    Returns:
        the result of :func:`apply`, with the layers' names in the base model. ``result.adapter`` is
        a pruned copy of the adapter, which can be saved.

    Raises:
        RuntimeError: If the model is pruned already: call :func:`remove` first.
        ValueError: If the model has no such adapter, or the adapter is merged, or if :func:`apply`
            raises it. The model is unchanged in this case.
    """
    new = _KEY not in model.__dict__
    found = "a pruned model; call splora.remove(model) first"
    require(new, "apply_to", "model", "a model that SPLoRA has not pruned", found, RuntimeError)
    value = LoraAdapter.from_model(model, adapter)
    result = apply(value, base, aligned, config, pairs=pairs, progress=progress)
    groups = LayerGroups(model, adapter, "module")
    names = [name for (name,) in groups.names]
    on = {name for name, is_on in zip(names, groups.mask.tolist(), strict=True) if is_on}
    pruned = set(result.pruned)
    switched = tuple(name for name in names if name in on and base_name(name) in pruned)
    groups.set_mask([name in on and name not in switched for name in names])
    model.__dict__[_KEY] = _Applied(adapter, switched)
    return result


def remove(model: nn.Module) -> None:
    """Undo :func:`apply_to`: switch on every layer that :func:`apply_to` switched off.

    Raises:
        RuntimeError: If the model is not pruned.
    """
    applied: _Applied | None = model.__dict__.pop(_KEY, None)
    if applied is None:
        found = f"a {type(model).__name__} that is not pruned"
        raise RuntimeError(f"remove: model: expected a model pruned by apply_to, found {found}")
    layers = adapted_layers(model)
    for name in applied.switched:
        layer = layers.get(name)
        if layer is not None and applied.adapter in adapters_of(layer):
            set_active(layer, applied.adapter, True)
