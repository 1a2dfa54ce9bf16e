"""Ablation over ranks and blocks: which modules are adapted, and what each setting learns."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import nn

from lora_ext._checks import require
from lora_ext.adapter import RankReport, rank_report
from lora_ext.layers import LoraConfig, block_index, block_name, matches_suffix, wrap

Task = TypeVar("Task")


def select_modules(
    model: nn.Module, suffixes: Sequence[str] = ("mlp.c_proj",), last_n: int | None = None
) -> list[str]:
    """Choose the modules of the last blocks to adapt, by the ends of their names.

    Args:
        model: any module whose blocks are numbered, ``h.0``, ``h.1`` and so on.
        suffixes: ends of names, from the beginning or from a dot on.
        last_n: of the model's blocks, whether they have such a module or not; None is all. Of a
            model with several stacks of blocks, the last of each.

    Returns:
        Full names in the model's order, for ``LoraConfig(target_modules=...)``.

    Raises:
        ValueError: no module has such a name, or ``last_n`` is no number of the model's blocks.
    """
    where = "select_modules"
    suffixes = (suffixes,) if isinstance(suffixes, str) else tuple(suffixes)
    names = [name for name, _ in model.named_modules()]
    found = [name for name in names if matches_suffix(name, suffixes)]
    require(found, where, "suffixes", f"the end of a name in {type(model).__name__}", suffixes)
    if last_n is None:
        return found
    places: dict[str, tuple[str, int]] = {}  # the list of blocks, and the place in it
    depths: dict[str, int] = {}
    for name in names:
        if (block := block_name(name)) is not None:
            stack, index = block.rpartition(".")[0], block_index(name) or 0
            places[name] = stack, index
            depths[stack] = max(depths.get(stack, 0), 1 + index)
    inside = [(name, *places[name]) for name in found if name in places]
    most = max((depths[stack] for _, stack, _ in inside), default=0)
    require(1 <= last_n <= most, where, "last_n", f"one of {most} blocks", last_n)
    return [name for name, stack, index in inside if index >= depths[stack] - last_n]


@dataclass(frozen=True)
class SweepPoint:
    """One setting of a sweep and what became of it.

    Attributes:
        rank, alpha: of the adapter, whose scale is ``alpha / rank``.
        last_n: how many blocks it is on; None is all.
        score: what the caller's function made of the trained model.
        report: the effective ranks of its modules.
    """

    rank: int
    alpha: float
    last_n: int | None
    score: float
    report: RankReport

    def mean(self, figure: str) -> float:
        """Average a figure of the report, ``"entropy"`` say, over the modules."""
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
    """Train an adapter of every rank on every number of last blocks, each on a fresh model.

    Args:
        make_model: gives the base model, a new object at every call.
        task: is handed on to the next two.
        ranks: to try.
        alpha_rule: alpha of a rank; the published runs have ``rank / 2``, so a scale of 0.5.
        train: ``train(model, task)``; all but the adapter is frozen.
        score: ``score(model, task)``.
        layers: values of ``last_n`` to try, as :func:`select_modules` takes them.
        suffixes: likewise.
        init_lora_weights: "gaussian" is that of the published runs, A ~ N(0, 1) / r and B = 0.
        report: ``kinds``, ``taus`` and ``k`` of :func:`lora_ext.adapter.rank_report`.

    Returns:
        A point for each number of blocks and each rank, in this order.

    Raises:
        ValueError: from :func:`select_modules` and ``LoraConfig``, or no setting to try.

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
