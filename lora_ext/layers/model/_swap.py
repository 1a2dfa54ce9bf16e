"""Replacement of modules of a model, and restoring the original objects."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from lora_ext._checks import require


class Swap:
    """Replacement of modules of a model, undone by :meth:`restore`.

    A module with several names is replaced only under the given name. Either all modules are
    replaced, or an error leaves the model unchanged.

    A swap in ``model.__dict__`` is copied with the model: the copy restores the copies of the
    originals. It does not keep the model alive.

    Args:
        model: contains the modules.
        replacements: new modules by name, as in ``model.named_modules()``; no name may be inside
            another. Usually each contains the module that it replaces.
        by: name of the calling function, for messages.

    Attributes:
        originals, placed: the original and the new modules by name.

    Raises:
        ValueError: If the model lacks a name, or a name is that of the model itself.
    """

    def __init__(self, model: nn.Module, replacements: Mapping[str, nn.Module], by: str):
        self.by = by
        self.originals: dict[str, nn.Module] = {}
        self.placed: dict[str, nn.Module] = {}
        self.add(model, replacements)

    def add(self, model: nn.Module, replacements: Mapping[str, nn.Module]) -> None:
        """Replace further modules of the same model.

        The names must not be replaced yet; arguments and errors are those of the class.
        """
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
        """Restore all originals.

        Args:
            model: the model of the swap.
            by: name of the calling function, for messages.

        Raises:
            RuntimeError: If a replacement has been replaced; the model is then unchanged.
        """
        self.check(model, by)
        for name, original in self.originals.items():
            model.set_submodule(name, original)

    def check(self, model: nn.Module, by: str) -> None:
        """Raise the errors of :meth:`restore` without changing ``model``."""
        for name, module in self.placed.items():
            found = find_module(model, name)
            kind = "nothing" if found is None else type(found).__name__
            other = "another " if type(found) is type(module) else ""
            expected = f"the layer that {self.by} put there"
            require(found is module, by, name, expected, f"{other}{kind}", RuntimeError)


def find_module(model: nn.Module, name: str) -> nn.Module | None:
    """Return the module with this name, or None."""
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None
