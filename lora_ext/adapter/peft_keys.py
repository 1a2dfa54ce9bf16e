"""PEFT's names of tensors: which module, which of its factors, and of which adapter."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence, Set
from typing import NamedTuple

PREFIX = "base_model.model."
MAGNITUDE = "magnitude_vector"

# Files carry no adapter name; the state dict of a live PEFT model does (`lora_A.default.weight`).
# The magnitude of DoRA is a bare parameter in files and in older models, a module in newer ones;
# the factors of an embedding are bare everywhere.
_KEY = re.compile(
    r"(?P<module>.+)\.lora_(?:"
    r"(?P<factor>[AB])(?:\.(?P<owner>[^.]+))?\.(?P<kind>weight|bias)"
    r"|(?P<bare>embedding_[AB])(?:\.(?P<owner_of_bare>[^.]+))?"
    r"|(?P<magnitude>magnitude_vector)(?:\.(?!weight$)(?P<owner_of_magnitude>[^.]+))?(?:\.weight)?)",
    re.DOTALL,
)


class Key(NamedTuple):
    """What the name of a tensor says."""

    module: str  # in the base model
    role: str  # A.weight, B.weight, B.bias, embedding_A, embedding_B or magnitude_vector
    adapter: str | None  # None in files

    @property
    def in_file(self) -> str:
        """The name that PEFT writes."""
        return f"{PREFIX}{self.module}.lora_{self.role}"


def parse_key(name: str) -> Key | None:
    """Read the name of a LoRA tensor, in a file or in a model; None: it names something else."""
    match = _KEY.fullmatch(name.removeprefix(PREFIX))
    if match is None:
        return None
    role = match["magnitude"] or match["bare"] or f"{match['factor']}.{match['kind']}"
    owner = match["owner"] or match["owner_of_bare"] or match["owner_of_magnitude"]
    return Key(match["module"], role, owner)


def wrapped_names(parameters: Mapping[str, Sequence[str]], targeted: Set[str]) -> dict[str, str]:
    """Expert parameters by the module under whose name PEFT keeps their factors.

    A module with two adapted parameters is wrapped twice, in the order in which it has them: the
    last one's factors are found under the module's own name, those before it one ``base_layer``
    deeper each.

    Args:
        parameters: of each experts module, in its order. targeted: those that are adapted.
    """
    return {
        module + ".base_layer" * depth: name
        for module, names in parameters.items()
        for depth, name in enumerate(n for n in reversed(names) if n in targeted)
    }


def base_name(name: str) -> str:
    """The name that a weight has in the base model, whether or not PEFT has wrapped its module."""
    return name.removeprefix(PREFIX).replace(".base_layer.", ".")


def natural_order(name: str) -> list[str | int]:
    """Sorts names of modules as they follow one another: layers.2 before layers.10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


def factor_roles(embedding: bool) -> tuple[str, str]:
    """The roles of A (r, I) and B (O, r)."""
    return ("embedding_A", "embedding_B") if embedding else ("A.weight", "B.weight")
