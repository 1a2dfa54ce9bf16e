"""The command that answers requests: serve."""

from __future__ import annotations

import sys
from argparse import Namespace

from ._output import say


def serve(arguments: Namespace) -> int:
    """``lora-ext serve``: until Ctrl-C."""
    try:
        from lora_ext import server
    except ModuleNotFoundError as error:
        remedy = "run `pip install --no-build-isolation '.[serve]'` in a checkout of lora_ext"
        raise ValueError(f"expected {error.name}, found none: {remedy}") from None
    names = server.Settings.__dataclass_fields__
    server.serve(server.Settings(**{name: getattr(arguments, name) for name in names}), _tell)
    return 0


def _tell(line: str) -> None:
    """Say it at once: who reads a pipe waits for it."""
    say(line)
    if sys.stdout is not None:
        sys.stdout.flush()
