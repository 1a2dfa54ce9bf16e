"""Check the machine code of every kernel, without a GPU.

    python tools/sass_gate.py [--update] [object ...]
    python tools/sass_gate.py --blackwell [--update] [wheel ...]

The script reads the objects that the build links (or those named), which contain the code that
ships. It checks each kernel and architecture: no stack, no local memory, the rules of
`kernels.toml`, and the numbers in `kernels.lock`, so that reviews show changes of the machine code.

It does not detect bank conflicts, stalls or speed, nor if an instruction is on the hot path. The
`_loop` rules search only between a backward branch and its target. `sass_loops.py` computes what
other rules limit: the bytes that a loop has in flight (`min_inflight`, `min_overlap`), the
cost before it (`max_trips`, `first_bytes`), its instructions (`mma_share`,
`instructions_per_element`), the memory trips of an iteration (`turn_trips`), exponentials that test
for denormals (`guarded_exp`), ways to let the next kernel start before the wait for the previous
one (`early_release`), and what a thread may run before that wait (`forbid_before_wait`; no kernel
writes memory there). `sass_blackwell.py` implements `--blackwell`.
"""

from __future__ import annotations

import argparse
import fnmatch
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import chain, product
from pathlib import Path

import sass_loops
from sass_loops import Instruction

try:
    import tomllib
except ImportError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
RULES, LOCK = ROOT / "kernels.toml", ROOT / "kernels.lock"
RULE_KEYS = {
    "match", "arch", "max_registers", "threads", "dynamic_shared", "min_blocks",
    "require", "forbid", "require_loop", "forbid_loop", "min_inflight", "min_overlap",
    "max_trips", "first_bytes", "mma_share", "instructions_per_element", "turn_trips",
    "guarded_exp", "early_release", "forbid_before_wait",
}  # fmt: skip
# The columns of the table: label, and the opcodes that it counts.
COUNTED = {
    "mma": r"(HMMA|HGMMA|QGMMA)\b",
    "ldsm": r"LDSM\b",
    "async": r"(LDGSTS|UBLKCP|UTMALDG)\b",
    "ldg": r"LDG\b",
    "ldg128": r"LDG\b.*\.128\b",
    "stg": r"STG\b",
    "stg128": r"STG\b.*\.128\b",
    "bar": r"BAR\b",
    "ffma": r"FFMA\b",
    "atomic": r"(ATOM|ATOMG|ATOMS|RED|REDG)\b",
    "pdl": r"(ACQBULK|PREEXIT)\b",
}


WRITES = r"(ST|STG|ATOM|ATOMG|RED|REDG|UBLKCP|UTMA\w*)\b"  # accesses that change global memory

# Address, predicate, opcode, operands.
INSTRUCTION = re.compile(r"\s+/\*([0-9a-f]{4,})\*/\s+(?:@(!?\w+)\s+)?(\S+)\s*([^;]*);")


@dataclass
class Kernel:
    arch: str
    mangled: str
    name: str
    registers: int = 0
    stack: int = 0
    local: int = 0
    shared: int = 0
    code: list[Instruction] = field(default_factory=list)

    @cached_property
    def opcodes(self) -> Counter[str]:
        """Number of occurrences of each opcode."""
        return Counter(one.opcode for one in self.code)

    def loop_opcodes(self) -> set[str]:
        """Return the opcodes between each backward branch and its target."""
        inside: set[int] = set()
        for one in self.code:
            if one.target is not None and one.target < one.address:
                inside.update(range(one.target, one.address + 1))
        return {one.opcode for one in self.code if one.address in inside}

    @cached_property
    def loops(self) -> sass_loops.Loops:
        return sass_loops.loops_of(self.code)

    @property
    def turns(self) -> list[list[Instruction]]:
        """Instructions of one iteration of each main loop."""
        return self.loops.turns

    @cached_property
    def flights(self) -> list[sass_loops.Flight]:
        """Memory traffic in flight in each main loop."""
        return [sass_loops.flight(turn) for turn in self.turns]

    @cached_property
    def costs(self) -> dict[str, float | None]:
        """Values that the rules with the same names limit; None if the kernel has no such code."""
        first = re.search(r"<(float|double|__half|__nv_bfloat16)", self.name)
        size = {"__half": 2, "__nv_bfloat16": 2, "double": 8}.get(first[1] if first else "", 4)
        prologue = sass_loops.prologue(self.code)
        return {
            "max_trips": prologue.trips,
            "first_bytes": prologue.first_bytes,
            "mma_share": sass_loops.mma_share(self.turns),
            "instructions_per_element": sass_loops.instructions_per_element(self.turns, size),
            "turn_trips": sass_loops.turn_trips(self.loops),
            "early_release": sass_loops.early_release(self.code),
        }

    @cached_property
    def before_wait(self) -> set[str] | None:
        """Opcodes that a thread may run before the wait for the previous kernel, if any waits."""
        found = sass_loops.before_wait(self.code)
        return None if found is None else {one.opcode for one in found}

    @cached_property
    def guarded_exp(self) -> int:
        """Number of exponentials that test for denormals."""
        return sass_loops.guarded_exp(self.code)

    def count(self, pattern: str) -> int:
        return sum(n for opcode, n in self.opcodes.items() if re.match(pattern, opcode))


# --- reading --------------------------------------------------------------------------------------
def reader() -> tuple[str, dict[str, str]]:
    """Return cuobjdump, which calls nvdisasm, and its environment; PyPI wheels come first."""
    folders = [p for base in sys.path for p in Path(base or ".").glob("nvidia/*/bin")]
    path = os.pathsep.join([*map(str, folders), os.environ.get("PATH", "")])
    tools = [shutil.which(tool, path=path) for tool in ("cuobjdump", "nvdisasm")]
    if not all(tools):
        raise SystemExit(
            f"sass_gate: expected cuobjdump and nvdisasm, found {tools}; run "
            "`pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm`."
        )
    return str(tools[0]), {**os.environ, "PATH": path}


def short_name(demangled: str) -> str:
    """Return ``f<float, 8>`` for ``void lora_ext::(anonymous namespace)::f<float, 8>(int)``."""
    name = re.sub(r"\(anonymous namespace\)::|^void |lora_ext::", "", demangled)
    depth = 0
    for i, letter in enumerate(name):
        depth += {"<": 1, ">": -1}.get(letter, 0)
        if letter == "(" and depth == 0:
            return name[:i]
    return name


def parse(res_usage: str, sass: str) -> list[Kernel]:
    """Return the kernels in the output of ``cuobjdump -res-usage`` and ``cuobjdump -sass``."""
    kernels: dict[tuple[str, str], Kernel] = {}
    arch = name = ""
    for line in res_usage.splitlines():
        if found := re.match(r"arch = (\S+)", line):
            arch = found[1]
        elif found := re.match(r"\s*Function (\S+):", line):
            name = found[1]
        elif "REG:" in line:
            number = {k: int(v) for k, v in re.findall(r"(\w+)(?:\[\d+\])?:(\d+)", line)}
            kernels[arch, name] = Kernel(
                arch, name, name, number["REG"], number["STACK"], number["LOCAL"], number["SHARED"]
            )
    for line in sass.splitlines():
        if found := re.match(r"arch = (\S+)", line):
            arch = found[1]
        elif found := re.match(r"\s*Function : (\S+)", line):
            name = found[1]
        elif found := INSTRUCTION.match(line):
            address, predicate, opcode, operands = found.groups(default="")
            kernels[arch, name].code.append(
                Instruction(int(address, 16), opcode, operands.strip(), predicate)
            )
        elif found := re.match(r"\s+/\* 0x([0-9a-f]{16}) \*/$", line):  # the upper 64 bits
            code = kernels[arch, name].code
            code[-1] = replace(code[-1], high=int(found[1], 16))
    return list(kernels.values())


def read(objects: Iterable[Path], archs: Iterable[str] = ()) -> list[Kernel]:
    """Return the kernels in these objects, for these architectures or all."""
    cuobjdump, env = reader()
    kernels: list[Kernel] = []
    selected = [["-arch", arch] for arch in archs] or [[]]
    for path, only in product(objects, selected):
        outputs = []
        for flag in ("-res-usage", "-sass"):
            command = [cuobjdump, *only, flag, path]
            run = subprocess.run(command, capture_output=True, text=True, env=env)
            if run.returncode:
                raise SystemExit(f"sass_gate: cuobjdump cannot read {path}: {run.stderr.strip()}")
            outputs.append(run.stdout)
        kernels += parse(*outputs)
    names = "\n".join(kernel.mangled for kernel in kernels)
    plain = subprocess.run(["c++filt"], input=names, capture_output=True, text=True, check=True)
    for kernel, name in zip(kernels, plain.stdout.splitlines(), strict=True):
        kernel.name = short_name(name)
    return kernels


# --- judging --------------------------------------------------------------------------------------
def blocks_per_multiprocessor(registers: int, threads: int, shared: int) -> int:
    """Return the number of blocks that an H100 multiprocessor can hold.

    It has 65,536 registers, 2048 threads and 233,472 bytes of shared memory. Registers are
    allocated per warp in units of 256, from four files of 16,384. The shared memory of each block
    includes 1,024 reserved bytes and is rounded up to 128.
    """
    warps = -(-threads // 32)
    warp_registers = -(-registers * 32 // 256) * 256
    by_registers = 16384 // warp_registers * 4 // warps
    by_shared = 233472 // (-(-(shared + 1024) // 128) * 128)
    return min(32, 64 // warps, by_registers, by_shared)


def judge(kernel: Kernel, rules: list[dict]) -> list[str]:
    """Return the faults of one kernel as messages; an empty list is a pass."""
    wrong = []
    if kernel.stack or kernel.local:
        wrong.append(f"uses {kernel.stack} bytes of stack and {kernel.local} of local memory")
    if spills := kernel.count(r"(LDL|STL)\b"):
        wrong.append(f"{spills} LDL/STL: registers spill, or an array is indexed at run time")
    own = [
        rule
        for rule in rules
        if fnmatch.fnmatchcase(kernel.name, rule["match"])
        and kernel.arch in rule.get("arch", [kernel.arch])
    ]
    most = max((rule.get("guarded_exp", 0) for rule in own), default=0)
    if kernel.guarded_exp > most:
        wrong.append(f"{kernel.guarded_exp} exponentials test for denormals (max. {most})")
    wrong += judge_before_wait(kernel, [WRITES])
    for rule in own:
        if kernel.registers > rule.get("max_registers", 255):
            wrong.append(f"{kernel.registers} registers (max. {rule['max_registers']})")
        if "min_blocks" in rule:
            # From sm_90 on, cuobjdump includes the 1,024 reserved bytes if a kernel uses any.
            static = kernel.shared - (1024 if kernel.shared and kernel.arch >= "sm_90" else 0)
            shared = static + rule.get("dynamic_shared", 0)
            blocks = blocks_per_multiprocessor(kernel.registers, rule["threads"], shared)
            if blocks < rule["min_blocks"]:
                wrong.append(f"{blocks} blocks per multiprocessor (min. {rule['min_blocks']})")
        for key in ("inflight", "overlap"):
            if (least := rule.get(f"min_{key}")) is None:
                continue
            found = [getattr(one, key) for one in kernel.flights]
            if key == "overlap":
                found = [
                    most for most, one in zip(found, kernel.flights, strict=True) if one.tensor
                ]
            if not found:
                wrong.append(f"no main loop to measure min_{key} in")
            elif min(found) < least:
                meant = "in flight" if key == "inflight" else "in flight during a product"
                wrong.append(f"{min(found)} bytes per thread {meant} in a main loop (min. {least})")
        wrong += judge_costs(kernel, rule)
        if "forbid_before_wait" in rule:
            if kernel.before_wait is None:
                wrong.append("forbid_before_wait: expected code to check, found none")
            wrong += judge_before_wait(kernel, rule["forbid_before_wait"])
        for suffix, opcodes in (("", kernel.opcodes), ("_loop", kernel.loop_opcodes())):
            place = " in a loop" if suffix else ""
            for pattern in rule.get("require" + suffix, []):
                if not any(re.match(pattern, opcode) for opcode in opcodes):
                    wrong.append(f"no {pattern}{place}")
            for pattern in rule.get("forbid" + suffix, []):
                bad = {opcode for opcode in opcodes if re.match(pattern, opcode)}
                if bad:
                    wrong.append(f"{', '.join(sorted(bad))}{place}, forbidden by {pattern}")
    return wrong


def judge_before_wait(kernel: Kernel, patterns: list[str]) -> list[str]:
    """Return the faults of the opcodes that may run before the wait for the previous kernel."""
    wrong = []
    for pattern in patterns:
        bad = {opcode for opcode in kernel.before_wait or () if re.match(pattern, opcode)}
        if bad:
            names = ", ".join(sorted(bad))
            wrong.append(f"{names} before the wait for the previous kernel, forbidden by {pattern}")
    return wrong


# Description of each cost in messages, and whether the limit in a rule is a maximum.
COSTS = {
    "max_trips": ("memory trips before the first wide load", True),
    "first_bytes": ("bytes per thread requested before the wait for the previous kernel", False),
    "mma_share": ("percent of a main loop multiplies on tensor cores", False),
    "instructions_per_element": ("instructions for each value that a main loop loads", True),
    "turn_trips": ("memory trips in series in an iteration of a loop that multiplies", True),
    "early_release": ("ways to let the next kernel start before the wait", True),
}


def judge_costs(kernel: Kernel, rule: dict) -> list[str]:
    """Return the costs of a kernel, before and in its main loops, that break one rule."""
    wrong = []
    for key, (what, is_most) in COSTS.items():
        if (bound := rule.get(key)) is None:
            continue
        found = kernel.costs[key]
        if found is None:
            wrong.append(f"{key}: expected code to measure, found none")
        elif found > bound if is_most else found < bound:
            wrong.append(f"{found} {what} ({'max.' if is_most else 'min.'} {bound})")
    return wrong


@dataclass(frozen=True, order=True)
class Verdict:
    """Result of the check of one kernel."""

    name: str
    arch: str
    row: str  # line of the table
    wrong: tuple[str, ...]


def verdicts(rules: list[dict], path: Path) -> list[Verdict]:
    """Return the verdicts on the kernels in one object."""
    return [Verdict(k.name, k.arch, row(k), tuple(judge(k, rules))) for k in read([path])]


def all_verdicts(objects: Iterable[Path], rules: list[dict]) -> list[Verdict]:
    """Return the verdicts on all kernels in these objects, computed by one process per core."""
    ordered = sorted(objects, key=lambda path: -path.stat().st_size)
    with ProcessPoolExecutor(min(len(ordered), len(os.sched_getaffinity(0)))) as pool:
        return sorted(chain.from_iterable(pool.map(partial(verdicts, rules), ordered)))


def load_rules(path: Path) -> list[dict]:
    rules = tomllib.loads(path.read_text()).get("rule", [])
    for rule in rules:
        if unknown := rule.keys() - RULE_KEYS:
            raise SystemExit(f"sass_gate: {path.name} has unknown keys {sorted(unknown)}")
        if "min_blocks" in rule and "threads" not in rule:
            raise SystemExit(f"sass_gate: {path.name}: {rule['match']}: min_blocks needs threads")
    return rules


# --- the table ------------------------------------------------------------------------------------
def row(kernel: Kernel) -> str:
    numbers = [kernel.registers, kernel.shared, len(kernel.code)]
    numbers += [kernel.count(pattern) for pattern in COUNTED.values()]
    flights = ["/".join(str(n) for n in found) or "-" for found in (
        [one.inflight for one in kernel.flights],
        [one.overlap for one in kernel.flights if one.tensor],
    )]  # fmt: skip
    labels = ("trips", "first", "mma", "each", "turn", "early", "guarded")
    costs = zip(labels, [*kernel.costs.values(), kernel.guarded_exp or None], strict=True)
    return (
        f"{kernel.arch:8}" + "".join(f"{n:7}" for n in numbers) + f"  {kernel.name}"
        f"  inflight {flights[0]}" + (f"  overlap {flights[1]}" if flights[1] != "-" else "")
    ) + "".join(f"  {label} {cost:g}" for label, cost in costs if cost is not None)


def header() -> str:
    """Return the header of the table."""
    numbers = ["regs", "shared", "instr", *COUNTED]
    return f"{'arch':8}" + "".join(f"{h:>7}" for h in numbers) + "  kernel"


def compiler(command: str = "python tools/sass_gate.py") -> str:
    """Return the first line of a lock, which names nvcc and the command that writes the lock."""
    run = subprocess.run(
        [os.environ.get("NVCC", "nvcc"), "--version"], capture_output=True, text=True
    )
    found = re.search(r"V(\d+\.\d+\.\d+)", run.stdout)
    return f"# nvcc {found[1] if found else 'unknown'}, -O3; `{command} --update`"


def main() -> int:
    import sass_blackwell  # which imports this module

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "objects", nargs="*", type=Path, help="objects or cubins; default: those of the build"
    )
    parser.add_argument("--update", action="store_true", help="rewrite kernels.lock")
    parser.add_argument("--rules", type=Path, default=RULES)
    parser.add_argument("--blackwell", action="store_true", help="check the code for Blackwell")
    args = parser.parse_args()
    if args.blackwell:
        if args.update and args.objects:
            parser.error("--update compiles the sources; name no wheel")
        return sass_blackwell.main(args.objects, args.update)
    built = sorted(ROOT.glob("build/cmake-*/CMakeFiles/lx_kernels.dir/csrc/cuda/*.cu.o"))
    objects = args.objects or [o for o in built if (ROOT / "csrc/cuda" / o.stem).exists()]
    if not objects:
        raise SystemExit("sass_gate: expected kernels, found none; build with LORA_EXT_CUDA=1")
    rules = load_rules(args.rules)
    try:
        kernels = all_verdicts(objects, rules)
    except FileNotFoundError as error:
        raise SystemExit(f"sass_gate: {error.filename} is needed; install binutils.") from error
    if not args.objects:  # a build of the architectures of wheels
        kernels = [kernel for kernel in kernels if kernel.arch not in sass_blackwell.ARCHS]
    lines = [header(), *(kernel.row for kernel in kernels)]
    print("\n".join(lines))
    failed = 0
    for kernel in kernels:
        for reason in kernel.wrong:
            failed += 1
            print(f"FAIL {kernel.arch} {kernel.name}: {reason}")
    for rule in rules:
        if not any(fnmatch.fnmatchcase(kernel.name, rule["match"]) for kernel in kernels):
            if not args.objects:
                failed += 1
                print(f"FAIL kernels.toml: no kernel is named {rule['match']}")
    if not args.objects:
        wanted = [compiler(), *lines]
        recorded = LOCK.read_text().splitlines() if LOCK.exists() else []
        if args.update:
            LOCK.write_text("\n".join(wanted) + "\n")
        elif not recorded:
            failed += 1
            print("FAIL no kernels.lock; `python tools/sass_gate.py --update` writes it")
        elif recorded[:1] != wanted[:1]:
            print("kernels.lock was written with another nvcc; numbers are not compared.")
        elif recorded != wanted:
            failed += 1
            print("FAIL kernels.lock differs; `python tools/sass_gate.py --update` records:")
            print("\n".join(f"  - {old}" for old in recorded if old not in wanted))
            print("\n".join(f"  + {new}" for new in wanted if new not in recorded))
    note = ""
    if not args.objects:
        wrong, old = sass_blackwell.covered(
            {kernel.name for kernel in kernels}, sass_blackwell.LOCK, ROOT
        )
        failed += len(wrong)
        print("".join(f"FAIL {fault}\n" for fault in wrong), end="")
        note = f"; {old} files have changed since {sass_blackwell.LOCK.name}" if old else ""
    print(f"{len(kernels)} kernels, {failed} failures{note}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
