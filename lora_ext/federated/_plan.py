"""Plans of the layers that a client trains in a round, and the assignment of tensors to layers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from lora_ext._checks import integer, require
from lora_ext.adapter import factor_keys, natural_order
from lora_ext.layers import block_index

Client = int | str

#: Default pattern of the layer index in a module name. It fits most transformers models.
PATTERN = r"layers\.(\d+)\."


@dataclass(frozen=True)
class LayerPlan:
    """The layers that a client trains, and the rank of each.

    Attributes:
        layers: zero-based indices in ascending order; the argument may have any order.
        ranks: ``ranks[j]`` is the rank of ``layers[j]``. None if every layer has the rank of the
            global adapter.

    Raises:
        TypeError: If an index or a rank is not an integer.
        ValueError: If an index is below 0 or repeated, a rank is below 1, or the numbers of ranks
            and layers differ.

    Sources: Fed-HeLLo (arXiv 2506.12213), where the layers are S_i^t; LEGEND (arXiv 2412.20004),
    where the ranks are r_l.
    """

    layers: tuple[int, ...]
    ranks: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        layers = _integers("layers", self.layers, least=0)
        ranks = None if self.ranks is None else _integers("ranks", self.ranks, least=1)
        if len(set(layers)) < len(layers):
            counts = Counter(layers)
            twice = next(layer for layer in layers if counts[layer] > 1)
            raise ValueError(f"LayerPlan: layers: expected each layer once, found {twice} twice")
        if ranks is not None:
            expected = f"one rank for each of {len(layers)} layers"
            require(len(ranks) == len(layers), "LayerPlan", "ranks", expected, len(ranks))
        order = sorted(range(len(layers)), key=layers.__getitem__)
        object.__setattr__(self, "layers", tuple(layers[i] for i in order))
        # A plan without layers has no ranks, so that it equals the plan read from its message.
        object.__setattr__(self, "ranks", tuple(ranks[i] for i in order) if ranks else None)

    def rank_of(self, layer: int, full: int) -> int:
        """Return the rank of the planned ``layer``. If the plan has no ranks, return ``full``, the
        rank of the global adapter."""
        return full if self.ranks is None else self.ranks[self.layers.index(layer)]

    def to_config(self) -> dict[str, list[int]]:
        """Return the plan as lists of integers, which JSON and Flower's ``ConfigRecord`` can store.

        ``ranks`` is omitted if it is None.
        """
        found = {"layers": list(self.layers)}
        if self.ranks is not None:
            found["ranks"] = list(self.ranks)
        return found

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> LayerPlan:
        """Create a plan from the output of :meth:`to_config`.

        Args:
            config: lists of integers by name: "layers" and optionally "ranks". Other keys of a
                message are ignored.

        Raises:
            ValueError: If "layers" is missing, or the plan is not valid.
            TypeError: If an index or a rank is not an integer.
        """
        require("layers" in config, "LayerPlan", "config", "the key 'layers'", [*config])
        return cls(config["layers"], config.get("ranks"))


class Allocator(Protocol):
    """Interface of an object that chooses the layers of each client."""

    def plan(self, round: int, client: Client, capability: int) -> LayerPlan:
        """Return the plan of one client, with at most ``capability`` layers. This method is not
        called for clients with a capability of 0."""
        ...


def _integers(name: str, values: Any, least: int) -> tuple[int, ...]:
    if not isinstance(values, Iterable) or isinstance(values, str | bytes | Mapping):
        raise TypeError(f"LayerPlan: {name}: expected integers, found {values!r:.100}")
    words = "integers", f"integers from {least}"
    return tuple(integer("LayerPlan", name, v, least, expected=words) for v in values)


class LayerNotFound(ValueError):
    """Raised if a pattern matches no layer, or if the indices of the layers have gaps."""


class Pair(NamedTuple):
    """Names of the two factors of one module in a state dict."""

    module: str  # name of the module in the base model
    layer: int
    a: str  # (r, I)
    b: str  # (O, r)


def layer_pairs(where: str, state: Mapping[str, Tensor], pattern: str) -> list[Pair]:
    """Return the factors' names for each module in a layer, sorted by layer and module.

    Args:
        where: prefix of error messages.
        state: tensors under PEFT's names, with or without ``base_model.model.``.
        pattern: a regular expression whose first group is the index of the layer.

    Raises:
        KeyError: If a module lacks one of its two factors.
        LayerNotFound: If the pattern matches no name of a factor.
        ValueError: If the factors of a module have different ranks, or are not floating-point
            matrices.
    """
    found: list[Pair] = []
    for module, (a, b) in factor_keys(where, state).items():
        layer = block_index(a, pattern)
        if layer is None:
            continue
        for name, factor in (("lora_A", state[a]), ("lora_B", state[b])):
            tensor = isinstance(factor, Tensor)
            other = (factor.dtype, list(factor.shape)) if tensor else type(factor)
            matrix = tensor and factor.is_floating_point() and factor.dim() > 1
            require(matrix, where, f"{module}.{name}", "a floating-point matrix", other)
        shapes = state[a].shape, state[b].shape
        require(shapes[0][0] == shapes[1][1], where, module, "equal ranks of A and B", shapes)
        found.append(Pair(module, layer, a, b))
    if not found:
        expected = f"a name of LoRA factors that matches {pattern!r}"
        begin = f"none among {len(state)} tensors, which begin with {[*map(str, state)][:4]}"
        raise LayerNotFound(f"{where}: pattern: expected {expected}, found {begin}")
    return sorted(found, key=lambda pair: (pair.layer, natural_order(pair.module)))


def check_layers(where: str, layers: set[int]) -> int:
    """Return the number of layers; raise unless their indices are 0, 1, ... without gaps."""
    if layers != set(range(len(layers))):
        expected = f"the indices 0 to {max(layers)} without a gap"
        raise LayerNotFound(f"{where}: pattern: expected {expected}, found {sorted(layers)}")
    return len(layers)
