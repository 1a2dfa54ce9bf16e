"""Whether a graph is being made of the code that runs."""

import torch


def compiles() -> bool:
    """Whether this code is compiled or exported.

    ``torch.compiler.is_compiling`` is true in every thread while one of them compiles: what another
    thread computes meanwhile must not be taken for a part of the graph.
    """
    return torch.compiler.is_dynamo_compiling() or torch.compiler.is_exporting()
