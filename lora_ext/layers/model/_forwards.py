"""Replacement of a module's forward that can call the original."""

from __future__ import annotations

import inspect
import types
import weakref
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

#: Function that replaces a forward. Arguments: the module, its forward, the arguments by name.
Run = Callable[[Any, Callable[..., Any], dict[str, Any]], Any]


class Forward:
    """Forward in a module's ``__dict__``; a copy of the module gets a copy of it.

    A hook would not be called by a wrapper that calls ``forward`` directly, as PEFT does.

    Args:
        module: the module, weakly referenced.
        run: function to run; it is copied with the module.
    """

    def __init__(self, module: nn.Module, run: Run):
        self._module = weakref.ref(module)
        self.before: Callable[..., Any] | None = module.__dict__.get("forward")
        self.run = run

    @classmethod
    def put_before(cls, module: nn.Module, run: Run) -> None:
        """Replace the module's forward by one that runs ``run``."""
        module.__dict__["forward"] = cls(module, run)

    @classmethod
    def remove(cls, module: nn.Module, run: Callable[[Run], bool]) -> bool:
        """Undo :meth:`put_before` if the predicate ``run`` accepts its function.

        Returns False if another wrapper has replaced the forward since, so that this one has to
        remain and pass calls on.
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
        """Forward of the module before the replacement."""
        module: Any = self._module()
        return self.before or types.MethodType(type(module).forward, module)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.own)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call ``run`` with the module's arguments by name."""
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
