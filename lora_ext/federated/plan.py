"""What one client trains in one round."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from lora_ext._checks import integer


@dataclass(frozen=True)
class LayerPlan:
    """The layers that a client trains, and the rank that it trains each of them at.

    Attributes:
        layers: indices from 0, rising. They may be given in any order.
        ranks: one for each layer, ``ranks[j]`` for ``layers[j]``; None where every layer has the
            rank of the global adapter.

    Raises:
        TypeError: an index or a rank that is no integer. ValueError: an index below 0 or given
            twice, a rank below 1, or another number of ranks than of layers.

    Sources: Fed-HeLLo (arXiv 2506.12213), S_i^t; LEGEND (arXiv 2412.20004), r_l.
    """

    layers: tuple[int, ...]
    ranks: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        layers = _integers("layers", self.layers, least=0)
        ranks = None if self.ranks is None else _integers("ranks", self.ranks, least=1)
        if len(set(layers)) < len(layers):
            twice = next(layer for layer in layers if layers.count(layer) > 1)
            raise ValueError(f"LayerPlan: layers: expected each layer once, found {twice} twice")
        if ranks is not None and len(ranks) != len(layers):
            raise ValueError(
                f"LayerPlan: ranks: expected one for each of {len(layers)} layers, found "
                f"{len(ranks)}"
            )
        order = sorted(range(len(layers)), key=layers.__getitem__)
        object.__setattr__(self, "layers", tuple(layers[i] for i in order))
        # A plan of no layer has no ranks, so that it equals what its message is read as.
        object.__setattr__(self, "ranks", tuple(ranks[i] for i in order) if ranks else None)

    def rank_of(self, layer: int, full: int) -> int:
        """The rank at which a planned layer is trained, ``full`` being the global adapter's."""
        return full if self.ranks is None else self.ranks[self.layers.index(layer)]

    def to_config(self) -> dict[str, list[int]]:
        """Flat lists, as JSON and Flower's ``ConfigRecord`` hold them; no ``ranks`` without any."""
        found = {"layers": list(self.layers)}
        if self.ranks is not None:
            found["ranks"] = list(self.ranks)
        return found

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> LayerPlan:
        """Read what :meth:`to_config` wrote; other keys of a message are left alone.

        Raises:
            ValueError: no ``layers``, or what the class refuses. TypeError: likewise.
        """
        if "layers" not in config:
            raise ValueError(
                f"LayerPlan: config: expected layers, found {sorted(map(str, config))}"
            )
        return cls(config["layers"], config.get("ranks"))


def _integers(name: str, values: Any, least: int) -> tuple[int, ...]:
    if not isinstance(values, Iterable) or isinstance(values, str | bytes | Mapping):
        raise TypeError(f"LayerPlan: {name}: expected integers, found {values!r:.100}")
    words = "integers", f"integers from {least}"
    return tuple(integer("LayerPlan", name, v, least, expected=words) for v in values)
