"""Replacement of modules of a model by other modules, which can be undone."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from lora_ext._checks import require


class Swap:
    """Replacement of modules of a model; :meth:`restore` undoes the replacement.

    If a module has several names, it is replaced only under the given name. If an error is raised,
    no module has been replaced.

    A swap stored in ``model.__dict__`` is copied with the model: the copied swap restores the
    copies of the original modules. A swap has no reference to the model.

    Args:
        model: model that contains the modules.
        replacements: new modules by the name of the module to replace, as in
            ``model.named_modules()``. No name may denote a submodule of another named module.
            Usually a new module contains the module that it replaces.
        by: name of the calling function, for messages.

    Attributes:
        originals: original modules by name.
        placed: new modules by name.

    Raises:
        ValueError: If the model has no module with one of the names, or a name is that of the model
            itself.
    """

    def __init__(self, model: nn.Module, replacements: Mapping[str, nn.Module], by: str):
        self.by = by
        self.originals: dict[str, nn.Module] = {}
        self.placed: dict[str, nn.Module] = {}
        self.add(model, replacements)

    def add(self, model: nn.Module, replacements: Mapping[str, nn.Module]) -> None:
        """Replace further modules of the same model.

        Modules that have already been replaced raise ValueError. Arguments and errors are those of
        the class.
        """
        originals: dict[str, nn.Module] = {}
        for name in replacements:
            original = find_module(model, name) if name else None
            if original is None or name in self.placed:
                found = "a replaced module" if name in self.placed else "no such submodule"
                expected = "the name of a submodule that is not replaced yet"
                raise ValueError(f"{self.by}: {name!r}: expected {expected}, found {found}")
            originals[name] = original
        for name, module in replacements.items():
            model.set_submodule(name, module)
        self.originals |= originals
        self.placed |= replacements

    def restore(self, model: nn.Module, by: str) -> None:
        """Restore all original modules.

        Args:
            model: model that contains the new modules.
            by: name of the calling function, for messages.

        Raises:
            RuntimeError: If a new module has been replaced by another one; the model is then
                unchanged.
        """
        self.check(model, by)
        for name, original in self.originals.items():
            model.set_submodule(name, original)

    def check(self, model: nn.Module, by: str) -> None:
        """Raise the error that :meth:`restore` would raise, without changing ``model``."""
        for name, module in self.placed.items():
            found = find_module(model, name)
            kind = "nothing" if found is None else type(found).__name__
            other = "another " if type(found) is type(module) else ""
            expected = f"the layer that {self.by} has inserted"
            require(found is module, by, name, expected, f"{other}{kind}", RuntimeError)


def find_module(model: nn.Module, name: str) -> nn.Module | None:
    """Return the submodule ``name`` of ``model``, or None if it does not exist."""
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None
