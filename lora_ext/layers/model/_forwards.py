"""Replacement of a module's forward by a function that can call the original forward."""

from __future__ import annotations

import inspect
import types
import weakref
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

#: Function that replaces a forward. Arguments: the module, its original forward, and a dictionary
#: of the call's arguments by name.
Run = Callable[[Any, Callable[..., Any], dict[str, Any]], Any]


class Forward:
    """Callable that replaces a module's forward and is stored in the module's ``__dict__``.

    It is copied with the module. It is not a hook, because wrappers such as PEFT call ``forward``
    directly, which skips hooks.

    Args:
        module: module to change, which is referenced weakly.
        run: function that replaces the forward.
    """

    def __init__(self, module: nn.Module, run: Run):
        self._module = weakref.ref(module)
        self.before: Callable[..., Any] | None = module.__dict__.get("forward")
        self.run = run

    @classmethod
    def put_before(cls, module: nn.Module, run: Run) -> None:
        """Replace the module's forward by a call of ``run``."""
        module.__dict__["forward"] = cls(module, run)

    @classmethod
    def remove(cls, module: nn.Module, run: Callable[[Run], bool]) -> bool:
        """Undo :meth:`put_before` if ``run``, a predicate, is True for the function that it set.

        Returns False if the module now has another forward. If that forward is a wrapper that was
        set later, it may still call the function, which must then call the original forward.
        """
        found = module.__dict__.get("forward")
        if not isinstance(found, cls) or not run(found.run):
            return False
        module.__dict__.pop("forward")
        if found.before is not None:
            module.__dict__["forward"] = found.before
        return True

    @property
    def own(self) -> Callable[..., Any]:
        """Original forward of the module."""
        module: Any = self._module()
        return self.before or types.MethodType(type(module).forward, module)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.own)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call ``run`` with the arguments of this call in a dictionary by name."""
        given = kwargs
        if args:
            parameters: Mapping[str, inspect.Parameter] = self.__signature__.parameters
            given = dict(self.__signature__.bind(*args, **kwargs).arguments)
            for name, parameter in parameters.items():
                if parameter.kind is parameter.VAR_KEYWORD:
                    given |= given.pop(name, {})
        return self.run(self._module(), self.own, given)

    def __getstate__(self) -> dict[str, Any]:
        return {"module": self._module(), "before": self.before, "run": self.run}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._module = weakref.ref(state["module"])
        self.before, self.run = state["before"], state["run"]
