"""Memory traffic of a kernel's loops, computed from the machine code alone.

Every instruction carries its schedule in its bits 105 and up: stall (4 bits), yield (1), the
barrier that its result sets (3), the barrier that its operands set (3), and the barriers that it
waits for (6). A load and the first instruction that needs it can thus be paired without a GPU.

The model: a load takes one memory trip, everything else takes no time. `flight` simulates a loop up
to its steady state, and divides the bytes that an iteration loads by the trips that it waits for.
The result is the bytes per thread in flight at any time. Sixteen loads that are issued together and
then used give 16 times their width. Sixteen loads, each used before the next is issued, give their
width once. If a loop branches, the path that loads most is simulated. `prologue` simulates the code
from the entry of a kernel to its first wide load in the same way.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

# Numbers of iterations that are simulated, and of the last ones that are measured: the first ones
# fill the pipeline. 24 is a multiple of 1, 2, 3, 4, 6 and 8.
TURNS, MEASURED = 40, 24
NO_BARRIER = 7
TENSOR = r"(HMMA|HGMMA|QGMMA)\b"


@dataclass(frozen=True)
class Instruction:
    address: int
    opcode: str
    operands: str
    predicate: str = ""
    high: int = 0  # the upper 64 of the 128 bits

    @cached_property
    def sets(self) -> int:
        """Barrier that the result sets, or ``NO_BARRIER``."""
        return self.high >> 46 & 7

    @cached_property
    def waits(self) -> int:
        """Bit mask of the barriers that must be clear before the instruction is issued."""
        return self.high >> 52 & 63

    @cached_property
    def load_bytes(self) -> int:
        """Bytes that a thread loads from global memory."""
        if not re.match(r"(LDG|LD|LDGSTS)\b", self.opcode):
            return 0
        width = re.search(r"\.(128|64|[US]16|[US]8)\b", self.opcode)
        return int(re.sub(r"\D", "", width[1])) // 8 if width else 4

    @cached_property
    def target(self) -> int | None:
        """Target address of a branch, or None."""
        found = re.search(r"0x([0-9a-f]+)\s*$", self.operands)
        return int(found[1], 16) if self.opcode.startswith("BRA") and found else None

    @cached_property
    def multiplies(self) -> bool:
        """Whether a tensor core runs the instruction."""
        return bool(re.match(TENSOR, self.opcode))

    @cached_property
    def conditional(self) -> bool:
        return bool(self.predicate) or "," in self.operands or "P" in self.operands

    @cached_property
    def ends(self) -> bool:
        """True if the next instruction in memory is not the next one that runs."""
        stops = self.target is not None or re.match(r"(EXIT|RET|BRX|KILL)\b", self.opcode)
        return bool(stops) and not self.conditional


@dataclass(frozen=True)
class Flight:
    inflight: int  # bytes per thread in flight, averaged over the memory trips waited for
    overlap: int  # bytes in flight while a tensor core multiplies
    tensor: bool  # whether a tensor core multiplies
    trips: int  # memory trips per iteration, one after the other


@dataclass(frozen=True)
class Prologue:
    """Loads before the main loops; a value is None if the kernel has no such load or wait."""

    trips: int | None  # memory trips, one after the other, before the first 16-byte load
    first_bytes: int | None  # bytes of 16-byte loads before the wait for the previous kernel


# --- loops ----------------------------------------------------------------------------------------
def successors(code: Sequence[Instruction], at: dict[int, int], i: int) -> list[int]:
    found = [] if code[i].ends or i + 1 == len(code) else [i + 1]
    target = code[i].target
    return found if target not in at else [*found, at[target]]


@dataclass(frozen=True)
class Loops:
    """Natural loops of a kernel: a branch back to a block that dominates the branch closes one."""

    code: Sequence[Instruction]
    starts: list[int]  # index of the first instruction of each basic block
    ends: list[int]
    after: list[list[int]]  # blocks that may follow
    bodies: dict[int, set[int]]  # blocks of each loop, by its head block

    def block_code(self, block: int) -> Sequence[Instruction]:
        return self.code[self.starts[block] : self.ends[block]]

    @cached_property
    def weight(self) -> list[int]:
        """Weight of each block: the bytes that it loads; 16-byte loads count 1.5 times."""
        return [
            sum(one.load_bytes * (2 + (one.load_bytes == 16)) for one in self.block_code(block))
            for block in range(len(self.starts))
        ]

    def turn(self, head: int) -> list[Instruction]:
        """Return one iteration of a loop, along the path that loads most."""
        way = way_that_loads_most(head, self.bodies[head], self.after, self.weight)
        return [one for block in way for one in self.block_code(block)]

    @cached_property
    def main(self) -> list[int]:
        """Heads of the main loops, in order: loops that pass `is_main` and contain no other one."""
        found = [
            head
            for head, body in self.bodies.items()
            if is_main([one for block in body for one in self.block_code(block)])
        ]
        return [
            head for head in found if not any(o in self.bodies[head] for o in found if o != head)
        ]

    @cached_property
    def turns(self) -> list[list[Instruction]]:
        """Instructions of one iteration of each main loop."""
        return [self.turn(head) for head in self.main]

    def outermost(self, head: int) -> int:
        """Return the head of the largest loop around a loop."""
        around = [other for other, body in self.bodies.items() if head in body]
        return max(around, key=lambda other: len(self.bodies[other]))


def loops_of(code: Sequence[Instruction]) -> Loops:
    """Return the natural loops of a kernel."""
    starts, ends, after = blocks_of(code)
    before: list[list[int]] = [[] for _ in starts]
    for k, following in enumerate(after):
        for n in following:
            before[n].append(k)

    # Bit k of dominators[n]: block k is on every path to block n.
    everything = (1 << len(starts)) - 1
    dominators = [1] + [everything] * (len(starts) - 1)
    changed = True
    while changed:
        changed = False
        for k in range(1, len(starts)):
            common = everything
            for p in before[k]:
                common &= dominators[p]
            common |= 1 << k
            changed |= common != dominators[k]
            dominators[k] = common

    bodies: dict[int, set[int]] = {}
    for k, following in enumerate(after):
        for head in following:
            if dominators[k] == everything or not dominators[k] >> head & 1:
                continue  # unreachable, or no back edge
            body, waiting = bodies.setdefault(head, {head}), [k]
            while waiting:
                block = waiting.pop()
                if block not in body:
                    body.add(block)
                    waiting += before[block]
    return Loops(code, starts, ends, after, dict(sorted(bodies.items())))


def main_loops(code: Sequence[Instruction]) -> list[list[Instruction]]:
    """Return the instructions of one iteration of each main loop, in order.

    A main loop loads 16 bytes at a time, or fills a ring by cp.async and waits for its stages, and
    contains no other main loop. One iteration of each inner loop is counted.
    """
    return loops_of(code).turns


def turn_trips(loops: Loops) -> int | None:
    """Return the largest number of serial memory trips in one iteration of an outermost loop.

    Only outermost loops that contain a main loop and multiply on tensor cores count; None if there
    is none. The outermost loop is simulated instead of the main loop, so that a store outside the
    main loop that waits for the next iteration's load is counted.
    """
    turns = [loops.turn(head) for head in {loops.outermost(head) for head in loops.main}]
    return max(
        (flight(turn).trips for turn in turns if any(i.multiplies for i in turn)), default=None
    )


def blocks_of(code: Sequence[Instruction]) -> tuple[list[int], list[int], list[list[int]]]:
    """Return the start and end of each basic block, and the blocks that may follow it."""
    at = {one.address: i for i, one in enumerate(code)}
    heads = {0} | {at[one.target] for one in code if one.target in at}
    heads |= {i + 1 for i, one in enumerate(code[:-1]) if one.target is not None or one.ends}
    starts = sorted(heads)
    block_of = {start: k for k, start in enumerate(starts)}
    ends = [*starts[1:], len(code)]
    return starts, ends, [[block_of[i] for i in successors(code, at, end - 1)] for end in ends]


def way_to(code: Sequence[Instruction], goal: str) -> list[Instruction] | None:
    """Return the instructions from the entry to the first opcode that matches ``goal``.

    The path is the one that loads most and passes no block twice; None if no path leads to a match.
    """
    starts, ends, after = blocks_of(code)
    hits = {
        k: next(i for i in range(start, end) if re.match(goal, code[i].opcode))
        for k, (start, end) in enumerate(zip(starts, ends, strict=True))
        if any(re.match(goal, code[i].opcode) for i in range(start, end))
    }
    best: dict[int, tuple[int, list[int]]] = {}
    open_blocks: set[int] = set()
    stack = [0]
    while stack:
        block = stack[-1]
        following = [] if block in hits else after[block]
        if block not in open_blocks:
            open_blocks.add(block)
            stack += [n for n in following if n not in open_blocks]
            continue
        stack.pop()
        if block in best:
            continue
        ways = [best[n] for n in following if n in best]
        if block in hits:
            ways.append((0, []))
        if ways:
            most, blocks = max(ways, key=lambda way: way[0])
            last = hits.get(block, ends[block])
            loads = sum(one.load_bytes for one in code[starts[block] : last])
            best[block] = most + loads, [block, *blocks]
    if 0 not in best:
        return None
    way = best[0][1]
    return [one for k in way for one in code[starts[k] : hits[k] + 1 if k in hits else ends[k]]]


def way_that_loads_most(
    head: int, body: set[int], after: Sequence[Sequence[int]], weight: Sequence[int]
) -> list[int]:
    """Return the blocks of one iteration along the path with the largest weight.

    The path leads from the head to a block that branches back to it.
    """
    best: dict[int, tuple[int, list[int]]] = {}  # weight and blocks of the path from a block
    open_blocks: set[int] = set()
    stack = [head]
    while stack:
        block = stack[-1]
        if block not in open_blocks:
            open_blocks.add(block)
            stack += [n for n in after[block] if n in body and n not in open_blocks]
            continue
        stack.pop()
        if block in best:
            continue
        ways = [best[n] for n in after[block] if n in best and n != head]
        if head in after[block]:
            ways.append((0, []))
        if ways:
            most, blocks = max(ways, key=lambda way: way[0])
            best[block] = most + weight[block], [block, *blocks]
    return best[head][1]


def is_main(loop: Sequence[Instruction]) -> bool:
    opcodes = "\n".join(one.opcode for one in loop)
    ring = re.search(r"^LDGSTS\b.*128\b", opcodes, re.M) and re.search(r"^DEPBAR\b", opcodes, re.M)
    return bool(ring or re.search(r"^LDG\b.*\.128\b", opcodes, re.M))


# --- flight ---------------------------------------------------------------------------------------
def flight(turn: Sequence[Instruction]) -> Flight:
    """Return the memory traffic that a loop has in flight in its steady state."""
    clock, began, overlap = 0, 0, 0
    lands: dict[int, int] = {}  # time at which the load that sets a barrier arrives
    groups: list[int] = []  # time at which each group of cp.async arrives
    open_group, group_barrier = 0, NO_BARRIER
    flying: list[tuple[int, int]] = []  # (time of arrival, bytes)
    # the few instructions that the model gives a time, or that overlap with loads
    timed = [i for i in turn if i.waits or i.load_bytes or i.multiplies or "DEPBAR" in i.opcode]
    for number in range(TURNS):
        if number == TURNS - MEASURED:
            began = clock
        for one in timed:
            if one.waits:
                clock = max([clock, *(t for b, t in lands.items() if one.waits >> b & 1)])
            if one.opcode == "LDGDEPBAR":
                groups.append(open_group)
                open_group, group_barrier = 0, one.sets
            elif one.opcode.startswith("DEPBAR") and group_barrier != NO_BARRIER:
                if found := re.match(r"SB(\d), 0x([0-9a-f]+)", one.operands):
                    landed = groups[: len(groups) - int(found[2], 16)]
                    clock = max([clock, *landed])
            if size := one.load_bytes:
                flying.append((clock + 1, size))
                if one.opcode.startswith("LDGSTS"):
                    open_group = clock + 1
                elif one.sets != NO_BARRIER:
                    lands[one.sets] = clock + 1
            if flying and number >= TURNS - MEASURED and one.multiplies:
                flying = [(when, size) for when, size in flying if when > clock]
                overlap = max(overlap, sum(size for _, size in flying))
    size = sum(one.load_bytes for one in turn)
    trips = clock - began
    tensor = any(one.multiplies for one in turn)
    inflight = size * MEASURED // trips if trips else size * MEASURED
    return Flight(inflight, overlap, tensor, -(-trips // MEASURED))


# --- prologue -------------------------------------------------------------------------------------
WIDE = r"(LDG|LDGSTS)\b.*\.128\b"


def prologue(code: Sequence[Instruction]) -> Prologue:
    """Return the memory trips before the first wide load, and the bytes loaded before the wait for
    the previous kernel."""
    to_load, to_wait = way_to(code, WIDE), way_to(code, r"ACQBULK\b")
    first = None
    if to_wait is not None:
        first = sum(one.load_bytes for one in to_wait if re.match(WIDE, one.opcode))
    return Prologue(None if to_load is None else trips(to_load), first)


def trips(way: Sequence[Instruction]) -> int:
    """Return the number of serial memory trips before the last instruction of a path is issued."""
    clock = 0
    lands: dict[int, int] = {}
    for one in way:
        for barrier in range(6):
            if one.waits >> barrier & 1:
                clock = max(clock, lands.get(barrier, 0))
        if one.load_bytes and one.sets != NO_BARRIER:
            lands[one.sets] = clock + 1
    return clock


def early_release(code: Sequence[Instruction]) -> int | None:
    """Return the number of instructions before the wait for the previous kernel with which a thread
    can let the next kernel start: triggers, ends and branches. None if the kernel does not wait."""
    found = [re.match(r"(ACQBULK|PREEXIT|EXIT|BRA|BRX|JMP|CALL|RET)\b", one.opcode) for one in code]
    opcodes = [one[1] for one in found if one]
    return opcodes.index("ACQBULK") if "ACQBULK" in opcodes else None


def before_wait(code: Sequence[Instruction]) -> list[Instruction] | None:
    """Return the instructions that a thread may run before the wait for the previous kernel.

    They are on paths from the entry without a wait. The result is None if no instruction waits.
    """
    if not any(re.match(r"ACQBULK\b", one.opcode) for one in code):
        return None
    at = {one.address: i for i, one in enumerate(code)}
    found: set[int] = set()
    open_places = [0]
    while open_places:
        i = open_places.pop()
        if i in found or (re.match(r"ACQBULK\b", code[i].opcode) and not code[i].predicate):
            continue
        found.add(i)
        open_places += successors(code, at, i)
    return [code[i] for i in sorted(found)]


def guarded_exp(code: Sequence[Instruction]) -> int:
    """Return the number of exponentials that test for denormals, as ``__expf`` does."""
    return sum(one.opcode.startswith("FSETP.GEU") and ", -126," in one.operands for one in code)


# --- cost of an iteration -------------------------------------------------------------------------
def mma_share(turns: Sequence[Sequence[Instruction]]) -> int | None:
    """Return the lowest percentage of tensor-core instructions in a main loop that has any."""
    counts = [(sum(i.multiplies for i in turn), len(turn)) for turn in turns]
    return min((100 * mma // every for mma, every in counts if mma), default=None)


def instructions_per_element(turns: Sequence[Sequence[Instruction]], size: int) -> float | None:
    """Return the instructions of an iteration per value of ``size`` bytes that it loads.

    The result is the largest number over all main loops that do not use tensor cores.
    """
    found = [
        len(turn) * size / sum(one.load_bytes for one in turn)
        for turn in turns
        if not any(one.multiplies for one in turn)
    ]
    return round(max(found), 1) if found else None
