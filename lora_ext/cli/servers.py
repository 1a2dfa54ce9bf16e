"""The command serve, which runs a server of OpenAI's API."""

from __future__ import annotations

import sys
from argparse import Namespace

from ._output import say


def serve(arguments: Namespace) -> int:
    """Run ``lora-ext serve`` until Ctrl-C."""
    try:
        from lora_ext import server
    except ModuleNotFoundError as error:
        remedy = "run `pip install --no-build-isolation '.[serve]'` in a checkout of lora_ext"
        raise ValueError(f"expected {error.name}, found none: {remedy}") from None
    names = server.Settings.__dataclass_fields__
    server.serve(server.Settings(**{name: getattr(arguments, name) for name in names}), _print_line)
    return 0


def _print_line(line: str) -> None:
    """Print a line and flush it: another process may read the output through a pipe and wait."""
    say(line)
    if sys.stdout is not None:
        sys.stdout.flush()
