"""The two tasks, HashHop (planning along one chain) and HashChain (comparing several chains), and
a solver that computes the answer from the prompt.

A hash is a random string. A chain is a sequence of hashes, each of which maps to the next.
"""

from __future__ import annotations

import random
import re
import string
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch.utils.data import Dataset

from lora_ext._checks import require

ALPHABET = string.ascii_lowercase + string.digits
_PROMPT = re.compile(
    r"Map:\n(?P<edges>(?:\w+=>\w+\n)+)Start: (?P<start>\w+)\n"
    r"(?:Hops: (?P<hops>\d+)|Task: shortest path)\nTarget:"
)


@dataclass(frozen=True)
class HashInstance:
    """One question of HashHop or HashChain, with its answer.

    Attributes:
        prompt: text of the question, which ends with ``Target:``.
        target: answer, a hash.
        edges: key and value of each line of the map, in the prompt's order.
        start: first hash of every chain.
        hops: k, number of hops in the hop task; None in the chain task.
        chain_lengths: number of hashes of each chain, including the start, in ascending order.
    """

    prompt: str
    target: str
    edges: tuple[tuple[str, str], ...]
    start: str
    hops: int | None
    chain_lengths: tuple[int, ...]

    @property
    def text(self) -> str:
        """Training text: the prompt, a space and the target."""
        return f"{self.prompt} {self.target}"


class _Task(Dataset[HashInstance]):
    """Dataset of instances. An instance depends only on the settings, the seed and its index."""

    def __init__(self, num_samples: int, hash_length: int, seed: int, needed: int):
        name = type(self).__name__
        require(num_samples >= 0, name, "num_samples", "at least 0", num_samples)
        require(hash_length >= 1, name, "hash_length", "at least 1", hash_length)
        possible = len(ALPHABET) ** hash_length
        # _hashes draws until all hashes are distinct. If at most half of the possible hashes are
        # needed, this takes few draws.
        expected = f"a length with at least {2 * needed} possible hashes, twice those in use"
        found = f"{hash_length}, which gives {possible}"
        require(2 * needed <= possible, name, "hash_length", expected, found)
        self.num_samples, self.hash_length, self.seed = num_samples, hash_length, seed

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> HashInstance:
        """Return one instance; a negative index counts from the end."""
        place = index + self.num_samples if index < 0 else index
        where = type(self).__name__
        fits = 0 <= place < self.num_samples
        require(fits, where, "index", f"one of {self.num_samples} instances", index, IndexError)
        return self._make(random.Random(f"{where} {self.seed} {place}"))

    def text(self, index: int) -> str:
        """Return the training text of an instance: the prompt, a space and the target."""
        return self[index].text

    def _make(self, rng: random.Random) -> HashInstance:
        raise NotImplementedError

    def _hashes(self, rng: random.Random, count: int) -> list[str]:
        found: dict[str, None] = {}
        while len(found) < count:
            found["".join(rng.choices(ALPHABET, k=self.hash_length))] = None
        return list(found)


class HashHop(_Task):
    """Planning task: find the hash that is k hops along a single chain.

    ``k`` is drawn uniformly from ``1 .. max_hops``. If the chain has fewer than k edges, the answer
    is its last hash.

    Args:
        num_samples: number of instances.
        chain_length: C, number of hashes of the chain, which has C - 1 edges.
        max_hops: largest k.
        vary_hops: whether to draw k; if False, k is always ``max_hops``.
        hash_length: number of characters of a hash, from a-z and 0-9.
        seed: seed of the instances.

    Raises:
        ValueError: If an argument is too small, or an instance would need more than half of all
            possible hashes.

    Warns:
        UserWarning: If ``max_hops`` is at least ``chain_length``, so that k can exceed the number
            of edges. The answer is then the only hash without a successor, which can be found
            without following the chain.

    Sources: arXiv 2412.00029, its code (neelr/lora-reasoning-experiments); magicproduct/hash-hop.
    """

    def __init__(
        self,
        num_samples: int,
        chain_length: int = 20,
        max_hops: int = 10,
        vary_hops: bool = True,
        hash_length: int = 4,
        seed: int = 0,
    ):
        require(chain_length >= 2, "HashHop", "chain_length", "at least 2", chain_length)
        require(max_hops >= 1, "HashHop", "max_hops", "at least 1", max_hops)
        super().__init__(num_samples, hash_length, seed, chain_length)
        if max_hops >= chain_length:
            warnings.warn(
                f"HashHop: max_hops: expected less than chain_length={chain_length}, found "
                f"{max_hops}: beyond the end, the answer is the last hash, which can be found as "
                "the only hash without a successor",
                stacklevel=2,
            )
        self.chain_length, self.max_hops, self.vary_hops = chain_length, max_hops, vary_hops

    def _make(self, rng: random.Random) -> HashInstance:
        chain = self._hashes(rng, self.chain_length)
        hops = rng.randint(1, self.max_hops) if self.vary_hops else self.max_hops
        edges = list(pairwise(chain))
        rng.shuffle(edges)
        prompt = _prompt(edges, chain[0], f"Hops: {hops}")
        target = chain[min(hops, self.chain_length - 1)]
        return HashInstance(prompt, target, tuple(edges), chain[0], hops, (self.chain_length,))


class HashChain(_Task):
    """Reasoning task: find the end of the shortest of several chains from one start.

    With ``vary_hash``, the length of the shortest chain is drawn uniformly from all allowed lengths
    except the largest. The lengths of the other chains are drawn from the larger allowed lengths,
    without repetition if there are enough of them. Therefore exactly one chain is the shortest.

    Args:
        num_samples: number of instances.
        chains: allowed lengths. A length is a number of hashes, including the start: length c
            means c - 1 edges. Without ``vary_hash``, the first ``num_chains`` lengths are used.
        num_chains: number of chains per instance.
        vary_hash: whether to draw the lengths.
        hash_length: number of characters of a hash, from a-z and 0-9.
        seed: seed of the instances.

    Raises:
        ValueError: If an argument is too small, there are too few lengths, the shortest chain would
            not be unique, or an instance would need more than half of all possible hashes.

    Sources: arXiv 2412.00029, its code (neelr/lora-reasoning-experiments).
    """

    def __init__(
        self,
        num_samples: int,
        chains: Sequence[int] = (2, 3, 4, 5, 6),
        num_chains: int = 4,
        vary_hash: bool = True,
        hash_length: int = 4,
        seed: int = 0,
    ):
        chains = tuple(chains)
        require(num_chains >= 2, "HashChain", "num_chains", "at least 2", num_chains)
        require(all(c >= 2 for c in chains), "HashChain", "chains", "lengths of at least 2", chains)
        self.chains, self.num_chains, self.vary_hash = chains, num_chains, vary_hash
        lengths = sorted(set(chains))
        if vary_hash:
            require(len(lengths) >= 2, "HashChain", "chains", "2 or more distinct lengths", chains)
            largest = max(self._longest(lengths, shortest) for shortest in lengths[:-1])
        else:
            enough = num_chains <= len(chains)
            require(enough, "HashChain", "num_chains", f"at most {len(chains)} chains", num_chains)
            used = chains[:num_chains]
            unique = used.count(min(used)) == 1
            require(unique, "HashChain", "chains", "exactly one shortest chain", used)
            largest = sum(used)
        super().__init__(num_samples, hash_length, seed, 1 + largest - num_chains)

    def _longest(self, lengths: Sequence[int], shortest: int) -> int:
        """Return the largest possible sum of the chains' lengths if the smallest is ``shortest``;
        ``lengths`` are the allowed lengths in ascending order."""
        above = [c for c in lengths if c > shortest]
        count = self.num_chains - 1
        return shortest + (sum(above[-count:]) if count <= len(above) else count * above[-1])

    def _lengths(self, rng: random.Random) -> tuple[int, ...]:
        if not self.vary_hash:
            return tuple(sorted(self.chains[: self.num_chains]))
        lengths = sorted(set(self.chains))
        shortest = rng.choice(lengths[:-1])
        above = [c for c in lengths if c > shortest]
        count = self.num_chains - 1
        others = rng.sample(above, count) if count <= len(above) else rng.choices(above, k=count)
        return (shortest, *sorted(others))

    def _make(self, rng: random.Random) -> HashInstance:
        lengths = self._lengths(rng)
        assert lengths[0] < lengths[1], f"HashChain: expected one shortest chain, found {lengths}"
        start, *rest = self._hashes(rng, 1 + sum(lengths) - self.num_chains)
        edges: list[tuple[str, str]] = []
        ends: list[str] = []
        for length in lengths:
            nodes, rest = rest[: length - 1], rest[length - 1 :]
            edges += pairwise([start, *nodes])
            ends.append(nodes[-1])
        rng.shuffle(edges)
        prompt = _prompt(edges, start, "Task: shortest path")
        return HashInstance(prompt, ends[0], tuple(edges), start, None, lengths)


def _prompt(edges: Sequence[tuple[str, str]], start: str, question: str) -> str:
    lines = "".join(f"{key}=>{value}\n" for key, value in edges)
    return f"Map:\n{lines}Start: {start}\n{question}\nTarget:"


def solve(instance: HashInstance | str) -> str:
    """Return the answer to a prompt.

    For the hop task, follow k edges from the start (k is the number of hops). For the chain task,
    find the nearest end of a chain by breadth-first search.

    Args:
        instance: prompt, or an instance whose prompt is used.

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
