"""Kernel instances that the cases of ``lora-ext gpu-report`` launch, compared with kernels.lock."""

from __future__ import annotations

import fnmatch

import launched
import pytest
from backends import BACKENDS, closed

from lora_ext.cli import _gpu_report, _gpu_variants

EMULATOR = next(b for b in BACKENDS if b.name == "emu")
# Patterns of instances that no case launches, each with the reason.
EXCEPTIONS: dict[str, str] = {}


def test_names_of_the_lock_and_of_symbols_are_equal() -> None:
    names = launched.locked()
    assert "lora_gram_kernel<__half, double>" in names and "lora_plan_kernel" in names
    scope = "lora_ext::(anonymous namespace)::"
    kernels = {
        "lora_plan_kernel(lora_ext::LoraIds, int)": "lora_plan_kernel",
        "void a_kernel<(Product)0, 64>(lora_ext::Gemm)": "a_kernel<(Product)0, 64>",
    }
    for symbol, name in kernels.items():
        assert launched.lock_name(symbol.replace("void ", f"void {scope}")) == name
    symbol = f"void {scope}b_kernel<({scope}Product)0, {scope}WarpTeam>({scope}Row)"
    assert launched.lock_name(symbol) == "b_kernel<(Product)0, WarpTeam>"


@pytest.mark.slow
@pytest.mark.emulated
def test_cases_launch_every_instance_of_the_lock(request: pytest.FixtureRequest) -> None:
    reason = closed(EMULATOR) or launched.lacking()
    if reason and request.config.getoption("--require-emu"):
        pytest.fail(reason)
    elif reason:
        pytest.skip(reason)
    found: set[str] = set()
    wrong = []
    with _gpu_report._backend("emu") as (device, module):
        for case in _gpu_variants.all_cases():
            with launched.recorded(module.__file__) as names:
                check = _gpu_report._check(case, device)
            print(f"{case.op}: {', '.join(sorted(set(names)))}")
            found |= set(names)
            wrong += [] if check["ok"] else [check]
            assert names, f"{case.op} launched no kernel"
    assert not wrong
    missing = {name for name in launched.locked() - found}
    excepted = {n for n in missing if any(fnmatch.fnmatchcase(n, p) for p in EXCEPTIONS)}
    assert sorted(missing - excepted) == []
    assert found <= launched.locked()
    for pattern in EXCEPTIONS:  # An exception that is not needed any more is removed.
        assert fnmatch.filter(missing, pattern), pattern
