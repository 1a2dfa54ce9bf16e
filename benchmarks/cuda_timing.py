"""Timing on a GPU: CUDA graphs, replayed between events. Not yet run on a GPU."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from common import Call, Timing

REPLAYS = 20


def interleaved_graphs(calls: Mapping[str, Call], rounds: int = 10) -> dict[str, Timing]:
    """Time calls as :func:`common.interleaved` does; each call is a graph that is replayed 20 times
    per round."""
    stream = torch.cuda.Stream()
    graphs: dict[str, torch.cuda.CUDAGraph] = {}
    for name, call in calls.items():
        with torch.cuda.stream(stream):
            for _ in range(3):  # creates library handles and workspaces before the capture
                call()
        stream.synchronize()
        graphs[name] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graphs[name], stream=stream):
            call()
    found: dict[str, list[float]] = {name: [] for name in calls}
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for graph in graphs.values():
        graph.replay()
    for index in range(rounds):
        for name in list(graphs) if index % 2 == 0 else list(reversed(graphs)):
            start.record()
            for _ in range(REPLAYS):
                graphs[name].replay()
            end.record()
            end.synchronize()
            found[name].append(start.elapsed_time(end) * 1e-3 / REPLAYS)
    return {name: Timing.of(seconds) for name, seconds in found.items()}
