"""Which base model an adapter was trained on, as far as names tell."""

from __future__ import annotations

import re
import warnings
from typing import Any

# The Hub's cache, whose last component is a revision: models--org--name/snapshots/<revision>.
_CACHED = re.compile(r"models--(?:.+--)?(.+)")
# Another storage of the same weights, on which adapters are often trained.
_STORED = re.compile(r"[-_.](unsloth[-_.])?(bnb[-_.][48]bit|awq|gptq|fp8)$")


class BaseModels:
    """The base models of adapters that come together, by ``base_model_name_or_path``.

    The first name is what the others are compared with; a name that is unknown says nothing.

    Args:
        expected: the name of the model, or None.
    """

    def __init__(self, expected: Any = None):
        self._first: str | None = None
        self._met: set[str | None] = set()
        self.meet("", expected, 1)

    def meet(self, where: str, name: Any, stacklevel: int) -> None:
        """Warn if ``name`` is another model than the first; once for each name.

        Args:
            where: opens the message: caller and argument.
            name: as a configuration has it, which nobody has checked.
            stacklevel: as for ``warnings.warn``, of the function that calls this one.
        """
        short = _short(name)
        if short is None or short in self._met:
            return
        self._met.add(short)
        if self._first is None:
            self._first = name
            return
        warnings.warn(
            f"{where}: expected adapters of one base model, found base_model_name_or_path "
            f"{self._first!r:.200} and {name!r:.200}: what comes out means nothing, unless these "
            "are two names of one model",
            stacklevel=stacklevel + 1,
        )


def model_name(model: Any) -> Any:
    """What PEFT would write into ``base_model_name_or_path``; None where the model has no name."""
    return getattr(model, "name_or_path", None)


def _short(name: Any) -> str | None:
    """What a folder and a name on the Hub share: the last component; None where that is nothing."""
    parts = re.split(r"[/\\]", name) if isinstance(name, str) else []
    parts = [part for part in parts if part not in ("", ".", "..")]
    if not parts:
        return None
    cached = next((found for part in parts if (found := _CACHED.fullmatch(part))), None)
    return _STORED.sub("", (cached[1] if cached else parts[-1]).casefold())
