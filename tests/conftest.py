"""Options, marks, and the fixture that routes the ops to one backend."""

import gc
import itertools
import os
import sys
from collections import defaultdict
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

# This must run before torch is imported. Idle OpenMP threads then sleep instead of spinning, which
# leaves the cores to parallel tests.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# Import tests/methods first; otherwise `methods` would later be benchmarks/methods.py.
import methods  # noqa: F401
import pytest
import torch
from backends import BACKENDS, OP_MODULES, Backend, closed, marks_of
from hypothesis import settings
from processes import TwoProcesses

import lora_ext
from lora_ext import ops
from lora_ext.ops import _registration
from lora_ext.serving.layers import _siblings

# This makes benchmarks/common.py importable. The path is appended because benchmarks/ also has
# modules named control and methods, like folders of tests/.
sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))

settings.register_profile("default", deadline=None, print_blob=True)
settings.load_profile("default")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--require-gpu", action="store_true", help="fail CUDA tests that cannot run")
    parser.addoption(
        "--require-emu", action="store_true", help="fail emulator tests that cannot run"
    )
    parser.addoption("--sanitizers", action="store_true", help="also run the tests of `make asan`")
    parser.addoption(
        "--quick",
        type=int,
        metavar="N",
        help="run no slow test and at most N cases of each test, op and backend (`make test`: 1)",
    )
    parser.addoption("--rest", type=int, metavar="N", help="run the tests that --quick N skips")
    parser.addoption(
        "--pairs",
        action="store_true",
        help="run every pair of values of two parameters, but not every combination of three",
    )
    parser.addoption(
        "--demo", type=lambda path: Path(path).resolve(), metavar="DIR",
        help="run the code of the pages on the output of `make demo` in DIR, not on a substitute",
    )  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "cuda: runs on a GPU")
    config.addinivalue_line("markers", "emulated: runs CUDA kernels on the emulator")
    config.addinivalue_line(
        "markers", "slow: runs a compiler, an example, a real model, or more than two seconds"
    )
    config.addinivalue_line(
        "markers", "hosts: also runs with the code paths of other processors (`make hosts`)"
    )
    config.addinivalue_line("markers", "sanitized: compiles all twins or kernels with sanitizers")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Disable the garbage collector during test collection, then freeze all objects that exist."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        gc.freeze()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    quick, rest = config.getoption("--quick"), config.getoption("--rest")
    pairs = config.getoption("--pairs")
    if quick or rest or pairs:
        chosen = _quick(items, quick or rest) if quick or rest else set()
        kept = chosen if quick else (_pairs(items, chosen) if pairs else set(items)) - chosen
        config.hook.pytest_deselected(items=[it for it in items if it not in kept])
        items[:] = [it for it in items if it in kept]
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)  # Slow tests run first.
    if not config.getoption("--sanitizers"):
        skip = pytest.mark.skip(reason="run by `make asan` (--sanitizers)")
        for item in items:
            if item.get_closest_marker("sanitized"):
                item.add_marker(skip)


def _quick(items: list[pytest.Item], cases: int) -> set[pytest.Item]:
    """Return evenly spaced cases of every test that is not slow, per test function, op and backend.

    Every test function that is not slow keeps at least one case on each of its backends, so every
    op and every room is covered. Only ``emu-check``, which `make test` does not build, has no case.
    """
    groups: defaultdict[tuple[Any, ...], list[pytest.Item]] = defaultdict(list)
    for item in items:
        params = getattr(getattr(item, "callspec", None), "params", {})
        checked = getattr(params.get("backend"), "name", None) == "emu-check"
        if not checked and item.get_closest_marker("slow") is None:
            shared = [getattr(params.get(name), "name", None) for name in ("backend", "op")]
            groups[(item.nodeid.partition("[")[0], *shared)].append(item)
    return {
        group[i * len(group) // min(len(group), cases)]
        for group in groups.values()
        for i in range(min(len(group), cases))
    }


def _pairs(items: list[pytest.Item], ran: set[pytest.Item]) -> set[pytest.Item]:
    """Return few items that, together with the items in ``ran``, contain every pair of values of
    any two parameters of each test.

    A parameter is a fixture or one call of ``parametrize``, so a list of cases with several names
    keeps each case. Tests with fewer than three parameters keep all items. The choice is greedy and
    deterministic, and equal in all workers of pytest-xdist.
    """
    tests: defaultdict[str, dict[pytest.Item, set[Any]]] = defaultdict(dict)
    kept = set()
    for item in items:
        ids = getattr(getattr(item, "callspec", None), "_idlist", ())
        if len(ids) < 3:
            kept.add(item)
        else:
            pairs = set(itertools.combinations(enumerate(ids), 2))
            tests[item.nodeid.partition("[")[0]][item] = pairs
    for cases in tests.values():
        left = set().union(*cases.values()).difference(*(cases[it] for it in cases if it in ran))
        while left:
            best = max(cases, key=lambda item: len(cases[item] & left))
            kept.add(best)
            left -= cases[best]
    return kept


def pytest_runtest_setup(item: pytest.Item) -> None:
    # Tests that set no instruction set use the one in LX_ISA, or the best one of this processor.
    lora_ext._C.set_cpu_isa(os.environ.get("LX_ISA", ""))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    given = [m.args[0] for m in metafunc.definition.iter_markers("parametrize")]
    if "backend" not in metafunc.fixturenames or any("backend" in names for names in given):
        return
    params = [pytest.param(b, id=b.name, marks=marks_of(b)) for b in BACKENDS]
    metafunc.parametrize("backend", params, indirect=True)


@pytest.fixture
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Backend]:
    """Run ``lora_ext.ops`` on one backend for the duration of a test."""
    chosen: Backend = request.param
    reason = closed(chosen)
    if reason:
        required = "--require-gpu" if chosen.device == "cuda" else "--require-emu"
        if request.config.getoption(required):
            pytest.fail(f"{required}: {reason}")
        pytest.skip(reason)
    _registration.register(chosen.library)
    if not chosen.is_twin and chosen.device == "cpu":
        seed = int(os.environ.get("LX_SEED", chosen.seed))
        chosen.module.set_seed(seed)
    lora_ext._C.set_cpu_isa(chosen.isa or os.environ.get("LX_ISA", ""))
    for module in OP_MODULES:
        monkeypatch.setattr(module, "_c", getattr(torch.ops, chosen.library))
        if hasattr(module, "direct"):
            monkeypatch.setattr(module, "direct", chosen.module)
    yield chosen
    lora_ext._C.set_cpu_isa("")


@pytest.fixture(scope="session")
def two_processes() -> Iterator[TwoProcesses]:
    """Yield a group of two processes, which start when the first test needs them."""
    pair = TwoProcesses()
    yield pair
    pair.close()


@pytest.fixture
def shared_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make sibling layers share one op on the CPU too, as they do on a GPU."""
    monkeypatch.setattr(_siblings, "SHARE_ON_CPU", True)


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that receives the number of modules of each call of
    ``lora_apply_siblings_``."""
    found: list[int] = []
    op = ops.lora_apply_siblings_

    def counted(y: Any, *args: Any, **how: Any) -> Any:
        found.append(len(y))
        return op(y, *args, **how)

    monkeypatch.setattr(ops, "lora_apply_siblings_", counted)
    return found
