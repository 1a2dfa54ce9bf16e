"""The command serve, which runs a server of OpenAI's API."""

from __future__ import annotations

from argparse import Namespace

from ._output import say


def serve(arguments: Namespace) -> None:
    """Serve OpenAI's API over HTTP; `model` selects an adapter.

    Serves chats and completions of a causal LM with continuous batching, or
    embeddings of an embedding model. An adapter is loaded at its first request.
    There is no authentication: listen on the loopback interface, or use a proxy.
    Ctrl-C stops the server.
    """
    try:
        from lora_ext import server
    except ModuleNotFoundError as error:
        remedy = "run `pip install --no-build-isolation '.[serve]'` in a checkout of lora_ext"
        raise ValueError(f"expected {error.name}, found none: {remedy}") from None
    names = server.Settings.__dataclass_fields__
    server.serve(server.Settings(**{name: getattr(arguments, name) for name in names}), say)
