"""Sweep over the rank of an adapter and the number of adapted blocks, and a monitor that records
the rank and the norm of each layer's update during training."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lora_ext import ops
from lora_ext._checks import require
from lora_ext.adapter import RankReport, gram_figures, rank_report
from lora_ext.layers import (
    LoraConfig,
    adapted_layers,
    adapter_factors,
    adapters_of,
    block_index,
    block_name,
    matches_suffix,
    recomputing,
    wrap,
)

Task = TypeVar("Task")


def select_modules(
    model: nn.Module, suffixes: Sequence[str] = ("mlp.c_proj",), last_n: int | None = None
) -> list[str]:
    """Return the names of the modules to adapt, selected by the ends of the names.

    Args:
        model: module with numbered blocks such as ``h.0`` and ``h.1``.
        suffixes: full names of modules, or endings of names that begin after a dot.
        last_n: number of last blocks to select from; blocks without a matching module are counted
            as well. If the model has several stacks of blocks, the last ``last_n`` blocks of each
            stack are used. None selects matching modules of the whole model.

    Returns:
        Full names in the order of ``named_modules()``, for ``LoraConfig(target_modules=...)``.

    Raises:
        ValueError: If ``suffixes`` match no module, or ``last_n`` is not between 1 and the number
            of blocks.
    """
    where = "select_modules"
    suffixes = (suffixes,) if isinstance(suffixes, str) else tuple(suffixes)
    names = [name for name, _ in model.named_modules()]
    found = [name for name in names if matches_suffix(name, suffixes)]
    require(found, where, "suffixes", f"endings of names in {type(model).__name__}", suffixes)
    if last_n is None:
        return found
    places: dict[str, tuple[str, int]] = {}  # module name to its block's stack and index
    depths: dict[str, int] = {}
    for name in names:
        if (block := block_name(name)) is not None:
            stack, index = block.rpartition(".")[0], block_index(name) or 0
            places[name] = stack, index
            depths[stack] = max(depths.get(stack, 0), 1 + index)
    inside = [(name, *places[name]) for name in found if name in places]
    most = max((depths[stack] for _, stack, _ in inside), default=0)
    require(1 <= last_n <= most, where, "last_n", f"1 to {most} blocks", last_n)
    return [name for name, stack, index in inside if index >= depths[stack] - last_n]


@dataclass(frozen=True)
class SweepPoint:
    """Setting of :func:`rank_sweep` with its results.

    Attributes:
        rank: rank of the adapter.
        alpha: alpha of the adapter; the scale is ``alpha / rank``.
        last_n: number of adapted blocks, counted from the last; None means all blocks.
        score: score of the trained model.
        report: effective ranks of the adapted modules.
    """

    rank: int
    alpha: float
    last_n: int | None
    score: float
    report: RankReport

    def mean(self, figure: str) -> float:
        """Return the mean over all modules of one value of the report, such as ``"entropy"``."""
        return sum(row[figure] for row in self.report) / len(self.report)


def rank_sweep(
    make_model: Callable[[], nn.Module],
    task: Task,
    ranks: Iterable[int],
    alpha_rule: Callable[[int], float] = lambda r: r / 2,
    *,
    train: Callable[[Any, Task], object],
    score: Callable[[Any, Task], float],
    layers: Iterable[int | None] = (None,),
    suffixes: Sequence[str] = ("mlp.c_proj",),
    init_lora_weights: bool | str = "gaussian",
    **report: Any,
) -> list[SweepPoint]:
    """Train one adapter per pair of rank and number of adapted blocks, each on a new base model.

    Args:
        make_model: function that returns a new base model at every call.
        task: any object; it is passed to ``train`` and ``score``.
        ranks: ranks to try.
        alpha_rule: function from a rank to alpha. The published runs use ``rank / 2``, which gives
            a scale of 0.5.
        train: function called as ``train(model, task)``; only the adapter is trainable.
        score: function called as ``score(model, task)``, which returns the score of the model.
        layers: values of ``last_n`` to try, see :func:`select_modules`.
        suffixes: ends of the names of the modules to adapt, see :func:`select_modules`.
        init_lora_weights: scheme of initialisation. The published runs use "gaussian":
            A ~ N(0, 1) / r and B = 0.
        report: arguments ``kinds``, ``taus`` and ``k`` of :func:`lora_ext.adapter.rank_report`.

    Returns:
        One point per setting: all ranks for the first value of ``layers``, then all ranks for the
        next value, and so on.

    Raises:
        ValueError: If there is no setting to try, or if :func:`select_modules` or ``LoraConfig``
            raises it.

    Source: arXiv 2412.00029.
    """
    ranks = tuple(ranks)
    settings = [(last_n, rank) for last_n in layers for rank in ranks]
    require(bool(settings), "rank_sweep", "ranks and layers", "at least one of each", "none")
    points: list[SweepPoint] = []
    for last_n, rank in settings:
        model = make_model()
        config = LoraConfig(
            r=rank,
            lora_alpha=alpha_rule(rank),
            target_modules=select_modules(model, suffixes, last_n),
            init_lora_weights=init_lora_weights,
        )
        wrap(model, config)
        train(model, task)
        found = score(model, task)
        measured = rank_report(model, **report)
        points.append(SweepPoint(rank, config.lora_alpha, last_n, found, measured))
    return points


class RankMonitor:
    """Context manager that records the norm and the participation rank of every layer's update.

    The update of a layer is ``scaling * B A``. If s are the singular values of the update, its
    participation rank is ``(sum s^2)^2 / sum s^4``. Train in ``with monitor:``, then read
    :attr:`history`. The adapted layers of :mod:`lora_ext.nn` and of PEFT are supported. The values
    are computed before a forward with one call of :func:`lora_ext.ops.lora_gram`, which needs no
    singular value decomposition. They stay on the device until :attr:`history` is read. The model's
    outputs do not change. The end of the ``with`` block removes the hook. Forwards of a compiled
    model are not recorded.

    Args:
        model: model that contains the layers, or one layer.
        adapter: name of the adapter to monitor.
        every: number of forwards of ``model`` per record; the first forward is recorded.

    Raises:
        ValueError: If no layer of the model has the adapter, or ``every`` is below 1.

    Source: arXiv 2412.00029, which computes effective ranks after training.
    """

    def __init__(self, model: nn.Module, adapter: str = "default", every: int = 1):
        require(every >= 1, "RankMonitor", "every", "at least 1", every)
        self.model, self.adapter, self.every = model, adapter, every
        layers = adapted_layers(model).items()
        self._layers: dict[str, Any] = {n: m for n, m in layers if adapter in adapters_of(m)}
        require(self._layers, "RankMonitor", "model", f"layers with an adapter {adapter!r}", "none")
        self._step = -1
        self._records: list[tuple[int, str, Tensor, Tensor]] = []
        self._handle: Any = None

    def __enter__(self) -> RankMonitor:
        if self._handle is not None:
            raise RuntimeError("RankMonitor: already entered; leave its `with` block first")
        self._handle = self.model.register_forward_pre_hook(self._before_forward)
        return self

    def __exit__(self, *_: object) -> None:
        self._handle.remove()
        self._handle = None

    @property
    def history(self) -> list[dict[str, Any]]:
        """List of dictionaries, one per record and layer, in the order of the records.

        The keys are ``step`` (index of the forward), ``module`` (name of the layer), ``fro``
        (Frobenius norm of the update) and ``participation`` (participation rank of the update, 0 if
        the update is zero). Reading the property synchronizes with the device.
        """
        return [
            {"step": step, "module": name, "fro": fro.item(), "participation": rank.item()}
            for step, name, fro, rank in self._records
        ]

    def _before_forward(self, *_: object) -> None:
        if not recomputing():
            self._step += 1
            if self._step % self.every == 0:
                self._record()

    @torch.no_grad()
    def _record(self) -> None:
        pairs = [adapter_factors(layer, self.adapter) for layer in self._layers.values()]
        # In float32, the norm would be inaccurate if large terms of the product nearly cancel.
        found = ops.lora_gram([a for a, _ in pairs], [b for _, b in pairs], dtype=torch.float64)
        grams = dict(zip(self._layers, zip(*found, strict=True), strict=True))
        alike: dict[Any, list[str]] = {}  # layers of equal rank and device are computed together
        for name, (gram, _) in grams.items():
            alike.setdefault((gram.shape, gram.device), []).append(name)
        figures: dict[str, tuple[Tensor, Tensor]] = {}
        for names in alike.values():
            of_a, of_b = (torch.stack([grams[name][i] for name in names]) for i in (0, 1))
            figures.update(zip(names, zip(*gram_figures(of_a, of_b), strict=True), strict=True))
        for name, layer in self._layers.items():
            (fro, rank), scale = figures[name], abs(layer.scaling[self.adapter])
            self._records.append((self._step, name, fro * scale, rank * bool(scale)))
