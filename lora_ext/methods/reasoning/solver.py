"""Solver that computes the answer to a prompt from its text."""

from __future__ import annotations

import re

from lora_ext._checks import require

from .tasks import HashInstance

_PROMPT = re.compile(
    r"Map:\n(?P<edges>(?:\w+=>\w+\n)+)Start: (?P<start>\w+)\n"
    r"(?:Hops: (?P<hops>\d+)|Task: shortest path)\nTarget:"
)


def solve(instance: HashInstance | str) -> str:
    """Return the answer to a prompt.

    In the hop task, k edges are followed from the start (k is the number of hops). In the chain
    task, a breadth-first search finds the nearest end.

    Args:
        instance: prompt, or instance, of which only the prompt is read.

    Raises:
        ValueError: If the text is not a prompt of either task, or has no unique answer.
    """
    prompt = instance if isinstance(instance, str) else instance.prompt
    match = _PROMPT.match(prompt)
    if match is None:
        lines = "'Map:', '<key>=><value>', 'Start: <hash>', 'Hops: <k>' or 'Task: shortest path'"
        raise ValueError(f"solve: prompt: expected lines {lines}, 'Target:', found {prompt!r:.200}")
    successors: dict[str, list[str]] = {}
    for line in match["edges"].splitlines():
        key, value = line.split("=>")
        successors.setdefault(key, []).append(value)
    start = match["start"]
    if match["hops"] is not None:
        place = start
        for _ in range(int(match["hops"])):
            following = successors.get(place, [])
            require(len(following) <= 1, "solve", "prompt", f"one edge from {place}", following)
            if not following:
                break  # Beyond the end of the chain, its last hash is the answer.
            (place,) = following
        return place
    level, seen = [start], {start}
    while level:
        ends = [place for place in level if place not in successors]
        if len(ends) == 1:
            return ends[0]
        require(not ends, "solve", "prompt", "a unique nearest end", ends)
        level = [following for place in level for following in successors[place]]
        level = [place for place in dict.fromkeys(level) if place not in seen]
        seen.update(level)
    raise ValueError(f"solve: prompt: expected a chain that ends, found only cycles from {start}")
