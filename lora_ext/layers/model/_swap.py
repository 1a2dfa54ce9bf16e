"""Modules of a model replaced by others, and the very objects put back."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from lora_ext._checks import require


class Swap:
    """Modules that stand in for modules of a model, until :meth:`restore`.

    A module that the model holds under several names is replaced under the one that is given; the
    others still lead to the original. Either all are replaced or none: an error leaves the model as
    it was.

    A swap that is kept on its model, in ``model.__dict__``, is copied with it: the copy restores
    the copies of the originals. It does not refer to the model, which goes as soon as nobody else
    does.

    Args:
        model: holds the modules.
        replacements: by name, as ``model.named_modules()`` has it, what comes there; no name lies
            inside another. Usually each holds the module that it replaces.
        by: the function that swaps, for messages.

    Attributes:
        originals, placed: by name, what was there and what came.

    Raises:
        ValueError: a name that the model lacks, or that of the model itself.
    """

    def __init__(self, model: nn.Module, replacements: Mapping[str, nn.Module], by: str):
        self.by = by
        self.originals: dict[str, nn.Module] = {}
        self.placed: dict[str, nn.Module] = {}
        self.add(model, replacements)

    def add(self, model: nn.Module, replacements: Mapping[str, nn.Module]) -> None:
        """Replace further modules of the same model, under names that are not replaced yet;
        arguments and errors are those of the class."""
        originals: dict[str, nn.Module] = {}
        for name in replacements:
            original = find_module(model, name) if name else None
            if original is None or name in self.placed:
                found = "one that is replaced already" if name in self.placed else "none"
                expected = "the name of a module inside the model"
                raise ValueError(f"{self.by}: {name!r}: expected {expected}, found {found}")
            originals[name] = original
        for name, module in replacements.items():
            model.set_submodule(name, module)
        self.originals |= originals
        self.placed |= replacements

    def restore(self, model: nn.Module, by: str) -> None:
        """Put every original back.

        Args:
            model: the one of the swap. by: the function that restores, for messages.

        Raises:
            RuntimeError: something else stands in the place of a replacement; the model is then as
                it was.
        """
        self.check(model, by)
        for name, original in self.originals.items():
            model.set_submodule(name, original)

    def check(self, model: nn.Module, by: str) -> None:
        """Raise what :meth:`restore` of ``model`` would, and change nothing; ``by`` is the function
        that asks, for the message."""
        for name, module in self.placed.items():
            found = find_module(model, name)
            kind = "nothing" if found is None else type(found).__name__
            other = "another " if type(found) is type(module) else ""
            expected = f"the layer that {self.by} put there"
            require(found is module, by, name, expected, f"{other}{kind}", RuntimeError)


def find_module(model: nn.Module, name: str) -> nn.Module | None:
    """Return the module of that name, or None where the model has none."""
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None
